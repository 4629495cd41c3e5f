"""ctrlrl: reinforcement learning for classical control and robotics, from simulation to the robot's controller.

import ctrlrl
run = ctrlrl.train("sac", env="Pendulum-v1", steps=20_000)
action, state, extras = ctrlrl.load(run).policy.act(obs, state)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctrlrl.training.callbacks import Callback as Callback
    from ctrlrl.training.loading import Run as Run
    from ctrlrl.training.loading import evaluate_run as evaluate
    from ctrlrl.training.loading import load as load
    from ctrlrl.training.session import resume as resume
    from ctrlrl.training.session import train as train

__all__ = ["Callback", "Run", "evaluate", "load", "resume", "train"]

# Looked up on first use: importing torch takes seconds, and the command line must answer at once.
_WHERE = {
    "Callback": ("ctrlrl.training.callbacks", "Callback"),
    "Run": ("ctrlrl.training.loading", "Run"),
    "evaluate": ("ctrlrl.training.loading", "evaluate_run"),
    "load": ("ctrlrl.training.loading", "load"),
    "resume": ("ctrlrl.training.session", "resume"),
    "train": ("ctrlrl.training.session", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ctrlrl' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)
