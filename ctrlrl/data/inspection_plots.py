"""Plots of a dataset as inline SVG, in the style of those of runs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ctrlrl.data.inspection_columns import ColumnSummary, RewardSummary, flat, is_pooled, observation_columns
from ctrlrl.data.store import Array, Dataset, Ragged
from ctrlrl.runs.plots import SERIES, STYLE, Series, downsample, inline_svg, plain_number, short_number
from ctrlrl.runs.statistics import Floats

MULTIPLES = 24
"""Numbers of a column that get a histogram of their own; the table has them all."""
_LINES = 6
"""Numbers up to which an episode is drawn as lines and not as a map of colours."""
_MAP_ROWS, _MAP_COLUMNS = 64, 800


def histogram(name: str, values: Array, label: str, counted: str, marks: Sequence[tuple[str, float]] = ()) -> str:
    """SVG of one histogram with vertical lines at `marks`; a logarithmic count where one bin dwarfs the others."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.9, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(label)
        axes.set_ylabel(counted)
        axes.grid(visible=False, axis="x")
        _bars(axes, values)
        for place, (text, value) in enumerate(marks):
            axes.axvline(value, color=SERIES[1 + place], linewidth=1.4, linestyle="--", label=text)
        if marks:
            figure.legend(loc="outside upper left", ncols=3, borderpad=0.2)
        return inline_svg(figure, name, f"Histogram: {label}")


def returns_in_order(name: str, returns: Floats) -> str:
    """SVG of the return of each episode in the order of the dataset: a replay buffer rises, a mixture has steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.9, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("episode in the order of the dataset")
        axes.set_ylabel("return")
        axes.grid(visible=False, axis="x")
        dots = downsample(Series(np.arange(len(returns), dtype=np.float64), returns), 1000)
        axes.plot(
            dots.steps, dots.values, linestyle="none", marker="o", markersize=2.6, markeredgewidth=0, color=SERIES[0]
        )
        axes.margins(x=0.02)
        _numbers(axes, 5)
        return inline_svg(figure, name, "Return of each episode in the order of the dataset")


def small_multiples(name: str, column: ColumnSummary, bounds: bool) -> str:
    """SVG of a histogram for each of the first numbers of a column, the space's bounds dashed where they are finite."""
    shown = min(len(column.mean), MULTIPLES)
    rows = math.ceil(shown / 4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 1.25 * rows + 0.1), layout="constrained")
        for d in range(shown):
            axes = figure.add_subplot(rows, 4, d + 1)
            axes.set_title(column.dimension(d), fontweight="normal")
            axes.grid(visible=False)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            values = np.asarray(column.sample[:, d], np.float64)
            _bars(axes, values[np.isfinite(values)], ticks=3, percentiles=not bounds)
            for bound in (column.low[d], column.high[d]):
                if bounds and np.isfinite(bound):
                    axes.axvline(bound, color=SERIES[1], linewidth=1, linestyle="--")
        return inline_svg(figure, name, f"Histograms of {column.name}, number by number")


def reward_histogram(name: str, reward: RewardSummary) -> str:
    """SVG of the rewards."""
    return histogram(name, reward.sample, "reward", "steps")


def episode(
    name: str, dataset: Dataset, index: int, observation: Sequence[ColumnSummary], action: ColumnSummary
) -> str:
    """SVG of one episode over time: observations, actions and rewards, one above the other."""
    columns: dict[str, Any] = dict(observation_columns(dataset))
    start, length = int(dataset.starts[index]), int(dataset.lengths[index])
    seen, steps = slice(start + index, start + index + length + 1), slice(start, start + length)
    unit = 1.0 if dataset.control_dt is None else dataset.control_dt
    parts = [flat(np.asarray(columns[one.name][seen])).astype(np.float64) for one in observation]
    labels = [one.dimension(d) for one in observation for d in range(len(one.mean))]
    with matplotlib.rc_context(STYLE):
        tall = 1.8 if len(labels) > _LINES else 1.5
        heights = ([tall] if labels else []) + [1.8 if len(action.mean) > _LINES else 1.3, 1.0]
        figure = Figure(figsize=(8.5, sum(heights) + 0.5), layout="constrained")
        places = list(np.atleast_1d(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)))
        if labels:
            values = np.concatenate(parts, axis=1)
            center = np.concatenate([one.mean for one in observation])
            spread = np.concatenate([np.where(one.std > 0, one.std, 1.0) for one in observation])
            _over_time(places[0], unit, (values - center) / spread, labels, "observation", 3.0)
        span = np.where(np.isfinite(action.high - action.low), action.high - action.low, np.inf)
        scale = np.where(np.isfinite(span), span / 2, np.maximum(np.abs(action.maximum), 1e-9))
        middle = np.where(np.isfinite(span), (action.high + action.low) / 2, 0.0)
        values = flat(dataset.action[steps]).astype(np.float64)
        names = [action.dimension(d) for d in range(len(action.mean))]
        if len(names) > _LINES:
            values = (values - middle) / scale
        _over_time(places[-2], unit, values, names, "action", 1.0)
        rewards = downsample(
            Series(np.arange(length, dtype=np.float64) * unit, np.asarray(dataset.reward[steps], np.float64))
        )
        places[-1].plot(rewards.steps, rewards.values, color=SERIES[0], linewidth=1.1)
        places[-1].set_ylabel("reward")
        places[-1].grid(visible=False, axis="x")
        _numbers(places[-1], 3)
        places[-1].set_xlabel("step" if dataset.control_dt is None else "seconds")
        places[-1].set_xlim(0, (length + 1) * unit)  # the last observation, too
        figure.align_ylabels(places)
        return inline_svg(figure, name, f"Episode {index}: observations, actions and rewards over time")


def _over_time(axes: Axes, unit: float, values: Floats, labels: Sequence[str], what: str, limit: float) -> None:
    """Lines where there are few numbers, else one row of colours for each."""
    axes.grid(visible=False, axis="x")
    if len(labels) <= _LINES:
        times = np.arange(len(values), dtype=np.float64) * unit
        for d, label in enumerate(labels):
            line = downsample(Series(times, values[:, d]))
            axes.plot(line.steps, line.values, color=SERIES[d], linewidth=1.1, label=label)
        axes.set_ylabel(what + (" (std)" if what == "observation" else ""))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.0)
        _numbers(axes, 4)
        return
    shown = values[:: math.ceil(len(values) / _MAP_COLUMNS), :_MAP_ROWS].T
    extent = (0.0, len(values) * unit, len(shown) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.imshow(
        shown, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent, interpolation="none"
    )  # an <image> of one pixel a number
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    rest = f", first {_MAP_ROWS}" if len(labels) > _MAP_ROWS else ""
    axes.set_ylabel(f"{what}{rest}")


def frames(dataset: Dataset, index: int, name: str, count: int = 6) -> list[str]:
    """PNG pictures of one episode as base64, evenly spread from its first to its last observation."""
    column = observation_columns(dataset)[name]
    if isinstance(column, Ragged) or not is_pooled(column) or column.dtype != np.uint8 or column.ndim < 3:
        return []
    first, length = int(dataset.starts[index]) + index, int(dataset.lengths[index])
    rows = np.unique(np.linspace(0, length, count).astype(int))
    return [_png(picture(np.asarray(column[first + row]))) for row in rows]


def picture(entry: Array) -> Array:
    """(H, W) or (H, W, 3) of a picture whose channels are last or first; the newest one of several stacked."""
    while entry.ndim > 3:
        entry = entry[-1]
    if entry.ndim == 3 and entry.shape[0] < min(entry.shape[1:]):
        entry = np.moveaxis(entry, 0, -1)
    if entry.ndim == 3:
        channels = 3 if entry.shape[-1] % 3 == 0 else 1
        entry = entry[..., -channels:] if channels == 3 else entry[..., -1]
    return entry


def _png(pixels: Array) -> str:
    buffer = io.BytesIO()
    # 0 and 255 stay black and white whatever the picture holds.
    matplotlib.image.imsave(buffer, pixels, cmap="gray", vmin=0, vmax=255)
    return base64.b64encode(buffer.getvalue()).decode()


def _bars(axes: Axes, values: Array, *, ticks: int = 5, percentiles: bool = False) -> None:
    """A histogram; with `percentiles`, without the outermost thousandth at each end, which would flatten the rest."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return
    low, high = np.quantile(values, [0.001, 0.999]) if percentiles else (values.min(), values.max())
    if percentiles and low == high:
        low, high = values.min(), values.max()
    whole = high - low <= 40 and np.array_equal(values, np.round(values))
    if whole:  # one bar for each
        edges = np.arange(math.floor(low), math.ceil(high) + 2) - 0.5
    elif high > low:
        edges = np.linspace(low, high, 41)
    else:
        width = max(abs(low) * 0.05, 0.05)
        edges = np.linspace(low - width, low + width, 12)
    counts, edges = np.histogram(values, edges)
    axes.stairs(counts, edges, fill=True, color=SERIES[0], alpha=0.85)
    positive = np.sort(counts[counts > 0])
    if ticks > 3 and len(positive) > 3 and positive[-1] > 100 * np.median(positive):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.margins(x=0.03)
    if whole and high - low < 4:
        axes.set_xlim(low - 2.5, high + 2.5)
    _numbers(axes, ticks, whole=whole)


def _numbers(axes: Axes, ticks: int, *, whole: bool = False) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10], integer=whole))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    if axes.get_yscale() != "log" and len(axes.get_yticks()):
        axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))


def _tick(value: float) -> str:
    return short_number(value) if abs(value) >= 1000 else plain_number(value)
