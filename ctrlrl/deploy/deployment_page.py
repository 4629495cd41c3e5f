"""The page of a deployment: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.deployment import Outcome
from ctrlrl.deploy.report import summary
from ctrlrl.deploy.safety import FAULTS
from ctrlrl.deploy.simulated_config import SimulatedConfig
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.ticks import PHASES, read_ticks
from ctrlrl.files import write_atomically
from ctrlrl.runs.page import embed, template
from ctrlrl.runs.plots import SERIES, STYLE, inline_svg, short_number
from ctrlrl.runs.record import Video

SHOWN = 500
"""Ticks of the plots of commands: the first, and where a fault stopped the robot the last."""
JOINTS = 12


def write_page(bundle: Bundle, outcome: Outcome, out: Path, video: Path | None, robot: SimulatedConfig | None) -> Path:
    """Write `out/report.html` and return its path."""
    head, ticks = read_ticks(out / "log")
    path = out / "report.html"
    c, episodes = outcome.controller, [e for e in outcome.episodes if not e["given up"]]
    fault = c.get("fault")
    deployed, trained = outcome.compared
    names = {name for episode in episodes for name in episode["figures"]}
    figures = [
        (name, float(np.mean([e["figures"][name] for e in episodes if name in e["figures"]]))) for name in sorted(names)
    ]
    films = [] if video is None else embed([Video(path=video, facts={"seed": outcome.episodes[0]["seed"]})])
    page = template(Path(__file__).with_name("deployment.html")).render(
        name=bundle.manifest.name,
        about=summary(bundle),
        outcome=outcome,
        episodes=outcome.episodes,
        mean=float(np.mean(outcome.returns)) if outcome.returns else None,
        success=[e["success"] for e in episodes if e["success"] is not None],
        figures=figures,
        now=float(np.mean(deployed)) if deployed else None,
        before=float(np.mean(trained)) if trained else None,
        compared=len(trained),
        fault=fault,
        meaning=FAULTS[fault["kind"]] if fault else "",
        controller=c,
        otherwise=_otherwise(robot),
        lateness=Markup(_lateness(c)),
        times=_times(ticks),
        joints=Markup(
            _joints(
                ticks,
                head["joints"],
                list(bundle.manifest.action.joints),
                efforts=bundle.manifest.action.kind == "joint effort",
                faulted=fault is not None,
            )
        ),
        films=films,
        phases=[
            (name, int((ticks["phase"] == i).sum())) for i, name in enumerate(PHASES) if (ticks["phase"] == i).any()
        ],
    )
    write_atomically(path, page.encode())
    return path


def _otherwise(robot: SimulatedConfig | None) -> list[tuple[str, Any]]:
    """What the simulated robot had otherwise than training."""
    if robot is None:
        return []
    default = type(robot.impairments)()
    given = [(name, getattr(robot.impairments, name)) for name in default.__dataclass_fields__]
    return [(name, value) for name, value in given if value != getattr(default, name)]


def _lateness(controller: dict[str, Any]) -> str:
    """SVG of how late ticks began."""
    counts = {int(below): count for below, count in controller["lateness"]["below, us"].items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.9, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("late by less than, microseconds")
        axes.set_ylabel("ticks")
        axes.grid(visible=False, axis="x")
        axes.set_yscale("log")
        axes.set_ylim(0.5, 2 * max(counts.values(), default=1))
        axes.bar(range(len(counts)), list(counts.values()), color=SERIES[0])
        axes.set_xticks(range(len(counts)), [short_number(float(below)) for below in counts])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        return inline_svg(figure, "lateness", "How late ticks began")


def _times(ticks: Array) -> list[tuple[str, float, float, float]]:
    """Median, 99th percentile and largest, in ms, of what ticks took and how old states were."""
    driven = ticks[ticks["sent"] > 0]
    rows = [("a tick's work", ticks["ended"] - ticks["began"]), ("age of the state when commanded", driven["age"])]
    return [
        (name, 1e3 * float(np.median(v)), 1e3 * float(np.quantile(v, 0.99)), 1e3 * float(v.max()))
        for name, v in rows
        if len(v)
    ]


def _joints(ticks: Array, measured: list[str], driven: list[str], *, efforts: bool, faulted: bool) -> str:
    """SVG: each driven joint's position and target; where efforts are commanded, these in panels of their own."""
    part = ticks[-SHOWN:] if faulted else ticks[ticks["sent"] > 0][:SHOWN]
    if not len(part):
        return ""
    seconds = part["began"] - part["began"][0]
    panels: list[tuple[str, list[tuple[str, Array]]]] = []
    for i, name in enumerate(driven[:JOINTS]):
        position = part["position"][:, measured.index(name)]
        commanded = np.where(part["sent"] > 0, part["command"][:, i], np.nan)
        lines = [("measured", position), ("commanded", commanded)]
        panels += [(name, lines[:1]), (f"effort of {name}", lines[1:])] if efforts else [(name, lines)]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.0 * columns, 1.0 + 1.7 * rows), layout="constrained")
        for i, (title, lines) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, i + 1)
            axes.set_title(title)
            for label, values in lines:
                axes.plot(seconds, values, color=SERIES[label == "commanded"], label=label, linewidth=1.2)
            axes.margins(x=0.02)
            if i >= len(panels) - columns:
                axes.set_xlabel("s")
        if not efforts:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=2, borderpad=0.2)
        return inline_svg(figure, "joints", "Positions of the joints, and what was commanded")
