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
    peers: tuple[str, ...] = ()
    """JSON files of other libraries' returns to compare with; docs/data/peer_returns.json in the source tree is one."""
    picture: str | None = None
    """Also draw the curves of each environment into this file, .svg or .png."""
    table: str | None = None
    """Also write the comparison with --peers into this file, as Markdown."""


def run(arguments: Sequence[str]) -> int:
    """Write the page; returns the exit code."""
    options = parse(Report, arguments, "report")
    from ctrlrl.runs.comparison import (
        compare,
        console_summary,
        run_summary,
        write_comparison,
        write_picture,
        write_table,
    )
    from ctrlrl.runs.report import write_report

    folders = [Path(path) for path in options.runs]
    if not folders:
        raise UsageError("which runs? ctrlrl report RUN, or ctrlrl report RUN RUN ...")
    if options.table is not None and not options.peers:
        raise UsageError("--table compares with --peers; give a file of theirs, or leave it out")
    if len(folders) == 1 and not options.peers:
        for flag in ("threshold", "picture"):
            if getattr(options, flag) is not None:
                raise UsageError(f"--{flag} compares several runs, got one: give more run folders, or leave it out")
        page = write_report(folders[0], options.out)
        print(run_summary(folders[0]))
    else:
        comparison = compare(folders, threshold=options.threshold, peers=options.peers)
        written = {}  # before the page, so that nothing is written where one of the names will not do
        if options.picture is not None:
            written["picture"] = write_picture(comparison, options.picture)
        if options.table is not None:
            written["table"] = write_table(comparison, options.table)
        page = write_comparison(comparison, "comparison.html" if options.out is None else options.out)
        print("\n".join([console_summary(comparison), *(f"{what}: {path}" for what, path in written.items())]))
    print(f"report: {page}")
    return 0
