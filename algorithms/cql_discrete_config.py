"""The numbers of discrete CQL, apart from `cql_discrete.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.agent_config import ReplayAgentConfig


@dataclass(frozen=True, kw_only=True)
class CQLDiscreteConfig(ReplayAgentConfig):
    """Conservative Q-learning for discrete actions on double DQN, with the networks and step sizes of the other agents
    here."""

    conservative_weight: float = 1.0
    """alpha: weight of the conservative term beside half the squared error (d3rlpy's). 0 leaves double DQN."""
    gamma: float = 0.99
    """Discount per environment step, in (0, 1]."""
    tau: float = 0.005
    """Step of the target networks towards the networks, in (0, 1]."""
    critic_lr: float = 3e-4
    """Adam step size."""
    layer_norm: bool = False
    """LayerNorm before each ReLU of the critics."""
    num_critics: int = 2
    """Critics: the target is their minimum, and the policy acts by their mean."""
    action_mask: str | None = None
    """Observation entry that says which actions exist, (n,); by default action_mask or candidate_mask, if there."""

    @property
    def critic_obs(self) -> tuple[str, ...] | None:
        """What the policy reads: it acts by the critics."""
        return self.policy_obs

    def check(self) -> None:
        super().check()
        self.require("conservative_weight", self.conservative_weight >= 0, "at least 0")
        self.require("gamma", 0 < self.gamma <= 1, "in (0, 1]")
        self.require("tau", 0 < self.tau <= 1, "in (0, 1]")
        self.require("critic_lr", 0 < self.critic_lr < 1, "in (0, 1)")
        self.require("num_critics", 1 <= self.num_critics <= 100, "between 1 and 100")
