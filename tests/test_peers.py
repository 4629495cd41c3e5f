"""Peers' returns: reading their files, the difference from ours, what page, console, table and picture say of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from ctrlrl.errors import UsageError
from ctrlrl.runs.comparison import Comparison, compare, console_summary, write_comparison, write_picture, write_table
from ctrlrl.runs.peers import load_peers
from ctrlrl.runs.statistics import pooled_difference
from tests.pages import Page, write_run
from tests.scripts import ROOT

CHEETAH, HOPPER = "HalfCheetah-v5", "Hopper-v5"


def peer_run(env: str, seed: int, final: float, **changes: Any) -> dict[str, Any]:
    """Rises evenly to `final` in ten evaluations, 100 steps apart."""
    evals = [{"step": 100 * k, "returns": [final * k / 10 - 1, final * k / 10 + 1]} for k in range(1, 11)]
    return {"algo": "SAC", "env": env, "seed": seed, "complete": True, "evals": evals, **changes}


def peers_file(path: Path, finals: dict[str, list[float]], **changes: Any) -> Path:
    content: dict[str, Any] = {"what": "Returns of X", "protocol": "as ours", "library": "X 1.0"}
    content["runs"] = [peer_run(env, seed, final) for env, each in finals.items() for seed, final in enumerate(each)]
    content["random"] = {env: {"returns": [0.0, 0.0]} for env in finals}
    path.write_text(json.dumps(content | changes))
    return path


def own_runs(folder: Path, finals: dict[str, list[float]]) -> list[Path]:
    return [
        write_run(folder / f"{env}-{seed}", env=env, seed=seed, curve=lambda step, final=final: final * step / 1000)  # type: ignore[misc]
        for env, each in finals.items()
        for seed, final in enumerate(each)
    ]


def compared(
    tmp_path: Path, ours: dict[str, list[float]], theirs: dict[str, list[float]], **changes: Any
) -> Comparison:
    tmp_path.mkdir(exist_ok=True)
    return compare(own_runs(tmp_path, ours), peers=[peers_file(tmp_path / "peers.json", theirs, **changes)])


def test_the_difference_is_pooled_in_units_of_what_both_sides_learned(tmp_path: Path) -> None:
    ours = {CHEETAH: [110.0, 120.0, 130.0], HOPPER: [10.0, 20.0]}
    theirs = {CHEETAH: [90.0, 100.0, 110.0], HOPPER: [20.0, 30.0, 22.0]}
    random = {CHEETAH: {"returns": [-20.0, -40.0]}, HOPPER: {"returns": [1.0, 2.0, 3.0]}}
    (verdict,) = compared(tmp_path, ours, theirs, random=random).verdicts
    scales = 110 + 30, (10 + 20 + 20 + 30 + 22) / 5 - 2
    tasks = {env: (ours[env], theirs[env], scale) for env, scale in zip(ours, scales, strict=True)}
    assert verdict.final == pooled_difference(tasks, 0.9)
    assert verdict.final is not None and verdict.final.value == pytest.approx((20 / 140 - 9 / 18.4) / 2)
    assert [one.final for one in verdict.envs] == [pooled_difference({e: task}, 0.9) for e, task in tasks.items()]
    # Every curve rises evenly from a tenth of its end: its area is 0.55 of that.
    area = pooled_difference(
        {CHEETAH: (np.multiply(0.55, ours[CHEETAH]), np.multiply(0.55, theirs[CHEETAH]), 90.5)}, 0.9
    )
    assert verdict.envs[0].area is not None
    assert (verdict.envs[0].area.value, verdict.envs[0].area.low) == pytest.approx((area.value, area.low))
    assert [(one.env, one.step, one.random) for one in verdict.envs] == [(CHEETAH, 1000, -30), (HOPPER, 1000, 2)]


@pytest.mark.parametrize(
    ("ours", "word"),
    [([100.0, 104.0, 96.0], "not below"), ([50.0, 54.0, 46.0], "below"), ([150.0, 154.0, 146.0], "above")],
)
def test_the_verdict_goes_by_the_whole_interval(tmp_path: Path, ours: list[float], word: str) -> None:
    theirs = [99.0, 103.0, 95.0]
    comparison = compared(tmp_path / "a", {CHEETAH: ours, HOPPER: ours}, {CHEETAH: theirs, HOPPER: theirs})
    (verdict,) = comparison.verdicts
    assert verdict.word == word
    assert f"verdict: sac is {word} SAC (X 1.0): pooled normalized difference" in console_summary(comparison)
    assert verdict.sentence.endswith("] over 2 environments, 90 % interval.")
    # Exchanged, the difference changes its sign and nothing else.
    (other,) = compared(tmp_path / "b", {CHEETAH: theirs, HOPPER: theirs}, {CHEETAH: ours, HOPPER: ours}).verdicts
    assert verdict.final is not None and other.final is not None
    bounds = -other.final.value, -other.final.high, -other.final.low
    assert (verdict.final.value, verdict.final.low, verdict.final.high) == pytest.approx(bounds)


def test_what_cannot_be_judged_is_left_out_and_said(tmp_path: Path) -> None:
    many = [10.0, 11.0, 12.0]
    finals = {"A-v0": many, "B-v0": many, "C-v0": [10.0], "D-v0": [10.0], "E-v0": many}
    theirs = finals | {"D-v0": many}
    del theirs["E-v0"]
    random = {env: {"returns": [0.0, 0.0]} for env in ("C-v0", "D-v0")} | {"B-v0": {"returns": [10.5, 12.9]}}
    comparison = compared(tmp_path, finals, theirs, random=random)
    (verdict,) = comparison.verdicts
    assert [one.env for one in verdict.envs] == ["A-v0", "B-v0", "C-v0", "D-v0"]
    assert [one.final is None for one in verdict.envs] == [True, True, False, False]
    assert verdict.final == verdict.envs[3].final  # the one environment that is left
    assert verdict.sentence.endswith(" over 1 of 4 environments, 90 % interval.")
    assert [note.partition(":")[0] for note in verdict.notes] == ["A-v0", "B-v0", "C-v0", "D-v0"]
    for note, what in zip(
        verdict.notes, ["no return of a random", "neither side is clearly above", "one run on each side"], strict=False
    ):
        assert what in note
    assert "sac has one run, which has no spread of its own" in verdict.notes[3]
    assert verdict.envs[2].final is not None and math.isnan(verdict.envs[2].final.low)
    (verdict,) = compared(tmp_path / "none", {CHEETAH: many}, {CHEETAH: many}, random={}).verdicts
    assert verdict.word == "no verdict" and "no environment allows one" in verdict.sentence


def test_who_learned_nothing_beside_one_that_did_stays_in(tmp_path: Path) -> None:
    nothing, much = [1.0, 0.0, -1.0], [90.0, 100.0, 110.0]
    (verdict,) = compared(tmp_path, {CHEETAH: nothing, HOPPER: much}, {CHEETAH: much, HOPPER: much}).verdicts
    assert verdict.envs[0].final is not None
    # All together learned 301 above random in 6 runs there (the run below random counts as 0): 100 / (301 / 6) = 1.99.
    assert verdict.envs[0].final.value == pytest.approx(-100 / (301 / 6))
    assert verdict.final is not None and verdict.final.value == pytest.approx(verdict.envs[0].final.value / 2)
    assert verdict.word == "below"


def test_random_returns_may_come_from_elsewhere_but_the_file_comes_first(tmp_path: Path) -> None:
    runs = own_runs(tmp_path, {CHEETAH: [10.0, 11.0]})
    bare = peers_file(tmp_path / "p.json", {CHEETAH: [10.0, 12.0]}, random={})
    (verdict,) = compare(runs, peers=[bare], random={CHEETAH: np.array([1.0, 3.0])}).verdicts
    assert verdict.envs[0].random == 2.0
    full = peers_file(tmp_path / "q.json", {CHEETAH: [10.0, 12.0]})
    (verdict,) = compare(runs, peers=[full], random={CHEETAH: np.array([1.0, 3.0])}).verdicts
    assert verdict.envs[0].random == 0.0


def test_the_same_seed_of_a_peer_counts_once_and_incomplete_runs_do_not(tmp_path: Path) -> None:
    runs = own_runs(tmp_path, {CHEETAH: [10.0, 11.0]})
    first = peers_file(tmp_path / "first.json", {CHEETAH: [10.0, 12.0]})
    extra = [peer_run(CHEETAH, 1, 99.0), peer_run(CHEETAH, 2, 14.0), peer_run(CHEETAH, 3, 50.0, complete=False)]
    second = peers_file(tmp_path / "second.json", {CHEETAH: []}, runs=extra)
    comparison = compare(runs, peers=[first, second])
    (verdict,) = comparison.verdicts
    assert sorted(verdict.envs[0].peers) == [10.0, 12.0, 14.0]
    summary = console_summary(comparison)
    assert "are the same seed (1)" in summary and f"only first: SAC {CHEETAH} 1 counts" in summary
    assert f"second.json: SAC {CHEETAH} 3 is not complete and left out." in summary


def test_an_algorithm_meets_its_like_and_a_new_one_all(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{algo}-{k}", algo=algo, seed=k) for algo in ("sac", "newest") for k in range(2)]
    theirs = [peer_run(CHEETAH, k, 9.0 + k, algo=algo) for algo in ("SAC", "TD3") for k in range(2)]
    peers = peers_file(tmp_path / "p.json", {CHEETAH: []}, runs=theirs)
    verdicts = compare(runs, peers=[peers]).verdicts
    pairs = [(one.ours, one.peers) for one in verdicts]
    assert pairs == [("newest", "SAC (X 1.0)"), ("newest", "TD3 (X 1.0)"), ("sac", "SAC (X 1.0)")]


def test_page_table_and_picture_show_both_sides(tmp_path: Path) -> None:
    finals = {CHEETAH: [100.0, 110.0, 120.0], HOPPER: [10.0]}
    theirs = {CHEETAH: [90.0, 100.0, 110.0], HOPPER: [20.0, 30.0], "Walker2d-v5": [1.0]}
    comparison = compared(tmp_path, finals, theirs)
    page = Page(write_comparison(comparison, tmp_path / "c.html").read_text())
    assert "sac on HalfCheetah-v5, Hopper-v5" in page.text and "4 runs compared" in page.text
    assert "sac against SAC (X 1.0) sac is not below SAC (X 1.0)" in page.text
    assert "HalfCheetah-v5 1,000 3 and 3 110 100 0 +0.10" in page.text
    assert "Returns of X. Protocol: as ours." in page.text
    assert "Walker2d" not in page.text  # nothing of ours to compare with
    assert "agent.gamma" not in page.text  # settings that peers do not tell are no difference
    table = write_table(comparison, tmp_path / "t.md").read_text()
    assert "| HalfCheetah-v5, 1,000 steps | 110 (100, 110, 120) | 100 (90, 100, 110) | 0 | +0.10 [" in table
    assert "| Hopper-v5, 1,000 steps | 10 | 25 (20, 30) | 0 | -0.75 [" in table
    assert "\nctrlrl sac is not below SAC (X 1.0): pooled normalized difference of the final return -0.3" in table
    picture = write_picture(comparison, tmp_path / "p.svg")
    text = picture.read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    for words in ("HalfCheetah-v5, 3 seeds each", "Hopper-v5, 1 and 2 seeds", "ctrlrl sac", "SAC (X 1.0)"):
        assert f"<!-- {words} -->" in text
    assert "fill: #ffffff" in text  # reads on dark pages, too
    assert write_picture(comparison, tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert write_picture(comparison, tmp_path / "again.svg").read_text() == text


def test_what_cannot_be_drawn_or_tabled_is_refused(tmp_path: Path) -> None:
    comparison = compare(own_runs(tmp_path, {CHEETAH: [1.0, 2.0]}))
    with pytest.raises(UsageError, match=r"p\.jpg must end in \.svg or \.png"):
        write_picture(comparison, tmp_path / "p.jpg")
    with pytest.raises(UsageError, match=r"t\.md was to hold the comparison with peers"):
        write_table(comparison, tmp_path / "t.md")


def test_the_figures_in_the_docs_are_a_peers_file() -> None:
    peers = load_peers(ROOT / "docs" / "data" / "peer_returns.json")
    found = {env: [run.seed for run in peers.runs if run.env == env] for env in peers.random}
    assert found == {CHEETAH: [0, 1, 2], HOPPER: [0, 1, 2], "Walker2d-v5": [1]}
    assert all([one.step for one in run.evaluations] == list(range(10_000, 100_001, 10_000)) for run in peers.runs)
    assert [round(run.evaluations[-1].mean) for run in peers.runs[:3]] == [4674, 3374, 5283]
    assert {run.algo for run in peers.runs} == {"SAC (SBX 0.28.0)"}
    assert all(len(returns) == 20 for returns in peers.random.values())
    assert "SBX 0.28.0" in peers.what and peers.protocol


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"what": 3}, r"what of the peers file .*p\.json is 3, expected text"),
        ({"runs": {}}, r"runs of the peers file .* is \{\}, expected a list"),
        ({"runs": [3]}, r"runs\[0\] of the peers file .* is 3, expected an object"),
        ({"runs": [{"algo": "SAC"}]}, r"runs\[0\]\.env of the peers file .* is missing"),
        ({"runs": [peer_run("A", True, 1.0)]}, r"runs\[0\]\.seed .* is true, expected a whole number"),
        ({"runs": [peer_run("A", 0, 1.0, evals=[{"step": 5, "returns": []}])]}, r"evals\[0\]\.returns .* finite"),
        ({"runs": [peer_run("A", 0, 1.0, evals=[{"step": 5, "returns": ["x"]}])]}, r"evals\[0\]\.returns .* finite"),
        (
            {"runs": [peer_run("A", 0, 1.0, evals=[{"step": 5, "returns": [1]}, {"step": 5, "returns": [1]}])]},
            r"evals\[1\] .* has step 5, which is not above",
        ),
        ({"random": {"A": [1.0]}}, r"random\.A of the peers file .* is \[1\.0\], expected an object"),
        ({"library": ["X"]}, r"library .* expected text"),
    ],
)
def test_bad_peers_files_are_refused_by_file_and_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_peers(peers_file(tmp_path / "p.json", {}, **change))


def test_a_file_without_library_is_called_by_its_name(tmp_path: Path) -> None:
    file = peers_file(tmp_path / "theirs.json", {CHEETAH: [1.0]})
    content = json.loads(file.read_text())
    del content["library"], content["random"]
    file.write_text(json.dumps(content))
    peers = load_peers(file)
    assert [run.algo for run in peers.runs] == ["SAC (theirs)"] and peers.random == {}
