"""Policies that an ONNX model computes, of a bundle or in a file, as others are built on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.graft import StoredModel
from ctrlrl.deploy.runtimes import onnx_session
from ctrlrl.errors import UsageError
from ctrlrl.nn.policy import PolicyState
from ctrlrl.training.base_fit import box_of, require_same
from ctrlrl.tree import Obs, obs_items

if TYPE_CHECKING:
    import onnx

_KINDS = {"tensor(float)": np.float32, "tensor(double)": np.float64}
_TORCH = {np.float32: torch.float32, np.float64: torch.float64}


class BundlePolicy(StoredModel):
    """The network of a bundle, run row by row in NumPy: bundles are for one robot.

    Attributes:
        bundle: it.
    """

    def __init__(self, bundle: Bundle, action_space: gym.Space[Any]) -> None:
        super().__init__()
        self.bundle, self._box = bundle, box_of(action_space)
        self._runtime = bundle.runtime()
        network = bundle.manifest.network
        self._memory, goldens = dict(network.state), bundle.goldens()
        for name in self._memory:
            blank = torch.zeros_like(torch.from_numpy(goldens[f"network/input/{name}"][:1]))
            self.register_buffer(_plain(name), blank, persistent=False)

    def initial_state(self, n: int) -> PolicyState:
        blank = {name: self.get_buffer(_plain(name)) for name in self._memory}
        return {name: value.repeat(n, *[1] * (value.dim() - 1)) for name, value in blank.items()}

    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        device, entries = obs_items(obs)[0][1].device, self.bundle.manifest.observation
        if torch.compiler.is_exporting():
            return self._traced(obs, state or self.initial_state(1))
        given = {e.name: (obs[e.name] if isinstance(obs, dict) else obs).cpu().numpy().astype(e.dtype) for e in entries}
        n = len(next(iter(given.values())))
        state = state or self.initial_state(n)
        given |= {name: value.cpu().numpy() for name, value in state.items()}
        rows = []
        for i in range(n):
            out = self._runtime.run({name: value[i : i + 1] for name, value in given.items()})
            rows.append({name: np.array(out[name]) for name in ("action", *self._memory.values())})
        after = {
            name: torch.from_numpy(np.concatenate([row[out] for row in rows])).to(device)
            for name, out in self._memory.items()
        }
        action = torch.from_numpy(np.concatenate([row["action"] for row in rows])).float().to(device)
        return action.view(n, *self._box.shape), after, {}

    def _traced(self, obs: Obs, state: PolicyState) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        own = self.bundle.manifest
        given = {
            e.name: (obs[e.name] if isinstance(obs, dict) else obs).to(getattr(torch, e.dtype)) for e in own.observation
        }
        outputs = {out: (tuple(state[name].shape), state[name].dtype) for name, out in self._memory.items()}
        out = self.traced(given | state, {"action": ((1, *own.action.shape), torch.float32)} | outputs)
        after = {name: out[of] for name, of in self._memory.items()}
        return out["action"].view(1, *self._box.shape), after, {}

    def model(self) -> onnx.ModelProto:
        import onnx

        return onnx.load_from_string(self.bundle.content("policy.onnx"))

    @property
    def source(self) -> str:
        return str(self.bundle.path)


def _plain(name: str) -> str:
    return name.replace(".", "_")


class OnnxPolicy(StoredModel):
    """An ONNX file with one input for each entry of the observation, named as it (any name, where there is one alone),
    and one output, actions in the environment's units.

    Raises:
        UsageError: onnxruntime is missing or cannot read it, or its inputs and output are others; names both sides.
    """

    def __init__(self, path: Path, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
        super().__init__()
        self._session, self._path = onnx_session(str(path), path), path
        box, inputs = box_of(action_space), self._session.get_inputs()
        self._shape = box.shape
        spaces = observation_space.spaces if isinstance(observation_space, gym.spaces.Dict) else {"": observation_space}
        names = [one.name for one in inputs]
        if len(inputs) == len(spaces) == 1:
            self._names = {names[0]: next(iter(spaces))}
        elif set(names) <= set(spaces):
            self._names = {name: name for name in names}
        else:
            raise UsageError(f"{path} reads {', '.join(names)}; the environment gives {', '.join(spaces)}")
        told = {one.name: tuple(one.shape) for one in inputs}
        differences = [
            f"{name}: it reads {told[name][1:]}, the environment gives {spaces[entry].shape}"
            for name, entry in self._names.items()
            if not _fits(told[name][1:], spaces[entry].shape or ())
        ]
        outputs = self._session.get_outputs()
        if len(outputs) != 1 or not _fits(tuple(outputs[0].shape)[1:], box.shape):
            found = ", ".join(f"{one.name} {tuple(one.shape)[1:]}" for one in outputs)
            differences.append(f"action: it gives {found}, the environment takes {box.shape}")
        require_same(str(path), differences, [])
        if odd := [one.type for one in (*inputs, *outputs) if one.type not in _KINDS]:
            raise UsageError(f"{path} has {', '.join(odd)}; inputs and output must be of float or double")
        self._types = {one.name: _KINDS[one.type] for one in inputs}
        firsts = {told[name][0] for name in told}
        self._single = 1 in firsts
        if fixed := [first for first in firsts if isinstance(first, int) and first != 1]:
            raise UsageError(f"{path} takes {fixed[0]} rows at a time; it must take one, or any number")

    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        first = obs_items(obs)[0][1]
        if torch.compiler.is_exporting():
            return self._traced(obs), state or {}, {}
        given = {}
        for name, entry in self._names.items():
            value = (obs[entry] if isinstance(obs, dict) else obs).cpu().numpy()
            given[name] = value.astype(self._types[name])
        rows = [slice(i, i + 1) for i in range(len(first))] if self._single else [slice(None)]
        parts = [self._session.run(None, {name: value[row] for name, value in given.items()})[0] for row in rows]
        action = torch.from_numpy(np.concatenate(parts)).float().to(first.device)
        return action.view(len(first), *self._shape), state or {}, {}

    def _traced(self, obs: Obs) -> Tensor:
        given = {
            name: (obs[entry] if isinstance(obs, dict) else obs).to(_TORCH[self._types[name]])
            for name, entry in self._names.items()
        }
        output = self._session.get_outputs()[0]
        out = self.traced(given, {output.name: ((1, *self._shape), _TORCH[_KINDS[output.type]])})
        return out[output.name].float()

    def model(self) -> onnx.ModelProto:
        import onnx

        return onnx.load(self._path)

    @property
    def source(self) -> str:
        return str(self._path)


def _fits(told: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    """Whether a shape, in which what is no number is left open, is `shape`."""
    return len(told) == len(shape) and all(not isinstance(a, int) or a == b for a, b in zip(told, shape, strict=True))
