"""Reading a run folder, whole or broken, into a `RunRecord`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ctrlrl.errors import UsageError
from ctrlrl.runs.plots import Series
from ctrlrl.runs.statistics import Floats, mean_interval, share_interval

RATES = ("steps_per_s", "updates_per_s")
"""Speeds of training, which a training record holds beside its metrics."""

# The parts of a run's JSON files that a page uses, with their types: {...} for an object, [...] for a list of such.
_CONFIG: dict[str, Any] = {"algo": str, "env": str, "seed": int, "steps": int, "updates": int, "num_envs": int}
_CONFIG |= {"device": str, "preset": str, "eval_every": int}
_STATUS: dict[str, Any] = {"state": str, "step": int, "message": str}
_SIDECAR: dict[str, Any] = {"checkpoint": str, "step": int, "return": float, "seed": int, "length": int, "frames": int}
_PROVENANCE: dict[str, Any] = {
    "command": str,
    "started": str,
    "ctrlrl": str,
    "python": str,
    "packages": dict,
    "hardware": {"cpu": str, "cores": int, "memory_gib": float, "gpu": str},
    "threads": int,
    "git": {"commit": str, "dirty": bool},
    "environment": {"observation_space": str, "action_space": str, "control_dt": float},
    "changed": [str],
    "sessions": [{"started": str, "from_step": int, "command": str, "notes": [str]}],
}
_HISTORY: dict[str, Any] = {
    "run": str,
    "algo": str,
    "checkpoint": str,
    "step": int,
    "unit": str,
    "evaluations": list,
    "notes": [str],
    "data": {"path": str, "mean_return": float, "reference": dict},
}
_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_TYPE_NAMES |= {dict: "an object", list: "a list"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Deterministic episodes of one checkpoint on fixed seeds."""

    step: int
    time: float
    """Seconds of training before it."""
    checkpoint: str
    """`current` while training; `best` or `last` when evaluated afterwards."""
    returns: Floats
    """(episodes,)"""
    lengths: Floats
    """(episodes,) steps of each."""
    success: float | None
    """Share of successful episodes, where the task knows."""
    best: bool
    """Whether the run kept it as its best checkpoint so far."""
    figures: dict[str, float]
    """Means over the episodes of what the task says of each, without the reward's terms."""
    transcripts: tuple[str, ...] = ()
    """What was said in the first episodes, where they are told in words."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Student-t interval of the mean; NaN for one episode."""
        return mean_interval(self.returns)

    @property
    def success_interval(self) -> tuple[float, float]:
        """95 % interval of the success rate (Wilson); NaN where the task knows none."""
        if self.success is None:
            return math.nan, math.nan
        return share_interval(round(self.success * len(self.returns)), len(self.returns))


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """An MP4 of the run and what its sidecar says."""

    path: Path
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run folder, read. `config` is as the run wrote it."""

    path: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    """What a page shows of it; unknown parts (null) are absent."""
    status: dict[str, Any]
    """Likewise; empty where the run wrote none."""
    evaluations: list[Evaluation]
    """Made while training, one per step, ascending."""
    checks: list[Evaluation]
    """Made afterwards, by `ctrlrl eval`, in the order of the file."""
    episodes: Series
    """Return of each training episode at the step where it ended."""
    metrics: dict[str, Series]
    """Each training metric, and `steps_per_s`, `updates_per_s`."""
    notes: list[tuple[int, str]]
    """(step, text)"""
    videos: list[Video]
    """The best one first."""
    step: int
    """Environment steps, or updates of what learns from a dataset alone, done."""
    seconds: float
    """Training time, summed over sessions."""
    unreadable: int
    """Lines of the two files that are no record: a write was cut off."""
    superseded: int
    """Records of steps that were lost with a killed session and done again."""
    remarks: list[str]
    """What is missing or broken in the folder, and so not in the page."""
    history: dict[str, Any] = field(default_factory=dict)
    """Of a run that started with another's weights: which, how that had learned, and from what."""
    library: str | None = None
    """Name and version of the library that a peer's run was made with; None for a run of ours."""

    @property
    def algo(self) -> str:
        """The algorithm's name."""
        return str(self.config["algo"])

    @property
    def env(self) -> str:
        """The environment's name."""
        return str(self.config["env"])

    @property
    def seed(self) -> Any:
        """The training seed."""
        return self.config.get("seed")

    @property
    def state(self) -> str:
        """`running`, `finished`, `interrupted`, `failed`, or `unknown` where the run wrote no status."""
        return str(self.status.get("state", "unknown"))

    @property
    def final(self) -> Evaluation | None:
        """The last evaluation while training."""
        return self.evaluations[-1] if self.evaluations else None

    @cached_property
    def best_index(self) -> int | None:
        """Which evaluation gave the best checkpoint: the last that the run marked so, else the highest mean."""
        marked = [index for index, one in enumerate(self.evaluations) if one.best]
        means = [one.mean for one in self.evaluations]
        highest = int(np.nanargmax(means)) if np.isfinite(means).any() else None
        return marked[-1] if marked else highest

    @property
    def best(self) -> Evaluation | None:
        """The evaluation that gave the best checkpoint."""
        return None if self.best_index is None else self.evaluations[self.best_index]

    @property
    def curve(self) -> Series:
        """Mean return of each evaluation."""
        steps = np.array([one.step for one in self.evaluations], dtype=np.float64)
        return Series(steps, np.array([one.mean for one in self.evaluations], dtype=np.float64))

    @property
    def unit(self) -> str:
        """What its steps are."""
        return "updates" if "updates" in self.config and "steps" not in self.config else "environment steps"

    @property
    def budget(self) -> Any:
        """How many of them there are to be; None where that is not known."""
        return self.config.get("updates" if self.unit == "updates" else "steps")

    @property
    def flat_config(self) -> dict[str, Any]:
        """`config` without nesting: names inside a section are dotted, as in `agent.gamma`."""
        return flatten(self.config)


def load_run(path: str | Path) -> RunRecord:
    """Read a run folder. A run that is still being written, or was killed, reads up to its last whole line.

    Only the configuration must be whole. What else is missing or broken is left out and named in `remarks`.

    Raises:
        UsageError: the folder does not exist, is no run folder (it has no config.json), or its config.json is broken.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {what}; expected the folder of a run, which `ctrlrl train` prints when it starts")
    if not (folder / "config.json").is_file():
        inside = sorted(child.parent.name for child in folder.glob("*/config.json"))
        hint = f" It holds run folders: {', '.join(inside[:4])}. Give those: {folder}/*" if inside else ""
        raise UsageError(f"{folder} is not a run folder: it has no file config.json.{hint}")
    config = _read_config(folder / "config.json")
    remarks: list[str] = []
    provenance = _read_object(folder / "provenance.json", _PROVENANCE, remarks)
    if not provenance:
        remarks.append("Nothing is known about where this run comes from.")
    history = _read_object(folder / "history.json", _HISTORY, remarks) if (folder / "history.json").exists() else {}
    status = _read_object(folder / "status.json", _STATUS, remarks) if (folder / "status.json").exists() else {}
    # From step 0 on every step was new; only a later session can have done steps again.
    starts = [one.get("from_step", 0) for one in provenance.get("sessions", [])]
    lines = _Lines([start for start in starts if start > 0])
    lines.read(folder / "metrics.jsonl", remarks)
    if (folder / "evaluations.jsonl").exists():
        lines.read(folder / "evaluations.jsonl", remarks)
    return RunRecord(
        path=folder,
        config=config,
        provenance=provenance,
        status=status,
        evaluations=[one for _, one in lines.evaluations],
        checks=lines.checks,
        episodes=_series(lines.episodes),
        metrics=_metrics(lines.train),
        notes=lines.notes,
        videos=_videos(folder / "videos", remarks),
        step=max(lines.step, status.get("step", 0)),
        seconds=lines.seconds,
        unreadable=lines.unreadable,
        superseded=lines.superseded,
        remarks=remarks,
        history=history,
    )


class _Lines:
    """Collects the records of metrics.jsonl and evaluations.jsonl line by line."""

    def __init__(self, session_starts: list[int]) -> None:
        self.train: list[tuple[int, dict[str, Any]]] = []
        self.episodes: list[tuple[int, float]] = []
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.checks: list[Evaluation] = []
        self.notes: list[tuple[int, str]] = []
        self.step = 0
        self.seconds = 0.0
        self.unreadable = 0
        self.superseded = 0
        self._starts = session_starts

    def read(self, path: Path, remarks: list[str]) -> None:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    self._add_line(line)
        except OSError as error:
            remarks.append(f"{path.name} cannot be read ({error.strerror}); its records are left out.")

    def _add_line(self, line: str) -> None:
        try:
            record = json.loads(line)
            step, seconds = int(record["step"]), float(record.get("time", 0))
            if not (0 <= step < 2**53 and math.isfinite(seconds)):
                raise ValueError("no run gets there")
            self._add(record["kind"], step, seconds, record)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            self.unreadable += 1
            return
        if record.get("checkpoint", "current") == "current":
            self.step, self.seconds = max(self.step, step), max(self.seconds, seconds)

    def _add(self, kind: str, step: int, seconds: float, record: dict[str, Any]) -> None:
        if kind == "train":
            rates: dict[str, Any] = {key: record[key] for key in RATES if key in record}
            self._rewind(self.train, step)
            self.train.append((step, {**record["metrics"], **rates}))
        elif kind == "episode":
            value = float(record["return"])
            self._rewind(self.episodes, step)
            self.episodes.append((step, value))
        elif kind == "note":
            self.notes.append((step, str(record["text"])))
        elif kind == "eval":
            evaluation = _evaluation(step, seconds, record)
            if evaluation.checkpoint != "current":
                self.checks.append(evaluation)
                return
            self._rewind(self.evaluations, step)
            if self.evaluations and self.evaluations[-1][0] == step:  # evaluated, killed before the checkpoint, again
                self.evaluations.pop()
                self.superseded += 1
            self.evaluations.append((step, evaluation))

    def _rewind(self, kept: list[tuple[int, Any]], step: int) -> None:
        """Drop what a resumed session does again: it went back to its checkpoint, and its records are the truth."""
        if not kept or step >= kept[-1][0]:
            return
        back_to = max((start for start in self._starts if start <= step), default=step)
        while kept and kept[-1][0] > back_to:
            kept.pop()
            self.superseded += 1


def _evaluation(step: int, seconds: float, record: Mapping[str, Any]) -> Evaluation:
    returns = np.asarray(record["returns"], dtype=np.float64)
    if returns.ndim != 1 or len(returns) == 0:
        raise ValueError("an evaluation without episodes")
    lengths = np.asarray(record.get("lengths") or [], dtype=np.float64)
    if lengths.ndim != 1:
        raise ValueError("lengths that are no list")
    success = record.get("success")
    return Evaluation(
        step=step,
        time=seconds,
        checkpoint=str(record.get("checkpoint", "current")),
        returns=returns,
        lengths=lengths,
        success=None if not success else float(np.mean(success)),
        best=bool(record.get("best", False)),
        figures={
            name.removeprefix("episode/"): float(value)
            for name, value in (record.get("figures") or {}).items()
            if not name.startswith("episode/reward/")
        },
        transcripts=tuple(map(str, record.get("transcripts") or ())),
    )


def _series(pairs: Sequence[tuple[int, float]]) -> Series:
    values = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return Series(values[:, 0], values[:, 1])


def _metrics(records: Iterable[tuple[int, Mapping[str, Any]]]) -> dict[str, Series]:
    columns: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in records:
        for key, value in metrics.items():
            if isinstance(value, (int, float)):
                columns.setdefault(key, []).append((step, float(value)))
    return {key: _series(pairs) for key, pairs in columns.items()}


def _videos(folder: Path, remarks: list[str]) -> list[Video]:
    videos = []
    for path in sorted(path for path in folder.glob("*.mp4") if path.is_file()):
        sidecar = path.with_suffix(".json")
        facts = _read_object(sidecar, _SIDECAR, remarks) if sidecar.exists() else {}
        videos.append(Video(path=path, facts=facts))
    return sorted(videos, key=lambda one: (one.facts.get("checkpoint") != "best", -one.facts.get("step", 0)))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}); restore it from a copy of the run") from error
    misfits: list[str] = []
    known = _fitting(config, _CONFIG, str(path), misfits) or {}
    absent = [key for key in ("algo", "env") if key not in known]
    if misfits:
        raise UsageError(f"{misfits[0]}; restore it from a copy of the run")
    if absent:
        raise UsageError(f"{path} has no {' and no '.join(map(repr, absent))}: no run wrote this")
    return dict(config)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`config` without nesting, the names inside a section dotted; an empty section stays, as `{}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_object(path: Path, shape: dict[str, Any], remarks: list[str]) -> dict[str, Any]:
    """The parts of a JSON file that `shape` names; what is wrong with it goes to `remarks`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remarks.append(f"{path.name} cannot be read ({reason}); what it says is left out.")
        return {}
    misfits: list[str] = []
    fitting = _fitting(value, shape, path.name, misfits) or {}
    remarks += [f"{misfit}; it is left out." for misfit in misfits]
    return dict(fitting)


def _fitting(value: Any, shape: Any, name: str, misfits: list[str]) -> Any:
    """The parts of `value` that `shape` names and that are of its types; None for null and for what does not fit."""
    if value is None:
        return None
    expected = shape if isinstance(shape, type) else type(shape)
    fits = isinstance(value, (int, float) if expected is float else expected)
    if not fits:
        misfits.append(f"{name} is {_clipped(json.dumps(value))}, expected {_TYPE_NAMES[expected]}")
        return None
    if isinstance(shape, dict):
        parts = {key: _fitting(value.get(key), part, f"{key} of {name}", misfits) for key, part in shape.items()}
        return {key: part for key, part in parts.items() if part is not None}
    if isinstance(shape, list):
        items = [_fitting(item, shape[0], f"item {index} of {name}", misfits) for index, item in enumerate(value)]
        return [item for item in items if item is not None]
    return value


def _clipped(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
