"""A bundle's policy for programs that make observations themselves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.runtimes import Runtime
from ctrlrl.deploy.tensors import Array
from ctrlrl.errors import UsageError


class Actor:
    """Acts on one observation after the other, and keeps the policy's memory.

        actor = Actor(Bundle.open("bundle"))
        action = actor.act(observation)

    Args:
        bundle: whose policy it is.
        runtime: `onnx`, `numpy` or `c`; by default the first that there is.

    Raises:
        UsageError: there is no such runtime, or it does not reproduce the goldens.
    """

    def __init__(self, bundle: Bundle, runtime: str | None = None) -> None:
        self.bundle = bundle
        self.runtime: Runtime = bundle.runtime(runtime)
        self._entries = bundle.manifest.observation
        goldens, self._next = bundle.goldens(), dict(bundle.manifest.network.state)
        self._memory = {
            name: np.zeros((1, *value.shape[1:]), value.dtype)
            for name in self._next
            for value in [goldens[f"network/input/{name}"]]
        }

    def reset(self) -> None:
        """Start an episode: the memory is empty."""
        for value in self._memory.values():
            value[...] = 0

    def act(self, observation: Array | Mapping[str, Array]) -> Array:
        """The action, in the environment's units, for one observation as the manifest describes it.

        Raises:
            UsageError: an entry is missing, or of another shape.
        """
        given = observation if isinstance(observation, Mapping) else {self._entries[0].name: observation}
        inputs = {}
        for entry in self._entries:
            if entry.name not in given:
                raise UsageError(f"the observation lacks {entry.name}; it has {', '.join(given)}")
            value = np.asarray(given[entry.name])
            if value.shape != entry.shape:
                raise UsageError(f"the observation {entry.name} is {value.shape}; the policy takes {entry.shape}")
            inputs[entry.name] = value.astype(entry.dtype, copy=False)[None]
        return self.run(inputs)

    def run(self, inputs: Mapping[str, Array]) -> Array:
        """The action for observations (1, ...) that are of the right types already."""
        outputs = self.runtime.run({**inputs, **self._memory})
        for name, following in self._next.items():
            self._memory[name][...] = outputs[following]
        return np.array(outputs["action"][0])
