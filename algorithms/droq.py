"""Dropout Q-functions (Hiraoka et al. 2022, arXiv:2110.02034, Algorithm 2) on SAC.

What differs from SAC (`sac.py`, whose shapes and `step` these are), with many updates per environment step:
- after each hidden linear layer of the critics come dropout, LayerNorm and ReLU; dropout is active in the critics'
  loss, in the target critics and in the policy's loss, each time with masks of its own;
- the policy and the temperature move once in `policy_delay` updates of the critics, the targets at each one;
- the policy goes up the mean over the critics.

Deviations from the paper besides those of `sac.py`:
- the target entropy is -A, as in SAC; the paper takes MBPO's table, as REDQ does (see `redq.py`).

Masks. An update needs half a million independent draws, of which one in a hundred drops something. So the gaps between
those that do are drawn instead, which are geometric: the same masks in distribution, for a hundredth of the numbers.
That is exact for any rate, and cheap for small ones. `draw` makes these places, `step` only marks them.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.algorithms.agent import Draws
from ctrlrl.algorithms.droq_config import DroQConfig
from ctrlrl.algorithms.sac import SAC
from ctrlrl.errors import UsageError
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.tree import Obs

_CRITICS, _TARGETS, _POLICY = range(3)
"""Whose masks: of the critics' loss, of their target, of the policy's loss."""


class DroQ(SAC):
    """SAC with dropout Q-functions: what `SAC` takes, with a `DroQConfig` and without a `network`.

    Raises:
        UsageError: if the spaces do not suit the algorithm, or a `network` is given, in which it cannot drop anything.
    """

    config: DroQConfig
    title = "DroQ"
    config_class = DroQConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: DroQConfig | None = None,
        *,
        network: NetworkFactory | None = None,
        **others: Any,
    ) -> None:
        if network is not None:
            raise UsageError(
                "droq drops outputs of the built-in networks' layers, and a network of your own was passed: put "
                "nn.Dropout into it and train it by sac with --agent.utd 20 --agent.policy-delay 20"
            )
        super().__init__(observation_space, action_space, config, **others)

    def draw(self, groups: int, rows: int) -> Draws:
        """What SAC draws, and the dropped places of the three masks of each update, (G, 3, n), see `masks`."""
        drawn = super().draw(groups, rows)
        size, rate = self._places(rows), self.config.dropout
        # The gaps drawn reach the end of the mask but for one in a billion, beyond six standard deviations.
        n = min(size, math.ceil(size * rate + 6 * math.sqrt(size * rate) + 10))
        gaps = torch.empty(groups, 3, n, dtype=torch.int64, device=self.device)
        places = gaps.geometric_(rate, generator=self.generator).cumsum(-1) - 1
        return *drawn, places.clamp_(max=size)

    def masks(self, dropped: Tensor, rows: int) -> list[Tensor]:
        """Dropout's factors for each hidden layer, (K, B, width): 0 at the places `dropped` (n,), else 1 / (1 - rate).

        Places count through all layers, each layer's critics, rows and units; one more takes those beyond the end.
        """
        # Bytes, since torch.compile makes slow loops of booleans.
        kept = torch.ones(self._places(rows) + 1, dtype=torch.uint8, device=dropped.device)
        factors = kept.index_fill_(0, dropped, 0) * (1 / (1 - self.config.dropout))
        shapes = [(self.config.num_critics, rows, width) for width in self.config.hidden]
        parts = torch.split(factors[:-1], [math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _places(self, rows: int) -> int:
        return self.config.num_critics * rows * sum(self.config.hidden)

    def value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """Q(s, a) of each critic with dropout, (K, B), for their loss."""
        (dropped,) = rest
        out: Tensor = self.critics(obs, action, masks=self.masks(dropped[_CRITICS], len(action)))
        return out

    def next_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """min over the target critics with dropout, Algorithm 2 line 6, (B,)."""
        (dropped,) = rest
        out: Tensor = self.target_critics(obs, action, masks=self.masks(dropped[_TARGETS], len(action))).amin(0)
        return out

    def policy_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """The mean over the critics with dropout, Algorithm 2 line 10, (B,)."""
        (dropped,) = rest
        out: Tensor = self.critics(obs, action, masks=self.masks(dropped[_POLICY], len(action))).mean(0)
        return out
