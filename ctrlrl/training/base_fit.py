"""Whether a policy fits an environment that another is to build on it in: what differs, term by term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from ctrlrl.deploy.to_onnx import BARE
from ctrlrl.envs.spec import SimTask
from ctrlrl.errors import UsageError
from ctrlrl.training.manifest_parts import action_of, terms_of
from ctrlrl.training.spaces import alike

if TYPE_CHECKING:
    from ctrlrl.deploy.manifest import Action, Manifest, Term


def require_run_fits(
    path: str,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    task: SimTask | None,
    control_dt: float | None,
    *,
    own_spaces: tuple[gym.Space[Any], gym.Space[Any]],
    own_task: SimTask | None,
    own_dt: float | None,
) -> None:
    """Of a run, trained in an environment with `spaces` of observations and actions, and for the environment's own.

    Tasks are None where they are none of ours, seconds between two actions where they are not known.

    Raises:
        UsageError: it does not fit; names each difference.
    """
    terms: list[tuple[str, str]] = []
    if task is not None and own_task is not None:
        terms = terms_apart(terms_of(task, task.policy_terms), terms_of(own_task, own_task.policy_terms))
    told = own_task.policy_group if own_task is not None and terms else None
    observations, actions = [f"{name}: {said}" for name, said in terms], []
    observations += _of_spaces(spaces[0], own_spaces[0], told=told)
    if not alike(spaces[1], own_spaces[1], bounds=True):
        actions.append(f"action: the base has {spaces[1]}, the environment {own_spaces[1]}")
    if task is not None and own_task is not None:
        actions += joints_apart(task.action.names, own_task.action.names) or actions_apart(
            action_of(spaces[1], task), action_of(own_spaces[1], own_task)
        )
    require_same(path, observations, actions + periods_apart(control_dt, own_dt))


def require_bundle_fits(
    path: str,
    manifest: Manifest,
    *,
    own_spaces: tuple[gym.Space[Any], gym.Space[Any]],
    own_task: SimTask | None,
    own_dt: float | None,
) -> None:
    """The same of a bundle.

    Raises:
        UsageError: it does not fit; names each difference.
    """
    observation_space, action_space = own_spaces
    named = isinstance(observation_space, gym.spaces.Dict)
    spaces = dict(observation_space.spaces) if named else {BARE: observation_space}  # type: ignore[attr-defined]
    observations = []
    for entry in manifest.observation:
        terms = []
        if own_task is not None and entry.terms and (not named or entry.name == own_task.policy_group):
            terms = terms_apart(entry.terms, terms_of(own_task, own_task.policy_terms))
        if entry.name not in spaces:
            observations.append(f"{entry.name}: the environment gives {', '.join(spaces)}")
        elif terms:
            observations += [f"{name}: {said}" for name, said in terms]
        elif entry.shape != spaces[entry.name].shape:
            gives = spaces[entry.name].shape
            observations.append(f"{entry.name}: it reads {entry.shape}, the environment gives {gives}")
    actions = _of_bounds(manifest.action, action_space)
    if own_task is not None and manifest.action.joints:
        actions += joints_apart(manifest.action.joints, own_task.action.names) or actions_apart(
            manifest.action, action_of(action_space, own_task)
        )
    require_same(path, observations, actions + periods_apart(manifest.control_dt, own_dt))


def require_same(path: str, observations: Sequence[str], actions: Sequence[str]) -> None:
    """Raise UsageError where there are differences, with all of them."""
    if observations or actions:
        what = " and ".join(filter(None, ("observes" * bool(observations), "does" * bool(actions))))
        listed = "".join(f"\n  {line}" for line in (*observations, *actions))
        raise UsageError(f"the base {path} {what} something else than this environment:{listed}")


def terms_apart(theirs: Sequence[Term], own: Sequence[Term]) -> list[tuple[str, str]]:
    """Names of terms, and how they differ; what training does to them (noise, delays, steps of a sensor) may differ."""
    there, here = {term.name: term for term in theirs}, {term.name: term for term in own}
    apart = [(name, "the environment has no such term") for name in there if name not in here]
    apart += [(name, "the base does not read it") for name in here if name not in there]
    for name in (name for name in there if name in here):
        one, other = there[name], here[name]
        if (one.size, one.unit, one.history) != (other.size, other.unit, other.history):
            apart.append((name, f"it reads {_numbers(one)}, the environment gives {_numbers(other)}"))
            continue
        for what in ("measure", "frame", "joints", "select", "frequency"):
            if getattr(one, what) != getattr(other, what):
                said = [_said(getattr(term, what)) for term in (one, other)]
                apart.append((name, f"its {what} is {said[0]}, the environment's {said[1]}"))
        if not _near(one.offset, other.offset):
            apart.append((name, f"its offset is {list(one.offset)}, the environment's {list(other.offset)}"))
    if not apart and list(there) != list(here):
        apart.append((BARE, f"the order is {', '.join(there)}, and the environment's {', '.join(here)}"))
    return apart


def joints_apart(theirs: Sequence[str], own: Sequence[str]) -> list[str]:
    """That it moves other joints, or in another order."""
    if list(theirs) == list(own):
        return []
    return [f"action: the base moves {', '.join(theirs)}, the environment {', '.join(own)}"]


def actions_apart(theirs: Action, own: Action) -> list[str]:
    """How what it does with the same joints differs; delays of training may."""
    if (theirs.kind, theirs.unit) != (own.kind, own.unit):
        return [f"action: it is {theirs.kind} ({theirs.unit}), the environment's {own.kind} ({own.unit})"]
    return [
        f"action: its {what} is {list(getattr(theirs, what))}, the environment's {list(getattr(own, what))}"
        for what in ("scale", "offset", "lead", "smoothing")
        if not _near(getattr(theirs, what), getattr(own, what))
    ]


def periods_apart(theirs: float | None, own: float | None) -> list[str]:
    """That it acts more or less often, where both are known, in s."""
    if theirs is None or own is None or abs(theirs - own) <= 1e-6:
        return []
    return [f"it acts every {theirs:g} s, in the environment every {own:g} s"]


def box_of(space: gym.Space[Any]) -> gym.spaces.Box:
    """The space of actions.

    Raises:
        UsageError: actions are not of numbers.
    """
    if not isinstance(space, gym.spaces.Box):
        raise UsageError(f"a base policy is for Box actions; the environment has {space}")
    return space


def _of_spaces(theirs: gym.Space[Any], own: gym.Space[Any], *, told: str | None) -> list[str]:
    """Differences of observations, entry by entry; of the entry `told` they have been told term by term."""
    if alike(theirs, own, bounds=False):
        return []
    if not isinstance(theirs, gym.spaces.Dict) or not isinstance(own, gym.spaces.Dict):
        return [] if told else [f"it has {theirs}, the environment {own}"]
    said = []
    for name in dict.fromkeys([*theirs.spaces, *own.spaces]):
        one, other = theirs.spaces.get(name), own.spaces.get(name)
        if one is None or other is None:
            said.append(f"{name}: {'the base does not have it' if one is None else 'the environment does not give it'}")
        elif name != told and not alike(one, other, bounds=False):
            said.append(f"{name}: the base has {one}, the environment {other}")
    return said


def _of_bounds(action: Action, space: gym.Space[Any]) -> list[str]:
    box = box_of(space)
    low, high = ([np.nan if b is None else b for b in bounds] for bounds in (action.low, action.high))
    if action.shape != box.shape:
        return [f"action: it gives {action.shape}, the environment takes {box.shape}"]
    if low and not (np.allclose(low, box.low.ravel(), 1e-4) and np.allclose(high, box.high.ravel(), 1e-4)):
        return [f"action: its bounds are {low} to {high}, the environment's {box.low.tolist()} to {box.high.tolist()}"]
    return []


def _near(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether numbers are the same up to rounding; none at all are zeros."""
    size = max(len(one), len(other))
    if {len(one), len(other)} - {0, size}:
        return False
    return np.allclose(one or [0.0] * size, other or [0.0] * size, 1e-4)


def _numbers(term: Term) -> str:
    return f"{term.size} {term.unit}".strip() + (f", {term.history} in succession" if term.history > 1 else "")


def _said(value: Any) -> str:
    return (", ".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "none"
