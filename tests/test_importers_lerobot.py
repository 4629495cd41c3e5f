"""Importing LeRobotDatasets: those that `lerobot` itself wrote, small ones made here, and broken or hostile ones.

tests/data/lerobot_v3 was written by lerobot 0.4.4, tests/data/lerobot_v21 by lerobot 0.3.3: three episodes of 6, 4 and
5 frames at 10 fps, with a vector, a video (AV1), images, rewards, `next.done` and `next.success` (in the first and the
last episode). The video is of two greys that change by 20 from one frame to the next.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.data.importers import detect, frames, import_dataset
from ctrlrl.data.importers.base import ImportOptions
from ctrlrl.errors import UsageError
from tests import dataset_files as files
from tests.dataset_files import EPISODES, edit_json, edit_parquet, recorded

pa = pytest.importorskip("pyarrow")

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["lerobot_v3", "lerobot_v21"])
def test_what_lerobot_wrote(name, tmp_path):
    assert detect(DATA / name).name == "lerobot"
    data, notes = import_dataset(DATA / name, tmp_path / "out")
    data.verify()
    assert data.lengths.tolist() == [6, 3, 5] and data.control_dt == 0.1
    assert data.terminated.tolist() == [True, False, True] and data.truncated.tolist() == [False, True, False]
    assert [info["task"] for info in data.infos] == ["push the block", "lift the block", "push the block"]
    assert data.provenance["robot_type"] == "toy" and data.provenance["names"]["action"] == ["left", "right"]
    assert "of 1 episodes that were cut off, the last action" in notes[-1]
    images = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
    assert data.observation_space.spaces.keys() == {"images.front", "images.wrist", "state"}
    assert data.observation_space["images.front"] == images
    for number, length in enumerate([6, 4, 5]):
        episode: Any = data.episode(number)
        rows = [*range(length), *([length - 1] if episode.terminated else [])]
        assert episode.observation["state"].tolist() == [[number, t, 0.5 * t] for t in rows]
        assert np.allclose(episode.action, [[t / 10, -number] for t in range(len(episode.reward))])
        assert episode.reward.tolist() == [t + 0.25 for t in range(len(episode.reward))]
        assert episode.columns["success"].tolist() == [
            episode.terminated and t == length - 1 for t in range(len(episode.reward))
        ]
        for t, row in enumerate(rows):
            front, wrist = episode.observation["images.front"][t], episode.observation["images.wrist"][t]
            grey = 20 + 20 * row + 60 * number
            assert abs(front[:, :14].astype(int) - (255 - grey)).max() < 8  # AV1 loses a little
            assert abs(front[:, 18:].astype(int) - grey).max() < 8
            expected = np.zeros((8, 8, 3), np.uint8)
            expected[row % 8, number], expected[..., 2] = 255, 10 * row
            assert np.array_equal(wrist, expected)


@pytest.mark.parametrize("version", ["v3.0", "v2.1", "v2.0"])
@given(
    st.lists(st.tuples(st.integers(1, 7), st.sampled_from(["terminated", "truncated"])), min_size=1, max_size=5).filter(
        lambda parts: any(ends == "terminated" or steps > 1 for steps, ends in parts)
    )
)
@settings(max_examples=15, deadline=None)
def test_every_transition(version, tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("lerobot")
    file = files.lerobot(folder, version, recorded(*parts))
    data, _ = import_dataset(file.path, folder / "out")
    data.verify()
    assert not files.differences(data, file.episodes)
    assert data.observation_space == gym.spaces.Box(-np.inf, np.inf, (3,))


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_videos_are_found_by_their_times(version, tmp_path):
    file = files.lerobot(tmp_path, version, video=True)
    data, _ = import_dataset(file.path, tmp_path / "out")
    assert not files.differences(data, file.episodes, entry="state")
    first = 0
    for number, (recorded_, given_) in enumerate(zip(EPISODES, file.episodes, strict=True)):
        seen: Any = data.episode(number).observation["images.front"]
        rows = np.minimum(np.arange(len(given_.reward) + 1), len(recorded_.reward) - 1)
        expected = files.pictures(len(recorded_.reward), first)[rows]
        assert seen.shape == expected.shape and abs(seen.astype(int) - expected).max() < 8
        first += len(recorded_.reward)


def test_videos_in_any_order(tmp_path):
    files.write_video(tmp_path / "x.mp4", files.pictures(25))
    video = frames.Video(tmp_path / "x.mp4", (32, 32, 3))
    for start in (20, 0, 3, 22, 1):
        times = (start + np.arange(3)) / files.FPS
        found = video.frames(times, 0.02)
        assert abs(found.astype(int) - files.pictures(3, start)).max() < 8
    video.close()


def test_blocks_smaller_than_episodes(tmp_path, monkeypatch):
    monkeypatch.setattr("ctrlrl.data.importers.lerobot.BLOCK", 300)
    file = files.lerobot(tmp_path)
    assert not files.differences(import_dataset(file.path, tmp_path / "out")[0], file.episodes)


def test_rewards_come_from_success_or_are_0(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    file = files.lerobot(tmp_path / "a", **{"next.reward": None})
    data, notes = import_dataset(file.path, tmp_path / "a" / "out")
    assert data.returns.tolist() == [1, 0, 1] and any("next.success was taken as the reward" in n for n in notes)
    file = files.lerobot(tmp_path / "b", **{"next.reward": None, "next.success": None, "next.done": None})
    data, notes = import_dataset(file.path, tmp_path / "b" / "out")
    assert not data.returns.any() and not data.terminated.any() and any("0 was taken as the reward" in n for n in notes)
    assert data.lengths.tolist() == [3, 5, 2] and not data.columns


def test_done_without_success_needs_the_time_limit(tmp_path):
    file = files.lerobot(tmp_path, **{"next.success": None})
    data, notes = import_dataset(file.path, tmp_path / "out")
    assert not data.terminated.any() and any("3 of these rewards were not 0" in note for note in notes)
    assert any("--max-episode-steps" in note for note in notes)
    data, _ = import_dataset(file.path, tmp_path / "told", None, ImportOptions(max_episode_steps=6))
    assert not files.differences(data, file.episodes)


def test_done_within_an_episode_cuts_it(tmp_path):
    episodes = recorded((6, "truncated"))
    done = np.array([False, False, True, False, False, True])
    success = np.array([False, False, True, False, False, False])
    file = files.lerobot(tmp_path, episodes=episodes, **{"next.done": done, "next.success": success})
    data, notes = import_dataset(file.path, tmp_path / "out")
    seen: Any = episodes[0].observation
    assert data.lengths.tolist() == [3, 2] and data.terminated.tolist() == [True, False]
    assert np.array_equal(data.episode(0).observation, seen[[0, 1, 2, 2]])
    assert np.array_equal(data.episode(1).observation, seen[3:6])
    assert any("they were cut there" in note for note in notes)


def test_more_features(tmp_path):
    rows = files.flat(EPISODES)
    said = pa.array([f"say {t}" for t in range(13)])
    file = files.lerobot(
        tmp_path,
        action=np.arange(13) % 3,
        **{"observation.force": rows["actions"].astype(np.float64), "phase": np.arange(13, dtype=np.int16)},
    )
    part = file.path / "data/chunk-000/file-000.parquet"
    matrix = pa.array(rows["observations"][:, None].repeat(2, 1).tolist(), pa.list_(pa.list_(pa.float32())))
    edit_parquet(part, lambda columns: columns.update({"said": said, "observation.matrix": matrix}))
    more = {
        "said": {"dtype": "string", "shape": [1], "names": None},
        "observation.matrix": {"dtype": "float32", "shape": [2, 3], "names": None},
    }
    edit_json(file.path / "meta/info.json", lambda info: info["features"].update(more))
    data, notes = import_dataset(file.path, tmp_path / "out")
    assert data.action_space == gym.spaces.Discrete(3)
    assert {name: space.shape for name, space in data.observation_space.spaces.items()} == {
        "state": (3,),
        "force": (2,),
        "matrix": (2, 3),
    }
    assert data.observation_space["force"].dtype == np.float64
    assert data.columns.keys() == {"success", "phase"} and any("texts were left out: said" in note for note in notes)
    data, _ = import_dataset(file.path, tmp_path / "named", None, ImportOptions(columns=("said",)))
    assert data.columns.keys() == {"said"} and data.episode(0).columns["said"] == [f"say {t}" for t in range(4)]


def test_tasks_that_change_within_an_episode(tmp_path):
    file = files.lerobot(tmp_path, task_index=np.array([0, 0, 1, 1, *[0] * 9]))
    data, _ = import_dataset(file.path, tmp_path / "out")
    assert data.infos == [{"task": "push", "tasks": ["push", "lift"]}, {"task": "push"}, {"task": "push"}]


# --- broken and hostile -----------------------------------------------------------------------------------------------


INFO, ROWS = "meta/info.json", "data/chunk-000/file-000.parquet"
META = "meta/episodes/chunk-000/file-000.parquet"


def info(change: Any) -> Any:
    return lambda path: edit_json(path / INFO, change)


def feature(name: str, **changed: Any) -> Any:
    return info(lambda value: value["features"].setdefault(name, {}).update(changed))


def told(**changed: Any) -> Any:
    return info(lambda value: value.update(changed))


def rows(name: str, change: Any) -> Any:
    """Change a column of the rows, given as a list."""

    def changed(columns: dict[str, Any]) -> None:
        values = columns[name].to_pylist()
        other = change(values)
        columns[name] = pa.array(values if other is None else other)

    return lambda path: edit_parquet(path / ROWS, changed)


def meta(name: str, values: Any) -> Any:
    return lambda path: edit_parquet(path / META, lambda columns: columns.update({name: pa.array(values)}))


def content(name: str, change: Any) -> Any:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def gone(name: str) -> Any:
    return lambda path: (path / name).unlink()


def put(row: int, value: Any) -> Any:
    return lambda values: values.__setitem__(row, value)


def linked(path: Path) -> None:
    shutil.move(path / ROWS, path.parent / "elsewhere")
    (path / ROWS).symlink_to(path.parent / "elsewhere")


def repeated(path: Path) -> None:
    edit_parquet(path / ROWS, lambda columns: columns.update({n: pa.concat_arrays([c, c]) for n, c in columns.items()}))


VIDEO = "videos/observation.images.front/chunk-000/file-000.mp4"
CASES: dict[str, tuple[Any, str]] = {
    "no info": (gone(INFO), "has no meta/info.json"),
    "info is cut off": (content(INFO, lambda raw: raw[:100]), "is no valid JSON"),
    "info is a list": (content(INFO, lambda raw: b"[1]"), "must be a JSON object"),
    "info is nested": (content(INFO, lambda raw: b'{"a":' * 5000), "nested too deeply"),
    "another version": (told(codebase_version="v1.6"), "of version 'v1.6'; ctrlrl reads v3.0, v2.1, v2.0"),
    "no version": (told(codebase_version=None), "of version 'None'"),
    "fps 0": (told(fps=0), "fps in meta/info.json is '0'"),
    "fps is text": (told(fps="10"), "expected a number"),
    "fps NaN": (told(fps=float("nan")), "expected a number"),
    "another fps": (told(fps=30), "frame 1 comes 0.1000 s after the one before it; at 30 frames per second"),
    "no features": (told(features=[]), "has no features"),
    "no action": (info(lambda v: v["features"].pop("action")), "has no feature 'action'"),
    "no observation": (info(lambda v: v["features"].pop("observation.state")), "has no observations"),
    "a feature leads out": (feature("../x", dtype="float32", shape=[1]), "cannot be called that"),
    "a shape of none": (feature("action", shape=None), "expected a list of numbers above 0"),
    "a negative shape": (feature("action", shape=[-1]), "expected a list of numbers above 0"),
    "a huge shape": (feature("observation.state", shape=[10**12]), "too large to be a row"),
    "another shape": (feature("observation.state", shape=[4]), "has entries of (3,); meta/info.json declares (4,)"),
    "objects": (feature("action", dtype="object"), "expected numbers, string, image or video"),
    "a structure": (feature("action", dtype="f4,f4"), "expected numbers, string, image or video"),
    "another kind": (feature("observation.state", dtype="int64"), "is of float32; meta/info.json declares int64"),
    "texts are numbers": (feature("observation.state", dtype="string"), "the only observation is a text"),
    "a feature more": (feature("force", dtype="float32", shape=[1]), "has no column 'force'"),
    "episodes 4": (told(total_episodes=4), "counts 4 episodes, and 3 are described"),
    "episodes -1": (told(total_episodes=-1), "total_episodes in meta/info.json is '-1'"),
    "frames 12": (told(total_frames=12), "counts 12 frames, and the lengths of its episodes add up to 13"),
    "a huge count": (told(total_frames=10**18), "expected a number"),
    "an absolute path": (told(data_path="/etc/passwd"), "'/etc/passwd' in its metadata leads out of the folder"),
    "a path up": (told(data_path="data/../../x"), "leads out of the folder"),
    "a path by a template": (told(data_path="{chunk_index}/../../x"), "leads out of the folder"),
    "an attribute": (told(data_path="{chunk_index.__class__}"), "is no template of a path"),
    "a wide field": (told(data_path="{chunk_index:0999999999d}"), "is no template of a path"),
    "an unknown field": (told(data_path="{episode_chunk:03d}/x"), "has a field 'episode_chunk'"),
    "a NUL": (told(data_path="data/\0"), "leads out of the folder"),
    "no template": (told(data_path=None), "is no template of a path"),
    "a link out": (linked, "is a link out of"),
    "no rows": (gone(ROWS), "there is no such file"),
    "rows are cut off": (content(ROWS, lambda raw: raw[: len(raw) // 2]), "cannot be read"),
    "rows are empty": (content(ROWS, lambda raw: b""), "cannot be read"),
    "never finalized": (content(ROWS, lambda raw: raw[:-8] + b"\0" * 8), "cannot be read"),
    "rows twice": (repeated, "has 26 rows, and the episodes in it are 13 frames long"),
    "NaN reward": (rows("next.reward", put(5, float("nan"))), "next.reward is NaN or infinite in row 1"),
    "NaN action": (rows("action", put(5, [0.0, float("inf")])), "the action is NaN or infinite in row 5"),
    "NaN observation": (rows("observation.state", put(0, [float("nan")] * 3)), "state is NaN or infinite in row 0"),
    "a null": (rows("next.reward", put(2, None)), "has no value in row 2"),
    "a shorter row": (rows("observation.state", put(2, [1.0])), "every row must have equally many"),
    "another episode": (rows("episode_index", put(5, 7)), "episode 1: row 1 of it"),
    "swapped frames": (rows("frame_index", lambda v: [1, 0, *v[2:]]), "is called frame 1"),
    "a late frame": (rows("timestamp", put(6, 0.25)), "episode 1: frame 2 comes 0.1500 s"),
    "a NaN time": (rows("timestamp", put(6, float("nan"))), "a timestamp is NaN"),
    "an unknown task": (rows("task_index", put(3, 9)), "has task 9"),
    "a flag of 2": (rows("next.done", lambda v: [2 * bool(x) for x in v]), "meta/info.json declares bool"),
    "no metadata": (gone(META), "the dataset was not written to its end"),
    "metadata is cut off": (content(META, lambda raw: raw[:-20]), "cannot be read"),
    "no tasks": (gone("meta/tasks.parquet"), "has no meta/tasks.parquet"),
    "a length of 0": (meta("length", [0, 10, 3]), "has 0 frames from 0 on"),
    "a negative length": (meta("length", [-4, 10, 3]), "length is '-4'"),
    "other lengths": (meta("length", [5, 5, 3]), "has 5 frames from 4 on; expected number 1"),
    "other lengths that agree": (
        lambda path: (meta("length", [5, 5, 3])(path), meta("dataset_from_index", [0, 5, 10])(path)),
        "episode 0: row 4 of it",
    ),
    "a huge length": (meta("length", [2**62, 6, 3]), "length is '4611686018427387904'"),
    "episodes swapped": (meta("episode_index", [1, 0, 2]), "is number 1"),
    "another file": (meta("data/file_index", [0, 1, 0]), "goes on in"),
    "no lengths": (
        lambda path: edit_parquet(path / META, lambda columns: columns.pop("length")),
        "has no column 'length'",
    ),
    "tasks are numbers": (meta("tasks", [1, 2, 3]), "expected texts"),
}
VIDEO_CASES: dict[str, tuple[Any, str]] = {
    "no video": (gone(VIDEO), "there is no video"),
    "video is cut off": (content(VIDEO, lambda raw: raw[: len(raw) // 2]), "cannot be decoded"),
    "video is empty": (content(VIDEO, lambda raw: b""), "cannot be decoded"),
    "video is text": (content(VIDEO, lambda raw: b"#EXTM3U\n/etc/passwd\n"), "cannot be decoded"),
    "frames are missing": (
        lambda path: files.write_video(path / VIDEO, files.pictures(12)),
        "has 12 frames, and the episodes in it 13",
    ),
    "slower": (lambda path: files.write_video(path / VIDEO, files.pictures(13), 5), "has no frame at 0.1000 s"),
    "larger": (
        lambda path: files.write_video(path / VIDEO, files.pictures(13).repeat(2, 1)),
        "has frames of 64 x 32 pixels, and 32 x 32 are declared",
    ),
    "declared larger": (feature("observation.images.front", shape=[2**12, 2**12, 3]), "has frames of 32 x 32"),
    "declared huge": (feature("observation.images.front", shape=[2**15, 2, 3]), "of at most 16384 pixels"),
    "two channels": (feature("observation.images.front", shape=[32, 32, 2]), "expected (height, width, 1, 3 or 4)"),
    "begins late": (
        meta("videos/observation.images.front/from_timestamp", [0.0, 9.0, 1.0]),
        "has no frame at 9.0000 s",
    ),
    "begins at NaN": (meta("videos/observation.images.front/from_timestamp", [0.0, float("nan"), 1.0]), "is nan"),
    "no template": (told(video_path=None), "video_path in meta/info.json is no template"),
    "leads out": (told(video_path="../{video_key}.mp4"), "leads out of the folder"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_datasets(name, tmp_path):
    check(files.lerobot(tmp_path).path, *CASES[name], tmp_path)


@pytest.mark.parametrize("name", VIDEO_CASES)
def test_bad_videos(name, tmp_path):
    check(files.lerobot(tmp_path, video=True).path, *VIDEO_CASES[name], tmp_path)


OLD = "meta/episodes.jsonl"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gone(OLD), "has no meta/episodes.jsonl"),
        (content(OLD, lambda raw: raw[:-30]), "episodes.jsonl, line 3 is no valid JSON"),
        (content(OLD, lambda raw: raw.replace(b'"length": 6', b'"length": 7')), "counts 13 frames"),
        (content(OLD, lambda raw: raw.replace(b'"episode_index": 1', b'"episode_index": 5')), "is episode 5"),
        (content(OLD, lambda raw: b"\n".join(raw.splitlines()[:2])), "counts 3 episodes, and 2 are described"),
        (content(OLD, lambda raw: b""), "counts 3 episodes, and 0 are described"),
        (gone("data/chunk-000/episode_000001.parquet"), "there is no such file"),
        (content("meta/tasks.jsonl", lambda raw: b"{}"), "are not numbered texts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_datasets_of_version_21(change, message, tmp_path):
    check(files.lerobot(tmp_path, "v2.1").path, change, message, tmp_path)


def check(path: Path, change: Any, message: str, folder: Path) -> None:
    change(path)
    with pytest.raises(UsageError) as error:
        import_dataset(path, folder / "out", "lerobot")
    assert message in str(error.value) and str(path) in str(error.value)
    assert not (folder / "out").exists() and not list(folder.glob(".tmp*"))


def test_images_that_are_none(tmp_path):
    for name, image, message in (
        ("text", b"hello", "is neither PNG nor JPEG"),
        ("cut", None, "cannot be decoded"),
        ("none", ..., "holds no image"),
    ):
        home = tmp_path / name
        shutil.copytree(DATA / "lerobot_v3", home)

        def change(columns: dict[str, Any], image: Any = image) -> None:
            values = columns["observation.images.wrist"].to_pylist()
            whole = values[3]["bytes"]
            values[3]["bytes"] = None if image is ... else whole[:40] if image is None else image
            kind = columns["observation.images.wrist"].type
            columns["observation.images.wrist"] = pa.array(values, kind)

        edit_parquet(home / ROWS, change)
        with pytest.raises(UsageError, match=message):
            import_dataset(home, tmp_path / "out")
    home = tmp_path / "size"
    shutil.copytree(DATA / "lerobot_v3", home)
    feature("observation.images.wrist", shape=[4, 16, 3])(home)
    with pytest.raises(UsageError, match="has 8 x 8 pixels, and declares 4 x 16"):
        import_dataset(home, tmp_path / "out")


def test_an_image_that_claims_to_be_huge_is_not_decoded():
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (2**30).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    with pytest.raises(UsageError, match="cannot be decoded"):
        frames.decode_image(header + bytes(100), (8, 8, 3), "x")


def test_detection(tmp_path):
    assert detect(files.lerobot(tmp_path).path).name == "lerobot"
    (tmp_path / "x" / INFO).write_text(json.dumps({"features": {}}))
    with pytest.raises(UsageError, match="looks like none"):
        detect(tmp_path / "x")
