"""Ours against peers over several environments: the pooled normalized difference of returns, and what it says.

Per environment the difference is (mean of our runs - mean of the peers') / scale, where scale is what all these runs
learned there: the mean of their returns above that of a random policy (none where a run is below it). It is of both
sides and not of the peers alone, so that exchanging the sides changes the sign and nothing else: a divisor that is the
mean of three runs of one side alone is as uncertain as they are, and favours the other. Environments have equal
weights; the interval is that of `pooled_difference`.

The return compared is that of the last evaluation up to which all runs went, not an average of the last few. Averaging
removes the noise of one policy's episodes, but what differs between seeds is the policies; and it looks back to where
less had been learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ctrlrl.runs.plots import plain_number
from ctrlrl.runs.statistics import Difference, Floats, pooled_difference

if TYPE_CHECKING:
    from ctrlrl.runs.comparison import EnvComparison, Group

CONFIDENCE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvDifference:
    """Ours against a peer's in one environment."""

    env: str
    step: float
    """Environment steps at which they are compared."""
    ours: list[float]
    """Final return of each run."""
    peers: list[float]
    random: float
    """Mean return of uniformly random actions; NaN where it is not known."""
    final: Difference | None
    """Of the final returns; None where there is no scale."""
    area: Difference | None
    """Of the mean returns over training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One of our algorithms against a peer's, over all environments that both ran in."""

    ours: str
    peers: str
    envs: list[EnvDifference]
    final: Difference | None
    """Pooled; None where no environment allows it."""
    pooled: int
    """How many of the environments it is pooled over."""
    area: Difference | None
    notes: list[str]

    @property
    def word(self) -> str:
        """`below` or `above` where the interval of the final return lies wholly there, else `not below`."""
        if self.final is None:
            return "no verdict"
        return "below" if self.final.high < 0 else "above" if self.final.low > 0 else "not below"

    @property
    def sentence(self) -> str:
        """The verdict and what it stands on."""
        if self.final is None:
            return f"{self.ours} against {self.peers}: no verdict, since no environment allows one."
        return (
            f"{self.ours} is {self.word} {self.peers}: pooled normalized difference of the final return "
            f"{difference_text(self.final)} over {self._pooled}, {100 * CONFIDENCE:.0f} % interval."
        )

    @property
    def _pooled(self) -> str:
        of = f"{self.pooled} of " if self.pooled < len(self.envs) else ""
        return f"{of}{len(self.envs)} environment{'s' * (len(self.envs) != 1)}"


def judge(comparisons: Sequence[EnvComparison], random: Mapping[str, Floats]) -> list[Verdict]:
    """Each of our groups against the peers' groups of the same algorithm or, where there is none, against all.

    Args:
        comparisons: environments with groups of ours and of peers.
        random: per environment returns (episodes,) of uniformly random actions.
    """
    groups = [group for one in comparisons for group in one.groups]
    ours = {group.label: group for group in groups if group.library is None}
    peers = {group.label: group for group in groups if group.library is not None}
    verdicts = []
    for own in ours.values():
        same = [label for label, peer in peers.items() if peer.algo.lower() == own.algo.lower()]
        for label in same or peers:
            verdict = _judge(own.label, label, comparisons, random)
            verdicts += [verdict] if verdict.envs else []
    return verdicts


def _judge(ours: str, peers: str, comparisons: Sequence[EnvComparison], random: Mapping[str, Floats]) -> Verdict:
    envs: list[EnvDifference] = []
    notes: list[str] = []
    finals: dict[str, tuple[list[float], list[float], float]] = {}
    areas: dict[str, tuple[list[float], list[float], float]] = {}
    for one in comparisons:
        groups = {group.label: group for group in one.groups}
        if ours not in groups or peers not in groups or one.last_common is None:
            continue
        left, right = groups[ours], groups[peers]
        if not (left.finals and right.finals):
            continue
        returns = random.get(one.env, np.empty(0))
        final, area = _task(left.finals, right.finals, returns), _task(left.areas, right.areas, returns)
        envs.append(
            EnvDifference(
                env=one.env,
                step=one.last_common,
                ours=left.finals,
                peers=right.finals,
                random=float(returns.mean()) if len(returns) else math.nan,
                final=pooled_difference({one.env: final}, CONFIDENCE) if final else None,
                area=pooled_difference({one.env: area}, CONFIDENCE) if area else None,
            )
        )
        reason = _why_not(left, right, returns, final is not None)
        notes += [f"{one.env}: {reason}"] if reason else []
        if max(len(left.finals), len(right.finals)) > 1:
            finals |= {one.env: final} if final else {}
            areas |= {one.env: area} if area else {}
    return Verdict(
        ours=ours,
        peers=peers,
        envs=envs,
        final=pooled_difference(finals, CONFIDENCE) if finals else None,
        pooled=len(finals),
        area=pooled_difference(areas, CONFIDENCE) if areas else None,
        notes=notes,
    )


def _task(
    ours: list[float], peers: list[float], random: npt.ArrayLike
) -> tuple[list[float], list[float], float] | None:
    """What `pooled_difference` takes, or None where neither side learned anything.

    A side that learned nothing beside one that did stays in: that is the largest difference there is.
    """
    baseline = np.asarray(random, np.float64)
    if not len(baseline):
        return None
    clearly = baseline.mean() + 2 * float(baseline.std()) / math.sqrt(len(baseline))
    scale = float(np.maximum(np.subtract([*ours, *peers], baseline.mean()), 0).mean())
    return (ours, peers, scale) if max(np.mean(ours), np.mean(peers)) > clearly else None


def _why_not(ours: Group, peers: Group, random: Floats, scaled: bool) -> str | None:
    """What keeps an environment out of the pooled difference, or is to be known about it."""
    if not len(random):
        return (
            "no return of a random policy is known (scripts/bench_returns.py measures it): no scale, so it is left out."
        )
    if not scaled:
        return "neither side is clearly above the random policy, so there is no scale, and it is left out."
    if len(ours.finals) == len(peers.finals) == 1:
        return "one run on each side does not say how much runs differ; it is left out of the pooled figures."
    single = [group.label for group in (ours, peers) if len(group.finals) == 1]
    return (
        f"{single[0]} has one run, which has no spread of its own; that of the other side is taken." if single else None
    )


def difference_text(difference: Difference | None) -> str:
    """`+0.16 [-0.20, +0.52]`; a dash for None, and no interval where it is unknown."""
    if difference is None:
        return "–"
    interval = f" [{difference.low:+.2f}, {difference.high:+.2f}]" if math.isfinite(difference.low) else ""
    return f"{difference.value:+.2f}{interval}"


def console_lines(verdict: Verdict) -> list[str]:
    """The verdict for the console."""
    unit = f"differences in units of what was learned, {100 * CONFIDENCE:.0f} % interval"
    rows = [
        (
            one.env,
            f"{plain_number(float(np.mean(one.ours)))} against {plain_number(float(np.mean(one.peers)))}",
            f"{len(one.ours)} and {len(one.peers)} seeds",
            difference_text(one.final),
            difference_text(one.area),
        )
        for one in verdict.envs
    ]
    rows.append(("pooled", "", "", difference_text(verdict.final), difference_text(verdict.area)))
    rows.insert(0, ("", "final return", "", "final", "mean over training"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [
        f"{verdict.ours} against {verdict.peers}, {unit}",
        *lines,
        *(f"  note: {note}" for note in verdict.notes),
        f"verdict: {verdict.sentence}",
    ]


def markdown(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as Markdown tables, for the docs."""
    blocks = []
    for verdict in verdicts:
        lines = [
            f"| | ctrlrl {verdict.ours} | {verdict.peers} | random policy | difference | of mean over training |",
            "|---|---|---|---|---|---|",
        ]
        for one in verdict.envs:
            cells = [f"{one.env}, {one.step:,.0f} steps", _returns(one.ours), _returns(one.peers), _number(one.random)]
            lines.append(f"| {' | '.join([*cells, difference_text(one.final), difference_text(one.area)])} |")
        lines.append(f"| **pooled** | | | | **{difference_text(verdict.final)}** | {difference_text(verdict.area)} |")
        notes = "".join(f"\n- {note}" for note in verdict.notes)
        blocks.append("\n".join([*lines, "", f"ctrlrl {verdict.sentence}"]) + (f"\n{notes}" if notes else ""))
    return "\n\n".join(blocks) + "\n"


def _returns(values: Sequence[float]) -> str:
    each = ", ".join(map(plain_number, sorted(values)))
    return f"{plain_number(float(np.mean(values)))} ({each})" if len(values) > 1 else each


def _number(value: float) -> str:
    return plain_number(value) if math.isfinite(value) else "–"
