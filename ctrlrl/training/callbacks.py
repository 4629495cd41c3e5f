"""What a user can hang into a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctrlrl.runs.metrics import Record

if TYPE_CHECKING:
    from ctrlrl.training.loop import Loop


class Callback:
    """Override what you need. All are called between steps, where everything is consistent."""

    def on_start(self, loop: Loop) -> None:
        """Before the first step of a session (also of a resumed one)."""

    def on_step(self, loop: Loop) -> None:
        """After every control step and the updates that belong to it; `loop.stop(reason)` ends the run."""

    def on_record(self, loop: Loop, record: Record) -> None:
        """After each line of `metrics.jsonl`: training metrics, an episode, an evaluation."""

    def on_end(self, loop: Loop) -> None:
        """After the last step, before the last checkpoint; not after a failure, and again whenever a run is resumed."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume: numbers, text, tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
