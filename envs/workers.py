"""Gymnasium environments in worker processes over shared memory, under this interpreter or another one.

Each worker hosts a contiguous share of the environments. Commands go as JSON lines over a socket pair; observations,
actions and rewards lie in one anonymous memory map, so nothing is left on disk however a run ends. Every worker is told
to step before the first answer is awaited. Workers do not see the terminal's Ctrl-C and end by themselves when this
process is gone.

To be fast rather than isolated, the first share can stay in this process: it is stepped while the workers step theirs,
and one process less is to be woken and waited for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from typing import IO, Any, NoReturn

import gymnasium as gym
import numpy as np
import torch

from ctrlrl.cores import usable_cores
from ctrlrl.envs import worker as worker_script
from ctrlrl.envs.gymnasium_backend import HostedVector, made_without_opengl, undrawable, usage_error
from ctrlrl.envs.vector import EnvState
from ctrlrl.envs.worker import (
    RECEIVED,
    Refused,
    Share,
    decode_array,
    encode_array,
    layout,
    map_arrays,
    place,
    receive_soon,
)
from ctrlrl.errors import EnvironmentFailure, UsageError

_OUTPUT_KEPT = 8192
"""Bytes of what a worker printed that are kept for the message of its failure."""
_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 5.0
_DUMP_SECONDS = 2.0
_DRAIN_SECONDS = 1.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_PROBE = """
import json, sys
from importlib import util
missing = [name for name in ("numpy", "gymnasium") if util.find_spec(name) is None]
version = ""
if not missing:
    from importlib.metadata import version as find
    version = find("gymnasium")
print(json.dumps({"python": list(sys.version_info[:2]), "missing": missing, "gymnasium": version}))
"""


class WorkerVector(HostedVector):
    """N Gymnasium environments in worker processes; the same trajectories as `GymnasiumVector`, seed for seed.

    What the first worker prints goes to stderr, a second later at most; of what the others print, the end is shown when
    they fail. Each worker computes with one thread, unless `OMP_NUM_THREADS` and its like are set. Where workers alone
    fill all cores, each keeps to its own; else they are left to the scheduler, so that several runs on one machine do
    not meet on the same cores.

    After an `EnvironmentFailure` only `get_state` and `close` work: the state is None for an environment that raised,
    and for all environments of a worker that died or hung.
    """

    def __init__(
        self,
        env_id: str,
        *,
        num_envs: int = 1,
        env_kwargs: dict[str, Any] | None = None,
        env_python: str | os.PathLike[str] | None = None,
        num_workers: int | None = None,
        takes_part: bool = False,
        device: torch.device | str = "cpu",
        render: bool = False,
        pixels: int = 0,
        grayscale: bool = False,
        timeout: float = 60.0,
        start_timeout: float = 180.0,
    ) -> None:
        """Start the workers and make `num_envs` environments `env_id` (`ID` or `module:ID`) in them.

        Args:
            env_kwargs: JSON-able arguments of `gymnasium.make`.
            env_python: another interpreter, with numpy and Gymnasium, to run the environments; None: this one.
            pixels, grayscale: as `make_env` takes them.
            num_workers: shares; None: one per core that this process may use, and no more than environments.
            takes_part: whether the first share stays in this process, where nothing limits how long a step takes.
            timeout: seconds that one step (of all environments of a worker) may take.
            start_timeout: seconds that making the environments, or a reset, may take.

        Raises:
            UsageError: the interpreter, the id, an argument or a space cannot be used; says what to do.
            RenderFailure: making an environment failed since OpenGL cannot be used.
            EnvironmentFailure: an environment raised while being made, or its worker died or hung.
        """
        if os.name != "posix":
            raise UsageError("environments in worker processes need Linux or macOS; use backend='gymnasium'")
        if env_python is not None:
            _check_interpreter(env_python)
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * (os.cpu_count() or 1)
        usable = usable_cores()
        count = min(num_envs, num_workers or usable)
        # Whoever waits stays awake where that keeps nobody from working: to be woken takes as long as a few steps.
        awake = count + (not takes_part) <= usable
        bounds = [int(edge) for edge in np.linspace(0, num_envs, count + 1).round()]
        config = {
            "env": env_id,
            "kwargs": env_kwargs or {},
            "render": render,
            "pixels": pixels,
            "grayscale": grayscale,
            "sys_path": sys.path if env_python is None else None,
            "awake": awake,
            # Environments that draw from global generators do so in the same way in every run of one seed.
            "generators": zlib.crc32(np.random.get_state(legacy=True)[1].tobytes()),  # type: ignore[index]
        }
        try:
            json.dumps(config)
        except TypeError as error:
            raise UsageError(f"{env_id}: env_kwargs must be JSON-able to reach a worker process: {error}") from error

        self.name = env_id
        self._timeout, self._start_timeout = timeout, start_timeout
        self._renders = render
        self._at = np.full(count, -1)
        self._workers: list[_Worker | _Here] = []
        self._memory_file = _anonymous_file()
        try:
            python = os.fspath(env_python) if env_python is not None else sys.executable
            for index in range(count):
                first, last = bounds[index], bounds[index + 1]
                worker: _Worker | _Here
                if index == 0 and takes_part:
                    worker = _Here(last)
                else:
                    shown = index == int(takes_part)
                    worker = _Worker(python, index, first, last - first, self._memory_file.fileno(), awake, shown)
                self._workers.append(worker)
                core = cores[index] if count == len(cores) and not takes_part else None
                worker.send({**config, "worker": index, "first": first, "count": last - first, "core": core}, timeout)
            descriptions = self._collect(start_timeout)
            if any(description != descriptions[0] for description in descriptions):
                raise UsageError(f"{env_id}: its environments have different spaces; they must be the same")
            arrays = layout(descriptions[0], num_envs, count)
            size = place(arrays)[1]
            os.truncate(self._memory_file.fileno(), size)
            buffers = map_arrays(arrays, mmap.mmap(self._memory_file.fileno(), size))
            for worker in self._workers:
                worker.settle(arrays, buffers, timeout)
            self._collect(timeout)
        except BaseException:
            self.close()
            raise
        self._at = buffers["at"]
        super().__init__(env_id, descriptions[0], buffers, num_envs, device)

    def get_state(self) -> EnvState:
        states: list[dict[str, Any] | None] = []
        arrays: list[dict[str, np.ndarray[Any, Any]]] = []
        for worker in self._workers:
            try:
                reply = self._state_of(worker)
            except EnvironmentFailure:  # further steps raise it; what the healthy workers hold can still be saved
                reply = {"json": [None] * worker.count, "arrays": [{}] * worker.count}
            states += reply["json"]
            arrays += [{name: decode_array(array) for name, array in row.items()} for row in reply["arrays"]]
        return EnvState(states, arrays)

    def _state_of(self, worker: _Worker | _Here) -> dict[str, Any]:
        if worker.awaited:  # an interrupted step: its answer is still to come
            self._receive(worker, self._timeout)
        worker.send({"do": "get_state"}, self._timeout)
        return self._receive(worker, self._timeout)

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if not self._renders:
            raise UsageError(f"{self.name} was made without pictures; make it with render=True")
        self._require_health()
        self._settle()
        self._workers[0].send({"do": "render"}, self._timeout)
        reply = self._receive(self._workers[0], self._timeout)
        if "undrawn" in reply:
            raise undrawable(self.name, reply["undrawn"], reply["cause"])
        return decode_array(reply["picture"])

    def scene(self, row: int) -> NoReturn:
        raise UsageError(f"{self.name} is stepped in worker processes, into whose MuJoCo scenes nobody can look")

    def close(self) -> None:
        workers, self._workers = self._workers, []
        deadline = time.monotonic() + _CLOSE_SECONDS
        with contextlib.ExitStack() as stack:  # all of it, even where an environment of this process raises
            stack.callback(self._memory_file.close)
            for worker in workers:
                stack.callback(worker.end, deadline)
            for worker in workers:
                stack.callback(worker.leave)

    def _reset(self, seeds: list[int | None]) -> None:
        self._settle()
        for worker in self._workers:
            chunk = seeds[worker.first : worker.first + worker.count]
            worker.send({"do": "reset", "seeds": chunk}, self._timeout)
        self._collect(self._start_timeout)

    def _step(self) -> None:
        self._settle()
        self._ask({"do": "step"}, self._timeout)

    def _set_state(self, state: EnvState, seeds: list[int]) -> list[str | None]:
        self._settle()
        for worker in self._workers:
            rows = slice(worker.first, worker.first + worker.count)
            arrays = [{name: encode_array(array) for name, array in row.items()} for row in state.arrays[rows]]
            command = {"do": "set_state", "json": state.json[rows], "arrays": arrays, "seeds": seeds[rows]}
            worker.send(command, self._timeout)
        return [reason for reply in self._collect(self._start_timeout) for reason in reply["reasons"]]

    def _ask(self, command: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
        for worker in self._workers:
            worker.send(command, timeout)
        return self._collect(timeout)

    def _settle(self) -> None:
        """Take the answers that an interrupted call left unread."""
        if any(worker.awaited for worker in self._workers):
            self._collect(self._start_timeout)

    def _collect(self, timeout: float) -> list[dict[str, Any]]:
        """The answers of all workers that owe one. All are heard, so that their states can be saved; then a failure
        raises."""
        replies, failures = [], []
        for worker in self._workers:
            if worker.awaited:
                try:
                    replies.append(self._receive(worker, timeout))
                except (EnvironmentFailure, UsageError) as failure:
                    failures.append(failure)
        if failures:
            raise failures[0]
        return replies

    def _receive(self, worker: _Worker | _Here, timeout: float) -> dict[str, Any]:
        """A worker's answer; raises what it says went wrong."""
        try:
            reply = worker.receive(timeout)
        except _WorkerGone as gone:
            row = int(self._at[worker.index])
            where = f"environment {row}{worker.where}" if row >= 0 else worker.label
            return self._fail(EnvironmentFailure(f"{self.name}: {where} {gone}"))
        if "refused" in reply:
            refused = Refused(*reply["refused"])
            if refused.word in gym.registry:
                raise RegisteredHereOnly(
                    f"{refused.word} is registered in this process, but not in its worker processes: put the call of "
                    f"gymnasium.register in a module and pass 'module:{refused.word}'"
                )
            raise usage_error(refused)
        if "unbuilt" in reply and reply["opengl"]:
            raise made_without_opengl(f"{self.name} ({worker.label})", reply["unbuilt"], reply["opengl"])
        if "unbuilt" in reply:
            self._fail(EnvironmentFailure(f"{self.name} cannot be made ({worker.label}):\n{reply['unbuilt']}"))
        if "raised" in reply:
            text = f"{self.name}: environment {reply['row']}{worker.where} raised:\n{reply['raised']}"
            self._fail(EnvironmentFailure(text))
        return reply


class RegisteredHereOnly(UsageError):
    """Workers do not know an ID that this process knows."""


class _WorkerGone(Exception):
    """A worker died, or was killed since it hung; the text continues `worker 1 ...`."""


class _Here:
    """The share of this process, in the place of a worker."""

    index = first = 0
    label, where = "this process", ""

    def __init__(self, count: int) -> None:
        self.count = count
        self._share = Share()
        self._asked: Callable[[], dict[str, Any]] | None = None

    @property
    def awaited(self) -> bool:
        """Whether there is something to be done, and to be answered."""
        return self._asked is not None

    def send(self, command: dict[str, Any], timeout: float) -> None:
        """Do it when the answer is asked for, which is when the workers have been told."""
        do = self._share.answer if "do" in command else self._share.build
        self._asked = functools.partial(do, command)

    def settle(self, arrays: Sequence[Any], buffers: dict[str, np.ndarray[Any, Any]], timeout: float) -> None:
        """Step in `buffers`, of the layout `arrays`."""
        self._share.settle(buffers)

    def receive(self, timeout: float) -> dict[str, Any]:
        """The answer to the command sent."""
        assert self._asked is not None
        do, self._asked = self._asked, None  # so that what was interrupted is not done twice
        return do()

    def leave(self) -> None:
        """Close the environments."""
        self._share.close()

    def end(self, deadline: float) -> None:
        """Nothing to wait for."""


class _Worker:
    """One worker process, its socket, and the end of what it printed."""

    def __init__(
        self, python: str, index: int, first: int, count: int, memory_fd: int, awake: bool, shown: bool
    ) -> None:
        self.index, self.first, self.count = index, first, count
        self.where = f" (worker {index})"
        self.label = f"worker {index} (environments {first} to {first + count - 1})"
        self.awaited = False
        self._since = 0.0
        self._inbox = bytearray()
        self._output = bytearray()
        self._dump = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        self._socket, theirs = socket.socketpair()
        self._at_once = self._socket.dup()  # without a timeout, for which Python would wait in poll()
        self._awake, self._shown = awake, shown
        self._drained = 0.0
        fds = (theirs.fileno(), memory_fd, self._dump.fileno())
        with theirs:
            self._process = subprocess.Popen(
                [python, "-u", worker_script.__file__, *map(str, fds), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                pass_fds=fds,
                env={**dict.fromkeys(_THREAD_VARIABLES, "1"), **os.environ},
                start_new_session=True,  # the terminal's Ctrl-C is for the parent, which saves and closes
            )
        assert self._process.stdout is not None  # a PIPE was asked for
        self._printed: IO[bytes] = self._process.stdout
        os.set_blocking(self._printed.fileno(), False)
        self._sources = selectors.DefaultSelector()  # not select.select, which cannot take descriptors above 1023
        self._sources.register(self._socket, selectors.EVENT_READ)
        self._sources.register(self._printed, selectors.EVENT_READ)

    def send(self, command: dict[str, Any], timeout: float) -> None:
        """Send a command; a worker that is gone is noticed when its answer is awaited."""
        self.awaited = True
        self._since = time.monotonic()
        if self._since - self._drained > _DRAIN_SECONDS:
            self._drain()
        message = json.dumps(command).encode() + b"\n"
        with contextlib.suppress(ConnectionError, TimeoutError):
            sent = 0
            with contextlib.suppress(BlockingIOError):
                sent = self._at_once.send(message, socket.MSG_DONTWAIT)
            if sent < len(message):
                self._socket.settimeout(timeout)
                self._socket.sendall(message[sent:])

    def settle(self, arrays: Sequence[Any], buffers: dict[str, np.ndarray[Any, Any]], timeout: float) -> None:
        """Step in the shared memory, of the layout `arrays`."""
        self.send({"layout": arrays}, timeout)

    def receive(self, timeout: float) -> dict[str, Any]:
        """The answer to the command sent; raises `_WorkerGone` where none comes within `timeout` seconds of it, or of
        the last sign of life."""
        while True:
            line, newline, rest = self._inbox.partition(b"\n")
            if newline:
                self._inbox = rest
                reply: dict[str, Any] = json.loads(line)
                if "alive" not in reply:
                    self.awaited = False
                    return reply
                self._since = time.monotonic()
                continue
            if self._awake and (chunk := receive_soon(self._at_once)):
                self._inbox += chunk
                continue
            left = self._since + timeout - time.monotonic()
            # In slices, since a child that the environment forked can hold the socket open after the worker has died.
            ready = [key.fileobj for key, _ in self._sources.select(max(0.0, min(left, _POLL_SECONDS)))]
            if self._printed in ready:
                self._drain()
            if self._socket in ready:
                chunk = b""
                with contextlib.suppress(ConnectionError):
                    chunk = self._socket.recv(RECEIVED)
                if not chunk:
                    raise self._died()
                self._inbox += chunk
            elif left <= 0:
                raise self._hung(timeout)
            elif not ready and self._process.poll() is not None:
                raise self._died()

    def leave(self) -> None:
        """Ask the worker to close its environments and end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def end(self, deadline: float) -> None:
        """Wait for the worker to end until `deadline` (monotonic seconds), then kill it and what it started."""
        while self._process.poll() is None and time.monotonic() < deadline:
            self._drain()  # a full pipe would hold up its last words
            time.sleep(0.002)
        self._kill()
        self._sources.close()
        self._socket.close()
        self._at_once.close()
        self._printed.close()
        self._dump.close()

    def _kill(self) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _died(self) -> _WorkerGone:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_DUMP_SECONDS)
        self._kill()  # one that closed its socket and lives on
        code = self._process.returncode
        how = f"exited with code {code}" if code >= 0 else f"was ended by signal {-code} ({signal.strsignal(-code)})"
        return _WorkerGone(f"{how}.{self._last_words()}")

    def _hung(self, timeout: float) -> _WorkerGone:
        """Ask where it hangs, then kill it."""
        before = os.fstat(self._dump.fileno()).st_size
        self._process.send_signal(signal.SIGUSR1)
        patience = time.monotonic() + _DUMP_SECONDS
        while os.fstat(self._dump.fileno()).st_size == before and time.monotonic() < patience:
            time.sleep(0.05)
        time.sleep(0.05)  # the dump is written in pieces
        self._kill()
        return _WorkerGone(
            f"gave no answer within {timeout:g} s and was killed; a longer worker_timeout gives it more time."
            + self._last_words()
        )

    def _last_words(self) -> str:
        """Where the worker was, as faulthandler wrote it, and the end of what it printed."""
        self._drain()
        dump = os.pread(self._dump.fileno(), 1 << 16, 0).decode(errors="replace").strip()
        printed = self._output.decode(errors="replace").strip()
        where = f"\nWhere it was:\n{dump}" if dump else ""
        return where + (f"\nThe end of what it printed:\n{printed}" if printed else "")

    def _drain(self) -> None:
        self._drained = time.monotonic()
        while chunk := self._printed.read(1 << 16):
            self._output += chunk
            del self._output[:-_OUTPUT_KEPT]
            if self._shown:
                sys.stderr.write(chunk.decode(errors="replace"))
        if chunk == b"" and self._printed in self._sources.get_map():  # closed, by the environment or by the end
            self._sources.unregister(self._printed)


def _anonymous_file() -> IO[bytes]:
    """A file of memory without a name, so that nothing can be left behind; on disk where the platform has none."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("ctrlrl-environments"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _check_interpreter(python: str | os.PathLike[str]) -> None:
    """Raise UsageError with the remedy where `python` cannot run a worker."""
    try:
        probe = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=60, check=True)
        found = json.loads(probe.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        detail = getattr(error, "stderr", None) or error
        raise UsageError(f"env_python: {python} does not run as a Python interpreter: {detail}") from error
    install = f'{python} -m pip install numpy "gymnasium>=0.29"'
    if tuple(found["python"]) < (3, 8):
        version = ".".join(map(str, found["python"]))
        raise UsageError(f"env_python: {python} is Python {version}; environments need Python 3.8 or newer")
    if found["missing"]:
        raise UsageError(f"env_python: {python} lacks {' and '.join(found['missing'])}. Install: {install}")
    if tuple(int(part) for part in found["gymnasium"].split(".")[:2]) < (0, 29):
        raise UsageError(f"env_python: {python} has Gymnasium {found['gymnasium']}; 0.29 is needed. Install: {install}")
