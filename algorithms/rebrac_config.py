"""The numbers of ReBRAC, apart from `rebrac.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctrlrl.algorithms.td3_config import TD3Config


@dataclass(frozen=True, kw_only=True)
class ReBRACConfig(TD3Config):
    """Revisited behaviour-regularized actor-critic. Defaults are those of Tarasov et al. 2023 (arXiv:2305.09836) for
    locomotion; the two coefficients are tuned for every dataset there, and 0.01 is the commonest value of both."""

    title: ClassVar[str] = "ReBRAC"
    actor_bc: float = 0.01
    """Weight of the squared distance from the data's action in the policy's loss, beside a critic of mean size 1."""
    critic_bc: float = 0.01
    """Weight of the squared distance from the data's next action in the critics' target, in units of the reward."""
    tau: float = 0.005
    """Step of the targets towards the networks, each time they move: at every second update."""
    batch_size: int = 1024
    """Transitions per gradient update."""
    actor_lr: float = 1e-3
    """Adam step size of the policy."""
    critic_lr: float = 1e-3
    """Adam step size of the critics."""
    hidden: tuple[int, ...] = (256, 256, 256)
    """Hidden layers of the policy and of each critic."""
    layer_norm: bool = True
    """LayerNorm before each ReLU of the critics."""

    def check(self) -> None:
        super().check()
        self.require("actor_bc", 0 <= self.actor_bc <= 1e6, "between 0 and 1,000,000")
        self.require("critic_bc", 0 <= self.critic_bc <= 1e6, "between 0 and 1,000,000")
