"""One switch for how an update runs: the same results, and a reason where it cannot."""

import shutil

import pytest
import torch
from torch import Tensor

from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.execution import Captured
from ctrlrl.runs.checkpoint import pack
from tests.test_sac import ACT, OBS, make_batch

CONFIG = SACConfig(hidden=(32, 32), layer_norm=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_updates_equal_eager_ones():
    eager = SAC(OBS, ACT, CONFIG, seed=1)
    compiled = SAC(OBS, ACT, SACConfig(**(CONFIG.to_dict() | {"execution": "compiled"})), seed=1)
    for i in range(3):
        batch = make_batch(i, groups=2)
        ours, theirs = compiled.update(batch), eager.update(batch)
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5) for name in theirs)
    left, right = pack(compiled.state_dict())[0], pack(eager.state_dict())[0]
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert torch.allclose(left[name].double(), value.double(), atol=1e-5), name
    assert torch.equal(compiled.generator.get_state(), eager.generator.get_state())


def rerun(work):
    """Stands for a CUDA graph: recording runs nothing, and a replay does the same work on the same buffers."""
    return work


def test_captured_steps_equal_eager_ones_each_done_once():
    eager, captured = SAC(OBS, ACT, CONFIG, seed=1), SAC(OBS, ACT, CONFIG, seed=1)
    step = Captured(captured.step, rerun)
    recorded = []
    for i in range(6):
        batch, noise = make_batch(i)[0], torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(i))
        theirs = eager.step(batch, noise)
        ours = step(batch.map(torch.clone), noise.clone())
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        recorded.append((ours, {name: value.clone() for name, value in ours.items()}))
    for metrics, then in recorded:  # later replays did not overwrite them
        assert all(torch.equal(metrics[name], then[name]) for name in then)
    left, right = pack(captured.state_dict())[0], pack(eager.state_dict())[0]
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_captured_records_once_on_buffers_that_stay():
    seen: list[int] = []
    captures = []

    def step(x: Tensor, nothing: None) -> dict[str, Tensor]:
        assert nothing is None
        seen.append(x.data_ptr())
        return {"double": x * 2}

    def capture(work):
        captures.append(work)
        return work

    captured = Captured(step, capture)
    for i in range(7):
        assert float(captured(torch.tensor(float(i)), None)["double"]) == 2 * i
    assert len(captures) == 1 and len(seen) == 7
    assert len(set(seen[3:])) == 1


def test_a_graph_needs_cuda():
    with pytest.raises(
        UsageError, match=r"--agent.execution captured makes a CUDA graph, and the device is cpu.*eager"
    ):
        SAC(OBS, ACT, SACConfig(execution="captured"))


def test_compiling_needs_a_compiler(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler on a CPU, and none was found: install one"):
        SAC(OBS, ACT, SACConfig(execution="compiled"))
