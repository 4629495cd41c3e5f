"""Policy bundles: every policy in every runtime, exports of runs, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import ctrlrl
from ctrlrl.algorithms.registry import find_algorithm
from ctrlrl.cli.main import run as command
from ctrlrl.deploy import Actor, Bundle
from ctrlrl.deploy.features import FeatureBuilder, Reading, require_readable, up_in_base
from ctrlrl.deploy.manifest import Action, Entry, Manifest, Network
from ctrlrl.envs.make import make_env
from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.sim_vector import SimVector, physics
from ctrlrl.errors import UsageError
from tests.runs import SMALL
from tests.scripts import ROOT

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from ctrlrl.deploy.to_onnx import ACTION, BARE, OPSET, as_inputs, to_onnx
from ctrlrl.training.export_run import export_run, quiet, require_gains, require_measures, write_bundle

FLAT = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
ACT = gym.spaces.Box(np.array([-2, -1, 0], np.float32), np.array([1, 3, 5], np.float32))
PICTURE = gym.spaces.Box(0, 255, (3, 36, 36), np.uint8)
GROUPS = gym.spaces.Dict({"policy": FLAT, "privileged": gym.spaces.Box(-1, 1, (3,), np.float32)})
MASKED = gym.spaces.Dict({"seen": FLAT, "action_mask": gym.spaces.MultiBinary(4)})
CANDIDATES = gym.spaces.Dict(
    {"seen": FLAT, "candidates": gym.spaces.Box(-9, 9, (4, 2), np.float32), "candidate_mask": gym.spaces.MultiBinary(4)}
)
FOUR, SEVERAL = gym.spaces.Discrete(4, start=3), gym.spaces.MultiDiscrete([3, 2])
KINDS: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "sac": ("sac", FLAT, ACT, {"normalize_obs": True}),
    "td3": ("td3", FLAT, ACT, {}),
    "dsac-t": ("dsac-t", FLAT, ACT, {}),
    "droq": ("droq", FLAT, ACT, {}),
    "wsrl": ("wsrl", FLAT, ACT, {"policy_layer_norm": True}),
    "ppo": ("ppo", FLAT, ACT, {}),
    "ppo-gru": ("ppo", FLAT, ACT, {"recurrent": "gru", "recurrent_size": 8}),
    "ppo-lstm": ("ppo", FLAT, ACT, {"recurrent": "lstm", "recurrent_size": 8}),
    "ppo-several": ("ppo", FLAT, SEVERAL, {}),
    "ppo-masked": ("ppo", MASKED, FOUR, {}),
    "iql": ("iql", FLAT, ACT, {}),
    "bc-gaussian": ("bc", FLAT, ACT, {"policy": "gaussian"}),
    "bc-discrete": ("bc", FLAT, FOUR, {}),
    "sac-discrete": ("sac-discrete", FLAT, FOUR, {}),
    "candidates": ("sac-discrete", CANDIDATES, FOUR, {}),
    "pictures": ("sac", PICTURE, ACT, {}),
    "privileged": ("sac", GROUPS, ACT, {}),
}


def made(kind: str) -> Any:
    """A policy with weights, and statistics, that are not those of a new one."""
    algo, obs, act, fields = KINDS[kind]
    algorithm = find_algorithm(algo)
    torch.manual_seed(0)
    agent = algorithm.load_agent_class()(obs, act, algorithm.load_config_class()(hidden=(16, 16), **fields))
    if agent.normalizer is not None:
        agent.normalizer.update(sampled(obs, 50), torch.ones(50, dtype=torch.bool))
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return agent.policy.eval()


def sampled(space: Any, rows: int) -> Any:
    if isinstance(space, gym.spaces.Dict):
        return {name: sampled(entry, rows) for name, entry in space.spaces.items()}
    space.seed(1)
    values = torch.from_numpy(np.stack([space.sample() for _ in range(rows)]))
    if isinstance(space, gym.spaces.MultiBinary):
        values[:, 0] = 1
    return as_inputs(values)


def bundle_of(kind: str, out: Path, rows: int = 6) -> tuple[Any, Any, Bundle]:
    policy, (_, space, act, _) = made(kind), KINDS[kind]
    seen = sampled(space, rows)
    one = {n: v[:1] for n, v in seen.items()} if isinstance(seen, dict) else seen[:1]
    exported = to_onnx(policy, one)
    state = policy.initial_state(rows)
    state = {name: torch.randn_like(value) for name, value in state.items()}
    with torch.no_grad():
        action, following, _ = policy.act(seen, state, explore=False)
    entries = seen if isinstance(seen, dict) else {BARE: seen}
    goldens = {f"network/input/{n}": entries[n].numpy() for n in exported.observed}
    goldens |= {f"network/input/state.{n}": v.numpy() for n, v in state.items()}
    goldens |= {f"network/output/next.{n}": v.numpy() for n, v in following.items()}
    goldens[f"network/output/{ACTION}"] = action.numpy()
    kinds = {torch.float32: "float32", torch.uint8: "uint8", torch.int64: "int64"}
    manifest = Manifest(
        name=kind,
        task="test",
        control_dt=0.02,
        observation=tuple(
            Entry(name=n, shape=tuple(entries[n].shape[1:]), dtype=kinds[entries[n].dtype])  # type: ignore[arg-type]
            for n in exported.observed
        ),
        action=Action(kind="box" if isinstance(act, gym.spaces.Box) else "choice", shape=tuple(act.shape or ())),
        network=Network(opset=OPSET, runtimes=("onnx",), state=exported.state),
    )
    write_bundle(out, manifest, exported.model, goldens)
    return policy, space, Bundle.open(out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_policy_acts_alike_in_every_runtime(kind: str, tmp_path: Path) -> None:
    policy, space, bundle = bundle_of(kind, tmp_path / "bundle")
    assert bundle.manifest.network.runtimes == ("onnx", "numpy", "c"), bundle.manifest.network.why_not
    if kind == "privileged":
        assert [entry.name for entry in bundle.manifest.observation] == ["policy"]
    actors = [Actor(bundle, name) for name in bundle.manifest.network.runtimes]
    seen, state = sampled(space, 8), policy.initial_state(1)
    for t in range(8):
        one = {n: v[t : t + 1] for n, v in seen.items()} if isinstance(seen, dict) else seen[t : t + 1]
        with torch.no_grad():
            expected, state, _ = policy.act(one, state, explore=False)
        given = {n: v[0].numpy() for n, v in one.items()} if isinstance(one, dict) else one[0].numpy()
        for actor in actors:
            np.testing.assert_allclose(actor.act(given), expected[0].numpy(), atol=2e-5)
    for actor in actors:  # an episode that starts anew has no memory of the one before
        actor.reset()
        first = {n: v[0].numpy() for n, v in seen.items()} if isinstance(seen, dict) else seen[0].numpy()
        again = {n: v[:1] for n, v in seen.items()} if isinstance(seen, dict) else seen[:1]
        with torch.no_grad():
            fresh = policy.act(again, policy.initial_state(1), explore=False)[0]
        np.testing.assert_allclose(actor.act(first), fresh[0].numpy(), atol=2e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pendulum"
    settings = SMALL | {"steps": 150, "eval_every": 100, "agent": SMALL["agent"] | {"normalize_obs": True}}
    return ctrlrl.train("sac", "Pendulum-v1", out=str(out), **settings).path


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "pendulum"
    return export_run(run, out).path


def test_a_run_becomes_a_bundle(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert command(["export", str(run), "--out", str(tmp_path / "b"), "--name", "swing"]) == 0
    said = capsys.readouterr().out
    assert "swing, trained on Pendulum-v1" in said and "20 actions a second" in said
    assert command(["check", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert all(f"{name:<12}goldens reproduced" in said for name in ("onnx", "numpy", "c"))
    assert command(["export", str(run), "--out", str(tmp_path / "b")]) == 2
    assert "is not empty" in capsys.readouterr().err
    bundle = Bundle.open(tmp_path / "b")
    policy = ctrlrl.load(run).policy
    seen = np.array([0.3, -0.9, 2.0], np.float32)
    expected = policy.act(torch.from_numpy(seen)[None])[0][0].numpy()
    for name in ("onnx", "numpy", "c"):
        np.testing.assert_allclose(Actor(bundle, name).act(seen), expected, atol=1e-5)
    manifest = bundle.manifest
    assert manifest.evaluation["mean_return"] < 0 and manifest.provenance["algo"] == "sac"
    assert (manifest.action.low, manifest.action.high) == ((-2.0,), (2.0,))
    for file in (tmp_path / "b").iterdir():  # nothing tells of this machine
        for word in (b"/site-packages", str(Path.cwd()).encode(), str(tmp_path).encode()):
            assert word not in file.read_bytes(), (file, word)
    with pytest.raises(UsageError, match="of whose observation nothing is known but its shape"):
        FeatureBuilder(manifest, [])
    with pytest.raises(UsageError, match=r"the observation observation is \(2,\); the policy takes \(3,\)"):
        Actor(bundle, "numpy").act(seen[:2])


def test_a_controller_needs_no_torch(whole: Path) -> None:
    code = (
        "import sys, numpy as np; from ctrlrl.deploy import Actor, Bundle; "
        f"print(Actor(Bundle.open({str(whole)!r}), 'numpy').act(np.zeros(3)));"
        "print([m for m in ('torch', 'gymnasium', 'mujoco', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "[]"


def altered(whole: Path, out: Path, change: Any, *, sealed: bool) -> Path:
    """A copy that was changed; `sealed`: with checksums that fit again."""
    shutil.copytree(whole, out)
    change(out)
    if sealed:
        tree = json.loads((out / "manifest.json").read_text())
        for name in tree["files"]:
            if (out / name).is_file():
                content = (out / name).read_bytes()
                tree["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (out / "manifest.json").write_text(json.dumps(tree))
    if (out / "manifest.json").is_file():
        seal = hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()
        (out / "manifest.sha256").write_text(seal)
    return out


def test_one_byte_of_the_manifest_is_enough(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "b")
    content = (tmp_path / "b/manifest.json").read_text()
    (tmp_path / "b/manifest.json").write_text(content.replace("-2.0", "-9.0", 1))
    with pytest.raises(UsageError, match=r"manifest\.json was altered"):
        Bundle.open(tmp_path / "b")
    (tmp_path / "b/manifest.sha256").unlink()
    with pytest.raises(UsageError, match=r"manifest\.sha256 is missing"):
        Bundle.open(tmp_path / "b")


@pytest.mark.parametrize(
    "name", ["policy.onnx", "network.json", "policy.safetensors", "policy.h", "golden.safetensors"]
)
def test_one_byte_is_enough(name: str, whole: Path, tmp_path: Path, capsys: Any) -> None:
    def flip(out: Path) -> None:
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)

    bad = altered(whole, tmp_path / "b", flip, sealed=False)
    with pytest.raises(UsageError, match=f"{name} was altered"):
        Bundle.open(bad)
    assert command(["check", str(bad)]) == 2 and "was altered" in capsys.readouterr().err


def edit(**changes: Any) -> Any:
    def change(out: Path) -> None:
        tree = json.loads((out / "manifest.json").read_text())
        for path, value in changes.items():
            at = tree
            *parts, last = path.split("__")
            for part in parts:
                at = at[int(part)] if part.isdigit() else at[part]
            if value is ...:
                del at[last]
            else:
                at[last] = value
        (out / "manifest.json").write_text(json.dumps(tree))

    return change


BAD: dict[str, tuple[Any, str]] = {
    "no manifest": (lambda out: (out / "manifest.json").unlink(), "is no bundle: it has no manifest.json"),
    "no JSON": (lambda out: (out / "manifest.json").write_text("{"), "is no valid JSON"),
    "NaN": (lambda out: (out / "manifest.json").write_text('{"control_dt": NaN}'), "NaN is no number"),
    "deep": (lambda out: (out / "manifest.json").write_text("[" * 100_000), "is no valid JSON"),
    "list": (lambda out: (out / "manifest.json").write_text("[]"), "manifest must be an object"),
    "format": (edit(format="ctrlrl.bundle/2"), "this version reads 'ctrlrl.bundle/1'"),
    "unknown field": (edit(joint_order=[1, 2]), "manifest has no field 'joint_order'"),
    "lacking": (edit(action=...), "manifest lacks action"),
    "type": (edit(control_dt="fast"), "manifest.control_dt must be a float, got 'fast'"),
    "range": (edit(control_dt=-1.0), "control_dt must be s above 0"),
    "kind": (edit(action__kind="joint velocity"), "no kind 'joint velocity'"),
    "true": (edit(network__opset=True), "manifest.network.opset must be a int, got True"),
    "missing": (lambda out: (out / "policy.onnx").unlink(), "policy.onnx is missing"),
    "extra": (lambda out: (out / "run.sh").write_text("rm"), r"holds run.sh, which its manifest does not list"),
    "escape": (edit(files__=0, files={"../evil": {"bytes": 1, "sha256": "0"}}), "lists no golden"),
    "other file": (edit(**{"files__evil.so": {"bytes": 0, "sha256": ""}}), "the file 'evil.so', which no bundle has"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bundle_that_is_not_as_it_says_is_refused(name: str, whole: Path, tmp_path: Path) -> None:
    change, message = BAD[name]
    with pytest.raises(UsageError, match=message):
        Bundle.open(altered(whole, tmp_path / "b", change, sealed=False))


def test_a_link_out_of_the_bundle_is_refused(whole: Path, tmp_path: Path) -> None:
    def link(out: Path) -> None:
        (out / "policy.onnx").rename(tmp_path / "elsewhere")
        (out / "policy.onnx").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UsageError, match="no plain file"):
        Bundle.open(altered(whole, tmp_path / "b", link, sealed=False))


def test_other_weights_are_noticed_where_checksums_fit(whole: Path, tmp_path: Path) -> None:
    from ctrlrl.deploy.tensors import read_tensors, write_tensors

    def weaken(out: Path) -> None:
        arrays = {n: v.copy() for n, v in read_tensors((out / "policy.safetensors").read_bytes(), "x").items()}
        next(v for v in arrays.values() if v.ndim == 2)[0] *= 1.01
        (out / "policy.safetensors").write_bytes(write_tensors(arrays))

    bundle = Bundle.open(altered(whole, tmp_path / "b", weaken, sealed=True))
    bundle.runtime("onnx")
    for name in ("numpy", "c"):
        with pytest.raises(
            UsageError, match=f"{name} gives other numbers than when this was exported: action of golden"
        ):
            bundle.runtime(name)

    def none(out: Path) -> None:
        (out / "golden.safetensors").write_bytes(write_tensors({"a": np.zeros(3)}))

    with pytest.raises(UsageError, match="has no goldens of the network"):
        Bundle.open(altered(whole, tmp_path / "c", none, sealed=True)).runtime("numpy")


def test_what_cannot_be_written_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*arguments: Any) -> None:
        raise UsageError("no space left")

    monkeypatch.setattr("ctrlrl.training.export_run.write_durably", full)
    with pytest.raises(UsageError, match="no space left"):
        export_run(run, tmp_path / "b")
    assert not list(tmp_path.iterdir())


# --- robots -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rig(tmp_path_factory: Any) -> Bundle:
    folder = tmp_path_factory.mktemp("rig")
    agent = {"hidden": [16, 16]}
    settings = {"steps": 256, "num_envs": 8, "rollout_steps": 8, "eval_every": 0, "video": False}
    settings |= {"preset": False, "threads": 1, "quiet": True}
    kwargs = {"history": 3, "observation_delay": 1}
    ran = ctrlrl.train("ppo", "CartPoleSwingUp-v0", out=str(folder / "r"), env_kwargs=kwargs, agent=agent, **settings)
    return export_run(ran.path, folder / "b", checkpoint="last")


def test_the_controllers_arithmetic_is_that_of_the_task(rig: Bundle) -> None:
    """History, encoder steps, directions of joints: `export_run` compared them, and so does whoever opens it."""
    assert rig.replay_features() < 1e-3
    manifest = rig.manifest
    assert manifest.robot == "cartpole" and manifest.is_robot
    first = manifest.observation[0].terms[0]
    assert (first.name, first.history, first.delay) == ("place", 3, (1, 1)) and manifest.action.delay == (0, 2)


def test_swapped_names_and_wrong_scales_are_noticed(rig: Bundle, tmp_path: Path) -> None:
    terms = json.loads((rig.path / "manifest.json").read_text())["observation"][0]["terms"]
    swapped = [term | {"joints": ["pole"]} if term["joints"] == ["slider"] else term for term in terms]
    bad = altered(rig.path, tmp_path / "a", edit(observation__0__terms=swapped), sealed=True)
    with pytest.raises(UsageError, match=r"policy/place in step 0 is .* by the manifest, and in training it was"):
        Bundle.open(bad)
    bad = altered(rig.path, tmp_path / "b", edit(action__scale=[9.9]), sealed=True)
    with pytest.raises(UsageError, match="control of slider in step 0"):
        Bundle.open(bad)


def test_declarations_are_compared_with_the_simulation(rig: Bundle) -> None:
    """Gains, limits, joints: by MuJoCo's own functions in states drawn at random, and not by the task's terms."""
    env = make_env("CartPoleSwingUp-v0", env_kwargs={"history": 3, "observation_delay": 1})
    assert isinstance(env, SimVector)
    task = quiet(env.task)
    plain, manifest = SimVector(task, BatchSim(physics(task), 1, 1)), rig.manifest
    require_gains(plain.sim.model, manifest)
    require_measures(plain, task, manifest)
    weak = tuple(replace(joint, max_effort=9.0) if joint.driven else joint for joint in manifest.joints)
    with pytest.raises(UsageError, match=r"max_effort of slider is 9\.0 by the robot's description, and was 10"):
        require_gains(plain.sim.model, replace(manifest, joints=weak))
    entry = manifest.observation[0]
    other = {"slider": "pole", "pole": "slider"}
    for name in ("place", "cart speed", "angle", "speed"):
        terms = tuple(
            replace(term, joints=tuple(other[j] for j in term.joints)) if term.name == name else term
            for term in entry.terms
        )
        with pytest.raises(UsageError, match=f"the term {name} is said to be joint"):
            require_measures(plain, task, replace(manifest, observation=(replace(entry, terms=terms),)))


def test_joints_are_found_by_name_and_never_by_place(rig: Bundle) -> None:
    manifest = rig.manifest
    with pytest.raises(
        UsageError, match=r"needs pole, slider, .* no such joint. The policy's: pole, slider. The robot's: cart, hinge"
    ):
        require_readable(manifest, ["cart", "hinge"], [])
    with pytest.raises(UsageError, match="names a joint twice"):
        require_readable(manifest, ["slider", "pole", "pole"], [])
    position, velocity = np.array([0.1, 0.5]), np.array([-1.0, 2.0])
    made = []
    for order in ([0, 1], [1, 0]):
        names = [("slider", "pole")[i] for i in order]
        builder = FeatureBuilder(manifest, names)
        reading = Reading(names, position[order], velocity[order])
        builder.reset(reading)
        made.append(builder.observe(reading)["policy"])
    assert np.array_equal(*made)


def test_what_is_not_as_it_began_is_refused_before_anything_changes(rig: Bundle) -> None:
    joints = ["slider", "pole"]
    builder = FeatureBuilder(rig.manifest, joints)
    reading = Reading(joints, np.array([0.1, 0.5]), np.zeros(2))
    for call in (lambda: builder.observe(reading), lambda: builder.act(np.zeros(1), reading)):
        with pytest.raises(UsageError, match="no episode was started"):
            call()
    builder.reset(reading)
    builder.act(np.array([0.3]), reading)
    for action in (np.array([np.nan]), np.zeros(2), np.zeros(())):
        with pytest.raises(UsageError, match=r"an action must be \(1,\) finite numbers"):
            builder.act(action, reading)
    assert builder.last_action == np.float32(0.3)
    for bad, message in (
        (Reading(["pole", "slider"], reading.position, reading.velocity), "is of the joints pole, slider; it began"),
        (Reading(joints, np.array([0.1, np.inf]), reading.velocity), "positions must be 2 finite numbers"),
        (Reading(joints, reading.position, np.zeros(1)), "velocities must be 2 finite numbers"),
    ):
        for call in (lambda bad=bad: builder.observe(bad), lambda bad=bad: builder.act(np.zeros(1), bad)):
            with pytest.raises(UsageError, match=message):
                call()
    with pytest.raises(UsageError, match="names a joint twice"):
        FeatureBuilder(rig.manifest, ["slider", "pole", "pole"])
    for zero in (np.zeros(4), np.array([np.nan, 0, 0, 1]), np.ones(3)):
        with pytest.raises(UsageError, match="a quaternion of length 1"):
            up_in_base(zero)


def test_up_is_the_same_for_a_quaternion_and_its_negative() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        q = rng.normal(size=4)
        q *= rng.uniform(0.6, 1.8) / np.linalg.norm(q)
        w, x, y, z = q / np.linalg.norm(q)
        rotation = np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ]
        )
        np.testing.assert_allclose(up_in_base(q), rotation.T @ [0, 0, 1], atol=1e-12)
        np.testing.assert_allclose(up_in_base(-q), up_in_base(q), atol=1e-12)


def test_the_page_runs(whole: Path, rig: Bundle, tmp_path: Path, monkeypatch: Any) -> None:
    page = (ROOT / "docs/bundle.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "bundles").mkdir()
    shutil.copytree(whole, tmp_path / "bundles/pendulum")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "bundle.md", "exec"), names)
    assert names["action"].shape == (1,)
    joints = ["pole", "slider"]
    first = Reading(joints, np.array([0.1, 0.2]), np.zeros(2))
    names = {"bundle": rig, "joints": joints, "first_reading": first, "reading": first, "actor": Actor(rig, "numpy")}
    code = blocks[1].replace("builder.command[:] = [0.5, 0, 0]", "builder.command[:] = []")  # a rig is told nothing
    exec(compile(code, "bundle.md", "exec"), names)
    assert names["targets"].shape == (1,) and abs(names["targets"][0]) <= 10


CONTRADICTIONS: dict[str, tuple[Any, str]] = {
    "vector of two": (edit(observation__0__terms__0__measure="base up"), "policy/place must be of 3 numbers"),
    "unknown measure": (edit(observation__0__terms__0__measure="joint torque"), "no measure 'joint torque'"),
    "unknown joint": (
        edit(observation__0__terms__0__joints=["cart"]),
        "names the joint 'cart'; the manifest has slider",
    ),
    "command": (edit(observation__0__terms__4__measure="command"), "policy/last action must be of 0 numbers"),
    "select": (edit(observation__0__terms__0__select=[7]), "a choice of 0 numbers of the command"),
    "offset": (edit(observation__0__terms__0__offset=[1.0, 2.0]), "an offset for each number"),
    "size": (edit(observation__0__shape=[7]), r"observation policy must be float32 \(18,\)"),
    "no clock": (edit(observation__0__terms__2__measure="gait clock", control_dt=None), "a clock with a frequency"),
    "scale": (edit(action__scale=[1.0, 2.0]), r"action.scale must be \(1,\) of them"),
    "lead": (edit(action__lead=[-1.0]), "action.lead must be at least 0"),
    "bounds": (edit(action__low=[2.0]), "action.low must be at most action.high"),
    "effort": (edit(joints__0__max_effort=-5.0), "an effort above 0"),
    "no effort": (edit(joints__0__max_effort=None), "an effort above 0"),
    "default": (edit(joints__0__default=3.0), "a default within its limits"),
    "same name": (edit(joints__1__name="slider"), "joints must be of different names"),
    "tolerance": (edit(network__tolerance=1e30), "network.tolerance must be above 0 and at most 0.01"),
    "runtime": (edit(network__runtimes=["gpu"]), "some of onnx, numpy and c"),
    "position without gains": (edit(action__kind="joint position offset"), "kp above 0 and limits"),
    "large": (edit(control_dt=10**400), "manifest.control_dt must be a float"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused(name: str, rig: Bundle, tmp_path: Path) -> None:
    change, message = CONTRADICTIONS[name]
    with pytest.raises(UsageError, match=message):
        Bundle.open(altered(rig.path, tmp_path / "b", change, sealed=True))


def test_numbers_that_are_none_and_names_that_stand_twice_are_refused() -> None:
    for text, message in (
        ('{"format": "ctrlrl.bundle/1", "format": "x"}', "a name stands twice"),
        ('{"format": "ctrlrl.bundle/1", "provenance": {"a": 1e999}}', "1e999 is no number that can be told"),
    ):
        with pytest.raises(UsageError, match=message):
            Manifest.from_json(text.encode(), "manifest.json")
