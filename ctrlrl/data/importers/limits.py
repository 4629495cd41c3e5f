"""Time limits, where a file marks the end of an episode but not whether the task ended or the time was up."""

from __future__ import annotations

from ctrlrl.data.importers.base import ImportOptions
from ctrlrl.data.importers.rows import Array


def time_limit(ended: Array, options: ImportOptions, format: str, notes: list[str]) -> int | None:
    """Episodes that are marked as ended and have so many steps were cut off: what --max-episode-steps says, or else the
    most steps that there are, where several episodes have them.

    A task that ends by itself seldom takes exactly the longest time twice, and one that was cut off and is taken as
    ended teaches that its last state is worthless; the other mistake costs little. A note says what was decided.

    Args:
        ended: (n,) the steps of each episode that is marked as ended.
    """
    if options.max_episode_steps is not None or not len(ended):
        return options.max_episode_steps
    longest = int(ended.max())
    count = int((ended == longest).sum())
    if count < 2:
        notes.append(
            f"{format} does not tell a time limit from the end of a task: all {len(ended):,} episodes that are marked "
            "as ended were taken as ended by the task. If there was a time limit, import again with --max-episode-steps"
        )
        return None
    notes.append(
        f"{format} does not tell a time limit from the end of a task: the {count:,} of {len(ended):,} episodes that "
        f"are marked as ended and have the most steps there are, {longest:,}, were taken as cut off. If that was no "
        "time limit, import again with --max-episode-steps and a greater number"
    )
    return longest
