"""The categorical distribution against hand-computed numbers, with and without choices that do not exist."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctrlrl.nn.distributions import Categorical

INF = math.inf


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_numbers_by_hand():
    # Odds 1 : 2 : 5 of the first decision, 1 : 3 : nothing of the second.
    logits = torch.tensor([[[1.0, 2.0, 5.0], [1.0, 3.0, 0.0]]]).log() + 7
    distribution = Categorical(logits)
    probs = [[0.125, 0.25, 0.625], [0.25, 0.75, 0.0]]
    assert distribution.probs[0].tolist() == [pytest.approx(p, abs=1e-6) for p in probs]
    assert distribution.probs[0, 1, 2] == 0
    assert distribution.mode.tolist() == [[2, 1]] and distribution.mode.dtype == torch.int64
    assert distribution.counts.tolist() == [[3, 2]]
    assert distribution.log_prob(torch.tensor([[1, 0]]))[0].tolist() == pytest.approx([math.log(0.25)] * 2)
    # 1/8 log 8 + 1/4 log 4 + 5/8 log 8/5 = 0.900256; 1/4 log 4 + 3/4 log 4/3 = 0.562335
    assert distribution.entropy()[0].tolist() == pytest.approx([0.900256, 0.562335], abs=1e-6)


def test_a_mask_is_of_each_decision_or_the_same_for_all():
    logits = torch.zeros(2, 3, 4)
    each = torch.rand(2, 3, 4, generator=generator()) > 0.4
    assert torch.equal(Categorical.masked(logits, each).probs > 0, each)
    one = torch.tensor([[True, False, True, True], [False, False, True, False]])
    shared = Categorical.masked(logits, one)
    assert torch.equal(shared.probs > 0, one[:, None].expand(2, 3, 4))
    assert shared.counts.tolist() == [[3] * 3, [1] * 3]
    assert torch.equal(Categorical.masked(logits, one.to(torch.int8)).logits, shared.logits)
    assert shared.entropy().flatten().tolist() == pytest.approx([math.log(3)] * 3 + [0.0] * 3)


def test_gradients_are_finite_and_do_not_reach_what_does_not_exist():
    logits = torch.tensor([[[0.3, -INF, 90.0]], [[-INF, -INF, -INF]], [[2.0, -INF, -INF]]], requires_grad=True)
    distribution = Categorical(logits)
    q = torch.tensor([1.0, 2.0, 3.0])
    loss = (distribution.probs * (0.5 * distribution.log_probs - q)).sum() + distribution.entropy().sum()
    loss = loss + distribution.log_prob(torch.tensor([[0], [0], [0]])).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert (gradient[logits == -INF] == 0).all()
    assert gradient[0, 0, 0] == pytest.approx(1, abs=1e-6)  # of log p = 0.3 - 90, to which the sums add nothing


def test_gradients_match_finite_differences():
    logits = torch.tensor([[[0.2, -INF, 1.3, -0.4]]], dtype=torch.float64)
    free = logits[logits > -INF].clone().requires_grad_()

    def values(x: Tensor) -> tuple[Tensor, ...]:
        distribution = Categorical(logits.masked_scatter(logits > -INF, x))
        return distribution.entropy(), distribution.log_prob(torch.tensor([[2]])), distribution.probs

    assert torch.autograd.gradcheck(values, (free,))


def test_a_decision_without_choices_counts_nothing():
    distribution = Categorical(torch.full((2, 1, 3), -INF))
    assert distribution.probs.tolist() == [[[0.0] * 3]] * 2
    assert distribution.entropy().tolist() == [[0.0]] * 2
    assert distribution.counts.tolist() == [[0]] * 2


def test_a_nan_is_not_hidden():
    distribution = Categorical(torch.tensor([[math.nan, 0.0, -INF]]))
    assert distribution.entropy().isnan().all() and distribution.log_prob(torch.tensor([1])).isnan().all()


def test_bfloat16_logits_are_normalized_in_float32():
    distribution = Categorical(torch.randn(64, 1, 50, generator=generator()).bfloat16())
    assert distribution.log_probs.dtype == distribution.entropy().dtype == torch.float32
    assert distribution.probs.sum(-1).sub(1).abs().max() < 1e-6


def test_draws_have_the_frequencies_of_the_probabilities():
    logits = torch.tensor([[[1.0, 2.0, 5.0, 0.0]], [[4.0, 0.0, 0.0, 4.0]]]).log()
    distribution = Categorical(logits.repeat(20_000, 1, 1, 1))
    choice = distribution.sample(generator())
    assert choice.shape == (20_000, 2, 1) and choice.dtype == torch.int64
    shares = torch.nn.functional.one_hot(choice, 4).double().mean(0)
    # Five standard deviations: sqrt(1/4 / 20,000) = 0.0035 at most.
    assert (shares - distribution.probs[0]).abs().max() < 0.018
    assert (shares[distribution.probs[0] == 0] == 0).all()
    assert torch.equal(choice, distribution.sample(generator())) and not torch.equal(
        choice, distribution.sample(generator(1))
    )


@st.composite
def distributions(draw):
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 6)))
    size = math.prod(shape)
    values = draw(st.lists(st.floats(-300, 300, width=32), min_size=size, max_size=size))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(shape)
    mask[..., draw(st.integers(0, shape[2] - 1))] = True
    return Categorical.masked(torch.tensor(values).view(shape), mask), mask


@settings(deadline=None, max_examples=150)
@given(distributions(), st.integers(0, 2**31))
def test_properties(made, seed):
    distribution, mask = made
    probs, log_probs, entropy = distribution.probs, distribution.log_probs, distribution.entropy()
    assert torch.allclose(probs.sum(-1), torch.ones(probs.shape[:-1]), atol=1e-5)
    assert (probs[~mask] == 0).all() and torch.isfinite(log_probs).all() and (log_probs <= 0).all()
    assert torch.equal(distribution.counts, mask.sum(-1))
    assert (entropy >= 0).all() and (entropy <= mask.sum(-1).log() + 1e-5).all()
    for choice in (distribution.sample(generator(seed)), distribution.mode):
        assert choice.shape == probs.shape[:-1]
        assert mask.gather(-1, choice[..., None]).all()
        assert torch.equal(distribution.log_prob(choice), log_probs.gather(-1, choice[..., None])[..., 0])
    assert torch.equal(distribution.log_prob(distribution.mode), log_probs.amax(-1))
    shifted = Categorical(distribution.logits + 3)  # only differences of logits count
    assert torch.allclose(shifted.probs, probs, atol=1e-4)
