"""Small files in every format that can be imported, and the episodes that they hold: for tests and for the fuzzer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ctrlrl.data.store import Dataset, Episode

Array = Any
FPS = 10


@dataclass(frozen=True, kw_only=True)
class File:
    """A file or folder, and what importing it gives."""

    name: str
    """Of this kind of file."""
    format: str
    path: Path
    episodes: list[Episode]
    options: dict[str, Any] = field(default_factory=dict)
    """Of ImportOptions; a mapping lies beside the file."""

    @property
    def rows(self) -> int:
        """Transitions in it."""
        return sum(len(episode.reward) for episode in self.episodes)


def recorded(*parts: tuple[int, str], seed: int = 0) -> list[Episode]:
    """Episodes of so many steps, each `terminated` or `truncated`, with observations (3,) and actions (2,)."""
    random = np.random.default_rng(seed)
    return [
        Episode(
            observation=random.normal(size=(steps + 1, 3)).astype(np.float32),
            action=random.uniform(-1, 1, (steps, 2)).astype(np.float32),
            reward=random.normal(size=steps).astype(np.float32),
            terminated=ends == "terminated",
            truncated=ends == "truncated",
        )
        for steps, ends in parts
    ]


EPISODES = recorded((4, "terminated"), (6, "truncated"), (3, "terminated"))


def differences(data: Dataset, episodes: list[Episode], *, entry: str = "") -> list[str]:
    """Where a dataset is not what these episodes are; `entry` is the observation entry that is compared."""
    found = []
    if data.lengths.tolist() != (lengths := [len(episode.reward) for episode in episodes]):
        return [f"lengths {data.lengths.tolist()}, not {lengths}"]
    for i, expected in enumerate(episodes):
        episode = data.episode(i)
        observation = episode.observation[entry] if entry else episode.observation
        for name, mine, theirs in (
            ("observation", observation, expected.observation),
            ("action", episode.action, expected.action),
            ("reward", episode.reward, expected.reward),
            ("terminated", episode.terminated, expected.terminated),
            ("truncated", episode.truncated, expected.truncated),
        ):
            if not np.array_equal(np.asarray(mine), np.asarray(theirs)):
                found.append(f"{name} of episode {i}")
    return found


def stood_in(episodes: list[Episode]) -> list[Episode]:
    """What is left where final observations are not kept: the last one twice, or the last action dropped."""
    found = []
    for episode in episodes:
        seen: Any = episode.observation
        if episode.terminated:
            found.append(replace(episode, observation=np.concatenate([seen[:-1], seen[-2:-1]])))
        elif len(episode.reward) > 1:
            action, reward = episode.action[:-1], episode.reward[:-1]
            found.append(replace(episode, observation=seen[:-1], action=action, reward=reward))
    return found


def flat(episodes: list[Episode]) -> dict[str, Array]:
    """The rows of all episodes one behind the other."""

    def ends(which: str) -> Array:
        flags = [np.arange(len(e.reward)) == len(e.reward) - 1 for e in episodes]
        return np.concatenate([flag & getattr(e, which) for flag, e in zip(flags, episodes, strict=True)])

    return {
        "observations": np.concatenate([e.observation[:-1] for e in episodes]),
        "actions": np.concatenate([e.action for e in episodes]),
        "rewards": np.concatenate([e.reward for e in episodes]),
        "terminals": ends("terminated"),
        "timeouts": ends("truncated"),
        "next_observations": np.concatenate([e.observation[1:] for e in episodes]),
    }


# --- HDF5, npz and tables ---------------------------------------------------------------------------------------------


def d4rl(folder: Path, *, following: bool = True, **options: Any) -> File:
    """D4RL; `options` are h5py's, such as compression."""
    import h5py

    path, arrays = folder / "x.hdf5", flat(EPISODES)
    if not following:
        del arrays["next_observations"]
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **options)
    episodes = EPISODES if following else stood_in(EPISODES)
    return File(name="d4rl" if following else "d4rl-short", format="d4rl", path=path, episodes=episodes)


def minari(folder: Path) -> File:
    """A Minari dataset in HDF5."""
    import h5py

    home = folder / "x-v0"
    (home / "data").mkdir(parents=True)
    with h5py.File(home / "data" / "main_data.hdf5", "w", track_order=True) as file:
        for i, episode in enumerate(EPISODES):
            group = file.create_group(f"episode_{i}")
            group.attrs["id"], group.attrs["total_steps"] = i, len(episode.reward)
            last = np.arange(len(episode.reward)) == len(episode.reward) - 1
            group["observations"], group["actions"], group["rewards"] = (
                episode.observation,
                episode.action,
                episode.reward,
            )
            group["terminations"], group["truncations"] = last & episode.terminated, last & episode.truncated

    def box(width: int, bound: float) -> str:
        bounds = {"low": [-bound] * width, "high": [bound] * width}
        return json.dumps({"type": "Box", "dtype": "float32", "shape": [width], **bounds})

    metadata = {
        "total_episodes": len(EPISODES),
        "total_steps": sum(len(e.reward) for e in EPISODES),
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": box(3, 10.0),
        "action_space": box(2, 1.0),
        "dataset_id": "x-v0",
        "minari_version": "0.5.4",
    }
    (home / "data" / "metadata.json").write_text(json.dumps(metadata))
    return File(name="minari", format="minari", path=home, episodes=EPISODES)


def minari_parquet(folder: Path) -> File:
    """A Minari dataset in Parquet."""
    pa, pq = _arrow()
    made = minari(folder)
    home = made.path / "data"
    (home / "main_data.hdf5").unlink()
    metadata = json.loads((home / "metadata.json").read_text()) | {"data_format": "parquet"}
    (home / "metadata.json").write_text(json.dumps(metadata))
    for i, episode in enumerate(EPISODES):
        last = np.arange(len(episode.reward)) == len(episode.reward) - 1
        columns = {"rewards": episode.reward, "terminations": last & episode.terminated}
        columns["truncations"] = last & episode.truncated
        arrays = {name: pa.array(np.append(column, column[-1:])) for name, column in columns.items()}
        arrays["observations"] = _lists(episode.observation, pa)
        arrays["actions"] = _lists(np.concatenate([episode.action, episode.action[-1:]]), pa)
        (home / str(i)).mkdir()
        pq.write_table(pa.table(arrays), home / str(i) / "part-0.parquet")
        (home / str(i) / "metadata.json").write_text(json.dumps({"id": i, "total_steps": len(episode.reward)}))
    return replace(made, name="minari-parquet")


def robomimic(folder: Path) -> File:
    """robomimic, with next observations."""
    import h5py

    path = folder / "x.hdf5"
    episodes = [replace(e, reward=np.float32(np.arange(len(e.reward)) == len(e.reward) - 1)) for e in EPISODES]
    episodes = [e if e.terminated else replace(e, reward=np.zeros_like(e.reward)) for e in episodes]
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}})
        for i, episode in enumerate(episodes):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = len(episode.reward)
            demo["obs/state"], demo["next_obs/state"] = episode.observation[:-1], episode.observation[1:]
            demo["actions"], demo["rewards"] = episode.action, episode.reward
            demo["dones"] = (episode.reward > 0).astype(int)
            demo["states"] = np.zeros((len(episode.reward), 2))
    return File(name="robomimic", format="robomimic", path=path, episodes=episodes)


def ogbench(folder: Path) -> File:
    """OGBench: the last row of each episode is an observation only."""
    path = folder / "antmaze-large-navigate-v0.npz"
    rows = [len(e.reward) + 1 for e in EPISODES]
    np.savez(
        path,
        observations=np.concatenate([e.observation for e in EPISODES]),
        actions=np.concatenate([np.concatenate([e.action, e.action[-1:]]) for e in EPISODES]),
        terminals=np.concatenate([np.arange(n) == n - 1 for n in rows]).astype(np.float32),
    )
    episodes = [replace(e, reward=np.zeros_like(e.reward), terminated=False, truncated=True) for e in EPISODES]
    return File(name="ogbench", format="ogbench", path=path, episodes=episodes)


MAPPING = """\
observation: [x, y, z]
next_observation: [x2, y2, z2]
action: [a, b]
reward: reward
terminated: fallen
truncated: late
"""


def table(folder: Path, kind: str) -> File:
    """npz, Parquet or CSV with a column for each number."""
    rows = flat(EPISODES)
    named = dict(zip("xyz", rows["observations"].T, strict=True)) | dict(zip("ab", rows["actions"].T, strict=True))
    named |= dict(zip(("x2", "y2", "z2"), rows["next_observations"].T, strict=True))
    named |= {"reward": rows["rewards"], "fallen": rows["terminals"].astype(int), "late": rows["timeouts"].astype(int)}
    path, mapping = folder / f"x.{kind}", folder / "mapping.yaml"
    mapping.write_text(MAPPING)
    episodes = EPISODES
    if kind == "npz":
        np.savez(path, **named)
    elif kind == "parquet":
        pa, pq = _arrow()
        pq.write_table(pa.table({name: pa.array(array) for name, array in named.items()}), path, row_group_size=5)
    else:
        lines = [",".join(named), *(",".join(map(repr, row)) for row in zip(*_plain(named), strict=True))]
        path.write_text("\n".join(lines) + "\n")
    return File(name=kind, format=kind, path=path, episodes=episodes, options={"mapping": mapping})


def _plain(named: Mapping[str, Array]) -> list[list[Any]]:
    return [[float(v) if array.dtype.kind == "f" else int(v) for v in array] for array in named.values()]


# --- imitation --------------------------------------------------------------------------------------------------------


def imitation(folder: Path, episodes: list[Episode] = EPISODES, **changed: Array | None) -> File:
    """An .npz of `imitation`; `changed` replaces arrays, or leaves them out."""
    ends = np.cumsum([len(e.reward) for e in episodes])
    arrays = {
        "obs": np.concatenate([e.observation for e in episodes]),
        "acts": np.concatenate([e.action for e in episodes]),
        "infos": np.array([{} for _ in range(int(ends[-1]))], object),
        "terminal": np.array([e.terminated for e in episodes]),
        "indices": ends[:-1],
        "rews": np.concatenate([e.reward for e in episodes]).astype(np.float64),
    }
    arrays = {name: array for name, array in {**arrays, **changed}.items() if array is not None}
    np.savez_compressed(folder / "x.npz", **arrays)
    return File(name="imitation", format="imitation", path=folder / "x.npz", episodes=episodes)


def imitation_folder(folder: Path, episodes: list[Episode] = EPISODES, **changed: Any) -> File:
    """A folder as `datasets` saves it for `imitation`; `changed` replaces columns."""
    pa, _ = _arrow()
    path = folder / "x"
    path.mkdir()

    def info(e: Episode, t: int) -> str:
        return json.dumps({"TimeLimit.truncated": e.truncated and t == len(e.reward) - 1})

    columns = {
        "obs": pa.array([e.observation.tolist() for e in episodes], pa.list_(pa.list_(pa.float32()))),
        "acts": pa.array([e.action.tolist() for e in episodes], pa.list_(pa.list_(pa.float32()))),
        "infos": pa.array([[info(e, t) for t in range(len(e.reward))] for e in episodes]),
        "terminal": pa.array([True for _ in episodes]),
        "rews": pa.array([e.reward.tolist() for e in episodes], pa.list_(pa.float64())),
    }
    named = {name: column for name, column in {**columns, **changed}.items() if column is not None}
    stream = pa.table(named)
    with pa.OSFile(str(path / "data-00000-of-00001.arrow"), "w") as file, pa.ipc.new_stream(file, stream.schema) as out:
        out.write_table(stream)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (path / "dataset_info.json").write_text(json.dumps({"features": {name: {} for name in named}}))
    return File(name="imitation-folder", format="imitation", path=path, episodes=episodes)


# --- Stable-Baselines3 ------------------------------------------------------------------------------------------------


def sb3(folder: Path, *, environments: int = 1, protocol: int = 5, kind: str = "ReplayBuffer") -> File:
    """A pickled replay buffer. With several environments, each has the episodes in another order."""
    import pickle

    from stable_baselines3.common import buffers
    from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

    inner = gym.spaces.Box(-10, 10, (3,))
    plain = kind in ("ReplayBuffer", "NStepReplayBuffer")
    space: Any = inner if plain else gym.spaces.Dict({"state": inner})
    made: Any = HerReplayBuffer if kind == "HerReplayBuffer" else getattr(buffers, kind)
    extra = {"env": None} if kind == "HerReplayBuffer" else {}
    action = gym.spaces.Box(-1, 1, (2,))
    buffer = made(40 * environments, space, action, device="cpu", n_envs=environments, **extra)
    orders = [EPISODES[i:] + EPISODES[:i] for i in range(environments)]
    rows = [flat(order) for order in orders]
    for t in range(len(rows[0]["rewards"])):
        add(buffer, [{name: array[t] for name, array in row.items()} for row in rows], plain)
    path = folder / "x.pkl"
    path.write_bytes(pickle.dumps(buffer, protocol))
    name = f"sb3-{kind}-{environments}-{protocol}"
    episodes = [episode for order in orders for episode in order]
    return File(name=name, format="sb3", path=path, episodes=episodes, options={"unsafe_pickle": True})


def add(buffer: Any, rows: list[dict[str, Array]], plain: bool = True) -> None:
    """Add a row of each environment to a buffer, as SB3's algorithms do."""
    seen, after = (np.stack([row[name] for row in rows]) for name in ("observations", "next_observations"))
    infos = [{"TimeLimit.truncated": bool(row["timeouts"])} for row in rows]
    buffer.add(
        seen if plain else {"state": seen},
        after if plain else {"state": after},
        np.stack([row["actions"] for row in rows]),
        np.array([row["rewards"] for row in rows]),
        np.array([row["terminals"] or row["timeouts"] for row in rows]),
        infos,
    )


# --- LeRobot ----------------------------------------------------------------------------------------------------------


def lerobot(
    folder: Path, version: str = "v3.0", episodes: list[Episode] = EPISODES, *, video: bool = False, **changed: Any
) -> File:
    """A LeRobotDataset with rewards and success; `changed` replaces columns of rows, or leaves them out.

    A row for each action: the final observation is not in it.
    """
    pa, pq = _arrow()
    path = folder / "x"
    rows = flat(episodes)
    lengths = [len(e.reward) for e in episodes]
    numbers = np.concatenate([np.arange(n) for n in lengths])
    columns: dict[str, Any] = {
        "observation.state": rows["observations"],
        "action": rows["actions"],
        "next.reward": rows["rewards"],
        "next.done": rows["terminals"] | rows["timeouts"],
        "next.success": rows["terminals"],
        "timestamp": (numbers / FPS).astype(np.float32),
        "frame_index": numbers,
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "index": np.arange(sum(lengths)),
        "task_index": np.repeat(np.arange(len(lengths)) % 2, lengths),
    }
    columns = {name: column for name, column in {**columns, **changed}.items() if column is not None}
    features = {
        name: {"dtype": array.dtype.name, "shape": list(array.shape[1:]) or [1], "names": None}
        for name, array in columns.items()
    }
    if video:
        names = ["height", "width", "channels"]
        features["observation.images.front"] = {"dtype": "video", "shape": [32, 32, 3], "names": names}
    arrays = {name: _lists(a, pa) if a.ndim > 1 else pa.array(a) for name, a in columns.items()}
    new, tasks = version == "v3.0", ["push", "lift"]
    info = {
        "codebase_version": version,
        "robot_type": "toy",
        "total_episodes": len(episodes),
        "total_frames": sum(lengths),
        "total_tasks": 2,
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if new
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if new
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (path / "meta").mkdir(parents=True)
    (path / "data" / "chunk-000").mkdir(parents=True)
    (path / "meta" / "info.json").write_text(json.dumps(info, indent=2))
    everything, starts = pa.table(arrays), np.cumsum([0, *lengths])
    if new:
        pq.write_table(everything, path / "data" / "chunk-000" / "file-000.parquet", row_group_size=5)
        described = {
            "episode_index": np.arange(len(lengths)),
            "length": np.array(lengths),
            "data/chunk_index": np.zeros(len(lengths), int),
            "data/file_index": np.zeros(len(lengths), int),
            "dataset_from_index": starts[:-1],
            "dataset_to_index": starts[1:],
        }
        if video:
            place = "videos/observation.images.front"
            described |= {f"{place}/{name}": np.zeros(len(lengths), int) for name in ("chunk_index", "file_index")}
            described |= {f"{place}/from_timestamp": starts[:-1] / FPS, f"{place}/to_timestamp": starts[1:] / FPS}
        named = {name: pa.array(array) for name, array in described.items()}
        named["tasks"] = pa.array([[tasks[i % 2]] for i in range(len(lengths))])
        (path / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        pq.write_table(pa.table(named), path / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
        pq.write_table(pa.table({"task_index": [0, 1], "task": tasks}), path / "meta" / "tasks.parquet")
    else:
        lines = [{"task_index": i, "task": task} for i, task in enumerate(tasks)]
        (path / "meta" / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines = [{"episode_index": i, "tasks": [tasks[i % 2]], "length": n} for i, n in enumerate(lengths)]
        (path / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for i, n in enumerate(lengths):
            part = everything.slice(int(starts[i]), n)
            pq.write_table(part, path / "data" / "chunk-000" / f"episode_{i:06d}.parquet")
    if video:
        place = (
            path / "videos" / ("observation.images.front/chunk-000" if new else "chunk-000/observation.images.front")
        )
        place.mkdir(parents=True)
        if new:
            write_video(place / "file-000.mp4", pictures(sum(lengths)))
        else:
            for i, n in enumerate(lengths):
                write_video(place / f"episode_{i:06d}.mp4", pictures(n, int(starts[i])))
    name = f"lerobot-{version}{'-video' if video else ''}"
    return File(name=name, format="lerobot", path=path, episodes=stood_in(episodes))


def pictures(count: int, first: int = 0) -> Array:
    """(count, 32, 32, 3): each of one grey, lighter from one to the next."""
    return np.stack([np.full((32, 32, 3), 15 + 8 * (first + i), np.uint8) for i in range(count)])


def write_video(path: Path, frames: Array, fps: float = FPS) -> None:
    """An MP4 with a frame for each."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"g": "2"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file; `change` alters its value."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_parquet(file: Path, change: Callable[[dict[str, Any]], None], **options: Any) -> None:
    """Rewrite a Parquet file; `change` alters its columns, Arrow's arrays by name."""
    pa, pq = _arrow()
    table = pq.ParquetFile(file).read()
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    change(columns)
    pq.write_table(pa.table(columns), file, **options)


def _lists(array: Array, pa: Any) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def _arrow() -> tuple[Any, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pa, pq
