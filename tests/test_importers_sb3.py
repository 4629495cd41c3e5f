"""Importing Stable-Baselines3's replay buffers: rings in order, true terminals, and pickles that never run."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from ctrlrl.data.importers import detect, import_dataset, sb3
from ctrlrl.data.importers.base import ImportOptions
from ctrlrl.data.importers.pickles import read_pickle
from ctrlrl.data.store import Dataset
from ctrlrl.errors import UsageError
from tests import dataset_files as files

BOX = gym.spaces.Box(-10, 10, (3,))
ACTION = gym.spaces.Box(-1, 1, (2,))


def brought(buffer: Any, folder: Path, protocol: int = 5, **options: Any) -> tuple[Dataset, list[str]]:
    path = folder / "x.pkl"
    path.write_bytes(pickle.dumps(buffer, protocol))
    options = {"unsafe_pickle": True} | options
    data, notes = import_dataset(path, folder / "out", "sb3", ImportOptions(**options))
    data.verify()
    return data, notes


def refused(content: bytes, folder: Path, **options: Any) -> str:
    path = folder / "x.pkl"
    path.write_bytes(content)
    options = {"unsafe_pickle": True} | options
    with pytest.raises(UsageError) as error:
        import_dataset(path, folder / "out", "sb3", ImportOptions(**options))
    assert not (folder / "out").exists() and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("kind", "environments"),
    [
        ("ReplayBuffer", 1),
        ("ReplayBuffer", 3),
        ("DictReplayBuffer", 2),
        ("HerReplayBuffer", 1),
        ("NStepReplayBuffer", 1),
    ],
)
def test_every_kind_of_buffer(kind, environments, protocol, tmp_path):
    file = files.sb3(tmp_path, kind=kind, environments=environments, protocol=protocol)
    assert detect(file.path).name == "sb3"
    data, _ = import_dataset(file.path, tmp_path / "out", None, ImportOptions(**file.options))
    entry = "state" if isinstance(data.observation, dict) else ""
    assert not files.differences(data, file.episodes, entry=entry)
    assert data.observation_space == (gym.spaces.Dict(state=BOX) if entry else BOX)
    assert data.provenance["buffer"] == kind and data.action_space == ACTION


class Ring:
    """A buffer beside plain lists of what was added to it."""

    def __init__(self, buffer: Any, environments: int) -> None:
        self.buffer = buffer
        self.rows: list[list[Any]] = [[] for _ in range(environments)]
        self.next_id = 0
        self.seen = [self._new() for _ in range(environments)]

    def _new(self) -> Any:
        self.next_id += 1
        return np.full(3, self.next_id, np.float32)

    def add(self, outcomes: list[str]) -> None:
        rows = []
        for env, outcome in enumerate(outcomes):
            after, action = self._new(), np.float32([self.next_id % 7 / 7, 0])
            ended = outcome in ("terminated", "truncated")
            row = {"observations": self.seen[env], "next_observations": after, "actions": action}
            row |= {"rewards": self.next_id, "terminals": outcome == "terminated", "timeouts": outcome == "truncated"}
            rows.append(row)
            self.rows[env].append((*self.seen[env][:1], *action, float(self.next_id), *after[:1], outcome))
            self.seen[env] = self._new() if ended or outcome == "jump" else after
        files.add(self.buffer, rows)

    def kept(self, capacity: int) -> list[list[Any]]:
        return [rows[-capacity:] for rows in self.rows]


def transitions(data: Dataset) -> list[Any]:
    found = []
    for i in range(data.num_episodes):
        episode: Any = data.episode(i)
        last = len(episode.reward) - 1
        for t, reward in enumerate(episode.reward):
            end = "on" if t < last else "terminated" if episode.terminated else "truncated"
            found.append((episode.observation[t][0], *episode.action[t], reward, episode.observation[t + 1][0], end))
    return found


OUTCOMES = st.sampled_from(["on", "on", "on", "terminated", "truncated", "jump"])
HISTORIES = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.lists(OUTCOMES, min_size=n, max_size=n), min_size=1, max_size=20)
)


@given(HISTORIES, st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_rings_are_put_in_order(tmp_path_factory, history, capacity):
    """Rows that were overwritten or never written are not there; the others are, each once and with its own flags."""
    environments = len(history[0])
    buffer = ReplayBuffer(capacity * environments, BOX, ACTION, device="cpu", n_envs=environments)
    ring = Ring(buffer, environments)
    for outcomes in history:
        ring.add(outcomes)
    data, _ = brought(buffer, tmp_path_factory.mktemp("sb3"))
    expected = []
    for rows in ring.kept(capacity):
        for k, row in enumerate(rows):
            end = row[-1]
            cut = end == "jump" or (end == "on" and k == len(rows) - 1)
            expected.append((*row[:-1], "truncated" if cut else end))
    assert transitions(data) == expected


@given(st.lists(OUTCOMES.filter(lambda o: o != "jump"), min_size=1, max_size=20), st.integers(3, 12))
@settings(max_examples=60, deadline=None)
def test_buffers_that_save_memory(tmp_path_factory, history, capacity):
    """Observations behind a done are lost, but for the newest row: no row leads into the next episode."""
    buffer = ReplayBuffer(
        capacity, BOX, ACTION, device="cpu", optimize_memory_usage=True, handle_timeout_termination=False
    )
    ring = Ring(buffer, 1)
    for outcome in history:
        ring.add([outcome])
    data, notes = brought(buffer, tmp_path_factory.mktemp("sb3"), max_episode_steps=1000)
    rows = ring.kept(capacity - 1 if len(history) >= capacity else capacity)[0]
    expected = []
    for k, row in enumerate(rows):
        done, newest = row[-1] != "on", k == len(rows) - 1
        end = "terminated" if done else "truncated" if newest else "on"
        after = row[0] if done and not newest else row[4]
        expected.append((*row[:4], after, end))
    assert transitions(data) == expected
    assert any("stands in for it" in note for note in notes) == any(row[-1] != "on" for row in rows[:-1])


def test_time_limits_that_the_buffer_does_not_tell(tmp_path):
    buffer = ReplayBuffer(40, BOX, ACTION, device="cpu", handle_timeout_termination=False)
    ring = Ring(buffer, 1)
    for steps in (4, 4, 2, 4):
        for t in range(steps):
            ring.add(["terminated" if t == steps - 1 else "on"])
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    data, notes = brought(buffer, tmp_path / "a")
    assert data.terminated.tolist() == [False, False, True, False]
    assert "3 of 4 episodes" in notes[0] and "the most steps there are, 4" in notes[0]
    data, notes = brought(buffer, tmp_path / "b", max_episode_steps=5)
    assert data.terminated.all() and not notes
    full = ReplayBuffer(40, BOX, ACTION, device="cpu")
    Ring(full, 1).add(["on"])
    assert "leave --max-episode-steps out" in refused(pickle.dumps(full), tmp_path, max_episode_steps=5)


def test_actions_have_the_environments_units_again(tmp_path):
    space = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
    buffer = ReplayBuffer(10, BOX, space, device="cpu")
    for action in ([-1, -1], [0, 0.5], [1, 1]):
        buffer.add(np.zeros(3), np.zeros(3), np.float32([action]), np.zeros(1), np.zeros(1), [{}])
    data, notes = brought(buffer, tmp_path)
    assert data.action.tolist() == [[-2, 0], [0, 7.5], [2, 10]] and data.action_space == space
    assert "scaled back" in notes[0]


def test_actions_beyond_one_are_in_the_environments_units_already(tmp_path):
    buffer = ReplayBuffer(10, BOX, gym.spaces.Box(-2, 2, (1,)), device="cpu")
    buffer.add(np.zeros(3), np.ones(3), np.float32([1.5]), np.zeros(1), np.zeros(1), [{}])
    (tmp_path / "a").mkdir()
    data, notes = brought(buffer, tmp_path / "a")
    assert data.action.tolist() == [[1.5]] and "beyond [-1, 1]" in notes[0]
    buffer.actions[0] = 3
    assert "neither within [-1, 1]" in refused(pickle.dumps(buffer), tmp_path)


@pytest.mark.parametrize(
    "space", [gym.spaces.Discrete(4), gym.spaces.Discrete(3, start=1), gym.spaces.MultiDiscrete([2, 3])]
)
def test_discrete_actions(space, tmp_path):
    buffer = ReplayBuffer(10, gym.spaces.Discrete(5), space, device="cpu")
    given = [space.sample() for _ in range(6)]
    for t, action in enumerate(given):
        buffer.add(np.array([t % 5]), np.array([(t + 1) % 5]), np.array(action), np.zeros(1), np.zeros(1), [{}])
    data, _ = brought(buffer, tmp_path)
    assert data.action_space == space and np.array_equal(data.action, given)
    assert data.observation.tolist() == [[0], [1], [2], [3], [4], [0], [1]]


def test_dict_observations_with_images(tmp_path):
    space = gym.spaces.Dict(camera=gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), state=BOX)
    buffer = DictReplayBuffer(10, space, ACTION, device="cpu")
    seen = [space.sample() for _ in range(4)]
    for t in range(3):
        now, then = ({k: v[None] for k, v in seen[i].items()} for i in (t, t + 1))
        buffer.add(now, then, np.zeros((1, 2)), np.zeros(1), np.zeros(1), [{}])
    data, _ = brought(buffer, tmp_path)
    assert data.observation_space == space
    for name in space.spaces:
        assert np.array_equal(data.observation[name], [o[name] for o in seen])


def test_without_opt_in_nothing_is_read(tmp_path):
    message = refused(pickle.dumps(ReplayBuffer(4, BOX, ACTION, device="cpu")), tmp_path, unsafe_pickle=False)
    assert "--allow-pickle" in message


class Bomb:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def with_state(**changed: Any) -> bytes:
    buffer = ReplayBuffer(4, BOX, ACTION, device="cpu")
    Ring(buffer, 1).add(["on"])
    buffer.__dict__.update(changed)
    for name in [name for name, value in changed.items() if value is ...]:
        del buffer.__dict__[name]
    return pickle.dumps(buffer, 5)


def nested(depth: int) -> bytes:
    """A tuple in a tuple in a tuple, as the key of a dictionary: to hash it overflows the stack."""
    return b"\x80\x04}(" + b")" + b"\x85" * depth + b"Nu."


def doubled(depth: int) -> bytes:
    """(t, t) of (t, t) of (t, t): to hash it takes for ever."""
    return b"\x80\x04}()q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth)) + b"Nu."


CASES: dict[str, tuple[bytes, str]] = {
    "os.system": (pickle.dumps(Bomb(os.system, "exit 3")), "names 'posix.system'"),
    "eval": (pickle.dumps(Bomb(eval, "1")), "names 'builtins.eval'"),
    "exec in protocol 2": (pickle.dumps(Bomb(exec, "raise SystemExit"), 2), "names '__builtin__.exec'"),
    "as an attribute": (with_state(device=Bomb(os.system, "exit 3")), "names 'posix.system'"),
    "deep inside": (with_state(extra={"deep": [Bomb(np.load, "x")]}), "names 'numpy.load'"),
    "builds of builds": (b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93)\x81(Nt\x81.", "is no pickle that can be read"),
    "a name and no more": (b"\x80\x02cos\nsystem\n", "names 'os.system'"),
    "an extension": (b"\x80\x04\x82\x01.", "which pickles of protocols 2 to 5 with arrays do not hold"),
    "a persistent id": (b"\x80\x04P1\n.", "do not hold"),
    "a terabyte": (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x", "it is cut off"),
    "a huge index": (b"\x80\x04Nr\xff\xff\xff\xff.", "holds no replay buffer"),
    "deep keys": (nested(100_000), "an entry in it is called by a tuple"),
    "doubling keys": (doubled(60), "an entry in it is called by a tuple"),
    "marks": (b"\x80\x04" + b"(" * 10_000 + b".", "it takes what is not there"),
    "deep lists": (b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds no replay buffer"),
    "a later protocol": (b"\x80\x09N.", "protocol 9"),
    "empty": (b"", "cannot be read"),
    "nothing": (b"\x80\x04N.", "holds no replay buffer"),
    "another object": (pickle.dumps([1, 2, {"a": None}]), "holds no replay buffer"),
    "cut off": (with_state()[:-40], "it is cut off"),
    "pos beyond": (with_state(pos=7), "pos is 7"),
    "no row": (with_state(pos=0), "holds no transition"),
    "other environments": (with_state(rewards=np.zeros((4, 2), np.float32)), "(4, 1, 2), and rewards (4, 2)"),
    "half done": (with_state(dones=np.full((4, 1), 0.5, np.float32)), "a flag is 0 or 1"),
    "NaN": (with_state(rewards=np.full((4, 1), np.nan, np.float32)), "the reward is NaN or infinite in row 0"),
    "infinite": (with_state(observations=np.full((4, 1, 3), np.inf, np.float32)), "NaN or infinite in row 0"),
    "no next": (with_state(next_observations=...), "has no 'next_observations'"),
    "other next": (with_state(next_observations=np.zeros((4, 1, 2), np.float32)), "not of the same shapes"),
    "objects": (with_state(observations=np.zeros((4, 1, 3), object)), "no array of numbers"),
    "complex": (with_state(observations=np.zeros((4, 1, 2), "c8")), "no array of numbers"),
    "wide actions": (with_state(actions=np.zeros((4, 1, 3), np.float32)), "actions are float32 (3,)"),
    "a Dict of actions": (with_state(action_space=gym.spaces.Dict(a=ACTION)), "the action space is a Dict"),
    "no space": (with_state(observation_space=3), "is no space"),
    "another space": (with_state(observation_space=gym.spaces.Box(-1, 1, (2,))), "their space is of"),
}


@pytest.mark.parametrize("name", CASES)
def test_hostile_and_damaged_pickles(name, tmp_path):
    content, message = CASES[name]
    assert message in refused(content, tmp_path)


def test_an_array_that_claims_more_than_there_is(tmp_path):
    content = with_state()
    shape = b"K\x04K\x01K\x02\x87"  # of actions
    assert shape in content
    assert "declares" in refused(content.replace(shape, b"J\xff\xff\xff\x7fK\x01K\x02\x87"), tmp_path)


def test_arrays_stay_in_the_file(tmp_path):
    """What is read is a view of the file: a buffer of many gigabytes takes no memory of its own."""
    (tmp_path / "x").write_bytes(pickle.dumps(np.arange(1000.0), 5))
    call = read_pickle(tmp_path / "x", sb3.ALLOWED)
    assert isinstance(call.args[0], memoryview) and len(call.args[0]) == 8000


def test_detection_reads_no_pickle(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Bomb(os.system, "exit 3")) + b"stable_baselines3 ReplayBuffer")
    assert sb3.looks_like(tmp_path / "x.pkl")  # by its first bytes
    assert not sb3.looks_like(tmp_path) and not sb3.looks_like(tmp_path / "none")
