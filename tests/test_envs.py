from __future__ import annotations

import ast
import ctypes.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from ctrlrl.envs import worker
from ctrlrl.envs.gymnasium_backend import GymnasiumVector, GymnasiumVectorAdapter
from ctrlrl.envs.headless import render_headless
from ctrlrl.envs.make import list_envs, make_env
from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.vector import EnvState, RenderFailure, Step, VectorEnv, derive_seeds
from ctrlrl.errors import EnvironmentFailure, UsageError
from tests import standins
from tests.conformance import actions_for, assert_same_steps, check_vector_env, copy_obs, rollout, same

STANDIN = standins.MODULE + "ctrlrl-test/"


def in_process(env_id: str, **kwargs: Any) -> Any:
    return lambda n: make_env(env_id, num_envs=n, env_kwargs=kwargs, backend="gymnasium")


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "kwargs", "ends_within"),
    [
        ("Pendulum-v1", {"max_episode_steps": 12}, 12),
        ("HalfCheetah-v5", {"max_episode_steps": 15}, 15),
        ("Humanoid-v5", {}, 60),
        ("CartPole-v1", {}, 60),
        (STANDIN + "Image-v0", {}, 60),
        (STANDIN + "MultiDiscrete-v0", {}, 60),
        (STANDIN + "Unbounded-v0", {}, 60),
    ],
)
def test_in_process_backend_conforms(env_id: str, kwargs: dict[str, Any], ends_within: int) -> None:
    check_vector_env(
        in_process(env_id, **kwargs), ends_within=ends_within, reference=lambda: gym.make(env_id, **kwargs)
    )


def counting_first(obs: Any) -> torch.Tensor:
    return obs[:, 1] == 0


@pytest.mark.parametrize("truncates", [False, True])
def test_counting_shows_every_boundary(truncates: bool) -> None:
    make = in_process(STANDIN + "OwnState-v0", truncates=truncates)
    env = make(2)
    env.reset(0)
    rows = []
    for action in actions_for(env, 5):
        step = env.step(action)
        flags = (bool(step.terminated[1]), bool(step.truncated[1]))
        rows.append((step.obs[1].tolist(), step.final_obs[1].tolist(), float(step.reward[1]), flags))
    over = (not truncates, truncates)
    assert rows == [
        ([0, 1], [0, 1], 1.0, (False, False)),
        ([0, 2], [0, 2], 2.0, (False, False)),
        ([0, 3], [0, 3], 3.0, (False, False)),
        ([1, 0], [0, 4], 4.0, over),
        ([1, 1], [1, 1], 1.0, (False, False)),
    ]


def test_environment_with_a_state_of_its_own_conforms() -> None:
    check_vector_env(in_process(STANDIN + "OwnState-v0"), ends_within=4, random_starts=False, is_first=counting_first)


def test_environment_that_reuses_its_array_keeps_its_terminal_observation() -> None:
    env = in_process(STANDIN + "Reusing-v0")(1)
    env.reset(0)
    steps = rollout(env, 4)
    assert steps[3].final_obs[0].tolist() == [0, 4]
    assert steps[3].obs[0].tolist() == [1, 0]


def test_native_standin_conforms() -> None:
    def at_start(obs: Any) -> torch.Tensor:
        return obs["privileged"][:, 3] == 0

    check_vector_env(standins.native_vector, ends_within=60, is_first=at_start)
    env = standins.native_vector(8)
    env.reset(0)
    steps = rollout(env, 60)
    assert not all(bool(step.valid.all()) for step in steps), "the stand-in must have invalid rows"
    assert all(float(step.action.abs().max()) <= 0.8 + 1e-6 for step in steps)
    assert any(not bool(step.log["success"].isnan().all()) for step in steps)


def mislead_final_obs(step: Step) -> None:
    step.final_obs = step.obs


def mislead_obs(step: Step) -> None:
    step.obs = step.final_obs


def merge_the_flags(step: Step) -> None:
    step.terminated, step.truncated = step.terminated | step.truncated, step.terminated & False


def round_the_reward(step: Step) -> None:
    step.reward = step.reward.round()


def report_an_action_out_of_bounds(step: Step) -> None:
    step.action = 2 * step.action


@pytest.mark.parametrize(
    "fault",
    [mislead_final_obs, mislead_obs, merge_the_flags, round_the_reward, report_an_action_out_of_bounds],
)
def test_conformance_notices_wrong_steps(fault: Callable[[Step], None], monkeypatch: pytest.MonkeyPatch) -> None:
    right = GymnasiumVector.step

    def wrong(self: GymnasiumVector, action: torch.Tensor) -> Step:
        step = right(self, action)
        fault(step)
        return step

    monkeypatch.setattr(GymnasiumVector, "step", wrong)
    with pytest.raises(AssertionError):
        test_in_process_backend_conforms("Pendulum-v1", {"max_episode_steps": 12}, 12)


def test_conformance_notices_wrong_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    right = worker.Slot.reset
    with monkeypatch.context() as patched:
        patched.setattr(worker.Slot, "reset", lambda slot, seed: right(slot, 3 if seed is None else seed))
        with pytest.raises(AssertionError, match="two episodes begin alike"):
            check_vector_env(in_process(STANDIN + "Walk-v0"), ends_within=60)
    with monkeypatch.context() as patched:
        patched.setattr(worker.Slot, "reset", lambda slot, seed: right(slot, None))
        with pytest.raises(AssertionError, match="a seed per row"):
            check_vector_env(in_process(STANDIN + "Walk-v0"), ends_within=60)


def test_conformance_notices_a_state_that_forgets_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    right = worker.Slot.set_state

    def wrong(slot: Any, *state: Any) -> Any:
        result = right(slot, *state)
        slot.env.unwrapped.np_random.random()
        return result

    monkeypatch.setattr(worker.Slot, "set_state", wrong)
    with pytest.raises(AssertionError, match="going on from step"):
        check_vector_env(in_process("CartPole-v1"), ends_within=60)


def test_conformance_notices_an_unseeded_fresh_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        worker.Slot, "set_state", lambda slot, state, arrays, seed, alive: (slot.reset(None), "no state was saved")
    )
    with pytest.raises(AssertionError, match="with one seed"):
        check_vector_env(in_process("CartPole-v1"), ends_within=60, restorable=False)


def test_conformance_notices_a_wrong_batched_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VectorEnv, "batched_observation_space", property(lambda env: env.observation_space))
    with pytest.raises(AssertionError, match="the batch is not in"):
        check_vector_env(in_process("CartPole-v1"), ends_within=60)


# --- the adapter of vector environments -------------------------------------------------------------------------------


def adapted(mode: AutoresetMode, env_id: str = "CartPole-v1", **kwargs: Any) -> Any:
    def make(n: int) -> VectorEnv:
        vector = gym.make_vec(env_id, n, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **kwargs)
        return make_env(vector, num_envs=n)

    return make


MODES = list(AutoresetMode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env_id", ["CartPole-v1", STANDIN + "Image-v0", STANDIN + "MultiDiscrete-v0"])
def test_adapter_conforms(mode: AutoresetMode, env_id: str) -> None:
    check_vector_env(
        adapted(mode, env_id),
        ends_within=60,
        restorable=False,
        next_step=mode is AutoresetMode.NEXT_STEP,
        reference=lambda: gym.make(env_id),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("env_id", "kwargs"), [("CartPole-v1", {}), (STANDIN + "Counting-v0", {"truncates": True, "discrete": True})]
)
def test_every_autoreset_mode_yields_the_same_transitions(
    mode: AutoresetMode, env_id: str, kwargs: dict[str, Any]
) -> None:
    def transitions(env: VectorEnv) -> list[list[tuple[Any, ...]]]:
        """Per row, its valid transitions; actions come from a list by the row's count of transitions."""
        choices = np.random.default_rng(0).integers(0, 2, (2, 200)) + getattr(env.action_space, "start", 0)
        obs, found = copy_obs(env.reset(4)), [[] for _ in range(2)]
        while min(map(len, found)) < 60:
            action = torch.tensor([int(choices[i, len(found[i])]) for i in range(2)])
            step = env.step(action)
            for i in range(2):
                if step.valid[i]:
                    success = step.log["success"][i].item() if "success" in step.log else np.nan
                    success = None if np.isnan(success) else success
                    ends = (bool(step.terminated[i]), bool(step.truncated[i]))
                    before, after = obs[i].tolist(), step.final_obs[i].tolist()
                    found[i].append((before, int(action[i]), float(step.reward[i]), *ends, after, success))
            obs = copy_obs(step.obs)
        return [entries[:60] for entries in found]

    ours = transitions(in_process(env_id, **kwargs)(2))
    assert any(entry[3] or entry[4] for entry in ours[0])
    assert transitions(adapted(mode, env_id, **kwargs)(2)) == ours


def test_adapter_needs_the_autoreset_mode() -> None:
    vector = gym.make_vec("CartPole-v1", 2, vectorization_mode="sync")
    del vector.metadata["autoreset_mode"]
    with pytest.raises(UsageError, match=r'metadata\["autoreset_mode"\]'):
        make_env(vector, num_envs=2)


def test_adapter_gives_vector_environments_of_other_makes_one_seed() -> None:
    env = make_env(gym.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point"), num_envs=3)
    first = copy_obs(env.reset(5))
    assert same(copy_obs(env.reset(5)), first)
    assert not same(copy_obs(env.reset(6)), first)
    with pytest.raises(UsageError, match="one seed"):
        env.reset([1, 2, 3])


# --- saving and restoring ---------------------------------------------------------------------------------------------


CARRIED = (
    "replaying its {} actions gave other rewards or observations: the environment carries something over from earlier "
    "episodes, or draws from a source of its own"
)


def test_replay_that_reaches_another_observation_starts_afresh_and_says_so() -> None:
    env, other = in_process(STANDIN + "Counting-v0")(2), in_process(STANDIN + "Counting-v0")(2)
    env.reset(0)
    rollout(env, 6)  # in the second episode, which a new environment counts as its first
    state = env.get_state()
    obs, reasons = other.set_state(state, seed=1)
    assert reasons == [CARRIED.format(2)] * 2
    assert counting_first(obs).all()


def normalized_pendulum() -> gym.Env[Any, Any]:
    return gym.wrappers.NormalizeReward(gym.make("Pendulum-v1", max_episode_steps=10))


@pytest.mark.parametrize(
    ("maker", "episode"), [(normalized_pendulum, 10), (standins.CurriculumEnv, 4)], ids=["statistics", "curriculum"]
)
def test_rewards_that_depend_on_earlier_episodes_are_noticed(
    maker: Callable[[], gym.Env[Any, Any]], episode: int
) -> None:
    env, other = make_env(maker), make_env(maker)
    env.reset(0)
    rollout(env, 3)
    assert other.set_state(env.get_state(), seed=1)[1] == [None]  # the first episode has none before it
    assert_same_steps(rollout(other, 2), rollout(env, 2), "going on in the first episode")
    rollout(env, episode - 2)
    state, attempts = env.get_state(), [make_env(maker), make_env(maker)]
    assert [attempt.set_state(state, seed=1)[1] for attempt in attempts] == [[CARRIED.format(3)]] * 2
    assert_same_steps(*[rollout(attempt, 12) for attempt in attempts], "two attempts with one seed")


def test_rows_without_state_start_afresh() -> None:
    env = in_process("Pendulum-v1")(2)
    assert env.get_state().json == [None, None]  # before the first reset there is nothing to go on from
    env.reset(0)
    state = env.get_state()
    obs, reasons = env.set_state(EnvState([state.json[0], None], state.arrays), seed=5)
    assert reasons == [None, "no state was saved"]
    assert torch.equal(obs[1], env.reset(derive_seeds(5, 2))[1])
    with pytest.raises(UsageError, match="saved is of 1 environments, these are 2"):
        env.set_state(EnvState(state.json[:1], state.arrays[:1]), seed=5)


def test_long_episodes_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_REPLAY", 5)
    env = in_process("Pendulum-v1")(1)
    env.reset(0)
    rollout(env, 5)
    assert env.set_state(env.get_state(), seed=1)[1] == [None]
    rollout(env, 1)
    assert env.set_state(env.get_state(), seed=1)[1] == ["its episode is longer than 5 steps"]


def test_own_state_restores_the_time_limit() -> None:
    make = in_process(STANDIN + "OwnState-v0", length=99, max_episode_steps=5)
    env, other = make(1), make(1)
    env.reset(0)
    rollout(env, 3)
    _, reasons = other.set_state(env.get_state(), seed=1)
    assert reasons == [None]
    assert [bool(step.truncated[0]) for step in rollout(other, 2)] == [False, True]


def test_own_state_is_not_trusted_below_other_wrappers() -> None:
    def stacked() -> gym.Env[Any, Any]:
        return gym.wrappers.FrameStackObservation(standins.OwnStateEnv(), 3)

    env, other = make_env(stacked), make_env(stacked)
    env.reset(0)
    rollout(env, 3)
    obs, reasons = other.set_state(env.get_state(), seed=1)
    assert env.get_state().json[0]["method"] == "replay"
    assert reasons == [None]
    assert obs[0, :, 1].tolist() == [1, 2, 3]


def test_array_splitting_round_trips() -> None:
    value = {"a": [1, 2.5, None, np.float32(3)], "b": {"c": np.arange(3, dtype=np.uint32)}, "d": 2**100}
    arrays: dict[str, Any] = {}
    stored = json.loads(json.dumps(worker.split_arrays(value, arrays, "x")))
    back = worker.join_arrays(stored, {k: worker.decode_array(worker.encode_array(a)) for k, a in arrays.items()})
    np.testing.assert_array_equal(back["b"].pop("c"), np.arange(3, dtype=np.uint32))
    assert back == {"a": [1, 2.5, None, 3.0], "b": {}, "d": 2**100}
    with pytest.raises(TypeError, match=r"state entry x\.f is a set"):
        worker.split_arrays({"f": set()}, {}, "x")


# --- spaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
        gym.spaces.Box(np.array([-1, -0.1], np.float32), np.array([np.inf, 0.4], np.float32)),
        gym.spaces.Box(0, 255, (4, 4, 3), np.uint8),
        gym.spaces.Box(-2.0, 2.0, ()),
        gym.spaces.Discrete(4, start=-1),
        gym.spaces.MultiDiscrete([3, 2], start=[0, 5]),
        gym.spaces.Dict({"b": gym.spaces.Box(0, 1, (2,)), "a": gym.spaces.Box(0, 9, (1,), np.int32)}),
    ],
)
def test_spaces_round_trip_through_json(space: gym.Space[Any]) -> None:
    describe = worker.describe_observation_space if isinstance(space, gym.spaces.Dict) else worker.describe_action_space
    assert build_space(json.loads(json.dumps(describe(space, "x")))) == space


def env_with(observation: gym.Space[Any], action: gym.Space[Any]) -> gym.Env[Any, Any]:
    env = standins.WalkEnv()
    env.observation_space, env.action_space = observation, action
    return env


BOX = gym.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (gym.spaces.Discrete(16), BOX, r"observation space is Discrete\(16\).*FlattenObservation"),
        (gym.spaces.Tuple([BOX]), BOX, "observation space is Tuple"),
        (gym.spaces.Dict({"a": gym.spaces.Dict({"t": gym.spaces.Text(3)})}), BOX, r"entry 'a\.t' .* Text"),
        (BOX, gym.spaces.MultiBinary(3), "action space is MultiBinary.*ActionWrapper"),
        (BOX, gym.spaces.MultiDiscrete([[2, 2]]), "one-dimensional MultiDiscrete"),
    ],
)
def test_unsupported_spaces_are_refused_with_the_remedy(
    observation: gym.Space[Any], action: gym.Space[Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_env(env_with(observation, action))


def test_environments_of_different_spaces_are_refused() -> None:
    with pytest.raises(UsageError, match="environment 1 has other spaces"):
        GymnasiumVector([standins.WalkEnv, standins.UnboundedEnv])


def test_wrong_shape_of_an_observation_is_said() -> None:
    env = make_env(env_with(gym.spaces.Box(-1, 1, (5,)), BOX))
    with pytest.raises(EnvironmentFailure, match=r"has shape \(2,\), its space says \(5,\)"):
        env.reset(0)


# --- actions, rewards, failures ---------------------------------------------------------------------------------------


def test_box_actions_are_clipped_and_reported() -> None:
    env = in_process("Humanoid-v5")(2)
    env.reset(0)
    step = env.step(torch.full((2, 17), 3.0))
    np.testing.assert_array_equal(step.action.numpy(), np.full((2, 17), 0.4, np.float32))


def test_discrete_actions_are_as_the_environment_counts() -> None:
    env = in_process(STANDIN + "Counting-v0", discrete=True)(2)
    env.reset(0)
    assert env.step(torch.tensor([2, 4])).action.tolist() == [2, 4]
    with pytest.raises(UsageError, match=r"dtype torch\.int64, got torch\.float32"):
        env.step(torch.zeros(2))
    with pytest.raises(UsageError, match=r"shape \(2,\), got \(2, 1\)"):
        env.step(torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(EnvironmentFailure, match=r"\(0\) is not in Discrete"):
        env.step(torch.tensor([2, 0]))


def test_environment_keeps_its_action_when_the_buffer_moves_on() -> None:
    seen = []

    class Keeping(standins.WalkEnv):
        def step(self, action: Any) -> Any:
            seen.append(action)
            return super().step(action)

    env = make_env(Keeping)
    env.reset(0)
    env.step(torch.zeros(1, 2))
    env.step(torch.ones(1, 2))
    assert seen[0].tolist() == [0, 0]


def test_non_finite_values_are_passed_on() -> None:
    env = in_process(STANDIN + "Nan-v0", at_step=2)(2)
    env.reset(0)
    steps = rollout(env, 2)
    assert steps[0].reward.isfinite().all()
    assert steps[1].reward.isnan().all()
    assert steps[1].final_obs.isnan().all()


def test_success_is_logged_where_it_is_known() -> None:
    env = in_process(STANDIN + "Counting-v0")(2)
    env.reset(0)
    steps = rollout(env, 8)
    assert steps[2].log == {}
    assert steps[3].log["success"].tolist() == [1.0, 1.0]
    assert steps[4].log["success"].isnan().all()
    assert steps[7].log["success"].tolist() == [0.0, 0.0]


def test_environment_that_raises_is_named_and_the_others_can_be_saved() -> None:
    env = in_process(STANDIN + "Crashing-v0", above=0.5)(3)
    env.reset(0)
    action = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(EnvironmentFailure, match=r"environment 1 raised:(?s:.*)lost its marbles") as caught:
        for _ in range(3):
            env.step(action)
    assert "tests/standins.py" in str(caught.value).replace(os.sep, "/")
    assert [entry is None for entry in env.get_state().json] == [False, True, False]
    with pytest.raises(EnvironmentFailure, match="must be made anew"):
        env.step(action)


def test_seeds_must_be_as_many_as_environments() -> None:
    with pytest.raises(UsageError, match="one seed, or 3, one per environment; got 2"):
        in_process("Pendulum-v1")(3).reset([1, 2])
    assert derive_seeds(3, 2) == derive_seeds(3, 5)[:2]


# --- make_env ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["gymnasium", "workers"])
@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        ("HalfCheeta-v5", {}, "no environment 'HalfCheeta-v5'.*Did you mean HalfCheetah-v5"),
        ("HalfCheetah-v3", {}, "outdated: use 'HalfCheetah-v5'"),
        ("HalfCheetah-v1", {}, "has no environment 'HalfCheetah-v1': the version to use is 'HalfCheetah-v5'"),
        ("HalfCheetah", {}, "the version to use is 'HalfCheetah-v5'"),
        (".x:Pendulum-v1", {}, r"module '\.x' is named relative to a package; give its full name"),
        ("no_such_module:Env-v0", {}, "no module 'no_such_module'.*start from the folder that contains it"),
        ("LunarLander-v3", {}, r'package that is not installed.*pip install swig "gymnasium\[box2d\]"'),
        ("Pendulum-v1", {"gravity": 3}, "no argument 'gravity'.*it takes g, max_episode_steps, render_mode"),
        ("HalfCheetah-v5", {"frame_skp": 3}, "Did you mean frame_skip"),
        ("FrozenLake-v1", {}, r"observation space is Discrete\(16\)"),
    ],
)
def test_what_cannot_be_made_is_explained(backend: str, env_id: str, kwargs: dict[str, Any], message: str) -> None:
    if env_id.startswith("LunarLander") and find_spec("Box2D"):
        pytest.skip("Box2D is installed")
    with pytest.raises(UsageError, match=message):
        make_env(env_id, env_kwargs=kwargs, backend=backend)


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("Pendulum-v1", {"num_envs": 0}, "num_envs must be at least 1, got 0"),
        (
            "Pendulum-v1",
            {"worker_timeout": float("inf")},
            r"finite number of seconds above 0 \(and below 1e\+09\), got inf",
        ),
        ("Pendulum-v1", {"worker_timeout": float("nan")}, "finite number of seconds above 0 .*got nan"),
        ("Pendulum-v1", {"worker_timeout": 0.0, "backend": "workers"}, r"finite number of seconds above 0 .*got 0\.0"),
        ("Pendulum-v1", {"backend": "worker"}, "got 'worker'. Did you mean workers?"),
        ("Pendulum-v1", {"backend": "gymnasium", "env_python": "python"}, "cannot use env_python"),
        (standins.WalkEnv, {"backend": "workers"}, "register the environment in a module"),
        (standins.WalkEnv, {"env_kwargs": {"a": 1}}, "env_kwargs go with an id"),
        (standins.WalkEnv(), {"num_envs": 2}, "pass a function that makes one"),
        (lambda: 3, {}, "must return a gymnasium.Env, it returned 3"),
        (3, {}, "env must be an id"),
        ("Pendulum-v1", {"backend": "workers", "env_kwargs": {"g": object()}}, "JSON-able"),
    ],
)
def test_wrong_arguments_are_explained(env: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_env(env, **options)


def test_what_can_be_passed() -> None:
    assert make_env(standins.WalkEnv()).num_envs == 1
    assert make_env(standins.WalkEnv, num_envs=3).num_envs == 3
    native = standins.native_vector(4)
    assert make_env(native, num_envs=4) is native
    with pytest.raises(UsageError, match="has 4 environments, num_envs is 1"):
        make_env(native)
    vector = gym.make_vec("CartPole-v1", 2, vectorization_mode="sync")
    assert isinstance(make_env(vector, num_envs=2), GymnasiumVectorAdapter)


class ClosingEnv(standins.WalkEnv):
    """Counts how often it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_what_was_passed_is_left_open_and_what_was_made_is_closed() -> None:
    users, made = ClosingEnv(), [ClosingEnv(), ClosingEnv()]
    rest = iter(made)
    for env in (make_env(users), make_env(lambda: next(rest), num_envs=2)):
        env.close()
        env.close()
    assert users.closed == 0
    assert [env.closed for env in made] == [1, 1]
    vector = gym.vector.SyncVectorEnv([ClosingEnv, ClosingEnv])
    make_env(vector, num_envs=2).close()
    assert [env.closed for env in vector.envs] == [0, 0]
    users.observation_space, made[0].observation_space = gym.spaces.Discrete(3), gym.spaces.Discrete(3)
    for env_or_maker in (users, lambda: made[0]):
        with pytest.raises(UsageError, match="observation space"):
            make_env(env_or_maker)
    assert users.closed == 0
    assert made[0].closed == 2


def test_constructor_that_raises_is_an_environment_failure() -> None:
    def maker() -> gym.Env[Any, Any]:
        raise OSError("no simulator on port 7")

    with pytest.raises(EnvironmentFailure, match="no simulator on port 7"):
        make_env(maker)


@pytest.mark.parametrize(("env_id", "dt"), [("HalfCheetah-v5", 0.05), ("Pendulum-v1", 0.05), ("CartPole-v1", 0.02)])
def test_control_dt(env_id: str, dt: float) -> None:
    assert make_env(env_id).control_dt == pytest.approx(dt)
    assert make_env(standins.WalkEnv).control_dt is None


def test_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = make_env(STANDIN + "Drawn-v0", num_envs=2, render=True)
    assert drawn.control_dt == pytest.approx(0.1)
    with pytest.raises(RenderFailure, match=r"cannot be drawn(?s:.*)before calling `env\.reset") as caught:
        drawn.render()
    assert caught.value.cause.startswith("ResetNeeded: ")
    drawn.reset(0)  # a picture that fails does not spoil the environments
    assert drawn.render().shape == (4, 6, 3)
    with pytest.raises(UsageError, match="make it with render=True"):
        make_env(STANDIN + "Drawn-v0").render()
    with pytest.raises(UsageError, match="it takes no render_mode"):
        make_env(STANDIN + "Walk-v0", render=True)
    monkeypatch.setitem(standins.DrawnEnv.metadata, "render_modes", ["human"])
    with pytest.raises(UsageError, match=r"needs the render mode 'rgb_array' and has \['human'\]"):
        make_env(STANDIN + "Drawn-v0", render=True)


def test_pictures_of_vector_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = gym.make_vec(STANDIN + "Drawn-v0", 2, vectorization_mode="sync", render_mode="rgb_array")
    env = make_env(vector, num_envs=2)
    env.reset(0)
    assert env.render().tolist() == np.arange(72).reshape(4, 6, 3).tolist()

    def fail(_: Any) -> None:
        raise OSError("no ink")

    monkeypatch.setattr(standins.DrawnEnv, "render", fail)
    with pytest.raises(RenderFailure, match=r"cannot be drawn(?s:.*)in fail") as caught:
        env.render()
    assert caught.value.cause == "OSError: no ink"


@pytest.mark.parametrize("renderer", ["glfw", "osmesa"])
def test_drawing_without_opengl_says_what_was_missing(renderer: str) -> None:
    code = """
import json
from ctrlrl.envs.make import make_env
from ctrlrl.envs.vector import RenderFailure
outcomes = []
for backend in ("gymnasium", "workers"):
    try:
        env = make_env("InvertedPendulum-v5", render=True, backend=backend)
        env.reset(0)
        outcomes.append(["picture", list(env.render().shape)])
    except RenderFailure as failure:
        outcomes.append([failure.cause, str(failure)])
print(json.dumps(outcomes))
"""
    hidden = {"DISPLAY", "WAYLAND_DISPLAY", "XDG_RUNTIME_DIR", "PYOPENGL_PLATFORM"}
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**{key: value for key, value in os.environ.items() if key not in hidden}, "MUJOCO_GL": renderer},
    )
    assert process.returncode == 0, process.stderr
    for cause, said in json.loads(process.stdout):
        if renderer == "osmesa" and ctypes.util.find_library("OSMesa"):
            assert (cause, said) == ("picture", [480, 480, 3])
        elif renderer == "osmesa":  # which is looked for when MuJoCo is imported
            assert "glGetError" in cause or "OSMesa" in cause
            assert "cannot be made: it looks for OpenGL" in said
            assert "Traceback" in said
        else:
            assert cause.startswith("FatalError: an OpenGL platform library has not been loaded")
            assert "environment 0 cannot be drawn" in said
            assert "Traceback" in said


def test_headless_rendering_leaves_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    render_headless()
    assert os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setenv("DISPLAY", ":0")
    render_headless()
    assert "MUJOCO_GL" not in os.environ


@pytest.mark.skipif(ctypes.util.find_library("EGL") is None, reason="there is no EGL")
@pytest.mark.parametrize("first", ["ctrlrl.training.session", "ctrlrl.training.loading", "ctrlrl.envs.sim_vector"])
def test_what_imports_mujoco_has_chosen_how_it_draws_before(first: str) -> None:
    """In a process of its own: here it was chosen before any test."""
    hidden = ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")
    code = f"import {first}, mujoco.gl_context; print(mujoco.gl_context.GLContext.__module__)"
    plain = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, check=True)
    assert done.stdout.strip() == "mujoco.egl"


def test_making_an_environment_gives_no_advice(recwarn: pytest.WarningsRecorder) -> None:
    make_env("HalfCheetah-v4").reset(0)
    assert [str(warning.message) for warning in recwarn] == []


def test_list_envs_names_the_newest_versions() -> None:
    infos = {info.id: info for info in list_envs()}
    assert infos["HalfCheetah-v5"].family == "mujoco"
    assert infos["HalfCheetah-v5"].installed
    assert infos["CartPole-v1"].family == "classic_control"
    assert infos["LunarLander-v3"].family == "box2d"
    assert infos["ctrlrl-test/Walk-v0"].family == "ctrlrl-test"
    assert not {"HalfCheetah-v4", "HalfCheetah-v3", "CartPole-v0", "GymV21Environment-v0"} & set(infos)


def test_listing_imports_neither_torch_nor_mujoco() -> None:
    code = (
        "import sys; from ctrlrl.envs.make import list_envs; list_envs(); print({'torch', 'mujoco'} & set(sys.modules))"
    )
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "set()"


def test_worker_script_is_python_3_8() -> None:
    source = Path(worker.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert foreign == {"numpy", "gymnasium"}
