"""The numbers of WSRL, apart from `wsrl.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlrl.algorithms.rlpd_config import RLPDConfig


@dataclass(frozen=True, kw_only=True)
class WSRLConfig(RLPDConfig):
    """Warm-start reinforcement learning. Defaults are those of Zhou et al. 2024 (arXiv:2412.07762), from the authors'
    code."""

    utd: float = 4.0
    """Gradient updates per environment step, whatever the number of environments."""
    policy_delay: int = 4
    """Gradient updates of the critics per update of the policy, counted over the whole training: one per environment
    step at the default utd."""
    actor_lr: float = 1e-4
    """Adam step size of the policy."""
    alpha_lr: float = 1e-4
    """Adam step size of the temperature; 0 keeps it at initial_alpha."""
    backup_entropy: bool = False
    """Whether the critics' target holds the entropy's worth."""
    target_entropy: float | None = None
    """Of the action in [-1, 1]^A, whatever the actuator range; by default minus the action dimension."""
    policy_layer_norm: bool = False
    """LayerNorm before each ReLU of the policy. The authors have it; weights to start from must have it then, too."""
