"""`ctrlrl eval RUN`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from ctrlrl.cli.parse import parse
from ctrlrl.envs.viewing import MAX_GRID
from ctrlrl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Deterministic returns of a run's policy on the fixed list of seeds, with a 95 % confidence interval."""

    run: Positional[str]
    """Run folder."""
    checkpoint: str = "best"
    """best, last, or a folder's name under checkpoints/."""
    episodes: int | None = None
    """Episodes, one per seed; by default as many as in training."""
    sample: bool = False
    """Sample actions as in training, instead of the likeliest ones."""
    video: bool = False
    """Record the first of them under videos/ and put it into the report."""
    video_grid: str | None = None
    """Record so many of its environments side by side, ROWSxCOLUMNS such as 4x6, for 10 simulated seconds."""
    device: str = "cpu"
    """Where the policy runs."""
    base: str | None = None
    """MODULE:FUNCTION that the run's policy builds on: it is imported only if named here too."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate; returns the exit code."""
    options = parse(Eval, arguments, "eval")
    if options.episodes is not None and options.episodes < 1:
        raise UsageError(f"--episodes must be at least 1, got {options.episodes}")
    grid = None if options.video_grid is None else _rows_and_columns(options.video_grid)
    from ctrlrl.runs.statistics import mean_interval, told_share
    from ctrlrl.training.loading import evaluate_run, film_grid  # imports torch: only now

    result = evaluate_run(
        options.run,
        checkpoint=options.checkpoint,
        episodes=options.episodes,
        sample=options.sample,
        video=options.video,
        device=options.device,
        base=options.base,
    )
    for seed, ret, length in zip(result.seeds, result.returns, result.lengths, strict=True):
        print(f"seed {seed}: return {ret:,.2f}, {length:,} steps")
    low, high = mean_interval(result.returns)
    print(f"mean return {result.mean:,.2f}, 95 % interval [{low:,.2f}, {high:,.2f}], {len(result.seeds)} episodes")
    if result.success is not None:
        print(f"success {told_share(sum(result.success), len(result.success))}")
    for name, value in result.figures.items():
        print(f"{name.removeprefix('episode/')} {value:,.4g}")
    if grid is not None:  # after the numbers, which must not be lost where nothing can be drawn
        film = film_grid(options.run, *grid, checkpoint=options.checkpoint, device=options.device, base=options.base)
        print(f"video: {film}")
    return 0


def _rows_and_columns(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or not all(1 <= int(number) <= MAX_GRID for number in match.groups()):
        raise UsageError(f"--video-grid takes ROWSxCOLUMNS, each from 1 to {MAX_GRID}, such as 4x6; got {text!r}")
    return int(match[1]), int(match[2])
