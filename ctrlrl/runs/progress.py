"""The progress line: live on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

REFRESH_S = 0.2
PLAIN_S = 10.0


class FinishedEpisode(Protocol):
    """What the progress line wants to know of an episode."""

    @property
    def ret(self) -> float: ...


class Progress:
    """Shows step, return, steps/s where it `collects` (else steps are updates), updates/s and the time left; `quiet`
    shows nothing."""

    def __init__(self, total: int, *, start: int = 0, collects: bool = True, quiet: bool = False) -> None:
        self.total, self.collects, self.quiet = total, collects, quiet
        self._step = self._first = start
        self._console = Console(stderr=False, highlight=False)
        self._live: Live | None = None
        self._returns: deque[float] = deque(maxlen=20)
        self._evaluation: float | None = None
        self._rates: tuple[float, float] | None = None
        self._begun = self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        self._begun = self._shown = time.monotonic()
        if not self.quiet and self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if not self.quiet and self._step > self._first:
            self._print(self.line())

    def update(self, step: int, episodes: Sequence[FinishedEpisode]) -> None:
        """Called every step; draws a few times a second on a terminal, else every ten seconds."""
        self._step = step
        self._returns.extend(episode.ret for episode in episodes)
        now = time.monotonic()
        if self.quiet or now - self._shown < (REFRESH_S if self._live else PLAIN_S):
            return
        self._shown = now
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            self._print(self.line())

    def training(self, steps_per_s: float, updates_per_s: float) -> None:
        """Take in the rates of the latest training record."""
        self._rates = (steps_per_s, updates_per_s)

    def evaluated(self, step: int, mean: float, best: bool) -> None:
        """Report an evaluation on a line of its own."""
        self._evaluation = mean
        self.message(f"step {step:,}: evaluation return {mean:,.1f}{' (best so far)' if best else ''}")

    def message(self, text: str) -> None:
        """Print `text` above the progress line."""
        if not self.quiet:
            self._print(text)

    def line(self) -> str:
        """Everything on one plain line."""
        parts = [f"step {self._step:,}/{self.total:,}"]
        if self._returns:
            parts.append(f"return {sum(self._returns) / len(self._returns):,.1f}")
        if self._evaluation is not None:
            parts.append(f"evaluation {self._evaluation:,.1f}")
        if self._rates is not None:
            if self.collects:
                parts.append(f"{self._rates[0]:,.0f} steps/s")
            parts.append(f"{self._rates[1]:,.0f} updates/s")
        if self._step < self.total and (left := self._seconds_left()) is not None:
            parts.append(f"{_duration(left)} left")
        return " | ".join(parts)

    def _seconds_left(self) -> float | None:
        if self._rates is not None and self._rates[0] > 0:
            return (self.total - self._step) / self._rates[0]
        done = self._step - self._first
        return (self.total - self._step) * (time.monotonic() - self._begun) / done if done > 0 else None

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_row(ProgressBar(total=self.total, completed=self._step, width=12), self.line())
        return table

    def _print(self, text: str) -> None:
        # print, not rich: lines of a log must not be wrapped at a width that nobody sees
        if self._live is not None:
            self._live.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, flush=True, file=sys.stdout)


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
