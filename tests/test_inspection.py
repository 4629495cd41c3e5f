"""Inspection of datasets: each finding in data that has it and in no clean data, numbers worked by hand, the page."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from ctrlrl.cli import data_inspect as command
from ctrlrl.data import inspection_coverage as coverage
from ctrlrl.data.inspection import Inspection, as_json, inspect
from ctrlrl.data.inspection_alignment import _kolmogorov_smirnov
from ctrlrl.data.inspection_columns import Distribution, RaggedSummary, drawn_rows, place, summarize
from ctrlrl.data.inspection_findings import Finding, find
from ctrlrl.data.inspection_plots import picture
from ctrlrl.data.store import Column, Dataset, DatasetWriter, Episode
from ctrlrl.errors import UsageError
from tests.pages import Page
from tests.scripts import ROOT

SEEN = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
ACTION = gym.spaces.Box(-1, 1, (2,), np.float32)
REFERENCE = {"random": -10.0, "expert": 90.0}
LIMIT = 60


def simulate(seed: int, noise: float = 0.4, gain: float = 0.3) -> Episode:
    """A cart with noise, pushed by noisy feedback; it ends where the second state leaves its limits, or after LIMIT."""
    random = np.random.default_rng(seed)
    a = np.array([[1, 0.1, 0, 0], [-0.1, 0.95, 0, 0], [0, 0, 0.9, 0.1], [0, 0, -0.1, 0.9]])
    b = np.array([[0.0, 0], [0.5, 0], [0, 0], [0, 0.6]])
    state = random.normal(size=4) * 0.5
    seen, actions, rewards = [state], [], []
    terminated = False
    while len(actions) < LIMIT and not terminated:
        action = np.clip(-gain * state[[1, 3]] + noise * random.normal(size=2), -1, 1)
        rewards.append(state[0] - 0.5 * action[0] - 0.3 * action[1] ** 2)
        state = a @ state + b @ action + 0.02 * random.normal(size=4)
        actions.append(action)
        seen.append(state)
        terminated = abs(state[1]) > 0.85
    return Episode(
        observation=np.array(seen, np.float32),
        action=np.array(actions, np.float32),
        reward=np.array(rewards, np.float32),
        terminated=terminated,
        truncated=not terminated,
    )


def clean(count: int = 120) -> list[Episode]:
    return [simulate(seed) for seed in range(count)]


def write(path: Path, episodes: Sequence[Episode], **options: Any) -> Dataset:
    options = {"observation_space": SEEN, "action_space": ACTION, "reference": REFERENCE, **options}
    with DatasetWriter.create(path, **options) as writer:
        for episode in episodes:
            writer.add(episode)
    return Dataset.open(path)


def codes(dataset: Dataset) -> dict[str, str]:
    return {one.code: one.severity for one in find(inspect(dataset))}


def each(change: Callable[[Episode], dict[str, Any]], episodes: Sequence[Episode]) -> list[Episode]:
    return [dataclasses.replace(one, **change(one)) for one in episodes]


def late(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[:1], rows[:-1]])


def early(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[1:], rows[-1:]])


# ---- Findings -------------------------------------------------------------------------------------------------------


def test_nothing_is_found_in_clean_data(tmp_path: Path) -> None:
    dataset = write(tmp_path / "set", clean())
    it = inspect(dataset)
    assert find(it) == []
    assert it.ends.terminated > 20 and it.ends.truncated > 20
    assert (it.alignment.action.verdict, it.alignment.reward.verdict) == ("aligned", "aligned")
    assert it.ends.terminal_states is not None and it.ends.terminal_states.differ


def constant_action(one: Episode) -> dict[str, Any]:
    return {"action": one.action * np.float32([1, 0]) + np.float32([0, 0.5])}


def outside(one: Episode) -> dict[str, Any]:
    return {"action": np.where(np.arange(len(one.action))[:, None] == 7, one.action + np.float32([0, 3]), one.action)}


def constant_number(one: Episode) -> dict[str, Any]:
    return {"observation": one.observation * np.float32([1, 1, 1, 0])}


def tiny_number(one: Episode) -> dict[str, Any]:
    return {"observation": one.observation * np.float32([1, 1, 1, 1e-6]) + np.float32([0, 0, 0, 3e-3])}


def sparse(one: Episode) -> dict[str, Any]:
    return {"reward": (np.arange(len(one.reward)) == len(one.reward) - 1).astype(np.float32) * one.terminated}


def one_each(one: Episode) -> dict[str, Any]:
    return {"reward": np.ones(len(one.reward), np.float32)}


def bang_bang(one: Episode) -> dict[str, Any]:
    return {"action": np.where(np.abs(one.action) > 0.3, np.sign(one.action), one.action)}


def all_terminated(one: Episode) -> dict[str, Any]:
    return {"terminated": True, "truncated": False}


def none_terminated(one: Episode) -> dict[str, Any]:
    return {"terminated": False, "truncated": True}


@pytest.mark.parametrize(
    ("change", "code", "severity"),
    [
        (constant_action, "action-constant", "warning"),
        (outside, "action-out-of-bounds", "error"),
        (bang_bang, "action-saturation", "note"),
        (constant_number, "observation-constant", "note"),
        (tiny_number, "observation-tiny-variance", "warning"),
        (sparse, "reward-sparse", "note"),
        (one_each, "reward-constant", "note"),
        (all_terminated, "timeout-as-terminal", "error"),
        (none_terminated, "terminal-as-timeout", "warning"),
        (lambda one: {"action": late(one.action)}, "action-shifted", "error"),
        (lambda one: {"action": early(one.action)}, "action-shifted", "warning"),
        (lambda one: {"reward": late(one.reward)}, "reward-shifted", "warning"),
        (lambda one: {"reward": early(one.reward)}, "reward-shifted", "error"),
        (lambda one: {"observation": early(one.observation)}, "observation-shifted", "error"),
        (lambda one: {"observation": late(one.observation)}, "observation-shifted", "error"),
    ],
)
def test_a_defect_is_found_and_nothing_else(
    tmp_path: Path, change: Callable[[Episode], dict[str, Any]], code: str, severity: str
) -> None:
    assert codes(write(tmp_path / "set", each(change, clean()))) == {code: severity}


def test_shifts_are_told_apart(tmp_path: Path) -> None:
    for name, change, action, reward in (
        ("a", lambda one: {"action": late(one.action)}, "late", "aligned"),
        ("b", lambda one: {"action": early(one.action)}, "early", "aligned"),
        ("c", lambda one: {"reward": late(one.reward)}, "aligned", "late"),
        ("d", lambda one: {"observation": late(one.observation)}, "early", "early"),
    ):
        it = inspect(write(tmp_path / name, each(change, clean())))
        assert (it.alignment.action.verdict, it.alignment.reward.verdict) == (action, reward), name


def test_a_policy_without_noise_and_too_little_data_leave_alignment_open(tmp_path: Path) -> None:
    feedback = inspect(write(tmp_path / "a", [simulate(seed, noise=0.0) for seed in range(120)])).alignment.action
    assert feedback.verdict == "untold" and feedback.left < 0.05 and "without noise" in feedback.why
    few = inspect(write(tmp_path / "b", clean(3))).alignment
    assert few.action.verdict == few.reward.verdict == "untold" and "too few transitions" in few.action.why


def test_correlated_actions_are_not_called_shifted(tmp_path: Path) -> None:
    def smoothed(one: Episode) -> dict[str, Any]:
        random = np.random.default_rng(len(one.action))
        noise, state = np.zeros((len(one.action), 2)), np.array(one.observation[0], np.float64)
        for t in range(1, len(noise)):
            noise[t] = 0.9 * noise[t - 1] + 0.3 * random.normal(size=2)
        seen = [state]
        for push in noise:
            state = 0.9 * state + np.array([0, 0.5 * push[0], 0, 0.5 * push[1]]) + 0.05 * random.normal(size=4)
            seen.append(state)
        return {"observation": np.array(seen, np.float32), "action": np.clip(noise, -1, 1).astype(np.float32)}

    verdict = inspect(write(tmp_path / "a", each(smoothed, clean()))).alignment.action
    assert verdict.memory > 0.5 and verdict.verdict in ("aligned", "untold")


def test_nan_is_found_with_its_place(tmp_path: Path) -> None:
    dataset = write(
        tmp_path / "set",
        each(lambda one: {"columns": {"force": np.zeros((len(one.reward), 2))}}, clean()),
        columns={"force": Column(dtype="float64", shape=(2,))},
    )
    rows = int(dataset.lengths[0]) + 1
    for name, dtype, place_in_file in (("observation", "<f4", (rows + 5) * 4 + 2), ("force", "<f8", 3)):
        raw = np.memmap(tmp_path / f"set/columns/{name}.bin", dtype, "r+")
        raw[place_in_file] = np.nan if name == "observation" else np.inf
        raw.flush()
    findings = {one.code: one for one in find(inspect(Dataset.open(tmp_path / "set")))}
    assert findings.keys() == {"non-finite"}
    assert "1 in observation, first observation[2] at episode 1, step 5" in findings["non-finite"].message
    assert "1 in force, first force[1] at episode 0, step 1" in findings["non-finite"].message


def test_scaled_actions_and_bounds(tmp_path: Path) -> None:
    wide = gym.spaces.Box(np.float32([-2, -3]), np.float32([2, 3]), dtype=np.float32)
    assert codes(write(tmp_path / "a", clean(), action_space=wide)) == {"action-scale": "warning"}
    narrow = gym.spaces.Box(-0.4, 0.4, (2,), np.float32)
    assert codes(write(tmp_path / "b", clean(), action_space=narrow)).keys() >= {"action-scale", "action-out-of-bounds"}
    huge = gym.spaces.Box(-40, 40, (2,), np.float32)
    quarter = each(lambda one: {"action": one.action / 4}, clean())
    assert codes(write(tmp_path / "c", quarter, action_space=huge)) == {"action-scale": "warning"}
    used = each(lambda one: {"action": one.action * 2}, clean())
    assert codes(write(tmp_path / "d", used, action_space=wide)) == {}
    free = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    assert codes(write(tmp_path / "e", clean(), action_space=free)) == {"action-unbounded": "note"}


def test_out_of_bounds_names_the_place_and_tolerates_rounding(tmp_path: Path) -> None:
    message = next(iter(find(inspect(write(tmp_path / "a", each(outside, clean(100))))))).message
    assert (
        "action[1]" in message
        and "declared is -1 to 1" in message
        and "first action[1] at episode 0, step 7" in message
    )
    barely = each(lambda one: {"action": one.action * np.float32(1 + 1e-6)}, clean())
    assert codes(write(tmp_path / "b", barely)) == {}
    tight = gym.spaces.Box(np.float32([-9, -1.1, -9, -9]), np.float32([9, 1.1, 9, 9]), dtype=np.float32)
    assert codes(write(tmp_path / "c", clean(), observation_space=tight)) == {"observation-out-of-bounds": "warning"}


def test_repeats(tmp_path: Path) -> None:
    episodes = clean()
    it = inspect(write(tmp_path / "a", [*episodes, episodes[5], episodes[3]]))
    assert it.repeats.episodes == 2 and it.repeats.first_episodes == (120, 5)
    assert it.repeats.transitions == it.repeats.in_episodes == len(episodes[5].reward) + len(episodes[3].reward)
    assert {one.code for one in find(it)} == {"duplicate-episodes"}
    stuck = each(  # a recorder that wrote the same row again: a fifth of the steps
        lambda one: {
            "observation": np.repeat(one.observation[:4], 3, axis=0),
            "action": np.repeat(one.action[:4], 3, axis=0)[:11],
            "reward": np.repeat(one.reward[:4], 3)[:11],
            "terminated": False,
            "truncated": True,
        },
        [one for one in episodes if len(one.reward) > 4],
    )
    assert codes(write(tmp_path / "b", stuck))["duplicate-transitions"] == "warning"


def test_constant_rewards_without_ends_are_a_warning(tmp_path: Path) -> None:
    same = each(lambda one: one_each(one) | none_terminated(one), [one for one in clean() if not one.terminated])
    assert codes(write(tmp_path / "a", same)) == {"reward-constant": "warning"}


def test_ends_that_are_right_are_left_alone(tmp_path: Path) -> None:
    """Truncated at one length; or terminated at many; or both flags in the last step, rarely."""
    only_cut = [one for one in clean() if not one.terminated]
    assert codes(write(tmp_path / "a", only_cut)) == {}
    assert codes(write(tmp_path / "b", [one for one in clean(200) if one.terminated])) == {}


def test_a_few_timeouts_among_terminals_are_a_warning(tmp_path: Path) -> None:
    ended = [one for one in clean(300) if one.terminated and len(one.reward) < LIMIT]
    cut = each(all_terminated, [one for one in clean(300) if not one.terminated][: len(ended) // 2])
    found = {one.code: one for one in find(inspect(write(tmp_path / "a", [*ended, *cut])))}
    assert found["timeout-as-terminal"].severity == "warning"
    assert f"{len(cut)} of {len(ended) + len(cut)} terminated episodes have exactly {LIMIT} steps" in (
        found["timeout-as-terminal"].message
    )


def test_gymnasiums_limit_and_indistinct_states_are_named(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    episodes = [
        Episode(
            observation=random.normal(size=(201, 3)).astype(np.float32),
            action=random.uniform(-2, 2, (200, 1)).astype(np.float32),
            reward=random.normal(size=200),
            terminated=True,
            truncated=False,
        )
        for _ in range(30)
    ]
    space = gym.spaces.Box(-9, 9, (3,), np.float32)
    box = gym.spaces.Box(-2, 2, (1,), np.float32)
    dataset = write(tmp_path / "a", episodes, observation_space=space, action_space=box, env="Pendulum-v1")
    message = find(inspect(dataset))[0].message
    assert "exactly 200 steps (where Pendulum-v1 cuts episodes)" in message
    assert "terminal observations look like those before" in message


def test_terminals_that_look_like_any_state_are_noted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    blind = []
    for _ in range(80):
        n = int(random.integers(20, 50))
        blind.append(
            Episode(
                observation=random.normal(size=(n + 1, 4)).astype(np.float32),
                action=random.uniform(-1, 1, (n, 2)).astype(np.float32),
                reward=random.normal(size=n),
                terminated=True,
                truncated=False,
            )
        )
    assert codes(write(tmp_path / "a", blind)) == {"terminal-unseen": "note"}
    cut = each(none_terminated, blind)
    assert codes(write(tmp_path / "b", cut)) == {"terminal-as-timeout": "note"}


def test_whole_numbers_repeat_by_themselves(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    episodes = []
    for _ in range(60):
        n = int(random.integers(1, 3))
        cells = random.integers(0, 4, n + 1)
        episodes.append(
            Episode(
                observation=np.eye(4, dtype=np.uint8)[cells],
                action=random.integers(0, 2, n),
                reward=(cells[1:] == 3).astype(np.float32),
                terminated=True,
                truncated=False,
            )
        )
    found = codes(
        write(
            tmp_path / "a",
            episodes,
            observation_space=gym.spaces.Box(0, 1, (4,), np.uint8),
            action_space=gym.spaces.Discrete(2),
        )
    )
    assert found.get("duplicate-episodes") == "note" and "duplicate-transitions" not in found


def test_every_finding_is_documented(tmp_path: Path) -> None:
    source = (ROOT / "ctrlrl/data/inspection_findings.py").read_text()
    made = set(re.findall(r'code="([a-z-]+)"', source))
    page = (ROOT / "docs/data-inspect.md").read_text()
    assert made == set(re.findall(r"^\| `([a-z-]+)` \|", page, flags=re.MULTILINE))
    assert len(made) > 15


# ---- Numbers --------------------------------------------------------------------------------------------------------


def hand_made(path: Path, **options: Any) -> Dataset:
    """Two episodes of 2 and 1 transitions on a grid that one can draw."""
    seen = np.float32([[0, 0], [1, 0], [2, 0], [0, 0], [1, 0]])
    options = {"observation_space": gym.spaces.Box(-1, 2, (2,), np.float32), **options}
    with DatasetWriter.create(
        path, action_space=gym.spaces.Discrete(3), columns={"success": Column(dtype="bool")}, **options
    ) as writer:
        for rows, action, reward, ended in (
            (seen[:3], [0, 2], [1.0, 2.0], True),
            (seen[3:], [0], [1.0], False),
        ):
            writer.add(
                Episode(
                    observation=rows,
                    action=np.array(action),
                    reward=np.float32(reward),
                    terminated=ended,
                    truncated=not ended,
                    columns={"success": np.arange(len(action)) == (len(action) - 1 if ended else -1)},
                )
            )
    return Dataset.open(path)


def test_numbers_by_hand(tmp_path: Path) -> None:
    it = inspect(hand_made(tmp_path / "set", reference={"random": 0.0, "expert": 4.0}))
    assert (it.transitions, it.episodes, it.success) == (3, 2, 0.5)
    assert (it.ret.mean, it.ret.median, it.ret.minimum, it.ret.maximum) == (2.0, 2.0, 1.0, 3.0)
    assert it.ret.std == 1.0 and it.ret.q25 == 1.5
    assert (it.length.mean, it.length.minimum, it.length.maximum) == (1.5, 1, 2)
    assert it.scores is not None
    assert (it.scores.normalized_mean, it.scores.normalized_maximum, it.scores.tq) == (50.0, 75.0, 0.5)
    assert it.reward.kind == "dense" and it.reward.values == 2
    assert (it.reward.mode, it.reward.mode_share) == (1.0, pytest.approx(2 / 3))
    observation = it.vectors[0]
    np.testing.assert_allclose(observation.mean, [0.8, 0.0])
    np.testing.assert_allclose(observation.std, [np.std([0, 1, 2, 0, 1]), 0.0])
    assert observation.at_high.tolist() == [0.2, 0.0] and observation.at_low.tolist() == [0.0, 0.0]
    assert it.action.low.tolist() == [0.0] and it.action.high.tolist() == [2.0]
    assert it.action.at_low.tolist() == [pytest.approx(2 / 3)]
    # Transition 2 is (0, 0), 0, 1, (1, 0), as transition 0 is.
    assert it.repeats.transitions == 1 and it.repeats.first == (2, 0) and it.repeats.episodes == 0
    assert [(one.bins, one.distinct, one.share) for one in it.coverage] == [
        (100, 2, pytest.approx(2 / 3)),
        (10, 2, pytest.approx(2 / 3)),
    ]
    assert (it.ends.terminated, it.ends.truncated, it.ends.longest) == (1, 1, 2)


def test_saco_by_hand(tmp_path: Path) -> None:
    """x in 0 .. 9.9 and one action: 10 bins of width 1 up to the largest, 99 in the reference's range."""

    def line(path: Path, places: Sequence[float], **more: Any) -> Dataset:
        seen = np.float32([*places, places[-1]])[:, None]
        with DatasetWriter.create(
            path,
            observation_space=gym.spaces.Box(-100, 100, (1,), np.float32),
            action_space=gym.spaces.Discrete(2),
            **more,
        ) as writer:
            writer.add(
                Episode(
                    observation=seen,
                    action=np.arange(len(places)) % 2,
                    reward=np.arange(len(places)),
                    terminated=True,
                    truncated=False,
                )
            )
        return Dataset.open(path)

    reference = line(tmp_path / "r", [0, 5, 15, 25, 100, 100.0], reference={"random": 0.0, "expert": 30.0})
    dataset = line(tmp_path / "d", [1, 2, 3, 4, 5, 60])
    it = inspect(dataset, reference)
    fine, coarse = it.coverage
    # 100 bins over [0, 100] are of width 1: six different places. 10 bins: [0, 10) with each of two actions, and 60.
    assert (fine.distinct, coarse.distinct) == (6, 3)
    # Reference, with actions 0 1 0 1 0 1: 0 5 15 25 100 100, six in both grids (0 and 5 differ in the action).
    assert (fine.reference, coarse.reference) == (6, 6)
    assert (fine.saco, coarse.saco) == (1.0, 0.5)
    assert it.scores is not None and it.scores.source.endswith("/r") and it.scores.tq == 0.5  # (15 - 0) / 30
    with pytest.raises(UsageError, match="another observation space"):
        inspect(dataset, write(tmp_path / "x", clean(2)))


def test_counting_more_than_are_counted_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = coverage.hash_rows(np.arange(300_000)[:, None])
    exact = coverage.Distinct(600_000)
    exact.add(hashes)
    exact.add(hashes)
    assert exact.count() == 300_000 and exact.error == 0
    monkeypatch.setattr(coverage, "EXACT", 100)
    for number in (1_000, 100_000, 300_000):
        estimate = coverage.Distinct(2 * number)
        estimate.add(hashes[:number])
        estimate.add(hashes[:number])
        assert estimate.hashes is None and estimate.count() == pytest.approx(number, rel=0.02)
    episodes = clean(40)
    it = inspect(write(tmp_path / "a", episodes * 2))
    half = it.transitions / 2
    assert it.repeats.first is None and it.repeats.transitions == pytest.approx(half, rel=0.05)
    assert it.coverage[0].error > 0 and it.coverage[0].distinct == pytest.approx(half, rel=0.05)
    assert {one.code for one in find(it)} == {"duplicate-episodes"}


def test_hashes() -> None:
    rows = np.float32([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    a, b, c, d = coverage.hash_rows(rows).tolist()
    assert a == b == d != c
    assert coverage.hash_rows(rows[1:2])[0] == a  # whatever else is there
    texts = coverage.hash_rows(["a", "b", "a"]).tolist()
    assert texts[0] == texts[2] != texts[1]
    grid = np.stack(np.meshgrid(np.arange(300.0), np.arange(300.0)), axis=-1).reshape(-1, 2).astype(np.float32)
    assert len(np.unique(coverage.hash_rows(grid))) == len(grid)
    pixels = np.zeros((3, 5, 7), np.uint8)
    pixels[1, 4, 6] = 1
    one, other, again = coverage.hash_rows(pixels).tolist()
    assert one == again != other


def test_statistics_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    column = (1e6 + random.normal(size=(5000, 3))).astype(np.float64)
    column[4321, 1] = np.nan
    monkeypatch.setattr("ctrlrl.data.inspection_columns.BLOCK_NUMBERS", 100)
    box = gym.spaces.Box(-np.inf, 1e6, (3,), np.float64)
    summary = summarize("x", column, "step", box)
    np.testing.assert_allclose(summary.mean, np.nanmean(column, axis=0), rtol=1e-12)
    np.testing.assert_allclose(summary.std, np.nanstd(column, axis=0), rtol=1e-9)
    np.testing.assert_array_equal(summary.maximum, np.nanmax(column, axis=0))
    assert summary.nonfinite == 1 and summary.first_nonfinite == (4321, 1)
    np.testing.assert_allclose(summary.outside, (column > 1e6).mean(axis=0))
    assert summary.first_outside == tuple(np.argwhere(column > 1e6)[0])


def test_small_parts(tmp_path: Path) -> None:
    assert _kolmogorov_smirnov(np.array([0.0, 1, 2, 3]), np.array([2.0, 3, 4, 5])) == 0.5
    assert drawn_rows(5, 9).tolist() == [0, 1, 2, 3, 4]
    drawn = drawn_rows(1000, 100)
    assert len(np.unique(drawn)) == 100 and (np.diff(drawn) > 0).all()
    dataset = hand_made(tmp_path / "set")
    assert [place(dataset, row, "step") for row in range(3)] == [
        "episode 0, step 0",
        "episode 0, step 1",
        "episode 1, step 0",
    ]
    assert place(dataset, 3, "observation") == "episode 1, step 0"
    assert Distribution.of(np.arange(101)).q95 == 95
    assert picture(np.zeros((9, 16, 16), np.uint8)).shape == (16, 16, 3)
    assert picture(np.zeros((4, 8, 8), np.uint8)).shape == (8, 8)
    assert picture(np.zeros((2, 8, 8, 3), np.uint8)).shape == (8, 8, 3)
    assert as_json({"a": np.array([1.0, np.nan]), "b": float("inf")}) == {"a": [1.0, None], "b": None}


# ---- Page and command -----------------------------------------------------------------------------------------------


def check_page(path: Path) -> Page:
    """It stands alone, its references hold, its tags close; returns it."""
    text = path.read_text()
    page = Page(text)
    assert not {"script", "link", "iframe"} & page.tags
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    wanted = {address[1:] for address in page.addresses if address.startswith("#")}
    assert wanted | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    for tag in ("div", "table", "tbody", "tr", "td", "th", "svg", "p", "section", "span", "h2", "h3", "b"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    return page


def test_the_page_holds_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = each(all_terminated, clean())
    write(tmp_path / "set", episodes, env="Pendulum-v1", control_dt=0.05, provenance={"source": "<b>evil</b> $\\frac$"})
    assert command.run([str(tmp_path / "set")]) == 0
    printed = capsys.readouterr().out
    assert "120 episodes of Pendulum-v1" in printed and "error: timeout-as-terminal" in printed
    assert "rows     actions aligned, rewards aligned" in printed and "TQ 0." in printed
    path = tmp_path / "set/inspection.html"
    assert printed.endswith(f"page: {path}\n")
    page = check_page(path)
    for words in (
        "timeout-as-terminal",
        "What to do: values would be learnt that end with the clock",
        "<b>evil</b> $\\frac$",
        "20 Hz",
        "Actions: aligned.",
        "action[1]",
        "highest return",
        "0 of 120",
    ):
        assert words in page.text, words
    assert path.read_text().count("<svg ") == 4 + 1 + 1 + 3
    Dataset.open(tmp_path / "set").verify()  # the page beside the data disturbs nothing
    first = path.read_text()
    assert command.run([str(tmp_path / "set")]) == 0 and path.read_text() == first


def test_json_has_all_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "set", each(constant_action, clean()), reference={})
    other = write(tmp_path / "other", clean())
    assert command.run([str(tmp_path / "set"), "--json", "--reference", str(other.path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "set/inspection.html").exists()
    assert told["transitions"] == other.num_transitions and told["return"]["count"] == 120
    assert told["coverage"][0]["saco"] > 0 and "sample" not in told["action"]
    assert [(one["severity"], one["code"]) for one in told["findings"]] == [("warning", "action-constant")]
    assert told["observation"][0]["low"] == [None] * 4
    arguments = ["--json", "--reference", str(other.path), "--out", str(tmp_path / "deep/page.html")]
    assert command.run([str(tmp_path / "set"), *arguments]) == 0
    assert "no reference returns" not in check_page(tmp_path / "deep/page.html").text  # those of the other dataset


def mixed(path: Path) -> Dataset:
    """Pictures, texts, vectors and ragged columns, with actions of whole numbers."""
    random = np.random.default_rng(0)
    space = gym.spaces.Dict(
        {
            "camera": gym.spaces.Box(0, 255, (12, 16, 3), np.uint8),
            "joints": gym.spaces.Box(-9, 9, (30,), np.float32),
            "task": gym.spaces.Text(100),
        }
    )
    columns = {"tokens": Column(dtype="int64", ragged=True), "said": Column(dtype="text")}
    with DatasetWriter.create(
        path, observation_space=space, action_space=gym.spaces.MultiDiscrete([3, 2]), columns=columns
    ) as writer:
        for _ in range(30):
            n = int(random.integers(5, 20))
            writer.add(
                Episode(
                    observation={
                        "camera": random.integers(0, 255, (n + 1, 12, 16, 3), np.uint8),
                        "joints": random.normal(size=(n + 1, 30)).astype(np.float32),
                        "task": ["push <the> button"] * (n + 1),
                    },
                    action=random.integers(0, 2, (n, 2)),
                    reward=random.normal(size=n),
                    terminated=True,
                    truncated=False,
                    columns={"tokens": [np.arange(random.integers(5)) for _ in range(n)], "said": ["ok"] * n},
                    info={"task": "<i>"},
                )
            )
    return Dataset.open(path)


def test_pictures_texts_and_ragged_columns(tmp_path: Path) -> None:
    it = inspect(mixed(tmp_path / "set"))
    camera, joints, task = it.observation
    assert not isinstance(camera, RaggedSummary) and camera.pooled and 120 < camera.mean[0] < 134
    assert isinstance(task, RaggedSummary) and task.distinct == 1 and task.first == "push <the> button"
    assert [one.name for one in it.vectors] == ["observation.joints"] and joints.rows == it.transitions + 30
    assert it.repeats.transitions == 0 and it.coverage[0].distinct == it.transitions
    assert it.alignment.observations == ("observation.joints",)
    tokens, said = it.columns
    assert isinstance(tokens, RaggedSummary) and tokens.length is not None and tokens.length.maximum == 4
    assert isinstance(said, RaggedSummary) and said.first == "ok"
    assert command.run([str(tmp_path / "set"), "--out", str(tmp_path / "page.html")]) == 0
    page = check_page(tmp_path / "page.html")
    assert "push <the> button" in page.text and "12 × 16 × 3 uint8" in page.text
    assert sum(address.startswith("data:image/png") for address in page.addresses) >= 3 * 6


def test_no_dataset_and_no_episode_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no dataset"):
        command.run([str(tmp_path / "nothing")])
    write(tmp_path / "empty", [])
    with pytest.raises(UsageError, match="holds no episode"):
        command.run([str(tmp_path / "empty")])
    write(tmp_path / "set", clean(3))
    with pytest.raises(UsageError, match="is a folder"):
        command.run([str(tmp_path / "set"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        command.run([])
    assert stopped.value.code == 2


def test_a_single_short_episode_has_a_page(tmp_path: Path) -> None:
    one = simulate(0)
    short = dataclasses.replace(one, observation=one.observation[:2], action=one.action[:1], reward=one.reward[:1])
    write(tmp_path / "set", [short])
    assert command.run([str(tmp_path / "set")]) == 0
    check_page(tmp_path / "set/inspection.html")


def test_a_large_set_in_little_memory(tmp_path: Path) -> None:
    """Blocks bound memory: measured without the rows that are drawn, whose number is bounded as well."""
    import tracemalloc

    random = np.random.default_rng(0)
    space = gym.spaces.Box(-9, 9, (20,), np.float32)
    with DatasetWriter.create(tmp_path / "set", observation_space=space, action_space=ACTION) as writer:
        for _ in range(200):
            writer.add(
                Episode(
                    observation=random.normal(size=(1001, 20)).astype(np.float32),
                    action=random.uniform(-1, 1, (1000, 2)).astype(np.float32),
                    reward=random.normal(size=1000),
                    terminated=False,
                    truncated=True,
                )
            )
    dataset = Dataset.open(tmp_path / "set")
    tracemalloc.start()
    it: Inspection = inspect(dataset)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert it.transitions == 200_000
    assert peak < 100 * 2**20


def test_findings_are_sorted_and_say_what_to_do(tmp_path: Path) -> None:
    worst = each(lambda one: outside(one) | constant_number(one) | all_terminated(one), clean())
    found: list[Finding] = find(inspect(write(tmp_path / "set", worst, reference={})))
    assert [one.severity for one in found] == sorted(
        (one.severity for one in found), key=["error", "warning", "note"].index
    )
    assert {one.code for one in found} == {
        "action-out-of-bounds",
        "timeout-as-terminal",
        "observation-constant",
        "no-reference",
    }
    assert all(len(one.remedy) > 20 and not one.remedy.endswith(".") for one in found)
