"""D4RL's HDF5 files: flat arrays over all steps, with `terminals`, and mostly `timeouts` and `next_observations`.

A timeout is where the recording was cut, never the end of the task. Files without timeouts need to be told after how
many steps episodes were cut, unless they have next observations: there the next row shows where an episode ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ctrlrl.data.importers.base import Format, ImportOptions, Source
from ctrlrl.data.importers.hdf5 import Hdf5, Leaf, block_rows, looks_like
from ctrlrl.data.importers.rows import (
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
    require_finite,
    rewarded,
)
from ctrlrl.data.store import Episode
from ctrlrl.errors import UsageError

REQUIRED = ("observations", "actions", "rewards", "terminals")
OWN = (*REQUIRED, "timeouts", "next_observations")

_LOCOMOTION = r"-(random|medium|expert|medium-replay|full-replay|medium-expert|mixed|random-expert)(-v\d+)?"
_ADROIT = r"-(human|cloned|expert)(-v\d+)?"
# name pattern: (random, expert), as D4RL's table has them; the environments are those of gym v2 and mujoco-py.
REFERENCES = {
    rf"halfcheetah{_LOCOMOTION}": (-280.178953, 12135.0),
    rf"hopper{_LOCOMOTION}": (-20.272305, 3234.3),
    rf"walker2d{_LOCOMOTION}": (1.629008, 4592.3),
    rf"ant{_LOCOMOTION}": (-325.6, 3879.7),
    r"antmaze-(umaze|medium|large)(-diverse|-play)?(-v\d+)?": (0.0, 1.0),
    r"kitchen-(complete|partial|mixed)(-v\d+)?": (0.0, 4.0),
    rf"pen{_ADROIT}": (96.262799, 3076.8331017826877),
    rf"hammer{_ADROIT}": (-274.856578, 12794.134825156867),
    rf"relocate{_ADROIT}": (-6.425911, 4233.877797728884),
    rf"door{_ADROIT}": (-56.512833, 2880.5693087298737),
    r"maze2d-umaze(-sparse)?(-v\d+)?": (23.85, 161.86),
    r"maze2d-medium(-sparse)?(-v\d+)?": (13.13, 277.39),
    r"maze2d-large(-sparse)?(-v\d+)?": (6.7, 273.99),
    r"maze2d-umaze-dense(-v\d+)?": (68.537689, 193.66285642381482),
    r"maze2d-medium-dense(-v\d+)?": (44.264742, 297.4552547777125),
    r"maze2d-large-dense(-v\d+)?": (30.569041, 303.4857382709002),
}


def reference(*names: str) -> dict[str, float]:
    """The reference returns of the first name that is one of D4RL's, such as `hopper_medium-v2` or `pen-human-v1`."""
    for name in names:
        plain = name.lower().removesuffix(".hdf5").replace("_", "-")
        for pattern, (random, expert) in REFERENCES.items():
            if re.fullmatch(pattern, plain):
                return {"random": random, "expert": expert}
    return {}


def read(path: Path, options: ImportOptions) -> Source:
    """Read a D4RL file.

    Raises:
        UsageError: it is none, or not as the format has it, or does not say where episodes end.
    """
    refuse_unused(options, "d4rl", "max_episode_steps")
    file = Hdf5(path)
    try:
        return _read(file, path, options)
    except BaseException:
        file.close()
        raise


def _read(file: Hdf5, path: Path, options: ImportOptions) -> Source:
    top = file.names(file.root)
    own = {name: file.leaf(file.root, name) for name in OWN if name in top or name in REQUIRED}
    _check_shapes(path, own)
    count = own["observations"].rows
    notes: list[str] = []
    if "timeouts" in own and options.max_episode_steps is not None:
        raise UsageError(f"{path} has timeouts, which say where episodes were cut: leave --max-episode-steps out")
    if not {"timeouts", "next_observations"} & own.keys() and options.max_episode_steps is None:
        raise UsageError(
            f"{path} has neither timeouts nor next_observations: where episodes were cut off cannot be known from it. "
            "Say after how many steps they were: --max-episode-steps 1000, say, or a number greater than any episode "
            "if every one ended with a terminal"
        )

    extra: dict[str, Leaf] = {}
    for name, leaf in file.leaves(file.root, skip=(*OWN, "metadata")).items():
        if leaf.is_number and leaf.rows == count:
            extra[column_name(name.removeprefix("infos."))] = leaf
        else:
            notes.append(f"{name} has no row of numbers for each step: left out")
    kept = {name: extra[name] for name in chosen(extra, options, path)}

    names = [path.name, *([options.env] if options.env else [])]
    known = reference(*names)
    if known and options.env and re.search(r"-v([4-9]|\d\d)$", options.env):
        notes.append(
            f"the reference returns are of D4RL's own environments (gym v2); returns in {options.env} differ from them"
        )
    action_space = _scan(path, own, notes)
    step = block_rows([*own.values(), *kept.values()])

    def blocks() -> Iterator[Rows]:
        for first in range(0, count, step):
            part: dict[str, Array] = {name: leaf[first : first + step] for name, leaf in own.items()}
            following = part.get("next_observations")
            terminals = flags(part["terminals"], f"{path}: terminals", first)
            yield Rows(
                first=first,
                observation={"": observed(part["observations"], f"{path}: observations")},
                action=acted(part["actions"], f"{path}: actions"),
                reward=rewarded(part["rewards"], f"{path}: rewards"),
                terminated=terminals,
                truncated=flags(part["timeouts"], f"{path}: timeouts", first)
                if "timeouts" in part
                else np.zeros(len(terminals), bool),
                next_observation=None
                if following is None
                else {"": observed(following, f"{path}: next_observations").astype(part["observations"].dtype)},
                columns={name: leaf[first : first + step] for name, leaf in kept.items()},
            )

    def read_all() -> Iterator[Episode]:
        tally = Tally()
        yield from episodes(blocks(), str(path), tally, cut_after=options.max_episode_steps)
        tally.report(path, notes)

    return Source(
        observation_space=observation_box(observed(own["observations"][:0], f"{path}: observations")),
        action_space=action_space,
        episodes=read_all(),
        env=options.env,
        columns={name: column_of(leaf[:0]) for name, leaf in kept.items()},
        reference=known,
        provenance={"format": "d4rl", "file": path.name, "metadata": _metadata(file)},
        notes=notes,
        close=file.close,
    )


def _check_shapes(path: Path, own: dict[str, Leaf]) -> None:
    count = own["observations"].rows
    for name, leaf in own.items():
        if not leaf.is_number:
            raise UsageError(f"{leaf.where} is of {leaf.holds}; expected numbers")
        if not leaf.shape:
            raise UsageError(f"{leaf.where} is a single number; expected one row for each step")
        if leaf.rows != count:
            raise UsageError(f"{path}: {name} has {leaf.rows:,} rows, observations {count:,}: every step needs one")
    if "next_observations" in own:
        one, other = own["observations"], own["next_observations"]
        if one.shape != other.shape or (one.dtype.kind, one.dtype.itemsize) != (other.dtype.kind, other.dtype.itemsize):
            raise UsageError(
                f"{path}: next_observations is {other.shape} of {other.dtype}, observations {one.shape} of {one.dtype}"
            )


def _scan(path: Path, own: dict[str, Leaf], notes: list[str]) -> Any:
    """The action space; checks actions, rewards and flags before any episode is read."""
    reach = ActionRange(path)
    small = {name: leaf for name, leaf in own.items() if not name.endswith("observations")}
    step = block_rows(list(small.values()))
    for first in range(0, own["actions"].rows, step):
        for name, leaf in small.items():
            part = leaf[first : first + step]
            if name == "actions":
                reach.add(acted(part, f"{path}: actions"), first)
            elif name == "rewards":
                require_finite(rewarded(part, f"{path}: rewards"), f"{path}: the reward", first)
            else:
                flags(part, f"{path}: {name}", first)
    return reach.space(notes)


def _metadata(file: Hdf5) -> dict[str, Any]:
    """The single numbers and texts under `metadata`: the algorithm, its iteration."""
    if "metadata" not in file.names(file.root):
        return {}
    found = {}
    for name, leaf in file.leaves(file.group(file.root, "metadata")).items():
        if leaf.shape == () and (leaf.is_number or leaf.is_text):
            value = leaf.scalar()
            if isinstance(value, str) or (value == value and abs(value) != float("inf")):
                found[name] = value[:1000] if isinstance(value, str) else value
    return found


FORMAT = Format(
    name="d4rl",
    title="D4RL HDF5: observations, actions, rewards, terminals, timeouts",
    detect=lambda path: looks_like(path, *REQUIRED),
    read=read,
)
