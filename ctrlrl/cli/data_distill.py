"""`ctrlrl data distill RUN RUN ... --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ctrlrl.cli.parse import parse
from ctrlrl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Make a dataset from which `ctrlrl train bc` learns one policy of several runs' tasks."""

    runs: Positional[tuple[str, ...]]
    """Run folders of the specialists, in the order of the tasks."""
    out: str
    """Folder of the dataset; must not hold anything yet."""
    steps: int = 100_000
    """Transitions at least, in whole episodes."""
    student: str | None = None
    """Run that learned all these tasks: it acts, and the specialists say what they would have done (DAgger)."""
    deterministic: bool = False
    """Act by the mode, without exploring."""
    seed: int = 0
    """Of environments and exploration."""
    num_envs: int = 10
    """Environments stepped together, in turn one of each task."""
    reference_episodes: int = 20
    """Episodes of random actions and of the specialists, whose mean returns scores are normalized by."""
    base: tuple[str, ...] = ()
    """MODULE:FUNCTION that specialists build on, one or several: they are imported only if named here too."""


def run(arguments: Sequence[str]) -> int:
    """Collect; returns the exit code."""
    options = parse(Distill, arguments, "data distill")
    from ctrlrl.runs.folder import RunFolder  # imports torch: only now
    from ctrlrl.training.distill import distill
    from ctrlrl.training.setup import read_config

    built_on = [getattr(read_config(RunFolder.open(Path(run)))[1], "base", None) for run in options.runs]
    if unused := [base for base in options.base if base not in built_on]:
        raise UsageError(f"--base {unused[0]}: none of the runs builds on that, but on {', '.join(map(str, built_on))}")
    data = distill(
        options.runs,
        options.out,
        steps=options.steps,
        student=options.student,
        deterministic=options.deterministic,
        seed=options.seed,
        num_envs=options.num_envs,
        reference_episodes=options.reference_episodes,
        bases=[base if base in options.base else None for base in built_on],
    )
    low, high = data.reference["random"], data.reference["expert"]
    print(
        f"{data.path}: {data.num_transitions:,} transitions in {data.num_episodes:,} episodes of {data.env}, mean "
        f"return {float(data.returns.mean()):,.2f} (random {low:,.2f}, specialists {high:,.2f}). One policy of them: "
        f"ctrlrl train bc --data {data.path}"
    )
    return 0
