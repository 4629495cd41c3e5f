"""What networks keep of an observation that was acted on, so that they compute less for the next one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class Recalling(nn.Module, ABC):
    """A network that gives the same, but for rounding, whether it keeps anything or not."""

    kept: Any = None
    """What it may read and change, inside `Recall` alone: elsewhere, while it learns say, rows are no environments."""

    @abstractmethod
    def nothing_kept(self) -> Any:
        """What `kept` is at first."""


class Recall:
    """What the networks of a policy keep for one caller, who has it act on the same rows (N, ...) again and again.

    `act` is called inside `with recall:`. It is no part of a checkpoint: who wants to go on exactly as if there had
    been no interruption clears it where that can be repeated, and acts again on what has been observed since.

    Args:
        policy: a module with networks of which some may keep something.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._networks = [module for module in policy.modules() if isinstance(module, Recalling)]
        self.clear()

    def __bool__(self) -> bool:
        """Whether there is a network that keeps anything."""
        return bool(self._networks)

    def clear(self) -> None:
        """Forget everything."""
        self._kept = [network.nothing_kept() for network in self._networks]

    def __enter__(self) -> None:
        for network, kept in zip(self._networks, self._kept, strict=True):
            network.kept = kept

    def __exit__(self, *exc: object) -> None:
        for network in self._networks:
            network.kept = None
