"""The fuzzer of the importers runs, and finds nothing in a few files of every format."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("h5py")
pytest.importorskip("pyarrow")

ROOT = Path(os.environ.get("CTRLRL_SOURCE", Path(__file__).parents[1]))
SCRIPT = ROOT / "scripts" / "fuzz_importers.py"


def test_a_few_files():
    command = [sys.executable, str(SCRIPT), "--count", "108", "--seed", "5", "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "108 files" in done.stdout and "; 0 failures" in done.stdout
