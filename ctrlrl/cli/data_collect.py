"""`ctrlrl data collect RUN --tier T --out DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from ctrlrl.cli.parse import parse


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Make a dataset from a run, and record the returns that scores are normalized by."""

    run: Positional[str]
    """Run folder, of a training in an environment."""
    out: str
    """Folder of the dataset; must not hold anything yet."""
    tier: Literal["random", "medium", "expert", "medium-replay", "replay"]
    """random actions; the policy half way to the best one; the best one; what was stored until half way; all that was
    stored."""
    steps: int = 100_000
    """Transitions at least, in whole episodes; the replay tiers have what there is."""
    deterministic: bool = False
    """Act by the policy's mode, without exploring."""
    seed: int = 0
    """Of environments and exploration."""
    num_envs: int = 10
    """Environments stepped together."""
    reference_episodes: int = 20
    """Episodes of the random and of the best policy, whose mean returns scores are normalized by."""
    base: str | None = None
    """MODULE:FUNCTION that the run's policy builds on: it is imported only if named here too."""


def run(arguments: Sequence[str]) -> int:
    """Collect; returns the exit code."""
    options = parse(Collect, arguments, "data collect")
    from ctrlrl.training.collect import collect  # imports torch: only now

    data = collect(
        options.run,
        options.out,
        tier=options.tier,
        steps=options.steps,
        deterministic=options.deterministic,
        seed=options.seed,
        num_envs=options.num_envs,
        reference_episodes=options.reference_episodes,
        base=options.base,
    )
    mean = float(data.returns.mean())
    low, high = data.reference["random"], data.reference["expert"]
    score = "the same, so there is no score" if low == high else f"score {data.normalized_score(mean):.1f}"
    print(
        f"{data.path}: {data.num_transitions:,} transitions in {data.num_episodes:,} episodes, mean return {mean:,.2f} "
        f"(random {low:,.2f}, expert {high:,.2f}: {score})"
    )
    return 0
