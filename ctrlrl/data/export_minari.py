"""A dataset in Minari's layout, so that `minari.load_dataset` reads it.

Observations, actions, rewards and flags go over as they are; the columns of a dataset become infos, with T + 1 rows or
T, as they have here (Minari's own infos have T + 1). Images are stored as they are, not as JPEG. Entries of varying
length, beside texts, have no place in Minari: such columns are left out.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.importers.base import need
from ctrlrl.data.store import Dataset, Episode
from ctrlrl.errors import UsageError
from ctrlrl.files import building_site, fsync_folder, write_durably, write_errors_explained

MINARI = "0.5.4"
"""The version whose layout this is; that one and later read it."""
_ID = re.compile(r"((?P<namespace>(?=[-\w/]{2,}/)[-\w]+(/[-\w]+)*)/)?[-\w]+-v\d+")


def export(dataset: Dataset, out: Path, dataset_id: str) -> None:
    """Write the dataset as `dataset_id` below `out`, the folder that MINARI_DATASETS_PATH names.

    Args:
        dataset_id: (NAMESPACE/)NAME-vN, such as pendulum/expert-v0.

    Raises:
        UsageError: the ID is none, there is such a dataset already, or Minari has no place for an entry of it.
    """
    h5py = need("h5py")
    match = _ID.fullmatch(dataset_id)
    if not match:
        raise UsageError(f"{dataset_id!r} is no Minari ID; expected (NAMESPACE/)NAME-vN, such as pendulum/expert-v0")
    home = out / dataset_id
    if home.exists():
        raise UsageError(f"{home} exists already: choose another version or folder; nothing was overwritten")
    _check(dataset)
    # Minari takes every folder without a leading dot for a namespace or a dataset.
    building = building_site(home)
    with write_errors_explained(home):
        (building / "data").mkdir(parents=True)
    try:
        data = building / "data"
        with write_errors_explained(home), h5py.File(data / "main_data.hdf5", "w", track_order=True) as file:
            for number in range(dataset.num_episodes):
                _write(file.create_group(f"episode_{number}"), dataset.episode(number), number, h5py)
        written = (data / "main_data.hdf5").stat().st_size
        write_durably(data / "metadata.json", json.dumps(_metadata(dataset, dataset_id, written)).encode())
        namespace = match["namespace"]
        while namespace:
            described = out / namespace / "namespace_metadata.json"
            if not described.exists():
                write_durably(described, b"{}")
            namespace = namespace.rpartition("/")[0]
        with write_errors_explained(home):
            os.rename(building, home)
            fsync_folder(home.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _check(dataset: Dataset) -> None:
    space = dataset.observation_space
    names = list(space.spaces) if isinstance(space, gym.spaces.Dict) else []
    bad = [name for name in names if name in ("", ".", "..") or "/" in name]
    if bad:
        raise UsageError(f"{dataset.path}: Minari has no place for an observation entry called {bad[0]!r}")
    if not dataset.num_episodes:
        raise UsageError(f"{dataset.path} holds no episode: there is nothing to export")


def _write(group: Any, episode: Episode, number: int, h5py: Any) -> None:
    group.attrs["id"] = number
    group.attrs["total_steps"] = len(episode.reward)
    seed = episode.info.get("seed")
    if isinstance(seed, int) and not isinstance(seed, bool) and abs(seed) < 2**63:
        group.attrs["seed"] = seed

    def put(parent: Any, name: str, rows: Any) -> None:
        text = isinstance(rows, list)
        parent.create_dataset(name, data=rows, dtype=h5py.string_dtype("utf-8") if text else None)

    observation = episode.observation
    if isinstance(observation, dict):
        entries = group.create_group("observations")
        for name, rows in observation.items():
            put(entries, name, rows)
    else:
        put(group, "observations", observation)
    put(group, "actions", episode.action)
    put(group, "rewards", episode.reward)
    for name, last in (("terminations", episode.terminated), ("truncations", episode.truncated)):
        ends = np.zeros(len(episode.reward), bool)
        ends[-1] = last
        put(group, name, ends)
    kept = {name: rows for name, rows in episode.columns.items() if not _is_ragged(rows)}
    if kept:
        infos = group.create_group("infos")
        for name, rows in kept.items():
            put(infos, name, rows)


def _is_ragged(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and not isinstance(rows[0], str)


def _metadata(dataset: Dataset, dataset_id: str, written: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "total_episodes": dataset.num_episodes,
        "total_steps": dataset.num_transitions,
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": json.dumps(_space(dataset.observation_space)),
        "action_space": json.dumps(_space(dataset.action_space)),
        "dataset_id": dataset_id,
        "minari_version": MINARI,
        "dataset_size": round(written / 1e6, 1),
    }
    left_out = [name for name, column in dataset.columns.items() if column.ragged]
    if left_out:
        metadata["description"] = f"Columns of varying length were left out: {', '.join(left_out)}"
    if {"random", "expert"} <= dataset.reference.keys():
        metadata["ref_min_score"] = dataset.reference["random"]
        metadata["ref_max_score"] = dataset.reference["expert"]
    for key in (
        "env_spec",
        "eval_env_spec",
        "algorithm_name",
        "author",
        "author_email",
        "code_permalink",
        "requirements",
    ):
        if dataset.provenance.get("format") == "minari" and key in dataset.provenance:
            metadata[key] = dataset.provenance[key]
    if "env_spec" not in metadata and (specification := _env_spec(dataset.env)):
        metadata["env_spec"] = specification
    return metadata


def _env_spec(env: str | None) -> str | None:
    """The registered environment's specification as JSON, without importing anything; None where there is none."""
    spec = gym.registry.get(env or "")
    if spec is None:
        return None
    try:
        return spec.to_json()
    except (TypeError, ValueError):  # made by a function that JSON cannot name
        return None


def _space(space: gym.Space[Any]) -> dict[str, Any]:
    """The space as Minari writes it."""
    match space:
        case gym.spaces.Box():
            bounds = {"low": space.low.tolist(), "high": space.high.tolist()}
            return {"type": "Box", "dtype": str(space.dtype), "shape": list(space.shape)} | bounds
        case gym.spaces.Discrete():
            return {"type": "Discrete", "dtype": "int64", "start": int(space.start), "n": int(space.n)}
        case gym.spaces.MultiDiscrete():
            counts = {"nvec": space.nvec.tolist(), "start": space.start.tolist()}
            return {"type": "MultiDiscrete", "dtype": str(space.dtype)} | counts
        case gym.spaces.Text():
            return {
                "type": "Text",
                "max_length": space.max_length,
                "min_length": space.min_length,
                "charset": space.characters,
            }
        case gym.spaces.Dict():
            return {"type": "Dict", "subspaces": {name: _space(entry) for name, entry in space.spaces.items()}}
        case _:
            raise UsageError(f"Minari has no place for a space like {space}")
