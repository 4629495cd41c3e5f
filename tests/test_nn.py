"""Networks' building blocks: optimizer, ensembles' special cases, the set-up of the CPU."""

import copy
import os
import pickle
import subprocess
import sys

import gymnasium as gym
import pytest
import torch
from torch import nn

from ctrlrl import cores
from ctrlrl.algorithms.ppo import PPO, RolloutBatch
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.algorithms.sac import SAC
from ctrlrl.algorithms.sac_config import SACConfig
from ctrlrl.errors import UsageError
from ctrlrl.nn.cpu import prepare_cpu
from ctrlrl.nn.mlp import MLP, EnsembleLinear, mlp
from ctrlrl.nn.optim import Adam, polyak
from tests.test_sac import make_batch


def test_adam_equals_torchs_bit_for_bit_and_goes_on_from_its_state():
    g = torch.Generator().manual_seed(0)
    ours = [torch.randn(2, 5, 3, generator=g, requires_grad=True), torch.randn(4, generator=g, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer, reference = Adam(ours, 1e-2), torch.optim.Adam(theirs, 1e-2, fused=True)
    for i in range(5):
        gradients = [torch.randn(p.shape, generator=g) for p in ours]
        optimizer.step(gradients)
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if i == 2:  # from here on another optimizer with the same state
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = Adam(ours, 1e-2)
            optimizer.load_state_dict(state)


def test_adam_takes_a_step_size_for_each_parameter_as_torchs_takes_groups():
    g = torch.Generator().manual_seed(0)
    ours = [torch.randn(3, generator=g), torch.randn(2, 2, generator=g), torch.randn(4, generator=g)]
    theirs = [p.clone().requires_grad_() for p in ours]
    later = torch.tensor(1e-3)
    optimizer = Adam(ours, [1e-2, 1e-2, later])
    groups = [{"params": theirs[:2], "lr": 1e-2}, {"params": theirs[2:], "lr": 1e-3}]
    reference = torch.optim.Adam(groups, fused=True)
    for i in range(4):
        gradients = [torch.randn(p.shape, generator=g) for p in ours]
        optimizer.step(gradients)
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        if i == 1:
            later.fill_(0.05)
            reference.param_groups[1]["lr"] = later.item()


def test_adam_steps_right_where_gradients_lie_in_memory_in_another_order():
    for parameter in (torch.zeros(3, 2), torch.zeros(2, 3).t()):
        gradient = torch.arange(6.0).view(2, 3).t() - 2.5
        assert parameter.shape == gradient.shape
        optimizer = Adam([parameter], 0.1)
        optimizer.step([gradient if parameter.is_contiguous() else gradient.contiguous()])
        assert torch.allclose(parameter, -0.1 * gradient.sign())


def test_adam_refuses_parameters_with_gaps_in_memory():
    with pytest.raises(UsageError, match=r"strides \(4, 2\) is part of a larger tensor"):
        Adam([torch.zeros(3, 4)[:, ::2]], 0.1)


def test_descend_follows_the_gradient_of_its_own_parameters_only():
    a, b = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    Adam([a], 0.1).descend((a * b).sum())
    assert torch.allclose(a, torch.full((3,), 0.9))
    assert torch.equal(b, torch.full((3,), 2.0)) and a.grad is None and b.grad is None


def test_polyak_moves_each_target_by_tau():
    target, source = torch.zeros(3), torch.tensor([1.0, 2.0, -4.0])
    polyak([target], [source], 0.25)
    assert target.tolist() == [0.25, 0.5, -1.0]


@pytest.mark.parametrize("shared", [True, False])
def test_a_value_head_equals_the_matrix_product_and_its_gradients(shared):
    torch.manual_seed(0)
    layer = EnsembleLinear(3, 6, 1)
    x = torch.randn(*(() if shared else (3,)), 5, 6, requires_grad=True)
    wide = torch.randn(3, 5, 1)
    parameters = [x, layer.weight, layer.bias]
    ours = layer(x)
    expected = torch.baddbmm(layer.bias, x.expand(3, 5, 6), layer.weight)
    assert torch.allclose(ours, expected, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, parameters, wide), torch.autograd.grad(expected, parameters, wide), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6)


def in_new_process(code: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def test_prepared_products_keep_the_precision_of_float32():
    out = in_new_process(
        "import torch\n"
        "from ctrlrl.nn.cpu import prepare_cpu\n"
        "prepare_cpu(1)\n"
        "assert torch.get_num_threads() == 1\n"
        "x, w = torch.randn(300, 200), torch.randn(200, 100)\n"
        "print(float((x @ w - x.double() @ w.double()).abs().max()))\n"
    )
    assert float(out) < 1e-4  # factors rounded to bfloat16 would give about 0.2


def test_prepare_leaves_a_precision_that_the_user_chose():
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "tf32"
        prepare_cpu()
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_products_of_few_rows_take_the_default_blas_meanwhile():
    out = in_new_process(
        "import torch\n"
        "from ctrlrl.nn import cpu\n"
        "setting = torch.backends.mkldnn.matmul\n"
        "cpu.prepare_cpu(1)\n"
        "print(setting.fp32_precision, cpu._switched)\n"
        "with cpu.products_of(16): print(setting.fp32_precision)\n"
        "with cpu.products_of(17): print(setting.fp32_precision)\n"
        "try:\n"
        "    with cpu.products_of(1): raise KeyError\n"
        "except KeyError: print(setting.fp32_precision)\n"
        "setting.fp32_precision = 'ieee'  # the user decides\n"
        "with cpu.products_of(1): print(setting.fp32_precision)\n"
    ).split()
    ours, switched, few, many, after, users = out
    assert many == after == ours and users == "ieee"
    assert few == ("none" if switched == "True" else ours)


def test_products_of_few_rows_leave_a_precision_that_the_user_chose():
    out = in_new_process(
        "import torch\n"
        "from ctrlrl.nn import cpu\n"
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'\n"
        "cpu.prepare_cpu(1)\n"
        "with cpu.products_of(1): print(torch.backends.mkldnn.matmul.fp32_precision)\n"
    )
    assert out.strip() == "bf16"


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc's allocator")
def test_prepared_memory_is_reused_instead_of_faulted_in_again():
    code = (
        "import resource, sys, torch\n"
        "from ctrlrl.nn.cpu import prepare_cpu\n"
        "if sys.argv[1] == 'yes': prepare_cpu(1)\n"
        "def work():\n"
        "    kept = [torch.ones(2_000_000) for _ in range(8)]\n"
        "for _ in range(5): work()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): work()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    static = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # else glibc adapts by itself
    faults = {}
    for asked in ("yes", "no"):
        command = [sys.executable, "-c", code, asked]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | static)
        faults[asked] = int(done.stdout)
    assert faults["yes"] < 100
    assert faults["no"] > 10_000


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu"])
def test_a_few_rows_by_numpy_are_what_pytorch_gives(activation):
    network, x = mlp((5, 16, 16, 3), activation=activation), torch.randn(7, 5)

    def check(made):
        with torch.no_grad():
            assert torch.allclose(made.by_numpy(x), made(x), atol=1e-6)

    check(network)
    with torch.no_grad():
        for p in network.parameters():  # in place, as optimizers change them
            p.add_(0.1)
    check(network)
    copied = copy.deepcopy(network)
    network.load_state_dict(mlp((5, 16, 16, 3)).state_dict(), assign=True)
    check(network)
    with torch.no_grad():
        copied[0].weight.zero_()
    check(copied)
    copied[2].bias = nn.Parameter(torch.randn(16))
    check(copied)
    check(pickle.loads(pickle.dumps(network)))


def test_numpy_is_for_few_rows_of_what_it_knows(monkeypatch):
    taken = []
    monkeypatch.setattr(MLP, "by_numpy", lambda self, x: taken.append(x) or x)
    small, x = mlp((64, 64, 2)), torch.randn(16, 64)
    with torch.no_grad():
        small.without_gradient(x)
        assert [rows is x for rows in taken] == [True]
        small.without_gradient(torch.randn(17, 64))
        mlp((64, 64, 2), layer_norm=True).without_gradient(x)
        small.double().without_gradient(x.double())
    assert len(taken) == 1


@pytest.mark.parametrize(("agent", "config"), [(SAC, SACConfig), (PPO, PPOConfig)])
def test_a_layer_that_a_users_network_does_not_use_stays_as_it_is(agent, config):
    class Spare(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.used, self.spare = nn.Linear(inputs, outputs), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    space = gym.spaces.Box(-1, 1, (4,)), gym.spaces.Box(-1, 1, (2,))
    made = agent(*space, config(normalize_obs=False), network=Spare)
    parts = made.policy, made.critics if agent is SAC else made.critic
    before = {name: p.clone() for part in parts for name, p in part.named_parameters()}
    if agent is SAC:
        made.step(make_batch(size=8, obs=4, act=space[1])[0], torch.rand(2, 8, 2))
    else:
        row = {"decision": torch.rand(8, 2), "start": torch.zeros(8, dtype=torch.bool), "policy_state": {}}
        row |= {name: torch.rand(8, 1) for name in ("behaviour", "log_prob", "value", "advantage")}
        row["reference"] = torch.zeros(8, 0)
        made.step(RolloutBatch(obs=torch.rand(8, 4), mask=torch.ones(8, 1, dtype=torch.bool), critic_state={}, **row))
    after = {name: p for part in parts for name, p in part.named_parameters()}
    moved = {name: not torch.equal(p, before[name]) for name, p in after.items()}
    assert any("spare" in name for name in moved) and any("used" in name for name in moved)
    assert all(moved[name] == ("spare" not in name) for name in moved), moved


def test_a_containers_quota_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert cores.usable_cores() == 16
    for quota, expected in (("max 100000", 16), ("250000 100000", 3), ("5000 100000", 1), ("9000000 100000", 16)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert cores.usable_cores() == expected
