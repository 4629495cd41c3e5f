"""What goes wrong by the user's or the environment's doing: one message with the remedy, an exit code, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class CtrlrlError(Exception):
    """A failure that the message explains in full. The command line prints it and exits with `exit_code`."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        # What came from a file may have half of a pair of surrogates in it, which cannot be printed.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())


class UsageError(CtrlrlError):
    """Bad input: says what was expected, what came, where it came from and what to do."""


class EnvironmentFailure(CtrlrlError):
    """An environment raised, hung or died; the message holds its own traceback."""


class NonFiniteError(CtrlrlError):
    """NaN or infinity in an observation, a reward, a loss or a weight."""

    exit_code = 3


class BadBaseAction(CtrlrlError):
    """A base policy gave an action that is none.

    Attributes:
        evidence: the observation and the action, as tensors by name, and `where` it was.
    """

    exit_code = 3

    def __init__(self, message: str, evidence: dict[str, Any]) -> None:
        super().__init__(message)
        self.evidence = evidence


class Interrupted(CtrlrlError):
    """Ctrl-C or SIGTERM; a checkpoint has been written."""

    exit_code = 130


def nearest(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """` Did you mean ...?` with the nearest names, or an empty string when nothing is near."""
    names = list(known)
    lowered = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), lowered, n=count, cutoff=0.6)
    return f" Did you mean {' or '.join(lowered[name] for name in close)}?" if close else ""
