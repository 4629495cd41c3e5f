"""The speed benchmark: its arithmetic by hand, and a small run of its own side."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest

from tests.scripts import SCRIPTS, loaded

SCRIPT = SCRIPTS / "bench_learner.py"
HERE = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))}
"""What is tested is what is installed, or lies here."""


@pytest.fixture(scope="module")
def bench():
    with loaded("bench_learner") as module:
        yield module


def test_the_updates_operations_are_those_of_the_paper(bench):
    batch, obs, act, hidden = 256, 3, 1, 256

    def product(inputs, outputs):
        return 2 * batch * inputs * outputs

    critic = product(obs + act, hidden) + product(hidden, hidden)  # the value head is no matrix product here
    actor = product(obs, hidden) + product(hidden, hidden) + product(hidden, 2 * act)
    critics = 2 * (
        3 * critic  # target, loss, policy's loss
        + critic
        + product(hidden, hidden)  # weights' gradients, and the hidden layer's input
        + product(hidden, hidden)
        + product(obs + act, hidden)  # the policy's loss, down to the action
    )
    policy = 2 * actor + actor + product(hidden, hidden) + product(hidden, 2 * act)
    assert bench.step_flops("sac", "Pendulum-v1") == critics + policy


def test_ratios_are_paired_by_round_with_the_peers_better_threads(bench):
    def worker(library, threads, rates):
        rounds = [{"seconds": 1 / r, "steps": 1, "updates": 1, "peak_mib": 100.0} for r in rates]
        made = Namespace(library=library, name=library, threads=threads, rounds=rounds, warm_up_s=1.0)
        made.rates = lambda what="steps": [r[what] / r["seconds"] for r in made.rounds]
        return made

    floor = Namespace(library="floor", threads=1)
    floor.rounds = [{"blas": 100.0, "float32": 200.0, "bfloat16": 400.0, "simulation_us": 1000.0}] * 3
    workers = [
        worker("ours", 1, [200, 300, 250]),
        worker("sb3", 1, [100, 100, 100]),
        worker("sb3", 2, [90, 90, 900]),
        floor,
    ]
    result = bench.case(1, workers, flops=200_000_000)
    assert result["ours_to_peer"] == {"ours / sb3": {"median": pytest.approx(2.5), "range": pytest.approx([2, 3])}}
    # 200 MFLOP take 2 ms at 100 GFLOP/s and 1 ms at 200, simulation 1 ms; a step takes 4 ms at 250 a second
    assert result["floor"]["1"]["share_of_blas_floor"] == pytest.approx(0.75)
    assert result["floor"]["1"]["share_of_float32_floor"] == pytest.approx(0.5)
    text = bench.table(result, Namespace(algo="sac", env="X"))
    assert "ours / sb3, each at its better number of threads: 2.50 (2.00 to 3.00)" in text


def test_a_run_of_our_side_writes_what_it_measured(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, str(SCRIPT), "--peers", "--env", "Pendulum-v1", "--num-envs", "2", "--threads", "1"]
    command += ["--segment", "40", "--rounds", "2", "--out", str(out), "--ways", "eager/float32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=HERE)
    assert done.returncode == 0, done.stderr
    case = json.loads(out.read_text())["cases"][0]
    row = case["rows"][0]
    assert row["library"] == "ctrlrl, eager/float32" and row["threads"] == 1 and case["num_envs"] == 2
    assert row["updates_per_s"] == pytest.approx(row["steps_per_s"])  # UTD 1, whatever the number of environments
    assert row["warm_up_s"] > 0 and row["peak_mib"] > 50
    assert case["floor"]["1"]["float32"] >= case["floor"]["1"]["blas"] > 0
    assert "ctrlrl, eager/float32 runs at" in done.stdout


def test_an_unknown_environment_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--env", "Nope-v0"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "Nope" in done.stderr and "Traceback" not in done.stderr
