"""Small stand-in environments for tests: well-behaved ones with odd spaces, and ones that fail in every way.

Importing this module registers the Gymnasium ones, so `tests.standins:ctrlrl-test/Counting-v0` works as an id, in a
worker process too. Workers need not have torch: `native_vector`, which does, imports it when called.
"""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

if TYPE_CHECKING:
    from ctrlrl.envs.vector import VectorEnv

MODULE = "tests.standins:"


class CountingEnv(gym.Env[Any, Any]):
    """Observation [episode since it was seeded, t]: shows at sight which episode and step a row is from.

    Replaying the episode alone cannot reach that count from a new environment.
    """

    observation_space = gym.spaces.Box(0.0, np.inf, (2,), np.float32)

    def __init__(self, length: int = 4, truncates: bool = False, discrete: bool = False) -> None:
        self.length, self.truncates = length, truncates
        self.action_space = gym.spaces.Discrete(3, start=2) if discrete else gym.spaces.Box(-1.0, 1.0, (1,))
        self.episode, self.t = -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = (self.episode + 1 if seed is None else 0), 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        self.t += 1
        ended = self.t >= self.length
        info = {"is_success": self.episode % 2 == 0} if ended else {}
        return self._obs(), float(self.t), ended and not self.truncates, ended and self.truncates, info

    def _obs(self) -> Any:
        return np.array([self.episode, self.t], np.float32)


class OwnStateEnv(CountingEnv):
    """A counting environment that saves its own state."""

    ctrlrl_state = True

    def get_state(self) -> dict[str, Any]:
        return {"episode": self.episode, "t": np.array([self.t])}

    def set_state(self, state: dict[str, Any]) -> None:
        self.episode, self.t = state["episode"], int(state["t"][0])


class ReusingEnv(CountingEnv):
    """A counting environment that hands out one and the same array each time."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.buffer = np.zeros(2, np.float32)

    def _obs(self) -> Any:
        self.buffer[:] = self.episode, self.t
        return self.buffer


class WalkEnv(gym.Env[Any, Any]):
    """A random walk pushed by the action; ends when it has gone far, so episodes differ in length."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space: gym.Space[Any] = gym.spaces.Box(-1.0, 1.0, (2,))
        self.position = np.zeros(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=2)
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.position = self.position + self._push(action) + self.np_random.normal(size=2)
        far = float(np.abs(self.position).max())
        return self._obs(), -far, far > 4.0, False, {}

    def _push(self, action: Any) -> Any:
        return 0.1 * np.asarray(action)

    def _obs(self) -> Any:
        return self.position.copy()


class UnboundedEnv(WalkEnv):
    """Actions without bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (2,))


class MultiDiscreteEnv(WalkEnv):
    """Two discrete actions at once."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = gym.spaces.MultiDiscrete([3, 2])

    def _push(self, action: Any) -> Any:
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        return 0.1 * (action - 1)


class ImageEnv(WalkEnv):
    """A nested Dict observation: a uint8 image and a float64 vector."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Dict(
            {
                "image": gym.spaces.Box(0, 255, (6, 5, 3), np.uint8),
                "body": gym.spaces.Dict({"position": gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)}),
            }
        )

    def _obs(self) -> Any:
        image = np.full((6, 5, 3), np.abs(self.position).sum() * 20 % 256, np.uint8)
        return {"image": image, "body": {"position": self.position.copy()}}


class MovingEnv(WalkEnv):
    """A random walk that is drawn as a white square, where pictures are asked for."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> Any:
        picture = np.zeros((40, 30, 3), np.uint8)
        row, column = (np.clip(self.position / 5 + 1, 0, 2) * (15, 10)).astype(int)
        picture[row : row + 9, column : column + 9] = 255
        return picture


class CurriculumEnv(CountingEnv):
    """A counting environment whose reward, but not what is observed, grows with the episodes that were finished."""

    def __init__(self) -> None:
        super().__init__()
        self.finished = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = super().step(action)
        reward = 1.0 + 1e-12 * self.finished  # which float32 would not show
        self.finished += terminated
        return obs, reward, terminated, truncated, info

    def _obs(self) -> Any:
        return np.array([0, self.t], np.float32)


class DrawnEnv(WalkEnv):
    """Gives pictures."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012  (as Gymnasium declares it)

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> Any:
        return np.arange(72, dtype=np.uint8).reshape(4, 6, 3)


class FaultyEnv(WalkEnv):
    """Fails at step `at_step` of its life, if its first action is then above `above`."""

    def __init__(self, at_step: int = 3, above: float = -np.inf) -> None:
        super().__init__()
        self.at_step, self.above, self.steps = at_step, above, 0

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        obs, reward, terminated, truncated, info = super().step(action)
        if self.steps == self.at_step and action[0] > self.above:
            obs, reward = self.fail(obs, reward)
        return obs, reward, terminated, truncated, info

    def fail(self, obs: Any, reward: float) -> tuple[Any, float]:
        raise NotImplementedError


class CrashingEnv(FaultyEnv):
    """Raises."""

    def fail(self, obs: Any, reward: float) -> tuple[Any, float]:
        raise RuntimeError("the simulator lost its marbles")


class ExitingEnv(FaultyEnv):
    """Ends its process."""

    def fail(self, obs: Any, reward: float) -> tuple[Any, float]:
        os.write(2, b"last words of the simulator\n")
        os._exit(7)


class SegfaultingEnv(FaultyEnv):
    """Crashes its process the hard way."""

    def fail(self, obs: Any, reward: float) -> tuple[Any, float]:
        import faulthandler

        faulthandler._sigsegv()
        raise AssertionError("unreachable")


class HangingEnv(FaultyEnv):
    """Does not come back."""

    def fail(self, obs: Any, reward: float) -> tuple[Any, float]:
        time.sleep(600)
        return obs, reward


class PrintingEnv(FaultyEnv):
    """Prints at every step, on stdout and stderr, and JSON at that; more than a pipe holds at the step that fails."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        print('{"raised": "not really", "row": 0}', flush=True)
        os.write(2, b'{"alive": true}\n')
        return super().step(action)

    def fail(self, obs: Any, reward: float) -> tuple[Any, float]:
        os.write(1, b"x" * 200_000)
        return obs, reward


class UnclosableEnv(FaultyEnv):
    """Raises when it is closed."""

    def close(self) -> None:
        raise RuntimeError("the window is gone")


class OnlyEnv(UnclosableEnv):
    """There can be only one in a process."""

    made = 0

    def __init__(self, **kwargs: Any) -> None:
        OnlyEnv.made += 1
        if OnlyEnv.made > 1:
            raise RuntimeError("there is one robot only")
        super().__init__(**kwargs)


class GlobalDrawsEnv(WalkEnv):
    """Draws from the generators of the process."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = super().step(action)
        return obs, float(np.random.rand() + random.random()), terminated, truncated, info


class NanEnv(FaultyEnv):
    """Observation and reward become NaN."""

    def fail(self, obs: Any, reward: float) -> tuple[Any, float]:
        return obs * np.nan, float("nan")


class MaskedCartPoleEnv(gym.ObservationWrapper):
    """CartPole without velocities: position and angle, from which a policy without memory cannot tell where it goes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(gym.make("CartPole-v1", **kwargs))
        box = self.env.observation_space
        self.observation_space = gym.spaces.Box(box.low[[0, 2]], box.high[[0, 2]])

    def observation(self, observation):
        return observation[[0, 2]]


_ENVS = {
    "Counting": CountingEnv,
    "Curriculum": CurriculumEnv,
    "OwnState": OwnStateEnv,
    "Reusing": ReusingEnv,
    "Walk": WalkEnv,
    "Unbounded": UnboundedEnv,
    "MultiDiscrete": MultiDiscreteEnv,
    "Image": ImageEnv,
    "Drawn": DrawnEnv,
    "Moving": MovingEnv,
    "Crashing": CrashingEnv,
    "Exiting": ExitingEnv,
    "Segfaulting": SegfaultingEnv,
    "Hanging": HangingEnv,
    "Printing": PrintingEnv,
    "Nan": NanEnv,
    "MaskedCartPole": MaskedCartPoleEnv,
    "Unclosable": UnclosableEnv,
    "Only": OnlyEnv,
    "GlobalDraws": GlobalDrawsEnv,
}


def register() -> None:
    """Register the Gymnasium stand-ins as `ctrlrl-test/NAME-v0`; once is enough, twice does no harm."""
    for name, cls in _ENVS.items():
        env_id = f"ctrlrl-test/{name}-v0"
        if env_id not in gym.registry:
            gym.register(env_id, entry_point=f"{__name__}:{cls.__name__}")


register()


def native_vector(num_envs: int, *, divergence: float = 0.02, length: int = 30) -> VectorEnv:
    """A batched torch environment as a GPU simulator would be: a cart to be parked at the origin.

    Observation groups `policy` [position, velocity] and `privileged` [position, velocity, mass, t]; the actuator clamps
    the action (1 wide) to 0.8 of its bounds; a row diverges with probability `divergence` per step and is then invalid
    and reset; `log["success"]` says whether an episode that ended is parked. Truncates after `length` steps.
    """
    import torch
    from torch import Tensor

    from ctrlrl.envs.vector import EnvState, Step, VectorEnv, seed_per_env

    class NativeVector(VectorEnv):
        name = "native-standin"
        device = torch.device("cpu")
        control_dt = 0.1
        may_be_invalid = True
        observation_space = gym.spaces.Dict(
            {"policy": gym.spaces.Box(-np.inf, np.inf, (2,)), "privileged": gym.spaces.Box(-np.inf, np.inf, (4,))}
        )
        action_space = gym.spaces.Box(-1.0, 1.0, (1,))

        def __init__(self) -> None:
            self.num_envs = num_envs
            self.random = torch.randint(2**31, (num_envs,))
            self.state = torch.zeros(num_envs, 4)

        def uniform(self, low: float, high: float) -> Tensor:
            self.random = (self.random * 1103515245 + 12345) % 2**31  # one small generator per row, batched
            return low + (high - low) * (self.random.float() / 2**31)

        def first_state(self) -> Tensor:
            zero = torch.zeros(self.num_envs)
            return torch.stack([self.uniform(-1, 1), zero, self.uniform(0.8, 1.2), zero], dim=1)

        def observe(self, state: Tensor) -> dict[str, Tensor]:
            return {"policy": state[:, :2].clone(), "privileged": state.clone()}

        def reset(self, seed: Any = None) -> dict[str, Tensor]:
            if seed is not None:
                seeds = [value or 0 for value in seed_per_env(seed, self.num_envs)]
                self.random = (torch.tensor(seeds) * 2654435761) % 2**31
            self.state = self.first_state()
            return self.observe(self.state)

        def step(self, action: Tensor) -> Step:
            applied = action.clamp(-0.8, 0.8)
            position, velocity, mass, t = self.state.unbind(1)
            velocity = velocity + 0.3 * applied[:, 0] / mass
            position = position + 0.1 * velocity
            final = torch.stack([position, velocity, mass, t + 1], dim=1)
            valid = self.uniform(0, 1) >= divergence
            terminated = valid & (position.abs() > 2)
            truncated = valid & ~terminated & (final[:, 3] >= length)
            ended = terminated | truncated
            self.state = torch.where((ended | ~valid)[:, None], self.first_state(), final)
            final = torch.where(valid[:, None], final, self.state)
            success = torch.where(ended, (position.abs() < 0.1).float(), torch.nan)
            return Step(
                obs=self.observe(self.state),
                action=applied,
                reward=torch.where(valid, -position.square() - 0.1 * applied[:, 0].square(), 0.0),
                terminated=terminated,
                truncated=truncated,
                final_obs=self.observe(final),
                valid=valid,
                log={"success": success},
            )

        def get_state(self) -> EnvState:
            rows = range(self.num_envs)
            return EnvState(
                [{"random": int(self.random[i])} for i in rows], [{"s": self.state[i].numpy()} for i in rows]
            )

        def set_state(self, state: EnvState, *, seed: int) -> tuple[dict[str, Tensor], list[str | None]]:
            self.reset(seed)
            reasons: list[str | None] = []
            for i, (json, arrays) in enumerate(zip(state.json, state.arrays, strict=True)):
                reasons.append("no state was saved" if json is None else None)
                if json is not None:
                    self.random[i], self.state[i] = json["random"], torch.from_numpy(arrays["s"].copy())
            return self.observe(self.state), reasons

    return NativeVector()
