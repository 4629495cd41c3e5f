"""The numbers of discrete SAC. Apart from `sac_discrete.py` only so that the command line can read them without
importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ctrlrl.algorithms.agent_config import OffPolicyAgentConfig


@dataclass(frozen=True, kw_only=True)
class SACDiscreteConfig(OffPolicyAgentConfig):
    """Discrete soft actor-critic, stabilized as by Zhou et al. 2022 (arXiv:2209.10081).

    `double_q="min", entropy_penalty=0, q_clip=0` is that of Christodoulou 2019 (arXiv:1910.07207).
    """

    alpha_lr: float = 3e-4
    """Adam step size of the temperature; 0 keeps it at initial_alpha."""
    initial_alpha: float = 1.0
    """Temperature at the start."""
    target_entropy_ratio: float = 0.2
    """Target entropy as a share of log(n), the entropy of all n actions of a row alike, in [0, 1]."""
    double_q: Literal["mean", "min"] = "mean"
    """What is made of the critics' values: mean (Zhou et al.), or min (Christodoulou)."""
    entropy_penalty: float = 0.5
    """beta, weight in the policy's loss of how far its entropy is from that when the action was taken; 0 turns it
    off."""
    backup_entropy: bool = True
    """Count entropy in the critics' target. Without, they tell of the return alone, as in RLPD."""
    reference: bool = False
    """Stay near the policy that learning begins with: the temperature weighs the divergence from it in the place of
    entropy, and is fixed (alpha_lr 0)."""
    critic_only: int = 0
    """So many gradient updates at least come before the first one of policy and temperature: for a policy that can do
    something at the start."""
    q_clip: float = 10.0
    """c, how far a critic may go from its target network before the loss holds it back, in units of the return: it
    moves by about c * tau per update at most. 0 turns it off."""
    action_mask: str | None = None
    """Observation entry that says which actions exist, (n,); by default action_mask or candidate_mask, if there."""

    def check(self) -> None:
        super().check()
        self.require("alpha_lr", 0 <= self.alpha_lr < 1, "in [0, 1)")
        self.require("initial_alpha", self.initial_alpha > 0, "above 0")
        self.require("target_entropy_ratio", 0 <= self.target_entropy_ratio <= 1, "in [0, 1]")
        self.require("entropy_penalty", self.entropy_penalty >= 0, "at least 0")
        fixed = not self.reference or self.alpha_lr == 0
        self.require("alpha_lr", fixed, "0 with agent.reference: the target entropy is none of a divergence")
        self.require("critic_only", self.critic_only >= 0, "at least 0")
        self.require("q_clip", self.q_clip >= 0, "at least 0")
