"""Virtual environments of other libraries, to run them beside ours with the versions that `PEER.txt` pins."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
from pathlib import Path

from ctrlrl.errors import UsageError, nearest

HERE = Path(__file__).resolve().parent
PEERS = sorted(path.stem for path in HERE.glob("*.txt"))
"""Names of the libraries there is a requirements file for."""


def python_of(peer: str) -> Path:
    """The interpreter of `.venv-peers/PEER` in the checkout; makes it first where it is missing or out of date.

    Raises:
        UsageError: there is no such peer, or its packages cannot be installed.
    """
    if peer not in PEERS:
        raise UsageError(f"no peer {peer!r}.{nearest(peer, PEERS)} There is: {', '.join(PEERS)} (scripts/peers/*.txt)")
    requirements = HERE / f"{peer}.txt"
    venv = HERE.parents[1] / ".venv-peers" / peer
    python, stamp = venv / "bin" / "python", venv / "installed"
    want = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    venv.parent.mkdir(exist_ok=True)
    with open(venv.parent / f"{peer}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it: wait until it is done
        if stamp.exists() and stamp.read_text() == want:
            return python
        print(f"installing {peer} into {venv} (a few minutes, the first time)", flush=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
        for command in ([sys.executable, "-m", "venv", "--clear", str(venv)], pip):
            if subprocess.run(command).returncode:
                raise UsageError(f"{peer} cannot be installed, this failed: {' '.join(command)}")
        stamp.write_text(want)  # last: what was cut off is made anew
    return python
