"""Behaviour cloning: supervised learning of the data's actions (Pomerleau 1988, ALVINN).

Shapes: B batch, H actions of a chunk, A action dimensions, D decisions, n choices.

    Box, deterministic     1/A sum_j (pi(s)_j - a_j)^2
    Box, Gaussian          -log pi(a|s)
    Box, chunks            of a_t, ..., a_t+H-1, as far as the episode has them: what the head says (`ctrlrl.nn.chunk`)
    Discrete               -sum_d log pi(a_d|s), the cross-entropy, over the choices that exist (`ctrlrl.nn.discrete`)

The loss is their mean over the batch, each row times `batch.weight` where there are weights: 0 leaves a row out.
Actions are compared in [-1, 1]^A, where `policy.scaling` maps the data's.

What is not obvious:
- a `tanh-gaussian` has no finite mode at a bound: the data's actions are clipped at 0.999 of the range for it, lest the
  few at the bounds, which atanh sends far away, outweigh the others in what is a regression on atanh(a);
- a row whose discrete action its mask rules out teaches nothing; `impossible_actions` is the share of such rows;
- images are shifted at random (DrQ, arXiv:2004.13649), which here is plain augmentation.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.algorithms.agent import Draws, ReplayAgent
from ctrlrl.algorithms.bc_config import BCConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.actor import CategoricalHead, GaussianHead, StochasticPolicy, TokenHead, make_head
from ctrlrl.nn.chunk import (
    ChunkHead,
    ChunkNetwork,
    ChunkPolicy,
    FlowHead,
    MixtureHead,
    MLPChunkNetwork,
    RegressionHead,
    TransformerChunkNetwork,
)
from ctrlrl.nn.discrete import CategoricalPolicy
from ctrlrl.nn.distributions import DiagonalGaussian
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.networks import Networks
from ctrlrl.nn.optim import Adam, trained
from ctrlrl.nn.policy import DeterministicPolicy, SquashedGaussianPolicy, require_bounded_box
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs

_INSIDE = 0.999
"""Share of the range within which a squashed Gaussian sees the data's actions."""
_SHOWN = 8
"""Rows of a batch whose plans are compared with the data: each is many passes of a flow. Records are means of many."""


class BC(ReplayAgent):
    """Behaviour cloning for Box observations (or flat Dicts of them) and Box, Discrete or MultiDiscrete actions.

    Args:
        observation_space: of one environment; a mask and candidates in it are recognized by `make_choices`.
        action_space: of one environment; a Box needs finite bounds but for `policy` gaussian.
        config: every number that changes the result.
        seed: of the weights and of every later draw.
        device: where weights and batches lie.
        network: `factory(in_features, out_features)`, instead of the multilayer perceptron of `config.hidden`.
        encoder: `factory(space)`, instead of the built-in one for vectors and images.

    Raises:
        UsageError: if the spaces do not suit the algorithm.
    """

    config: BCConfig
    policy: DeterministicPolicy | StochasticPolicy | SquashedGaussianPolicy | CategoricalPolicy | ChunkPolicy
    title = "BC"
    config_class = BCConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: BCConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        c = config or BCConfig()
        super().__init__(c, seed, device)
        low, high = c.log_std_bounds
        log_std = min(max(0.0, low), high)
        head = make_head(observation_space, action_space, self.title, log_std=log_std, action_mask=c.action_mask)
        drawn = isinstance(head, CategoricalHead | TokenHead)
        if drawn and c.policy != "deterministic":
            raise UsageError(
                f"agent.policy {c.policy} is for Box actions; the environment has {action_space}, for which the policy "
                "is a categorical distribution: leave agent.policy out"
            )
        if drawn and c.chunk > 1:
            raise UsageError(f"agent.chunk is for Box actions; the environment has {action_space}")
        with self._weights_from(seed):
            mirrored = None if c.plans else action_space
            networks = Networks(head.observation_space, c, network, encoder, action_space=mirrored)
            self.normalizer, features = networks.normalizer, networks.policy_encoder
            if isinstance(head, CategoricalHead):
                trunk = networks.trunk(head.outputs, actions=head.inputs)
                self.policy = CategoricalPolicy(features, trunk, head.choices, self.normalizer)
            elif c.policy == "gaussian" or isinstance(head, TokenHead):
                self.policy = StochasticPolicy(features, None, networks.trunk(head.outputs), head, self.normalizer)
            else:
                box = require_bounded_box(action_space, self.title)
                dim = math.prod(box.shape)
                if c.plans:
                    execute = c.execute or c.chunk
                    planner = _planner(networks, c, dim)
                    self.policy = ChunkPolicy(features, planner, box, c.chunk, execute, c.ensemble, self.normalizer)
                elif c.policy == "deterministic":
                    self.policy = DeterministicPolicy(features, networks.trunk(dim), box, 0.0, self.normalizer)
                else:
                    trunk = networks.trunk(2 * dim)
                    self.policy = SquashedGaussianPolicy(features, trunk, box, (low, high), self.normalizer)
        self.policy.to(self.device).generator = self.generator
        self.optimizer = Adam(trained(self.policy), c.lr)
        self._keep(policy=self.policy, optimizer=self.optimizer)

    def draw(self, groups: int, rows: int) -> Draws:
        """The shift of images, (G, B, 2), down and to the right, None without; and what the loss of chunks draws."""
        pad = self.config.random_shift
        more: tuple[Tensor, ...] = ()
        if isinstance(self.policy, ChunkPolicy):
            more = self.policy.head.draw(groups, rows, self.generator)
        if not pad or not self.policy.encoder.sees:
            return None, *more
        shape = (groups, rows, 2)
        return torch.randint(0, 2 * pad + 1, shape, generator=self.generator, device=self.device), *more

    @property
    def chunk(self) -> int:
        return self.config.chunk if isinstance(self.policy, ChunkPolicy) else 0

    def step(self, batch: Batch, shift: Tensor | None = None, *rest: Tensor, improve: bool = True) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...] with, for images, a shift (B, 2); the `rest` is what the loss of chunks
        draws."""
        obs = batch.obs
        if shift is not None:
            obs = self.policy.encoder.shifted(obs, shift, self.config.random_shift)
        loss, metrics = self.losses(obs, batch.action, batch.mask, rest)  # (B,)
        if batch.weight is not None:
            loss = batch.weight * loss
        loss = loss.mean()
        self.optimizer.descend(loss)
        if isinstance(self.policy, StochasticPolicy) and isinstance(self.policy.head, GaussianHead):
            with torch.no_grad():
                self.policy.head.log_std.clamp_(*self.config.log_std_bounds)
        return {"actor_loss": loss.detach()} | metrics

    def losses(
        self, obs: Obs, action: Tensor, mask: Tensor | None = None, draws: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each row, (B,), and metrics of the policy against the data's actions (B, ...), or chunks of them
        (B, H, ...), which are there where `mask` (B, H) is true."""
        policy = self.policy
        if isinstance(policy, ChunkPolicy):
            assert mask is not None
            features, target = policy.encoder(obs), policy.scaling.to_unit(action)  # (B, F), (B, H, A)
            with torch.no_grad():
                mode = policy.head.plan(features[:_SHOWN], None)
                error = (mode - target[:_SHOWN]).abs().mean(-1) * mask[:_SHOWN]
            loss = policy.head.loss(features, target, mask, draws)
            return loss, {"action_error": error.sum() / mask[:_SHOWN].sum()}
        if isinstance(policy, CategoricalPolicy):
            choices = policy.distribution(obs)
            choice = policy.choices.to_choice(action)  # (B, D)
            exists = (choices.logits.gather(-1, choice.unsqueeze(-1)).squeeze(-1) > -math.inf).all(-1)  # (B,)
            loss = torch.where(exists, -choices.log_prob(choice).sum(-1), 0.0)
            return loss, {
                "accuracy": (choices.mode == choice).all(-1).float().mean(),
                "entropy": choices.entropy().detach().sum(-1).mean(),
                "impossible_actions": 1 - exists.float().mean(),
            }
        if isinstance(policy, StochasticPolicy) and isinstance(policy.head, TokenHead):
            log_prob, entropy = policy.distribution(obs).score(action)  # (B, D), 0 where there is no token
            tokens = (action >= 0).sum()
            return -log_prob.sum(-1), {
                "log_prob_of_token": log_prob.detach().sum() / tokens,
                "entropy": entropy.detach().sum() / tokens,
            }
        if isinstance(policy, DeterministicPolicy):
            target, mode = policy.scaling.to_unit(action), policy.action(obs)  # (B, A)
            loss = (mode - target).square().mean(-1)
            metrics: dict[str, Tensor] = {}
        elif isinstance(policy, SquashedGaussianPolicy):
            target, squashed = policy.scaling.to_unit(action), policy.distribution(obs)
            loss, mode = -squashed.log_prob(target.clamp(-_INSIDE, _INSIDE)).squeeze(-1), squashed.mode
            metrics = {"log_std": squashed.log_std.detach().mean()}
        else:
            assert isinstance(policy.head, GaussianHead)
            target, normal = policy.head.scaling.to_unit(action), policy.distribution(obs)
            assert isinstance(normal, DiagonalGaussian)
            loss, mode = -normal.log_prob(target).squeeze(-1), normal.mode
            metrics = {"log_std": policy.head.log_std.detach().mean()}
        return loss, {"action_error": (mode.detach() - target).abs().mean()} | metrics


def _planner(networks: Networks, c: BCConfig, dim: int) -> ChunkHead:
    """The head of a policy of chunks of `dim` numbers each, and its network."""
    flow, modes = c.policy == "flow", c.modes if c.policy == "mixture" else 0
    per_action, features = 2 * modes * dim or dim, networks.policy_encoder.out_features
    net: ChunkNetwork
    if c.trunk == "mlp":
        trunk = networks.trunk(c.chunk * per_action + modes, actions=MLPChunkNetwork.inputs(c.chunk, dim, flow))
        net = MLPChunkNetwork(trunk, c.chunk, per_action)
    else:
        net = TransformerChunkNetwork(features, c.chunk, dim if flow else 0, c.hidden, per_action, modes)
    if flow:
        return FlowHead(net, c.flow_steps, dim, c.chunk)
    if modes:
        return MixtureHead(net, modes, dim, c.chunk, (c.log_std_bounds[0], c.log_std_bounds[1]))
    return RegressionHead(net)
