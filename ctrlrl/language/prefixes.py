"""Keys and values of prompts that were read: of what begins as they do, only the rest is read.

Shapes: N rows of which B are asked, U different prompts of L tokens, padded on the left; S tokens of those before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ctrlrl.language.model import LanguageModel

_WORTH = 512
"""Tokens that must be left out for it to pay: to compare, and to move keys and values, takes time, too."""


class Prefixes:
    """Of each row, the keys and values of the prompt that it was asked last, and by which weights.

    Nothing has to be said of episodes that end, or of histories that are cut: their prompts begin otherwise.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._stamp: object = None
        self._place = self._said = torch.empty(0)
        self._layers: list[tuple[Tensor, Tensor]] = []

    def read(
        self, model: LanguageModel, prompt: Tensor, rows: Tensor, of_prompt: Tensor, *, total: int, most: int
    ) -> tuple[Tensor, Any]:
        """Read prompts, and keep them in place of those before.

        Args:
            model: by which; keys and values of other weights are of no use.
            prompt: (U, L).
            rows: (B,), in ascending order; whose they are.
            of_prompt: (B,), which prompt is each one's.
            total: N.
            most: prompts that may be kept; those of the first rows are.

        Returns:
            what `LanguageModel.read` returns of them, logits (U, V) and cache, within rounding.
        """
        if prompt.numel() < _WORTH or not most:
            self.clear()
            logits, _, cache = model.read(prompt, cache=True)
            return logits, cache
        first = torch.full((len(prompt),), total, device=prompt.device).scatter_reduce(0, of_prompt, rows, "amin")
        stamp = model.stamp()
        if stamp != self._stamp or len(self._place) != total:
            self._layers = []
        shared = self._shared(prompt, first) if self._layers else None
        logits, cache = self._read(model, prompt, None if shared is None else self._place[first], shared)
        self._layers, self._stamp = [], stamp
        if model.may_be_cut(cache):
            chosen = slice(None) if most >= len(prompt) else first.argsort()[:most].sort().values
            place = torch.full((len(prompt),), -1, device=prompt.device)
            place[chosen] = torch.arange(min(most, len(prompt)), device=prompt.device)
            self._place = torch.full((total,), -1, device=prompt.device).index_copy(0, rows, place[of_prompt])
            self._said = prompt[chosen]
            self._layers = [(layer.keys[chosen], layer.values[chosen]) for layer in cache.layers]
        return logits, cache

    def _shared(self, prompt: Tensor, first: Tensor) -> Tensor:
        """With how many tokens of what is kept each prompt begins (U,); never all of it: its last one is asked."""
        place = self._place[first]
        said = _to_the_left(self._said[place.clamp(min=0)])
        new = _to_the_left(prompt)
        width = min(said.shape[1], new.shape[1])
        same = (said[:, :width] == new[:, :width]) & (new[:, :width] >= 0) & (place >= 0)[:, None]
        longest = (prompt >= 0).sum(-1).sub(1).clamp(min=0)
        return torch.minimum(same.long().cumprod(-1).sum(-1), longest)

    def _read(
        self, model: LanguageModel, prompt: Tensor, place: Tensor | None, shared: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Prompts (U, L), of which `shared` tokens (U,) are kept at `place` (U,)."""
        length = prompt.shape[1]
        if shared is not None and place is not None:
            rest = (prompt >= 0).sum(-1) - shared
            short = 2 * rest <= length  # the others are read apart: all are read to the length of the longest
            few, columns = int(short.sum()), int(torch.where(short, rest, 0).max())
            if few * (length - columns) >= _WORTH and bool(shared[short].any()):
                on = short.nonzero().squeeze(-1)
                logits, cache = self._go_on(model, prompt[on], place[on].clamp(min=0), shared[on], max(1, columns))
                if few < len(prompt):
                    anew = (~short).nonzero().squeeze(-1)
                    other, _, apart = model.read(prompt[anew], cache=True)
                    order = torch.cat([on, anew]).argsort()
                    logits = torch.cat([logits, other])[order]
                    for layer, more in zip(cache.layers, apart.layers, strict=True):
                        layer.keys = torch.cat([layer.keys, more.keys])[order]
                        layer.values = torch.cat([layer.values, more.values])[order]
                return logits, cache
        logits, _, cache = model.read(prompt, cache=True)
        return logits, cache

    def _go_on(
        self, model: LanguageModel, prompt: Tensor, place: Tensor, shared: Tensor, columns: int
    ) -> tuple[Tensor, Any]:
        """Read the last `columns` of prompts, without what is `shared`; the cache's columns are the prompts'."""
        length, device = prompt.shape[1], prompt.device
        said = self._said[place]
        known, number = said.shape[1], (said >= 0).sum(-1, keepdim=True)
        ordinal = torch.arange(known, device=device) - (known - number)
        before = torch.where((ordinal >= 0) & (ordinal < shared[:, None]), said, -1)
        size = (prompt >= 0).sum(-1, keepdim=True)
        ordinal = torch.arange(length, device=device) - (length - size)  # of each column of the prompts
        rest = torch.where(ordinal >= shared[:, None], prompt, -1)[:, length - columns :]
        cache = model.cache_of([(keys[place], values[place]) for keys, values in self._layers])
        logits, _, cache = model.read(rest, cache=True, before=(before, cache))
        was, new = known - number + ordinal, known + columns - size + ordinal
        column = torch.where(ordinal < shared[:, None], was, new).clamp(min=0)[:, None, :, None]
        for layer in cache.layers:
            layer.keys = layer.keys.take_along_dim(column, 2)
            layer.values = layer.values.take_along_dim(column, 2)
        return logits, cache


def _to_the_left(ids: Tensor) -> Tensor:
    """Ids (U, L) padded on the left, padded on the right by -1 instead."""
    column = torch.arange(ids.shape[1], device=ids.device) + (ids < 0).sum(-1, keepdim=True)
    return ids.gather(-1, column.clamp(max=ids.shape[1] - 1)).masked_fill(column >= ids.shape[1], -1)
