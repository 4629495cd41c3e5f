"""Messages between controllers and robots: what is read is what was written, and nothing else is read."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import time
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from ctrlrl.deploy import wire
from ctrlrl.deploy.realtime import Time
from ctrlrl.deploy.transport import (
    Endpoint,
    UdpLine,
    UdpServer,
    WireDriver,
    ZmqLine,
    parse_udp,
    require_loopback,
)
from ctrlrl.deploy.virtual import MemoryLine, VirtualTime
from ctrlrl.deploy.wire import BadMessage, Command, RobotDescription, RobotJoint, State
from ctrlrl.errors import UsageError

ROBOT = RobotDescription(
    name="two",
    control="position",
    joints=(
        RobotJoint(name="a", lower=-1.0, upper=1.0, max_effort=5.0),
        RobotJoint(name="passive"),
        RobotJoint(name="b", lower=-2.0, upper=2.0, max_effort=7.0),
    ),
    measures={"orientation": 4, "range": 1},
    rate=200.0,
    watchdog=0.1,
)


def a_state(sequence: int = 5) -> State:
    others = {"orientation": np.array([1.0, 0, 0, 0]), "range": np.array([0.25])}
    return State(sequence, 12.5, wire.DRIVEN, 3, np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 3.0]), others)


def a_command(sequence: int = 9, mode: int = wire.DRIVE) -> Command:
    return Command(sequence, 3.25, mode, 3, 5, np.array([0.5, -0.5]), np.array([20.0, 30.0]), np.array([0.5, 0.6]))


def test_what_is_read_is_what_was_written() -> None:
    state = wire.unpack_state(wire.pack_state(a_state(), ROBOT, ROBOT.digest), ROBOT, ROBOT.digest)
    assert (state.sequence, state.time, state.mode, state.episode) == (5, 12.5, wire.DRIVEN, 3)
    assert state.position.tolist() == [0.1, 0.2, 0.3] and state.velocity.tolist() == [1, 2, 3]
    assert {name: value.tolist() for name, value in state.others.items()} == {
        "orientation": [1, 0, 0, 0],
        "range": [0.25],
    }
    command = wire.unpack_command(wire.pack_command(a_command(), ROBOT.digest), ROBOT, ROBOT.digest)
    assert (command.sequence, command.time, command.mode, command.episode, command.origin) == (9, 3.25, 1, 3, 5)
    assert [v.tolist() for v in (command.target, command.kp, command.kd)] == [[0.5, -0.5], [20, 30], [0.5, 0.6]]
    assert RobotDescription.from_json(ROBOT.to_json(), "here") == ROBOT
    echo = bytes(range(32))
    assert wire.unpack_hello(wire.pack_hello(1, 0.0, echo)) == echo
    assert wire.unpack_description(wire.pack_description(1, 0.0, echo, ROBOT), echo, "here") == (ROBOT, ROBOT.digest)
    loose = wire.pack_description(1, 0.0, echo, ROBOT).replace(b"200.0", b"200")  # as another program writes it
    assert wire.unpack_description(loose, echo, "here") == (ROBOT, hashlib.sha256(loose[64:]).digest()[:8])
    with pytest.raises(BadMessage, match="echo"):
        wire.unpack_description(wire.pack_description(1, 0.0, echo, ROBOT), bytes(32), "here")


def test_the_layout_is_the_documented_one() -> None:
    message = wire.pack_command(a_command(), ROBOT.digest)
    head = struct.unpack_from("<4sBBBBQq8s", message)
    assert head == (b"CTRL", 1, 4, 1, 0, 9, 3_250_000_000, ROBOT.digest)
    assert struct.unpack_from("<IQ6d", message, 32) == (3, 5, 0.5, -0.5, 20, 30, 0.5, 0.6)
    assert len(message) == wire.command_size(ROBOT) == 32 + 12 + 48
    assert len(wire.pack_state(a_state(), ROBOT, ROBOT.digest)) == wire.state_size(ROBOT) == 32 + 4 + 8 * 11


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m[:-1], "size"),
        (lambda m: m + b"x", "size"),
        (lambda m: b"", "size"),
        (lambda m: b"ctrl" + m[4:], "magic"),
        (lambda m: m[:4] + b"\x02" + m[5:], "version"),
        (lambda m: m[:5] + b"\x09" + m[6:], "kind"),
        (lambda m: m[:6] + b"\x07" + m[7:], "mode"),
        (lambda m: m[:7] + b"\x01" + m[8:], "reserved byte"),
        (lambda m: m[:24] + bytes(8) + m[32:], "description"),
    ],
)
def test_anything_else_is_dropped_and_counted(change: object, why: str) -> None:
    ours, theirs = MemoryLine.pair()
    endpoint = Endpoint(theirs, ROBOT, VirtualTime())
    ours.send(change(wire.pack_command(a_command(), ROBOT.digest)))  # type: ignore[operator]
    assert list(endpoint.commands()) == [] and endpoint.dropped == {why: 1}


def test_old_repeated_and_not_finite_commands_are_dropped() -> None:
    ours, theirs = MemoryLine.pair()
    endpoint = Endpoint(theirs, ROBOT, VirtualTime())
    for sequence in (5, 5, 4, 6):
        ours.send(wire.pack_command(a_command(sequence), ROBOT.digest))
    bad = replace(a_command(7), target=np.array([np.nan, 0.0]))
    ours.send(wire.pack_command(bad, ROBOT.digest))
    assert [command.sequence for command in endpoint.commands()] == [5, 6]
    assert endpoint.dropped == {"sequence": 2, "numbers that are not finite": 1}


def connected() -> tuple[WireDriver, Endpoint, MemoryLine]:
    clock = VirtualTime()
    ours, theirs = MemoryLine.pair()
    endpoint, driver = Endpoint(theirs, ROBOT, clock), WireDriver(ours, "here", clock)
    clock.between = lambda until: deque(endpoint.commands(), maxlen=0).clear()
    assert driver.connect(1.0) == ROBOT and 0 < driver.trip < 0.001
    return driver, endpoint, theirs


def test_a_driver_takes_the_newest_state_and_drops_old_ones() -> None:
    driver, endpoint, theirs = connected()
    assert driver.read() is None
    for _ in range(3):
        endpoint.state(a_state())
    state = driver.read()
    assert state is not None and state.sequence == 9  # descriptions were the first messages
    theirs.send(wire.pack_state(a_state(2), ROBOT, ROBOT.digest))
    theirs.send(wire.pack_state(a_state(19), ROBOT, bytes(8)))
    assert driver.read() is None and driver.dropped == {"sequence": 1, "description": 1}


def test_a_driver_commands_what_the_robot_understands() -> None:
    driver, endpoint, _ = connected()
    endpoint.state(a_state())
    state = driver.read()
    assert state is not None
    driver.drive(state, np.array([0.5, -0.5]), np.array([20.0, 30.0]), np.array([0.5, 0.6]))
    driver.make_safe(state)
    drive, safe = endpoint.commands()
    assert (drive.mode, drive.origin, drive.episode, drive.target.tolist()) == (wire.DRIVE, 7, 3, [0.5, -0.5])
    assert (safe.mode, safe.target.tolist()) == (wire.SAFE, [0, 0]) and safe.sequence == drive.sequence + 1


def test_a_controller_that_begins_anew_is_heard() -> None:
    driver, endpoint, _ = connected()
    for _ in range(5):
        driver.make_safe(None)
    assert len(list(endpoint.commands())) == 5
    assert endpoint.greeted == 1
    driver._sequence = 0  # as another process would
    driver.connect(1.0)
    driver.make_safe(None)
    assert len(list(endpoint.commands())) == 1 and endpoint.greeted == 2


def test_a_hello_that_comes_again_is_answered_and_changes_nothing() -> None:
    clock = VirtualTime()
    ours, theirs = MemoryLine.pair()
    endpoint = Endpoint(theirs, ROBOT, clock)
    for _ in range(2):
        ours.send(wire.pack_hello(1, 0.0, bytes(32)))
        ours.send(wire.pack_command(a_command(5), ROBOT.digest))
    assert len(list(endpoint.commands())) == 1 and endpoint.greeted == 1
    assert len(list(ours.receive())) == 2 and endpoint.dropped == {"sequence": 1}


def test_messages_over_udp_and_nobody_takes_the_robot_over() -> None:
    server = UdpServer(("127.0.0.1", 0))
    endpoint = Endpoint(server, ROBOT, Time())
    line = UdpLine(("127.0.0.1", server.port))
    other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        line.send(wire.pack_hello(1, 0.0, bytes(32)))
        wait(lambda: bool(list(endpoint.commands())) or endpoint.greeted)
        wait(lambda: any(wire.kind_of(m) == wire.DESCRIPTION for m in line.receive()))
        endpoint.busy = True
        other.sendto(wire.pack_hello(1, 0.0, bytes(32)), ("127.0.0.1", server.port))
        other.sendto(wire.pack_command(a_command(50), ROBOT.digest), ("127.0.0.1", server.port))
        other.sendto(bytes(60_000), ("127.0.0.1", server.port))
        wait(lambda: not list(endpoint.commands()) and sum(endpoint.dropped.values()) == 3)
        assert endpoint.dropped == {"sender": 2, "magic": 1} and endpoint.greeted == 1
        line.send(wire.pack_command(a_command(2), ROBOT.digest))
        wait(lambda: [command.sequence for command in endpoint.commands()] == [2])
    finally:
        line.close()
        server.close()
        other.close()


def test_messages_over_zeromq(tmp_path: object) -> None:
    pytest.importorskip("zmq")
    address = f"ipc://{tmp_path}/robot"
    server, line = ZmqLine(address, serve=True), ZmqLine(address, serve=False)
    try:
        endpoint = Endpoint(server, ROBOT, Time())
        line.send(wire.pack_hello(1, 0.0, bytes(32)))
        wait(lambda: bool(list(endpoint.commands())) or endpoint.greeted)
        wait(lambda: any(wire.kind_of(m) == wire.DESCRIPTION for m in line.receive()))
        line.send(wire.pack_command(a_command(2), ROBOT.digest))
        wait(lambda: [command.sequence for command in endpoint.commands()] == [2])
        with pytest.raises(UsageError, match="cannot serve at"):
            ZmqLine("nonsense://x", serve=True)
    finally:
        line.close()
        server.close()


def wait(there: object) -> None:
    end = time.monotonic() + 20
    while not there():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


def test_nobody_there_is_told_of() -> None:
    free = UdpServer(("127.0.0.1", 0))
    port = free.port
    free.close()
    driver = WireDriver(UdpLine(("127.0.0.1", port)), f"127.0.0.1:{port}", Time())
    with pytest.raises(UsageError, match=f"no robot answers at 127.0.0.1:{port} within 0.2 s"):
        driver.connect(0.2)
    driver.close()
    driver.close()


def test_servers_are_for_this_machine_unless_told() -> None:
    require_loopback("127.0.0.1", False)
    require_loopback("::1", False)
    require_loopback("0.0.0.0", True)
    with pytest.raises(UsageError, match="--allow-remote"):
        require_loopback("0.0.0.0", False)


@pytest.mark.parametrize("address", ["", "7001", "localhost", "127.0.0.1:", "127.0.0.1:70000", "127.0.0.1:x", ":1"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_udp(address)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"joints": ()}, "different names"),
        ({"joints": (ROBOT.joints[0], ROBOT.joints[0])}, "different names, got a, a"),
        ({"joints": (ROBOT.joints[1],)}, "must be driven"),
        ({"rate": 0.0}, "rate must be"),
        ({"watchdog": 11.0}, "watchdog must be"),
        ({"measures": {"x": 0}}, "from 1 to 1000"),
        ({"measures": {str(i): 1000 for i in range(8)}}, "one datagram"),
    ],
)
def test_robots_that_describe_themselves_wrongly(changes: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        replace(ROBOT, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "no valid JSON"),
        (b"[]", "must be an object"),
        (ROBOT.to_json().replace(b'"name": "two"', b'"name": 2'), "name must be a str"),
        (ROBOT.to_json().rstrip()[:-1] + b', "more": 1}', "no field 'more'"),
        (ROBOT.to_json().replace(b"200.0", b"NaN"), "no valid JSON"),
        (b" " * 40_000, "32,768 are read at most"),
    ],
)
def test_descriptions_are_read_strictly(content: bytes, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        RobotDescription.from_json(content, "here")


def test_no_garbage_gets_through() -> None:
    draw = random.Random(0)
    whole = [
        wire.pack_state(a_state(), ROBOT, ROBOT.digest),
        wire.pack_command(a_command(), ROBOT.digest),
        wire.pack_hello(1, 0.0, bytes(32)),
        wire.pack_description(1, 0.0, bytes(32), ROBOT),
    ]
    driver, endpoint, theirs = connected()
    ours = driver._line
    for _ in range(3000):
        message = bytearray(draw.choice(whole))
        for _ in range(draw.randrange(1, 5)):
            message[draw.randrange(len(message))] = draw.randrange(256)
        cut = bytes(message[: draw.randrange(len(message) + 1)] if draw.random() < 0.3 else message)
        theirs.send(cut)
        ours.send(cut)
        state = driver.read()
        assert state is None or (len(state.position) == 3 and state.mode <= wire.HELD)
        for command in endpoint.commands():
            assert np.isfinite(command.target).all() and command.mode <= wire.DRIVE
    assert sum(driver.dropped.values()) > 1000 and sum(endpoint.dropped.values()) > 1000
