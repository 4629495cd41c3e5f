"""Time for a control loop: absolute deadlines, and what keeps others from taking it."""

from __future__ import annotations

import ctypes
import gc
import os
import time

from ctrlrl.errors import UsageError

SPIN = 2e-4
"""Seconds before a deadline that are waited for awake: the operating system wakes too late by about so much."""
_MCL_CURRENT, _MCL_FUTURE = 1, 2


class Time:
    """The clock that controllers go by: seconds that never go back or jump."""

    def now(self) -> float:
        """s since some moment."""
        return time.monotonic()

    def wait_until(self, moment: float) -> None:
        """Sleep, then spin, until `moment`."""
        while True:
            left = moment - time.monotonic()
            if left <= 0:
                return
            if left > SPIN:
                time.sleep(left - SPIN)


def enter_realtime(priority: int | None, cpu: int | None) -> None:
    """Make this process fit for a loop: no garbage collection, and where asked real-time scheduling and one processor.

    Args:
        priority: of SCHED_FIFO, 1 to 99; memory is locked then, too. None: ordinary scheduling.
        cpu: the processor to stay on.

    Raises:
        UsageError: the operating system does not permit it.
    """
    if cpu is not None:
        try:
            os.sched_setaffinity(0, {cpu})
        except (OSError, ValueError, OverflowError):
            there = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
            raise UsageError(f"--cpu {cpu}: there is no such processor; this process may use {there}") from None
    if priority is not None:
        lowest, highest = os.sched_get_priority_min(os.SCHED_FIFO), os.sched_get_priority_max(os.SCHED_FIFO)
        if not lowest <= priority <= highest:
            raise UsageError(f"--priority goes from {lowest} to {highest}, got {priority}")
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        except PermissionError:
            raise UsageError(
                "not permitted to use real-time scheduling: run as root, grant CAP_SYS_NICE, or raise the limit rtprio "
                "in /etc/security/limits.conf; or leave out --priority"
            ) from None
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE):
            raise UsageError(
                f"not permitted to lock memory ({os.strerror(ctypes.get_errno())}): raise the limit memlock in "
                "/etc/security/limits.conf, or leave out --priority"
            )
    gc.collect()
    gc.freeze()
    gc.disable()
