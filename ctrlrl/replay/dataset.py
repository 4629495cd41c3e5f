"""Sampling from a dataset: uniform or by the return of episodes, n-step, action chunks, hindsight goals; and batches
that are put together from two sources.

Nothing is kept for each transition but its columns: which episode a transition belongs to is looked up by bisection in
the episodes' ends, so a set needs its own size in memory where it is copied there, and next to nothing where it stays
on the disk, mapped.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.store import Dataset, Ragged
from ctrlrl.errors import UsageError
from ctrlrl.replay.batch import Batch
from ctrlrl.replay.hindsight import Hindsight, place, require_one_step
from ctrlrl.tree import Obs

Array = np.ndarray[Any, Any]


class Source(Protocol):
    """What batches can be drawn from: a replay memory, a dataset, or a mixture."""

    def __len__(self) -> int: ...
    def sample(self, groups: int, batch_size: int, *, gamma: float, n_step: int = 1) -> Batch: ...


class DatasetSampler:
    """Draws batches of a dataset's transitions, with replacement, from a generator of its own.

    Args:
        dataset: what to draw from.
        device: where batches are to lie.
        seed: of the generator.
        resident: whether columns are copied to the device, as float32 where they are of floats. By default they are,
            if they take at most half of its memory; else they stay mapped, and batches are read from the disk's cache.
        memory: bytes of the device's memory.
        extras: columns of the dataset that come with each row (`Batch.extras`).
        observed: tensors (T + E, ...) that have an entry for each observation of the T transitions of E episodes, in
            their order; they come with each row, too, and as `Batch.next_extras` for the next observation.
        next_action: give `Batch.next_action`.
        mc_return: give `Batch.mc_return`, a lower bound of the return that followed: where an episode was cut, nothing
            is taken to follow if no reward is negative, and else the lowest for ever.
        temperature: with a number, episodes are drawn in proportion to exp(R / temperature), R their return scaled to
            [0, 1], and then one of their transitions (return weighting, arXiv:2306.13085; there 0.1). None: uniform
            over transitions.
        reward_scale: rewards are (r + reward_shift) * reward_scale.
        reward_shift: see there.
        hindsight: give a share of the rows other goals.

    Raises:
        UsageError: the dataset has no transition, no such column, or columns that are no tensors; or returns of the
            former goals are asked for where goals are replaced; or these stand in no observation.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        resident: bool | None = None,
        memory: int | None = None,
        extras: Sequence[str] = (),
        observed: Mapping[str, Tensor] | None = None,
        next_action: bool = False,
        mc_return: bool = False,
        temperature: float | None = None,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        hindsight: Hindsight | None = None,
    ) -> None:
        if not dataset.num_transitions:
            raise UsageError(f"{dataset.path} has no transition to learn from")
        if hindsight is not None and mc_return:
            raise UsageError(
                "where goals are replaced (--sampling.hindsight) the return that followed in the data is of another "
                "goal, so nothing can be calibrated by it: leave out one of --sampling.hindsight and --agent.calibrate"
            )
        if hindsight is not None:
            if hindsight.achieved is None:
                raise UsageError("a dataset has what was achieved in its observations: say where (Hindsight.achieved)")
            self._achieved = place(hindsight.achieved)
        self.dataset, self.device = dataset, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._bare = not isinstance(dataset.observation, dict)
        observation = {"": dataset.observation} if self._bare else dataset.observation
        columns: dict[str, Any] = {f"obs/{name}": value for name, value in observation.items()}
        columns |= {"action": dataset.action, "reward": dataset.reward}
        for name in extras:
            if name in dataset.columns and dataset.columns[name].per == "observation":
                raise UsageError(f"{dataset.path}: the column {name!r} is of observations; extras are of steps")
            columns[f"extras/{name}"] = dataset.column(name)
        for name, value in columns.items():
            if isinstance(value, Ragged):
                raise UsageError(
                    f"{dataset.path}: {name.partition('/')[2]!r} differs in length from row to row; make tensors of "
                    "one shape of it (tokens, padded) before it is learned from"
                )
        needed = sum(value.size * (4 if value.dtype.kind == "f" else value.itemsize) for value in columns.values())
        self.resident = needed <= memory / 2 if resident is None and memory is not None else resident is not False
        where = self.device if self.resident else torch.device("cpu")
        self._columns = {name: _tensor(value, where, copy=self.resident) for name, value in columns.items()}
        self._scale, self._shift = reward_scale, reward_shift
        if self.resident:
            self._columns["reward"] = self._scaled(self._columns["reward"])
        self._where = where
        self._with_observations = {name: value.to(where) for name, value in (observed or {}).items()}
        self._ends = torch.from_numpy(dataset.starts + dataset.lengths).to(where)
        self._terminated = torch.from_numpy(dataset.terminated).to(where)
        self._wants_next_action, self._wants_mc_return = next_action, mc_return
        self._returns: dict[float, Tensor] = {}
        self._chances: Tensor | None = None
        if temperature is not None:
            self._chances = torch.from_numpy(return_weights(dataset.returns, temperature).cumsum()).to(self.device)
            self._lengths = torch.from_numpy(dataset.lengths).to(self.device)
        self._hindsight = hindsight

    def __len__(self) -> int:
        return self.dataset.num_transitions

    def observations(self, start: int, stop: int) -> Obs:
        """Rows [start, stop) of all observations, (stop - start, ...), on the device."""
        return self._wrap({k: v[start:stop].to(self.device) for k, v in self._observed()})

    def sample(self, groups: int, batch_size: int, *, gamma: float, n_step: int = 1, chunk: int = 0) -> Batch:
        """`groups` independent batches [G, B, ...].

        n-step returns stop at the end of an episode. With a `chunk` of H, `action` is [G, B, H, ...], the action and
        those that follow, and `mask` [G, B, H] says which there are: behind the end the last is repeated.
        """
        first = self._draw(groups * batch_size)
        episode = torch.searchsorted(self._ends, first, right=True)
        final = self._ends.index_select(0, episode) - 1  # the last transition of its episode
        reward, last = self._rewards(first), torch.minimum(first + (n_step - 1), final)
        for k in range(1, n_step):
            at = torch.minimum(first + k, final)
            reward = reward + torch.where(first + k <= final, gamma**k * self._rewards(at), 0.0)
        end = last == final
        terminated = end & self._terminated.index_select(0, episode)
        length = (last - first + 1).to(torch.float32)
        seen = first + episode
        action, mask = self._take("action", first), None
        if chunk:
            ahead = first[:, None] + torch.arange(chunk, device=first.device)
            mask = ahead <= final[:, None]
            actions = self._take("action", torch.minimum(ahead, final[:, None]).flatten())
            action = actions.view(len(first), chunk, *actions.shape[1:])
        obs = {name: value.index_select(0, seen) for name, value in self._observed()}
        next_obs = {name: value.index_select(0, last + episode + 1) for name, value in self._observed()}
        if self._hindsight is not None:
            require_one_step(n_step)
            reward, terminated = self._relabel(self._hindsight, obs, next_obs, reward, terminated, last, final, episode)
            end = end | terminated
        extras = [name for name in self._columns if name.startswith("extras/")]
        batch = Batch(
            obs=self._wrap(obs),
            action=action,
            reward=reward,
            discount=torch.pow(gamma, length) * ~terminated,
            next_obs=self._wrap(next_obs),
            end=end,
            index=first,
            extras={name.removeprefix("extras/"): self._take(name, first) for name in extras}
            | {name: value.index_select(0, seen) for name, value in self._with_observations.items()},
            next_extras={
                name.removeprefix("extras/"): self._take(name, torch.minimum(last + 1, final)) for name in extras
            }
            | {name: value.index_select(0, last + episode + 1) for name, value in self._with_observations.items()},
            next_action=self._take("action", torch.minimum(last + 1, final)) if self._wants_next_action else None,
            mc_return=self._returns_to_go(gamma).index_select(0, first) if self._wants_mc_return else None,
            mask=mask,
        )
        return batch.map(lambda value: value.to(self.device).view(groups, batch_size, *value.shape[1:]))

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self.generator.set_state(state["generator"].cpu())

    def _draw(self, count: int) -> Tensor:
        if self._chances is None:
            return torch.randint(len(self), (count,), generator=self.generator, device=self.device).to(self._where)
        drawn = torch.rand(2, count, generator=self.generator, device=self.device, dtype=torch.float64)
        episode = torch.searchsorted(self._chances, drawn[0] * self._chances[-1], right=True)
        episode = episode.clamp_(max=len(self._chances) - 1)
        length = self._lengths.index_select(0, episode)
        step = torch.minimum((drawn[1] * length).to(torch.int64), length - 1)
        return (self._ends.to(self.device).index_select(0, episode) - length + step).to(self._where)

    def _take(self, name: str, at: Tensor) -> Tensor:
        return _as_float32(self._columns[name].index_select(0, at))

    def _rewards(self, at: Tensor) -> Tensor:
        reward = self._take("reward", at)
        return reward if self.resident else self._scaled(reward)

    def _scaled(self, reward: Tensor) -> Tensor:
        plain = (self._scale, self._shift) == (1.0, 0.0)
        return reward if plain else (reward + self._shift) * self._scale

    def _observed(self) -> list[tuple[str, Tensor]]:
        return [(n.removeprefix("obs/"), v) for n, v in self._columns.items() if n.startswith("obs/")]

    def _wrap(self, parts: dict[str, Tensor]) -> Obs:
        obs = {n: _as_float32(v) for n, v in parts.items()}
        return obs[""] if self._bare else obs

    def _returns_to_go(self, gamma: float) -> Tensor:
        """(N,) float32, computed once for each gamma: at least so much followed, whatever came behind a cut."""
        if gamma not in self._returns:
            data = self.dataset
            rewards = (np.asarray(data.reward, np.float64) + self._shift) * self._scale
            lowest = min(float(rewards.min()), 0.0)
            behind = np.where(data.terminated | (lowest == 0), 0.0, lowest / (1 - gamma) if gamma < 1 else -np.inf)
            returns = returns_to_go(rewards, data.starts, data.lengths, gamma, behind)
            self._returns[gamma] = torch.from_numpy(returns.astype(np.float32)).to(self._where)
        return self._returns[gamma]

    def _relabel(
        self,
        hindsight: Hindsight,
        obs: dict[str, Tensor],
        next_obs: dict[str, Tensor],
        reward: Tensor,
        terminated: Tensor,
        last: Tensor,
        final: Tensor,
        episode: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Put other goals into `obs` and `next_obs`; returns the rewards and terminations that follow."""
        drawn = torch.rand(2, len(reward), generator=self.generator, device=self.device).to(self._where)
        chosen = drawn[0] < hindsight.share
        ahead = ((final - last + 1) * drawn[1]).to(torch.int64)
        later = torch.minimum(last + ahead, final)  # what followed this transition, or a later one of its episode
        name, part = self._achieved
        goal = dict(self._observed())[name].index_select(0, later + episode + 1)[:, part]
        new, terminated = hindsight.put(obs, next_obs, next_obs[name][:, part], goal, chosen, terminated)
        return torch.where(chosen, self._scaled(new), reward), terminated


class MixedSampler:
    """Batches of which an exact share comes from each of two sources: rows of the second lie behind those of the first.

    Args:
        first: the one, a replay memory say.
        second: the other, a dataset say.
        share: of the second, in [0, 1]; of B rows it gives round(share * B).
    """

    def __init__(self, first: Source, second: Source, share: float) -> None:
        self.first, self.second, self.share = first, second, share

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def sample(self, groups: int, batch_size: int, *, gamma: float, n_step: int = 1) -> Batch:
        """`groups` batches [G, B, ...], each with the same number of rows of either source."""
        of_second = round(self.share * batch_size)
        parts = [
            source.sample(groups, rows, gamma=gamma, n_step=n_step)
            for source, rows in ((self.first, batch_size - of_second), (self.second, of_second))
            if rows
        ]
        return parts[0] if len(parts) == 1 else _joined(*parts)


def _joined(one: Batch, other: Batch) -> Batch:
    """Rows of both, along B; what only one of them has is left out."""

    def both(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b.to(a.dtype)], 1)

    def optional(name: str) -> Tensor | None:
        a, b = getattr(one, name), getattr(other, name)
        return None if a is None or b is None else both(a, b)

    def shared(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: both(a[name], b[name]) for name in a if name in b}

    obs = [
        shared(a, b) if isinstance(a, dict) and isinstance(b, dict) else both(a, b)  # type: ignore[arg-type]
        for a, b in ((one.obs, other.obs), (one.next_obs, other.next_obs))
    ]
    return Batch(
        obs=obs[0],
        action=both(one.action, other.action),
        reward=both(one.reward, other.reward),
        discount=both(one.discount, other.discount),
        next_obs=obs[1],
        end=both(one.end, other.end),
        index=both(one.index, other.index),
        extras=shared(one.extras, other.extras),
        next_extras=shared(one.next_extras, other.next_extras),
        next_action=optional("next_action"),
        mc_return=optional("mc_return"),
        weight=optional("weight"),
        mask=optional("mask"),
    )


def return_weights(returns: Array, temperature: float) -> Array:
    """(E,) chances of episodes, exp(R / temperature) normalized, R their returns scaled to [0, 1]."""
    low, high = returns.min(), returns.max()
    scaled = (returns - low) / (high - low) if high > low else np.zeros_like(returns)
    weights = np.exp((scaled - 1) / temperature)  # the best has 1, so that none overflows
    chances: Array = weights / weights.sum()
    return chances


def returns_to_go(rewards: Array, starts: Array, lengths: Array, gamma: float, behind: Array) -> Array:
    """(N,) discounted sums of the rewards from each transition to the end of its episode, and of the return (E,) that
    is `behind` that."""
    out: Array = rewards.astype(np.float64).copy()
    out[(starts + lengths - 1)[lengths > 0]] += gamma * behind[lengths > 0]
    order = np.argsort(-lengths, kind="stable")
    ends, lengths = (starts + lengths)[order], lengths[order]
    longest = int(lengths[0]) if len(lengths) else 0
    for back in range(2, longest + 1):  # of all episodes that are so long at once, from their ends on
        at = ends[: np.searchsorted(-lengths, -back, side="right")] - back
        out[at] += gamma * out[at + 1]
    return out


def _tensor(value: Array, device: torch.device, *, copy: bool) -> Tensor:
    """A column as a tensor, on the device if copied, else mapped."""
    with warnings.catch_warnings():  # a mapped column is not writable, and nothing writes to it
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(value)
    if not copy:
        return tensor
    return tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _as_float32(value: Tensor) -> Tensor:
    """Floats of any width as float32, other numbers as they are: what is mapped is as on the disk."""
    return value.to(torch.float32) if value.is_floating_point() else value
