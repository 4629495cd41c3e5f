"""Tasks over a simulation as vector environments."""

from __future__ import annotations

import subprocess
import sys

import mujoco
import numpy as np
import pytest
import torch

from ctrlrl.algorithms.ppo import PPO
from ctrlrl.envs.make import make_env
from ctrlrl.envs.spec import Action, Event, Obs, Reward
from ctrlrl.envs.vector import Step
from ctrlrl.envs.world import World
from ctrlrl.errors import UsageError
from ctrlrl.mirror import Mirror, Reflection
from ctrlrl.training.collector import Collector
from ctrlrl.training.evaluation import evaluate
from tests.conformance import check_vector_env
from tests.simulations import cart_mirror, cart_task, distance, make_cart, place, push


def random_actions(n: int, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(n, 1, generator=generator) * 2 - 1 for _ in range(steps)]


def test_contract() -> None:
    check_vector_env(make_cart, ends_within=35)


def test_rewards_and_episode_figures() -> None:
    """Against sums by hand, with the physics of a single simulation."""
    env = make_cart(1, events={}, terminations={}, action=Action(["rail"], lambda w, a: w.control(a)))
    env.reset(3)
    model = cart_task().model.compile()
    data = mujoco.MjData(model)
    data.qpos[1] = 0.2
    mujoco.mj_forward(model, data)
    near = effort = gone = away = 0.0
    for t, action in enumerate(random_actions(1, 30)):
        goal = env.world.command[0, 0].item()
        data.ctrl[:] = action.item()
        mujoco.mj_step(model, data, 2)
        seen_place, seen_speed = data.sensordata  # of the state before the last substep
        step = env.step(action)
        weight = -0.1 - 0.4 * (t + 1) / 40
        terms = np.exp(-abs(seen_place - goal)), weight * action.item() ** 2
        assert step.reward.item() == pytest.approx(sum(terms), abs=1e-5)
        near, effort, gone = near + terms[0], effort + terms[1], gone + abs(seen_speed) * 0.02
        away += abs(seen_place - goal) / 30
    assert step.truncated.all() and not step.terminated.any()
    expected = {"reward/near": near, "reward/effort": effort, "distance": away, "travelled": gone}
    for name, value in expected.items():
        assert step.log[f"episode/{name}"].item() == pytest.approx(value, rel=1e-4)
    assert step.log["success"].item() == float(abs(seen_place - goal) < 0.2)
    np.testing.assert_allclose(step.final_obs["privileged"][0, :2], data.qpos, rtol=1e-6)


def test_reward_floor_and_scale() -> None:
    rewards = {"cost": Reward(lambda w: -distance(w), 1.0), "bonus": Reward(lambda w: torch.ones(w.num_envs), 0.05)}
    plain = make_cart(4, rewards=rewards)
    scaled = make_cart(4, rewards=rewards, reward_floor=0.0, reward_scale=0.5)
    plain.reset(0)
    scaled.reset(0)
    for action in random_actions(4, 20):
        a, b = plain.step(action), scaled.step(action)
        torch.testing.assert_close(b.reward, a.reward.clamp(min=0) * 0.5)


def test_noise_delay_and_history() -> None:
    observations = {
        "policy": {
            "noisy": Obs(place, noise=0.05),
            "late": Obs(place, delay=(2, 2)),
            "three": Obs(place, history=3),
            "now": Obs(place),
        }
    }
    env = make_cart(64, observations=observations, events={}, terminations={})
    seen = [env.reset(0)]
    assert seen[0].shape == (64, 6)
    for action in random_actions(64, 29):
        seen.append(env.step(action).obs)
    now = torch.stack([obs[:, 5] for obs in seen])  # (T, N)
    noise = torch.stack([obs[:, 0] for obs in seen]) - now
    assert noise.abs().max() <= 0.05 + 1e-6 and abs(noise.mean()) < 0.003 and 0.027 < noise.std() < 0.031
    for t in range(30):
        assert torch.equal(seen[t][:, 1], now[max(t - 2, 0)])
        for age, column in ((2, 2), (1, 3), (0, 4)):
            assert torch.equal(seen[t][:, column], now[max(t - age, 0)])


def test_delay_is_drawn_for_each_episode() -> None:
    env = make_cart(400, observations={"policy": {"late": Obs(place, delay=(1, 3)), "now": Obs(place)}}, events={})
    env.reset(0)
    lag = env.groups["policy"]._delays[0].lag[:, 0].clone()
    assert set(lag.tolist()) == {1, 2, 3} and torch.bincount(lag)[1:].min() > 100
    for action in random_actions(400, 30):
        env.step(action)
    assert 0.2 < (env.groups["policy"]._delays[0].lag[:, 0] != lag).float().mean() < 0.9


def test_actions_take_effect_late() -> None:
    late = make_cart(2, events={}, action=Action(["rail"], lambda w, a: w.control(a), delay=(1, 1)))
    prompt = make_cart(2, events={}, action=Action(["rail"], lambda w, a: w.control(a)))
    late.reset(0)
    prompt.reset(0)
    actions = random_actions(2, 8)
    for t, action in enumerate(actions):
        late.step(action)
        prompt.step(torch.zeros(2, 1) if t == 0 else actions[t - 1])
        assert torch.equal(late.sim.field("qpos"), prompt.sim.field("qpos"))
        assert torch.equal(late.world.action, action)


def test_startup_randomization_stays_until_seeded_anew() -> None:
    env = make_cart(50)
    first = env.reset(0)["privileged"][:, 2].clone()
    assert first.min() > 0.5 and first.max() < 2 and first.std() > 0.3
    for action in random_actions(50, 70):
        step = env.step(action)
        assert torch.equal(step.obs["privileged"][:, 2], first)
    assert torch.equal(env.reset()["privileged"][:, 2], first)
    assert torch.equal(env.reset(0)["privileged"][:, 2], first)
    assert not torch.equal(env.reset(1)["privileged"][:, 2], first)
    weights = env.sim.expand("dof_invweight0")[:, 0]  # MuJoCo knows: what it derives from masses is each one's own
    order = env.reset(1)["privileged"][:, 2].argsort()
    assert weights.std() > 0.1 and (weights[order].diff() <= 0).all()  # the heavier, the less
    assert (env.world.memory("lifetime", 1, keep=True) == 0).all()


def test_masses_change_the_motion() -> None:
    env = make_cart(2, events={"mass": cart_task().events["mass"]}, action=Action(["rail"], lambda w, a: w.control(a)))
    env.reset(0)
    model = cart_task().model.compile()
    for _ in range(10):
        env.step(torch.ones(2, 1))
    for row in range(2):
        model.body_mass[1] = env.world.model_field("body_mass")[0][row, 1].item()
        model.body_inertia[1] = env.world.model_field("body_inertia")[0][row, 1].numpy()
        data = mujoco.MjData(model)
        mujoco.mj_setConst(model, data)
        mujoco.mj_resetData(model, data)
        data.qpos[1], data.ctrl[:] = 0.2, 1.0
        mujoco.mj_step(model, data, 20)
        np.testing.assert_allclose(env.sim.field("qpos")[row], data.qpos, rtol=1e-12)


def test_interval_events_come_in_time() -> None:
    times: list[torch.Tensor] = []
    event = Event("interval", lambda w, rows: times.append(rows.clone()), every=(0.1, 0.2))
    env = make_cart(100, events={"bell": event}, terminations={})
    env.reset(0)
    times.clear()
    for action in random_actions(100, 29):
        env.step(action)
    rung = torch.stack(times)  # (29, 100)
    for row in rung.t():
        gaps = np.diff(np.flatnonzero(row.numpy()))
        assert (gaps >= 5).all() and (gaps <= 10).all() and row.any()


def test_commands_are_drawn_anew() -> None:
    env = make_cart(20, terminations={})
    env.reset(0)
    changed = torch.zeros(20)
    for action in random_actions(20, 29):
        before = env.world.command.clone()
        step = env.step(action)
        changed += (env.world.command != before)[:, 0]
        assert torch.equal(step.obs["policy"][:, 4:5], env.world.command)
    assert changed.min() >= 1 and changed.max() <= 6


def test_diverged_simulations_are_no_transitions() -> None:
    env = make_cart(3)
    env.reset(0)
    env.step(torch.zeros(3, 1))
    env.sim.field("qvel")[1] = 1e12
    step = env.step(torch.zeros(3, 1))
    assert step.valid.tolist() == [True, False, True]
    assert step.reward[1] == 0 and not (step.terminated | step.truncated)[1]
    for group in ("policy", "privileged"):
        assert torch.isfinite(step.obs[group]).all()
        assert torch.equal(step.obs[group][1], step.final_obs[group][1])
    assert env.world.elapsed.tolist() == [2, 0, 2]


def test_rows_are_independent() -> None:
    """Row i of N is what a single environment with its seed is, whenever the others' episodes end."""
    seeds = [11, 12, 13, 14]
    near = {"terminations": {"far": lambda w: place(w)[:, 0].abs() > 0.2}}
    env, singles = make_cart(4, **near), [make_cart(1, **near) for _ in seeds]
    first = env.reset(seeds)
    for row, (single, seed) in enumerate(zip(singles, seeds, strict=True)):
        assert torch.equal(single.reset([seed])["policy"][0], first["policy"][row])
    ends = set()
    for t, action in enumerate(random_actions(4, 120)):
        step = env.step(action)
        for row, single in enumerate(singles):
            one = single.step(action[row : row + 1])
            assert torch.equal(one.reward[0], step.reward[row])
            for name, value in step.obs.items():
                assert torch.equal(one.obs[name][0], value[row])
                assert torch.equal(one.final_obs[name][0], step.final_obs[name][row])
        ends.add((t, tuple((step.terminated | step.truncated).tolist())))
    assert any(any(over) and not all(over) for _, over in ends)  # not all at the same time


def remembers(w: World, action: torch.Tensor) -> None:
    w.memory("smooth", 1).lerp_(action, 0.3)
    w.control(w.memory("smooth", 1))


def test_state_fields_are_current_in_events_and_actions() -> None:
    """What a reset event or an interval event has written is what the action sees."""
    seen: list[torch.Tensor] = []

    def apply(w: World, action: torch.Tensor) -> None:
        seen.append(torch.cat([w.field("qpos") - w.live("qpos"), w.field("qvel") - w.live("qvel")], 1).abs().max())
        w.control(action)

    env = make_cart(3, action=Action(["rail"], apply))
    env.reset(0)
    for action in random_actions(3, 70):
        env.step(action)
    assert len(seen) > 70 and max(seen) < 1e-6  # rounding to float32


def test_keeps_state_of_its_own() -> None:
    """Going on from a state in another instance gives the same bits; conformance checks it for all that ends, too."""
    env, other = make_cart(4), make_cart(4)
    env.reset(5)
    actions = random_actions(4, 60)
    for action in actions[:17]:
        env.step(action)
    state = env.get_state()
    _, reasons = other.set_state(state, seed=1)
    assert reasons == [None] * 4
    assert torch.equal(other.world.model_field("body_mass")[0], env.world.model_field("body_mass")[0])
    for action in actions[17:]:
        a, b = env.step(action), other.step(action)
        assert torch.equal(a.reward, b.reward)
        assert all(torch.equal(a.obs[k], b.obs[k]) for k in a.obs)
    reasons = make_cart(4, observations={"policy": {"place": Obs(place)}}).set_state(state, seed=1)[1]
    assert all(reason and "another task" in reason for reason in reasons)


BAD = {
    "stateful action": ({"action": Action(["rail"], remembers)}, "action changes the memory 'smooth'"),
    "joints": ({"joints": []}, "joints must name"),
    "substeps": ({"substeps": 0}, "substeps must be"),
    "seconds": ({"episode_seconds": 0.0}, "episode_seconds must be"),
    "groups": ({"observations": {"a": {"x": Obs(place)}, "b": {"x": Obs(place)}}}, "one group is policy"),
    "empty group": ({"observations": {"policy": {}}}, "policy .* no term"),
    "names": ({"metrics": {"success": distance}}, "success .* twice|named twice"),
    "late mass": (
        {"events": {"mass": Event("interval", cart_task().events["mass"].do, every=(1, 2))}},
        "body_inertia during an episode|body_mass during an episode",
    ),
    "reward": ({"rewards": {"tall": Reward(place, 1.0)}}, r"reward tall .* shape \(2,\), it gave \(2, 1\)"),
    "rows": ({"rewards": {"one": Reward(lambda w: torch.zeros(1), 1.0)}}, r"reward one .*\(2, ...\), it gave \(1,\)"),
    "dtype": ({"terminations": {"far": lambda w: place(w)[:, 0]}}, "termination far must give torch.bool"),
    "no tensor": ({"metrics": {"far": lambda w: 1.0}}, "metric far must give a tensor .* it gave a float"),
    "flat": ({"observations": {"policy": {"x": Obs(distance)}}}, r"observation policy/x .* \(2, size\)"),
    "sensor": ({"track": lambda w: w.sensor("palce")}, "no sensor 'palce'.*place"),
    "joint": ({"joints": ["rial"]}, "no joint 'rial'.*rail"),
    "pose": ({"pose": {"rail": (0.0, 1.0)}}, "rail has 1 coordinates, the pose gives it 2"),
    "event": ({"events": {"push": Event("interval", push)}}, "event push is of the kind interval, every is None"),
    "delay": ({"observations": {"policy": {"x": Obs(place, delay=(2, 1))}}}, "fewest first"),
    "mirror": ({"mirror": Mirror({"policy": Reflection.signs(-1)}, Reflection.signs(-1))}, "5 numbers .* policy .* 1"),
    "model field": ({"track": lambda w: w.model_field("body_mas")}, "body_mas cannot differ"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_tasks_that_are_wrong(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_cart(2, **change)


def test_reflections() -> None:
    legs = Reflection.of_names(["L_hip", "L_knee", "R_hip", "R_knee"], {"L": "R", "R": "L"}, flipped=["hip"])
    assert legs == Reflection((2, 3, 0, 1), (-1.0, 1.0, -1.0, 1.0))
    joined = Reflection.join(Reflection.signs(1, -1), legs)
    assert joined.order == (0, 1, 4, 5, 2, 3) and joined.sign == (1.0, -1.0, -1.0, 1.0, -1.0, 1.0)
    for order, sign in (((1, 2, 0), (1.0, 1.0, 1.0)), ((1, 0), (1.0, -1.0)), ((0,), (2.0,)), ((0, 1), (1.0,))):
        with pytest.raises(UsageError, match="no reflection"):
            Reflection(order, sign)


def test_mirrored_task() -> None:
    """What is said of the mirror is true: from mirrored states mirrored actions lead to mirrored observations."""
    env = make_cart(
        2,
        events={},
        mirror=cart_mirror(),
        action=Action(["rail"], lambda w, a: w.control(a)),
        observations={
            "policy": {
                "p": Obs(place, history=3),
                "s": Obs(lambda w: w.sensor("speed")),
                "g": Obs(lambda w: w.command),
            },
            "privileged": {"q": Obs(lambda w: w.field("qpos")), "m": cart_task().observations["privileged"]["mass"]},
        },
    )
    env.reset(0)
    env.sim.field("qpos")[1] = -env.sim.field("qpos")[0]
    env.world.command[1] = -env.world.command[0]
    env._command_wait.fill_(9)
    for action in random_actions(1, 20):
        step = env.step(torch.cat([action, -action]))
        for name, reflection in cart_mirror().observations.items():
            order, sign = reflection.tensors()
            torch.testing.assert_close(step.obs[name][1], step.obs[name][0][order] * sign, atol=1e-6, rtol=0)


def test_mujoco_without_batches() -> None:
    """One that is too old: said at once, by name, with the remedy."""
    code = (
        "import sys; sys.modules['mujoco.batch'] = None\n"
        "from ctrlrl.envs.make import make_env\n"
        "from ctrlrl.errors import UsageError\n"
        "try: make_env('Go1VelocityFlat-v0')\n"
        "except UsageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "need MuJoCo 3.17 or newer, and this is" in done.stdout and "pip install" in done.stdout, done.stderr


def test_backends_refused() -> None:
    for env, words in (("HalfCheetah-v5", "simulates tasks of ours"), ("Go1VelocityFlat-v0", "Warp|cuda")):
        if env.startswith("Go1") and torch.cuda.is_available():
            continue
        with pytest.raises(UsageError, match=words):
            make_env(env, backend="warp", device="cuda")


def test_rows_that_are_no_transition_are_counted() -> None:
    env = make_cart(3)
    agent = PPO(env.observation_space, env.action_space)
    collector = Collector(env, agent.policy, env.reset(0), seed=0)
    env.sim.field("qvel")[1] = 1e12
    step, _, _ = collector.step(random=True)
    assert collector.finished(step) == ([], 2)
    assert collector.figures() == {"invalid_rows": 1.0}
    assert collector.figures() == {}


def test_an_unstable_episode_is_no_success() -> None:
    """Also where it ends before any other has told of success."""
    env = make_cart(3, terminations={}, outcomes={"success": lambda w: torch.ones(w.num_envs)})
    agent = PPO(env.observation_space, env.action_space)
    steps, step = [0], env.step

    def unstable(action: torch.Tensor) -> Step:
        steps[0] += 1
        if steps[0] == 3:
            env.sim.field("qvel")[1] = 1e12
        return step(action)

    env.step = unstable  # type: ignore[method-assign]
    result = evaluate(env, agent.policy, [1, 2, 3])
    assert result.success == [True, False, True] and result.lengths == [30, 2, 30]
