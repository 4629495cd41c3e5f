"""Drawing where there is no display: decided when `ctrlrl.envs` is imported, before anything of it imports MuJoCo."""

from __future__ import annotations

import ctypes
import os
import sys


def render_headless() -> None:
    """Let MuJoCo draw without a display, through EGL where that is installed, and pygame into memory.

    Both pick their way to draw when they are first imported, so this comes before. Left alone they would try to open a
    window, and fail or complain where there is no display.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if not sys.platform.startswith("linux") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if "MUJOCO_GL" in os.environ:
        return
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        return
    os.environ["MUJOCO_GL"] = "egl"
