"""OGBench's .npz files: trajectories one after the other, the last row of each an observation only.

`terminals` is 1 on that last row and means that the trajectory ends there, never that the task ended. What else has as
many rows (`qpos`, `qvel`, `button_states`) belongs to the observations. There are no rewards: goals are chosen later.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ctrlrl.data.importers.base import Format, ImportOptions, Source
from ctrlrl.data.importers.npz import Npz, names
from ctrlrl.data.importers.rows import (
    BLOCK,
    ActionRange,
    Array,
    Rows,
    Tally,
    acted,
    chosen,
    column_name,
    column_of,
    episodes,
    flags,
    observation_box,
    observed,
    refuse_unused,
    rewarded,
)
from ctrlrl.data.store import Episode
from ctrlrl.errors import UsageError

OWN = ("observations", "actions", "terminals")


def looks_like(path: Path) -> bool:
    """Whether it has OGBench's arrays, and neither rewards nor next observations."""
    there = names(path)
    return there.issuperset(OWN) and not there & {"rewards", "next_observations"}


def read(path: Path, options: ImportOptions) -> Source:
    """Read an OGBench file.

    Raises:
        UsageError: it is none, or not as the format has it.
    """
    refuse_unused(options, "ogbench")
    file = Npz(path)
    try:
        return _read(file, path, options)
    except BaseException:
        file.close()
        raise


def _read(file: Npz, path: Path, options: ImportOptions) -> Source:
    own = {name: file[name] for name in OWN}
    if "rewards" in file.arrays:
        own["rewards"] = file["rewards"]
    count = own["observations"].rows
    for name, member in own.items():
        if member.rows != count:
            raise UsageError(f"{path}: {name} has {member.rows:,} rows, observations {count:,}")
    notes: list[str] = []
    extra = {}
    for name, member in file.arrays.items():
        if name not in own and member.is_number and member.rows == count:
            extra[column_name(name)] = name
        elif name not in own:
            notes.append(f"{name} has no row of numbers for each observation: left out")
    kept = {column: extra[column] for column in chosen(extra, options, path)}
    if "rewards" not in own:
        notes.append("there are no rewards: every reward is 0, to be made by relabelling with a goal")

    step = max(1, BLOCK // max(1, sum(file[name].row_bytes for name in {*own, *kept.values()})))
    reach, actions, at = ActionRange(path), own["actions"].reader(), 0
    while at < count:
        part = acted(actions.read(step), f"{path}: actions")
        reach.add(part, at)
        at += len(part)
    action_space = reach.space(notes)

    def blocks() -> Iterator[Rows]:
        readers = {name: file[name].reader() for name in {*own, *kept.values()}}
        for first in range(0, count, step):
            part: dict[str, Array] = {name: reader.read(step) for name, reader in readers.items()}
            rows = len(part["observations"])
            ends = flags(part["terminals"], f"{path}: terminals", first)
            rewards = part.get("rewards", np.zeros(rows, np.float32))
            yield Rows(
                first=first,
                observation={"": observed(part["observations"], f"{path}: observations")},
                action=acted(part["actions"], f"{path}: actions"),
                reward=rewarded(rewards, f"{path}: rewards"),
                terminated=np.zeros(rows, bool),
                truncated=ends,
                columns={column: part[name] for column, name in kept.items()},
            )

    def read_all() -> Iterator[Episode]:
        tally = Tally()
        yield from episodes(blocks(), str(path), tally, last_row_acts=False, per_observation=True)
        tally.report(path, notes)

    example = {name: np.empty((0, *file[name].shape[1:]), file[name].dtype.newbyteorder("=")) for name in file.arrays}
    return Source(
        observation_space=observation_box(observed(example["observations"], f"{path}: observations")),
        action_space=action_space,
        episodes=read_all(),
        env=options.env,
        columns={column: column_of(example[name], "observation") for column, name in kept.items()},
        provenance={"format": "ogbench", "file": path.name},
        notes=notes,
        close=file.close,
    )


FORMAT = Format(
    name="ogbench",
    title="OGBench .npz: observations, actions and where trajectories end",
    detect=looks_like,
    read=read,
)
