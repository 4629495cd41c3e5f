"""What a dataset holds, in numbers: `inspect` measures, `inspection_findings` judges, `inspection_page` shows.

Columns are read in blocks of about a million numbers, so that memory does not grow with the dataset, but for one number
an episode and, up to `inspection_coverage.EXACT` transitions, 8 bytes for each transition and count of different ones.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctrlrl.data.inspection_alignment import Alignment, Ends, alignment, ends
from ctrlrl.data.inspection_columns import (
    ColumnSummary,
    Distribution,
    RaggedSummary,
    RewardSummary,
    observation_bounds,
    observation_columns,
    place,
    summarize,
    summarize_ragged,
    summarize_reward,
)
from ctrlrl.data.inspection_coverage import Coverage, Distinct, Ranges, Repeats, count, coverage, joined, ranges
from ctrlrl.data.store import Dataset, Ragged
from ctrlrl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Returns on the scale of the reference returns."""

    source: str
    """The dataset whose references they are: its own, or those of `--reference`."""
    random: float
    expert: float
    normalized_mean: float
    """Of the mean return: 0 is random, 100 is expert."""
    normalized_maximum: float
    tq: float
    """Trajectory quality (arXiv 2111.04714): (mean - random) / (expert - random)."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything that was measured."""

    path: str
    env: str | None
    control_dt: float | None
    observation_space: str
    action_space: str
    bytes: int
    """Of its files."""
    content_hash: str
    provenance: dict[str, Any]
    reference: dict[str, float]
    """Reference returns by name."""
    reference_dataset: str | None
    transitions: int
    episodes: int
    length: Distribution
    """Transitions of an episode."""
    ret: Distribution = dataclasses.field(metadata={"json": "return"})
    """Return of an episode, without discount."""
    scores: Scores | None
    success: float | None
    """Share of episodes with a step of success, where there is such a column."""
    reward: RewardSummary
    reward_column: ColumnSummary
    action: ColumnSummary
    observation: list[ColumnSummary | RaggedSummary]
    columns: list[ColumnSummary | RaggedSummary]
    """The others."""
    places: dict[str, str]
    """Where the first number is that is not finite (`nonfinite NAME`) or out of bounds (`outside NAME`)."""
    ends: Ends
    repeats: Repeats
    coverage: list[Coverage]
    reference_transitions: int | None
    alignment: Alignment

    @property
    def vectors(self) -> list[ColumnSummary]:
        """The observation's entries whose numbers are described one by one."""
        return [one for one in self.observation if isinstance(one, ColumnSummary) and not one.pooled]

    @property
    def real(self) -> bool:
        """Whether observations or actions hold real numbers; else the same transition comes about again by itself."""
        every = [self.action, *self.observation]
        return any(isinstance(one, ColumnSummary) and one.real for one in every)


def inspect(dataset: Dataset, reference: Dataset | None = None) -> Inspection:
    """Measure `dataset`, its coverage also against that of `reference`.

    Raises:
        UsageError: it holds no episode, or the spaces of the two differ.
    """
    if reference is not None:
        _require_comparable(dataset, reference)
    if not dataset.num_episodes:
        raise UsageError(f"{dataset.path} holds no episode; add some before it is inspected")
    bounds = observation_bounds(dataset)
    observation = [
        summarize_ragged(name, column, "text" if _is_text(bounds[name]) else "array")
        if isinstance(column, Ragged)
        else summarize(name, column, "observation", bounds[name])
        for name, column in observation_columns(dataset).items()
    ]
    action = summarize("action", dataset.action, "step", dataset.action_space)
    reward_column = summarize("reward", dataset.reward, "step")
    columns = [_summarize_other(dataset, name) for name in dataset.columns]
    every = [one for one in (*observation, action, reward_column, *columns) if isinstance(one, ColumnSummary)]
    if not np.isfinite(reward_column.mean).all():
        raise UsageError(f"no reward of {dataset.path} is a finite number; import it anew")
    reach = ranges(*(one for one in (*observation, action) if isinstance(one, ColumnSummary)))
    other: dict[int, Distinct] | None = None
    if reference is not None:
        reach = joined(reach, _reach(reference))
        _, other = count(reference, reach)
    repeats, own = count(dataset, reach)
    return Inspection(
        path=str(dataset.path),
        env=dataset.env,
        control_dt=dataset.control_dt,
        observation_space=str(dataset.observation_space),
        action_space=str(dataset.action_space),
        bytes=sum(file.stat().st_size for file in _files(dataset.path)),
        content_hash=dataset.content_hash,
        provenance=dataset.provenance,
        reference=dataset.reference,
        reference_dataset=None if reference is None else str(reference.path),
        transitions=dataset.num_transitions,
        episodes=dataset.num_episodes,
        length=Distribution.of(dataset.lengths),
        ret=Distribution.of(dataset.returns),
        scores=_scores(dataset, reference),
        success=_success(dataset),
        reward=summarize_reward(dataset.reward),
        reward_column=reward_column,
        action=action,
        observation=observation,
        columns=columns,
        places=_places(dataset, every),
        ends=ends(dataset),
        repeats=repeats,
        coverage=coverage(own, dataset.num_transitions, other),
        reference_transitions=None if reference is None else reference.num_transitions,
        alignment=alignment(dataset),
    )


def _require_comparable(dataset: Dataset, reference: Dataset) -> None:
    for what in ("observation_space", "action_space"):
        one, other = getattr(dataset, what), getattr(reference, what)
        if one != other:
            raise UsageError(
                f"--reference {reference.path} has another {what.replace('_', ' ')} than {dataset.path}: {other}, not "
                f"{one}. State-action pairs are compared within one environment; give a dataset of the same one"
            )
    if not reference.num_episodes:
        raise UsageError(f"--reference {reference.path} holds no episode")


def _reach(dataset: Dataset) -> Ranges:
    columns = {**observation_columns(dataset), "action": dataset.action}
    return ranges(*(summarize(name, one, "step") for name, one in columns.items() if not isinstance(one, Ragged)))


def _is_text(space: Any) -> bool:
    return type(space).__name__ == "Text"


def _summarize_other(dataset: Dataset, name: str) -> ColumnSummary | RaggedSummary:
    column, spec = dataset.column(name), dataset.columns[name]
    if isinstance(column, Ragged):
        return summarize_ragged(name, column, spec.dtype)
    return summarize(name, column, spec.per)


def _scores(dataset: Dataset, reference: Dataset | None) -> Scores | None:
    for source in (dataset, reference):
        if source is not None and {"random", "expert"} <= source.reference.keys():
            mean, best = float(dataset.returns.mean()), float(dataset.returns.max())
            low, high = source.reference["random"], source.reference["expert"]
            if low == high:
                continue
            return Scores(
                source=str(source.path),
                random=low,
                expert=high,
                normalized_mean=source.normalized_score(mean),
                normalized_maximum=source.normalized_score(best),
                tq=(mean - low) / (high - low),
            )
    return None


def _success(dataset: Dataset) -> float | None:
    spec = dataset.columns.get("success")
    if spec is None or spec.is_ragged or spec.shape:
        return None
    each = np.arange(dataset.num_episodes) if spec.per == "observation" else 0
    starts = np.asarray(dataset.starts + each, np.int64)
    succeeded = np.add.reduceat((np.asarray(dataset.column("success")) > 0).astype(np.int64), starts)
    return float((succeeded > 0).mean())


def _places(dataset: Dataset, summaries: list[ColumnSummary]) -> dict[str, str]:
    result = {}
    for one in summaries:
        for what, first in (("nonfinite", one.first_nonfinite), ("outside", one.first_outside)):
            if first is not None:
                result[f"{what} {one.name}"] = f"{one.dimension(first[1])} at {place(dataset, first[0], one.per)}"
    return result


def _files(folder: Path) -> list[Path]:
    return [folder / "dataset.json", *folder.glob("episodes.*"), *folder.glob("columns/*")]


def as_json(value: Any) -> Any:
    """Dataclasses and arrays as JSON; what is not finite as null, without the rows that were drawn."""
    if dataclasses.is_dataclass(value):
        fields = [(one, one.metadata.get("json", one.name)) for one in dataclasses.fields(value)]
        return {name: as_json(getattr(value, one.name)) for one, name in fields if name}
    if isinstance(value, np.ndarray | list | tuple):
        return [as_json(one) for one in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, dict):
        return {str(name): as_json(one) for name, one in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
