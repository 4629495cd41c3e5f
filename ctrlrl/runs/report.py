"""The report of one run: one HTML file that needs nothing else, no network and no JavaScript."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ctrlrl.files import write_atomically
from ctrlrl.runs import plots
from ctrlrl.runs.page import embed, setting_text, shown, template, writable_page
from ctrlrl.runs.plots import EvaluationCurve, Series
from ctrlrl.runs.record import RATES, RunRecord, load_run
from ctrlrl.runs.stages import better_of, change_of


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write `report.html` into the run folder (or to `out`) and return its path; replaces an earlier one in one step.

    Folders above `out` are created.

    Raises:
        UsageError: as `load_run`, or `out` is a folder or lies under a file.
    """
    run = load_run(run_dir)
    path = writable_page(run.path / "report.html" if out is None else Path(out))
    metrics, idle = _while_updating(run.metrics)
    panels = [
        (family, Markup(plots.small_panel(f"panel{index}", curves, unit)), idle if curves.keys() & {*RATES} else 0)
        for index, (family, unit, curves) in enumerate(plots.panels(metrics))
    ]
    if {"q_mean", "q_std"} <= metrics.keys() and len(metrics["q_mean"].steps) == len(metrics["q_std"].steps):
        learned = plots.value_distribution("values", metrics["q_mean"], metrics["q_std"])
        panels.insert(0, ("Value distribution", Markup(learned), 0))
    page = template().render(
        kind="run",
        title=f"{run.algo} on {run.env}",
        run=run,
        curve=Markup(plots.learning_curve("curve", _evaluation_curve(run), run.episodes, run.best_index, run.unit)),
        recent=float(run.episodes.values[-10:].mean()) if len(run.episodes.values) else None,
        stages=_stages(run),
        panels=panels,
        videos=embed(run.videos),
        no_video=_why_no_video(run),
        before_and_after=_before_and_after(run),
        config=_config_sections(run.flat_config),
        changed=set(run.provenance.get("changed", [])),
        commands=_commands(run),
        provenance=_provenance_rows(run.provenance),
    )
    write_atomically(path, page.encode())
    return path


def _while_updating(metrics: Mapping[str, Series]) -> tuple[dict[str, Series], int]:
    """`metrics` with rates only of records in which the agent learnt, and the number of records that lost theirs.

    Steps without updates are so much faster that the rest would be a flat line. Where there is nothing else, they stay.
    """
    updates = metrics.get("updates_per_s")
    idle = np.empty(0) if updates is None else updates.steps[updates.values == 0]
    if updates is None or len(idle) == len(updates.steps):
        return dict(metrics), 0
    kept = {key: ~np.isin(metrics[key].steps, idle) for key in RATES if key in metrics}
    rates = {key: Series(metrics[key].steps[rows], metrics[key].values[rows]) for key, rows in kept.items()}
    return {**metrics, **rates}, len(idle)


def _evaluation_curve(run: RunRecord) -> EvaluationCurve:
    curve = run.curve
    low = np.array([one.returns.min() for one in run.evaluations], dtype=np.float64)
    high = np.array([one.returns.max() for one in run.evaluations], dtype=np.float64)
    return EvaluationCurve(curve.steps, curve.values, low, high)


def _stages(run: RunRecord) -> dict[str, Any] | None:
    """What the page says of a run that started with another's weights: both curves, dip and regret."""
    history = run.history
    pairs = [p for p in history.get("evaluations", []) if isinstance(p, list) and len(p) == 2]
    if not history or "algo" not in history:
        return None
    before = Series(np.array([float(p[0]) for p in pairs]), np.array([float(p[1]) for p in pairs]))
    data = history.get("data") or {}
    change = change_of([(one.step, one.mean) for one in run.evaluations], data.get("reference"))
    unit = str(history.get("unit", "steps"))
    lines = {"mean return of the data": data["mean_return"]} if "mean_return" in data else {}
    drawn = plots.stages("stages", before, f"{history['algo']}, {unit}", run.curve, f"{run.algo}, steps", lines)
    said = better_of(change.first, data) if change is not None and "mean_return" in data else ""
    return {"history": history, "unit": unit, "svg": Markup(drawn), "change": change, "better": said}


def _before_and_after(run: RunRecord) -> list[tuple[str, tuple[str, ...]]]:
    """What was said in the same episodes at the first evaluation and at the best one."""
    told = [one for one in run.evaluations if one.transcripts]
    if not told:
        return []
    best = max(told, key=lambda one: (one.mean, one.step))
    shown_ones = [told[0]] if best is told[0] else [told[0], best]
    return [(f"Step {one.step:,}, return {one.mean:.3g} on average", one.transcripts) for one in shown_ones]


def _why_no_video(run: RunRecord) -> str | None:
    """What the run itself says about the video that is not there."""
    sessions = [note for session in run.provenance.get("sessions", []) for note in session.get("notes", [])]
    said = [run.status.get("message", ""), *(text for _, text in reversed(run.notes)), *reversed(sessions)]
    return next((text for text in said if "video" in text.lower() or "render" in text.lower()), None)


def _config_sections(flat_config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(section, rows of (dotted name, name inside the section, value)), the run's own settings first."""
    sections: dict[str, list[tuple[str, str, str]]] = {"run": []}
    for dotted, value in flat_config.items():
        section, _, rest = dotted.partition(".")
        sections.setdefault(section if rest else "run", []).append((dotted, rest or section, setting_text(value)))
    return list(sections.items())


def _commands(run: RunRecord) -> list[tuple[str, str]]:
    folder = shlex.quote(shown(run.path))
    rows = [("Train it again", run.provenance["command"])] if "command" in run.provenance else []
    return [
        *rows,
        ("Go on where it stopped", f"ctrlrl resume {folder}"),
        ("Evaluate the best checkpoint", f"ctrlrl eval {folder}"),
    ]


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
