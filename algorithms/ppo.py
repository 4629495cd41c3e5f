"""Proximal policy optimization with a clipped ratio (Schulman et al. 2017, arXiv:1707.06347).

Shapes: T control steps, N environments, D decisions (a Box action is one; a MultiDiscrete action has one per
dimension, an answer one per token), C credits (1, or D of them), R rows of a minibatch; with a recurrent layer it has
S sequences of L steps, [S, L, ...] for [R, ...].

A rollout's values, log-probabilities and advantages are computed once, by the weights that collected it, before its
first minibatch. Observation statistics move only after the last one, so the first minibatch's ratio is 1. An episode
that was cut by a time limit is bootstrapped with V of its true last observation; what is no transition has no weight.

Deviations from the paper, each also in Stable-Baselines3 or CleanRL: advantages are standardized within a minibatch;
observations and rewards are normalized; gradients are shortened; orthogonal initial weights; Adam's epsilon is 1e-5;
minibatches are larger, and of eight environments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent import OnPolicyAgent
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.actor import StochasticPolicy, make_head
from ctrlrl.nn.cpu import products_of
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.execution import executed
from ctrlrl.nn.mlp import Backbone, NetworkFactory
from ctrlrl.nn.networks import OnPolicyNetworks, ValueFunction
from ctrlrl.nn.normalizer import RunningNormalizer
from ctrlrl.nn.optim import Adam, trained
from ctrlrl.nn.recurrence import State
from ctrlrl.replay.advantages import Decisions, ends, gae, next_values
from ctrlrl.replay.group_advantages import GROUP_ESTIMATORS, Groups
from ctrlrl.replay.rollout import Rollout
from ctrlrl.tokens import TokenSpace
from ctrlrl.tree import Obs, map_obs

_ROUNDING = 1e-9
"""A divergence up to this is none: the squared rounding of a ratio of 1."""


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """Rows [R, ...], or sequences [S, L, ...] with the states before their first step, [S, H] each."""

    obs: Obs
    decision: Tensor
    behaviour: Tensor  # (R, D), log-probabilities of the policy that collected them
    log_prob: Tensor  # (R, D), of the policy as the update begins: the same one, unless they are stale
    reference: Tensor  # (R, D), of the one to stay near to; (R, 0) without one
    value: Tensor  # (R, C), of the critic then
    advantage: Tensor  # (R, C)
    mask: Tensor  # (R, 1) or (R, D) bool: which decisions were made, in rows that count
    start: Tensor  # (R,) bool: an episode begins there
    policy_state: State
    critic_state: State

    def rows(self) -> RolloutBatch:
        """Sequences [S, L, ...] as rows [L * S, ...], step by step, as recurrent layers go through them."""
        rows = replace(self, policy_state={}, critic_state={})
        return rows.map(lambda value: value.transpose(0, 1).flatten(0, 1))

    def split(self, order: Tensor) -> list[RolloutBatch]:
        """A batch for each row of `order` (M, R), of the rows that it names."""
        columns = [value[order].unbind() for value in self.tensors()]
        batches = []
        for parts in zip(*columns, strict=True):
            following = iter(parts)
            batches.append(self.map(lambda _, following=following: next(following)))  # type: ignore[misc]
        return batches

    def tensors(self) -> list[Tensor]:
        """All of them, in the order in which `map` comes to them."""
        found: list[Tensor] = []

        def take(value: Tensor) -> Tensor:
            found.append(value)
            return value

        self.map(take)
        return found

    def map(self, fn: Callable[[Tensor], Tensor]) -> RolloutBatch:
        """The batch of `fn` of each tensor."""
        return RolloutBatch(
            map_obs(fn, self.obs),
            fn(self.decision),
            fn(self.behaviour),
            fn(self.log_prob),
            fn(self.reference),
            fn(self.value),
            fn(self.advantage),
            fn(self.mask),
            fn(self.start),
            {name: fn(value) for name, value in self.policy_state.items()},
            {name: fn(value) for name, value in self.critic_state.items()},
        )


class PPO(OnPolicyAgent):
    """PPO agent for Box observations (or flat Dicts of them) and Box, Discrete or MultiDiscrete actions, or answers of
    tokens.

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
    critic: ValueFunction | None
    """None where groups tell how good an episode was."""

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
        tokens = isinstance(action_space, TokenSpace)
        if c.credit == "per-decision" and not tokens:
            raise UsageError(f"agent.credit per-decision is for answers made of tokens; actions are {action_space}")
        self._joint = c.ratio == "joint" or (c.ratio == "auto" and not tokens)
        self._per_token = c.advantage == "gae" and tokens and c.credit != "joint" and not self._joint
        if c.decision_gamma != 1 and not self._per_token:
            raise UsageError("agent.decision_gamma is for answers of tokens with credit for each: leave it at 1")
        with self._weights_from(seed):
            networks = OnPolicyNetworks(head.observation_space, c, network, encoder, action_space=action_space)
            self.normalizer = networks.normalizer
            memory, trunk = networks.policy_trunk(head.outputs, actions=head.inputs, gain=0.01)
            self.policy = StochasticPolicy(networks.policy_encoder, memory, trunk, head, self.normalizer)
            self.critic = networks.value_function(gain=1.0) if c.advantage == "gae" else None
        self.policy.to(self.device)
        # With an adapter the copy is one of the adapter alone: what is frozen is shared.
        self.reference = copy.deepcopy(self.policy).requires_grad_(False) if c.kl_coef else None
        if self.reference is not None:
            self.reference.encoder.refer_to(self.reference.normalizer)  # which stays as it was, as the weights do
        self.policy.generator = self.generator
        # A network of a user's, a language model say, is asked about so many rows at a time.
        self._rows = c.minibatch_size if isinstance(network, Backbone) else None
        self.returns = RunningNormalizer(()).to(self.device)
        self.lr = torch.tensor(c.lr, device=self.device)
        learned: list[nn.Module] = [self.policy]
        if self.critic is not None:
            learned.append(self.critic.to(self.device))
            self._keep(critic=self.critic)
        weights, own = trained(*learned), len(trained(self.policy))
        lr = c.lr if c.lr_schedule == "constant" else self.lr
        # The policy's, where it is not always that: 0 while the critic alone learns.
        self._policy_lr = torch.zeros((), device=self.device) if c.critic_only else None
        lrs = [lr if self._policy_lr is None else self._policy_lr] * own
        lrs += [lr if c.critic_lr is None else c.critic_lr] * (len(weights) - own)
        self.optimizer = Adam(weights, lrs, eps=1e-5)
        self._keep(policy=self.policy, optimizer=self.optimizer, returns=self.returns, lr=self.lr)
        if self.reference is not None:
            self._begun = torch.zeros((), dtype=torch.bool, device=self.device)
            self._keep(reference=self.reference, begun=self._begun)
        self._former: list[RolloutBatch] = []  # earlier rollouts, the newest last
        self._step = executed(self.step, c.execution, "float32", self.device, self._changing)

    def require(self, rollout: Rollout) -> None:
        c = self.config
        if c.advantage == "gae":
            if rollout.groups is not None:
                raise UsageError("language.group_size is for agent.advantage grpo, rloo and gigpo: leave it out")
            return
        if rollout.groups is None:
            raise UsageError(
                f"agent.advantage {c.advantage} compares environments that are given the same tasks: text environments "
                "with --language.group-size"
            )
        _, rows = rollout.groups
        if rollout.horizon % rows:
            raise UsageError(
                f"episodes of groups take {rows} steps, and a rollout has {rollout.horizon} of each environment: make "
                f"--rollout-steps a multiple of {rows * rollout.num_envs}"
            )

    def update(self, rollout: Rollout) -> tuple[dict[str, Tensor], int]:
        """All epochs on a full rollout; returns the metrics' means (0-d) and the number of gradient steps."""
        history: list[dict[str, Tensor]] = []
        if self.reference is not None and not self._begun:  # now, after what it starts from was read
            self.reference.load_state_dict(self.policy.state_dict())
            self._begun.fill_(True)
        with products_of(self.config.minibatch_size, max(self.config.hidden, default=1)):
            data, metrics = self.prepare(rollout)
            if bool(rollout.valid.any()):  # else there is nothing to learn from
                history = self._epochs(self._with_former(data))
        if self.normalizer is not None:
            seen = map_obs(lambda value: value[:-1].flatten(0, 1), rollout.obs)
            self.normalizer.update(seen, rollout.valid.flatten())
        means = {name: torch.stack([one[name] for one in history]).mean() for name in history[0]} if history else {}
        if self.config.lr_schedule == "adaptive":
            metrics["lr"] = self.lr.clone()
        return metrics | means, len(history)

    def state_dict(self) -> dict[str, Any]:
        former = [{name: getattr(one, name) for name in _SAVED} for one in self._former]
        return super().state_dict() | ({"former": former} if former else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)

        def here(value: Tensor) -> Tensor:
            return value.to(self.device, copy=True)

        read = [RolloutBatch(**one, policy_state={}, critic_state={}) for one in state.get("former", [])]
        self._former = [one.map(here) for one in read]

    @torch.no_grad()
    def _with_former(self, data: RolloutBatch) -> RolloutBatch:
        """A rollout's rows, and those of earlier ones, by the policy of now."""
        kept = self.config.stale_rollouts
        if not kept:
            return data
        parts = [replace(one, log_prob=self._scored(self.policy, one.obs, one.decision)) for one in self._former]
        self._former = [*self._former, data.map(torch.clone)][-kept:]  # the rollout's own rows are written over
        columns = zip(*(part.tensors() for part in (*parts, data)), strict=True)
        joined = iter([torch.cat(column) for column in columns])
        return data.map(lambda _: next(joined))

    def _epochs(self, data: RolloutBatch) -> list[dict[str, Tensor]]:
        """Gradient steps on all minibatches of all epochs; returns the metrics of each."""
        c = self.config
        if self._rows is not None:  # what waits, or is no transition, takes as long as what counts
            counted = data.mask.any(-1)
            data = data.map(lambda x: x[counted])
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
        value: Tensor | None = None
        if c.recurrent != "none":
            assert self.critic is not None
            obs, start = map_obs(lambda value: value.transpose(0, 1), batch.obs), batch.start.t()  # (L, S, ...)
            distribution, *_ = self.policy.unroll(obs, batch.policy_state, start)
            value = self.critic.unroll(obs, batch.critic_state, start)[0].view(-1, 1)  # (R, 1)
            batch = batch.rows()
        else:
            distribution = self.policy.distribution(batch.obs)
            value = None if self.critic is None else self._value(batch.obs, batch.decision)
        log_prob, entropies = distribution.score(batch.decision)  # (R, D)
        # What does not count may be anything, and has no weight: a row, or one of its decisions.
        rows = batch.mask.any(-1, keepdim=True)
        made = batch.mask.expand_as(log_prob)
        per_row = rows / rows.sum().clamp(min=1)

        # r = pi(a|s) / pi_old(a|s); as sums of logarithms, over all decisions of a row where it is joint.
        log_ratio = self._of_ratio(log_prob - batch.log_prob, made)
        ratio = log_ratio.exp()
        counted = rows if self._joint else made
        weight = counted / counted.sum().clamp(min=1)  # means are over what counts, rows or decisions
        advantage, credited = batch.advantage, batch.mask if self._per_token else rows
        if c.normalize_advantage and c.advantage == "gae":
            number = credited.sum().clamp(min=1)
            share = credited / number
            centered = advantage - (share * advantage).sum()
            deviation = ((share * centered.square()).sum() * number / (number - 1).clamp(min=1)).sqrt()
            advantage = centered / (deviation + 1e-8)
        # L_clip, eq. 7
        near = ratio.clamp(1 - c.clip, 1 + (c.clip if c.clip_high is None else c.clip_high))
        surrogate = torch.minimum(ratio * advantage, near * advantage)
        if c.stale_rollouts:
            stale = self._of_ratio(batch.log_prob - batch.behaviour, made).exp()
            surrogate = stale.clamp(max=c.stale_weight) * surrogate
        policy_loss = -(weight * surrogate).sum()
        entropy = (per_row * torch.where(made, entropies, 0.0).sum(-1, keepdim=True)).sum()
        loss = policy_loss - c.entropy_coef * entropy  # eq. 9, with what follows
        metrics = {"policy_loss": policy_loss.detach(), "entropy": entropy.detach()}

        if value is not None:  # L_VF, eq. 9: (V - V_target)^2, where V_target = A + V_old.
            target = batch.advantage + batch.value
            error = (value - target).square()
            if c.value_clip is not None:
                clipped = batch.value + (value - batch.value).clamp(-c.value_clip, c.value_clip)
                error = torch.maximum(error, (clipped - target).square())
            value_loss = (credited / credited.sum().clamp(min=1) * error).sum()
            loss = loss + c.value_coef * value_loss
            metrics["value_loss"] = value_loss.detach()
        if self.reference is not None:
            away = self._of_ratio(batch.reference - log_prob, made)
            metrics["kl_reference"] = -(per_row * away.sum(-1, keepdim=True)).sum().detach()
            if c.kl_estimator != "k1":
                away = away.square() / 2 if c.kl_estimator == "k2" else away.exp() - 1 - away
                loss = loss + c.kl_coef * (weight * away).sum()

        with torch.no_grad():
            kl = (per_row * (ratio - 1 - log_ratio).sum(-1, keepdim=True)).sum()  # of old from new, as it is sampled
            clipped_share = (weight * (near != ratio)).sum()
            moves = self.optimizer.steps >= c.critic_only  # before, what there is of a divergence is rounding
            if c.lr_schedule == "adaptive":
                little = (kl < c.desired_kl / 2) & (kl > _ROUNDING)  # in the first minibatch nothing has moved yet
                factor = torch.where(kl > 2 * c.desired_kl, 1 / 1.5, torch.where(little, 1.5, 1.0))
                self.lr.mul_(torch.where(moves, factor, 1.0)).clamp_(1e-5, 1e-2)
            if self._policy_lr is not None:
                lr = self.lr if c.lr_schedule == "adaptive" else c.lr
                self._policy_lr.copy_(lr * moves)
        self.optimizer.descend(loss, max_norm=c.max_grad_norm)
        return metrics | {"kl": kl, "clipped": clipped_share}

    def _of_ratio(self, logarithms: Tensor, made: Tensor) -> Tensor:
        """Logarithms of ratios (R, D), of a row's decisions together (R, 1) where they are joint."""
        logarithms = torch.where(made, logarithms, 0.0)
        return logarithms.sum(-1, keepdim=True) if self._joint else logarithms

    def _value(self, obs: Obs, decision: Tensor) -> Tensor:
        """V (R, C), without memory."""
        assert self.critic is not None
        return self.critic.along(obs, decision) if self._per_token else self._plain_value(obs)[:, None]

    def _plain_value(self, obs: Obs) -> Tensor:
        """V (R,), without memory."""
        assert self.critic is not None
        value: Tensor = self.critic(obs)
        return value

    @torch.no_grad()
    def prepare(self, rollout: Rollout) -> tuple[RolloutBatch, dict[str, Tensor]]:
        """What the minibatches are taken from, all rows (or sequences) in one; and metrics of the rollout."""
        c, shape = self.config, rollout.reward.shape
        seen = self._remember(rollout) if c.recurrent != "none" else self._look_back(rollout)
        decision, valid = rollout.extras["decision"], rollout.valid[..., None]
        made = self.policy.head.made(decision)
        mask = valid if made is None else valid & made
        metrics: dict[str, Tensor] = {}
        if self.critic is None:
            groups = self._groups(rollout)
            advantage = GROUP_ESTIMATORS[c.advantage](groups)[..., None]
            metrics["groups_alike"] = groups.alike()
        else:
            advantage = gae(self._decisions(rollout, seen, mask if self._per_token else valid), c.gae_lambda)
            value, credited = seen.value, mask if self._per_token else valid
            whole = _variance(advantage + value, credited).clamp(min=1e-8)
            metrics["explained_variance"] = 1 - _variance(advantage, credited) / whole
            metrics["value_mean"] = _mean(value, credited)
        obs, start = map_obs(lambda x: x[:-1], rollout.obs), rollout.start[:-1]
        old = seen.log_prob
        batch = RolloutBatch(obs, decision, old, old, seen.reference, seen.value, advantage, mask, start, {}, {})
        states = seen.states
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

    def _decisions(self, rollout: Rollout, seen: _Look, mask: Tensor) -> Decisions:
        """What the critic's estimator looks at; `mask` (T, N, C) says what is credited."""
        c = self.config
        reward = self._normalized(rollout) if c.normalize_reward else rollout.reward
        # The last decision of a row earns its reward, and a step of time passes after it.
        last = mask & ~torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
        rewards = torch.where(last, reward[..., None], 0.0)
        if self.reference is not None and c.kl_estimator == "k1":
            away = torch.where(mask, seen.log_prob - seen.reference, 0.0)
            rewards = rewards - c.kl_coef * (away if self._per_token else away.sum(-1, keepdim=True))
        return Decisions(
            reward=rewards,
            discount=torch.where(last, (c.gamma * ~rollout.terminated)[..., None], c.decision_gamma),
            value=seen.value,
            next_value=next_values(seen.value, seen.last_value, seen.final_value, rollout.ended & rollout.valid, mask),
            end=ends(rollout.ended, rollout.valid)[..., None] & last,
            mask=mask,
        )

    def _groups(self, rollout: Rollout) -> Groups:
        """What the estimators that need no critic look at."""
        c = self.config
        assert rollout.groups is not None and rollout.anchor is not None  # see `require`; both or none
        reward = torch.where(rollout.valid, rollout.reward, 0.0)
        return Groups(reward, rollout.valid, rollout.anchor, *rollout.groups, c.gamma, c.step_weight)

    def _look_back(self, rollout: Rollout) -> _Look:
        """Without memory."""
        shape, decision = rollout.reward.shape, rollout.extras["decision"].flatten(0, 1)
        obs = map_obs(lambda x: x[:-1].flatten(0, 1), rollout.obs)
        # Of a network that takes long only what counts is asked.
        asked = slice(None) if self._rows is None else rollout.valid.flatten()

        def everywhere(found: Tensor) -> Tensor:
            out = found.new_zeros(len(decision), found.shape[-1])
            out[asked] = found
            return out.view(*shape, -1)

        obs, made = map_obs(lambda x: x[asked], obs), decision[asked]
        log_prob = everywhere(self._scored(self.policy, obs, made))
        reference = log_prob[..., :0] if self.reference is None else everywhere(self._scored(self.reference, obs, made))
        value, last_value = log_prob.new_zeros(*shape, 1), torch.zeros_like(rollout.reward[0])
        final_value = torch.zeros_like(rollout.reward)
        if self.critic is not None:
            value = everywhere(self._blocks(self._value, obs, made))
            last_value = self._blocks(self._plain_value, map_obs(lambda x: x[-1], rollout.obs))
            if bool((cut := _cut_short(rollout)).any()):
                final_value[cut] = self._blocks(self._plain_value, map_obs(lambda x: x[cut], rollout.final_obs))
        return _Look(log_prob, reference, value, last_value, final_value, [])

    def _scored(self, policy: StochasticPolicy, obs: Obs, decision: Tensor) -> Tensor:
        """Log-probabilities (M, D) by `policy` of the decisions at rows (M, ...)."""
        return self._blocks(lambda obs, made: policy.distribution(obs).score(made)[0], obs, decision)

    def _blocks(self, ask: Callable[..., Tensor], obs: Obs, *given: Tensor) -> Tensor:
        """What `ask(obs, *given)` says of rows (M, ...), all in one batch or so many at a time."""
        count = len(_entries(obs)[0])
        if self._rows is None or count <= self._rows:
            return ask(obs, *given)
        parts = []
        for begin in range(0, count, self._rows):
            rows = slice(begin, begin + self._rows)
            part = map_obs(lambda x, rows=rows: x[rows], obs)  # type: ignore[misc]
            parts.append(ask(part, *(x[rows] for x in given)))
        return torch.cat(parts)

    def _remember(self, rollout: Rollout) -> _Look:
        """With memory: step by step from the states before the rollout. The critic's goes on to the next one."""
        horizon, shape = rollout.horizon, rollout.reward.shape
        assert self.critic is not None and self.critic.recurrence is not None
        recurrence, decision = self.critic.recurrence, rollout.extras["decision"].flatten(0, 1)
        carried = rollout.carried_state(recurrence.initial(rollout.num_envs))
        values, critic, after = self.critic.unroll(rollout.obs, carried, rollout.start)
        rollout.carried |= critic[horizon]
        obs = map_obs(lambda x: x[:-1], rollout.obs)
        distribution, policy, _ = self.policy.unroll(obs, rollout.policy_state, rollout.start[:-1])
        log_prob = distribution.score(decision)[0].view(*shape, -1)
        reference = log_prob[..., :0]
        if self.reference is not None:
            beside, *_ = self.reference.unroll(obs, rollout.policy_state, rollout.start[:-1])
            reference = beside.score(decision)[0].view(*shape, -1)
        final_value, rows = torch.zeros_like(rollout.reward), _cut_short(rollout)
        if bool(rows.any()):
            state = {k: torch.stack([one[k] for one in after[:horizon]])[rows] for k in after[0]}
            final_value[rows] = self.critic.step(map_obs(lambda x: x[rows], rollout.final_obs), state)[0]
        stretches = -(-horizon // self.config.sequence_length)  # of equal lengths, as far as that goes
        length = -(-horizon // stretches)
        states = [(policy[t], critic[t]) for t in range(0, horizon, length)]
        return _Look(log_prob, reference, values[:-1, :, None], values[-1], final_value, states)

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


_SAVED = ("obs", "decision", "behaviour", "log_prob", "reference", "value", "advantage", "mask", "start")
"""What a checkpoint has of earlier rollouts."""


class _Look(NamedTuple):
    """A rollout, by the weights that collected it."""

    log_prob: Tensor  # (T, N, D)
    reference: Tensor  # (T, N, D), by the policy to stay near to; (T, N, 0) without one
    value: Tensor  # (T, N, C)
    last_value: Tensor  # (N,), of the observation to be acted on next
    final_value: Tensor  # (T, N), of true last observations of what was cut
    states: list[tuple[State, State]]  # with memory, of policy and critic (N, H) before each stretch of time


def _entries(obs: Obs) -> list[Tensor]:
    return list(obs.values()) if isinstance(obs, dict) else [obs]


def _cut_short(rollout: Rollout) -> Tensor:
    """Rows (T, N) after which an episode was cut, and its last observation is worth something."""
    return rollout.truncated & ~rollout.terminated & rollout.valid


def _mean(value: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, value, 0.0).sum() / mask.sum().clamp(min=1)


def _variance(value: Tensor, mask: Tensor) -> Tensor:
    return _mean((value - _mean(value, mask)).square(), mask)
