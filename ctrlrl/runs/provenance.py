"""Where a run's numbers come from: versions, source, hardware, command."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from ctrlrl.envs.worker import describe_action_space, describe_observation_space

_PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "safetensors")


def now() -> str:
    """The present moment, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What decides the last bits of a result: the same description promises the same bits."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "ctrlrl": importlib.metadata.version("ctrlrl") if _installed() else "source",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": _memory_gib(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "threads": threads,
    }


def describe_environment(
    name: str, observation_space: gym.Space[Any], action_space: gym.Space[Any], control_dt: float | None
) -> dict[str, Any]:
    """Name, spaces (for people, and to make the policy again without the environment) and control period."""
    observation = describe_observation_space(observation_space, name)
    action = describe_action_space(action_space, name)
    return {
        "name": name,
        "observation_space": str(observation_space),
        "action_space": str(action_space),
        "control_dt": control_dt,
        "spaces": {"observation": observation, "action": action},
    }


def describe_source() -> dict[str, Any] | None:
    """Commit of the ctrlrl checkout this runs from; None where it is installed without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout

    try:
        changes = git("diff", "HEAD")
        digest = hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else None
        dirty = bool(git("status", "--porcelain").strip())
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": dirty, "changes": digest}
    except (OSError, subprocess.SubprocessError):
        return None


def differences(then: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    """What of `machine` differs from the provenance `then` and can change the last bits."""
    out = []
    for key in ("ctrlrl", "python", "threads"):
        if then.get(key) != machine[key]:
            out.append(f"{key} {then.get(key)} -> {machine[key]}")
    if then.get("git") != machine["git"]:
        out.append("the source code (git)")
    for group in ("packages", "hardware"):
        before = then.get(group, {})
        out += [
            f"{key} {before.get(key)} -> {value}"
            for key, value in machine[group].items()
            if key != "memory_gib" and before.get(key) != value
        ]
    return out


def command_line() -> str:
    """The command as typed, with the program's short name."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else []
    if words and words[0] == "__main__.py":
        words[0] = "ctrlrl"
    return " ".join(w if w and not set(w) & set(" '\"{}$\\") else "'" + w.replace("'", "'\\''") + "'" for w in words)


def _installed() -> bool:
    try:
        importlib.metadata.version("ctrlrl")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
