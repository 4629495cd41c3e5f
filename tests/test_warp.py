"""What MuJoCo Warp does besides what tests/test_sim.py asks of every backend."""

from __future__ import annotations

import builtins
import gc
import warnings
from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from ctrlrl.envs.sim import BatchSim
from ctrlrl.envs.warp import _DERIVED, _STATE, WarpSim, probe_sizes
from ctrlrl.errors import UsageError
from tests.sims import DEVICE, XML, everywhere, rows_of, small_model, stir, warp_sim


def changed(old: str, new: str) -> mujoco.MjModel:
    assert old in XML
    return mujoco.MjModel.from_xml_string(XML.replace(old, new))


def test_fields_alias_warps_arrays_and_mean_what_mujoco_means() -> None:
    ours, theirs = warp_sim(small_model(), 3), BatchSim(small_model(), 3, threads=1)
    random = torch.Generator().manual_seed(0)
    pose, speed = torch.randn(3, 8, generator=random), torch.randn(3, 7, generator=random)
    for sim in (ours, theirs):
        sim.field("qpos")[:, 3:] = (pose / pose[:, 3:7].norm(dim=1, keepdim=True))[:, 3:]
        sim.field("qpos")[0, 2] = 0.05  # in contact
        sim.field("qvel").copy_(speed)
        sim.field("ctrl").copy_(speed[:, :1])
        sim.field("xfrc_applied")[:, 1, 3:] = 0.1
    readable = [*sorted(_DERIVED), "time", "act", "qfrc_applied", "xfrc_applied", "mocap_pos", "mocap_quat"]
    fields = {name: (ours.field(name), theirs.field(name)) for name in readable}
    for sim in (ours, theirs):
        sim.forward(everywhere(sim))
    different = set()
    for name, (a, b) in fields.items():
        assert a.shape == b.shape and a.dtype == torch.float32, name
        assert a.device == ours.device
        if a.numel():
            assert a.data_ptr() == getattr(ours._data, name).ptr, name
            assert (a.cpu() - b).abs().max() < 1e-4 * (b.abs().max() + 1e-2), name
        if b.numel() and (b != 0).any():
            different.add(name)
    # Most were seen with numbers in them; sensors of forces, tendons and fluids are not in the model.
    assert len(different) > 30


def test_trajectories_are_those_of_the_cpu() -> None:
    ours, theirs = warp_sim(small_model(), 4), BatchSim(small_model(), 4, threads=1)
    fields = {name: (ours.field(name), theirs.field(name)) for name in ("qpos", "qvel", "sensordata")}
    for sim in (ours, theirs):
        sim.field("qvel")[:, 4] = 2.0  # comes down with the arm ahead
    touched = False
    for t in range(50):
        if t % 10 == 0:
            for sim in (ours, theirs):
                stir_controls(sim, t)
        for sim in (ours, theirs):
            sim.step(2)
        for name, (a, b) in fields.items():
            assert np.allclose(a.cpu(), b, rtol=1e-3, atol=1e-3), f"{name} at {t}"
        touched = touched or bool(fields["sensordata"][1][:, -1].any())
    assert touched  # it came down on the floor
    assert not ours.overflow().any() and not ours.diverged().any()


def stir_controls(sim: Any, seed: int) -> None:
    sim.field("ctrl").copy_(torch.rand(sim.field("ctrl").shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1)


def test_a_recorded_call_gives_the_bits_of_one_that_is_not() -> None:
    recorded, plain = warp_sim(small_model(), 3), warp_sim(small_model(), 3)
    plain.unrecorded = "for the test"
    for sim in (recorded, plain):
        stir(sim)
        sim.field("xpos")
    for t in range(12):
        for sim in (recorded, plain):
            sim.step(4)
            rows = rows_of(sim, t % 3)
            if t % 4 == 3:
                sim.reset(rows)
                sim.forward(rows)
        for name, value in recorded.get_state().items():
            assert torch.equal(value, plain.get_state()[name]), f"{name} at {t}"
    assert set(recorded._graphs) == {("step", 4), "reset", "forward"} and not plain._graphs
    assert recorded.unrecorded is None
    recorded.close()
    recorded.close()


def test_a_field_first_asked_for_late_is_kept_by_forward_too() -> None:
    sim = warp_sim(small_model(), 2)
    stir(sim)
    sim.step(3)
    sim.forward(rows_of(sim, 0))
    sim.step(3)
    late = sim.field("xpos")
    before = late.clone()
    sim.forward(rows_of(sim, 0))
    assert torch.equal(late[1], before[1]) and not torch.equal(late[0], before[0])


def test_what_cannot_be_recorded_runs_all_the_same_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import warp

    class Fails(warp.ScopedCapture):  # type: ignore[misc]
        def __enter__(self) -> None:
            raise RuntimeError("no graphs\n  today")

    sim = warp_sim(small_model(), 2)
    monkeypatch.setattr(warp, "ScopedCapture", Fails)
    with pytest.warns(UserWarning, match=r"cannot be recorded as graphs on .* several times slower: no graphs today"):
        sim.step(1)
    assert sim.unrecorded == "no graphs today" and gc.isenabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sim.step(1)
        sim.forward(everywhere(sim))
    assert sim.field("time").tolist() == pytest.approx([0.008, 0.008])


def test_another_compilation_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    sim = warp_sim(small_model(), 2, deterministic=False)
    sim.step(1)
    assert capfd.readouterr().out == ""
    assert sim._model.opt.deterministic == 0


def test_too_little_memory_is_told_by_overflow_until_a_reset() -> None:
    sim = warp_sim(small_model(), 2, constraints=8)
    assert sim.constraints == 8
    sim.field("qpos")[0, 2] = 0.045  # four corners on the floor: 16 rows
    sim.step(1)
    assert sim.overflow().tolist() == [True, False]
    sim.reset(rows_of(sim, 0))
    assert not sim.overflow().any()
    crowded = warp_sim(small_model(), 2, contacts=1)
    crowded.field("qpos")[:, 2] = 0.045
    crowded.step(1)
    assert crowded.overflow().all()  # the pool is common


def test_sizes_are_measured() -> None:
    model = small_model()
    pairs = np.array([[0, 1], [0, 2]])
    contacts, constraints = probe_sizes(model, pairs)
    data = mujoco.MjData(model)
    data.qpos[2] = 0.045
    mujoco.mj_forward(model, data)
    assert contacts % 8 == constraints % 8 == 0 and contacts >= 16
    assert 1.2 * data.nefc < constraints < 6 * data.nefc
    many = "".join(
        f'<body pos="{x} 0 0.06"><freejoint/><geom type="box" size="0.05 0.05 0.05"/></body>' for x in range(9)
    )
    crowd = changed('<body name="goal"', f'{many}<body name="goal"')
    pairs = np.stack(np.triu_indices(crowd.ngeom, 1), 1)
    more = probe_sizes(crowd, pairs)
    assert more[0] >= 1.5 * 4 * 9 and more[1] >= 1.5 * 16 * 9
    assert probe_sizes(changed("<option", '<option><flag contact="disable"/></option><option'), pairs[:0]) == (16, 32)


def test_expand_is_refused_once_a_call_may_be_recorded_and_for_fields_that_are_laid_out_otherwise() -> None:
    sim = warp_sim(small_model(), 2)
    for name in ("geom_contype", "opt.impratio", "geom_aabb", "opt.iterations", "jnt_type"):
        with pytest.raises(UsageError, match=rf"the model's {name} cannot differ between simulations on MuJoCo Warp"):
            sim.expand(name)
    first = sim.expand("body_mass")
    assert sim.expand("body_mass").data_ptr() == first.data_ptr()
    assert sim.expand("body_subtreemass").shape == (2, 4)
    sim.reset(everywhere(sim))
    with pytest.raises(UsageError, match=r"expand\('opt.gravity'\) comes too late"):
        sim.expand("opt.gravity")


def test_set_const_without_what_it_reads_does_nothing() -> None:
    sim = warp_sim(small_model(), 2)
    sim.expand("opt.gravity")
    sim.set_const(everywhere(sim))
    assert not sim._started


def test_a_solver_that_warp_does_not_have_is_replaced_only_when_asked() -> None:
    model = changed("<option", '<option solver="PGS"/><option')
    with pytest.raises(UsageError, match=r"solver PGS, which MuJoCo Warp does not have. Take solver='newton'"):
        warp_sim(model, 2)
    sim = warp_sim(model, 2, solver="newton")
    assert sim.model.opt.solver == mujoco.mjtSolver.mjSOL_NEWTON and model.opt.solver == mujoco.mjtSolver.mjSOL_PGS
    with pytest.raises(UsageError, match="solver: expected newton or cg, got 'pgs'"):
        warp_sim(model, 2, solver="pgs")


FLEX = """<flexcomp name="cloth" type="grid" count="3 3 1" spacing="0.1 0.1 0.1" dim="2" pos="0 0 2"/>"""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: changed("<light", FLEX + "<light"), "the model has flexes"),
        (lambda: changed("<option", '<option><flag sleep="enable"/></option><option'), "the model lets bodies sleep"),
        (
            lambda: changed('integrator="implicitfast"', 'integrator="discrete" noslip_iterations="3"'),
            "MuJoCo Warp cannot simulate this model: noslip solver not implemented for the discrete integrator",
        ),
    ],
)
def test_what_warp_cannot_simulate_is_named(model: Callable[[], mujoco.MjModel], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        warp_sim(model(), 1)


def test_an_unknown_field_is_named_with_the_nearest() -> None:
    sim = warp_sim(small_model(), 1)
    for name in ("sensor_data", "M", "qLD", "ncon"):
        with pytest.raises(UsageError, match=rf"MuJoCo Warp gives no field {name!r} of mujoco.MjData"):
            sim.field(name)
    with pytest.raises(UsageError, match="Did you mean sensordata"):
        sim.field("sensor_data")
    assert all(hasattr(sim._data, name) for name in (*_DERIVED, *_STATE))


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device 'cuda': PyTorch finds no such GPU here"):
        WarpSim(small_model(), 2)
    with pytest.raises(UsageError, match="simulates on cuda or cpu, got device 'meta'"):
        WarpSim(small_model(), 2, "meta")


def test_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "mujoco_warp":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    message = r"pip install 'ctrlrl\[warp\]', or take --device cpu \(No module named 'mujoco_warp'\)"
    with pytest.raises(UsageError, match=message):
        WarpSim(small_model(), 2, DEVICE)
