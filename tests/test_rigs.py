"""The rigs' swing-up tasks, and the controller that does them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlrl.algorithms.registry import find_algorithm
from ctrlrl.envs.make import make_env
from ctrlrl.envs.sim_vector import SimVector, simulate
from ctrlrl.envs.tasks.registry import make_robot_task
from ctrlrl.envs.tasks.swing_up import BIAS, COUNT, RAIL_COUNT
from ctrlrl.envs.tasks.swing_up_expert import SwingUpExpert, linear_model, regulator
from ctrlrl.envs.viewing import aim
from ctrlrl.errors import UsageError
from tests.conformance import check_vector_env

CARTPOLE, PENDULUM = "CartPoleSwingUp-v0", "PendulumSwingUp-v0"
TASKS = [CARTPOLE, PENDULUM]


def make(env_id: str, num_envs: int, **options: Any) -> SimVector:
    return simulate(make_robot_task(env_id, options), num_envs)


def put(env: SimVector, qpos: list[float], qvel: list[float], row: int = 0) -> None:
    env.sim.field("qpos")[row] = torch.tensor(qpos, dtype=torch.float64)
    env.sim.field("qvel")[row] = torch.tensor(qvel, dtype=torch.float64)


@pytest.mark.parametrize("env_id", TASKS)
def test_contract(env_id: str) -> None:
    def brief(num_envs: int) -> SimVector:
        return simulate(dataclasses.replace(make_robot_task(env_id, {"history": 2}), episode_seconds=0.4), num_envs)

    check_vector_env(brief, ends_within=20, num_envs=2)


@pytest.mark.parametrize("env_id", TASKS)
def test_starts_hanging_at_rest(env_id: str) -> None:
    env = make_env(env_id, num_envs=50)
    seen = env.reset(0)["privileged"]
    sine, cosine, speed = seen[:, -3], seen[:, -2], seen[:, -1]
    assert (cosine < -0.99).all() and 0.03 < sine.abs().mean() < 0.07 and (speed == 0).all()
    assert env.control_dt == pytest.approx(0.02)
    for _ in range(499):
        step = env.step(torch.zeros(50, 1))
    assert not step.truncated.any() and not step.log
    step = env.step(torch.zeros(50, 1))
    assert step.truncated.all() and (step.log["success"] == 0).all() and step.log["episode/reward/balance"].max() < 3


TENTH = 0.1 ** (0.3**2)  # of a value three tenths of the margin away: dm_control's Gaussian
REWARDS = {  # angle, place, speed, action -> dense and sparse reward
    "perfect": (0.0, 0.0, 0.0, 0.0, 1.0, 1),
    "hangs": (math.pi, 0.0, 0.0, 0.0, 0.0, 0),
    "level": (math.pi / 2, 0.0, 0.0, 0.0, 0.5, 0),
    "off the middle": (0.0, 0.12, 0.0, 0.0, (1 + TENTH) / 2, 0),
    "turns": (0.0, 0.0, 1.5, 0.0, (1 + TENTH) / 2, 1),
    "pushes": (0.0, 0.0, 0.0, 0.5, (4 + 0.75) / 5, 1),
    "all": (1.0, -0.12, -1.5, -1.0, (1 + math.cos(1.0)) / 2 * ((1 + TENTH) / 2) ** 2 * 0.8, 0),
    "leans a little": (0.13, 0.09, 0.0, 0.0, (1 + math.cos(0.13)) / 2 * (1 + 0.1 ** (0.225**2)) / 2, 1),
    "leans": (0.15, 0.0, 0.0, 0.0, (1 + math.cos(0.15)) / 2, 0),
}


@pytest.mark.parametrize(("angle", "place", "speed", "action", "dense", "sparse"), REWARDS.values(), ids=REWARDS)
def test_rewards_by_hand(angle: float, place: float, speed: float, action: float, dense: float, sparse: int) -> None:
    for is_sparse, expected in ((False, dense), (True, sparse)):
        env = make(CARTPOLE, 1, sparse=is_sparse)
        env.reset(0)
        env.world.action[:] = action
        put(env, [place, angle], [0.7, speed])
        env.world.refresh()
        reward = env.task.rewards["balance"].of(env.world)
        assert reward.item() == pytest.approx(expected, abs=1e-6)
        if place == 0:
            arm = make(PENDULUM, 1, sparse=is_sparse)
            arm.reset(0)
            arm.world.action[:] = action
            put(arm, [angle], [speed])
            arm.world.refresh()
            slow = 0.1 ** ((speed / 5) ** 2)  # all of it counts for the pendulum, not half
            expected *= 1 if is_sparse else slow / ((1 + slow) / 2)
            assert arm.task.rewards["balance"].of(arm.world).item() == pytest.approx(expected, abs=1e-6)


def test_limit_switches_end_the_episode() -> None:
    env = make(CARTPOLE, 3)
    env.reset(0)
    for row, place in enumerate((0.385, -0.385, 0.375)):
        put(env, [place, 0.0], [0.0, 0.0], row)
    step = env.step(torch.zeros(3, 1))
    assert step.terminated.tolist() == [True, True, False] and not step.truncated.any()
    assert step.log["success"][:2].tolist() == [0, 0]


@pytest.mark.parametrize(("seconds", "success"), [(1.1, 1.0), (0.9, 0.0)])
def test_success_is_a_second_upright(seconds: float, success: float) -> None:
    env = make(PENDULUM, 1, randomize=False)
    env.reset(0)
    for t in range(500):
        put(env, [0.0 if (500 - t) * 0.02 <= seconds else math.pi], [0.0])
        step = env.step(torch.zeros(1, 1))
    assert step.truncated.all() and step.log["success"].item() == success


def test_what_encoders_tell() -> None:
    env = make(CARTPOLE, 200)
    env.reset(0)
    step = env.step(torch.zeros(200, 1))
    seen, true = step.obs["policy"], step.obs["privileged"]
    counts = seen[:, 0] / RAIL_COUNT
    torch.testing.assert_close(counts, counts.round(), atol=0.01, rtol=0)
    assert (seen[:, 0] - true[:, 0]).abs().max() <= RAIL_COUNT / 2 + 1e-7
    counts = torch.atan2(seen[:, 2], seen[:, 3]) / COUNT
    torch.testing.assert_close(counts, counts.round(), atol=0.01, rtol=0)
    off = torch.atan2(seen[:, 2], seen[:, 3]) - torch.atan2(true[:, 2], true[:, 3])
    off = torch.remainder(off + math.pi, 2 * math.pi) - math.pi
    torch.testing.assert_close(off, env.world.memory("encoder bias", 1, keep=True)[:, 0], atol=COUNT / 2 + 1e-5, rtol=0)
    assert 0.8 * BIAS < off.abs().max() < BIAS + COUNT
    noise = seen[:, 4] - true[:, 4]
    assert 0.9 * COUNT / 0.02 < noise.abs().max() <= COUNT / 0.02 + 1e-6


def test_delay_and_history() -> None:
    def noiseless(**options: Any) -> SimVector:
        task = make_robot_task(PENDULUM, {"randomize": False, **options})
        policy = {k: dataclasses.replace(term, noise=0.0) for k, term in task.observations["policy"].items()}
        return simulate(dataclasses.replace(task, observations={**task.observations, "policy": policy}), 3)

    prompt, late, long = noiseless(), noiseless(observation_delay=1), noiseless(history=2)
    before = prompt.reset(0)["policy"].clone()
    late.reset(0)
    assert torch.equal(long.reset(0)["policy"][:, [0, 1, 4, 6]], before)
    assert late.observation_space == prompt.observation_space
    for t in range(20):
        action = torch.full((3, 1), math.sin(t))
        now, past, both = (env.step(action).obs["policy"].clone() for env in (prompt, late, long))
        assert torch.equal(past[:, :3], before[:, :3]) and torch.equal(past[:, 3], now[:, 3])
        assert both.shape == (3, 8) and torch.equal(both[:, [0, 1, 4, 6]], before)
        assert torch.equal(both[:, [2, 3, 5, 7]], now)
        before = now


def test_rigs_differ_where_they_are_randomized() -> None:
    env = make(CARTPOLE, 64)
    env.reset(0)
    model = env.sim.model
    ranges = {  # field and entry: least and largest factor of the file's value
        ("body_mass", model.body("pole").id): (0.8, 1.2),
        ("body_mass", model.body("cart").id): (0.9, 1.1),
        ("dof_damping", 0): (0.75, 1.25),
        ("dof_damping", 1): (0.75, 1.25),
        ("dof_armature", 0): (0.8, 1.2),
        ("dof_frictionloss", 0): (0.5, 1.5),
        ("dof_frictionloss", 1): (0.0, 2.0),
    }
    for (field, index), (least, most) in ranges.items():
        factor = env.world.model_field(field)[0][:, index] / getattr(model, field)[index]
        assert least <= factor.min() < least + 0.1 * (most - least), field
        assert most - 0.1 * (most - least) < factor.max() <= most, field
    gear = env.world.model_field("actuator_gear")[0][:, 0]
    assert 0.9 <= gear[:, 0].min() < 0.92 and 1.08 < gear[:, 0].max() <= 1.1 and (gear[:, 1:] == 0).all()
    center = env.world.model_field("body_ipos")[0][:, model.body("pole").id]
    assert (center[:, :2] == 0).all() and 0.28 <= center[:, 2].min() < 0.285 and 0.315 < center[:, 2].max() <= 0.32
    assert set(env._action_delay.lag[:, 0].tolist()) == {0, 1, 2}
    whole = env.task.model.compile()  # what is simulated lacks what is only seen, not its mass
    for field in ("body_mass", "body_inertia", "body_ipos"):
        np.testing.assert_allclose(getattr(model, field), getattr(whole, field), rtol=1e-12)
    assert make(CARTPOLE, 2, randomize=False).world.state().keys().isdisjoint({"model/body_mass"})


@pytest.mark.parametrize("env_id", TASKS)
def test_mirror(env_id: str) -> None:
    """Mirrored states and actions give mirrored observations and the same rewards."""
    task = make_robot_task(env_id, {"randomize": False, "history": 2})
    clean = {k: {n: dataclasses.replace(o, noise=0.0) for n, o in g.items()} for k, g in task.observations.items()}
    env = simulate(dataclasses.replace(task, observations=clean), 2)
    env.reset(0)
    env.sim.field("qpos")[1] = -env.sim.field("qpos")[0]
    generator = torch.Generator().manual_seed(0)
    for t in range(30):
        action = torch.rand(1, 1, generator=generator) * 2 - 1
        step = env.step(torch.cat([action, -action]))
        assert step.reward[0] == pytest.approx(step.reward[1].item(), abs=1e-6)
        if t < 1:
            continue  # histories reach back to before the mirror was put up
        for name, reflection in task.mirror.observations.items():
            order, sign = reflection.tensors()
            torch.testing.assert_close(step.obs[name][1], step.obs[name][0][order] * sign, atol=1e-5, rtol=0)
    assert make_robot_task(env_id, {"symmetric": False}).mirror is None


BAD = {
    "name": ({"randomise": True}, "has no option 'randomise'. Did you mean randomize"),
    "kind": ({"randomize": 1}, "option randomize takes true or false, got 1"),
    "number": ({"history": 2.0}, "option history takes an integer, got 2.0"),
    "history": ({"history": 0}, "history of 0"),
    "delay": ({"observation_delay": -1}, "a delay takes control steps from 0 on"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_env(CARTPOLE, env_kwargs=options)


def expert_returns(env_id: str, seeds: range, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns of the controller and its successes, (N,) each."""
    env = make_env(env_id, num_envs=len(seeds), env_kwargs=options)
    assert isinstance(env, SimVector)
    expert = SwingUpExpert(env.task)
    obs, total, success = env.reset(list(seeds)), torch.zeros(len(seeds)), torch.zeros(len(seeds))
    running = torch.ones(len(seeds), dtype=torch.bool)
    for _ in range(500):
        step = env.step(expert(obs["policy"]))
        total += step.reward * running
        ended = running & (step.terminated | step.truncated)
        if ended.any():
            success = torch.where(ended, step.log["success"], success)
        running &= ~ended
        obs = step.obs
    assert not running.any()
    return total, success


@pytest.mark.parametrize(("env_id", "stated"), [(CARTPOLE, 250), (PENDULUM, 360)])
def test_the_controller_reaches_its_stated_return(env_id: str, stated: float) -> None:
    returns, success = expert_returns(env_id, range(50))
    assert (returns >= stated).float().mean() >= 0.95
    assert success.mean() >= 0.95


@pytest.mark.parametrize("env_id", TASKS)
def test_the_controller_on_the_rig_of_the_file(env_id: str) -> None:
    returns, success = expert_returns(env_id, range(4), randomize=False)
    assert (success == 1).all() and returns.min() > (340 if env_id == CARTPOLE else 400)
    with pytest.raises(UsageError, match="leave out history"):
        SwingUpExpert(make_robot_task(env_id, {"history": 2}))


def test_linear_model_and_regulator() -> None:
    """The model against small steps of the simulation; the gains against an equation with a known solution."""
    spec = make_robot_task(CARTPOLE, {}).model
    spec.option.timestep = 0.005
    model = spec.compile()
    model.dof_frictionloss[:] = 0
    a, b = linear_model(model, mujoco.MjData(model), 4)
    rng = np.random.default_rng(0)
    for _ in range(5):
        state, force = rng.normal(size=4) * 1e-4, rng.normal() * 1e-3
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:], data.ctrl[:] = state[:2], state[2:], force
        mujoco.mj_step(model, data, 4)
        expected = a @ state + b[:, 0] * force
        np.testing.assert_allclose([*data.qpos, *data.qvel], expected, atol=1e-8)
    # x' = 2 x + u, costs of 1: p = 1 + 4 p / (1 + p), so p = 2 + sqrt 5; gain = 2 p / (1 + p).
    one = np.eye(1)
    p = 2 + math.sqrt(5)
    assert regulator(2 * one, one, one, one)[0, 0] == pytest.approx(2 * p / (1 + p))


@pytest.mark.parametrize(("env_id", "reach"), [(CARTPOLE, 0.6), (PENDULUM, 0.3)])
def test_the_camera_sees_the_pole_upright_too(env_id: str, reach: float) -> None:
    env = make(env_id, 1, randomize=False)
    env.reset(0)
    camera = mujoco.MjvCamera()
    model, data = env.scene(0)
    aim(camera, model, data)
    assert abs(camera.lookat[2]) < 0.02  # where the hinge is, though the pole hangs
    assert camera.distance * math.tan(math.radians(model.vis.global_.fovy / 2)) > 1.2 * reach


def test_presets() -> None:
    for algorithm in ("ppo", "sac"):
        for env_id in TASKS:
            preset = find_algorithm(algorithm).preset_for(env_id)
            assert preset is not None and preset.name == "swing-up"
    assert find_algorithm("sac").preset_for("Pendulum-v1").name == "pendulum"
