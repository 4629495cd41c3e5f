"""N simulations of one MuJoCo model behind one seam, so that a task is written once.

`BatchSim` steps them on MuJoCo's own thread pool (`mujoco.batch`), which is the fastest on a CPU. `ThreadSim` keeps one
`MjData` for each and steps them on threads of Python: slower, but every derived field is what a single simulation would
show after a step, contact forces among them (see there). Both give, to the bit, what a loop over single simulations
gives, whatever the number of threads.

Fields have the names of `mujoco.MjData`. State fields (qpos, qvel, ctrl, ...) are read and written; derived ones (xpos,
sensordata, ...) are read, and belong to the state before the last substep, as after `mj_step`.
"""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mujoco
import numpy as np
import torch
from mujoco.batch import Batch, SimulationError
from torch import Tensor

from ctrlrl.cores import usable_cores

Array = np.ndarray[Any, np.dtype[Any]]

_DIVERGED = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADQACC) + 1)
"""The warnings of an unstable simulation: positions, velocities or accelerations that are NaN or huge."""
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
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
        """Advance all simulations by `substeps` steps of the model's timestep, with `ctrl` as it is."""

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
    def get_state(self) -> dict[str, Tensor]:
        """A copy, (N, ...) each, of what steps depend on (`mjSTATE_INTEGRATION`) and of the derived fields in use."""

    @abstractmethod
    def set_state(self, rows: Tensor, state: dict[str, Tensor]) -> None:
        """Go on from what `get_state` gave where `rows` (N,) bool."""

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Stop the threads. Safe to call twice."""


def threads_for(num_sims: int, threads: int | None = None) -> int:
    """How many threads step `num_sims` simulations: `threads`, by default the cores there are, at most one each."""
    return max(1, min(threads or usable_cores(), num_sims))


class BatchSim(Sim):
    """On the thread pool of `mujoco.batch`: memory grows with threads, not with simulations.

    What only sensors make MuJoCo compute is computed at the first stage of a Runge-Kutta step, not at the last as
    `mj_rnePostConstraint` after `mj_step` does: `cfrc_ext` differs from a single simulation's in such models.
    """

    def __init__(self, model: mujoco.MjModel, num_sims: int, threads: int | None = None) -> None:
        self.model, self.num_sims = model, num_sims
        self._batch = Batch(model, num_sims, threads_for(num_sims, threads))
        self._warnings = self._batch.warning[:, _DIVERGED, 1]
        self._failed: list[int] = []
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
        try:
            self._batch.step(nstep=substeps)
        except SimulationError as error:
            self._failed = [int(row) for row in error.ids]

    def reset(self, rows: Tensor) -> None:
        self._batch.reset(rows.numpy(), stage=_NOTHING)

    def forward(self, rows: Tensor) -> None:
        self._batch.forward(rows.numpy())

    def diverged(self) -> Tensor | None:
        if not self._failed and not self._warnings.any():
            return None
        rows = self._warnings.any(1)
        rows[self._failed] = True
        self._warnings[:] = 0
        self._failed = []
        return torch.from_numpy(rows)

    def get_state(self) -> dict[str, Tensor]:
        state = torch.from_numpy(self._batch.state.copy())
        return {_INTEGRATION: state} | {name: value.clone() for name, value in self._derived.items()}

    def set_state(self, rows: Tensor, state: dict[str, Tensor]) -> None:
        self._batch.state[rows.numpy()] = state[_INTEGRATION][rows].numpy()
        for name, value in self._derived.items():
            value[rows] = state[name][rows]


class ThreadSim(Sim):
    """One `MjData` for each simulation, on threads of Python, which MuJoCo frees while it computes.

    After each step `after` is called with model and data, `mujoco.mj_rnePostConstraint` say, and sees what a single
    simulation would: of a Runge-Kutta step, the last stage.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        num_sims: int,
        threads: int | None = None,
        after: Callable[[mujoco.MjModel, mujoco.MjData], None] | None = None,
    ) -> None:
        self.model, self.num_sims = model, num_sims
        self._after = after
        self._data = [mujoco.MjData(model) for _ in range(num_sims)]
        self._fields: dict[str, Array] = {}
        self._read: list[list[tuple[Array, Array]]] = [[] for _ in range(num_sims)]
        self._written: list[list[tuple[Array, Array]]] = [[] for _ in range(num_sims)]
        self._control: list[tuple[Array, Array]] = []
        self._warnings = [data.warning.number[_DIVERGED] for data in self._data]
        self._warned = np.zeros(num_sims, np.bool_)
        threads = threads_for(num_sims, threads)
        # A few shares per thread, since a simulation in contact takes longer than one in the air.
        edges = np.linspace(0, num_sims, min(num_sims, 1 if threads == 1 else 4 * threads) + 1).astype(int)
        self._shares = [range(first, last) for first, last in itertools.pairwise(edges)]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.field("ctrl")

    def field(self, name: str) -> Tensor:
        if name not in self._fields:
            views = [getattr(data, name) for data in self._data]
            self._fields[name] = np.stack(views)
            pairs = list(zip(views, self._fields[name], strict=True))
            if name == "ctrl":
                self._control = pairs
            else:
                for row, pair in enumerate(pairs):
                    self._read[row].append(pair)
                    if name in ("qpos", "qvel", "act"):
                        self._written[row].append(pair)
        return torch.from_numpy(self._fields[name])

    def step(self, substeps: int) -> None:
        model, after = self.model, self._after

        def advance(share: range) -> None:
            for row in share:
                data = self._data[row]
                view, ours = self._control[row]
                view[:] = ours
                mujoco.mj_step(model, data, substeps)
                if after is not None:
                    after(model, data)
                for view, ours in self._read[row]:
                    ours[:] = view
                self._warned[row] = self._warnings[row].any()

        self._each_share(advance)

    def reset(self, rows: Tensor) -> None:
        for row in rows.nonzero().flatten().tolist():
            mujoco.mj_resetData(self.model, self._data[row])
            for view, ours in self._read[row]:
                ours[:] = view

    def forward(self, rows: Tensor) -> None:
        for row in rows.nonzero().flatten().tolist():
            for view, ours in self._written[row]:
                view[:] = ours
            mujoco.mj_forward(self.model, self._data[row])
            for view, ours in self._read[row]:
                ours[:] = view

    def diverged(self) -> Tensor | None:
        if not self._warned.any():
            return None
        rows = self._warned.copy()
        for row in np.flatnonzero(rows):
            self._warnings[row][:] = 0
        self._warned[:] = False
        return torch.from_numpy(rows)

    def get_state(self) -> dict[str, Tensor]:
        state = np.empty((self.num_sims, mujoco.mj_stateSize(self.model, _STATE)))
        for row, data in enumerate(self._data):
            mujoco.mj_getState(self.model, data, state[row], _STATE)
        fields = {name: torch.from_numpy(value.copy()) for name, value in self._fields.items()}
        return {_INTEGRATION: torch.from_numpy(state)} | fields

    def set_state(self, rows: Tensor, state: dict[str, Tensor]) -> None:
        for row in rows.nonzero().flatten().tolist():
            mujoco.mj_setState(self.model, self._data[row], state[_INTEGRATION][row].numpy(), _STATE)
            for name, value in self._fields.items():
                value[row] = state[name][row].numpy()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _each_share(self, work: Callable[[range], None]) -> None:
        shares: Sequence[range] = self._shares
        if self._pool is None:
            for share in shares:
                work(share)
        else:
            for _ in self._pool.map(work, shares):
                pass
