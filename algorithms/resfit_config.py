"""The numbers of ResFiT, apart from `resfit.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.agent_config import OffPolicyAgentConfig


@dataclass(frozen=True, kw_only=True)
class ResFiTConfig(OffPolicyAgentConfig):
    """Residual off-policy fine-tuning of a frozen policy. Defaults are those of the authors' code (Ankile et al. 2025,
    arXiv:2509.19301) unless noted; theirs is for cameras, with networks of 1024 units."""

    utd: float = 4.0
    """Gradient updates per environment step, whatever the number of environments."""
    policy_delay: int = 4
    """Gradient updates of the critics per update of the policy, counted over the whole training."""
    actor_lr: float = 1e-5
    """Adam step size of the residual; theirs is 1e-6, with networks four times as wide."""
    critic_lr: float = 3e-4
    """Adam step size of the critics; theirs is 1e-4."""
    normalize_obs: bool = True
    """Standardize observations: by the statistics of the data, where there is any. Critics that are given metres do
    not see the millimetres that decide on a grasp."""
    min_obs_std: float = 0.01
    """Smallest standard deviation that they are divided by, in their units; theirs is 0.1."""
    layer_norm: bool = True
    """LayerNorm before each ReLU, of critics and residual."""
    num_critics: int = 10
    """Critics; the policy goes up their mean."""
    subset: int = 2
    """Target critics, drawn anew for each update, whose minimum is the target."""
    residual_scale: float = 0.2
    """Largest residual, as a share of half the range of each action (theirs: 0.1 or 0.2 of the data's range)."""
    residual_penalty: float = 0.0
    """Weight of the mean squared residual, as a share of its largest, in the policy's loss."""
    exploration_noise: float = 0.05
    """Standard deviation of the noise on actions in [-1, 1]^A."""
    target_noise: float = 0.05
    """Standard deviation of the noise on the target policy's actions."""
    noise_clip: float = 0.3
    """Largest such noise, of both kinds."""
    warm_up_noise: float = 0.2
    """Half width of the uniform noise on the base's actions before learning starts."""
    critic_only: int = 10_000
    """Gradient updates before the first one of the residual: the critics learn of the base alone."""
    max_grad_norm: float = 1.0
    """To which the critics' gradient is shortened, and the policy's."""

    def check(self) -> None:
        super().check()
        allowed = f"between 1 and agent.num_critics = {self.num_critics}"
        self.require("subset", 1 <= self.subset <= self.num_critics, allowed)
        self.require("residual_scale", 0 < self.residual_scale <= 2, "in (0, 2]")
        self.require("residual_penalty", self.residual_penalty >= 0, "at least 0")
        for name in ("exploration_noise", "target_noise", "warm_up_noise"):
            self.require(name, 0 <= getattr(self, name) <= 2, "between 0 and 2")
        self.require("noise_clip", 0 < self.noise_clip <= 2, "in (0, 2]")
        self.require("critic_only", self.critic_only >= 0, "at least 0")
        self.require("max_grad_norm", self.max_grad_norm > 0, "above 0")
