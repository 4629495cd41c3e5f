"""Watching a run's policy in a window, in real time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ctrlrl.config import TrainConfig
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.envs.viewing import GymnasiumWindow, MujocoWindow, Window
from ctrlrl.errors import UsageError
from ctrlrl.nn.cpu import prepare_cpu, products_of
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.policy import Policy
from ctrlrl.training.base_policy import BaseLike
from ctrlrl.training.collector import require_finite
from ctrlrl.training.evaluation import FIRST_SEED
from ctrlrl.training.loading import Run, load, own_environment
from ctrlrl.training.setup import EnvLike, make, visible
from ctrlrl.tree import obs_to

_NO_CLOCK = 1 / 30
"""Seconds that a step is shown where the environment has no clock, and between two looks at a window that pauses."""
_LATE = 0.25
"""Seconds behind which what was missed is not made up for: a computer that is too slow, or was asleep."""


@dataclass(frozen=True, slots=True)
class Episode:
    """One that came to its end while it was watched."""

    seed: int
    ret: float
    """Sum of its rewards."""
    length: int
    """Steps."""
    success: bool | None
    """None where the environment does not say."""
    diverged: bool
    """Whether it ended since its simulation became unstable."""


class Pace:
    """Lets a step pass every `period` seconds: waits for the moment, not for a time, so that delays do not add up."""

    def __init__(
        self,
        period: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.period = period
        self._clock, self._sleep = clock, sleep
        self._due = clock()

    def wait(self) -> None:
        """Return when the next step is due, at once when that was missed."""
        self._due += self.period
        now = self._clock()
        if now < self._due:
            self._sleep(self._due - now)
        elif now > self._due + _LATE:
            self._due = now

    def pause(self) -> None:
        """Wait a moment that does not count."""
        self._sleep(_NO_CLOCK)
        self._due = self._clock()


def play(
    run: str | Path | Run,
    *,
    checkpoint: str = "best",
    seed: int | None = None,
    episodes: int | None = None,
    speed: float = 1.0,
    backend: str | None = None,
    env: EnvLike | None = None,
    device: str = "cpu",
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
    base: BaseLike | None = None,
    on_episode: Callable[[Episode], None] = lambda episode: None,
    pace: Callable[[float], Pace] = Pace,
) -> None:
    """Show deterministic episodes of a run's policy in a window until it is closed.

    Episodes start from `seed`, `seed` + 1, ...: by default from the seeds of `ctrlrl eval`, and with its returns.

    Args:
        run: the run folder.
        checkpoint: `best`, `last`, or a checkpoint folder's name.
        seed: of the first episode, from 0 to 2**32 - 1.
        episodes: after so many the window closes by itself; None: never.
        speed: simulated seconds per second.
        backend: as in training, by default the one the run was trained with.
        env: in place of the run's: an ID, an environment, a vector environment of one, or a function.
        device: where the policy runs.
        network: as given to `train`.
        encoder: as given to `train`.
        base: as `load`.
        on_episode: called with every episode that ended.
        pace: makes what waits between two steps, given seconds between them.

    Raises:
        UsageError: as `load`; or the environment cannot be shown in a window here.
        NonFiniteError: the environment gave NaN or infinity.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise UsageError(f"speed must be a finite number above 0, got {speed}")
    if episodes is not None and episodes < 1:
        raise UsageError(f"episodes must be at least 1, got {episodes}")
    seed = FIRST_SEED if seed is None else seed
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must be between 0 and 4294967295, got {seed}")
    loaded = load(run, checkpoint=checkpoint, device=device, network=network, encoder=encoder, base=base)
    source = own_environment(loaded, env)
    prepare_cpu()
    vector, window = _open(source, visible(loaded.config, backend))
    try:
        steps = pace((vector.control_dt or _NO_CLOCK) / speed)
        for count in itertools.count() if episodes is None else range(episodes):
            episode = _episode(vector, loaded.policy, (seed + count) % 2**32, window, steps)
            if episode is None:
                break
            on_episode(episode)
    finally:
        window.close()
        if vector is not env:
            vector.close()


def _open(source: EnvLike, config: TrainConfig) -> tuple[VectorEnv, Window]:
    """One environment and a window on it: MuJoCo's viewer where it has a scene, else the one it opens by itself."""
    vector = make(source, config, 1, "cpu")
    try:
        vector.reset(0)
        try:
            vector.scene(0)
        except UsageError:
            if config.env_python or not isinstance(source, str):
                raise
        else:
            return vector, MujocoWindow(vector)
    except BaseException:
        if vector is not source:
            vector.close()
        raise
    vector.close()
    human = replace(config, backend="gymnasium", env_kwargs=config.env_kwargs | {"render_mode": "human"})
    return make(source, human, 1, "cpu"), GymnasiumWindow()


def _episode(env: VectorEnv, policy: Policy, seed: int, window: Window, pace: Pace) -> Episode | None:
    """One episode from `seed`; None where the window was closed before its end."""
    obs, state = env.reset([seed]), policy.initial_state(1)
    total, length = 0.0, 0
    window.show()
    while window.is_open():
        if window.paused:
            pace.pause()
            window.show()
            continue
        with products_of(1):
            action, state, _ = policy.act(obs_to(obs, policy.device), state, explore=False)
        step = env.step(action.to(env.device))
        if not step.valid:
            return Episode(seed, total, length, None, diverged=True)
        require_finite(env, step, step.valid, [length])
        total, length, obs = total + float(step.reward), length + 1, step.obs
        pace.wait()
        if step.terminated or step.truncated:
            success = float(step.log["success"]) if "success" in step.log else math.nan
            return Episode(seed, total, length, None if math.isnan(success) else bool(success), diverged=False)
        window.show()
    return None
