"""Implicit Q-learning for answers written token by token: `iql.py`, whose step this is, with each token a decision, as
in ILQL (Snell et al. 2022, arXiv:2206.11871).

Shapes: B batch, D tokens of an answer at most, M tokens that there are in all, row by row, K critics. A token is chosen
at the observation and the tokens before it, whose value is V(s, w_<j), and leads for certain to where the next one is
chosen, without reward and without discount (as in POAD, arXiv:2405.15821):

    Q(s, w_<=j)  towards  V(s, w_<=j)              inside an answer
                          r + gamma V(s')          at its last token
    L_V = E[ |tau - 1(u < 0)| u^2 ],   u = min_k Q'_k(s, w_<=j) - V(s, w_<j)
    L_pi = E[ -exp(beta (min_k Q'_k(s, w_<=j) - V(s, w_<j))) log pi(w_j | s, w_<j) ],   the weight at most 100

Expectations are over all tokens of the batch, so that a long answer counts more than a short one. The policy acts by
the likeliest token each time.

Deviations from ILQL besides those of `iql.py`:
- gamma is of a turn; there each token is discounted;
- Q takes a token as it takes an action elsewhere, and gives one number for it; there it has one for each token of the
  vocabulary, and a term beside its loss (CQL's) that keeps those of tokens low which the data does not have;
- the policy is trained by the weights above; there, as it acts, its logits are moved by Q - V;
- V and Q have networks and optimizers of their own; there both, and the target, read one, trained by one loss.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.algorithms.iql import ImplicitQ
from ctrlrl.algorithms.iql_tokens_config import IQLTokensConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.actor import StochasticPolicy, TokenHead
from ctrlrl.nn.distributions import TokenSequence
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.networks import Critics, Networks, ValueFunction
from ctrlrl.replay.batch import Batch
from ctrlrl.tokens import TokenSpace
from ctrlrl.tree import Obs


class IQLTokens(ImplicitQ):
    """Implicit Q-learning agent for answers of tokens.

    Args:
        observation_space: of one environment.
        action_space: of one environment.
        config: every number that changes the result.
        seed: of the weights and of every later draw.
        device: where weights and batches lie.
        network: the networks of a language model, a `Backbone` that writes.
        encoder: not used; a `Backbone` has its own.

    Raises:
        UsageError: if the spaces or the network do not suit the algorithm.
    """

    config: IQLTokensConfig
    policy: StochasticPolicy
    value: ValueFunction
    config_class = IQLTokensConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: IQLTokensConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        c = config or IQLTokensConfig()
        super().__init__(c, seed, device)
        if not isinstance(action_space, TokenSpace):
            raise UsageError(
                f"IQL of tokens is for answers that a language model writes; the environment has {action_space}: take "
                "iql-discrete for candidates and other Discrete actions, iql for a Box"
            )
        head = TokenHead(observation_space, action_space)
        with self._weights_from(seed):
            networks = Networks(head.observation_space, c, network, encoder)
            self.normalizer = networks.normalizer
            trunk = networks.trunk(head.outputs)
            self.policy = StochasticPolicy(networks.policy_encoder, None, trunk, head, self.normalizer)
            self.critics = networks.token_critics(c.num_critics)
            self.value = networks.value()
        self._learn()

    def v(self, obs: Obs, action: Tensor) -> Tensor:
        return self.value.along(obs, action)[action >= 0]

    def target(self, batch: Batch, v: Tensor, next_obs: Obs) -> Tensor:
        said = batch.action >= 0  # (B, D)
        last = said.sum(-1).cumsum(0) - 1  # (B,), of each row its last token's place among all
        some = said.any(-1)
        after = v.roll(-1)  # V before the token that follows
        after[last[some]] = (batch.reward + batch.discount * self.value(next_obs))[some]
        return after

    def q(self, critics: Critics, obs: Obs, action: Tensor) -> Tensor:
        return critics.along(obs, action)[:, action >= 0]

    def actor_loss(self, obs: Obs, action: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        answers = self.policy.distribution(obs)
        assert isinstance(answers, TokenSequence)
        said = action >= 0
        log_prob, entropy = answers.score(action)  # (B, D)
        loss, metrics = self.weigh(advantage, log_prob[said])
        return loss, metrics | {"entropy": entropy.detach()[said].mean()}
