"""Loops that collect what they learn from: one iteration is one control step in each of N environments, and the updates
that are due then."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ctrlrl.config import OnlineConfig
from ctrlrl.envs.vector import EnvState, Step, VectorEnv
from ctrlrl.runs.folder import RunFolder
from ctrlrl.training.collector import Collector
from ctrlrl.training.loop import Loop
from ctrlrl.tree import Obs


class CollectingLoop(Loop):
    """Trains `agent` on `env`, for `config.steps` environment steps; callbacks may read `env`, too.

    A loop stores what was collected (`_store`) and learns from it (`_learn`).
    """

    config: OnlineConfig

    def __init__(self, *, env: VectorEnv, collector: Collector, **shared: Any) -> None:
        self.env, self.collector = env, collector
        super().__init__(**shared)

    # What a session asks of the kind of loop, before there is one.

    @staticmethod
    @abstractmethod
    def make_memory(config: Any, env: VectorEnv, agent: Any, obs: Obs) -> Any:
        """The empty memory of what `agent` will collect in `env`, which is at `obs`; `memory.begin(obs)` starts it.

        Raises:
            UsageError: if it does not fit.
        """

    @staticmethod
    @abstractmethod
    def restore_memory(memory: Any, folder: RunFolder, state: dict[str, Any]) -> None:
        """Fill an empty memory with what the checkpoint `state` holds or refers to."""

    @staticmethod
    @abstractmethod
    def begin_afresh(memory: Any, obs: Obs, rows: Sequence[bool]) -> None:
        """Go on from `obs` where the episodes of `rows` could not be continued."""

    @staticmethod
    @abstractmethod
    def stored_bytes(config: Any, env: VectorEnv, memory: Any) -> int:
        """How much of the memory the run folder will hold."""

    @staticmethod
    def shares_environments(config: Any) -> bool:
        """Whether environments are worth several processes where nothing else is asked for."""
        return False

    def _iterate(self) -> None:
        before = self.env_steps
        with self._saved_on_failure(continue_episodes=False):  # what the environments did in this step is lost
            step, extras, next_extras = self.collector.step(random=self._acts_at_random())
        self._store(step, extras, next_extras)
        episodes, transitions = self.collector.finished(step)
        self.env_steps += transitions

        self._learn(before)
        self._after(before, episodes)

    @abstractmethod
    def _store(self, step: Step, extras: dict[str, Tensor], next_extras: dict[str, Tensor]) -> None:
        """Keep a control step, with what the policy said of its actions here and at `final_obs`."""

    @abstractmethod
    def _learn(self, before: int) -> None:
        """Make the updates that are due now; `before` environment steps had been done before this iteration."""

    def _figures(self) -> dict[str, float]:
        """What a training record says besides, since the last one."""
        return self.collector.figures()

    def _where(self, continue_episodes: bool) -> dict[str, Any]:
        """Where environments and their episodes are, for a checkpoint."""
        n = self.env.num_envs
        env = self.env.get_state() if continue_episodes else EnvState([None] * n, [{} for _ in range(n)])
        return {"collector": self.collector.state_dict(), "env": {"json": env.json, "arrays": env.arrays}}

    def _acts_at_random(self) -> bool:
        """Whether the next actions are uniformly random."""
        return False
