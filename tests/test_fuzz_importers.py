"""The fuzzer of the importers runs, and finds nothing in a few files of every format."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.scripts import SCRIPTS

pytest.importorskip("h5py")
pytest.importorskip("pyarrow")

SCRIPT = SCRIPTS / "fuzz_importers.py"


def test_a_few_files():
    command = [sys.executable, str(SCRIPT), "--count", "108", "--seed", "5", "--processes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "108 files" in done.stdout and "; 0 failures" in done.stdout
