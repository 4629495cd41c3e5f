"""Replay memory: a ring of the latest transitions of N environments, preallocated on the learner's device.

Layout. Time runs along `slots`; slot t of environment n holds the observation before the action, and the transition
that follows from it: action, reward, terminated, truncated, valid. The next observation of a transition is simply the
observation in the slot after it, so each observation (or camera frame) is stored once; only where an episode ended does
the true final observation need a place of its own, the ring `_finals`, since the next slot already holds the new
episode's first observation. Discount and end are made when sampling, from the agent's gamma.

Of stacked images only the newest frame of each slot is kept, and how far back its episode reaches; the stack is rebuilt
when sampling, from the slots before. The ring is longer by as many slots as the oldest row's stack reaches back.

With hindsight (`ctrlrl.replay.hindsight`) goals are replaced when sampling, too; what is stored are the episodes' own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.vector import Step
from ctrlrl.replay.batch import Batch
from ctrlrl.replay.hindsight import Futures, Hindsight, held, place, require_one_step
from ctrlrl.tree import Obs, is_image

Extras = dict[str, Tensor]


class ReplayBuffer:
    """The latest `capacity` transitions (rounded up to whole rows of N).

    Observations are kept in float32 (float64 ones are rounded: networks read float32) or in their integer type, so
    images take one byte per pixel. Sampling is uniform over valid transitions, with replacement, from the buffer's own
    generator.

    Args:
        observation_space: of one environment; a Box or a flat Dict of Boxes.
        action_space: of one environment.
        capacity: transitions, at least N.
        num_envs: N.
        device: where everything lies.
        seed: of the sampling generator.
        extras: per-transition tensors the policy attaches, as `name: example (N, ...)`.
        next_extras: whether their values at the next observation are stored too.
        frame_stack: K: images of the observation space are (K, ...), as `FrameStack` makes them, and each frame is
            stored once. 1: they are stored as they come.
        reward_scale: batches have rewards (r + reward_shift) * reward_scale; stored they stay as they are.
        reward_shift: see there.
        hindsight: give a share of the transitions drawn other goals.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        *,
        capacity: int,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        extras: Mapping[str, Tensor] | None = None,
        next_extras: bool = False,
        frame_stack: int = 1,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        hindsight: Hindsight | None = None,
    ) -> None:
        if capacity < num_envs:
            raise ValueError(f"buffer.capacity must be at least num_envs = {num_envs}, got {capacity}")
        self.device = torch.device(device)
        self.num_envs = n = num_envs
        self.rows = -(-capacity // n)
        # One more than rows, since the newest holds the observation not yet acted on, and the frames before the oldest.
        self.slots = r = self.rows + frame_stack
        self.frame_stack = frame_stack
        self._scale, self._shift = reward_scale, reward_shift
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.total_rows = 0
        """Rows ever added; slot of row i is i % slots."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        spaces = observation_space.spaces if isinstance(observation_space, gym.spaces.Dict) else {"": observation_space}
        self._bare = not isinstance(observation_space, gym.spaces.Dict)
        self._stacked = [k for k, s in spaces.items() if frame_stack > 1 and is_image(s)]
        for name in self._stacked:
            shape = spaces[name].shape or ()
            if shape[0] != frame_stack:
                raise ValueError(f"observation {name!r} is {shape}; expected stacks of {frame_stack} frames")
        shapes = {k: (s.shape or ())[k in self._stacked :] for k, s in spaces.items()}  # of one frame of a stack
        self._obs = {k: zeros(r, n, *shapes[k], dtype=_storage_dtype(s)) for k, s in spaces.items()}
        # How many of the K - 1 frames before a slot belong to its stack; the others are its episode's first, repeated.
        self._reach = zeros(r, n, dtype=torch.uint8)
        self._columns: dict[str, Tensor] = {
            "action": zeros(r, n, *(action_space.shape or ()), dtype=_storage_dtype(action_space)),
            "reward": zeros(r, n),
            "terminated": zeros(r, n, dtype=torch.bool),
            "truncated": zeros(r, n, dtype=torch.bool),
            "valid": zeros(r, n, dtype=torch.bool),
            "final": zeros(r, n, dtype=torch.int64),  # which entry of the ring `_finals`, counted from the first ever
        }
        for prefix in ("extras", "next_extras") if next_extras else ("extras",):
            for name, example in (extras or {}).items():
                self._columns[f"{prefix}/{name}"] = zeros(r, *example.shape, dtype=example.dtype)
        self._hindsight, self._futures = hindsight, None
        if hindsight is not None:
            several = hindsight.achieved is None
            self._futures = Futures(r, n, self.device, several=several)
            if several:  # as the goals in observations
                name, part = place(hindsight.desired)
                goal = self._obs[name][:, :, part]
                self._columns["achieved"] = zeros(r, n, hindsight.most, goal.shape[-1], dtype=goal.dtype)
        columns = {f"obs/{key}": value for key, value in self._obs.items()} | self._columns
        self._flat = {name: value.view(r * n, *value.shape[2:]) for name, value in columns.items()}  # the same memory
        # Final observations, in the order of their rows, entry i at i % len; grows by doubling.
        self._finals = {k: zeros(max(64, 2 * n), *v.shape[2:], dtype=v.dtype) for k, v in self._obs.items()}
        self._finals_head = self._finals_tail = 0
        # Flat slots (slot * N + environment) of the valid transitions, oldest first, entry i at i % len.
        self._order = zeros(self.rows * n, dtype=torch.int64)
        self._order_head = self._order_tail = 0
        self._row_counts = np.zeros((r, 2), np.int64)  # valid transitions and final observations of each slot

    def __len__(self) -> int:
        """Valid transitions that can be sampled."""
        return self._order_head - self._order_tail

    @property
    def transition_bytes(self) -> int:
        """Memory that a transition takes, wherever it lies; final observations come on top."""
        by_slot = [*self._flat.values(), self._reach, *(self._futures.tensors if self._futures else ())]
        whole: int = sum(value.nbytes for value in by_slot)
        return whole // (self.slots * self.num_envs) + self._order.element_size()

    @property
    def oldest_row(self) -> int:
        """The first row that the ring still holds."""
        return max(0, self.total_rows - self.rows)

    def begin(self, obs: Obs) -> None:
        """Set the observations (N, ...) from which the next actions are taken.

        If transitions were stored before, the episodes that they belong to were left without an end: a filler row (one
        for each frame of a stack) keeps their last observation, so their last transitions keep their true next
        observation, and traces stop there.
        """
        if not self.total_rows:
            self._write_obs(self._slot(0), obs)
            return
        no = torch.zeros(self.num_envs, dtype=torch.bool)
        nothing = {name: torch.zeros_like(value[0]) for name, value in self._columns.items()}
        for age in reversed(range(self.frame_stack)):  # frame by frame: `obs` may be of an episode that goes on
            images = {key: value[:, -1 - age, None] for key, value in self._entries(obs) if key in self._stacked}
            frame = self._wrap(dict(self._entries(obs)) | images)
            filler = Step(
                frame,
                nothing["action"],
                torch.zeros(self.num_envs),
                no,
                no,
                frame,
                no,
                achieved=nothing.get("achieved"),
            )
            self.add(filler, _part(nothing, "extras/"), _part(nothing, "next_extras/"))
        self._reach[self._slot(0)] = self.frame_stack - 1

    def add(self, step: Step, extras: Extras | None = None, next_extras: Extras | None = None) -> None:
        """Store one transition of each environment: from the latest observation, by `step.action`, to `step`."""
        slot, following = self._slot(0), self._slot(1)
        if self.total_rows >= self.rows:
            self._evict(self._slot(-self.rows))
        column = self._columns
        column["action"][slot] = step.action
        column["reward"][slot] = step.reward
        column["terminated"][slot] = step.terminated
        column["truncated"][slot] = step.truncated
        column["valid"][slot] = step.valid
        if "achieved" in column:
            assert step.achieved is not None  # `VectorEnv.goals` said so
            column["achieved"][slot] = step.achieved
        for prefix, values in (("extras/", extras), ("next_extras/", next_extras)):
            for name, value in _part(column, prefix).items():
                value[slot] = (values or {})[name]
        self._write_obs(following, step.obs)
        ended = (step.terminated | step.truncated) & step.valid
        if self._stacked:
            further = (self._reach[slot] + 1).clamp(max=self.frame_stack - 1)
            self._reach[following] = torch.where((ended | ~step.valid).to(self.device), 0, further)
        if self._futures is not None:
            self._follow(self._futures, torch.tensor([slot, following], device=self.device), ended[None])
        self.total_rows += 1

        begin, n = self._order_head % len(self._order), self.num_envs
        if begin + n <= len(self._order) and bool((step.valid & ~ended).all()):  # the usual row, in fewer operations
            torch.arange(slot * n, (slot + 1) * n, out=self._order[begin : begin + n])
            self._order_head += n
            self._row_counts[slot] = (n, 0)
            return
        finals = {key: value[ended] for key, value in self._frames(step.final_obs)}
        self._index(torch.tensor([slot], device=self.device), ended[None], finals)

    def sample(self, groups: int, batch_size: int, *, gamma: float, n_step: int = 1) -> Batch:
        """`groups` independent batches [G, B, ...], for as many gradient steps.

        n-step returns stop at the end of an episode, before a row that is no transition and at the newest row.

        Raises:
            ValueError: if nothing has been stored yet.
            UsageError: goals are replaced, and `n_step` is above 1.
        """
        if not len(self):
            raise ValueError("sample() from an empty replay buffer")
        drawn = torch.randint(len(self), (groups * batch_size,), generator=self.generator, device=self.device)
        entry = (drawn + self._order_tail) % len(self._order) if self._order_tail else drawn
        first = self._order.index_select(0, entry)
        # Transitions are meant by their place in the columns laid flat, slot * N + environment, and (G * B) in one row.
        flat, size, n = self._flat, self.slots * self.num_envs, self.num_envs
        last, reward = first, self._rewards(first)
        following, terminated, ended, end = self._look(first)
        discount = torch.where(terminated, 0.0, gamma)
        if n_step > 1:
            length = torch.ones_like(reward)
            for k in range(1, n_step):
                last = torch.where(end, last, following)
                reward = reward + torch.where(end, 0.0, gamma**k * self._rewards(last))
                length += ~end
                following, terminated, ended, stop = self._look(last)
                end = end | stop
            discount = torch.pow(gamma, length) * ~terminated

        final = self._final(last)
        obs, next_obs = {}, {}
        for key in self._obs:
            frames, after = flat[f"obs/{key}"], self._after(key, following, ended, final)
            if key in self._stacked:
                obs[key] = self._stack(frames, first)
                past = obs[key] if n_step == 1 else self._stack(frames, last)
                next_obs[key] = torch.cat([past[:, 1:], after[:, None]], 1)
            else:
                obs[key], next_obs[key] = frames.index_select(0, first), after
        if self._hindsight is not None:
            require_one_step(n_step)
            reward, terminated = self._relabel(self._hindsight, first, obs, next_obs, reward, terminated)
            discount, end = torch.where(terminated, 0.0, gamma), end | terminated

        oldest = self._slot(0) * n  # where the ring begins, in rows that may have been forgotten
        batch = Batch(
            obs=self._wrap(obs),
            action=flat["action"].index_select(0, first),
            reward=reward,
            discount=discount,
            next_obs=self._wrap(next_obs),
            end=end,
            index=(first - oldest) % size + (self.total_rows * n - size),
            extras={name: value.index_select(0, first) for name, value in _part(flat, "extras/").items()},
            next_extras={name: value.index_select(0, last) for name, value in _part(flat, "next_extras/").items()},
        )
        return batch.map(lambda value: value.view(groups, batch_size, *value.shape[1:]))

    # Saving. Rows are written once, in segments [start, stop) of all rows ever added, and loaded into an empty buffer.

    def export_rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """Rows [start, stop) as plain tensors on the CPU; they must still be in the ring.

        Columns are (rows, N, ...); `obs/...` and `reach` have one more row, the observations after the last one;
        `finals/...` has the final observations of the episodes that ended, in the order of their rows; `before/...` has
        the frames that the stacks of the first rows need besides.
        """
        if not self.oldest_row <= start <= stop <= self.total_rows:
            raise ValueError(f"rows {start}..{stop} asked for; the ring holds {self.oldest_row}..{self.total_rows}")
        slots = torch.arange(start, stop + 1, device=self.device) % self.slots
        rows = {name: value[slots[:-1]] for name, value in self._columns.items() if name != "final"}
        rows |= {f"obs/{key}": value[slots] for key, value in self._obs.items()}
        if self._stacked:
            rows |= {"reach": self._reach[slots]}
            rows |= {f"before/{key}": self._obs[key][self._slots_before(start)] for key in self._stacked}
        which = self._columns["final"][slots[:-1]][_ended(rows)] % self._finals_capacity
        rows |= {f"finals/{key}": value[which] for key, value in self._finals.items()}
        return {name: value.cpu() for name, value in rows.items()}

    def load_rows(self, start: int, rows: Mapping[str, Tensor], *, total_rows: int) -> None:
        """Take in what `export_rows(start, ...)` gave, in order, into a buffer that will hold `total_rows` in the end.

        Raises:
            ValueError: if a segment is missing in between.
        """
        oldest = max(0, total_rows - self.rows)
        skip = min(max(0, oldest - start), len(rows["reward"]))  # older than the ring reaches
        if skip == len(rows["reward"]):
            return
        start = start + skip
        if start not in (oldest, self.total_rows):
            raise ValueError(f"stored rows continue at {start}, but row {max(oldest, self.total_rows)} was expected")
        for key in self._stacked:
            frames = torch.cat([rows[f"before/{key}"], rows[f"obs/{key}"]])[skip : skip + self.frame_stack - 1]
            self._obs[key][self._slots_before(start)] = frames.to(self.device)
        apart = ("finals/", "before/")
        kept = {name: value[skip:].to(self.device) for name, value in rows.items() if not name.startswith(apart)}
        slots = torch.arange(start, start + len(kept["reward"]) + 1, device=self.device) % self.slots
        for name, value in self._columns.items():
            if name != "final":
                value[slots[:-1]] = kept[name]
        for key, value in self._obs.items():
            value[slots] = kept[f"obs/{key}"]
        if self._stacked:
            self._reach[slots] = kept["reach"]
        if self._futures is not None:
            self._follow(self._futures, slots, _ended(kept))
        self.total_rows = start + len(kept["reward"])
        skipped_finals = int(_ended({name: value[:skip] for name, value in rows.items()}).sum())
        finals = {key: rows[f"finals/{key}"][skipped_finals:].to(self.device) for key in self._obs}
        self._index(slots[:-1], _ended(kept), finals)

    # Inside.

    def _slot(self, offset: int) -> int:
        """Slot of the row `offset` rows after the one to be written next."""
        return (self.total_rows + offset) % self.slots

    def _slots_before(self, row: int) -> Tensor:
        """Slots of the K - 1 rows before `row`."""
        return torch.arange(row - self.frame_stack + 1, row, device=self.device) % self.slots

    @property
    def _finals_capacity(self) -> int:
        return len(next(iter(self._finals.values())))

    def _rewards(self, at: Tensor) -> Tensor:
        return self._scaled(self._flat["reward"].index_select(0, at))

    def _scaled(self, reward: Tensor) -> Tensor:
        plain = (self._scale, self._shift) == (1.0, 0.0)
        return reward if plain else (reward + self._shift) * self._scale

    def _look(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What follows, whether it was terminated or ended, and whether a trace stops there."""
        flat = self._flat
        following = (at + self.num_envs) % (self.slots * self.num_envs)  # after the newest row, never valid
        terminated = flat["terminated"].index_select(0, at)
        ended = terminated | flat["truncated"].index_select(0, at)
        return following, terminated, ended, ended | ~flat["valid"].index_select(0, following)

    def _after(self, key: str, following: Tensor, ended: Tensor, final: Tensor, part: slice | None = None) -> Tensor:
        """The true next observations' entry `key`, or a part of it, of stacks the newest frame; `final` counts where
        `ended`."""
        frames, finals = self._flat[f"obs/{key}"], self._finals[key]
        if part is not None:
            frames, finals = frames[:, part], finals[:, part]
        mask = ended.view(-1, *[1] * (frames.dim() - 1))
        return torch.where(mask, finals.index_select(0, final), frames.index_select(0, following))

    def _final(self, at: Tensor) -> Tensor:
        """Which entry of `_finals` belongs to the transitions, where an episode ended with them."""
        return self._flat["final"].index_select(0, at) % self._finals_capacity

    def _relabel(
        self,
        hindsight: Hindsight,
        first: Tensor,
        obs: dict[str, Tensor],
        next_obs: dict[str, Tensor],
        reward: Tensor,
        terminated: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Put other goals into `obs` and `next_obs`; returns the rewards and terminations that follow."""
        assert self._futures is not None
        drawn = torch.rand(2, len(first), generator=self.generator, device=self.device)
        later, which, there = self._futures.draw(first, drawn[1])
        chosen = (drawn[0] < hindsight.share) & there
        if hindsight.achieved is None:
            achieved = self._flat["achieved"].index_select(0, first)
            goal = self._flat["achieved"][later, which]
        else:
            name, part = place(hindsight.achieved)
            achieved = next_obs[name][:, part]
            following, _, ended, _ = self._look(later)
            goal = self._after(name, following, ended, self._final(later), part)
        new, terminated = hindsight.put(obs, next_obs, achieved, goal, chosen, terminated)
        return torch.where(chosen, self._scaled(new), reward), terminated

    def _wrap(self, parts: dict[str, Tensor]) -> Obs:
        return parts[""] if self._bare else parts

    def _entries(self, obs: Obs) -> Iterable[tuple[str, Tensor]]:
        return obs.items() if isinstance(obs, dict) else [("", obs)]

    def _frames(self, obs: Obs) -> Iterable[tuple[str, Tensor]]:
        """The entries of `obs`, of stacks the newest frame."""
        return ((key, value[:, -1] if key in self._stacked else value) for key, value in self._entries(obs))

    def _write_obs(self, slot: int, obs: Obs) -> None:
        for key, value in self._frames(obs):
            self._obs[key][slot] = value

    def _stack(self, frames: Tensor, at: Tensor) -> Tensor:
        """The stacks (M, K, ...) of the observations at the flat places `at` (M,), the oldest frame first."""
        back = torch.arange(self.frame_stack - 1, -1, -1, device=self.device)
        back = torch.minimum(back, self._reach.view(-1)[at][..., None])
        return frames[(at[..., None] - back * self.num_envs) % len(frames)]

    def _follow(self, futures: Futures, slots: Tensor, ended: Tensor) -> None:
        """Let `futures` know of freshly written rows, all but the last of `slots` (R + 1,); `ended` (R, N)."""
        rows, column = slots[:-1], self._columns
        goals = held(column["achieved"][rows]) if "achieved" in column else None
        futures.extend(slots, column["valid"][rows], ended.to(self.device), goals)

    def _evict(self, slot: int) -> None:
        """Forget the oldest row, which lies in `slot`."""
        transitions, finals = self._row_counts[slot]
        self._order_tail += int(transitions)
        self._finals_tail += int(finals)
        self._columns["valid"][slot] = False

    def _index(self, slots: Tensor, ended: Tensor, finals: dict[str, Tensor]) -> None:
        """Make freshly written rows `slots` (R,) sampleable; `ended` (R, N), `finals` their final observations."""
        valid = self._columns["valid"][slots]
        row, env = valid.nonzero(as_tuple=True)
        entries = torch.arange(self._order_head, self._order_head + len(row), device=self.device)
        self._order[entries % len(self._order)] = slots[row] * self.num_envs + env
        self._order_head += len(row)

        count = int(ended.sum())
        if count:
            self._reserve_finals(count)
            entries = torch.arange(self._finals_head, self._finals_head + count, device=self.device)
            for key, value in self._finals.items():
                value[entries % len(value)] = finals[key].to(value.dtype).to(self.device)
            row, env = ended.to(self.device).nonzero(as_tuple=True)
            self._columns["final"][slots[row], env] = entries
            self._finals_head += count
        self._row_counts[slots.cpu().numpy()] = torch.stack([valid.sum(1).cpu(), ended.sum(1).cpu()], 1).numpy()

    def _reserve_finals(self, count: int) -> None:
        held, capacity = self._finals_head - self._finals_tail, self._finals_capacity
        if held + count <= capacity:
            return
        live = torch.arange(self._finals_tail, self._finals_head, device=self.device)
        size = max(2 * capacity, held + count)
        for key, value in self._finals.items():
            larger = torch.zeros(size, *value.shape[1:], dtype=value.dtype, device=self.device)
            larger[live % size] = value[live % capacity]
            self._finals[key] = larger


def _storage_dtype(space: gym.Space[Any]) -> torch.dtype:
    dtype = np.dtype(space.dtype)
    return torch.float32 if dtype.kind == "f" else torch.from_numpy(np.zeros(0, dtype)).dtype


def _part(columns: Mapping[str, Tensor], prefix: str) -> Extras:
    return {name.removeprefix(prefix): value for name, value in columns.items() if name.startswith(prefix)}


def _ended(rows: Mapping[str, Tensor]) -> Tensor:
    return (rows["terminated"] | rows["truncated"]) & rows["valid"]
