"""Advantages without a critic: how an episode went beside others of the same task.

Shapes: T control steps, N environments, H steps of a stretch, G environments of a group.
Environments G * i to G * i + G - 1 are given the same tasks. Their episodes begin together, every H steps, and who has
finished waits, in rows that are no transitions. So a stretch of H rows is an episode, and a group of G are comparable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Groups:
    """What these estimators look at.

    Attributes:
        reward: (T, N), 0 where there is no transition.
        valid: (T, N) bool.
        observed: (T, N) int64, the same number where the same was shown (`Step.anchor`).
        size: G.
        rows: H, which divides T.
        gamma: discount per step.
        weight: of what GiGPO finds step by step.
    """

    reward: Tensor
    valid: Tensor
    observed: Tensor
    size: int
    rows: int
    gamma: float
    weight: float

    def returns(self) -> Tensor:
        """(T / H, N / G, G), of each episode the sum of its rewards."""
        t, n = self.reward.shape
        return self.reward.view(t // self.rows, self.rows, n).sum(1).view(-1, n // self.size, self.size)

    def alike(self) -> Tensor:
        """Share of groups (0-d) whose episodes all came to the same, which say nothing."""
        returns = self.returns()
        return (returns == returns[..., :1]).all(-1).float().mean()

    def spread(self, value: Tensor) -> Tensor:
        """Of each episode (T / H, N / G, G) to each of its rows (T, N)."""
        return value.float().flatten(1).repeat_interleave(self.rows, 0) * self.valid


def grpo(groups: Groups) -> Tensor:
    """(R - mean) / standard deviation, within the group (Shao et al. 2024, arXiv:2402.03300, section 4.1.2)."""
    returns = groups.returns().double()  # where all are equal, the difference is to be none
    centered = returns - returns.mean(-1, keepdim=True)
    return groups.spread(centered / (returns.std(-1, keepdim=True) + _EPS))


def rloo(groups: Groups) -> Tensor:
    """R - mean of the others (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8)."""
    returns, g = groups.returns(), groups.size
    return groups.spread((returns - returns.mean(-1, keepdim=True)) * (g / (g - 1)))


def gigpo(groups: Groups) -> Tensor:
    """GRPO's, and with `weight` the same of the rewards to come, discounted, among all steps of the group at which the
    same was observed (Feng et al. 2025, arXiv:2505.10978, eqs. 3, 7 and 8)."""
    # A GPU would add up in another order each time, and where all is equal but for rounding that is all there is.
    reward, valid, observed = (x.cpu() for x in (groups.reward, groups.valid, groups.observed))
    t, n = reward.shape
    to_come = reward.double().view(t // groups.rows, groups.rows, n).clone()
    for i in reversed(range(groups.rows - 1)):
        to_come[:, i] += groups.gamma * to_come[:, i + 1]
    to_come = to_come.view(t, n)
    stretch = torch.arange(t)[:, None] // groups.rows
    group = torch.arange(n)[None] // groups.size
    key = torch.stack([stretch.expand(t, n), group.expand(t, n), observed], -1)[valid]  # (M, 3)
    values, anchor = to_come[valid], torch.unique(key, dim=0, return_inverse=True)[1]

    def sums(x: Tensor) -> Tensor:
        """(M,), of each row the sum over those that share its anchor."""
        return x.new_zeros(len(x)).index_add_(0, anchor, x)[anchor]

    count = sums(torch.ones_like(values))
    centered = values - sums(values) / count
    deviation = (sums(centered.square()) / (count - 1).clamp(min=1)).sqrt()
    step = torch.zeros_like(to_come)
    step[valid] = centered / (deviation + _EPS)
    return grpo(groups) + (groups.weight * step).float().to(groups.reward.device)


GROUP_ESTIMATORS: dict[str, Callable[[Groups], Tensor]] = {"grpo": grpo, "rloo": rloo, "gigpo": gigpo}
"""By the names that `agent.advantage` takes: advantages (T, N), 0 where there is no transition."""
