"""Reports: one run, or several compared, as one HTML file that needs nothing else, no network and no JavaScript."""

from __future__ import annotations

import base64
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from ctrlrl.errors import UsageError
from ctrlrl.runs import plots
from ctrlrl.runs.files import write_atomically, write_errors_explained
from ctrlrl.runs.plots import EvaluationCurve, GroupCurve, Series, plain_number
from ctrlrl.runs.statistics import Floats, align_curves, iqm, mean_interval, stratified_bootstrap, time_to_threshold

_NOT_LEARNING = frozenset(
    {"seed", "steps", "out", "preset", "device", "threads", "env_python", "worker_timeout"}
    | {"video", "log_every", "eval_every", "eval_episodes", "checkpoint_every", "keep_checkpoints"}
)
"""Settings in which runs of one group may differ: which run it is, how long, where, how closely watched."""
_EMBEDDED_BYTES = 32 * 2**20
"""Videos are embedded up to this many bytes in all; further ones are named, so that the page still opens on a phone."""
_RATES = ("steps_per_s", "updates_per_s")

# The parts of a run's JSON files that a page uses, with their types: {...} for an object, [...] for a list of such.
_CONFIG: dict[str, Any] = {"algo": str, "env": str, "seed": int, "steps": int, "num_envs": int}
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
_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_TYPE_NAMES |= {dict: "an object", list: "a list"}


# ---- Reading a run folder -------------------------------------------------------------------------------------------


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

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Student-t interval of the mean; NaN for one episode."""
        return mean_interval(self.returns)


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
    """Environment steps done."""
    seconds: float
    """Training time, summed over sessions."""
    unreadable: int
    """Lines of the two files that are no record: a write was cut off."""
    superseded: int
    """Records of steps that were lost with a killed session and done again."""
    remarks: list[str]
    """What is missing or broken in the folder, and so not in the page."""

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
            rates: dict[str, Any] = {key: record[key] for key in _RATES if key in record}
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


# ---- One run --------------------------------------------------------------------------------------------------------


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write `report.html` into the run folder (or to `out`) and return its path; replaces an earlier one in one step.

    Folders above `out` are created.

    Raises:
        UsageError: as `load_run`, or `out` is a folder or lies under a file.
    """
    run = load_run(run_dir)
    path = _writable_page(run.path / "report.html" if out is None else Path(out))
    metrics, idle = _while_updating(run.metrics)
    panels = [
        (family, Markup(plots.small_panel(f"panel{index}", curves, unit)), idle if curves.keys() & {*_RATES} else 0)
        for index, (family, unit, curves) in enumerate(plots.panels(metrics))
    ]
    page = _template().render(
        kind="run",
        title=f"{run.algo} on {run.env}",
        run=run,
        curve=Markup(plots.learning_curve("curve", _evaluation_curve(run), run.episodes, run.best_index)),
        recent=float(run.episodes.values[-10:].mean()) if len(run.episodes.values) else None,
        panels=panels,
        videos=_embed(run.videos),
        no_video=_why_no_video(run),
        config=_config_sections(run.config),
        changed=set(run.provenance.get("changed", [])),
        commands=_commands(run),
        provenance=_provenance_rows(run.provenance),
    )
    write_atomically(path, page.encode())
    return path


def _writable_page(path: Path) -> Path:
    """`path`, where a page can be written now: its folder exists."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected the name of the page; write it to {path / 'report.html'}, say")
    with write_errors_explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(f"cannot write {path}: {error.filename} is not a folder; choose another place") from error
    return path


def _while_updating(metrics: Mapping[str, Series]) -> tuple[dict[str, Series], int]:
    """`metrics` with rates only of records in which the agent learnt, and the number of records that lost theirs.

    Steps without updates are so much faster that the rest would be a flat line. Where there is nothing else, they stay.
    """
    updates = metrics.get("updates_per_s")
    idle = np.empty(0) if updates is None else updates.steps[updates.values == 0]
    if updates is None or len(idle) == len(updates.steps):
        return dict(metrics), 0
    kept = {key: ~np.isin(metrics[key].steps, idle) for key in _RATES if key in metrics}
    rates = {key: Series(metrics[key].steps[rows], metrics[key].values[rows]) for key, rows in kept.items()}
    return {**metrics, **rates}, len(idle)


def _evaluation_curve(run: RunRecord) -> EvaluationCurve:
    curve = run.curve
    low = np.array([one.returns.min() for one in run.evaluations], dtype=np.float64)
    high = np.array([one.returns.max() for one in run.evaluations], dtype=np.float64)
    return EvaluationCurve(curve.steps, curve.values, low, high)


def _embed(videos: Iterable[Video]) -> list[dict[str, Any]]:
    left = _EMBEDDED_BYTES
    result = []
    for video in videos:
        size = video.path.stat().st_size
        fits = size <= left
        left -= size if fits else 0
        data = base64.b64encode(video.path.read_bytes()).decode() if fits else None
        result.append({"name": video.path.name, "data": data, "size": size, "facts": video.facts})
    return result


def _why_no_video(run: RunRecord) -> str | None:
    """What the run itself says about the video that is not there."""
    sessions = [note for session in run.provenance.get("sessions", []) for note in session.get("notes", [])]
    said = [run.status.get("message", ""), *(text for _, text in reversed(run.notes)), *reversed(sessions)]
    return next((text for text in said if "video" in text.lower() or "render" in text.lower()), None)


def _config_sections(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(section, rows of (dotted name, name inside the section, value)), the run's own settings first."""
    sections: dict[str, list[tuple[str, str, str]]] = {"run": []}
    for dotted, value in _flatten(config).items():
        section, _, rest = dotted.partition(".")
        sections.setdefault(section if rest else "run", []).append((dotted, rest or section, _text(value)))
    return list(sections.items())


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _commands(run: RunRecord) -> list[tuple[str, str]]:
    folder = shlex.quote(_shown(run.path))
    rows = [("Train it again", run.provenance["command"])] if "command" in run.provenance else []
    return [
        *rows,
        ("Go on where it stopped", f"ctrlrl resume {folder}"),
        ("Evaluate the best checkpoint", f"ctrlrl eval {folder}"),
    ]


def _link(file: Path, page_folder: Path) -> str | None:
    """Where a page in `page_folder` finds `file`, if there is one."""
    return os.path.relpath(file, page_folder).replace(os.sep, "/") if file.is_file() else None


def _shown(path: Path) -> str:
    """The path as one would type it here."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)


def _provenance_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    hardware = provenance.get("hardware", {})
    machine = [hardware.get("cpu"), f"{hardware['cores']} cores" if hardware.get("cores") else None]
    machine += [f"{hardware['memory_gib']:g} GiB memory" if hardware.get("memory_gib") else None, hardware.get("gpu")]
    git = provenance.get("git", {})
    source = f"{git['commit']}{' with uncommitted changes' if git.get('dirty') else ''}" if "commit" in git else None
    environment = provenance.get("environment", {})
    control = environment.get("control_dt")
    rows = [
        ("Started", provenance.get("started")),
        ("Machine", ", ".join(str(part) for part in machine if part)),
        ("Threads", provenance.get("threads")),
        ("ctrlrl", provenance.get("ctrlrl")),
        ("Source", source or "no commit recorded"),
        ("Python", provenance.get("python")),
        ("Packages", ", ".join(f"{name} {version}" for name, version in provenance.get("packages", {}).items())),
        ("Observation space", environment.get("observation_space")),
        ("Action space", environment.get("action_space")),
        ("Control period", f"{control:g} s ({1 / control:g} Hz)" if control else None),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


# ---- Several runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """An aggregate over seeds with its 95 % interval; NaN where one seed leaves it unknown."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """What the table of runs says about one run."""

    run: RunRecord
    label: str
    area: float | None
    """Mean return over the steps that all runs cover: the area under the curve divided by its width."""
    reached: int | None
    """First evaluation at or above the threshold."""
    counted: bool
    """Whether it is in the aggregates; a repetition of the same seed and a run without evaluation are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The runs of one algorithm with one set of settings in one environment, differing in seed."""

    label: str
    rows: list[RunRow]
    """All its runs."""
    curve: GroupCurve
    final: Score
    """IQM at the last step that all runs of the environment cover."""
    area: Score
    reached: tuple[int, float]
    """How many counted runs reached the threshold, and the median step (infinite where half did not)."""

    @property
    def seeds(self) -> int:
        """Number of counted runs."""
        return sum(row.counted for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvComparison:
    """All groups of one environment."""

    env: str
    groups: list[Group]
    last_common: float | None
    """Last step that all counted runs cover; None where they share none."""
    threshold: float | None
    threshold_rule: str
    notes: list[str]
    differences: list[tuple[str, list[str]]]
    """(setting, its value in each group)"""


def write_comparison(run_dirs: Sequence[str | Path], out: str | Path, *, threshold: float | None = None) -> Path:
    """Write one HTML page that compares runs, per environment and algorithm, over their seeds; returns its path.

    Runs are of one group when environment, algorithm and every setting that bears on learning agree (seed, length,
    device and the rhythm of evaluations and checkpoints may differ). Returns of different environments are never mixed;
    success rates are, where every run has them.

    Args:
        run_dirs: run folders, at least one.
        out: the HTML file; folders above it are created.
        threshold: return for "steps to threshold"; by default 80 % of the best final return of each environment.

    Raises:
        UsageError: no runs, a threshold that is no finite number, as `load_run`, or `out` is a folder or lies under a
            file.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise UsageError(f"the threshold must be a finite return, got {threshold}")
    target = _writable_page(Path(out))
    runs, notes = _load_all(run_dirs)
    comparisons = _compare(runs, threshold)
    labels = list(dict.fromkeys(group.label for one in comparisons for group in one.groups))
    sections = []
    for index, one in enumerate(comparisons):
        curves = [group.curve for group in one.groups]
        firsts = [(group.label, video) for group in one.groups for video in _first_video(group)]
        embedded = _embed(video for _, video in firsts)
        sections.append(
            {
                "comparison": one,
                "svg": Markup(plots.comparison_curves(f"env{index}", curves, one.threshold, labels)),
                "videos": [{**v, "label": label} for (label, _), v in zip(firsts, embedded, strict=True)],
            }
        )
    page = _template().render(
        kind="comparison",
        title=" and ".join(sorted({run.algo for run in runs})) + " on " + ", ".join(one.env for one in comparisons),
        runs=runs,
        notes=notes,
        sections=sections,
        across=_success_across(comparisons),
        link=lambda run: _link(run.path / "report.html", target.parent),
        shown=_shown,
    )
    write_atomically(target, page.encode())
    return target


def console_summary(run_dirs: Sequence[str | Path]) -> str:
    """The few lines that the command line prints about one run or several.

    Raises:
        UsageError: no runs, or as `load_run`.
    """
    runs, notes = _load_all(run_dirs)
    if len(runs) == 1:
        return "\n".join([*_summary_of_one(runs[0]), *notes])
    lines = []
    for one in _compare(runs, None):
        at = "(no step in common)" if one.last_common is None else f"at step {one.last_common:,.0f}"
        lines.append(f"{one.env}: IQM of the evaluation return {at}, 95 % interval over seeds")
        width = max(len(group.label) for group in one.groups)
        for group in one.groups:
            seeds = f"{group.seeds} seed{'s' if group.seeds != 1 else ' '}"
            lines.append(f"  {group.label:<{width}}  {seeds}  {_score_text(group.final)}")
        lines += [f"  note: {note}" for note in one.notes]
    return "\n".join([*lines, *notes])


def _summary_of_one(run: RunRecord) -> list[str]:
    lines = [f"{run.algo} on {run.env}, seed {run.seed}: {run.step:,} steps in {_duration(run.seconds)} ({run.state})"]
    if run.status.get("message"):
        lines.append(f"  {run.status['message']}")
    if run.final is None or run.best is None:
        return [*lines, "  not evaluated yet"]
    score = _score_text(Score(run.final.mean, *run.final.interval))
    lines.append(f"  final return {score}, 95 % interval over {len(run.final.returns)} episodes")
    lines.append(f"  best return {plain_number(run.best.mean)} at step {run.best.step:,}")
    return lines


def _score_text(score: Score) -> str:
    if math.isnan(score.value):
        return "–"
    interval = f" [{plain_number(score.low)}, {plain_number(score.high)}]" if math.isfinite(score.low) else ""
    return plain_number(score.value) + interval


def _load_all(run_dirs: Sequence[str | Path]) -> tuple[list[RunRecord], list[str]]:
    """Every folder once, and notes about those given twice."""
    if not run_dirs:
        raise UsageError("a report needs at least one run folder, got none: ctrlrl report RUN [RUN ...]")
    unique: dict[Path, Path] = {}
    for path in map(Path, run_dirs):
        unique.setdefault(path.resolve(), path)
    repeated = len(run_dirs) - len(unique)
    notes = [f"{repeated} of the folders given are repetitions of another and count once."] if repeated else []
    runs = [load_run(path) for path in unique.values()]
    return runs, notes + [f"{run.path.name}: {remark}" for run in runs for remark in run.remarks]


def _compare(runs: Sequence[RunRecord], threshold: float | None) -> list[EnvComparison]:
    by_env: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_env.setdefault(run.env, []).append(run)
    return [_compare_env(env, members, threshold) for env, members in sorted(by_env.items())]


def _compare_env(env: str, runs: Sequence[RunRecord], threshold: float | None) -> EnvComparison:
    labelled = _label_groups(runs)
    notes: list[str] = []
    counted: set[Path] = set()
    for label, members in labelled:
        counted |= _independent(label, members, notes)
    everyone = [run for run in runs if run.path in counted]
    grid, values = np.empty(0), np.empty((0, 0))
    if everyone:
        grid, values = align_curves([(run.curve.steps, run.curve.values) for run in everyone])
    aligned = {run.path: row for run, row in zip(everyone, values, strict=True)} if len(grid) else {}
    notes += _notes_on_lengths(everyone, grid)
    if threshold is None:
        threshold, rule = _default_threshold(everyone)
    else:
        rule = "as given"
    groups = []
    for label, members in labelled:
        rows = [_run_row(run, label, grid, aligned, threshold, run.path in counted) for run in members]
        groups.append(_group(label, rows, aligned))
    if any(group.seeds < 5 for group in groups):
        notes.append("With fewer than five seeds an interval over seeds is mostly too narrow; one seed gives none.")
    return EnvComparison(
        env=env,
        groups=groups,
        last_common=float(grid[-1]) if len(grid) else None,
        threshold=threshold,
        threshold_rule=rule,
        notes=notes,
        differences=_differences(labelled),
    )


def _label_groups(runs: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """Runs of one environment by algorithm and settings; the label tells apart the settings of one algorithm."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    result = []
    for members in groups.values():
        own = _settings(members[0])
        rivals = [_settings(other[0]) for other in groups.values() if other[0].algo == members[0].algo]
        keys = sorted({key for rival in rivals for key in own.keys() | rival.keys() if own.get(key) != rival.get(key)})
        parts = [f"{key.rpartition('.')[2]}={_text(own.get(key))}" for key in keys]
        more = f", {len(parts) - 2} more" if len(parts) > 2 else ""
        result.append((members[0].algo + (f" ({', '.join(parts[:2])}{more})" if parts else ""), members))
    labels = [label for label, _ in result]
    unique = [
        (f"{label} #{labels[:index].count(label) + 1}" if labels.count(label) > 1 else label, members)
        for index, (label, members) in enumerate(result)
    ]
    return sorted(unique, key=lambda pair: pair[0])


def _settings(run: RunRecord) -> dict[str, Any]:
    return {key: value for key, value in _flatten(run.config).items() if key not in _NOT_LEARNING}


def _independent(label: str, members: Sequence[RunRecord], notes: list[str]) -> set[Path]:
    """The runs of a group that count: evaluated ones, and of those with one seed the longest."""
    longest: dict[str, RunRecord] = {}
    for run in members:
        if not run.evaluations:
            notes.append(f"{run.path.name} has no evaluation yet and is left out of the figures.")
            continue
        key = str(run.path) if run.seed is None else _text(run.seed)
        rival = longest.get(key)
        if rival is None:
            longest[key] = run
            continue
        longest[key] = max(rival, run, key=lambda one: one.evaluations[-1].step)
        notes.append(
            f"{rival.path.name} and {run.path.name} are the same seed ({key}) of the same settings of {label}: "
            f"not two independent runs, so only {longest[key].path.name} counts."
        )
    return {run.path for run in longest.values()}


def _notes_on_lengths(runs: Sequence[RunRecord], grid: Floats) -> list[str]:
    lasts = {run.evaluations[-1].step for run in runs}
    if runs and not len(grid):
        return ["The runs share no range of evaluated steps, so there is no step at which they can be compared."]
    if len(lasts) < 2:
        return []
    shortest = min(runs, key=lambda run: run.evaluations[-1].step)
    note = (
        f"The runs differ in length. Figures over seeds compare them at step {grid[-1]:,.0f}, the last that all were "
        f"evaluated up to; {shortest.path.name} ({shortest.state}) sets it. Leave it out to compare the others further."
    )
    return [note]


def _default_threshold(runs: Sequence[RunRecord]) -> tuple[float | None, str]:
    finals = [run.evaluations[-1].mean for run in runs]
    if not finals:
        return None, "no run was evaluated"
    best = max(finals)
    if best > 0:
        return 0.8 * best, f"80 % of the best final return, {plain_number(best)}"
    # A share of a negative return would lie above it, so measure from the worst start instead.
    worst = min(run.evaluations[0].mean for run in runs)
    rule = f"80 % of the way from the lowest first evaluation, {plain_number(worst)}, to the best final return, "
    return worst + 0.8 * (best - worst), rule + plain_number(best)


def _run_row(
    run: RunRecord, label: str, grid: Floats, aligned: Mapping[Path, Floats], threshold: float | None, counted: bool
) -> RunRow:
    reached = None if threshold is None else time_to_threshold(run.curve.steps, run.curve.values, threshold)
    values = aligned.get(run.path)
    area = None if values is None else _mean_over(grid, values)
    return RunRow(run=run, label=label, area=area, reached=reached, counted=counted)


def _mean_over(grid: Floats, values: Floats) -> float:
    """Area under a curve (trapezoids) divided by its width; the value itself for one point."""
    if len(grid) == 1:
        return float(values[0])
    return float(((values[1:] + values[:-1]) / 2 @ np.diff(grid)) / (grid[-1] - grid[0]))


def _group(label: str, rows: list[RunRow], aligned: Mapping[Path, Floats]) -> Group:
    members = [row for row in rows if row.counted]
    curves = [row.run.curve for row in members]
    grid, values = align_curves([(one.steps, one.values) for one in curves]) if curves else (np.empty(0), np.empty(0))
    middle = low = high = np.empty(0)
    if len(grid):
        middle = iqm(values)
        low, high = stratified_bootstrap({label: values})
    finals = [aligned[row.run.path][-1] for row in members if row.run.path in aligned]
    areas = [row.area for row in members if row.area is not None]
    times = [math.inf if row.reached is None else float(row.reached) for row in members]
    return Group(
        label=label,
        rows=rows,
        curve=GroupCurve(label, grid, middle, low, high, [row.run.curve for row in rows]),
        final=_score({label: finals}),
        area=_score({label: areas}),
        reached=(sum(map(math.isfinite, times)), float(np.median(times)) if times else math.inf),
    )


def _score(scores: Mapping[str, npt.ArrayLike]) -> Score:
    everything = np.concatenate([np.asarray(values, dtype=np.float64) for values in scores.values()])
    if not len(everything):
        return Score(math.nan, math.nan, math.nan)
    low, high = stratified_bootstrap(scores)
    return Score(float(iqm(everything)), float(low), float(high))


def _differences(groups: Sequence[tuple[str, list[RunRecord]]]) -> list[tuple[str, list[str]]]:
    """Settings, versions and machines that are not the same everywhere: (name, what each group has)."""
    table = [[_comparable(run) for run in members] for _, members in groups]
    names = dict.fromkeys(name for group in table for run in group for name in run)
    rows = []
    for name in names:
        cells = [list(dict.fromkeys(_text(run.get(name)) for run in group)) for group in table]
        if len({value for cell in cells for value in cell}) > 1:
            rows.append((name, [", ".join(cell) for cell in cells]))
    return rows


def _comparable(run: RunRecord) -> dict[str, Any]:
    flat = {key: value for key, value in _flatten(run.config).items() if key not in ("seed", "env", "out")}
    hardware, git = run.provenance.get("hardware", {}), run.provenance.get("git", {})
    packages = run.provenance.get("packages", {})
    flat |= {"ctrlrl version": run.provenance.get("ctrlrl"), "commit": git.get("commit")}
    flat |= {f"{name} version": packages.get(name) for name in ("torch", "mujoco", "gymnasium")}
    return flat | {"CPU": hardware.get("cpu"), "GPU": hardware.get("gpu")}


def _first_video(group: Group) -> list[Video]:
    return next(([row.run.videos[0]] for row in group.rows if row.run.videos), [])


def _success_across(comparisons: Sequence[EnvComparison]) -> list[tuple[str, Score]] | None:
    """Success rate per algorithm over all environments: the one figure here whose scale is the same in each.

    None where there is one environment, or some run's task knows no success, or no algorithm ran in all of them.
    """
    if len(comparisons) < 2:
        return None
    rates: dict[str, dict[str, list[float]]] = {}
    for comparison in comparisons:
        for group in comparison.groups:
            for row in group.rows:
                final = row.run.final
                if final is None or not row.counted:
                    continue
                if final.success is None:
                    return None
                rates.setdefault(group.label, {}).setdefault(comparison.env, []).append(final.success)
    everywhere = {label: tasks for label, tasks in rates.items() if len(tasks) == len(comparisons)}
    return [(label, _score(tasks)) for label, tasks in everywhere.items()] or None


# ---- The page -------------------------------------------------------------------------------------------------------


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    environment.filters["duration"] = _duration
    environment.filters["date"] = _date
    environment.globals["score_text"] = _score_text
    return environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else plain_number(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def _date(text: str) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return text
