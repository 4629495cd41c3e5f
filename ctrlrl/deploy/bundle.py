"""A policy bundle: a folder that holds everything a controller needs, and nothing that it must trust blindly.

    manifest.json         what it is (`ctrlrl.deploy.manifest`), with the checksum of every other file
    manifest.sha256       its own
    policy.onnx           observation and state to action and next state: normalization, clips and squashing inside
    network.json          the same as operations (`ctrlrl.deploy.network`), whose arrays are in policy.safetensors
    policy.safetensors
    policy.h              the same as C
    golden.safetensors    observations and the actions that follow, and measurements and the observations they make

Opening one compares checksums and replays the goldens of measurements, and a runtime replays those of the network; what
differs is refused. Nothing in it is run but arithmetic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctrlrl.deploy.features import FeatureBuilder, Reading
from ctrlrl.deploy.manifest import Manifest
from ctrlrl.deploy.network import Network
from ctrlrl.deploy.runtimes import RUNTIMES, Runtime, make_runtime
from ctrlrl.deploy.tensors import Array, read_tensors
from ctrlrl.errors import UsageError

MANIFEST, SEAL, MODEL, NETWORK, WEIGHTS, HEADER, GOLDENS = (
    "manifest.json",
    "manifest.sha256",
    "policy.onnx",
    "network.json",
    "policy.safetensors",
    "policy.h",
    "golden.safetensors",
)
FEATURE_TOLERANCE = 1e-4
"""By which observations and commands may differ from training's, in their units: those are of float32."""
LARGEST_FILE = 2**31
LARGEST_MANIFEST = 2**24


class Bundle:
    """A bundle on disk whose checksums are right; `Bundle.open` reads one.

    Attributes:
        path: its folder.
        manifest: what it says.
    """

    def __init__(self, path: Path, manifest: Manifest, raw: bytes, contents: Mapping[str, bytes]) -> None:
        self.path, self.manifest, self._raw, self._contents = path, manifest, raw, dict(contents)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read a bundle and compare its checksums.

        Raises:
            UsageError: there is none, a file is missing, altered or one too many, or the manifest is none.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise UsageError(f"{path} is no bundle: it has no {MANIFEST}. `ctrlrl export RUN --out BUNDLE` makes one")
        raw = _content(path, MANIFEST, LARGEST_MANIFEST)
        seal = _content(path, SEAL, 1000).strip().decode(errors="replace")
        if seal != hashlib.sha256(raw).hexdigest():
            raise UsageError(f"{path / MANIFEST} was altered: {SEAL} has another checksum")
        manifest = Manifest.from_json(raw, str(path / MANIFEST))
        needed = {MODEL, GOLDENS} | ({NETWORK, WEIGHTS} if "numpy" in manifest.network.runtimes else set())
        if missing := sorted(needed - manifest.files.keys()):
            raise UsageError(f"{path / MANIFEST} lists no {', '.join(missing)}")
        there = {entry.name for entry in path.iterdir()} - {MANIFEST, SEAL}
        if extra := sorted(there - manifest.files.keys()):
            raise UsageError(f"{path} holds {', '.join(extra)}, which its manifest does not list")
        contents = {}
        for name, entry in manifest.files.items():
            if name not in (MODEL, NETWORK, WEIGHTS, HEADER, GOLDENS):
                raise UsageError(f"{path / MANIFEST} lists the file {name!r}, which no bundle has")
            contents[name] = content = _content(path, name, LARGEST_FILE)
            found = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            if found != entry:
                raise UsageError(f"{path / name} was altered: it is {found}, and the manifest says {entry}")
        opened = cls(path, manifest, raw, contents)
        if opened.measured:
            opened.replay_features()
        return opened

    @property
    def seal(self) -> str:
        """The checksum of its manifest, and so of all that is in it."""
        return hashlib.sha256(self._raw).hexdigest()

    def content(self, name: str) -> bytes:
        """The bytes of one of its files, as they were when it was opened."""
        return self._contents[name]

    @property
    def measured(self) -> bool:
        """Whether there are goldens of measurements, so that it is known what the policy's terms were in training."""
        return any(name.startswith("features/") for name in self.goldens())

    def network(self) -> Network:
        """The network as operations.

        Raises:
            UsageError: it has none, or none that can be run.
        """
        if NETWORK not in self._contents:
            raise UsageError(f"{self.path} runs with onnxruntime alone: {self.manifest.network.why_not}")
        weights = read_tensors(self._contents[WEIGHTS], str(self.path / WEIGHTS))
        network, m = Network.from_json(self._contents[NETWORK], weights, str(self.path / NETWORK)), self.manifest
        said = {entry.name: (1, *entry.shape) for entry in m.observation}
        found = {name: value.shape for name, value in network.inputs.items() if name not in m.network.state}
        outputs = {"action", *m.network.state.values()}
        if (
            said != found
            or not m.network.state.keys() <= network.inputs.keys()
            or not outputs <= network.outputs.keys()
        ):
            raise UsageError(
                f"{self.path}: the network takes {found} and gives {', '.join(network.outputs)}; its manifest says "
                f"{said} and {', '.join(sorted(outputs))}"
            )
        return network

    def goldens(self) -> dict[str, Array]:
        """`network/input/NAME` and `network/output/NAME` (N, ...), and `features/...` where there are any."""
        return read_tensors(self._contents[GOLDENS], str(self.path / GOLDENS))

    def runtime(self, name: str | None = None) -> Runtime:
        """What runs the network, after it has reproduced the goldens; by default the first that there is.

        Raises:
            UsageError: there is none of that name, or it gives other numbers.
        """
        chosen = name or next((n for n in self.manifest.network.runtimes if RUNTIMES[n].available()), None)
        if chosen is None or chosen not in self.manifest.network.runtimes:
            known = ", ".join(self.manifest.network.runtimes)
            raise UsageError(f"{self.path} runs with {known}, not {chosen or 'what is installed here'}")
        runtime = make_runtime(chosen, self)
        self.replay(runtime)
        return runtime

    def replay(self, runtime: Runtime) -> float:
        """The largest difference of a runtime's numbers to the goldens, relative to 1 or to the number.

        Raises:
            UsageError: it is above the tolerance, or there are no goldens.
        """
        goldens = self.goldens()
        given = {n.removeprefix("network/input/"): v for n, v in goldens.items() if n.startswith("network/input/")}
        wanted = {n.removeprefix("network/output/"): v for n, v in goldens.items() if n.startswith("network/output/")}
        rows = {len(value) for value in (*given.values(), *wanted.values()) if value.ndim}
        if not given or not wanted or len(rows) != 1 or not (count := rows.pop()):
            raise UsageError(f"{self.path / GOLDENS} has no goldens of the network")
        worst = 0.0
        for row in range(count):
            result = runtime.run({name: value[row : row + 1] for name, value in given.items()})
            for name, value in wanted.items():
                expected = value[row : row + 1].astype(np.float64)
                if name not in result or result[name].shape != expected.shape:
                    raise UsageError(f"{self.path}: {runtime.name} gives no {name} of {expected.shape}")
                off = np.abs(result[name] - expected) / np.maximum(1.0, np.abs(expected))
                if not (off <= self.manifest.network.tolerance).all():
                    raise UsageError(
                        f"{self.path}: {runtime.name} gives other numbers than when this was exported: {name} of "
                        f"golden {row} is off by {off.max():.3g}, and {self.manifest.network.tolerance:g} is allowed"
                    )
                worst = max(worst, float(off.max(initial=0.0)))
        return worst

    def asked_efforts(self) -> dict[str, float]:
        """By joint, the largest effort that the policy asked for in the goldens of measurements at the moment it acted,
        as a share of what the motor gives: above 1 the motor was at its limit in training. Nothing is in it where
        there are none, or where efforts are commanded."""
        action = self.manifest.action
        if not self.measured or "position" not in action.kind:
            return {}
        goldens, known = self.goldens(), {joint.name: joint for joint in self.manifest.joints}
        places = [list(known).index(name) for name in action.joints]
        joints = [known[name] for name in action.joints]
        kp, kd, most = (np.array([getattr(j, n) for j in joints], float) for n in ("kp", "kd", "max_effort"))
        target, position = goldens["features/control"], goldens["features/position"][:, places]
        asked = np.abs(kp * (target - position) - kd * goldens["features/velocity"][:, places]).max(0) / most
        return dict(zip(action.joints, asked.tolist(), strict=True))

    def replay_features(self) -> float:
        """The largest difference of what `FeatureBuilder` makes of the goldens' measurements to what the task made of
        them in training: observations, and what actions command.

        Raises:
            UsageError: it is above `FEATURE_TOLERANCE`, and what is measured in steps above these; or there are none.
        """
        goldens, manifest = self.goldens(), self.manifest
        part: dict[str, Array] = {
            n.removeprefix("features/"): v for n, v in goldens.items() if n.startswith("features/")
        }
        others = {n.removeprefix("others/"): v for n, v in part.items() if n.startswith("others/")}
        needed = {"position", "velocity", "action", "control", "command"}
        needed |= {f"observation/{entry.name}" for entry in manifest.observation}
        rows = {len(value) for value in part.values() if value.ndim == 2}
        if not needed <= part.keys() or len(rows) != 1 or any(value.ndim != 2 for value in part.values()):
            raise UsageError(f"{self.path / GOLDENS} has no goldens of measurements")
        names = [joint.name for joint in manifest.joints]
        if part["position"].shape[1:] != (len(names),):
            raise UsageError(f"{self.path / GOLDENS}: positions are {part['position'].shape}, of {len(names)} joints")
        builder = FeatureBuilder(manifest, names)
        worst = 0.0
        for t in range(len(part["control"])):
            measured = {name: value[t] for name, value in others.items()}
            reading = Reading(names, part["position"][t], part["velocity"][t], measured)
            if t == 0:
                builder.reset(reading)
            builder.command[:] = part["command"][t]
            observation = builder.observe(reading)
            command = builder.act(part["action"][t], reading)
            pairs = [(f"control of {name}", 0.0) for name in manifest.action.joints]
            made, expected = list(command), list(part["control"][t])
            for entry in manifest.observation:
                made += list(observation[entry.name][0])
                expected += list(part[f"observation/{entry.name}"][t])
                for term in entry.terms:
                    pairs += [(f"{entry.name}/{term.name}", term.resolution)] * (term.size * term.history)
            for (what, step), ours, theirs in zip(pairs, made, expected, strict=True):
                off = abs(float(ours) - float(theirs))
                if not off <= FEATURE_TOLERANCE + step:
                    raise UsageError(
                        f"{self.path}: {what} in step {t} is {ours:.6g} by the manifest, and in training it was "
                        f"{theirs:.6g}"
                    )
                worst = max(worst, off)
        return worst


def _content(path: Path, name: str, largest: int) -> bytes:
    file = path / name
    if file.is_symlink() or not file.is_file():
        raise UsageError(f"{file} is missing, or no plain file")
    if file.stat().st_size > largest:
        raise UsageError(f"{file} has {file.stat().st_size:,} bytes; {largest:,} are read at most")
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from None


def file_entry(content: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
