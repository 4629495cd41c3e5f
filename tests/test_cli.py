"""The command line: what it prints on bad input (kept in `tests/messages/`), exit codes, start-up time.

To take new messages on: UPDATE_MESSAGES=1 scripts/test tests/test_cli.py, then read the diff.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tests.standins  # noqa: F401  (registers ctrlrl-test/...)
from ctrlrl import files
from ctrlrl.cli.main import run as ctrlrl_command
from ctrlrl.errors import UsageError
from ctrlrl.runs.folder import RunFolder

MESSAGES = Path(__file__).parent / "messages"
QUICK = "--steps 150 --learning-starts 50 --eval-every 0 --checkpoint-every 70 --threads 1 --no-video --quiet"
TINY = f"{QUICK} --agent.hidden 8 --agent.batch-size 8"

# name: (command, exit code). {tmp} is an empty folder, {run} a finished run, {copy} a copy of it to be damaged.
CASES = {
    "no-command": ("", 2),
    "unknown-command": ("trian", 2),
    "no-algorithm": ("train", 2),
    "unknown-algorithm": ("train scac --env Pendulum-v1", 2),
    "no-environment": ("train sac", 2),
    "unknown-environment": ("train sac --env HalfChetah-v5", 2),
    "old-version": ("train sac --env HalfCheetah-v3", 2),
    "unknown-module": ("train sac --env no_such_module:Thing-v0", 2),
    "missing-package": ("train sac --env LunarLanderContinuous-v3", 2),
    "bad-env-kwargs": ('train sac --env Pendulum-v1 --env-kwargs {{"gravty":1}}', 2),
    "env-kwargs-not-json": ("train sac --env Pendulum-v1 --env-kwargs gravity=1", 2),
    "env-python-missing": ("train sac --env Pendulum-v1 --env-python {tmp}/python", 2),
    "discrete-actions": ("train sac --env CartPole-v1", 2),
    "multi-discrete-actions": ("train sac --env ctrlrl-test/MultiDiscrete-v0", 2),
    "unbounded-actions": ("train sac --env ctrlrl-test/Unbounded-v0", 2),
    "image-observation": ("train sac --env ctrlrl-test/Image-v0", 2),
    "pixels-too-few": ("train sac --env Pendulum-v1 --pixels 4", 2),
    "pixels-undrawable": ("train sac --env ctrlrl-test/Walk-v0 --pixels 48", 2),
    "grayscale-without-pixels": ("train sac --env Pendulum-v1 --grayscale", 2),
    "frame-stack-without-images": ("train sac --env Pendulum-v1 --frame-stack 3", 2),
    "shift-negative": ("train sac --env Pendulum-v1 --agent.random-shift -1", 2),
    "discrete-observation": ("train sac --env Taxi-v4", 2),
    "unknown-flag": ("train sac --env Pendulum-v1 --agent.gama 0.9", 2),
    "flag-of-wrong-type": ("train sac --env Pendulum-v1 --agent.batch-size many", 2),
    "flag-out-of-range": ("train sac --env Pendulum-v1 --agent.gamma 1.5", 2),
    "flag-not-among-choices": ("train sac --env Pendulum-v1 --backend gpu", 2),
    "no-environments": ("train sac --env Pendulum-v1 --num-envs 0", 2),
    "capacity-below-environments": ("train sac --env Pendulum-v1 --num-envs 8 --buffer.capacity 4", 2),
    "unknown-device": ("train sac --env Pendulum-v1 --device tpu", 2),
    "config-missing": ("train sac --env Pendulum-v1 --config {tmp}/none.yaml", 2),
    "config-unknown-field": ("train sac --env Pendulum-v1 --config {tmp}/unknown.yaml", 2),
    "config-wrong-type": ("train sac --env Pendulum-v1 --config {tmp}/type.yaml", 2),
    "config-other-algorithm": ("train sac --env Pendulum-v1 --config {tmp}/other.json", 2),
    "out-holds-a-run": ("train sac --env Pendulum-v1 --out {run}", 2),
    "out-not-empty": ("train sac --env Pendulum-v1 --out {tmp}", 2),
    "nan-observation": ('train sac --env ctrlrl-test/Nan-v0 --env-kwargs {{"at_step":30}} --out {tmp}/nan ' + TINY, 3),
    "resume-nothing": ("resume {tmp}/none", 2),
    "resume-no-run": ("resume {tmp}", 2),
    "resume-fewer-steps": ("resume {run} --steps 100", 2),
    "resume-unknown-checkpoint": ("resume {run} --checkpoint step-5", 2),
    "eval-without-best": ("eval {run}", 2),
    "eval-no-episodes": ("eval {run} --checkpoint last --episodes 0", 2),
    "eval-grid-malformed": ("eval {run} --checkpoint last --video-grid 4", 2),
    "eval-grid-too-large": ("eval {run} --checkpoint last --video-grid 4x21", 2),
    "flag-not-finite": ("train sac --env Pendulum-v1 --agent.target-entropy nan", 2),
    "batch-too-large": ("train sac --env Pendulum-v1 --agent.batch-size 1000000000000", 2),
    "replay-too-large": ("train sac --env HalfCheetah-v5 --buffer.capacity 100000000000 --out {tmp}/new", 2),
    "worker-timeout-infinite": ("train sac --env Pendulum-v1 --backend workers --worker-timeout inf", 2),
    "config-not-json": ("train sac --env Pendulum-v1 --config {tmp}/date.yaml", 2),
    "relative-module": ("train sac --env .x:Pendulum-v1", 2),
    "out-is-a-file": ("train sac --env Pendulum-v1 --out {tmp}/type.yaml", 2),
    "out-inside-a-file": ("train sac --env Pendulum-v1 --out {tmp}/type.yaml/run", 2),
    "out-too-long": ("train sac --env Pendulum-v1 --out {tmp}/" + "x" * 300, 2),
    "eval-unknown-device": ("eval {run} --checkpoint last --device foo", 2),
    "eval-checkpoint-pattern": ("eval {run} --checkpoint step-*", 2),
    "report-out-is-a-folder": ("report {run} --out {tmp}", 2),
    "report-threshold-for-one": ("report {run} --threshold 5", 2),
    "report-no-run": ("report {tmp}", 2),
    "report-nothing": ("report", 2),
    "report-peers-missing": ("report {run} --peers {tmp}/none.json", 2),
    "report-peers-not-json": ("report {run} --peers {tmp}/unknown.yaml", 2),
    "report-peers-without-runs": ("report {run} --peers {tmp}/other.json", 2),
    "report-table-without-peers": ("report {run} --table {tmp}/table.md", 2),
    "report-picture-for-one": ("report {run} --picture {tmp}/picture.svg", 2),
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "finished"
    assert ctrlrl_command(f"train sac --env Pendulum-v1 --no-preset --out {path} {TINY}".split()) == 0
    return path


def invoke(command: list[str], capsys) -> tuple[int, str, str]:
    try:
        code = ctrlrl_command(command)
    except SystemExit as stop:  # tyro's own way out
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def check(name: str, text: str) -> None:
    path = MESSAGES / f"{name}.txt"
    if os.environ.get("UPDATE_MESSAGES"):
        os.makedirs(MESSAGES, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"no message kept for {name}: UPDATE_MESSAGES=1"
    assert text == path.read_text()


def normalized(text: str, *folders: tuple[Path, str]) -> str:
    for folder, name in folders:
        text = text.replace(str(folder), name)
    text = re.sub(r"\d+ bytes instead of \d+", "N bytes instead of M", text.replace(sys.executable, "PYTHON"))
    text = re.sub(r"has [\d.,]+ GiB of memory", "has X GiB of memory", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.yaml").write_text("agent: {gama: 0.9}\n")
    (tmp_path / "type.yaml").write_text("steps: soon\n")
    (tmp_path / "date.yaml").write_text("env_kwargs: {day: 2026-11-21}\n")
    (tmp_path / "other.json").write_text('{"algo": "td3"}\n')
    return tmp_path


def everything_under(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_clear_message(name, folder, finished_run, capsys):
    command, expected = CASES[name]
    before = everything_under(finished_run), everything_under(folder)
    code, out, err = invoke(command.format(tmp=folder, run=finished_run).split(), capsys)
    assert code == expected, err
    assert "Traceback" not in err + out
    check(name, normalized(err or out, (finished_run, "RUN"), (folder, "FOLDER")))
    if expected == 2:  # nothing overwritten, nothing begun
        assert (everything_under(finished_run), everything_under(folder)) == before


DAMAGE = {
    "checkpoint-truncated": ("tensors.safetensors", lambda data: data[: len(data) // 2]),
    "checkpoint-altered": ("tensors.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "checkpoint-state-altered": ("state.json", lambda data: data.replace(b'"env_steps": 150', b'"env_steps": 151')),
    "checkpoint-manifest-cut": ("manifest.json", lambda data: data[:30]),
    "checkpoint-manifest-gone": ("manifest.json", None),
    "checkpoint-of-the-future": ("manifest.json", lambda data: data.replace(b'"format": 1', b'"format": 2')),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("command", ["resume {run} --steps 200", "eval {run} --checkpoint last"])
def test_damaged_checkpoints_are_refused(name, command, folder, finished_run, capsys):
    copy = folder / "copy"
    shutil.copytree(finished_run, copy)
    file, change = DAMAGE[name]
    path = RunFolder(copy).find_checkpoint("last") / file
    if change is None:
        path.unlink()
    else:
        changed = change(path.read_bytes())
        assert changed != path.read_bytes()
        path.write_bytes(changed)
    before = everything_under(copy)
    code, _, err = invoke(command.format(run=copy).split(), capsys)
    assert code == 2
    check(name, normalized(err, (folder, "FOLDER")))
    assert everything_under(copy) == before
    if name == "checkpoint-truncated" and command.startswith("resume"):  # the remedy it names works
        remedy = re.search(r"--checkpoint (step-\d+)", err)
        assert remedy
        assert invoke(["resume", str(copy), "--checkpoint", remedy[1], "--quiet"], capsys)[0] == 0


@pytest.mark.parametrize("how", ["altered", "missing"])
def test_damaged_replay_is_refused(how, folder, finished_run, capsys):
    copy = folder / "copy"
    shutil.copytree(finished_run, copy)
    segment = next((copy / "replay").glob("rows-*"))
    if how == "missing":
        segment.unlink()
    else:
        segment.write_bytes(segment.read_bytes()[:-3] + b"xyz")
    code, _, err = invoke(["resume", str(copy), "--steps", "200", "--quiet"], capsys)
    assert code == 2
    check(f"replay-{how}", normalized(err, (folder, "FOLDER")))


BROKEN = {
    "config-json-list": ("config.json", "[]"),
    "config-json-algo": ("config.json", '{"algo": [1]}'),
    "config-json-cut": ("config.json", '{"algo": "sac", "env"'),
    "provenance-empty": ("provenance.json", "{}"),
    "provenance-list": ("provenance.json", "[]"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", ["resume {run} --steps 200", "eval {run} --checkpoint last", "report {run}"])
def test_broken_run_folders_are_explained(name, command, folder, finished_run, capsys):
    copy = folder / "copy"
    shutil.copytree(finished_run, copy)
    file, content = BROKEN[name]
    (copy / file).write_text(content)
    code, out, err = invoke(command.format(run=copy).split(), capsys)
    if command.startswith("report") and name.startswith("provenance"):
        assert code == 0  # a page can do without, and says so
        assert "provenance.json" in out or "Nothing is known about where this run comes from" in out
        return
    assert code == 2
    assert "Traceback" not in err
    check(f"{name}-{command.split()[0]}", normalized(err, (folder, "FOLDER")))


def in_a_process(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")} | environment
    words = [sys.executable, "-m", "ctrlrl", *command.split()]
    root = Path(__file__).parents[1]
    return subprocess.run(words, capture_output=True, text=True, env=variables, cwd=root, timeout=120)


def test_a_machine_that_cannot_draw_still_finishes_its_training(folder):
    """glfw wants a display: what MuJoCo raises then is what a machine without EGL gives, too."""
    quick = TINY.replace("--no-video --quiet", "")
    done = in_a_process(f"train sac --env HalfCheetah-v5 --out {folder}/run {quick}", MUJOCO_GL="glfw")
    assert done.returncode == 0, done.stderr
    assert "no video: cannot render:" in done.stdout
    assert "libegl1 libegl-mesa0 libgl1-mesa-dri libgles2" in done.stdout
    assert json.loads((folder / "run" / "status.json").read_text())["state"] == "finished"
    done = in_a_process(f"eval {folder}/run --checkpoint last --episodes 1 --video", MUJOCO_GL="glfw")
    assert done.returncode == 2
    assert "libegl1 libegl-mesa0 libgl1-mesa-dri libgles2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_real_limit_on_file_sizes_is_a_full_disk(folder):
    """The kernel refuses files beyond 300 kB: wherever that strikes, one message, exit 2, and the run goes on later."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from ctrlrl.cli.main import run\n"
        "import ctrlrl.training.session\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    words = f"train sac --env HalfCheetah-v5 --out {folder}/run --steps 5000 --learning-starts 4900 --eval-every 0"
    words += " --checkpoint-every 500 --log-every 1 --threads 1 --no-video --quiet --agent.hidden 8"
    command = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    assert done.returncode == 2, done.stderr
    assert "no space left to write" in done.stderr
    assert "Traceback" not in done.stderr
    run = RunFolder(folder / "run")
    assert json.loads((run.path / "status.json").read_text())["state"] == "failed"
    assert in_a_process(f"resume {run.path} --quiet").returncode == 0
    assert run.find_checkpoint("last").name == "step-000000005000"


def test_a_disk_that_is_too_small_is_noticed_before_the_start(folder, capsys, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50 * 2**20))
    code, _, err = invoke(f"train sac --env HalfCheetah-v5 --out {folder}/run".split(), capsys)
    assert code == 2
    check("disk-too-small", normalized(err, (folder, "FOLDER")))
    assert not (folder / "run").exists()


def test_a_disk_that_fills_up_loses_nothing(folder, capsys, monkeypatch):
    """The third checkpoint finds no space: the second one stays, and the run goes on from it once there is some."""
    original, count = files.write_durably, 0

    def write(path, content):
        nonlocal count
        count += "step-000000000150" in str(path)
        if "step-000000000150" in str(path):
            with files.write_errors_explained(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        original(path, content)

    monkeypatch.setattr("ctrlrl.runs.checkpoint.write_durably", write)
    code, _, err = invoke(f"train sac --env Pendulum-v1 --no-preset --out {folder}/run {TINY}".split(), capsys)
    assert (code, count) == (2, 1)
    check("disk-full", re.sub(r"\.tmp-\d+", ".tmp-PID", normalized(err, (folder, "FOLDER"))))
    run = RunFolder(folder / "run")
    assert [p.name for p in run.step_checkpoints()] == ["step-000000000070", "step-000000000140"]
    assert not list(run.path.rglob(".tmp-*"))
    monkeypatch.undo()
    assert invoke(["resume", str(run.path), "--quiet"], capsys)[0] == 0
    assert run.find_checkpoint("last").name == "step-000000000150"


def test_no_permission_is_explained(folder, capsys, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # the tests may run as root, whom no mode stops
    code, _, err = invoke(f"train sac --env Pendulum-v1 --out {folder}/run".split(), capsys)
    assert code == 2
    check("no-permission", normalized(err, (folder, "FOLDER")))


def test_the_whole_round(folder, capsys):
    run = folder / "run"
    command = f"train sac --env Pendulum-v1 --no-preset --out {run} --steps 300 --learning-starts 50 --eval-every 100"
    command += " --eval-episodes 3 --threads 1 --no-video --agent.hidden 16 --agent.batch-size 16"
    code, out, _ = invoke(command.split(), capsys)
    assert code == 0
    assert f"report: {run}/report.html" in out
    assert "step 300: evaluation return" in out
    code, out, _ = invoke(["resume", str(run), "--steps", "400"], capsys)
    assert code == 0
    assert "resumed at step 300; continues exactly" in out
    code, out, _ = invoke(["eval", str(run), "--episodes", "4"], capsys)
    assert code == 0
    assert re.search(r"mean return -[\d,.]+, 95 % interval \[-[\d,.]+, -[\d,.]+\], 4 episodes", out)
    code, out, _ = invoke(["report", str(run)], capsys)
    assert code == 0
    assert "Pendulum-v1" in (run / "report.html").read_text()
    # The run's own config.json trains the same thing again.
    again = folder / "again"
    code, _, _ = invoke(["train", "sac", "--config", str(run / "config.json"), "--out", str(again), "--quiet"], capsys)
    assert code == 0
    first, second = (json.loads((p / "config.json").read_text()) for p in (run, again))
    assert {k: v for k, v in first.items() if k != "out"} == {k: v for k, v in second.items() if k != "out"}
    code, out, _ = invoke(["report", str(run), str(again), "--out", str(folder / "both.html")], capsys)
    assert code == 0
    assert (folder / "both.html").stat().st_size > 10_000
    code, out, _ = invoke(["envs", "cheetah"], capsys)
    assert (code, out.split()[:2]) == (0, ["HalfCheetah-v5", "mujoco"])
    code, out, _ = invoke(["algos"], capsys)
    assert (code, out.split()[0]) == (0, "sac")


def test_dry_run_shows_preset_and_changes_and_writes_nothing(folder, capsys):
    before = everything_under(folder)
    code, out, _ = invoke(["train", "sac", "--env", "Swimmer-v5", "--dry-run", "--agent.batch-size", "128"], capsys)
    assert code == 0
    check("dry-run", out)
    assert everything_under(folder) == before


def test_flags_go_before_the_file_and_the_file_before_the_preset(folder, capsys):
    (folder / "c.yaml").write_text("agent: {gamma: 0.9, tau: 0.1}\n")
    command = "train sac --env Swimmer-v5 --dry-run --config c.yaml --agent.tau 0.2"
    _, out, _ = invoke(command.split(), capsys)
    assert "* agent.gamma: 0.9\n* agent.tau: 0.2\n" in out


@pytest.mark.parametrize(
    "command",
    ["--help", "train sac --help", "train sac --env X --agent.gama 1", "play --help", "envs", "algos", "robots"],
)
def test_quick_answers_do_not_import_torch(command):
    """Torch takes seconds to import; help and typing errors must not wait for it."""
    code = (
        "import sys; from ctrlrl.cli.main import run\n"
        f"try: run({command.split()!r})\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(folder):
    run = folder / "run"
    command = [sys.executable, "-m", "ctrlrl", *f"train sac --env Pendulum-v1 --out {run} --steps 1000000".split()]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    try:
        while not run.exists() or not RunFolder(run).step_checkpoints():  # before, it is given up
            assert process.poll() is None, process.communicate()
            __import__("time").sleep(0.05)
        process.send_signal(2)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"Go on with: ctrlrl resume {run}" in err
    assert RunFolder(run).step_checkpoints()


def test_messages_with_half_a_character_can_be_printed(capsys):
    """JSON may hold them (`"\\ud800"`), and so may what a file calls its columns."""
    assert "no command '\\ud800'" in str(UsageError("no command '\ud800'"))
    assert ctrlrl_command(["\ud800"]) == 2
    assert "\\ud800" in capsys.readouterr().err
