"""The record of a run: `metrics.jsonl` is the truth; TensorBoard and others are writers beside it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, Protocol

from ctrlrl.files import write_errors_explained

Record = dict[str, Any]
"""One line of `metrics.jsonl`: `kind` (train, episode, eval, note), `step`, `time` and what belongs to the kind."""


class Writer(Protocol):
    """Takes every record as it is made. Weights & Biases and the like are ten lines behind this."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Finish writing."""


class JsonLines:
    """Appends records to a file; `offset` is what a checkpoint remembers, so that a resumed run continues there."""

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        with write_errors_explained(path):
            self._path = path
            # Unbuffered: a line that finds no space fails where it is written, and not once more when closing.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed by close)
            self.missing = max(0, offset - self._file.tell())
            """Bytes that a checkpoint counted and the file no longer has."""
            self._file.truncate(min(offset, self._file.tell()))
            self._file.seek(0, os.SEEK_END)

    def write(self, record: Record) -> None:
        with write_errors_explained(self._path):
            line = json.dumps(record).encode() + b"\n"
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "No space left on device")

    def offset(self) -> int:
        """Bytes written so far, all of them on the disk."""
        with write_errors_explained(self._path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars under `tensorboard/`: train/..., episode/..., evaluation/..., against environment steps."""

    def __init__(self, folder: Path, *, resumed_at: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        # What an earlier session wrote after the checkpoint it is resumed from is hidden by purge_step.
        with write_errors_explained(folder):
            self._writer = SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)

    def write(self, record: Record) -> None:
        step, kind = record["step"], record["kind"]
        if kind == "train":
            scalars = {f"train/{name}": value for name, value in record["metrics"].items()}
            scalars |= {f"speed/{name}": record[name] for name in ("steps_per_s", "updates_per_s")}
        elif kind == "episode":
            scalars = {"episode/return": record["return"], "episode/length": record["length"]}
        elif kind == "eval":
            scalars = {"evaluation/return": record["mean"], "evaluation/length": _mean(record["lengths"])}
            if record["success"] is not None:
                scalars["evaluation/success"] = _mean(record["success"])
            for name, value in record.get("figures", {}).items():
                scalars[f"evaluation/{name.removeprefix('episode/')}"] = value
        else:
            return
        with write_errors_explained(self._folder):
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
            if kind == "eval":
                self._writer.flush()

    def close(self) -> None:
        with write_errors_explained(self._folder):
            self._writer.close()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
