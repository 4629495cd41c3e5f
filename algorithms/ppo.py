"""Proximal policy optimization with a clipped ratio (Schulman et al. 2017, arXiv:1707.06347).

Shapes: T control steps, N environments, D decisions (a Box action is one; a MultiDiscrete action has one per
dimension), R rows of a minibatch; with a recurrent layer it has S sequences of L steps, [S, L, ...] for [R, ...].

A rollout's values, log-probabilities and advantages are computed once, by the weights that collected it, before its
first minibatch. Observation statistics move only after the last one, so the first minibatch's ratio is 1. An episode
that was cut by a time limit is bootstrapped with V of its true last observation; what is no transition has no weight.

Deviations from the paper, each also in Stable-Baselines3 or CleanRL: advantages are standardized within a minibatch;
observations and rewards are normalized; gradients are shortened; orthogonal initial weights; Adam's epsilon is 1e-5;
the entropy bonus is 0 and the step size does not fall to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.algorithms.agent import OnPolicyAgent
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.nn.actor import StochasticPolicy, make_head
from ctrlrl.nn.cpu import products_of
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.execution import executed
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.networks import Networks
from ctrlrl.nn.normalizer import RunningNormalizer
from ctrlrl.nn.optim import Adam
from ctrlrl.nn.recurrence import State
from ctrlrl.replay.advantages import ESTIMATORS, Decisions, next_values
from ctrlrl.replay.rollout import Rollout
from ctrlrl.tree import Obs, map_obs


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Rows [R, ...], or sequences [S, L, ...] with the states before their first step, [S, H] each."""

    obs: Obs
    decision: Tensor
    log_prob: Tensor  # (R, D), of the policy that collected them
    value: Tensor  # (R, 1), of the critic then
    advantage: Tensor  # (R, 1)
    mask: Tensor  # (R, 1) bool: whether the row counts
    start: Tensor  # (R,) bool: an episode begins there
    policy_state: State
    critic_state: State

    def map(self, fn: Callable[[Tensor], Tensor]) -> RolloutBatch:
        """The batch of `fn` of each tensor."""
        return RolloutBatch(
            map_obs(fn, self.obs),
            fn(self.decision),
            fn(self.log_prob),
            fn(self.value),
            fn(self.advantage),
            fn(self.mask),
            fn(self.start),
            {name: fn(value) for name, value in self.policy_state.items()},
            {name: fn(value) for name, value in self.critic_state.items()},
        )


class PPO(OnPolicyAgent):
    """PPO agent for Box observations (or flat Dicts of them) and Box, Discrete or MultiDiscrete actions.

    Args:
        observation_space: of one environment.
        action_space: of one environment.
        config: every number that changes the result.
        seed: of the weights and of every later draw.
        device: where weights and rollouts lie.
        network: `factory(in_features, out_features)`, instead of the multilayer perceptrons of `config.hidden`; used
            for the policy and for the critic.
        encoder: `factory(space)`, instead of the built-in one for vectors and images; policy and critic get one each.

    Raises:
        UsageError: if the spaces do not suit the algorithm.
    """

    config: PPOConfig
    policy: StochasticPolicy

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: PPOConfig | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        super().__init__(seed, device)
        self.config = c = config or PPOConfig()
        head = make_head(observation_space, action_space, "PPO", log_std=c.log_std, action_mask=c.action_mask)
        with self._weights_from(seed):
            networks = Networks(head.observation_space, c, network, encoder)
            self.normalizer = networks.normalizer
            kind, size = c.recurrent, c.recurrent_size
            encoder_, outputs = networks.policy_encoder, head.outputs
            memory, trunk = networks.recurrent_trunk(
                encoder_, outputs, kind, size, c.activation, actions=head.inputs, out_gain=0.01
            )
            self.policy = StochasticPolicy(encoder_, memory, trunk, head, self.normalizer)
            self.critic = networks.value_function(kind, size, c.activation, out_gain=1.0)
        self.policy.to(self.device).generator = self.generator
        self.critic.to(self.device)
        self.returns = RunningNormalizer(()).to(self.device)
        self.lr = torch.tensor(c.lr, device=self.device)
        weights = list(dict.fromkeys([*self.policy.parameters(), *self.critic.parameters()]))
        self.optimizer = Adam(weights, c.lr if c.lr_schedule == "constant" else self.lr, eps=1e-5)
        self._keep(policy=self.policy, critic=self.critic, optimizer=self.optimizer, returns=self.returns, lr=self.lr)
        self._step = executed(self.step, c.execution, "float32", self.device, self._changing)

    def update(self, rollout: Rollout) -> tuple[dict[str, Tensor], int]:
        """All epochs on a full rollout; returns the metrics' means (0-d) and the number of gradient steps."""
        with products_of(self.config.minibatch_size, max(self.config.hidden, default=1)):
            data, metrics = self.prepare(rollout)
            history = self._epochs(data)
        if self.normalizer is not None:
            seen = map_obs(lambda value: value[:-1].flatten(0, 1), rollout.obs)
            self.normalizer.update(seen, rollout.valid.flatten())
        means = {name: torch.stack([one[name] for one in history]).mean() for name in history[0]}
        return metrics | means | {"lr": self.lr.clone()}, len(history)

    def _epochs(self, data: RolloutBatch) -> list[dict[str, Tensor]]:
        """Gradient steps on all minibatches of all epochs; returns the metrics of each."""
        c = self.config
        units = len(data.start)  # rows, or sequences
        size = max(1, round(c.minibatch_size / (c.sequence_length if self.critic.recurrence else 1)))
        count = max(1, round(units / size))
        size = units // count
        history: list[dict[str, Tensor]] = []
        for _ in range(c.epochs):
            # What does not fit into minibatches of one size, fewer rows than there are minibatches, is left out.
            order = torch.randperm(units, generator=self.generator, device=self.device)[: count * size]
            shuffled = data.map(lambda value, order=order: value[order].view(count, size, *value.shape[1:]))  # type: ignore[misc]
            epoch = [self._step(shuffled.map(lambda value, i=i: value[i])) for i in range(count)]  # type: ignore[misc]
            history += epoch
            if c.target_kl is not None and float(torch.stack([m["kl"] for m in epoch]).mean()) > 1.5 * c.target_kl:
                break
        return history

    def step(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """One gradient step on a minibatch: a pure function of weights and batch."""
        c = self.config
        if self.critic.recurrence is not None:
            states = batch.policy_state, batch.critic_state
            batch = batch.map(lambda value: value.transpose(0, 1) if value.dim() > 1 else value)  # [L, S, ...]
            distribution, *_ = self.policy.unroll(batch.obs, states[0], batch.start)
            value = self.critic.unroll(batch.obs, states[1], batch.start)[0].flatten()
            batch = batch.map(lambda value: value.flatten(0, 1))
        else:
            distribution, value = self.policy.distribution(batch.obs), self.critic(batch.obs)
        value = value[..., None]  # (R, 1)
        weight = batch.mask / batch.mask.sum().clamp(min=1)  # means are over the rows that count

        # r = pi(a|s) / pi_old(a|s); as sums of logarithms, over all decisions of a row where it is joint.
        log_ratio = distribution.log_prob(batch.decision) - batch.log_prob  # (R, D)
        if c.ratio == "joint":
            log_ratio = log_ratio.sum(-1, keepdim=True)
        ratio = log_ratio.exp()
        advantage = batch.advantage
        if c.normalize_advantage:
            centered = advantage - (weight * advantage).sum()
            rows = batch.mask.sum()
            deviation = ((weight * centered.square()).sum() * rows / (rows - 1).clamp(min=1)).sqrt()
            advantage = centered / (deviation + 1e-8)
        # L_clip, eq. 7; of several ratios in a row the mean.
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - c.clip, 1 + c.clip) * advantage)
        policy_loss = -(weight * surrogate.mean(-1, keepdim=True)).sum()

        # L_VF, eq. 9: (V - V_target)^2, where V_target = A + V_old.
        target = batch.advantage + batch.value
        error = (value - target).square()
        if c.value_clip is not None:
            clipped = batch.value + (value - batch.value).clamp(-c.value_clip, c.value_clip)
            error = torch.maximum(error, (clipped - target).square())
        value_loss = (weight * error).sum()
        entropy = (weight * distribution.entropy().sum(-1, keepdim=True)).sum()

        with torch.no_grad():
            kl = (weight * (ratio - 1 - log_ratio).sum(-1, keepdim=True)).sum()  # of old from new, as it is sampled
            clipped_share = (weight * ((ratio - 1).abs() > c.clip).float().mean(-1, keepdim=True)).sum()
            if c.lr_schedule == "adaptive":
                factor = torch.where(kl > 2 * c.desired_kl, 1 / 1.5, torch.where(kl < c.desired_kl / 2, 1.5, 1.0))
                self.lr.mul_(factor).clamp_(1e-5, 1e-2)
        # eq. 9
        loss = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy
        self.optimizer.descend(loss, max_norm=c.max_grad_norm)
        return {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "entropy": entropy.detach(),
            "kl": kl,
            "clipped": clipped_share,
        }

    @torch.no_grad()
    def prepare(self, rollout: Rollout) -> tuple[RolloutBatch, dict[str, Tensor]]:
        """What the minibatches are taken from, all rows in one; and metrics of the rollout."""
        c, horizon = self.config, rollout.horizon
        obs = map_obs(lambda value: value[:-1], rollout.obs)
        cut = rollout.ended & rollout.valid
        bootstrapped = rollout.truncated & ~rollout.terminated & rollout.valid
        final_value = torch.zeros_like(rollout.reward)
        final_obs = map_obs(lambda value: value[bootstrapped], rollout.final_obs)
        final_rows = bool(bootstrapped.any())
        policy_states: list[State] = []
        critic_states: list[State] = []
        if self.critic.recurrence is None:
            values = self.critic(map_obs(lambda value: value.flatten(0, 1), rollout.obs)).view(horizon + 1, -1)
            distribution = self.policy.distribution(map_obs(lambda value: value.flatten(0, 1), obs))
            if final_rows:
                final_value[bootstrapped] = self.critic(final_obs)
        else:
            carried = rollout.carried_state(self.critic.recurrence.initial(rollout.num_envs))
            values, critic_states, after = self.critic.unroll(rollout.obs, carried, rollout.start)
            rollout.carried |= critic_states[horizon]
            distribution, policy_states, _ = self.policy.unroll(obs, rollout.policy_state, rollout.start[:-1])
            if final_rows:
                before = {k: torch.stack([state[k] for state in after[:horizon]])[bootstrapped] for k in after[0]}
                final_value[bootstrapped] = self.critic.step(final_obs, before)[0]

        log_prob = distribution.log_prob(rollout.extras["decision"].flatten(0, 1))
        log_prob = log_prob.view(*rollout.reward.shape, -1)
        reward = self._normalized(rollout) if c.normalize_reward else rollout.reward
        mask = rollout.valid[..., None]
        value = values[:-1, :, None]
        following = torch.cat([rollout.valid[1:], torch.ones_like(rollout.valid[:1])])
        decisions = Decisions(
            reward=reward[..., None],
            discount=(c.gamma * ~rollout.terminated)[..., None],
            value=value,
            next_value=next_values(value, values[-1], final_value, cut, mask),
            end=(rollout.ended | ~following)[..., None],
            mask=mask,
        )
        advantage = ESTIMATORS[c.advantage](decisions, c.gae_lambda)
        batch = RolloutBatch(
            obs, rollout.extras["decision"], log_prob, value, advantage, mask, rollout.start[:-1], {}, {}
        )
        target = (advantage + value)[mask]
        unexplained = (target - value[mask]).var() / target.var().clamp(min=1e-8)
        metrics = {"explained_variance": 1 - unexplained, "value_mean": value[mask].mean()}
        if self.critic.recurrence is None:
            return batch.map(lambda x: x.flatten(0, 1)), metrics
        length = c.sequence_length
        first = range(0, horizon, length)
        policy_state, critic_state = (
            {k: torch.cat([states[t][k] for t in first]) for k in states[0]}
            for states in (policy_states, critic_states)
        )

        def sequences(x: Tensor) -> Tensor:
            """(T, N, ...) as (S, L, ...), environment by environment within each stretch of time; the last one is
            filled up with rows that do not count."""
            x = torch.cat([x, x.new_zeros(len(first) * length - horizon, *x.shape[1:])])
            return x.view(len(first), length, *x.shape[1:]).transpose(1, 2).flatten(0, 1)

        return replace(batch.map(sequences), policy_state=policy_state, critic_state=critic_state), metrics

    def _normalized(self, rollout: Rollout) -> Tensor:
        """Rewards (T, N) over the standard deviation of the discounted return of all rollouts so far."""
        running = rollout.carried.get("return", torch.zeros_like(rollout.reward[0]))
        returns = torch.empty_like(rollout.reward)
        for t in range(rollout.horizon):
            running = torch.where(rollout.start[t], 0.0, self.config.gamma * running) + rollout.reward[t]
            returns[t] = running
        rollout.carried["return"] = running
        self.returns.update(returns.flatten(), rollout.valid.flatten())
        deviation = (self.returns.variance + 1e-8).sqrt().to(rollout.reward.dtype)
        return (rollout.reward / deviation).clamp(-10, 10)
