"""Proximal policy optimization with a clipped ratio (Schulman et al. 2017, arXiv:1707.06347).

Shapes: T control steps, N environments, D decisions (a Box action is one; a MultiDiscrete action has one per
dimension), R rows of a minibatch; with a recurrent layer it has S sequences of L steps, [S, L, ...] for [R, ...].

A rollout's values, log-probabilities and advantages are computed once, by the weights that collected it, before its
first minibatch. Observation statistics move only after the last one, so the first minibatch's ratio is 1. An episode
that was cut by a time limit is bootstrapped with V of its true last observation; what is no transition has no weight.

Deviations from the paper, each also in Stable-Baselines3 or CleanRL: advantages are standardized within a minibatch;
observations and rewards are normalized; gradients are shortened; orthogonal initial weights; Adam's epsilon is 1e-5;
minibatches are larger, and of eight environments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import gymnasium as gym
import torch
from torch import Tensor

from ctrlrl.algorithms.agent import OnPolicyAgent
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.nn.actor import StochasticPolicy, make_head
from ctrlrl.nn.cpu import products_of
from ctrlrl.nn.distributions import Categorical, DiagonalGaussian
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.execution import executed
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.networks import OnPolicyNetworks
from ctrlrl.nn.normalizer import RunningNormalizer
from ctrlrl.nn.optim import Adam, trained
from ctrlrl.nn.recurrence import State
from ctrlrl.replay.advantages import ESTIMATORS, Decisions, ends, next_values
from ctrlrl.replay.rollout import Rollout
from ctrlrl.tree import Obs, map_obs

_ROUNDING = 1e-9
"""A divergence up to this is none: the squared rounding of a ratio of 1."""


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

    def rows(self) -> RolloutBatch:
        """Sequences [S, L, ...] as rows [L * S, ...], step by step, as recurrent layers go through them."""
        rows = replace(self, policy_state={}, critic_state={})
        return rows.map(lambda value: value.transpose(0, 1).flatten(0, 1))

    def split(self, order: Tensor) -> list[RolloutBatch]:
        """A batch for each row of `order` (M, R), of the rows that it names."""
        columns: list[tuple[Tensor, ...]] = []  # of each tensor, in the order in which `map` comes to them

        def take(value: Tensor) -> Tensor:
            columns.append(value[order].unbind())
            return value

        self.map(take)
        batches = []
        for parts in zip(*columns, strict=True):
            following = iter(parts)
            batches.append(self.map(lambda _, following=following: next(following)))  # type: ignore[misc]
        return batches

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
            networks = OnPolicyNetworks(head.observation_space, c, network, encoder, action_space=action_space)
            self.normalizer = networks.normalizer
            memory, trunk = networks.policy_trunk(head.outputs, actions=head.inputs, gain=0.01)
            self.policy = StochasticPolicy(networks.policy_encoder, memory, trunk, head, self.normalizer)
            self.critic = networks.value_function(gain=1.0)
        self.policy.to(self.device).generator = self.generator
        self.critic.to(self.device)
        self.returns = RunningNormalizer(()).to(self.device)
        self.lr = torch.tensor(c.lr, device=self.device)
        weights = trained(self.policy, self.critic)
        self.optimizer = Adam(weights, c.lr if c.lr_schedule == "constant" else self.lr, eps=1e-5)
        self._keep(policy=self.policy, critic=self.critic, optimizer=self.optimizer, returns=self.returns, lr=self.lr)
        self._step = executed(self.step, c.execution, "float32", self.device, self._changing)

    def update(self, rollout: Rollout) -> tuple[dict[str, Tensor], int]:
        """All epochs on a full rollout; returns the metrics' means (0-d) and the number of gradient steps."""
        history: list[dict[str, Tensor]] = []
        with products_of(self.config.minibatch_size, max(self.config.hidden, default=1)):
            data, metrics = self.prepare(rollout)
            if bool(rollout.valid.any()):  # else there is nothing to learn from
                history = self._epochs(data)
        if self.normalizer is not None:
            seen = map_obs(lambda value: value[:-1].flatten(0, 1), rollout.obs)
            self.normalizer.update(seen, rollout.valid.flatten())
        means = {name: torch.stack([one[name] for one in history]).mean() for name in history[0]} if history else {}
        if self.config.lr_schedule == "adaptive":
            metrics["lr"] = self.lr.clone()
        return metrics | means, len(history)

    def _epochs(self, data: RolloutBatch) -> list[dict[str, Tensor]]:
        """Gradient steps on all minibatches of all epochs; returns the metrics of each."""
        c = self.config
        counts = data.mask.flatten(1).any(1)  # (units,): rows, or sequences
        units = len(counts)
        size = max(1, round(c.minibatch_size * units / data.start.numel()))
        count = max(1, round(units / size))
        size = units // count
        whole = bool(counts.all())
        history: list[dict[str, Tensor]] = []
        for _ in range(c.epochs):
            # What does not fit into minibatches of one size, fewer rows than there are minibatches, is left out.
            order = torch.randperm(units, generator=self.generator, device=self.device)
            if whole:
                order = order[: count * size].view(count, size)
            else:  # dealt out, what counts first, so that each minibatch has its share of it
                order = order[torch.argsort((~counts[order]).int(), stable=True)]
                order = order[: count * size].view(size, count).t()
            epoch = [self._step(batch) for batch in data.split(order)]
            history += epoch
            if c.target_kl is not None and float(torch.stack([m["kl"] for m in epoch]).mean()) > 1.5 * c.target_kl:
                break
        return history

    def step(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """One gradient step on a minibatch: a pure function of weights and batch."""
        c = self.config
        if self.critic.recurrence is not None:
            obs, start = map_obs(lambda value: value.transpose(0, 1), batch.obs), batch.start.t()  # (L, S, ...)
            distribution, *_ = self.policy.unroll(obs, batch.policy_state, start)
            value = self.critic.unroll(obs, batch.critic_state, start)[0].view(-1, 1)  # (R, 1)
            batch = batch.rows()
        else:
            distribution, value = self.policy.distribution(batch.obs), self.critic(batch.obs)[:, None]
        rows = batch.mask.sum().clamp(min=1)
        weight = batch.mask / rows  # means are over the rows that count

        # r = pi(a|s) / pi_old(a|s); as sums of logarithms, over all decisions of a row where it is joint.
        log_ratio = distribution.log_prob(batch.decision) - batch.log_prob  # (R, D)
        log_ratio = torch.where(batch.mask, log_ratio, 0.0)  # of what does not count it may be anything
        if c.ratio == "joint":
            log_ratio = log_ratio.sum(-1, keepdim=True)
        ratio = log_ratio.exp()
        advantage = batch.advantage
        if c.normalize_advantage:
            centered = advantage - (weight * advantage).sum()
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
                little = (kl < c.desired_kl / 2) & (kl > _ROUNDING)  # in the first minibatch nothing has moved yet
                factor = torch.where(kl > 2 * c.desired_kl, 1 / 1.5, torch.where(little, 1.5, 1.0))
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
        """What the minibatches are taken from, all rows (or sequences) in one; and metrics of the rollout."""
        c, shape = self.config, rollout.reward.shape
        look = self._look_back if self.critic.recurrence is None else self._remember
        distribution, values, final_value, states = look(rollout)
        decision = rollout.extras["decision"]
        log_prob = distribution.log_prob(decision.flatten(0, 1)).view(*shape, -1)

        reward = self._normalized(rollout) if c.normalize_reward else rollout.reward
        mask, value = rollout.valid[..., None], values[:-1, :, None]
        decisions = Decisions(
            reward=reward[..., None],
            discount=(c.gamma * ~rollout.terminated)[..., None],
            value=value,
            next_value=next_values(value, values[-1], final_value, rollout.ended & rollout.valid, mask),
            end=ends(rollout.ended, rollout.valid)[..., None],
            mask=mask,
        )
        advantage = ESTIMATORS[c.advantage](decisions, c.gae_lambda)
        obs = map_obs(lambda x: x[:-1], rollout.obs)
        batch = RolloutBatch(obs, decision, log_prob, value, advantage, mask, rollout.start[:-1], {}, {})
        metrics = {
            "explained_variance": 1 - _variance(advantage, mask) / _variance(advantage + value, mask).clamp(min=1e-8),
            "value_mean": _mean(value, mask),
        }
        if not states:
            return batch.map(lambda x: x.flatten(0, 1)), metrics
        length = -(-shape[0] // len(states))
        missing = length * len(states) - shape[0]

        def sequences(x: Tensor) -> Tensor:
            """(T, N, ...) as (S, L, ...), environment by environment within each stretch of time; the last one is
            filled up with rows that do not count."""
            x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
            return x.view(len(states), length, *x.shape[1:]).transpose(1, 2).flatten(0, 1)

        policy, critic = ({k: torch.cat([pair[i][k] for pair in states]) for k in states[0][i]} for i in (0, 1))
        return replace(batch.map(sequences), policy_state=policy, critic_state=critic), metrics

    def _look_back(self, rollout: Rollout) -> _Look:
        """Without memory: all rows in one batch."""
        flat = map_obs(lambda x: x.flatten(0, 1), rollout.obs)
        values = self.critic(flat).view(rollout.horizon + 1, -1)
        distribution = self.policy.distribution(map_obs(lambda x: x[: rollout.reward.numel()], flat))
        final_value, rows = torch.zeros_like(rollout.reward), _cut_short(rollout)
        if bool(rows.any()):
            final_value[rows] = self.critic(map_obs(lambda x: x[rows], rollout.final_obs))
        return distribution, values, final_value, []

    def _remember(self, rollout: Rollout) -> _Look:
        """With memory: step by step from the states before the rollout. The critic's goes on to the next one."""
        horizon, recurrence = rollout.horizon, self.critic.recurrence
        assert recurrence is not None
        carried = rollout.carried_state(recurrence.initial(rollout.num_envs))
        values, critic, after = self.critic.unroll(rollout.obs, carried, rollout.start)
        rollout.carried |= critic[horizon]
        obs = map_obs(lambda x: x[:-1], rollout.obs)
        distribution, policy, _ = self.policy.unroll(obs, rollout.policy_state, rollout.start[:-1])
        final_value, rows = torch.zeros_like(rollout.reward), _cut_short(rollout)
        if bool(rows.any()):
            state = {k: torch.stack([one[k] for one in after[:horizon]])[rows] for k in after[0]}
            final_value[rows] = self.critic.step(map_obs(lambda x: x[rows], rollout.final_obs), state)[0]
        stretches = -(-horizon // self.config.sequence_length)  # of equal lengths, as far as that goes
        length = -(-horizon // stretches)
        return distribution, values, final_value, [(policy[t], critic[t]) for t in range(0, horizon, length)]

    def _normalized(self, rollout: Rollout) -> Tensor:
        """Rewards (T, N) over the standard deviation of the discounted return of all rollouts so far."""
        running = rollout.carried.get("return", torch.zeros_like(rollout.reward[0]))
        rewards = torch.where(rollout.valid, rollout.reward, 0.0).unbind()  # of what is no transition it may be NaN
        kept = (self.config.gamma * ~rollout.start[:-1]).unbind()
        returns = []
        for reward, keep in zip(rewards, kept, strict=True):
            running = torch.addcmul(reward, keep, running)
            returns.append(running)
        rollout.carried["return"] = running
        self.returns.update(torch.cat(returns), rollout.valid.flatten())
        deviation = (self.returns.variance + 1e-8).sqrt().to(rollout.reward.dtype)
        return (rollout.reward / deviation).clamp(-10, 10)


_Look: TypeAlias = tuple[DiagonalGaussian | Categorical, Tensor, Tensor, list[tuple[State, State]]]
"""Over decisions (T * N, ...); V (T + 1, N) of all observations, and (T, N) of true last ones; with memory, the states
(N, H) of policy and critic before each stretch of time."""


def _cut_short(rollout: Rollout) -> Tensor:
    """Rows (T, N) after which an episode was cut, and its last observation is worth something."""
    return rollout.truncated & ~rollout.terminated & rollout.valid


def _mean(value: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, value, 0.0).sum() / mask.sum().clamp(min=1)


def _variance(value: Tensor, mask: Tensor) -> Tensor:
    return _mean((value - _mean(value, mask)).square(), mask)
