"""How `bench_envs.py` gives processes their turns: they work while all others wait. Standard library only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable


def serve(run: Callable[[float], int]) -> None:
    """For each line on stdin, a number of seconds: `run` that long, write the steps, the seconds and the memory."""
    output = sys.stdout
    sys.stdout = sys.stderr  # what environments print cannot get in between
    run(0.2)
    print(json.dumps({}), file=output, flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        steps = run(float(line))
        seconds = time.perf_counter() - begun
        print(json.dumps({"steps": steps, "seconds": seconds, "peak_mib": peak_mib()}), file=output, flush=True)


def peak_mib() -> float:
    """The most memory that this process has held."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
