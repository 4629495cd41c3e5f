"""How each algorithm is trained in another library: which of its classes, and what differs from its defaults.

Runs in the peers' virtual environments. Networks are 2x256 and batches 256 for what learns from a replay, with one
update per environment step (DroQ: 20); PPO is as the library has it, networks and minibatches included.
"""

from __future__ import annotations

from typing import Any

LIBRARIES = {"sb3": ("stable_baselines3", "stable-baselines3", "Stable-Baselines3"), "sbx": ("sbx", "sbx-rl", "SBX")}
"""Module, package and title of each."""
ALGORITHMS = {"sb3": ("sac", "td3", "ddpg", "ppo"), "sbx": ("sac", "td3", "ddpg", "ppo", "droq")}
"""What each can train."""


def make_model(library: str, algo: str, env: Any, *, num_envs: int, seed: int, learning_starts: int) -> Any:
    """The model of `algo`, as `library` makes it for the vector environment `env`."""
    import importlib

    import numpy as np
    from stable_baselines3.common.noise import NormalActionNoise

    module = importlib.import_module(LIBRARIES[library][0])
    if algo == "ppo":
        return module.PPO("MlpPolicy", env, seed=seed, device="cpu")
    settings: dict[str, Any] = {
        "learning_starts": learning_starts,
        "batch_size": 256,
        "train_freq": 1,
        "gradient_steps": num_envs,
        "policy_kwargs": {"net_arch": [256, 256]},
    }
    if algo in ("td3", "ddpg"):  # whose papers explore by noise, and whose classes do not by themselves
        actions = env.action_space.shape[0]
        settings["action_noise"] = NormalActionNoise(np.zeros(actions), np.full(actions, 0.1))
    name = algo.upper()
    if algo == "droq":  # as SBX's documentation has it
        name = "SAC"
        settings["policy_kwargs"] |= {"dropout_rate": 0.01, "layer_norm": True}
        settings |= {"gradient_steps": 20 * num_envs, "policy_delay": 20}
    return getattr(module, name)("MlpPolicy", env, seed=seed, device="cpu", **settings)
