#!/usr/bin/env python3
"""Success over environment steps of trainings that are there, as a picture, a table and a file of numbers.

    python scripts/success_curves.py --out docs/data/residual.json --picture docs/images/residual.svg \\
        "pick-place: ResFiT=runs/pp-0,runs/pp-1,runs/pp-2" "pick-place: RLPD=runs/rlpd-0,runs/rlpd-1"
    python scripts/success_curves.py --from docs/data/residual.json --picture docs/images/residual.svg

(with the interpreter of .venv) A group is `PANEL: LABEL=RUN,RUN,...`; runs of a group are seeds of one training. The
table has each seed's success at the first, the lowest and the last evaluation, and the mean of the last ones. --from
reads what --out has written, so that the picture can be drawn without the runs; groups are added to it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import numpy as np
from cells import read_json

from ctrlrl.errors import CtrlrlError, UsageError
from ctrlrl.files import write_json
from ctrlrl.runs.plots import Series, returns_picture
from ctrlrl.runs.record import load_run

Groups = dict[str, dict[str, list[dict[str, Any]]]]


def read_group(text: str) -> tuple[str, str, list[dict[str, Any]]]:
    """Panel, label, and steps and success of each run."""
    name, separator, runs = text.partition("=")
    panel, colon, label = name.partition(": ")
    if not separator or not colon:
        raise UsageError(f"a group is 'PANEL: LABEL=RUN,RUN', got {text!r}")
    seeds = []
    for run in runs.split(","):
        record = load_run(Path(run))
        points = [(e.step, e.success) for e in record.evaluations if e.success is not None]
        if not points:
            raise UsageError(f"no evaluation of {run} says what succeeded")
        seeds.append({"steps": [step for step, _ in points], "success": [share for _, share in points]})
    return panel, label, seeds


def table(groups: Groups) -> str:
    """In markdown."""
    lines = ["| | seeds | first | lowest | last | mean of the last |", "|---|---|---|---|---|---|"]
    for panel, labels in groups.items():
        for label, seeds in labels.items():
            said = [
                ", ".join(f"{pick(seed['success']):.2f}" for seed in seeds)
                for pick in (lambda x: x[0], min, lambda x: x[-1])
            ]
            mean = np.mean([seed["success"][-1] for seed in seeds])
            steps = "" if len({seed["steps"][-1] for seed in seeds}) == 1 else " (not all as long)"
            lines.append(
                f"| {panel}: {label}, {seeds[0]['steps'][-1]:,} steps{steps} | {len(seeds)} | {' | '.join(said)} | "
                f"{mean:.2f} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Read, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP")
    parser.add_argument("--from", dest="source", type=Path, help="numbers that are there already")
    parser.add_argument("--out", type=Path, help="where the numbers go")
    parser.add_argument("--picture", type=Path, help="an .svg or .png file")
    options = parser.parse_args()
    try:
        groups: Groups = {} if options.source is None else read_json(options.source)
        for text in options.groups:
            panel, label, seeds = read_group(text)
            groups.setdefault(panel, {})[label] = seeds
        if not groups:
            raise UsageError("no group, and no --from: there is nothing to draw")
    except CtrlrlError as error:
        print(f"success_curves: {error}", file=sys.stderr)
        return error.exit_code
    print(table(groups))
    if options.out is not None:
        write_json(options.out, groups)
    if options.picture is not None:
        panels = [
            (
                panel,
                [
                    (label, [Series(np.asarray(s["steps"], float), np.asarray(s["success"], float)) for s in seeds])
                    for label, seeds in labels.items()
                ],
            )
            for panel, labels in groups.items()
        ]
        kind = options.picture.suffix.removeprefix(".")
        options.picture.write_bytes(returns_picture(panels, kind, quantity="success"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
