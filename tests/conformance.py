"""What every backend must do, whatever it wraps: `check_vector_env` is run by each backend's tests."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.vector import EnvState, Step, VectorEnv, derive_seeds
from ctrlrl.tree import Obs, map_obs, obs_items

SEED = 20


@dataclass
class Expected:
    """What a backend is known to do; see `check_vector_env`."""

    ends_within: int
    num_envs: int
    restorable: bool
    next_step: bool
    random_starts: bool
    reference: Callable[[], gym.Env[Any, Any]] | None
    is_first: Callable[[Obs], Tensor] | None


def check_vector_env(
    make: Callable[[int], VectorEnv],
    *,
    ends_within: int,
    num_envs: int = 3,
    restorable: bool = True,
    next_step: bool = False,
    random_starts: bool = True,
    reference: Callable[[], gym.Env[Any, Any]] | None = None,
    is_first: Callable[[Obs], Tensor] | None = None,
) -> None:
    """Check a backend against the contract; raises AssertionError at the first breach.

    Args:
        make: makes the environment with that many rows.
        ends_within: steps of random actions within which every row ends once at least.
        restorable: whether `set_state` continues every row exactly, in another instance too.
        next_step: whether a row that ended is reset by the next step, with a filler row (Gymnasium's NEXT_STEP).
        random_starts: whether first observations differ between rows and episodes.
        reference: makes the single environment that a row must agree with, bit for bit.
        is_first: tells from observations (N, ...) which rows (N,) are at the start of an episode.
    """
    expected = Expected(ends_within, num_envs, restorable, next_step, random_starts, reference, is_first)
    env, other = make(num_envs), make(num_envs)
    try:
        check_description(env, expected)
        first = copy_obs(env.reset(SEED))
        check_obs(env, first)
        steps = rollout(env, 2 * ends_within + 2)
        for step in steps:
            check_step(env, step)
        check_boundaries(first, steps, expected)
        check_seeding(env, other, first, steps, expected)
        if reference is not None:
            check_reference(env, first, steps, expected)
        check_state(env, other, steps, expected)
        check_fresh_start(env, other, expected)
    finally:
        env.close()
        other.close()
    env.close()  # twice does no harm


# --- driving an environment -------------------------------------------------------------------------------------------


def copy_obs(obs: Obs) -> Obs:
    """A copy, since a backend may reuse its tensors."""
    return map_obs(torch.clone, obs)


def copy_step(step: Step) -> Step:
    """A copy of everything in a step."""
    return Step(
        copy_obs(step.obs),
        step.action.clone(),
        step.reward.clone(),
        step.terminated.clone(),
        step.truncated.clone(),
        copy_obs(step.final_obs),
        step.valid.clone(),
        {key: value.clone() for key, value in step.log.items()},
    )


def actions_for(env: VectorEnv, count: int, seed: int = 1) -> list[Tensor]:
    """Random actions (N, ...); a Box's go beyond its bounds, so that it must clip."""
    random, space, shape = np.random.default_rng(seed), env.action_space, env.batched_action_space.shape or ()
    if isinstance(space, gym.spaces.Box):
        low = np.where(np.isfinite(space.low), space.low, -1.0)
        high = np.where(np.isfinite(space.high), space.high, 1.0)
        values = [random.uniform(1.5 * low - 0.5 * high, 1.5 * high - 0.5 * low, shape) for _ in range(count)]
        return [torch.as_tensor(value, dtype=torch.float32, device=env.device) for value in values]
    assert isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete))
    counts = space.n if isinstance(space, gym.spaces.Discrete) else space.nvec
    return [
        torch.as_tensor(random.integers(space.start, space.start + counts, shape), device=env.device)
        for _ in range(count)
    ]


def rollout(env: VectorEnv, count: int, seed: int = 1) -> list[Step]:
    """`count` copied steps of random actions; the actions given must come out of it unchanged."""
    steps = []
    for action in actions_for(env, count, seed):
        given = action.clone()
        steps.append(copy_step(env.step(action)))
        assert torch.equal(action, given), "step changed the tensor it was given"
    return steps


def same(a: Obs, b: Obs) -> bool:
    """Equal to the bit, NaN included."""
    left, right = obs_items(a), obs_items(b)
    return [name for name, _ in left] == [name for name, _ in right] and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
        if x.is_floating_point()
        else torch.equal(x, y)
        for (_, x), (_, y) in zip(left, right, strict=True)
    )


def assert_same_steps(a: list[Step], b: list[Step], what: str) -> None:
    """Every tensor of two rollouts agrees to the bit."""
    assert len(a) == len(b)
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        for field in ("obs", "action", "reward", "terminated", "truncated", "final_obs", "valid"):
            assert same(getattr(x, field), getattr(y, field)), f"{what}: {field} differs at step {index}"


def row(obs: Obs, index: int) -> Obs:
    """The observation of one environment."""
    return map_obs(lambda value: value[index], obs)


def differ(a: Obs, b: Obs, rows: Tensor) -> Tensor:
    """(N,) which of `rows` differ anywhere between two observations."""
    unlike = torch.zeros_like(rows)
    for (_, x), (_, y) in zip(obs_items(a), obs_items(b), strict=True):
        unlike |= (x != y).flatten(1).any(1) if x.ndim > 1 else x != y
    return unlike & rows


# --- the checks -------------------------------------------------------------------------------------------------------


def check_description(env: VectorEnv, expected: Expected) -> None:
    """Name, sizes, spaces, clock."""
    assert env.name and isinstance(env.name, str)
    assert env.num_envs == expected.num_envs
    assert isinstance(env.device, torch.device)
    spaces = env.observation_space
    entries = spaces.spaces.values() if isinstance(spaces, gym.spaces.Dict) else [spaces]
    assert entries and all(isinstance(entry, gym.spaces.Box) for entry in entries)
    assert isinstance(env.action_space, (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete))
    assert env.control_dt is None or env.control_dt > 0
    assert env.may_be_invalid or not expected.next_step


def check_obs(env: VectorEnv, obs: Obs) -> None:
    """Names, shapes, dtypes and device are those of the space, and each row lies in it."""
    space, batched_space = env.observation_space, env.batched_observation_space
    boxes = space.spaces if isinstance(space, gym.spaces.Dict) else {"obs": space}
    batched = batched_space.spaces if isinstance(batched_space, gym.spaces.Dict) else {"obs": batched_space}
    assert isinstance(obs, dict) == isinstance(space, gym.spaces.Dict) == isinstance(batched_space, gym.spaces.Dict)
    assert [name for name, _ in obs_items(obs)] == list(boxes) == list(batched)
    for name, value in obs_items(obs):
        assert batched[name].contains(value.cpu().numpy()), f"{name}: the batch is not in {batched[name]}"
        assert value.shape == (env.num_envs, *(boxes[name].shape or ()))
        assert value.device == env.device
        for entry in value.cpu().numpy():
            assert entry.dtype == boxes[name].dtype
            assert boxes[name].contains(np.asarray(entry)), f"{name}: {entry} is not in {boxes[name]}"


def check_step(env: VectorEnv, step: Step) -> None:
    """Shapes, dtypes, bounds, and what holds between the tensors of one step."""
    n = env.num_envs
    check_obs(env, step.obs)
    check_obs(env, step.final_obs)
    assert step.action.shape == env.batched_action_space.shape
    assert step.action.device == env.device
    for action in step.action.cpu().numpy():
        assert np.asarray(action).dtype == env.action_space.dtype
        assert env.action_space.contains(action), f"applied {action}, outside {env.action_space}"
    for flag in (step.terminated, step.truncated, step.valid):
        assert flag.shape == (n,)
        assert flag.dtype == torch.bool
        assert flag.device == env.device
    assert step.reward.shape == (n,)
    assert step.reward.dtype == torch.float32
    assert step.reward.device == env.device
    for name, value in step.log.items():
        assert value.shape == (n,), f"log[{name!r}] has shape {tuple(value.shape)}"
        assert value.device == env.device
    ended = step.terminated | step.truncated
    assert env.may_be_invalid or bool(step.valid.all())
    assert not (ended & ~step.valid).any(), "a row that is no transition cannot end"
    assert (step.reward[~step.valid] == 0).all()
    assert not differ(step.obs, step.final_obs, ~ended).any(), "final_obs must equal obs where nothing ended"


def check_boundaries(first: Obs, steps: list[Step], expected: Expected) -> None:
    """Every row ended; where it did, `final_obs` is of the old episode and `obs` of the new one."""
    ended = torch.stack([step.terminated | step.truncated for step in steps])  # (T, N)
    assert ended[: expected.ends_within].any(0).all(), f"a row did not end within {expected.ends_within} steps"
    if expected.next_step:
        for before, step in itertools.pairwise(steps):
            over = before.terminated | before.truncated
            assert torch.equal(step.valid, ~over), "the row after an end, and only that, is a filler"
            assert same(before.obs, before.final_obs)
        return
    is_first = expected.is_first
    if is_first is not None:
        assert is_first(first).all()
    for step, over in zip(steps, ended, strict=True):
        if is_first is not None:
            assert is_first(step.obs)[over].all()
            assert not is_first(step.final_obs)[over].any()
            assert torch.equal(is_first(step.obs), over | ~step.valid), "a row started an episode without a word"
        assert torch.equal(differ(step.obs, step.final_obs, over), over), "final_obs is not the observation reached"


def check_seeding(env: VectorEnv, other: VectorEnv, first: Obs, steps: list[Step], expected: Expected) -> None:
    """One seed, one trajectory, in any instance; rows and episodes differ; automatic resets do not reseed."""
    for again in (env, other):
        assert same(copy_obs(again.reset(derive_seeds(SEED, expected.num_envs))), first), (
            "a seed per row, used as it is"
        )
        assert same(copy_obs(again.reset(SEED)), first)
        assert_same_steps(rollout(again, len(steps)), steps, "same seed")
    if not expected.random_starts:
        return
    assert not same(copy_obs(env.reset(SEED + 1)), first), "another seed, the same observations"
    starts = [row(first, index) for index in range(expected.num_envs)]
    for step in steps:
        # Where the new episode shows: in the same step, or in the filler row after it.
        begun = ~step.valid if expected.next_step else step.terminated | step.truncated
        starts += [row(step.obs, index) for index in begun.nonzero().flatten().tolist()]
    distinct = {tuple(value.cpu().numpy().tobytes() for _, value in obs_items(start)) for start in starts}
    assert len(distinct) == len(starts), "two episodes begin alike: rows are copies, or an automatic reset reseeds"


def check_reference(env: VectorEnv, first: Obs, steps: list[Step], expected: Expected) -> None:
    """Each row is what the single environment gives for the actions applied, bit for bit."""
    assert expected.reference is not None
    dtypes = {name: value.dtype for name, value in obs_items(first)}

    def flat(obs: Any) -> Obs:
        if not isinstance(obs, dict):
            return torch.as_tensor(np.asarray(obs), dtype=dtypes["obs"])
        entries: dict[str, Tensor] = {}

        def visit(value: Any, path: str) -> None:
            if isinstance(value, dict):
                for key, entry in value.items():
                    visit(entry, f"{path}.{key}" if path else key)
            else:
                entries[path] = torch.as_tensor(np.asarray(value), dtype=dtypes[path])

        visit(obs, "")
        return dict(sorted(entries.items()))

    for index, seed in enumerate(derive_seeds(SEED, expected.num_envs)):
        single = expected.reference()
        obs, _ = single.reset(seed=seed)
        assert same(flat(obs), row(first, index))
        for step in steps:
            if not step.valid[index]:
                assert same(flat(single.reset()[0]), row(step.obs, index)), "a filler row shows the new episode"
                continue
            action = step.action[index].numpy()
            final, reward, terminated, truncated, _ = single.step(action if action.ndim else action[()])
            ended = terminated or truncated
            assert same(flat(final), row(step.final_obs, index)), "final_obs is not the observation reached"
            assert step.reward[index] == torch.tensor(float(reward), dtype=torch.float32)
            assert (bool(step.terminated[index]), bool(step.truncated[index])) == (bool(terminated), bool(truncated))
            if ended and not expected.next_step:
                assert same(flat(single.reset()[0]), row(step.obs, index)), "obs is not the next episode's first"
        single.close()


def check_state(env: VectorEnv, other: VectorEnv, steps: list[Step], expected: Expected) -> None:
    """`get_state` disturbs nothing, and `set_state` goes on to the bit in another instance, or says why not."""
    ends = [t for t, step in enumerate(steps) if bool((step.terminated | step.truncated).any())]
    # Before the first step, mid-episode, right after an end, after several.
    moments = {0, 1, ends[0] + 1, min(ends[-1] + 2, len(steps) - 1)}
    for moment in sorted(moments):
        before = copy_obs(env.reset(SEED))
        if moment:
            rollout(env, moment)
            before = copy_obs(steps[moment - 1].obs)
        state = env.get_state()
        assert len(state.json) == len(state.arrays) == expected.num_envs
        stored = json.loads(json.dumps(state.json))
        kinds = {type(array) for entry in state.arrays for array in entry.values()}
        assert kinds <= {np.ndarray}, "a checkpoint gives numbers back as numbers, not as arrays"
        arrays = [{name: array.copy() for name, array in entry.items()} for entry in state.arrays]
        other.reset(SEED + 7)
        rollout(other, 2, seed=3)
        obs, reasons = other.set_state(EnvState(stored, arrays), seed=SEED + 9)
        check_obs(other, obs)
        assert len(reasons) == expected.num_envs
        if not expected.restorable:
            assert all(isinstance(reason, str) and reason for reason in reasons)
            continue
        assert reasons == [None] * expected.num_envs
        assert same(copy_obs(obs), before), "set_state gives another observation to act on"
        count = expected.ends_within + 2
        assert_same_steps(rollout(other, count, seed=5), rollout(env, count, seed=5), f"going on from step {moment}")
        n = expected.num_envs
        some = EnvState([stored[0], *[None] * (n - 1)], [arrays[0], *[{}] * (n - 1)])
        obs, reasons = other.set_state(some, seed=SEED + 9)
        assert reasons[0] is None and all(reasons[1:])
        assert same(row(obs, 0), row(before, 0))
        fresh = copy_obs(env.reset(SEED + 9))
        for index in range(1, n):
            assert same(row(obs, index), row(fresh, index)), "a row that starts afresh shows its first observation"


def check_fresh_start(env: VectorEnv, other: VectorEnv, expected: Expected) -> None:
    """What cannot go on is started afresh by `set_state`'s seed, so that two attempts give one trajectory."""
    n = expected.num_envs

    def begin(again: VectorEnv, seed: int) -> tuple[Obs, list[Step]]:
        obs, reasons = again.set_state(EnvState([None] * n, [{} for _ in range(n)]), seed=seed)
        assert len(reasons) == n
        assert all(isinstance(reason, str) and reason for reason in reasons)
        return copy_obs(obs), rollout(again, expected.ends_within + 2, seed=7)

    first, steps = begin(env, SEED)
    for again in (env, other):
        obs, others = begin(again, SEED)
        assert same(obs, first), "set_state with one seed starts afresh in two ways"
        assert_same_steps(others, steps, "started afresh with one seed")
    assert same(copy_obs(env.reset(derive_seeds(SEED, n))), first), "a row starts afresh with the seed derived for it"
    assert not expected.random_starts or not same(begin(env, SEED + 1)[0], first), "another seed, the same start"
