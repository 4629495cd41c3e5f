"""Cart-pole rig: a belt drives the cart along a rail, the pole swings freely. Dimensions are in its model file.

Numbers are ours, of the size of the rigs that laboratories teach with.
"""

from __future__ import annotations

import math

from ctrlrl.robots.resolver import ModelSource
from ctrlrl.robots.robot import Joint, Robot

ROBOT = Robot(
    name="cartpole",
    title="Cart-pole rig",
    kind="rig",
    control="effort",
    joints=(
        Joint(
            name="slider",  # + along the rail, 0 in its middle
            lower=-0.4,
            upper=0.4,
            default=0.0,
            max_effort=10.0,  # N; the 0.7 kg that move are accelerated at 12 m/s^2 at most, with the rotor
            armature=0.1,  # kg: a rotor of 4e-6 kg m^2 on a pulley of 6.4 mm
            damping=5.0,  # N s/m: back-EMF and guides
            friction=0.3,  # N
            max_speed=2.0,  # m/s
            unit="m",
        ),
    ),
    passive={"pole": math.pi},  # 0 is upright, + leans towards + of the slider; at rest it hangs
    base="rail",
    mass=0.7,
    frames={"cart": "body:cart", "pole": "body:pole", "tip": "site:tip"},
    licence="LicenseRef-ctrlrl",
    model=ModelSource(file="cartpole.xml"),
)
