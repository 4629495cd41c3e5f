"""Trainings on a dataset, alone or beside an environment, and trainings that go on from another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ctrlrl
from ctrlrl.cli.main import run as command
from ctrlrl.data.store import Dataset, DatasetWriter
from ctrlrl.errors import Interrupted, UsageError
from ctrlrl.runs.checkpoint import load_checkpoint
from ctrlrl.runs.folder import RunFolder
from ctrlrl.runs.record import load_run
from ctrlrl.runs.stages import better_of, change_of
from tests.datasets import pendulum_data
from tests.runs import SMALL, InterruptAt, assert_same

OFFLINE: dict[str, Any] = {
    "updates": 130,
    "log_every": 20,
    "eval_every": 50,
    "eval_episodes": 2,
    "checkpoint_every": 40,
    "threads": 1,
    "video": False,
    "agent": {"hidden": [16, 16], "batch_size": 16},
    "quiet": True,
}
ALGORITHMS = ("bc", "td3-bc", "rebrac", "iql", "cql")


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Dataset:
    return pendulum_data(tmp_path_factory.mktemp("data") / "pendulum")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_training_that_is_interrupted_goes_on_with_the_same_bits(algo: str, data: Dataset, tmp_path: Path) -> None:
    settings = OFFLINE | {"data": str(data.path)}
    if algo == "cql":
        settings["agent"] = settings["agent"] | {"calibrate": True}
    ctrlrl.train(algo, out=str(tmp_path / "whole"), callbacks=[InterruptAt(10**9)], **settings)
    with pytest.raises(Interrupted):
        ctrlrl.train(algo, out=str(tmp_path / "parts"), callbacks=[InterruptAt(70)], **settings)
    ctrlrl.resume(tmp_path / "parts", callbacks=[InterruptAt(10**9)], quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    record = load_run(tmp_path / "parts")
    assert [one.step for one in record.evaluations] == [50, 100, 130] and record.unit == "updates"
    assert record.provenance and json.loads((tmp_path / "parts/provenance.json").read_text())["data"]["content_hash"]
    policy = ctrlrl.load(tmp_path / "parts").policy
    assert policy.act(torch.zeros(2, 3))[0].shape == (2, 1)


def test_a_longer_budget_extends_it(data: Dataset, tmp_path: Path) -> None:
    settings = OFFLINE | {"data": str(data.path), "eval_every": 0, "checkpoint_every": 1000}
    ctrlrl.train("td3-bc", out=str(tmp_path / "whole"), **settings | {"updates": 150})
    ctrlrl.train("td3-bc", out=str(tmp_path / "parts"), **settings | {"updates": 100})
    with pytest.raises(UsageError, match="is counted in updates: extend it by --updates"):
        ctrlrl.resume(tmp_path / "parts", steps=150, quiet=True)
    with pytest.raises(UsageError, match=r"has done 100 updates already; --updates must be at least that, got 20"):
        ctrlrl.resume(tmp_path / "parts", updates=20, quiet=True)
    ctrlrl.resume(tmp_path / "parts", updates=150, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_observations_are_standardized_by_the_data(data: Dataset, tmp_path: Path) -> None:
    ctrlrl.train("td3-bc", out=str(tmp_path / "r"), data=str(data.path), **OFFLINE | {"updates": 10, "eval_every": 0})
    normalizer = ctrlrl.load(tmp_path / "r", checkpoint="last").policy.normalizer
    assert normalizer is not None
    entry = normalizer.entry("obs")  # type: ignore[operator]
    assert torch.allclose(entry.mean, torch.from_numpy(data.observation.astype(np.float64).mean(0)), atol=1e-6)
    assert float(entry.count) == data.num_transitions + data.num_episodes


def test_a_changed_dataset_is_not_gone_on_with(data: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data.path, copy)
    ctrlrl.train("bc", out=str(tmp_path / "r"), data=str(copy), **OFFLINE | {"updates": 20, "eval_every": 0})
    with DatasetWriter.append(copy) as writer:
        writer.add(data.episode(0))
    with pytest.raises(UsageError, match=r"has changed since the run began \(200 transitions then, 250 now\)"):
        ctrlrl.resume(tmp_path / "r", updates=40, quiet=True)


def test_without_an_environment_nothing_is_evaluated(tmp_path: Path, capsys: Any) -> None:
    unnamed = pendulum_data(tmp_path / "data", 2, 20, env=None)
    run = ctrlrl.train("bc", data=str(unnamed.path), out=str(tmp_path / "r"), **OFFLINE | {"updates": 20})
    assert load_run(run.path).evaluations == []
    assert "nothing is evaluated" in " ".join(text for _, text in load_run(run.path).notes)
    with pytest.raises(UsageError, match=r"has the observation space .* and MountainCarContinuous-v0 has"):
        ctrlrl.train("bc", "MountainCarContinuous-v0", data=str(unnamed.path), out=str(tmp_path / "s"), **OFFLINE)
    assert not (tmp_path / "s").exists()


def test_it_is_evaluated_on_the_environment_of_the_data(tmp_path: Path) -> None:
    lost = pendulum_data(tmp_path / "lost", 2, 20, env="Lift")
    with pytest.raises(UsageError, match=r"no environment 'Lift'.* names it, to evaluate on: .*--eval-every 0"):
        ctrlrl.train("bc", data=str(lost.path), out=str(tmp_path / "r"), **OFFLINE | {"updates": 20})
    data = pendulum_data(tmp_path / "data", 2, 20)
    with DatasetWriter.append(data.path) as writer:
        writer.provenance["env_kwargs"] = {"g": 0.0}
    settings = OFFLINE | {"updates": 20, "eval_every": 20, "data": str(data.path)}
    means = []
    for name, change in (("light", {}), ("heavy", {"env_kwargs": {"g": 10.0}})):
        run = ctrlrl.train("bc", out=str(tmp_path / name), **settings | change)
        means.append(load_run(run.path).evaluations[-1].mean)
        assert json.loads((run.path / "config.json").read_text())["env_kwargs"] == change.get("env_kwargs", {"g": 0.0})
    assert means[0] != means[1]
    ctrlrl.resume(tmp_path / "light", updates=40, quiet=True)
    assert "is made as for the data" in " ".join(text for _, text in load_run(tmp_path / "light").notes)


def test_both_sources_are_learned_from_and_resumed_exactly(data: Dataset, tmp_path: Path) -> None:
    settings = SMALL | {"steps": 200, "data": str(data.path), "data_share": 0.25, "sampling": {"temperature": 0.2}}
    settings |= {"agent": SMALL["agent"] | {"normalize_obs": True}}
    ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "whole"), **settings)
    ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "parts"), **settings | {"steps": 96})
    ctrlrl.resume(tmp_path / "parts", steps=200, quiet=True)
    left, right = (load_checkpoint(RunFolder(tmp_path / n).find_checkpoint("last")) for n in ("whole", "parts"))
    assert torch.equal(left["data"]["generator"], right["data"]["generator"])
    for name, value in left["agent"]["policy"].items():
        assert torch.equal(value, right["agent"]["policy"][name]), name
    record = load_run(tmp_path / "whole")
    assert (record.metrics["data_share"].values == 0.25).all()
    statistics = ctrlrl.load(tmp_path / "whole").policy.normalizer.entry("obs")  # type: ignore[union-attr, operator]
    assert float(statistics.count) == data.num_transitions + data.num_episodes  # kept as they came with the data


def test_data_of_another_variant_of_the_environment_is_told_of(tmp_path: Path) -> None:
    data = pendulum_data(tmp_path / "data", 2, 20)
    with DatasetWriter.append(data.path) as writer:
        writer.provenance["env_kwargs"] = {"g": 5.0}
    for name, kwargs in (("same", {"g": 5.0}), ("other", {"g": 9.0}), ("default", {})):
        settings = SMALL | {"steps": 40, "data": str(data.path), "env_kwargs": kwargs}
        ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / name), **settings)
        notes = " ".join(text for _, text in load_run(tmp_path / name).notes)
        told = "was collected with --env-kwargs '{\"g\": 5.0}', and these environments are made otherwise" in notes
        assert told == (name != "same")


def test_rlpd_and_wsrl_say_what_they_need(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rlpd learns from a dataset besides: --data DIR"):
        ctrlrl.train("rlpd", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL)
    with pytest.raises(UsageError, match="wsrl goes on from a run that was trained on data: --init-from RUN"):
        ctrlrl.train("wsrl", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("before", "after", "critics"),
    [
        ("iql", "sac", True),
        ("td3-bc", "td3", True),
        ("bc", "sac", False),
        ("cql", "sac", True),
        ("td3-bc", "sac", True),
    ],
)
def test_what_was_learned_offline_goes_on_online(
    before: str, after: str, critics: bool, data: Dataset, tmp_path: Path
) -> None:
    """The first evaluation is the former policy's, to the last digit; then it is the environment's turn."""
    settings = OFFLINE | {"updates": 40, "eval_every": 40}
    if before == "cql":
        settings["agent"] = settings["agent"] | {"hidden": [16, 16]}
    ctrlrl.train(before, data=str(data.path), out=str(tmp_path / "before"), **settings)
    agent = SMALL["agent"] | ({"normalize_obs": True} if before in ("bc", "td3-bc") else {})
    online = SMALL | {"steps": 160, "eval_every": 80, "agent": agent, "init_from": str(tmp_path / "before")}
    ctrlrl.train(after, "Pendulum-v1", out=str(tmp_path / "after"), data=str(data.path), **online)
    first, *rest = load_run(tmp_path / "after").evaluations
    former = load_run(tmp_path / "before").evaluations[-1]
    assert first.step == 0 and np.allclose(first.returns, former.returns, rtol=1e-5)
    assert [one.step for one in rest] == [80, 160]
    history = json.loads((tmp_path / "after/history.json").read_text())
    assert history["algo"] == before and ("critics: as they were" in history["notes"]) == critics
    notes = " ".join(text for _, text in load_run(tmp_path / "after").notes)
    assert "starts from" in notes and "which suggests to preserve" in notes
    page = (tmp_path / "after/report.html").read_text()
    assert f"From {before} on" in page and "Dip" in page and "Regret" in page
    ctrlrl.resume(tmp_path / "after", steps=170, quiet=True)  # and can be gone on with itself


def test_values_and_policy_are_learned_apart(data: Dataset, tmp_path: Path) -> None:
    settings = OFFLINE | {"data": str(data.path), "updates": 60, "sampling": {"return_range": 1000.0}}
    agent = settings["agent"]
    with pytest.raises(UsageError, match="extracts a policy from values that are there: --init-from RUN"):
        ctrlrl.train("iql", out=str(tmp_path / "no"), **settings | {"agent": agent | {"learn": "policy"}})
    ctrlrl.train("iql", out=str(tmp_path / "values"), **settings | {"agent": agent | {"learn": "value"}})
    policy = settings | {"agent": agent | {"learn": "policy"}, "init_from": str(tmp_path / "values"), "eval_every": 30}
    ctrlrl.train("iql", out=str(tmp_path / "policy"), **policy)
    before, after = (
        load_checkpoint(RunFolder(tmp_path / name).find_checkpoint("last"))["agent"] for name in ("values", "policy")
    )
    for part in ("critics", "target_critics", "value"):
        assert all(torch.equal(value, after[part][name]) for name, value in before[part].items()), part
    moved = [name for name, value in before["policy"].items() if not torch.equal(value, after["policy"][name])]
    assert any(name.startswith("trunk") for name in moved)
    assert [one.step for one in load_run(tmp_path / "policy").evaluations] == [0, 30, 60]
    other = pendulum_data(tmp_path / "data", 3)  # whose returns lie otherwise, so that 1000 is another scale
    for change in ({"data": str(other.path)}, {"sampling": {}}, {"agent": policy["agent"] | {"num_critics": 3}}):
        with pytest.raises(UsageError, match=r"needs the values of .*values, and they do not fit: .*critics: new"):
            ctrlrl.train("iql", out=str(tmp_path / "misfit"), **policy | change)
    assert not (tmp_path / "misfit").exists()


def test_a_temperature_is_kept_where_rewards_are(data: Dataset, tmp_path: Path) -> None:
    settings = OFFLINE | {"data": str(data.path), "updates": 20, "eval_every": 0}
    scaled = {"sampling": {"reward_scale": 2.0}}
    shape = settings["agent"]
    changes: list[tuple[str, dict[str, Any]]] = [("plain", {}), ("scaled", scaled)]
    for name, change in changes:
        ctrlrl.train("cql", out=str(tmp_path / name), **settings | change | {"agent": shape | {"alpha_lr": 0.01}})
        after = settings | {"agent": shape, "init_from": str(tmp_path / name)}
        ctrlrl.train("cql", out=str(tmp_path / f"after-{name}"), **after)
        notes = json.loads((tmp_path / f"after-{name}/history.json").read_text())["notes"]
        kept = [note for note in notes if note.startswith("temperature: as it was, 0.8")]
        assert bool(kept) == ("critics: as they were" in notes) == (name == "plain")
        assert "--agent.initial-alpha 0.01 is what a policy that is good already needs" in notes[-1]
    soft = {**after, "agent": shape | {"backup_entropy": True}, "init_from": str(tmp_path / "plain")}
    ctrlrl.train("cql", out=str(tmp_path / "soft"), **soft)
    notes = json.loads((tmp_path / "soft/history.json").read_text())["notes"]
    assert any(note.startswith("they did not count entropy, and do here") for note in notes)
    given = {**after, "agent": shape | {"initial_alpha": 0.05}, "init_from": str(tmp_path / "plain")}
    ctrlrl.train("cql", out=str(tmp_path / "given"), **given)
    notes = json.loads((tmp_path / "given/history.json").read_text())["notes"]
    assert notes[-1] == "temperature: 0.05, as --agent.initial-alpha says"


def test_critics_of_other_rewards_start_afresh_unless_rewards_are_changed_alike(data: Dataset, tmp_path: Path) -> None:
    """IQL by its range of returns, and then SAC in the environment, which has no range but a factor."""
    settings = OFFLINE | {"data": str(data.path), "updates": 20, "eval_every": 0, "sampling": {"return_range": 1000.0}}
    ctrlrl.train("iql", out=str(tmp_path / "before"), **settings)
    scale = 1000.0 / float(data.returns.max() - data.returns.min())
    online = SMALL | {"steps": 80, "init_from": str(tmp_path / "before")}
    agent = SMALL["agent"]
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "alike": {"sampling": {"reward_scale": scale}},
        "gamma": {"sampling": {"reward_scale": scale}, "agent": agent | {"gamma": 0.9}},
    }
    notes = {}
    for name, change in cases.items():
        ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / name), **online | change)
        notes[name] = json.loads((tmp_path / name / "history.json").read_text())["notes"]
    assert f"--sampling.reward-scale {scale} keeps them" in notes["plain"][1]
    assert notes["alike"][1] == "critics: as they were"
    assert notes["gamma"][1:3] == [
        "critics: as they were",
        "their gamma was 0.99 and is 0.9 here, so they have to change first",
    ]


def test_hindsight_is_for_tasks_with_goals(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a task whose reward is a function of goals, and Pendulum-v1 is"):
        ctrlrl.train(
            "td3-bc", out=str(tmp_path / "r"), data=str(data.path), **OFFLINE | {"sampling": {"hindsight": 0.8}}
        )
    with pytest.raises(UsageError, match=r"sampling\.n_step must be 1 where goals are replaced"):
        ctrlrl.train("td3-bc", data=str(data.path), **OFFLINE | {"sampling": {"hindsight": 0.8, "n_step": 3}})


def test_wsrl_warms_up_with_the_policy_it_starts_from(data: Dataset, tmp_path: Path) -> None:
    shape = {"hidden": [16, 16], "batch_size": 16, "num_critics": 4, "layer_norm": True, "subset": 2}
    ctrlrl.train("cql", data=str(data.path), out=str(tmp_path / "before"), **OFFLINE | {"updates": 40, "agent": shape})
    settings = SMALL | {"steps": 120, "learning_starts": 100, "init_from": str(tmp_path / "before"), "agent": shape}
    run = ctrlrl.train("wsrl", "Pendulum-v1", out=str(tmp_path / "after"), **settings)
    compared = json.loads((run.path / "history.json").read_text())["data"]  # of the former run: there is none here
    assert compared["mean_return"] == float(data.returns.mean()) and compared["reference"] == data.reference
    state = load_checkpoint(RunFolder(run.path).find_checkpoint("last"))
    assert state["loop"]["updates"] == 4 * 20


def test_no_random_actions_come_before_those_of_a_policy_that_is_there(data: Dataset, tmp_path: Path) -> None:
    shape = {"hidden": [16, 16], "batch_size": 16}
    cloned = OFFLINE | {"updates": 40, "agent": shape | {"normalize_obs": False}}
    before = ctrlrl.train("bc", data=str(data.path), out=str(tmp_path / "before"), **cloned)
    settings = SMALL | {"steps": 120, "learning_starts": 100, "init_from": str(before.path), "agent": shape}
    run = ctrlrl.train("wsrl", "Pendulum-v1", out=str(tmp_path / "after"), **settings)
    state = load_checkpoint(RunFolder(run.path).find_checkpoint("last"))
    stored = load_file(RunFolder(run.path).replay / state["replay"]["segments"][0]["file"])
    meant = ctrlrl.load(before.path).policy.act(stored["obs/"][:70].flatten(0, 1))[0]
    off = (stored["action"].flatten(0, 1) - meant).abs()
    assert len(off) == 70 and 0 < float(off.mean()) < 0.3 and float(off.max()) < 1  # its noise is 0.1 of 2, before tanh


def test_a_run_that_does_not_fit_is_refused(data: Dataset, tmp_path: Path) -> None:
    settings = OFFLINE | {"updates": 20, "eval_every": 0}
    ctrlrl.train("bc", data=str(data.path), out=str(tmp_path / "before"), **settings)
    online = SMALL | {"init_from": str(tmp_path / "before"), "agent": {"hidden": [8, 8], "batch_size": 16}}
    with pytest.raises(
        UsageError, match=r"does not fit this agent: its trunk\.0\.weight is \(16, 3\), and here it is \(8, 3\)"
    ):
        ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "after"), **online)
    with pytest.raises(UsageError, match="was trained with the observation space"):
        ctrlrl.train("sac", "MountainCarContinuous-v0", out=str(tmp_path / "after"), **online)
    settings |= {"agent": settings["agent"] | {"policy": "gaussian", "normalize_obs": False}}
    ctrlrl.train("bc", data=str(data.path), out=str(tmp_path / "gaussian"), **settings)
    linear = SMALL | {"init_from": str(tmp_path / "gaussian"), "agent": settings["agent"] | {"hidden": [16, 16]}}
    del linear["agent"]["policy"]
    with pytest.raises(UsageError, match="the mean of its policy is not squashed by tanh"):  # its actions would shrink
        ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "after"), **linear)
    with pytest.raises(UsageError, match="no such run folder"):
        ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "after"), **online | {"init_from": str(tmp_path / "x")})
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize(
    ("algo", "fields", "message"),
    [
        ("sac", {"data_share": 0.3}, "data_share must be left alone where there is no data, got 0.3"),
        ("sac", {"sampling": {"temperature": 0.1}}, "temperature must be left alone where there is no data"),
        ("sac", {"keep_statistics": False}, "keep_statistics must be left alone where there is neither data nor"),
        ("iql", {"data": "x", "agent": {"utd": 2.0}}, "agent.utd is of training in an environment"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(algo: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ctrlrl.train(algo, "Pendulum-v1", **fields)


def test_dip_and_regret() -> None:
    change = change_of([(0, 100.0), (10, 40.0), (20, 80.0), (30, 120.0)], {"random": 0.0, "expert": 200.0})
    assert change is not None
    assert (change.dip, change.lowest_step, change.back) == (60.0, 10, 30)
    assert change.regret == pytest.approx((60 + 20 + 0) / 3) and change.score_regret == pytest.approx(1 - 0.4)
    never = change_of([(0, 100.0), (10, 40.0)], None)
    assert never is not None and never.back is None and never.score_regret is None
    assert change_of([(10, 1.0), (20, 2.0)], None) is None and change_of([(0, 1.0)], None) is None
    assert "preserve the policy" in better_of(10.0, {"mean_return": 5.0})
    assert "preserve the data" in better_of(1.0, {"mean_return": 5.0}) and better_of(1.0, None) == ""


def test_the_command_line(data: Dataset, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = f"train iql --data {data.path} --updates 20 --eval-every 10 --eval-episodes 1 --threads 1 --no-video"
    assert command([*words.split(), "--agent.hidden", "16", "--quiet"]) == 0
    run = tmp_path / "runs/iql-pendulum-seed0"
    assert json.loads((run / "config.json").read_text())["env"] == "Pendulum-v1"
    assert command(["resume", str(run), "--updates", "30", "--quiet"]) == 0
    assert command(["eval", str(run), "--episodes", "1"]) == 0
    capsys.readouterr()
    assert command(["train", "iql", "--data", str(tmp_path / "nowhere"), "--updates", "20"]) == 2
    assert "is no dataset: no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        command(["train", "iql", "--updates", "20"])
    assert refused.value.code == 2
    assert command(["train", "iql", "--data", str(data.path), "--dry-run"]) == 0
    assert "updates: 500000" in capsys.readouterr().out
