"""`ctrlrl algos`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctrlrl.algorithms.registry import ALGORITHMS
from ctrlrl.cli.parse import parse


@dataclass(frozen=True)
class Algos:
    """List algorithms: name, action space, where they learn from, what they are."""


def run(arguments: Sequence[str]) -> int:
    """Print one line per algorithm; returns the exit code."""
    parse(Algos, arguments, "algos")
    width = max(len(a.actions) for a in ALGORITHMS.values())
    for a in ALGORITHMS.values():
        print(f"{a.name:<16} {a.actions:<{width}} {a.data:<12} {a.title} ({a.paper})")
    return 0
