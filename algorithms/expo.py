"""Expressive policy optimization (Dong et al. 2025, arXiv:2507.07986).

Shapes: G gradient steps, B batch, A action dimensions, K critics, M of them, N samples.
The base is an expressive policy that was trained by imitation (`ctrlrl train bc --agent.policy flow`), and goes on
imitating what is in the batches. Edits e of a tanh-Gaussian at (s, a) move its actions: a + beta * e. The policy that
acts is made on the fly: of N actions of the base and their N edits, the one that the critics value most (the minimum of
M target critics). The same choice gives the target's action:

    y = r + gamma min_M Q'(s', a*(s'))        a* = argmax over 2N of min_M' Q'(s', .)

Each `policy_delay`-th step the base takes a step of its own loss on the batch's actions, edits go up the mean of the
critics with an entropy bonus, at the batch's actions, and the temperature moves. What acts has a moving average of the
base. Without exploration the N noises of the base are always the same ones, edits are their modes, and the minimum is
over all K critics, so that the policy is one function.

Deviations from the authors' code: the base is flow matching or a mixture, theirs diffusion; a + beta * e is clipped to
the bounds everywhere, theirs in the environment; step sizes are constant, theirs fall by a cosine; their evaluation
draws noise anew. Their target entropy of beta * e, -A/2, cannot be reached below a beta of 0.3, so that the temperature
grows for ever: here it is -A/2 of e, A log beta lower.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent import Draws, OffPolicyAgent
from ctrlrl.algorithms.expo_config import EXPOConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.chunk import ChunkPolicy
from ctrlrl.nn.distributions import TanhNormal
from ctrlrl.nn.encoder import Encoder, EncoderFactory, ObservationNormalizer
from ctrlrl.nn.mlp import NetworkFactory, at_least_float32
from ctrlrl.nn.networks import Critics, Networks
from ctrlrl.nn.optim import Adam, polyak, trained, trained_beside
from ctrlrl.nn.policy import ActionScaling, Policy, PolicyState, require_bounded_box
from ctrlrl.replay.batch import Batch
from ctrlrl.tree import Obs, is_image, map_obs, obs_items


class Edits(nn.Module):
    """The tanh-Gaussian over edits (B, A) in [-1, 1] of actions (B, A)."""

    def __init__(self, encoder: Encoder, trunk: nn.Module, scale: float, log_std_bounds: tuple[float, float]) -> None:
        super().__init__()
        self.encoder, self.trunk, self.scale, self.log_std_bounds = encoder, trunk, scale, log_std_bounds

    def distribution(self, obs: Obs, action: Tensor) -> TanhNormal:
        """Over edits of `action` at `obs`."""
        out = at_least_float32(self.trunk(torch.cat([self.encoder(obs), action], -1)))
        mean, log_std = out.chunk(2, dim=-1)
        return TanhNormal(mean, log_std.clamp(*self.log_std_bounds))

    def apply_to(self, action: Tensor, edit: Tensor) -> Tensor:
        """a + beta * e, within the bounds."""
        return (action + self.scale * edit).clamp(-1, 1)


class EXPOPolicy(Policy):
    """The best of N actions of a base and their edits, by target critics.

    Args:
        base: gives actions.
        edits: moves them.
        critics: value them.
        space: of the environment's actions.
        samples: N.
        subset: M.
        normalizer: what the encoders of edits and critics refer to.
    """

    noise: Tensor
    """(N, noise of the base): what it samples with where nothing is explored."""

    def __init__(
        self,
        base: ChunkPolicy,
        edits: Edits,
        critics: Critics,
        space: gym.spaces.Box,
        samples: int,
        subset: int,
        normalizer: ObservationNormalizer | None,
    ) -> None:
        super().__init__()
        self.normalizer = normalizer  # here, so that it is saved with the policy
        self.base, self.edits, self.critics, self.scaling = base, edits, critics, ActionScaling(space)
        self.samples, self.subset = samples, subset
        self.register_buffer("noise", torch.randn(samples, base.head.noise))

    @torch.no_grad()
    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        """The best action, of fresh samples to explore; extras are empty."""
        n = len(obs_items(obs)[0][1])
        count, dim = self.samples, self.scaling.low.numel()
        noise, edit, members = self.noise.repeat(n, 1), None, None
        if explore:
            g = self.require_generator()
            noise = torch.randn(noise.shape, generator=g, device=noise.device)
            edit = torch.randn(n * count, dim, generator=g, device=noise.device)
            order = torch.rand(self.critics.ensemble.members, generator=g, device=noise.device).argsort()
            members = order[: self.subset]
        unit = self.choose(obs, self.base, noise, edit, members)
        return self.scaling.to_environment(unit), state or {}, {}

    def choose(self, obs: Obs, base: ChunkPolicy, noise: Tensor, edit: Tensor | None, members: Tensor | None) -> Tensor:
        """The best action (B, A) at `obs`, with the base's noise (B N, ...) and the edits' (B N, A), None for modes, by
        the minimum of these critics, None for all."""
        count = self.samples
        repeated = map_obs(lambda x: x.repeat_interleave(count, 0), obs)
        actions = base.head.plan(base.encoder(repeated), noise)[:, 0]  # (B N, A)
        edits = self.edits.distribution(repeated, actions)
        moved = self.edits.apply_to(actions, edits.mode if edit is None else edits.rsample(edit)[0])
        both = torch.stack([actions, moved], 1)  # (B N, 2, A)
        twice = map_obs(lambda x: x.repeat_interleave(2, 0), repeated)
        q = self.critics(twice, both.flatten(0, 1), members=members).amin(0)  # (B N 2,)
        best = q.view(-1, 2 * count).argmax(1)  # (B,)
        chosen = (torch.arange(2 * count, device=best.device) == best[:, None]).float()  # (B, 2 N)
        out: Tensor = (both.reshape(-1, 2 * count, both.shape[-1]) * chosen[..., None]).sum(1)
        return out


class EXPO(OffPolicyAgent):
    """An expressive base, edits and critics for Box observations (or flat Dicts of them) and bounded Box actions.

    Args:
        observation_space: of one environment.
        action_space: of one environment.
        config: every number that changes the result.
        base: a policy of BC that samples single actions (flow or mixture); it goes on learning.
        seed: of the weights and of every later draw.
        device: where weights and batches lie.
        network: `factory(in_features, out_features)`, instead of the multilayer perceptrons of `config.hidden`.
        encoder: `factory(space)`, instead of the built-in one for vectors and images.

    Raises:
        UsageError: if the spaces or the base do not suit the algorithm.
    """

    config: EXPOConfig
    policy: EXPOPolicy
    title = "EXPO"
    trains_base = True
    config_class = EXPOConfig

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        config: EXPOConfig | None = None,
        *,
        base: Policy,
        seed: int = 0,
        device: torch.device | str = "cpu",
        network: NetworkFactory | None = None,
        encoder: EncoderFactory | None = None,
    ) -> None:
        c = config or EXPOConfig()
        super().__init__(c, seed, device)
        box = require_bounded_box(action_space, self.title)
        if not isinstance(base, ChunkPolicy) or base.chunk != 1 or not base.head.noise:
            raise UsageError(
                "EXPO goes on training its base, which must sample single actions: a run of ctrlrl train bc "
                "--agent.policy flow (or mixture), with --agent.chunk 1"
            )
        dim = math.prod(box.shape)
        highest = dim * math.log(2 * c.edit_scale)
        self.target_entropy = highest - dim * math.log(2) - dim / 2 if c.target_entropy is None else c.target_entropy
        if self.target_entropy >= highest:
            raise UsageError(
                f"agent.target_entropy must be below {highest:.3g}, the most that {dim} edits of at most "
                f"{c.edit_scale:g} can have, got {self.target_entropy:g}"
            )
        bounds = (c.log_std_bounds[0], c.log_std_bounds[1])
        spaces = observation_space.spaces if isinstance(observation_space, gym.spaces.Dict) else {"": observation_space}
        if any(map(is_image, spaces.values())):
            raise UsageError("EXPO learns from vectors: base, edits and critics would each need a look at every image")
        with self._weights_from(seed):
            networks = Networks(observation_space, c, network, encoder)
            self.normalizer = networks.normalizer
            edits = Edits(networks.policy_encoder, networks.trunk(2 * dim, actions=dim), c.edit_scale, bounds)
            self.critics = networks.critics(c.num_critics, actions=dim, layer_norm=c.layer_norm).to(self.device)
            self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
            acting = copy.deepcopy(base).requires_grad_(False)
            self.policy = EXPOPolicy(acting, edits, self.target_critics, box, c.samples, c.subset, self.normalizer)
        self.policy.to(self.device).generator = self.generator
        self.base = copy.deepcopy(base).requires_grad_(True).to(self.device)
        self.log_alpha = torch.tensor(math.log(c.initial_alpha), device=self.device, requires_grad=True)

        learned = [p for p in nn.ModuleList([self.base.encoder, self.base.head]).parameters() if p.requires_grad]
        acting_parameters = nn.ModuleList([acting.encoder, acting.head]).parameters()
        self._learned, self._acting = learned, list(acting_parameters)
        self._critic, self._target = trained(self.critics), trained_beside(self.critics, self.target_critics)
        shared = set(self._critic)
        self.actor_optimizer = Adam([p for p in trained(edits) if p not in shared], c.actor_lr)
        self.base_optimizer, self.critic_optimizer = Adam(learned, c.base_lr), Adam(self._critic, c.critic_lr)
        self.alpha_optimizer = Adam([self.log_alpha], c.alpha_lr)
        self._keep(policy=self.policy, critics=self.critics, base=self.base, log_alpha=self.log_alpha)
        self._keep(actor_optimizer=self.actor_optimizer, critic_optimizer=self.critic_optimizer)
        self._keep(base_optimizer=self.base_optimizer, alpha_optimizer=self.alpha_optimizer)

    def draw(self, groups: int, rows: int) -> Draws:
        """The base's noise (G, B N, ...), that of edits (G, B N + B, A), M critics to choose by and M for the target
        (G, 2, M), the shift of images, and what the base's loss draws."""
        c, dim = self.config, self.policy.scaling.low.numel()
        chunk = rows * c.samples
        order = torch.rand(groups, 2, c.num_critics, generator=self.generator, device=self.device).argsort(-1)
        return (
            self.normal(groups, chunk, self.base.head.noise),
            self.normal(groups, chunk + rows, dim),
            order[..., : c.subset],
            self.draw_shift(groups, rows),
            *self.base.head.draw(groups, rows, self.generator),
        )

    def step(
        self,
        batch: Batch,
        noise: Tensor,
        edit_noise: Tensor,
        members: Tensor,
        shift: Tensor | None = None,
        *base_draws: Tensor,
        improve: bool = True,
    ) -> dict[str, Tensor]:
        """One gradient step on `batch` [B, ...], with what `draw` gives for it."""
        c, alpha = self.config, self.log_alpha.detach().exp()
        critic_obs, obs, _, target_obs = self.see(batch, shift)
        stored = self.policy.scaling.to_unit(batch.action)
        rows = len(stored)

        # Critics: y = r + gamma min_M Q'(s', a*), a* the best of 2N by other M critics; no entropy.
        with torch.no_grad():
            edit = edit_noise[: rows * c.samples]
            next_action = self.policy.choose(target_obs, self.base, noise, edit, members[0])
            next_q = self.target_critics(target_obs, next_action, members=members[1]).amin(0)
            target = batch.reward + batch.discount * next_q  # (B,)
        q = self.critics(critic_obs, stored)  # (K, B)
        critic_loss = (q - target.expand_as(q)).square().mean(-1).sum()
        self.critic_optimizer.descend(critic_loss)
        metrics = {"critic_loss": critic_loss.detach(), "q_mean": q.detach().mean(), "target_mean": target.mean()}
        polyak(self._target, self._critic, c.tau)

        if improve:
            # The base imitates the batch.
            whole = torch.ones(rows, 1, dtype=torch.bool, device=self.device)
            features = self.base.encoder(batch.obs)
            base_loss = self.base.head.loss(features, stored[:, None], whole, base_draws).mean()
            self.base_optimizer.descend(base_loss)
            polyak(self._acting, self._learned, c.base_tau)
            # Edits of the batch's actions: alpha log pi(e|s, a) - mean_K Q(s, a + beta e), entropy of beta * e.
            edits = self.policy.edits
            edit, log_prob, _ = edits.distribution(obs, stored).rsample(edit_noise[rows * c.samples :])
            log_prob = log_prob.sum(-1) - stored.shape[-1] * math.log(c.edit_scale)
            value = self.critics(obs, edits.apply_to(stored, edit)).mean(0)
            actor_loss = (alpha * log_prob - value).mean()
            self.actor_optimizer.descend(actor_loss)
            if c.alpha_lr > 0:
                self.alpha_optimizer.step([-(log_prob.detach().mean() + self.target_entropy)])
            metrics |= {"base_loss": base_loss.detach(), "actor_loss": actor_loss.detach(), "alpha": alpha}
            metrics |= {"edit_size": c.edit_scale * edit.detach().abs().mean(), "entropy": -log_prob.detach().mean()}
        return metrics
