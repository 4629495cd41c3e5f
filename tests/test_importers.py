"""Importers: every transition comes over as it is in the file, none crosses a boundary, and bad files get one message.

To take new messages on: UPDATE_MESSAGES=1 scripts/test tests/test_importers.py, then read the diff.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrlrl.data.importers import arrow, detect, hdf5, import_dataset, npz, ogbench, rows, table
from ctrlrl.data.importers.base import ImportOptions
from ctrlrl.data.importers.d4rl import reference
from ctrlrl.data.store import Dataset
from ctrlrl.errors import UsageError

h5py = pytest.importorskip("h5py")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

MESSAGES = Path(__file__).parent / "messages" / "importers.json"


class Recorded:
    """An episode as an environment gave it: T + 1 observations, T actions."""

    def __init__(self, seed: int, steps: int, ends: str) -> None:
        random = np.random.default_rng(seed)
        self.seen = random.normal(size=(steps + 1, 3)).astype(np.float32)
        self.action = random.uniform(-1, 1, (steps, 2)).astype(np.float32)
        self.reward = random.normal(size=steps).astype(np.float32)
        self.terminated, self.truncated = ends == "terminated", ends == "truncated"
        self.terminals, self.timeouts = np.zeros(steps, bool), np.zeros(steps, bool)
        self.terminals[-1], self.timeouts[-1] = self.terminated, self.truncated

    def transitions(self, *, last: Any = None) -> list[Any]:
        """With `last`, another observation in the place of the final one."""
        seen = self.seen if last is None else np.concatenate([self.seen[:-1], last[None]])
        return [
            (seen[t].tolist(), self.action[t].tolist(), float(self.reward[t]), seen[t + 1].tolist(), bool(end))
            for t, end in enumerate(self.terminals)
        ]


def recorded(*parts: tuple[int, str]) -> list[Recorded]:
    return [Recorded(seed, steps, ends) for seed, (steps, ends) in enumerate(parts)]


def transitions(data: Dataset, entry: str | None = None) -> list[Any]:
    found = []
    for number in range(data.num_episodes):
        episode = data.episode(number)
        seen: Any = episode.observation if entry is None else episode.observation[entry]
        for t, reward in enumerate(episode.reward):
            end = episode.terminated and t == len(episode.reward) - 1
            found.append((seen[t].tolist(), episode.action[t].tolist(), float(reward), seen[t + 1].tolist(), end))
    return found


def flat(episodes: list[Recorded], *, following: bool = True, timeouts: bool = True) -> dict[str, Any]:
    arrays = {
        "observations": np.concatenate([e.seen[:-1] for e in episodes]),
        "actions": np.concatenate([e.action for e in episodes]),
        "rewards": np.concatenate([e.reward for e in episodes]),
        "terminals": np.concatenate([e.terminals for e in episodes]),
    }
    if following:
        arrays["next_observations"] = np.concatenate([e.seen[1:] for e in episodes])
    if timeouts:
        arrays["timeouts"] = np.concatenate([e.timeouts for e in episodes])
    return arrays


def write_hdf5(path: Path, arrays: dict[str, Any], **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **options)
    return path


def without_following(episodes: list[Recorded]) -> list[Any]:
    """What can be known of episodes whose final observations are not in the file."""
    found = []
    for episode in episodes:
        known = episode.transitions(last=episode.seen[-2])
        found += known if episode.terminated else known[:-1]
    return found


def brought(path: Path, out: Path, name: str | None = None, **options: Any) -> Dataset:
    data, _ = import_dataset(path, out, name, ImportOptions(**options))
    data.verify()
    return data


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of one to three rows, so that episodes lie across them."""
    for module in (hdf5, npz, ogbench, rows, table):
        if hasattr(module, "BLOCK"):
            monkeypatch.setattr(module, "BLOCK", 100)


EPISODES = st.lists(
    st.tuples(st.integers(1, 7), st.sampled_from(["terminated", "truncated"])), min_size=1, max_size=6
).map(lambda parts: recorded(*parts))


# D4RL ---------------------------------------------------------------------------------------------------------------


@given(EPISODES, st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_d4rl_every_transition_with_next_observations(tmp_path_factory, episodes, timeouts, compressed):
    folder = tmp_path_factory.mktemp("d4rl")
    options = {"compression": "gzip", "chunks": True} if compressed else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hdf5, "BLOCK", 100)
        data = brought(write_hdf5(folder / "x.hdf5", flat(episodes, timeouts=timeouts), **options), folder / "out")
    assert transitions(data) == [t for e in episodes for t in e.transitions()]
    assert data.lengths.tolist() == [len(e.reward) for e in episodes]
    assert data.terminated.tolist() == [e.terminated for e in episodes]
    assert data.truncated.tolist() == [not e.terminated for e in episodes]


@given(EPISODES)
@settings(max_examples=25, deadline=None)
def test_d4rl_without_next_observations_nothing_crosses_a_boundary(tmp_path_factory, episodes):
    folder = tmp_path_factory.mktemp("d4rl")
    expected = without_following(episodes)
    path = write_hdf5(folder / "x.hdf5", flat(episodes, following=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hdf5, "BLOCK", 100)
        if not expected:
            with pytest.raises(UsageError, match="holds no transition"):
                brought(path, folder / "out")
            return
        data = brought(path, folder / "out")
    assert transitions(data) == expected


def test_d4rl_final_partial_trajectory_is_truncated(tmp_path):
    episodes = recorded((3, "terminated"), (4, ""))
    data = brought(write_hdf5(tmp_path / "x.hdf5", flat(episodes, following=False)), tmp_path / "out")
    assert data.truncated.tolist() == [False, True] and data.lengths.tolist() == [3, 3]


def test_d4rl_says_what_it_decided(tmp_path):
    episodes = recorded((3, "terminated"), (4, "truncated"), (1, "truncated"))
    path = write_hdf5(tmp_path / "x.hdf5", flat(episodes, following=False))
    data, notes = import_dataset(path, tmp_path / "out")
    assert [note.split(" ")[0] for note in notes[1:]] == ["the", "2", "1"]
    assert data.provenance["notes"] == notes[1:]
    arrays = flat(episodes)
    arrays["timeouts"][:] = False
    _, notes = import_dataset(write_hdf5(tmp_path / "y.hdf5", arrays), tmp_path / "jumps")
    assert "1 episodes end where no flag says so" in notes[1]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 100])
def test_d4rl_without_timeouts_is_cut_where_told(limit, tmp_path, small_blocks):
    episodes = recorded((7, "terminated"), (2, "terminated"), (5, ""))
    path = write_hdf5(tmp_path / "x.hdf5", flat(episodes, following=False, timeouts=False))
    expected = []
    for episode in episodes:
        steps = len(episode.reward)
        for start in range(0, steps, limit):
            stop = min(start + limit, steps)
            part = episode.transitions(last=episode.seen[-2])[start:stop]
            expected += part if stop == steps and episode.terminated else part[:-1]
    data = brought(path, tmp_path / "out", max_episode_steps=limit)
    assert transitions(data) == expected


def test_d4rl_both_flags_stay_both(tmp_path):
    arrays = flat(recorded((3, "terminated"), (2, "truncated")))
    arrays["timeouts"][2] = True
    data = brought(write_hdf5(tmp_path / "x.hdf5", arrays), tmp_path / "out")
    assert data.terminated.tolist() == [True, False] and data.truncated.tolist() == [True, True]


def test_d4rl_columns_reference_and_metadata(tmp_path):
    arrays = flat(recorded((3, "terminated"), (4, "truncated")), following=False)
    extra = {"infos/qpos": np.arange(14.0).reshape(7, 2), "infos/goal": np.arange(7), "infos/odd": np.arange(3)}
    path = write_hdf5(tmp_path / "hopper_medium-v2.hdf5", arrays | extra)
    with h5py.File(path, "a") as file:
        file["metadata/algorithm"], file["metadata/iteration"] = "SAC", 7
        file["metadata/policy/weight"] = np.zeros((3, 3))
    assert detect(path).name == "d4rl"
    data, notes = import_dataset(path, tmp_path / "out")
    assert data.columns.keys() == {"qpos", "goal"} and data.column("goal").tolist() == [0, 1, 2, 3, 4, 5]
    assert data.reference == {"random": -20.272305, "expert": 3234.3}
    assert data.provenance["metadata"] == {"algorithm": "SAC", "iteration": 7}
    assert any(note.startswith("infos.odd") for note in notes)
    assert data.env is None and data.action_space == gym.spaces.Box(-1, 1, (2,), np.float32)
    data = brought(path, tmp_path / "less", columns=("goal",), env="Mine-v0")
    assert data.columns.keys() == {"goal"} and data.env == "Mine-v0"
    assert brought(path, tmp_path / "none", columns=()).columns == {}


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("halfcheetah_medium_expert-v2.hdf5", 12135.0),
        ("walker2d-full-replay-v2", 4592.3),
        ("ant-medium-v0", 3879.7),
        ("antmaze-large-diverse-v2", 1.0),
        ("kitchen-partial-v0", 4.0),
        ("maze2d-umaze-sparse-v1.hdf5", 161.86),
        ("maze2d-large-dense-v1", 303.4857382709002),
        ("pen-human-v1.hdf5", 3076.8331017826877),
        ("bullet-hopper-medium-v0", None),
        ("hopper", None),
        ("Hopper-v5", None),
    ],
)
def test_d4rl_reference_returns(name, expert):
    assert reference("other", name).get("expert") == expert


def test_action_bounds_are_the_datas_own_beyond_one(tmp_path):
    arrays = flat(recorded((6, "terminated")))
    arrays["actions"][:, 1] = [-0.5, 0.1, 2.5, 2, 1, 0]
    data, notes = import_dataset(write_hdf5(tmp_path / "x.hdf5", arrays), tmp_path / "out")
    space = data.action_space
    assert isinstance(space, gym.spaces.Box)
    assert space.low[0] == -1 and space.high.tolist() == [1, 2.5] and space.low[1] == -0.5
    assert "beyond [-1, 1]" in notes[1]


def test_integer_actions_are_discrete(tmp_path):
    arrays = flat(recorded((6, "terminated")))
    arrays["actions"] = np.array([[0], [2], [1], [0], [2], [1]], np.uint8)
    data = brought(write_hdf5(tmp_path / "x.hdf5", arrays), tmp_path / "out")
    assert data.action_space == gym.spaces.Discrete(3) and data.action.tolist() == [0, 2, 1, 0, 2, 1]
    arrays["actions"] = np.array([[0, 1], [2, 0], [1, 0], [0, 1], [2, 4], [1, 0]])
    data = brought(write_hdf5(tmp_path / "y.hdf5", arrays), tmp_path / "several")
    assert data.action_space == gym.spaces.MultiDiscrete([3, 5])


# Minari -------------------------------------------------------------------------------------------------------------

SPACES = gym.spaces
OBSERVATION = SPACES.Dict(
    {
        "camera": SPACES.Box(0, 255, (32, 40, 3), np.uint8),
        "body": SPACES.Dict(
            {"joints": SPACES.Box(-9, 9, (3,), np.float32), "tiny": SPACES.Box(0, 255, (4,), np.uint8)}
        ),
        "pair": SPACES.Tuple((SPACES.Discrete(4, start=1), SPACES.MultiBinary(3))),
        "count": SPACES.MultiDiscrete([3, 5]),
        "said": SPACES.Text(20),
    }
)


def minari_episode(seed: int, steps: int, *, terminated: bool) -> Any:
    from minari.data_collector.episode_buffer import EpisodeBuffer

    random, rows = np.random.default_rng(seed), steps + 1

    def sampled(space: Any) -> Any:
        space.seed(int(random.integers(1000)))
        return [space.sample() for _ in range(rows)]

    observation: Any = {
        "camera": [np.full((32, 40, 3), 7 * i, np.uint8) for i in range(rows)],
        "body": {name: sampled(OBSERVATION["body"][name]) for name in ("joints", "tiny")},
        "pair": tuple(sampled(part) for part in OBSERVATION["pair"]),
        "count": sampled(OBSERVATION["count"]),
        "said": [f"hé {i}" for i in range(rows)],
    }
    return EpisodeBuffer(
        seed=seed,
        observations=observation,
        actions=[np.int64(random.integers(2, 7)) for _ in range(steps)],
        rewards=random.normal(size=steps).tolist(),
        terminations=[False] * (steps - 1) + [terminated],
        truncations=[False] * (steps - 1) + [not terminated],
        infos={
            "success": [bool(i % 2) for i in range(rows)],
            "deep": {"matrix": [random.normal(size=(2, 2)) for _ in range(rows)]},
            "phase": ["reach"] * rows,
        },
    )


@pytest.fixture
def minari(tmp_path, monkeypatch):
    module = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    warnings.simplefilter("ignore")
    return module


def minari_dataset(minari: Any, name: str = "some/thing-v0", **options: Any) -> Path:
    buffer = [minari_episode(1, 4, terminated=True), minari_episode(2, 1, terminated=False)]
    given = {"observation_space": OBSERVATION, "action_space": SPACES.Discrete(5, start=2), "buffer": buffer}
    minari.create_dataset_from_buffers(name, **{**given, **options})
    return Path(os.environ["MINARI_DATASETS_PATH"]) / name


@pytest.mark.parametrize("jpeg", [True, False])
@pytest.mark.parametrize("layout", ["hdf5", "arrow", "parquet"])
def test_minari_reads_as_minari_itself_does(layout, jpeg, minari, tmp_path):
    path = minari_dataset(
        minari, data_format=layout, jpeg_encoding=jpeg, ref_min_score=1.0, ref_max_score=5.0, eval_env="Pendulum-v1"
    )
    assert detect(path).name == detect(path / "data").name == "minari"
    data, notes = import_dataset(path, tmp_path / "out")
    assert data.env == "Pendulum-v1" and data.reference == {"random": 1.0, "expert": 5.0}
    assert data.action_space == SPACES.Discrete(5, start=2)
    assert any("JPEG" in note for note in notes) == jpeg and any("phase" in note for note in notes)
    buffers = [minari_episode(1, 4, terminated=True), minari_episode(2, 1, terminated=False)]
    for number, episode in enumerate(buffers):
        mine, seen = data.episode(number), episode.observations
        observation: Any = mine.observation
        for name, rows_ in (
            ("body.joints", seen["body"]["joints"]),
            ("body.tiny", seen["body"]["tiny"]),
            ("pair.0", np.array(seen["pair"][0])[:, None]),
            ("pair.1", seen["pair"][1]),
            ("count", seen["count"]),
            ("camera", seen["camera"]),  # of one colour: JPEG keeps them
        ):
            assert np.array_equal(observation[name], rows_), name
        assert observation["said"] == seen["said"]
        assert np.array_equal(mine.action, episode.actions)
        assert np.array_equal(mine.reward, np.float32(episode.rewards))
        assert (mine.terminated, mine.truncated) == (episode.terminations[-1], episode.truncations[-1])
        assert mine.info == {"seed": episode.seed}
        assert np.array_equal(mine.columns["success"], episode.infos["success"])
        assert np.array_equal(mine.columns["deep.matrix"], episode.infos["deep"]["matrix"])
    assert data.columns["success"].per == "observation"


def test_minari_keeps_texts_that_are_named(minari, tmp_path):
    data = brought(minari_dataset(minari), tmp_path / "out", columns=("phase",))
    assert data.columns.keys() == {"phase"} and data.column("phase")[0] == "reach"


def test_minari_plain_box(minari, tmp_path):
    from minari.data_collector.episode_buffer import EpisodeBuffer

    episodes = recorded((5, "terminated"), (3, "truncated"))
    buffer = [
        EpisodeBuffer(
            observations=list(e.seen),
            actions=list(e.action),
            rewards=e.reward.tolist(),
            terminations=e.terminals.tolist(),
            truncations=e.timeouts.tolist(),
        )
        for e in episodes
    ]
    box, act = SPACES.Box(-np.inf, np.inf, (3,), np.float32), SPACES.Box(-2, 2, (2,), np.float32)
    path = minari_dataset(minari, "plain-v3", buffer=buffer, observation_space=box, action_space=act)
    data = brought(path, tmp_path / "out")
    assert transitions(data) == [t for e in episodes for t in e.transitions()]
    assert data.observation_space == box and data.action_space == act


def test_minari_arrow_in_several_files(minari, tmp_path):
    path = minari_dataset(minari, data_format="arrow")
    whole = brought(path, tmp_path / "whole")
    part = path / "data" / "0" / "part-0.arrow"
    rows_ = pa.ipc.open_file(part).read_all()
    for number, piece in enumerate((rows_.slice(0, 2), rows_.slice(2))):
        with pa.ipc.new_file(part.with_name(f"part-{number}.arrow"), rows_.schema) as writer:
            writer.write_table(piece)
    assert brought(path, tmp_path / "parts").content_hash == whole.content_hash


# robomimic ----------------------------------------------------------------------------------------------------------


def write_robomimic(
    path: Path, episodes: list[Recorded], *, following: bool = True, done: Any = None, env_args: str | None = None
) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        environment = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}}
        data.attrs["env_args"] = env_args or json.dumps(environment)
        for number, episode in reversed(list(enumerate(episodes))):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = len(episode.reward)
            demo["obs/state"], demo["obs/image"] = episode.seen[:-1], np.zeros((len(episode.reward), 4, 4, 3), np.uint8)
            if following:
                demo["next_obs/state"], demo["next_obs/image"] = episode.seen[1:], demo["obs/image"][:]
            demo["actions"], demo["rewards"] = episode.action, episode.reward
            demo["dones"] = episode.terminals.astype(int) if done is None else np.asarray(done[number])
            demo["states"] = np.arange(2 * len(episode.reward), dtype=float).reshape(-1, 2)
        file["mask/train"] = np.array([b"demo_0", b"demo_11"])
    return path


def lifted(*parts: tuple[int, str]) -> list[Recorded]:
    """Episodes with robosuite's rewards: 1 for success, at the end."""
    episodes = recorded(*parts)
    for episode in episodes:
        episode.reward[:] = 0
        episode.reward[-1] = episode.terminated
    return episodes


def test_robomimic_every_transition(tmp_path):
    episodes = lifted(*[(2, "terminated"), (3, "truncated")] * 6)
    path = write_robomimic(tmp_path / "x.hdf5", episodes)
    assert detect(path).name == "robomimic"
    data = brought(path, tmp_path / "out")
    assert transitions(data, "state") == [t for e in episodes for t in e.transitions()]
    assert data.terminated.tolist() == [e.terminated for e in episodes]
    assert data.env is None and data.control_dt == 0.05
    assert data.columns.keys() == {"dones", "states"} and data.provenance["mask"] == {"train": ["demo_0", "demo_11"]}
    assert [info["demonstration"] for info in data.infos] == [f"demo_{i}" for i in range(12)]


def test_robomimic_without_next_obs(tmp_path):
    episodes = lifted((4, "terminated"), (3, "truncated"), (1, "truncated"))
    data = brought(write_robomimic(tmp_path / "x.hdf5", episodes, following=False), tmp_path / "out")
    assert transitions(data, "state") == without_following(episodes)


def test_robomimic_done_at_the_end_is_no_success(tmp_path):
    episodes = lifted((3, "truncated"), (4, "terminated"))
    episodes[0].reward[-1] = 0.4  # shaped
    done = [[0, 0, 1], [0, 1, 1, 1]]
    data, notes = import_dataset(write_robomimic(tmp_path / "x.hdf5", episodes, done=done), tmp_path / "out")
    assert data.terminated.tolist() == [False, True] and data.lengths.tolist() == [3, 4]
    assert data.column("dones").tolist() == [0, 0, 1, 0, 1, 1, 1]
    assert "2 steps before the last" in notes[1] and "1 demonstrations end with done" in notes[2]


# OGBench ------------------------------------------------------------------------------------------------------------


def ogbench_arrays(episodes: list[Recorded]) -> dict[str, Any]:
    rows_ = [len(e.seen) for e in episodes]
    ends = np.zeros(sum(rows_), np.float32)
    ends[np.cumsum(rows_) - 1] = 1
    return {
        "observations": np.concatenate([e.seen for e in episodes]),
        "actions": np.concatenate([np.concatenate([e.action, np.zeros((1, 2), np.float32)]) for e in episodes]),
        "terminals": ends,
        "qpos": np.arange(2.0 * sum(rows_)).reshape(-1, 2),
    }


@given(EPISODES, st.booleans(), st.booleans())
@settings(max_examples=20, deadline=None)
def test_ogbench_last_row_is_an_observation_only(tmp_path_factory, episodes, compressed, fortran):
    folder = tmp_path_factory.mktemp("og")
    path, arrays = folder / "antmaze-large-navigate-v0.npz", ogbench_arrays(episodes)
    if fortran:
        arrays["observations"] = np.asfortranarray(arrays["observations"])
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    assert detect(path).name == "ogbench"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ogbench, "BLOCK", 100)
        data = brought(path, folder / "out")
    expected = [(o, a, 0.0, n, False) for e in episodes for o, a, _, n, _ in e.transitions()]
    assert transitions(data) == expected
    assert not data.terminated.any() and data.truncated.all()
    assert data.columns["qpos"].per == "observation" and np.array_equal(data.column("qpos"), arrays["qpos"])


# Tables -------------------------------------------------------------------------------------------------------------

MAPPING = """
observation: [x, y, z]
action: [a, b]
reward: reward
terminated: fallen
"""


def columns(episodes: list[Recorded], *, following: bool = False) -> dict[str, Any]:
    """A column for each number."""
    arrays = flat(episodes)
    named = dict(zip("xyz", arrays["observations"].T, strict=True)) | dict(zip("ab", arrays["actions"].T, strict=True))
    named |= {"reward": arrays["rewards"], "fallen": arrays["terminals"].astype(int), "late": arrays["timeouts"]}
    named["run"] = np.concatenate([np.full(len(e.reward), 10 * i) for i, e in enumerate(episodes)])
    if following:
        named |= dict(zip(("x2", "y2", "z2"), arrays["next_observations"].T, strict=True))
    return named


def write_table(path: Path, named: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **named)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({name: pa.array(array) for name, array in named.items()}), path, row_group_size=5)
    else:
        lines = [",".join(named)]
        lines += [",".join(str(v) for v in row) for row in zip(*named.values(), strict=True)]
        path.write_text("\n".join(lines) + "\n")
    return path


def mapped(folder: Path, text: str, name: str = "mapping.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@given(EPISODES, st.sampled_from(["npz", "parquet", "csv"]), st.sampled_from(["next", "late", "run", "both"]))
@settings(max_examples=40, deadline=None)
def test_tables_every_transition(tmp_path_factory, episodes, kind, ends):
    folder = tmp_path_factory.mktemp("table")
    path = write_table(folder / f"x.{kind}", columns(episodes, following=ends == "next"))
    says = {
        "next": "next_observation: [x2, y2, z2]\n",
        "late": "truncated: late\n",
        "run": "episode: run\n",
        "both": "truncated: late\nepisode: run\n",
    }[ends]
    mapping = mapped(folder, MAPPING + says)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "BLOCK", 100)
        expected = [t for e in episodes for t in e.transitions()] if ends == "next" else without_following(episodes)
        if not expected:
            with pytest.raises(UsageError, match="holds no transition"):
                brought(path, folder / "out", kind, mapping=mapping)
            return
        data = brought(path, folder / "out", kind, mapping=mapping)
    assert transitions(data) == expected
    assert detect(path).name == kind


def test_mapping_says_everything(tmp_path):
    named = columns(recorded((4, "terminated"), (3, "truncated")))
    named |= {"image": np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3), "force": np.arange(7.0)}
    named["action"] = np.array([0, 1, 2, 0, 1, 2, 0])
    path = write_table(tmp_path / "x.npz", named)
    text = {
        "observation": {"camera": "image", "joints": ["x", "y", "z"]},
        "action": "action",
        "discrete_actions": 4,
        "reward": "reward",
        "terminated": "fallen",
        "episode": "run",
        "observation_dtype": None,
        "columns": {"push": "force"},
        "env": "Some-v0",
        "control_dt": 0.02,
        "reference": {"random": 1, "expert": 2},
    }
    mapping = mapped(tmp_path, json.dumps(text), "mapping.json")
    data = brought(path, tmp_path / "out", "npz", mapping=mapping)
    assert isinstance(data.observation_space, SPACES.Dict)
    assert data.observation_space["camera"] == SPACES.Box(0, 255, (2, 2, 3), np.uint8)
    assert data.action_space == SPACES.Discrete(4) and data.env == "Some-v0" and data.control_dt == 0.02
    assert data.column("push").tolist() == [0, 1, 2, 3, 4, 5] and data.reference == {"random": 1.0, "expert": 2.0}


def test_parquet_lists_and_folders(tmp_path):
    arrays = flat(recorded((4, "terminated"), (3, "truncated")))
    folder = tmp_path / "many"
    folder.mkdir()
    for number, part in enumerate((slice(0, 2), slice(2, 7))):
        lists = {name: pa.array(list(arrays[name][part])) for name in ("observations", "actions")}
        rest = {name: pa.array(arrays[name][part]) for name in ("rewards", "terminals", "timeouts")}
        pq.write_table(pa.table(lists | rest), folder / f"{number}.parquet")
    text = "observation: observations\naction: actions\nreward: rewards\nterminated: terminals\ntruncated: timeouts\n"
    mapping = mapped(tmp_path, text + "action_low: -1.5\naction_high: [2, 3]\n")
    data = brought(folder, tmp_path / "out", "parquet", mapping=mapping)
    assert transitions(data) == without_following(recorded((4, "terminated"), (3, "truncated")))
    assert data.action_space == SPACES.Box(np.float32([-1.5, -1.5]), np.float32([2, 3]))


def test_csv_types(tmp_path):
    lines = "x,act,reward,end,name\n0,1,0.5,False,a\n1,0,1,true,a\n2,1,-1e3,0,b\n3,0,0,0,b\n"
    (tmp_path / "x.csv").write_text(lines)
    text = "observation: x\naction: act\nreward: reward\nterminated: end\nepisode: name\n"
    mapping = mapped(tmp_path, text + "discrete_actions: 2\nobservation_dtype: uint8\n")
    data = brought(tmp_path / "x.csv", tmp_path / "out", "csv", mapping=mapping)
    assert data.action.tolist() == [1, 0, 1] and data.observation.dtype == np.uint8
    assert data.reward.tolist() == [0.5, 1, -1000] and data.terminated.tolist() == [True, False]
    mapping = mapped(tmp_path, text)
    data, notes = import_dataset(tmp_path / "x.csv", tmp_path / "floats", "csv", ImportOptions(mapping=mapping))
    assert data.action.dtype == np.float32 and "discrete_actions" in notes[0]


# Bad files ----------------------------------------------------------------------------------------------------------

GOOD = flat(recorded((3, "terminated"), (4, "truncated")))


def d4rl(**changed: Any) -> Callable[[Path], Path]:
    """A good D4RL file but for some arrays; None leaves one out."""

    def write(folder: Path) -> Path:
        arrays = {name: array for name, array in (GOOD | changed).items() if array is not None}
        return write_hdf5(folder / "x.hdf5", arrays)

    return write


def altered(change: Callable[[Any], None], **changed: Any) -> Callable[[Path], Path]:
    """A D4RL file that h5py has then done something to."""

    def write(folder: Path) -> Path:
        path = d4rl(**changed)(folder)
        with h5py.File(path, "a") as file:
            change(file)
        return path

    return write


def with_value(name: str, row: int, value: float) -> Callable[[Path], Path]:
    array = GOOD[name].astype(float)
    array[row] = value
    return d4rl(**{name: array})


def huge(file: Any) -> None:
    del file["observations"]
    file.create_dataset("observations", shape=(10**12, 3), dtype="f4")


def bomb(file: Any) -> None:
    for name in GOOD:
        del file[name]
        shape = (200_000_000, 3) if "observations" in name or name == "actions" else (200_000_000,)
        file.create_dataset(name, shape=shape, dtype="f4", chunks=(100_000, *shape[1:]), compression="gzip")


def virtual(file: Any) -> None:
    del file["rewards"]
    layout = h5py.VirtualLayout((7,), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.hdf5", "rewards", shape=(7,))
    file.create_virtual_dataset("rewards", layout)


def outside(file: Any) -> None:
    del file["rewards"]
    file.create_dataset("rewards", shape=(7,), dtype="f4", external=[("elsewhere.bin", 0, 28)])


def linked(link: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file["rewards"]
        file["rewards"] = link

    return change


def replaced(name: str, **dataset: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        if name in file:
            del file[name]
        file.create_dataset(name, **dataset)

    return change


def cycle(file: Any) -> None:
    group = file.create_group("infos")
    group["again"] = group


def doubling(file: Any) -> None:
    """Twenty groups, each twice in the one before: a million paths."""
    group = file.create_group("infos")
    for _ in range(12):
        below = group.create_group("a")
        group["b"] = below
        group = below
    group["x"] = np.zeros(7)


def cut(build: Callable[[Path], Path], keep: float) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = build(folder)
        path.write_bytes(path.read_bytes()[: int(len(path.read_bytes()) * keep)])
        return path

    return write


def corrupt_chunk(folder: Path) -> Path:
    path = write_hdf5(folder / "x.hdf5", GOOD, compression="gzip", chunks=True)
    with h5py.File(path) as file:
        where = file["observations"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[where.byte_offset + 2 : where.byte_offset + where.size] = b"\xff" * (where.size - 2)
    path.write_bytes(content)
    return path


def robomimic(change: Callable[[Any], None], **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_robomimic(folder / "x.hdf5", lifted((3, "terminated"), (2, "truncated")), **options)
        with h5py.File(path, "a") as file:
            change(file)
        return path

    return write


def file_of(content: bytes | str, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def npz_of(arrays: dict[str, Any], **replaced: bytes) -> Callable[[Path], Path]:
    """An .npz whose members may be replaced byte by byte."""

    def write(folder: Path) -> Path:
        path = folder / "x.npz"
        np.savez(folder / "plain.npz", **arrays)
        with zipfile.ZipFile(folder / "plain.npz") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, replaced.get(name.removesuffix(".npy"), old.read(name)))
        (folder / "plain.npz").unlink()
        return path

    return write


def npy(shape: tuple[int, ...], descr: str = "<f4", *, zeros: int = 0) -> bytes:
    """An array that declares this shape, with so many bytes behind it."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"shape": shape, "fortran_order": False, "descr": descr})
    return stream.getvalue() + bytes(zeros)


OG = ogbench_arrays(recorded((3, ""), (4, "")))


def table_of(kind: str, change: Callable[[dict[str, Any]], None] = lambda named: None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        named = columns(recorded((3, "terminated"), (4, "truncated")))
        change(named)
        return write_table(folder / f"x.{kind}", named)

    return write


def many_rows(folder: Path) -> Path:
    """A Parquet file in which four million equal rows take a few kilobytes."""
    path = folder / "x.parquet"
    zeros = pa.array(np.zeros(1_000_000, np.int8))
    rows_ = pa.table(dict.fromkeys(("x", "y", "z", "a", "b", "reward", "fallen", "late", "run"), zeros))
    with pq.ParquetWriter(path, rows_.schema, compression="zstd") as writer:
        for _ in range(4):
            writer.write_table(rows_)
    return path


def ragged(named: dict[str, Any]) -> None:
    named["x"] = pa.array([[1.0]] * 5 + [[1.0, 2.0], [1.0]])


def missing(named: dict[str, Any]) -> None:
    named["x"] = pa.array([1.0, 2.0, None, 4.0, 5.0, 6.0, 7.0])


def shuffled(named: dict[str, Any]) -> None:
    named["run"] = np.array([0, 0, 1, 1, 0, 2, 2])


LATE = MAPPING + "truncated: late\n"

# name: (what writes the file, format, mapping, options)
CASES: dict[str, tuple[Callable[[Path], Path], str, str | None, dict[str, Any]]] = {
    "hdf5-missing-file": (lambda folder: folder / "none.hdf5", "d4rl", None, {}),
    "hdf5-empty-file": (file_of(b"", "x.hdf5"), "d4rl", None, {}),
    "hdf5-other-file": (file_of("step,reward\n0,1\n", "x.hdf5"), "d4rl", None, {}),
    "hdf5-folder": (lambda folder: folder, "d4rl", None, {}),
    "hdf5-cut-off": (cut(d4rl(), 0.5), "d4rl", None, {}),
    "hdf5-corrupt-chunk": (corrupt_chunk, "d4rl", None, {}),
    "hdf5-huge": (altered(huge), "d4rl", None, {}),
    "hdf5-bomb": (altered(bomb), "d4rl", None, {}),
    "hdf5-virtual": (altered(virtual), "d4rl", None, {}),
    "hdf5-outside": (altered(outside), "d4rl", None, {}),
    "hdf5-external-link": (altered(linked(h5py.ExternalLink("/etc/passwd", "x"))), "d4rl", None, {}),
    "hdf5-soft-link": (altered(linked(h5py.SoftLink("/actions"))), "d4rl", None, {}),
    "hdf5-objects": (
        altered(replaced("rewards", data=[np.zeros(i, "f4") for i in range(1, 8)], dtype=h5py.vlen_dtype("f4"))),
        "d4rl",
        None,
        {},
    ),
    "hdf5-compound": (altered(replaced("rewards", data=np.zeros(7, "f4,i4"))), "d4rl", None, {}),
    "hdf5-texts": (altered(replaced("rewards", data=["a"] * 7)), "d4rl", None, {}),
    "hdf5-no-shape": (altered(replaced("rewards", data=h5py.Empty("f4"))), "d4rl", None, {}),
    "hdf5-cycle": (altered(cycle), "d4rl", None, {}),
    "hdf5-doubling": (altered(doubling), "d4rl", None, {}),
    "hdf5-group-for-array": (altered(lambda f: (f.move("rewards", "r"), f.create_group("rewards"))), "d4rl", None, {}),
    "d4rl-no-rewards": (d4rl(rewards=None, reward=GOOD["rewards"]), "d4rl", None, {}),
    "d4rl-no-boundaries": (d4rl(timeouts=None, next_observations=None), "d4rl", None, {}),
    "d4rl-both-limits": (d4rl(), "d4rl", None, {"max_episode_steps": 5}),
    "d4rl-limit-zero": (d4rl(timeouts=None, next_observations=None), "d4rl", None, {"max_episode_steps": 0}),
    "d4rl-mapping": (d4rl(), "d4rl", LATE, {}),
    "d4rl-pickle": (d4rl(), "d4rl", None, {"unsafe_pickle": True}),
    "d4rl-lengths": (d4rl(rewards=GOOD["rewards"][:-1]), "d4rl", None, {}),
    "d4rl-no-rows": (d4rl(**{name: array[:0] for name, array in GOOD.items()}), "d4rl", None, {}),
    "d4rl-next-of-another-shape": (d4rl(next_observations=np.zeros((7, 2), "f4")), "d4rl", None, {}),
    "d4rl-two-rewards": (d4rl(rewards=np.zeros((7, 2))), "d4rl", None, {}),
    "d4rl-odd-flag": (with_value("terminals", 4, 2), "d4rl", None, {}),
    "d4rl-nan-reward": (with_value("rewards", 3, np.nan), "d4rl", None, {}),
    "d4rl-infinite-action": (with_value("actions", 5, np.inf), "d4rl", None, {}),
    "d4rl-nan-observation": (
        d4rl(observations=np.full((7, 3), np.nan, "f4"), next_observations=None),
        "d4rl",
        None,
        {},
    ),
    "d4rl-nan-column": (altered(replaced("infos/x", data=np.full(7, np.nan))), "d4rl", None, {}),
    "d4rl-unknown-column": (altered(replaced("infos/qpos", data=np.zeros(7))), "d4rl", None, {"columns": ("qpo",)}),
    "d4rl-negative-choice": (d4rl(actions=np.array([0, 1, -1, 0, 0, 0, 0])), "d4rl", None, {}),
    "d4rl-complex": (d4rl(actions=np.zeros((7, 2), complex)), "d4rl", None, {}),
    "robomimic-states-only": (robomimic(lambda f: f.__delitem__("data/demo_0/obs")), "robomimic", None, {}),
    "robomimic-no-dones": (robomimic(lambda f: f.__delitem__("data/demo_1/dones")), "robomimic", None, {}),
    "robomimic-next-obs-short": (
        robomimic(replaced("data/demo_1/next_obs/state", data=np.zeros((1, 3), "f4"))),
        "robomimic",
        None,
        {},
    ),
    "robomimic-other-entries": (robomimic(lambda f: f.__delitem__("data/demo_1/obs/image")), "robomimic", None, {}),
    "robomimic-other-shape": (
        robomimic(replaced("data/demo_1/obs/state", data=np.zeros((2, 4), "f4"))),
        "robomimic",
        None,
        {},
    ),
    "robomimic-no-demo": (robomimic(lambda f: f.create_group("data/extra")), "robomimic", None, {}),
    "robomimic-env-args": (robomimic(lambda f: None, env_args="{'env_name': 1}"), "robomimic", None, {}),
    "robomimic-deep-env-args": (robomimic(lambda f: None, env_args="[" * 20_000), "robomimic", None, {}),
    "npz-no-zip": (file_of("not a zip", "x.npz"), "ogbench", None, {}),
    "npz-cut-off": (cut(npz_of(OG), 0.6), "ogbench", None, {}),
    "npz-huge": (npz_of(OG, observations=npy((10**12, 3))), "ogbench", None, {}),
    "npz-negative": (npz_of(OG, observations=npy((-4, 3))), "ogbench", None, {}),
    "npz-bomb": (npz_of(OG, observations=npy((5_000_000,), zeros=20_000_000)), "ogbench", None, {}),
    "npz-objects": (npz_of(OG | {"actions": np.array([{}] * 9)}), "ogbench", None, {}),
    "npz-no-header": (npz_of(OG, actions=b"garbage"), "ogbench", None, {}),
    "ogbench-no-actions": (npz_of({"observations": OG["observations"], "act": OG["actions"]}), "ogbench", None, {}),
    "ogbench-lengths": (npz_of(OG | {"actions": OG["actions"][1:]}), "ogbench", None, {}),
    "ogbench-single-rows": (npz_of(OG | {"terminals": np.ones(9)}), "ogbench", None, {}),
    "parquet-no-mapping": (table_of("parquet"), "parquet", None, {}),
    "parquet-cut-off": (cut(table_of("parquet"), 0.5), "parquet", LATE, {}),
    "parquet-other-file": (file_of("a,b\n", "x.parquet"), "parquet", LATE, {}),
    "parquet-empty-folder": (lambda folder: folder, "parquet", LATE, {}),
    "parquet-ragged": (table_of("parquet", ragged), "parquet", LATE, {}),
    "parquet-missing-value": (table_of("parquet", missing), "parquet", LATE, {}),
    "parquet-many-rows": (many_rows, "parquet", LATE, {}),
    "parquet-texts": (table_of("parquet", lambda n: n.update(x=["a"] * 7)), "parquet", LATE, {}),
    "csv-empty": (file_of("", "x.csv"), "csv", LATE, {}),
    "csv-header-only": (file_of("x,y,z,a,b,reward,fallen,late\n", "x.csv"), "csv", LATE, {}),
    "csv-no-number": (table_of("csv", lambda n: n.update(x=["one"] * 7)), "csv", LATE, {}),
    "csv-no-value": (table_of("csv", lambda n: n.update(x=[1, 2, "", 4, 5, 6, 7])), "csv", LATE, {}),
    "csv-short-row": (file_of("x,y,z,a,b,reward,fallen,late\n1,2,3\n", "x.csv"), "csv", LATE, {}),
    "csv-column-twice": (file_of("x,y,z,a,b,reward,fallen,late,x\n" + "1," * 8 + "1\n", "x.csv"), "csv", LATE, {}),
    "table-episode-twice": (table_of("csv", shuffled), "csv", MAPPING + "episode: run\n", {}),
    "mapping-unknown-key": (table_of("csv"), "csv", MAPPING + "truncate: late\n", {}),
    "mapping-lacks-key": (table_of("csv"), "csv", "observation: x\naction: a\nreward: reward\n", {}),
    "mapping-unknown-column": (table_of("csv"), "csv", LATE.replace("fallen", "falen"), {}),
    "mapping-no-boundaries": (table_of("csv"), "csv", MAPPING, {}),
    "mapping-both-limits": (table_of("csv"), "csv", LATE, {"max_episode_steps": 4}),
    "mapping-not-yaml": (table_of("csv"), "csv", "observation: [x", {}),
    "mapping-no-object": (table_of("csv"), "csv", "- x\n- y\n", {}),
    "mapping-wrong-value": (table_of("csv"), "csv", LATE.replace("[a, b]", "{a: 1}"), {}),
    "mapping-dtype": (table_of("csv"), "csv", LATE + "observation_dtype: float\n", {}),
    "mapping-one-bound": (table_of("csv"), "csv", LATE + "action_low: -1\n", {}),
    "mapping-bounds-shape": (table_of("csv"), "csv", LATE + "action_low: [-1, -1, -1]\naction_high: 1\n", {}),
    "mapping-bounds-exceeded": (table_of("csv"), "csv", LATE + "action_low: -0.1\naction_high: 0.1\n", {}),
    "mapping-bounds-crossed": (table_of("csv"), "csv", LATE + "action_low: 1\naction_high: -1\n", {}),
    "mapping-discrete": (table_of("npz"), "npz", LATE + "discrete_actions: 3\n", {}),
    "mapping-discrete-exceeded": (
        table_of("npz", lambda n: n.update(act=np.arange(7))),
        "npz",
        LATE.replace("[a, b]", "act") + "discrete_actions: 3\n",
        {},
    ),
}


def check(name: str, message: str) -> None:
    kept = json.loads(MESSAGES.read_text()) if MESSAGES.exists() else {}
    if os.environ.get("UPDATE_MESSAGES") and kept.get(name) != message:
        MESSAGES.write_text(json.dumps(dict(sorted((kept | {name: message}).items())), indent=1) + "\n")
        kept[name] = message
    assert name in kept, f"no message kept for {name}: UPDATE_MESSAGES=1"
    assert message == kept[name]


def refused(path: Path, folder: Path, format: str, options: dict[str, Any]) -> str:
    """The message, without what differs between machines and versions."""
    before = {p.name for p in folder.iterdir()}
    with pytest.raises(UsageError) as caught:
        import_dataset(path, folder / "out", format, ImportOptions(**options))
    assert {p.name for p in folder.iterdir()} == before  # nothing half-written is left
    message = str(caught.value).replace(str(folder), "FOLDER")
    message = re.sub(r"cannot be read \(.*?\)(?=\. |: )", "cannot be read (REASON)", message, flags=re.S)
    return re.sub(r"in a file of [\d.,]+ [KM]?i?B|[\d.,]+ [KM]?iB are there", "SIZE", message)


@pytest.mark.parametrize("name", CASES)
def test_bad_files_get_one_clear_message(name, tmp_path, monkeypatch):
    for module in (hdf5, npz, arrow):
        monkeypatch.setattr(module, "FREE", 2**20)
    build, format, mapping, options = CASES[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    path = build(folder)
    if mapping is not None:
        options = options | {"mapping": mapped(folder, mapping)}
    check(name, refused(path, folder, format, options))


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes metadata.json."""

    def write(path: Path) -> None:
        file = path / "data" / "metadata.json"
        metadata = json.loads(file.read_text())
        change(metadata)
        file.write_text(json.dumps(metadata))

    return write


def in_hdf5(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
            change(file)

    return write


def space(key: str, value: Any) -> Callable[[Path], None]:
    return edited(lambda m: m.update({key: value if isinstance(value, str) else json.dumps(value)}))


def box(**changed: Any) -> dict[str, Any]:
    return {"type": "Box", "dtype": "float32", "shape": [2], "low": [-1, -1], "high": [1, 1]} | changed


def frame_of_another_size(file: Any) -> None:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(stream, format="JPEG")
    del file["episode_1/observations/camera"]
    frames = file["episode_1/observations"].create_dataset("camera", (2,), dtype=h5py.vlen_dtype("u1"))
    frames[:] = [np.frombuffer(stream.getvalue(), np.uint8)] * 2


def break_heap(path: Path) -> None:
    """An object of no size among the texts: HDF5 2.0 itself goes round in it forever."""
    file = path / "data" / "main_data.hdf5"
    content = bytearray(file.read_bytes())
    heap = content.index(b"GCOL\x01")
    content[heap + 16 : heap + 32] = bytes(16)
    file.write_bytes(content)


def ends_early(file: Any) -> None:
    file["episode_0/terminations"][1] = True


MINARI_CASES: dict[str, Callable[[Path], None]] = {
    "minari-no-metadata": lambda path: (path / "data" / "metadata.json").unlink(),
    "minari-metadata-cut": lambda path: (path / "data" / "metadata.json").write_text('{"total_episodes": 2'),
    "minari-metadata-list": lambda path: (path / "data" / "metadata.json").write_text("[]"),
    "minari-no-space": edited(lambda m: m.pop("observation_space")),
    "minari-space-no-json": space("observation_space", "Box(3,)"),
    "minari-unknown-space": space("observation_space", {"type": "Graph"}),
    "minari-space-too-deep": space("observation_space", '{"type":"Tuple","subspaces":[' * 40 + "1" + "]}" * 40),
    "minari-space-nested-json": space("observation_space", "[" * 20_000),
    "minari-box-huge": space("observation_space", box(shape=[10**12])),
    "minari-box-bounds": space("observation_space", box(low=[2, 2])),
    "minari-box-dtype": space("observation_space", box(dtype="object")),
    "minari-names-collide": space(
        "observation_space",
        {"type": "Dict", "subspaces": {"a.b": box(), "a": {"type": "Dict", "subspaces": {"b": box()}}}},
    ),
    "minari-text-alone": space("observation_space", {"type": "Text", "max_length": 3}),
    "minari-action-dict": space("action_space", {"type": "Dict", "subspaces": {"a": box()}}),
    "minari-action-none": space("action_space", {"type": "Discrete", "n": 0}),
    "minari-episodes-missing": edited(lambda m: m.update(total_episodes=3)),
    "minari-no-episodes": edited(lambda m: m.update(total_episodes=0)),
    "minari-steps-miscounted": edited(lambda m: m.update(total_steps=99)),
    "minari-layout": edited(lambda m: m.update(data_format="zarr")),
    "minari-no-data": lambda path: (path / "data" / "main_data.hdf5").unlink(),
    "minari-data-elsewhere": lambda path: (
        (path / "data" / "main_data.hdf5").rename(path.parent.parent / "elsewhere"),
        (path / "data" / "main_data.hdf5").symlink_to(path.parent.parent / "elsewhere"),
    )[1],
    "minari-external-episode": in_hdf5(
        lambda f: (f.__delitem__("episode_1"), f.__setitem__("episode_1", h5py.ExternalLink("other.hdf5", "episode_0")))
    ),
    "minari-ends-early": in_hdf5(ends_early),
    "minari-observation-short": in_hdf5(lambda f: f["episode_1/observations/body/joints"].resize((1, 3))),
    "minari-observation-shape": in_hdf5(replaced("episode_1/observations/count", data=np.zeros((2, 3), int))),
    "minari-observation-missing": in_hdf5(lambda f: f.__delitem__("episode_1/observations/count")),
    "minari-observation-type": in_hdf5(replaced("episode_1/observations/count", data=np.full((2, 2), 0.5))),
    "minari-frame-size": in_hdf5(frame_of_another_size),
    "minari-frame-damaged": in_hdf5(lambda f: f["episode_0/observations/camera"].__setitem__(1, 0)),
    "minari-heap-damaged": break_heap,
    "minari-infos-missing": in_hdf5(lambda f: f.__delitem__("episode_1/infos/success")),
    "minari-infos-short": in_hdf5(replaced("episode_1/infos/success", data=np.zeros(1, bool))),
    "minari-nan": in_hdf5(replaced("episode_1/observations/body/joints", data=np.full((2, 3), np.nan))),
    "minari-no-step": in_hdf5(replaced("episode_1/rewards", data=np.zeros(0))),
}


@pytest.mark.parametrize("name", MINARI_CASES)
def test_bad_minari_datasets_get_one_clear_message(name, minari, tmp_path):
    path = minari_dataset(minari, "set-v0")
    MINARI_CASES[name](path)
    check(name, refused(path, path.parent, "minari", {}))


ARROW_CASES: dict[str, Callable[[Path], None]] = {
    "arrow-cut-off": lambda data: os.truncate(data / "1" / "part-0.arrow", 300),
    "arrow-no-part": lambda data: (data / "1" / "part-0.arrow").unlink(),
    "arrow-other-columns": lambda data: write_arrow(data / "1" / "part-0.arrow", {"rewards": [1.0, 0.0]}),
    "arrow-elsewhere": lambda data: (
        (data / "1").rename(data.parent.parent / "elsewhere"),
        (data / "1").symlink_to(data.parent.parent / "elsewhere"),
    )[1],
}


def write_arrow(path: Path, named: dict[str, Any]) -> None:
    rows_ = pa.table(named)
    with pa.ipc.new_file(path, rows_.schema) as writer:
        writer.write_table(rows_)


@pytest.mark.parametrize("name", ARROW_CASES)
def test_bad_arrow_datasets_get_one_clear_message(name, minari, tmp_path):
    path = minari_dataset(minari, "set-v0", data_format="arrow")
    ARROW_CASES[name](path / "data")
    check(name, refused(path, path.parent, "minari", {}))


def test_every_message_kept_is_of_a_case():
    assert json.loads(MESSAGES.read_text()).keys() == CASES.keys() | MINARI_CASES.keys() | ARROW_CASES.keys()


def test_detection_never_raises(tmp_path):
    for name, content in {
        "a.hdf5": b"\x89HDF\r\n\x1a\n" + b"\xff" * 500,
        "b.npz": b"PK\x03\x04",
        "c.parquet": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        for format in ("minari", "d4rl", "robomimic", "ogbench", "npz", "parquet", "csv"):
            from ctrlrl.data.importers import find_format

            find_format(format).detect(tmp_path / name)
    with pytest.raises(UsageError, match="looks like none"):
        detect(tmp_path / "a.hdf5")
