"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """While entered, the first signal only sets `requested`; the second one aborts at once, as it would without us."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # handlers can be set nowhere else
            for number in self.SIGNALS:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        os.write(2, b"\nstopping after this step and writing a checkpoint; once more aborts at once\n")

    def _restore(self) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}
