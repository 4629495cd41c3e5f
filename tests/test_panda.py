"""PandaReach-v0 and PandaLift-v0, and their scripted experts. The model comes from where robots find theirs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from ctrlrl.envs.make import make_env
from ctrlrl.envs.sim_vector import SimVector
from ctrlrl.envs.tasks import panda, panda_lift, panda_reach
from ctrlrl.envs.tasks.kinematics import Chain
from ctrlrl.envs.tasks.panda_expert import PandaExpert, expert
from ctrlrl.errors import UsageError
from tests.conformance import check_vector_env
from tests.scripts import ROOT, loaded
from tests.simulations import make_cart

IDS = ("PandaReach-v0", "PandaLift-v0")
PAGE = (ROOT / "docs" / "panda.md").read_text()


def make(env_id: str, num_envs: int, **options: Any) -> SimVector:
    env = make_env(env_id, num_envs=num_envs, env_kwargs=options, cores=1)
    assert isinstance(env, SimVector)
    return env


def entries(env: SimVector, obs: Any) -> dict[str, torch.Tensor]:
    return {name: obs[:, place] for name, place in env.groups["policy"].names.items()}


def random_actions(env: SimVector, steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = env.world.action.shape
    return [torch.rand(size, generator=generator) * 2 - 1 for _ in range(steps)]


def episode(env: SimVector, policy: PandaExpert, steps: int = 100) -> Any:
    """The last step of the first `steps`."""
    obs = env.reset(0)
    for _ in range(steps):
        step = env.step(policy(obs))
        obs = step.obs
    return step


@pytest.mark.parametrize("env_id", IDS)
def test_contract(env_id: str) -> None:
    check_vector_env(lambda n: make(env_id, n), ends_within=100)


def test_contract_of_actions_of_the_tool() -> None:
    check_vector_env(lambda n: make("PandaLift-v0", n, action="tool"), ends_within=100)


@pytest.mark.parametrize("action", panda.ACTIONS)
@pytest.mark.parametrize("env_id", IDS)
def test_other_rows_that_begin_change_nothing(env_id: str, action: str) -> None:
    """Actions add to targets, and must do so once, whichever rows start an episode in between."""
    env, staggered = make(env_id, 2, action=action), make(env_id, 2, action=action)
    env.reset(0)
    staggered.reset(0)
    staggered.world.elapsed[1] = 95
    for t, action in enumerate(random_actions(env, 12)):
        a, b = env.step(action), staggered.step(action)
        assert bool(b.truncated[1]) == (t == 4)
        assert torch.equal(a.obs[0], b.obs[0]) and torch.equal(a.reward[0], b.reward[0])


# What is seen, done and rewarded.


def test_against_a_single_simulation() -> None:
    """Targets, physics and observations of the lift, by hand."""
    env = make("PandaLift-v0", 2, randomize=False)
    first = entries(env, env.reset(4))
    model = env.sim.model
    data = mujoco.MjData(model)
    data.qpos[:] = env.sim.field("qpos")[1].numpy()
    arm = [model.joint(f"joint{i}").qposadr[0] for i in range(1, 8)]
    home = torch.tensor([0.0, -0.04, 0.0, -2.34, 0.0, 2.3, -torch.pi / 4])
    finger = model.joint("finger_joint1").qposadr[0]
    target = torch.tensor(data.qpos[arm])
    grip = 0.04
    data.act[:] = target
    torch.testing.assert_close(first["joint positions"][1], (target - home).float())
    assert first["leads"].abs().max() < 1e-6 and (first["last action"] == 0).all()
    assert first["gripper"][1].item() == pytest.approx(0.04)
    for action in random_actions(env, 20):
        step = env.step(action)
        now = torch.tensor(data.qpos[arm])
        target = (target + 0.05 * action[1, :7]).clamp(now - 0.2, now + 0.2)
        grip = min(max(grip + 0.01 * action[1, 7].item(), 0.0), 0.04)
        data.ctrl[:7], data.ctrl[7] = target, grip
        mujoco.mj_step(model, data, 8)
    seen = {name: value[1] for name, value in entries(env, step.obs).items()}
    expected = {
        "achieved goal": data.body("cube").xpos,
        "desired goal": env.world.command[1],
        "tool": data.site("tool").xpos,
        "cube axes": data.body("cube").xmat.reshape(3, 3).T[:2].flatten(),
        "joint positions": data.qpos[arm] - home.numpy(),
        "gripper": data.qpos[[finger]],
        "joint velocities": data.qvel[:7],
        "leads": [*(target.numpy() - data.qpos[arm]), grip - data.qpos[finger]],
        "last action": action[1],
    }
    assert list(seen) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], torch.as_tensor(value).float(), atol=2e-5, rtol=1e-4, msg=name)
    assert env.observation_space.shape == (46,) and env.action_space.shape == (8,)
    assert env.control_dt == pytest.approx(0.04)


@pytest.mark.parametrize("action", panda.ACTIONS)
@pytest.mark.parametrize("env_id", IDS)
def test_nothing_but_the_goal_depends_on_the_goal_where_goals_may_be_replaced(env_id: str, action: str) -> None:
    env = make(env_id, 4, reward="sparse", action=action)
    env.reset(0)
    other = make(env_id, 4, reward="sparse", action=action)
    other.reset(0)
    other.world.command.add_(0.1)
    seen, moved = (entries(e, e.step(torch.zeros(4, *e.action_space.shape)).obs) for e in (env, other))  # type: ignore[misc]
    assert [name for name in seen if not torch.equal(seen[name], moved[name])] == ["desired goal"]


def test_actions_of_the_tool_move_it_in_the_world_and_keep_it_pointing_down() -> None:
    env = make("PandaLift-v0", 10, randomize=False, action="tool")
    env.reset(3)
    model, data = env.sim.model, mujoco.MjData(env.sim.model)
    site = model.site("tool").id

    def targets() -> tuple[np.ndarray, np.ndarray]:
        """Where the tools would be with joints at their targets: positions and axes."""
        places, axes = [], []
        for row in env.sim.field("ctrl").numpy():
            data.qpos[:7] = row[:7]
            mujoco.mj_kinematics(model, data)
            places.append(data.site_xpos[site].copy())
            axes.append(data.site_xmat[site].reshape(3, 3).copy())
        return np.array(places), np.array(axes)

    for _ in range(5):  # the tool, which an episode begins with a little off, is turned down
        env.step(torch.zeros(10, 5))
    before, turned_before = targets()
    assert np.abs(turned_before[:, 2, 2] + 1).max() < 1e-4
    moves = torch.eye(5).repeat(2, 1) * torch.tensor([1.0] * 5 + [-1.0] * 5)[:, None]
    env.step(moves)
    after, turned = targets()
    expected = panda.TOOL_STEP * moves[:, :3].numpy()
    np.testing.assert_allclose(after - before, expected, atol=1.5e-3)  # of linearization and damping
    assert np.abs(turned[:, 2, 2] + 1).max() < 1e-4
    yaw = np.arctan2(-turned[:, 0, 0], turned[:, 1, 0]) - np.arctan2(-turned_before[:, 0, 0], turned_before[:, 1, 0])
    np.testing.assert_allclose(yaw, panda.TOOL_TURN * moves[:, 3].numpy(), atol=5e-3)
    grip = env.sim.field("ctrl")[:, 7] - 0.04
    torch.testing.assert_close(grip.float(), panda.GRIP_STEP * moves[:, 4].clamp(max=0), atol=1e-6, rtol=0)
    assert env.action_space.shape == (5,) and env.task.action.effect is None
    assert make("PandaReach-v0", 1, action="tool").action_space.shape == (4,)


def test_at_another_rate_actions_move_things_as_fast() -> None:
    slow, usual = make("PandaReach-v0", 2, randomize=False, rate=10), make("PandaReach-v0", 2, randomize=False)
    assert (slow.task.substeps, usual.task.substeps) == (20, 8)
    assert slow.task.action.effect is not None and usual.task.action.effect is not None
    np.testing.assert_allclose(slow.task.action.effect.scale, 2.5 * np.array(usual.task.action.effect.scale))
    moves = torch.linspace(-1, 1, 14).reshape(2, 7)
    after = []
    for env, steps in ((slow, 2), (usual, 5)):  # 0.2 s of both
        env.reset(4)
        before = env.sim.field("ctrl").clone()
        for _ in range(steps):
            env.step(moves)
        after.append((env.sim.field("ctrl") - before)[:, :7])
    assert after[0].abs().amax() > 0.1
    torch.testing.assert_close(after[0], after[1], atol=0.06, rtol=0)  # leads bound both, at other moments


@pytest.mark.parametrize("action", ["joints", "tool"])
@pytest.mark.parametrize("rate", [10, 50])
def test_experts_succeed_at_other_rates(action: str, rate: int) -> None:
    env = make("PandaLift-v0", 20, action=action, rate=rate)
    policy, obs = expert(env), env.reset(0)
    for _ in range(4 * rate):
        step = env.step(policy(obs))
        obs = step.obs
    assert step.truncated.all()
    assert step.log["success"].mean() >= 0.9


def test_dense_reward_of_reaching() -> None:
    env = make("PandaReach-v0", 8, randomize=False)
    env.reset(1)
    last = torch.zeros(8, 7)
    for action in random_actions(env, 30):
        step = env.step(action)
        seen = entries(env, step.final_obs)
        distance = (seen["achieved goal"] - seen["desired goal"]).square().sum(1).sqrt()
        expected = -0.2 * distance + 0.1 * (1 - torch.tanh(distance / 0.1))
        expected -= 1e-4 * ((action - last).square().sum(1) + seen["joint velocities"].square().sum(1))
        torch.testing.assert_close(step.reward, expected, atol=1e-6, rtol=1e-5)
        last = action


@pytest.mark.parametrize("env_id", IDS)
def test_sparse_reward_can_be_computed_afterwards(env_id: str) -> None:
    points = torch.tensor([[0.0, 0, 0], [0.0, 0, 0], [0.1, 0.2, 0.3], [1.0, 1, 1]])
    goals = torch.tensor([[0.0, 0, 0.024], [0.0, 0.026, 0], [0.1, 0.2, 0.3], [1.015, 1.015, 1.015]])
    assert panda.sparse_reward(points, goals).tolist() == [0, -1, 0, -1]

    env = make(env_id, 16, reward="sparse")
    policy = expert(env, noise=0.5)
    obs, seen = env.reset(0), set()
    for _ in range(100):
        step = env.step(policy(obs))
        obs = step.obs
        assert torch.equal(step.reward, panda.sparse_reward(step.final_obs[:, :3], step.final_obs[:, 3:6]))
        seen |= set(step.reward.tolist())
    assert seen == {0.0, -1.0}
    assert torch.equal(step.log["success"], step.reward + 1)


def test_pressing_on_the_cube_is_no_grasp() -> None:
    env = make("PandaLift-v0", 10, randomize=False)
    policy, obs = expert(env), env.reset(0)
    pressed = torch.zeros(10, dtype=torch.bool)
    for _ in range(60):
        action = policy(obs)
        action[:, 7] = -1.0  # comes down with its fingers shut
        obs = env.step(action).obs
        touch = (env.world.sensor("left_pad")[:, 0] > 0) & (env.world.sensor("right_pad")[:, 0] > 0)
        shut = entries(env, obs)["gripper"][:, 0] < 0.015  # the cube can force them open, and is grasped then
        assert not (env.task.rewards["grasp"].of(env.world) > 0)[shut].any()
        pressed |= touch & shut
    assert pressed.sum() >= 5


def test_a_blocked_arm_comes_back_at_once() -> None:
    """Targets do not run away from joints that the floor stops."""
    env = make("PandaReach-v0", 1)
    env.reset(0)
    down = torch.tensor([[0.0, 1, 0, 0, 0, 0, 0]])
    for _ in range(60):
        seen = entries(env, env.step(down).obs)
        assert seen["leads"].abs().max() < 0.25
    height = seen["achieved goal"][0, 2].item()
    assert 0 < height < 0.05
    for _ in range(12):
        seen = entries(env, env.step(-down).obs)
    assert seen["achieved goal"][0, 2].item() > height + 0.05


# How episodes start, and how robots differ.


def test_starts_and_goals() -> None:
    env = make("PandaLift-v0", 500)
    seen = entries(env, env.reset(0))
    for value, low, high in (
        (seen["achieved goal"][:, :2], panda_lift.START_LOW[:2], panda_lift.START_HIGH[:2]),
        (seen["desired goal"], panda_lift.GOAL_LOW, panda_lift.GOAL_HIGH),
        (env.world.joint_pos[:, :7] - env.world.default_joint_pos[:7], (-0.1,) * 7, (0.1,) * 7),
    ):
        low, high = torch.tensor(low), torch.tensor(high)
        share = (value - low) / (high - low)  # uniform in [0, 1]
        assert share.min() > -1e-5 and share.max() < 1 + 1e-5
        assert ((share.mean(0) - 0.5).abs() < 0.06).all() and ((share.std(0) - 12**-0.5).abs() < 0.03).all()
    yaw = torch.atan2(seen["cube axes"][:, 1], seen["cube axes"][:, 0])
    assert yaw.min() < -3 and yaw.max() > 3 and yaw.mean().abs() < 0.3
    noise = seen["joint positions"] - env.world.joint_pos[:, :7] + env.world.default_joint_pos[:7]
    assert 0.009 < noise.abs().max() <= 0.01 + 1e-6
    for _ in range(10):
        obs = env.step(torch.zeros(500, 8)).obs
    rest = entries(env, obs)  # the cube lies, the arm stands
    assert (rest["achieved goal"][:, 2] - 0.02).abs().max() < 1e-3
    assert (rest["achieved goal"] - seen["achieved goal"]).abs().max() < 1e-3
    assert (rest["tool"] - seen["tool"]).abs().max() < 1e-3

    goals = entries(reach := make("PandaReach-v0", 200), reach.reset(0))["desired goal"]
    low, high = torch.tensor(panda_reach.LOW), torch.tensor(panda_reach.HIGH)
    assert (goals >= low).all() and (goals <= high).all() and (goals.std(0) > 0.25 * (high - low)).all()


def test_robots_differ_only_where_asked() -> None:
    env = make("PandaLift-v0", 100)
    env.reset(0)
    pads = [env.sim.model.geom(pad).id for pad in panda.PADS]
    friction = env.world.model_field("geom_friction")[0][:, pads, 0]
    assert torch.equal(friction[:, 0], friction[:, 1])
    assert 0.5 <= friction.min() < 0.55 and 1.15 < friction.max() <= 1.2
    mass = env.world.model_field("body_mass")[0][:, env.sim.model.body("cube").id]
    assert 0.025 <= mass.min() < 0.03 and 0.09 < mass.max() <= 0.1
    assert not make("PandaLift-v0", 2, randomize=False).world.varies


def test_turned_goals() -> None:
    """The orientation that is asked for, against the site's rotation."""
    env = make("PandaReach-v0", 20, orientation=True, randomize=False)
    env.world.field("site_xmat")
    step = episode(env, expert(env), 99)
    turn = env.world.command[:, 3:]
    assert turn[:, 1].min() > 0 and turn[:, 0].min() < -0.5 < 0.5 < turn[:, 0].max()
    frame = env.world.field("site_xmat").reshape(20, -1, 3, 3)[:, env.sim.model.site("tool").id]
    torch.testing.assert_close(frame[:, 1, 0], turn[:, 1], atol=0.02, rtol=0)
    torch.testing.assert_close(frame[:, 0, 0], -turn[:, 0], atol=0.02, rtol=0)
    assert (frame[:, 2, 2] < -0.999).all()
    assert (env.task.rewards["angle"].of(env.world) < 0.03).all()
    assert step.obs.shape == (20, 42)


# The experts.


@pytest.mark.parametrize("action", panda.ACTIONS)
@pytest.mark.parametrize("env_id", IDS)
def test_expert_succeeds(env_id: str, action: str) -> None:
    env = make(env_id, 20, action=action)
    policy = expert(env)
    seen = episode(env, policy, 99).obs.clone()
    step = episode(env, expert(env), 99)
    assert torch.equal(step.obs, seen)  # the same bits
    if env_id == "PandaLift-v0":
        begin = env.sim.model.joint("cube").qposadr[0]
        height = env.world.field("qpos")[:, begin + 2]
        assert (height > 0.12).sum() >= 19 and (env.world.sensor("left_pad")[:, 0] > 0).sum() >= 19
    step = env.step(policy(step.obs))
    assert step.truncated.all() and step.log["success"].sum() >= 19
    assert step.log["episode/final distance"].median() < 0.005


def test_noise_spoils_the_expert() -> None:
    rates = []
    for noise in (0.0, 1.0, 2.0):
        env = make("PandaLift-v0", 20)
        rates.append(episode(env, expert(env, noise=noise)).log["success"].mean().item())
    assert rates[0] > rates[1] > rates[2]


def test_kinematics() -> None:
    env = make("PandaReach-v0", 1)
    model, data = env.sim.model, mujoco.MjData(env.sim.model)
    chain = Chain(model, env.task.joints[:7], "tool", torch.device("cpu"))
    site, angles = model.site("tool").id, torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) * 4 - 2
    end, axes, jacobian = chain(angles)
    for row in range(5):
        data.qpos[:7] = angles[row]
        mujoco.mj_forward(model, data)
        place, turn = torch.zeros(3, model.nv).double().numpy(), torch.zeros(3, model.nv).double().numpy()
        mujoco.mj_jacSite(model, data, place, turn, site)
        torch.testing.assert_close(end[row], torch.tensor(data.site_xpos[site]).float(), atol=1e-5, rtol=0)
        torch.testing.assert_close(axes[row].flatten(), torch.tensor(data.site_xmat[site]).float(), atol=1e-5, rtol=0)
        expected = torch.cat([torch.tensor(place), torch.tensor(turn)])[:, :7].float()
        torch.testing.assert_close(jacobian[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("env_id", ["PandaReach-v0", "PandaLift-v0"])
def test_success_is_rewarded_once_and_ends_the_episode(env_id: str) -> None:
    env = make(env_id, 16, reward="success")
    policy, obs, ended = expert(env), env.reset(0), 0
    for _ in range(110):
        step = env.step(policy(obs))
        assert torch.equal(step.reward, step.terminated.float())
        away = (step.final_obs[:, :3] - step.final_obs[:, 3:6]).norm(dim=1)
        assert torch.equal(step.terminated, away <= panda.TOLERANCE)
        over = step.terminated | step.truncated
        if bool(over.any()):
            assert torch.equal(step.log["success"][over] > 0, step.terminated[over])
        ended += int(step.terminated.sum())
        obs = step.obs
    assert ended >= 16


# What is refused.


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        (
            "PandaReach-v0",
            {"reward": "spars"},
            "reward must be one of dense, sparse, success, got 'spars'. Did you mean sparse",
        ),
        ("PandaLift-v0", {"action": "tol"}, "action must be one of joints, tool, got 'tol'. Did you mean tool"),
        ("PandaLift-v0", {"rate": 30}, "rate, of actions a second, must be one of 8, 10, 20, 25, 40, 50, got 30"),
        ("PandaLift-v0", {"reward": None}, "option reward takes text, got None"),
        ("PandaReach-v0", {"orientatoin": True}, "PandaReach-v0 has no option 'orientatoin'. Did you mean orientation"),
        ("PandaLift-v0", {"orientation": True}, "has no option 'orientation'.*reward, action, rate, randomize, folder"),
        ("PandaReach-v0", {"reward": "sparse", "orientation": True}, "sparse reward is of positions alone"),
        ("PandaLift-v0", {"folder": "/nowhere"}, "/nowhere is no model file"),
    ],
)
def test_options_that_are_wrong(env_id: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(env_id, 1, **options)


def test_a_policy_that_the_expert_corrects_within_a_limit() -> None:
    with loaded("experts") as script:
        corrected = script.Corrected
    env = make("PandaLift-v0", 5, action="tool")
    obs = env.reset(0)
    assert isinstance(obs, torch.Tensor)
    half, wanted = torch.full((5, 5), 0.5), expert(env)(obs)
    for limit in (0.0, 0.2, 2.0):
        action, _, _ = corrected(env, lambda seen: half[: len(seen)], limit).act(obs, {})
        torch.testing.assert_close(action, half + (wanted - half).clamp(-limit, limit))
    assert (wanted - half).abs().max() > 0.5
    once = corrected(env, lambda seen: half[: len(seen)], 2.0, at=1)  # the second action alone
    for expected in (half, wanted, half):
        torch.testing.assert_close(once.act(obs, {})[0], expected)


def test_how_returns_change_with_one_correction(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where the base does what the expert does nothing changes; where it flees the goal, a step towards it helps, and
    the more the longer it counts."""
    (tmp_path / "bases_of_experts.py").write_text(
        "from ctrlrl.envs.make import make_env\n"
        "from ctrlrl.envs.tasks.panda_expert import expert\n"
        "asked = expert(make_env('PandaReach-v0', num_envs=4))\n"
        "def same(observation_space, action_space): return asked\n"
        "def flees(observation_space, action_space): return lambda obs: -0.2 * asked(obs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def rows(base: str) -> list[list[float]]:
        flags = ["--correct", f"bases_of_experts:{base}", "--limit", "2", "--at", "0", "90", "500", "--episodes", "4"]
        monkeypatch.setattr("sys.argv", ["experts.py", "PandaReach-v0", *flags])
        with loaded("experts") as script:
            assert script.main() == 0
        lines = capsys.readouterr().out.splitlines()[-3:]
        return [[float(cell.strip(" %")) for cell in line.split("|")[3:7]] for line in lines]

    assert rows("same") == [[0, 100, 0, 0], [90, 100, 0, 0], [500, 0, 0, 0]]
    early, late, never = rows("flees")
    assert early[2] > late[2] > 0 and early[3] > 0 and never == [500, 0, 0, 0]
    del sys.modules["bases_of_experts"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--correct", "run", "--noise", "0.5"], "leave out --noise"),
        (["--limit", "0.2"], "leave out --limit"),
        (["--at", "2"], "leave out --at"),
        (["--correct", "run", "--at", "2"], "give --episodes 2"),
        (["--correct", "run", "--at", "-1", "--episodes", "2"], "counts actions from 0"),
    ],
)
def test_what_the_experts_would_ignore_is_refused(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["experts.py", "PandaReach-v0", "--episodes", "1", *flags])
    with loaded("experts") as script, pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_experts_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="PandaReach-v0 and PandaLift-v0, not for Cart-v0"):
        expert(make_cart(1))
    with pytest.raises(UsageError, match=r"from 0 to 2, got 2\.5"):
        expert(make("PandaReach-v0", 1), noise=2.5)


# What the page says.


@pytest.mark.parametrize(
    ("env_id", "options", "column"), [(IDS[0], {"orientation": True}, 0), (IDS[0], {}, 0), (IDS[1], {}, 1)]
)
def test_the_page_has_the_observation(env_id: str, options: dict[str, Any], column: int) -> None:
    rows = re.findall(r"^\| `([a-z ]+)` \| ([\d:]*) ?\| ([\d:]*) ?\|", PAGE, flags=re.MULTILINE)
    said = {name: places[column] for name, *places in rows if places[column]}
    names = make(env_id, 1, **options).groups["policy"].names
    if env_id == IDS[0] and not options:
        del said["turn"], said["tool axes"]
    assert said == {name: f"{place.start}:{place.stop}" for name, place in names.items()}


def test_python_on_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "panda.md", "exec"), names)
    assert names["step"].log["success"].mean() >= 0.8
