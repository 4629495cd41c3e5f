"""The page of a dataset: one HTML file that needs nothing else, no network and no JavaScript."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ctrlrl.data import inspection_plots as plots
from ctrlrl.data.inspection import Inspection
from ctrlrl.data.inspection_columns import ColumnSummary, RaggedSummary
from ctrlrl.data.inspection_findings import Finding
from ctrlrl.data.store import Dataset
from ctrlrl.files import write_atomically
from ctrlrl.runs.page import shown, template, writable_page

_ROWS = 128
"""Numbers of an entry that get a row in its table."""


def write_page(inspection: Inspection, findings: Sequence[Finding], dataset: Dataset, out: str | Path) -> Path:
    """Write the page to `out`, making the folders above it, and return its path.

    Raises:
        UsageError: `out` is a folder or lies under a file.
    """
    path = writable_page(Path(out))
    it = inspection
    marks = [("random", it.scores.random), ("expert", it.scores.expert)] if it.scores else []
    page = template(Path(__file__).with_name("inspection.html")).render(
        it=it,
        name=shown(dataset.path),
        findings=findings,
        counts=[(word, sum(one.severity == word for one in findings)) for word in ("error", "warning", "note")],
        returns=Markup(plots.histogram("returns", dataset.returns, "return", "episodes", marks)),
        lengths=Markup(plots.histogram("lengths", dataset.lengths, "steps", "episodes")),
        in_order=Markup(plots.returns_in_order("order", dataset.returns)),
        rewards=Markup(plots.reward_histogram("rewards", it.reward)),
        actions=Markup(plots.small_multiples("actions", it.action, bounds=True)),
        observations=[_entry(f"observation{i}", one) for i, one in enumerate(it.observation)],
        shown_rows=_ROWS,
        alignment=_alignment_rows(it),
        examples=_examples(it, dataset),
        provenance=[
            (key, value if isinstance(value, str) else json.dumps(value)) for key, value in it.provenance.items()
        ],
    )
    write_atomically(path, page.encode())
    return path


def _entry(name: str, column: ColumnSummary | RaggedSummary) -> dict[str, Any]:
    svg = plots.small_multiples(name, column, bounds=False) if isinstance(column, ColumnSummary) else ""
    return {"column": column, "ragged": not svg, "svg": Markup(svg)}


def _alignment_rows(it: Inspection) -> list[tuple[str, float, bool]]:
    """(what is explained by what, share, whether that is what aligned data has most of)."""
    action, reward = it.alignment.action, it.alignment.reward
    rows = [
        ("of an action, by the observation before its own", action.before, False),
        ("of an action, by the next observation", action.after, True),
        ("of an action beside its next observation, by its own", action.before_next, True),
        ("of an action beside its next observation, by the one after that", action.after_next, False),
        ("of the previous row's reward, by a transition", reward.previous, False),
        ("of its own reward, by a transition", reward.own, True),
        ("of the next row's reward, by a transition", reward.following, False),
    ]
    return [row for row in rows if row[1] == row[1]]


def _examples(it: Inspection, dataset: Dataset) -> list[dict[str, Any]]:
    """The episode of the highest return, the one in the middle and the one of the lowest."""
    order = np.argsort(dataset.returns, kind="stable")
    chosen = {
        int(order[-1]): "highest return",
        int(order[len(order) // 2]): "median return",
        int(order[0]): "lowest return",
    }
    return [
        {
            "index": index,
            "what": what,
            "length": int(dataset.lengths[index]),
            "return": float(dataset.returns[index]),
            "end": "terminated" if dataset.terminated[index] else "truncated",
            "svg": Markup(plots.episode(f"episode{index}", dataset, index, it.vectors, it.action)),
            "frames": [(one.name, plots.frames(dataset, index, one.name)) for one in it.observation],
            "info": json.dumps(dataset.infos[index], ensure_ascii=False) if dataset.infos[index] else "",
        }
        for index, what in chosen.items()
    ]
