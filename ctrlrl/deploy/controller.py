"""The loop between a robot and a policy: one tick after the other, at absolute deadlines.

Phases: `wait` for states that are to be believed, commanding the safe action; `ramp` to where the policy begins, for
robots that take positions; `run`, the policy; `fault`, the safe action for good; `stop`, the safe action at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ctrlrl.deploy import wire
from ctrlrl.deploy.actor import Actor
from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.driver import Driver, require_fits
from ctrlrl.deploy.features import FeatureBuilder, Reading
from ctrlrl.deploy.realtime import Time
from ctrlrl.deploy.safety import FAULTS, Checks, Clock, Fault, Lateness, Limits, SafetyConfig, driven_of
from ctrlrl.deploy.tensors import Array
from ctrlrl.deploy.ticks import PHASES, TickLog, read_ticks, record_type
from ctrlrl.deploy.wire import HELD, State
from ctrlrl.errors import UsageError

WAIT, RAMP, RUN, FAULT, STOP = range(len(PHASES))
SAFE, DRIVEN, REFLEX = 0, 1, 2
LAST_WORDS = 5
"""Safe commands that are sent where the program ends for a reason of its own."""
OLD_STATES = 10
OBEYS = 1.0
"""Seconds in which a robot that is driven must say so."""
WARM_UP = 50
"""Inferences before the loop begins: the first ones are slow."""


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """What a controller does.

    Raises:
        UsageError: on construction, where a number is out of range.
    """

    command: tuple[float, ...] | None = None
    """What the policy is told to do; None: what the robot's own operator tells it, or zeros."""
    seconds: float | None = None
    """Of the policy, after which the controller stops; None: until it is interrupted."""
    settle: float = 0.5
    """Seconds of states that are to be believed before anything moves."""
    patience: float = 5.0
    """Seconds in which these must come."""
    ramp: float = 3.0
    """Seconds in which joints go to where the policy begins, where it commands positions; 0: it begins where they
    are."""
    arrive: float = 0.15
    """rad or m by which a joint may be off after that, besides what half of its motor's largest effort bends it."""
    linger: float = 0.3
    """Seconds for which the safe action is commanded at the end."""
    hold: float | None = None
    """Seconds for which it is commanded after a fault; None: until the controller is interrupted."""
    safety: SafetyConfig = field(default_factory=SafetyConfig)

    def __post_init__(self) -> None:
        for name in ("settle", "patience", "ramp", "arrive", "linger"):
            if not 0 <= getattr(self, name) <= 3600:
                raise UsageError(f"--{name} must be from 0 to 3600, got {getattr(self, name)}")
        for name in ("seconds", "hold"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise UsageError(f"--{name} must be at least 0, got {getattr(self, name)}")


class Reflex(Protocol):
    """What runs more often than the policy and may take over from it: a safety critic, say."""

    rate: float
    """Hz."""

    def reset(self) -> None:
        """An episode begins."""

    def __call__(self, reading: Reading, command: Array) -> Array | None:
        """What to command (A,) instead of `command`, or None."""


class Controller:
    """One tick of the loop, and all that is kept from one to the next.

    Args:
        bundle: whose policy drives.
        driver: to the robot; connected.
        config: what to do.
        clock: seconds.
        runtime: of the policy.
        reflex: looks at each tick, if there is one; ticks come at its rate then.
        log: a new folder for the log of all ticks.
        told: is called once, with the fault that stops the robot; must not wait.

    Raises:
        UsageError: the policy is not for this robot, or the bundle does not run here.

    Attributes:
        phase: of `PHASES`.
        fault: what stopped the robot, if something has.
        period: s, between two ticks.
        lateness: of ticks.
        limits: with their counts.
        episodes: that the policy began.
        acted: ticks at which the policy was asked.
        taken_over: ticks at which the reflex commanded.
    """

    def __init__(
        self,
        bundle: Bundle,
        driver: Driver,
        config: ControllerConfig,
        clock: Time,
        *,
        runtime: str | None = None,
        reflex: Reflex | None = None,
        log: Path | None = None,
        told: Callable[[str], None] = lambda text: None,
    ) -> None:
        m = bundle.manifest
        m.require_robot()
        if m.control_dt is None:
            raise UsageError(f"{m.name} does not say how often it acts: name control_dt where the bundle is exported")
        if not bundle.measured:
            raise UsageError(f"{bundle.path} has no goldens of measurements: whether its terms are right is not known")
        robot = driver.description
        require_fits(m, robot, operated=config.command is not None)
        if config.command is not None and len(config.command) != len(m.command):
            wanted = "; ".join(m.command) or "nothing"
            raise UsageError(f"--command takes {len(m.command)} numbers ({wanted}), got {list(config.command)}")
        self.driver, self.config, self.clock, self.reflex, self.told = driver, config, clock, reflex, told
        self.actor = Actor(bundle, runtime)
        self._names = [joint.name for joint in robot.joints]
        self._builder = FeatureBuilder(m, self._names)
        self._every = 1 if reflex is None else max(1, round(reflex.rate * m.control_dt))
        self.period = m.control_dt / self._every
        self.safety = config.safety
        self._max_age = self.safety.max_age if self.safety.max_age is not None else 2 * m.control_dt
        if driver.trip > self._max_age:
            raise UsageError(
                f"a message to the robot and its answer take {driver.trip * 1e3:.0f} ms, and states may be "
                f"{self._max_age * 1e3:.0f} ms old (--safety.max-age)"
            )
        self._clock = Clock(self._max_age, driver.trip)
        self._checks = Checks(m, robot, self.safety)
        self.limits = Limits(m, self.safety, self.period, m.control_dt)
        self.lateness = Lateness(self.period, self.safety)
        self._measured, self._commanded = driven_of(robot, m.action.joints)
        known = {joint.name: joint for joint in m.joints}
        driven = [known[name] for name in m.action.joints]
        self._default = np.array([joint.default for joint in driven])
        self._kp = self._for_robot(np.array([joint.kp for joint in driven]))
        self._kd = self._for_robot(np.array([joint.kd for joint in driven]))
        self._positions = "position" in m.action.kind
        self._told = robot.measures.get("command") == len(m.command) > 0 and config.command is None
        self._state: State | None = None
        self._reading: Reading | None = None
        self._command = np.zeros(len(driven))
        self._from = np.zeros(len(driven))
        self._ticks = self._since = self._believed = self._steady = self._driven = 0
        self._episode: int | None = None
        self._ramped, self._obeyed = False, 0.0
        self._countdown = 0
        self.phase, self.fault = WAIT, None
        self.episodes = self.acted = self.taken_over = 0
        self.log: TickLog | None = None
        self._broken_log: TickLog | None = None
        self._missed = 0
        self._warm_up(bundle)
        if log is not None:
            head = {
                "bundle": str(bundle.path),
                "manifest": bundle.seal,
                "runtime": self.actor.runtime.name,
                "joints": self._names,
                "measures": robot.measures,
                "period": self.period,
                "safety": asdict(self.safety),
                "reflex": getattr(reflex, "seal", None),
            }
            self.log = TickLog(log, record_type(m, robot), head)
        self._fields = [entry.name for entry in m.observation]

    fault: Fault | None

    # --- a tick -------------------------------------------------------------------------------------------------------

    def tick(self, due: float) -> None:
        """One tick, which should have begun at `due`: reads, decides, commands. What goes wrong in it, be it a mistake
        of the program, is a fault."""
        began = self.clock.now()
        self._note(due=due, began=began, phase=self.phase, acted=0, first=0, sent=SAFE, fresh=0)
        sent: Array | None = None
        try:
            self._read()
            if self.phase < FAULT:
                self.lateness.take(began - due, self._missed)
                sent = self._decide()
        except Fault as fault:
            self._fail(fault)
        except Exception as error:  # whatever it is, the robot must be safe
            self._fail(Fault("program", f"{type(error).__name__}: {error}"))
        if sent is None:
            self._make_safe()
        if self.log is not None:
            try:
                self._note(tick=self._ticks, ended=self.clock.now(), fault=self._fault_number())
                self.log.commit()
            except Exception as error:  # a full disk: the log is over, the robot is not
                self._broken_log, self.log = self.log, None
                self._fail(Fault("program", f"the log cannot be written: {error}"))
        self._ticks += 1

    def _make_safe(self) -> None:
        try:
            self.driver.make_safe(self._state)
        except Exception as error:  # tried again at the next tick
            self._fail(Fault("program", f"the safe action cannot be commanded: {error}"))

    def _fault_number(self) -> int:
        return 0 if self.fault is None else 1 + list(FAULTS).index(self.fault.kind)

    def _read(self) -> None:
        """Take the newest state, if there is one; after a fault only for the log."""
        state = self.driver.read()
        if state is not None:
            self._state = state
            self._note(
                fresh=1,
                episode=state.episode,
                sequence=state.sequence,
                robot_time=state.time,
                position=state.position,
                velocity=state.velocity,
            )
            for name, value in state.others.items():
                self._note(**{f"measure {name}": value})
            if self.phase < FAULT:
                self._clock.take(state.time, self.clock.now())
        if self.phase >= FAULT or self._state is None:
            return
        if self.phase != WAIT or state is not None:
            self._require_fresh()
        if state is not None:
            if state.episode != self._episode:
                self._checks.reset()
            self._checks.take(state)
            self._reading = Reading(self._names, state.position, state.velocity, state.others)
            self._believed += 1
            self._require_obeyed(state)

    def _require_obeyed(self, state: State) -> None:
        """
        Raises:
            Fault: the robot holds itself safe, or says that nobody drives it.
        """
        moves = self.phase in (RAMP, RUN)
        if moves and state.mode == HELD and state.episode == self._episode:
            raise Fault("robot", "it holds itself safe")
        if not moves or state.mode == wire.DRIVEN:
            self._obeyed = state.time
        elif state.time - self._obeyed > OBEYS:
            raise Fault("robot", f"for {OBEYS:g} s it says that nobody drives it: commands do not arrive")

    def _require_fresh(self) -> None:
        """
        Raises:
            Fault: the newest state is too old.
        """
        age = self._clock.age(self.clock.now())
        self._note(age=age)
        if age > self._max_age:
            raise Fault("age", f"{age * 1e3:.1f} ms, allowed are {self._max_age * 1e3:g}")

    def _decide(self) -> Array | None:
        """What was sent; None: the safe action is to be."""
        if self.phase == WAIT:
            waited = self._ticks * self.period
            self._steady = self._steady + 1 if self._believed else 0
            if self._state is None or self._reading is None or self._believed < 2:
                if waited > self.config.patience:
                    raise Fault("no state", f"none within {self.config.patience:g} s")
                return None
            if self._steady * self.period < self.config.settle:
                return None
            self._begin_ramp()
        state, reading = self._state, self._reading
        assert state is not None and reading is not None
        position, velocity = reading.position[self._measured], reading.velocity[self._measured]
        if self.phase == RAMP:
            if state.episode != self._episode:
                self._begin_ramp()
            return self._ramp(state, position, velocity)
        if state.episode != self._episode or self._since == 0:
            self._begin_episode(state, reading)
        if self.config.seconds is not None and self._driven * self.period > self.config.seconds - self.period / 2:
            self.stop()
            return None
        self._driven += 1
        if self._since % self._every == 0:
            self._act(reading)
        self._since += 1
        wanted, by = self._command, DRIVEN
        if self.reflex is not None:
            instead = self.reflex(reading, wanted)
            if instead is not None:
                wanted, by = instead, REFLEX
                self.taken_over += 1
        return self._send(state, wanted, position, velocity, by)

    def _begin_ramp(self) -> None:
        assert self._reading is not None and self._state is not None
        self._from = np.array(self._reading.position[self._measured], np.float64)
        self._since, self._episode = 0, self._state.episode
        ramps = self._positions and self.config.ramp > 0
        self.limits.reset(self._from.copy() if ramps else None)
        self.phase = RAMP if ramps else RUN

    def _ramp(self, state: State, position: Array, velocity: Array) -> Array | None:
        self._since += 1
        share = min(1.0, self._since * self.period / self.config.ramp)
        if share >= 1.0 and self._since * self.period > self.config.ramp + self.config.settle:
            off = np.abs(position - self._default) - self.limits.bend
            if off.max() > self.config.arrive:
                i = int(np.argmax(off))
                far = abs(position[i] - self._default[i])
                raise Fault(
                    "outside", f"{self.limits.names[i]} is {far:.3f} off where it was told to go: does it follow?"
                )
            self.phase, self._since, self._ramped = RUN, 0, True
        smooth = share * share * (3 - 2 * share)
        return self._send(state, self._from + smooth * (self._default - self._from), position, velocity, DRIVEN)

    def _begin_episode(self, state: State, reading: Reading) -> None:
        self._episode, self._since = state.episode, 0
        self._builder.reset(reading)
        self.actor.reset()
        if not self._ramped:  # else the ramp's last target is what the joints hang on
            self.limits.reset(np.array(reading.position[self._measured], np.float64) if self._positions else None)
        self._ramped = False
        self._command = np.zeros(len(self._command))
        if self.reflex is not None:
            self.reflex.reset()
        self.episodes += 1
        self._note(first=1)

    def _act(self, reading: Reading) -> None:
        told = reading.others["command"] if self._told else self.config.command
        if told is not None:
            self._builder.command[:] = told
        observation = self._builder.observe(reading)
        action = self.actor.run(observation)
        self._note(acted=1, action=action, told=self._builder.command)
        for name in self._fields:
            self._note(**{f"observation {name}": observation[name][0]})
        if not np.isfinite(action).all():
            raise Fault("action", f"the policy gave {action.tolist()}")
        self.limits.clips(action)
        self._command = self._builder.act(action, reading)
        self.acted += 1

    def _send(self, state: State, wanted: Array, position: Array, velocity: Array, by: int) -> Array:
        if wanted.shape != self._command.shape or not np.isfinite(wanted).all():
            raise Fault("reflex" if by == REFLEX else "action", f"{wanted.tolist()} was to be commanded")
        command = self.limits(wanted, position, velocity)
        if not np.isfinite(command).all():
            raise Fault("program", f"limits made {command.tolist()} of {wanted.tolist()}")
        if self.phase == RUN and self._positions:
            self._builder.target[:] = command  # what the joints were told to, not what they would have been
        self._require_fresh()  # again: computing took its time
        self.driver.drive(state, self._for_robot(command), self._kp, self._kd)
        self._checks.told(command)
        self._note(sent=by, wanted=wanted, command=command)
        return command

    def _for_robot(self, values: Array) -> Array:
        """In the order in which the robot takes commands."""
        out = np.zeros(len(values))
        out[self._commanded] = values
        return out

    def _fail(self, fault: Fault) -> None:
        self.fault = self.fault or fault
        if self.phase < FAULT:
            self.phase, self._countdown = FAULT, 0
            self.told(f"FAULT {fault}; the robot is kept safe")

    def _note(self, **values: Any) -> None:
        if self.log is not None:
            for name, value in values.items():
                self.log.row[name] = value

    # --- the loop -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Command the safe action from now on, and end soon."""
        if self.phase < FAULT:
            self.phase, self._countdown = STOP, 0

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Tick until the time is over, or `stopped` says so; afterwards the robot is safe. Ticks that were missed are
        not made up for."""
        try:
            self._run(stopped)
        except BaseException:  # what ends the program must not leave the robot to itself
            for _ in range(LAST_WORDS):
                self._make_safe()
            raise

    def _run(self, stopped: Callable[[], bool]) -> None:
        for _ in range(OLD_STATES):  # what came while this program was starting
            if self.driver.read() is None:
                break
        start, number = self.clock.now() + self.period, 0
        while True:
            due = start + number * self.period
            self.clock.wait_until(due)
            if stopped():
                self.stop()
            self.tick(due)
            if self.phase >= FAULT:
                self._countdown += 1
                spent = self._countdown * self.period
                if self.phase == STOP and spent > self.config.linger:
                    return
                over = self.config.hold is not None and spent > self.config.hold
                if self.phase == FAULT and (over or stopped()):
                    return
            following = max(number + 1, int((self.clock.now() - start) / self.period))
            number, self._missed = following, following - number - 1

    def close(self) -> None:
        """Close log and driver. Safe to call twice."""
        try:
            for log in (self.log, self._broken_log):
                if log is not None:
                    log.close()
        finally:
            self.driver.close()

    def _warm_up(self, bundle: Bundle) -> None:
        goldens = bundle.goldens()
        first = {entry.name: goldens[f"network/input/{entry.name}"][:1] for entry in bundle.manifest.observation}
        for _ in range(WARM_UP):
            self.actor.run(first)
        self.actor.reset()

    def summary(self) -> dict[str, Any]:
        """What happened, in numbers."""
        late = self.lateness
        return {
            "phase": PHASES[self.phase],
            "fault": None if self.fault is None else {"kind": self.fault.kind, "detail": self.fault.detail},
            "ticks": self._ticks,
            "period": self.period,
            "episodes": self.episodes,
            "acted": self.acted,
            "taken over by the reflex": self.taken_over,
            "limits": dict(self.limits.counts),
            "lateness": {
                "below, us": {str(2**i): count for i, count in enumerate(late.counts) if count},
                "p50": late.percentile(0.5),
                "p99": late.percentile(0.99),
                "p99.9": late.percentile(0.999),
                "worst": late.worst,
                "late": late.late,
            },
            "dropped": dict(self.driver.dropped),
            "runtime": self.actor.runtime.name,
        }


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of computing a log again."""

    ticks: int
    """At which the policy acted."""
    observation: float
    """Largest difference."""
    action: float
    wanted: float


def replay(bundle: Bundle, folder: str | Path, *, runtime: str | None = None) -> Replay:
    """Compute what a logged controller observed, did and wanted to command, from what it measured.

    Raises:
        UsageError: there is no log, or it is of another bundle.
    """
    head, ticks = read_ticks(folder)
    if head.get("manifest") != bundle.seal:
        raise UsageError(f"{folder} is the log of another bundle than {bundle.path}: {head.get('bundle')}")
    names = list(head["joints"])
    m, actor = bundle.manifest, Actor(bundle, runtime or str(head["runtime"]))
    builder = FeatureBuilder(m, names)
    off = {"observation": 0.0, "action": 0.0, "wanted": 0.0}
    count, positions, begun = 0, "position" in m.action.kind, False

    def differs(what: str, made: Array, logged: Array) -> None:
        off[what] = max(off[what], float(np.abs(made.astype(np.float64) - logged).max(initial=0.0)))

    for row in ticks:
        # Copies are aligned, as what came over the line was.
        others = {name: row[f"measure {name}"].copy() for name in head["measures"]}
        reading = Reading(names, row["position"].copy(), row["velocity"].copy(), others)
        if row["first"]:
            builder.reset(reading)
            actor.reset()
            begun = True
        if row["acted"] and np.isfinite(row["action"]).all():
            count += 1
            builder.command[:] = row["told"]
            observation = builder.observe(reading)
            for entry in m.observation:
                differs("observation", observation[entry.name][0], row[f"observation {entry.name}"])
            action = actor.run(observation)
            differs("action", action, row["action"])
            wanted = builder.act(action, reading)
            if row["sent"] == DRIVEN:
                differs("wanted", wanted, row["wanted"])
        if row["sent"] != SAFE and begun and positions:
            builder.target[:] = row["command"]
    return Replay(count, off["observation"], off["action"], off["wanted"])
