"""The numbers of a tiny language model, apart from `make_lm.py` so that no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctrlrl.config import Config


@dataclass(frozen=True, kw_only=True)
class TinyConfig(Config):
    """The tiny model, and how it learns."""

    section: ClassVar[str] = ""
    hidden: int = 64
    """Units of a layer."""
    layers: int = 2
    """Transformer layers."""
    heads: int = 4
    """Attention heads."""
    context: int = 512
    """Tokens it can read."""
    digits: bool = False
    """Write numbers digit by digit, in place of a word for each: for numbers that the demonstrations are too few to
    show all of."""
    episodes: int = 100
    """Demonstrated episodes."""
    epochs: int = 20
    """Passes over them."""
    batch_size: int = 32
    """Turns per update."""
    lr: float = 1e-3
    """Adam step size, down to a tenth of it along a cosine."""
    smoothing: float = 0.05
    """Of the labels, so that no answer becomes impossible."""
    seed: int = 0
    """Of demonstrations, weights and batches."""

    def check(self) -> None:
        for name in ("hidden", "layers", "heads", "context", "episodes", "epochs", "batch_size"):
            self.require(name, 1 <= getattr(self, name) <= 10**6, "between 1 and 1,000,000")
        self.require("heads", self.hidden % self.heads == 0, f"a divisor of hidden = {self.hidden}")
        self.require("lr", 0 < self.lr < 1, "in (0, 1)")
        self.require("smoothing", 0 <= self.smoothing < 1, "in [0, 1)")
