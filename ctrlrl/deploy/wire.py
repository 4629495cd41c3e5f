"""What a controller and a robot say to each other: small messages of one fixed size, as any C program can write them.

All numbers are little-endian. Each message begins with 32 bytes:

    magic     4 bytes   CTRL
    version   uint8     1
    kind      uint8     1 hello, 2 description, 3 state, 4 command
    mode      uint8     of a command 0 safe, 1 drive; of a state 0 idle, 1 driven, 2 safe by its own watchdog
    reserved  uint8     0
    sequence  uint64    of the sender, 1 more with each message
    time      int64     ns, of the sender's own clock, which never goes back
    digest    8 bytes   the first of the SHA-256 of the description's JSON, byte for byte as it was sent, by which
                        numbers are to be read; zeros in a hello and a description

    hello        (controller)  32 bytes that the description echoes. The same again is answered again; others begin
                               anew: the robot is idle, and sequence numbers start over
    description  (robot)       the echo, then JSON: `RobotDescription`, of at most 32 KiB
    state        (robot)       episode uint32, then float64: positions and velocities of the joints, in the
                               description's order, then the measurements
    command      (controller)  episode uint32, sequence uint64 of the state that it was computed from, then float64 for
                               each driven joint: targets or efforts, then kp, then kd

A message of another size, version or description is not looked at. That numbers are finite is for who uses them.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ctrlrl.deploy.strict_json import read_document, write_document
from ctrlrl.deploy.tensors import Array
from ctrlrl.errors import UsageError

MAGIC, VERSION = b"CTRL", 1
HELLO, DESCRIPTION, STATE, COMMAND = 1, 2, 3, 4
SAFE, DRIVE = 0, 1
IDLE, DRIVEN, HELD = 0, 1, 2
ECHO = 32
LARGEST_DESCRIPTION = 32_768
LARGEST_MESSAGE = 60_000
"""Of one UDP datagram."""
_HEADER = struct.Struct("<4sBBBBQq8s")
_EPISODE = struct.Struct("<I")
_ORIGIN = struct.Struct("<IQ")
_NOBODY = bytes(8)


class BadMessage(Exception):
    """A message that is none of these; the text is one word, under which it is counted."""


@dataclass(frozen=True, kw_only=True)
class RobotJoint:
    """A joint that a robot measures."""

    name: str
    unit: Literal["rad", "m"] = "rad"
    lower: float | None = None
    """None: without end."""
    upper: float | None = None
    max_effort: float | None = None
    """N m or N; None: nobody drives it."""


@dataclass(frozen=True, kw_only=True)
class RobotDescription:
    """What a robot says of itself when a controller says hello: by these names, and in this order, numbers come."""

    name: str
    control: Literal["position", "effort"]
    """What it takes: targets of positions, rad or m, or efforts, N m or N."""
    joints: tuple[RobotJoint, ...]
    measures: dict[str, int] = field(default_factory=dict)
    """What it measures besides, and how many numbers that is (`ctrlrl.deploy.features.READINGS`)."""
    rate: float
    """States a second."""
    watchdog: float
    """Seconds without a command after which it makes itself safe."""

    def __post_init__(self) -> None:
        names = [joint.name for joint in self.joints]
        wrong = (
            (not names or len(set(names)) != len(names), f"joints must have different names, got {', '.join(names)}"),
            (not self.driven, "a joint at least must be driven: have a max_effort"),
            (not 0 < self.rate <= 100_000, f"rate must be above 0 and at most 100,000 Hz, got {self.rate}"),
            (not 0 < self.watchdog <= 10, f"watchdog must be above 0 and at most 10 s, got {self.watchdog}"),
            (any(not 1 <= size <= 1000 for size in self.measures.values()), "measures have from 1 to 1000 numbers"),
            (state_size(self) > LARGEST_MESSAGE, "a state must fit one datagram"),
        )
        for is_so, what in wrong:
            if is_so:
                raise UsageError(f"the robot {self.name}: {what}")

    @property
    def driven(self) -> tuple[RobotJoint, ...]:
        """The joints that it takes commands for, in their order."""
        return tuple(joint for joint in self.joints if joint.max_effort is not None)

    def to_json(self) -> bytes:
        """What `from_json` reads."""
        return write_document(self, indent=None)

    @classmethod
    def from_json(cls, content: bytes, where: str) -> RobotDescription:
        """Read it strictly.

        Raises:
            UsageError: it is none.
        """
        if len(content) > LARGEST_DESCRIPTION:
            raise UsageError(f"{where} has {len(content):,} bytes; {LARGEST_DESCRIPTION:,} are read at most")
        return read_document(content, cls, where, "description")

    @property
    def digest(self) -> bytes:
        """8 bytes that differ for another description: of what `to_json` makes of it."""
        return _digest(self.to_json())


@dataclass(slots=True)
class State:
    """What a robot measured at one moment, (J,) and by name."""

    sequence: int
    time: float
    """s, of the robot's clock."""
    mode: int
    episode: int
    position: Array
    velocity: Array
    others: dict[str, Array]


@dataclass(slots=True)
class Command:
    """What a robot is to do; `target`, `kp` and `kd` are for its driven joints, (A,)."""

    sequence: int
    time: float
    mode: int
    episode: int
    origin: int
    """The sequence number of the state that it was computed from."""
    target: Array
    kp: Array
    kd: Array


def state_size(description: RobotDescription) -> int:
    """Bytes of a state."""
    numbers = 2 * len(description.joints) + sum(description.measures.values())
    return _HEADER.size + _EPISODE.size + 8 * numbers


def command_size(description: RobotDescription) -> int:
    """Bytes of a command."""
    return _HEADER.size + _ORIGIN.size + 3 * 8 * len(description.driven)


def kind_of(message: bytes) -> int:
    """Which kind of message it is.

    Raises:
        BadMessage: none of ours.
    """
    if len(message) < _HEADER.size:
        raise BadMessage("size")
    magic, version, kind, _, reserved, *_ = _HEADER.unpack_from(message)
    if magic != MAGIC:
        raise BadMessage("magic")
    if reserved:
        raise BadMessage("reserved byte")
    if version != VERSION:
        raise BadMessage("version")
    if not HELLO <= kind <= COMMAND:
        raise BadMessage("kind")
    return int(kind)


def pack_hello(sequence: int, time: float, echo: bytes) -> bytes:
    """A hello with an `echo` of 32 bytes."""
    return _header(HELLO, 0, sequence, time, _NOBODY) + echo


def unpack_hello(message: bytes) -> bytes:
    """The echo that is asked for.

    Raises:
        BadMessage: of another size.
    """
    if len(message) != _HEADER.size + ECHO:
        raise BadMessage("size")
    return message[_HEADER.size :]


def pack_description(sequence: int, time: float, echo: bytes, description: RobotDescription) -> bytes:
    """The answer to a hello."""
    return _header(DESCRIPTION, 0, sequence, time, _NOBODY) + echo + description.to_json()


def unpack_description(message: bytes, echo: bytes, where: str) -> tuple[RobotDescription, bytes]:
    """The description that answers the hello with this `echo`, and its digest.

    Raises:
        BadMessage: it answers another one.
        UsageError: what it says is no description.
    """
    if message[_HEADER.size : _HEADER.size + ECHO] != echo:
        raise BadMessage("echo")
    content = message[_HEADER.size + ECHO :]
    return RobotDescription.from_json(content, where), _digest(content)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:8]


def pack_state(state: State, description: RobotDescription, digest: bytes) -> bytes:
    """A state; `digest` is the description's."""
    others = [np.asarray(state.others[name], "<f8") for name in description.measures]
    numbers = np.concatenate([state.position, state.velocity, *others]).astype("<f8")
    head = _header(STATE, state.mode, state.sequence, state.time, digest)
    return head + _EPISODE.pack(state.episode) + numbers.tobytes()


def unpack_state(message: bytes, description: RobotDescription, digest: bytes) -> State:
    """The state in a message.

    Raises:
        BadMessage: of another size, mode or description.
    """
    mode, sequence, time = _opened(message, state_size(description), digest, HELD)
    (episode,) = _EPISODE.unpack_from(message, _HEADER.size)
    numbers = np.frombuffer(message, "<f8", offset=_HEADER.size + _EPISODE.size).copy()  # aligned
    count = len(description.joints)
    others, at = {}, 2 * count
    for name, size in description.measures.items():
        others[name] = numbers[at : at + size]
        at += size
    return State(sequence, time, mode, episode, numbers[:count], numbers[count : 2 * count], others)


def pack_command(command: Command, digest: bytes) -> bytes:
    """A command; `digest` is the description's."""
    numbers = np.concatenate([command.target, command.kp, command.kd]).astype("<f8")
    head = _header(COMMAND, command.mode, command.sequence, command.time, digest)
    return head + _ORIGIN.pack(command.episode, command.origin) + numbers.tobytes()


def unpack_command(message: bytes, description: RobotDescription, digest: bytes) -> Command:
    """The command in a message.

    Raises:
        BadMessage: of another size, mode or description.
    """
    mode, sequence, time = _opened(message, command_size(description), digest, DRIVE)
    episode, origin = _ORIGIN.unpack_from(message, _HEADER.size)
    numbers = np.frombuffer(message, "<f8", offset=_HEADER.size + _ORIGIN.size)
    target, kp, kd = numbers.reshape(3, -1)
    return Command(sequence, time, mode, episode, origin, target, kp, kd)


def _header(kind: int, mode: int, sequence: int, time: float, digest: bytes) -> bytes:
    return _HEADER.pack(MAGIC, VERSION, kind, mode, 0, sequence, round(time * 1e9), digest)


def _opened(message: bytes, size: int, digest: bytes, last_mode: int) -> tuple[int, int, float]:
    if len(message) != size:
        raise BadMessage("size")
    _, _, _, mode, _, sequence, time, said = _HEADER.unpack_from(message)
    if said != digest:
        raise BadMessage("description")
    if mode > last_mode:
        raise BadMessage("mode")
    return mode, sequence, time / 1e9
