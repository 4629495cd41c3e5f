"""Plots of runs as inline SVG. They take their ink from the page, so they read well on light and on dark.

Colours are fixed here and written as CSS variables with the light colour as fallback: `currentColor` for ink,
`var(--grid)`, and `var(--series-0)` onwards, which the page sets for each scheme. Text stays text. Ids are prefixed
with the plot's name, so that many plots fit in one page; the same input gives the same bytes.
"""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ctrlrl.runs.statistics import Floats, align_curves

SERIES = ("#0b68ad", "#c9540d", "#178562", "#a2559a", "#a57c00", "#3f8fc4", "#b8324f", "#6b6f76")
"""Light-scheme colours of the series, told apart by readers with colour-blindness too; dark ones in report.html."""
_INK, _GRID = "#202124", "#d9dce1"
_STEPS = "environment steps"
_XLINK = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_MAX_POINTS = 2000
_MAX_DOTS = 800
_TICKS = [1, 2, 2.5, 5, 10]
_SMALLEST_TEXT = 8.5  # points, of ticks and legends

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": _SMALLEST_TEXT,
    "legend.frameon": False,
    "legend.title_fontsize": _SMALLEST_TEXT,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "path.simplify_threshold": 0.2,
    "svg.fonttype": "none",
    "svg.hashsalt": "ctrlrl",
    "text.color": _INK,
    "text.parse_math": False,  # a dollar in a metric's name is a dollar
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": _SMALLEST_TEXT,
    "ytick.labelsize": _SMALLEST_TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
"""Of every plot that `inline_svg` takes."""


@dataclass(frozen=True, slots=True)
class Series:
    """One named curve over environment steps."""

    steps: Floats
    """(T,) ascending."""
    values: Floats
    """(T,); NaN where a value is missing."""


@dataclass(frozen=True, slots=True)
class EvaluationCurve:
    """Evaluations of one run: (T,) each, in units of return."""

    steps: Floats
    mean: Floats
    low: Floats
    """Worst episode of each evaluation."""
    high: Floats
    """Best episode of each evaluation."""


@dataclass(frozen=True, slots=True)
class GroupCurve:
    """The seeds of one algorithm in one environment: IQM with interval on a common grid, and each run on its own."""

    label: str
    grid: Floats
    iqm: Floats
    low: Floats
    high: Floats
    runs: Sequence[Series]


def short_number(value: float) -> str:
    """`value` as on an axis: 20k, 1.5M, -300, 0.05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def plain_number(value: float) -> str:
    """`value` as in a table, to four digits: 4,521, 731.2, -0.05."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def downsample(series: Series, limit: int = _MAX_POINTS) -> Series:
    """At most `limit` points that look the same: the lowest and the highest of each stretch, so no spike is lost."""
    count = len(series.steps)
    if count <= limit:
        return series
    edges = np.linspace(0, count, limit // 2 + 1).astype(int)
    kept: set[int] = set()
    for start, stop in itertools.pairwise(edges):
        stretch = series.values[start:stop]
        if np.isfinite(stretch).any():
            kept |= {start + int(np.nanargmin(stretch)), start + int(np.nanargmax(stretch))}
    rows = np.array(sorted(kept), dtype=int)
    return Series(series.steps[rows], series.values[rows])


def learning_curve(
    name: str, evaluations: EvaluationCurve, episodes: Series, best: int | None, unit: str = _STEPS
) -> str:
    """SVG of one run: mean and range of each evaluation over training episodes as points.

    Args:
        name: unique in the page; prefixes every id.
        evaluations: may be empty.
        episodes: (step at the end, return) of each training episode, in any number.
        best: index of the best evaluation, which is marked.
        unit: of the steps.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(5.5, 3.1, unit, "return per episode")
        if len(episodes.steps):
            rows = np.unique(np.linspace(0, len(episodes.steps) - 1, _MAX_DOTS).astype(int))
            axes.plot(
                episodes.steps[rows],
                episodes.values[rows],
                linestyle="none",
                marker="o",
                markersize=2.8,
                markeredgewidth=0,
                color=SERIES[7],
                alpha=0.55,
                label="training episode (exploring)",
            )
        steps, mean = evaluations.steps, evaluations.mean
        if len(steps):
            few = len(steps) <= 40
            axes.fill_between(
                steps, evaluations.low, evaluations.high, color=SERIES[0], alpha=0.16, linewidth=0, label="min to max"
            )
            axes.plot(
                steps, mean, color=SERIES[0], marker="o" if few else None, markersize=3.2, label="evaluation, mean"
            )
        if best is not None:
            axes.plot(
                [steps[best]],
                [mean[best]],
                marker="D",
                markersize=6.5,
                linestyle="none",
                color=SERIES[1],
                label=f"best: {plain_number(float(mean[best]))}",
            )
        return _svg(figure, axes, name, "Learning curve: return over environment steps")


def stages(
    name: str, before: Series, before_label: str, after: Series, after_label: str, lines: Mapping[str, float]
) -> str:
    """Two trainings, the second of which went on from the first, side by side at one scale of returns.

    Args:
        name: prefix of the ids in the SVG.
        before: (step, mean return) of the first one's evaluations.
        before_label: its axis.
        after: of the second one's.
        after_label: its axis.
        lines: returns to compare with, by what they are.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.8, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.6])
        for index, (axes, series, label) in enumerate(((left, before, before_label), (right, after, after_label))):
            axes.plot(series.steps, series.values, color=SERIES[index], marker="o", markersize=3)
            for text, value in lines.items():
                axes.axhline(value, color=_INK, linestyle="--", linewidth=1, label=text)
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(3 + 2 * index, steps=_TICKS))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        left.set_ylabel("evaluation return")
        if len(after.values):
            right.axhline(after.values[0], color=SERIES[0], linestyle=":", linewidth=1, label="before it went on")
        handles, labels = right.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside upper left", ncols=2, borderpad=0.2)
        described = f"Evaluation returns of {before_label} and, going on from it, of {after_label}."
        return inline_svg(figure, name, described)


def comparison_curves(name: str, groups: Sequence[GroupCurve], threshold: float | None, labels: Sequence[str]) -> str:
    """SVG of one environment: the IQM of each group with its interval, every run as a thin line, the threshold dashed.

    `labels` are those of all groups in the page, so that one label has one colour throughout.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(5.8, 3.2, _STEPS, "evaluation return")
        for group in groups:
            index = labels.index(group.label)
            color, dashes = SERIES[index % 7], "-" if index < 7 else "--"
            for run in group.runs:
                thin = downsample(run)
                axes.plot(thin.steps, thin.values, color=color, alpha=0.35, linewidth=0.7)
            axes.fill_between(group.grid, group.low, group.high, color=color, alpha=0.16, linewidth=0)
            axes.plot(group.grid, group.iqm, color=color, linestyle=dashes, linewidth=2, label=_legend(group.label))
        if threshold is not None:
            label = f"threshold: {plain_number(threshold)}"
            axes.axhline(threshold, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6, label=label)
        return _svg(figure, axes, name, "Evaluation return over environment steps, by group")


def returns_picture(
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[Series]]]]],
    format: str,
    *,
    quantity: str = "evaluation return",
) -> bytes:
    """A picture for docs, on white of its own, so that it reads in a light page and in a dark one.

    Args:
        panels: (environment, [(label, the curve of each seed)]). Each panel shows the mean over seeds, where all of
            them have values, the range from the lowest to the highest, and each seed as a thin line.
        format: `svg` or `png`.
        quantity: what the curves are of.

    Returns:
        The file's content, the same for the same input.
    """
    labels = list(dict.fromkeys(label for _, groups in panels for label, _ in groups))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    own: dict[Any, Any] = {"svg.fonttype": "path", "figure.facecolor": "white", "figure.constrained_layout.w_pad": 0.1}
    with matplotlib.rc_context({**STYLE, **own}):
        figure = Figure(figsize=(3.5 * max(columns, 2), 2.7 * rows + 0.5), layout="constrained")
        drawn: dict[str, Any] = {}
        for index, (env, groups) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            counts = [len(curves) for _, curves in groups]
            several = " and ".join(map(str, counts)) if len(counts) < 3 else f"{min(counts)} to {max(counts)}"
            seeds = several if len(set(counts)) > 1 else str(counts[0])
            axes.set_title(
                f"{env}, {seeds} seed{'' if seeds == '1' else 's'}{' each' * (seeds.isdigit() and len(counts) > 1)}"
            )
            axes.set_xlabel(_STEPS)
            if index % columns == 0:
                axes.set_ylabel(quantity)
            axes.grid(visible=False, axis="x")
            axes.margins(x=0.02)
            for label, curves in groups:
                if not curves:
                    continue
                place = labels.index(label)
                color, dashes = SERIES[place % 7], "-" if place < 7 else "--"
                for curve in map(downsample, curves):
                    axes.plot(curve.steps, curve.values, color=color, alpha=0.5, linewidth=0.7)
                grid, values = align_curves([(curve.steps, curve.values) for curve in curves])
                axes.fill_between(grid, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
                drawn[label] = axes.plot(grid, values.mean(axis=0), color=color, linestyle=dashes, linewidth=2)[0]
            _ticks(axes)
        figure.legend(
            drawn.values(),
            map(_legend, drawn),
            loc="outside upper left",
            ncols=min(max(len(drawn), 1), 4),
            title="Mean over seeds, range from the lowest to the highest, each seed:",
            alignment="left",
        )
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format=format, dpi=160, metadata={"Date": None} if format == "svg" else {"Software": None}
        )
    return buffer.getvalue()


def small_panel(name: str, series: Mapping[str, Series], unit: str = "") -> str:
    """SVG of one small plot with all of `series`; a logarithmic axis where they are positive over three decades."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.9, 2.3, _STEPS, unit)
        for index, (label, full) in enumerate(series.items()):
            thin = downsample(full)
            axes.plot(
                thin.steps,
                thin.values,
                color=SERIES[index % len(SERIES)],
                linewidth=1.2,
                marker="o" if len(thin.steps) == 1 else None,
                label=_legend(label),
            )
        values = np.concatenate([one.values for one in series.values()])
        values = values[np.isfinite(values)]
        if len(values) and values.min() > 0 and values.max() / values.min() > 1000:
            axes.set_yscale("log")
        return _svg(figure, axes, name, f"{', '.join(series)} over environment steps", title=len(series) == 1)


def value_distribution(name: str, mean: Series, deviation: Series) -> str:
    """SVG of a Gaussian return distribution that was learned: its mean, and one and two standard deviations about it.

    Args:
        name: unique in the page; prefixes every id.
        mean: of the returns in the batches that were learned from.
        deviation: mean of the learned standard deviations, at the same steps.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(3.9, 2.3, _STEPS, "return")
        for times, label in ((2, "2 standard deviations"), (1, "1 standard deviation")):
            low, high = mean.values - times * deviation.values, mean.values + times * deviation.values
            axes.fill_between(mean.steps, low, high, color=SERIES[0], alpha=0.16, linewidth=0, label=label)
        few = len(mean.steps) == 1
        axes.plot(mean.steps, mean.values, color=SERIES[0], linewidth=1.2, marker="o" if few else None, label="mean")
        return _svg(figure, axes, name, "Learned return distribution over environment steps")


_FAMILIES = (  # title, pattern, whether curves of one scale share a panel, unit
    ("Losses", r"loss", True, "loss"),
    ("Temperature", r"alpha|temperature", True, ""),
    ("Entropy", r"entropy", True, "nats"),
    ("Q values", r"(^|[_/.])(q\d*|qs?|v|values?)([_/.]|$)", True, "return"),
    ("Speed", r"_per_s$", True, "per second"),
    ("Other metrics", r"", False, ""),
)


def panels(metrics: Mapping[str, Series]) -> list[tuple[str, str, dict[str, Series]]]:
    """Sort any training metrics into panels: (family, unit, curves that share a panel), none left out.

    Losses, temperatures, entropies, Q values and rates share a panel with those of their family whose size is within a
    factor of five; every other metric has a panel of its own.
    """
    result: list[tuple[str, str, dict[str, Series]]] = []
    left = dict(metrics)
    for title, pattern, shared, unit in _FAMILIES:
        family = {key: left.pop(key) for key in list(left) if re.search(pattern, key)}
        groups: list[tuple[float, dict[str, Series]]] = []
        for key, series in family.items():
            size = _size(series)
            place = next((g for s, g in groups if shared and s / 5 <= size <= s * 5 and len(g) < 4), None)
            if place is None:
                groups.append((size, {key: series}))
            else:
                place[key] = series
        result += [(title, unit, group) for _, group in groups]
    return result


def _size(series: Series) -> float:
    finite = np.abs(series.values[np.isfinite(series.values)])
    return float(np.median(finite)) if len(finite) else 0.0


def _legend(label: str) -> str:
    # matplotlib leaves labels that start with an underscore out of the legend.
    return f" {label}" if label.startswith("_") else label


def _figure(width: float, height: float, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=False, axis="x")
    axes.margins(x=0.02)
    return figure, axes


def _ticks(axes: Axes) -> None:
    """Steps from 0, and short numbers on both axes."""
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_TICKS))
        axes.ticklabel_format(axis="y", useOffset=False)
        if max(map(abs, axes.get_ylim())) >= 1000:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def _svg(figure: Figure, axes: Axes, name: str, description: str, *, title: bool = False) -> str:
    """The finished figure as an `<svg>` element that can stand in a page with others."""
    _ticks(axes)
    handles, labels = axes.get_legend_handles_labels()
    if title and labels:
        axes.set_title(labels[0])
    elif labels:
        columns = max(1, int(figure.get_figwidth() * 15 / (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, len(labels)), borderpad=0.2)
    return inline_svg(figure, name, description)


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """A figure drawn under `STYLE` as an `<svg>` element; `name` is unique in the page, `description` is read aloud."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The browser draws the text with its own fonts; that matplotlib's lacks a glyph matters to nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Narrower than this, text would be smaller than 10 px; the page scrolls the plot instead.
    min_width = math.ceil(figure.get_figwidth() * 72 * 10 / _SMALLEST_TEXT)
    return _inline(buffer.getvalue(), name, description, min_width)


def _inline(document: str, name: str, description: str, min_width: int) -> str:
    """matplotlib's SVG document as an element of a page: no size or font of its own, page colours, short numbers."""
    svg = document[document.index("<svg") :].strip().replace("font-family: 'DejaVu Sans'; ", "")
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # only what is referred to needs an id
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(
        r' (?:d|x|y|transform)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0].replace("\n", "")), svg
    )
    svg = svg.replace(_INK, "currentColor").replace(_GRID, f"var(--grid, {_GRID})")
    for index, color in enumerate(SERIES):
        svg = svg.replace(color, f"var(--series-{index}, {color})")
    head = f'<svg role="img" aria-label="{html.escape(description)}" stroke-linejoin="round"'
    head += f' style="min-width: {min_width}px"'
    return re.sub(r'<svg .*?(viewBox="[^"]*")[^>]*', lambda match: f"{head} {match[1]} {_XLINK}", svg, count=1)
