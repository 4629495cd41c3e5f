"""Warm-start reinforcement learning (Zhou et al. 2024, arXiv:2412.07762): fine-tuning without the data it began with.

Policy and critics start from weights that were trained on data, by CQL for instance. The frozen policy first fills an
empty replay (the loop's `learning_starts`); from then on all is learned from what the agent collects itself.

What differs from RLPD (`rlpd.py`, whose shapes and `step` these are):
- no entropy in the critics' target, a target entropy of -A, and four updates a step, one of which improves the policy;
- the policy goes up the minimum over all K critics;
- the policy can have LayerNorm, too.

Deviations from the authors' code besides those of `rlpd.py`:
- the policy and the temperature learn from the last of four batches of 256, theirs from all 1,024 rows;
- the temperature looks at the entropy at s, theirs at s', and is exp of its parameter, theirs softplus;
- last layers begin as all others do, theirs a hundredth as large; no matter where weights are loaded.
"""

from __future__ import annotations

from torch import Tensor, nn

from ctrlrl.algorithms.rlpd import RLPD
from ctrlrl.algorithms.wsrl_config import WSRLConfig
from ctrlrl.nn.networks import Networks
from ctrlrl.tree import Obs


class WSRL(RLPD):
    """SAC with an ensemble of critics, from a warm start: what `SAC` takes, with a `WSRLConfig`."""

    config: WSRLConfig
    title = "WSRL"
    config_class = WSRLConfig
    entropy_per_action = -1.0

    def make_trunk(self, networks: Networks, outputs: int) -> nn.Module:
        return networks.trunk(outputs, layer_norm=self.config.policy_layer_norm)

    def policy_value(self, obs: Obs, action: Tensor, *rest: Tensor) -> Tensor:
        """The minimum of Q(s, a) over all K, (B,)."""
        return self.value(obs, action).amin(0)
