"""`ctrlrl resume RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from ctrlrl.cli.parse import parse


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run exactly where it stopped; with more steps, extend it."""

    run: Positional[str]
    """Run folder."""
    steps: int | None = None
    """Environment steps in all, instead of what the run was started with."""
    updates: int | None = None
    """The same of what learns from a dataset alone: updates in all."""
    checkpoint: str = "last"
    """Where to go on from: last, or a folder's name under checkpoints/. What came after it is deleted."""
    device: str | None = None
    """Where to learn from now on, if not where the run was: cpu, cuda, cuda:1, auto."""
    quiet: bool = False
    """Print nothing but errors."""


def run(arguments: Sequence[str]) -> int:
    """Resume; returns the exit code."""
    options = parse(Resume, arguments, "resume")
    from ctrlrl.training.session import resume  # imports torch: only now

    resume(
        options.run,
        steps=options.steps,
        updates=options.updates,
        checkpoint=options.checkpoint,
        device=options.device,
        quiet=options.quiet,
    )
    return 0
