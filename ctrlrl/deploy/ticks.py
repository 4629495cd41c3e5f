"""The log of a controller: every tick, in a file that survives the process, and can be replayed.

`ticks.json` says what is in a record, and which bundle and limits it was; `ticks.bin` is records, one after the other.
The file is mapped into memory, so that writing a tick is a copy, and what was written is there after a crash.
"""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from ctrlrl.deploy.manifest import Manifest
from ctrlrl.deploy.strict_json import parse_json
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.wire import RobotDescription
from ctrlrl.errors import UsageError
from ctrlrl.files import write_errors_explained

FORMAT = "ctrlrl.ticks/1"
GROW = 1_024
"""Records by which the file grows."""
PHASES = ("wait", "ramp", "run", "fault", "stop")
"""What a controller does: waits for states, goes to where the policy begins, follows the policy, keeps safe."""


def record_type(manifest: Manifest, robot: RobotDescription) -> np.dtype[Any]:
    """One tick."""
    joints, driven = len(robot.joints), len(manifest.action.joints)
    fields: list[tuple[Any, ...]] = [
        ("tick", "<i8"),
        ("due", "<f8"),  # s, of the controller's clock
        ("began", "<f8"),
        ("ended", "<f8"),
        ("phase", "<u1"),  # of PHASES
        ("acted", "<u1"),  # 1 where the policy was asked
        ("first", "<u1"),  # 1 where its episode began
        ("sent", "<u1"),  # 0 safe, 1 driven, 2 by the reflex
        ("fault", "<u1"),  # 0 none, else 1 and its place in FAULTS
        ("fresh", "<u1"),  # 1 where a state had come since the tick before
        ("episode", "<u4"),
        ("sequence", "<u8"),  # of the state
        ("age", "<f8"),  # s, of the state when the command was sent
        ("robot_time", "<f8"),
        ("position", "<f8", (joints,)),
        ("velocity", "<f8", (joints,)),
        *((f"measure {name}", "<f8", (size,)) for name, size in robot.measures.items()),
        ("told", "<f8", (len(manifest.command),)),
        *((f"observation {entry.name}", "<f4", entry.shape) for entry in manifest.observation),
        ("action", "<f4", manifest.action.shape),
        ("wanted", "<f8", (driven,)),  # before the limits
        ("command", "<f8", (driven,)),
    ]
    return np.dtype(fields)


class TickLog:
    """Writes ticks.

    Args:
        folder: must have no log yet.
        kind: of a record.
        head: what `ticks.json` says besides.

    Attributes:
        row: the record of this tick, to be filled; `commit` keeps it.

    Raises:
        UsageError: it cannot be written.
    """

    def __init__(self, folder: Path, kind: np.dtype[Any], head: dict[str, Any]) -> None:
        self._kind, self._count, self._room = kind, 0, 0
        self.row: Any = np.zeros((), kind)
        with write_errors_explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            described = {"format": FORMAT, "fields": np.lib.format.dtype_to_descr(kind), **head}
            with open(folder / "ticks.json", "x") as file:
                json.dump(described, file, indent=1, default=list)
            self._file = os.open(folder / "ticks.bin", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._map: mmap.mmap | None = None
            self._grow()

    def _grow(self) -> None:
        """More room, on the disk: where there is none is known now, and not when a page is written."""
        size = self._kind.itemsize
        os.posix_fallocate(self._file, self._room * size, GROW * size)
        self._room += GROW
        if self._map is None:
            self._map = mmap.mmap(self._file, self._room * self._kind.itemsize)
        else:
            self._map.resize(self._room * self._kind.itemsize)

    def commit(self) -> None:
        """Keep the record as it is now, and begin the next with the same contents."""
        assert self._map is not None
        if self._count == self._room:
            self._grow()
        at = self._count * self._kind.itemsize
        self._map[at : at + self._kind.itemsize] = self.row.tobytes()
        self._count += 1

    def close(self) -> None:
        """Cut the file to what was written. Safe to call twice."""
        if self._map is not None:
            self._map.flush()
            self._map.close()
            self._map = None
            os.ftruncate(self._file, self._count * self._kind.itemsize)
            os.close(self._file)


def read_ticks(folder: str | Path) -> tuple[dict[str, Any], Array]:
    """What `ticks.json` says, and the records (T,), of a log that may not have been closed.

    Raises:
        UsageError: there is none, or it is none of ours.
    """
    folder = Path(folder)
    for name in ("ticks.json", "ticks.bin"):
        if not (folder / name).is_file():
            raise UsageError(f"{folder} has no log of a controller: there is no {name}")
    head = parse_json((folder / "ticks.json").read_bytes(), str(folder / "ticks.json"))
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise UsageError(f"{folder / 'ticks.json'} is no log of a controller, or of another version")
    try:
        kind = np.dtype(
            [(str(n), str(t), tuple(map(int, *s))) if s else (str(n), str(t)) for n, t, *s in head["fields"]]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{folder / 'ticks.json'} does not say what a record is: {error}") from None
    if kind.hasobject or not kind.itemsize:
        raise UsageError(f"{folder / 'ticks.json'} does not say what a record is")
    count = (folder / "ticks.bin").stat().st_size // kind.itemsize
    records = np.memmap(folder / "ticks.bin", kind, "r", shape=(count,)) if count else np.zeros(0, kind)
    written = np.flatnonzero(records["began"]) if "began" in (kind.names or ()) else np.zeros(0, np.int64)
    return head, records[: int(written[-1]) + 1 if len(written) else 0]
