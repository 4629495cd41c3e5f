"""One switch for how an update runs: the same results, and a reason where it cannot."""

import signal

import pytest
import torch
from torch import Tensor

import ctrlrl
from ctrlrl.algorithms.registry import train_config_class
from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.execution import Captured, _compile, multiplies_bfloat16, unavailable
from ctrlrl.nn.mlp import EnsembleMLP, mlp
from ctrlrl.runs.checkpoint import pack
from ctrlrl.training.setup import settle_execution
from tests.test_sac import ACT, OBS, make_batch

CONFIG = SACConfig(hidden=(32,), layer_norm=True)
cannot = unavailable("compiled", torch.device("cpu"))
needs_compiler = pytest.mark.skipif(cannot is not None, reason=str(cannot))


@needs_compiler
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


def first_gradients(config, execution="eager", precision="float32"):
    """What one update steps down, times 0.1: Adam's first moments after it."""
    changed = config.to_dict() | {"execution": execution, "precision": precision}
    agent = SAC(OBS, ACT, SACConfig(**changed), seed=1)
    metrics = agent.update(make_batch(size=256))
    assert all(value.dtype == torch.float32 for value in metrics.values())
    parts = agent.actor_optimizer.first, agent.critic_optimizer.first
    return [torch.cat([value.flatten() for value in part]) for part in parts], metrics


def distance(left, right):
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("layer_norm", [False, True])
def test_bfloat16_gradients_are_float32s_within_its_rounding(layer_norm):
    config = SACConfig(hidden=(64, 64), layer_norm=layer_norm)
    exact, theirs = first_gradients(config)
    rounded, ours = first_gradients(config, precision="bfloat16")
    for left, right in zip(rounded, exact, strict=True):
        assert 1e-4 < distance(left, right) < 0.03  # 8 bits are 0.4 %
    for name in ("critic_loss", "actor_loss", "entropy", "target_mean", "q_mean"):
        assert torch.allclose(ours[name], theirs[name], rtol=0.02, atol=0.01), name
    assert torch.equal(ours["alpha"], theirs["alpha"])


@needs_compiler
def test_compiled_bfloat16_is_eager_bfloat16():
    eager, theirs = first_gradients(CONFIG, "eager", "bfloat16")
    compiled, ours = first_gradients(CONFIG, "compiled", "bfloat16")
    for left, right in zip(compiled, eager, strict=True):
        assert distance(left, right) < 0.03  # fused operations do not round in between
    assert torch.allclose(ours["critic_loss"], theirs["critic_loss"], rtol=0.02)


def test_outputs_are_computed_in_float32():
    network, x = mlp((5, 8, 3)), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp((5, 3)).double()(x.double()).dtype == torch.float64  # of a float64 reference
    with torch.autocast("cpu", torch.bfloat16):
        hidden = network[:2](x)
        out = network(x)
    assert hidden.dtype == torch.bfloat16 and out.dtype == torch.float32
    assert torch.equal(out, torch.nn.functional.linear(hidden.float(), network[2].weight, network[2].bias))
    ensemble = EnsembleMLP(2, (5, 8, 1))
    with torch.autocast("cpu", torch.bfloat16):
        out = ensemble(x)
    assert out.dtype == torch.float32 and not torch.equal(out, out.bfloat16().float())


def test_a_network_that_gives_bfloat16_is_taken_in_float32():
    def network(inputs, outputs):
        return torch.nn.Linear(inputs, outputs, bias=False)

    agent, batch = SAC(OBS, ACT, SACConfig(precision="bfloat16"), network=network), make_batch()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert agent.policy.trunk(batch.obs).dtype == torch.bfloat16
        assert agent.policy.distribution(batch.obs).log_std.dtype == torch.float32
        assert agent.critics(batch.obs, batch.action).dtype == torch.float32


def rerun(work):
    """Stands for a CUDA graph: runs to warm up, and a replay does the same work on the same buffers."""
    work()
    work()
    return work


def test_captured_steps_equal_eager_ones_each_done_once():
    eager, captured = SAC(OBS, ACT, CONFIG, seed=1), SAC(OBS, ACT, CONFIG, seed=1)
    step = Captured(captured.step, captured._changing, rerun)
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

    captured = Captured(step, list, capture)
    for i in range(7):
        assert captured(torch.full((2,), float(i)), None)["double"].tolist() == [2 * i] * 2
    assert len(captures) == 1 and len(seen) == 7 and len(set(seen)) == 1
    with pytest.raises(ValueError, match=r"captured with \(2,\), called with \(1,\)"):
        captured(torch.ones(1), None)


def test_a_ctrl_c_is_heard_when_the_compiler_is_done(monkeypatch):
    events = []
    former = signal.signal(signal.SIGINT, lambda *_: events.append("heard"))

    def compiled(x):
        signal.raise_signal(signal.SIGINT)  # to this thread: another one that PyTorch started may take a process's
        events.append("compiled")
        return {"x": x}

    monkeypatch.setattr(torch, "compile", lambda step, **_: compiled)
    try:
        _compile(lambda x: x, torch.ones(1))
    finally:
        signal.signal(signal.SIGINT, former)
    assert events == ["compiled", "heard"]


def test_a_graph_needs_cuda_but_only_to_learn():
    agent = SAC(OBS, ACT, SACConfig(execution="captured", hidden=(8,)))  # of a run trained on a GPU, to act here
    assert agent.policy.act(torch.zeros(1, 5))[0].shape == (1, 2)
    with pytest.raises(UsageError, match=r"--agent.execution captured: a CUDA graph needs --device cuda.*eager"):
        agent.update(make_batch())


def without_a_compiler(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)


def test_compiling_needs_a_compiler(monkeypatch):
    without_a_compiler(monkeypatch)
    agent = SAC(OBS, ACT, SACConfig(execution="compiled", hidden=(8,)))
    with pytest.raises(UsageError, match=r"--agent.execution compiled: .* needs a C\+\+ compiler, and none was found"):
        agent.update(make_batch())


def settled(agent=None, *, steps=100_000, plain=True, resumed=False, device="cpu"):
    config = train_config_class("sac").from_dict({"env": "Pendulum-v1", "steps": steps, "agent": agent or {}})
    config, remark = settle_execution(config, torch.device(device), plain=plain, resumed=resumed)
    return config.agent.execution, remark


@needs_compiler
@pytest.mark.parametrize("native", [False, True])
def test_compiled_updates_multiply_bfloat16_where_the_processor_does(monkeypatch, native):
    monkeypatch.setattr("ctrlrl.training.setup.multiplies_bfloat16", lambda: native)

    def precision(agent=None, **how):
        config = train_config_class("sac").from_dict({"env": "Pendulum-v1", "steps": 100_000, "agent": agent or {}})
        how = {"plain": True, "resumed": False} | how
        return settle_execution(config, torch.device("cpu"), **how)[0].agent.precision

    assert precision() == ("bfloat16" if native else "float32")
    assert precision({"execution": "eager"}) == "float32"
    assert precision(plain=False) == "float32"
    assert precision({"execution": "eager", "precision": "bfloat16"}) == "bfloat16"
    assert precision({"precision": "float32"}) == "float32"


@needs_compiler
def test_long_trainings_on_a_cpu_are_compiled():
    chosen, remark = settled()
    assert chosen == "compiled"
    assert "the first one takes up to a minute" in remark
    assert ("bfloat16" in remark) == multiplies_bfloat16()
    assert settled(steps=54_999) == ("eager", "")
    assert settled({"utd": 0.5}) == ("eager", "")
    assert settled(plain=False) == ("eager", "")
    assert settled(device="cuda") == ("eager", "")
    assert settled({"execution": "eager"}) == ("eager", "")


def test_without_a_compiler_trainings_run_eagerly_and_say_so(monkeypatch):
    without_a_compiler(monkeypatch)
    chosen, remark = settled()
    assert chosen == "eager"
    assert "needs a C++ compiler" in remark
    with pytest.raises(UsageError, match="needs a C\\+\\+ compiler"):
        settled({"execution": "compiled"})
    chosen, remark = settled({"execution": "compiled"}, resumed=True)
    assert chosen == "eager"
    assert remark.startswith("updates run eagerly and not compiled, which changes last bits")


@needs_compiler
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_training_resumes_bit_for_bit(tmp_path, precision):
    how = {"env": "Pendulum-v1", "learning_starts": 60, "eval_every": 0, "video": False, "threads": 1, "quiet": True}
    agent = {"execution": "compiled", "precision": precision, "hidden": [16], "batch_size": 32}
    how |= {"agent": agent, "preset": False}
    whole = ctrlrl.train("sac", steps=120, out=str(tmp_path / "whole"), **how)
    parts = ctrlrl.train("sac", steps=90, out=str(tmp_path / "parts"), **how)
    parts = ctrlrl.resume(parts.path, steps=120, quiet=True)
    left, right = whole.policy.state_dict(), parts.policy.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    eager = ctrlrl.train(
        "sac", steps=120, out=str(tmp_path / "eager"), **(how | {"agent": how["agent"] | {"execution": "eager"}})
    )
    near = 1e-4 if precision == "float32" else 0.02
    assert all(torch.allclose(left[name], value, atol=near) for name, value in eager.policy.state_dict().items())
