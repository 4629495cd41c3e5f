"""Checkpoints: tensors as safetensors, everything else as JSON, checksummed, complete or absent.

A checkpoint is a folder `step-000020000` with `tensors.safetensors`, `state.json` and `manifest.json` (sizes and
sha256 of the two). It is written under a temporary name and renamed when it is on the disk. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from ctrlrl.errors import UsageError
from ctrlrl.files import fsync_folder, sha256, write_durably, write_errors_explained

FORMAT = 1
_FILES = ("tensors.safetensors", "state.json")


def pack(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists, numbers and text with tensors or arrays in them into named tensors and pure JSON."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor | np.ndarray):
            array = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value, order="C"))
            while path in tensors:  # {"a": {"b": x}, "a/b": y}: the JSON says which is which
                path += "'"
            tensors[path] = array.clone(memory_format=torch.contiguous_format)  # safetensors refuses shared memory
            return {"$tensor" if isinstance(value, Tensor) else "$array": path}
        if isinstance(value, dict):
            if odd := [key for key in value if not isinstance(key, str)]:
                raise TypeError(f"{path}: keys must be text, got {odd[0]!r}")
            return {key: walk(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item, f"{path}/{i}") for i, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"{path}: a checkpoint holds tensors, arrays, numbers and text, not {type(value).__name__}")

    return tensors, walk(state, "")


def unpack(tensors: dict[str, Tensor], tree: Any) -> Any:
    """The inverse of `pack` (tuples come back as lists)."""
    if isinstance(tree, dict):
        if "$tensor" in tree:
            return tensors[tree["$tensor"]]
        if "$array" in tree:
            return tensors[tree["$array"]].numpy()
        return {key: unpack(tensors, item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [unpack(tensors, item) for item in tree]
    return tree


def save_checkpoint(folder: Path, name: str, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint `name` under `folder`, in one step; returns its path.

    Raises:
        FileExistsError: if there is one of that name: checkpoints are never rewritten.
    """
    tensors, tree = pack(state)
    content = {_FILES[0]: to_safetensors(tensors), _FILES[1]: json.dumps(tree).encode()}
    manifest = {
        "format": FORMAT,
        "files": {
            file: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for file, data in content.items()
        },
    }
    if (folder / name).exists():
        raise FileExistsError(folder / name)
    temporary, final = folder / f".tmp-{os.getpid()}-{name}", folder / name
    try:
        with write_errors_explained(final):
            temporary.mkdir(parents=True)
        for file, data in content.items():
            write_durably(temporary / file, data)
        write_durably(temporary / "manifest.json", json.dumps(manifest, indent=2).encode())
        fsync_folder(temporary)
        os.rename(temporary, final)
        fsync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint back, after checking that every byte is as it was written.

    Raises:
        UsageError: if a file is missing, truncated or altered; names it and says how to go on.
    """

    def damaged(what: str) -> UsageError:
        others = sorted(p.name for p in path.parent.glob("step-*") if p != path)
        remedy = (
            f"Go on from another one: --checkpoint {others[-1]}"
            if others
            else "There is no other checkpoint in this run; restore it from a copy"
        )
        return UsageError(f"checkpoint {path} is damaged: {what}. {remedy}")

    try:
        manifest = json.loads((path / "manifest.json").read_text())
        expected = {file: manifest["files"][file] for file in _FILES}
        version = manifest["format"]
    except FileNotFoundError:
        raise damaged("manifest.json is missing") from None
    except (ValueError, KeyError, TypeError):
        raise damaged("manifest.json is not as it was written") from None
    if version != FORMAT:
        raise UsageError(f"checkpoint {path} has format {version}; this version of ctrlrl reads format {FORMAT}")
    for file, figures in expected.items():
        if not (path / file).is_file():
            raise damaged(f"{file} is missing")
        size = (path / file).stat().st_size
        if size != figures["bytes"]:
            raise damaged(f"{file} has {size} bytes instead of {figures['bytes']}")
        if sha256(path / file) != figures["sha256"]:
            raise damaged(f"{file} was altered (its sha256 is another)")
    try:
        state: dict[str, Any] = unpack(load_file(path / _FILES[0]), json.loads((path / _FILES[1]).read_text()))
    except (SafetensorError, ValueError, KeyError) as error:
        raise damaged(f"its content cannot be read ({error})") from None
    return state
