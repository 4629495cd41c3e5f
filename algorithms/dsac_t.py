"""DSAC with three refinements, DSAC-T (Duan et al. 2025, arXiv:2310.05858), on DSAC.

What differs from DSAC (`dsac.py`, whose shapes, `step` and deviations these are):
- expected value substitution: the target of the mean is r + gamma (Q' - alpha log pi(a'|s')), with the mean Q' of the
  target critic where DSAC has the sample Z; the sample serves the deviation alone;
- twin value distributions: two critics, of which the one with the smaller target mean at (s', a') gives both; the
  policy goes up the smaller mean;
- variance-based gradient adjustment: m, a moving average of the batch's mean of sigma for each critic, bounds the
  sampled target (by 3 m) and scales the critics' gradient, which DSAC divides by the variance: where sigma is m, the
  mean's is that of a squared error, whatever the scale of the rewards.

The critics' loss is the surrogate whose gradient the paper gives, with epsilon = 0.1 and [x] for x without gradient:

  (m^2 + eps) E[-[y - Q] / ([sigma]^2 + eps) * Q - ([Q - y_b]^2 - [sigma]^2) / ([sigma]^3 + eps) * sigma]

Its value says nothing about the fit. A second loss was published with the authors' code of July 2025 (DSAC-v2): Huber
losses of width 50 in the place of the squares, and m^2 / sigma^2 clamped to [0.1, 10] as the factor: errors beyond 50
weigh less there, and the factor of a sample stays within bounds. That is not implemented here.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.algorithms.dsac import DSAC, _bounded, _moments
from ctrlrl.algorithms.dsac_t_config import DSACTConfig
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs


class DSACT(DSAC):
    """DSAC-T agent: what `SAC` takes, with a `DSACTConfig`.

    Attributes:
        std_average: m, the moving average of each critic's standard deviation, (K,); 0 before the first update.
    """

    config: DSACTConfig
    title = "DSAC-T"
    config_class = DSACTConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: DSACTConfig | None = None,
        **others: Any,
    ) -> None:
        super().__init__(observation_space, action_space, config, **others)
        self.std_average = torch.zeros(self.config.num_critics, device=self.device)
        self._keep(std_average=self.std_average)

    def step(
        self, batch: Batch, noise: Tensor, shift: Tensor | None = None, *rest: Tensor, improve: bool = True
    ) -> dict[str, Tensor]:
        """DSAC's step, and the average of the standard deviation in its metrics."""
        metrics = super().step(batch, noise, shift, *rest, improve=improve)
        return metrics | {"q_std_average": self.std_average.mean()}

    def critic_loss(self, q: Tensor, std: Tensor, target: Tensor, sample: Tensor) -> Tensor:
        """The surrogate at the top, 0-d, for arguments as in `DSAC.critic_loss`; moves the deviations' average."""
        c, fixed_q, fixed_std = self.config, q.detach(), std.detach()
        m, batch_mean = self.std_average, fixed_std.mean(-1)
        m.copy_(torch.where(m > 0, m.lerp(batch_mean, c.std_tau), batch_mean))  # the first one is the batch's
        bounded = _bounded(sample, fixed_q, m)  # y_b
        to_mean = (target - fixed_q) / (fixed_std.square() + c.gradient_bias)
        to_std = ((fixed_q - bounded).square() - fixed_std.square()) / (fixed_std.pow(3) + c.gradient_bias)
        scale = m.square() + c.gradient_bias  # (K,)
        return (scale * (-to_mean * q - to_std * std).mean(-1)).sum()

    def next_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """The return at (s', a') in the targets of mean and deviation, (2, B): mean and sample of the critic with the
        smaller mean."""
        (z,) = rest
        q, std = _moments(self.target_critics(obs, action))  # (K, B)
        q, least = q.min(0)
        return torch.stack([q, q + z * std.gather(0, least.unsqueeze(0)).squeeze(0)])
