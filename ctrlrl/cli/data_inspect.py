"""`ctrlrl data inspect DATASET`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from ctrlrl.cli.parse import parse

if TYPE_CHECKING:
    from ctrlrl.data.inspection import Inspection
    from ctrlrl.data.inspection_findings import Finding


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """What a dataset holds and what is wrong with it: a summary here, everything on a page."""

    dataset: Positional[str]
    """Dataset folder."""
    out: str | None = None
    """The page; by default inspection.html in the dataset folder. Makes its folders."""
    reference: str | None = None
    """Another dataset of the environment, a replay buffer say, against which coverage is measured (SACo)."""
    json: bool = False
    """Print all numbers and findings as JSON, and write a page only if --out is given."""


def run(arguments: Sequence[str]) -> int:
    """Inspect; returns the exit code."""
    options = parse(Inspect, arguments, "data inspect")
    from ctrlrl.data.inspection import as_json, inspect
    from ctrlrl.data.inspection_findings import find
    from ctrlrl.data.inspection_page import write_page
    from ctrlrl.data.store import Dataset
    from ctrlrl.runs.page import writable_page

    dataset = Dataset.open(options.dataset)
    out = None if options.json and options.out is None else Path(options.out or dataset.path / "inspection.html")
    if out is not None:
        writable_page(out)  # before the minutes that a large dataset takes
    inspection = inspect(dataset, None if options.reference is None else Dataset.open(options.reference))
    findings = find(inspection)
    page = None if out is None else write_page(inspection, findings, dataset, out)
    if options.json:
        print(json.dumps(as_json(inspection) | {"findings": as_json(findings)}, indent=2))
    else:
        print("\n".join([*summary(inspection), *verdict(findings), f"page: {page}"]))
    return 0


def summary(it: Inspection) -> list[str]:
    """The most important numbers, a line each."""
    ret, length, reward = it.ret, it.length, it.reward.distribution
    lines = [
        f"{it.path}: {it.transitions:,} transitions in {it.episodes:,} episodes of "
        f"{it.env or 'an unnamed environment'}, {it.bytes / 1e6:,.1f} MB",
        f"observation {_short(it.observation_space)}, action {_short(it.action_space)}",
        f"return   mean {ret.mean:,.4g}, median {ret.median:,.4g}, from {ret.minimum:,.4g} to {ret.maximum:,.4g}"
        + (f"; normalized {it.scores.normalized_mean:.1f}, TQ {it.scores.tq:.3f}" if it.scores else "")
        + (f"; success {it.success:.0%}" if it.success is not None else ""),
        f"length   mean {length.mean:,.4g}, median {length.median:,.4g}, from {length.minimum:,.0f} to "
        f"{length.maximum:,.0f}; {it.ends.terminated:,} episodes terminated, {it.ends.truncated:,} truncated",
        f"reward   {it.reward.kind}, mean {reward.mean:,.4g}, from {reward.minimum:,.4g} to {reward.maximum:,.4g}",
    ]
    fine = it.coverage[0]
    against = "" if fine.saco is None else f"; SACo {fine.saco:.3f} against {it.reference_dataset}"
    pairs = f"{fine.distinct:,} different state-action pairs ({fine.bins} bins)"
    lines.append(f"coverage {pairs}, {fine.share:.1%} of the transitions{against}")
    rows = {"actions": it.alignment.action.verdict, "rewards": it.alignment.reward.verdict}
    told = [f"{name} {'cannot be told' if word == 'untold' else word}" for name, word in rows.items()]
    return [*lines, f"rows     {', '.join(told)}"]


def verdict(findings: Sequence[Finding]) -> list[str]:
    """Each finding with its remedy, the worst first."""
    if not findings:
        return ["nothing found"]
    return [f"{one.severity}: {one.code}: {one.message}\n  {one.remedy}" for one in findings]


def _short(space: str) -> str:
    return space if len(space) <= 100 else f"{space[:97]}..."
