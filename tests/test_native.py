"""Our tasks against the environments of Gymnasium that they are."""

from __future__ import annotations

import re
from pathlib import Path
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
from ctrlrl.envs.tasks.registry import ROBOT_TASKS
from ctrlrl.envs.vector import EnvState
from ctrlrl.errors import EnvironmentFailure, UsageError
from ctrlrl.training.evaluation import evaluate
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


@pytest.mark.parametrize("env_id", ["Ant-v5", "Humanoid-v5"])
def test_the_fast_mode_conforms(env_id: str) -> None:
    kwargs = {"max_episode_steps": 40}
    make = lambda n: make_env(env_id, num_envs=n, env_kwargs=kwargs, backend="native-fast")  # noqa: E731
    check_vector_env(make, ends_within=40)


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
    if steps < 200:
        kwargs = {"max_episode_steps": 70} | kwargs
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
    assert ends > 0
    ours.close()
    theirs.close()


@pytest.mark.parametrize("threads", [2, 3])
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
        task.qvel[1, 0] = torch.nan
        step = copy_step(env.step(action))
        assert step.valid.tolist() == [True, False, True]
        assert step.reward[1] == 0 and not step.terminated.any() and not step.truncated.any()
        assert [value.isnan().tolist() for value in step.log.values()] == [[False, True, False]] * len(step.log)
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


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5", "Hopper-v5"])
def test_a_model_of_the_users_is_gymnasiums_to_the_bit(env_id: str, tmp_path: Path) -> None:
    """With actuators that have a state, and a sensor that makes MuJoCo compute contact forces by itself."""
    path = Path(gym.__file__).parent / "envs/mujoco/assets" / gym.make(env_id).unwrapped.fullpath  # type: ignore[attr-defined]
    spec = mujoco.MjSpec.from_file(str(path))
    for actuator in spec.actuators:
        actuator.dyntype, actuator.dynprm[0] = mujoco.mjtDyn.mjDYN_FILTER, 0.05
    if env_id == "Ant-v5":  # which does not cost by the first stage's forces
        spec.worldbody.first_body().add_site(name="imu")
        spec.add_sensor(type=mujoco.mjtSensor.mjSENS_ACCELEROMETER, objtype=mujoco.mjtObj.mjOBJ_SITE, objname="imu")
    spec.compile()
    (tmp_path / "robot.xml").write_text(spec.to_xml())
    kwargs = {"xml_file": str(tmp_path / "robot.xml"), "max_episode_steps": 30, "reset_noise_scale": 0.3}
    check_vector_env(
        lambda n: make_env(env_id, num_envs=n, env_kwargs=kwargs, backend="native"),
        ends_within=30,
        reference=lambda: gym.make(env_id, **kwargs),
    )


def test_a_model_whose_state_is_not_all_of_it_is_refused(tmp_path: Path) -> None:
    spec = mujoco.MjSpec.from_file(gym.make("HalfCheetah-v5").unwrapped.fullpath)  # type: ignore[attr-defined]
    spec.option.enableflags |= mujoco.mjtEnableBit.mjENBL_SLEEP
    (tmp_path / "robot.xml").write_text(spec.to_xml())
    with pytest.raises(UsageError, match=r"lets bodies sleep.*--backend gymnasium"):
        make_env("HalfCheetah-v5", env_kwargs={"xml_file": str(tmp_path / "robot.xml")})


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5"])
def test_what_mujoco_refuses_to_step_is_a_failure_of_the_environment(env_id: str, tmp_path: Path) -> None:
    text = Path(gym.make(env_id).unwrapped.fullpath).read_text()  # type: ignore[attr-defined]
    small = re.sub("(<mujoco[^>]*>)", r'\1<size memory="9000"/>', re.sub("<size[^>]*/>", "", text), count=1)
    (tmp_path / "robot.xml").write_text(small)
    with pytest.raises(EnvironmentFailure, match=f"^{env_id}: MuJoCo failed: (?s:.*)out of memory"):
        env = make_env(env_id, num_envs=4, env_kwargs={"xml_file": str(tmp_path / "robot.xml")})
        env.reset(0)
        for action in actions_for(env, 200):
            env.step(action)
    with pytest.raises(EnvironmentFailure, match="failed before and must be made anew"):
        env.reset(0)
    env.close()


def test_an_interrupted_step_leaves_no_thread_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env("Humanoid-v5", num_envs=16, backend="native", cores=2)
    env.reset(0)
    action = torch.zeros(16, 17)
    right, at_work = mujoco.mj_step, []

    def counted(*arguments: Any) -> None:
        at_work.append(1)
        right(*arguments)
        at_work.pop()

    monkeypatch.setattr(mujoco, "mj_step", counted)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("concurrent.futures.Future.result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            env.step(action)
    assert not at_work
    env.step(action)
    env.close()


def test_steps_before_the_first_reset_and_actions_that_do_not_exist_are_refused() -> None:
    env = make_env("CartPole-v1", num_envs=2)
    with pytest.raises(UsageError, match="call reset before step"):
        env.step(torch.zeros(2, dtype=torch.int64))
    env.reset(0)
    with pytest.raises(UsageError, match=r"takes actions from 0 to 1, got \[0, 5\]"):
        env.step(torch.tensor([0, 5]))


@pytest.mark.parametrize("env_id", [*CLASSIC, "Hopper-v5"])
def test_steps_without_autograd_can_be_followed_by_others(env_id: str) -> None:
    env = make_env(env_id, num_envs=2, env_kwargs={"max_episode_steps": 3})
    first, *rest = actions_for(env, 8)
    env.reset(0)
    with torch.inference_mode():
        env.step(first)
    for action in rest:
        env.step(action)


def test_an_evaluation_ends_where_a_simulation_diverged() -> None:
    env = make_env("HalfCheetah-v5", num_envs=2, env_kwargs={"max_episode_steps": 50})
    policy, count = Still(), 0

    def spoil() -> None:
        nonlocal count
        count += 1
        if count == 30:
            env.task.qvel[1, 0] = torch.nan  # type: ignore[attr-defined]

    done = evaluate(env, policy, [1, 2], before_step=spoil)  # type: ignore[arg-type]
    assert done.lengths == [50, 29]


class Still(torch.nn.Module):
    """A policy that does nothing."""

    device = torch.device("cpu")

    def initial_state(self, n: int) -> dict[str, torch.Tensor]:
        return {}

    def reset(self, state: Any, mask: torch.Tensor) -> Any:
        return state

    def act(self, obs: torch.Tensor, state: Any, *, explore: bool) -> Any:
        return torch.zeros(len(obs), 6), state, {}


def test_which_environments_are_stepped_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(has_native(env_id) for env_id in (*MUJOCO, *CLASSIC))
    assert {info.id for info in list_envs() if info.native} == {*MUJOCO, *CLASSIC, *ROBOT_TASKS}
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
    assert has_native("gymnasium:HalfCheetah-v5") and not has_native("no_such_module:HalfCheetah-v5")
    assert isinstance(make_env("gymnasium:HalfCheetah-v5"), NativeVector)
    assert not has_native("CartPole-v1", env_kwargs={"render_mode": "human"})


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("FrozenLake-v1", {"backend": "native"}, "FrozenLake-v1 has no native backend; `ctrlrl envs` marks those"),
        ("HalfCheeta-v5", {"backend": "native"}, "Did you mean HalfCheetah-v5"),
        ("CartPole-v1", {"backend": "native", "env_kwargs": {"render_mode": "human"}}, "no window is opened"),
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
