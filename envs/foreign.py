"""Environments made elsewhere that step as one batch: EnvPool's, ManiSkill's, Isaac Lab's and mjlab's.

    env = from_envpool(envpool.make_gymnasium("HalfCheetah-v5", num_envs=64))
    env = from_maniskill(ManiSkillVectorEnv(gymnasium.make("PickCube-v1", num_envs=512)))
    env = from_isaaclab(gymnasium.make("Isaac-Velocity-Flat-Anymal-C-v0", cfg=cfg))
    env = from_mjlab(ManagerBasedRlEnv(cfg, device="cuda:0"))

None of these packages is imported here. How each of them ends and resets episodes was read in the sources of EnvPool
1.2.5, ManiSkill 3.0.1, Isaac Lab 2.3.2 and 3.0.0, and mjlab 1.6.0. Tensors stay on the device of the simulation, and
steps wait for no result of it, except where `from_mjlab` says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.envs.gymnasium_backend import GymnasiumVectorAdapter, at_path, picture, usage_error
from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.vector import Step, VectorEnv, seed_per_env
from ctrlrl.envs.worker import Refused, describe_action_space, describe_observation_space, draw, flatten_dict_space
from ctrlrl.errors import UsageError, nearest
from ctrlrl.tree import Obs, map_obs

GROUPS = {"actor": "policy", "critic": "privileged"}
"""What Isaac Lab and mjlab call observation groups, and what they are called here."""
TIMEOUTS = ("previous", "drop")
"""What `from_isaaclab` can do with rows cut off by time whose last observation is not known."""


# --- what to call -----------------------------------------------------------------------------------------------------


def from_envpool(
    env: Any, *, name: str | None = None, device: torch.device | str = "cpu", owned: bool = True
) -> VectorEnv:
    """An EnvPool made with `envpool.make_gymnasium`, all of whose environments step together.

    EnvPool resets an environment in the step after its end: `valid` is False for that row. Where an episode reaches its
    time limit in the very step that ends its task, EnvPool reports the time limit alone.

    EnvPool takes seeds when a pool is made, so `reset(seed)` makes a new one, with the configuration of `env` and one
    seed per environment (its lower 32 bits, as a signed number). What renders is carried over.

    Args:
        env: the pool.
        name: what to call it in messages and run folders; the name of its class by default.
        device: where the tensors lie; EnvPool's arrays are copied there.
        owned: whether `close` closes `env`.

    Raises:
        UsageError: `env` is not such a pool.
    """
    return _EnvPoolVector(env, name=name, device=device, owned=owned)


def from_maniskill(env: Any, *, name: str | None = None, owned: bool = True) -> VectorEnv:
    """A `ManiSkillVectorEnv`, which resets in the same step and gives tensors on its own device.

    `final_obs` is its `final_observation`; `log["success"]` is what the task says of each row, before it is reset. One
    seed per environment goes to ManiSkill; what a task draws from torch's own generator in later episodes is seeded by
    ManiSkill only where it was made with `enhanced_determinism=True`.

    Args:
        env: the vector environment, made with `auto_reset=True` (its default).
        name: what to call it; its ID by default.
        owned: whether `close` closes `env`.

    Raises:
        UsageError: `env` is not such an environment, or has spaces that are not supported.
    """
    return _ManiSkillVector(env, name=name, owned=owned)


def from_isaaclab(
    env: Any,
    *,
    name: str | None = None,
    timeouts: str | None = None,
    groups: Mapping[str, str] | None = None,
    clip_actions: float | None = None,
    success: str | None = None,
    owned: bool = True,
) -> VectorEnv:
    """An Isaac Lab `DirectRLEnv` or `ManagerBasedRLEnv`, which resets in the same step.

    From Isaac Lab 3.0 on, make it with `cfg.compute_final_obs = True`: `final_obs` is then what it observed before the
    reset. Else the last observation of an episode is lost. That is no matter where the task ended, since no value
    follows; where time cut the episode off, `timeouts` says what to do:

    - `"previous"`: `final_obs` is the observation before the last action, so the value beyond the cut is that of one
      step before. This is what rsl_rl computes. Rewards and returns are complete.
    - `"drop"`: the row is no transition (`valid` is False). What is learned from is exact; the last step of such an
      episode is lost, and the episode does not appear among the returns of a training.

    With `cfg.is_finite_horizon` the time limit belongs to the task, and reaching it is `terminated`.

    Isaac Lab seeds all environments together, from global generators: one seed gives one trajectory of the batch, and a
    list of seeds stands for one seed made of all of them.

    Args:
        env: the environment, as `gymnasium.make` or its class makes it.
        name: what to call it; its ID by default.
        timeouts: see above; not needed with `compute_final_obs` or a finite horizon.
        groups: our name for each of its observation groups; groups that are not named here keep theirs. By default
            `actor` becomes `policy` and `critic` becomes `privileged`.
        clip_actions: bound of the actions, in both directions, in place of those of the action space (which are
            infinite where Isaac Lab's managers make it). Algorithms that need bounded actions need it.
        success: name of the termination term that means success, for `log["success"]`.
        owned: whether `close` closes `env`.

    Raises:
        UsageError: `env` is not such an environment, or has spaces that are not supported; `timeouts` is missing.
    """
    return _IsaacLabVector(
        env, name=name, timeouts=timeouts, groups=groups, clip_actions=clip_actions, success=success, owned=owned
    )


def from_mjlab(
    env: Any,
    *,
    name: str | None = None,
    groups: Mapping[str, str] | None = None,
    clip_actions: float | None = None,
    success: str | None = None,
    owned: bool = True,
) -> VectorEnv:
    """An mjlab `ManagerBasedRlEnv` made with `cfg.auto_reset = False`; what has ended is reset here.

    So `final_obs` is the observation that the episode ended with. mjlab takes the numbers of the environments to reset,
    for which each step waits once for the device (mjlab's own step does so, too). Seeds, `is_finite_horizon` and the
    other arguments are as in `from_isaaclab`.

    Raises:
        UsageError: `env` is not such an environment, has spaces that are not supported, or resets by itself.
    """
    return _MjlabVector(env, name=name, groups=groups, clip_actions=clip_actions, success=success, owned=owned)


def adopt(env: object, *, device: torch.device | str = "cpu") -> VectorEnv | None:
    """`env` by the function above that fits, left open by `close`; None where it is of none of these frameworks."""
    match framework_of(env):
        case "envpool":
            return from_envpool(env, device=device, owned=False)
        case "mani_skill":
            return from_maniskill(env, owned=False)
        case "isaaclab":
            return from_isaaclab(env, owned=False)
        case "mjlab":
            return from_mjlab(env, owned=False)
    return None


def framework_of(env: object) -> str | None:
    """The package that `env` is a batch of environments of, told by the names of its classes; None if of none here."""
    inner = env.unwrapped if isinstance(env, gym.Env) else env  # not of a vector wrapper, which has a word in the step
    for cls in type(inner).__mro__:
        package = cls.__module__.partition(".")[0]
        if cls.__name__ in _CLASSES.get(package, ()):
            return package
    return None


_CLASSES = {
    "envpool": ("EnvPoolMixin",),
    "mani_skill": ("ManiSkillVectorEnv",),
    "isaaclab": ("DirectRLEnv", "ManagerBasedRLEnv"),
    "mjlab": ("ManagerBasedRlEnv",),
}


# --- arrays -----------------------------------------------------------------------------------------------------------


class _EnvPoolVector(GymnasiumVectorAdapter):
    """`GymnasiumVectorAdapter` does the steps; this adds seeds."""

    def __init__(self, env: Any, *, name: str | None, device: torch.device | str, owned: bool) -> None:
        if not isinstance(env, gym.vector.VectorEnv) or not hasattr(env, "is_async"):
            raise UsageError(f"from_envpool takes what envpool.make_gymnasium returns, got a {type(env).__name__}")
        pool: Any = env
        if pool.is_async or pool.config["max_num_players"] != 1:
            raise UsageError(
                f"{type(env).__name__} was made with batch_size {pool.config['batch_size']} for {env.num_envs} "
                f"environments, of up to {pool.config['max_num_players']} players; make it with batch_size=num_envs "
                "(the default) and one player, so that one step is one step of every environment"
            )
        super().__init__(env, name=name, device=device)
        self._given, self._owned = pool, owned

    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        if seed is not None:
            seeds = np.array(seed_per_env(seed, self.num_envs), np.uint32).astype(np.int32).tolist()
            old: Any = self._env
            spec = type(old.spec)
            config = old.config | {"env_seed": seeds}
            self._env = type(old)(spec(spec.gen_config(**config)))
            for key, value in vars(old).items():
                if key.startswith("_render_"):  # EnvPool sets these after making a pool, and not through its spec
                    setattr(self._env, key, value)
            if old is not self._given:
                old.close()
        return super().reset()

    def close(self) -> None:
        if self._env is not self._given:
            self._env.close()
        if self._owned:
            self._owned = False
            self._given.close()


# --- tensors ----------------------------------------------------------------------------------------------------------


class _TensorVector(VectorEnv):
    """What the frameworks have in common whose environments take and give tensors on a device of their own."""

    def __init__(self, env: Any, *, name: str | None, owned: bool) -> None:
        self._env, self._base = env, env.unwrapped
        self.name = name or getattr(getattr(env, "spec", None), "id", None) or type(self._base).__name__
        self.num_envs = int(self._base.num_envs)
        self.device = torch.empty(0, device=self._base.device).device  # with its index, which "cuda" lacks
        self._all_valid = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        self._finite_horizon = False
        self._owned = owned

    def _set_spaces(
        self, observation: gym.Space[Any], paths: dict[str, tuple[str, ...]], action: gym.Space[Any]
    ) -> None:
        """Take the spaces of one environment; `paths` says where each entry lies in what the framework observes."""
        if not isinstance(action, gym.spaces.Box):
            raise UsageError(f"{self.name}: the action space is {action}; expected a Box")
        self.observation_space, self.action_space = observation, action
        boxes = observation.spaces if isinstance(observation, gym.spaces.Dict) else {"": observation}
        self._entries = {name: (paths[name], _torch_dtype(box)) for name, box in boxes.items()}
        self._bounds = [torch.as_tensor(bound, device=self.device) for bound in (action.low, action.high)]

    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        seeds = [value for value in seed_per_env(seed, self.num_envs) if value is not None]
        return self._read(self._env.reset(seed=self._seed(seeds) if seeds else None)[0])

    def step(self, action: Tensor) -> Step:
        shape = (self.num_envs, *(self.action_space.shape or ()))
        if action.shape != shape:
            raise UsageError(f"step takes actions of shape {shape}, got {tuple(action.shape)}")
        applied = torch.clamp(action.detach().to(self.device, self._bounds[0].dtype), *self._bounds)
        raw, given_reward, given_terminated, given_truncated, extras = self._env.step(applied.clone())
        reward = self._row(given_reward, torch.float32)
        terminated, truncated = self._row(given_terminated, torch.bool), self._row(given_truncated, torch.bool)
        if self._finite_horizon:
            terminated, truncated = terminated | truncated, torch.zeros_like(truncated)
        success = self._success(extras)
        if success is not None:
            success = self._row(success, torch.float32)
        obs, final_obs, valid = self._transition(self._read(raw), terminated, truncated, extras)
        if self.may_be_invalid:
            reward, terminated, truncated = torch.where(valid, reward, 0.0), terminated & valid, truncated & valid
            success = None if success is None else torch.where(valid, success, torch.nan)
        log = {} if success is None else {"success": success}
        return Step(obs, applied, reward, terminated, truncated, final_obs, valid, log)

    def render(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        renders = getattr(self._base, "render_mode", None) == "rgb_array"
        return picture(self.name, renders, lambda: draw(lambda: _one_picture(self._env.render())))

    def close(self) -> None:
        if self._owned:
            self._owned = False
            self._env.close()

    def _read(self, raw: Any) -> Obs:
        """What the framework observed, by our names."""
        read = {name: at_path(raw, path).to(self.device, dtype) for name, (path, dtype) in self._entries.items()}
        return read if isinstance(self.observation_space, gym.spaces.Dict) else read[""]

    def _row(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,) a copy, since the frameworks write their flags in place."""
        return value.detach().to(self.device, dtype, copy=True).view(self.num_envs)

    @abstractmethod
    def _seed(self, seeds: list[int]) -> Any:
        """What the framework's `reset` takes for one seed per environment."""

    @abstractmethod
    def _success(self, extras: dict[str, Any]) -> Tensor | None:
        """(N,) whether each row has succeeded, or None where the task does not say; asked right after the step."""

    @abstractmethod
    def _transition(
        self, obs: Obs, terminated: Tensor, truncated: Tensor, extras: dict[str, Any]
    ) -> tuple[Obs, Obs, Tensor]:
        """What to act on, the true next observation, (N,) which rows are transitions; `obs` is what `step` gave."""


class _ManiSkillVector(_TensorVector):
    """`final_observation` holds all rows, in steps in which an episode ended."""

    def __init__(self, env: Any, *, name: str | None, owned: bool) -> None:
        attributes = ("unwrapped", "single_observation_space", "single_action_space", "auto_reset")
        _require(env, "from_maniskill", "a ManiSkillVectorEnv around what gymnasium.make returns", attributes)
        super().__init__(env, name=name, owned=owned)
        if not env.auto_reset:
            raise UsageError(f"{self.name}: make the ManiSkillVectorEnv with auto_reset=True")
        try:
            observation = build_space(describe_observation_space(env.single_observation_space, self.name))
            action = build_space(describe_action_space(env.single_action_space, self.name))
        except Refused as error:
            raise usage_error(error) from error
        paths = {".".join(path): path for path in flatten_dict_space(env.single_observation_space)}
        self._set_spaces(observation, paths, action)
        self.control_dt = getattr(self._base, "control_timestep", None)

    def _seed(self, seeds: list[int]) -> list[int]:
        return seeds

    def _success(self, extras: dict[str, Any]) -> Tensor | None:
        success: Tensor | None = extras.get("final_info", extras).get("success")  # beside it, after the reset
        return success

    def _transition(
        self, obs: Obs, terminated: Tensor, truncated: Tensor, extras: dict[str, Any]
    ) -> tuple[Obs, Obs, Tensor]:
        if "final_observation" not in extras:
            return obs, obs, self._all_valid
        final_obs = _where(terminated | truncated, self._read(extras["final_observation"]), obs)
        return obs, final_obs, self._all_valid


class _GroupedVector(_TensorVector):
    """What Isaac Lab and mjlab have in common: observation groups, one seed for all, terms of termination."""

    def __init__(
        self,
        env: Any,
        *,
        caller: str,
        taken: str,
        name: str | None,
        groups: Mapping[str, str] | None,
        clip_actions: float | None,
        success: str | None,
        owned: bool,
    ) -> None:
        attributes = ("num_envs", "device", "single_observation_space", "single_action_space", "step_dt", "cfg")
        _require(getattr(env, "unwrapped", env), caller, taken, attributes)
        super().__init__(env, name=name, owned=owned)
        base = self._base
        boxes, paths = self._groups(base.single_observation_space, groups)
        action = _box(base.single_action_space, f"{self.name}: the action space")
        if clip_actions is not None:
            if not 0 < clip_actions < np.inf:
                raise UsageError(f"clip_actions must be a finite number above 0, got {clip_actions}")
            action = gym.spaces.Box(-clip_actions, clip_actions, action.shape, np.float32)
        self._set_spaces(gym.spaces.Dict(boxes), paths, action)
        self.control_dt = float(base.step_dt)
        self._finite_horizon = bool(getattr(base.cfg, "is_finite_horizon", False))
        terms = list(getattr(getattr(base, "termination_manager", None), "active_terms", ()))
        if success is not None and success not in terms:
            raise UsageError(
                f"{self.name} has no termination term {success!r}; it has {', '.join(terms) or 'none'}."
                + nearest(success, terms)
            )
        self._success_term = success

    def _groups(
        self, space: Any, groups: Mapping[str, str] | None
    ) -> tuple[dict[str, gym.Space[Any]], dict[str, tuple[str, ...]]]:
        """The Box of each group by our name for it, and where the framework has it."""
        theirs = dict(space.spaces)
        for group in groups or ():
            if group not in theirs:
                raise UsageError(
                    f"{self.name} has no observation group {group!r}; it has {', '.join(theirs)}."
                    + nearest(group, theirs)
                )
        names = {group: (GROUPS if groups is None else groups).get(group, group) for group in theirs}
        if "policy" not in names.values() or len(set(names.values())) < len(names):
            called = ", ".join(f"{group} -> {name}" for group, name in names.items())
            raise UsageError(
                f"{self.name}: its observation groups would be called {called}; expected different names, one of them "
                "'policy'. Say what policies read with groups={'...': 'policy'}"
            )
        boxes: dict[str, gym.Space[Any]] = {
            names[group]: _box(box, f"{self.name}: observation group {group!r}") for group, box in theirs.items()
        }
        return boxes, {name: (group,) for group, name in names.items()}

    def _seed(self, seeds: list[int]) -> int:
        # 31 bits: the generators behind take different ranges.
        return int(np.random.SeedSequence(seeds).generate_state(1)[0] >> 1)

    def _success(self, extras: dict[str, Any]) -> Tensor | None:
        if self._success_term is None:
            return None
        success: Tensor = self._base.termination_manager.get_term(self._success_term)
        return success


class _IsaacLabVector(_GroupedVector):
    """`final_obs` from `extras`, or what `timeouts` says."""

    def __init__(self, env: Any, *, timeouts: str | None, **arguments: Any) -> None:
        taken = "an Isaac Lab DirectRLEnv or ManagerBasedRLEnv"
        super().__init__(env, caller="from_isaaclab", taken=taken, **arguments)
        if timeouts is not None and timeouts not in TIMEOUTS:
            raise UsageError(
                f"timeouts must be one of {', '.join(TIMEOUTS)}; got {timeouts!r}.{nearest(timeouts, TIMEOUTS)}"
            )
        self._gives_final = bool(getattr(self._base.cfg, "compute_final_obs", False))
        if not (self._gives_final or self._finite_horizon or timeouts):
            raise UsageError(
                f"{self.name} does not give the last observation of an episode that its time limit ends, beyond which "
                "values are learned. From Isaac Lab 3.0 on make it with cfg.compute_final_obs = True; else choose "
                "from_isaaclab(env, timeouts='previous'), to take the observation before it, as rsl_rl does, or "
                "timeouts='drop', to leave out the step"
            )
        self.may_be_invalid = timeouts == "drop" and not self._gives_final
        self._last: Obs = {}

    def reset(self, seed: int | Sequence[int] | None = None) -> Obs:
        obs = super().reset(seed)
        self._last = map_obs(torch.clone, obs)
        return obs

    def _transition(
        self, obs: Obs, terminated: Tensor, truncated: Tensor, extras: dict[str, Any]
    ) -> tuple[Obs, Obs, Tensor]:
        if self._gives_final:
            # It stays in `extras` after the step that it is of: only rows that ended now are of now.
            final = extras.get("final_obs")
            final_obs = obs if final is None else _where(terminated | truncated, self._read(final), obs)
            return obs, final_obs, self._all_valid
        valid = terminated | ~truncated if self.may_be_invalid else self._all_valid
        final_obs = _where((terminated | truncated) & valid, self._last, obs)
        self._last = map_obs(torch.clone, obs)
        return obs, final_obs, valid


class _MjlabVector(_GroupedVector):
    """Episodes that have ended are reset here, once their last observation is known."""

    def __init__(self, env: Any, **arguments: Any) -> None:
        super().__init__(env, caller="from_mjlab", taken="an mjlab ManagerBasedRlEnv", **arguments)
        if getattr(self._base.cfg, "auto_reset", True):
            raise UsageError(
                f"{self.name} resets by itself, and the last observation of each episode is lost with that. Make it "
                "with cfg.auto_reset = False (mjlab 1.6 has it); from_mjlab resets what has ended"
            )

    def _transition(
        self, obs: Obs, terminated: Tensor, truncated: Tensor, extras: dict[str, Any]
    ) -> tuple[Obs, Obs, Tensor]:
        ended = terminated | truncated
        ids = ended.nonzero().squeeze(-1)  # waits for the device
        if not len(ids):
            return obs, obs, self._all_valid
        final_obs = map_obs(torch.clone, obs)
        # The other rows, too, are observed anew, with other noise: they keep what they saw.
        obs = _where(ended, self._read(self._env.reset(env_ids=ids)[0]), final_obs)
        return obs, final_obs, self._all_valid


def _require(env: Any, caller: str, taken: str, attributes: Sequence[str]) -> None:
    missing = [key for key in attributes if not hasattr(env, key)]
    if missing:
        raise UsageError(f"{caller} takes {taken}; the {type(env).__name__} passed has no {', '.join(missing)}")


def _box(space: Any, what: str) -> gym.spaces.Box:
    """A Box of Gymnasium's from one of Gymnasium's or of mjlab's own."""
    if not hasattr(space, "low") or np.dtype(space.dtype).kind not in "fiu":
        raise UsageError(
            f"{what} is {space}; expected a Box of numbers. Groups of terms need concatenate_terms=True in their "
            "configuration"
        )
    shape, dtype = tuple(space.shape), np.dtype(space.dtype)
    low, high = (np.broadcast_to(np.asarray(bound, dtype), shape) for bound in (space.low, space.high))
    return gym.spaces.Box(low, high, shape, dtype.type)


def _torch_dtype(space: gym.Space[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, space.dtype)).dtype


def _where(rows: Tensor, a: Obs, b: Obs) -> Obs:
    """`a` in `rows` (N,), `b` elsewhere."""

    def pick(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, y)

    if isinstance(a, dict) and isinstance(b, dict):
        return {name: pick(a[name], b[name]) for name in b}
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return pick(a, b)


def _one_picture(pictures: Any) -> Any:
    """The picture of environment 0, of one or of all."""
    array = pictures.cpu().numpy() if isinstance(pictures, Tensor) else np.asarray(pictures)
    return array[0] if array.ndim == 4 else array
