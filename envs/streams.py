"""Random numbers for N rows at once, on any device, each row with a stream of its own.

Numbers are a hash of their row's key and of their position in that row's stream (SplitMix64, Steele et al. 2014), two
from each hash, so that a row's numbers depend on neither N, nor the device, nor on what other rows draw, and that the
state to save is two integers a row. No generator is asked: drawing is arithmetic, which a CUDA graph can hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15, as a signed number
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


class Streams:
    """Uniform numbers for N rows, drawn between `begin` and `end`.

    What is drawn between the two is one block for all rows. In `end` only the rows that used it move on.

    Attributes:
        key: (N, 1) int64.
        position: (N, 1) int64, hashes that were used.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.key = torch.zeros(num_rows, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.key)
        self._sizes: dict[str, int] = {}
        self._places: dict[int, Tensor] = {}
        self._phase = ""
        self._used = 0
        self._rows: Tensor | None = None
        self._block = torch.empty(num_rows, 0, device=device)

    def seed(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Start the streams of `rows` anew."""
        index = torch.tensor(rows, device=self.key.device)
        numbers = torch.tensor(seeds, dtype=torch.int64, device=self.key.device)[:, None]
        self.key[index] = _mix((numbers + 1) * _GAMMA)
        self.position[index] = 0

    def begin(self, phase: str, rows: Tensor | None = None) -> None:
        """Begin to draw; `phase` names a place in the code, which draws as many numbers each time. With `rows` (N,)
        bool only theirs count, and a CPU computes no others, which are 0."""
        self._phase, self._used = phase, 0
        self._rows = None if rows is None or rows.device.type != "cpu" else rows.nonzero()[:, 0]
        self._block = self._numbers(self._sizes.get(phase, 0))

    def uniform(self, size: int, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        """(N, size) float32 in [low, high)."""
        end = self._used + size
        if end > self._block.shape[1]:  # the first time
            self._block = self._numbers(end)
        drawn = self._block[:, self._used : end]
        self._used = end
        if isinstance(low, float | int) and isinstance(high, float | int) and (low, high) == (0.0, 1.0):
            return drawn
        return low + drawn * (high - low)

    def end(self, rows: Tensor | None = None) -> None:
        """Move on where `rows` (N,) bool, by default everywhere."""
        self._sizes[self._phase] = self._used
        hashes = -(-self._used // 2)
        self.position += hashes if rows is None else hashes * rows[:, None]

    def _numbers(self, count: int) -> Tensor:
        """(N, count) float32 in [0, 1), the next ones of each stream."""
        hashes = -(-count // 2)
        if hashes not in self._places:
            self._places[hashes] = torch.arange(1, hashes + 1, device=self.key.device) * _GAMMA
        key, position, rows = self.key, self.position, self._rows
        if rows is not None:
            key, position = key[rows], position[rows]
        bits = _mix(key + position * _GAMMA + self._places[hashes])
        numbers = torch.empty(len(bits), hashes, 2, device=bits.device)
        numbers[:, :, 0] = (bits >> 40).bitwise_and_(0xFFFFFF)
        numbers[:, :, 1] = (bits >> 16).bitwise_and_(0xFFFFFF)
        drawn = numbers.flatten(1)[:, :count].mul_(2.0**-24)
        return drawn if rows is None else drawn.new_zeros(len(self.key), count).index_copy_(0, rows, drawn)


def _mix(z: Tensor) -> Tensor:
    """The finalizer of SplitMix64, in place; shifts are arithmetic in torch, so the bits shifted in are masked away."""
    z.bitwise_xor_((z >> 30).bitwise_and_(0x3FFFFFFFF)).mul_(_MIX_1)
    z.bitwise_xor_((z >> 27).bitwise_and_(0x1FFFFFFFFF)).mul_(_MIX_2)
    return z.bitwise_xor_((z >> 31).bitwise_and_(0x1FFFFFFFF))
