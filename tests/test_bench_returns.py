"""scripts/bench_returns.py: trainings side by side, interrupted and gone on with, and what is written about them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ctrlrl.errors import UsageError
from ctrlrl.runs.peers import load_peers
from tests.scripts import SCRIPTS, loaded

SCRIPT = SCRIPTS / "bench_returns.py"
TINY = "--learning-starts 50 --agent.hidden 8 --agent.batch-size 8"


def start(words: str) -> subprocess.Popen[str]:
    here = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, str(SCRIPT), *words.split()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=here)


def bench(words: str) -> tuple[int, str, str]:
    process = start(words)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def script() -> Iterator[ModuleType]:
    """The script as a module, and `peers` from beside it."""
    with loaded("bench_returns") as module:
        yield module


def test_cells_run_are_skipped_fail_alone_and_are_not_mixed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask = f"--algo sac --env Pendulum-v1 --seeds 0 1 --steps 200 --eval-every 100 --eval-episodes 2 --out {out}"
    code, text, err = bench(f"{ask} --jobs 2 -- {TINY}")
    assert code == 0, err
    assert text.startswith('preset pendulum: {"learning_starts": 1000, ')
    assert "-- --no-preset turns it off" in text
    assert text.count("step 200 of 200, return -") == 2

    results = load_peers(out / "returns.json")  # a later run can be compared with this one
    assert [(run.algo, run.env, run.seed) for run in results.runs] == [
        ("sac (ctrlrl)", "Pendulum-v1", seed) for seed in (0, 1)
    ]
    assert [[one.step for one in run.evaluations] for run in results.runs] == [[100, 200]] * 2
    assert len(results.runs[0].evaluations[0].returns) == 2
    assert len(results.random["Pendulum-v1"]) == 20
    assert -2000 < results.random["Pendulum-v1"].mean() < -900  # 1,200 or so
    assert (out / "comparison.html").exists() and (out / "returns.svg").exists()
    config = json.loads((out / "sac-Pendulum-v1-1" / "config.json").read_text())
    assert (config["threads"], config["seed"], config["video"], config["preset"]) == (1, 1, False, "pendulum")

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for other, said in (
        ("--agent.gamma 0.9", "agent.gamma is 0.99 there, 0.9 asked for"),
        ("--no-preset", "preset is"),
    ):
        code, _, err = bench(f"{ask} -- {TINY} {other}")
        assert code == 2 and f"{out}/sac-Pendulum-v1-0 holds a run with other settings: " in err and said in err
    code, _, err = bench(f"{ask} --peers {tmp_path}/none.json -- {TINY}")
    assert code == 2 and "none.json cannot be read" in err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    # One cell cannot go on, for want of its checkpoints; a third one runs all the same, and the finished one stays.
    status = out / "sac-Pendulum-v1-0" / "status.json"
    status.write_text(status.read_text().replace("finished", "interrupted"))
    for checkpoint in (out / "sac-Pendulum-v1-0" / "checkpoints").iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    code, text, err = bench(f"{ask.replace('0 1', '0 1 2')} --jobs 1 -- {TINY}")
    assert code == 1
    assert "sac-Pendulum-v1-0: FAILED with exit code 2" in text and "sac-Pendulum-v1-2: step 200 of 200" in text
    assert "sac-Pendulum-v1-1: step" not in text
    assert f"failed with exit code 2; the end of {out}/sac-Pendulum-v1-0.log" in err
    assert "has no checkpoint: nothing was trained yet" in err
    complete = [one["complete"] for one in json.loads((out / "returns.json").read_text())["runs"]]
    assert complete == [False, True, True]

    (out / "comparison.html").unlink()
    code, text, _ = bench(f"{ask} --only-report -- {TINY}")  # of a failed cell, too, what there is
    assert code == 0 and "step 200 of 200" not in text and (out / "comparison.html").exists()


def test_ctrl_c_stops_all_with_checkpoints_and_the_same_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        f"--env Pendulum-v1 --seeds 0 1 --steps 800 --eval-every 800 --eval-episodes 1 --out {out} --jobs 2 -- {TINY}"
    )
    process = start(words)
    statuses = [out / f"sac-Pendulum-v1-{seed}" / "status.json" for seed in (0, 1)]
    until = time.monotonic() + 60
    while not all(list(path.parent.glob("checkpoints/step-*")) for path in statuses) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping 2 trainings" in text and "go on with the same command: " in text and words in text
    for path in statuses:
        status = json.loads(path.read_text())
        assert status["state"] == "interrupted" and status["step"] < 800
        assert list((path.parent / "checkpoints").glob("step-*"))

    code, text, err = bench(words)
    assert code == 0, err
    assert text.count("step 800 of 800, return -") == 2
    for path in statuses:
        assert len(json.loads((path.parent / "provenance.json").read_text())["sessions"]) == 2
        assert "ctrlrl resume" in (out / f"{path.parent.name}.log").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-- --seed 3", "--seed is this script's to give"),
        ("-- --threads=2", "--threads=2 is this script's to give"),
        ("-- --eval_every 5", "--eval_every is this script's to give"),
        ("--jobs 0", "--jobs must be at least 1, got 0"),
        ("--peer sb3 -- --agent.gamma 0.9", "peers run with their defaults"),
        ("--peer sb3 --peers x.json", "--peers compares runs of ours"),
        ("--peer torchrl", "invalid choice: 'torchrl'"),
        ("--peer sb3 --algo droq", "sb3 trains sac, td3, ddpg, ppo, not droq"),
        ("-- --agent.gama 0.9", "Unrecognized options"),
    ],
)
def test_bad_flags_start_nothing(
    words: str, message: str, tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(f"--env Pendulum-v1 --seeds 0 --out {tmp_path}/out {words}".split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_cell_is_named_and_single_threaded(script: ModuleType, tmp_path: Path) -> None:
    cell = script.OwnCell("sac", "some.module:My/Env-v0", 3, 5, tmp_path, ())
    assert cell.name == "sac-some.module-My-Env-v0-3"
    command = cell.command()
    assert command[:5] == [sys.executable, "-m", "ctrlrl", "train", "sac"]
    assert command[command.index("--threads") + 1] == "1"
    assert sys.modules["cells"].ONE_THREAD["OMP_NUM_THREADS"] == "1"


def test_what_was_stopped_before_its_first_checkpoint_starts_anew(script: ModuleType, tmp_path: Path) -> None:
    cell = script.OwnCell("sac", "Pendulum-v1", 0, 5, tmp_path, ())
    (cell.path / "checkpoints").mkdir(parents=True)
    for name in ("provenance.json", "config.json"):
        assert cell.state() == "new"
        (cell.path / name).write_text('{"algo": "sac", "env": "Pendulum-v1"}')
    assert cell.state() == "started"
    assert "train" in cell.command() and not cell.path.exists()
    (cell.path / "checkpoints" / "step-000000000000").mkdir(parents=True)
    (cell.path / "config.json").write_text('{"algo": "sac", "env": "Pendulum-v1"}')
    assert cell.command()[3:] == ["resume", str(cell.path)] and cell.path.exists()
    other = script.OwnCell("sac", "Pendulum-v1", 1, 5, tmp_path, ())
    other.path.mkdir()
    (other.path / "thesis.tex").touch()
    assert "train" in other.command() and (other.path / "thesis.tex").exists()  # `ctrlrl train` refuses it


# ---- Peers ----------------------------------------------------------------------------------------------------------


def test_a_peer_runs_by_the_same_scheduling(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stable-Baselines3 is there for tests, so its own environment is not made here."""
    for module in (script, sys.modules["cells"]):
        monkeypatch.setattr(module, "python_of", lambda peer: Path(sys.executable))
    ask = f"--peer sb3 --env Pendulum-v1 --seeds 4 --steps 40 --eval-every 20 --eval-episodes 2 --out {tmp_path}"
    assert script.main(ask.split()) == 0
    assert "sb3-sac-Pendulum-v1-4: step 40 of 40, return -" in capsys.readouterr().out
    peers = load_peers(tmp_path / "returns-sb3.json")
    (run,) = peers.runs
    assert run.algo.startswith("SAC (Stable-Baselines3 2.") and (run.env, run.seed) == ("Pendulum-v1", 4)
    assert [(one.step, len(one.returns)) for one in run.evaluations] == [(20, 2), (40, 2)]
    assert peers.protocol.startswith(
        "What learns from a replay: one environment, one update per step"
    ) and peers.protocol.endswith("one thread.")
    assert len(peers.random["Pendulum-v1"]) == 20
    assert script.main(ask.split()) == 0  # finished: nothing to do
    assert "step 40 of 40" not in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"sb3-sac-Pendulum-v1-4\.json holds a run with steps 40, asked for is 50"):
        script.main(ask.replace("--steps 40", "--steps 50").split())
    (tmp_path / "sb3-sac-Pendulum-v1-4.json").write_text("{")
    with pytest.raises(UsageError, match="is no valid JSON"):
        script.main(ask.split())


def test_a_peers_environment_is_made_once_and_anew_when_its_versions_change(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = script.peers
    monkeypatch.setattr(venv, "HERE", tmp_path / "scripts" / "peers")
    venv.HERE.mkdir(parents=True)
    commands: list[list[str]] = []
    returncode = 0

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        Path(command[-1]).mkdir(parents=True, exist_ok=True) if "venv" in command else None
        return SimpleNamespace(returncode=returncode)

    monkeypatch.setattr(venv.subprocess, "run", run)
    requirements = venv.HERE / "sb3.txt"
    requirements.write_text("a==1\n")
    folder = tmp_path / ".venv-peers" / "sb3"
    assert venv.python_of("sb3") == folder / "bin" / "python"
    assert [command[1:] for command in commands] == [
        ["-m", "venv", "--clear", str(folder)],
        ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)],
    ]
    assert [command[0] for command in commands] == [sys.executable, str(folder / "bin" / "python")]
    venv.python_of("sb3")
    assert len(commands) == 2
    requirements.write_text("a==2\n")
    returncode = 1
    with pytest.raises(UsageError, match=r"sb3 cannot be installed, this failed: .* -m venv"):
        venv.python_of("sb3")
    returncode = 0
    venv.python_of("sb3")
    assert len(commands) == 5
    with pytest.raises(UsageError, match=r"no peer 'sb33'. Did you mean sb3\?"):
        venv.python_of("sb33")
