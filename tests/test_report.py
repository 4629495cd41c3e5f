"""Reports of synthetic run folders: what is read, what the page says and what it must never hold."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from ctrlrl.cli import report as command
from ctrlrl.errors import UsageError
from ctrlrl.runs import plots
from ctrlrl.runs.comparison import compare, console_summary, write_comparison
from ctrlrl.runs.plots import Series, downsample, panels, short_number
from ctrlrl.runs.record import load_run
from ctrlrl.runs.report import write_report
from tests.pages import Page, evaluation, write_run

ROOT = Path(__file__).parent.parent


# ---- Reading --------------------------------------------------------------------------------------------------------


def test_a_run_reads_as_written(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", status={"state": "finished", "step": 1000}))
    assert (run.algo, run.env, run.seed, run.state, run.step, run.seconds) == (
        "sac",
        "HalfCheetah-v5",
        0,
        "finished",
        1000,
        100.0,
    )
    np.testing.assert_array_equal(run.curve.steps, np.arange(100, 1001, 100))
    np.testing.assert_allclose(run.curve.values, np.arange(1, 11))
    assert set(run.metrics) == {"critic_loss", "actor_loss", "alpha", "odd_one", "steps_per_s"}
    assert run.final is run.best and run.final is not None and run.final.mean == 10.0
    # mean 10, s = sqrt(2), n = 2: 10 -+ 12.7062 * sqrt(2) / sqrt(2)
    assert run.final.interval == pytest.approx((10 - 12.7062, 10 + 12.7062), abs=1e-3)


def test_half_written_and_unknown_lines(tmp_path: Path) -> None:
    new = {"kind": "weather", "step": 1000, "time": 1.0}
    glued = '{"kind":"episode","st{"kind":"note","step":5,"time":1,"text":"x"}\n{"kind":"tra'
    run = load_run(write_run(tmp_path / "a", lines=[new], tail=glued))
    assert run.unreadable == 2
    assert len(run.evaluations) == 10
    assert run.state == "unknown"
    assert "2 lines of its records could not be read" in Page(write_report(tmp_path / "a").read_text()).text


def test_steps_done_again_after_a_kill_count_once(tmp_path: Path) -> None:
    # Killed at 1000 with the last checkpoint at 750; the new session starts there.
    again = [
        {"kind": "episode", "step": 820, "time": 82, "env": 0, "return": 7.0, "length": 70},
        evaluation(800, 80.0),
        evaluation(900, 90.0),
    ]
    run = load_run(write_run(tmp_path / "a", lines=again, sessions=[{"from_step": 0}, {"from_step": 750}]))
    np.testing.assert_array_equal(run.curve.steps, np.arange(100, 901, 100))
    assert run.curve.values[-3:].tolist() == [7.0, 80.0, 90.0]
    assert run.episodes.steps[-2:].tolist() == [700, 820]
    assert run.superseded == 3 + 3
    assert "6 records of steps that were lost" in Page(write_report(tmp_path / "a").read_text()).text


def test_evaluations_made_afterwards_are_not_on_the_curve(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", lines=[evaluation(300, 77.0, checkpoint="best")])
    later = evaluation(1000, 78.0, checkpoint="last")
    del later["time"]
    (folder / "evaluations.jsonl").write_text(json.dumps(later | {"date": "2026-11-21"}) + "\n")
    run = load_run(folder)
    assert len(run.evaluations) == 10
    assert [(one.checkpoint, one.step, one.mean) for one in run.checks] == [("best", 300, 77.0), ("last", 1000, 78.0)]
    assert run.best is not None and run.best.mean == 10.0


def test_what_the_run_marked_best_is_best(tmp_path: Path) -> None:
    marked = evaluation(1100, 5.0) | {"best": True}
    run = load_run(write_run(tmp_path / "a", lines=[marked, evaluation(1200, 6.0)]))
    assert run.best is not None and run.best.step == 1100


def test_refusals_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing does not exist; expected the folder of a run"):
        load_run(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file; expected the folder"):
        load_run(tmp_path / "file")
    write_run(tmp_path / "runs" / "a")
    with pytest.raises(UsageError, match=r"no file config.json.*run folders: a\."):
        load_run(tmp_path / "runs")
    config = tmp_path / "runs" / "a" / "config.json"
    config.write_text('{"algo": "sac"')
    with pytest.raises(UsageError, match=r"config.json is not valid JSON \(.*line 1"):
        load_run(tmp_path / "runs" / "a")
    config.write_text('["sac"]')
    with pytest.raises(UsageError, match=r"config.json is \[\"sac\"\], expected an object; restore it"):
        load_run(tmp_path / "runs" / "a")
    config.write_text('{"algo": "sac"}')
    with pytest.raises(UsageError, match="has no 'env'"):
        load_run(tmp_path / "runs" / "a")
    config.write_text('{"algo": [1], "env": "x"}')
    with pytest.raises(UsageError, match=r"algo of .*config.json is \[1\], expected text; restore it"):
        load_run(tmp_path / "runs" / "a")
    config.write_text('{"algo": "sac", "env": "x", "steps": "many"}')
    with pytest.raises(UsageError, match=r'steps of .*config.json is "many", expected a whole number'):
        load_run(tmp_path / "runs" / "a")
    config.unlink()
    config.mkdir()
    with pytest.raises(UsageError, match=r"no file config\.json"):
        load_run(tmp_path / "runs" / "a")


@pytest.mark.parametrize(
    ("name", "content", "remark"),
    [
        ("provenance.json", None, "provenance.json cannot be read (No such file or directory)"),
        ("provenance.json", {}, "Nothing is known about where this run comes from."),
        ("provenance.json", [], "provenance.json is [], expected an object"),
        ("provenance.json", {"sessions": 3}, "sessions of provenance.json is 3, expected a list"),
        ("provenance.json", {"sessions": [3]}, "item 0 of sessions of provenance.json is 3, expected an object"),
        (
            "provenance.json",
            {"sessions": [{"from_step": "x", "notes": ["y"]}]},
            'from_step of item 0 of sessions of provenance.json is "x", expected a whole number',
        ),
        ("provenance.json", {"hardware": {"memory_gib": [1]}}, "memory_gib of hardware of provenance.json is [1]"),
        ("provenance.json", {"environment": {"control_dt": "x"}}, "control_dt of environment of provenance.json is"),
        ("provenance.json", {"packages": "x", "git": 1, "changed": 2, "started": 3}, "started of provenance.json is 3"),
        ("status.json", [], "status.json is [], expected an object"),
        ("status.json", {"step": "x", "message": 1}, 'step of status.json is "x", expected a whole number'),
        ("videos/best.json", {"step": "x", "return": "y"}, 'return of best.json is "y", expected a number'),
        ("metrics.jsonl", None, "metrics.jsonl cannot be read (No such file or directory)"),
    ],
)
def test_broken_parts_are_left_out_and_named(tmp_path: Path, name: str, content: Any, remark: str) -> None:
    folder = write_run(tmp_path / "a", status={"state": "finished"})
    (folder / "videos").mkdir()
    (folder / "videos" / "best.mp4").write_bytes(b"video")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(json.dumps(content))
    assert remark in Page(write_report(folder).read_text()).text
    assert f"a: {remark}" in Page(write_comparison(compare([folder]), tmp_path / "c.html").read_text()).text
    assert f"a: {remark}" in console_summary(compare([folder]))


@pytest.mark.parametrize("name", ["provenance.json", "status.json", "metrics.jsonl", "evaluations.jsonl"])
def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "a")
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    assert f"{name} cannot be read (Is a directory)" in Page(write_report(folder).read_text()).text


def test_numbers_that_no_run_writes_are_unreadable_lines(tmp_path: Path) -> None:
    huge = "1" + "0" * 400
    values = [
        '"step": Infinity, "time": 1, "return": 1',
        f'"step": {huge}, "time": 1, "return": 1',
        f'"step": 1, "time": {huge}, "return": 1',
        '"step": 1, "time": Infinity, "return": 1',
        f'"step": 1, "time": 1, "return": {huge}',
        '"step": -1, "time": 1, "return": 1',
    ]
    tail = "".join(f'{{"kind": "episode", {value}}}\n' for value in values)
    tail += json.dumps(evaluation(1100, 1.0) | {"lengths": 5}) + "\n"
    folder = write_run(tmp_path / "a", tail=tail)
    assert load_run(folder).unreadable == len(values) + 1
    assert "7 lines of its records could not be read" in Page(write_report(folder).read_text()).text


# ---- One run --------------------------------------------------------------------------------------------------------


def test_report_holds_what_it_promises_and_loads_nothing(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "a",
        success=0.5,
        status={"state": "failed", "step": 1000, "message": "critic_loss became NaN"},
        changed=["agent.gamma"],
        sessions=[{"from_step": 0, "command": "ctrlrl train", "notes": ["environment 0 continues exactly"]}],
    )
    (folder / "videos").mkdir()
    (folder / "videos" / "best.mp4").write_bytes(b"not really a video")
    facts = {"step": 100_000, "checkpoint": "best", "seed": 10_000, "return": 5523.0, "length": 1000, "frames": 500}
    (folder / "videos" / "best.json").write_text(json.dumps(facts))
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text()
    page = Page(text)
    for words in (
        "sac on HalfCheetah-v5",
        "critic_loss became NaN",
        "first 500 of 1,000 steps, return 5,523, best checkpoint at step 100,000, seed 10000",
        "-2.706 to 22.71",
        "50%",
        "9% to 91%",
        "ctrlrl train sac --env HalfCheetah-v5 --steps 1000 --seed 0",
        "ctrlrl resume",
        "environment 0 continues exactly",
        "odd_one",
    ):
        assert words in page.text, words
    assert base64.b64encode(b"not really a video").decode() in text
    assert "script" not in page.tags and "link" not in page.tags
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert re.search(r'<tr class="changed"><th>gamma</th>', text)
    assert not re.search(r'<tr class="changed"><th>hidden</th>', text)
    assert sorted(child.name for child in folder.iterdir() if "report" in child.name) == ["report.html"]


def test_ids_are_unique_references_hold_and_reports_repeat(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    text = write_report(folder).read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)) > 5
    wanted = {address[1:] for address in page.addresses if address.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert wanted and wanted <= set(page.ids)
    assert write_report(folder).read_text() == text


def test_untrusted_words_are_escaped(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script>"><img src=http://x>$\\frac$'
    note = {"kind": "note", "step": 1, "time": 0.1, "text": evil}
    train = {"kind": "train", "step": 1100, "time": 110, "metrics": {evil: 1.0, f"loss{evil}": 1.0}}
    folder = write_run(
        tmp_path / "a", env=evil, algo=evil, lines=[note, train], status={"state": evil, "message": evil}
    )
    for path in (write_report(folder), write_comparison(compare([folder]), tmp_path / "out.html")):
        page = Page(path.read_text())
        assert "script" not in page.tags and "img" not in page.tags
        assert evil in page.text


def test_a_run_without_evaluation_or_video_says_so(tmp_path: Path) -> None:
    reason = "no video: cannot render without OpenGL"
    note = {"kind": "note", "step": 50, "time": 5.0, "text": reason}
    page = Page(write_report(write_run(tmp_path / "a", stop=50, lines=[note], status={"state": "running"})).read_text())
    assert "not evaluated yet" in page.text
    assert f"The run says: {reason}" in page.text
    assert "--video" in page.text


def test_a_video_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrlrl.runs.page._EMBEDDED_BYTES", 10)
    folder = write_run(tmp_path / "a")
    (folder / "videos").mkdir()
    (folder / "videos" / "long.mp4").write_bytes(b"x" * 11)
    page = Page(write_report(folder).read_text())
    assert "video" not in page.tags
    assert "too large to embed: videos/long.mp4" in page.text


@pytest.mark.parametrize(
    ("facts", "caption"),
    [
        ({}, "> best.mp4 <"),
        (
            {"checkpoint": "best", "step": 200, "return": None, "length": 300},
            "> 300 steps, best checkpoint at step 200 <",
        ),
        (
            {"checkpoint": "last", "return": 1.5, "length": 80, "frames": 80},
            "> 80 steps, return 1.5, last checkpoint <",
        ),
    ],
)
def test_captions_say_what_is_known(tmp_path: Path, facts: dict[str, Any], caption: str) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "videos").mkdir()
    (folder / "videos" / "best.mp4").write_bytes(b"video")
    (folder / "videos" / "best.json").write_text(json.dumps(facts))
    found = re.search(r"<figcaption(>.*?<)/figcaption>", write_report(folder).read_text(), flags=re.DOTALL)
    assert found is not None and re.sub(r"\s+", " ", found[1]) == caption


def test_rates_of_steps_without_updates_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rates(step: int, speed: float, updates: float) -> dict[str, Any]:
        record = {"kind": "train", "step": step, "time": 1.0, "steps_per_s": speed, "updates_per_s": updates}
        return record | {"metrics": {"idle": 1.0}}

    shown: dict[str, Series] = {}

    def panels(metrics: dict[str, Series]) -> list[tuple[str, str, dict[str, Series]]]:
        shown.update(metrics)
        return plots.panels(metrics)

    lines = [rates(10, 2500.0, 0.0), rates(20, 2500.0, 0.0), rates(30, 100.0, 100.0), rates(40, 110.0, 110.0)]
    monkeypatch.setattr("ctrlrl.runs.report.plots", SimpleNamespace(**{**vars(plots), "panels": panels}))
    text = Page(write_report(write_run(tmp_path / "a", stop=50, lines=lines)).read_text()).text
    assert shown["steps_per_s"].values.tolist() == [100.0, 110.0]
    assert shown["updates_per_s"].steps.tolist() == [30.0, 40.0]
    assert shown["idle"].steps.tolist() == [10.0, 20.0, 30.0, 40.0]
    assert text.count("Without 2 records of steps that made no update") == 1
    text = Page(write_report(write_run(tmp_path / "b", stop=50, lines=lines[:2])).read_text()).text
    assert shown["steps_per_s"].values.tolist() == [2500.0, 2500.0]  # nothing else to show
    assert "made no update" not in text


def test_pages_are_written_where_asked_or_refused(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / f"a{k}", seed=k)) for k in range(2)]
    (tmp_path / "file").write_text("")
    for folders in (runs[:1], runs):
        target = tmp_path / f"new{len(folders)}" / "deeper" / "x.html"
        assert command.run([*folders, "--out", str(target)]) == 0
        assert target.read_text().startswith("<!DOCTYPE html>")
        with pytest.raises(UsageError, match=rf"{tmp_path} is a folder, .*{tmp_path / 'report.html'}"):
            command.run([*folders, "--out", str(tmp_path)])
        for below in ("x.html", "deeper/x.html"):
            with pytest.raises(UsageError, match=rf"cannot write .*x.html: {tmp_path}/file\S* is not a folder; choose"):
                command.run([*folders, "--out", str(tmp_path / "file" / below)])


def test_a_learned_return_distribution_is_drawn_from_its_mean_and_deviation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(step: int, **metrics: float) -> dict[str, Any]:
        return {"kind": "train", "step": step, "time": 1.0, "updates": step, "metrics": metrics}

    drawn: list[tuple[list[float], list[float]]] = []
    draw = plots.value_distribution
    monkeypatch.setattr(
        plots,
        "value_distribution",
        lambda name, mean, std: drawn.append((list(mean.values), list(std.values))) or draw(name, mean, std),
    )
    lines = [train(2000, q_mean=3.0, q_std=0.5), train(3000, q_mean=4.0, q_std=0.25)]
    page = write_report(write_run(tmp_path / "a", lines=lines)).read_text()
    assert drawn == [([3.0, 4.0], [0.5, 0.25])]
    assert "Value distribution" in page and "Learned return distribution over environment steps" in page
    plain = write_report(write_run(tmp_path / "b", lines=[train(2000, q_mean=3.0)])).read_text()
    assert "Value distribution" not in plain and len(drawn) == 1


def test_a_long_run_makes_a_small_report(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lines = [
        {"kind": "train", "step": step, "time": step / 10, "metrics": {"critic_loss": float(generator.random())}}
        for step in range(1001, 20_001)
    ]
    size = write_report(write_run(tmp_path / "a", lines=lines)).stat().st_size
    assert size < 400_000


def test_reports_do_without_torch() -> None:
    code = "import sys, ctrlrl.runs.comparison, ctrlrl.runs.report, ctrlrl.runs.video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


# ---- Plots ----------------------------------------------------------------------------------------------------------


def test_downsampling_keeps_ends_of_range_and_spikes() -> None:
    values = np.zeros(100_000)
    values[54_321], values[777] = 9.0, -9.0
    thin = downsample(Series(np.arange(100_000.0), values), limit=200)
    assert len(thin.steps) <= 200
    assert thin.values.max() == 9.0 and thin.values.min() == -9.0
    assert thin.steps[thin.values.argmax()] == 54_321
    assert (np.diff(thin.steps) > 0).all()


def test_every_metric_has_a_panel() -> None:
    def flat(value: float) -> Series:
        return Series(np.array([0.0, 1.0]), np.array([value, value]))

    metrics = {"critic_loss": flat(1), "q1_loss": flat(2), "actor_loss": flat(-100), "alpha": flat(0.2)}
    metrics |= {"q_mean": flat(5), "steps_per_s": flat(90), "entropy": flat(-6), "quality": flat(1), "clip": flat(1)}
    found = [(family, set(curves)) for family, _, curves in panels(metrics)]
    assert found == [
        ("Losses", {"critic_loss", "q1_loss"}),
        ("Losses", {"actor_loss"}),
        ("Temperature", {"alpha"}),
        ("Entropy", {"entropy"}),
        ("Q values", {"q_mean"}),
        ("Speed", {"steps_per_s"}),
        ("Other metrics", {"quality"}),
        ("Other metrics", {"clip"}),
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (20_000, "20k"), (1.5e6, "1.5M"), (-300, "-300"), (0.05, "0.05"), (2e9, "2G")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


def test_svg_is_well_formed_and_takes_its_colours_from_the_page() -> None:
    wide = Series(np.array([0.0, 50_000.0, 100_000.0]), np.array([1e-3, 1.0, 1e3]))
    svg = plots.small_panel("a", {"grad $norm$ <b>": wide})
    root = ElementTree.fromstring(svg)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"environment steps", "40k", "100k", "grad $norm$ <b>", "0.001", "1", "1k"} <= set(texts)  # a log axis
    assert "currentColor" in svg and "var(--series-0," in svg and "var(--grid," in svg


def test_plots_keep_their_text_legible_on_a_phone() -> None:
    line = Series(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    svg = plots.small_panel("a", {"x": line, "y": line}, "unit")
    view = re.search(r'viewBox="0 0 ([\d.]+) ', svg)
    width = re.search(r'<svg [^>]*style="min-width: (\d+)px"', svg)
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    assert view is not None and width is not None and len(sizes) > 5
    assert min(sizes) * float(width[1]) / float(view[1]) >= 10
