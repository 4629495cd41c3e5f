"""What holds for simulations on each backend: `Sim` means the same on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import mujoco
import numpy as np
import pytest
import torch

from ctrlrl.envs.sim import Sim
from ctrlrl.errors import UsageError
from tests.sims import BACKENDS, everywhere, rows_of, small_model, stir

Make = Callable[[int], Sim]
READ = ("qpos", "qvel", "xpos", "site_xpos", "sensordata", "qacc")


@pytest.fixture(params=sorted(BACKENDS))
def make(request: pytest.FixtureRequest) -> Make:
    return lambda n: BACKENDS[request.param](small_model(), n)


def read(sim: Sim) -> dict[str, torch.Tensor]:
    return {name: sim.field(name).clone() for name in READ}


def close(a: torch.Tensor, b: object, tolerance: float = 2e-5) -> bool:
    return np.allclose(a.cpu().double().numpy(), b, rtol=tolerance, atol=tolerance)


def test_fields_are_live_and_those_of_the_state_are_written_to(make: Make) -> None:
    sim = make(3)
    qpos, xpos = sim.field("qpos"), sim.field("xpos")
    assert sim.field("qpos").data_ptr() == qpos.data_ptr() and sim.field("xpos").data_ptr() == xpos.data_ptr()
    assert qpos.shape == (3, 8) and xpos.shape == (3, 4, 3) and sim.field("xmat").shape == (3, 4, 9)
    assert close(qpos, small_model().qpos0)
    qpos[:, 2] = torch.tensor([1.0, 2.0, 3.0])
    sim.field("mocap_pos")[1] = 7.0
    sim.forward(everywhere(sim))
    assert close(xpos[:, 1, 2], [1, 2, 3]) and close(xpos[:, 3, 0], [1, 7, 1])
    sim.field("xfrc_applied")[0, 1, 2] = 100.0
    sim.field("qfrc_applied")[1, 0] = 10.0
    sim.step(1)
    moved = sim.field("qvel").cpu()
    assert moved[0, 2] > 0.2 and moved[1, 2] < 0 and moved[1, 0] > 0.02 and moved[2, 0].abs() < 1e-6


def test_a_step_is_mujocos_and_derived_fields_are_of_the_state_before_the_last_substep(make: Make) -> None:
    sim, model = make(2), small_model()
    stir(sim)
    single = mujoco.MjData(model)
    fields = {name: sim.field(name) for name in READ}
    single.qvel[:], single.ctrl[:] = fields["qvel"][1].cpu(), sim.field("ctrl")[1].cpu()
    for substeps in (1, 3, 3, 5):
        mujoco.mj_step(model, single, substeps - 1)
        before = single.qpos.copy()
        mujoco.mj_step(model, single)
        sim.step(substeps)
        for name, value in fields.items():
            assert close(value[1], getattr(single, name), 1e-3 if name == "qacc" else 2e-5), name
        assert close(fields["xpos"][1, 1], before[:3])
        assert not close(fields["xpos"][1, 1], single.qpos[:3])
    assert close(sim.field("time"), [single.time] * 2)


def test_reset_and_forward_change_the_rows_asked_for_alone(make: Make) -> None:
    sim = make(4)
    stir(sim)
    read(sim)
    sim.field("mocap_pos")[:] = 9.0
    sim.step(5)
    lagging = read(sim)
    rows = rows_of(sim, 0, 2)
    sim.reset(rows)
    for name in ("qvel", "ctrl", "qacc_warmstart"):
        assert (sim.field(name)[rows] == 0).all() and (sim.field(name)[~rows] != 0).any(), name
    assert close(sim.field("qpos")[rows], small_model().qpos0) and (sim.field("time")[rows] == 0).all()
    assert (sim.field("mocap_pos")[rows] == 1).all() and (sim.field("mocap_pos")[~rows] == 9).all()
    sim.field("qpos")[0, 2] = 5.0
    sim.forward(rows)
    now = read(sim)
    for name, value in now.items():
        assert torch.equal(value[~rows], lagging[name][~rows]), name
    assert close(now["xpos"][rows][:, 1, 2], [5.0, 0.3])
    sim.forward(~rows)
    assert torch.equal(read(sim)["xpos"][rows], now["xpos"][rows])
    assert close(sim.field("xpos")[~rows][:, 1], now["qpos"][~rows][:, :3].cpu())
    assert not torch.equal(sim.field("xpos")[~rows], lagging["xpos"][~rows])


def test_reset_goes_back_to_what_is_each_simulations_own(make: Make) -> None:
    sim = make(3)
    start, places = sim.expand("qpos0"), sim.expand("body_pos")
    start[1, 7], places[2, 3, 0] = 0.5, 4.0
    stir(sim)
    sim.step(5)
    sim.reset(rows_of(sim, 1, 2))
    assert close(sim.field("qpos")[1:, 7], [0.5, 0.0]) and close(sim.field("mocap_pos")[1:, 0, 0], [1.0, 4.0])
    assert (sim.field("qvel")[0] != 0).any() and (sim.field("qvel")[1:] == 0).all()


def test_forward_leaves_no_trace_in_later_steps(make: Make) -> None:
    one, other = make(3), make(3)
    for sim in (one, other):
        stir(sim)
        sim.step(20)
    one.forward(rows_of(one, 1))
    one.step(10)
    other.step(10)
    assert torch.equal(one.field("qpos"), other.field("qpos"))


def test_a_diverged_simulation_is_marked_and_does_not_touch_the_others(make: Make) -> None:
    sim, whole = make(3), make(3)
    for each in (sim, whole):
        stir(each)
        each.step(40)  # some are on the floor by now
        fine = each.diverged()
        assert fine is None or not fine.any()
    sim.field("qvel")[1, 0] = torch.nan
    for _ in range(3):
        sim.step(5)
        whole.step(5)
        marked = sim.diverged()
        if marked is None:
            continue
        assert marked.tolist() == [False, True, False]
        sim.reset(marked)
        sim.forward(marked)
        sim.field("qvel")[1] = torch.nan
    sim.reset(rows_of(sim, 1))
    sim.step(1)
    whole.step(1)
    sim.diverged()  # BatchSim tells of a step that went well only after it has told of the last that did not
    sim.step(4)
    whole.step(4)
    again = sim.diverged()
    assert again is None or not again.any()
    for name in ("qpos", "qvel", "qacc_warmstart"):
        assert torch.equal(sim.field(name)[[0, 2]], whole.field(name)[[0, 2]]), name
        assert sim.field(name).isfinite().all()


def test_a_saved_state_goes_on_with_the_same_bits(make: Make) -> None:
    sim = make(3)
    stir(sim)
    read(sim)
    sim.step(30)
    saved, seen = sim.get_state(), read(sim)
    assert {name: tuple(value.shape[:1]) for name, value in saved.items()} == dict.fromkeys(saved, (3,))
    sim.step(30)
    expected = read(sim)
    other = make(3)
    read(other)
    stir(other, seed=5)
    other.step(7)
    untouched = read(other)
    rows = rows_of(other, 0, 2)
    other.set_state(rows, saved)
    for name, value in read(other).items():
        assert torch.equal(value[rows], seen[name][rows]) and torch.equal(value[~rows], untouched[name][~rows]), name
    other.step(30)
    for name, value in read(other).items():
        assert torch.equal(value[rows], expected[name][rows]), name
    sim.set_state(everywhere(sim), saved)  # and `saved` is a copy
    assert torch.equal(sim.field("xpos"), seen["xpos"])


def test_expanded_fields_are_each_simulations_own(make: Make) -> None:
    sim = make(3)
    gravity, friction = sim.expand("opt.gravity"), sim.expand("geom_friction")
    assert gravity.shape == (3, 3) and friction.shape == (3, 3, 3) and close(gravity[1], small_model().opt.gravity)
    gravity[:, 2] = torch.tensor([0.0, -9.81, 2.0])
    friction[:, :, 0] = torch.tensor([1.0, 0.01, 1.0])[:, None]
    sim.step(1)
    assert close(sim.field("qvel")[:, 2], [0, -0.004 * 9.81, 0.004 * 2])
    gravity[0, 2] = -5.0  # is read by steps that follow, recorded or not
    sim.step(1)
    assert close(sim.field("qvel")[:, 2], [-0.004 * 5, -0.008 * 9.81, 0.008 * 2])


def test_set_const_follows_what_was_expanded_in_the_rows_asked_for(make: Make) -> None:
    sim = make(3)
    mass, inertia = sim.expand("body_mass"), sim.expand("body_inertia")
    names = ("dof_invweight0", "body_invweight0", "body_subtreemass")
    constants = {name: sim.expand(name) for name in names}
    height = sim.field("xpos")[:, 1, 2]
    sim.field("qpos")[:, 2] = 0.7
    sim.forward(everywhere(sim))
    mass[:, 2] *= torch.tensor([1.0, 4.0, 4.0], device=sim.device)
    inertia[:, 2] *= torch.tensor([1.0, 4.0, 4.0], device=sim.device)[:, None]
    sim.set_const(rows_of(sim, 0, 1))
    lighter, heavier = small_model(), small_model()
    heavier.body_mass[2] *= 4
    heavier.body_inertia[2] *= 4
    mujoco.mj_setConst(heavier, mujoco.MjData(heavier))
    for name in names:
        kept, changed = getattr(lighter, name), getattr(heavier, name)
        assert not np.allclose(kept, changed, rtol=0.05), name
        for row, expected in enumerate((kept, changed, kept)):
            assert close(constants[name][row], expected), f"{name} of {row}"
    sim.forward(rows_of(sim, 0))
    assert close(height, [0.7] * 3)  # what is kept is not of the reference pose


def test_what_cannot_be_expanded_is_refused(make: Make) -> None:
    for name in ("no_such_field", "opt.no_such_option", "nq"):
        with pytest.raises(UsageError, match=f"model's {name} cannot differ between simulations"):
            make(2).expand(name)
