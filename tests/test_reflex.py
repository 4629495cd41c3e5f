"""Reflexes: what is read and refused, when one takes over and gives back, and that one keeps a cart on its rail."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.controller import ControllerConfig
from ctrlrl.deploy.features import FeatureBuilder, Reading
from ctrlrl.deploy.manifest import Action, Entry, Joint, Manifest, Term
from ctrlrl.deploy.manifest import Network as NetworkEntry
from ctrlrl.deploy.network import Network, Node, Value
from ctrlrl.deploy.reflex import ReadJoint, Recovery, ReflexSpec, RiskReflex, read_reflex, write_reflex
from ctrlrl.deploy.safety import Fault
from ctrlrl.deploy.simulated_config import SimulatedConfig
from ctrlrl.deploy.ticks import read_ticks
from ctrlrl.deploy.virtual import VirtualDeployment
from ctrlrl.deploy.wire import DRIVEN
from ctrlrl.envs.tasks.registry import make_robot_task
from ctrlrl.errors import UsageError
from tests.scripts import loaded

JOINTS = ["pole", "slider"]  # of the robot, in another order than the reflex has them
EFFORT = 10.0  # N
SWITCH = 0.38  # m


def manifest(**changes: Any) -> Manifest:
    """Of a policy of the cart-pole rig that sees where the cart is."""
    place = Term(name="place", size=1, measure="joint position", unit="m", frame="joint", joints=("slider",))
    standard: dict[str, Any] = {
        "name": "outward",
        "robot": "cartpole",
        "task": "CartPoleSwingUp-v0",
        "control_dt": 0.02,
        "observation": (Entry(name="observation", shape=(1,), terms=(place,)),),
        "action": Action(
            kind="joint effort",
            shape=(1,),
            joints=("slider",),
            low=(-1.0,),
            high=(1.0,),
            scale=(EFFORT,),
            offset=(0.0,),
        ),
        "joints": (
            Joint(name="slider", unit="m", lower=-0.4, upper=0.4, default=0.0, max_effort=EFFORT),
            Joint(name="pole", unit="rad", lower=None, upper=None, default=math.pi, driven=False),
        ),
        "network": NetworkEntry(opset=20, runtimes=("onnx",)),
    }
    return Manifest(**(standard | changes))


def spec(**changes: Any) -> ReflexSpec:
    standard: dict[str, Any] = {
        "robot": "cartpole",
        "control": "effort",
        "rate": 200.0,
        "reads": (ReadJoint(name="slider", unit="m", lower=-0.4, upper=0.4), ReadJoint(name="pole", unit="rad")),
        "commands": ("slider",),
        "threshold": 0.5,
        "release": 0.2,
        "longest": 1.0,
        "recovery": Recovery(kind="feedback", centre=(0.0,), k_p=(40.0,), k_d=(10.0,), max_effort=(EFFORT,)),
    }
    return ReflexSpec(**(standard | changes))


def by_hand() -> Network:
    """A critic: where the cart soon is, in the first 0.12 s, and a little further where it is pushed to."""
    nodes = [
        Node("Concat", ("state", "command"), "all", {"axis": 1}),
        Node("Gemm", ("all", "soon"), "place", {}),
        Node("Abs", ("place",), "far", {}),
        Node("Gemm", ("far", "steep", "edge"), "logit", {}),
        Node("Sigmoid", ("logit",), "likely", {}),
    ]
    constants = {
        "soon": np.array([[1.0, 0.0, 0.12, 0.0, 0.004]], np.float32),
        "steep": np.array([[40.0]], np.float32),
        "edge": np.array([-12.0], np.float32),
    }
    inputs = {"state": Value((1, 4), "float32"), "command": Value((1, 1), "float32")}
    return Network(inputs, {"risk": "likely"}, nodes, constants)


def goldens(network: Network, rows: int = 8) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    state, command = (random.normal(size=(rows, n)).astype(np.float32) for n in (4, 1))
    risks = [network({"state": s[None], "command": c[None]})["risk"] for s, c in zip(state, command, strict=True)]
    return {"state": state, "command": command, "risk": np.concatenate(risks)}


def reflex(joints: list[str] = JOINTS, **changes: Any) -> RiskReflex:
    return RiskReflex(spec(**changes), by_hand(), manifest(), joints)


def reading(place: float, speed: float = 0.0, joints: list[str] = JOINTS) -> Reading:
    where = {"slider": (place, speed), "pole": (3.0, 0.5)}
    position, velocity = (np.array([where.get(name, (0.0, 0.0))[i] for name in joints]) for i in (0, 1))
    return Reading(list(joints), position, velocity)


@pytest.fixture
def folder(tmp_path):
    out = tmp_path / "reflex"
    write_reflex(out, spec(provenance={"seed": 3}), by_hand(), goldens(by_hand()))
    return out


# --- the folder -------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(folder):
    read, made = read_reflex(folder, manifest(), JOINTS), reflex()
    assert replace(read.spec, files={}) == replace(made.spec, provenance={"seed": 3})
    assert read.rate == 200 and read.seal == hashlib.sha256((folder / "reflex.json").read_bytes()).hexdigest()
    for place in (-0.39, -0.2, 0.0, 0.31):
        told = read(reading(place, 0.3), np.array([2.0])), made(reading(place, 0.3), np.array([2.0]))
        assert read.risk == made.risk and (told[0] is None) == (told[1] is None)


def test_nothing_is_overwritten(folder):
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(UsageError, match="is not empty"):
        write_reflex(folder, spec(), by_hand(), goldens(by_hand()))
    assert sorted(folder.parent.rglob("*")) == before


def test_a_network_that_is_not_the_critic_is_not_written(tmp_path):
    wrong = goldens(by_hand())
    wrong["risk"][5] += 1e-3
    with pytest.raises(UsageError, match="risk of golden 5 is off by"):
        write_reflex(tmp_path / "reflex", spec(), by_hand(), wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["reflex.json", "network.json", "policy.safetensors", "golden.safetensors"])
def test_altered_files_are_refused(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name} was altered"):
        read_reflex(folder, manifest(), JOINTS)


@pytest.mark.parametrize("name", ["reflex.sha256", "network.json", "golden.safetensors"])
def test_missing_files_are_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"{name} is missing"):
        read_reflex(folder, manifest(), JOINTS)


def test_files_too_many_and_other_folders_are_refused(folder):
    (folder / "more.py").write_text("")
    with pytest.raises(UsageError, match=r"holds .*more\.py"):
        read_reflex(folder, manifest(), JOINTS)
    with pytest.raises(UsageError, match=r"is no reflex: it has no reflex\.json"):
        read_reflex(folder.parent, manifest(), JOINTS)


def rewrite(folder: Path, change: Any) -> None:
    """As somebody would who knows about checksums."""
    tree = json.loads((folder / "reflex.json").read_text())
    change(tree)
    (folder / "reflex.json").write_text(json.dumps(tree))
    (folder / "reflex.sha256").write_text(hashlib.sha256((folder / "reflex.json").read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tree: tree.update(format="ctrlrl.reflex/2"), "this version reads 'ctrlrl.reflex/1'"),
        (lambda tree: tree.update(treshold=0.5), "no field 'treshold'"),
        (lambda tree: tree.update(rate="200"), "reflex.rate must be a float"),
        (lambda tree: tree.update(release=0.5), "0 < release < threshold < 1"),
        (lambda tree: tree.update(commands=["cart"]), "some of slider, pole, each once"),
        (lambda tree: tree["recovery"].update(kind="hold"), "feedback for a robot that takes efforts"),
        (lambda tree: tree["recovery"].update(k_p=[-1.0]), "recovery.k_p must be at least 0"),
        (lambda tree: tree["recovery"].update(k_d=[]), "recovery.k_d must be 1 numbers"),
        (lambda tree: tree["recovery"].update(k_d=[5.0]), "the recovery of golden . is off"),
        (lambda tree: tree["reads"].pop(), "asks for float32"),
        (lambda tree: tree["files"].pop("network.json"), "lists golden.safetensors, policy.safetensors"),
    ],
)
def test_descriptions_that_contradict_themselves_are_refused(folder, change, match):
    rewrite(folder, change)
    with pytest.raises(UsageError, match=match):
        read_reflex(folder, manifest(), JOINTS)


# --- whose it is ------------------------------------------------------------------------------------------------------


def other(name: str, **changes: Any) -> tuple[Joint, ...]:
    return tuple(replace(joint, **changes) if joint.name == name else joint for joint in manifest().joints)


def test_another_robot_or_rate_is_refused():
    for changes, match in (
        ({"robot": "pendulum"}, "for the robot cartpole, and outward for pendulum"),
        ({"control_dt": 0.013}, "for 200 Hz, which is no whole multiple of the policy's 76.9231 Hz"),
        ({"control_dt": None}, "no whole multiple"),
        ({"joints": other("slider", upper=0.5)}, "limits -0.4 to 0.4 m, and outward says -0.4 to 0.5 m"),
        ({"joints": other("slider", max_effort=5.0)}, "up to 10, and outward allows 5"),
        ({"joints": other("pole", unit="m")}, "None to None rad, and outward says None to None m"),
    ):
        with pytest.raises(UsageError, match=match):
            RiskReflex(spec(), by_hand(), manifest(**changes), JOINTS)


def test_other_joints_are_refused_with_both_lists(folder):
    with pytest.raises(UsageError, match=r"reads pole, .*The reflex's: slider, pole\. The robot's: slider, arm"):
        read_reflex(folder, manifest(), ["slider", "arm"])
    driven = replace(manifest().action, joints=("pole",))
    joints = other("pole", max_effort=1.0)
    with pytest.raises(UsageError, match=r"commands slider, .*The reflex's: slider\. The policy's: pole"):
        read_reflex(folder, manifest(action=driven, joints=joints), JOINTS)
    with pytest.raises(UsageError, match="the reflex was made for pole, slider"):
        reflex()(reading(0.0, joints=["slider", "pole"]), np.zeros(1))


def test_a_reflex_of_positions_is_not_for_efforts():
    with pytest.raises(UsageError, match="commands positions, and outward efforts"):
        reflex(control="position", recovery=Recovery(kind="hold"))


# --- when it acts -----------------------------------------------------------------------------------------------------


def test_it_takes_over_above_one_risk_and_gives_back_at_a_lower_one():
    one, nothing = reflex(), np.zeros(1)
    edges = {risk: 0.3 + math.log(risk / (1 - risk)) / 40 for risk in (0.2, 0.5)}  # m, of a cart at rest
    assert one(reading(edges[0.5] - 1e-4), nothing) is None and not one.active
    taken = one(reading(edges[0.5] + 1e-4), nothing)
    assert one.active and one.risk == pytest.approx(0.5, abs=0.01)
    assert taken == pytest.approx([-EFFORT])  # -(40 * 0.3), saturated
    between = (edges[0.2] + edges[0.5]) / 2
    assert one(reading(between, -1.5), nothing) is None  # on its way back
    assert one(reading(between), nothing) is None  # between both, where it had not
    one(reading(edges[0.5] + 1e-4), nothing)
    assert one(reading(edges[0.2] + 1e-4), nothing) == pytest.approx([-EFFORT])  # and where it had
    assert one(reading(edges[0.2] - 1e-4), nothing) is None and not one.active


def test_what_is_asked_is_the_policys_command():
    one = reflex()
    assert one(reading(0.28), np.array([-10.0])) is None
    assert one(reading(0.28), np.array([10.0])) is not None
    assert one(reading(0.28), np.array([-10.0])) is None


def test_the_recovery_is_a_saturated_feedback():
    law = Recovery(kind="feedback", centre=(0.1, 0.0), k_p=(2.0, 3.0), k_d=(0.5, 0.0), max_effort=(1.0, 1.0))
    # -(2 * (0.3 - 0.1) + 0.5 * 0.4) = -0.6; -(3 * -2) = 6, of which 1 is given
    assert law(np.array([0.3, -2.0]), np.array([0.4, 9.0])) == pytest.approx([-0.6, 1.0])


def test_a_new_episode_is_the_policys():
    one = reflex()
    one(reading(0.35), np.zeros(1))
    one.reset()
    assert not one.active
    assert one(reading(0.29), np.zeros(1)) is None


def test_it_may_not_have_the_robot_for_long():
    one = reflex(longest=0.05)
    for _ in range(2):
        for _ in range(10):  # ticks of 5 ms
            assert one(reading(0.35), np.zeros(1)) is not None
        assert one(reading(0.0), np.zeros(1)) is None  # a break
    for _ in range(10):
        one(reading(0.35), np.zeros(1))
    with pytest.raises(Fault, match=r"it has had the robot for 0\.05 s") as raised:
        one(reading(0.35), np.zeros(1))
    assert raised.value.kind == "reflex"


def test_a_risk_that_is_no_number_is_a_fault():
    with pytest.raises(Fault, match="the risk is nan"):
        reflex()(reading(math.inf), np.array([-math.inf]))


def test_robots_that_take_positions_are_held_where_they_were():
    joints = (
        Joint(name="slider", unit="m", lower=-0.4, upper=0.4, default=0.0, kp=100.0, max_effort=EFFORT),
        Joint(name="pole", unit="rad", lower=-4.0, upper=4.0, default=0.0, kp=10.0, max_effort=1.0),
    )
    action = Action(
        kind="joint position offset",
        shape=(2,),
        joints=("pole", "slider"),
        low=(-1.0, -1.0),
        high=(1.0, 1.0),
        scale=(1.0, 1.0),
        offset=(0.0, 0.0),
    )
    own = spec(
        control="position",
        recovery=Recovery(kind="hold"),
        reads=(spec().reads[0], ReadJoint(name="pole", unit="rad", lower=-4.0, upper=4.0)),
    )
    one = RiskReflex(own, by_hand(), manifest(action=action, joints=joints), JOINTS)
    told = np.array([0.7, 0.39])
    assert one(reading(0.1), told) is None
    assert one(reading(0.31), told) == pytest.approx([0.7, 0.31])  # the pole is left to the policy
    assert one(reading(0.33), told) == pytest.approx([0.7, 0.31])
    assert told.tolist() == [0.7, 0.39]


# --- on the rig -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """Of a policy that pushes outward with all it has."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from ctrlrl.deploy.to_onnx import ACTION, BARE, to_onnx
    from ctrlrl.nn.policy import Policy
    from ctrlrl.training.export_run import write_bundle

    class Outward(Policy):
        def act(self, obs, state=None, *, explore=False):
            return (obs * 1e6).clamp(-1, 1), {}, {}

    seen = torch.linspace(-0.4, 0.4, 9)[:, None]
    own, builder = manifest(), FeatureBuilder(manifest(), ["slider", "pole"])
    kept: dict[str, list[Any]] = {}
    for t, place in enumerate(seen[:, 0].tolist()):
        now = reading(place, joints=["slider", "pole"])
        if t == 0:
            builder.reset(now)
        action = np.clip(np.array([1e6 * place]), -1, 1)
        row = {"position": now.position, "velocity": now.velocity, "action": action, "command": np.zeros(0)}
        row |= {"observation/observation": builder.observe(now)["observation"][0], "control": EFFORT * action}
        builder.act(action, now)
        for name, value in row.items():
            kept.setdefault(f"features/{name}", []).append(value)
    rows = {name: np.stack(values).astype(np.float64) for name, values in kept.items()}
    rows |= {f"network/input/{BARE}": seen.numpy(), f"network/output/{ACTION}": Outward().act(seen)[0].numpy()}
    out = tmp_path_factory.mktemp("bundles") / "outward"
    write_bundle(out, own, to_onnx(Outward(), seen[:1]).model, rows)
    return Bundle.open(out)


def deployed(bundle: Bundle, own: RiskReflex | None, folder: Path) -> tuple[VirtualDeployment, dict[str, Any], float]:
    """Three seconds of it in virtual time, the episode, and how far from the middle the cart was, m."""
    config = ControllerConfig(ramp=0.0, settle=0.05, seconds=3.0)
    robot = SimulatedConfig(task="CartPoleSwingUp-v0", seeds=(7,), patience=1.0)
    one = VirtualDeployment(bundle, robot, config, runtime="numpy", reflex=own, log=folder)
    episode = one.run()[0]
    one.controller.close()
    head, ticks = read_ticks(folder)
    return one, episode, float(np.abs(ticks["position"][:, head["joints"].index("slider")]).max())


def test_a_policy_that_pushes_outward_is_kept_from_the_switches(bundle, tmp_path):
    _, episode, farthest = deployed(bundle, None, tmp_path / "without")
    assert episode["length"] < 50 and not episode["given up"]  # a switch ended it
    assert farthest > SWITCH - 0.03

    own = RiskReflex(spec(), by_hand(), bundle.manifest, ["slider", "pole"])
    one, episode, farthest = deployed(bundle, own, tmp_path / "with")
    assert episode["length"] >= 150 and episode["given up"]  # the controller ended it
    assert one.controller.fault is None
    assert 0.2 < farthest < SWITCH - 0.03
    assert one.controller.period == 0.005 and one.controller.acted == 150
    assert 50 < one.controller.taken_over < 550


def test_the_robot_is_made_safe_where_the_reflex_keeps_it_too_long(bundle, tmp_path):
    own = RiskReflex(spec(longest=0.02), by_hand(), bundle.manifest, ["slider", "pole"])
    one, _, _ = deployed(bundle, own, tmp_path / "log")
    assert one.controller.fault is not None and one.controller.fault.kind == "reflex"
    assert one.robot.sim.mode != DRIVEN


# --- the example ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("onnxscript")
    with loaded("train_reflex") as module:
        yield module


@pytest.fixture
def one_thread():
    """Two wait for each other where something else runs beside the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_areas_under_curves_are_those_by_hand(script):
    risks, violated = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, True, False, True])
    assert script.auc(risks, violated) == pytest.approx((1 + 0.5 + 2) / 4)


def test_training_is_reproduced_by_its_seed_and_is_what_is_written(script, tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(script, "BATCH", 256)
    task = make_robot_task(script.TASK, {})
    critics = []
    for _ in range(2):
        data = script.collect(task, 16, 300, seed=5)
        critics.append(script.train(data, 300, seed=5))
    assert data.violated.sum() > 10
    for a, b in zip(*(critic.parameters() for critic in critics), strict=True):
        assert torch.equal(a, b)
    states, commands, risks, violated = script.held_out(task, critics[0], 200, seed=5)
    assert script.auc(risks, violated) > 0.7  # a few seconds of it already tell something
    rows = {"state": states[:16].numpy(), "command": commands[:16].numpy(), "risk": risks[:16, None].numpy()}
    write_reflex(tmp_path / "reflex", script.spec_of(task, 0.4, {}), script.network_of(critics[0]), rows)
    read = read_reflex(tmp_path / "reflex", manifest(), JOINTS)
    for state, command, risk in zip(states[:50].double().numpy(), commands[:50].double().numpy(), risks, strict=False):
        read(Reading(JOINTS, state[[1, 0]], state[[3, 2]]), command)
        assert read.risk == pytest.approx(float(risk), abs=1e-5)
        read.reset()
