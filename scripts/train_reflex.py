#!/usr/bin/env python3
"""Train the reflex of the cart-pole rig: a critic of the risk to run into the rail's limit switches (docs/reflex.md).

    python scripts/train_reflex.py --out reflexes/cartpole

with the interpreter of .venv. Rigs of the task CartPoleSwingUp-v0, randomized as in training, are driven at the rate of
their physics by efforts that are held, change at each tick, push outward, or brake. The critic learns, of states s,
commands a, and c = 1 where the cart is at a switch,

    Q_risk(s, a) = c + (1 - c) gamma_safe Q_risk(s', a')      a' the command that followed

as Recovery RL (arXiv:2010.15920) and Bresa (arXiv:2503.21989) do. What differs from the former: there a' is of the
policy in training, of which a reflex for any policy knows nothing, so here it is the data's own; there it is the
squared error, here the cross entropy, whose minimum is the same; there are two critics, here one. (With a' the
recovery's, the risk was a cliff: it told states apart better, and no threshold from 0.02 on was early enough.) The
threshold is the highest of a list at which, and below which, policies made to fail do not, on rigs of their own; all
is measured on others again. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import numpy as np
import torch
from torch import Tensor, nn

from ctrlrl.deploy.features import Reading
from ctrlrl.deploy.lowering import lower
from ctrlrl.deploy.manifest import Action, Entry, Joint, Manifest
from ctrlrl.deploy.manifest import Network as NetworkEntry
from ctrlrl.deploy.network import Network
from ctrlrl.deploy.reflex import (
    COMMAND,
    RISK,
    STATE,
    ReadJoint,
    Recovery,
    ReflexSpec,
    RiskReflex,
    read_reflex,
    write_reflex,
)
from ctrlrl.deploy.safety import Fault
from ctrlrl.deploy.to_onnx import ACTION, OPSET, to_onnx
from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.sim_vector import SimVector, physics
from ctrlrl.envs.spec import Event, SimTask
from ctrlrl.envs.tasks.registry import make_robot_task
from ctrlrl.envs.tasks.swing_up_expert import SwingUpExpert
from ctrlrl.envs.world import World
from ctrlrl.errors import CtrlrlError, UsageError
from ctrlrl.nn.policy import Policy, PolicyState
from ctrlrl.robots.robot import get_robot
from ctrlrl.runs.provenance import describe_source, now
from ctrlrl.tree import Obs

TASK = "CartPoleSwingUp-v0"
ROBOT = get_robot("cartpole")
JOINTS = ("slider", "pole")
EFFORT = float(ROBOT.joints[0].max_effort)  # N, of an action of 1
GAMMA_SAFE = 0.98  # a horizon of 50 ticks, 0.25 s: twice what the cart takes to brake
RECOVERY = Recovery(kind="feedback", centre=(0.0,), k_p=(40.0,), k_d=(10.0,), max_effort=(EFFORT,))
LONGEST = 1.0  # s
THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7)
RELEASE = 0.5  # of the threshold
HIDDEN, BATCH, RATE, SPEED = 64, 1024, 2e-3, 0.02
GOLDEN = 64
RIGS = {"train": 1, "held out": 2, "choose": 3, "measure": 4}
"""Of seeds: rigs of each purpose are others."""


# --- the rig, at the rate of its physics ------------------------------------------------------------------------------


def fast(task: SimTask, seconds: float, *, anywhere: bool) -> SimTask:
    """The task with a control step for each step of the physics; delays are the same in seconds. `anywhere`: episodes
    begin in any state."""
    a = task.action
    delay = (a.delay[0] * task.substeps, a.delay[1] * task.substeps)
    events = dict(task.events) | ({"start": Event("reset", scatter)} if anywhere else {})
    return replace(
        task,
        substeps=1,
        episode_seconds=seconds,
        action=replace(a, delay=delay),
        events=events,
        observations={"policy": task.observations["policy"]},
        mirror=None,
        metrics={},
    )


def scatter(w: World, rows: Tensor) -> None:
    """Any place but the last 5 cm, any angle, speeds as they occur."""
    drawn = w.random.uniform(4, -1.0, 1.0)
    w.write("qpos", rows, drawn[:, :2] * torch.tensor([0.33, torch.pi]), w.joint_qpos)
    w.write("qvel", rows, drawn[:, 2:] * torch.tensor([1.8, 12.0]), w.joint_qvel)


def observed(obs: Obs) -> Tensor:
    """(N, 6) of the one group that there is."""
    assert isinstance(obs, Tensor)
    return obs


def rigs(task: SimTask, count: int, purpose: str, seed: int) -> tuple[SimVector, Tensor]:
    """`count` of them, and what is observed at first."""
    env = SimVector(task, BatchSim(physics(task), count, 1))
    return env, observed(env.reset(10 * seed + RIGS[purpose]))


def state_of(seen: Tensor) -> Tensor:
    """(N, 4) m, rad, m/s, rad/s, of observations (N, 6): what a robot's encoders tell of `JOINTS`."""
    place, speed, sine, cosine, turning = seen[:, :5].unbind(1)
    return torch.stack([place, torch.atan2(sine, cosine), speed, turning], 1)


def recover(state: Tensor) -> Tensor:
    """(N, 1) N."""
    return torch.from_numpy(RECOVERY(state[:, :1].double().numpy(), state[:, 2:3].double().numpy())).float()


class Driver:
    """What drives rigs while transitions are collected: one manner for a while, then another."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self._generator, self._left = generator, torch.zeros(count, dtype=torch.int64)
        self._manner, self._level = torch.zeros(count, dtype=torch.int64), torch.zeros(count)

    def __call__(self, state: Tensor, begun: Tensor) -> Tensor:
        """(N, 1) N, for states (N, 4) of which episodes have just `begun` (N,) bool."""
        n, g = len(state), self._generator
        fresh = (self._left <= 0) | begun
        self._left = torch.where(fresh, torch.randint(1, 60, (n,), generator=g), self._left - 1)
        self._manner = torch.where(fresh, torch.randint(0, 5, (n,), generator=g), self._manner)
        self._level = torch.where(fresh, torch.rand(n, generator=g) * 2 - 1, self._level)
        outward = torch.where(state[:, 0] > 0, 1.0, -1.0) * (self._level.abs() * 2).clamp(max=1)
        any_at_all = torch.rand(n, generator=g) * 2 - 1
        each = torch.stack([self._level, any_at_all, recover(state)[:, 0] / EFFORT, outward, outward])
        return EFFORT * each.gather(0, self._manner[None])[0][:, None]


@dataclass
class Transitions:
    """What was collected."""

    state: Tensor  # (N, 4)
    command: Tensor  # (N, 1) N
    violated: Tensor  # (N,) bool: the cart was at a switch after it
    following: Tensor  # (N, 4), of the next episode where it was
    then: Tensor  # (N, 1) N, the command there


def collect(task: SimTask, count: int, ticks: int, seed: int) -> Transitions:
    """Drive `count` rigs for so many ticks each."""
    env, seen = rigs(fast(task, 2.0, anywhere=True), count, "train", seed)
    drives = Driver(count, torch.Generator().manual_seed(seed))
    state = state_of(seen)
    command, rows = drives(state, torch.ones(count, dtype=torch.bool)), []
    for _ in range(ticks):
        step = env.step(command / EFFORT)
        following, over = state_of(observed(step.obs)), step.terminated | step.truncated | ~step.valid
        then = drives(following, over)
        rows.append((state, command, step.terminated, following, then, step.valid & ~step.truncated))
        state, command = following, then
    env.close()
    *parts, whole = (torch.cat(part) for part in zip(*rows, strict=True))
    return Transitions(*(part[whole] for part in parts))


# --- the critic -------------------------------------------------------------------------------------------------------


class Critic(Policy):
    """Q_risk. It is exported as policies are, its risk in the place of the action."""

    def __init__(self) -> None:
        super().__init__()
        last = nn.Linear(HIDDEN, 1)
        nn.init.constant_(last.bias, -5.0)  # what is not learned yet is no risk
        self.layers = nn.Sequential(nn.Linear(6, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), last)

    def logit(self, state: Tensor, command: Tensor) -> Tensor:
        """(N, 1) of states (N, 4) and commands (N, 1) N."""
        place, angle, speed, turning = state.unbind(1)
        scaled = torch.stack([place / 0.2, angle.sin(), angle.cos(), speed, turning / 8], 1)
        out: Tensor = self.layers(torch.cat([scaled, command / EFFORT], 1))
        return out

    def act(
        self, obs: Obs, state: PolicyState | None = None, *, explore: bool = False
    ) -> tuple[Tensor, PolicyState, dict[str, Tensor]]:
        assert isinstance(obs, dict)
        return torch.sigmoid(self.logit(obs[STATE], obs[COMMAND])), {}, {}

    @torch.no_grad()
    def risk(self, state: Tensor, command: Tensor) -> Tensor:
        """(N,) from 0 to 1."""
        return torch.sigmoid(self.logit(state, command))[:, 0]


def train(data: Transitions, updates: int, seed: int) -> Critic:
    """Q_risk of what was collected."""
    torch.manual_seed(seed)
    critic, target = Critic(), Critic()
    target.load_state_dict(critic.state_dict())
    optimizer = torch.optim.Adam(critic.parameters(), RATE)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    sides = torch.tensor([1.0, -1.0])
    for _ in range(updates):
        rows = torch.randint(0, len(data.state), (BATCH,))
        side = sides[torch.randint(0, 2, (BATCH, 1))]  # a rig and its mirror image are alike
        following = target.risk(side * data.following[rows], side * data.then[rows])
        wanted = torch.where(data.violated[rows], 1.0, GAMMA_SAFE * following)
        logit = critic.logit(side * data.state[rows], side * data.command[rows])[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logit, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        slower.step()
        with torch.no_grad():
            for old, new in zip(target.parameters(), critic.parameters(), strict=True):
                old.lerp_(new, SPEED)
    return critic.eval()


def network_of(critic: Critic) -> Network:
    """The same as operations."""
    exported = to_onnx(critic, {STATE: torch.zeros(1, 4), COMMAND: torch.zeros(1, 1)})
    network = lower(exported.model)
    return Network(network.inputs, {RISK: network.outputs[ACTION]}, network.nodes, network.constants)


# --- what it is worth -------------------------------------------------------------------------------------------------


def held_out(task: SimTask, critic: Critic, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a moment in each episode: states (N, 4), commands (N, 1), risks (N,), and (N,) bool whether the cart was at a
    switch within the next 1 / (1 - gamma_safe) ticks."""
    env, seen = rigs(fast(task, 4.0, anywhere=True), count, "held out", seed)
    drives, nobody = Driver(count, torch.Generator().manual_seed(seed + 1)), torch.zeros(count, dtype=torch.bool)

    def after(ticks: int, seen: Tensor) -> tuple[Tensor, Tensor]:
        """What is observed then, and which were at a switch."""
        hit = nobody.clone()
        for _ in range(ticks):
            step = env.step(drives(state_of(seen), nobody) / EFFORT)
            seen, hit = observed(step.obs), hit | step.terminated | ~step.valid
        return seen, hit

    seen, before = after(40, seen)
    state = state_of(seen)
    command = drives(state, nobody)
    step = env.step(command / EFFORT)
    violated = step.terminated | after(round(1 / (1 - GAMMA_SAFE)) - 1, observed(step.obs))[1]
    env.close()
    state, command, violated = state[~before], command[~before], violated[~before]
    return state, command, critic.risk(state, command), violated


def auc(risks: Tensor, violated: Tensor) -> float:
    """How often a state that led to a violation has the greater risk than one that did not; ties count half."""
    bad, good = risks[violated].double(), risks[~violated].double().sort().values
    below = torch.searchsorted(good, bad), torch.searchsorted(good, bad, right=True)
    return float((below[0] + below[1]).double().mean() / 2 / len(good))


Drives = Callable[[Tensor], Tensor]
"""Observations (N, 6) to actions (N, 1), asked 50 times a second."""


def outward(seen: Tensor) -> Tensor:
    """Pushes outward with all it has."""
    return torch.where(seen[:, :1] > 0, 1.0, -1.0)


class Jumpy:
    """Pushes with all it has to a side that is drawn now and then."""

    def __init__(self, seed: int) -> None:
        self._generator, self._side = torch.Generator().manual_seed(seed), torch.zeros(0)

    def __call__(self, seen: Tensor) -> Tensor:
        """Actions (N, 1)."""
        drawn = torch.rand(len(seen), 2, generator=self._generator)
        if len(self._side) != len(seen):
            self._side = torch.ones(len(seen))
        self._side = torch.where(drawn[:, 0] < 0.1, torch.where(drawn[:, 1] < 0.5, 1.0, -1.0), self._side)
        return self._side[:, None]


def choose(task: SimTask, critic: Critic, each: int, seed: int) -> float:
    """The highest threshold at which, and below which, neither bad policy ran any of `each` rigs into a switch.

    Raises:
        UsageError: there is none.
    """
    levels, safe = torch.tensor(THRESHOLDS).repeat_interleave(each), torch.ones(len(THRESHOLDS), dtype=torch.bool)
    for policy in (outward, Jumpy(seed)):
        env, seen = rigs(fast(task, 60.0, anywhere=False), len(levels), "choose", seed)
        active, hit = torch.zeros(len(levels), dtype=torch.bool), torch.zeros(len(levels), dtype=torch.bool)
        wanted = torch.zeros(len(levels), 1)
        for t in range(800):
            if t % task.substeps == 0:
                wanted = policy(seen)
            state = state_of(seen)
            active = critic.risk(state, EFFORT * wanted) > torch.where(active, RELEASE * levels, levels)
            step = env.step(torch.where(active[:, None], recover(state) / EFFORT, wanted))
            hit, seen = hit | step.terminated | ~step.valid, observed(step.obs)
        env.close()
        safe &= ~hit.view(-1, each).any(1)
    good = int(safe.long().cumprod(0).sum())
    if not good:
        raise UsageError("at no threshold was the cart kept from the switches: collect more, or make more updates")
    return THRESHOLDS[good - 1]


@dataclass(frozen=True)
class Measured:
    """Shares: of episodes, and of ticks that the reflex took over."""

    violated: float
    success: float
    faults: float
    taken_over: float


def measure(
    task: SimTask, policy: Drives, reflexes: list[RiskReflex] | None, count: int, seconds: float, seed: int
) -> Measured:
    """An episode of each of `count` rigs, each with a reflex of its own as it is deployed, or without any."""
    env, seen = rigs(fast(task, seconds, anywhere=False), count, "measure", seed)
    names, success, wanted = list(JOINTS), torch.zeros(count), torch.zeros(count, 1)
    hit, over, faulted = (torch.zeros(count, dtype=torch.bool) for _ in range(3))
    ticks = taken = 0
    for t in range(round(seconds / task.timestep)):
        if t % task.substeps == 0:
            wanted = policy(seen)
        action, state = wanted.clone(), state_of(seen).double().numpy()
        for i in (~over).nonzero().flatten().tolist():
            ticks += 1
            if reflexes is None:
                continue
            reading = Reading(names, state[i, :2], state[i, 2:])
            try:
                instead = None if faulted[i] else reflexes[i](reading, EFFORT * wanted[i].double().numpy())
            except Fault:
                instead, faulted[i] = None, True
            if faulted[i]:
                action[i] = 0.0
            elif instead is not None:
                taken += 1
                action[i] = torch.from_numpy(instead / EFFORT)
        step = env.step(action)
        hit |= step.terminated & ~over
        told = step.log.get("success", torch.full((count,), torch.nan))
        success = torch.where(over | told.isnan(), success, told)
        over |= step.terminated | step.truncated | ~step.valid
        seen = observed(step.obs)
    env.close()
    violated, succeeded, faults = (float(one.float().mean()) for one in (hit, success, faulted))
    return Measured(violated, succeeded, faults, taken / ticks)


def manifest_of(task: SimTask) -> Manifest:
    """What a bundle's manifest says of the rig, as far as a reflex asks."""
    effect, slider = task.action.effect, ROBOT.joints[0]
    assert effect is not None
    return Manifest(
        name="measured",
        robot=ROBOT.name,
        task=task.name,
        control_dt=task.timestep * task.substeps,
        observation=(Entry(name="observation", shape=(6,)),),
        action=Action(
            kind=effect.kind,
            shape=(1,),
            joints=("slider",),
            low=(-1.0,),
            high=(1.0,),
            scale=tuple(map(float, effect.scale)),
            offset=(0.0,),
        ),
        joints=(
            Joint(name="slider", unit="m", lower=slider.lower, upper=slider.upper, default=0.0, max_effort=EFFORT),
            Joint(name="pole", unit="rad", lower=None, upper=None, default=0.0, driven=False),
        ),
        network=NetworkEntry(opset=OPSET, runtimes=("numpy",)),
    )


def spec_of(task: SimTask, threshold: float, provenance: Mapping[str, Any]) -> ReflexSpec:
    """The reflex's description."""
    slider = ROBOT.joints[0]
    return ReflexSpec(
        robot=ROBOT.name,
        control="effort",
        rate=1 / task.timestep,
        reads=(
            ReadJoint(name="slider", unit="m", lower=slider.lower, upper=slider.upper),
            ReadJoint(name="pole", unit="rad"),
        ),
        commands=("slider",),
        threshold=threshold,
        release=RELEASE * threshold,
        longest=LONGEST,
        recovery=RECOVERY,
        provenance=dict(provenance),
    )


def main() -> int:
    """Train, choose, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder of the reflex")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rigs", type=int, default=256, help="that are driven at once")
    parser.add_argument("--ticks", type=int, default=2000, help="of each")
    parser.add_argument("--updates", type=int, default=16_000)
    parser.add_argument("--episodes", type=int, default=200, help="of each measurement")
    options = parser.parse_args()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UsageError(f"{options.out} is not empty: choose another --out; nothing was overwritten")
    torch.set_num_threads(1)
    began = time.process_time()

    def say(text: str) -> None:
        print(f"{time.process_time() - began:4.0f} s of CPU: {text}", file=sys.stderr, flush=True)

    task, seed, count = make_robot_task(TASK, {}), options.seed, options.episodes
    data = collect(task, options.rigs, options.ticks, seed)
    say(f"{len(data.state):,} transitions, {int(data.violated.sum()):,} of them to a switch")
    critic = train(data, options.updates, seed)
    say(f"{options.updates:,} updates")
    states, commands, risks, violated = held_out(task, critic, 20 * count, seed)
    threshold = choose(task, critic, count // 2, seed)
    say(f"threshold {threshold:g}")
    network, manifest, rows = network_of(critic), manifest_of(task), {}
    figures: dict[str, Any] = {
        "held-out states": len(risks),
        "of which led to a switch": int(violated.sum()),
        "area under the curve": auc(risks, violated),
        "mean risk, led to a switch": float(risks[violated].mean()),
        "mean risk, did not": float(risks[~violated].mean()),
    }
    for name, make, seconds in (
        ("pushes outward", lambda: outward, 4.0),
        ("pushes to sides drawn at random", lambda: Jumpy(seed), 4.0),
        ("scripted controller", lambda: SwingUpExpert(task), 10.0),
    ):
        reflexes = [RiskReflex(spec_of(task, threshold, {}), network, manifest, JOINTS) for _ in range(count)]
        rows[name] = [measure(task, make(), own, count, seconds, seed) for own in (None, reflexes)]
        say(name)
    provenance = {
        "task": TASK,
        "seed": seed,
        "gamma_safe": GAMMA_SAFE,
        "rigs": options.rigs,
        "transitions": len(data.state),
        "violations": int(data.violated.sum()),
        "updates": options.updates,
        "held out": figures,
        "measured": {name: {"without": asdict(a), "with": asdict(b)} for name, (a, b) in rows.items()},
        "made": now(),
        "git": describe_source(),
    }
    goldens = {STATE: states[:GOLDEN].numpy(), COMMAND: commands[:GOLDEN].numpy(), RISK: risks[:GOLDEN, None].numpy()}
    write_reflex(options.out, spec_of(task, threshold, provenance), network, goldens)
    reflex = read_reflex(options.out, manifest, JOINTS)
    print(table(figures, rows, reflex.spec, seconds_of(reflex)))
    say(f"wrote {options.out}")
    return 0


def seconds_of(reflex: RiskReflex) -> float:
    """Of one call, the median."""
    reading, times = Reading(list(JOINTS), np.array([0.1, 3.0]), np.zeros(2)), []
    for _ in range(2000):
        start = time.perf_counter()
        reflex(reading, np.zeros(1))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def table(
    figures: Mapping[str, Any], rows: Mapping[str, list[Measured]], spec: ReflexSpec, seconds_of_call: float
) -> str:
    """What was measured, as Markdown."""
    lines = ["| held out | |", "|---|---|"]
    lines += [f"| {n} | {v:,} |" if isinstance(v, int) else f"| {n} | {v:.3f} |" for n, v in figures.items()]
    lines += [f"| threshold, release | {spec.threshold:g}, {spec.release:g} |"]
    lines += [f"| one call | {seconds_of_call * 1e6:.0f} us |", ""]
    lines += [
        "| policy | at a switch, without | with the reflex | success, without | with | ticks taken over | faults |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, (bare, own) in rows.items():
        shares = (bare.violated, own.violated, bare.success, own.success, own.taken_over, own.faults)
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CtrlrlError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
