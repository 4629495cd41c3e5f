"""Comparisons of synthetic run folders: what is computed over seeds, and what the page and the console say of it."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ctrlrl.cli import report as command
from ctrlrl.errors import UsageError
from ctrlrl.runs.comparison import compare, console_summary, run_summary, write_comparison
from ctrlrl.runs.report import write_report
from tests.pages import Page, evaluation, write_run


def scaled(factor: float) -> Callable[[int], float]:
    return lambda step: factor * step / 100


def test_comparison_computes_over_seeds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"sac-{k}", seed=k, curve=scaled(k + 1)) for k in range(5)]
    runs += [write_run(tmp_path / f"td3-{k}", algo="td3", seed=k, curve=scaled(0.5)) for k in range(2)]
    page = Page(write_comparison(compare(runs), tmp_path / "out" / "c.html").read_text())
    # sac ends at 10, 20, 30, 40, 50: IQM 30. Its areas are 5.5 times 1..5: IQM 16.5.
    assert re.search(r"sac 5 30 [\d.]+ to [\d.]+ 16.5 ", page.text)
    assert "td3 2 5 5 to 5 2.75 2.75 to 2.75 0 of 2 –" in page.text
    assert "Threshold: 40 (80 % of the best final return, 50)" in page.text
    assert "sac 3 sac-3 1,000 40 27.29 to 52.71 40 22 1,000" in page.text  # reaches 40 at its end
    assert "sac 4 sac-4 1,000 50 37.29 to 62.71 50 27.5 800" in page.text
    assert "fewer than five seeds" in page.text
    summary = console_summary(compare(runs))
    assert "HalfCheetah-v5: IQM of the evaluation return at step 1,000" in summary
    assert re.search(r"sac  5 seeds  30 \[[\d.]+, [\d.]+\]", summary)


def test_a_given_threshold_and_a_negative_best(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", env="Pendulum-v1", curve=lambda step: -1100 + step)]
    given = Page(write_comparison(compare(runs, threshold=-600.0), tmp_path / "c.html").read_text()).text
    assert "Threshold: -600 (as given)" in given and " 500 " in given
    # From -1000 at step 100 to -100 at step 1000: four fifths of the way is -280, first reached at 900.
    default = Page(write_comparison(compare(runs), tmp_path / "c.html").read_text()).text
    assert "Threshold: -280 (80 % of the way from the lowest first evaluation, -1,000, to the best" in default
    assert "1 of 1 900" in default


def test_settings_make_groups_and_are_told_apart(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", agent={"gamma": 0.9}),
        write_run(tmp_path / "b"),
        write_run(tmp_path / "c", seed=1),
    ]
    page = Page(write_comparison(compare(runs), tmp_path / "c.html").read_text())
    assert "sac (gamma=0.9) 1 10 – " in page.text
    assert "sac (gamma=0.99) 2 10 10 to 10" in page.text
    assert "agent.gamma 0.9 0.99" in page.text


def test_equal_seeds_and_unequal_lengths_are_said(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", seed=0),
        write_run(tmp_path / "twin", seed=0, stop=500),
        write_run(tmp_path / "b", seed=1, stop=700, status={"state": "interrupted", "step": 700}),
    ]
    summary = console_summary(compare([*runs, runs[0]]))
    assert "a and twin are the same seed (0)" in summary and "only a counts" in summary
    assert "at step 700" in summary and "b (interrupted) sets it" in summary
    assert "2 seeds  7 [7, 7]" in summary
    assert "1 of the folders given are repetitions" in summary


def test_runs_without_common_steps_or_evaluations(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", stop=200), write_run(tmp_path / "new", seed=2, stop=50)]
    late = [evaluation(step, 3.0) for step in (500, 600)]
    runs.append(write_run(tmp_path / "late", seed=1, stop=50, lines=late))
    page = Page(write_comparison(compare(runs), tmp_path / "c.html").read_text())
    assert "new has no evaluation yet" in page.text
    assert "share no range of evaluated steps" in page.text
    assert "no step in common" in console_summary(compare(runs))


def test_scales_are_not_mixed_but_success_rates_are(tmp_path: Path) -> None:
    cheetah = [write_run(tmp_path / f"h{k}", seed=k, success=0.4) for k in range(2)]
    reach = [write_run(tmp_path / f"r{k}", env="FetchReach-v4", seed=k, success=0.8) for k in range(2)]
    page = Page(write_comparison(compare([*cheetah, *reach]), tmp_path / "c.html").read_text())
    assert "sac 0.6 0.6 to 0.6" in page.text  # the same share in each environment: nothing for the bootstrap to vary
    other = write_run(tmp_path / "p", env="Pendulum-v1")
    page = Page(write_comparison(compare([*cheetah, *reach, other]), tmp_path / "c.html").read_text())
    assert "Returns of different environments have different scales" in page.text
    assert "success rate" not in page.text


def test_comparison_links_to_reports_that_exist_and_embeds_a_video_per_group(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "runs" / f"a{k}", seed=k) for k in range(2)]
    for run in runs:
        (run / "videos").mkdir()
        (run / "videos" / "best.mp4").write_bytes(run.name.encode())
    write_report(runs[1])
    page = Page(write_comparison(compare(runs), tmp_path / "out" / "c.html").read_text())
    outside = [address for address in page.addresses if not address.startswith("#")]
    assert outside == ["../runs/a1/report.html", "data:video/mp4;base64," + base64.b64encode(b"a0").decode()]


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one run folder"):
        write_comparison(compare([]), tmp_path / "c.html")


def test_thresholds_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / f"a{k}", seed=k)) for k in range(2)]
    with pytest.raises(UsageError, match="--threshold compares several runs, got one"):
        command.run([runs[0], "--threshold", "5"])
    for value in ("nan", "inf", "-inf"):
        with pytest.raises(UsageError, match=f"must be a finite return, got {value}"):
            command.run([*runs, "--out", str(tmp_path / "c.html"), f"--threshold={value}"])
    assert not (tmp_path / "c.html").exists()


def test_summary_of_one_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", status={"state": "interrupted", "step": 1000, "message": "Ctrl-C"})
    assert run_summary(run).splitlines() == [
        "sac on HalfCheetah-v5, seed 0: 1,000 steps in 2 min (interrupted)",
        "  Ctrl-C",
        "  final return 10 [-2.706, 22.71], 95 % interval over 2 episodes",
        "  best return 10 at step 1,000",
    ]
