"""What tests of whole runs share: small trainings, and everything of a run that must be equal bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import ctrlrl
from ctrlrl.runs.checkpoint import load_checkpoint, pack
from ctrlrl.runs.folder import RunFolder

SMALL: dict[str, Any] = {
    "steps": 400,
    "learning_starts": 60,
    "log_every": 50,
    "eval_every": 150,
    "eval_episodes": 2,
    "checkpoint_every": 70,
    "threads": 1,
    "video": False,
    "agent": {"hidden": [16, 16], "batch_size": 16},
    "quiet": True,
}


class InterruptAt(ctrlrl.Callback):
    """Interrupts a training at a step, as Ctrl+C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, loop: Any) -> None:
        if loop.env_steps >= self.step:
            signal.raise_signal(signal.SIGINT)
            self.step = 10**9


def contents(run: Path) -> dict[str, Any]:
    """Weights, optimizers, generators, counters, replay and records of a run, without clock readings."""
    folder = RunFolder.open(run)
    state = load_checkpoint(folder.find_checkpoint("last"))
    del state["loop"]["seconds"], state["loop"]["moment"], state["metrics_offset"]
    segments = state.get("replay", {}).pop("segments", [])
    tensors, tree = pack(state)
    rows: dict[str, torch.Tensor] = {}
    for segment in segments:
        for name, value in load_file(folder.replay / segment["file"]).items():
            if name.startswith("before/"):  # frames of the segment before
                continue
            # `obs/` has one more row than the segment: the first one of the next
            value = value[:-1] if name.startswith(("obs/", "reach")) and segment is not segments[-1] else value
            rows[name] = torch.cat([rows[name], value]) if name in rows else value
    records = []
    for line in folder.metrics.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "note":
            continue
        records.append({k: v for k, v in record.items() if k not in ("time", "steps_per_s", "updates_per_s")})
    best = load_checkpoint(folder.find_checkpoint("best")) if state["best"] else {}
    return {"tensors": tensors, "tree": tree, "rows": rows, "records": records, "best": pack(best)[0]}


def assert_same(a: Path, b: Path) -> None:
    """Raise unless the two runs hold the same bits."""
    left, right = contents(a), contents(b)
    assert left["tree"] == right["tree"]
    assert left["records"] == right["records"]
    for part in ("tensors", "rows", "best"):
        assert left[part].keys() == right[part].keys()
        for name, value in left[part].items():
            assert torch.equal(value, right[part][name]), (part, name)
