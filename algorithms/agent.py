"""What the off-policy loop asks of an agent."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ctrlrl.nn.policy import Policy
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs


class LearnerConfig(Protocol):
    """The numbers that the loop itself reads."""

    @property
    def gamma(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def utd(self) -> float: ...


class OffPolicyAgent(Protocol):
    """A policy, and the learner that improves it."""

    @property
    def policy(self) -> Policy: ...
    @property
    def config(self) -> LearnerConfig: ...

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step per group of `batch` [G, B, ...]; metrics are 0-d tensors, the mean over the groups."""

    def observe(self, obs: Obs, valid: Tensor) -> None:
        """Take observations (N, ...) of valid rows into the normalizers; called once per environment step."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while learning, as nested dicts, lists, numbers and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
