"""A policy bundle of a run: what it was trained to do, in a form that needs nothing of training any more."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch

from ctrlrl.deploy import bundle as files
from ctrlrl.deploy.bundle import Bundle, file_entry
from ctrlrl.deploy.c_source import c_header
from ctrlrl.deploy.features import READINGS, FeatureBuilder
from ctrlrl.deploy.lowering import Unsupported, lower
from ctrlrl.deploy.manifest import Entry, Joint, Manifest, Network, Term
from ctrlrl.deploy.runtimes import RUNTIMES
from ctrlrl.deploy.sensors import measured
from ctrlrl.deploy.tensors import Array, write_tensors
from ctrlrl.deploy.to_onnx import ACTION, BARE, OPSET, Exported, as_inputs, to_onnx
from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.sim_vector import SimVector, physics
from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.spec import SimTask
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.envs.world import index_of
from ctrlrl.errors import UsageError
from ctrlrl.files import building_site, put_in_place, write_durably, write_errors_explained
from ctrlrl.nn.cpu import prepare_cpu
from ctrlrl.nn.policy import Policy
from ctrlrl.runs.folder import RunFolder
from ctrlrl.runs.provenance import describe_source, now
from ctrlrl.runs.record import Evaluation, load_run
from ctrlrl.training.base_policy import BaseLike
from ctrlrl.training.evaluation import evaluation_seeds
from ctrlrl.training.loading import load, own_environment
from ctrlrl.training.manifest_parts import action_of, finite, terms_of
from ctrlrl.training.setup import EnvLike, make, on_cpu, read_config, read_provenance, step_of
from ctrlrl.tree import Obs

ROWS, EVERY = 32, 5
"""Goldens of the network, and how many steps lie between two of them."""
HEADER_GOLDENS = 4
FEATURE_STEPS = 40
STATES, STATE_TOLERANCE = 20, 1e-4
LIMIT_TOLERANCE = 1e-3
"""rad or m, by which a model file's limits may differ from the description's; as `Robot` allows."""
SEED = 20_000


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    checkpoint: str = "best",
    name: str | None = None,
    env: EnvLike | None = None,
    network: Any = None,
    encoder: Any = None,
    base: BaseLike | None = None,
) -> Bundle:
    """Write a bundle of a run's policy to the new folder `out`, and open it: every runtime has reproduced the goldens.

    Args:
        run: the run.
        out: the bundle's folder; must not hold anything yet.
        checkpoint: `best`, `last`, or a checkpoint's name.
        name: what the bundle calls itself; by default the run's folder's name.
        env: what the run was trained on, where that was an object.
        network: as given to `train`.
        encoder: as given to `train`.
        base: as `load`.

    Raises:
        UsageError: there is no such run or checkpoint; the policy cannot be exported; `out` is taken.
    """
    out = Path(out)
    require_empty(out)
    loaded = load(run, checkpoint=checkpoint, network=network, encoder=encoder, base=base)
    folder = RunFolder(loaded.path)
    algo, config = read_config(folder)
    if config.language.model is not None:
        raise UsageError(
            f"the policy of {run} is a language model, which is exported as a folder of transformers: ctrlrl language "
            "export"
        )
    path = folder.find_checkpoint(checkpoint)
    source = own_environment(loaded, env)
    prepare_cpu()
    vector = make(source, on_cpu(config), 1, "cpu")
    try:
        spaces = read_provenance(folder)["environment"]["spaces"]
        observation, action = build_space(spaces["observation"]), build_space(spaces["action"])
        first = as_inputs(vector.reset(SEED))
        exported = to_onnx(loaded.policy, first)
        given, wanted = _goldens(vector, loaded.policy, exported, first)
        task = vector.task if isinstance(vector, SimVector) else None
        dt = vector.control_dt
    finally:
        if vector is not source:
            vector.close()
    record = load_run(folder.path)
    told = [one for one in (*record.evaluations, *record.checks) if one.step == step_of(path)]
    manifest = Manifest(
        name=name or folder.path.resolve().name,
        robot=task.robot.name if task is not None and task.robot is not None else None,
        task=config.env,
        control_dt=dt,
        timestep=None if task is None else task.timestep,
        observation=_entries(observation, exported, task),
        command=() if task is None or task.command is None else tuple(task.command.names),
        action=action_of(action, task),
        joints=() if task is None else _joints(task),
        gravity_compensated=_carried(task),
        network=Network(opset=OPSET, runtimes=("onnx",), state=exported.state),
        provenance={
            "algo": algo,
            "checkpoint": path.name,
            "step": step_of(path),
            "env_kwargs": config.env_kwargs,
            "seed": config.seed,
            "exported": now(),
            "git": describe_source(),
        },
        evaluation=_evaluation(told[-1]) if told else {},
    )
    goldens = {f"network/input/{n}": v for n, v in given.items()}
    goldens |= {f"network/output/{n}": v for n, v in wanted.items()}
    if task is not None and manifest.is_robot:
        goldens |= feature_goldens(task, manifest, loaded.policy)
    write_bundle(out, manifest, exported.model, goldens)
    return Bundle.open(out)


def require_empty(out: Path) -> None:
    """Raise UsageError where something is at `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty: choose another --out; nothing was overwritten")


def write_bundle(out: Path, manifest: Manifest, model: Any, goldens: Mapping[str, Array]) -> None:
    """Write all files of a bundle, of an ONNX model whose inputs and outputs the manifest names; it appears whole.

    Raises:
        UsageError: it cannot be written.
    """
    contents = {files.MODEL: model.SerializeToString(), files.GOLDENS: write_tensors(goldens)}
    network = manifest.network
    try:
        operations = lower(model)
        inputs = {n.removeprefix("network/input/"): v for n, v in goldens.items() if n.startswith("network/input/")}
        outputs = {n.removeprefix("network/output/"): v for n, v in goldens.items() if n.startswith("network/output/")}
        rows = range(min(HEADER_GOLDENS, len(next(iter(inputs.values())))))
        pairs = [
            ({n: v[i : i + 1] for n, v in inputs.items()}, {n: v[i : i + 1] for n, v in outputs.items()}) for i in rows
        ]
        title = f"The policy {manifest.name}, trained on {manifest.task}"
        contents[files.NETWORK] = json.dumps(operations.to_json(), indent=1).encode()
        contents[files.WEIGHTS] = write_tensors(operations.constants)
        network = replace(network, runtimes=("onnx", "numpy"))
        contents[files.HEADER] = c_header(operations, "policy", title=title, goldens=pairs).encode()
        network = replace(network, runtimes=("onnx", "numpy", "c"))
    except (Unsupported, NotImplementedError) as error:
        network = replace(network, why_not=f"{error} is not among the operations of the other runtimes")
    listed = {name: file_entry(content) for name, content in contents.items()}
    contents[files.MANIFEST] = replace(manifest, network=network, files=listed).to_json()
    contents[files.SEAL] = hashlib.sha256(contents[files.MANIFEST]).hexdigest().encode() + b"\n"
    building = building_site(out)
    try:
        with write_errors_explained(out):
            building.mkdir(parents=True)
        for name, content in contents.items():
            write_durably(building / name, content)
        opened = Bundle.open(building)  # which replays the goldens of measurements
        for runtime in opened.manifest.network.runtimes:
            if RUNTIMES[runtime].available():
                opened.runtime(runtime)  # and this those of the network
        put_in_place(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _evaluation(one: Evaluation) -> dict[str, Any]:
    low, high = one.interval
    told: dict[str, Any] = {
        "mean_return": round(one.mean, 4),
        "episodes": len(one.returns),
        "seeds": evaluation_seeds(len(one.returns)),
        "returns": [round(float(value), 4) for value in one.returns],
        "seconds_of_training": one.time,
    }
    if math.isfinite(low):
        told["interval"] = [low, high]
    if one.success is not None:
        told["success"] = one.success
    return told | ({"figures": one.figures} if one.figures else {})


def _entries(space: gym.Space[Any], exported: Exported, task: SimTask | None) -> tuple[Entry, ...]:
    spaces = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {BARE: space}
    entries = []
    for name in exported.observed:
        shape, dtype = tuple(spaces[name].shape or ()), np.dtype(spaces[name].dtype or np.float32)
        kind = {"f": "float32", "b": "bool"}.get(dtype.kind, "uint8" if dtype == np.uint8 else "int64")
        group = None if task is None else task.observations.get("policy" if name == BARE else name)
        if task is not None and name == BARE and len(task.observations) == 1:
            group = next(iter(task.observations.values()))
        terms: tuple[Term, ...] = ()
        if group is not None and task is not None and all(term.measure is not None for term in group.values()):
            terms = terms_of(task, group)
        entries.append(Entry(name=name, shape=shape, dtype=kind, terms=terms))  # type: ignore[arg-type]
    return tuple(entries)


def _carried(task: SimTask | None) -> bool:
    """Whether the robot's own weight is compensated in the simulation."""
    if task is None or task.robot is None:
        return False
    model = physics(task)
    base = model.body(task.robot.base).id
    own = [i for i in range(model.nbody) if model.body_rootid[i] == model.body_rootid[base]]
    return bool(own) and all(model.body_gravcomp[i] == 1 for i in own)


def _joints(task: SimTask) -> tuple[Joint, ...]:
    """The task's joints as they were in training: the robot's own description, in the pose in which episodes start."""
    if task.robot is None:
        return ()
    own = {joint.name: joint for joint in task.robot.joints}
    joints = []
    for name in task.joints:
        default = float(task.pose[name][0]) if name in task.pose else 0.0
        if name not in own:
            joints.append(Joint(name=name, unit="rad", lower=None, upper=None, default=default, driven=False))
            continue
        joint = own[name]
        joints.append(
            Joint(
                name=name,
                unit=joint.unit,
                lower=finite(joint.lower),
                upper=finite(joint.upper),
                default=default,
                kp=joint.kp,
                kd=joint.kd,
                max_effort=joint.max_effort,
                max_speed=joint.max_speed,
            )
        )
    return tuple(joints)


# --- goldens ----------------------------------------------------------------------------------------------------------


def _goldens(
    vector: VectorEnv, policy: Policy, exported: Exported, first: Obs
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inputs and outputs (ROWS, ...) of the policy as torch runs it, along episodes of its own."""
    names = {f"state.{name}": name for name in policy.initial_state(1)}
    given: dict[str, list[Array]] = {name: [] for name in (*exported.observed, *names)}
    wanted: dict[str, list[Array]] = {name: [] for name in (ACTION, *(f"next.{name}" for name in names.values()))}
    obs, state = first, policy.initial_state(1)
    for t in range(ROWS * EVERY):
        with torch.no_grad():
            action, following, _ = policy.act(obs, state, explore=False)
        if t % EVERY == 0:
            entries = {BARE: obs} if not isinstance(obs, dict) else obs
            for name in exported.observed:
                given[name].append(entries[name].numpy().copy())
            for name, own in names.items():
                given[name].append(state[own].numpy().copy())
                wanted[f"next.{own}"].append(following[own].numpy().copy())
            wanted[ACTION].append(action.numpy().copy())
        step = vector.step(action)
        ended = step.terminated | step.truncated | ~step.valid
        obs, state = as_inputs(step.obs), policy.reset(following, ended)
    return tuple({n: np.concatenate(parts) for n, parts in side.items()} for side in (given, wanted))  # type: ignore[return-value]


def quiet(task: SimTask) -> SimTask:
    """The task without noise, delays, pushes and differences between robots."""
    groups = {
        group: {name: replace(term, noise=0.0, delay=(0, 0)) for name, term in terms.items()}
        for group, terms in task.observations.items()
    }
    events = {name: event for name, event in task.events.items() if event.when == "reset"}
    return replace(task, observations=groups, events=events, action=replace(task.action, delay=(0, 0)))


def feature_goldens(task: SimTask, manifest: Manifest, policy: Policy) -> dict[str, Array]:
    """What a simulated robot measures along an episode, and what the task makes of it: observations, and controls.

    Raises:
        UsageError: the controller's own arithmetic gives something else, so that the task's `Measure`s are wrong.
    """
    plain = quiet(task)
    env = SimVector(plain, BatchSim(physics(plain), 1, 1))
    require_gains(env.sim.model, manifest)
    require_measures(env, plain, manifest)
    terms = plain.policy_terms
    out: dict[str, list[Array]] = {}

    def keep(name: str, value: Any) -> None:
        plain_value = value.tolist() if isinstance(value, torch.Tensor) else value
        out.setdefault(f"features/{name}", []).append(np.array(plain_value, np.float64).ravel())

    w = env.world
    w.field("xquat")  # from the first step on
    obs, state = env.reset(SEED), policy.initial_state(1)
    base = 0 if task.robot is None else index_of(env.sim.model, mujoco.mjtObj.mjOBJ_BODY, task.robot.base)
    motors = [env.sim.model.actuator(name).id for name in manifest.action.joints]  # of our robots, named as joints
    names = [joint.name for joint in manifest.joints]
    order = [list(task.joints).index(name) for name in names]
    for _ in range(FEATURE_STEPS):
        own = obs[plain.policy_group] if isinstance(obs, dict) else obs
        keep("position", w.field("qpos")[0, w.joint_qpos].double().numpy()[order])
        keep("velocity", w.joint_vel[0].double().numpy()[order])
        keep("command", w.command[0])
        for label, term in terms.items():
            assert term.measure is not None
            if term.measure.what == "base up":
                keep("others/orientation", w.field("xquat")[0, base])
            elif term.measure.what in READINGS:
                keep(f"others/{READINGS[term.measure.what]}", term.of(w)[0])
            elif term.measure.what == "given":
                keep(f"others/{label}", term.of(w)[0])
        keep(f"observation/{manifest.observation[0].name}", own[0])
        with torch.no_grad():
            action, state, _ = policy.act(obs, state, explore=False)
        keep("action", action[0])
        step = env.step(action)
        obs = step.obs
        if bool(step.truncated[0] | step.terminated[0]):  # controls are those of the next episode already
            for kept in out.values():
                del kept[len(out["features/control"]) :]
            break
        keep("control", w.live("ctrl")[0, motors])
    return {name: np.stack(values) for name, values in out.items()}


def require_gains(model: mujoco.MjModel, manifest: Manifest) -> None:
    """Compare the motors and limits that were simulated with what the manifest says of them.

    Raises:
        UsageError: a gain, a limit or an effort is another; names the joint and both numbers.
    """
    for joint in (joint for joint in manifest.joints if joint.driven):
        motor = model.actuator(joint.name).id
        position = "position" in manifest.action.kind
        kp, kd = (model.actuator_gainprm[motor, 0], -model.actuator_biasprm[motor, 2]) if position else (0.0, 0.0)
        low, high = model.jnt_range[model.joint(joint.name).id]
        pairs: dict[str, tuple[float | None, float]] = {"kp": (joint.kp, kp), "kd": (joint.kd, kd)}
        pairs["max_effort"] = (joint.max_effort, model.actuator_forcerange[motor, 1])
        if position:  # whose targets are kept within what the description says
            low, high = model.actuator_ctrlrange[motor]
        if joint.lower is not None:
            pairs |= {"lower": (joint.lower, low), "upper": (joint.upper, high)}
        for what, (said, simulated) in pairs.items():
            if said is None or abs(said - simulated) > 1e-6 * max(1.0, abs(simulated)) + LIMIT_TOLERANCE * (
                what in "lower upper"
            ):
                raise UsageError(f"{what} of {joint.name} is {said} by the robot's description, and was {simulated:g}")


def require_measures(env: SimVector, task: SimTask, manifest: Manifest) -> None:
    """Put the robot into states drawn at random, and compare what the task observes with what the controller makes of
    measurements that are taken without the task: frames, signs, joints.

    Raises:
        UsageError: a term is not what its `Measure` says.
    """
    assert task.robot is not None
    model, data, w = env.sim.model, mujoco.MjData(env.sim.model), env.world
    names = [joint.name for joint in manifest.joints]
    entry = manifest.observation[0]
    group = task.policy_terms
    random, rows = np.random.default_rng(0), torch.ones(1, dtype=torch.bool)
    env.reset(SEED)
    for _ in range(STATES):
        data.qpos[:], data.qvel[:] = w.home.numpy(), random.normal(scale=0.5, size=model.nv)
        for joint in names:
            data.qpos[model.joint(joint).qposadr[0]] += random.uniform(-0.2, 0.2) * (model.joint(joint).type[0] == 3)
        if task.robot.base_height is not None:
            start = model.jnt_qposadr[model.body_jntadr[model.body(task.robot.base).id]] + 3
            turn = random.normal(size=4)
            data.qpos[start : start + 4] = turn / np.linalg.norm(turn)
        w.live("qpos")[0], w.live("qvel")[0] = torch.from_numpy(data.qpos.copy()), torch.from_numpy(data.qvel.copy())
        env.sim.forward(rows)
        w.refresh()
        mujoco.mj_forward(model, data)
        reading = measured(model, data, task.robot, names)
        given = {n: t.of(w)[0].double().numpy() for n, t in group.items() if t.measure and t.measure.what == "given"}
        reading = replace(reading, others={**reading.others, **given})
        builder = FeatureBuilder(manifest, names)
        builder.reset(reading)
        builder.command[:] = w.command[0].double().numpy()
        made, at = builder.observe(reading)[entry.name][0], 0
        for term in entry.terms:
            ours = made[at : at + term.size]
            at += term.size * term.history
            if term.measure in (
                "last action",
                "gait clock",
                "joint lead",
            ):  # what was before, of which there is nothing
                continue
            theirs = group[term.name].of(w)[0].numpy()
            if not np.abs(ours - theirs).max() <= STATE_TOLERANCE + term.resolution:
                raise UsageError(
                    f"the term {term.name} is said to be {term.measure} {term.frame and f'({term.frame})'}: by that a "
                    f"controller would observe {ours.round(4).tolist()}, and the task observes "
                    f"{theirs.round(4).tolist()}"
                )
