"""A small model with most of what a robot's simulation has, and simulations of it on each backend."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import mujoco
import torch

from ctrlrl.envs.sim import BatchSim, Sim
from ctrlrl.envs.warp import WarpSim

XML = """
<mujoco>
  <option timestep="0.004" integrator="implicitfast"/>
  <worldbody>
    <light pos="0 0 3"/>
    <geom name="floor" type="plane" size="5 5 0.1"/>
    <body name="trunk" pos="0 0 0.3">
      <freejoint/>
      <geom name="trunk" type="box" size="0.1 0.08 0.05" mass="1"/>
      <site name="imu"/>
      <camera name="eye" pos="0.1 0 0.1"/>
      <body name="arm" pos="0.1 0 0">
        <joint name="hinge" axis="0 1 0" damping="0.1" armature="0.01" range="-2 2" limited="true"/>
        <geom name="tip" type="capsule" fromto="0 0 0 0.2 0 0" size="0.02" mass="0.2"/>
      </body>
    </body>
    <body name="goal" mocap="true" pos="1 1 1"/>
  </worldbody>
  <actuator><position name="hinge" joint="hinge" kp="5" ctrlrange="-1 1"/></actuator>
  <sensor>
    <gyro site="imu"/>
    <framelinvel objtype="site" objname="imu"/>
    <framezaxis objtype="site" objname="imu"/>
    <jointpos joint="hinge"/>
    <contact geom1="tip" geom2="floor" data="found"/>
  </sensor>
</mujoco>
"""
DEVICE = os.environ.get("CTRLRL_TEST_DEVICE", "cpu")
"""Where MuJoCo Warp simulates in the tests; scripts/gpu_check.sh says cuda."""


def small_model() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(XML)


def warp_sim(model: mujoco.MjModel, num_sims: int, **options: Any) -> WarpSim:
    """A WarpSim whose kernels compile in less time, and run in more."""
    import warp

    warp.config.optimization_level = 0 if DEVICE == "cpu" else None
    return WarpSim(model, num_sims, DEVICE, **options)


BACKENDS: dict[str, Callable[[mujoco.MjModel, int], Sim]] = {
    "batch": lambda model, num_sims: BatchSim(model, num_sims, threads=1),
    "warp": warp_sim,
}


def rows_of(sim: Sim, *rows: int) -> torch.Tensor:
    """The mask (N,) that is true at `rows`."""
    mask = torch.zeros(sim.num_sims, dtype=torch.bool)
    mask[list(rows)] = True
    return mask.to(sim.device)


def everywhere(sim: Sim) -> torch.Tensor:
    return torch.ones(sim.num_sims, dtype=torch.bool, device=sim.device)


def stir(sim: Sim, seed: int = 0) -> None:
    """Velocities and controls, different in each simulation."""
    random = torch.Generator().manual_seed(seed)
    for name, size in (("qvel", 0.5), ("ctrl", 1.0)):
        field = sim.field(name)
        field.copy_(size * torch.randn(field.shape, generator=random))
