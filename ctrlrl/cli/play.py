"""`ctrlrl play RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tyro.conf import Positional

from ctrlrl.cli.parse import parse
from ctrlrl.envs.viewing import no_display, undrawable_here
from ctrlrl.errors import UsageError

if TYPE_CHECKING:
    from ctrlrl.training.play import Episode


@dataclass(frozen=True, kw_only=True)
class Play:
    """Watch a run's policy in MuJoCo's viewer, in real time; where there is no MuJoCo, in Gymnasium's window.

    The space bar pauses, Tab shows the viewer's panels; closing the window ends it. Episodes are those of ctrlrl eval.
    """

    run: Positional[str]
    """Run folder."""
    checkpoint: str = "best"
    """best, last, or a folder's name under checkpoints/."""
    seed: int | None = None
    """Of the first episode; the next ones count on from it. By default the first of the seeds of evaluation."""
    episodes: int | None = None
    """Close the window after so many; by default it stays until you close it."""
    speed: float = 1.0
    """Simulated seconds per second."""
    backend: str | None = None
    """Where the environment runs: auto, native, native-fast or gymnasium; by default as in training."""
    device: str = "cpu"
    """Where the policy runs."""
    base: str | None = None
    """MODULE:FUNCTION that the run's policy builds on: it is imported only if named here too."""


def run(arguments: Sequence[str]) -> int:
    """Play until the window is closed; returns the exit code."""
    options = parse(Play, arguments, "play")
    if reason := no_display():
        raise UsageError(f"no window can be opened here: {reason}. {_instead(options.run)}")
    from ctrlrl.training.play import play  # imports torch: only now

    play(
        options.run,
        checkpoint=options.checkpoint,
        seed=options.seed,
        episodes=options.episodes,
        speed=options.speed,
        backend=options.backend,
        device=options.device,
        base=options.base,
        on_episode=_tell,
    )
    return 0


def _tell(episode: Episode) -> None:
    line = f"seed {episode.seed}: return {episode.ret:,.2f}, {episode.length:,} steps"
    if episode.success is not None:
        line += ", success" if episode.success else ", no success"
    print(line + ", its simulation became unstable" * episode.diverged, flush=True)


def _instead(run: str) -> str:
    """What to do where there is no display."""
    text = f"A video needs none: ctrlrl eval {run} --video, or ctrlrl eval {run} --video-grid 4x6 for many environments"
    if cause := undrawable_here():
        from ctrlrl.runs.video import rendering_error

        text += f". For that, too, something is missing here: {rendering_error(cause)}"
    return text
