"""N simulations of one MuJoCo model behind one seam, so that a task is written once.

`BatchSim` steps them on MuJoCo's own thread pool (`mujoco.batch`), which is the fastest on a CPU. `ThreadSim` steps
them one by one on threads of Python: slower, but every derived field is what a single simulation would show after a
step, contact forces among them (see there). Both give, to the bit, what a loop over single simulations gives, whatever
the number of threads.

Fields have the names of `mujoco.MjData`. State fields (qpos, qvel, ctrl, mocap_pos, ...) are read and written; derived
ones (xpos, sensordata, ...) are read, and belong to the state before the last substep, as after `mj_step`.
"""

from __future__ import annotations

import itertools
import queue
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import mujoco
import numpy as np
import torch
from torch import Tensor

from ctrlrl.cores import usable_cores
from ctrlrl.errors import EnvironmentFailure, UsageError

try:
    from mujoco.batch import Batch, SimulationError
except ImportError as error:
    raise UsageError(
        f"batches of simulations need MuJoCo 3.17 or newer, and this is {mujoco.__version__}: "
        "pip install 'mujoco>=3.17', or take --backend gymnasium for Gymnasium's environments"
    ) from error

Array = np.ndarray[Any, np.dtype[Any]]

_DIVERGED = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADQACC) + 1)
"""The warnings of an unstable simulation: positions, velocities or accelerations that are NaN or huge."""
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
_STATE_FIELDS = {
    name: getattr(mujoco.mjtState, f"mjSTATE_{name.removeprefix('qacc_').upper()}")
    for name in (
        "qpos",
        "qvel",
        "act",
        "qacc_warmstart",
        "ctrl",
        "qfrc_applied",
        "xfrc_applied",
        "mocap_pos",
        "mocap_quat",
    )
}
"""Fields that are parts of the state, in its order, which is that of their bits."""
READ_BY_SET_CONST = frozenset(
    (
        *("qpos0", "body_mass", "body_inertia", "body_ipos", "body_iquat", "body_pos", "body_quat"),
        *("dof_armature", "tendon_armature", "actuator_armature", "actuator_gear", "eq_data", "geom_size"),
        *("cam_pos", "cam_quat", "light_pos", "light_dir", "tendon_stiffness", "tendon_damping"),
    )
)
"""Model fields from which `set_const` derives others."""
_READ_BY_RESET = frozenset(("qpos0", "body_pos", "body_quat", "eq_active0"))
"""Model fields that the state after a reset depends on: reference positions, where mocap bodies are, equalities."""
_INTEGRATION = "integration"
_NOTHING = int(mujoco.mjtStage.mjSTAGE_NONE)


class Sim(ABC):
    """N simulations of one model; rows of every field are simulations.

    Attributes:
        model: the compiled model, shared by all.
        num_sims: N.
        device: where the fields lie.
    """

    model: mujoco.MjModel
    num_sims: int
    device = torch.device("cpu")

    @abstractmethod
    def field(self, name: str) -> Tensor:
        """The live (N, ...) tensor of an `MjData` field; ask once and keep it."""

    @abstractmethod
    def step(self, substeps: int) -> None:
        """Advance all simulations by `substeps` steps of the model's timestep, from the state fields as they are.

        Raises:
            EnvironmentFailure: MuJoCo raised an error (out of memory for contacts, say).
        """

    @abstractmethod
    def reset(self, rows: Tensor) -> None:
        """Set the simulations where `rows` (N,) bool to the model's defaults; computes nothing, `forward` does."""

    @abstractmethod
    def forward(self, rows: Tensor) -> None:
        """Compute the derived fields from the state (`mj_forward`) where `rows` (N,) bool."""

    @abstractmethod
    def diverged(self) -> Tensor | None:
        """(N,) bool: simulations that became unstable in the last step (MuJoCo set them back); None where none did."""

    @abstractmethod
    def expand(self, name: str) -> Tensor:
        """The live (N, ...) tensor of an `MjModel` field (`geom_friction`, `opt.gravity`): each simulation's own, from
        now on. Before the first step, since a captured step holds on to what it was captured with.

        Raises:
            UsageError: the field cannot differ between these simulations.
        """

    @abstractmethod
    def set_const(self, rows: Tensor) -> None:
        """Compute what MuJoCo derives from expanded fields (`mj_setConst`), where `rows` (N,) bool: after masses,
        inertias, frames or the reference pose have changed. The state stays as it is."""

    def overflow(self) -> Tensor | None:
        """(N,) bool: simulations that have had more contacts or constraints than there was memory for, and lost some;
        None where memory grows as needed."""
        return None

    @abstractmethod
    def get_state(self) -> dict[str, Tensor]:
        """A copy, (N, ...) each, of what steps depend on (`mjSTATE_INTEGRATION`) and of the derived fields in use."""

    @abstractmethod
    def set_state(self, rows: Tensor, state: dict[str, Tensor]) -> None:
        """Go on from what `get_state` gave where `rows` (N,) bool."""

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Free what is not freed with the object. Safe to call twice."""


def threads_for(num_sims: int, threads: int | None = None) -> int:
    """How many threads step `num_sims` simulations: `threads`, by default the cores there are, at most one each."""
    return max(1, min(threads or usable_cores(), num_sims))


class BatchSim(Sim):
    """On the thread pool of `mujoco.batch`: memory grows with threads, not with simulations.

    What only sensors make MuJoCo compute is computed at the first stage of a Runge-Kutta step, not at the last as
    `mj_rnePostConstraint` after `mj_step` does: `cfrc_ext` differs from a single simulation's in such models.
    """

    def __init__(self, model: mujoco.MjModel, num_sims: int, threads: int | None = None) -> None:
        _require_whole_state(model)
        self.model, self.num_sims = model, num_sims
        self._batch = Batch(model, num_sims, threads_for(num_sims, threads))
        self._initial: Array | None = self._batch.state[0].copy()
        """The state that a reset gives; None where it is each simulation's own."""
        self._warnings = self._batch.warning[:, _DIVERGED, 1]
        self._derived: dict[str, Tensor] = {}

    def field(self, name: str) -> Tensor:
        array = self._batch.bind(name)
        if array.flags.writeable:
            return torch.from_numpy(array)
        if name not in self._derived:
            with warnings.catch_warnings():  # derived fields are not to be written to, but by `set_state`
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                self._derived[name] = torch.from_numpy(array)
        return self._derived[name]

    def step(self, substeps: int) -> None:
        self._call(lambda: self._batch.step(nstep=substeps))

    def reset(self, rows: Tensor) -> None:
        if self._initial is None:
            self._call(lambda: self._batch.reset(rows.numpy(), stage=_NOTHING))
        else:  # the same, without waking the threads
            self._batch.state[rows.numpy()] = self._initial

    def forward(self, rows: Tensor) -> None:
        self._call(lambda: self._batch.forward(rows.numpy()))

    def diverged(self) -> Tensor | None:
        if not self._warnings.any():
            return None
        rows = self._warnings.any(1)
        self._warnings[:] = 0
        return torch.from_numpy(rows)

    def expand(self, name: str) -> Tensor:
        if name in _READ_BY_RESET:
            self._initial = None
        try:
            return torch.from_numpy(self._batch.expand(name))
        except (ValueError, AttributeError, KeyError) as error:
            raise UsageError(f"the model's {name} cannot differ between simulations: {error}") from error

    def set_const(self, rows: Tensor) -> None:
        self._call(lambda: self._batch.set_const(rows.numpy()))

    def get_state(self) -> dict[str, Tensor]:
        state = torch.from_numpy(self._batch.state.copy())
        return {_INTEGRATION: state} | {name: value.clone() for name, value in self._derived.items()}

    def set_state(self, rows: Tensor, state: dict[str, Tensor]) -> None:
        self._batch.state[rows.numpy()] = state[_INTEGRATION][rows].numpy()
        for name, value in self._derived.items():
            value[rows] = state[name][rows]

    def _call(self, work: Callable[[], None]) -> None:
        try:
            work()
        except SimulationError as error:
            raise EnvironmentFailure(f"MuJoCo failed: {error}") from error


class ThreadSim(Sim):
    """On threads of Python, which MuJoCo frees while it computes, with one `MjData` for each thread: what belongs to a
    simulation is its state, and fewer of these large objects stay in the processor's caches.

    All simulations share the model. After each step `after` is called with model and data,
    `mujoco.mj_rnePostConstraint` say, and sees what a single simulation would: of a Runge-Kutta step, the last stage.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        num_sims: int,
        threads: int | None = None,
        after: Callable[[mujoco.MjModel, mujoco.MjData], None] | None = None,
    ) -> None:
        _require_whole_state(model)
        self.model, self.num_sims = model, num_sims
        self._after = after
        threads = threads_for(num_sims, threads)
        self._desks = [_Desk(model) for _ in range(threads)]
        self._warned = np.zeros(num_sims, np.bool_)
        self._state = np.empty((num_sims, mujoco.mj_stateSize(model, _STATE)))
        mujoco.mj_getState(model, self._desks[0].data, self._state[0], _STATE)
        self._state[1:] = self._state[0]
        self._derived: dict[str, Array] = {}
        # A few shares per thread, since a simulation in contact takes longer than one in the air.
        edges = np.linspace(0, num_sims, min(num_sims, 1 if threads == 1 else 4 * threads) + 1).astype(int)
        self._shares = [range(first, last) for first, last in itertools.pairwise(edges)]
        self._free: queue.SimpleQueue[_Desk] = queue.SimpleQueue()
        for desk in self._desks:
            self._free.put(desk)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def field(self, name: str) -> Tensor:
        first = getattr(self._desks[0].data, name)
        if name in _STATE_FIELDS:
            component = _STATE_FIELDS[name]
            begin = mujoco.mj_stateSize(self.model, int(_STATE) & (int(component) - 1))
            view = self._state[:, begin : begin + mujoco.mj_stateSize(self.model, component)]
            return torch.from_numpy(view.reshape(self.num_sims, *np.shape(first)))
        if name not in self._derived:
            self._derived[name] = np.zeros((self.num_sims, *np.shape(first)), first.dtype)
            for desk in self._desks:
                desk.read.append((getattr(desk.data, name), self._derived[name]))
        return torch.from_numpy(self._derived[name])

    def step(self, substeps: int) -> None:
        model, after, state = self.model, self._after, self._state

        def advance(share: range) -> None:
            desk = self._free.get()
            data, warnings = desk.data, desk.warnings
            try:
                for row in share:
                    mujoco.mj_setState(model, data, state[row], _STATE)
                    mujoco.mj_step(model, data, substeps)
                    if after is not None:
                        after(model, data)
                    self._take(row, desk)
                    if warnings.any():
                        self._warned[row] = True
                        warnings[:] = 0
            finally:
                self._free.put(desk)

        try:
            self._each_share(advance)
        except mujoco.FatalError as error:
            raise EnvironmentFailure(f"MuJoCo failed: {error}") from error

    def reset(self, rows: Tensor) -> None:
        desk = self._desks[0]
        for row in rows.nonzero().flatten().tolist():
            mujoco.mj_resetData(self.model, desk.data)
            self._take(row, desk)

    def forward(self, rows: Tensor) -> None:
        desk = self._desks[0]
        for row in rows.nonzero().flatten().tolist():
            mujoco.mj_resetData(self.model, desk.data)  # what forward does not compute is of another simulation
            mujoco.mj_setState(self.model, desk.data, self._state[row], _STATE)
            mujoco.mj_forward(self.model, desk.data)
            self._take(row, desk)

    def diverged(self) -> Tensor | None:
        if not self._warned.any():
            return None
        rows = self._warned.copy()
        self._warned[:] = False
        return torch.from_numpy(rows)

    def expand(self, name: str) -> Tensor:
        raise UsageError(f"simulations that share a model have one {name}; take a BatchSim")

    def set_const(self, rows: Tensor) -> None:
        raise UsageError("simulations that share a model have nothing that was expanded")

    def get_state(self) -> dict[str, Tensor]:
        fields = {name: torch.from_numpy(value.copy()) for name, value in self._derived.items()}
        return {_INTEGRATION: torch.from_numpy(self._state.copy())} | fields

    def set_state(self, rows: Tensor, state: dict[str, Tensor]) -> None:
        self._state[rows.numpy()] = state[_INTEGRATION][rows].numpy()
        for name, value in self._derived.items():
            value[rows.numpy()] = state[name][rows].numpy()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _take(self, row: int, desk: _Desk) -> None:
        """Read state and derived fields of the simulation that lies on a desk."""
        mujoco.mj_getState(self.model, desk.data, self._state[row], _STATE)
        for view, ours in desk.read:
            ours[row] = view

    def _each_share(self, work: Callable[[range], None]) -> None:
        if self._pool is None:
            for share in self._shares:
                work(share)
            return
        futures = [self._pool.submit(work, share) for share in self._shares]
        try:
            for future in futures:
                future.result()
        finally:
            wait(futures)  # an interrupt must not leave threads at work on what is used next


class _Desk:
    """An `MjData` that simulations take turns on."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.data = mujoco.MjData(model)
        self.warnings: Array = self.data.warning.number[_DIVERGED]
        self.read: list[tuple[Array, Array]] = []
        """Views of fields, and where they are kept for each simulation (N, ...)."""


def _require_whole_state(model: mujoco.MjModel) -> None:
    """Raise UsageError where a model's simulations depend on more than `mjSTATE_INTEGRATION`."""
    if model.opt.enableflags & mujoco.mjtEnableBit.mjENBL_SLEEP:
        raise UsageError(
            "the model lets bodies sleep (<flag sleep='enable'/>), whose bookkeeping is no part of MuJoCo's state; "
            "turn that off, or take --backend gymnasium"
        )
