"""The numbers of TD3 and of DDPG, its preset. Apart from `td3.py` so that the command line need not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctrlrl.algorithms.agent_config import OffPolicyAgentConfig


@dataclass(frozen=True, kw_only=True)
class TD3Config(OffPolicyAgentConfig):
    """Twin delayed deep deterministic policy gradient. Defaults are those of the authors' code (github.com/sfujim/TD3)
    unless noted, which differ from the paper's (Fujimoto et al. 2018, arXiv:1802.09477) in networks, batch and lr."""

    title: ClassVar[str] = "TD3"
    tau: float = 0.01
    """Step of the targets towards the networks, each time they move. The authors have 0.005; since targets move at
    every second update, 0.01 is what 0.005 at every update would be, as in SBX, and learns faster (docs/td3.md)."""
    policy_delay: int = 2
    """Gradient updates of the critics per update of the policy and of all targets, counted over the whole training."""
    target_noise: float = 0.2
    """Standard deviation of the noise on the target policy's actions in [-1, 1]^A; 0 turns the smoothing off."""
    target_noise_clip: float = 0.5
    """Largest such noise."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on actions in [-1, 1]^A, after the first random ones."""

    def check(self) -> None:
        super().check()
        self.require("target_noise", 0 <= self.target_noise <= 10, "between 0 and 10")
        self.require("target_noise_clip", 0 < self.target_noise_clip <= 2, "in (0, 2]")
        self.require("exploration_noise", 0 <= self.exploration_noise <= 10, "between 0 and 10")


@dataclass(frozen=True, kw_only=True)
class DDPGConfig(TD3Config):
    """Deep deterministic policy gradient (Lillicrap et al. 2016, arXiv:1509.02971): TD3 with one critic, no smoothing
    and no delay; so the targets' step is half of TD3's. The other numbers are TD3's, as in "our DDPG" of Fujimoto
    et al. 2018 (arXiv:1802.09477)."""

    title: ClassVar[str] = "DDPG"
    tau: float = 0.005
    """Step of the targets towards the networks, at every update."""
    num_critics: int = 1
    """Critics; one, so that nothing holds its overestimation back."""
    policy_delay: int = 1
    """Gradient updates of the critic per update of the policy and of all targets."""
    target_noise: float = 0.0
    """Standard deviation of the noise on the target policy's actions; 0: there is none."""
