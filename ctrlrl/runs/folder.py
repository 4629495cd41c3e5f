"""The run folder: everything needed to resume, evaluate, report and export."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from ctrlrl.errors import UsageError
from ctrlrl.files import (
    remove_folder,
    remove_leftovers,
    sha256,
    write_atomically,
    write_errors_explained,
    write_json,
)
from ctrlrl.replay.buffer import ReplayBuffer
from ctrlrl.runs.checkpoint import save_checkpoint


class RunFolder:
    """Paths and files of one run.

    ```
    config.json       the resolved configuration
    provenance.json   versions, source, hardware, command, sessions
    status.json       running, finished, interrupted or failed
    metrics.jsonl     every record; tensorboard/ the same for TensorBoard
    checkpoints/      step-000020000 (resumable, the newest few) and best-000010000 (weights)
    replay/           the buffer, in segments written once; checkpoints say how far to read
    base/             a copy of the policy that this one is built on, if any
    videos/           report.html
    ```
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.replay = path / "checkpoints", path / "replay"
        self.videos, self.tensorboard = path / "videos", path / "tensorboard"
        self.metrics, self.base = path / "metrics.jsonl", path / "base"

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """An empty run at `path`.

        Raises:
            UsageError: if something is there already, or it cannot be written.
        """
        require_vacant(path)
        folder = cls(path)
        with write_errors_explained(path):
            for part in (folder.checkpoints, folder.replay, folder.videos):
                part.mkdir(parents=True, exist_ok=True)
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run at `path`.

        Raises:
            UsageError: if there is none.
        """
        if not path.is_dir():
            raise UsageError(f"no such run folder: {path}")
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} is no run folder: it has no config.json")
        return cls(path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process while it trains; the lock goes with the process, however it ends.

        Raises:
            UsageError: if another process holds it.
        """
        if sys.platform == "win32":  # has no flock: two processes on one run are the user's to avoid
            yield
            return
        import fcntl

        with write_errors_explained(self.path / ".lock"):
            file = open(self.path / ".lock", "a+")  # noqa: SIM115  (closed below)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UsageError(
                    f"{self.path} is being trained by process {file.read().strip() or '?'}; wait for it, or stop it"
                ) from None
            except OSError as error:  # some network file systems have no locks
                print(f"ctrlrl: {self.path} cannot be locked ({error.strerror}); train it once only", file=sys.stderr)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def read_json(self, name: str) -> dict[str, Any]:
        """`config`, `provenance` or `status`, as written.

        Raises:
            UsageError: if the file is missing or damaged.
        """
        path = self.path / f"{name}.json"
        try:
            value = json.loads(path.read_text())
        except FileNotFoundError:
            raise UsageError(f"{path} is missing") from None
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"{path} is no valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise UsageError(f"{path} must hold a JSON object; it holds {str(value)[:40]}")
        return value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Replace `config`, `provenance` or `status` in one step."""
        write_json(self.path / f"{name}.json", value)

    def step_checkpoints(self) -> list[Path]:
        """Resumable checkpoints, oldest first."""
        return sorted(p for p in self.checkpoints.glob("step-*") if p.is_dir())

    def find_checkpoint(self, name: str) -> Path:
        """The checkpoint `last`, `best`, or one by its folder's name.

        Raises:
            UsageError: if there is none; lists what there is.
        """
        there = sorted(p for p in self.checkpoints.glob("[bs]*-*") if p.is_dir())
        prefix = {"last": "step-", "best": "best-"}.get(name)
        found = [p for p in there if (p.name.startswith(prefix) if prefix else p.name == name)]
        if not there:
            raise UsageError(f"{self.path} has no checkpoint: nothing was trained yet. Delete it, and train anew")
        if not found:
            names = ", ".join(p.name for p in there)
            raise UsageError(f"{self.path} has no checkpoint {name!r}; there: {names}")
        return found[-1]

    def save_step(self, step: int, state: dict[str, Any], *, keep: int) -> Path:
        """Write a resumable checkpoint and delete all but the newest `keep`.

        A second one of the same step (the episodes start afresh after a failure, say) gets a number behind.
        """
        name = f"step-{step:012d}"
        if same := [p.name for p in self.step_checkpoints() if p.name.startswith(name)]:
            count = int(same[-1].removeprefix(name).lstrip("-") or 1) + 1  # behind the newest: earlier ones may be gone
            name = f"{name}-{count:04d}"
        path = save_checkpoint(self.checkpoints, name, state)
        for old in self.step_checkpoints()[:-keep]:
            remove_folder(old)
        self._drop_segments()
        return path

    def save_best(self, step: int, state: dict[str, Any]) -> Path:
        """Write the weights of the best policy so far.

        Older ones go, save those that a resumable checkpoint counts as its best: a resumed run may need them again.
        """
        path = save_checkpoint(self.checkpoints, f"best-{step:012d}", state)
        self._drop_best(keep={path.name})
        return path

    def forget_after(self, checkpoint: Path, best: str | None) -> None:
        """Delete what was written after `checkpoint`, and what cut-off writes left: a resumed run writes it anew.

        `best` names the best checkpoint up to there.
        """
        step = _step_of(checkpoint)
        for folder in (self.path, self.checkpoints, self.replay, self.videos):
            remove_leftovers(folder)
        for path in self.path.glob("non-finite-*"):
            remove_folder(path)
        for path in self.step_checkpoints():
            if path.name > checkpoint.name:
                remove_folder(path)
        for path in self.checkpoints.glob("best-*"):
            if _step_of(path) >= step and path.name != best:
                remove_folder(path)
        for path in self.videos.iterdir():
            if _step_of(path) > step:
                path.unlink()

    def _drop_best(self, *, keep: set[str]) -> None:
        """Delete the best checkpoints that are neither in `keep` nor the best one of a resumable checkpoint."""
        states = self._states()
        if states is None:
            return
        used = keep | {state["best"]["checkpoint"] for state in states if state["best"]}
        for path in self.checkpoints.glob("best-*"):
            if path.name not in used:
                remove_folder(path)

    def _states(self) -> list[dict[str, Any]] | None:
        """`state.json` of each resumable checkpoint, without its tensors; None if one cannot be read.

        What a damaged checkpoint refers to is not known, so nothing is deleted while there is one.
        """
        try:
            return [json.loads((path / "state.json").read_text()) for path in self.step_checkpoints()]
        except (OSError, ValueError):
            return None

    # Replay segments.

    def append_replay(self, buffer: ReplayBuffer, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Persist the rows added since the last of `segments`; returns the list with the new one."""
        written = segments[-1]["stop"] if segments else 0
        start = max(written, buffer.oldest_row)
        stop = buffer.total_rows
        segments = [s for s in segments if s["stop"] > buffer.oldest_row]
        if start == stop:
            return segments
        path = self.replay / f"rows-{start:012d}-{stop:012d}.safetensors"
        content = to_safetensors({k: v.contiguous() for k, v in buffer.export_rows(start, stop).items()})
        write_atomically(path, content)
        return [*segments, {"file": path.name, "start": start, "stop": stop, "sha256": sha256(path)}]

    def load_replay(self, buffer: ReplayBuffer, segments: list[dict[str, Any]], total_rows: int) -> None:
        """Fill an empty `buffer` with the rows that a checkpoint refers to, after checking every byte.

        Raises:
            UsageError: if a segment is missing or altered.
        """
        for segment in segments:
            path = self.replay / segment["file"]
            if not path.is_file() or sha256(path) != segment["sha256"]:
                state = "altered or truncated" if path.is_file() else "missing"
                raise UsageError(
                    f"replay segment {path} is {state}; restore it from a copy: the run cannot go on without"
                )
            try:
                rows = load_file(path)
            except SafetensorError as error:
                raise UsageError(f"replay segment {path} cannot be read: {error}") from None
            buffer.load_rows(segment["start"], rows, total_rows=total_rows)

    def _drop_segments(self) -> None:
        """Delete segments that no checkpoint refers to any more."""
        states = self._states()
        if states is None:
            return
        used = {segment["file"] for state in states for segment in state.get("replay", {}).get("segments", ())}
        for path in self.replay.glob("rows-*"):
            if path.name not in used:
                path.unlink()


def _step_of(path: Path) -> int:
    """The number in `step-000000020000-0002`, `best-000000020000`, `best-000000020000.mp4`; -1 where there is none."""
    match = re.match(r"[a-z]+-(\d+)", path.name)
    return int(match[1]) if match else -1


def require_vacant(path: Path) -> None:
    """Raise `UsageError` unless a new run can be made at `path`."""
    with write_errors_explained(path):
        taken = path.exists()
    if taken and not path.is_dir():
        raise UsageError(f"{path} is a file; --out must name a folder that is empty or does not exist")
    if taken and any(path.iterdir()):
        what = "already holds a run" if (path / "config.json").exists() else "is not empty"
        remedy = f"go on with it (ctrlrl resume {path}) or " if what == "already holds a run" else ""
        raise UsageError(f"{path} {what}: {remedy}choose another --out; nothing was overwritten")


def require_space(path: Path, needed: int) -> None:
    """Raise `UsageError` if the disk under `path` has less than `needed` bytes free."""
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UsageError(
            f"the run may need {needed / 2**30:.2f} GiB under {path}, and {free / 2**30:.2f} GiB are free. "
            "Free some space, choose another --out, or lower --steps or --buffer.capacity"
        )


def default_path(algo: str, env: str, seed: int) -> Path:
    """`runs/ALGO-ENV-seedN`, with a number behind if that is taken."""
    name = f"{algo}-{re.sub(r'[^A-Za-z0-9._-]+', '-', env)}-seed{seed}"
    path, count = Path("runs") / name, 1
    while path.exists():
        count += 1
        path = Path("runs") / f"{name}-{count}"
    return path
