"""Bridges into the contract, tested against stand-ins (`foreign_standins.py`); EnvPool itself where installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import ctrlrl
from ctrlrl.envs.foreign import framework_of, from_envpool, from_isaaclab, from_maniskill, from_mjlab
from ctrlrl.envs.make import make_env
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import UsageError
from ctrlrl.replay.buffer import ReplayBuffer
from ctrlrl.tree import Obs
from tests.conformance import check_vector_env, copy_step
from tests.foreign_standins import (
    BOX,
    CRITIC,
    ENDS_WITHIN,
    DirectRLEnv,
    ManagerBasedRlEnv,
    ManiSkillVectorEnv,
    length,
    make_pool,
)

MAKERS: dict[str, Any] = {
    "envpool": lambda n: from_envpool(make_pool(n)),
    "maniskill": lambda n: from_maniskill(ManiSkillVectorEnv(n)),
    "isaaclab-3": lambda n: from_isaaclab(DirectRLEnv(n, final=True), success="goal"),
    "isaaclab-previous": lambda n: from_isaaclab(DirectRLEnv(n), timeouts="previous", success="goal"),
    "isaaclab-drop": lambda n: from_isaaclab(DirectRLEnv(n), timeouts="drop", success="goal"),
    "mjlab": lambda n: from_mjlab(ManagerBasedRlEnv(n), clip_actions=1.0, success="goal"),
}


def main_entry(obs: Obs) -> torch.Tensor:
    """[start, episode, t] of each row."""
    return obs[next(name for name in ("policy", "state") if name in obs)] if isinstance(obs, dict) else obs


def is_first(obs: Obs) -> torch.Tensor:
    return main_entry(obs)[:, 2] == 0


@pytest.mark.parametrize("name", MAKERS)
def test_contract(name: str) -> None:
    check_vector_env(
        MAKERS[name], ends_within=ENDS_WITHIN, restorable=False, next_step=name == "envpool", is_first=is_first
    )


@pytest.mark.parametrize("name", MAKERS)
def test_each_step_by_hand(name: str) -> None:
    """Row 0 ends by its task after 3 steps, row 1 by time after 4; actions of 7 are applied as 1."""
    env: VectorEnv = MAKERS[name](2)
    env.reset(0)
    actions = torch.full((2, 2), 7.0)
    found: list[list[tuple[Any, ...]]] = [[], []]
    for _ in range(5):
        step = copy_step(env.step(actions))
        assert (step.action == 1).all()
        obs, final = main_entry(step.obs), main_entry(step.final_obs)
        for row in range(2):
            flags = "".join(
                letter
                for letter, value in zip("TCV", (step.terminated, step.truncated, step.valid), strict=True)
                if value[row]
            )
            success = float(step.log["success"][row])
            found[row].append(
                (
                    flags,
                    float(step.reward[row]),
                    tuple(final[row, 1:3].tolist()),
                    tuple(obs[row, 1:3].tolist()),
                    success,
                )
            )
    nan = pytest.approx(float("nan"), nan_ok=True)
    # Flags (Terminated, trunCated, Valid), reward, (episode, t) of the true next observation and of what to act on.
    before, after = ("V", 1.0, (0, 1), (0, 1), 0.0), ("V", 1.0, (0, 2), (0, 2), 0.0)
    third = ("V", 1.0, (0, 3), (0, 3), 0.0)
    rows = {
        "same-step": [
            [before, after, ("TV", 1.0, (0, 3), (1, 0), 1.0), ("V", 1.0, (1, 1), (1, 1), 0.0)],
            [before, after, third, ("CV", 1.0, (0, 4), (1, 0), 0.0), ("V", 1.0, (1, 1), (1, 1), 0.0)],
        ],
        "envpool": [
            [before, after, ("TV", 1.0, (0, 3), (0, 3), 1.0), ("", 0.0, (1, 0), (1, 0), nan)],
            [before, after, third, ("CV", 1.0, (0, 4), (0, 4), 0.0), ("", 0.0, (1, 0), (1, 0), nan)],
        ],
    }
    # Without the last observation, the one before it stands for it; after an end by the task nothing is read from it.
    ended = ("TV", 1.0, (0, 2), (1, 0), 1.0)
    rows["isaaclab-previous"] = [
        [before, after, ended, rows["same-step"][0][3]],
        [before, after, third, ("CV", 1.0, (0, 3), (1, 0), 0.0), rows["same-step"][1][4]],
    ]
    rows["isaaclab-drop"] = [
        rows["isaaclab-previous"][0],
        [before, after, third, ("", 0.0, (1, 0), (1, 0), nan), rows["same-step"][1][4]],
    ]
    for row, expected in enumerate(rows.get(name, rows["same-step"])):
        assert found[row][: len(expected)] == expected, f"row {row}"


@pytest.mark.parametrize("name", MAKERS)
def test_no_transition_in_the_replay_spans_two_episodes(name: str) -> None:
    env: VectorEnv = MAKERS[name](4)
    obs = env.reset(0)
    buffer = ReplayBuffer(env.observation_space, env.action_space, capacity=400, num_envs=4)
    buffer.begin(obs)
    stored = 0
    for _ in range(60):
        step = env.step(torch.ones(4, 2))
        buffer.add(step)
        stored += int(step.valid.sum())
    batch = buffer.sample(1, 2000, gamma=0.9)
    now, then = main_entry(batch.obs)[0], main_entry(batch.next_obs)[0]
    assert (now[:, 1] == then[:, 1]).all()
    assert len(torch.unique(torch.cat([now, batch.action[0]], 1), dim=0)) > stored // 2
    if name in ("isaaclab-previous", "isaaclab-drop"):
        late = then[:, 2] == now[:, 2]  # the last row of an episode, whose next observation is lost
        assert late.any() and (then[~late, 2] == now[~late, 2] + 1).all()
        if name == "isaaclab-drop":
            assert (batch.discount[0, late] == 0).all()  # only where no value follows
    else:
        assert (then[:, 2] == now[:, 2] + 1).all()
    assert (batch.discount == 0).any() and (batch.discount == 0.9).any()


def test_groups_get_our_names() -> None:
    for env in (MAKERS["isaaclab-3"](3), MAKERS["mjlab"](3)):
        obs = env.reset(0)
        assert list(obs) == list(env.observation_space.spaces) == ["policy", "privileged"]
        step = env.step(torch.zeros(3, 2))
        for seen in (obs, step.obs, step.final_obs):
            assert torch.equal(seen["privileged"], seen["policy"][:, :3] + CRITIC)
    named = from_isaaclab(DirectRLEnv(2, final=True), groups={"critic": "policy", "policy": "camera"})
    named_obs = named.reset(0)
    assert isinstance(named_obs, dict) and (named_obs["policy"] == named_obs["camera"] + CRITIC).all()
    maniskill = MAKERS["maniskill"](2)
    assert list(maniskill.reset(0)) == ["extra.goal", "state"]


def test_a_row_that_goes_on_keeps_what_it_saw() -> None:
    """mjlab observes all rows again when some are reset, with other noise."""
    env = from_mjlab(ManagerBasedRlEnv(3))
    env.reset(0)
    steps = [copy_step(env.step(torch.zeros(3, 2))) for _ in range(3)]
    assert steps[2].terminated.tolist() == [True, False, False]
    obs, final = main_entry(steps[2].obs), main_entry(steps[2].final_obs)
    assert torch.equal(obs[1:], final[1:]) and not torch.equal(obs[0, 3:], final[0, 3:])


def test_only_ended_rows_are_reset_in_mjlab() -> None:
    inner = ManagerBasedRlEnv(3)
    env = from_mjlab(inner)
    env.reset(0)
    for _ in range(60):
        env.step(torch.zeros(3, 2))
    assert inner.resets == {row: 1 + 60 // length(row) for row in range(3)}


@pytest.mark.parametrize(
    "make", [lambda: from_isaaclab(DirectRLEnv(2, finite=True)), lambda: from_mjlab(ManagerBasedRlEnv(2, finite=True))]
)
def test_in_a_finite_horizon_the_time_limit_is_the_tasks(make: Any) -> None:
    env = make()
    env.reset(0)
    steps = [copy_step(env.step(torch.zeros(2, 2))) for _ in range(4)]
    assert steps[3].terminated.tolist() == [False, True]
    assert not any(step.truncated.any() for step in steps)


def test_seeds_reach_the_pool() -> None:
    pool: Any = make_pool(2, env_seed=[8, 9])
    pool._render_mode = "rgb_array"  # as envpool.make_gymnasium sets it
    env = from_envpool(pool)
    given = env.reset()
    assert torch.equal(given, from_envpool(make_pool(2)).reset([8, 9]))  # type: ignore[arg-type]
    env.reset([2**32 - 1, 9])
    remade = env._env  # type: ignore[attr-defined]
    assert remade is not pool and remade.config["env_seed"] == [-1, 9] and remade._render_mode == "rgb_array"
    assert pool.close_calls == 0
    env.close()
    env.close()
    assert pool.close_calls == 1


def test_one_seed_for_a_batch_that_takes_one() -> None:
    env = MAKERS["isaaclab-3"](2)
    first = main_entry(env.reset([3, 4])).clone()
    assert torch.equal(main_entry(env.reset([3, 4])), first)
    assert not torch.equal(main_entry(env.reset([4, 3])), first)
    with pytest.raises(UsageError, match="one seed, or 2, one per environment; got 3"):
        env.reset([1, 2, 3])


@pytest.mark.parametrize("name", ["maniskill", "isaaclab-3", "isaaclab-previous", "isaaclab-drop"])
def test_no_step_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there are no values: whatever reads one raises."""
    n, meta = 3, torch.device("meta")

    def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(n, *shape, dtype=dtype, device=meta)

    flags = rows(dtype=torch.bool)
    seen: Any = {"policy": rows(3), "critic": rows(3), "state": rows(3), "extra": {"goal": rows(3)}}
    extras: Any = {"final_obs": seen, "final_observation": seen, "success": flags, "final_info": {"success": flags}}
    inner: Any = ManiSkillVectorEnv(n) if name == "maniskill" else DirectRLEnv(n, final=name == "isaaclab-3")
    inner.unwrapped.device = inner.device = meta
    monkeypatch.setattr(inner, "reset", lambda **_: (seen, {}))
    monkeypatch.setattr(inner, "step", lambda action: (seen, rows(), flags, flags, extras))
    inner.termination_manager = SimpleNamespace(active_terms=["goal"], get_term=lambda _: flags)
    timeouts = name.partition("-")[2] if name in ("isaaclab-previous", "isaaclab-drop") else None
    env = from_maniskill(inner) if name == "maniskill" else from_isaaclab(inner, timeouts=timeouts, success="goal")
    env.reset(0)
    step = env.step(rows(2))
    for value in (step.action, step.reward, step.terminated, step.truncated, step.valid, step.log["success"]):
        assert value.device == meta == env.device
    assert main_entry(step.final_obs).shape == (n, 3)


def test_make_env_recognises_them_and_leaves_them_open() -> None:
    given: list[Any] = [
        make_pool(2),
        ManiSkillVectorEnv(2),
        gym.Wrapper(DirectRLEnv(2, final=True)),
        ManagerBasedRlEnv(2),
    ]
    frameworks = ["envpool", "mani_skill", "isaaclab", "mjlab"]
    for raw, framework in zip(given, frameworks, strict=True):
        assert framework_of(raw) == framework
        env = make_env(raw, num_envs=2)
        env.reset(0)
        assert env.step(torch.zeros(2, 2)).valid.all()
        env.close()
        assert raw.unwrapped.close_calls == 0 if framework != "mani_skill" else raw.close_calls == 0
    assert framework_of(gym.make("CartPole-v1")) is None and framework_of("CartPole-v1") is None
    with pytest.raises(UsageError, match="has 2 environments, num_envs is 3"):
        make_env(given[3], num_envs=3)


@pytest.mark.parametrize("raw", [False, True])
def test_training(raw: bool, tmp_path: Any) -> None:
    inner = ManagerBasedRlEnv(4)
    env: Any = inner if raw else from_mjlab(inner, name="Rows-v0")
    run = ctrlrl.train(
        "ppo", env=env, num_envs=4, steps=64, eval_every=0, video=False, quiet=True, out=str(tmp_path / "run"),
        agent={"hidden": [8]}, rollout_steps=8,
    )  # fmt: skip
    assert run.config.env == ("ManagerBasedRlEnv" if raw else "Rows-v0")
    assert inner.close_calls == 0 and inner.resets[0] > 3


def test_an_object_is_not_evaluated_on_while_it_trains(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="evaluation needs an environment of its own"):
        ctrlrl.train("ppo", env=ManagerBasedRlEnv(2), num_envs=2, steps=64, out=str(tmp_path / "run"))  # type: ignore[arg-type]


def test_clip_actions_bounds_what_has_no_bounds() -> None:
    inner = DirectRLEnv(2, final=True, bounded=False)
    assert np.isinf(from_isaaclab(inner).action_space.high).all()  # type: ignore[attr-defined]
    env = from_isaaclab(inner, clip_actions=0.5)
    assert env.action_space == gym.spaces.Box(-0.5, 0.5, (2,), np.float32)
    env.reset(0)
    step = env.step(torch.tensor([[3.0, 0.1], [-3.0, 0.2]]))
    assert step.action.tolist() == [[0.5, pytest.approx(0.1)], [-0.5, pytest.approx(0.2)]]
    assert step.reward.tolist() == [0.5, -0.5]


def test_pictures() -> None:
    inner = ManiSkillVectorEnv(2)
    env = from_maniskill(inner)
    with pytest.raises(UsageError, match="made without pictures"):
        env.render()
    inner.base.render_mode = "rgb_array"
    assert env.render().shape == (4, 6, 3) and env.render().dtype == np.uint8


def _nested() -> Any:
    env = DirectRLEnv(2, final=True)
    env.single_observation_space = gym.spaces.Dict({"policy": gym.spaces.Dict({"joints": BOX})})
    return env


def _without_policy() -> Any:
    env = DirectRLEnv(2, final=True)
    env.single_observation_space = gym.spaces.Dict({"critic": BOX, "camera": BOX})
    return env


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_envpool(gym.make("CartPole-v1")), "takes what envpool.make_gymnasium returns, got a"),
        (lambda: from_envpool(make_pool(4, batch_size=2)), "batch_size 2 for 4 environments"),
        (lambda: from_maniskill(DirectRLEnv(2)), "the DirectRLEnv passed has no auto_reset"),
        (lambda: from_maniskill(ManiSkillVectorEnv(2, auto_reset=False)), "auto_reset=True"),
        (lambda: from_isaaclab(gym.make("CartPole-v1")), "takes an Isaac Lab DirectRLEnv.*has no num_envs, device"),
        (lambda: from_isaaclab(DirectRLEnv(2)), "cfg.compute_final_obs = True; else choose"),
        (lambda: make_env(DirectRLEnv(2), num_envs=2), "cfg.compute_final_obs = True; else choose"),
        (lambda: from_isaaclab(DirectRLEnv(2), timeouts="prev"), "previous, drop; got 'prev'. Did you mean previous"),
        (lambda: from_isaaclab(DirectRLEnv(2, final=True), success="gaol"), "it has time_out, goal. Did you mean goal"),
        (lambda: from_isaaclab(DirectRLEnv(2, final=True), groups={"critc": "x"}), "Did you mean critic"),
        (lambda: from_isaaclab(DirectRLEnv(2, final=True), groups={"critic": "policy"}), "expected different names"),
        (lambda: from_isaaclab(_without_policy()), "critic -> privileged.*one of them 'policy'"),
        (lambda: from_isaaclab(_nested()), "observation group 'policy' is Dict.*concatenate_terms=True"),
        (lambda: from_isaaclab(DirectRLEnv(2, final=True), clip_actions=0.0), "finite number above 0, got 0.0"),
        (lambda: from_mjlab(ManagerBasedRlEnv(2, auto_reset=True)), "cfg.auto_reset = False"),
        (lambda: from_mjlab("Mjlab-Go1"), "takes an mjlab ManagerBasedRlEnv; the str passed"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_a_step_of_another_shape_is_refused() -> None:
    env = MAKERS["mjlab"](2)
    env.reset(0)
    with pytest.raises(UsageError, match=r"actions of shape \(2, 2\), got \(2, 1\)"):
        env.step(torch.zeros(2, 1))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "HalfCheetah-v5"])
def test_envpool_itself(env_id: str) -> None:
    envpool = pytest.importorskip("envpool")

    def make(n: int) -> VectorEnv:
        return from_envpool(envpool.make_gymnasium(env_id, num_envs=n, num_threads=1, max_episode_steps=15))

    check_vector_env(make, ends_within=16, restorable=False, next_step=True)
