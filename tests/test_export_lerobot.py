"""Exporting to LeRobot: imported again it is the same dataset, and others can read what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.data.export_lerobot import export
from ctrlrl.data.importers import import_dataset
from ctrlrl.data.importers.base import ImportOptions
from ctrlrl.data.importers.lerobot_meta import OURS
from ctrlrl.data.store import Column, Dataset, DatasetWriter, Episode
from ctrlrl.errors import UsageError
from ctrlrl.mirror import ReflectedBox, Reflection
from tests import dataset_files as files

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

OBSERVATION = gym.spaces.Dict(
    {
        "images.front": gym.spaces.Box(0, 255, (9, 7, 3), np.uint8),
        "stack": gym.spaces.Box(0, 255, (4, 4, 2), np.uint8),
        "state": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
        "grid": gym.spaces.Box(-1, 1, (2, 2), np.float32),
        "said": gym.spaces.Text(30),
        "x": gym.spaces.Box(-1, 1, (1,), np.float32),
    }
)
COLUMNS = {
    "success": Column(dtype="bool"),
    "behaviour_log_prob": Column(dtype="float32"),
    "qpos": Column(dtype="float64", shape=(2,), per="observation"),
    "points": Column(dtype="float32", shape=(2,), ragged=True),
    "note": Column(dtype="text"),
    "next.x": Column(dtype="int16", shape=(1,)),
    "index": Column(dtype="int64"),
}


def episode(seed: int, steps: int, *, terminated: bool) -> Episode:
    random, rows = np.random.default_rng(seed), steps + 1
    return Episode(
        observation={
            "images.front": random.integers(0, 256, (rows, 9, 7, 3), np.uint8),
            "stack": random.integers(0, 256, (rows, 4, 4, 2), np.uint8),
            "state": random.normal(size=(rows, 3)),
            "grid": random.random((rows, 2, 2)).astype(np.float32),
            "said": [f"hé {i}" for i in range(rows)],
            "x": random.random((rows, 1)).astype(np.float32),
        },
        action=random.normal(size=(steps, 2)).astype(np.float32),
        reward=random.normal(size=steps).astype(np.float32),
        terminated=terminated,
        truncated=not terminated or seed == 3,
        columns={
            "success": np.arange(steps) == 2,
            "behaviour_log_prob": random.normal(size=steps).astype(np.float32),
            "qpos": random.normal(size=(rows, 2)),
            "points": [random.random((i % 3, 2)).astype(np.float32) for i in range(steps)],
            "note": ["", "a", "b", "c", "d", "e", "f"][:steps],
            "next.x": np.arange(steps, dtype=np.int16)[:, None],
            "index": np.arange(steps),
        },
        info={"seed": seed, "task": "push" if seed % 2 else "lift", "deep": {"a": [1, None]}},
    )


def written(folder: Path, episodes: list[Episode], **given_: Any) -> Dataset:
    spaces = {"observation_space": OBSERVATION, "action_space": gym.spaces.Box(-2, 3, (2,)), "columns": COLUMNS}
    known = {"env": "Foo-v0", "control_dt": 0.02, "reference": {"random": 1.0, "expert": 3.0}, "provenance": {"a": 1}}
    with DatasetWriter.create(folder / "dataset", **{**spaces, **known, **given_}) as writer:
        for one in episodes:
            writer.add(one)
    return Dataset.open(folder / "dataset")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other) and one.dtype == other.dtype
    return bool(one == other)


def check_round_trip(data: Dataset, folder: Path) -> Path:
    export(data, folder / "exported", robot_type="so101")
    back, notes = import_dataset(folder / "exported", folder / "back", "lerobot")
    back.verify()
    assert not notes
    for name in ("observation_space", "action_space", "env", "control_dt", "reference", "columns", "num_episodes"):
        assert getattr(back, name) == getattr(data, name), name
    for i in range(data.num_episodes):
        mine, theirs = data.episode(i), back.episode(i)
        for name in ("observation", "action", "reward", "terminated", "truncated", "columns", "info"):
            assert same(getattr(mine, name), getattr(theirs, name)), name
    assert back.provenance["before"] == data.provenance and back.provenance["robot_type"] == "so101"
    return folder / "exported"


@given(st.lists(st.tuples(st.integers(1, 7), st.booleans()), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None)
def test_round_trip(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("lerobot")
    episodes = [episode(seed, steps, terminated=ends) for seed, (steps, ends) in enumerate(parts)]
    check_round_trip(written(folder, episodes), folder)


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Discrete(5, start=2),
        gym.spaces.MultiDiscrete([3, 4]),
        gym.spaces.Box(-1, 1, (1,), np.float64),
        gym.spaces.Box(0, 9, (2, 2), np.int32),
        ReflectedBox(-1, 1, (2,), np.float32, Reflection.signs(1, -1)),
    ],
    ids=str,
)
def test_round_trip_of_action_spaces(space, tmp_path):
    box = gym.spaces.Box(-10, 10, (3,))
    episodes = [
        Episode(
            observation=one.observation,
            action=np.array([space.sample() for _ in one.reward], space.dtype),
            reward=one.reward,
            terminated=one.terminated,
            truncated=one.truncated,
        )
        for one in files.EPISODES
    ]
    data = written(
        tmp_path, episodes, observation_space=box, action_space=space, columns={}, env=None, control_dt=1 / 3
    )
    check_round_trip(data, tmp_path)


def test_a_single_image_and_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("ctrlrl.data.export_lerobot.LARGEST_FILE", 300)
    monkeypatch.setattr("ctrlrl.data.export_lerobot.FILES_A_CHUNK", 2)
    random, box = np.random.default_rng(0), gym.spaces.Box(0, 255, (5, 6, 3), np.uint8)
    episodes = [
        Episode(
            observation=random.integers(0, 256, (4, 5, 6, 3), np.uint8),
            action=np.zeros((3, 2), np.float32),
            reward=np.zeros(3, np.float32),
            terminated=True,
            truncated=False,
        )
        for _ in range(5)
    ]
    path = check_round_trip(written(tmp_path, episodes, observation_space=box, columns={}), tmp_path)
    assert sorted(str(file.relative_to(path)) for file in path.glob("data/*/*")) == [
        f"data/chunk-00{i // 2}/file-00{i % 2}.parquet" for i in range(5)
    ]
    assert "observation.image" in json.loads((path / "meta/info.json").read_text())["features"]


def test_what_others_read(tmp_path):
    """The rows as a LeRobotDataset has them; the final observation is one more."""
    data = written(tmp_path, [episode(1, 3, terminated=True), episode(2, 2, terminated=False)])
    export(data, tmp_path / "out")
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 50 and isinstance(info["fps"], int)
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (2, 7, 2)
    assert info["features"]["observation.images.front"] == {
        "dtype": "image",
        "shape": [9, 7, 3],
        "names": ["height", "width", "channels"],
    }
    rows = pq.read_table(tmp_path / "out/data/chunk-000/file-000.parquet").to_pydict()
    assert rows["episode_index"] == [0, 0, 0, 0, 1, 1, 1] and rows["frame_index"] == [0, 1, 2, 3, 0, 1, 2]
    assert rows["index"] == list(range(7)) and np.allclose(rows["timestamp"], np.array(rows["frame_index"]) * 0.02)
    assert rows["next.done"] == [False, False, True, True, False, True, True]
    assert rows["next.terminated"] == [False, False, True, True, False, False, False]
    assert rows["next.truncated"] == [False, False, False, False, False, True, True]
    assert rows["ctrlrl.final"] == [False, False, False, True, False, False, True]
    assert rows["action"][3] == rows["action"][2] and rows["next.reward"][3] == 0
    assert rows["next.success"][:3] == [False, False, True] and rows["column.index"][:3] == [0, 1, 2]
    assert json.loads(rows["points"][1]) == data.episode(0).columns["points"][1].tolist()
    assert set(rows) | {"task"} == set(info["features"]) | {"task"}
    tasks = pq.read_table(tmp_path / "out/meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0, 1], "__index_level_0__": ["push", "lift"]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]
    meta = pq.read_table(tmp_path / "out/meta/episodes/chunk-000/file-000.parquet").to_pydict()
    assert meta["length"] == [4, 3] and meta["dataset_to_index"] == [4, 7] and meta["tasks"] == [["push"], ["lift"]]
    stats = json.loads((tmp_path / "out/meta/stats.json").read_text())
    actions = np.array(rows["action"])
    for name, value in (("mean", actions.mean(0)), ("std", actions.std(0)), ("max", actions.max(0))):
        assert np.allclose(stats["action"][name], value)
    images = np.concatenate([data.episode(i).observation["images.front"] for i in range(2)]) / 255
    found = stats["observation.images.front"]
    assert np.allclose(np.ravel(found["std"]), images.std((0, 1, 2))) and np.shape(found["mean"]) == (3, 1, 1)
    assert found["count"] == stats["action"]["count"] == [7]


def test_without_our_file_it_is_a_dataset_as_any(tmp_path):
    data = written(tmp_path, [episode(1, 3, terminated=True), episode(2, 2, terminated=False)])
    export(data, tmp_path / "out")
    (tmp_path / "out" / OURS).unlink()
    back, _ = import_dataset(tmp_path / "out", tmp_path / "back", None, ImportOptions(columns=("success",)))
    assert back.lengths.tolist() == [3, 2] and back.terminated.tolist() == [True, False]
    for i in range(2):
        mine, theirs = data.episode(i), back.episode(i)
        assert same(theirs.observation, mine.observation) and same(theirs.action, mine.action)
        assert same(theirs.columns["success"], mine.columns["success"])
        assert theirs.info == {"task": mine.info["task"]}


def test_frames_per_second(tmp_path):
    data = written(tmp_path, files.EPISODES, observation_space=gym.spaces.Box(-9, 9, (3,)), columns={}, control_dt=None)
    with pytest.raises(UsageError, match="say --fps"):
        export(data, tmp_path / "a")
    with pytest.raises(UsageError, match="positive number"):
        export(data, tmp_path / "a", fps=0)
    export(data, tmp_path / "a", fps=12.5)
    back, _ = import_dataset(tmp_path / "a", tmp_path / "back")
    assert back.control_dt == 0.08
    assert not files.differences(back, files.EPISODES)


def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
    data = written(tmp_path, [episode(1, 3, terminated=True)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="is not empty"):
        export(data, tmp_path / "full")

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    with pytest.raises(UsageError, match="no space left"):
        export(data, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dataset", "full"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=2), "is of format '2'"),
        (lambda v: v.pop("observation_space"), "KeyError: 'observation_space'"),
        (lambda v: v["observation"].update(state="nothing"), "there is no feature 'nothing'"),
        (lambda v: v["observation"].pop("state"), "its observation space has other entries"),
        (lambda v: v["observation_space"]["entries"]["state"].update(shape=[10**12]), "is not as its space"),
        (lambda v: v["observation_space"]["entries"]["state"].update(dtype="float32"), "is not as its space"),
        (lambda v: v["observation_space"]["entries"]["state"].update(low="x"), "ValueError"),
        (lambda v: v.update(action_space={"type": "Discrete", "n": 3, "start": 0}), "action is not as its space"),
        (lambda v: v["columns"]["qpos"].update(shape=[3]), "the column qpos is not of its feature's shape"),
        (lambda v: v["columns"]["qpos"].update(per="day"), "the column qpos is not of its feature's shape"),
        (lambda v: v.update(control_dt=-1), "control_dt or a reference return is no number"),
        (lambda v: v.update(reference={"random": float("nan")}), "control_dt or a reference return is no number"),
        (lambda v: v.update(columns=[1]), "is not as ctrlrl wrote it"),
    ],
    ids=range(13),
)
def test_our_file_altered(change, message, tmp_path):
    export(written(tmp_path, [episode(1, 3, terminated=True)]), tmp_path / "out")
    files.edit_json(tmp_path / "out" / OURS, change)
    with pytest.raises(UsageError) as error:
        import_dataset(tmp_path / "out", tmp_path / "back")
    assert message in str(error.value) and str(tmp_path / "out" / OURS) in str(error.value)


def test_final_rows_must_be_at_the_ends(tmp_path):
    export(written(tmp_path, [episode(1, 3, terminated=True)]), tmp_path / "out")
    rows = tmp_path / "out/data/chunk-000/file-000.parquet"
    files.edit_parquet(rows, lambda columns: columns.update({"ctrlrl.final": pa.array([False] * 4)}))
    with pytest.raises(UsageError, match=r"ctrlrl\.final must be true in its last row"):
        import_dataset(tmp_path / "out", tmp_path / "back")
