"""Stand-ins for batches of other frameworks: each keeps to how its framework documents steps, ends and resets.

They are not these frameworks, of which most need a GPU. Episode e of row i ends after `length(i)` steps, by its task
where e + i is even, else by time. Observations show at sight which episode and step they are of.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

CRITIC = 1000.0
"""What the critic's group adds to the policy's, to tell them apart."""
ENDS_WITHIN = 12
"""Steps within which every row has ended by its task, fillers included."""


def length(row: Any) -> Any:
    """Steps of an episode of `row`: 3, 4 or 5."""
    return 3 + row % 3


class Rows:
    """N episodes. Observation [where it starts, episode, t]; reward: the first entry of the action."""

    def __init__(self, n: int, seeds: list[int]) -> None:
        self.n, self.index = n, torch.arange(n)
        self.start, self.episode, self.t = torch.zeros(n), torch.full((n,), -1), torch.zeros(n, dtype=torch.long)
        self.seed(seeds)

    def seed(self, seeds: list[int]) -> None:
        """One seed per row; or one for all, from which each gets its own."""
        entropies = (
            [(seeds[0], row) for row in range(self.n)] if len(seeds) == 1 else [(seed % 2**32,) for seed in seeds]
        )
        self.generators = [np.random.default_rng(entropy) for entropy in entropies]
        self.episode[:] = -1

    def begin(self, rows: Tensor) -> None:
        for row in rows.nonzero().flatten().tolist():
            self.start[row] = float(self.generators[row].normal())
        self.episode += rows
        self.t[rows] = 0

    def advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.t += 1
        over = self.t >= length(self.index)
        by_task = (self.index + self.episode) % 2 == 0
        return action[:, 0].clone(), over & by_task, over & ~by_task

    def observe(self) -> Tensor:
        return torch.stack([self.start, self.episode, self.t], 1).float()

    def every(self) -> Tensor:
        return torch.ones(self.n, dtype=torch.bool)


BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTION = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)


# --- EnvPool 1.2: next-step reset, NumPy, seeds when made -------------------------------------------------------------


class EnvPoolMixin:
    __module__ = "envpool.python.envpool"


class PoolSpec:
    """Made from a configuration, which its `gen_config` completes."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    @staticmethod
    def gen_config(**given: Any) -> dict[str, Any]:
        return {"num_envs": 1, "batch_size": given.get("num_envs", 1), "max_num_players": 1, "env_seed": []} | given


class Pool(EnvPoolMixin, gym.vector.VectorEnv):  # type: ignore[misc]
    """A pool of `envpool.make_gymnasium`."""

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    single_observation_space, single_action_space = BOX, ACTION
    observation_space, action_space = BOX, ACTION  # EnvPool's are those of one environment

    def __init__(self, spec: PoolSpec) -> None:
        self.spec, self.config = spec, spec.config  # type: ignore[assignment]
        self.num_envs = n = self.config["num_envs"]
        self.is_async = self.config["batch_size"] != n
        self.rows = Rows(n, self.config["env_seed"] or [0])
        self.over = torch.zeros(n, dtype=torch.bool)
        self.close_calls = 0

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        assert seed is None, "EnvPool ignores seeds that reset is given"
        self.rows.begin(self.rows.every())
        self.over[:] = False
        return self.rows.observe().numpy(), {"elapsed_step": self.rows.t.numpy()}

    def step(self, actions: Any) -> tuple[Any, ...]:
        assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
        before, filler = self.rows.t.clone(), self.over
        reward, terminated, truncated = self.rows.advance(torch.from_numpy(actions))
        self.rows.t = torch.where(filler, before, self.rows.t)
        self.rows.begin(filler)
        reward, terminated, truncated = reward * ~filler, terminated & ~filler, truncated & ~filler
        self.over = terminated | truncated
        info = {"elapsed_step": self.rows.t.numpy(), "success": terminated.numpy()}
        return self.rows.observe().numpy(), reward.numpy(), terminated.numpy(), truncated.numpy(), info

    def close(self, **_: Any) -> None:
        self.close_calls += 1


def make_pool(num_envs: int, **config: Any) -> Pool:
    """What `envpool.make_gymnasium` does."""
    return Pool(PoolSpec(PoolSpec.gen_config(num_envs=num_envs, **config)))


# --- ManiSkill 3: tensors, same-step reset, everything of before the reset in the info --------------------------------


class ManiSkillVectorEnv(gym.vector.VectorEnv[Any, Any, Any]):
    """The wrapper; `unwrapped` is the environment below it."""

    __module__ = "mani_skill.vector.wrappers.gymnasium"

    def __init__(self, num_envs: int, *, auto_reset: bool = True) -> None:
        self.num_envs, self.device, self.auto_reset = num_envs, torch.device("cpu"), auto_reset
        self.single_observation_space = gym.spaces.Dict({"state": BOX, "extra": gym.spaces.Dict({"goal": BOX})})
        self.single_action_space = ACTION
        self.rows = Rows(num_envs, [0])
        self.base = SimpleNamespace(num_envs=num_envs, device=self.device, control_timestep=0.05, render_mode=None)
        self.close_calls = 0

    @property
    def unwrapped(self) -> Any:
        return self.base

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        rows = self.rows.every()
        if options is not None:
            rows = torch.zeros(self.num_envs, dtype=torch.bool)
            rows[options["env_idx"]] = True
        if seed is not None:
            self.rows.seed(seed)
        self.rows.begin(rows)
        return self._observe(), {"success": torch.zeros(self.num_envs, dtype=torch.bool)}

    def step(self, actions: Tensor) -> tuple[Any, ...]:
        reward, terminated, truncated = self.rows.advance(actions)
        obs, info = self._observe(), {"success": terminated.clone()}
        dones = terminated | truncated
        if dones.any() and self.auto_reset:
            final_obs, final_info = obs, info
            obs, info = self.reset(options={"env_idx": torch.arange(self.num_envs)[dones]})
            info |= {"final_observation": final_obs, "final_info": final_info, "_final_info": dones}
        return obs, reward, terminated, truncated, info

    def render(self) -> Any:
        return torch.full((self.num_envs, 4, 6, 3), 7, dtype=torch.uint8)

    def close(self, **_: Any) -> None:
        self.close_calls += 1

    def _observe(self) -> dict[str, Any]:
        return {"state": self.rows.observe(), "extra": {"goal": self.rows.observe() + CRITIC}}


# --- Isaac Lab 2 and 3: tensors, same-step reset, the last observation lost or in extras ------------------------------


class Terms:
    """A termination manager: named terms, each (N,)."""

    def __init__(self, n: int) -> None:
        self.terms = {"time_out": torch.zeros(n, dtype=torch.bool), "goal": torch.zeros(n, dtype=torch.bool)}
        self.active_terms = list(self.terms)

    def get_term(self, name: str) -> Tensor:
        return self.terms[name]


class DirectRLEnv(gym.Env[Any, Any]):
    """Isaac Lab's; `final` is `cfg.compute_final_obs` of version 3."""

    __module__ = "isaaclab.envs.direct_rl_env"

    def __init__(self, num_envs: int, *, final: bool = False, finite: bool = False, bounded: bool = True) -> None:
        self.cfg = SimpleNamespace(compute_final_obs=final, is_finite_horizon=finite)
        self.num_envs, self.device, self.step_dt = num_envs, "cpu", 0.02
        self.single_observation_space = gym.spaces.Dict({"policy": BOX, "critic": BOX})
        self.single_action_space = ACTION if bounded else gym.spaces.Box(-np.inf, np.inf, (2,))
        self.rows, self.termination_manager = Rows(num_envs, [0]), Terms(num_envs)
        self.reset_terminated, self.reset_time_outs = torch.zeros((2, num_envs), dtype=torch.bool)
        self.extras: dict[str, Any] = {}
        self.close_calls = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.rows.seed([seed])
        self.rows.begin(self.rows.every())
        return self._observe(), self.extras

    def step(self, action: Tensor) -> tuple[Any, ...]:
        reward, terms = torch.zeros(self.num_envs), self.termination_manager.terms
        reward[:], self.reset_terminated[:], self.reset_time_outs[:] = self.rows.advance(action)
        terms["goal"][:], terms["time_out"][:] = self.reset_terminated, self.reset_time_outs
        action[:] = torch.nan  # it may keep what it is given, and write to it
        over = self.reset_terminated | self.reset_time_outs
        if over.any():
            if self.cfg.compute_final_obs:
                self.extras["final_obs"] = self._observe()  # and it stays there
            self.rows.begin(over)
            self.extras["log"] = {"Episode_Termination/goal": 1.0}
        return self._observe(), reward, self.reset_terminated, self.reset_time_outs, self.extras

    def close(self) -> None:
        self.close_calls += 1

    def _observe(self) -> dict[str, Tensor]:
        return {"policy": self.rows.observe(), "critic": self.rows.observe() + CRITIC}


# --- mjlab 1.6: Isaac Lab's words; with auto_reset off, its caller resets ---------------------------------------------


@dataclass
class Box:
    """mjlab's own spaces."""

    shape: tuple[int, ...]
    low: float = -float("inf")
    high: float = float("inf")
    dtype: str = "float32"


@dataclass
class Dict:
    spaces: dict[str, Any] = field(default_factory=dict)


class ManagerBasedRlEnv:
    """mjlab's; each time it observes, it does so with new noise, here in the second half of the observation."""

    __module__ = "mjlab.envs.manager_based_rl_env"

    def __init__(self, num_envs: int, *, auto_reset: bool = False, finite: bool = False) -> None:
        self.cfg = SimpleNamespace(auto_reset=auto_reset, is_finite_horizon=finite)
        self.num_envs, self.device, self.step_dt, self.render_mode = num_envs, "cpu", 0.02, None
        self.single_observation_space = Dict({"actor": Box((6,)), "critic": Box((3,))})
        self.single_action_space = Box((2,))
        self.rows, self.termination_manager = Rows(num_envs, [0]), Terms(num_envs)
        self.noise = torch.Generator().manual_seed(0)
        self.pending = torch.zeros(num_envs, dtype=torch.bool)
        self.resets: collections.Counter[int] = collections.Counter()
        self.close_calls = 0

    @property
    def unwrapped(self) -> ManagerBasedRlEnv:
        return self

    def reset(self, *, seed: int | None = None, env_ids: Tensor | None = None) -> tuple[Any, dict[str, Any]]:
        rows = self.rows.every() if env_ids is None else torch.zeros(self.num_envs, dtype=torch.bool)
        if env_ids is not None:
            rows[env_ids] = True
        if seed is not None:
            self.rows.seed([seed])
            self.noise.manual_seed(seed)
        for flags in (self.pending, *self.termination_manager.terms.values()):
            flags &= ~rows
        self.rows.begin(rows)
        self.resets.update(rows.nonzero().flatten().tolist())
        return self._observe(), {}

    def step(self, action: Tensor) -> tuple[Any, ...]:
        if self.pending.any():
            raise RuntimeError("Environments must be reset via reset(env_ids=...) before calling step() again")
        reward, terminated, truncated = self.rows.advance(action)
        self.termination_manager.terms = {"time_out": truncated, "goal": terminated}
        self.pending = terminated | truncated
        return self._observe(), reward, terminated, truncated, {}  # its own flags, which a reset may clear

    def close(self) -> None:
        self.close_calls += 1

    def _observe(self) -> dict[str, Tensor]:
        seen = self.rows.observe()
        return {
            "actor": torch.cat([seen, torch.randn(self.num_envs, 3, generator=self.noise)], 1),
            "critic": seen + CRITIC,
        }
