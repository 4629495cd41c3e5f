"""What algorithms there are, without importing them: the command line lists and picks them by name."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ctrlrl.config import Config, OfflineConfig, OffPolicyConfig, OnPolicyConfig, TrainConfig
from ctrlrl.errors import UsageError, nearest


@dataclass(frozen=True)
class Preset:
    """Settings for a family of environments, picked by name."""

    name: str
    pattern: str
    """Regular expression that the environment's ID must match from its start."""
    values: dict[str, Any]
    """Fields that differ from the defaults, nested."""
    reason: str


@dataclass(frozen=True)
class Algorithm:
    """One line of `ctrlrl algos`, and where the code is."""

    name: str
    title: str
    actions: str
    data: str
    """Where it learns from: an environment, a dataset, both."""
    paper: str
    config: str
    """`module:class` of its numbers."""
    agent: str
    """`module:class` of the agent."""
    loop: Literal["off-policy", "on-policy", "offline"] = "off-policy"
    """How it collects and learns: from a replay memory, from each rollout once, or from a dataset alone."""
    needs: Literal["", "data", "init_from", "base"] = ""
    """Which setting of the loop it cannot do without: a dataset besides, a run to start from, a policy to build on."""
    presets: tuple[Preset, ...] = field(default=())

    def load_config_class(self) -> type[Config]:
        """The dataclass of the algorithm's numbers; imports no torch."""
        loaded: type[Config] = _load(self.config)
        return loaded

    def load_agent_class(self) -> Any:
        """The agent's class; imports torch."""
        return _load(self.agent)

    def preset_for(self, env: str) -> Preset | None:
        """The settings to start from on the environment `env`."""
        return next((p for p in self.presets if re.match(p.pattern, env.rpartition(":")[2])), None)


_CONTINUOUS = (
    Preset(
        "swimmer",
        r"Swimmer-",
        {"agent": {"gamma": 0.999}},
        "0.99 sees too short a way ahead to swim (RL Zoo)",
    ),
    Preset(
        "pendulum",
        r"Pendulum-",
        {"learning_starts": 1_000, "eval_every": 2_000, "agent": {"actor_lr": 1e-3, "critic_lr": 1e-3}},
        "solved in a few thousand steps (RL Zoo's step size)",
    ),
)
"""Of what learns from a replay as SAC does."""

ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(
            name="sac",
            title="Soft actor-critic with a learned temperature",
            actions="Box",
            data="environment",
            paper="Haarnoja et al. 2018, arXiv:1812.05905",
            config="ctrlrl.algorithms.sac_config:SACConfig",
            agent="ctrlrl.algorithms.sac:SAC",
            presets=(
                *_CONTINUOUS,
                Preset(
                    "velocity",
                    r"\w+VelocityFlat-",
                    {
                        "num_envs": 512,
                        "steps": 10_000_000,
                        "learning_starts": 25_600,
                        "update_every": 512,
                        "eval_every": 1_000_000,
                        "checkpoint_every": 1_000_000,
                        "log_every": 51_200,
                        "agent": {
                            "utd": 1 / 512,
                            "batch_size": 1024,
                            "gamma": 0.97,
                            "tau": 0.02,
                            "initial_alpha": 0.01,
                            "layer_norm": True,
                            "normalize_obs": True,
                        },
                    },
                    "many environments, one large update for a step of all of them (FastTD3, FastSAC)",
                ),
                Preset(
                    "swing-up",
                    r"\w+SwingUp-",
                    {
                        "num_envs": 64,
                        "steps": 500_000,
                        "learning_starts": 10_000,
                        "update_every": 64,
                        "eval_every": 25_000,
                        "checkpoint_every": 50_000,
                        "agent": {
                            "utd": 0.0625,
                            "batch_size": 512,
                            "actor_lr": 1e-3,
                            "critic_lr": 1e-3,
                            "hidden": [128, 128],
                        },
                    },
                    "many environments, few and large updates",
                ),
                Preset(
                    "panda",
                    r"Panda(Reach|Lift)-",
                    {
                        "num_envs": 64,
                        "update_every": 64,
                        "agent": {
                            "gamma": 0.97,
                            "utd": 0.0625,
                            "batch_size": 512,
                            "actor_lr": 1e-3,
                            "critic_lr": 1e-3,
                            "initial_alpha": 0.01,
                        },
                    },
                    "ours: many environments, few large updates; rewards are small, and entropy must not outweigh them",
                ),
            ),
        ),
        Algorithm(
            name="redq",
            title="SAC with an ensemble of critics, of which random subsets make the targets",
            actions="Box",
            data="environment",
            paper="Chen et al. 2021, arXiv:2101.05982",
            config="ctrlrl.algorithms.redq_config:REDQConfig",
            agent="ctrlrl.algorithms.redq:REDQ",
            presets=_CONTINUOUS,
        ),
        Algorithm(
            name="droq",
            title="SAC with dropout and LayerNorm in the critics, for many updates per step",
            actions="Box",
            data="environment",
            paper="Hiraoka et al. 2022, arXiv:2110.02034",
            config="ctrlrl.algorithms.droq_config:DroQConfig",
            agent="ctrlrl.algorithms.droq:DroQ",
            presets=_CONTINUOUS,
        ),
        Algorithm(
            name="dsac",
            title="SAC with a Gaussian distribution of returns for a critic",
            actions="Box",
            data="environment",
            paper="Duan et al. 2021, arXiv:2001.02811",
            config="ctrlrl.algorithms.dsac_config:DSACConfig",
            agent="ctrlrl.algorithms.dsac:DSAC",
            presets=_CONTINUOUS,
        ),
        Algorithm(
            name="dsac-t",
            title="DSAC with three refinements: twin distributions, whose gradients adapt to the rewards' scale",
            actions="Box",
            data="environment",
            paper="Duan et al. 2025, arXiv:2310.05858",
            config="ctrlrl.algorithms.dsac_t_config:DSACTConfig",
            agent="ctrlrl.algorithms.dsac_t:DSACT",
            presets=_CONTINUOUS,
        ),
        Algorithm(
            name="td3",
            title="Twin delayed deep deterministic policy gradient",
            actions="Box",
            data="environment",
            paper="Fujimoto et al. 2018, arXiv:1802.09477",
            config="ctrlrl.algorithms.td3_config:TD3Config",
            agent="ctrlrl.algorithms.td3:TD3",
            presets=_CONTINUOUS,
        ),
        Algorithm(
            name="ddpg",
            title="Deep deterministic policy gradient",
            actions="Box",
            data="environment",
            paper="Lillicrap et al. 2016, arXiv:1509.02971",
            config="ctrlrl.algorithms.td3_config:DDPGConfig",
            agent="ctrlrl.algorithms.td3:TD3",
            presets=_CONTINUOUS,
        ),
        Algorithm(
            name="ppo",
            title="Proximal policy optimization",
            actions="Box, Discrete, MultiDiscrete, tokens",
            data="environment",
            paper="Schulman et al. 2017, arXiv:1707.06347",
            config="ctrlrl.algorithms.ppo_config:PPOConfig",
            agent="ctrlrl.algorithms.ppo:PPO",
            loop="on-policy",
            presets=(
                *_CONTINUOUS[:1],
                Preset(
                    "velocity",
                    r"\w+VelocityFlat-",
                    {
                        "num_envs": 1024,
                        "rollout_steps": 24 * 1024,
                        "steps": 10_000_000,
                        "eval_every": 1_000_000,
                        "checkpoint_every": 1_000_000,
                        "log_every": 24 * 1024,
                        "agent": {
                            "epochs": 5,
                            "minibatch_size": 6144,
                            "lr": 1e-3,
                            "lr_schedule": "adaptive",
                            "entropy_coef": 0.005,
                            "max_grad_norm": 1.0,
                            "hidden": [128, 128],
                            "activation": "elu",
                            "log_std": -0.7,
                        },
                    },
                    "many environments, short rollouts, large minibatches (mjbatch, rsl_rl)",
                ),
                Preset(
                    "swing-up",
                    r"\w+SwingUp-",
                    {
                        "num_envs": 128,
                        "rollout_steps": 32 * 128,
                        "steps": 2_000_000,
                        "eval_every": 100_000,
                        "checkpoint_every": 100_000,
                        "log_every": 32 * 128,
                        "agent": {
                            "epochs": 5,
                            "minibatch_size": 1024,
                            "lr": 1e-3,
                            "lr_schedule": "adaptive",
                            "entropy_coef": 0.005,
                            "max_grad_norm": 1.0,
                            "activation": "elu",
                        },
                    },
                    "many environments, short rollouts, large minibatches, as for walking",
                ),
                Preset(
                    "panda",
                    r"Panda(Reach|Lift)-",
                    {
                        "num_envs": 512,
                        "rollout_steps": 32 * 512,
                        "steps": 5_000_000,
                        "eval_every": 500_000,
                        "checkpoint_every": 500_000,
                        "log_every": 32 * 512,
                        "agent": {
                            "gamma": 0.97,
                            "epochs": 5,
                            "minibatch_size": 2048,
                            "lr": 5e-4,
                            "entropy_coef": 0.001,
                            "max_grad_norm": 1.0,
                            "hidden": [128, 128],
                            "activation": "elu",
                            "log_std": -0.7,
                        },
                    },
                    "ours: as for velocity, but for a constant step size, and 0.97, which sees a second ahead",
                ),
                Preset(
                    "lunarlander",
                    r"LunarLander-",
                    {"agent": {"gamma": 0.999, "gae_lambda": 0.98, "entropy_coef": 0.01}},
                    "RL Zoo's: landing takes hundreds of steps",
                ),
            ),
        ),
        Algorithm(
            name="iql",
            title="Implicit Q-learning: values of the data's actions alone, then advantage-weighted regression",
            actions="Box",
            data="dataset",
            paper="Kostrikov et al. 2021, arXiv:2110.06169",
            config="ctrlrl.algorithms.iql_config:IQLConfig",
            agent="ctrlrl.algorithms.iql:IQL",
            loop="offline",
            presets=(
                *_CONTINUOUS[:1],
                Preset(
                    "locomotion",
                    r"(HalfCheetah|Hopper|Walker2d|Ant)-",
                    {"sampling": {"return_range": 1000.0}},
                    "the paper's: rewards on the scale for which beta was chosen",
                ),
                Preset(
                    "antmaze",
                    r"AntMaze",
                    {"sampling": {"reward_shift": -1.0}, "agent": {"expectile": 0.9, "beta": 10.0}},
                    "the paper's for sparse rewards and long ways",
                ),
                Preset(
                    "adroit",
                    r"AdroitHand",
                    {"agent": {"beta": 0.5}},
                    "the paper's for few human demonstrations (it has dropout in the policy besides)",
                ),
            ),
        ),
        Algorithm(
            name="cql",
            title="Conservative Q-learning: SAC with low values where the data has no actions; Cal-QL by a setting",
            actions="Box",
            data="dataset",
            paper="Kumar et al. 2020, arXiv:2006.04779; Nakamoto et al. 2023, arXiv:2303.05479",
            config="ctrlrl.algorithms.cql_config:CQLConfig",
            agent="ctrlrl.algorithms.cql:CQL",
            loop="offline",
            presets=(
                *_CONTINUOUS[:1],
                Preset(
                    "antmaze",
                    r"AntMaze",
                    {
                        "sampling": {"reward_scale": 10.0, "reward_shift": -0.5},
                        "agent": {"conservative_weight": 5.0, "action_gap": 0.8, "max_target_backup": True},
                    },
                    "CORL's for sparse rewards and long ways (it has five hidden layers in the critics besides)",
                ),
            ),
        ),
        Algorithm(
            name="iql-discrete",
            title="Implicit Q-learning for discrete actions",
            actions="Discrete",
            data="dataset",
            paper="Kostrikov et al. 2021, arXiv:2110.06169",
            config="ctrlrl.algorithms.iql_discrete_config:IQLDiscreteConfig",
            agent="ctrlrl.algorithms.iql_discrete:IQLDiscrete",
            loop="offline",
        ),
        Algorithm(
            name="iql-tokens",
            title="Implicit Q-learning for answers that a language model writes",
            actions="tokens",
            data="dataset",
            paper="Snell et al. 2022, arXiv:2206.11871; Kostrikov et al. 2021, arXiv:2110.06169",
            config="ctrlrl.algorithms.iql_tokens_config:IQLTokensConfig",
            agent="ctrlrl.algorithms.iql_tokens:IQLTokens",
            loop="offline",
        ),
        Algorithm(
            name="cql-discrete",
            title="Conservative Q-learning for discrete actions, on double DQN",
            actions="Discrete",
            data="dataset",
            paper="Kumar et al. 2020, arXiv:2006.04779",
            config="ctrlrl.algorithms.cql_discrete_config:CQLDiscreteConfig",
            agent="ctrlrl.algorithms.cql_discrete:CQLDiscrete",
            loop="offline",
        ),
        Algorithm(
            name="sac-discrete",
            title="Soft actor-critic for discrete actions, stabilized",
            actions="Discrete",
            data="environment",
            paper="Zhou et al. 2022, arXiv:2209.10081; Christodoulou 2019, arXiv:1910.07207",
            config="ctrlrl.algorithms.sac_discrete_config:SACDiscreteConfig",
            agent="ctrlrl.algorithms.sac_discrete:SACDiscrete",
            presets=(
                Preset(
                    "classic-control",
                    r"(CartPole|Acrobot)-",
                    {"learning_starts": 1_000, "eval_every": 2_000, "agent": {"critic_lr": 1e-3, "batch_size": 128}},
                    "solved in tens of thousands of steps",
                ),
                Preset(
                    "lunarlander",
                    r"LunarLander-",
                    {"learning_starts": 1_000, "agent": {"critic_lr": 6e-4, "batch_size": 128}},
                    "ours: faster critics, smaller batches",
                ),
            ),
        ),
        Algorithm(
            name="bc",
            title="Behaviour cloning: supervised learning of the data's actions",
            actions="Box, Discrete, MultiDiscrete, tokens",
            data="dataset",
            paper="Pomerleau 1988, ALVINN",
            config="ctrlrl.algorithms.bc_config:BCConfig",
            agent="ctrlrl.algorithms.bc:BC",
            loop="offline",
        ),
        Algorithm(
            name="td3-bc",
            title="TD3 with behaviour cloning",
            actions="Box",
            data="dataset",
            paper="Fujimoto and Gu 2021, arXiv:2106.06860",
            config="ctrlrl.algorithms.td3_bc_config:TD3BCConfig",
            agent="ctrlrl.algorithms.td3_bc:TD3BC",
            loop="offline",
            presets=_CONTINUOUS[:1],
        ),
        Algorithm(
            name="rebrac",
            title="TD3 that stays near the data in both actor and critics",
            actions="Box",
            data="dataset",
            paper="Tarasov et al. 2023, arXiv:2305.09836",
            config="ctrlrl.algorithms.rebrac_config:ReBRACConfig",
            agent="ctrlrl.algorithms.rebrac:ReBRAC",
            loop="offline",
            presets=(
                *_CONTINUOUS[:1],
                Preset(
                    "halfcheetah",
                    r"HalfCheetah-",
                    {"agent": {"actor_bc": 0.001, "critic_bc": 0.01}},
                    "the authors' tuning for D4RL's medium data; for other data see docs/rebrac.md",
                ),
                Preset(
                    "hopper",
                    r"Hopper-",
                    {"agent": {"actor_bc": 0.01, "critic_bc": 0.01}},
                    "the authors' tuning for D4RL's medium data; for other data see docs/rebrac.md",
                ),
                Preset(
                    "walker2d",
                    r"Walker2d-",
                    {"agent": {"actor_bc": 0.05, "critic_bc": 0.1}},
                    "the authors' tuning for D4RL's medium data; for other data see docs/rebrac.md",
                ),
            ),
        ),
        Algorithm(
            name="rlpd",
            title="REDQ with LayerNorm, from data and an environment, half and half",
            actions="Box",
            data="both",
            paper="Ball et al. 2023, arXiv:2302.02948",
            config="ctrlrl.algorithms.rlpd_config:RLPDConfig",
            agent="ctrlrl.algorithms.rlpd:RLPD",
            needs="data",
            presets=(
                *_CONTINUOUS,
                Preset(
                    "antmaze",
                    r"AntMaze",
                    {
                        "sampling": {"reward_shift": -1.0},
                        "agent": {"hidden": [256, 256, 256], "subset": 1, "backup_entropy": False},
                    },
                    "the authors' for sparse rewards and long ways",
                ),
                Preset(
                    "adroit",
                    r"AdroitHand",
                    {"agent": {"hidden": [256, 256, 256], "backup_entropy": False}},
                    "the authors' for sparse rewards",
                ),
            ),
        ),
        Algorithm(
            name="resfit",
            title="A residual over a frozen policy, from the environment and demonstrations",
            actions="Box",
            data="both",
            paper="Ankile et al. 2025, arXiv:2509.19301",
            config="ctrlrl.algorithms.resfit_config:ResFiTConfig",
            agent="ctrlrl.algorithms.resfit:ResFiT",
            needs="base",
            presets=(
                Preset(
                    "paper",
                    r"",
                    {"learning_starts": 10_000, "buffer": {"n_step": 3}},
                    "the authors' for rewards that tell of success alone",
                ),
            ),
        ),
        Algorithm(
            name="policy-decorator",
            title="SAC over a frozen policy, which it may correct a little, and more often as time goes on",
            actions="Box",
            data="environment",
            paper="Yuan et al. 2024, arXiv:2412.13630",
            config="ctrlrl.algorithms.policy_decorator_config:PolicyDecoratorConfig",
            agent="ctrlrl.algorithms.policy_decorator:PolicyDecorator",
            needs="base",
            presets=(
                Preset("paper", r"", {"learning_starts": 8_000, "sampling": {"reward_shift": -1.0}}, "the authors'"),
            ),
        ),
        Algorithm(
            name="expo",
            title="An expressive policy that goes on imitating, edited towards value; the best of several acts",
            actions="Box",
            data="both",
            paper="Dong et al. 2025, arXiv:2507.07986",
            config="ctrlrl.algorithms.expo_config:EXPOConfig",
            agent="ctrlrl.algorithms.expo:EXPO",
            needs="base",
            presets=(
                Preset("pretrained", r"", {"learning_starts": 0}, "the authors', where the base was trained before"),
            ),
        ),
        Algorithm(
            name="wsrl",
            title="Fine-tuning of what was learned from data, without that data",
            actions="Box",
            data="both",
            paper="Zhou et al. 2024, arXiv:2412.07762",
            config="ctrlrl.algorithms.wsrl_config:WSRLConfig",
            agent="ctrlrl.algorithms.wsrl:WSRL",
            needs="init_from",
            presets=_CONTINUOUS[:1],
        ),
    )
}


def find_algorithm(name: str) -> Algorithm:
    """The algorithm called `name`.

    Raises:
        UsageError: if there is none; suggests the nearest names.
    """
    if name not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise UsageError(f"no algorithm {name!r}.{nearest(name, ALGORITHMS)} There is: {known} (ctrlrl algos)")
    return ALGORITHMS[name]


_CONFIGS: dict[str, type[TrainConfig]] = {
    "off-policy": OffPolicyConfig,
    "on-policy": OnPolicyConfig,
    "offline": OfflineConfig,
}


@functools.cache
def train_config_class(name: str) -> type[TrainConfig]:
    """The configuration of a training run with algorithm `name`: the loop's fields and `agent`."""
    algorithm = find_algorithm(name)
    agent = algorithm.load_config_class()
    made = dataclasses.make_dataclass(
        f"Train{agent.__name__.removesuffix('Config')}",
        [("agent", agent, field(default_factory=agent))],
        bases=(_CONFIGS[algorithm.loop],),
        frozen=True,
        kw_only=True,
    )
    made.__doc__ = (agent.__doc__ or "").split("\n")[0]
    made.__module__ = __name__
    return made


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
