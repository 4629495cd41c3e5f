"""N simulations of one MuJoCo model on a GPU, by MuJoCo Warp (`mujoco_warp`), behind the seam of `ctrlrl.envs.sim`.

A call is recorded once as a graph and replayed from then on: a CUDA graph on a GPU, Warp's own on its CPU device, which
runs the same code and is there for tests. The first call compiles kernels, 10 to 40 s on a CPU, which Warp keeps in its
cache (`~/.cache/warp`, or where `WARP_CACHE_PATH` says).

Sources: the documentation of MuJoCo Warp 4.0 (`mujoco_warp.reset_data`, `set_const`, `OverflowType`) and Warp 1.19
(graphs, streams shared with PyTorch).
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.sim import _STATE_FIELDS, READ_BY_SET_CONST, Array, Sim, _require_whole_state
from ctrlrl.errors import UsageError, nearest

_STATE = ("time", *_STATE_FIELDS, "history", "plastic", "eq_active", "userdata")
"""All that later steps depend on (`mjSTATE_INTEGRATION`; plugins are refused)."""
_DERIVED = frozenset(
    (
        *("energy", "sensordata", "qacc", "qacc_smooth", "act_dot", "subtree_com", "subtree_linvel", "subtree_angmom"),
        *("xpos", "xquat", "xmat", "xipos", "ximat", "xanchor", "xaxis", "geom_xpos", "geom_xmat"),
        *("site_xpos", "site_xmat", "cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
        *("cdof", "cdof_dot", "cinert", "crb", "cvel", "cfrc_ext"),
        *("ten_length", "ten_velocity", "actuator_length", "actuator_velocity", "actuator_force"),
        *("qfrc_bias", "qfrc_spring", "qfrc_damper", "qfrc_gravcomp", "qfrc_fluid", "qfrc_passive"),
        *("qfrc_actuator", "qfrc_smooth", "qfrc_constraint"),
    )
)
"""Fields that mean the same in MuJoCo Warp as in `mujoco.MjData`; others (`M`, `qLD`) are laid out otherwise."""
_WRITTEN_BY_SET_CONST = (
    *("body_subtreemass", "geom_aabb", "geom_rbound", "geom_size", "tendon_length0", "eq_data"),
    *("cam_pos0", "cam_poscom0", "cam_mat0", "light_pos0", "light_poscom0", "light_dir0"),
    *("dof_invweight0", "body_invweight0", "tendon_invweight0", "actuator_acc0"),
)
_SPARE = 1.5
_SOLVERS = {"newton": mujoco.mjtSolver.mjSOL_NEWTON, "cg": mujoco.mjtSolver.mjSOL_CG}


class WarpSim(Sim):
    """On a GPU, in float32. Derived fields after `step` belong to the state before the last substep, as everywhere.

    No call waits for the GPU, but the first of each kind, which compiles and records, and `expand`. Work is queued on
    PyTorch's current stream.

    Where this differs from the simulations on a CPU:

    - Fields are float32. `reset` leaves derived fields as they are, until `forward`.
    - Memory for contacts is one pool, for constraints one block per simulation. Sizes are measured (`probe_sizes`) or
      given; `overflow` says where they did not do.
    - MuJoCo Warp sets no diverged simulation back: `diverged` marks it until the caller resets it.
    - Controls that are not finite make a simulation diverge; MuJoCo takes zeros instead.

    Attributes:
        model: a copy of the model given, with `solver` if that was given.
        contacts: places in the pool of contacts, and of pairs of geoms that are near, per simulation.
        constraints: places for constraints, of each simulation.
        unrecorded: why calls are launched kernel by kernel, which is several times slower, instead of replayed from a
            graph; None as long as they are replayed. There is one warning, too.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        num_sims: int,
        device: torch.device | str = "cuda",
        *,
        solver: str | None = None,
        contacts: int | None = None,
        constraints: int | None = None,
        deterministic: bool = True,
    ) -> None:
        """
        Args:
            model: compiled.
            num_sims: N.
            device: `cuda`, `cuda:1`, or `cpu`, which is for tests: a small fraction of `BatchSim`'s speed.
            solver: `newton` or `cg`, instead of the model's. MuJoCo Warp has no PGS.
            contacts: how many contacts there is memory for, per simulation; measured by default.
            constraints: how many rows of constraints each simulation has memory for; measured by default.
            deterministic: the same bits from the same state. Without, sums on a GPU are made in the order in which
                threads arrive, which takes less time.

        Raises:
            UsageError: MuJoCo Warp is not installed, there is no such device, or the model has what it cannot simulate.
        """
        self._wp, self._mjw = _import()
        self.device = _require_device(torch.device(device), self._wp)
        self.model, self.num_sims = _require_supported(model, solver), num_sims
        self._place = self._wp.device_from_torch(self.device)
        wp, mjw = self._wp, self._mjw
        with wp.ScopedDevice(self._place):
            try:
                self._model = mjw.put_model(self.model)
            except (NotImplementedError, ValueError) as error:
                raise UsageError(
                    f"MuJoCo Warp cannot simulate this model: {error} Change the model, or simulate it on the CPU"
                ) from error
            if contacts is None or constraints is None:
                near, rows = probe_sizes(self.model, self._model.nxn_geom_pair_filtered.numpy())
                contacts = near if contacts is None else contacts
                constraints = rows if constraints is None else constraints
            self.contacts, self.constraints = contacts, constraints
            self._model.opt.warn_overflow = 0  # it would print from the GPU; `overflow` says it
            self._model.opt.deterministic = deterministic
            self._model.opt.graph_conditional = self.device.type == "cpu" or wp.is_conditional_graph_supported()
            self._data = mjw.make_data(self.model, nworld=num_sims, nconmax=contacts, njmax=constraints)
            self._mask = wp.zeros(num_sims, dtype=bool)
        wp.synchronize_device(self._place)  # all of that is there, whatever stream is the current one later
        self._rows = self._tensor(self._mask)
        self._state = {name: self._tensor(getattr(self._data, name)) for name in _STATE}
        self._watched = [self._tensor(getattr(self._data, name)) for name in ("qpos", "qvel", "qacc")]
        self._overflow = self._tensor(self._data.overflow)
        bits = mjw.OverflowType
        self._lost = int(bits.ALL & ~(bits.ITERATIONS | bits.LS_ITERATIONS))
        self._derived: dict[str, Tensor] = {}
        self._expanded: dict[str, Tensor] = {}
        self._example = mujoco.MjData(self.model)
        self._graphs: dict[Any, Any] = {}
        self._started = False
        self.unrecorded: str | None = None
        if not (self.device.type == "cpu" or wp.is_mempool_enabled(self._place)):
            self._say_unrecorded("the GPU or its driver has no memory pools, which a recorded call allocates from")

    def field(self, name: str) -> Tensor:
        """Raises UsageError for a field that MuJoCo Warp does not have, or lays out otherwise."""
        if name in self._derived:
            return self._derived[name]
        readable = {"time", *_STATE_FIELDS, *_DERIVED}
        if name not in readable:
            raise UsageError(
                f"MuJoCo Warp gives no field {name!r} of mujoco.MjData.{nearest(name, readable)} "
                f"There are {', '.join(sorted(readable))}"
            )
        shape = np.shape(getattr(self._example, name))  # MjData has matrices as 9 numbers, MuJoCo Warp as (3, 3)
        value = self._tensor(getattr(self._data, name)).view(self.num_sims, *shape)
        if name in _DERIVED:
            self._derived[name] = value
        return value

    def step(self, substeps: int) -> None:
        def advance() -> None:
            for _ in range(substeps):
                self._mjw.step(self._model, self._data)

        self._run(("step", substeps), advance)

    def reset(self, rows: Tensor) -> None:
        self._rows.copy_(rows)
        self._run("reset", lambda: self._mjw.reset_data(self._model, self._data, self._mask))

    def forward(self, rows: Tensor) -> None:
        # Computed for all; the others get back what belongs to the state before their last substep.
        kept = [*self._derived.values(), self._state["history"]]
        before = [value.clone() for value in kept]
        self._run("forward", lambda: self._mjw.forward(self._model, self._data))
        for value, old in zip(kept, before, strict=True):
            _put(value, ~rows, old)

    def diverged(self) -> Tensor:
        """(N,) bool: simulations with a position, velocity or acceleration that is NaN or beyond `mjMAXVAL`, until they
        are reset. They do not change the others."""
        whole = [(value.abs() <= mujoco.mjMAXVAL).all(1) for value in self._watched]
        marked: Tensor = ~(whole[0] & whole[1] & whole[2])
        return marked

    def expand(self, name: str) -> Tensor:
        """What MuJoCo Warp looks at only while the simulations are made (whether an actuator has an armature at all)
        stays as it is in `model`; the documentation of `mujoco_warp.set_const` lists that."""
        if self._started:
            raise UsageError(
                f"expand({name!r}) comes too late: the simulations have begun. Expand before reset and step"
            )
        holder, attribute = self._holder(name)
        theirs: Any = self.model.opt if name.startswith("opt.") else self.model
        value = self._tensor(getattr(holder, attribute)) if _has_rows(holder, attribute) else None
        if value is None or value.shape[1:] != np.shape(getattr(theirs, attribute)) or not value.is_floating_point():
            raise UsageError(f"the model's {name} cannot differ between simulations on MuJoCo Warp")
        for other in (name, *(_WRITTEN_BY_SET_CONST if name in READ_BY_SET_CONST else ())):
            if other not in self._expanded:
                self._expand(other)
        return self._expanded[name]

    def set_const(self, rows: Tensor) -> None:
        """What MuJoCo Warp computes is in the documentation of `mujoco_warp.set_const`; not among it are `dof_length`
        and the reference lengths of springs of tendons."""
        if not self._expanded.keys() & READ_BY_SET_CONST:
            return  # nothing that it reads can have changed
        constants = [self._expanded[name] for name in _WRITTEN_BY_SET_CONST]
        before, derived = [value.clone() for value in constants], [value.clone() for value in self._derived.values()]
        self._run("set_const", lambda: self._mjw.set_const(self._model, self._data, restore=False))
        for value, old in zip(constants, before, strict=True):
            _put(value, ~rows, old)
        for value, old in zip(self._derived.values(), derived, strict=True):  # they are of the reference pose now
            value.copy_(old)

    def overflow(self) -> Tensor:
        """(N,) bool: since their last reset these have had more constraints, or the pool more contacts (then all have),
        than there was memory for, or a collision or a contact sensor ran out of it; some were lost. `contacts` and
        `constraints` make room."""
        return (self._overflow & self._lost) != 0

    def get_state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in (self._state | self._derived).items()}

    def set_state(self, rows: Tensor, state: dict[str, Tensor]) -> None:
        for name, value in (self._state | self._derived).items():
            _put(value, rows, state[name])

    def close(self) -> None:
        self._graphs.clear()

    def _tensor(self, array: Any) -> Tensor:
        """The memory of a Warp array as a tensor; Warp cannot share what is empty."""
        if not array.size:
            return torch.zeros(*array.shape, *getattr(array.dtype, "_shape_", ()), device=self.device)
        tensor: Tensor = self._wp.to_torch(array, requires_grad=False)
        return tensor

    def _holder(self, name: str) -> tuple[Any, str]:
        """Where a model's field lies, and its name there."""
        inside = name.startswith("opt.")
        return (self._model.opt if inside else self._model), name.removeprefix("opt.")

    def _expand(self, name: str) -> None:
        holder, attribute = self._holder(name)
        array = getattr(holder, attribute)
        value = self._tensor(array)
        value = value.repeat(self.num_sims, *(1 for _ in value.shape[1:]))
        if array.size:
            setattr(holder, attribute, self._wp.from_torch(value, dtype=array.dtype, requires_grad=False))
        self._expanded[name] = value

    def _run(self, key: Any, work: Callable[[], None]) -> None:
        """Replay what `key` was recorded as. The first time run `work`, which sets up what cannot be recorded, and
        record it, which runs nothing."""
        self._started = True
        wp = self._wp
        stream = wp.stream_from_torch(self.device) if self.device.type == "cuda" else None
        if (graph := self._graphs.get(key)) is not None:
            wp.capture_launch(graph, stream)
            return
        with wp.ScopedDevice(self._place), wp.ScopedStream(stream):
            work()
        if self.unrecorded is None:
            wp.synchronize_device(self._place)
            self._record(key, work)

    def _record(self, key: Any, work: Callable[[], None]) -> None:
        wp = self._wp
        # PyTorch's current stream is mostly CUDA's default one, which cannot be recorded.
        stream = wp.Stream(self._place) if self.device.type == "cuda" else None
        collects = gc.isenabled()
        gc.disable()  # what is freed while recording would be freed by each replay
        try:
            with (
                wp.ScopedDevice(self._place),
                wp.ScopedStream(stream),
                wp.ScopedCapture(self._place, stream=stream, force_module_load=False) as capture,
            ):
                work()
            self._graphs[key] = capture.graph
        except RuntimeError as error:
            self._say_unrecorded(" ".join(str(error).split())[:400])
        finally:
            if collects:
                gc.enable()

    def _say_unrecorded(self, reason: str) -> None:
        self.unrecorded = reason
        warnings.warn(
            f"MuJoCo Warp's calls cannot be recorded as graphs on {self.device} and are several times slower: {reason}",
            stacklevel=4,
        )


def probe_sizes(model: mujoco.MjModel, pairs: Array) -> tuple[int, int]:
    """How many contacts, or pairs of geoms that are near, and how many rows of constraints a simulation has memory for:
    half as much again as was seen in random poses, and with random controls from the reference pose and keyframes.

    The pairs near are counted by bounding spheres, where MuJoCo Warp has tighter boxes besides.

    Args:
        model: compiled.
        pairs: (P, 2) int: the geoms that may collide.

    Returns:
        Both rounded up to multiples of 8, of at least 16 and 32.
    """
    random = np.random.default_rng(0)
    data = mujoco.MjData(model)
    reach = model.geom_rbound[pairs].sum(1) + (model.geom_margin + model.geom_gap)[pairs].sum(1)
    if model.npair:
        reach += 2 * (model.pair_margin + model.pair_gap).max()
    planes = model.geom_rbound == 0
    seen = np.zeros(2, np.int64)

    def look() -> None:
        apart = data.geom_xpos[pairs[:, 1]] - data.geom_xpos[pairs[:, 0]]
        distance = np.linalg.norm(apart, axis=1)
        for side, sign in ((0, 1.0), (1, -1.0)):
            normal = data.geom_xmat[pairs[:, side]][:, 2::3]
            distance = np.where(planes[pairs[:, side]], sign * (apart * normal).sum(1), distance)
        seen[:] = np.maximum(seen, (max(data.ncon, int((distance <= reach).sum())), data.nefc))

    for _ in range(100):
        mujoco.mj_resetData(model, data)
        _pose(model, data.qpos, random)
        mujoco.mj_fwdPosition(model, data)
        look()
    low, high = np.where(model.actuator_ctrllimited[:, None], model.actuator_ctrlrange, (-1.0, 1.0)).T
    for start in range(-1, max(3, model.nkey)):
        mujoco.mj_resetDataKeyframe(model, data, start)  # the reference pose where there is no such keyframe
        for step in range(min(1_000, int(np.ceil(2.0 / model.opt.timestep)))):
            if step % 10 == 0:
                data.ctrl[:] = random.uniform(low, high)
            mujoco.mj_step(model, data)
            look()
    near, rows = (8 * int(np.ceil(_SPARE * count / 8)) for count in seen)
    return max(16, near), max(32, rows)


def _pose(model: mujoco.MjModel, qpos: Array, random: np.random.Generator) -> None:
    """Joints anywhere in their range, bodies that are free in any orientation."""
    for kind, address, limited, (low, high) in zip(
        model.jnt_type, model.jnt_qposadr, model.jnt_limited, model.jnt_range, strict=True
    ):
        if kind == mujoco.mjtJoint.mjJNT_HINGE and not limited:
            low, high, limited = -np.pi, np.pi, True
        if kind in (mujoco.mjtJoint.mjJNT_FREE, mujoco.mjtJoint.mjJNT_BALL):
            begin = address + 3 * (kind == mujoco.mjtJoint.mjJNT_FREE)
            qpos[begin : begin + 4] = random.normal(size=4)  # MuJoCo normalizes it
        elif limited:
            qpos[address] = random.uniform(low, high)


def _import() -> tuple[Any, Any]:
    """`warp` and `mujoco_warp`, which print no more than warnings from now on."""
    try:
        import warp

        warp.config.log_level = max(warp.config.log_level, warp.LOG_WARNING)
        import mujoco_warp

        warp.init()
    except ImportError as error:
        raise UsageError(
            f"simulation on a GPU needs MuJoCo Warp: pip install 'ctrlrl[warp]', or take --device cpu ({error})"
        ) from error
    return warp, mujoco_warp


def _require_device(device: torch.device, warp: Any) -> torch.device:
    """`device` with its index; UsageError where there is none."""
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UsageError(f"MuJoCo Warp simulates on cuda or cpu, got device {str(device)!r}")
    index = device.index
    if not torch.cuda.is_available() or (index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {str(device)!r}: PyTorch finds no such GPU here. Take --device cpu")
    if not warp.is_cuda_available():
        raise UsageError(f"device {str(device)!r}: PyTorch finds the GPU, but Warp does not; its driver may be too old")
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


def _require_supported(model: mujoco.MjModel, solver: str | None) -> mujoco.MjModel:
    """A copy of the model with `solver`; UsageError for what MuJoCo Warp does not have, or keeps outside the state."""
    _require_whole_state(model)
    model = copy.copy(model)
    if solver is not None:
        if solver not in _SOLVERS:
            raise UsageError(f"solver: expected {' or '.join(_SOLVERS)}, got {solver!r}")
        model.opt.solver = _SOLVERS[solver]
    if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
        raise UsageError(
            "the model asks for the solver PGS, which MuJoCo Warp does not have. Take solver='newton', which solves "
            "the same problem to a smaller error, or <option solver='Newton'/> in the model"
        )
    if model.nplugin:
        raise UsageError("the model has plugins, which MuJoCo Warp does not have; take them out")
    if model.nflex:
        raise UsageError("the model has flexes, whose caches in MuJoCo Warp are no part of the state; take them out")
    return model


def _has_rows(holder: Any, attribute: str) -> bool:
    """Whether MuJoCo Warp reads the field as one row for all simulations, or one for each."""
    types = {field.name: field.type for field in dataclasses.fields(holder)}
    return bool(getattr(types.get(attribute), "shape", ())[:1] == ("*",))


def _put(value: Tensor, rows: Tensor, new: Tensor) -> None:
    """`new` into `value` where `rows` (N,) bool."""
    value.copy_(torch.where(rows.view(-1, *(1 for _ in value.shape[1:])), new, value))
