"""How `bench_learner.py` drives one training among several: it trains while all others wait.

Standard library only, since it runs in the peers' virtual environments too.
"""

from __future__ import annotations

import json
import os
import sys
import time


class Gate:
    """Called after every control step; each line on stdin lets `segment` more environment steps through.

    Writes one JSON object per line to stdout: first an empty one once `warm_updates` updates are done, then for every
    segment its seconds, environment steps, updates, what else is counted and the process's peak memory in MiB. At the
    end of stdin the process ends.
    """

    def __init__(self, segment: int, warm_updates: int = 100) -> None:
        self.segment, self.warm_updates = segment, warm_updates
        self.stop_at: int | None = None

    def __call__(self, steps: int, updates: int, **more: float) -> None:
        """`steps` and `updates` done so far, and sums of `more`."""
        counts = {"steps": steps, "updates": updates, **more}
        if self.stop_at is None:
            if updates < self.warm_updates:
                return
            self._write({})
        elif steps < self.stop_at:
            return
        else:
            seconds = time.perf_counter() - self._begun
            done = {name: count - self._counts[name] for name, count in counts.items()}
            self._write({"seconds": seconds, **done, "peak_mib": _peak_mib()})
        if not sys.stdin.readline():
            os._exit(0)
        self.stop_at, self._counts = steps + self.segment, counts
        self._begun = time.perf_counter()

    def _write(self, record: dict[str, float]) -> None:
        print(json.dumps(record), flush=True)


def _peak_mib() -> float:
    with open("/proc/self/status") as status:  # not getrusage: that begins with the memory of the parent
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
