"""Policy Decorator (Yuan et al. 2024, arXiv:2412.13630): SAC over a frozen policy, which it may correct a little.

What differs from SAC (`sac.py`, whose shapes and `step` these are), with b what the base does at s:
- the action is clip(b + scale * e, -1, 1); e in [-1, 1]^A is what the tanh-Gaussian is over, in the entropy too, and
  the policy reads s alone;
- critics take the whole action ("sum" of the authors' three inputs);
- to explore, each action has the residual with a chance that rises from 0 to 1 over `ramp` environment steps; it always
  has it in evaluation, so that a run's first evaluations are below the base's (the authors' issue 1).

Deviations from the authors' code: b + scale * e is clipped in the learner, too, and not by the environment alone; b' is
what the base will do with its memory there; its first actions are the base's, not uniform ones; the chance is per
control step, where theirs is per chunk; standard deviations begin at 1 and not at 1e-4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium as gym
from torch import Tensor, nn

from ctrlrl.algorithms.agent import with_base_actions
from ctrlrl.algorithms.policy_decorator_config import PolicyDecoratorConfig
from ctrlrl.algorithms.sac import SAC
from ctrlrl.nn.networks import Networks
from ctrlrl.nn.policy import Policy, require_bounded_box
from ctrlrl.nn.residual import BASE, Base, GaussianResidualPolicy, groups_of, with_base_space
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs


class PolicyDecorator(SAC):
    """A residual by SAC over the frozen policy `base`; other arguments as those of `SAC`."""

    config: PolicyDecoratorConfig
    policy: GaussianResidualPolicy
    title = "Policy Decorator"
    config_class = PolicyDecoratorConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: PolicyDecoratorConfig | None = None,
        *,
        base: Policy,
        **others: Any,
    ) -> None:
        c = config or PolicyDecoratorConfig()
        box = require_bounded_box(action_space, self.title)
        self._base = Base(base, box)
        space = with_base_space(observation_space, self._base.scaling.low.numel())
        policy_obs, critic_obs = groups_of(observation_space, c.policy_obs, c.critic_obs)
        super().__init__(space, action_space, replace(c, policy_obs=policy_obs, critic_obs=critic_obs), **others)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({BASE})

    def make_policy(self, networks: Networks, trunk: nn.Module, box: gym.spaces.Box) -> GaussianResidualPolicy:
        c = self.config
        bounds = (c.log_std_bounds[0], c.log_std_bounds[1])
        numbers = (c.residual_scale, bounds, c.ramp, c.warm_up_noise)
        return GaussianResidualPolicy(self._base, networks.policy_encoder, trunk, box, *numbers, self.normalizer)

    def step(
        self, batch: Batch, noise: Tensor, shift: Tensor | None = None, *rest: Tensor, improve: bool = True
    ) -> dict[str, Tensor]:
        """One gradient step of SAC on `batch` [B, ...], with the base's actions among its observations."""
        return super().step(with_base_actions(batch), noise, shift, *rest, improve=improve)

    def next_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        return super().next_value(obs, self.policy.add(obs, action), *rest)

    def policy_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        return super().policy_value(obs, self.policy.add(obs, action), *rest)
