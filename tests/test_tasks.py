"""Writing a task: registering it, running it from the command line, events, and the page that shows how."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlrl.__main__ import main
from ctrlrl.cli.main import run as ctrlrl_command
from ctrlrl.envs import events
from ctrlrl.envs.make import has_native, list_envs, make_env
from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.sim_vector import SimVector, simulate
from ctrlrl.envs.spec import Action, Event, SimTask
from ctrlrl.envs.tasks import registry
from ctrlrl.envs.tasks.registry import is_robot_task, register_task
from ctrlrl.envs.world import World
from ctrlrl.errors import CtrlrlError, UsageError
from tests.scripts import ROOT
from tests.simulations import cart_task, make_cart

PAGE = (ROOT / "docs/tasks.md").read_text()
CART_MODULE = """
from ctrlrl.envs.tasks.registry import register_task
from tests.simulations import cart_task

def cart(name, seconds=0.6, loud=True, size=3, note="", folder=None):
    return cart_task(name=name, episode_seconds=seconds)

register_task("OwnCart-v0", cart)
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, from which modules are imported; what they register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "ROBOT_TASKS", registry.ROBOT_TASKS)
    known, modules = dict(registry.ROBOT_TASKS), set(sys.modules)
    yield tmp_path
    forget(known, modules)


def forget(known: dict[str, Any], modules: set[str]) -> None:
    """As in a process that has not imported the modules."""
    for name in set(registry.ROBOT_TASKS) - set(known):
        del registry.ROBOT_TASKS[name]
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == Path.cwd():
            del sys.modules[name]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


# Registering.


def test_a_module_that_registers_a_task(workplace: Path) -> None:
    (workplace / "own_cart.py").write_text(CART_MODULE)
    assert not is_robot_task("OwnCart-v0") and "own_cart" not in sys.modules
    assert is_robot_task("own_cart:OwnCart-v0") and not has_native("own_cart:OwnCart-v0")
    env = make_env("own_cart:OwnCart-v0", num_envs=3, env_kwargs={"seconds": 1})
    assert isinstance(env, SimVector) and env.name == "own_cart:OwnCart-v0" and env.task.episode_seconds == 1
    assert env.reset(0)["policy"].shape == (3, 5)
    assert is_robot_task("OwnCart-v0")  # in this process, from now on
    assert "OwnCart-v0" in {info.id for info in list_envs()}
    importlib.reload(sys.modules["own_cart"])  # registers the same again
    with pytest.raises(UsageError, match="leave out env_python"):
        make_env("OwnCart-v0", env_python=sys.executable)


BAD_OPTIONS = {
    "unknown": ({"secons": 1.0}, "has no option 'secons'. Did you mean seconds"),
    "text for a number": ({"seconds": "1"}, "seconds takes a number, got '1'"),
    "number for a switch": ({"loud": 1}, "loud takes true or false, got 1"),
    "switch for a number": ({"size": True}, "size takes an integer, got True"),
    "number for text": ({"note": 1.5}, "note takes text, got 1.5"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_options_are_checked(workplace: Path, options: dict[str, Any], message: str) -> None:
    (workplace / "own_cart.py").write_text(CART_MODULE)
    with pytest.raises(UsageError, match=message):
        make_env("own_cart:OwnCart-v0", env_kwargs=options)
    make_env("own_cart:OwnCart-v0", env_kwargs={"folder": "anything goes where the default is none"})


def test_ids_and_functions_refused(workplace: Path) -> None:
    def fits(name: str) -> SimTask:
        return cart_task(name=name)

    def needs_more(name: str, robot: str) -> SimTask:
        return cart_task(name=name)

    for env_id in ("Pendulum-v1", "Go1VelocityFlat-v0"):
        with pytest.raises(UsageError, match=f"there is an environment {env_id} already"):
            register_task(env_id, fits)
    with pytest.raises(UsageError, match="has no colon"):
        register_task("module:Cart-v0", fits)
    with pytest.raises(UsageError, match="without one are: name, robot"):
        register_task("Cart-v0", needs_more)
    with pytest.raises(UsageError, match="without one are: none"):
        register_task("Cart-v0", lambda: fits("Cart-v0"))
    assert "Cart-v0" not in registry.ROBOT_TASKS


def test_modules_that_fail_say_why(workplace: Path) -> None:
    (workplace / "broken.py").write_text("import no_such_package\n")
    (workplace / "taken.py").write_text(CART_MODULE.replace("OwnCart-v0", "Pendulum-v1"))
    (workplace / "own_cart.py").write_text(CART_MODULE)
    for env_id, message in (
        ("broken:Cart-v0", "no_such_package"),
        ("taken:Pendulum-v1", "there is an environment Pendulum-v1 already"),
        ("missing:Cart-v0", "there is no module 'missing'"),
        ("own_cart:OwnCar-v0", "no environment 'OwnCar-v0'.*Did you mean OwnCart-v0"),
    ):
        with pytest.raises(CtrlrlError, match=message):
            make_env(env_id)


def test_the_command_finds_modules_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["ctrlrl", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert sys.path[-1] == str(tmp_path)


# The page.


def test_the_page_is_true(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its file, what it does with it, and its commands; then evaluation and resuming as in other processes."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    known, modules = dict(registry.ROBOT_TASKS), set(sys.modules)
    file, *uses = blocks("python")
    assert len(uses) == 2
    (workplace / "lever.py").write_text(file)
    names: dict[str, Any] = {"torch": torch}
    for block in uses:
        exec(compile(block.replace("4_096", "512"), "tasks.md", "exec"), names)
    out = capsys.readouterr().out
    for figure in ("reward/near", "reward/jerk", "error", "level"):
        assert f"episode/{figure}" in out
    assert names["env"].groups["policy"].size == 6
    forget(known, modules)
    commands = [line.partition("#")[0] for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 3
    for command in commands:
        brief = re.sub(r"--steps [\d_]+", "--steps 512", command) + " --no-video" * ("train" in command)
        assert ctrlrl_command(shlex.split(brief)[1:]) == 0, command
        forget(known, modules)
    assert ctrlrl_command(["resume", "runs/lever", "--steps", "1024"]) == 0


def test_the_page_lists_all_events() -> None:
    listed = set(re.findall(r"^\| `(\w+)\(", PAGE, flags=re.MULTILINE))
    public = {
        name
        for name, value in vars(events).items()
        if callable(value) and getattr(value, "__module__", "") == events.__name__ and not name.startswith("_")
    }
    assert listed == public


MISTAKES = {
    "reward near": (r"w: torch.exp\(.*\), 1.0", "w: w.joint_vel, 1.0"),
    "shape (2, size)": (r'"speed": Obs\(lambda w: w.joint_vel\)', '"error": Obs(error)'),
    "termination too fast": (r"w.joint_vel\[:, 0\].abs\(\) > 30", "w.joint_vel[:, 0]"),
    "no joint": (r'joints=\["hinge"\]', 'joints=["hing"]'),
    "event kick": (r", every=\(1, 3\)", ""),
    "two ways": (r'"level": lambda w: .*', '"level": lambda w: w.memory("level", 1)[:, 0],'),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_messages_of_the_page(said: str) -> None:
    """Each mistake of the table gives the message beside it."""
    wrong, right = MISTAKES[said]
    text, count = re.subn(wrong, lambda _: right, blocks("python")[0].replace("register_task(", "str("))
    assert count == 1
    names: dict[str, Any] = {}
    exec(compile(text.replace('str("Lever-v0", lever)', ""), "tasks.md", "exec"), names)
    with pytest.raises(UsageError) as raised:
        simulate(names["lever"]("Lever-v0"), 2)
    assert said in str(raised.value) and f"`{raised.value}`" in PAGE


# Events.


def cart_with(when: Any, num_envs: int = 60, **changes: events.Do) -> SimVector:
    every = (0.02, 0.02) if when == "interval" else None
    return make_cart(num_envs, events={name: Event(when, do, every=every) for name, do in changes.items()})


def own(env: SimVector, field: str, index: int) -> Tensor:
    return env.world.model_field(field)[0][:, index].clone()


def test_events_on_joints() -> None:
    env = cart_with(
        "startup",
        damping=events.joint_damping(["hinge"], (0.5, 2.0)),
        armature=events.armature(["rail", "hinge"], (1.0, 1.5)),
        friction=events.joint_friction(["rail"], (0.1, 0.3)),
    )
    env.reset(0)
    model = env.sim.model
    damping = own(env, "dof_damping", 1) / model.dof_damping[1]
    assert 0.5 <= damping.min() < 0.6 and 1.8 < damping.max() <= 2
    assert (own(env, "dof_damping", 0) == model.dof_damping[0]).all()
    loss = own(env, "dof_frictionloss", 0)
    assert 0.1 <= loss.min() < 0.12 and 0.28 < loss.max() <= 0.3
    assert (own(env, "dof_frictionloss", 1) == 0).all()
    with pytest.raises(UsageError, match=r"no joint 'hing'.*Did you mean hinge"):
        cart_with("startup", damping=events.joint_damping(["hing"], (1, 1)))


def test_center_of_mass_along_an_axis() -> None:
    env = cart_with("startup", center=events.center_of_mass("pole", (-0.1, 0.1), along="xz"))
    env.reset(0)
    moved = own(env, "body_ipos", 2) - torch.from_numpy(env.sim.model.body_ipos[2])
    assert (moved[:, 1] == 0).all()
    for axis in (0, 2):
        assert -0.1 <= moved[:, axis].min() < -0.08 and 0.08 < moved[:, axis].max() <= 0.1
    assert not torch.equal(moved[:, 0], moved[:, 2])


def test_motor_constant_scales_all_forces_and_strength_the_largest() -> None:
    """A motor that takes efforts: half the constant is half of any force; half the strength cuts large ones only."""
    for do, small, large in (
        (events.motor_constant((0.5, 0.5)), 0.5, 0.5),
        (events.motor_strength((0.5, 0.5)), 1.0, 25 / 36),
    ):
        forces = []
        for change in ({}, {"motor": Event("startup", do)}):
            task = cart_task(events=change, action=Action(["rail"], lambda w, a: w.control(40 * a)))
            actuator = task.model.actuator("rail")
            actuator.gainprm, actuator.biastype = [1.0] + [0.0] * 9, mujoco.mjtBias.mjBIAS_NONE
            actuator.ctrlrange, actuator.forcerange = [-40, 40], [-50, 50]
            env = SimVector(task, BatchSim(task.model.compile(), 2))
            force = env.sim.field("qfrc_actuator")[:, 0]  # live from now on
            env.reset(0)
            env.step(torch.tensor([[0.25], [0.9]]))
            forces.append(force)
        torch.testing.assert_close(forces[0].float(), torch.tensor([10.0, 36.0]))
        torch.testing.assert_close((forces[1] / forces[0]).float(), torch.tensor([small, large]))


def test_bias_is_kept_for_the_term_to_add() -> None:
    env = cart_with("startup", off=events.bias("place bias", (-0.1, 0.1), size=2))
    env.reset(0)
    first = env.world.memory("place bias", 2, keep=True).clone()
    assert first.abs().max() <= 0.1 and first.std() > 0.04
    for _ in range(40):
        env.step(torch.ones(60, 1))
    assert torch.equal(env.world.memory("place bias", 2, keep=True), first)


def test_mass_at_reset_reaches_what_mujoco_derives() -> None:
    """Constants of the model follow at each episode's start, and the state that the other events set is kept."""
    env = make_cart(
        4,
        events={
            "start": Event("reset", events.joint_offsets((-0.1, 0.1))),
            "mass": Event("reset", events.mass("cart", (0.5, 2.0))),
        },
        terminations={},
    )
    invweight, _ = env.world.model_field("dof_invweight0")
    env.reset(0)
    before = own(env, "body_mass", 1)
    for _ in range(30):
        step = env.step(torch.zeros(4, 1))
    assert step.truncated.all()
    assert (own(env, "body_mass", 1) != before).all() and (env.sim.field("qpos")[:, 0] != 0).all()
    assert env.sim.field("qpos")[:, 0].abs().max() <= 0.1
    model = cart_task().model.compile()
    for row in range(4):
        for field in ("body_mass", "body_inertia"):
            getattr(model, field)[:] = env.world.model_field(field)[0][row].numpy()
        mujoco.mj_setConst(model, mujoco.MjData(model))
        np.testing.assert_allclose(invweight[row], model.dof_invweight0, rtol=1e-12)


# What the framework refuses.


def test_memories_are_asked_for_in_one_way() -> None:
    def both(first: dict[str, Any], second: dict[str, Any]) -> None:
        def track(w: World) -> None:
            w.memory("level", **first)
            w.memory("level", **second)

        make_cart(2, track=track)

    both({"size": 1}, {"size": 1})
    for other in ({"size": 2}, {"size": 1, "keep": True}):
        with pytest.raises(UsageError, match="memory 'level' in two ways"):
            both({"size": 1}, other)


def test_unknown_moments_and_other_timesteps() -> None:
    with pytest.raises(UsageError, match="event push must happen at startup, reset or interval, not at 'restart'"):
        cart_with("restart", push=lambda w, rows: None)
    task = cart_task(timestep=0.005)
    with pytest.raises(UsageError, match=r"wants steps of 0.005 s, its model was compiled with 0.01"):
        SimVector(task, BatchSim(task.model.compile(), 1))
    assert simulate(task, 1).sim.model.opt.timestep == 0.005


def test_curricula_draw_numbers_of_their_own() -> None:
    """What a curriculum draws is used up: it is not what the reset events see, nor the same each time."""
    drawn: list[Tensor] = []
    started: list[Tensor] = []
    env = make_cart(
        5,
        terminations={},
        curriculum=lambda w, rows: drawn.append(w.random.uniform(1)[:, 0].clone()),
        events={"start": Event("reset", lambda w, rows: started.append(w.random.uniform(1)[:, 0].clone()))},
    )
    drawn.clear()
    started.clear()
    env.reset(0)
    for _ in range(60):
        env.step(torch.zeros(5, 1))
    assert len(drawn) == 2 and len(started) == 3  # at the ends of two episodes; at the starts of three
    numbers = torch.stack(drawn + started)
    assert len(numbers.unique()) == numbers.numel()
