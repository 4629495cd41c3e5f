"""Importing trajectories of `imitation`, from .npz files and from folders of `datasets`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.data.importers import detect, import_dataset
from ctrlrl.data.importers.base import ImportOptions
from ctrlrl.errors import UsageError
from tests import dataset_files as files
from tests.dataset_files import EPISODES, recorded

pa = pytest.importorskip("pyarrow")

PARTS = st.lists(st.tuples(st.integers(1, 7), st.sampled_from(["terminated", "truncated"])), min_size=1, max_size=6)


@given(PARTS, st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_transition(tmp_path_factory, parts, as_folder):
    folder, episodes = tmp_path_factory.mktemp("imitation"), recorded(*parts)
    file = (files.imitation_folder if as_folder else files.imitation)(folder, episodes)
    assert detect(file.path).name == "imitation"
    options = ImportOptions(max_episode_steps=None if as_folder else 100)
    data, _ = import_dataset(file.path, folder / "out", None, options)
    data.verify()
    assert not files.differences(data, episodes)


def test_time_limits_are_no_terminals(tmp_path):
    """`terminal` is true at a time limit, too: what several episodes share as the longest time is taken for one."""
    episodes = recorded((5, "terminated"), (3, "terminated"), (5, "terminated"), (4, "truncated"))
    file = files.imitation(tmp_path, episodes)
    data, notes = import_dataset(file.path, tmp_path / "out")
    assert data.terminated.tolist() == [False, True, False, False] and data.truncated.tolist() == [
        True,
        False,
        True,
        True,
    ]
    assert any("the 2 of 3 episodes" in note and "--max-episode-steps" in note for note in notes)
    data, notes = import_dataset(file.path, tmp_path / "told", None, ImportOptions(max_episode_steps=6))
    assert data.terminated.tolist() == [True, True, True, False]
    assert not any("time limit" in note for note in notes)


def test_infos_of_a_folder_tell_time_limits(tmp_path):
    episodes = recorded((5, "truncated"), (5, "terminated"), (2, "truncated"))
    data, notes = import_dataset(files.imitation_folder(tmp_path, episodes).path, tmp_path / "out")
    assert data.terminated.tolist() == [False, True, False] and not any("time limit" in note for note in notes)
    bare = [["{}"] * len(e.reward) for e in episodes]
    (tmp_path / "b").mkdir()
    data, notes = import_dataset(files.imitation_folder(tmp_path / "b", episodes, infos=bare).path, tmp_path / "other")
    assert data.terminated.tolist() == [False, False, True] and any("time limit" in note for note in notes)


def test_infos_are_not_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    infos = np.array([Bomb()] * files.File(name="", format="", path=tmp_path, episodes=EPISODES).rows, object)
    data, notes = import_dataset(files.imitation(tmp_path, infos=infos).path, tmp_path / "out")
    assert not files.differences(data, EPISODES) and not (tmp_path / "ran").exists()
    assert "infos, which are pickled objects, were left out" in notes


def test_without_rewards_and_with_discrete_actions(tmp_path):
    acts = np.arange(13) % 3
    file = files.imitation(tmp_path, rews=None, acts=acts)
    data, notes = import_dataset(file.path, tmp_path / "out")
    assert data.action.tolist() == acts.tolist() and data.action_space.n == 3
    assert not data.returns.any() and "there are no rews: every reward is 0" in notes


def npz(**changed: Any) -> Any:
    return lambda folder: files.imitation(folder, **changed).path


def in_folder(**changed: Any) -> Any:
    return lambda folder: files.imitation_folder(folder, **changed).path


def after(build: Any, change: Any) -> Any:
    def built(folder: Path) -> Path:
        path = build(folder)
        change(path)
        return path

    return built


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def state(value: Any) -> Any:
    return lambda path: (path / "state.json").write_text(json.dumps(value))


def lists(*rows: Any) -> Any:
    return pa.array(list(rows), pa.list_(pa.list_(pa.float32())))


OBS = [e.observation.tolist() for e in EPISODES]
ACTS = [e.action.tolist() for e in EPISODES]
CASES: dict[str, tuple[Any, str]] = {
    "cut off": (after(npz(), cut), "is no .npz file, or was not written to its end"),
    "empty": (after(npz(), lambda path: path.write_bytes(b"")), "is no .npz file"),
    "a pointer of git-lfs": (after(npz(), lambda path: path.write_text("version 1")), "is no .npz file"),
    "no obs": (npz(obs=None), "has no array 'obs'"),
    "an obs too few": (npz(obs=np.zeros((15, 3), np.float32)), "13 acts in 3 trajectories need 16 obs"),
    "indices that go back": (npz(indices=np.array([10, 4])), "indices must ascend"),
    "indices beyond": (npz(indices=np.array([4, 99])), "trajectory 2 has -86 steps"),
    "huge indices": (npz(indices=np.array([4, 2**64 - 1], np.uint64)), "indices must ascend"),
    "an index too few": (npz(indices=np.array([4])), "terminal says that there are 3 trajectories"),
    "indices of floats": (npz(indices=np.array([4.0, 10.0])), "expected a row of integers"),
    "no trajectory": (npz(terminal=np.zeros(0, bool)), "terminal says that there are 0 trajectories"),
    "terminal is a number": (npz(terminal=np.array([0, 1, 2])), "a flag is 0 or 1"),
    "NaN": (npz(rews=np.full(13, np.nan)), "rews is NaN or infinite in row 0"),
    "a rew too few": (npz(rews=np.zeros(12)), "there are 12 rews and 13 acts"),
    "obs of objects": (npz(obs=np.array([{}] * 16, object)), "objects, which only a pickle could restore"),
    "obs of texts": (npz(obs=np.array(["x"] * 16)), "expected numbers"),
    "other columns": (npz(), "has no column 'x'"),
    "no state": (after(in_folder(), lambda path: (path / "state.json").unlink()), "has no state.json"),
    "state is none": (after(in_folder(), state([1])), "must be a JSON object"),
    "lists nothing": (after(in_folder(), state({"_data_files": 3})), "lists no files of data"),
    "leads out": (
        after(in_folder(), state({"_data_files": [{"filename": "../x.arrow"}]})),
        "has no file of data called '../x.arrow'",
    ),
    "file is gone": (
        after(in_folder(), lambda path: (path / "data-00000-of-00001.arrow").unlink()),
        "has no file of data called",
    ),
    "file is a link": (
        after(in_folder(), lambda path: _linked(path / "data-00000-of-00001.arrow")),
        "is a link out of",
    ),
    "file is cut off": (after(in_folder(), lambda path: cut(path / "data-00000-of-00001.arrow")), "cannot be read"),
    "no acts": (in_folder(acts=None), "has no column 'acts'"),
    "an obs is missing": (in_folder(obs=lists(OBS[0][:-1], *OBS[1:])), "has 4 obs and 4 acts"),
    "no steps": (in_folder(acts=lists([], *ACTS[1:]), obs=lists(OBS[0][:1], *OBS[1:])), "expected at least one act"),
    "a null": (in_folder(obs=lists(None, *OBS[1:])), "trajectory 0 has no obs"),
    "a null within": (in_folder(obs=lists([None, *OBS[0][1:]], *OBS[1:])), "has no value in row 0"),
    "ragged": (in_folder(obs=lists([OBS[0][0][:2], *OBS[0][1:]], *OBS[1:])), "every row must have equally many"),
    "another width": (
        in_folder(acts=lists(*ACTS[:2], [row[:1] for row in ACTS[2]])),
        "acts are (2,) at first, and (1,) at step 10",
    ),
    "terminal is text": (in_folder(terminal=pa.array(["no"] * 3)), "expected true or false"),
    "obs are no list": (in_folder(obs=pa.array([1.0, 2.0, 3.0])), "expected a list"),
    "a rew is missing": (
        in_folder(rews=pa.array([[0.0], *([0.0] * len(a) for a in ACTS[1:])])),
        "has 1 rews and 4 acts",
    ),
}


def _linked(path: Path) -> None:
    target = path.parent.parent / "elsewhere.arrow"
    path.rename(target)
    path.symlink_to(target)


@pytest.mark.parametrize("name", CASES)
def test_bad_files(name, tmp_path):
    build, message = CASES[name]
    path = build(tmp_path)
    options = ImportOptions(columns=("x",) if name == "other columns" else None)
    with pytest.raises(UsageError) as error:
        import_dataset(path, tmp_path / "out", "imitation", options)
    assert message in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "out").exists()
