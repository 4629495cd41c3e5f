"""The quadrupeds' velocity task."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch

import ctrlrl
from ctrlrl.envs.make import make_env
from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.sim_vector import SimVector, physics
from ctrlrl.envs.spec import Obs
from ctrlrl.envs.tasks.registry import make_robot_task
from ctrlrl.errors import UsageError
from ctrlrl.mirror import ReflectedBox
from ctrlrl.robots.robot import get_robot
from tests.conformance import check_vector_env
from tests.runs import assert_same

TASKS = {"go1": "Go1VelocityFlat-v0", "go2": "Go2VelocityFlat-v0"}


def noiseless(robot: str, num_envs: int) -> SimVector:
    task = make_robot_task(TASKS[robot], {"randomize": False})
    clean = {name: {k: Obs(term.of) for k, term in terms.items()} for name, terms in task.observations.items()}
    task = dataclasses.replace(task, observations=clean)
    return SimVector(task, BatchSim(physics(task), num_envs))


@pytest.mark.parametrize("robot", TASKS)
def test_contract(robot: str) -> None:
    def make(num_envs: int) -> SimVector:
        task = dataclasses.replace(make_robot_task(TASKS[robot], {}), episode_seconds=0.4)
        return SimVector(task, BatchSim(physics(task), num_envs))

    check_vector_env(make, ends_within=20, num_envs=2)


@pytest.mark.parametrize("robot", TASKS)
def test_stands(robot: str) -> None:
    """Held in the standing pose it does not fall, and stays where it is."""
    env = noiseless(robot, 4)
    env.reset(0)
    for _ in range(200):
        env.world.command.zero_()
        step = env.step(torch.zeros(4, 12))
        assert not step.terminated.any()
    assert env.sim.field("qpos")[:, 2].min() > 0.7 * get_robot(robot).base_height
    assert env.sim.field("qpos")[:, :2].abs().max() < 0.2


def random_state(env: SimVector, row: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    quat = rng.normal(size=4) * [0.1, 0.3, 0.3, 0.3] + [1, 0, 0, 0]
    model, robot = env.sim.model, get_robot("go1")
    qpos = robot.default_qpos(model)
    qpos[:7] = [0.3, -0.2, 0.31, *(quat / np.linalg.norm(quat))]
    qpos[7:] += rng.uniform(-0.5, 0.5, 12)
    env.sim.field("qpos")[row] = torch.from_numpy(qpos)
    env.sim.field("qvel")[row] = torch.from_numpy(rng.normal(size=18))


def mirror_state(env: SimVector) -> None:
    """Row 1 is row 0 in the mirror, by the geometry of its joints and not by the task's own reflections."""
    model = env.sim.model
    qpos, qvel = env.sim.field("qpos"), env.sim.field("qvel")
    qpos[1, :7] = qpos[0, :7] * torch.tensor([1, -1, 1, 1, -1, 1, -1])
    qvel[1, :6] = qvel[0, :6] * torch.tensor([1, -1, 1, -1, 1, -1])
    for leg, other in (("FR", "FL"), ("FL", "FR"), ("RR", "RL"), ("RL", "RR")):
        for part, sign in (("hip", -1), ("thigh", 1), ("calf", 1)):
            mine, theirs = (model.joint(f"{name}_{part}_joint") for name in (leg, other))
            qpos[1, mine.qposadr[0]] = sign * qpos[0, theirs.qposadr[0]]
            qvel[1, mine.dofadr[0]] = sign * qvel[0, theirs.dofadr[0]]


def test_mirror() -> None:
    """Of a robot and its mirror image, observations are reflections of each other, and rewards are the same."""
    env = noiseless("go1", 2)
    w, task = env.world, env.task
    env.reset(0)
    assert isinstance(env.action_space, ReflectedBox)
    reflection = env.action_space.reflection
    order, sign = reflection.tensors()
    for seed in range(1, 6):
        random_state(env, 0, seed)
        mirror_state(env)
        env.sim.forward(torch.ones(2, dtype=torch.bool))
        w.refresh()
        w.command[0] = torch.tensor([0.7, 0.3, -0.5])
        w.command[1] = torch.tensor([0.7, -0.3, 0.5])
        w.action[0] = torch.rand(12) - 0.5
        w.action[1] = w.action[0][order] * sign
        w.last_action[0] = torch.rand(12) - 0.5
        w.last_action[1] = w.last_action[0][order] * sign
        w.memory("clock", 1)[:, 0] = torch.tensor([0.11 * seed, (0.11 * seed + 0.5) % 1])
        w.memory("landed", 4)[0] = torch.tensor([0.0, 1.0, 1.0, 0.0])
        w.memory("landed", 4)[1] = torch.tensor([1.0, 0.0, 0.0, 1.0])
        for name, group in env.groups.items():
            seen = group.first(w, torch.zeros(2, dtype=torch.bool))
            o, s = task.mirror.observations[name].tensors()
            torch.testing.assert_close(seen[1], seen[0][o] * s, atol=1e-5, rtol=1e-4)
        for name, term in task.rewards.items():
            value = term.of(w)
            torch.testing.assert_close(value[1], value[0], atol=1e-5, rtol=1e-4, msg=name)


def test_what_is_measured() -> None:
    """Sensors, against MuJoCo's own functions on one simulation."""
    env = noiseless("go1", 1)
    env.reset(0)
    random_state(env, 0, 3)
    env.sim.forward(torch.ones(1, dtype=torch.bool))
    env.world.refresh()
    model, data = env.scene(0)
    data.qvel[:] = env.sim.field("qvel")[0].numpy()
    mujoco.mj_forward(model, data)
    motion = np.zeros(6)
    site = model.site("imu").id
    mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_SITE, site, motion, 1)
    np.testing.assert_allclose(env.world.sensor("rotation")[0], motion[:3], atol=1e-5)
    np.testing.assert_allclose(env.world.sensor("velocity")[0], motion[3:], atol=1e-5)
    np.testing.assert_allclose(env.world.sensor("up")[0], data.site_xmat[site].reshape(3, 3)[2], atol=1e-5)
    joints = [data.joint(joint.name).qpos[0] for joint in get_robot("go1").joints]
    np.testing.assert_allclose(env.world.joint_pos[0], joints, atol=1e-5)
    assert [model.actuator(i).name for i in range(12)] == [joint.name for joint in get_robot("go1").joints]


def test_rewards_by_hand() -> None:
    env = noiseless("go1", 2)
    env.reset(0)
    w, rewards = env.world, env.task.rewards
    w.sensor("velocity")[:] = torch.tensor([[0.5, 0.1, 0.2], [1.0, 0.0, 0.0]])
    w.sensor("rotation")[:] = torch.tensor([[0.1, 0.2, 0.5], [0.0, 0.0, 0.0]])
    w.sensor("up")[:] = torch.tensor([[0.3, 0.4, 0.8], [0.0, 0.0, 1.0]])
    w.command[:] = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert rewards["track"].of(w).tolist() == pytest.approx([np.exp(-(0.25 + 0.01) / 0.25), 1.0])
    assert rewards["turn"].of(w).tolist() == pytest.approx([np.exp(-0.25 / 0.25), 1.0])
    assert rewards["orientation"].of(w).tolist() == pytest.approx([0.25, 0.0])
    assert rewards["bounce"].of(w).tolist() == pytest.approx([0.04, 0.0])
    assert rewards["roll and pitch"].of(w).tolist() == pytest.approx([0.05, 0.0])
    # The gait: at a quarter of the cycle FR and RL are at their highest, FL and RR on the ground.
    w.memory("clock", 1).fill_(0.25)
    for foot, height in (("FR", 0.06), ("FL", 0.0), ("RR", 0.0), ("RL", 0.06)):
        w.sensor(f"{foot} position")[:, 2] = height + env.sim.model.geom("FR").size[0]
        w.sensor(f"{foot} velocity")[:] = torch.tensor([0.2, 0.0, -0.3])
    slide = np.exp(-0.04 / 0.1)
    assert rewards["gait"].of(w).tolist() == pytest.approx([(2 + 2 * slide) / 4] * 2, rel=1e-4)
    w.memory("height", 4)[:] = torch.tensor([0.06, 0.01, 0.0, 0.06])  # FL has just come down
    env.task.track(w)
    w.memory("clock", 1).fill_(0.25)
    assert rewards["landing"].of(w).tolist() == pytest.approx([0.09, 0.09])
    w.command.zero_()  # at rest all feet should be down
    expected = (2 * np.exp(-4.0 - 0.04 / 0.1) + 2 * slide) / 4
    assert rewards["gait"].of(w).tolist() == pytest.approx([expected] * 2, rel=1e-4)


def test_options() -> None:
    with pytest.raises(UsageError, match=r"no option 'randomise'.*Did you mean.*randomize"):
        make_env("Go1VelocityFlat-v0", env_kwargs={"randomise": False})
    with pytest.raises(UsageError, match="simulation of ours"):
        make_env("Go1VelocityFlat-v0", backend="gymnasium")
    plain = make_env("Go1VelocityFlat-v0", env_kwargs={"symmetric": False})
    assert not isinstance(plain.action_space, ReflectedBox)


def test_randomization() -> None:
    env = make_env("Go1VelocityFlat-v0", num_envs=200)
    assert isinstance(env, SimVector)
    env.reset(0)
    model = env.sim.model
    floor, trunk = model.geom("floor").id, model.body("trunk").id
    friction = env.world.model_field("geom_friction")[0][:, floor, 0]
    assert friction.min() >= 0.4 and friction.max() <= 1.0 and friction.std() > 0.1
    mass = env.world.model_field("body_mass")[0][:, trunk] / model.body_mass[trunk]
    assert 0.7 < mass.min() < 0.85 and 1.15 < mass.max() < 1.3
    kp = env.world.model_field("actuator_gainprm")[0][:, :, 0]
    assert torch.equal(kp, -env.world.model_field("actuator_biasprm")[0][:, :, 1])
    assert kp.min() >= 31.5 and kp.max() <= 38.5


def test_a_training_resumes_exactly(tmp_path: Path) -> None:
    """Randomized robots, delays, clocks and commands go on where they were."""
    how = {"num_envs": 4, "rollout_steps": 64, "eval_every": 0, "video": False, "quiet": True}
    agent = {"minibatch_size": 32, "epochs": 2, "hidden": [16]}
    for name, steps in (("whole", 400), ("parts", 180)):
        ctrlrl.train("ppo", "Go1VelocityFlat-v0", steps=steps, out=str(tmp_path / name), agent=agent, **how)
    ctrlrl.resume(tmp_path / "parts", steps=300, quiet=True)
    ctrlrl.resume(tmp_path / "parts", steps=400, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")
