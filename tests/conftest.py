"""MuJoCo decides when it is imported how it draws: what it draws with here is settled before any test imports it."""

from __future__ import annotations

import pytest
import torch

import ctrlrl.envs  # noqa: F401

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads_as_at_first() -> None:
    """Trainings take the machine's cores for the whole process. What comes after them in it would, too, and where as
    many processes run tests as there are cores, small products take ten times as long."""
    torch.set_num_threads(THREADS)
