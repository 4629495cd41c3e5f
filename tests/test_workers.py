from __future__ import annotations

import json
import os
import random
import resource
import selectors
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from ctrlrl.envs.make import make_env
from ctrlrl.envs.vector import EnvState, RenderFailure, VectorEnv
from ctrlrl.envs.workers import WorkerVector
from ctrlrl.errors import EnvironmentFailure, UsageError
from tests import standins
from tests.conformance import actions_for, assert_same_steps, check_vector_env, copy_obs, copy_step, rollout

STANDIN = standins.MODULE + "ctrlrl-test/"
ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="worker processes need POSIX")


def workers(env_id: str, takes_part: bool = False, **kwargs: Any) -> Any:
    return lambda n: WorkerVector(env_id, num_envs=n, num_workers=2, takes_part=takes_part, env_kwargs=kwargs)


@pytest.fixture
def faulty() -> Iterator[Any]:
    """Makes four environments in two workers that fail at step 3 where the action is positive; closes them after."""
    made: list[WorkerVector] = []

    def make(name: str, **options: Any) -> WorkerVector:
        made.append(WorkerVector(STANDIN + name, num_envs=4, num_workers=2, env_kwargs={"above": 0.0}, **options))
        made[0].reset(0)
        return made[0]

    yield make
    for env in made:
        env.close()


def fail_row(env: VectorEnv, row: int) -> str:
    """Step until the environment `row`, and no other, fails; what the failure says."""
    action = torch.full((4, 2), -0.5)
    action[row] = 0.5
    with pytest.raises(EnvironmentFailure) as caught:
        for _ in range(3):
            env.step(action)
    return str(caught.value)


def children() -> set[str]:
    """Process ids of the children of this process, zombies too."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def is_running(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "kwargs", "ends_within"),
    [
        ("Pendulum-v1", {"max_episode_steps": 12}, 12),
        ("HalfCheetah-v5", {"max_episode_steps": 15}, 15),
        ("Humanoid-v5", {}, 60),
        ("CartPole-v1", {}, 60),
        (STANDIN + "Image-v0", {}, 60),
        (STANDIN + "MultiDiscrete-v0", {}, 60),
    ],
)
def test_workers_conform(env_id: str, kwargs: dict[str, Any], ends_within: int) -> None:
    check_vector_env(workers(env_id, **kwargs), ends_within=ends_within, reference=lambda: gym.make(env_id, **kwargs))


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", STANDIN + "MultiDiscrete-v0"])
def test_a_share_in_this_process_conforms(env_id: str) -> None:
    kwargs = {"max_episode_steps": 15} if env_id == "HalfCheetah-v5" else {}
    made = workers(env_id, takes_part=True, **kwargs)
    check_vector_env(made, ends_within=60, reference=lambda: gym.make(env_id, **kwargs))
    env, before = made(2), children()
    assert [type(worker).__name__ for worker in env._workers] == ["_Here", "_Worker"]
    env.close()
    assert len(before - children()) == 1


def test_failures_of_either_share_name_the_environment() -> None:
    for row, said in ((1, "environment 1 raised"), (2, "environment 2 (worker 1) raised")):
        env = WorkerVector(STANDIN + "Crashing-v0", num_envs=4, num_workers=2, takes_part=True, env_kwargs={"above": 0})
        env.reset(0)
        assert said in fail_row(env, row)
        assert [entry is None for entry in env.get_state().json] == [row == i for i in range(4)]
        env.close()
    env = WorkerVector(STANDIN + "Exiting-v0", num_envs=4, num_workers=2, takes_part=True, env_kwargs={"above": 0.0})
    env.reset(0)
    assert "environment 3 (worker 1) exited with code 7" in fail_row(env, 3)
    env.close()
    before = children()
    with pytest.raises(UsageError, match="Nowhere"):
        make_env("Nowhere-v0", num_envs=2, backend="parallel")
    with pytest.raises(UsageError, match="cannot use env_python"):
        make_env("CartPole-v1", num_envs=2, backend="parallel", env_python=sys.executable)
    assert children() == before


def test_processes_end_where_an_environment_of_this_one_cannot_be_closed() -> None:
    before = children()
    env = WorkerVector(STANDIN + "Unclosable-v0", num_envs=3, num_workers=3, takes_part=True, env_kwargs={"above": 0.0})
    with pytest.raises(RuntimeError, match="the window is gone"):
        env.close()
    env.close()
    assert children() == before


@pytest.mark.parametrize("backend", ["gymnasium", "workers"])
def test_why_an_environment_cannot_be_made_is_said_though_the_others_cannot_be_closed(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standins.OnlyEnv, "made", 0)
    with pytest.raises(EnvironmentFailure, match="there is one robot only"):
        make_env(STANDIN + "Only-v0", num_envs=2, backend=backend, cores=1 if backend == "workers" else None)


def test_draws_from_global_generators_are_those_of_the_seed() -> None:
    rewards = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        random.seed(seed)
        env = workers(STANDIN + "GlobalDraws-v0", takes_part=True)(4)
        env.reset(0)
        rewards.append([step.reward.tolist() for step in rollout(env, 3)])
        env.close()
    assert rewards[0] == rewards[1] != rewards[2]
    assert len({tuple(column) for column in zip(*rewards[0], strict=True)}) == 4, "each row draws its own"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="workers that fill two cores are kept to them")
def test_waiting_awake_keeps_nobody_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    awake = {}
    for cores in (1, 2, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        for takes_part in (False, True):
            env = WorkerVector("CartPole-v1", num_envs=2, num_workers=2, takes_part=takes_part)
            awake[cores, takes_part] = env._workers[1]._awake
            env.close()
    assert [key for key, value in awake.items() if value] == [(2, True), (3, False), (3, True)]


def test_state_moves_between_backends() -> None:
    ours = make_env("HalfCheetah-v5", num_envs=3, env_kwargs={"max_episode_steps": 10}, backend="gymnasium")
    theirs = workers("HalfCheetah-v5", max_episode_steps=10)(3)
    ours.reset(1)
    rollout(ours, 14)
    _, reasons = theirs.set_state(ours.get_state(), seed=1)
    assert reasons == [None] * 3
    assert_same_steps(rollout(theirs, 12), rollout(ours, 12), "going on in workers")
    theirs.close()


@pytest.mark.parametrize(("num_envs", "num_workers"), [(5, 2), (2, 9), (3, 1)])
def test_environments_are_spread_over_workers(num_envs: int, num_workers: int) -> None:
    env = WorkerVector("CartPole-v1", num_envs=num_envs, num_workers=num_workers)
    assert len(env._workers) == min(num_envs, num_workers)
    sizes = [worker.count for worker in env._workers]
    assert sum(sizes) == num_envs
    assert max(sizes) - min(sizes) <= 1
    assert len(copy_obs(env.reset(0))) == num_envs
    env.close()


def test_own_state_and_reasons_come_through() -> None:
    env = workers(STANDIN + "OwnState-v0")(2)
    env.reset(0)
    rollout(env, 6)
    state = env.get_state()
    obs, reasons = env.set_state(EnvState([state.json[0], None], state.arrays), seed=1)
    assert reasons == [None, "no state was saved"]
    assert obs.tolist() == [[1, 2], [0, 0]]
    env.close()


def test_pictures_come_from_environment_0() -> None:
    env = WorkerVector(STANDIN + "Drawn-v0", num_envs=2, num_workers=2, render=True)
    with pytest.raises(RenderFailure, match=r"cannot be drawn(?s:.*)before calling `env\.reset") as caught:
        env.render()
    assert caught.value.cause.startswith("ResetNeeded: ")
    env.reset(0)
    picture = env.render()
    assert picture.dtype == np.uint8
    assert picture.tolist() == np.arange(72).reshape(4, 6, 3).tolist()
    env.close()
    unseen = workers(STANDIN + "Drawn-v0")(1)
    with pytest.raises(UsageError, match="make it with render=True"):
        unseen.render()
    unseen.close()


# --- failures ---------------------------------------------------------------------------------------------------------


def test_environment_that_raises(faulty: Any) -> None:
    env = faulty("Crashing-v0")
    message = fail_row(env, 2)
    assert "environment 2 (worker 1) raised" in message
    assert "RuntimeError: the simulator lost its marbles" in message
    assert "in fail" in message, "the environment's own traceback is there"
    assert [entry is None for entry in env.get_state().json] == [False, False, True, False]
    with pytest.raises(EnvironmentFailure, match="must be made anew"):
        env.step(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Exiting-v0", ["environment 3 (worker 1) exited with code 7", "last words of the simulator"]),
        ("Segfaulting-v0", ["environment 3 (worker 1) was ended by signal 11", "standins.py", "in fail"]),
    ],
)
def test_worker_that_dies(faulty: Any, name: str, said: list[str]) -> None:
    env = faulty(name)
    message = fail_row(env, 3)
    for words in said:
        assert words in message
    state = env.get_state()
    assert [entry is None for entry in state.json] == [False, False, True, True]
    assert len(state.arrays) == 4
    healthy = workers(STANDIN + "Exiting-v0", above=0.0)(4)
    assert [reason is None for reason in healthy.set_state(state, seed=1)[1]] == [True, True, False, False]
    healthy.close()


def test_what_healthy_workers_held_goes_on_exactly(faulty: Any) -> None:
    env, reference = faulty("Crashing-v0"), make_env(STANDIN + "Crashing-v0", num_envs=4, env_kwargs={"above": 0.9})
    fail_row(env, 2)  # in its third step; environment 3, in the same worker, has made two
    other = workers(STANDIN + "Crashing-v0", above=0.9)(4)
    _, reasons = other.set_state(env.get_state(), seed=1)
    assert reasons == [None, None, "no state was saved", None]
    action = torch.full((4, 2), -0.5)
    reference.reset(0)
    undisturbed = [copy_step(reference.step(action)) for _ in range(23)]
    assert any(bool(step.terminated[row]) for row in (0, 1, 3) for step in undisturbed[3:])
    for index in range(20):
        step = other.step(action)
        for row, made in ((0, 3), (1, 3), (3, 2)):
            expected = undisturbed[made + index]
            for field in ("obs", "reward", "terminated", "final_obs"):
                assert torch.equal(getattr(step, field)[row], getattr(expected, field)[row]), (field, row, index)
    other.close()


def test_worker_that_hangs_is_located_and_killed(faulty: Any) -> None:
    env = faulty("Hanging-v0", timeout=1.5)
    hanging = env._workers[0]._process.pid
    message = fail_row(env, 0)
    assert "environment 0 (worker 0) gave no answer within 1.5 s and was killed" in message
    assert "standins.py" in message
    assert "in fail" in message
    assert not is_running(hanging)
    assert [entry is None for entry in env.get_state().json] == [True, True, False, False]


def test_worker_killed_from_outside(faulty: Any) -> None:
    env = faulty("Crashing-v0")
    os.kill(env._workers[1]._process.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFailure, match=r"worker 1 \(environments 2 to 3\) was ended by signal 9"):
        env.step(torch.full((4, 2), -0.5))
    assert [entry is None for entry in env.get_state().json] == [False, False, True, True]


def test_printing_does_not_disturb_the_protocol(faulty: Any, capfd: pytest.CaptureFixture[str]) -> None:
    env = faulty("Printing-v0")
    for action in [torch.full((4, 2), 0.5)] * 4:
        step = env.step(action)
    assert step.obs.isfinite().all()
    env.close()
    captured = capfd.readouterr()
    assert captured.out == ""
    # two environments of worker 0, four steps each; what worker 1 prints is not passed on
    assert captured.err.count('{"raised": "not really", "row": 0}') == 8
    assert captured.err.count('{"alive": true}') == 8


def test_interrupted_step_leaves_the_environments_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    env, reference = workers("Pendulum-v1")(2), make_env("Pendulum-v1", num_envs=2, backend="gymnasium")
    env.reset(0)
    reference.reset(0)
    actions = actions_for(env, 2)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(selectors.DefaultSelector, "select", interrupt)
        patched.setattr(env._workers[0], "_awake", False)
        with pytest.raises(KeyboardInterrupt):
            env.step(actions[0])
    reference.step(actions[0])
    assert env.get_state().json == reference.get_state().json  # the digest of what was observed, among others
    assert_same_steps([env.step(actions[1])], [reference.step(actions[1])], "after the interrupt")
    env.close()


def test_many_open_files_do_not_matter() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"this system allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if soft < 1200 else soft, hard))
    fillers = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while fillers[-1] < 1024:
            fillers.append(os.dup(fillers[0]))
        env = workers("CartPole-v1")(2)
        assert len(copy_obs(env.reset(0))) == 2
        env.close()
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- beginnings and ends ----------------------------------------------------------------------------------------------


def test_close_leaves_no_process_and_no_file() -> None:
    fds, before = len(os.listdir("/proc/self/fd")), children()
    files = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    env = workers("CartPole-v1")(4)
    env.reset(0)
    assert len(children() - before) == 2
    env.close()
    env.close()
    assert children() == before
    del env  # and with it the memory map
    assert len(os.listdir("/proc/self/fd")) == fds
    assert not os.path.isdir("/dev/shm") or set(os.listdir("/dev/shm")) <= files


def test_a_refusal_leaves_no_process() -> None:
    before = children()
    with pytest.raises(UsageError):
        make_env("Nowhere-v0", num_envs=2, backend="workers")
    assert children() == before


@pytest.mark.parametrize("hanging", [False, True])
def test_workers_end_when_the_parent_is_killed(hanging: bool) -> None:
    code = """
import torch
from ctrlrl.envs.workers import WorkerVector
env = WorkerVector("tests.standins:ctrlrl-test/Hanging-v0", num_envs=2, num_workers=2)
env.reset(0)
print(*[worker._process.pid for worker in env._workers], flush=True)
if HANGING:
    for _ in range(3):
        env.step(torch.zeros(2, 2))
input()
"""
    code = code.replace("HANGING", str(hanging))
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(is_running(pid) for pid in pids)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def test_the_terminals_interrupt_does_not_reach_workers() -> None:
    env = workers("CartPole-v1")(2)
    groups = {os.getpgid(worker._process.pid) for worker in env._workers}
    assert os.getpgid(0) not in groups
    env.close()


# --- another interpreter ----------------------------------------------------------------------------------------------


def test_another_interpreter_needs_neither_torch_nor_ctrlrl(tmp_path: Path) -> None:
    (tmp_path / "foreign.py").write_text(
        "import sys, gymnasium as gym, numpy as np\n"
        "class Env(gym.Env):\n"
        "    observation_space = gym.spaces.Box(0, 1, (3,), np.float64)\n"
        "    action_space = gym.spaces.Discrete(2)\n"
        "    def reset(self, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        names = [name.partition('.')[0] for name in sys.modules]\n"
        "        return np.array(['torch' in names, 'ctrlrl' in names, 'spaces' in names], float), {}\n"
        "    def step(self, action): return self.reset()[0], 0.0, False, False, {}\n"
        "gym.register('Foreign-v0', entry_point=Env)\n"
    )
    code = (
        "import sys; from ctrlrl.envs.make import make_env\n"
        "env = make_env('foreign:Foreign-v0', num_envs=2, env_python=sys.executable)\n"
        "print(env.reset(0).tolist()); env.close()"
    )
    # The worker finds the module in the current folder, as `python -m` would.
    process = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == [[0.0, 0.0, 0.0]] * 2


def test_interpreters_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not run as a Python interpreter"):
        make_env("CartPole-v1", env_python=tmp_path / "python")
    venv.create(tmp_path / "bare", symlinks=True)
    bare = tmp_path / "bare" / "bin" / "python"
    with pytest.raises(UsageError, match=r"lacks numpy and gymnasium. Install: .*bin/python -m pip install numpy"):
        make_env("CartPole-v1", env_python=bare)
    not_python = tmp_path / "not-python"
    not_python.write_text("#!/bin/sh\necho hello\n")
    not_python.chmod(0o755)
    with pytest.raises(UsageError, match="does not run as a Python interpreter"):
        make_env("CartPole-v1", env_python=not_python)


def test_id_registered_in_this_process_only() -> None:
    gym.register("ctrlrl-test/OnlyHere-v0", entry_point=standins.WalkEnv)
    try:
        with pytest.raises(UsageError, match="registered in this process, but not in its worker processes"):
            make_env("ctrlrl-test/OnlyHere-v0", backend="workers")
    finally:
        del gym.registry["ctrlrl-test/OnlyHere-v0"]


def test_actions_reach_the_right_environment() -> None:
    env = WorkerVector(STANDIN + "Counting-v0", num_envs=5, num_workers=2, env_kwargs={"discrete": True})
    env.reset(0)
    step = env.step(torch.tensor([2, 3, 4, 3, 2]))
    np.testing.assert_array_equal(step.action.numpy(), [2, 3, 4, 3, 2])
    with pytest.raises(EnvironmentFailure, match=r"environment 4 \(worker 1\) raised(?s:.*)\(9\) is not in Discrete"):
        env.step(torch.tensor([2, 3, 4, 3, 9]))
    env.close()
