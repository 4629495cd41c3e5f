"""What runs a bundle's network: onnxruntime with one thread, NumPy, and C that is compiled here.

All take inputs (1, ...) by name and give outputs (1, ...) by name. A policy's memory is among both; `Actor` keeps it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctrlrl.deploy.network import Network
from ctrlrl.deploy.tensors import Array
from ctrlrl.errors import UsageError

if TYPE_CHECKING:
    from ctrlrl.deploy.bundle import Bundle


COMPILE_SECONDS = 300


class Runtime(ABC):
    """Runs a network."""

    name: str

    @abstractmethod
    def __init__(self, bundle: Bundle) -> None: ...

    @staticmethod
    @abstractmethod
    def available() -> bool:
        """Whether what it needs is installed."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs (1, ...) of inputs (1, ...), both by name. Outputs are valid until the next call."""


def onnx_session(model: bytes | str, path: Path) -> Any:
    """onnxruntime's session of a model, or of the file that it is in, with one thread; `path` names it in errors.

    Raises:
        UsageError: it is not installed, or cannot read the model.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(f"{path} needs onnxruntime: pip install 'ctrlrl[deploy]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions have no common base but this
        raise UsageError(f"onnxruntime cannot read {path}: {error}") from None


class OnnxRuntime(Runtime):
    """onnxruntime, with one thread: by default it takes one for each core, and the control loop waits for them."""

    name = "onnx"

    def __init__(self, bundle: Bundle) -> None:
        if not self.available():
            raise UsageError("onnxruntime is not installed: pip install 'ctrlrl[deploy]', or take --runtime numpy")
        self._session = onnx_session(bundle.content("policy.onnx"), bundle.path / "policy.onnx")
        self._outputs = [output.name for output in self._session.get_outputs()]

    @staticmethod
    def available() -> bool:
        return importlib.util.find_spec("onnxruntime") is not None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))


class NumpyRuntime(Runtime):
    """The reference (`ctrlrl.deploy.network`), which needs nothing but NumPy."""

    name = "numpy"

    def __init__(self, bundle: Bundle) -> None:
        self._network = bundle.network()

    @staticmethod
    def available() -> bool:
        return True

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self._network(inputs)


class CRuntime(Runtime):
    """C generated from the network (`ctrlrl.deploy.c_source`), compiled by the C compiler of this machine.

    The C is generated anew from the operations: a bundle's own policy.h is for other machines, and not compiled here.
    """

    name = "c"

    def __init__(self, bundle: Bundle) -> None:
        if not self.available():
            raise UsageError("no C compiler is on the PATH ($CC, cc or gcc); take another runtime: onnx or numpy")
        self._network = bundle.network()
        file = _compiled(self._network)
        library = ctypes.CDLL(str(file))
        file.unlink()  # what is loaded stays
        self._call = library.ctrlrl_run
        self._call.argtypes, self._call.restype = [ctypes.c_void_p, ctypes.c_void_p], None
        self._in, self._inputs = _block(self._network.inputs)
        values = {name: self._network.values[result] for name, result in self._network.outputs.items()}
        self._out, self._outputs = _block(values)
        self._addresses = self._in.ctypes.data, self._out.ctypes.data

    @staticmethod
    def available() -> bool:
        return _compiler() is not None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for name, place in self._inputs.items():
            place[...] = inputs[name]
        self._call(*self._addresses)
        return self._outputs


RUNTIMES: dict[str, type[Runtime]] = {"onnx": OnnxRuntime, "numpy": NumpyRuntime, "c": CRuntime}


def make_runtime(name: str, bundle: Bundle) -> Runtime:
    """The runtime `name` of a bundle.

    Raises:
        UsageError: what it needs is not installed, or cannot read the bundle.
    """
    return RUNTIMES[name](bundle)


def _block(values: Mapping[str, Any]) -> tuple[Array, dict[str, Array]]:
    """The memory of a C struct of arrays, and the arrays in it by name."""
    dtype = np.dtype(
        [(f"f{i}", value.dtype, value.shape or (1,)) for i, value in enumerate(values.values())], align=True
    )
    block = np.zeros((), dtype)
    return block, {name: block[f"f{i}"].reshape(value.shape) for i, (name, value) in enumerate(values.items())}


def _compiler() -> str | None:
    wanted = os.environ.get("CC")
    return next((found for name in (wanted, "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)


def _compiled(network: Network) -> Path:
    """A library with `ctrlrl_run(input, output)`, compiled for this machine."""
    from ctrlrl.deploy.c_source import c_header

    try:
        header = c_header(network, "policy")
    except NotImplementedError as error:
        raise UsageError(f"there is no C for {error}; take the runtime onnx or numpy") from None
    program = (
        '#include "policy.h"\nstatic policy_memory memory;\n'
        "void ctrlrl_run(const policy_input *in, policy_output *out) { policy_run(in, out, &memory); }\n"
    )
    folder = Path(tempfile.mkdtemp(prefix="ctrlrl-c-"))
    try:
        (folder / "policy.h").write_text(header)
        (folder / "policy.c").write_text(program)
        library = folder / f"policy-{hashlib.sha256(header.encode()).hexdigest()[:12]}.so"
        command = [str(_compiler()), "-std=c99", "-O3", "-march=native", "-shared", "-fPIC"]
        command += [str(folder / "policy.c"), "-o", str(library), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS)
        if done.returncode:
            raise UsageError(f"the C compiler failed: {done.stderr[-1000:]}")
        loaded = library.rename(folder.with_suffix(".so"))
    except subprocess.TimeoutExpired:
        raise UsageError(f"the C compiler took more than {COMPILE_SECONDS} s; take the runtime onnx or numpy") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return loaded
