"""Pendulum rig: a motor turns an arm with a weight, which it is too weak to lift at once.

Dimensions are in its model file. Numbers are ours, of the size of the rigs that laboratories teach with.
"""

from __future__ import annotations

import math

from ctrlrl.robots.resolver import ModelSource
from ctrlrl.robots.robot import Joint, Robot

ROBOT = Robot(
    name="pendulum",
    title="Torque-driven pendulum rig",
    kind="rig",
    control="effort",
    joints=(
        Joint(
            name="hinge",  # 0 is upright; at rest the arm hangs
            lower=-math.inf,
            upper=math.inf,
            default=math.pi,
            max_effort=0.25,  # N m, a third of the 0.74 N m that hold the arm level
            armature=5e-4,  # kg m^2: a direct drive
            damping=2e-3,  # N m s/rad
            friction=5e-3,  # N m
            max_speed=40.0,  # rad/s
        ),
    ),
    base="stand",
    mass=0.3,
    frames={"arm": "body:arm", "tip": "site:tip"},
    licence="LicenseRef-ctrlrl",
    model=ModelSource(file="pendulum.xml"),
)
