"""Mapping files: which columns of a table are what.

```yaml
observation: [x, x_dot, theta, theta_dot]   # one column, several, or entries: {camera: image, joints: [q0, q1]}
action: torque
reward: reward
terminated: fallen                          # 0 or 1; `false` where the task never ends
truncated: timeout                          # and/or `episode: run`, a number or name that changes with each episode
action_low: -2
action_high: 2
env: Pendulum-v1
```

`KEYS` has all of them. Rows are in order, an episode's one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml

from ctrlrl.data.importers.rows import MOST_CHOICES, column_name
from ctrlrl.errors import UsageError, nearest

Names: TypeAlias = tuple[str, ...]

KEYS = {
    "observation": "a column, a list of them, or a name for each entry: {camera: image, joints: [q0, q1]}",
    "next_observation": "the same of the observation after the step, where there is one",
    "action": "a column, or a list of them",
    "reward": "a column",
    "terminated": "a column of 0 and 1: the task ended with this step; or false: it never ends",
    "truncated": "a column of 0 and 1: the episode was cut off after this step",
    "episode": "a column whose value changes with every episode",
    "columns": "others to keep: a list, or {name: column}",
    "observation_dtype": "the type observations are kept in, such as float32 or uint8",
    "action_dtype": "the type of actions: float32, float64, or int64 of discrete ones",
    "action_low": "the least action: a number, or one for each dimension",
    "action_high": "the greatest action",
    "discrete_actions": "how many actions there are, counted from 0: a number, or one for each dimension",
    "env": "the environment's ID",
    "control_dt": "seconds between two actions",
    "reference": "returns that scores are normalized by: {random: 20, expert: 500}",
}
REQUIRED = ("observation", "action", "reward", "terminated")
DTYPES = ("float32", "float64", "float16", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32")


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """What the mapping file says, checked."""

    file: Path
    observation: dict[str, Names]
    """Columns of each entry; an observation that is one array is called ""."""
    next_observation: dict[str, Names] | None
    action: Names
    reward: str
    terminated: str | None
    truncated: str | None
    episode: str | None
    columns: dict[str, Names]
    observation_dtype: str | None
    action_dtype: str | None
    action_low: Any
    action_high: Any
    discrete_actions: Any
    env: str | None
    control_dt: float | None
    reference: dict[str, float]

    @property
    def whole_actions(self) -> bool:
        """Whether actions are read as integers."""
        return self.discrete_actions is not None or is_integer(self.action_dtype)

    @property
    def every(self) -> list[str]:
        """All columns that it names."""
        groups = [*self.observation.values(), *(self.next_observation or {}).values(), self.action]
        singles = [name for name in (self.reward, self.terminated, self.truncated, self.episode) if name]
        columns = [name for names in self.columns.values() for name in names]
        return list(dict.fromkeys([*(name for names in groups for name in names), *singles, *columns]))


def read_mapping(path: Path) -> Mapping:
    """The mapping file at `path`, YAML or JSON.

    Raises:
        UsageError: it cannot be read, has a key that there is none of, or lacks one.
    """
    try:
        if path.stat().st_size > 2**20:
            raise UsageError(f"{path} has more than 1 MiB; expected a mapping file, which names columns")
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the mapping file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"the mapping file {path} is neither YAML nor JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise UsageError(f"the mapping file {path} must hold `key: column` lines; it holds {str(data)[:40]!r}")
    for key in data:
        if key not in KEYS:
            raise UsageError(f"{path} has an unknown key {key!r}.{nearest(str(key), KEYS)} Keys: {', '.join(KEYS)}")
    for key in REQUIRED:
        if key not in data:
            raise UsageError(f"{path} lacks {key!r}: {KEYS[key]}")
    return _Reader(path, data).mapping()


class _Reader:
    """Checks the values of a mapping file."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    def wrong(self, key: str) -> UsageError:
        return UsageError(f"{self.path}: {key} must be {KEYS[key]}; it is {str(self.data[key])[:60]!r}")

    def names(self, key: str, value: Any) -> Names:
        listed = [value] if isinstance(value, str) else value
        if not (isinstance(listed, list) and listed and all(isinstance(name, str) and name for name in listed)):
            raise self.wrong(key)
        return tuple(listed)

    def entries(self, key: str) -> dict[str, Names]:
        value = self.data[key]
        if not isinstance(value, dict):
            return {"": self.names(key, value)}
        if not value or not all(isinstance(name, str) and name for name in value):
            raise self.wrong(key)
        return {name: self.names(key, columns) for name, columns in value.items()}

    def text(self, key: str) -> str | None:
        value = self.data.get(key)
        if value is not None and not (isinstance(value, str) and value):
            raise self.wrong(key)
        return value

    def dtype(self, key: str) -> str | None:
        value = self.text(key)
        if value is not None and value not in DTYPES:
            there = f"{nearest(value, DTYPES)} There are: {', '.join(DTYPES)}"
            raise UsageError(f"{self.path}: {key} must be a type of numbers, got {value!r}.{there}")
        return value

    def number(self, key: str, *, listed: bool = True, integer: bool = False) -> Any:
        value = self.data.get(key)
        values = value if isinstance(value, list) and listed else [value]
        kinds = int if integer else (int, float)
        good = all(isinstance(v, kinds) and not isinstance(v, bool) and math.isfinite(v) for v in values)
        if value is not None and not (good and values):
            raise self.wrong(key)
        return value

    def columns(self) -> dict[str, Names]:
        value = self.data.get("columns") or {}
        if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
            value = {name: name for name in value}
        if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value):
            raise self.wrong("columns")
        return {column_name(name): self.names("columns", names) for name, names in value.items()}

    def mapping(self) -> Mapping:
        reference = self.data.get("reference") or {}
        good = isinstance(reference, dict) and reference.keys() <= {"random", "expert"}
        if not good or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in reference.values()):
            raise self.wrong("reference")
        dt = self.number("control_dt", listed=False)
        if dt is not None and dt <= 0:
            raise self.wrong("control_dt")
        low, high = self.number("action_low"), self.number("action_high")
        discrete = self.number("discrete_actions", integer=True)
        if (low is None) != (high is None):
            raise UsageError(f"{self.path} has one of action_low and action_high; it needs both or neither")
        if low is not None and discrete is not None:
            raise UsageError(f"{self.path} has discrete_actions, which have no action_low and action_high")
        if discrete is not None and not all(0 < n <= MOST_CHOICES for n in np.atleast_1d(discrete)):
            raise self.wrong("discrete_actions")
        following = self.entries("next_observation") if self.data.get("next_observation") is not None else None
        observation = self.entries("observation")
        if following is not None and following.keys() != observation.keys():
            raise UsageError(f"{self.path}: next_observation and observation must have the same entries")
        terminated = None if self.data["terminated"] is False else self.text("terminated")
        if terminated is None and self.data["terminated"] is not False:
            raise self.wrong("terminated")
        reward = self.text("reward")
        if reward is None:
            raise self.wrong("reward")
        return Mapping(
            file=self.path,
            observation=observation,
            next_observation=following,
            action=self.names("action", self.data["action"]),
            reward=reward,
            terminated=terminated,
            truncated=self.text("truncated"),
            episode=self.text("episode"),
            columns=self.columns(),
            observation_dtype=self.dtype("observation_dtype"),
            action_dtype=self.dtype("action_dtype"),
            action_low=low,
            action_high=high,
            discrete_actions=discrete,
            env=self.text("env"),
            control_dt=dt,
            reference={name: float(value) for name, value in reference.items()},
        )


def is_integer(dtype: str | None) -> bool:
    """Whether this names a type of integers."""
    return dtype is not None and np.dtype(dtype).kind in "iu"
