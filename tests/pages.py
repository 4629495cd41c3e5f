"""What tests of reports share: synthetic run folders, and what stands in a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


def rising(step: int) -> float:
    return step / 100


def write_run(
    folder: Path,
    *,
    algo: str = "sac",
    env: str = "HalfCheetah-v5",
    seed: int = 0,
    steps: int = 1000,
    stop: int | None = None,
    every: int = 100,
    curve: Callable[[int], float] = rising,
    agent: dict[str, Any] | None = None,
    success: float | None = None,
    status: dict[str, Any] | None = None,
    lines: Sequence[dict[str, Any]] = (),
    tail: str = "",
    **provenance: Any,
) -> Path:
    """A run evaluated each `every` steps with two episodes, curve(step) -+ 1; then come `lines` and the raw `tail`."""
    folder.mkdir(parents=True)
    config = {"algo": algo, "env": env, "steps": steps, "seed": seed, "num_envs": 1, "device": "cpu"}
    config |= {"out": str(folder), "eval_every": every, "agent": {"gamma": 0.99, "hidden": [256, 256], **(agent or {})}}
    (folder / "config.json").write_text(json.dumps(config))
    origin: dict[str, Any] = {
        "command": f"ctrlrl train {algo} --env {env} --steps {steps} --seed {seed}",
        "ctrlrl": "0.1.0",
    }
    origin |= {"packages": {"torch": "2.13.0"}, "hardware": {"cpu": "CPU", "cores": 2, "gpu": None}, "git": None}
    (folder / "provenance.json").write_text(json.dumps(origin | provenance))
    records: list[dict[str, Any]] = []
    for step in range(every, (stop or steps) + 1, every):
        metrics = {"critic_loss": 1.0, "actor_loss": -40.0, "alpha": 0.2, "odd_one": 3.0}
        records.append({"kind": "train", "step": step, "time": step / 10, "steps_per_s": 10.0, "metrics": metrics})
        records.append({"kind": "episode", "step": step, "time": step / 10, "env": 0, "return": 0.5, "length": 100})
        records.append(evaluation(step, curve(step), success))
    text = "".join(json.dumps(record) + "\n" for record in [*records, *lines])
    (folder / "metrics.jsonl").write_text(text + tail)
    if status is not None:
        (folder / "status.json").write_text(json.dumps(status))
    return folder


def evaluation(step: int, mean: float, success: float | None = None, checkpoint: str = "current") -> dict[str, Any]:
    share = None if success is None else [True] * round(success * 10) + [False] * round((1 - success) * 10)
    return {
        "kind": "eval",
        "step": step,
        "time": step / 10,
        "checkpoint": checkpoint,
        "returns": [mean - 1, mean + 1],
        "lengths": [100, 300],
        "success": share,
        "mean": mean,
    }


class Page(HTMLParser):
    """Collects ids, tags and every address of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href"):
                self.addresses.append(str(value))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))
