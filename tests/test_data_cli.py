"""`ctrlrl data ...`: one message and an exit code, nothing half-written; datasets need no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest

from ctrlrl.cli.data import COMMANDS
from ctrlrl.cli.main import run as command
from ctrlrl.data.store import Dataset
from tests.datasets import pendulum_data


def d4rl_file(path: Path, steps: int = 60) -> Path:
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = random.normal(size=(steps, 3)).astype(np.float32)
        file["actions"] = random.uniform(-1, 1, (steps, 2)).astype(np.float32)
        file["rewards"] = random.normal(size=steps).astype(np.float32)
        file["terminals"] = np.arange(steps) % 20 == 19
        file["timeouts"] = np.zeros(steps, bool)
    return path


def test_import_tells_the_format_and_says_what_it_decided(tmp_path: Path, capsys: Any) -> None:
    source = d4rl_file(tmp_path / "x.hdf5")
    assert command(["data", "import", str(source), "--out", str(tmp_path / "set"), "--env", "Mine-v0"]) == 0
    said = capsys.readouterr().out
    assert "read as d4rl" in said and f"{Dataset.open(tmp_path / 'set').num_transitions} transitions" in said
    data = Dataset.open(tmp_path / "set")
    data.verify()
    assert data.env == "Mine-v0" and data.provenance["format"] == "d4rl" and data.provenance["source"] == str(source)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.hdf5", "--format", "d4rI"], "no format 'd4rI'. Did you mean d4rl"),
        (["nothing.hdf5"], "no such file or folder: nothing.hdf5"),
        (["text.txt"], "looks like none of the formats"),
        (["text.txt", "--format", "d4rl"], "text.txt"),
    ],
)
def test_import_refuses_with_one_message(
    words: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    d4rl_file(tmp_path / "x.hdf5")
    (tmp_path / "text.txt").write_text("hello")
    assert command(["data", "import", *words, "--out", "set"]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt", "x.hdf5"]


@pytest.mark.parametrize(
    ("env", "largest", "message"),
    [("Pendulum-v1", 1.9, ""), ("Pendulum-v1", 0.5, ""), ("Pendulum-v1", 2.5, "and Pendulum-v1 takes Box(-2.0, 2.0"),
     ("CartPole-v1", 0.5, "and CartPole-v1 takes Discrete(2)")],
)  # fmt: skip
def test_actions_are_those_of_the_environment(
    env: str, largest: float, message: str, tmp_path: Path, capsys: Any
) -> None:
    source = d4rl_file(tmp_path / "x.hdf5")
    with h5py.File(source, "r+") as file:
        del file["actions"]
        file["actions"] = np.linspace(-largest, largest, 60, dtype=np.float32)[:, None]
    code = command(["data", "import", str(source), "--out", str(tmp_path / "set"), "--env", env])
    assert code == (2 if message else 0) and message in capsys.readouterr().err
    if not message:
        space = Dataset.open(tmp_path / "set").action_space
        assert isinstance(space, gym.spaces.Box) and (space.low, space.high) == (-2, 2)


def test_an_import_does_not_write_over_anything(tmp_path: Path, capsys: Any) -> None:
    source = d4rl_file(tmp_path / "x.hdf5")
    pendulum_data(tmp_path / "set", 1, 5)
    before = Dataset.open(tmp_path / "set").content_hash
    assert command(["data", "import", str(source), "--out", str(tmp_path / "set")]) == 2
    assert "is not empty" in capsys.readouterr().err and Dataset.open(tmp_path / "set").content_hash == before


def test_there_and_back(tmp_path: Path, capsys: Any) -> None:
    data = pendulum_data(tmp_path / "set", 3, 10)
    for format, more in (("minari", ["--id", "mine/pendulum-v0"]), ("lerobot", [])):
        out = tmp_path / format
        assert command(["data", "export", str(data.path), "--format", format, "--out", str(out), *more]) == 0
        source = out / "mine/pendulum-v0" if format == "minari" else out
        assert command(["data", "import", str(source), "--out", str(tmp_path / f"{format}-again")]) == 0, format
        again = Dataset.open(tmp_path / f"{format}-again")
        assert again.num_episodes == 3 and np.array_equal(again.action, data.action), format
    assert command(["data", "export", str(data.path), "--format", "minari", "--out", str(tmp_path / "m")]) == 2
    assert "needs the dataset's ID" in capsys.readouterr().err


def test_help_and_typing_errors(capsys: Any) -> None:
    assert command(["data"]) == 2 and command(["data", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    assert command(["data", "imprt"]) == 2
    assert "Did you mean import?" in capsys.readouterr().err


def test_datasets_are_read_and_imported_without_torch(tmp_path: Path) -> None:
    source = d4rl_file(tmp_path / "x.hdf5")
    code = (
        "import sys\n"
        "from ctrlrl.cli.main import run\n"
        f"assert run(['data', 'import', {str(source)!r}, '--out', {str(tmp_path / 'set')!r}]) == 0\n"
        f"assert run(['data', 'inspect', {str(tmp_path / 'set')!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
