"""What a task is to a controller, in the words of a bundle's manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import mujoco

from ctrlrl.deploy.manifest import Action, Term
from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.sim_vector import SimVector, physics
from ctrlrl.envs.spec import Measure, Obs, SimTask


def terms_of(task: SimTask, group: Mapping[str, Obs]) -> tuple[Term, ...]:
    """The terms of a group of observations, in their order; `measure` is empty where a robot cannot compute one."""
    env = SimVector(task, BatchSim(physics(task), 1, 1))  # which finds out how long each term is
    places = next(own.names for own in env.groups.values() if own.names.keys() == group.keys())
    terms = []
    for name, term in group.items():
        m, size = term.measure or Measure(""), (places[name].stop - places[name].start) // term.history
        terms.append(
            Term(
                name=name,
                size=size,
                measure=m.what,
                unit=m.unit,
                frame=m.frame,  # type: ignore[arg-type]
                joints=tuple(m.joints),
                offset=tuple(map(float, m.offset)),
                frequency=m.frequency,
                resolution=m.resolution,
                select=tuple(m.select),
                history=term.history,
                delay=term.delay,
                noise=term.noise,
            )
        )
    return tuple(terms)


def action_of(space: gym.Space[Any], task: SimTask | None) -> Action:
    """What an action of `space` is, and does in `task`."""
    if not isinstance(space, gym.spaces.Box):
        shape = tuple(space.shape or ())
        if isinstance(space, gym.spaces.Discrete):
            first, last = float(space.start), float(space.start + space.n - 1)
            return Action(kind="choice", shape=shape, low=(first,), high=(last,))
        assert isinstance(space, gym.spaces.MultiDiscrete)
        lows = [float(n) for n in space.start.ravel()]
        highs = [float(n) for n in (space.start + space.nvec - 1).ravel()]
        return Action(kind="choice", shape=shape, low=tuple(lows), high=tuple(highs))
    low, high = (tuple(finite(bound) for bound in part.ravel()) for part in (space.low, space.high))
    effect = None if task is None else task.action.effect
    if task is None or effect is None:
        return Action(kind="box", shape=tuple(space.shape), low=low, high=high)
    count = len(task.action.names)
    return Action(
        kind=effect.kind,
        shape=tuple(space.shape),
        joints=tuple(task.action.names),
        unit=effect.unit,
        low=low,
        high=high,
        scale=tuple(map(float, effect.scale)),
        offset=tuple(map(float, effect.offset or [0.0] * count)),
        lead=tuple(map(float, effect.lead)),
        delay=task.action.delay,
        smoothing=_smoothing(task),
    )


def _smoothing(task: SimTask) -> tuple[float, ...]:
    """Time constants of the filters before the motors, as they were simulated."""
    model = physics(task)
    motors = [model.actuator(name).id for name in task.action.names] if task.robot is not None else []
    filters = (mujoco.mjtDyn.mjDYN_FILTER, mujoco.mjtDyn.mjDYN_FILTEREXACT)
    seconds = [model.actuator_dynprm[i, 0] if model.actuator_dyntype[i] in filters else 0.0 for i in motors]
    return tuple(map(float, seconds)) if any(seconds) else ()


def finite(number: float) -> float | None:
    """The number, None where it is not finite."""
    return float(number) if math.isfinite(number) else None
