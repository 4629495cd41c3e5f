"""Our tasks against the environments of Gymnasium that they are."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch

import ctrlrl
from ctrlrl.envs.make import has_native, list_envs, make_env
from ctrlrl.envs.native import NativeVector, make_native
from ctrlrl.envs.sim import BatchSim, Sim, ThreadSim
from ctrlrl.envs.vector import EnvState
from ctrlrl.errors import UsageError
from tests.conformance import actions_for, check_vector_env, copy_obs, copy_step
from tests.runs import SMALL

MUJOCO = ["HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "HumanoidStandup", "Swimmer", "Reacher", "Pusher"]
MUJOCO = [f"{name}-v5" for name in (*MUJOCO, "InvertedPendulum", "InvertedDoublePendulum")]
CLASSIC = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"]
OTHER_NUMBERS = {
    "HalfCheetah-v5": {"forward_reward_weight": 2.0, "exclude_current_positions_from_observation": False},
    "Hopper-v5": {"healthy_state_range": (-3.0, 3.0), "healthy_reward": 0.5, "reset_noise_scale": 0.1},
    "Walker2d-v5": {"terminate_when_unhealthy": False, "ctrl_cost_weight": 0.3, "frame_skip": 8},
    "Ant-v5": {"main_body": "front_left_leg", "contact_cost_weight": 0.1, "include_cfrc_ext_in_observation": False},
    "Humanoid-v5": {"contact_cost_range": (0.0, 1.0), "include_cvel_in_observation": False, "max_episode_steps": 7},
    "HumanoidStandup-v5": {"impact_cost_weight": 1e-3, "include_qfrc_actuator_in_observation": False},
    "Swimmer-v5": {"reset_noise_scale": 0.5, "exclude_current_positions_from_observation": False},
    "Reacher-v5": {"reward_dist_weight": 3.0},
    "Pusher-v5": {"reward_control_weight": 0.7},
    "InvertedDoublePendulum-v5": {"healthy_reward": 3.0},
    "CartPole-v1": {"sutton_barto_reward": True},
    "Pendulum-v1": {"g": 3.0},
    "MountainCar-v0": {"goal_velocity": 0.01},
    "MountainCarContinuous-v0": {"goal_velocity": 0.01},
}


def ends_within(env_id: str) -> int:
    """A time limit that random actions reach, and that leaves some episodes to end before."""
    return 40 if env_id in MUJOCO else 60


@pytest.mark.parametrize("env_id", [*MUJOCO, *CLASSIC])
def test_native_environments_conform_and_are_gymnasiums_to_the_bit(env_id: str) -> None:
    limit = ends_within(env_id)
    kwargs = {"max_episode_steps": limit}
    check_vector_env(
        lambda n: make_env(env_id, num_envs=n, env_kwargs=kwargs, backend="native"),
        ends_within=limit,
        reference=lambda: gym.make(env_id, **kwargs),
    )


@pytest.mark.parametrize(
    ("env_id", "kwargs", "steps"),
    [
        *((env_id, {}, 1_100) for env_id in MUJOCO),
        *((env_id, {}, 3_000) for env_id in CLASSIC),
        *((env_id, kwargs, 150) for env_id, kwargs in OTHER_NUMBERS.items()),
    ],
)
def test_long_episodes_and_other_numbers_are_gymnasiums_to_the_bit(
    env_id: str, kwargs: dict[str, Any], steps: int
) -> None:
    ours, theirs = (
        make_env(env_id, num_envs=2, env_kwargs=kwargs, backend=backend) for backend in ("native", "gymnasium")
    )
    assert isinstance(ours, NativeVector)
    assert torch.equal(copy_obs(ours.reset(3)), copy_obs(theirs.reset(3)))  # type: ignore[arg-type]
    ends = 0
    for t, action in enumerate(actions_for(ours, steps)):
        mine, its = ours.step(action), theirs.step(action)
        for field in ("obs", "final_obs", "reward", "terminated", "truncated", "action"):
            assert torch.equal(getattr(mine, field), getattr(its, field)), f"{field} differs at step {t}"
        terms = [value.float() for name, value in mine.log.items() if name.startswith("reward/")]
        if env_id == "HumanoidStandup-v5":
            terms.append(torch.ones(2))
        assert not terms or torch.allclose(sum(terms), mine.reward, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
        ends += int((mine.terminated | mine.truncated).sum())
    assert ends > 0 or steps < 200
    ours.close()
    theirs.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int) -> None:
    for env_id in ("HalfCheetah-v5", "Ant-v5"):
        one, more = (make_env(env_id, num_envs=5, backend="native", cores=cores) for cores in (1, threads))
        assert torch.equal(copy_obs(one.reset(0)), copy_obs(more.reset(0)))  # type: ignore[arg-type]
        for action in actions_for(one, 20):
            assert torch.equal(one.step(action).obs, more.step(action).obs)  # type: ignore[arg-type]
        one.close()
        more.close()


@pytest.mark.parametrize("env_id", ["Ant-v5", "Humanoid-v5", "HumanoidStandup-v5"])
def test_the_fast_mode_differs_in_contact_forces_only(env_id: str) -> None:
    exact, fast = (make_env(env_id, num_envs=3, backend=backend) for backend in ("native", "native-fast"))
    forces = slice(-(exact.task.sim.model.nbody - 1) * 6, None)  # type: ignore[attr-defined]
    rest = slice(0, forces.start)
    first = [copy_obs(env.reset(0)) for env in (exact, fast)]
    assert torch.equal(*first)  # type: ignore[arg-type]
    seen = []
    for action in actions_for(exact, 60):
        a, b = copy_step(exact.step(action)).final_obs, copy_step(fast.step(action)).final_obs
        assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        assert torch.equal(a[:, rest], b[:, rest])
        seen.append(torch.stack((a[:, forces], b[:, forces])))
    theirs, ours = torch.stack(seen, 1)
    assert not torch.equal(theirs, ours)
    assert 0.5 < float(ours.abs().mean() / theirs.abs().mean()) < 2.0  # of the same size
    exact.close()
    fast.close()


def test_a_diverged_simulation_is_no_transition_and_starts_anew() -> None:
    for env_id in ("HalfCheetah-v5", "Ant-v5"):
        env = make_env(env_id, num_envs=3, backend="native")
        assert env.may_be_invalid
        env.reset(0)
        action = torch.zeros(3, *env.action_space.shape)  # type: ignore[misc]
        for _ in range(3):
            env.step(action)
        task = env.task  # type: ignore[attr-defined]
        if isinstance(task.sim, ThreadSim):
            task.sim._data[1].qvel[0] = np.nan
        else:
            task.qvel[1, 0] = torch.nan
        step = copy_step(env.step(action))
        assert step.valid.tolist() == [True, False, True]
        assert step.reward[1] == 0 and not step.terminated.any() and not step.truncated.any()
        assert torch.equal(step.obs[1], step.final_obs[1]) and step.obs.isfinite().all()  # type: ignore[index,union-attr]
        assert env._elapsed.tolist() == [4, 0, 4]  # type: ignore[attr-defined]
        assert env.step(action).valid.all()
        env.close()


@pytest.mark.parametrize("kind", [BatchSim, ThreadSim])
def test_the_simulations_are_those_of_a_loop_over_single_ones(kind: type[Sim]) -> None:
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><option timestep='0.01'/><worldbody><geom type='plane' size='5 5 1'/>"
        "<body pos='0 0 0.3'><freejoint/><geom type='capsule' size='0.1 0.2'/><site name='s'/>"
        "<body pos='0.2 0 0'><joint name='j' axis='0 1 0'/><geom type='capsule' size='0.05 0.1'/></body></body>"
        "</worldbody><actuator><motor joint='j'/></actuator><sensor><gyro site='s'/></sensor></mujoco>"
    )
    sim = kind(model, 4, 2)
    qpos, qvel, ctrl, positions, sensors = (sim.field(name) for name in ("qpos", "qvel", "ctrl", "xpos", "sensordata"))
    everyone = torch.ones(4, dtype=torch.bool)
    sim.reset(everyone)
    random = np.random.default_rng(0)
    start = torch.from_numpy(random.normal(size=(4, model.nv)))
    qvel[:] = start
    sim.forward(everyone)
    single = [mujoco.MjData(model) for _ in range(4)]
    for row, data in enumerate(single):
        data.qvel[:] = start[row].numpy()
        mujoco.mj_forward(model, data)
    saved = {}
    for t in range(60):
        control = random.uniform(-1, 1, (4, 1))
        ctrl[:] = torch.from_numpy(control)
        if t == 30:
            saved = sim.get_state()
            rows = torch.tensor([True, False, False, True])
            sim.reset(rows)  # and back again: nothing of it may remain
            sim.set_state(rows, saved)
        sim.step(2)
        for row, data in enumerate(single):
            data.ctrl[:] = control[row]
            mujoco.mj_step(model, data, 2)
            for field, name in ((qpos, "qpos"), (qvel, "qvel"), (positions, "xpos"), (sensors, "sensordata")):
                assert np.array_equal(field[row].numpy(), getattr(data, name)), f"{name} at step {t}"
    assert sim.diverged() is None
    sim.close()


def test_which_environments_are_stepped_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(has_native(env_id) for env_id in (*MUJOCO, *CLASSIC))
    assert {info.id for info in list_envs() if info.native} == {*MUJOCO, *CLASSIC}
    assert not has_native("HalfCheetah-v4") and not has_native("FrozenLake-v1") and not has_native("Nowhere-v0")
    assert not has_native("CartPole-v1", pixels=32) and not has_native("CartPole-v1", env_python="python")
    slow = gym.envs.registration.EnvSpec("ctrlrl-test/Slow-v0", gym.spec("Pendulum-v1").entry_point, kwargs={"g": 1.0})
    wrapped = gym.envs.registration.EnvSpec(
        "ctrlrl-test/Wrapped-v0",
        slow.entry_point,
        additional_wrappers=(gym.wrappers.TimeAwareObservation.wrapper_spec(),),
    )
    for spec in (slow, wrapped):
        monkeypatch.setitem(gym.registry, spec.id, spec)
    assert has_native(slow.id) and not has_native(wrapped.id)
    env = make_env(slow.id)
    assert isinstance(env, NativeVector) and env.task.max_episode_steps is None
    env.close()


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("FrozenLake-v1", {"backend": "native"}, "FrozenLake-v1 has no native backend; `ctrlrl envs` marks those"),
        ("CartPole-v1", {"backend": "native", "pixels": 32}, "does not observe pictures"),
        ("CartPole-v1", {"backend": "native", "env_python": "python"}, "cannot use env_python"),
        ("Hopper-v5", {"backend": "native", "env_kwargs": {"weight": 1}}, "weight"),
        (lambda: gym.make("CartPole-v1"), {"backend": "native"}, "makes environments from an id"),
    ],
)
def test_what_has_no_native_backend_is_refused(env: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_env(env, **options)


def test_a_state_of_another_backend_or_model_starts_afresh() -> None:
    env, theirs, other = (
        make_native("Hopper-v5", num_envs=2),
        make_env("Hopper-v5", num_envs=2, backend="gymnasium"),
        make_native("Walker2d-v5", num_envs=2),
    )
    theirs.reset(0)
    other.reset(0)
    for state, reason in ((theirs.get_state(), "another backend"), (other.get_state(), "another model")):
        _, reasons = env.set_state(EnvState(state.json, state.arrays), seed=0)
        assert all(reason in (said or "") for said in reasons)
    env.reset(0)
    assert theirs.set_state(env.get_state(), seed=0)[1] == ["its state was saved by another backend"] * 2
    for each in (env, theirs, other):
        each.close()


def test_pictures_show_environment_0() -> None:
    for env_id in ("InvertedPendulum-v5", "CartPole-v1"):
        ours, theirs = (
            make_env(env_id, num_envs=2, backend=backend, render=True) for backend in ("native", "gymnasium")
        )
        ours.reset(1)
        theirs.reset(1)
        for action in actions_for(ours, 5):
            ours.step(action)
            theirs.step(action)
        picture = ours.render()
        unlike = (picture != theirs.render()).any(-1).mean()  # MuJoCo's are of the state before the last substep
        assert picture.std() > 10 and unlike < (0.01 if env_id in MUJOCO else 1e-9), unlike
        ours.close()
        theirs.close()
    env = make_env("CartPole-v1", backend="native")
    with pytest.raises(UsageError, match="made without pictures"):
        env.render()


def test_a_training_is_the_same_natively(tmp_path: Any, capsys: Any) -> None:
    runs = []
    for backend in ("auto", "gymnasium"):
        out = tmp_path / backend
        ctrlrl.train("sac", "Hopper-v5", out=str(out), backend=backend, num_envs=2, **SMALL | {"quiet": False})
        said = "stepped natively" in "".join(capsys.readouterr())
        assert said == (backend == "auto")
        runs.append(torch.cat([value.flatten() for value in ctrlrl.load(str(out)).policy.state_dict().values()]))
    assert torch.equal(*runs)
