"""Writing files so that a crash at any moment leaves either the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctrlrl.errors import UsageError


@contextlib.contextmanager
def write_errors_explained(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a message that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UsageError(
                f"no space left to write {path}. Free some space and run the command again (a training goes on with "
                "`ctrlrl resume`): what was complete is intact"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UsageError(f"not permitted to write {path}: {error.strerror}") from error
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def building_site(path: Path) -> Path:
    """Where what is to be at `path` can be made before it is renamed: a new name beside it, which no process has had,
    on another machine or before a crash, and which `remove_leftovers` knows."""
    return path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def put_in_place(building: Path, path: Path) -> None:
    """Give what was made at a `building_site` its name, at which there may be an empty folder."""
    with write_errors_explained(path):
        if path.exists():
            path.rmdir()
        os.rename(building, path)
        fsync_folder(path.resolve().parent)


def fsync_folder(path: Path) -> None:
    """Make renames inside `path` survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk; not atomic, for use inside a folder that is then renamed."""
    with write_errors_explained(path), open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        write_durably(temporary, content)
        with write_errors_explained(path):
            os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, in one step."""
    write_atomically(path, json.dumps(value, indent=2, default=str).encode() + b"\n")


def remove_leftovers(folder: Path) -> None:
    """Delete what writes that were cut off left behind."""
    for path in folder.glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_folder(path: Path) -> None:
    """Delete a folder; cut off at any moment, it is there in full or not at all under its name."""
    doomed = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
