"""Messages over UDP and ZeroMQ, and the driver that talks to a robot by them (`ctrlrl.deploy.wire`).

Whoever serves binds to this machine alone unless told otherwise. A UDP controller is connected to one address, so that
the operating system drops what others send; messages that are none, too old, or of another robot are counted.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from ctrlrl.deploy import wire
from ctrlrl.deploy.driver import Driver
from ctrlrl.deploy.realtime import Time
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.wire import BadMessage, Command, RobotDescription, State
from ctrlrl.errors import UsageError

TRIPS = 5
"""Hellos by which it is measured how long a message and its answer take."""
AT_ONCE = 1000
"""Messages that are looked at in one go: whoever floods a controller must not stop its loop."""
HELLO_EVERY = 0.1  # s
ANSWER = 0.0005  # s, between two looks for it
MEMORY = 64 * 1024
"""Bytes of messages that the operating system keeps, the oldest ones: what does not look for long must look again."""


class Line(ABC):
    """Messages to and from one other side; nothing waits."""

    @abstractmethod
    def send(self, message: bytes) -> None:
        """Send it, or lose it."""

    @abstractmethod
    def receive(self) -> Iterator[bytes]:
        """Messages that have come, at most `AT_ONCE`."""

    def accept(self) -> None:  # noqa: B027  (most have one other side)
        """Talk to whoever sent the message that was received last."""

    @property
    def accepted(self) -> bool:
        """Whether the message that was received last came from whom this talks to."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Safe to call twice."""


class UdpLine(Line):
    """Datagrams to and from one address."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = _udp_socket(address[0])
        self._socket.connect(address)

    def send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody there, no route, no memory: as a datagram that was lost
            self._socket.send(message)

    def receive(self) -> Iterator[bytes]:
        for _ in range(AT_ONCE):
            try:
                yield self._socket.recv(wire.LARGEST_MESSAGE + 1)
            except BlockingIOError:
                return
            except OSError:  # what was sent before found nobody
                continue

    def close(self) -> None:
        self._socket.close()


class UdpServer(Line):
    """Datagrams from anyone; what is sent goes to whoever sent the last one that `accept` was called for."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = _udp_socket(address[0])
        try:
            self._socket.bind(address)
        except OSError as error:
            raise UsageError(f"cannot serve at {address[0]}:{address[1]}: {error.strerror}") from None
        self._last: Any = None
        self._peer: Any = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._socket.getsockname()[1])

    def accept(self) -> None:
        self._peer = self._last

    @property
    def accepted(self) -> bool:
        return self._last is not None and self._last == self._peer

    def send(self, message: bytes) -> None:
        if self._peer is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(message, self._peer)

    def receive(self) -> Iterator[bytes]:
        for _ in range(AT_ONCE):
            try:
                message, self._last = self._socket.recvfrom(wire.LARGEST_MESSAGE + 1)
            except BlockingIOError:
                return
            except OSError:
                continue
            yield message

    def close(self) -> None:
        self._socket.close()


class ZmqLine(Line):
    """Messages over ZeroMQ, one pair of sockets; where the other side does not take them, new ones are dropped."""

    def __init__(self, address: str, *, serve: bool) -> None:
        zmq = _zmq()
        self._zmq, self._context = zmq, zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 2)
        self._socket.setsockopt(zmq.RCVHWM, 1000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.LARGEST_MESSAGE)
        try:
            self._socket.bind(address) if serve else self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise UsageError(f"cannot {'serve at' if serve else 'connect to'} {address}: {error}") from None

    def send(self, message: bytes) -> None:
        with contextlib.suppress(self._zmq.ZMQError):
            self._socket.send(message, self._zmq.NOBLOCK)

    def receive(self) -> Iterator[bytes]:
        for _ in range(AT_ONCE):
            try:
                message: bytes = self._socket.recv(self._zmq.NOBLOCK)
            except self._zmq.ZMQError:
                return
            yield message

    def close(self) -> None:
        if not self._socket.closed:
            self._socket.close()
            self._context.term()


class WireDriver(Driver):
    """A robot that speaks `ctrlrl.deploy.wire`.

    Args:
        line: to it.
        where: what it is called in messages.
        clock: real time, or another.
    """

    def __init__(self, line: Line, where: str, clock: Time) -> None:
        super().__init__()
        self._line, self._where, self._clock = line, where, clock
        self._sequence, self._newest = 0, -1
        self._digest = bytes(8)

    def connect(self, timeout: float) -> RobotDescription:
        end, echo = self._clock.now() + timeout, os.urandom(wire.ECHO)
        while self._clock.now() < end:
            if self._greet(echo, HELLO_EVERY) is not None:
                break
        else:
            counted = ", ".join(f"{count} dropped for their {why}" for why, count in self.dropped.items())
            raise UsageError(
                f"no robot answers at {self._where} within {timeout:g} s: is it on, and is the address right?"
                + (f" What came was none of its messages: {counted}" if counted else "")
            )
        trips = [self._greet(echo, min(timeout, 1.0)) for _ in range(TRIPS)]  # the same hello changes nothing
        self.trip = min((trip for trip in trips if trip is not None), default=0.0)
        self._newest = -1
        self._nothing = np.zeros(len(self.description.driven))
        return self.description

    def _greet(self, echo: bytes, patience: float) -> float | None:
        """Say hello, and take the description; returns the seconds that it took, None where nothing came."""
        self._sequence += 1
        began = self._clock.now()
        self._line.send(wire.pack_hello(self._sequence, began, echo))
        while self._clock.now() < began + patience:
            for message in self._line.receive():
                try:
                    kind = wire.kind_of(message)
                    if kind == wire.STATE:
                        continue  # of a robot that has been greeted
                    if kind != wire.DESCRIPTION:
                        raise BadMessage("kind")
                    self.description, self._digest = wire.unpack_description(message, echo, self._where)
                except BadMessage as bad:
                    self.dropped[str(bad)] += 1
                    continue
                return self._clock.now() - began
            self._clock.wait_until(self._clock.now() + ANSWER)
        return None

    def read(self) -> State | None:
        newest = None
        for message in self._line.receive():
            try:
                if wire.kind_of(message) != wire.STATE:
                    raise BadMessage("kind")
                state = wire.unpack_state(message, self.description, self._digest)
                if state.sequence <= self._newest:
                    raise BadMessage("sequence")
            except BadMessage as bad:
                self.dropped[str(bad)] += 1
                continue
            self._newest, newest = state.sequence, state
        return newest

    def drive(self, state: State, target: Array, kp: Array, kd: Array) -> None:
        self._send(wire.DRIVE, state, target, kp, kd)

    def make_safe(self, state: State | None) -> None:
        self._send(wire.SAFE, state, self._nothing, self._nothing, self._nothing)

    def _send(self, mode: int, state: State | None, target: Array, kp: Array, kd: Array) -> None:
        self._sequence += 1
        episode, origin = (0, 0) if state is None else (state.episode, state.sequence)
        command = Command(self._sequence, self._clock.now(), mode, episode, origin, target, kp, kd)
        self._line.send(wire.pack_command(command, self._digest))

    def close(self) -> None:
        self._line.close()


class Endpoint:
    """The robot's side: answers hellos, hands out commands, sends states.

    Args:
        line: to controllers.
        description: of the robot.
        clock: real time, or another.

    Attributes:
        dropped: messages that were not looked at, by the reason.
        busy: set while a controller drives: hellos of others are dropped then.
    """

    def __init__(self, line: Line, description: RobotDescription, clock: Time) -> None:
        self.line, self._clock = line, clock
        self.description, self.digest = description, description.digest
        self.dropped: Counter[str] = Counter()
        self.busy = False
        self.greeted = 0
        """Controllers that said hello, or one that was started again."""
        self._sequence, self._newest = 0, -1
        self._echo = b""

    def commands(self) -> Iterator[Command]:
        """Commands that have come, oldest first; each has a greater sequence number than the one before."""
        for message in self.line.receive():
            try:
                kind = wire.kind_of(message)
                if kind == wire.HELLO:
                    self._greet(wire.unpack_hello(message))
                    continue
                if kind != wire.COMMAND:
                    raise BadMessage("kind")
                if not self.line.accepted:
                    raise BadMessage("sender")
                command = wire.unpack_command(message, self.description, self.digest)
                if command.sequence <= self._newest:
                    raise BadMessage("sequence")
                if not np.isfinite(message_numbers(command)).all():
                    raise BadMessage("numbers that are not finite")
            except BadMessage as bad:
                self.dropped[str(bad)] += 1
                continue
            self._newest = command.sequence
            yield command

    def _greet(self, echo: bytes) -> None:
        if self.busy and not self.line.accepted:
            raise BadMessage("sender")
        self.line.accept()
        if echo != self._echo:  # else its answer was lost, or it was late
            self.greeted, self._newest, self._echo = self.greeted + 1, -1, echo
        self._sequence += 1
        self.line.send(wire.pack_description(self._sequence, self._clock.now(), echo, self.description))

    def state(self, state: State) -> None:
        """Send a state, whose sequence number is set here."""
        self._sequence += 1
        state.sequence = self._sequence
        self.line.send(wire.pack_state(state, self.description, self.digest))


def message_numbers(command: Command) -> Array:
    """All numbers of a command, (3 A,)."""
    return np.concatenate([command.target, command.kp, command.kd])


def parse_udp(address: str) -> tuple[str, int]:
    """`host:port`.

    Raises:
        UsageError: it is none.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not 0 <= int(port) < 65_536 or not host:
        raise UsageError(f"an address is HOST:PORT, such as 127.0.0.1:7001; got {address!r}")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
    except OSError as error:
        raise UsageError(f"no host {host!r}: {error.strerror}") from None
    return str(found[0][4][0]), int(port)


def require_loopback(host: str, remote: bool) -> None:
    """Raise unless a server at `host` is reached from this machine alone, or it was said that others may.

    Raises:
        UsageError: they could, and it was not said.
    """
    if not remote and not ipaddress.ip_address(host).is_loopback:
        raise UsageError(f"whoever reaches {host} could drive the robot: say --allow-remote if that is meant")


def _udp_socket(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    udp = socket.socket(family, socket.SOCK_DGRAM)
    udp.setblocking(False)
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MEMORY)
    return udp


def _zmq() -> Any:
    try:
        import zmq
    except ImportError:
        raise UsageError("ZeroMQ is not installed: pip install 'ctrlrl[deploy]', or take UDP") from None
    return zmq
