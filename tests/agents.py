"""What tests of several agents share: the same bits after resuming, the same numbers when compiled."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ctrlrl
from ctrlrl.runs.checkpoint import pack
from tests.runs import SMALL, assert_same
from tests.test_sac import ACT, OBS, make_batch


def assert_same_state(left: Any, right: Any, atol: float = 0.0) -> None:
    """Raise unless two agents hold the same numbers, or to `atol` the same, and the same state of the generator."""
    ours, theirs = pack(left.state_dict())[0], pack(right.state_dict())[0]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name].double(), value.double(), rtol=0, atol=atol), name
    assert torch.equal(left.generator.get_state(), right.generator.get_state())


def assert_state_dict_continues(make: Any, **settings: Any) -> None:
    """Raise unless an agent with another seed goes on with the bits of the one whose state it takes."""
    config = make.config_class(hidden=(16,), normalize_obs=True, **settings)
    a, b = make(OBS, ACT, config, seed=1), make(OBS, ACT, config, seed=2)
    a.observe(torch.randn(50, 5) * 3 + 1, torch.ones(50, dtype=torch.bool))
    a.update(make_batch(groups=3))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for agent in (a, b):
        agent.update(make_batch(9, groups=3))
    assert a.updates == b.updates == 6
    assert_same_state(a, b)


def assert_training_resumes(algo: str, folder: Path, **agent: Any) -> None:
    """Raise unless a training stopped twice, also between two turns of updates, equals an uninterrupted one."""
    how = SMALL | {"eval_every": 0, "checkpoint_every": 10_000, "agent": SMALL["agent"] | agent}
    ctrlrl.train(algo, "Pendulum-v1", out=str(folder / "whole"), **how | {"steps": 120})
    ctrlrl.train(algo, "Pendulum-v1", out=str(folder / "parts"), **how | {"steps": 77})
    ctrlrl.resume(folder / "parts", steps=101, quiet=True)
    ctrlrl.resume(folder / "parts", steps=120, quiet=True)
    assert_same(folder / "whole", folder / "parts")


def assert_compiled_equals_eager(make: Any, **settings: Any) -> None:
    """Raise unless compiled updates, each of which improves the policy, give what eager ones do."""
    config = make.config_class(hidden=(16,), policy_delay=1, **settings)
    eager, compiled = make(OBS, ACT, config, seed=1), make(OBS, ACT, replace(config, execution="compiled"), seed=1)
    for i in range(2):
        batch = make_batch(i, groups=2)
        ours, theirs = compiled.update(batch), eager.update(batch)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)
    assert_same_state(compiled, eager, atol=1e-5)
