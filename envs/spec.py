"""The words in which a task over a simulation is written: model, action, observations, rewards, ends, events.

A term is a function of the `World` (see there) that returns a tensor whose rows are environments. `SimTask` names the
terms; `ctrlrl.envs.sim_vector.SimVector` makes a vector environment of it, on a CPU or a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import mujoco
from torch import Tensor

from ctrlrl.errors import UsageError
from ctrlrl.mirror import Mirror

if TYPE_CHECKING:
    from ctrlrl.envs.world import World
    from ctrlrl.robots.robot import Robot

Term: TypeAlias = "Callable[[World], Tensor]"
"""(N,) or (N, size)."""


@dataclass(frozen=True)
class Measure:
    """What a term is on the robot itself, so that a controller can compute it; in the words of a bundle's manifest
    (`ctrlrl.deploy.manifest.MEASURES`)."""

    what: str
    unit: str = ""
    frame: str = ""
    """`base`, `world` or `joint`."""
    joints: Sequence[str] = ()
    offset: Sequence[float] = ()
    """What is subtracted, a number for each."""
    frequency: float = 0.0
    """Hz, of a clock."""
    select: Sequence[int] = ()
    """Which numbers of the command."""
    resolution: float = 0.0
    """In what steps it is measured."""


@dataclass(frozen=True)
class Effect:
    """What an action does on the robot itself, in the words of a bundle's manifest (`ctrlrl.deploy.manifest.ACTIONS`);
    a number for each of the action's names."""

    kind: str
    unit: str
    scale: Sequence[float]
    offset: Sequence[float] = ()
    lead: Sequence[float] = ()
    """How far a target may be from its joint; 0: as far as it likes."""


@dataclass(frozen=True)
class Obs:
    """One term of an observation group, (N, size)."""

    of: Term
    noise: float = 0.0
    """Half width of the uniform noise, in the term's unit, drawn at each step."""
    delay: tuple[int, int] = (0, 0)
    """Control steps, from and to, by which it comes late; drawn for each episode."""
    history: int = 1
    """Successive values observed together, the oldest first. At an episode's start all are its first one."""
    measure: Measure | None = None
    """What it is on the robot; None: a robot cannot compute it by itself."""


@dataclass(frozen=True)
class Reward:
    """One term of the reward, (N,); times its weight it is summed and logged."""

    of: Term
    weight: float
    ramp: tuple[float, int] | None = None
    """The weight that it comes to, linearly, and after how many control steps: a curriculum. Evaluations begin at step
    0, and see the first weight."""


@dataclass(frozen=True)
class Event:
    """Something that happens to the simulation: randomization, or a push."""

    when: Literal["startup", "reset", "interval"]
    """startup: once for each seeding. reset: at the start of an episode, before derived fields are computed. interval:
    from time to time during it, before a step; what MuJoCo derives from model fields (`Sim.set_const`) is not computed
    then, so masses are for the other two."""
    do: Callable[[World, Tensor], None]
    """Called with the world and the rows (N,) bool to which it happens; must leave the others alone."""
    every: tuple[float, float] | None = None
    """Seconds between two, from and to; for interval."""


@dataclass(frozen=True)
class Command:
    """What the policy is told to do, (N, size): a target velocity, a goal."""

    size: int
    draw: Callable[[World], Tensor]
    """New commands (N, size) for all rows; taken where it is time."""
    every: tuple[float, float] | None = None
    """Seconds after which a new one is drawn, from and to; by default only at an episode's start."""
    names: Sequence[str] = ()
    """What its numbers are, with units."""


@dataclass(frozen=True)
class Action:
    """What a policy's numbers, (N, size) in [-1, 1], do."""

    names: Sequence[str]
    """Of its entries: joints, for most robots."""
    apply: Callable[[World, Tensor], None]
    """Writes controls from actions (N, size), for all rows. Where an episode begins it is asked once more, with zeros
    there, so what it remembers from step to step is kept by `SimTask.track`."""
    delay: tuple[int, int] = (0, 0)
    """Control steps, from and to, by which it takes effect late; drawn for each episode."""
    effect: Effect | None = None
    """What it does on the robot."""


@dataclass(frozen=True)
class Goals:
    """That a task's reward is one of goals, so that transitions can be given others afterwards (hindsight). Neither
    what else is observed nor how episodes end may depend on them."""

    achieved: str
    """The term of the group `policy` that has what was achieved, (N, size)."""
    desired: str
    """The term that has the goal, (N, size)."""
    reward: Callable[[Tensor, Tensor], Tensor]
    """The task's reward (N,) of what was achieved after a step, and of the goal."""


@dataclass(frozen=True, kw_only=True)
class SimTask:
    """A task, written once for all simulations.

    The order of a control step: interval events; the action, `substeps` steps of physics; `track`; terminations;
    rewards; commands; observations. Fields that MuJoCo derives (sensors, positions of bodies) belong to the state
    before the last substep.
    """

    name: str
    model: mujoco.MjSpec
    """Compiled by the environment."""
    timestep: float
    """Seconds of a step of physics; the model's own is not used."""
    substeps: int
    """Steps of physics in a control step."""
    episode_seconds: float
    """After which an episode is truncated."""
    joints: Sequence[str]
    """The joints that `World.joint_pos` and `joint_vel` are of, in that order."""
    pose: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Where episodes start, before events: `qpos` of joints by name, where it is not the model's own."""
    robot: Robot | None = None
    """The robot whose joints these are; what a controller is told of it (limits, gains) is its description's."""
    action: Action
    observations: Mapping[str, Mapping[str, Obs]]
    """Groups of terms: `policy`, and `privileged` for critics that may know what a robot cannot measure."""
    rewards: Mapping[str, Reward]
    reward_scale: float = 1.0
    """Of the sum: seconds of a control step, say, where weights are per second."""
    reward_floor: float | None = None
    """Below which the sum does not go: else a robot that stumbles learns to end its episode."""
    terminations: Mapping[str, Term] = field(default_factory=dict)
    """(N,) bool: where the task has ended."""
    track: Callable[[World], None] | None = None
    """Called once after each step's physics: clocks, what several terms share."""
    metrics: Mapping[str, Term] = field(default_factory=dict)
    """(N,) figures, whose mean over an episode is logged at its end."""
    outcomes: Mapping[str, Term] = field(default_factory=dict)
    """(N,) figures of a whole episode, asked at its end; `success` among them, 1 or 0, where the task knows it."""
    command: Command | None = None
    events: Mapping[str, Event] = field(default_factory=dict)
    curriculum: Callable[[World, Tensor], None] | None = None
    """Called with the rows (N,) bool whose episode has ended, before they start anew; not with those that diverged. A
    level that outlives episodes is `World.memory(..., keep=True)`; evaluations start at its beginning, zero."""
    goals: Goals | None = None
    """What of it are goals, where the reward is a function of them alone."""
    mirror: Mirror | None = None
    """How observations and actions look in a mirror, for policies that are to be symmetric."""

    def __post_init__(self) -> None:
        """
        Raises:
            UsageError: a field is out of range, or two things would be logged under one name.
        """
        self._require("joints", bool(self.joints), "must name a joint at least", list(self.joints))
        self._require("action.names", bool(self.action.names), "must name an entry at least", list(self.action.names))
        self._require("timestep", self.timestep > 0, "must be above 0 s", self.timestep)
        self._require("substeps", self.substeps >= 1, "must be at least 1", self.substeps)
        self._require("episode_seconds", self.episode_seconds > 0, "must be above 0 s", self.episode_seconds)
        self._require("rewards", bool(self.rewards), "must have a term at least", list(self.rewards))
        groups = list(self.observations)
        policy = len(groups) == 1 or "policy" in groups
        self._require("observations", policy, "must be groups of which one group is policy", groups)
        for group, terms in self.observations.items():
            self._require(f"observations of {group}", bool(terms), "have no term", list(terms))
        twice = (set(self.metrics) & set(self.outcomes)) | ({"success"} & set(self.metrics))
        self._require("metrics and outcomes", not twice, "are named twice, or success is no outcome", sorted(twice))
        for name, event in self.events.items():
            if event.every is not None:
                low, high = event.every
                self._require(
                    f"events[{name!r}].every", 0 < low <= high, "must be seconds above 0, the fewest first", event.every
                )

    @property
    def policy_group(self) -> str:
        """The group of observations that the policy has: `policy`, or the only one."""
        return "policy" if "policy" in self.observations else next(iter(self.observations))

    @property
    def policy_terms(self) -> Mapping[str, Obs]:
        """The terms of that group."""
        return self.observations[self.policy_group]

    def _require(self, field_name: str, ok: bool, rule: str, value: object) -> None:
        if not ok:
            raise UsageError(f"the task {self.name}: {field_name} {rule}, got {value}")
