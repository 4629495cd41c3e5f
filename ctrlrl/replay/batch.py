"""What an off-policy agent learns from."""

from __future__ import annotations

from collections.abc import Callable
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
    next_action: Tensor | None = None  # the data's, after the row; where the episode ended there, its last one
    mc_return: Tensor | None = None  # float32: discounted sum of the rewards that followed in the data
    weight: Tensor | None = None  # float32: of the row in the loss
    mask: Tensor | None = None  # bool [.., H]: which actions of a chunk [.., H, ...] the episode has

    def __getitem__(self, g: int) -> Batch:
        """The batch [B, ...] of gradient step `g`."""
        return self.map(lambda tensor: tensor[g])

    def map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        """The batch of `fn` of each tensor."""
        return Batch(
            obs=map_obs(fn, self.obs),
            action=fn(self.action),
            reward=fn(self.reward),
            discount=fn(self.discount),
            next_obs=map_obs(fn, self.next_obs),
            end=fn(self.end),
            index=fn(self.index),
            extras={name: fn(value) for name, value in self.extras.items()},
            next_extras={name: fn(value) for name, value in self.next_extras.items()},
            next_action=None if self.next_action is None else fn(self.next_action),
            mc_return=None if self.mc_return is None else fn(self.mc_return),
            weight=None if self.weight is None else fn(self.weight),
            mask=None if self.mask is None else fn(self.mask),
        )

    def __len__(self) -> int:
        """G of a batch [G, B, ...]."""
        return len(self.reward)
