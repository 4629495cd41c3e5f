"""The tanh-Gaussian against hand-computed numbers, quadrature and float64."""

import math

import pytest
import torch
from gymnasium.spaces import Box

from ctrlrl.nn.distributions import TanhNormal, log_tanh_jacobian
from ctrlrl.nn.policy import ActionScaling


def test_log_prob_by_hand():
    # u ~ N(0.5, 0.2^2), a = tanh(u) at u = 0.7: log N = -0.5 - log 0.2 - 0.9189385; log(1 - tanh^2 0.7) = -0.4543530
    distribution = TanhNormal(
        torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([[math.log(0.2)]], dtype=torch.float64)
    )
    action, log_prob, raw = distribution.rsample(torch.ones(1, 1, dtype=torch.float64))
    assert raw.item() == pytest.approx(0.7)
    assert action.item() == pytest.approx(0.6043677771)
    by_hand = -0.5 - math.log(0.2) - 0.5 * math.log(2 * math.pi) - math.log(1 - 0.6043677771**2)
    assert log_prob.item() == pytest.approx(by_hand, abs=1e-9)
    assert distribution.log_prob(action).item() == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.0, -1.0), (-2.0, 0.5)])
def test_the_density_integrates_to_one(mean, log_std):
    edges = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    middle = ((edges[1:] + edges[:-1]) / 2)[:, None]
    full = torch.full_like(middle, mean), torch.full_like(middle, log_std)
    total = TanhNormal(*full).log_prob(middle).exp().sum() * (edges[1] - edges[0])
    assert total.item() == pytest.approx(1.0, abs=1e-4)


def test_the_jacobian_stays_exact_where_tanh_saturates():
    raw = torch.tensor([-30.0, -9.0, 0.0, 9.0, 30.0])
    exact = torch.log1p(-(torch.tanh(raw.double()) ** 2))  # -inf beyond +-19 even in float64
    got = log_tanh_jacobian(raw)
    assert torch.isfinite(got).all()
    assert torch.allclose(got[1:4], exact[1:4].float(), rtol=1e-5)
    assert got[4].item() == pytest.approx(2 * math.log(2) - 60)
    common = torch.log(1 - torch.tanh(raw) ** 2 + 1e-6)
    assert abs(common[3].item() - exact[3].item()) > 2  # the form in wide use is off by nats there


def test_gradients_match_finite_differences():
    mean = torch.tensor([[0.3, -1.2]], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([[-0.5, 0.4]], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[0.7, -1.5]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m, s: TanhNormal(m, s).rsample(noise), (mean, log_std))


@pytest.mark.parametrize("half", [0.4, 1.0, 3.0])
def test_scaling_covers_any_bounds_and_comes_back(half):
    space = Box(low=torch.tensor([-half, 0.0]).numpy(), high=torch.tensor([half, 2 * half]).numpy())
    scaling = ActionScaling(space)
    unit = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.25, -0.5]])
    action = scaling.to_environment(unit)
    assert action[0].tolist() == pytest.approx([-half, 0.0])
    assert action[1].tolist() == pytest.approx([half, 2 * half])
    assert torch.allclose(scaling.to_unit(action), unit, atol=1e-6)
    assert all(space.contains(a.numpy()) for a in scaling.to_environment(torch.rand(1000, 2) * 2 - 1))


def test_loaded_bounds_take_the_place_of_the_environments():
    wide, narrow = ActionScaling(Box(-2.0, 2.0, (1,))), ActionScaling(Box(-1.0, 1.0, (1,)))
    wide.load_state_dict(narrow.state_dict())
    assert wide.to_environment(torch.tensor([[0.5]])).item() == 0.5
    assert wide.to_unit(torch.tensor([[0.5]])).item() == 0.5


def test_log_prob_does_not_depend_on_the_actuator_range():
    """SAC's entropy, Jacobian and target live in [-1, 1]^A: Humanoid's 0.4 changes none of them."""
    distribution = TanhNormal(torch.zeros(1, 17), torch.zeros(1, 17))
    _, log_prob, _ = distribution.rsample(torch.zeros(1, 17))
    assert log_prob.shape == (1, 1)
    assert log_prob.item() == pytest.approx(-17 * 0.5 * math.log(2 * math.pi), abs=1e-4)


def test_the_entropy_estimate_is_right_on_average():
    edges = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    middle = ((edges[1:] + edges[:-1]) / 2)[:, None]
    mean, log_std = torch.full_like(middle, 0.4), torch.full_like(middle, -0.3)
    log_prob = TanhNormal(mean, log_std).log_prob(middle)
    exact = -(log_prob.exp() * log_prob).sum() * (edges[1] - edges[0])
    noise = torch.randn(200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert TanhNormal(mean, log_std).entropy(noise).mean().item() == pytest.approx(exact.item(), abs=0.01)
