"""Goals that are put in the place of others afterwards (Andrychowicz et al. 2017, arXiv:1707.01495; of text, as in
SAC-GLAM, arXiv:2410.12481), for a replay memory and datasets alike.

Shapes: M transitions; S slots of a ring, N environments, A goals that may hold at once, g numbers of a goal.
The strategy is `future`: another goal is what holds after the transition itself or a later one of its episode, each as
likely as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ctrlrl.envs.vector import VectorEnv, VectorGoals
from ctrlrl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Hindsight(VectorGoals):
    """Goals of which a share is replaced.

    Rows that get another one have the reward, and stop where the goal is reached, as if it had been theirs all along.
    """

    share: float = 0.8
    """Of the rows that get another goal; 0.8 is the paper's four in five (k = 4)."""

    def put(
        self,
        obs: dict[str, Tensor],
        next_obs: dict[str, Tensor],
        achieved: Tensor,
        goal: Tensor,
        chosen: Tensor,
        terminated: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Put other goals into observations; returns rewards (M,), which count where `chosen`, and terminations (M,).

        Args:
            obs: entries (M, ...), changed in place.
            next_obs: the same after the transitions.
            achieved: after the transitions, as `reward` takes it.
            goal: (M, g), what goals become.
            chosen: (M,) bool, where.
            terminated: (M,) bool, with the former goals.
        """
        name, part = place(self.desired)
        if self.reached is not None:  # what ended by its former goal comes to nothing later, so reaches the other, too
            terminated = terminated | (chosen & self.reached(achieved, goal))
        for entries in (obs, next_obs):
            entries[name][:, part] = torch.where(chosen[:, None], goal, entries[name][:, part])
        return self.reward(achieved, goal).to(torch.float32), terminated


class Futures:
    """What follows each transition of a ring in its episode, as slots (0 to S - 1) of an environment (0 to N - 1).

    Args:
        slots: S, more than there are transitions of an environment in the ring.
        num_envs: N.
        device: where the tensors lie.
        several: whether any number of goals can hold after a transition; else each has one.
    """

    def __init__(self, slots: int, num_envs: int, device: torch.device, *, several: bool) -> None:
        self._slots, self._n = slots, num_envs

        def zeros() -> Tensor:
            return torch.zeros(slots, num_envs, dtype=torch.int64, device=device)

        self._episode = zeros()  # episodes of an environment are counted; number e has its entry at e % S
        self._last = zeros()  # by episode, the slot of its last transition so far
        self._before = zeros() if several else None  # goals that held after all transitions before, of all episodes

    @property
    def tensors(self) -> list[Tensor]:
        """All there are, (S, N)."""
        return [self._episode, self._last, *([] if self._before is None else [self._before])]

    def extend(self, slots: Tensor, valid: Tensor, ended: Tensor, held: Tensor | None) -> None:
        """Take in new rows.

        Args:
            slots: (R + 1,), theirs in order, and the one after them.
            valid: (R, N) bool.
            ended: (R, N) bool.
            held: (R, N), goals that hold after each, where there are several; of what is no transition any number.
        """
        over = ended | ~valid  # what is no transition lies between two episodes
        self._episode[slots[1:]] = self._episode[slots[0]] + over.cumsum(0)
        closes = valid & (over | torch.cat([~valid[1:], torch.ones_like(valid[:1])]))  # one row of each episode
        row, env = closes.nonzero(as_tuple=True)
        at = slots[row]
        self._last[self._episode[at, env] % self._slots, env] = at
        if self._before is not None and held is not None:
            self._before[slots[1:]] = self._before[slots[0]] + held.cumsum(0)

    def draw(self, first: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each transition, a goal that held after itself or later.

        Args:
            first: (M,) flat places, slot * N + environment.
            drawn: (M,) uniform in [0, 1).

        Returns:
            The flat place (M,) of the transition after which it held, which of the goals there it is (M,), and whether
            there is any (M,).
        """
        n, size = self._n, self._slots * self._n
        slot, env = first // n, first % n
        episode = self._episode.view(-1).index_select(0, first) % self._slots
        last = self._last.view(-1).index_select(0, episode * n + env)
        span = (last - slot) % self._slots  # transitions that follow
        if self._before is None:
            ahead = torch.minimum(((span + 1) * drawn).to(torch.int64), span)
            return (first + ahead * n) % size, torch.zeros_like(first), torch.ones_like(first, dtype=torch.bool)
        before = self._before.view(-1)
        begin, end = before[first], before[(first + (span + 1) * n) % size]
        wanted = torch.minimum(begin + ((end - begin) * drawn).to(torch.int64), end - 1)  # counted in the environment
        # By bisection the last transition before which no more than `wanted` goals held.
        low, high = torch.zeros_like(span), span
        for _ in range(int(span.max()).bit_length()):
            middle = (low + high + 1) // 2
            reached = before[(first + middle * n) % size] <= wanted
            low, high = torch.where(reached, middle, low), torch.where(reached, high, middle - 1)
        later = (first + low * n) % size
        return later, (wanted - before[later]).clamp(min=0), end > begin


def hindsight_of(env: VectorEnv, share: float, *, option: str, more: str = "") -> Hindsight:
    """How goals of `env` are replaced.

    Args:
        env: knows its goals.
        share: of the rows that get another one.
        option: what asks for it; this and the next are for the message.
        more: examples besides the Panda's tasks.

    Raises:
        UsageError: it has no goals, or its reward is not one of them alone.
    """
    if env.goals is None:
        raise UsageError(
            f"{option} needs a task whose reward is a function of goals, and {env.name} is none: "
            'PandaReach-v0 and PandaLift-v0 are, with --env-kwargs \'{"reward": "sparse"}\'' + more
        )
    return Hindsight(**vars(env.goals), share=share)


def held(achieved: Tensor) -> Tensor:
    """How many of the goals (..., A, g) hold, (...): rows of -1 are none."""
    return (achieved >= 0).any(-1).sum(-1)


def place(where: str | slice) -> tuple[str, slice]:
    """The entry of observations, and the part of it."""
    return (where, slice(None)) if isinstance(where, str) else ("", where)


def require_one_step(n_step: int) -> None:
    """Raise UsageError where more than one reward is summed before the bootstrap."""
    if n_step > 1:
        raise UsageError(f"hindsight goals go with n_step = 1, got {n_step}: rewards in between are of the former goal")
