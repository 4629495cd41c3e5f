"""Tables: plain .npz, Parquet and CSV files, one row a step, of which a mapping file says what is what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.arrow import explained, parquet, to_numpy
from ctrlrl.data.importers.base import Format, ImportOptions, Source, need
from ctrlrl.data.importers.mapping import REQUIRED, Mapping, Names, is_integer, read_mapping
from ctrlrl.data.importers.npz import Npz, names
from ctrlrl.data.importers.rows import (
    BLOCK,
    ActionRange,
    Array,
    Rows,
    Tally,
    acted,
    chosen,
    column_of,
    episodes,
    flags,
    inside,
    numbers,
    observation_box,
    observed,
    refuse_unused,
    require_finite,
    rewarded,
)
from ctrlrl.data.store import Episode
from ctrlrl.errors import UsageError, nearest


class Table(Protocol):
    """A file of rows in columns."""

    names: list[str]

    def blocks(self, names: list[str]) -> Iterator[dict[str, Array]]:
        """The rows of these columns, equally many of each, a block at a time."""

    def close(self) -> None:
        """Close the file."""


class _NpzTable:
    def __init__(self, path: Path, mapping: Mapping) -> None:
        self._file, self._path = Npz(path), path
        self.names = list(self._file.arrays)

    def blocks(self, names: list[str]) -> Iterator[dict[str, Array]]:
        members = {name: self._file[name] for name in names}
        counts = {name: member.rows for name, member in members.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {rows:,}" for name, rows in counts.items())
            raise UsageError(f"{self._path}: arrays have different numbers of rows: {listed}")
        readers = {name: member.reader() for name, member in members.items()}
        step = max(1, BLOCK // max(1, sum(member.row_bytes for member in members.values())))
        for _ in range(0, next(iter(counts.values())), step):
            yield {name: reader.read(step) for name, reader in readers.items()}

    def close(self) -> None:
        self._file.close()


class _ParquetTable:
    """A Parquet file, or a folder of them in the order of their names."""

    def __init__(self, path: Path, mapping: Mapping) -> None:
        self._paths = sorted(inside(p, path) for p in path.glob("*.parquet")) if path.is_dir() else [path]
        if not self._paths:
            raise UsageError(f"{path} holds no .parquet file")
        first, _ = parquet(self._paths[0])
        with explained(str(path)):
            self.names = list(first.schema_arrow.names)
        first.close()

    def blocks(self, names: list[str]) -> Iterator[dict[str, Array]]:
        for path in self._paths:
            file, row_bytes = parquet(path)
            try:
                with explained(str(path)):
                    lacking = set(names) - set(file.schema_arrow.names)
                if lacking:
                    raise UsageError(f"{path} has no column {sorted(lacking)[0]!r}, which {self._paths[0].name} has")
                step = max(1, BLOCK // row_bytes)
                batches, first = file.iter_batches(batch_size=step, columns=names), 0
                while True:
                    with explained(str(path)):
                        batch = next(batches, None)
                        if batch is not None:
                            batch.validate(full=True)
                    if batch is None:
                        break
                    yield {name: to_numpy(batch.column(name), f"{path}: {name}", first) for name in names}
                    first += len(batch)
            finally:
                file.close()

    def close(self) -> None:
        return None


_CSV = "Expected a line of names, and then lines of as many numbers, with commas between them"


class _CsvTable:
    """A CSV file with a header; numbers are read as float64, or as int64 where integers are asked for."""

    def __init__(self, path: Path, mapping: Mapping) -> None:
        self._path, self._csv, pa = path, need("pyarrow.csv"), need("pyarrow")
        if not path.is_file():
            raise UsageError(f"{path} is no CSV file: {'it is a folder' if path.is_dir() else 'there is no such file'}")
        self._types = dict.fromkeys(mapping.every, pa.float64())
        self._types |= dict.fromkeys(mapping.action, pa.int64() if mapping.whole_actions else pa.float64())
        if is_integer(mapping.observation_dtype):
            groups = [*mapping.observation.values(), *(mapping.next_observation or {}).values()]
            self._types |= {name: pa.int64() for names in groups for name in names}
        self._types |= {name: pa.bool_() for name in (mapping.terminated, mapping.truncated) if name}
        self._types |= {mapping.episode: pa.string()} if mapping.episode else {}
        with explained(str(path), _CSV):
            self.names = self._open(None).schema.names
        twice = [name for name in self.names if self.names.count(name) > 1]
        if twice:
            raise UsageError(f"{path} has two columns {twice[0]!r}; rename one")

    def _open(self, columns: list[str] | None) -> Any:
        convert = self._csv.ConvertOptions(
            column_types=self._types,
            include_columns=columns,
            true_values=["1", "1.0", "true", "True", "TRUE"],
            false_values=["0", "0.0", "false", "False", "FALSE"],
            strings_can_be_null=True,
        )
        with explained(str(self._path), _CSV):
            return self._csv.open_csv(
                self._path, read_options=self._csv.ReadOptions(block_size=4 * 2**20), convert_options=convert
            )

    def blocks(self, names: list[str]) -> Iterator[dict[str, Array]]:
        reader, first = self._open(names), 0
        while True:
            with explained(f"{self._path}, from row {first} on,", _CSV):
                batch = next(reader, None)
            if batch is None:
                return
            yield {name: to_numpy(batch.column(name), f"{self._path}: {name}", first) for name in names}
            first += len(batch)

    def close(self) -> None:
        return None


def _reading(format: str, table: Callable[[Path, Mapping], Table]) -> Callable[[Path, ImportOptions], Source]:
    def read(path: Path, options: ImportOptions) -> Source:
        refuse_unused(options, format, "mapping", "max_episode_steps")
        if options.mapping is None:
            raise UsageError(
                f"{path}: which columns are what has to be said in a mapping file: --mapping FILE, YAML or JSON, with "
                f"the keys {', '.join(REQUIRED)} and truncated or episode"
            )
        mapping = read_mapping(options.mapping)
        opened = table(path, mapping)
        try:
            return _read(opened, path, mapping, options, format)
        except BaseException:
            opened.close()
            raise

    return read


def _read(table: Table, path: Path, mapping: Mapping, options: ImportOptions, format: str) -> Source:
    for name in mapping.every:
        if name not in table.names:
            shown = ", ".join(table.names[:40]) + (", ..." if len(table.names) > 40 else "")
            near = nearest(name, table.names)
            raise UsageError(f"{path} has no column {name!r}, which {mapping.file} names.{near} There: {shown}")
    says = mapping.truncated or mapping.episode
    if says and options.max_episode_steps is not None:
        raise UsageError(f"{mapping.file} says where episodes end ({says}): leave --max-episode-steps out")
    if not (says or mapping.next_observation or options.max_episode_steps):
        raise UsageError(
            f"{mapping.file} names neither truncated, nor episode, nor next_observation: where episodes were cut off "
            "cannot be known. Add one of them, or say after how many steps they were: --max-episode-steps 1000, say"
        )
    kept = {name: mapping.columns[name] for name in chosen(mapping.columns, options, mapping.file)}
    reading = _Reading(table, path, mapping, kept, single=format == "csv")
    notes: list[str] = []
    action_space = reading.action_space(notes)
    example = next(reading.rows())

    def read_all() -> Iterator[Episode]:
        tally = Tally()
        yield from episodes(reading.rows(), str(path), tally, cut_after=options.max_episode_steps)
        tally.report(path, notes)

    boxes: dict[str, gym.Space[Any]] = {
        name: observation_box(array[:0].astype(mapping.observation_dtype or array.dtype))
        for name, array in example.observation.items()
    }
    return Source(
        observation_space=boxes.get("", gym.spaces.Dict(boxes)),
        action_space=action_space,
        episodes=read_all(),
        env=options.env or mapping.env,
        control_dt=mapping.control_dt,
        columns={name: column_of(array) for name, array in example.columns.items()},
        reference=mapping.reference,
        provenance={"format": format, "file": path.name, "mapping": mapping.file.name},
        notes=notes,
        close=table.close,
    )


class _Reading:
    """A table read as its mapping says.

    Args:
        kept: extra columns, by the name they get.
        single: whether numbers are texts in the file, so that float32 is as good as any type where none is asked for.
    """

    def __init__(self, table: Table, path: Path, mapping: Mapping, kept: dict[str, Names], *, single: bool) -> None:
        self.table, self.path, self.mapping, self.kept, self.single = table, path, mapping, kept, single
        groups = [*mapping.observation.values(), *(mapping.next_observation or {}).values(), mapping.action]
        used = {name for names in (*groups, *kept.values()) for name in names}
        used |= {name for name in (mapping.reward, mapping.terminated, mapping.truncated, mapping.episode) if name}
        self.wanted = [name for name in mapping.every if name in used]

    def rows(self) -> Iterator[Rows]:
        """The table's rows, block by block."""
        mapping, first = self.mapping, 0
        seen = _Seen(self.path)
        for block in self.table.blocks(self.wanted):
            count = len(block[mapping.reward])
            if not count:
                continue
            ids = None
            if mapping.episode is not None:
                ids = block[mapping.episode]
                seen.check(ids, first)
            following = mapping.next_observation
            yield Rows(
                first=first,
                observation=self._observation(block, mapping.observation),
                action=self._action(block),
                reward=rewarded(block[mapping.reward], f"{self.path}: {mapping.reward}"),
                terminated=self._flags(block, mapping.terminated, first),
                truncated=self._flags(block, mapping.truncated, first),
                next_observation=None if following is None else self._observation(block, following),
                episode=ids,
                columns={name: self._joined(block, names, flat=True) for name, names in self.kept.items()},
            )
            first += count

    def action_space(self, notes: list[str]) -> gym.Space[Any]:
        """The action space; checks actions, rewards and flags before any episode is read."""
        mapping = self.mapping
        marks = [name for name in (mapping.terminated, mapping.truncated) if name]
        reach, first, whole = ActionRange(self.path), 0, True
        for block in self.table.blocks(list(dict.fromkeys([*mapping.action, mapping.reward, *marks]))):
            action = self._action(block)
            reach.add(action, first)
            whole = whole and bool((action == np.round(action)).all())
            reward = rewarded(block[mapping.reward], f"{self.path}: {mapping.reward}")
            require_finite(reward, f"{self.path}: the reward", first)
            for name in marks:
                self._flags(block, name, first)
            first += len(action)
        if not first:
            raise UsageError(f"{self.path} holds no transition: it has no rows")
        if mapping.discrete_actions is not None:
            return _discrete(reach, mapping, self.path)
        if mapping.action_low is not None:
            return _bounded(reach, mapping, self.path)
        if self.single and whole and not mapping.whole_actions:
            notes.append("every action is a whole number, and is taken as continuous: discrete_actions says otherwise")
        return reach.space(notes)

    def _flags(self, block: dict[str, Array], name: str | None, first: int) -> Array:
        if name is None:
            return np.zeros(len(block[self.mapping.reward]), bool)
        return flags(block[name], f"{self.path}: {name}", first)

    def _observation(self, block: dict[str, Array], entries: dict[str, Names]) -> dict[str, Array]:
        single = self.single and self.mapping.observation_dtype is None
        arrays = {name: self._joined(block, names) for name, names in entries.items()}
        return {name: array.astype(np.float32) if single else array for name, array in arrays.items()}

    def _action(self, block: dict[str, Array]) -> Array:
        mapping, action = self.mapping, self._joined(block, self.mapping.action)
        kind, wanted = action.dtype.kind, mapping.action_dtype
        if wanted is None and ((kind == "f" and self.single) or (kind != "f" and mapping.action_low is not None)):
            wanted = "float32"
        if wanted is not None and mapping.discrete_actions is None:
            with np.errstate(all="ignore"):
                cast = action.astype(wanted)
            if is_integer(wanted) and not np.array_equal(cast, action):
                raise UsageError(f"{self.path}: actions are not of {wanted}, which {mapping.file} asks for")
            action = cast
        return acted(action, f"{self.path}: {', '.join(mapping.action)}")

    def _joined(self, block: dict[str, Array], names: Names, *, flat: bool = False) -> Array:
        """The columns of one entry side by side; a single one as it is (`flat`: without a dimension of its own)."""
        path = self.path
        for name in names:
            if block[name].dtype.kind == "O":
                raise UsageError(f"{path}: {name} is of texts; expected numbers")
        if len(names) == 1:
            where = f"{path}: {names[0]}"
            return numbers(block[names[0]], where) if flat else observed(block[names[0]], where)
        parts = [observed(block[name], f"{path}: {name}") for name in names]
        if any(part.ndim != 2 for part in parts):
            raise UsageError(f"{path}: {', '.join(names)} cannot be joined side by side; give each an entry of its own")
        return np.concatenate(parts, axis=1)


class _Seen:
    """Checks that no episode begins twice: then rows of several would be mixed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: Any = None
        self._seen: set[Any] = set()

    def check(self, ids: Array, first: int) -> None:
        """Take in the next rows, the first of which is row `first` of the file."""
        begins = (np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist()
        for row in [*([0] if ids[0] != self._last else []), *begins]:
            if ids[row] in self._seen:
                raise UsageError(
                    f"{self._path}: episode {ids[row]} begins again in row {first + row}; sort the rows by episode"
                )
            self._seen.add(ids[row])
        self._last = ids[-1]


def _discrete(reach: ActionRange, mapping: Mapping, path: Path) -> gym.Space[Any]:
    low, high = reach.range()
    choices = np.asarray(mapping.discrete_actions)
    if low.dtype.kind == "f" or choices.shape not in ((), low.shape):
        what = "not whole numbers" if low.dtype.kind == "f" else f"of shape {low.shape}"
        raise UsageError(f"{path}: actions are {what}, and {mapping.file} has discrete_actions: {choices.tolist()}")
    if (low < 0).any() or (high >= choices).any():
        raise UsageError(
            f"{path}: actions reach from {low.min()} to {high.max()}; with discrete_actions: {choices.tolist()} they "
            "count from 0"
        )
    if low.ndim == 0:
        return gym.spaces.Discrete(int(choices))
    return gym.spaces.MultiDiscrete(np.broadcast_to(choices, low.shape).tolist())


def _bounded(reach: ActionRange, mapping: Mapping, path: Path) -> gym.Space[Any]:
    low, high = reach.range()
    try:
        lowest = np.broadcast_to(np.asarray(mapping.action_low, low.dtype), low.shape)
        highest = np.broadcast_to(np.asarray(mapping.action_high, low.dtype), low.shape)
    except ValueError:
        raise UsageError(
            f"{mapping.file}: action_low and action_high must be a number, or one for each of the {low.shape} numbers "
            "of an action"
        ) from None
    if (lowest >= highest).any():
        raise UsageError(f"{mapping.file}: action_low must be below action_high")
    slack = 1e-5 * np.maximum(1, np.abs(highest - lowest))
    if (low < lowest - slack).any() or (high > highest + slack).any():
        raise UsageError(
            f"{path}: actions reach from {low.min():.6g} to {high.max():.6g}, beyond action_low and action_high of "
            f"{mapping.file}"
        )
    return gym.spaces.Box(lowest, highest, low.shape, low.dtype.type)


def _ends(path: Path, ending: str) -> bool:
    return path.suffix == ending and path.is_file()


FORMATS = {
    "npz": Format(
        name="npz",
        title="arrays in an .npz file, with a mapping file",
        detect=lambda path: bool(names(path)),
        read=_reading("npz", _NpzTable),
    ),
    "parquet": Format(
        name="parquet",
        title="a Parquet file, or a folder of them, with a mapping file",
        detect=lambda path: _ends(path, ".parquet") or (path.is_dir() and any(path.glob("*.parquet"))),
        read=_reading("parquet", _ParquetTable),
    ),
    "csv": Format(
        name="csv",
        title="a CSV file with a header, with a mapping file",
        detect=lambda path: _ends(path, ".csv"),
        read=_reading("csv", _CsvTable),
    ),
}
