"""How many CPU cores there are to use. Imports no torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """CPU cores that this process may use: by its affinity, and by the quota of its container (cgroups, version 2)."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().strip("/")
    except OSError:
        return there
    for folder in (CGROUPS / group, *(CGROUPS / group).parents):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            there = min(there, max(1, math.ceil(int(quota) / int(period))))
    return there
