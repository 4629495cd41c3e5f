"""Returns of other libraries, read from JSON files, as runs to compare with.

```json
{"what": "text", "protocol": "text", "library": "SBX 0.28.0",
 "runs": [{"algo": "SAC", "env": "Hopper-v5", "seed": 0, "complete": true,
           "evals": [{"step": 10000, "mean": 205.1, "returns": [203.2, 207.0]}]}],
 "random": {"Hopper-v5": {"mean": 17.6, "returns": [12.1, 23.1]}}}
```

`random` holds returns of uniformly random actions; it may be missing, as may `library`, for which the file's name
stands in. `scripts/bench_returns.py` writes such files, of our runs too.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctrlrl.errors import UsageError
from ctrlrl.runs.plots import Series
from ctrlrl.runs.record import Evaluation, RunRecord
from ctrlrl.runs.statistics import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFile:
    """What a file says."""

    path: Path
    what: str
    """Which libraries, versions, machine."""
    protocol: str
    """How it was measured."""
    runs: list[RunRecord]
    """The complete ones; `algo` names the library too, as in `SAC (SBX 0.28.0)`."""
    random: dict[str, Floats]
    """Per environment returns (episodes,) of uniformly random actions."""
    notes: list[str]
    """What is left out."""


def load_peers(path: str | Path) -> PeerFile:
    """Read a peers file.

    Raises:
        UsageError: it cannot be read, or something in it is missing or of the wrong kind; names file and key.
    """
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the peers file {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"the peers file {file} is not valid JSON ({error})") from error
    whole = _Part(file, "", data)
    library = whole.get("library", str).value if "library" in whole.of(dict) else file.stem
    runs, notes = [], []
    for part in whole.get("runs", list).items():
        name = f"{part.get('algo', str).value} {part.get('env', str).value} {part.get('seed', int).value}"
        if part.get("complete", bool).value:
            runs.append(_run(part, library, file.parent / f"{file.stem}: {name.replace('/', '-')}"))
        else:
            notes.append(f"{file.name}: {name} is not complete and left out.")
    random = whole.get("random", dict).value if "random" in whole.value else {}
    return PeerFile(
        path=file,
        what=whole.get("what", str).value,
        protocol=whole.get("protocol", str).value,
        runs=runs,
        random={env: whole.get("random", dict).get(env, dict).get("returns", list).numbers() for env in random},
        notes=notes,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """A value in the file, and where it stands."""

    file: Path
    key: str
    value: Any

    def of(self, kind: type) -> Any:
        fits = isinstance(self.value, kind) and (kind is bool or not isinstance(self.value, bool))
        if not fits:
            name = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}[kind]
            text = json.dumps(self.value)
            raise self.error(f"is {text if len(text) <= 40 else text[:40] + '...'}, expected {name}")
        return self.value

    def error(self, what: str) -> UsageError:
        return UsageError(
            f"{self.key or 'the whole'} of the peers file {self.file} {what}; docs/data/peer_returns.json in the "
            "source tree shows the format, and scripts/bench_returns.py writes it"
        )

    def get(self, name: str, kind: type) -> _Part:
        key = f"{self.key}.{name}" if self.key else name
        if name not in self.of(dict):
            raise _Part(self.file, key, None).error("is missing")
        part = _Part(self.file, key, self.value[name])
        part.of(kind)
        return part

    def items(self) -> list[_Part]:
        return [_Part(self.file, f"{self.key}[{index}]", item) for index, item in enumerate(self.of(list))]

    def numbers(self) -> Floats:
        values = self.of(list)
        fit = all(isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) for one in values)
        if not (fit and values):
            raise self.error("must be a list of finite numbers, at least one")
        return np.array(values, dtype=np.float64)


def _run(part: _Part, library: str, path: Path) -> RunRecord:
    evaluations: list[Evaluation] = []
    for one in part.get("evals", list).items():
        step, returns = one.get("step", int).value, one.get("returns", list).numbers()
        if step <= (evaluations[-1].step if evaluations else -1):
            raise one.error(f"has step {step}, which is not above the one before")
        none = np.empty(0)
        evaluations.append(
            Evaluation(
                step=step,
                time=0.0,
                checkpoint="current",
                returns=returns,
                lengths=none,
                success=None,
                best=False,
                figures={},
            )
        )
    return RunRecord(
        path=path,
        library=library,
        config={
            "algo": f"{part.value['algo']} ({library})",
            "env": part.value["env"],
            "seed": part.value["seed"],
        },
        provenance={},
        status={"state": "finished"},
        evaluations=evaluations,
        checks=[],
        episodes=Series(np.empty(0), np.empty(0)),
        metrics={},
        notes=[],
        videos=[],
        step=evaluations[-1].step if evaluations else 0,
        seconds=0.0,
        unreadable=0,
        superseded=0,
        remarks=[],
    )
