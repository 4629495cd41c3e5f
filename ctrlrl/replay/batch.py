"""What an off-policy agent learns from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ctrlrl.tree import Obs, map_obs


@dataclass(frozen=True, slots=True)
class Batch:
    """Transitions [G, B, ...] (or [B, ...]: `batch[g]`), on the agent's device.

    For n-step returns a row spans up to n transitions: `reward` is their discounted sum, `next_obs` the observation
    after the last of them, `discount` what the value there is worth.
    """

    obs: Obs
    action: Tensor  # as applied, in the environment's units
    reward: Tensor  # float32
    discount: Tensor  # float32: gamma^k * (1 - terminated); the only place gamma enters
    next_obs: Obs
    end: Tensor  # bool: terminated, or truncated, or the next row is no transition
    index: Tensor  # int64: which stored transition, counted from the first one of the run
    extras: dict[str, Tensor]
    next_extras: dict[str, Tensor]

    def __getitem__(self, g: int) -> Batch:
        """The batch [B, ...] of gradient step `g`."""

        def part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[g] for name, value in tensors.items()}

        return Batch(
            obs=map_obs(lambda t: t[g], self.obs),
            action=self.action[g],
            reward=self.reward[g],
            discount=self.discount[g],
            next_obs=map_obs(lambda t: t[g], self.next_obs),
            end=self.end[g],
            index=self.index[g],
            extras=part(self.extras),
            next_extras=part(self.next_extras),
        )

    def __len__(self) -> int:
        """G of a batch [G, B, ...]."""
        return len(self.reward)
