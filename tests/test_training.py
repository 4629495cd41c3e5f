"""Whole trainings: counting, extension, interruption, failures, Python's interface."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import ctrlrl
from ctrlrl.algorithms.sac import SAC
from ctrlrl.errors import EnvironmentFailure, Interrupted, NonFiniteError, UsageError
from ctrlrl.runs.checkpoint import load_checkpoint, pack, save_checkpoint
from ctrlrl.runs.folder import RunFolder
from tests.runs import SMALL, assert_same, contents
from tests.standins import MODULE, WalkEnv, native_vector


def records(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


class StopAt(ctrlrl.Callback):
    """Ends or interrupts a training at a step, and counts."""

    def __init__(self, step: int, *, interrupt: bool = False) -> None:
        self.step, self.interrupt, self.calls = step, interrupt, 0

    def on_step(self, loop):
        self.calls += 1
        if loop.env_steps >= self.step:
            if self.interrupt:
                signal.raise_signal(signal.SIGINT)
                self.step = 10**9
            else:
                loop.stop("enough")

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


@pytest.mark.parametrize(("num_envs", "utd"), [(1, 1.0), (8, 1.0), (8, 0.25), (3, 2.0)])
def test_updates_are_counted_per_environment_step(tmp_path, num_envs, utd):
    settings = SMALL | {"steps": 240, "eval_every": 0, "agent": SMALL["agent"] | {"utd": utd}}
    ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), num_envs=num_envs, **settings)
    state = load_checkpoint(RunFolder(tmp_path / "r").find_checkpoint("last"))
    assert state["loop"]["env_steps"] == 240
    assert state["loop"]["updates"] == int(utd * (240 - 60))


@pytest.mark.parametrize(("num_envs", "utd", "every"), [(3, 0.3, 8), (1, 3.0, 8), (5, 1.0, 3)])
def test_stopped_between_turns_of_updates_and_resumed_equals_uninterrupted(tmp_path, num_envs, utd, every):
    settings = SMALL | {"num_envs": num_envs, "update_every": every, "eval_every": 0, "checkpoint_every": 10_000}
    settings |= {"buffer": {"capacity": 300, "n_step": 3}, "agent": SMALL["agent"] | {"utd": utd}}
    ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "whole"), **settings | {"steps": 240})
    ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "parts"), **settings | {"steps": 93})
    ctrlrl.resume(tmp_path / "parts", steps=151, quiet=True)
    ctrlrl.resume(tmp_path / "parts", steps=240, quiet=True)
    left, right = (load_checkpoint(RunFolder(tmp_path / name).find_checkpoint("last")) for name in ("whole", "parts"))
    assert left["loop"]["updates"] == right["loop"]["updates"] > 0
    left, right = pack(left["agent"])[0], pack(right["agent"])[0]
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def test_a_turn_of_updates_is_sampled_within_bounds(tmp_path, monkeypatch):
    sizes = []
    update = SAC.update
    monkeypatch.setattr(SAC, "update", lambda agent, batch: sizes.append(len(batch)) or update(agent, batch))
    settings = SMALL | {"steps": 76, "eval_every": 0}
    ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "a"), **settings)
    assert sizes == [4, 8]  # at steps 64 and 72; those of the last four steps stay owed
    sizes.clear()
    group = 2 * SMALL["agent"]["batch_size"] * 3 * 4
    monkeypatch.setattr("ctrlrl.training.off_policy.MAX_SAMPLED_BYTES", 3 * group)
    ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "b"), **settings)
    assert sizes == [3, 1, 3, 3, 2]


def test_a_run_of_before_a_setting_goes_on_as_it_was(tmp_path):
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL | {"steps": 80, "eval_every": 0})
    config = json.loads((run.path / "config.json").read_text())
    del config["update_every"], config["agent"]["precision"]
    (run.path / "config.json").write_text(json.dumps(config))
    ctrlrl.resume(run.path, steps=90, quiet=True)
    config = json.loads((run.path / "config.json").read_text())
    assert config["update_every"] == 1 and config["agent"]["precision"] == "float32"
    assert load_checkpoint(RunFolder(run.path).find_checkpoint("last"))["loop"]["updates"] == 30  # none stay owed


def test_a_run_without_updates_says_so(tmp_path):
    how = SMALL | {"steps": 130, "learning_starts": 125, "update_every": 100, "eval_every": 0}
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **how)
    assert "the last turn of updates (every 100 steps) is at step 100" in records(run.path, "note")[0]["text"]


def test_actions_are_random_before_learning_starts_and_the_policys_after(tmp_path):
    ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL)
    actions = contents(tmp_path / "r")["rows"]["action"].squeeze()
    first = torch.rand(60, generator=torch.Generator().manual_seed(0)) * 4 - 2
    assert torch.allclose(actions[:60], first)
    assert actions.abs().max() <= 2


def test_extended_run_equals_a_longer_one(tmp_path):
    ctrlrl.train("sac", "HalfCheetah-v5", out=str(tmp_path / "whole"), **SMALL | {"num_envs": 2, "eval_every": 200})
    short = SMALL | {"num_envs": 2, "steps": 200, "eval_every": 200}
    ctrlrl.train("sac", "HalfCheetah-v5", out=str(tmp_path / "parts"), **short)
    ctrlrl.resume(tmp_path / "parts", steps=400, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UsageError, match="has done 400 steps already"):
        ctrlrl.resume(tmp_path / "parts", steps=300)


@pytest.mark.parametrize(
    ("env", "more"),
    [
        ("Pendulum-v1", {}),
        ("Humanoid-v5", {"steps": 200}),  # reads derived quantities that lag the state; bounds of 0.4
        ("HalfCheetah-v5", {"num_envs": 3, "backend": "workers", "steps": 330}),
        (MODULE + "ctrlrl-test/Image-v0", {"buffer": {"n_step": 3}}),  # nested Dict, uint8
        (
            "Pendulum-v1",
            {"buffer": {"capacity": 100}, "agent": {"hidden": [16], "batch_size": 8, "normalize_obs": True}},
        ),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, env, more):
    settings = SMALL | more
    encoder = {}
    if "Image" in env:
        encoder = {"encoder": DictEncoder}
    ctrlrl.train("sac", env, out=str(tmp_path / "whole"), callbacks=[StopAt(10**9)], **settings, **encoder)
    for at in (settings["steps"] // 3, settings["steps"] // 2 + 7):
        calls = StopAt(at, interrupt=True)
        with pytest.raises(Interrupted, match="Go on with: ctrlrl resume"):
            if at == settings["steps"] // 3:
                ctrlrl.train("sac", env, out=str(tmp_path / "parts"), callbacks=[calls], **settings, **encoder)
            else:
                ctrlrl.resume(tmp_path / "parts", callbacks=[calls], quiet=True, **encoder)
        assert json.loads((tmp_path / "parts" / "status.json").read_text())["state"] == "interrupted"
    ctrlrl.resume(tmp_path / "parts", callbacks=[StopAt(10**9)], quiet=True, **encoder)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert "continues exactly" in records(tmp_path / "parts", "note")[-1]["text"]


class DictEncoder(nn.Module):
    """Mean pixel and position."""

    def __init__(self, space):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, obs):
        pixel = obs["image"].float().flatten(1).mean(1, keepdim=True) / 255
        return self.linear(torch.cat([pixel, obs["body.position"].float()], 1))


def test_a_native_backend_with_groups_and_invalid_rows_trains_and_resumes(tmp_path):
    settings = SMALL | {"num_envs": 4}
    make = lambda: native_vector(4)  # noqa: E731
    ctrlrl.train("sac", make(), eval_env=native_vector(2), out=str(tmp_path / "whole"), **settings)
    with pytest.raises(Interrupted):
        stop = [StopAt(200, interrupt=True)]
        ctrlrl.train("sac", make(), eval_env=native_vector(2), out=str(tmp_path / "parts"), callbacks=stop, **settings)
    with pytest.raises(UsageError, match="pass the same one: env="):
        ctrlrl.resume(tmp_path / "parts", callbacks=[StopAt(10**9)])
    again = [StopAt(10**9)]
    ctrlrl.resume(tmp_path / "parts", env=make(), eval_env=native_vector(2), callbacks=again, quiet=True)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert all(torch.equal(v, parts["rows"][k]) for k, v in whole["rows"].items())
    state = load_checkpoint(RunFolder(tmp_path / "whole").find_checkpoint("last"))
    assert state["loop"]["env_steps"] == int(whole["rows"]["valid"].sum())  # filler rows are no environment steps


class Drifting(WalkEnv):
    """Draws from a source that nobody saves, so its episodes cannot be continued; they last 40 steps."""

    def step(self, action):
        self.t = self.t + 1
        self.position = np.random.default_rng().normal(size=2)
        return self._obs(), 0.0, False, self.t == 40, {}

    def reset(self, **kwargs):
        self.t = 0
        return super().reset(**kwargs)


def test_an_environment_that_cannot_continue_starts_afresh_and_says_so(tmp_path):
    with pytest.raises(Interrupted):
        stop = [StopAt(103, interrupt=True)]
        ctrlrl.train("sac", lambda: Drifting(), out=str(tmp_path / "r"), callbacks=stop, **SMALL)
    ctrlrl.resume(tmp_path / "r", env=lambda: Drifting(), callbacks=[StopAt(10**9)], quiet=True)
    note = records(tmp_path / "r", "note")[-1]["text"]
    assert "environment 0 started a new episode (" in note
    session = json.loads((tmp_path / "r" / "provenance.json").read_text())["sessions"][-1]
    assert session["from_step"] == 103
    assert "environment 0 started a new episode (" in session["notes"][-1]
    rows = contents(tmp_path / "r")["rows"]
    assert int((~rows["valid"]).sum()) == 1  # the one filler row between the two halves
    assert len(rows["valid"]) == 401


@pytest.mark.parametrize("backend", ["gymnasium", "workers"])
def test_a_crashing_environment_is_reported_and_the_run_saved(tmp_path, backend):
    env = MODULE + "ctrlrl-test/Crashing-v0"
    settings = SMALL | {"env_kwargs": {"at_step": 90}, "backend": backend, "eval_every": 0}
    with pytest.raises(EnvironmentFailure) as error:
        ctrlrl.train("sac", env, out=str(tmp_path / "r"), **settings)
    text = str(error.value)
    assert "Traceback" in text
    assert "standins.py" in text
    assert "Go on with: ctrlrl resume" in text
    state = load_checkpoint(RunFolder(tmp_path / "r").find_checkpoint("last"))
    assert state["loop"]["env_steps"] == 89  # everything up to the step that failed
    status = json.loads((tmp_path / "r" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 89)
    assert (tmp_path / "r" / "report.html").exists()
    with pytest.raises(EnvironmentFailure):  # goes on, with a fresh environment that fails 90 steps later
        ctrlrl.resume(tmp_path / "r", quiet=True)
    assert load_checkpoint(RunFolder(tmp_path / "r").find_checkpoint("last"))["loop"]["env_steps"] == 178


def test_a_hanging_worker_is_reported_with_where_it_hangs_and_the_run_saved(tmp_path):
    env = MODULE + "ctrlrl-test/Hanging-v0"
    settings = SMALL | {"env_kwargs": {"at_step": 90}, "backend": "workers", "eval_every": 0, "worker_timeout": 1.0}
    with pytest.raises(EnvironmentFailure) as error:
        ctrlrl.train("sac", env, out=str(tmp_path / "r"), **settings)
    text = str(error.value)
    assert "standins.py" in text
    assert "in fail" in text  # the frame that sleeps
    assert "Go on with: ctrlrl resume" in text
    assert load_checkpoint(RunFolder(tmp_path / "r").find_checkpoint("last"))["loop"]["env_steps"] == 89


def test_tensorboard_shows_the_record_also_of_a_resumed_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Interrupted):
        ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), callbacks=[StopAt(230, interrupt=True)], **SMALL)
    ctrlrl.resume(tmp_path / "r", checkpoint="step-000000000210", callbacks=[StopAt(10**9)], quiet=True)
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    for tag, kind, value in (
        ("evaluation/return", "eval", lambda r: r["mean"]),
        ("episode/return", "episode", lambda r: r["return"]),
        ("train/critic_loss", "train", lambda r: r["metrics"].get("critic_loss")),
    ):
        want = [(r["step"], value(r)) for r in records(tmp_path / "r", kind) if value(r) is not None]
        got = [(e.step, e.value) for e in events.Scalars(tag)]
        assert got == [(step, pytest.approx(x, rel=1e-6)) for step, x in want], tag


def test_nan_from_the_environment_stops_with_the_run_saved(tmp_path):
    settings = SMALL | {"env_kwargs": {"at_step": 100}, "eval_every": 0}
    with pytest.raises(
        NonFiniteError, match=r"non-finite reward in environment 0[\s\S]*Go on with: ctrlrl resume"
    ) as error:
        ctrlrl.train("sac", MODULE + "ctrlrl-test/Nan-v0", out=str(tmp_path / "r"), **settings)
    assert error.value.exit_code == 3
    rows = contents(tmp_path / "r")["rows"]
    assert all(torch.isfinite(v.float()).all() for v in rows.values())


def test_non_finite_training_keeps_the_last_good_checkpoint(tmp_path):
    class Poison(ctrlrl.Callback):
        def on_step(self, loop):
            if loop.env_steps == 260:
                next(loop.agent.critics.parameters()).data.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match=r"became non-finite.*critic_loss") as error:
        ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), callbacks=[Poison()], **SMALL)
    folder = RunFolder(tmp_path / "r")
    assert folder.find_checkpoint("last").name == "step-000000000210"
    assert str(folder.find_checkpoint("last")) in str(error.value)
    post_mortem = load_checkpoint(next(folder.path.glob("non-finite-*")))
    assert len(post_mortem["batches"]) == 16
    assert post_mortem["batches"][-1]["index"].shape == (8, 16)  # of the eight updates in a row
    with pytest.raises(NonFiniteError, match=r"became non-finite.*critic_loss"):
        ctrlrl.resume(tmp_path / "r", callbacks=[Poison()], quiet=True)  # the same again, and no other error
    ctrlrl.resume(tmp_path / "r", callbacks=[ctrlrl.Callback()], quiet=True)
    assert not list(folder.path.glob("non-finite-*"))


class EvaluationFails(gym.Wrapper):
    """Raises in its `broken`-th evaluation, and in no other."""

    count, broken = 0, 0

    def reset(self, **kwargs):
        EvaluationFails.count += 1
        if EvaluationFails.count == EvaluationFails.broken:
            raise RuntimeError("no evaluation today")
        return super().reset(**kwargs)


@pytest.mark.parametrize("which", ["periodic", "final"])
def test_a_failed_evaluation_costs_nothing(tmp_path, which):
    settings = SMALL | {"steps": 240, "eval_every": 100, "eval_episodes": 1, "checkpoint_every": 120}
    make = lambda: EvaluationFails(gym.make("Pendulum-v1"))  # noqa: E731
    EvaluationFails.count, EvaluationFails.broken = 0, 0
    ctrlrl.train("sac", "Pendulum-v1", eval_env=make, out=str(tmp_path / "whole"), **settings)
    # One reset to try the seeds, then one for each episode and one more where it ends: the 2nd begins the evaluation
    # at step 100, the 6th the one at the end.
    EvaluationFails.count, EvaluationFails.broken = 0, {"periodic": 2, "final": 6}[which]
    with pytest.raises(EnvironmentFailure, match=r"no evaluation today[\s\S]*Go on with: ctrlrl resume"):
        ctrlrl.train("sac", "Pendulum-v1", eval_env=make, out=str(tmp_path / "parts"), **settings)
    at = {"periodic": 100, "final": 240}[which]
    assert load_checkpoint(RunFolder(tmp_path / "parts").find_checkpoint("last"))["loop"]["env_steps"] == at
    ctrlrl.resume(tmp_path / "parts", eval_env=make, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_every_checkpoint_leads_to_the_same_end(tmp_path):
    settings = SMALL | {"keep_checkpoints": 10, "num_envs": 2, "buffer": {"capacity": 120, "n_step": 2}}
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "whole"), **settings)
    names = [p.name for p in RunFolder(run.path).step_checkpoints()]
    assert names[0] == "step-000000000000"
    assert len(names) == 7
    shutil.copytree(run.path, tmp_path / "again")
    for name in reversed(names[:-1]):  # resuming from one deletes those after it
        ctrlrl.resume(tmp_path / "again", checkpoint=name, quiet=True)
        assert_same(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("steps", [240, 250])
def test_resuming_a_finished_run_changes_nothing(tmp_path, steps):
    settings = SMALL | {"steps": steps, "eval_every": 100, "checkpoint_every": 10}  # a checkpoint is due at the end too
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **settings)
    before = contents(run.path)
    assert before["records"][-1]["kind"] == "eval"
    ctrlrl.resume(run.path, quiet=True)
    after = contents(run.path)
    assert before["records"] == after["records"]
    assert before["tree"] == after["tree"]


def test_a_failure_right_after_a_checkpoint_is_left_behind(tmp_path):
    """The episodes start afresh from there, so that the same failure does not come back with every resume."""
    settings = SMALL | {"env_kwargs": {"at_step": 141}, "eval_every": 0}
    env = MODULE + "ctrlrl-test/Nan-v0"
    with pytest.raises(NonFiniteError):
        ctrlrl.train("sac", env, out=str(tmp_path / "r"), **settings)
    names = [p.name for p in RunFolder(tmp_path / "r").step_checkpoints()]
    assert names == ["step-000000000140", "step-000000000140-0002"]
    rows = []
    for copy in ("a", "b"):
        shutil.copytree(tmp_path / "r", tmp_path / copy)
        with pytest.raises(NonFiniteError):
            ctrlrl.resume(tmp_path / copy, quiet=True)
        assert load_checkpoint(RunFolder(tmp_path / copy).find_checkpoint("last"))["loop"]["env_steps"] == 280
        rows.append(contents(tmp_path / copy)["rows"])
    assert all(torch.equal(rows[0][k], rows[1][k]) for k in rows[0])  # starting afresh is seeded


@pytest.mark.parametrize("keep", [1, 2])
def test_failing_at_once_again_and_again_loses_nothing(tmp_path, keep):
    """Each resume fails in its first step, and may write one more checkpoint of that step; then all is well again."""
    env = MODULE + "ctrlrl-test/Crashing-v0"
    run, settings = tmp_path / "r", SMALL | {"eval_every": 0, "keep_checkpoints": keep}
    with pytest.raises(EnvironmentFailure):
        ctrlrl.train("sac", env, env_kwargs={"at_step": 101}, out=str(run), **settings)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"env_kwargs": {"at_step": 1}}))
    for _ in range(3):
        with pytest.raises(EnvironmentFailure):
            ctrlrl.resume(run, quiet=True)
        last = load_checkpoint(RunFolder(run).find_checkpoint("last"))
        assert last["loop"]["env_steps"] == 100
        assert last["env"]["json"] == [None]  # the failing episode is not gone on with
    (run / "config.json").write_text(json.dumps(config | {"env_kwargs": {"at_step": 10**6}}))
    ctrlrl.resume(run, steps=230, quiet=True)
    ctrlrl.resume(run, steps=400, quiet=True)
    assert RunFolder(run).find_checkpoint("last").name == "step-000000000400"


def test_an_orphaned_best_beside_a_damaged_checkpoint_does_not_stop_a_resume(tmp_path):
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL)
    folder = RunFolder(run.path)
    (folder.step_checkpoints()[0] / "state.json").unlink()
    shutil.copytree(folder.find_checkpoint("best"), folder.checkpoints / "best-000000000450")
    ctrlrl.resume(run.path, steps=600, quiet=True)
    assert RunFolder(run.path).find_checkpoint("last").name == "step-000000000600"


def test_nan_in_an_evaluation_stops_the_training_too(tmp_path):
    nan = MODULE + "ctrlrl-test/Nan-v0"
    walk = MODULE + "ctrlrl-test/Walk-v0"
    with pytest.raises(NonFiniteError, match=r"Nan-v0 gave a non-finite reward[\s\S]*Go on with"):
        ctrlrl.train("sac", walk, eval_env=nan, out=str(tmp_path / "r"), **SMALL)
    with pytest.raises(UsageError, match="pass the same one: eval_env="):
        ctrlrl.resume(tmp_path / "r", quiet=True)


def test_a_users_own_vector_environment_that_raises_keeps_its_traceback_and_the_run(tmp_path):
    env = native_vector(2)
    step, count = env.step, 0

    def fails(action):
        nonlocal count
        count += 1
        if count == 90:
            raise RuntimeError("out of coffee")
        return step(action)

    env.step = fails
    with pytest.raises(RuntimeError, match="out of coffee") as error:
        ctrlrl.train("sac", env, out=str(tmp_path / "r"), **SMALL | {"num_envs": 2, "eval_every": 0})
    assert "Go on with: ctrlrl resume" in error.value.__notes__[0]
    state = load_checkpoint(RunFolder(tmp_path / "r").find_checkpoint("last"))
    assert state["replay"]["total_rows"] == 89


def test_a_run_that_fails_at_once_can_be_resumed(tmp_path):
    with pytest.raises(EnvironmentFailure):
        settings = SMALL | {"env_kwargs": {"at_step": 1}, "eval_every": 0}
        ctrlrl.train("sac", MODULE + "ctrlrl-test/Crashing-v0", out=str(tmp_path / "r"), **settings)
    with pytest.raises(EnvironmentFailure):
        ctrlrl.resume(tmp_path / "r", quiet=True)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_resume_that_cannot_start_changes_nothing(tmp_path):
    narrow, wide = (lambda i, o, w=w: nn.Sequential(nn.Linear(i, w), nn.ReLU(), nn.Linear(w, o)) for w in (8, 9))
    run = ctrlrl.train("sac", "Pendulum-v1", network=narrow, out=str(tmp_path / "r"), **SMALL)
    before = snapshot(run.path)
    older = RunFolder(run.path).step_checkpoints()[0].name
    with pytest.raises(UsageError, match="the checkpoint does not fit the agent"):
        ctrlrl.resume(run.path, checkpoint=older, network=wide)
    with pytest.raises(UsageError, match="the network is not the one of"):
        ctrlrl.load(run, network=wide)
    segment = next(RunFolder(run.path).replay.iterdir())
    good = segment.read_bytes()
    segment.write_bytes(good[:-1])
    with pytest.raises(UsageError, match="is altered or truncated"):
        ctrlrl.resume(run.path, network=narrow, steps=500)
    segment.write_bytes(good)
    assert snapshot(run.path) == before


def test_two_processes_cannot_train_one_run(tmp_path):
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL)
    with RunFolder(run.path).locked(), pytest.raises(UsageError, match=r"is being trained by process \d+"):
        ctrlrl.resume(run.path, steps=500)


def test_a_half_deleted_checkpoint_does_not_stop_a_resume(tmp_path):
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL)
    older = RunFolder(run.path).step_checkpoints()[0]
    (older / "state.json").unlink()
    ctrlrl.resume(run.path, steps=600, quiet=True)
    assert RunFolder(run.path).find_checkpoint("last").name == "step-000000000600"


def test_acting_is_deterministic_with_dropout(tmp_path):
    def network(i, o):
        return nn.Sequential(nn.Linear(i, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, o))

    run = ctrlrl.train("sac", "Pendulum-v1", network=network, out=str(tmp_path / "r"), **SMALL)
    policy = ctrlrl.load(run, network=network).policy
    assert torch.equal(policy.act(torch.ones(1, 3))[0], policy.act(torch.ones(1, 3))[0])
    twice = [ctrlrl.evaluate(run, network=network, episodes=2).returns for _ in range(2)]
    assert twice[0] == twice[1]
    assert run.policy.training  # evaluation gives the policy back as it was


def test_evaluating_needs_the_environment_the_run_was_trained_on(tmp_path):
    settings = SMALL | {"eval_every": 0}
    run = ctrlrl.train("sac", gym.make("Pendulum-v1", g=1.0), out=str(tmp_path / "r"), **settings)
    with pytest.raises(UsageError, match="with an own env; pass it: env="):
        ctrlrl.evaluate(run, checkpoint="last")
    ctrlrl.evaluate(run, checkpoint="last", env=lambda: gym.make("Pendulum-v1", g=1.0))


def test_another_device_type_starts_new_random_numbers_and_says_so(tmp_path):
    """A checkpoint of a GPU's generators cannot be loaded on a CPU; here one is made to look like that."""
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL)
    folder = RunFolder(run.path)
    path = folder.find_checkpoint("last")
    state = load_checkpoint(path)
    state["device"] = "cuda"
    state["agent"]["generator"] = state["replay"]["generator"] = torch.zeros(16, dtype=torch.uint8)
    state["global_generators"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    shutil.rmtree(path)
    save_checkpoint(folder.checkpoints, path.name, state)
    ctrlrl.resume(run.path, steps=450, device="cpu", quiet=True)
    assert "device cuda -> cpu: random numbers start from a new seed" in records(run.path, "note")[-1]["text"]


def test_a_callback_whose_state_cannot_be_saved_is_refused_at_the_start(tmp_path):
    class Bad(ctrlrl.Callback):
        def state_dict(self):
            return {"seen": {1, 2}}

    with pytest.raises(UsageError, match="a callback's state_dict cannot be saved"):
        ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), callbacks=[Bad()], **SMALL)
    assert not (tmp_path / "r").exists()


def test_an_own_encoder_and_normalization_are_not_mixed(tmp_path):
    with pytest.raises(UsageError, match=r"agent\.normalize_obs goes with the built-in networks"):
        agent = SMALL["agent"] | {"normalize_obs": True}
        ctrlrl.train(
            "sac", "Pendulum-v1", encoder=lambda s: nn.Flatten(), out=str(tmp_path), **SMALL | {"agent": agent}
        )


def test_a_callback_can_stop_and_writers_see_every_record(tmp_path):
    class Keep:
        def __init__(self):
            self.kept, self.closed = [], False

        def write(self, record):
            self.kept.append(record)

        def close(self):
            self.closed = True

    writer, stop = Keep(), StopAt(150)
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), callbacks=[stop], writers=[writer], **SMALL)
    assert stop.calls == 150
    assert writer.closed
    assert writer.kept == [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert {r["kind"] for r in writer.kept} == {"train", "eval", "note"}
    assert json.loads((run.path / "status.json").read_text())["state"] == "finished"


def test_load_gives_the_best_policy_without_making_the_environment(tmp_path, monkeypatch):
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL)
    monkeypatch.setattr("ctrlrl.training.setup.make_env", None)
    policy = ctrlrl.load(run).policy
    action, state, extras = policy.act(torch.zeros(2, 3))
    assert action.shape == (2, 1)
    assert (state, extras) == ({}, {})
    last = ctrlrl.load(run.path, checkpoint="last").policy
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), run.policy.parameters(), strict=True))
    with pytest.raises(UsageError, match="has no checkpoint 'step-1'; there: best-"):
        ctrlrl.load(run, checkpoint="step-1")


def test_evaluate_repeats_what_training_recorded(tmp_path):
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL)
    best = max(records(run.path, "eval"), key=lambda r: r["mean"])
    assert ctrlrl.evaluate(run).returns == best["returns"]
    assert len(ctrlrl.evaluate(run, episodes=3).returns) == 3


def test_own_networks_are_needed_again(tmp_path):
    network = lambda i, o: nn.Sequential(nn.Linear(i, 8), nn.ELU(), nn.Linear(8, o))  # noqa: E731
    run = ctrlrl.train("sac", "Pendulum-v1", network=network, out=str(tmp_path / "r"), **SMALL)
    with pytest.raises(UsageError, match="pass the same one: network="):
        ctrlrl.load(run)
    assert isinstance(ctrlrl.load(run, network=network).policy.trunk[1], nn.ELU)


def test_an_environment_object_needs_one_for_evaluation(tmp_path):
    with pytest.raises(UsageError, match="evaluation needs an environment of its own"):
        ctrlrl.train("sac", gym.make("Pendulum-v1"), out=str(tmp_path / "r"), **SMALL)
    assert not (tmp_path / "r").exists()
    ctrlrl.train("sac", gym.make("Pendulum-v1"), out=str(tmp_path / "r"), **SMALL | {"eval_every": 0})
    vector = gym.make_vec("Pendulum-v1", 2, vectorization_mode="sync")
    ctrlrl.train("sac", vector, out=str(tmp_path / "v"), **SMALL | {"eval_every": 0, "num_envs": 2, "steps": 440})
    rows = contents(tmp_path / "v")["rows"]
    assert int(rows["truncated"].sum()) == 2
    assert int((~rows["valid"]).sum()) == 2  # Gymnasium's own autoreset rows, held back


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / name), seed=seed, **SMALL)
    assert_same(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "a", tmp_path / "c")


def test_old_checkpoints_and_segments_are_deleted(tmp_path):
    small = SMALL | {"buffer": {"capacity": 100}, "checkpoint_every": 30, "keep_checkpoints": 2}
    run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / "r"), **small)
    folder = RunFolder(run.path)
    assert [p.name for p in folder.step_checkpoints()] == ["step-000000000390", "step-000000000400"]
    starts = sorted(int(p.name.split("-")[1]) for p in folder.replay.iterdir())
    assert starts[0] >= 390 - 100 - 30
    assert not list(run.path.rglob(".tmp-*"))


def test_killed_at_any_moment_and_resumed_equals_uninterrupted(tmp_path):
    """20 runs die two or three times each, at random moments or inside file operations."""
    command = [sys.executable, "-m", "tests.kill_driver", str(tmp_path), "20", "Pendulum-v1"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "20 of 20 equal"
    assert done.stdout.count("died at nothing") < 5


@pytest.mark.slow
def test_pendulum_is_solved_over_three_seeds(tmp_path):
    """RL Zoo's SAC reaches -150 on Pendulum-v1; an untrained policy gets about -1,200."""
    finals = []
    for seed in range(3):
        run = ctrlrl.train("sac", "Pendulum-v1", out=str(tmp_path / str(seed)), seed=seed, steps=8_000, quiet=True)
        finals.append(records(run.path, "eval")[-1]["mean"])
    assert np.mean(finals) > -220, finals
