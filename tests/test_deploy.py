"""`ctrlrl deploy` with real processes. Limits of time are wide, since tests run on busy machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ctrlrl
from ctrlrl.cli.main import run as command
from ctrlrl.deploy import process, simulated
from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.controller import ControllerConfig, replay
from ctrlrl.deploy.deployment import Outcome, free_folder, start, task_of
from ctrlrl.deploy.process import ProcessConfig
from ctrlrl.deploy.safety import FAULTS, SafetyConfig
from ctrlrl.deploy.simulated_config import SimulatedConfig
from ctrlrl.deploy.ticks import read_ticks
from ctrlrl.errors import UsageError
from tests.runs import SMALL

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
from ctrlrl.training.export_run import export_run

RIG = "PendulumSwingUp-v0"
PATIENT = [
    *("--safety.max-age", "20", "--safety.late", "100000", "--safety.freeze", "0", "--sim.watchdog", "10"),
    *("--runtime", "numpy"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    settings = {**SMALL, "steps": 70, "eval_every": 70}
    run = ctrlrl.train("sac", env=RIG, preset=None, out=str(folder / "run"), **settings)
    return export_run(run.path, folder / "bundle")


def test_a_deployment_from_the_command_line(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["deploy", str(bundle.path), "--robot", "pendulum", "--driver", "sim", "--episodes", "1", "--out", str(out)]
    assert command([*words, *PATIENT]) == 0
    said = capsys.readouterr().out
    assert "seed 10000: return" in said and "500 steps" in said
    assert "training's evaluation of the same seeds: " in said and "limits that held back: " in said
    page = (out / "report.html").read_text()
    assert "no fault" in page and "against training" in page and "<svg" in page and "effort of hinge" in page
    told = json.loads((out / "deployment.json").read_text())
    assert told["controller"]["phase"] == "stop" and told["controller"]["fault"] is None
    assert told["episodes"][0]["length"] == 500 and told["robot"]["commands"] >= 100
    again = replay(bundle, out / "log")
    assert again.ticks >= 100 and again.action < 1e-6
    log = dict(np.load(out / "robot.npz", allow_pickle=False))
    drove = log["command mode"] == 1
    assert np.isfinite(log["command target"][drove]).all() and np.abs(log["command target"]).max() <= 0.25 + 1e-9
    assert command([*words, *PATIENT]) == 2 and "not empty" in capsys.readouterr().err


def test_a_fault_is_told_of_and_ends_the_deployment(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["deploy", str(bundle.path), "--episodes", "3", "--out", str(out), *PATIENT, "--safety.freeze", "0.2"]
    assert command([*words, "--sim.freeze", "0.5"]) == 4
    said = capsys.readouterr().out
    assert "given up" in said and "FAULT frozen: hinge is at" in said and FAULTS["frozen"] in said
    assert "fault: frozen" in (out / "report.html").read_text()
    assert len(json.loads((out / "deployment.json").read_text())["episodes"]) == 1


def test_over_zeromq(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("zmq")
    words = ["deploy", str(bundle.path), "--episodes", "1", "--out", str(tmp_path / "out"), *PATIENT]
    assert command([*words, "--sim.transport", "zmq", "--seconds", "1"]) == 0
    assert json.loads((tmp_path / "out" / "deployment.json").read_text())["controller"]["acted"] == 50


def robot(out: Path, **options: Any) -> tuple[subprocess.Popen[bytes], str]:
    config = SimulatedConfig(task=RIG, seeds=(1,), out=str(out), watchdog=1.0, **options)
    body = start("ctrlrl.deploy.simulated", simulated.to_options(config))
    assert body.stdout is not None
    return body, json.loads(body.stdout.readline())["address"]


def controller(bundle: Bundle, address: str, log: Path, **changes: Any) -> ProcessConfig:
    safety = SafetyConfig(max_age=20.0, late=100_000, freeze=0.0)
    given = {"driver": "udp", "address": address, "log": str(log), "runtime": "numpy", **changes}
    control = ControllerConfig(ramp=0.0, settle=0.1, safety=safety)
    return ProcessConfig(bundle=str(bundle.path), seal=bundle.seal, controller=control, **given)


def wait_until_driven(log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if read_ticks(log)[1]["acted"].sum() > 10:
                return
        except (UsageError, ValueError):
            pass
        time.sleep(0.05)
    raise AssertionError("nothing was driven")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_controller_that_is_stopped_or_killed_leaves_a_safe_robot(bundle: Bundle, tmp_path: Path, how: int) -> None:
    body, address = robot(tmp_path)
    try:
        mind = start("ctrlrl.deploy.process", process.to_options(controller(bundle, address, tmp_path / "log")))
        wait_until_driven(tmp_path / "log")
        mind.send_signal(how)
        said, _ = mind.communicate(timeout=60)
        body.wait(60)
        log = dict(np.load(tmp_path / "robot.npz", allow_pickle=False))
        if how == signal.SIGINT:
            told = json.loads(said.splitlines()[-1])
            assert (mind.returncode, told["phase"], told["fault"]) == (0, "stop", None)
            assert log["command mode"][-1] == 0 and (log["command mode"] == 0).sum() >= 5
        else:
            assert json.loads(said) == {"kind": "started"} and 2 in log["mode mode"]  # its own watchdog held it
            held = log["mode time"][log["mode mode"] == 2][0]
            last = log["command time"][-1]
            assert 1.0 <= held - last < 5.0
        _, ticks = read_ticks(tmp_path / "log")
        assert len(ticks) > 10  # what was logged is there, even after a kill
    finally:
        body.kill()
        body.wait()


def test_what_a_controllers_process_refuses(bundle: Bundle, tmp_path: Path) -> None:
    wrong = controller(bundle, "127.0.0.1:9", tmp_path / "log", connect=0.2)
    for change, what in (
        ({"seal": "0" * 64}, "is not the bundle any more that was checked"),
        ({}, "no robot answers at 127.0.0.1:9 within 0.2 s"),
        ({"driver": "ros"}, "no driver 'ros'"),
    ):
        options = json.loads(process.to_options(wrong)) | change
        mind = start("ctrlrl.deploy.process", json.dumps(options).encode())
        said, _ = mind.communicate(timeout=60)
        assert mind.returncode == 2 and what in json.loads(said)["message"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--robot", "go1"], "is for the robot pendulum, not go1"),
        (["--driver", "udp"], "--driver udp needs --address"),
        (["--driver", "udp", "--address", "127.0.0.1:9", "--record"], "--record is for --driver sim"),
        (["--address", "127.0.0.1:9"], "--address is of a real robot"),
        (["--episodes", "0"], "--episodes must be at least 1"),
        (["--sim.loss", "1.5"], "--sim.loss must be from 0 to less than 1"),
        (["--env-kwargs", "{"], "--env-kwargs is no JSON"),
        (["--env-kwargs", "[1]"], "--env-kwargs must be a JSON object"),
        (["--command", "1", "--episodes", "1"], r"--command takes 0 numbers"),
        (["--task", "Ant-v5"], "is no task with a robot"),
    ],
)
def test_what_cannot_be_deployed(
    words: list[str], what: str, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["deploy", str(bundle.path), "--out", str(tmp_path / "out"), *words]) == 2
    assert what in capsys.readouterr().err


def test_policies_whose_actions_are_not_of_joints_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**SMALL, "steps": 20, "learning_starts": 20, "env_kwargs": {"action": "tool"}, "eval_every": 0}
    run = ctrlrl.train("sac", env="PandaReach-v0", preset=None, out=str(tmp_path / "run"), **settings)
    assert command(["export", str(run.path), "--checkpoint", "last", "--out", str(tmp_path / "bundle")]) == 0
    assert "controller  cannot run it: how PandaReach-v0 makes commands to joints" in capsys.readouterr().out
    deployed = ["deploy", str(tmp_path / "bundle"), "--out", str(tmp_path / "out")]
    for words in ([], ["--env-kwargs", '{"action": "tool"}'], ["--driver", "udp", "--address", "127.0.0.1:9"]):
        assert command([*deployed, *words]) == 2
        assert "train with actions of joints (on the Panda's tasks without" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_real_time_scheduling_that_is_not_permitted(bundle: Bundle, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may do everything")
    body, address = robot(tmp_path)
    try:
        config = controller(bundle, address, tmp_path / "log", priority=50)
        said, _ = start("ctrlrl.deploy.process", process.to_options(config)).communicate(timeout=60)
        assert "leave out --priority" in json.loads(said)["message"]
    finally:
        body.kill()
        body.wait()


def test_a_bundle_names_no_module_or_file_that_is_used(bundle: Bundle) -> None:
    from dataclasses import replace

    def bundle_of(**changes: Any) -> Any:
        class Other:
            manifest = replace(bundle.manifest, **changes)

        return Other()

    assert task_of(bundle, None, None) == (RIG, {})
    with pytest.raises(UsageError, match="say --task os:Rig-v0"):
        task_of(bundle_of(task="os:Rig-v0"), None, None)
    assert task_of(bundle_of(task="os:Rig-v0"), RIG, None)[0] == RIG
    folder = bundle_of(provenance={"env_kwargs": {"folder": "/tmp/model"}})
    with pytest.raises(UsageError, match="texts may be files, which are not read"):
        task_of(folder, None, None)
    assert task_of(folder, None, {"folder": "/tmp/model"})[1] == {"folder": "/tmp/model"}
    with pytest.raises(UsageError, match="texts may be files"):
        task_of(bundle_of(provenance={"env_kwargs": {"a": ["model.xml"]}}), None, None)
    for name, plain in (("/etc/x", "_etc_x"), ("../../x", "______x"), ("", "policy"), ("go1", "go1")):
        assert free_folder(name).parent == Path("deployments") and free_folder(name).name.startswith(plain + "-")


@pytest.mark.parametrize("address", ["tcp://*:18765", "tcp://0.0.0.0:18765", "pgm://eth0;239.0.0.1:5555"])
def test_a_robot_over_zeromq_is_for_this_machine_unless_told(address: str) -> None:
    config = SimulatedConfig(task=RIG, seeds=(1,), transport="zmq", address=address)
    with pytest.raises(UsageError, match=r"--allow-remote|begins with ipc"):
        next(iter(simulated.serve(config)))


def test_a_controller_whose_parent_goes_away_stops(bundle: Bundle, tmp_path: Path) -> None:
    body, address = robot(tmp_path)
    try:
        options = process.to_options(controller(bundle, address, tmp_path / "log"))
        (tmp_path / "options").write_bytes(options)
        program = (
            "import subprocess, sys, time; options = open(sys.argv[1]); "
            "subprocess.Popen([sys.executable, '-m', 'ctrlrl.deploy.process'], stdin=options); "
            "time.sleep(600)"
        )
        parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "options")], stdout=subprocess.DEVNULL)
        wait_until_driven(tmp_path / "log")
        parent.kill()
        parent.wait()
        body.wait(60)
        log = dict(np.load(tmp_path / "robot.npz", allow_pickle=False))
        assert log["command mode"][-1] == 0 and 2 not in log["mode mode"]  # told to be safe, not left alone
    finally:
        body.kill()
        body.wait()


def test_deployment_and_training_are_compared_on_the_same_seeds() -> None:
    episodes = [
        {"seed": 1, "return": 9.0, "given up": False},
        {"seed": 2, "return": 7.0, "given up": True},
        {"seed": 3, "return": 5.0, "given up": False},
    ]
    trained = {"seeds": [3, 2, 1], "returns": [6.0, 8.0, 10.0]}
    outcome = Outcome(controller={}, episodes=episodes, trained=trained)
    assert outcome.compared == ([9.0, 5.0], [10.0, 6.0]) and outcome.returns == [9.0, 5.0]
    assert Outcome(controller={}, episodes=episodes, trained={"mean_return": 3.0}).compared == ([], [])
