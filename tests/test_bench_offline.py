"""scripts/bench_offline.py and what it starts: what d3rlpy is given of a dataset, and how both are put side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.algorithms.registry import train_config_class
from ctrlrl.data.store import Dataset, DatasetWriter, Episode
from ctrlrl.replay.dataset import DatasetSampler
from tests.scripts import SCRIPTS, loaded

PLAIN = {"temperature": None, "n_step": 1, "reward_scale": 1.0, "reward_shift": 0.0, "return_range": None}
LENGTHS, TERMINATED = (3, 1, 4, 2, 1), (True, True, False, True, False)


@pytest.fixture
def peer() -> Iterator[ModuleType]:
    """peers/offline.py, which imports d3rlpy only where it is used."""
    with loaded("peers.offline") as module:
        yield module


@pytest.fixture
def script() -> Iterator[ModuleType]:
    with loaded("bench_offline") as module:
        yield module


@pytest.fixture
def parity() -> Iterator[ModuleType]:
    with loaded("parity_d3rlpy") as module:
        yield module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset in which every number is another one."""
    spaces = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        "action_space": gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 1])),
    }
    path = tmp_path / "some-data"
    draws = np.random.default_rng(0)
    with DatasetWriter.create(path, **spaces, env="Pendulum-v1") as writer:
        for length, terminated in zip(LENGTHS, TERMINATED, strict=True):
            writer.add(
                Episode(
                    observation=draws.standard_normal((length + 1, 2)),
                    action=(draws.random((length, 2)) * [4, 1] - [2, 0]).astype(np.float32),
                    reward=draws.standard_normal(length).astype(np.float32),
                    terminated=terminated,
                    truncated=not terminated,
                )
            )
    return path


# ---- What d3rlpy learns from -----------------------------------------------------------------------------------------


def transitions(rows: Any) -> list[tuple[Any, ...]]:
    """(observation, action, reward, next observation or None, ended) as d3rlpy takes them of its rows: the successor is
    the next row, and the last row of an episode that did not end its task is no transition."""
    out = []
    for i in range(len(rows.rewards)):
        if rows.timeouts[i]:
            continue
        after = None if rows.terminals[i] else tuple(rows.observations[i + 1])
        out.append((tuple(rows.observations[i]), tuple(rows.actions[i]), rows.rewards[i], after, rows.terminals[i]))
    return out


def test_d3rlpy_gets_the_same_transitions_as_our_sampler_draws(peer: ModuleType, data: Path) -> None:
    read = peer.read(data, PLAIN)
    theirs = transitions(read.rows)
    dataset = Dataset.open(data)
    assert len(theirs) == dataset.num_transitions == sum(LENGTHS)
    batch = DatasetSampler(dataset, next_action=True).sample(1, 500, gamma=0.9)[0]
    assert set(batch.index.tolist()) == set(range(sum(LENGTHS)))
    for i, index in enumerate(batch.index.tolist()):
        observation, action, reward, after, ended = theirs[index]
        assert observation == tuple(batch.obs[i].tolist()) and action == tuple(batch.action[i].tolist())
        assert reward == batch.reward[i] and ended == (batch.discount[i] == 0)
        assert ended or after == tuple(batch.next_obs[i].tolist())
    # One row more for each episode that was cut: its last action once more, without a reward.
    rows = read.rows
    assert rows.timeouts.sum() == 2 and not (rows.timeouts & rows.terminals).any()
    added = np.flatnonzero(rows.timeouts)
    assert (rows.actions[added] == rows.actions[added - 1]).all() and not rows.rewards[added].any()


def test_d3rlpy_gets_actions_in_the_unit_range_and_our_statistics(peer: ModuleType, data: Path) -> None:
    read, dataset = peer.read(data, PLAIN), Dataset.open(data)
    assert read.low.tolist() == [-2, 0] and read.high.tolist() == [2, 1]
    assert (np.abs(read.unit_actions) <= 1).all()
    np.testing.assert_allclose(read.unit_actions, read.rows.actions * [0.5, 2] - [0, 1], atol=1e-6)
    np.testing.assert_allclose(read.mean, np.mean(dataset.observation, 0))
    np.testing.assert_allclose(read.std, np.std(dataset.observation, 0), rtol=1e-6)


def test_rewards_are_scaled_as_ours(peer: ModuleType, data: Path) -> None:
    from ctrlrl.config import OfflineSamplingConfig
    from ctrlrl.training.offline import make_sampler

    for fields in ({"reward_shift": -1.0, "reward_scale": 3.0}, {"return_range": 1000.0, "reward_scale": 0.5}):
        sampling = OfflineSamplingConfig(**fields)
        agent: Any = SimpleNamespace(device=torch.device("cpu"), reads=frozenset())
        batch = make_sampler(Dataset.open(data), agent, sampling, seed=0).sample(1, 100, gamma=0.9)[0]
        theirs = transitions(peer.read(data, sampling.to_dict()).rows)
        expected = [theirs[index][2] for index in batch.index.tolist()]
        np.testing.assert_allclose(batch.reward.numpy(), expected, rtol=1e-5)
    with pytest.raises(SystemExit, match=r"sampling\.temperature None alone, and this is 0\.1"):
        peer.read(data, PLAIN | {"temperature": 0.1})


def test_settings_that_d3rlpy_does_not_know_are_refused(peer: ModuleType) -> None:
    for algo in peer.ALGORITHMS:
        agent = train_config_class(algo).from_dict({"data": "d"}).to_dict()["agent"]
        peer.require_known(algo, agent)  # what we train by default can be compared
        for key in peer.ONLY.get(algo, {}):
            with pytest.raises(SystemExit, match=f"d3rlpy has no {algo} with {key} 'other', only with "):
                peer.require_known(algo, agent | {key: "other"})


# ---- Speed -----------------------------------------------------------------------------------------------------------


def worker(name: str, threads: int, *rates: float, sampling: float = 0.02) -> Any:
    turns = [{"updates": 10 * rate, "seconds": 10.0, "sampling": 10 * sampling, "peak_mib": 100.0} for rate in rates]
    return SimpleNamespace(
        name=name, threads=threads, rates=list(rates), sampling=sampling, turns=turns, warm_up_s=1.0, algo="iql"
    )


def test_ratios_are_of_one_round_and_of_the_better_number_of_threads(script: ModuleType) -> None:
    workers = [
        worker("ctrlrl compiled/bfloat16", 1, 100, 200, 300),
        worker("ctrlrl compiled/bfloat16", 2, 90, 180, 270),
        worker("ctrlrl eager/float32", 1, 50, 100, 150),
        worker("d3rlpy", 1, 30, 60, 90, sampling=0.3),
        worker("d3rlpy", 2, 40, 100, 100, sampling=0.3),
    ]
    result = script.summary(workers)
    assert [row["updates_per_s"] for row in result["rows"]] == [200, 180, 100, 60, 100]
    assert result["to_peer"] == {
        "ctrlrl compiled/bfloat16": {"median": 2.5, "range": [2.0, 3.0]},
        "ctrlrl eager/float32": {"median": 1.25, "range": [1.0, 1.5]},
    }
    text = script.updates_table("iql", result)
    assert "| d3rlpy | 2 | 100 (40 to 100) | 30.0% | 100 MiB | 1.0 s |" in text
    assert "ctrlrl compiled/bfloat16: 2.50 (2.00 to 3.00) times d3rlpy" in text and "the goal is 2.5: reached" in text
    assert text.count("goal") == 2 and "sampling takes 2.0% of ctrlrl compiled/bfloat16 with 1 thread(s)" in text
    assert "the goal is 3.0" not in text
    alone = script.summary(workers[:1])
    assert alone["to_peer"] == {} and "times d3rlpy" not in script.updates_table("bc", alone)


def test_files_are_made_in_both_layouts(script: ModuleType, tmp_path: Path) -> None:
    script.make_store(tmp_path / "store", 3000)
    dataset = Dataset.open(tmp_path / "store")
    assert (dataset.num_transitions, dataset.num_episodes) == (3000, 3)
    assert dataset.terminated.tolist() == [True, False, False]
    h5py = pytest.importorskip("h5py")
    script.make_d4rl(tmp_path / "file.hdf5", 2000, compression="gzip")
    with h5py.File(tmp_path / "file.hdf5") as file:
        assert file["timeouts"][:].nonzero()[0].tolist() == [999, 1999]
        assert (file["next_observations"][:-1] == file["observations"][1:]).all()


def test_tables_of_import_and_store(script: ModuleType) -> None:
    names = ("importing", "starting", "unpacking", "reading", "copying")
    seconds = {name: {"median": 2.0, "range": [1.0, 3.0]} for name in names}
    result = {"compression": None, "transitions": 10**6, "file_mib": 100.0, "store_mib": 90.0, "seconds": seconds}
    text = script.import_table(result)
    assert "1,000,000 transitions in 100 MiB, not compressed; the store made of it has 90 MiB" in text
    assert "| `ctrlrl data import` | 2.00 (1.00 to 3.00) | 500,000 | 50 |" in text
    row = {"opening_ms": 1.25, "making_s": 0.5, "resident": True, "batches_per_s": 1000.0}
    row |= {"own_mib": 900.0, "mapped_mib": 30.0}
    text = script.store_table({"transitions": 10**7, "writing_s": 3.0, "ways": {"as a training does": row}})
    assert "| as a training does (in memory) | 1.2 ms | 0.50 s | 1,000 | 256,000 | 900 MiB | 30 MiB |" in text, text


# ---- Returns ---------------------------------------------------------------------------------------------------------


def ask(data: Path, out: Path, *more: str) -> list[str]:
    words = ["returns", "--algo", "iql", "--data", str(data), "--seeds", "0", "1", "--updates", "40"]
    return [*words, "--eval-every", "20", "--eval-episodes", "2", "--out", str(out), *more]


def test_both_sides_are_asked_for_the_same(
    script: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "python_of", lambda peer: Path(f"/{peer}"))
    flags = ["--agent.expectile", "0.9", "--sampling.return-range", "1000"]
    options, rest = script.parse_arguments([*ask(data, tmp_path / "out"), "--", *flags])
    (own, peer), (second, _) = script.cells_of(options, rest)
    assert (own.name, own.path) == ("iql-some-data-0", tmp_path / "out" / "some-data" / "iql-some-data-0")
    assert (second.seed, own.state(), peer.state()) == (1, "new", "new")
    command = own.command()
    assert command[2:5] == ["ctrlrl", "train", "iql"]
    assert command[command.index("--data") + 1] == str(data) and command[command.index("--updates") + 1] == "40"
    theirs = peer.command()
    assert theirs[0] == "/d3rlpy" and theirs[2] == "returns"
    said = dict(zip(theirs[3::2], theirs[4::2], strict=True))
    assert (said["--env"], said["--updates"], said["--eval-every"]) == ("Pendulum-v1", "40", "20")
    config = json.loads(said["--config"])
    assert (config["agent"]["expectile"], config["sampling"]["return_range"]) == (0.9, 1000)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--", "--updates", "3"], "--updates is this script's to give"),
        (["--", "--eval_every=3"], "--eval_every=3 is this script's to give"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--updates", "50"], "--updates 50 is no multiple of --eval-every 20"),
    ],
)
def test_bad_flags_start_nothing(
    more: list[str], message: str, script: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(ask(data, tmp_path / "out", *more))
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_of_another_protocol_are_not_mixed(script: ModuleType, data: Path, tmp_path: Path) -> None:
    from ctrlrl.errors import UsageError

    options, rest = script.parse_arguments(ask(data, tmp_path / "out"))
    _, peer = script.cells_of(options, rest)[0]
    peer.path.parent.mkdir(parents=True)
    record = {key: peer.settings[key] for key in ("agent", "sampling")}
    good = {"settings": record, "data": Dataset.open(data).content_hash, "complete": True, "evals": []}
    peer.path.write_text(json.dumps(good))
    peer.require_same_settings()
    assert peer.state() == "finished"
    for other, message in (
        ({"steps": 50}, "with steps 50, asked for is 40"),
        ({"settings": record | {"sampling": {}}}, "with other hyper-parameters"),
        ({"data": "0"}, "on other data than is in"),
    ):
        peer.path.write_text(json.dumps(good | other))
        with pytest.raises(UsageError, match=message):
            peer.require_same_settings()


def test_returns_of_both_sides_are_put_side_by_side(
    script: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours is trained; the peer's runs are made up."""
    pendulum = tmp_path / "swings"
    spaces = {"observation_space": gym.make("Pendulum-v1").observation_space}
    with DatasetWriter.create(
        pendulum, **spaces, action_space=gym.make("Pendulum-v1").action_space, env="Pendulum-v1"
    ) as w:
        rows = np.random.default_rng(0).uniform(-1, 1, (51, 3)).astype(np.float32)
        w.add(Episode(observation=rows, action=rows[:50, :1], reward=rows[:50, 1], terminated=False, truncated=True))
    out = tmp_path / "out"
    folder = out / "swings"
    folder.mkdir(parents=True)
    for seed, final in ((0, -300.0), (1, -200.0)):
        evals = [{"step": step, "mean": final, "returns": [final]} for step in (20, 40)]
        run = {"library": "d3rlpy 2.8.1", "algo": "IQL", "env": "Pendulum-v1", "seed": seed, "complete": True}
        run |= {"started": "2026-01-01", "packages": {"d3rlpy": "2.8.1"}, "evals": evals}
        (folder / f"d3rlpy-iql-swings-{seed}.json").write_text(json.dumps(run))
    tiny = ["--", "--agent.hidden", "8", "--agent.batch-size", "8"]
    assert script.main(ask(pendulum, out, "--no-peer", "--jobs", "2", *tiny)) == 0
    text = capsys.readouterr().out
    assert "Pendulum-v1, swings: IQM of the evaluation return at step 40" in text
    assert "verdict: iql is below IQL (d3rlpy 2.8.1)" in text, text
    table = (out / "returns.md").read_text()
    assert "| Pendulum-v1, swings, 40 steps |" in table and "-250 (-300, -200)" in table
    assert (out / "comparison.html").exists() and (out / "returns.svg").exists()
    protocol = json.loads((folder / "returns-d3rlpy.json").read_text())["protocol"]
    assert protocol.startswith("d3rlpy's `fit` with the hyper-parameters") and protocol.endswith("one thread.")


# ---- One update of both ----------------------------------------------------------------------------------------------


def test_weights_of_d3rlpy_become_ours(parity: ModuleType) -> None:
    record = {}
    for member in range(2):
        for layer, name in enumerate(("_encoder._layers.10", "_encoder._layers.2", "_fc")):
            base = f"before/q_funcs.{member}.{name}"
            record |= {f"{base}.weight": np.full((2, 3), 10 * layer + member), f"{base}.bias": np.full(2, -layer)}
    stacked = parity.ensemble(record, "before", "q_funcs")
    assert [part.shape for part in stacked] == [(2, 3, 2), (2, 1, 2)] * 3
    assert [int(part[1].flat[0]) for part in stacked[::2]] == [11, 1, 21]  # by number, layer 2 before layer 10
    heads = {
        f"before/policy.{head}.{part}": np.ones((1, 1)) for head in ("_mu", "_logstd") for part in ("weight", "bias")
    }
    heads["before/policy._mu.weight"] *= 2
    assert parity.network(heads, "before", "policy")[0].ravel().tolist() == [2, 1]


def test_what_differs_on_purpose_is_said_and_the_rest_is_judged(parity: ModuleType) -> None:
    case = parity.Case("iql", "", differs={"policy": "why", "actor loss": "for this"})
    assert parity.verdict(case, "gradient of policy", 1.0, 1e-6, "policy") == "why"
    assert parity.verdict(case, "actor loss", 1.0, 1e-6) == "for this"
    assert parity.verdict(case, "critic loss", 1e-7, 1e-6) == "equal"
    assert parity.verdict(case, "step of critics", 1e-5, float("inf")) == "not judged"
    assert parity.verdict(case, "critic loss", 1e-5, 1e-6) == "**NOT EQUAL** (limit 1e-06)"


@pytest.mark.slow
def test_one_update_is_that_of_d3rlpy() -> None:
    """Makes d3rlpy's environment where there is none yet."""
    command = [sys.executable, str(SCRIPTS / "parity_d3rlpy.py"), "--dtype", "float64"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all numbers agree that should" in run.stdout
