"""What agents share. An algorithm's own file has the rest, its step in the order of its paper.

Shapes: G gradient steps, B batch.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ctrlrl.algorithms.agent_config import OffPolicyAgentConfig, ReplayAgentConfig
from ctrlrl.nn.encoder import ObservationNormalizer
from ctrlrl.nn.execution import executed
from ctrlrl.nn.networks import Critics
from ctrlrl.nn.optim import Adam
from ctrlrl.nn.policy import Policy
from ctrlrl.nn.residual import BASE, with_base
from ctrlrl.replay.batch import Batch
from ctrlrl.replay.rollout import Rollout
from ctrlrl.tree import Obs, map_obs

Draws = tuple[Tensor | None, ...]
"""The random numbers of one gradient step, or, with a first dimension G, of G of them."""


class Agent(ABC):
    """A policy, and the learner that improves it.

    Attributes:
        policy: what acts.
        device: where weights and batches lie.
        generator: of every draw after the weights'.
    """

    policy: Policy

    def __init__(self, seed: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._kept: dict[str, nn.Module | Adam | Tensor] = {}

    @contextmanager
    def _weights_from(self, seed: int) -> Iterator[None]:
        """Draw the weights of the networks that are made inside from `seed`, and leave the global generator alone."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's alone: weights are made there
            yield

    def _keep(self, **parts: nn.Module | Adam | Tensor) -> None:
        """Name what changes while learning, for `state_dict`."""
        self._kept |= parts

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while learning: weights (the policy's hold the normalizer), optimizers, counters and
        the generator, as nested dicts, lists and tensors."""
        return {
            name: part.detach() if isinstance(part, Tensor) else part.state_dict() for name, part in self._kept.items()
        } | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        for name, part in self._kept.items():
            if isinstance(part, Tensor):
                with torch.no_grad():
                    part.copy_(state[name])
            else:
                part.load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())

    def _changing(self) -> Sequence[Tensor]:
        """All tensors that a step changes in place."""
        tensors: list[Tensor] = []
        for part in self._kept.values():
            if isinstance(part, Tensor):
                tensors.append(part)
            elif isinstance(part, Adam):
                tensors += [value for values in part.state_dict().values() for value in values]
            else:
                tensors += part.parameters()
        return list(dict.fromkeys(tensors))


class OnPolicyAgent(Agent):
    """A policy that learns from rollouts, each once."""

    def require(self, rollout: Rollout) -> None:
        """Raise UsageError unless it can learn from rollouts like this one, which is empty still."""

    @abstractmethod
    def update(self, rollout: Rollout) -> tuple[dict[str, Tensor], int]:
        """Learn from a full rollout; metrics are 0-d tensors, the means over the gradient steps, whose number follows.

        Observation statistics may move when that is done, and at no other time.
        """


def with_base_actions(batch: Batch) -> Batch:
    """`batch` with what the base does at its observations among them (`ctrlrl.nn.residual`)."""
    return replace(
        batch,
        obs=with_base(batch.obs, batch.extras[BASE]),
        next_obs=with_base(batch.next_obs, batch.next_extras[BASE]),
    )


class ReplayAgent(Agent):
    """A policy that learns from stored transitions.

    An algorithm makes its networks, names in `_keep` what changes, draws the random numbers of its steps (`draw`) and
    writes one gradient step down (`step`); everything else is here.

    Attributes:
        config: every number that changes the result.
        normalizer: of observations, if any; it belongs to the policy's state.
        updates: gradient steps so far, 0-d; which of them improve the policy too follows from it.
        policy_delay: every so many steps one improves the policy too.
        trains_base: whether it goes on training the policy that it builds on.
    """

    normalizer: ObservationNormalizer | None
    policy_delay: int = 1
    trains_base: bool = False

    def __init__(self, config: ReplayAgentConfig, seed: int, device: torch.device | str) -> None:
        super().__init__(seed, device)
        self.config = config
        self.updates = 0
        self._steps = {
            improve: executed(
                functools.partial(self.step, improve=improve),
                config.execution,
                config.precision,
                self.device,
                self._changing,
            )
            for improve in (True, False)
        }

    @abstractmethod
    def draw(self, groups: int, rows: int) -> Draws:
        """Random numbers for `groups` gradient steps on batches of `rows`, from the generator; each [G, ...]."""

    @abstractmethod
    def step(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """`step(batch, *draws, improve=True)`: one gradient step on `batch` [B, ...], a pure function of weights, batch
        and draws; with `improve` the policy's too. Metrics are 0-d."""

    @property
    def reads(self) -> frozenset[str]:
        """Which optional entries of a batch its step reads: `next_action`, `mc_return`, names of `extras`."""
        return frozenset()

    @property
    def chunk(self) -> int:
        """Of how many actions in a row its batches have to be (`Batch.mask`); 0: of single ones."""
        return 0

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step for each of the G groups of `batch` [G, B, ...].

        Every `policy_delay`-th step of the whole training improves the policy too. Metrics are 0-d, means over the
        steps that gave them; those of the policy are missing where no step improved it.
        """
        draws = self.draw(len(batch), batch.reward.shape[1])
        metrics: list[dict[str, Tensor]] = []
        for g in range(len(batch)):
            self.updates += 1
            step = self._steps[self.improves()]
            metrics.append(step(batch[g], *(None if value is None else value[g] for value in draws)))
        if len(metrics) == 1:
            return metrics[0]
        names = dict.fromkeys(name for given in metrics for name in given)
        return {name: torch.stack([given[name] for given in metrics if name in given]).mean() for name in names}

    def improves(self) -> bool:
        """Whether the gradient step that is counted last improves the policy too."""
        return self.updates % self.policy_delay == 0

    def observe(self, obs: Obs, valid: Tensor) -> None:
        """Take observations (N, ...) of valid rows into the running statistics; once per environment step."""
        if self.normalizer is not None:
            self.normalizer.update(obs, valid)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.updates = state.get("updates", 0)  # runs of before there were delayed policies do not count them

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of the agent's generator."""
        return torch.randn(shape, generator=self.generator, device=self.device)


class OffPolicyAgent(ReplayAgent):
    """An actor, a critic ensemble and target critics, which learn from replayed transitions.

    Attributes:
        critics: of [-1, 1]^A actions.
        target_critics: their moving average.
    """

    config: OffPolicyAgentConfig
    critics: Critics
    target_critics: Critics

    def __init__(self, config: OffPolicyAgentConfig, seed: int, device: torch.device | str) -> None:
        super().__init__(config, seed, device)
        self.policy_delay = config.policy_delay

    def draw_shift(self, groups: int, rows: int) -> Tensor | None:
        """How far images are shifted, (G, 2, B, 2): of obs and next_obs, down and to the right; None without images."""
        pad = self.config.random_shift
        if not pad or not self.critics.encoder.sees:
            return None
        shape = (groups, 2, rows, 2)
        return torch.randint(0, 2 * pad + 1, shape, generator=self.generator, device=self.device)

    def see(self, batch: Batch, shift: Tensor | None, *, target_policy: bool = False) -> tuple[Obs, Obs, Obs, Obs]:
        """The observations with images shifted and seen, once for all networks.

        Returns those for the critics' loss, the same without its gradient, the next ones for the policy (or the target
        policy, which sees as the target critics do), and for the target critics, whose convolutions are their own.
        """
        obs, next_obs, encoder = batch.obs, batch.next_obs, self.critics.encoder
        if shift is not None:
            pad = self.config.random_shift
            obs, next_obs = encoder.shifted(obs, shift[0], pad), encoder.shifted(next_obs, shift[1], pad)
        seen = encoder.see(obs)
        with torch.no_grad():
            for_targets = self.target_critics.encoder.see(next_obs)
            for_policy = for_targets if target_policy else encoder.see(next_obs)
            return seen, map_obs(Tensor.detach, seen), for_policy, for_targets

    def actor_parameters(self) -> list[nn.Parameter]:
        """The policy's that are learned, without the convolutions that it shares with the critics, whose loss trains
        them."""
        shared = set(self.critics.parameters())
        return [p for p in self.policy.parameters() if p.requires_grad and p not in shared]
