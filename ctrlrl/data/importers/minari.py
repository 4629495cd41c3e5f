"""Minari's datasets: a folder with `data/metadata.json` and the episodes, as HDF5, Arrow or Parquet.

Spaces are JSON texts and are rebuilt from them; the environment's specification is JSON too, and of it the ID is taken.
Nothing in either is run. Observations are T + 1 an episode and so are infos, which become columns of the same rows (or
of T, where an older version wrote as many). Dict and Tuple observations are flattened, with names joined by dots; a
Discrete or MultiDiscrete one becomes a box of integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.base import Format, ImportOptions, Source
from ctrlrl.data.importers.minari_spaces import Entry, actions, entries
from ctrlrl.data.importers.minari_stores import ArrowStore, Entries, Hdf5Store, Store
from ctrlrl.data.importers.rows import (
    chosen,
    column_name,
    flags,
    inside,
    json_object,
    refuse_unused,
    require_finite,
    rewarded,
)
from ctrlrl.data.store import Column, Episode
from ctrlrl.errors import UsageError

KEPT = (
    "dataset_id",
    "minari_version",
    "algorithm_name",
    "description",
    "author",
    "author_email",
    "code_permalink",
    "requirements",
    "data_format",
    "env_spec",
    "eval_env_spec",
)
"""What of metadata.json goes to the provenance."""


def looks_like(path: Path) -> bool:
    """Whether it is a folder with Minari's metadata.json."""
    try:
        file = _home(path) / "metadata.json"
        return file.is_file() and b'"observation_space"' in file.read_bytes()[: 64 * 2**20]
    except OSError:
        return False


def _home(path: Path) -> Path:
    return path / "data" if (path / "data" / "metadata.json").is_file() else path


def read(path: Path, options: ImportOptions) -> Source:
    """Read a Minari dataset.

    Raises:
        UsageError: it is none, or not as the format has it.
    """
    refuse_unused(options, "minari")
    home = _home(path)
    metadata = _metadata(home)
    observation = list(entries(_space_json(home, metadata, "observation_space"), f"{home}: observation_space"))
    action_space, action = actions(_space_json(home, metadata, "action_space"), f"{home}: action_space")
    count = metadata.get("total_episodes")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UsageError(f"{home}/metadata.json: total_episodes must be a positive number, got {count!r}")
    layout = metadata.get("data_format", "hdf5")
    if layout not in ("hdf5", "arrow", "parquet"):
        raise UsageError(f"{home}/metadata.json: data_format is {layout!r}; expected hdf5, arrow or parquet")
    store: Store = Hdf5Store(home, count) if layout == "hdf5" else ArrowStore(home, count, layout)
    try:
        reading = _Reading(home, store, observation, action, count, options, metadata)
    except BaseException:
        store.close()
        raise
    spaces = {entry.name: entry.space for entry in observation}
    return Source(
        observation_space=spaces.get("", gym.spaces.Dict(spaces)),
        action_space=action_space,
        episodes=reading.episodes(),
        env=options.env or _environment(home, metadata),
        columns=reading.columns,
        reference=_reference(metadata),
        provenance={"format": "minari", "layout": layout, "file": path.name}
        | {key: metadata[key] for key in KEPT if _is_plain(metadata.get(key))},
        notes=reading.notes,
        close=store.close,
    )


class _Reading:
    """The episodes of a dataset. What can be told from the first one is told at once."""

    def __init__(
        self,
        home: Path,
        store: Store,
        observation: list[Entry],
        action: Entry,
        count: int,
        options: ImportOptions,
        metadata: dict[str, Any],
    ) -> None:
        self.home, self.store, self.count, self.metadata = home, store, count, metadata
        self.observation, self.action = observation, action
        self.notes: list[str] = []
        self.columns: dict[str, Column] = {}
        self.first_infos = store.infos(0)
        named = {column_name(name): name for name in self.first_infos}
        self.infos = {column: named[column] for column in chosen(named, options, home)}
        for column, name in list(self.infos.items()):
            declared = self._column(name, text=options.columns is not None)
            if isinstance(declared, Column):
                self.columns[column] = declared
            elif options.columns is not None:
                raise UsageError(f"{home}: infos {name} cannot be kept: {declared}")
            else:
                self.notes.append(f"infos {name}: {declared}; left out")

    def _column(self, name: str, *, text: bool) -> Column | str:
        """What an info is declared as, or why it cannot be kept."""
        steps = self.store.steps(0)
        try:
            rows = self.store.info(self.first_infos[name])
        except UsageError as error:
            return str(error)
        if len(rows) not in (steps, steps + 1):
            return f"it has {len(rows)} rows, with {steps} steps"
        if isinstance(rows, list) and not text:
            return "it is of texts, which are kept where --columns names them"
        per: Any = "observation" if len(rows) > steps else "step"
        if isinstance(rows, list):
            return Column(dtype="text", per=per)
        return Column(dtype=rows.dtype.name, shape=rows.shape[1:], per=per)

    def episodes(self) -> Iterator[Episode]:
        """All of them, in order."""
        later: set[str] = set()
        total = 0
        for number in range(self.count):
            infos = self.store.infos(number)
            later |= infos.keys() - self.first_infos.keys()
            episode = self._episode(number, infos)
            total += len(episode.reward)
            yield episode
        counted = self.metadata.get("total_steps")
        if isinstance(counted, int) and counted != total:
            raise UsageError(f"{self.home}: metadata.json counts {counted:,} steps, its episodes have {total:,}")
        if self.store.decoded:
            self.notes.append("images were kept as JPEG, with loss: what is read are the decoded ones")
        if later:
            self.notes.append(f"infos {', '.join(sorted(later))}: not in the first episode, left out")

    def _episode(self, number: int, infos: Mapping[str, Any]) -> Episode:
        where = f"{self.home}: episode {number}"
        steps = self.store.steps(number)
        if steps < 1:
            raise UsageError(f"{where} has no step: leave it out")
        seen = {e.name: self._checked(number, "observations", e, steps + 1) for e in self.observation}
        action = self._checked(number, "actions", self.action, steps)
        ends = {}
        for part in ("terminations", "truncations"):
            ends[part] = flags(self.store.plain(number, part), f"{where}: {part}")
            if len(ends[part]) != steps:
                raise UsageError(f"{where}: {part} has {len(ends[part])} rows, rewards {steps}")
            if ends[part][:-1].any():
                step = int(np.flatnonzero(ends[part])[0])
                raise UsageError(
                    f"{where}: {part} is true at step {step} of {steps}, and the episode goes on: where the next one "
                    "begins cannot be told. Split it there"
                )
        columns: dict[str, Entries] = {}
        for column, declared in self.columns.items():
            name = self.infos[column]
            if name not in infos:
                raise UsageError(f"{where} has no infos {name}, which the first has: name the others with --columns")
            rows = self.store.info(infos[name])
            if len(rows) != steps + (declared.per == "observation"):
                raise UsageError(
                    f"{where}: infos {name} has {len(rows)} rows with {steps} steps; in the first episode there is one "
                    f"for each {declared.per}. Name the others with --columns"
                )
            if not isinstance(rows, list):
                remedy = "Leave it out: name the others with --columns"
                require_finite(rows, f"{where}: infos {name}", remedy=remedy)
            columns[column] = rows
        seed = self.store.seed(number)
        return Episode(
            observation=seen.get("", seen),  # type: ignore[arg-type]
            action=np.asarray(action),
            reward=rewarded(self.store.plain(number, "rewards"), f"{where}: rewards"),
            terminated=bool(ends["terminations"][-1]),
            truncated=bool(ends["truncations"][-1]),
            columns=columns,
            info={"seed": seed} if isinstance(seed, int) else {},
        )

    def _checked(self, number: int, part: str, entry: Entry, rows: int) -> Entries:
        """An entry's rows, in number, shape and type as its space has them."""
        what = f"{self.home}: episode {number}: {part}{f' {entry.name}' if entry.name else ''}"
        array = self.store.entry(number, part, entry)
        if len(array) != rows:
            raise UsageError(
                f"{what} has {len(array)} rows; with {self.store.steps(number)} rewards it must have {rows}"
            )
        if isinstance(array, list):
            return array
        if array.shape[1:] != entry.shape:
            raise UsageError(f"{what} has entries of shape {array.shape[1:]}; its space says {entry.shape}")
        require_finite(array, what)
        wanted = np.dtype(entry.space.dtype)
        with np.errstate(all="ignore"):
            cast = array.astype(wanted, copy=False)
        if wanted.kind != "f" and not np.array_equal(cast, array):
            raise UsageError(f"{what} is of {array.dtype}; its space says {wanted}, which cannot hold all of it")
        return cast.reshape(rows, *(entry.space.shape or ()))


def _metadata(home: Path) -> dict[str, Any]:
    file = home / "metadata.json"
    if not file.is_file():
        raise UsageError(f"{home} is no Minari dataset: it has no metadata.json. Name the folder NAME-vN, or its data")
    inside(file, home)
    if file.stat().st_size > 64 * 2**20:
        raise UsageError(f"{file} has more than 64 MiB; it should hold two spaces and a few lines")
    return json_object(file.read_bytes(), str(file))


def _space_json(home: Path, metadata: dict[str, Any], key: str) -> dict[str, Any]:
    text = metadata.get(key)
    if not isinstance(text, str):
        raise UsageError(f"{home}/metadata.json has no {key}; Minari 0.5 writes it as a JSON text")
    return json_object(text, f"{home}/metadata.json: {key}")


def _environment(home: Path, metadata: dict[str, Any]) -> str | None:
    """The ID in the environment's specification, or in that of the one to evaluate in."""
    for key in ("env_spec", "eval_env_spec"):
        if isinstance(text := metadata.get(key), str):
            found = json_object(text, f"{home}/metadata.json: {key}").get("id")
            return found if isinstance(found, str) and found else None
    return None


def _reference(metadata: dict[str, Any]) -> dict[str, float]:
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    both = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in (low, high))
    return {"random": float(low), "expert": float(high)} if both else {}  # type: ignore[arg-type]


def _is_plain(value: Any) -> bool:
    """Whether it is a text or a list of some, of no great length."""
    listed = value if isinstance(value, list) else [value]
    return bool(listed) and all(isinstance(text, str) and len(text) < 10_000 for text in listed[:1000])


FORMAT = Format(
    name="minari",
    title="Minari, as HDF5, Arrow or Parquet",
    detect=looks_like,
    read=read,
)
