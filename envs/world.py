"""What the terms of a task see: N simulations, and what belongs to their episodes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.sim import Sim
from ctrlrl.envs.streams import Streams
from ctrlrl.errors import UsageError, nearest


class World:
    """N simulations and their episodes; rows of every tensor are environments.

    Tensors are float32 and current: `field`, `sensor` and what comes from them change with each step in place, so terms
    read them anew or keep views.

    Attributes:
        sim: the simulations.
        model: what they are simulations of.
        num_envs: N.
        device: where tensors lie.
        dt: seconds of a control step.
        random: where random numbers come from.
        action: (N, A) of this step, in [-1, 1].
        last_action: (N, A) of the step before; zero at an episode's start.
        command: (N, C).
        elapsed: (N,) int64, control steps of the episode.
        terminated: (N,) bool, of this step.
        steps: () int64, control steps in all, for curricula.
    """

    def __init__(
        self,
        sim: Sim,
        dt: float,
        *,
        joints: Sequence[str],
        actions: int,
        commands: int,
        home: np.ndarray[Any, np.dtype[np.float64]],
    ) -> None:
        self.sim, self.model, self.num_envs, self.device, self.dt = sim, sim.model, sim.num_sims, sim.device, dt
        n, device = self.num_envs, self.device
        self.random = Streams(n, device)
        self.action, self.last_action = torch.zeros(n, actions, device=device), torch.zeros(n, actions, device=device)
        self.command = torch.zeros(n, commands, device=device)
        self.elapsed = torch.zeros(n, dtype=torch.int64, device=device)
        self.terminated = torch.zeros(n, dtype=torch.bool, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self._live: dict[str, Tensor] = {}
        self.home = torch.as_tensor(home, device=device).to(self.live("qpos").dtype)
        """(nq,) positions in which episodes start."""
        self._fields: dict[str, Tensor] = {}
        self._memory: dict[str, Tensor] = {}
        self._kept: set[str] = set()
        self._models: dict[str, tuple[Tensor, Tensor]] = {}
        self.touched: set[str] = set()
        """Model fields that were asked for since the environment last emptied this."""
        self._views: dict[str | tuple[str, ...], Tensor] = {}
        self._gathered: dict[str, Tensor] = {}
        self._constants: dict[tuple[float, ...], Tensor] = {}
        self._indices: dict[tuple[int | str, ...], Tensor] = {}
        ids = [index_of(self.model, mujoco.mjtObj.mjOBJ_JOINT, name) for name in joints]
        self.joint_qpos = _places([int(self.model.jnt_qposadr[i]) for i in ids], device)
        self.joint_qvel = _places([int(self.model.jnt_dofadr[i]) for i in ids], device)
        self.default_joint_pos = self.home[self.joint_qpos].to(torch.float32)
        """(J,) positions of the joints in the pose in which episodes start."""

    # --- reading ------------------------------------------------------------------------------------------------------

    def field(self, name: str) -> Tensor:
        """(N, ...) float32 of an `MjData` field."""
        if name not in self._fields:
            live = self.live(name)
            self._fields[name] = live if live.dtype == torch.float32 else live.to(torch.float32)
        return self._fields[name]

    def sensor(self, name: str) -> Tensor:
        """(N, size) of a sensor of the model; the same view each time."""
        if name not in self._views:
            self._views[name] = self.field("sensordata")[:, self._place(name)]
        return self._views[name]

    def sensors(self, names: Sequence[str]) -> Tensor:
        """(N, len(names), size) of sensors of one size; the same view each time where they lie one after the other in
        the model.

        Raises:
            UsageError: their sizes differ.
        """
        key = tuple(names)
        if key in self._views:
            return self._views[key]
        places = [self._place(name) for name in names]
        sizes = {place.stop - place.start for place in places}
        if len(sizes) > 1:
            raise UsageError(f"sensors of one size make a block, {', '.join(names)} have {sorted(sizes)}")
        if any(a.stop != b.start for a, b in itertools.pairwise(places)):
            return torch.stack([self.sensor(name) for name in names], 1)
        block = self.field("sensordata")[:, places[0].start : places[-1].stop]
        self._views[key] = block.view(self.num_envs, len(names), -1)
        return self._views[key]

    def _place(self, name: str) -> slice:
        """Where a sensor's numbers are."""
        i = index_of(self.model, mujoco.mjtObj.mjOBJ_SENSOR, name)
        begin = int(self.model.sensor_adr[i])
        return slice(begin, begin + int(self.model.sensor_dim[i]))

    def indices(self, kind: mujoco.mjtObj, names: Sequence[str]) -> Tensor:
        """(len(names),) int64 on the device: the numbers of what is called so in the model; the same tensor each time.

        Raises:
            UsageError: there is none; says what there is.
        """
        key: tuple[int | str, ...] = (int(kind), *names)
        if key not in self._indices:
            found = [index_of(self.model, kind, name) for name in names]
            self._indices[key] = torch.tensor(found, device=self.device)
        return self._indices[key]

    def dofs(self, joints: Sequence[str]) -> Tensor:
        """(len(joints),) int64 on the device: where velocities of hinges and slides are; the same tensor each time."""
        key: tuple[int | str, ...] = ("dofs", *joints)
        if key not in self._indices:
            places = self.model.jnt_dofadr[self.indices(mujoco.mjtObj.mjOBJ_JOINT, joints).cpu().numpy()]
            self._indices[key] = torch.tensor(places.tolist(), device=self.device)
        return self._indices[key]

    def constant(self, *values: float) -> Tensor:
        """(len(values),) on the device; the same tensor each time."""
        if values not in self._constants:
            self._constants[values] = torch.tensor(values, dtype=torch.float32, device=self.device)
        return self._constants[values]

    @property
    def joint_pos(self) -> Tensor:
        """(N, J) positions of the task's joints."""
        return self._of_joints("qpos", self.joint_qpos)

    @property
    def joint_vel(self) -> Tensor:
        """(N, J) velocities of the task's joints."""
        return self._of_joints("qvel", self.joint_qvel)

    def _of_joints(self, name: str, places: slice | Tensor) -> Tensor:
        if isinstance(places, slice):
            return self.field(name)[:, places]
        if name not in self._gathered:  # once for all the terms that read it
            self._gathered[name] = self.field(name).index_select(1, places)
        return self._gathered[name]

    def memory(self, name: str, size: int, *, keep: bool = False) -> Tensor:
        """(N, size) float32 of the task's own, zero when an episode starts; with `keep` only when rows are seeded.

        Raises:
            UsageError: what is called so is of another size, or is kept where this is not.
        """
        if name not in self._memory:
            self._memory[name] = torch.zeros(self.num_envs, size, device=self.device)
            if keep:
                self._kept.add(name)
        value = self._memory[name]
        if value.shape[1] != size or (name in self._kept) != keep:
            raise UsageError(
                f"the task asks for its memory {name!r} in two ways: of size {value.shape[1]}, "
                f"keep={name in self._kept}, and of size {size}, keep={keep}"
            )
        return value

    # --- writing ------------------------------------------------------------------------------------------------------

    def live(self, name: str) -> Tensor:
        """(N, ...) of a state field as the simulations have it, in their dtype: what `write` has written, too."""
        if name not in self._live:
            self._live[name] = self.sim.field(name)
        return self._live[name]

    def write(self, name: str, rows: Tensor, value: Tensor, at: int | slice | Tensor = slice(None)) -> None:
        """Set entries `at` of a state field (`qpos`, `qvel`, `ctrl`, `mocap_pos`, ...) where `rows` (N,) bool."""
        live = self.live(name)
        part = live[:, at]
        where = rows.view(-1, *[1] * (part.dim() - 1))
        live[:, at] = torch.where(where, value.to(live.dtype), part)
        self._gathered.pop(name, None)

    def control(self, value: Tensor) -> None:
        """Set all controls (N, nu)."""
        self.live("ctrl").copy_(value)

    def model_field(self, name: str) -> tuple[Tensor, Tensor]:
        """An `MjModel` field, each simulation's own (N, ...) and live, and what it was at first (...)."""
        self.touched.add(name)
        if name not in self._models:
            own = self.sim.expand(name)
            self._models[name] = own, own[0].clone()
        return self._models[name]

    # --- for the environment ------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read the fields in use from the simulations."""
        self._gathered.clear()
        for name, value in self._fields.items():
            live = self._live[name]
            if value is not live:
                value.copy_(live)

    def begin(self, rows: Tensor, *, all_memory: bool) -> None:
        """Forget what belongs to the episodes of `rows` (N,) bool; with `all_memory`, what outlives them too."""
        column = rows[:, None]
        for name, value in self._memory.items():
            if all_memory or name not in self._kept:
                value.masked_fill_(column, 0.0)
            else:  # of a simulation that diverged
                value.nan_to_num_(0.0, 0.0, 0.0)
        self.action.masked_fill_(column, 0.0)
        self.last_action.masked_fill_(column, 0.0)
        self.elapsed.masked_fill_(rows, 0)

    def state(self) -> dict[str, Tensor]:
        """(N, ...) each, live: all but what `Sim.get_state` has."""
        own = {
            "action": self.action,
            "last_action": self.last_action,
            "command": self.command,
            "elapsed": self.elapsed,
            "stream_key": self.random.key,
            "stream_position": self.random.position,
        }
        memory = {f"memory/{name}": value for name, value in self._memory.items()}
        return own | memory | {f"model/{name}": value for name, (value, _) in self._models.items()}

    @property
    def varies(self) -> bool:
        """Whether simulations have model fields of their own."""
        return bool(self._models)


_COUNTS = {
    mujoco.mjtObj.mjOBJ_BODY: ("body", "nbody"),
    mujoco.mjtObj.mjOBJ_JOINT: ("joint", "njnt"),
    mujoco.mjtObj.mjOBJ_GEOM: ("geom", "ngeom"),
    mujoco.mjtObj.mjOBJ_SITE: ("site", "nsite"),
    mujoco.mjtObj.mjOBJ_ACTUATOR: ("actuator", "nu"),
    mujoco.mjtObj.mjOBJ_SENSOR: ("sensor", "nsensor"),
}


def index_of(model: mujoco.MjModel, kind: mujoco.mjtObj, name: str) -> int:
    """The number of what is called `name` in the model.

    Raises:
        UsageError: there is none; says what there is.
    """
    found = mujoco.mj_name2id(model, kind, name)
    if found < 0:
        what, count = _COUNTS[kind]
        known = (mujoco.mj_id2name(model, kind, i) for i in range(getattr(model, count)))
        names = [other for other in known if other]
        raise UsageError(f"the model has no {what} {name!r}.{nearest(name, names)} It has: {', '.join(names)}")
    return int(found)


def _places(indices: list[int], device: torch.device) -> slice | Tensor:
    """The same entries: as a slice, which makes views, where they lie in a row."""
    if indices == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[0] + len(indices))
    return torch.tensor(indices, device=device)


def initial_qpos(model: mujoco.MjModel, pose: Mapping[str, Sequence[float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`qpos` (nq,) of the model with joints set as `pose` says, by name.

    Raises:
        UsageError: the model has no such joint, or it takes another number of values.
    """
    qpos: np.ndarray[Any, np.dtype[np.float64]] = model.qpos0.copy()
    for name, values in pose.items():
        joint = index_of(model, mujoco.mjtObj.mjOBJ_JOINT, name)
        begin, size = int(model.jnt_qposadr[joint]), len(model.joint(joint).qpos0)
        if len(values) != size:
            raise UsageError(f"joint {name} has {size} coordinates, the pose gives it {len(values)}: {list(values)}")
        qpos[begin : begin + size] = values
    return qpos
