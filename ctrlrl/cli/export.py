"""`ctrlrl export RUN --out BUNDLE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ctrlrl.cli.parse import parse


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a policy as a bundle: what a controller needs, and nothing that it must trust blindly."""

    run: Positional[str]
    """Run folder."""
    out: str
    """Folder of the bundle; must not hold anything yet."""
    checkpoint: str = "best"
    """best, last, or a checkpoint's name."""
    name: str | None = None
    """What the bundle calls itself; by default the run folder's name."""


def run(arguments: Sequence[str]) -> int:
    """Export; returns the exit code."""
    options = parse(Export, arguments, "export")
    from ctrlrl.deploy.report import summary
    from ctrlrl.training.export_run import export_run

    bundle = export_run(options.run, Path(options.out), checkpoint=options.checkpoint, name=options.name)
    print("\n".join(summary(bundle)))
    return 0
