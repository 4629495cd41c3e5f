"""What a replay memory holds, as episodes for a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ctrlrl.data.store import Episode
from ctrlrl.replay.buffer import ReplayBuffer


def episodes_of(buffer: ReplayBuffer) -> Iterator[Episode]:
    """What a replay memory holds as episodes, environment by environment. The first one of each environment begins
    where memory does; the last one, if it goes on, is cut where it is."""
    rows = {name: value.numpy() for name, value in buffer.export_rows(buffer.oldest_row, buffer.total_rows).items()}
    ended = (rows["terminated"] | rows["truncated"]) & rows["valid"]
    finals = np.cumsum(ended.flatten()).reshape(ended.shape) - 1  # in the order of rows, and of environments in each
    names = [name.removeprefix("obs/") for name in rows if name.startswith("obs/")]
    for env in range(buffer.num_envs):
        begin = 0
        total = len(ended)
        for t in range(total):
            valid, over = bool(rows["valid"][t, env]), bool(ended[t, env])
            last = t == total - 1
            if not valid:  # its observation is the true one after the transition before
                if t > begin:
                    yield _of_rows(rows, names, env, begin, t, None, finals)
                begin = t + 1
            elif over or last:
                yield _of_rows(rows, names, env, begin, t + 1, t if over else None, finals)
                begin = t + 1


def _of_rows(
    rows: dict[str, np.ndarray[Any, Any]],
    names: Sequence[str],
    env: int,
    begin: int,
    end: int,
    over: int | None,
    finals: np.ndarray[Any, Any],
) -> Episode:
    """The transitions [begin, end) of an environment; `over` is the one that ended the episode, if one did."""
    observation = {}
    for name in names:
        seen = rows[f"obs/{name}"][begin : end + 1, env].copy()
        if over is not None:
            seen[-1] = rows[f"finals/{name}"][finals[over, env]]
        observation[name] = seen
    return Episode(
        observation=observation.get("", observation),
        action=rows["action"][begin:end, env],
        reward=rows["reward"][begin:end, env],
        terminated=over is not None and bool(rows["terminated"][over, env]),
        truncated=over is None or bool(rows["truncated"][over, env]),
    )
