"""One task on the CPU's simulations and on MuJoCo Warp's: the same task."""

from __future__ import annotations

import mujoco
import pytest
import torch

from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.sim_vector import SimVector, physics
from ctrlrl.envs.spec import SimTask
from ctrlrl.envs.tasks.registry import make_robot_task
from tests.conformance import check_vector_env
from tests.sims import warp_sim
from tests.simulations import cart_task


def both(task: SimTask, num_envs: int) -> tuple[SimVector, SimVector]:
    """With Newton's solver, which both have."""
    model = physics(task)
    model.opt.solver, model.opt.iterations = mujoco.mjtSolver.mjSOL_NEWTON, 50
    return SimVector(task, BatchSim(model, num_envs)), SimVector(task, warp_sim(model, num_envs))


def compare(task: SimTask, num_envs: int, steps: int, tolerance: float, size: float) -> None:
    """Same seed, same actions: randomization and noise are the same, and the rest nearly."""
    native, warp = both(task, num_envs)
    first, other = native.reset(0), warp.reset(0)
    for name in first:
        torch.testing.assert_close(other[name].cpu(), first[name], atol=tolerance, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        action = (torch.rand(num_envs, len(task.action.names), generator=generator) * 2 - 1) * size
        a, b = native.step(action), warp.step(action.to(warp.device))
        assert torch.equal(a.terminated, b.terminated.cpu()) and torch.equal(a.truncated, b.truncated.cpu())
        torch.testing.assert_close(b.reward.cpu(), a.reward, atol=tolerance, rtol=1e-3)
        for name, value in a.final_obs.items():
            torch.testing.assert_close(b.final_obs[name].cpu(), value, atol=tolerance, rtol=1e-3)
        for name, term in task.rewards.items():  # where no episode has just begun
            ours, theirs = (term.of(env.world).cpu()[~(a.terminated | a.truncated)] for env in (native, warp))
            size = max(1.0, float(ours.abs().max()) if len(ours) else 1.0)
            torch.testing.assert_close(
                theirs, ours, atol=tolerance * size, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert not bool(warp.sim.overflow().any())
    torch.testing.assert_close(warp.world.random.position.cpu(), native.world.random.position)


def test_the_same_task() -> None:
    compare(cart_task(), num_envs=16, steps=60, tolerance=2e-3, size=1.0)


def test_contract_on_warp() -> None:
    model = physics(cart_task())
    check_vector_env(lambda n: SimVector(cart_task(), warp_sim(model, n)), ends_within=35)


@pytest.mark.slow
def test_the_same_quadruped() -> None:
    """Feet that hit the ground make rounding grow: the horizon is short."""
    compare(make_robot_task("Go1VelocityFlat-v0", {}), num_envs=8, steps=15, tolerance=2e-2, size=0.5)
