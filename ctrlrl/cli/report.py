"""`ctrlrl report RUN...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ctrlrl.cli.parse import parse
from ctrlrl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Report:
    """One self-contained page: of one run, or comparing several (seeds of the same settings are put together)."""

    runs: Positional[tuple[str, ...]]
    """Run folders."""
    out: str | None = None
    """The page; by default report.html in the run folder, or comparison.html for several. Makes its folders."""
    threshold: float | None = None
    """For several runs: return for "steps to threshold"; by default 80 % of the best final one."""


def run(arguments: Sequence[str]) -> int:
    """Write the page; returns the exit code."""
    options = parse(Report, arguments, "report")
    from ctrlrl.runs.comparison import console_summary, write_comparison
    from ctrlrl.runs.report import write_report

    folders = [Path(path) for path in options.runs]
    if not folders:
        raise UsageError("which runs? ctrlrl report RUN, or ctrlrl report RUN RUN ...")
    if len(folders) == 1:
        if options.threshold is not None:
            raise UsageError("--threshold compares several runs, got one: give more run folders, or leave it out")
        page = write_report(folders[0], options.out)
    else:
        out = "comparison.html" if options.out is None else options.out
        page = write_comparison(folders, out, threshold=options.threshold)
    print(console_summary(folders))
    print(f"report: {page}")
    return 0
