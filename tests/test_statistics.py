"""Statistics against numbers worked by hand or taken from printed tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrlrl.errors import UsageError
from ctrlrl.runs.statistics import (
    align_curves,
    iqm,
    mean_interval,
    pooled_difference,
    share_interval,
    stratified_bootstrap,
    student_t,
    time_to_threshold,
    told_share,
)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 9.0, 2.0], 4.0),  # floor(3/4) = 0 cut: the plain mean
        ([100.0, 1.0, 2.0, -50.0], 1.5),  # one cut at each end
        ([0.0, 1.0, 2.0, 4.0, 100.0], 7 / 3),  # floor(5/4) = 1 cut at each end, three left
        ([0, 1, 2, 3, 4, 5, 100], 3.0),  # floor(7/4) = 1, five left: 1..5
        ([0, 1, 2, 3, 4, 5, 6, 100], 3.5),  # two cut at each end: 2..5
    ],
)
def test_iqm_cuts_whole_numbers_as_rliable_does(scores: list[float], expected: float) -> None:
    assert float(iqm(scores)) == pytest.approx(expected)


def test_iqm_of_curves_is_pointwise() -> None:
    curves = np.array([[0.0, 10.0], [1.0, -90.0], [2.0, 20.0], [50.0, 30.0]])
    np.testing.assert_allclose(iqm(curves), [1.5, 15.0])


def test_iqm_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"at least one score .* \(0,\)"):
        iqm([])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_iqm_ignores_order_and_stays_within_the_scores(scores: list[float], random: object) -> None:
    shuffled = list(scores)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert float(iqm(scores)) == pytest.approx(float(iqm(shuffled)))
    assert min(scores) - 1e-6 <= float(iqm(scores)) <= max(scores) + 1e-6


def test_bootstrap_of_two_runs_against_the_exact_distribution() -> None:
    # Means of two draws from {0, 1}: 0, 1/2, 1 with 1/4, 1/2, 1/4. So the central half is [0..1/2, 1/2..1] and the
    # central 95 % is [0, 1].
    low, high = stratified_bootstrap({"a": [0.0, 1.0]}, iqm, resamples=4000)
    assert (float(low), float(high)) == (0.0, 1.0)
    low, high = stratified_bootstrap({"a": [0.0, 1.0]}, iqm, resamples=4000, confidence=0.4)
    assert (float(low), float(high)) == (0.5, 0.5)


def test_bootstrap_agrees_with_the_normal_approximation_of_a_mean() -> None:
    scores = np.random.default_rng(1).normal(10.0, 2.0, size=200)
    low, high = stratified_bootstrap({"a": scores}, lambda x: x.mean(axis=0), resamples=4000)
    half = 1.96 * scores.std() / math.sqrt(200)
    assert float(low) == pytest.approx(scores.mean() - half, abs=0.03)
    assert float(high) == pytest.approx(scores.mean() + half, abs=0.03)


def test_bootstrap_keeps_runs_inside_their_task() -> None:
    # Tasks without spread of their own: only mixing tasks could widen the interval.
    low, high = stratified_bootstrap({"a": [0.0, 0.0, 0.0], "b": [100.0, 100.0, 100.0]}, lambda x: x.mean(axis=0))
    assert (float(low), float(high)) == (50.0, 50.0)


def test_bootstrap_redraws_whole_curves_and_repeats_itself() -> None:
    curves = np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0], [3.0, 6.0], [4.0, 8.0]])
    low, high = stratified_bootstrap({"a": curves}, iqm, seed=3)
    assert low.shape == high.shape == (2,)
    np.testing.assert_allclose(low[1], 2 * low[0])  # the same runs at both points
    np.testing.assert_allclose(high[1], 2 * high[0])
    again, _ = stratified_bootstrap({"a": curves}, iqm, seed=3)
    np.testing.assert_array_equal(low, again)


def test_one_run_has_no_interval() -> None:
    low, high = stratified_bootstrap({"a": [1.0], "b": [2.0]})
    assert np.isnan(low) and np.isnan(high)
    assert all(math.isnan(bound) for bound in mean_interval([5.0]))
    assert all(math.isnan(bound) for bound in mean_interval([5.0, math.inf]))


@pytest.mark.parametrize("scores", [{}, {"a": []}])
def test_bootstrap_refuses_missing_scores(scores: dict[str, list[float]]) -> None:
    with pytest.raises(UsageError, match=r"at least one task|task 'a' has no runs"):
        stratified_bootstrap(scores)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_checked(confidence: float) -> None:
    with pytest.raises(UsageError, match="confidence must lie between 0 and 1"):
        mean_interval([1.0, 2.0], confidence)
    with pytest.raises(UsageError, match="confidence must lie between 0 and 1"):
        stratified_bootstrap({"a": [1.0, 2.0]}, confidence=confidence)


@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),  # the printed table of t
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.30265),
        (3, 0.95, 3.18245),
        (4, 0.95, 2.77645),
        (5, 0.99, 4.03214),
        (9, 0.95, 2.26216),
        (10, 0.90, 1.81246),
        (30, 0.95, 2.04227),
        (99, 0.95, 1.98422),
        (1_000, 0.95, 1.96234),
    ],
)
def test_student_t_table(freedom: int, confidence: float, expected: float) -> None:
    assert student_t(freedom, confidence) == pytest.approx(expected, abs=2e-4 if freedom == 1 else 1e-5)


@pytest.mark.parametrize(
    ("freedom", "confidence", "expected", "tolerance"),  # scipy.stats.t.ppf((1 + confidence) / 2, freedom)
    [
        (1.5, 0.9, 3.70518, 0.021),
        (1.5, 0.95, 6.01666, 0.03),
        (2.5, 0.9, 2.55822, 0.003),
        (4.75, 0.9, 2.03871, 0.001),
        (11.3, 0.95, 2.19387, 1e-4),
    ],
)
def test_student_t_between_whole_degrees_errs_on_the_wide_side(
    freedom: float, confidence: float, expected: float, tolerance: float
) -> None:
    assert 0 <= student_t(freedom, confidence) / expected - 1 < tolerance


def test_pooled_difference_by_hand() -> None:
    # One task, x = 2, 4, 6 and y = 2, 6, scale 4: in its units the means are equal and s^2 is 1/4 and 1/2. The variance
    # of x's mean is 1/12 with 2 degrees, that of y's 1/4 with 1: 1/3 with (1/9) / (1/288 + 1/16) = 32/19 degrees.
    one = pooled_difference({"a": ([2.0, 4.0, 6.0], [2.0, 6.0], 4.0)}, 0.9)
    half = student_t(32 / 19, 0.9) * math.sqrt(1 / 3)
    assert (one.value, one.low, one.high) == pytest.approx((0.0, -half, half))
    # With a second task, 1 above and of variance 4/3 + 4/3 with 2 degrees each: half the sum of the differences is 1/2,
    # and half the square root of 1/3 + 8/3 = 3 its standard error.
    two = pooled_difference(
        {"a": ([1.0, 2.0, 3.0], [1.0, 3.0], 2.0), "b": ([1.0, 3.0, 5.0], [0.0, 2.0, 4.0], 1.0)}, 0.9
    )
    half = student_t(9 / (1 / 288 + 1 / 16 + 16 / 9), 0.9) * math.sqrt(3) / 2
    assert (two.value, two.low, two.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_one_run_takes_the_spread_of_the_other_side() -> None:
    # s^2 = 1 of three runs for both sides: variance 1/3 + 1 with two degrees, t = 2.91999.
    one = pooled_difference({"a": ([1.0, 2.0, 3.0], [2.5], 1.0)}, 0.9)
    half = 2.91999 * math.sqrt(4 / 3)
    assert (one.value, one.low, one.high) == pytest.approx((-0.5, -0.5 - half, -0.5 + half), abs=1e-4)
    other = pooled_difference({"a": ([2.5], [1.0, 2.0, 3.0], 1.0)}, 0.9)
    assert (other.value, other.low, other.high) == pytest.approx((-one.value, -one.high, -one.low))
    alone = pooled_difference({"a": ([2.0], [1.0], 1.0)})
    assert alone.value == 1.0 and math.isnan(alone.low) and math.isnan(alone.high)
    equal = pooled_difference({"a": ([2.0, 2.0], [1.0, 1.0], 1.0)})
    assert (equal.low, equal.high) == (1.0, 1.0)


@pytest.mark.parametrize("runs", [((3, 3), (3, 3), (3, 3)), ((3, 3), (3, 3), (3, 1))])
@pytest.mark.parametrize("shape", ["normal", "skewed", "two peaks"])
def test_nine_intervals_of_ten_hold_the_difference(runs: tuple[tuple[int, int], ...], shape: str) -> None:
    rng = np.random.default_rng(0)

    def draw(spread: float, count: int) -> np.ndarray:
        if shape == "normal":
            return spread * rng.standard_normal(count)
        if shape == "skewed":
            return spread * (rng.exponential(size=count) - 1)
        return spread * rng.choice([-1.0, 1.0], size=count) + spread / 10 * rng.standard_normal(count)

    held = 0
    for _ in range(1000):
        tasks = {
            str(spread): (0.3 + draw(spread, ours), draw(spread, theirs), 2.0)
            for spread, (ours, theirs) in zip((0.2, 0.9, 0.5), runs, strict=True)
        }
        found = pooled_difference(tasks, 0.9)
        held += found.low <= 0.15 <= found.high
    assert 870 <= held <= 960  # of 900 expected; the standard error of the count is 10


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "at least one task"),
        ({"a": ([], [1.0], 1.0)}, "0 and 1 runs, scale 1"),
        ({"a": ([1.0], [1.0], 0.0)}, "a scale above 0"),
        ({"a": ([1.0], [1.0], math.nan)}, "a scale above 0"),
    ],
)
def test_pooled_difference_refuses_what_cannot_be_compared(tasks: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pooled_difference(tasks)
    with pytest.raises(UsageError, match="confidence must lie between"):
        pooled_difference({"a": ([1.0], [1.0], 1.0)}, 90)


def test_mean_interval_by_hand() -> None:
    # mean 2, s = 1, n = 3: 2 -+ 4.30265 / sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)


def test_time_to_threshold_is_the_first_evaluation_at_or_above() -> None:
    steps, values = [10, 20, 30, 40], [1.0, 5.0, 2.0, 9.0]
    assert time_to_threshold(steps, values, 5.0) == 20
    assert time_to_threshold(steps, values, 5.1) == 40
    assert time_to_threshold(steps, values, 9.1) is None
    assert time_to_threshold([], [], 0.0) is None


def test_align_interpolates_inside_and_never_outside() -> None:
    grid, values = align_curves([([0, 10, 20, 30], [0.0, 1.0, 2.0, 3.0]), ([5, 15, 25], [10.0, 20.0, 40.0])])
    np.testing.assert_array_equal(grid, [5, 10, 15, 20, 25])
    np.testing.assert_allclose(values, [[0.5, 1.0, 1.5, 2.0, 2.5], [10.0, 15.0, 20.0, 30.0, 40.0]])


def test_align_leaves_equal_grids_alone_and_knows_disjoint_ones() -> None:
    grid, values = align_curves([([1, 2], [3.0, 4.0]), ([1, 2], [5.0, 6.0])])
    np.testing.assert_array_equal(grid, [1, 2])
    np.testing.assert_array_equal(values, [[3.0, 4.0], [5.0, 6.0]])
    grid, values = align_curves([([1, 2], [3.0, 4.0]), ([3, 4], [5.0, 6.0])])
    assert grid.shape == (0,) and values.shape == (2, 0)
    grid, values = align_curves([([], []), ([3, 4], [5.0, 6.0])])
    assert grid.shape == (0,) and values.shape == (2, 0)


def test_align_refuses_what_it_cannot_place() -> None:
    with pytest.raises(UsageError, match="curve 1 needs steps"):
        align_curves([([1, 2], [3.0, 4.0]), ([2, 1], [3.0, 4.0])])
    with pytest.raises(UsageError, match="at least one curve"):
        align_curves([])


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_interval_of_a_share_against_newcombe_1998(successes: int, trials: int, expected: tuple[float, float]) -> None:
    """Two-sided confidence intervals for the single proportion, table I, method 3."""
    assert share_interval(successes, trials) == pytest.approx(expected, abs=6e-5)
    low, high = share_interval(trials - successes, trials)
    assert (1 - high, 1 - low) == pytest.approx(expected, abs=6e-5)


def test_a_share_is_told_with_its_interval() -> None:
    assert told_share(300, 300) == "300 of 300, 95 % interval [0.987, 1.000]"
    for successes, trials in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(UsageError, match=f"no share: {successes} of {trials}"):
            share_interval(successes, trials)
    with pytest.raises(UsageError, match="confidence"):
        share_interval(1, 2, confidence=1.0)
