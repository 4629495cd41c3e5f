"""robomimic's HDF5 files: one group a demonstration, with obs, next_obs, actions, rewards, dones and states.

A demonstration is an episode. `dones` marks success, or the end of the demonstration, or both, depending on how the
file was made; the file does not say how. Robosuite rewards success with 1 and, where rewards are shaped, everything
else with less: an episode is terminated if its last step is done with a reward of 1, and else cut off. What is marked
done before the last step stays within its episode; the column `dones` keeps it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.base import Format, ImportOptions, Source
from ctrlrl.data.importers.hdf5 import Hdf5, Leaf, looks_like
from ctrlrl.data.importers.rows import (
    ActionRange,
    Rows,
    Tally,
    acted,
    chosen,
    column_name,
    column_of,
    episodes,
    flags,
    json_object,
    observation_box,
    observed,
    refuse_unused,
    require_finite,
    rewarded,
)
from ctrlrl.data.store import Episode
from ctrlrl.errors import UsageError

SUCCESS = 1 - 1e-6
"""Robosuite's reward for success, scaled as it is by default, but for rounding."""
OWN = ("obs", "next_obs", "actions", "rewards")


def read(path: Path, options: ImportOptions) -> Source:
    """Read a robomimic file.

    Raises:
        UsageError: it is none, or not as the format has it.
    """
    refuse_unused(options, "robomimic")
    file = Hdf5(path)
    try:
        return _read(file, path, options)
    except BaseException:
        file.close()
        raise


def _read(file: Hdf5, path: Path, options: ImportOptions) -> Source:
    data = file.group(file.root, "data")
    demos = _demos(file, path, data)
    notes: list[str] = []
    first = _Demo(file, data, demos[0])
    shapes = {name: (leaf.shape[1:], leaf.dtype) for name, leaf in first.every.items()}
    shared = set(first.extra)
    reach = ActionRange(path)
    for name in demos:
        demo = _Demo(file, data, name)
        demo.check(shapes)
        shared &= set(demo.extra)
        reach.add(acted(demo.every["actions"][:], f"{demo.where}/actions"), 0)
        require_finite(rewarded(demo.every["rewards"][:], f"{demo.where}/rewards"), f"{demo.where}/rewards")
        flags(demo.every["dones"][:], f"{demo.where}/dones")
    lacking = sorted(set(first.extra) - shared)
    if lacking:
        notes.append(f"{', '.join(lacking)}: not in every demonstration, left out")
    available = {column_name(name): name for name in first.extra if name in shared}
    kept = {column: available[column] for column in chosen(available, options, path)}
    action_space = reach.space(notes)
    environment = _environment(file, data)

    def read_all() -> Iterator[Episode]:
        tally, unsure, early = Tally(), 0, 0
        for name in demos:
            demo = _Demo(file, data, name)
            rows = demo.rows(kept)
            dones = flags(demo.every["dones"][:], f"{demo.where}/dones")
            early += int(dones[:-1].sum())
            unsure += bool(dones[-1] and not rows.terminated[-1])
            for episode in episodes([rows], demo.where, tally):
                yield dataclasses.replace(episode, info={"demonstration": name})
        tally.report(path, notes)
        if early:
            notes.append(f"{early:,} steps before the last of their demonstration are marked done: they do not end it")
        if unsure:
            notes.append(
                f"{unsure:,} demonstrations end with done and a reward below that of success (1): taken as cut off"
            )

    entries: dict[str, gym.Space[Any]] = {
        name.removeprefix("obs."): observation_box(observed(leaf[:0], leaf.where))
        for name, leaf in first.every.items()
        if name.startswith("obs.")
    }
    frequency = environment.get("env_kwargs", {}).get("control_freq")
    return Source(
        observation_space=gym.spaces.Dict(entries),
        action_space=action_space,
        episodes=read_all(),
        env=options.env,  # the name in the file is robosuite's, which Gymnasium does not know
        control_dt=1 / frequency if isinstance(frequency, (int, float)) and frequency > 0 else None,
        columns={column: column_of(first.every[name][:0]) for column, name in kept.items()},
        provenance={"format": "robomimic", "file": path.name, "env_args": environment, "mask": _masks(file)},
        notes=notes,
        close=file.close,
    )


class _Demo:
    """One demonstration's arrays, by their path with dots."""

    def __init__(self, file: Hdf5, data: Any, name: str) -> None:
        group = file.group(data, name)
        self.where = file.where(group)
        self.every = file.leaves(group)
        own = {n for n in self.every if n.split(".")[0] in OWN}
        if not any(n.startswith("obs.") for n in own):
            raise UsageError(
                f"{self.where} has no obs: this file holds simulation states only. Make observations of them first, "
                "with robomimic's dataset_states_to_obs.py"
            )
        for required in ("actions", "rewards", "dones"):
            file.leaf(group, required)
        self.steps = self.every["actions"].rows
        self.has_next = any(n.startswith("next_obs.") for n in own)
        self.extra = [
            n for n, leaf in self.every.items() if n not in own and leaf.is_number and leaf.rows == self.steps
        ]

    def check(self, shapes: dict[str, tuple[Any, Any]]) -> None:
        """Raise UsageError unless arrays have a row for each step, of the shape and type of the first demonstration."""
        if self.steps < 1:
            raise UsageError(f"{self.where} holds no step: leave it out")
        for name, leaf in self.every.items():
            own = name.split(".")[0] in OWN or name == "dones"
            if own and not leaf.is_number:
                raise UsageError(f"{leaf.where} is of {leaf.holds}; expected numbers")
            if own and leaf.rows != self.steps:
                raise UsageError(f"{leaf.where} has {leaf.rows} rows, actions {self.steps}: every step needs one")
            if (own or name in self.extra) and name in shapes and (leaf.shape[1:], leaf.dtype) != shapes[name]:
                shape, dtype = shapes[name]
                raise UsageError(
                    f"{leaf.where} is {leaf.shape[1:]} of {leaf.dtype} a step, and in the first demonstration {shape} "
                    f"of {dtype}: entries must be alike"
                )
        for prefix in ("obs.", *(["next_obs."] if self.has_next else [])):
            here = {n.removeprefix(prefix) for n in self.every if n.startswith(prefix)}
            there = {n.removeprefix("obs.") for n in shapes if n.startswith("obs.")}
            if here != there:
                differing = ", ".join(sorted(here ^ there))
                raise UsageError(f"{self.where}: {prefix[:-1]} and the first demonstration's obs differ in {differing}")

    def rows(self, kept: dict[str, str]) -> Rows:
        """The whole demonstration."""
        every = self.every

        def observation(prefix: str) -> dict[str, Any]:
            return {
                name.removeprefix(prefix): observed(leaf[:], leaf.where)
                for name, leaf in every.items()
                if name.startswith(prefix)
            }

        reward = rewarded(every["rewards"][:], f"{self.where}/rewards")
        done = flags(every["dones"][:], f"{self.where}/dones")
        terminated, truncated = np.zeros(self.steps, bool), np.zeros(self.steps, bool)
        terminated[-1] = done[-1] and reward[-1] >= SUCCESS
        truncated[-1] = not terminated[-1]
        return Rows(
            first=0,
            observation=observation("obs."),
            action=acted(every["actions"][:], f"{self.where}/actions"),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            next_observation=observation("next_obs.") if self.has_next else None,
            columns={column: every[name][:] for column, name in kept.items()},
        )


def _demos(file: Hdf5, path: Path, data: Any) -> list[str]:
    """The demonstrations in the order of their numbers."""
    names = file.names(data)
    other = [name for name in names if not re.fullmatch(r"demo_\d+", name)]
    if other:
        raise UsageError(f"{path}: data/{other[0]} is no demonstration; they are called demo_0, demo_1 and so on")
    if not names:
        raise UsageError(f"{path} holds no demonstration: its group data is empty")
    return sorted(names, key=lambda name: int(name.removeprefix("demo_")))


def _environment(file: Hdf5, data: Any) -> dict[str, Any]:
    """What `env_args` says: the environment's name, its arguments. None of it is run."""
    text = file.attribute(data, "env_args")
    if not isinstance(text, str):
        return {}
    value = json_object(text, f"{file.path}: the attribute env_args of data")
    return value if isinstance(value.get("env_kwargs", {}), dict) else value | {"env_kwargs": {}}


def _masks(file: Hdf5) -> dict[str, list[str]]:
    """The filter keys, each a list of demonstrations."""
    if "mask" not in file.names(file.root):
        return {}
    leaves: dict[str, Leaf] = file.leaves(file.group(file.root, "mask"))
    return {name: [text.decode("utf-8", "replace") for text in leaf.strings()] for name, leaf in leaves.items()}


FORMAT = Format(
    name="robomimic",
    title="robomimic HDF5: demonstrations with obs, actions, rewards and dones",
    detect=lambda path: looks_like(path, "data") and not looks_like(path, "observations"),
    read=read,
)
