"""Several runs compared: one HTML file that needs nothing else, and a few lines for the console."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from ctrlrl.errors import UsageError
from ctrlrl.files import write_atomically
from ctrlrl.runs import plots
from ctrlrl.runs.page import duration, embed, setting_text, shown, template, writable_page
from ctrlrl.runs.peers import PeerFile, load_peers
from ctrlrl.runs.plots import GroupCurve, plain_number
from ctrlrl.runs.record import RunRecord, Video, load_run
from ctrlrl.runs.statistics import Floats, align_curves, iqm, stratified_bootstrap, time_to_threshold
from ctrlrl.runs.verdict import Verdict, console_lines, difference_text, judge, markdown

_NOT_LEARNING = frozenset(
    {"seed", "steps", "out", "preset", "device", "threads", "env_python", "worker_timeout"}
    | {"agent.execution", "video", "log_every", "eval_every", "eval_episodes", "checkpoint_every", "keep_checkpoints"}
)
"""Settings in which runs of one group may differ: which run it is, how long, where and how run, how closely watched."""


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
    finals: list[float]
    """Return of each counted run at that step; empty where the runs share none."""
    areas: list[float]
    """`RunRow.area` of each counted run."""

    @property
    def library(self) -> str | None:
        """The peers' library; None for runs of ours."""
        return self.rows[0].run.library

    @property
    def algo(self) -> str:
        """The algorithm's name alone."""
        return self.rows[0].run.algo.removesuffix(f" ({self.library})")

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
    """(setting, its value in each group of ours)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Runs compared, with one another and with peers."""

    runs: list[RunRecord]
    """Ours."""
    envs: list[EnvComparison]
    verdicts: list[Verdict]
    peers: list[PeerFile]
    notes: list[str]


def compare(
    run_dirs: Sequence[str | Path],
    *,
    threshold: float | None = None,
    peers: Sequence[str | Path] = (),
    random: Mapping[str, Floats] | None = None,
) -> Comparison:
    """Compare runs per environment and algorithm over their seeds.

    Runs are of one group when environment, algorithm and every setting that bears on learning agree (seed, length,
    device and the rhythm of evaluations and checkpoints may differ). Returns of different environments are never mixed,
    except as the normalized difference from peers (`ctrlrl.runs.verdict`); success rates are, where every run has them.

    Args:
        run_dirs: run folders, at least one.
        threshold: return for "steps to threshold"; by default 80 % of the best final return of each environment.
        peers: files with other libraries' returns (`ctrlrl.runs.peers`); environments that no run is of are left out.
        random: per environment returns (episodes,) of a random policy, where the peers files have none.

    Raises:
        UsageError: no runs, a threshold that is no finite number, or as `load_run` and `load_peers`.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise UsageError(f"the threshold must be a finite return, got {threshold}")
    files = [load_peers(path) for path in peers]
    runs, notes = _load_all(run_dirs)
    envs = {run.env for run in runs}
    theirs = [run for file in files for run in file.runs if run.env in envs]
    comparisons = _compare([*runs, *theirs], threshold)
    known: dict[str, Floats] = dict(random or {})
    for file in reversed(files):
        known |= file.random
    notes += [note for file in files for note in file.notes]
    return Comparison(runs=runs, envs=comparisons, verdicts=judge(comparisons, known), peers=files, notes=notes)


def write_comparison(comparison: Comparison, out: str | Path) -> Path:
    """Write the comparison as one HTML page; returns its path. Folders above it are created.

    Raises:
        UsageError: `out` is a folder or lies under a file.
    """
    target = writable_page(Path(out))
    runs, comparisons = comparison.runs, comparison.envs
    labels = list(dict.fromkeys(group.label for one in comparisons for group in one.groups))
    sections = []
    for index, one in enumerate(comparisons):
        curves = [group.curve for group in one.groups]
        firsts = [(group.label, video) for group in one.groups for video in _first_video(group)]
        embedded = embed(video for _, video in firsts)
        sections.append(
            {
                "comparison": one,
                "svg": Markup(plots.comparison_curves(f"env{index}", curves, one.threshold, labels)),
                "videos": [{**v, "label": label} for (label, _), v in zip(firsts, embedded, strict=True)],
            }
        )
    page = template().render(
        kind="comparison",
        title=" and ".join(sorted({run.algo for run in runs})) + " on " + ", ".join(one.env for one in comparisons),
        runs=runs,
        peers=comparison.peers,
        notes=comparison.notes,
        sections=sections,
        across=_success_across(comparisons),
        verdicts=comparison.verdicts,
        difference=difference_text,
        link=lambda run: _link(run.path / "report.html", target.parent),
        shown=shown,
    )
    write_atomically(target, page.encode())
    return target


def write_table(comparison: Comparison, out: str | Path) -> Path:
    """Write the comparison with peers as a Markdown table, for docs; returns its path.

    Raises:
        UsageError: there is nothing to compare with, or `out` is a folder or lies under a file.
    """
    if not comparison.verdicts:
        raise UsageError(f"{out} was to hold the comparison with peers, and there are none of these environments")
    target = writable_page(Path(out))
    write_atomically(target, markdown(comparison.verdicts).encode())
    return target


def write_picture(comparison: Comparison, out: str | Path) -> Path:
    """Draw each environment's curves into one picture, SVG or PNG by the name's ending; returns its path.

    Raises:
        UsageError: another ending, or `out` is a folder or lies under a file.
    """
    target = writable_page(Path(out))
    if target.suffix not in (".svg", ".png"):
        raise UsageError(f"{out} must end in .svg or .png: the picture's format")
    panels = [
        (
            one.env,
            [
                (f"ctrlrl {g.label}" if g.library is None else g.label, [r.run.curve for r in g.rows if r.counted])
                for g in one.groups
            ],
        )
        for one in comparison.envs
    ]
    write_atomically(target, plots.returns_picture(panels, target.suffix[1:]))
    return target


def console_summary(comparison: Comparison) -> str:
    """The few lines that the command line prints about one run or several."""
    lines = []
    for one in comparison.envs:
        at = "(no step in common)" if one.last_common is None else f"at step {one.last_common:,.0f}"
        lines.append(f"{one.env}: IQM of the evaluation return {at}, 95 % interval over seeds")
        width = max(len(group.label) for group in one.groups)
        for group in one.groups:
            seeds = f"{group.seeds} seed{'s' if group.seeds != 1 else ' '}"
            lines.append(f"  {group.label:<{width}}  {seeds}  {_score_text(group.final)}")
        lines += [f"  note: {note}" for note in one.notes]
    for verdict in comparison.verdicts:
        lines += console_lines(verdict)
    return "\n".join([*lines, *comparison.notes])


def run_summary(run_dir: str | Path) -> str:
    """The few lines that the command line prints about one run.

    Raises:
        UsageError: as `load_run`.
    """
    (run,), notes = _load_all([run_dir])
    return "\n".join([*_summary_of_one(run), *notes])


def _summary_of_one(run: RunRecord) -> list[str]:
    lines = [f"{run.algo} on {run.env}, seed {run.seed}: {run.step:,} steps in {duration(run.seconds)} ({run.state})"]
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
        differences=_differences([(label, members) for label, members in labelled if members[0].library is None]),
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
        parts = [f"{key.rpartition('.')[2]}={setting_text(own.get(key))}" for key in keys]
        more = f", {len(parts) - 2} more" if len(parts) > 2 else ""
        result.append((members[0].algo + (f" ({', '.join(parts[:2])}{more})" if parts else ""), members))
    labels = [label for label, _ in result]
    unique = [
        (f"{label} #{labels[:index].count(label) + 1}" if labels.count(label) > 1 else label, members)
        for index, (label, members) in enumerate(result)
    ]
    return sorted(unique, key=lambda pair: (pair[1][0].library is not None, pair[0]))  # ours first


def _settings(run: RunRecord) -> dict[str, Any]:
    return {key: value for key, value in run.flat_config.items() if key not in _NOT_LEARNING}


def _independent(label: str, members: Sequence[RunRecord], notes: list[str]) -> set[Path]:
    """The runs of a group that count: evaluated ones, and of those with one seed the longest."""
    longest: dict[str, RunRecord] = {}
    for run in members:
        if not run.evaluations:
            notes.append(f"{run.path.name} has no evaluation yet and is left out of the figures.")
            continue
        key = str(run.path) if run.seed is None else setting_text(run.seed)
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
        finals=[float(value) for value in finals],
        areas=areas,
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
        cells = [list(dict.fromkeys(setting_text(run.get(name)) for run in group)) for group in table]
        if len({value for cell in cells for value in cell}) > 1:
            rows.append((name, [", ".join(cell) for cell in cells]))
    return rows


def _comparable(run: RunRecord) -> dict[str, Any]:
    flat = {key: value for key, value in run.flat_config.items() if key not in ("seed", "env", "out")}
    hardware, git = run.provenance.get("hardware", {}), run.provenance.get("git", {})
    packages = run.provenance.get("packages", {})
    flat |= {"ctrlrl version": run.provenance.get("ctrlrl"), "commit": git.get("commit")}
    flat |= {f"{name} version": packages.get(name) for name in ("torch", "mujoco", "gymnasium")}
    return flat | {"CPU": hardware.get("cpu"), "GPU": hardware.get("gpu")}


def _first_video(group: Group) -> list[Video]:
    return next(([row.run.videos[0]] for row in group.rows if row.run.videos), [])


def _link(file: Path, page_folder: Path) -> str | None:
    """Where a page in `page_folder` finds `file`, if there is one."""
    return os.path.relpath(file, page_folder).replace(os.sep, "/") if file.is_file() else None


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
                if final is None or not row.counted or group.library is not None:
                    continue
                if final.success is None:
                    return None
                rates.setdefault(group.label, {}).setdefault(comparison.env, []).append(final.success)
    everywhere = {label: tasks for label, tasks in rates.items() if len(tasks) == len(comparisons)}
    return [(label, _score(tasks)) for label, tasks in everywhere.items()] or None
