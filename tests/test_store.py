"""The dataset store: what goes in comes out, appending disturbs no reader, damage is named."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.data import store
from ctrlrl.data.store import Column, Dataset, DatasetWriter, Episode
from ctrlrl.errors import UsageError

BOX = gym.spaces.Box(-10, 10, (3,), np.float32)
ACTION = gym.spaces.Box(-1, 1, (2,), np.float32)
WORDS = gym.spaces.Dict({"text": gym.spaces.Text(100), "state": BOX, "deep": gym.spaces.Dict({"x": BOX})})


def episode(seed: int, length: int = 5, **more: Any) -> Episode:
    random = np.random.default_rng(seed)
    return Episode(
        observation=random.uniform(-1, 1, (length + 1, 3)).astype(np.float32),
        action=random.uniform(-1, 1, (length, 2)).astype(np.float32),
        reward=random.normal(size=length).astype(np.float32),
        **{"terminated": seed % 2 == 0, "truncated": False, "info": {"seed": seed}} | more,
    )


def write(path: Path, lengths: list[int], **options: Any) -> Path:
    with DatasetWriter.create(path, observation_space=BOX, action_space=ACTION, **options) as writer:
        for seed, length in enumerate(lengths):
            writer.add(episode(seed, length))
    return path


def equal(one: Episode, other: Episode) -> bool:
    arrays = all(np.array_equal(getattr(one, k), getattr(other, k)) for k in ("observation", "action", "reward"))
    return arrays and one.terminated == other.terminated and one.info == other.info


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(0, 7))
@settings(max_examples=30, deadline=None)
def test_what_goes_in_comes_out(tmp_path_factory: Any, lengths: list[int], appended_from: int) -> None:
    path = tmp_path_factory.mktemp("data") / "set"
    write(path, lengths[:appended_from], env="Pendulum-v1", control_dt=0.05, reference={"random": -1.0, "expert": 3.0})
    with DatasetWriter.append(path) as writer:
        for seed in range(appended_from, len(lengths)):
            writer.add(episode(seed, lengths[seed]))
    data = Dataset.open(path)
    assert (data.num_episodes, data.num_transitions) == (len(lengths), sum(lengths))
    assert data.observation_space == BOX and data.action_space == ACTION and data.env == "Pendulum-v1"
    assert data.lengths.tolist() == lengths and data.control_dt == 0.05 and data.normalized_score(1.0) == 50
    for i, length in enumerate(lengths):
        expected = episode(i, length)
        assert equal(data.episode(i), expected) and data.truncated[i] == (i % 2 == 1)
        assert data.returns[i] == pytest.approx(expected.reward.astype(np.float64).sum())
        for t in range(length):  # the rule that says where a transition's observations are
            row = data.starts[i] + t + i
            assert np.array_equal(data.observation[row : row + 2], expected.observation[t : t + 2])  # type: ignore[index]
    data.verify()


def test_ragged_and_text_columns(tmp_path: Path) -> None:
    columns = {
        "tokens": Column(dtype="int64", ragged=True),
        "points": Column(dtype="float32", shape=(2,), ragged=True, per="observation"),
        "said": Column(dtype="text"),
        "success": Column(dtype="bool"),
    }
    rows = {
        "tokens": [np.arange(n) for n in (0, 3, 1)],
        "points": [np.full((n, 2), n, np.float32) for n in (2, 0, 1, 4)],
        "said": ["", "grüß Gott", "ok"],
        "success": np.array([False, False, True]),
    }
    seen = {
        "text": ["a", "", "日本", "d"],
        "state": np.ones((4, 3), np.float32),
        "deep.x": np.zeros((4, 3), np.float32),
    }
    with DatasetWriter.create(
        tmp_path / "set", observation_space=WORDS, action_space=gym.spaces.Discrete(4), columns=columns
    ) as w:
        for _ in range(2):
            w.add(
                Episode(
                    observation=seen,
                    action=np.array([1, 2, 3]),
                    reward=np.zeros(3),
                    terminated=True,
                    truncated=False,
                    columns=rows,
                )
            )
    data = Dataset.open(tmp_path / "set")
    got = data.episode(1)
    assert got.columns["said"] == rows["said"] and got.observation["text"] == seen["text"]  # type: ignore[index,call-overload]
    assert np.array_equal(got.columns["success"], rows["success"])
    for name in ("tokens", "points"):
        assert all(np.array_equal(a, b) for a, b in zip(got.columns[name], rows[name], strict=True))
    assert data.action.dtype == np.int64 and list(data.observation["text"]) == seen["text"] * 2
    assert isinstance(data.observation_space, gym.spaces.Dict) and "text" in data.observation_space.spaces
    data.verify()


def test_nothing_is_there_until_the_first_commit(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        DatasetWriter.create(tmp_path / "set", observation_space=BOX, action_space=ACTION) as w,
    ):
        w.add(episode(0))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_reader_keeps_what_it_opened_and_a_crash_leaves_the_last_commit(tmp_path: Path) -> None:
    path = write(tmp_path / "set", [3, 4])
    before = Dataset.open(path)
    copy = [np.array(before.episode(i).observation) for i in range(2)]
    writer = DatasetWriter.append(path)
    for seed in range(2, 50):
        writer.add(episode(seed))
    writer._write()  # rows reach the files, dataset.json does not count them yet
    writer.close()  # as a killed process would
    again = Dataset.open(path)
    assert again.num_transitions == 7 and again.content_hash == before.content_hash
    again.verify()
    with DatasetWriter.append(path) as writer:
        writer.add(episode(2))
    after = Dataset.open(path)
    after.verify()
    assert after.num_episodes == 3 and equal(after.episode(2), episode(2))
    assert all(np.array_equal(before.episode(i).observation, copy[i]) for i in range(2))


def _append(path: str, count: int) -> None:
    for seed in range(count):
        with DatasetWriter.append(path) as writer:
            writer.add(episode(seed, 1 + seed % 7))


def test_reading_while_another_process_appends(tmp_path: Path) -> None:
    path = write(tmp_path / "set", [5])
    process = multiprocessing.get_context("spawn").Process(target=_append, args=(str(path), 40))
    process.start()
    sizes = []
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        data = Dataset.open(path)
        sizes.append(data.num_episodes)
        for i in range(1, data.num_episodes):
            assert equal(data.episode(i), episode(i - 1, 1 + (i - 1) % 7))
        data.verify()
    process.join()
    assert process.exitcode == 0 and sizes == sorted(sizes) and Dataset.open(path).num_episodes == 41


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a", [3, 4]), write(tmp_path / "b", [3, 4])
    longer = write(tmp_path / "c", [3, 5])
    assert Dataset.open(one).content_hash == Dataset.open(other).content_hash != Dataset.open(longer).content_hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observation": np.zeros((5, 3), np.float32)}, "observation has 5 rows; with 5 rewards it must have 6"),
        ({"observation": np.zeros((6, 4), np.float32)}, r"entries of observation are \(4,\), declared \(3,\)"),
        ({"action": np.full((5, 2), np.nan, np.float32)}, "action has NaN or infinity, first in row 0"),
        ({"action": np.zeros((5, 2), complex)}, "action is of dtype complex128, declared float32"),
        ({"action": np.full((5, 2), 1e300)}, "action has numbers that float32 cannot hold"),
        ({"columns": {"x": np.zeros(5)}}, "has also x; the dataset's columns are observation, action, reward"),
        ({"reward": np.zeros(0)}, "has no transition"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    whole = episode(0)
    with DatasetWriter.create(tmp_path / "set", observation_space=BOX, action_space=ACTION) as writer:
        writer.add(whole)
        parts = {name: getattr(whole, name) for name in ("observation", "action", "reward", "terminated", "truncated")}
        with pytest.raises(UsageError, match=f"episode 1.*{message}"):
            writer.add(Episode(**parts | change))
    assert Dataset.open(tmp_path / "set").num_episodes == 1
    Dataset.open(tmp_path / "set").verify()


def test_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "set", [3, 4])
    with pytest.raises(UsageError, match="is not empty"):
        write(path, [1])
    with pytest.raises(UsageError, match="is no dataset: no such folder"):
        Dataset.open(tmp_path / "nowhere")
    column = path / "columns" / "action.bin"
    content = column.read_bytes()
    column.write_bytes(content[:-1])
    with pytest.raises(UsageError, match=r"columns/action.bin has 55 bytes, and 56 are needed"):
        Dataset.open(path)
    column.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UsageError, match=r"columns/action.bin was altered"):
        Dataset.open(path).verify()
    column.write_bytes(content)
    Dataset.open(path).verify()
    manifest = json.loads((path / "dataset.json").read_text())
    for key, value in (
        ("format", 99),
        ("transitions", -1),
        ("columns", {"../x": {"dtype": "bool", "shape": []}}),
        ("columns", {"x": {"dtype": "bool"}}),
        ("columns", {"x": {"dtype": "bool", "shape": 3}}),
        ("columns", {"x": {"dtype": "bool", "shape": [-1]}}),
        ("columns", {"x": []}),
        ("observation_space", {"type": "Dict", "entries": []}),
        ("reference", {"random": "low"}),
        ("sizes", []),
    ):
        (path / "dataset.json").write_text(json.dumps(manifest | {key: value}))
        with pytest.raises(UsageError):
            Dataset.open(path)
    (path / "dataset.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        Dataset.open(path)


def test_damage_of_what_is_known_of_episodes_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "set", [3, 4])
    lines = (path / "episodes.jsonl").read_text()
    for content, message in (
        (lines.splitlines()[0] + "\n", "episodes.jsonl does not have a line for each episode"),
        (lines.replace('{"seed": 1}', "[1]"), "episodes.jsonl does not have a line for each episode"),
        (lines.replace("}", ""), "episodes.jsonl cannot be read"),
    ):
        (path / "episodes.jsonl").write_text(content)
        with pytest.raises(UsageError, match=message):
            Dataset.open(path).episode(0)
    (path / "episodes.jsonl").unlink()
    with pytest.raises(UsageError, match=r"episodes\.jsonl is missing"):
        Dataset.open(path).episode(0)
    with pytest.raises(UsageError, match=r"episodes\.jsonl is missing"):
        Dataset.open(path).verify()


def test_a_commit_that_failed_half_way_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A file on a disk that is full after a few bytes."""

        def __init__(self, path: Path, mode: str) -> None:
            self.file = open(path, mode)  # noqa: SIM115

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *rest: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, content: bytes) -> None:
            nonlocal left
            self.file.write(content)
            left -= len(content)
            if left < 0:
                raise OSError(errno.ENOSPC, "full")

    left = 200
    with DatasetWriter.create(tmp_path / "set", observation_space=BOX, action_space=ACTION) as writer:
        for seed in range(6):
            writer.add(episode(seed))
        with monkeypatch.context() as patch:
            patch.setattr(store, "open", Full, raising=False)
            with pytest.raises(UsageError, match="no space left"):
                writer.commit()
        writer.commit()
    data = Dataset.open(tmp_path / "set")
    data.verify()
    assert data.num_episodes == 6 and equal(data.episode(5), episode(5))


def test_equal_references_give_no_score(tmp_path: Path) -> None:
    path = write(tmp_path / "set", [3], reference={"random": 2.0, "expert": 2.0})
    with pytest.raises(UsageError, match="are the same, 2: they give no score"):
        Dataset.open(path).normalized_score(1.0)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = write(tmp_path / "set", [3])
    with DatasetWriter.append(path), pytest.raises(UsageError, match="another process appends"):
        DatasetWriter.append(path)
    DatasetWriter.append(path).close()


def test_names_stay_in_the_folder(tmp_path: Path) -> None:
    for name in ("../up", "a/b", "", ".hidden", "action"):
        with pytest.raises(UsageError, match="cannot be called"):
            DatasetWriter.create(
                tmp_path / "set", observation_space=BOX, action_space=ACTION, columns={name: Column(dtype="bool")}
            )
    for columns in (
        {"a": Column(dtype="text"), "a.ends": Column(dtype="int64")},
        {"observation.ends": Column(dtype="int64"), "observation": Column(dtype="bool", ragged=True)},
    ):
        with pytest.raises(UsageError, match="cannot be called"):
            DatasetWriter.create(tmp_path / "set", observation_space=BOX, action_space=ACTION, columns=columns)
    assert os.listdir(tmp_path) == []


def test_a_large_set_opens_at_once(tmp_path: Path) -> None:
    """Ten thousand episodes of a thousand steps, whose columns are holes in files: nothing is read that is not asked
    for."""
    path = write(tmp_path / "set", [1000])
    manifest = json.loads((path / "dataset.json").read_text())
    episodes = 10_000
    record = (path / "episodes.bin").read_bytes()
    (path / "episodes.bin").write_bytes(record * episodes)
    for name in manifest["sizes"]:
        rows = 1001 if name == "columns/observation.bin" else 1000
        if name.startswith("columns/"):
            manifest["sizes"][name] = manifest["sizes"][name] // rows * rows * episodes
            os.truncate(path / name, manifest["sizes"][name])
    manifest |= {"transitions": 1000 * episodes, "episodes": episodes}
    manifest["sizes"]["episodes.bin"] = len(record) * episodes
    (path / "dataset.json").write_text(json.dumps(manifest))
    begun = time.perf_counter()
    data = Dataset.open(path)
    assert data.num_transitions == 10_000_000 and data.observation.shape == (10_010_000, 3)
    assert time.perf_counter() - begun < 1
