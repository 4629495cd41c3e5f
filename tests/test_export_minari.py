"""Minari export: Minari itself reads it, and importing it again gives the same dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from ctrlrl.data.export_minari import export
from ctrlrl.data.importers import import_dataset
from ctrlrl.data.store import Column, Dataset, DatasetWriter, Episode
from ctrlrl.errors import UsageError

h5py = pytest.importorskip("h5py")
minari = pytest.importorskip("minari")

WORDS = gym.spaces.Dict(
    {
        "state": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64),
        "camera.left": gym.spaces.Box(0, 255, (40, 32, 3), np.uint8),
        "said": gym.spaces.Text(30),
    }
)
BOX = gym.spaces.Box(-9, 9, (3,), np.float32)
ACTIONS = {
    "box": gym.spaces.Box(np.float32([-1, -2]), np.float32([1, 2])),
    "discrete": gym.spaces.Discrete(5, start=2),
    "several": gym.spaces.MultiDiscrete([3, 4]),
}


def sampled(space: Any, count: int, seed: int) -> Any:
    if isinstance(space, gym.spaces.Dict):
        return {name: sampled(part, count, seed) for name, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Text):
        return [f"schön {seed} {i}" for i in range(count)]
    space.seed(seed)
    return np.stack([space.sample() for _ in range(count)])


def written(path: Path, observation: Any, action: Any, **options: Any) -> Dataset:
    given: dict[str, Any] = {
        "env": "Pendulum-v1",
        "reference": {"random": -3.5, "expert": 7.25},
        "columns": {"success": Column(dtype="bool"), "qpos": Column(dtype="float64", shape=(2,), per="observation")},
    } | options
    ends = [(True, False), (False, True), (True, True)]
    with DatasetWriter.create(path, observation_space=observation, action_space=action, **given) as writer:
        for seed, (steps, (terminated, truncated)) in enumerate(zip([4, 1, 6], ends, strict=True)):
            random = np.random.default_rng(seed)
            columns: dict[str, Any] = {
                "success": np.arange(steps) % 2 == 0,
                "qpos": random.normal(size=(steps + 1, 2)),
                "tokens": [np.arange(i) for i in range(steps)],
                "phase": [f"é{i}" for i in range(steps + 1)],
            }
            writer.add(
                Episode(
                    observation=sampled(observation, steps + 1, seed),
                    action=sampled(action, steps, seed),
                    reward=random.normal(size=steps).astype(np.float32),
                    terminated=terminated,
                    truncated=truncated,
                    columns={name: columns[name] for name in given["columns"]},
                    info={"seed": seed + 10, "task": "lift"},
                )
            )
    return Dataset.open(path)


def entries(observation: Any) -> dict[str, Any]:
    return observation if isinstance(observation, dict) else {"": observation}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", [BOX, WORDS], ids=["box", "dict"])
def test_there_and_back(observation, action, tmp_path, monkeypatch):
    data = written(tmp_path / "data", observation, ACTIONS[action])
    export(data, tmp_path / "root", "some/where/thing-v2")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    assert list(minari.list_local_datasets()) == ["some/where/thing-v2"]

    theirs = minari.load_dataset("some/where/thing-v2")
    assert (theirs.total_episodes, theirs.total_steps) == (3, 11)
    assert theirs.observation_space.keys() == WORDS.keys() if observation is WORDS else theirs.observation_space == BOX
    assert theirs.action_space == ACTIONS[action] and theirs.env_spec.id == "Pendulum-v1"
    assert minari.get_normalized_score(theirs, np.array([7.25])) == 1

    again, _ = import_dataset(tmp_path / "root" / "some/where/thing-v2", tmp_path / "again")
    assert again.observation_space == data.observation_space and again.action_space == data.action_space
    assert again.reference == data.reference and again.env == data.env and again.columns == data.columns
    for number, episode in enumerate(theirs.iterate_episodes()):
        mine, back = data.episode(number), again.episode(number)
        for name, rows in entries(mine.observation).items():
            assert np.array_equal(rows, entries(episode.observations)[name])
            assert np.array_equal(rows, entries(back.observation)[name])
        assert np.array_equal(mine.action, episode.actions) and np.array_equal(mine.action, back.action)
        assert np.array_equal(mine.reward, episode.rewards) and np.array_equal(mine.reward, back.reward)
        assert (mine.terminated, mine.truncated) == (back.terminated, back.truncated)
        assert (mine.terminated, mine.truncated) == (episode.terminations[-1], episode.truncations[-1])
        assert not episode.terminations[:-1].any() and not episode.truncations[:-1].any()
        for name in data.columns:
            assert np.array_equal(mine.columns[name], episode.infos[name])
            assert np.array_equal(mine.columns[name], back.columns[name])
        assert back.info == {"seed": number + 10}


def test_without_references_or_a_registered_environment(tmp_path, monkeypatch):
    data = written(tmp_path / "data", BOX, ACTIONS["box"], env="Unheard-v0", reference={}, columns={})
    export(data, tmp_path / "root", "thing-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    theirs = minari.load_dataset("thing-v0")
    assert theirs.env_spec is None and "ref_min_score" not in theirs.storage.metadata
    assert theirs[0].infos is None


def test_what_came_from_minari_goes_back_with_its_origin(tmp_path, monkeypatch):
    origin = {"format": "minari", "algorithm_name": "SAC", "author": ["A", "B"], "notes": []}
    export(written(tmp_path / "data", BOX, ACTIONS["box"], provenance=origin), tmp_path / "root", "thing-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    metadata = minari.load_dataset("thing-v0").storage.metadata
    assert metadata["algorithm_name"] == "SAC" and metadata["author"] == {"A", "B"}


def test_texts_go_over_and_columns_of_varying_length_do_not(tmp_path, monkeypatch):
    columns = {
        "tokens": Column(dtype="int64", ragged=True),
        "phase": Column(dtype="text", per="observation"),
    }
    export(written(tmp_path / "data", BOX, ACTIONS["box"], columns=columns), tmp_path / "root", "thing-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    theirs = minari.load_dataset("thing-v0")
    assert theirs[0].infos.keys() == {"phase"} and theirs[0].infos["phase"][1].decode() == "é1"
    assert "tokens" in theirs.storage.metadata["description"]


@pytest.mark.parametrize(
    "name", ["thing", "thing-v", "../thing-v0", "a/thing-v0", "/thing-v0", "some//thing-v0", "-v0x"]
)
def test_names_that_are_none(name, tmp_path):
    data = written(tmp_path / "data", BOX, ACTIONS["box"])
    with pytest.raises(UsageError, match="is no Minari ID"):
        export(data, tmp_path / "root", name)
    assert not (tmp_path / "root").exists()


def test_nothing_is_overwritten_or_left_half_written(tmp_path, monkeypatch):
    data = written(tmp_path / "data", BOX, ACTIONS["box"])
    export(data, tmp_path / "root", "thing-v0")
    with pytest.raises(UsageError, match="exists already"):
        export(data, tmp_path / "root", "thing-v0")
    monkeypatch.setattr(Dataset, "episode", lambda self, i: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(data, tmp_path / "root", "thing-v1")
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["thing-v0"]


def test_a_dataset_without_episodes_is_refused(tmp_path):
    with DatasetWriter.create(tmp_path / "data", observation_space=BOX, action_space=ACTIONS["box"]):
        pass
    with pytest.raises(UsageError, match="holds no episode"):
        export(Dataset.open(tmp_path / "data"), tmp_path / "root", "thing-v0")
