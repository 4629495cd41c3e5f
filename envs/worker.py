"""Hosts single Gymnasium environments, in this process or as a worker process under any interpreter.

`ctrlrl.envs.gymnasium_backend` imports this file; `ctrlrl.envs.workers` runs it as a script, possibly under an
interpreter that has numpy and Gymnasium but neither torch nor ctrlrl. So it imports nothing else, speaks Python 3.8 and
Gymnasium 0.29, and is the only file of the package that does. Both users step environments through the same `Host`,
which writes into arrays laid out by `layout`: plain memory in process, a memory map shared with the parent in a worker.

How an environment's state is saved. Restoring qpos and qvel of a MuJoCo task is not exact to the bit, since its
observations read derived fields (contact forces, body positions) that lag the state. So a `Slot` records how the
episode began (the seed, or the state of the random generator) and the actions since; restoring replays them and
compares a digest of all rewards and observations on the way, bit for bit. That is exact for every environment and
wrapper whose episodes depend on nothing but their beginning and the actions.

What is carried from one episode to the next, such as the statistics of `NormalizeReward` or the level of a curriculum,
is not restored. Where it made a difference within the recorded part of the episode, the digest shows it and the episode
is started afresh, without it. Where it would make one only later (the run stopped at the first step of an episode, say)
nothing can show it: the episode goes on as if earlier ones had not been. An environment that needs it sets
`ctrlrl_state = True` and has `get_state() -> dict` and `set_state(dict)` of JSON-able values and arrays.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]  # the folder of this script: its neighbours would be found under their bare names

import base64
import contextlib
import faulthandler
import hashlib
import importlib.util
import inspect
import json
import math
import mmap
import os
import random
import re
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

MAX_REPLAY = 100_000
"""Steps of one episode that are recorded; a longer episode is not replayed but started afresh."""

EXTRAS = {
    "box2d": ("Box2D", 'swig "gymnasium[box2d]"'),
    "classic_control": ("gymnasium", '"gymnasium[classic-control]"'),
    "mujoco": ("mujoco", '"gymnasium[mujoco]"'),
    "phys2d": ("jax", '"gymnasium[jax]"'),
    "tabular": ("jax", '"gymnasium[jax]"'),
    "toy_text": ("gymnasium", '"gymnasium[toy-text]"'),
}
"""Gymnasium's families: the module that the environments need, and what pip installs for it."""

_OPENGL_MODULES = re.compile(r"(OpenGL|glfw|mujoco\.(.*\.)?(gl_context|egl|glfw|osmesa))(\.|$)")
_pack_reward = struct.Struct("<d").pack
_WATCH_SECONDS = 1.0
_AWAKE_SECONDS = 0.0005
RECEIVED = 1 << 16
"""Bytes that are taken from a socket at once."""
_ALIGNMENT = 64


class Refused(Exception):
    """What the user has to change; the backends raise it as a UsageError.

    `word` is the name that was not found and `known` are the names there are: the backends suggest the nearest.
    """

    def __init__(self, message: str, word: str = "", known: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.word = word
        self.known = list(known)


class EnvironmentRaised(Exception):
    """An environment raised: `row` is its index in the batch, the text is its traceback."""

    def __init__(self, row: int) -> None:
        super().__init__(traceback.format_exc())
        self.row = row


class Undrawn(Exception):
    """Drawing an environment raised: `cause` is the type and message of that, the text is its traceback."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(traceback.format_exc())
        self.cause = name_and_message(error)


def name_and_message(error: BaseException) -> str:
    """`ValueError: 3 is too many`."""
    return f"{type(error).__name__}: {error}"


# --- building an environment ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet_gymnasium() -> Iterator[None]:
    """Gymnasium's advice about names and versions is held back: where it matters, `Refused` says it better."""
    level = gym.logger.min_level
    gym.logger.min_level = 40
    try:
        yield
    finally:
        gym.logger.min_level = level


def _mujoco_warns_on_stderr(spec: Any) -> None:
    """MuJoCo's warnings once each on stderr; left alone it writes them to MUJOCO_LOG.TXT in the current folder.

    That the model files of Gymnasium use an attribute that MuJoCo 4 deprecates is nothing its user can act on.
    """
    if "mujoco" not in str(spec.entry_point) or importlib.util.find_spec("mujoco") is None:
        return
    mujoco: Any = importlib.import_module("mujoco")  # not at the top: other environments do without it
    if not hasattr(mujoco, "get_mju_user_warning") or mujoco.get_mju_user_warning() is not None:
        return
    seen = set()

    def warn(message: str) -> None:
        if message not in seen and "'settotalmass'" not in message:
            seen.add(message)
            print(f"MuJoCo: {message}", file=sys.stderr)

    mujoco.set_mju_user_warning(warn)


def build_env(
    env_id: str, kwargs: dict[str, Any], render: bool = False, pixels: int = 0, grayscale: bool = False
) -> gym.Env[Any, Any]:
    """The environment `env_id` (`ID` or `module:ID`), made with `kwargs`; raises `Refused` with the remedy.

    `render`: it can give pictures. `pixels`: it is observed through them, see `PixelObservation`.
    """
    if pixels:
        return PixelObservation(build_env(env_id, kwargs, render=True), pixels, grayscale)
    module, _, name = env_id.rpartition(":")
    options = {"disable_env_checker": True, **({"render_mode": "rgb_array"} if render else {}), **kwargs}
    with _quiet_gymnasium():
        if module:
            _import_for(env_id, module)
        if name not in gym.registry:
            raise _unknown(name)
        try:
            _mujoco_warns_on_stderr(gym.registry[name])
            env: gym.Env[Any, Any] = gym.make(name, **options)
        except (gym.error.DependencyNotInstalled, ImportError) as error:
            if opengl_failure(error) is not None:
                raise
            raise _missing_package(name, error) from error
        except TypeError as error:
            if (render or kwargs.get("render_mode") == "human") and "'render_mode'" in str(error):
                raise Refused(f"{env_id} cannot give pictures: it takes no render_mode.") from error
            raise _bad_argument(name, kwargs, error) from error
    modes = list(env.metadata.get("render_modes") or [])
    if render and options["render_mode"] == "rgb_array" and "rgb_array" not in modes:
        env.close()
        raise Refused(f"{env_id} cannot give pictures: it needs the render mode 'rgb_array' and has {modes}.")
    if options.get("render_mode") == "human" and "human" not in modes:
        env.close()
        raise Refused(f"{env_id} has no window: it needs the render mode 'human' and has {modes}.")
    if render and not {"camera_id", "camera_name", "default_camera_config"} & kwargs.keys():
        _follow_with_camera(env.unwrapped)
    return env


def opengl_failure(error: BaseException) -> BaseException | None:
    """What looking for OpenGL raised, if that is what `error` comes from; where a module is missing, it is not.

    MuJoCo looks for the renderer that MUJOCO_GL names when it is first imported, whether or not anything is drawn.
    """
    cause: BaseException | None = error
    while cause is not None:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(cause.__traceback__)]
        if not isinstance(cause, ModuleNotFoundError) and any(_OPENGL_MODULES.match(module) for module in modules):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _follow_with_camera(env: Any) -> None:
    """Take the MuJoCo model's own camera `track`, if it has one; Gymnasium's default one stays where the robot was."""
    if hasattr(env, "mujoco_renderer"):
        names = [env.model.camera(index).name for index in range(env.model.ncam)]
        if "track" in names:
            env.mujoco_renderer.camera_id = names.index("track")


class PixelObservation(gym.Wrapper[Any, Any, Any, Any]):
    """Observes an environment through its picture, scaled to `size` x `size`, in place of its own observation.

    A pixel is the mean over the area that it covers, rounded, so it keeps where a thin or moving thing is more finely
    than its own width. The sums are whole numbers that floating point holds exactly: the same picture gives the same
    bits on every machine, whatever the order of summation. Observations are uint8 (size, size, 3), RGB, or with
    `grayscale` (size, size): luma as in ITU-R BT.601.
    """

    def __init__(self, env: gym.Env[Any, Any], size: int, grayscale: bool) -> None:
        super().__init__(env)
        if env.render_mode != "rgb_array":
            raise Refused(
                f"{env} cannot be observed through pixels: its render mode is {env.render_mode!r}; make it with "
                "render_mode='rgb_array'."
            )
        self._size, self._grayscale = size, grayscale
        self._weights: dict[int, np.ndarray[Any, Any]] = {}
        self.observation_space = gym.spaces.Box(0, 255, (size, size) if grayscale else (size, size, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        _, info = self.env.reset(seed=seed, options=options)
        return self._look(), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        _, reward, terminated, truncated, info = self.env.step(action)
        return self._look(), reward, terminated, truncated, info

    def _look(self) -> np.ndarray[Any, Any]:
        picture = draw(self.env.render)
        if picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(f"the environment's picture has shape {picture.shape}, expected (height, width, 3)")
        height, width, _ = picture.shape
        # float32 holds the sums over a column (at most 255 height) exactly, float64 those over the whole area
        rows = self._overlap(height) @ np.ascontiguousarray(picture, np.float32).reshape(height, -1)
        area = self._overlap(width).astype(np.float64) @ rows.reshape(self._size, width, 3)
        total = height * width
        if self._grayscale:
            area, total = area @ np.array([299.0, 587.0, 114.0]), 1000 * total
        seen: np.ndarray[Any, Any] = np.rint(area / total).astype(np.uint8)
        return seen

    def _overlap(self, length: int) -> np.ndarray[Any, Any]:
        """(size, length): how much of each of `length` pixels each of `size` ones covers, in units of 1 / size."""
        if length not in self._weights:
            ours, theirs = np.arange(self._size)[:, None] * length, np.arange(length) * self._size
            overlap = np.minimum(ours + length, theirs + self._size) - np.maximum(ours, theirs)
            self._weights[length] = np.maximum(overlap, 0).astype(np.float32)
        return self._weights[length]


_STATELESS = (gym.wrappers.OrderEnforcing, gym.wrappers.PassiveEnvChecker, gym.wrappers.TimeLimit, PixelObservation)


def _import_for(env_id: str, module: str) -> None:
    if module.startswith("."):
        raise Refused(
            f"{env_id}: the module {module!r} is named relative to a package; give its full name, as in "
            "'package.module:ID'."
        )
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise _missing_package(env_id, error) from error
        raise Refused(
            f"{env_id}: there is no module {error.name!r} in {sys.executable}. Install the package that has it, or "
            f"start from the folder that contains it (now {os.getcwd()})."
        ) from error


def _unknown(name: str) -> Refused:
    stem, _, version = name.rpartition("-v")
    stem = stem if version.isdigit() else name
    newest = newest_versions().get(stem)
    if newest is None:
        return Refused(
            f"There is no environment {name!r}. `ctrlrl envs` lists those there are; for one of another package or of "
            "your own, name the module that registers it: 'module:ID'.",
            name,
            list(newest_versions().values()),
        )
    return Refused(f"Gymnasium {gym.__version__} has no environment {name!r}: the version to use is {newest!r}.")


def newest_versions() -> dict[str, str]:
    """Of each registered environment, by its name without version, the id of the newest version."""
    newest: dict[str, Any] = {}
    for spec in gym.registry.values():
        stem = spec.id if spec.version is None else spec.id.rpartition("-v")[0]
        if stem not in newest or (spec.version or 0) > (newest[stem].version or 0):
            newest[stem] = spec
    return {stem: spec.id for stem, spec in newest.items()}


def family_of(entry_point: Any) -> str | None:
    """The folder of `gymnasium.envs` that an entry point lies in; None for an environment from elsewhere."""
    path = entry_point if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
    match = re.match(r"gymnasium\.envs\.(\w+)[.:]", path)
    return match.group(1) if match else None


def _missing_package(env_id: str, error: Exception) -> Refused:
    spec = gym.registry.get(env_id)
    name = env_id.rpartition("-v")[0]
    if spec and getattr(spec.entry_point, "__module__", "") == "gymnasium.envs" and newest_versions()[name] != env_id:
        # Gymnasium registers what it has given up with a function that raises
        return Refused(f"{env_id} is outdated: use {newest_versions()[name]!r}. ({error})")
    extra = EXTRAS.get(family_of(spec.entry_point) or "") if spec else None
    package = extra[1] if extra else getattr(error, "name", None)
    remedy = f" Install it: {sys.executable} -m pip install {package}" if package else ""
    return Refused(f"{env_id} needs a package that is not installed ({error}).{remedy}")


def _bad_argument(env_id: str, kwargs: dict[str, Any], error: TypeError) -> Exception:
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if match is None or match.group(1) not in kwargs:
        missing = re.search(r"missing \d+ required .*arguments?: .*?(?= was raised|$)", str(error))
        return Refused(f"{env_id} cannot be made: {missing.group(0)}; give it in env_kwargs.") if missing else error
    entry_point: Any = gym.registry[env_id].entry_point
    if isinstance(entry_point, str):
        where, _, attribute = entry_point.partition(":")
        entry_point = getattr(importlib.import_module(where), attribute)
    parameters = inspect.signature(entry_point).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = sorted({*named, "max_episode_steps"})
    return Refused(
        f"{env_id} takes no argument {match.group(1)!r} (env_kwargs); it takes {', '.join(known)}.",
        match.group(1),
        known,
    )


# --- spaces and arrays ------------------------------------------------------------------------------------------------


def describe_box(space: Any) -> dict[str, Any]:
    """A Box as JSON-able values; bounds that are the same everywhere become one number."""

    def bound(values: Any) -> Any:
        return values.flat[0].item() if values.size and (values == values.flat[0]).all() else values.tolist()

    reflection, vocabulary = getattr(space, "reflection", None), getattr(space, "vocabulary", None)
    return {
        "type": "Box",
        "dtype": space.dtype.name,
        "shape": list(space.shape),
        "low": bound(space.low),
        "high": bound(space.high),
        **({"reflection": {"order": reflection.order, "sign": reflection.sign}} if reflection is not None else {}),
        **({"vocabulary": vocabulary} if vocabulary is not None else {}),
    }


def flatten_dict_space(space: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The entries of a Dict space by their path, nested ones included; `()` for a space that is no Dict."""
    if not isinstance(space, gym.spaces.Dict):
        return {path: space}
    flat: dict[tuple[str, ...], Any] = {}
    for key, entry in space.spaces.items():
        flat.update(flatten_dict_space(entry, (*path, str(key))))
    return dict(sorted(flat.items(), key=lambda item: ".".join(item[0])))


def describe_observation_space(space: Any, owner: str) -> dict[str, Any]:
    """A Box, or a Dict of Boxes flattened to one level with names joined by a dot; else raises `Refused`."""
    entries = flatten_dict_space(space)
    for path, entry in entries.items():
        if not isinstance(entry, gym.spaces.Box) or entry.dtype.kind not in "fiu":
            what = f"entry {'.'.join(path)!r} of its observation space" if path else "observation space"
            raise Refused(
                f"{owner}: the {what} is {entry}; expected a Box of numbers, or a Dict of such Boxes. Wrap the "
                "environment, for instance with gymnasium.wrappers.FlattenObservation, and pass the wrapped object, a "
                "function that makes it, or an id that it is registered under."
            )
    if list(entries) == [()]:
        return describe_box(space)
    return {"type": "Dict", "entries": {".".join(path): describe_box(entry) for path, entry in entries.items()}}


def describe_action_space(space: Any, owner: str) -> dict[str, Any]:
    """A Box, Discrete or one-dimensional MultiDiscrete as JSON-able values; else raises `Refused`."""
    if isinstance(space, gym.spaces.Box) and space.dtype is not None and space.dtype.kind in "fiu":
        return describe_box(space)
    if isinstance(space, gym.spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, gym.spaces.MultiDiscrete) and space.nvec.ndim == 1:
        start = getattr(space, "start", np.zeros_like(space.nvec))  # Gymnasium 0.29 has none
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": np.asarray(start).tolist()}
    raise Refused(
        f"{owner}: the action space is {space}; expected Box, Discrete or a one-dimensional MultiDiscrete. Wrap the "
        "environment in a gymnasium.ActionWrapper that offers one of these."
    )


def layout(description: dict[str, Any], num_envs: int, num_workers: int = 1) -> list[tuple[str, str, list[int]]]:
    """Name, dtype and shape of the arrays through which `num_envs` environments of this description are stepped."""
    observation, action = description["observation"], description["action"]
    entries = observation["entries"] if observation["type"] == "Dict" else {"": observation}
    shapes = {"Box": action.get("shape"), "Discrete": [], "MultiDiscrete": [len(action.get("nvec", []))]}
    arrays = [
        ("action", action.get("dtype", "int64"), [num_envs, *shapes[action["type"]]]),
        ("reward", "float32", [num_envs]),
        ("terminated", "bool", [num_envs]),
        ("truncated", "bool", [num_envs]),
        ("success", "float32", [num_envs]),
        ("at", "int64", [num_workers]),  # the row that each worker is busy with, -1 for none
    ]
    for name, box in entries.items():
        arrays += [(kind + name, box["dtype"], [num_envs, *box["shape"]]) for kind in ("obs/", "final/")]
    return arrays


def place(arrays: Sequence[Any]) -> tuple[list[int], int]:
    """The offset of each array of a layout in one block of memory, and the size of the block in bytes."""
    offsets, end = [], 0
    for _, dtype, shape in arrays:
        offsets.append(end)
        end += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
    return offsets, max(end, 1)


def map_arrays(arrays: Sequence[Any], memory: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a layout over `memory` (a buffer of the size that `place` says)."""
    offsets, _ = place(arrays)
    return {
        name: np.ndarray(tuple(shape), np.dtype(dtype), memory, offsets[index])
        for index, (name, dtype, shape) in enumerate(arrays)
    }


def encode_array(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """An array as JSON-able values, exact to the bit."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def decode_array(encoded: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The array that `encode_array` was given."""
    flat = np.frombuffer(base64.b64decode(encoded["data"]), np.dtype(encoded["dtype"]))
    return flat.reshape(encoded["shape"]).copy()


def split_arrays(value: Any, arrays: dict[str, np.ndarray[Any, Any]], name: str) -> Any:
    """`value` with its arrays moved to `arrays` (named by their path from `name`), so that the rest is JSON-able."""
    if isinstance(value, np.ndarray):
        arrays[name] = value.copy()
        return {"__array__": name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: split_arrays(entry, arrays, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [split_arrays(entry, arrays, f"{name}.{index}") for index, entry in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"the state entry {name} is a {type(value).__name__}; expected JSON-able values and numpy arrays")


def join_arrays(value: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    """The value that `split_arrays` was given (tuples come back as lists)."""
    if isinstance(value, dict):
        if list(value) == ["__array__"]:
            return arrays[value["__array__"]].copy()
        return {key: join_arrays(entry, arrays) for key, entry in value.items()}
    return [join_arrays(entry, arrays) for entry in value] if isinstance(value, list) else value


# --- one environment --------------------------------------------------------------------------------------------------


class Slot:
    """One environment: resets itself where an episode ends, and records what is needed to get here again.

    Observations are dicts by entry name; the one entry of an environment without names is called "".
    """

    def __init__(self, env: gym.Env[Any, Any], owner: str) -> None:
        self.env = env
        self.description = {
            "observation": describe_observation_space(env.observation_space, owner),
            "action": describe_action_space(env.action_space, owner),
            "control_dt": control_dt(env),
        }
        self.broken = False
        self._entries = [
            (".".join(path), path, box.dtype, box.shape)
            for path, box in flatten_dict_space(env.observation_space).items()
        ]
        self._obs: dict[str, Any] | None = None
        space = env.action_space
        self._action_type: Any = space.dtype
        recorded_type = space.dtype if isinstance(space, gym.spaces.Box) else np.int64
        self._actions = np.empty((0, *(space.shape or ())), recorded_type)
        self._steps = 0
        self._digest = hashlib.blake2b()
        self._seed: int | None = None
        self._generator_at_start: dict[str, Any] | None = None
        wrappers = []
        while isinstance(env, gym.Wrapper):
            wrappers.append(env)
            env = env.env
        # The environment's own state says nothing of its wrappers: it is used where those have none but a clock.
        self._has_own_state = bool(getattr(env, "ctrlrl_state", False)) and all(
            type(wrapper) in _STATELESS for wrapper in wrappers
        )
        self._time_limits = [wrapper for wrapper in wrappers if isinstance(wrapper, gym.wrappers.TimeLimit)]

    def reset(self, seed: int | None) -> dict[str, Any]:
        """Start an episode; None goes on with the generator as it is."""
        self._seed = seed
        self._generator_at_start = None if seed is not None else self._generator().state
        self._steps = 0
        self._obs = self._flatten(self.env.reset(seed=seed)[0])
        if not self._has_own_state:
            self._digest = hashlib.blake2b()
            for value in self._obs.values():
                self._digest.update(value.tobytes())
        return self._obs

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any], Any]:
        """One step: (observation to act on, reward, terminated, truncated, true next observation, success or None).

        Where the episode ended, the observation to act on is the first one of the next episode, else the two
        observations are the same object. `action` is a row of the batch; the environment gets its own copy.
        """
        recorded = not self._has_own_state and self._steps < MAX_REPLAY
        if recorded:
            self._record(action)
        self._steps += 1
        raw, reward, terminated, truncated, info = self.env.step(action.astype(self._action_type))
        obs = final = self._flatten(raw)
        success = info.get("is_success", info.get("success")) if info else None
        if not isinstance(success, (bool, int, float, np.bool_, np.number)):
            success = None
        if terminated or truncated:
            # copied, since an environment may hand out the same array at each step and at its reset
            final = {name: value.copy() for name, value in obs.items()}
            obs = self.reset(None)
        elif recorded:
            self._digest.update(_pack_reward(reward))
            for value in obs.values():
                self._digest.update(value.tobytes())
        self._obs = obs
        return obs, reward, terminated, truncated, final, success

    def get_state(self) -> tuple[dict[str, Any] | None, dict[str, np.ndarray[Any, Any]]]:
        """What `set_state` needs (JSON-able values, arrays); (None, {}) where there is nothing to continue."""
        if self.broken or self._obs is None:
            return None, {}
        if not self._has_own_state and self._steps > MAX_REPLAY:
            return {"method": "none", "why": f"its episode is longer than {MAX_REPLAY} steps"}, {}
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        state: dict[str, Any] = {"generator": split_arrays(self._generator().state, arrays, "generator")}
        if self._has_own_state:
            elapsed = [wrapper._elapsed_steps for wrapper in self._time_limits]
            try:
                own = split_arrays(self.env.unwrapped.get_state(), arrays, "own")  # type: ignore[attr-defined]
            except Exception as error:  # the run goes on, and says why this episode cannot
                return {"method": "none", "why": f"saving raised {name_and_message(error)}"}, {}
            arrays.update({"obs." + name: np.array(value) for name, value in self._obs.items()})
            return {**state, "method": "own", "own": own, "elapsed": elapsed}, arrays
        arrays["actions"] = self._actions[: self._steps].copy()
        start = split_arrays(self._generator_at_start, arrays, "start")
        digest = self._digest.hexdigest()
        return {**state, "method": "replay", "seed": self._seed, "start": start, "digest": digest}, arrays

    def set_state(
        self,
        state: dict[str, Any] | None,
        arrays: dict[str, np.ndarray[Any, Any]],
        seed: int,
        alive: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, Any], str | None]:
        """Continue from `get_state`'s values: (observation to act on, None or why the episode is started afresh).

        An episode that is started afresh is started with `seed`. `alive` is called after each replayed step.
        """
        self.broken = False
        if state is None:
            return self.reset(seed), "no state was saved"
        try:
            if state["method"] == "replay":
                self._replay(state, arrays, alive)
            elif state["method"] == "own":
                self._restore_own(state, arrays)
            elif state["method"] == "none":
                raise _NotRestored(state["why"])
            else:
                raise _NotRestored("its state was saved by another backend")
            self._generator().state = join_arrays(state["generator"], arrays)
            return self._obs, None  # type: ignore[return-value]
        except Exception as error:
            why = str(error) if isinstance(error, _NotRestored) else f"restoring raised {name_and_message(error)}"
        return self.reset(seed), why

    def _replay(self, state: dict[str, Any], arrays: dict[str, Any], alive: Callable[[], None]) -> None:
        if state["start"] is not None:
            self._generator().state = join_arrays(state["start"], arrays)
        self.reset(state["seed"])
        actions = arrays["actions"]
        for index in range(len(actions)):
            _, _, terminated, truncated, _, _ = self.step(actions[index])
            if terminated or truncated:
                raise _NotRestored(f"replaying its {len(actions)} actions ended the episode after {index + 1}")
            alive()
        if self._digest.hexdigest() != state["digest"]:
            raise _NotRestored(
                f"replaying its {len(actions)} actions gave other rewards or observations: the environment carries "
                "something over from earlier episodes, or draws from a source of its own"
            )

    def _restore_own(self, state: dict[str, Any], arrays: dict[str, Any]) -> None:
        if not self._has_own_state:
            raise _NotRestored("its state was saved by the environment itself, which this one does not offer")
        self.reset(None)
        self.env.unwrapped.set_state(join_arrays(state["own"], arrays))  # type: ignore[attr-defined]
        for index, wrapper in enumerate(self._time_limits):
            wrapper._elapsed_steps = state["elapsed"][index]
        self._obs = {name: arrays["obs." + name].copy() for name, _, _, _ in self._entries}

    def _generator(self) -> Any:
        return self.env.unwrapped.np_random.bit_generator

    def _record(self, action: Any) -> None:
        if self._steps == len(self._actions):
            grown = np.empty((max(64, 2 * self._steps), *self._actions.shape[1:]), self._actions.dtype)
            grown[: self._steps] = self._actions
            self._actions = grown
        self._actions[self._steps] = action

    def _flatten(self, obs: Any) -> dict[str, Any]:
        flat = {}
        for name, path, dtype, shape in self._entries:
            value = obs
            for key in path:
                value = value[key]
            value = np.asarray(value, dtype)
            if value.shape != shape:
                what = f"observation entry {name!r}" if name else "observation"
                raise ValueError(f"the environment's {what} has shape {value.shape}, its space says {shape}")
            flat[name] = value
        return flat


class _NotRestored(Exception):
    """Why a saved state could not be reached again."""


def control_dt(env: Any) -> float | None:
    """Seconds per step: the environment's `dt`, else what its frame rate says."""
    dt = getattr(env.unwrapped, "dt", None)
    if isinstance(dt, (int, float, np.number)) and dt > 0:
        return float(dt)
    fps = (env.metadata or {}).get("render_fps")
    return 1.0 / float(fps) if isinstance(fps, (int, float, np.number)) and fps > 0 else None


# --- the environments of one process ----------------------------------------------------------------------------------


class Host:
    """Steps the environments of one process and writes to their rows of the batch, `first` and on.

    `arrays` are those of `layout`; `worker` is the entry of `at` to keep. An environment that raises makes the methods
    raise `EnvironmentRaised`; the environments before it have been stepped then, those after it not.
    """

    def __init__(
        self, slots: Sequence[Slot], arrays: dict[str, np.ndarray[Any, Any]], first: int = 0, worker: int = 0
    ) -> None:
        self.rows = list(enumerate(slots, first))
        self._span = slice(first, first + len(slots))
        self._arrays = arrays
        self._at = arrays["at"][worker : worker + 1]
        self._at[0] = -1
        self._names = [name[len("obs/") :] for name in arrays if name.startswith("obs/")]

    def reset(self, seeds: Sequence[int | None]) -> None:
        """Start an episode in each environment, each with its seed."""
        with self._watched():
            for index, (row, slot) in enumerate(self.rows):
                self._at[0] = row
                self._write_first(row, slot.reset(seeds[index]))

    def step(self) -> None:
        """Step each environment with its row of `action`."""
        arrays = self._arrays
        actions, rewards, successes = arrays["action"], arrays["reward"], arrays["success"]
        terminations, truncations = arrays["terminated"], arrays["truncated"]
        observations = [(name, arrays["obs/" + name]) for name in self._names]
        ended = []
        with self._watched():
            for row, slot in self.rows:
                self._at[0] = row
                obs, reward, terminated, truncated, final, success = slot.step(actions[row])
                for name, array in observations:
                    array[row] = obs[name]
                rewards[row] = reward
                terminations[row] = terminated
                truncations[row] = truncated
                successes[row] = math.nan if success is None else success
                if final is not obs:
                    ended.append((row, final))
        for name, array in observations:
            arrays["final/" + name][self._span] = array[self._span]
        for row, final in ended:
            for name in self._names:
                arrays["final/" + name][row] = final[name]

    def get_state(self) -> list[tuple[dict[str, Any] | None, dict[str, np.ndarray[Any, Any]]]]:
        """The state of each environment, as `Slot.get_state` gives it."""
        return [slot.get_state() for _, slot in self.rows]

    def set_state(
        self,
        states: Sequence[tuple[dict[str, Any] | None, dict[str, Any]]],
        seeds: Sequence[int],
        alive: Callable[[], None] = lambda: None,
    ) -> list[str | None]:
        """Continue each from its state; per environment None, or why it is started afresh, with its seed."""
        reasons = []
        with self._watched():
            for index, (row, slot) in enumerate(self.rows):
                self._at[0] = row
                obs, reason = slot.set_state(*states[index], seeds[index], alive)
                self._write_first(row, obs)
                reasons.append(reason)
        return reasons

    def render(self) -> np.ndarray[Any, Any]:
        """The picture (H, W, 3) of the first environment."""
        return draw(self.rows[0][1].env.render)

    def close(self) -> None:
        """Close the environments, all of them even where one raises."""
        close_all(slot for _, slot in self.rows)

    def _write_first(self, row: int, obs: dict[str, Any]) -> None:
        arrays = self._arrays
        for name in self._names:
            arrays["obs/" + name][row] = arrays["final/" + name][row] = obs[name]
        arrays["reward"][row] = 0.0
        arrays["terminated"][row] = arrays["truncated"][row] = False
        arrays["success"][row] = math.nan

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """What the environment that `at` names raises becomes `EnvironmentRaised`."""
        try:
            yield
        except Refused:  # an environment that is observed through its picture, and lacks a package to draw it
            raise
        except (Exception, SystemExit) as error:
            row = int(self._at[0])
            self.rows[row - self._span.start][1].broken = True
            raise EnvironmentRaised(row) from error
        self._at[0] = -1


def close_all(slots: Iterable[Slot]) -> None:
    """Close the environments, all of them even where one raises."""
    with contextlib.ExitStack() as stack:
        for slot in slots:
            stack.callback(slot.env.close)


def draw(render: Callable[[], Any]) -> np.ndarray[Any, Any]:
    """The uint8 picture that `render` gives; raises `Undrawn`, or `Refused` where a package is missing."""
    try:
        return np.asarray(render(), np.uint8)
    except gym.error.DependencyNotInstalled as error:
        raise Refused(f"To draw the environment, a package is needed that is not installed: {error}") from error
    except Exception as error:
        raise Undrawn(error) from error


def describe(slots: Sequence[Slot], owner: str) -> dict[str, Any]:
    """Spaces and clock of the environments, which must agree; raises `Refused` where they do not."""
    first = slots[0].description
    for index, slot in enumerate(slots):
        if slot.description != first:
            raise Refused(f"{owner}: environment {index} has other spaces than environment 0; they must be the same.")
    return first


# --- the worker process -----------------------------------------------------------------------------------------------


class _Channel:
    """JSON lines over the socket to the parent. What environments print cannot get in between."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)
        self._inbox = bytearray()
        self.awake = False
        """Whether to stay awake for a while when waiting, see `receive_soon`."""

    def receive(self) -> dict[str, Any] | None:
        """The next command; None when the parent has closed its end or is gone."""
        while b"\n" not in self._inbox:
            chunk = receive_soon(self._socket) if self.awake else None
            if chunk is None:
                try:
                    chunk = self._socket.recv(RECEIVED)
                except ConnectionError:
                    chunk = b""
            if not chunk:
                return None
            self._inbox += chunk
        line, _, self._inbox = self._inbox.partition(b"\n")
        command: dict[str, Any] = json.loads(line)
        return command

    def send(self, reply: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError):  # the parent is gone; the next `receive` ends the worker
            self._socket.sendall(json.dumps(reply).encode() + b"\n")


def receive_soon(channel: socket.socket) -> bytes | None:
    """What arrives within the next half millisecond, b"" at the other side's end; None where nothing does.

    Without giving up the core: to be woken takes longer than a few steps of an environment, and between two steps of a
    training there is less than that to wait for.
    """
    until = time.perf_counter() + _AWAKE_SECONDS
    while True:
        try:
            return channel.recv(RECEIVED, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if time.perf_counter() > until:
                return None
        except ConnectionError:
            return b""


def _leave_with_parent(parent: int) -> None:
    """End the process when its parent is gone, even in the middle of a step, or while a fork holds the socket open."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


class Share:
    """A contiguous share of the environments, and the answers to what is asked of it.

    `alive(reply)` is called with a sign of life now and then while an answer takes long.
    """

    def __init__(self, alive: Callable[[dict[str, Any]], None] = lambda reply: None) -> None:
        self._alive = alive
        self._slots: list[Slot] = []
        self._host: Host | None = None

    def build(self, config: dict[str, Any]) -> dict[str, Any]:
        """Make the environments; their description, or why there is none."""
        self._first, self._worker = config["first"], config["worker"]
        try:
            for index in range(config["count"]):
                render = config["render"] and config["first"] + index == 0
                env = build_env(config["env"], config["kwargs"], render, config["pixels"], config["grayscale"])
                self._slots.append(Slot(env, config["env"]))
            return describe(self._slots, config["env"])
        except Refused as error:
            reply: dict[str, Any] = {"refused": [str(error), error.word, error.known]}
        except (Exception, SystemExit) as error:
            failed = opengl_failure(error)
            reply = {"unbuilt": traceback.format_exc(), "opengl": failed and name_and_message(failed)}
        with contextlib.suppress(Exception):  # why there is none matters more than what closing the others raises
            self.close()
        return reply

    def settle(self, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        """Step in these `arrays` from now on."""
        self._host = Host(self._slots, arrays, self._first, self._worker)

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what `command["do"]` says: step, reset, get_state, set_state or render."""
        try:
            reply: dict[str, Any] = getattr(self, "_" + command["do"])(self._host, command)
        except EnvironmentRaised as error:
            return {"raised": str(error), "row": error.row}
        except Refused as error:
            return {"refused": [str(error), error.word, error.known]}
        return reply

    def close(self) -> None:
        """Close the environments, all of them even where one raises."""
        slots, self._slots = self._slots, []
        close_all(slots)

    def _step(self, host: Host, _: dict[str, Any]) -> dict[str, Any]:
        host.step()
        return {}

    def _reset(self, host: Host, command: dict[str, Any]) -> dict[str, Any]:
        host.reset(command["seeds"])
        return {}

    def _get_state(self, host: Host, _: dict[str, Any]) -> dict[str, Any]:
        states = host.get_state()
        return {
            "json": [state for state, _ in states],
            "arrays": [{name: encode_array(array) for name, array in arrays.items()} for _, arrays in states],
        }

    def _set_state(self, host: Host, command: dict[str, Any]) -> dict[str, Any]:
        told = time.monotonic()

        def alive() -> None:
            nonlocal told
            if time.monotonic() - told > _WATCH_SECONDS:
                told = time.monotonic()
                self._alive({"alive": True})

        states = [
            (state, {name: decode_array(array) for name, array in command["arrays"][index].items()})
            for index, state in enumerate(command["json"])
        ]
        return {"reasons": host.set_state(states, command["seeds"], alive)}

    def _render(self, host: Host, _: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"picture": encode_array(host.render())}
        except Undrawn as error:
            return {"undrawn": str(error), "cause": error.cause}


def _serve(channel: _Channel, memory_fd: int) -> None:
    """Build the environments, map the arrays, then answer commands until the parent closes its end."""
    config = channel.receive()
    if config is None:
        return
    sys.path[:] = config["sys_path"] or [os.getcwd(), *sys.path]
    if config["core"] is not None:
        os.sched_setaffinity(0, [config["core"]])
    channel.awake = config["awake"]
    random.seed(config["generators"] + config["worker"])
    np.random.seed((config["generators"] + config["worker"]) % 2**32)
    share = Share(channel.send)
    channel.send(share.build(config))
    mapping = channel.receive()
    if mapping is None:
        return
    memory = mmap.mmap(memory_fd, place(mapping["layout"])[1])
    share.settle(map_arrays(mapping["layout"], memory))
    channel.send({})
    while True:
        command = channel.receive()
        if command is None:
            break
        channel.send(share.answer(command))
    share.close()


def main() -> None:
    """`worker.py SOCKET MEMORY DUMP PARENT`: three inherited file descriptors and the parent's process id."""
    socket_fd, memory_fd, dump_fd, parent = map(int, sys.argv[1:])
    for fd in (memory_fd, dump_fd):
        os.set_inheritable(fd, False)
    faulthandler.enable(dump_fd)
    faulthandler.register(signal.SIGUSR1, dump_fd)  # the parent asks so where a step hangs
    threading.Thread(target=_leave_with_parent, args=(parent,), daemon=True).start()
    _serve(_Channel(socket_fd), memory_fd)


if __name__ == "__main__":
    main()
