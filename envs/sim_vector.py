"""A task over a simulation as a vector environment, on a CPU or a GPU: the same code for both."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.gymnasium_backend import picture
from ctrlrl.envs.observations import Delay, Group, require, require_figure
from ctrlrl.envs.sim import READ_BY_SET_CONST, BatchSim, Sim
from ctrlrl.envs.spec import Event, SimTask
from ctrlrl.envs.tasks.registry import make_robot_task
from ctrlrl.envs.vector import EnvState, Step, VectorEnv, VectorGoals, derive_seeds, require_as_many, seed_per_env
from ctrlrl.envs.viewing import Grid
from ctrlrl.envs.worker import draw
from ctrlrl.envs.world import World, initial_qpos
from ctrlrl.errors import EnvironmentFailure, UsageError
from ctrlrl.mirror import Mirror, ReflectedBox, Reflection

_METHOD = "simulation"


class SimVector(VectorEnv):
    """A `SimTask` behind the vector contract.

    `Step.log` has, where an episode ended: `episode/reward/NAME`, the sum of each weighted term over it;
    `episode/NAME`, the mean of each of the task's metrics, and its outcomes, of which `success` is called just that;
    on a GPU `episode/overflow`, 1 where contacts or constraints found no memory.
    NaN elsewhere; where none ended, a CPU's steps have no log at all.

    On a GPU nothing waits for the device.

    Args:
        task: what to simulate.
        sim: simulations of `task.model`, compiled.
        render: give pictures of environment 0.

    Raises:
        UsageError: a term gives what it should not, by name; the model lacks what the task names.
    """

    def __init__(self, task: SimTask, sim: Sim, *, render: bool = False) -> None:
        if sim.model.opt.timestep != task.timestep:
            raise UsageError(
                f"the task {task.name} wants steps of {task.timestep} s, its model was compiled with "
                f"{sim.model.opt.timestep}; `physics(task)` compiles it as the task says"
            )
        self.task, self.sim = task, sim
        self._renders = render
        self._grid: Grid | None = None
        self.name, self.num_envs, self.device = task.name, sim.num_sims, sim.device
        self.control_dt = task.timestep * task.substeps
        self.may_be_invalid = True
        self._limit = max(1, round(task.episode_seconds / self.control_dt))
        size = len(task.action.names)
        self.world = w = World(
            sim,
            self.control_dt,
            joints=task.joints,
            actions=size,
            commands=0 if task.command is None else task.command.size,
            home=initial_qpos(sim.model, task.pose),
        )
        self._on_cpu = self.device.type == "cpu"
        n, device = self.num_envs, self.device
        self._weights = torch.tensor([term.weight for term in task.rewards.values()], device=device)
        self._ramps = [
            (i, term.weight, *term.ramp) for i, term in enumerate(task.rewards.values()) if term.ramp is not None
        ]
        self._labels = [f"episode/reward/{name}" for name in task.rewards] + [f"episode/{m}" for m in task.metrics]
        self._sums = torch.zeros(n, len(self._labels), device=device)
        self._wait = {name: torch.zeros(n, 1, device=device) for name in self._intervals()}
        self._command_wait = torch.zeros(n, 1, device=device)
        self._action_delay = Delay(w, size, task.action.delay) if task.action.delay != (0, 0) else None
        self._begun = False
        self._failure: EnvironmentFailure | None = None
        self._resets_models = False
        """Whether an event changes models at an episode's start, on whose fields others depend."""
        self._rehearse()
        mirror = task.mirror
        seen = {} if mirror is None else mirror.observations
        self.action_space = _box(1.0, size, None if mirror is None else mirror.action)
        spaces: dict[str, gym.Space[Any]] = {k: _box(np.inf, g.size, seen.get(k)) for k, g in self.groups.items()}
        self.observation_space = gym.spaces.Dict(spaces) if len(spaces) > 1 else next(iter(spaces.values()))
        if task.goals is not None and len(spaces) == 1:
            names = self.groups[task.policy_group].names
            achieved, desired = names[task.goals.achieved], names[task.goals.desired]
            self.goals = VectorGoals(achieved=achieved, desired=desired, reward=task.goals.reward)

    # --- the contract -------------------------------------------------------------------------------------------------

    def reset(self, seed: int | Sequence[int] | None = None) -> dict[str, Tensor] | Tensor:
        seeds = [own for own in seed_per_env(seed, self.num_envs) if own is not None]
        if not self._begun and not seeds:
            seeds = derive_seeds(int(np.random.SeedSequence().generate_state(1)[0]), self.num_envs)
        self._begun = True
        everything = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        with self._guarded():
            if seeds:
                self.world.random.seed(range(self.num_envs), seeds)
                self.world.steps.zero_()
                self._ramp()
                self._start_up(everything)
            self._seen = self._begin(everything)
        return self._bare(self._seen)

    def step(self, action: Tensor) -> Step:
        if not self._begun:
            raise UsageError(f"{self.name}: call reset before step")
        if action.shape != self.world.action.shape:
            raise UsageError(
                f"{self.name} takes actions of shape {tuple(self.world.action.shape)}, got {tuple(action.shape)}"
            )
        with self._guarded(), self._one_thread():
            return self._step(action.detach())

    def get_state(self) -> EnvState:
        if not self._begun:
            return super().get_state()
        arrays = {name: value.cpu().numpy() for name, value in self._state().items()}
        json: list[dict[str, Any] | None] = [
            {"method": _METHOD, "steps": int(self.world.steps)} for _ in range(self.num_envs)
        ]
        return EnvState(json, [{k: np.array(v[row]) for k, v in arrays.items()} for row in range(self.num_envs)])

    def set_state(self, state: EnvState, *, seed: int) -> tuple[dict[str, Tensor] | Tensor, list[str | None]]:
        require_as_many(self, state)
        first = self.reset(derive_seeds(seed, self.num_envs))
        own = self._state()
        reasons = [self._why_not(*row, own) for row in zip(state.json, state.arrays, strict=True)]
        goes_on = torch.tensor([reason is None for reason in reasons], device=self.device)
        if not bool(goes_on.any()):
            return first, reasons
        saved = {name: value.clone() for name, value in own.items()}
        for row in goes_on.nonzero().flatten().tolist():
            json, arrays = state.json[row], state.arrays[row]
            assert json is not None
            self.world.steps.fill_(json["steps"])
            for name, value in saved.items():
                value[row] = torch.as_tensor(arrays[name], device=self.device)
        simulations = {name: value for name, value in saved.items() if name.startswith("sim/")}
        for name, value in own.items():
            if name not in simulations:
                value[goes_on] = saved[name][goes_on]
        if self.world.varies:
            self.sim.set_const(goes_on)
        self.sim.set_state(goes_on, {name.removeprefix("sim/"): value for name, value in simulations.items()})
        self.world.refresh()
        self._ramp()
        return self._bare({name: value.clone() for name, value in self._seen.items()}), reasons

    def scene(self, row: int) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model, data = self._scene
        for name in ("qpos", "qvel", "mocap_pos", "mocap_quat"):
            getattr(data, name)[:] = self.sim.field(name)[row].cpu().numpy()
        mujoco.mj_forward(model, data)
        return model, data

    @functools.cached_property
    def _scene(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = self.task.model.compile()
        return model, mujoco.MjData(model)

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return picture(self.name, self._renders, lambda: draw(self._draw))

    def _draw(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if self._grid is None:
            self._grid = Grid(self, 1, 1)
        return self._grid.draw()

    def close(self) -> None:
        if self._grid is not None:
            self._grid.close()
            self._grid = None
        self.sim.close()

    # --- a step -------------------------------------------------------------------------------------------------------

    def _step(self, action: Tensor) -> Step:
        w, task = self.world, self.task
        w.random.begin("step")
        for name, event in self._intervals().items():
            self._happen(name, event)
            w.refresh()
        w.last_action.copy_(w.action)
        applied = action.to(self.device, torch.float32).clamp(-1.0, 1.0)
        w.action.copy_(applied)
        task.action.apply(w, w.action if self._action_delay is None else self._action_delay.push(w.action))
        self.sim.step(task.substeps)
        w.refresh()
        w.elapsed += 1
        w.steps += 1
        self._ramp()
        if task.track is not None:
            task.track(w)
        diverged = self.sim.diverged()
        terminated, truncated = self._terminated(), w.elapsed >= self._limit
        w.terminated = terminated
        reward = self._reward()
        if task.command is not None and task.command.every is not None:
            self._command_wait -= w.dt
            self._draw_command(self._command_wait[:, 0] <= 0)
        final = {name: group.observe(w) for name, group in self.groups.items()}
        w.random.end()

        over = terminated | truncated
        valid = torch.ones_like(over)
        if diverged is not None:
            valid = ~diverged
            reward = torch.where(valid, reward, 0.0)
            terminated, truncated, over = terminated & valid, truncated & valid, over | diverged
        obs, log = final, {}
        if not self._on_cpu or bool(over.any()):
            log = self._log(over & valid)
            if task.curriculum is not None:
                w.random.begin("curriculum")
                task.curriculum(w, over & valid)
                w.random.end(over & valid)
            obs = {k: torch.where(over[:, None], new, final[k]) for k, new in self._begin(over).items()}
            if diverged is not None:  # nothing that was seen of it is to be relied on
                final = {k: torch.where(diverged[:, None], obs[k], value) for k, value in final.items()}
        self._seen = obs
        return Step(
            obs=self._bare(obs),
            action=applied,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            final_obs=self._bare(final),
            valid=valid,
            log=log,
        )

    def _terminated(self) -> Tensor:
        ended = [term(self.world) for term in self.task.terminations.values()]
        if not ended:
            return torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        return ended[0] if len(ended) == 1 else torch.stack(ended).any(0)

    def _reward(self) -> Tensor:
        w, task = self.world, self.task
        terms = [term.of(w) for term in task.rewards.values()]
        metrics = [metric(w) for metric in task.metrics.values()]
        values = torch.stack(terms + metrics, 1)
        weighted = values[:, : len(terms)].mul_(self._weights)
        self._sums += values
        reward = weighted.sum(1)
        if task.reward_floor is not None:
            reward.clamp_(min=task.reward_floor)
        return reward.mul_(task.reward_scale) if task.reward_scale != 1.0 else reward

    def _ramp(self) -> None:
        for i, start, end, steps in self._ramps:
            self._weights[i] = start + (end - start) * (self.world.steps / steps).clamp(max=1.0)

    def _log(self, ended: Tensor) -> dict[str, Tensor]:
        """Figures of the episodes that ended where `ended` (N,) bool."""
        w, rewards = self.world, len(self.task.rewards)
        sums = self._sums.clone()
        sums[:, :rewards] *= self.task.reward_scale
        sums[:, rewards:] /= w.elapsed[:, None].clamp(min=1)
        figures = torch.where(ended[:, None], sums, torch.nan).unbind(1)
        log = dict(zip(self._labels, figures, strict=True))
        overflow = self.sim.overflow()
        if overflow is not None:
            log["episode/overflow"] = torch.where(ended, overflow.to(torch.float32), torch.nan)
        for name, outcome in self.task.outcomes.items():
            log[name if name == "success" else f"episode/{name}"] = torch.where(ended, outcome(w), torch.nan)
        return log

    # --- episodes -----------------------------------------------------------------------------------------------------

    def _start_up(self, rows: Tensor) -> None:
        w = self.world
        w.begin(rows, all_memory=True)
        w.random.begin("startup")
        for event in self.task.events.values():
            if event.when == "startup":
                event.do(w, rows)
        w.random.end(rows)
        if w.varies:
            self.sim.set_const(rows)

    def _begin(self, rows: Tensor) -> dict[str, Tensor]:
        """Start new episodes where `rows`; returns first observations, which count there only."""
        w, task = self.world, self.task
        w.random.begin("reset", rows)
        w.begin(rows, all_memory=False)
        self._sums.masked_fill_(rows[:, None], 0.0)
        self.sim.reset(rows)
        w.write("qpos", rows, w.home.expand(self.num_envs, -1))
        for event in task.events.values():
            if event.when == "reset":
                event.do(w, rows)
        if self._resets_models:
            self.sim.set_const(rows)
        for name, event in self._intervals().items():
            self._set_wait(self._wait[name], rows, event.every)
        if self._action_delay is not None:
            self._action_delay.begin(w, rows, w.action)
        w.refresh()
        task.action.apply(w, w.action)
        self.sim.forward(rows)
        w.refresh()
        if task.command is not None:
            self._draw_command(rows)
        first = {name: group.first(w, rows) for name, group in self.groups.items()}
        w.random.end(rows)
        return first

    def _draw_command(self, rows: Tensor) -> None:
        w, command = self.world, self.task.command
        assert command is not None
        w.command.copy_(torch.where(rows[:, None], command.draw(w), w.command))
        self._set_wait(self._command_wait, rows, command.every)

    def _happen(self, name: str, event: Event) -> None:
        """An event of the kind `interval`, where its time has come."""
        wait = self._wait[name]
        wait -= self.world.dt
        rows = wait[:, 0] <= 0
        event.do(self.world, rows)
        self._set_wait(wait, rows, event.every)

    def _set_wait(self, wait: Tensor, rows: Tensor, every: tuple[float, float] | None) -> None:
        if every is not None:
            wait.copy_(torch.where(rows[:, None], self.world.random.uniform(1, *every), wait))

    def _intervals(self) -> dict[str, Event]:
        return {name: event for name, event in self.task.events.items() if event.when == "interval"}

    # --- checks and state ---------------------------------------------------------------------------------------------

    def _rehearse(self) -> None:
        """Ask every term once: for its shape, and for the fields, memories and model fields that it uses. Simulations
        must not have begun: the model fields that differ between them have to be known before."""
        w, task, nowhere = self.world, self.task, torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self._rehearse_action()
        w.random.begin("rehearsal")
        for name, event in task.events.items():
            if event.when not in ("startup", "reset", "interval"):
                raise UsageError(
                    f"the task's event {name} must happen at startup, reset or interval, not at {event.when!r}"
                )
            if (event.when == "interval") != (event.every is not None):
                raise UsageError(f"the task's event {name} is of the kind {event.when}, every is {event.every}")
            w.touched.clear()
            event.do(w, nowhere)
            constants = w.touched & READ_BY_SET_CONST
            if event.when == "interval" and constants:
                raise UsageError(
                    f"the task's event {name} changes the model's {min(constants)} during an episode, from which "
                    "MuJoCo derives constants; let it happen at startup or reset"
                )
            self._resets_models |= event.when == "reset" and bool(constants)
        if task.command is not None:
            drawn = require("command", task.command.draw(w), w)
            if drawn.shape != w.command.shape:
                raise UsageError(
                    f"the task's command must have the shape {tuple(w.command.shape)}, it has {tuple(drawn.shape)}"
                )
        if task.track is not None:
            task.track(w)
        for name, term in task.terminations.items():
            require_figure(f"termination {name}", term(w), w, torch.bool)
        for name, reward in task.rewards.items():
            require_figure(f"reward {name}", reward.of(w), w)
        for name, metric in task.metrics.items():
            require_figure(f"metric {name}", metric(w), w)
        for name, outcome in task.outcomes.items():
            require_figure(f"outcome {name}", outcome(w), w)
        self.groups = {name: Group(name, terms, w) for name, terms in task.observations.items()}
        self._seen = {name: torch.zeros(self.num_envs, g.size, device=self.device) for name, g in self.groups.items()}
        if task.mirror is not None:
            require_mirror(
                task.mirror, {name: group.size for name, group in self.groups.items()}, len(task.action.names)
            )
        if task.curriculum is not None:
            task.curriculum(w, nowhere)
        w.random.end()
        w.begin(~nowhere, all_memory=True)

    def _rehearse_action(self) -> None:
        """Refuse an action that keeps something by itself: it is asked for again where other rows start an episode."""
        w, apply = self.world, self.task.action.apply
        half = torch.full_like(w.action, 0.5)
        apply(w, half)
        before = {name: value.clone() for name, value in w.state().items() if name.startswith("memory/")}
        apply(w, half)
        for name, value in before.items():
            if not torch.equal(w.state()[name], value):
                raise UsageError(
                    f"the task's action changes the memory {name.removeprefix('memory/')!r} each time it is applied, "
                    "which is more than once in a step where other episodes begin; change it in track"
                )

    def _state(self) -> dict[str, Tensor]:
        """(N, ...) each, by name; live, but for the simulations'."""
        own = {"sums": self._sums, "command_wait": self._command_wait} | self.world.state()
        own |= {f"wait/{name}": value for name, value in self._wait.items()}
        own |= {f"seen/{name}": value for name, value in self._seen.items()}
        if self._action_delay is not None:
            own |= {"action_past": self._action_delay.past, "action_lag": self._action_delay.lag}
        for name, group in self.groups.items():
            own |= {f"{name}/{key}": value for key, value in group.state().items()}
        return own | {f"sim/{name}": value for name, value in self.sim.get_state().items()}

    def _why_not(self, json: dict[str, Any] | None, arrays: dict[str, Any], own: dict[str, Tensor]) -> str | None:
        if json is None:
            return "no state was saved"
        if json.get("method") != _METHOD:
            return "its state was saved by another backend"
        # What was saved besides belongs to somebody who looked at more fields.
        if any(name not in arrays or np.shape(arrays[name]) != value.shape[1:] for name, value in own.items()):
            return "the state saved is of another task, or of the same one on another backend"
        return None

    def _bare(self, groups: dict[str, Tensor]) -> dict[str, Tensor] | Tensor:
        return groups if len(groups) > 1 else next(iter(groups.values()))

    @contextlib.contextmanager
    def _one_thread(self) -> Iterator[None]:
        """On a CPU terms are too small to be shared by threads, which would take from the simulations' time."""
        threads = torch.get_num_threads()
        if not self._on_cpu or threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Once MuJoCo has failed, what the simulations hold is no longer of one moment."""
        if self._failure is not None:
            raise EnvironmentFailure(f"{self.name} has failed before and must be made anew. {self._failure}")
        try:
            yield
        except EnvironmentFailure as error:
            self._failure = error
            raise EnvironmentFailure(f"{self.name}: {error}") from error


def _box(bound: float, size: int, reflection: Reflection | None) -> gym.spaces.Box:
    if reflection is None:
        return gym.spaces.Box(-bound, bound, (size,), np.float32)
    return ReflectedBox(-bound, bound, (size,), np.float32, reflection)


def require_mirror(mirror: Mirror, sizes: Mapping[str, int], actions: int) -> None:
    """Raise UsageError unless `mirror` fits observation groups of `sizes` and as many actions."""
    for name, size in sizes.items():
        known = mirror.observations.get(name)
        if known is None or len(known) != size:
            raise UsageError(
                f"the task's mirror must say how the {size} numbers of the observation {name} look in it; it says so "
                f"of {'none' if known is None else len(known)}"
            )
    if len(mirror.action) != actions:
        raise UsageError(f"the task's mirror is of {len(mirror.action)} actions, there are {actions}")


def make_sim_env(
    env_id: str,
    *,
    num_envs: int,
    options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    threads: int | None = None,
    render: bool = False,
    device: torch.device | str = "cpu",
) -> SimVector:
    """N environments of a task of our own.

    Args:
        env_id: one of `ROBOT_TASKS`.
        num_envs: N.
        options: of the task.
        backend: `native`, on threads of the CPU, or `warp`, by MuJoCo Warp on `device`, with Newton's solver where the
            task has PGS, which it lacks. auto is warp where `device` is a GPU, else native.
        threads: of native; by default as many as there are cores.
        render: give pictures of environment 0.
        device: where tensors lie; for native the CPU.

    Raises:
        UsageError: the backend cannot simulate it, or a model or an option is missing.
    """
    task = make_robot_task(env_id, options or {})
    return simulate(task, num_envs, backend=backend, threads=threads, render=render, device=device)


def simulate(
    task: SimTask,
    num_envs: int,
    *,
    backend: str = "auto",
    threads: int | None = None,
    render: bool = False,
    device: torch.device | str = "cpu",
) -> SimVector:
    """N environments of a task; arguments as of `make_sim_env`.

    Raises:
        UsageError: the backend cannot simulate it, or the task contradicts itself or its model.
    """
    if backend not in ("auto", "native", "warp"):
        raise UsageError(f"{task.name} is a simulation of ours: --backend takes auto, native or warp, got {backend}")
    model, on_gpu = physics(task), torch.device(device).type == "cuda"
    if backend == "warp" or (backend == "auto" and on_gpu):
        from ctrlrl.envs.warp import WarpSim

        pgs = model.opt.solver == mujoco.mjtSolver.mjSOL_PGS
        return SimVector(task, WarpSim(model, num_envs, device, solver="newton" if pgs else None), render=render)
    if on_gpu:
        raise UsageError(
            f"{task.name}: --backend native simulates on the CPU, and the learner is on {device}: "
            "take --backend warp, or --device cpu"
        )
    return SimVector(task, BatchSim(model, num_envs, threads), render=render)


def physics(task: SimTask) -> mujoco.MjModel:
    """The task's model without what is only seen, which moves the same and is stepped in less time."""
    spec = task.model.copy()
    spec.option.timestep = task.timestep
    spec.compiler.discardvisual = True
    return spec.compile()
