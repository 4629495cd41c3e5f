"""The numbers of PPO. Apart from `ppo.py` only so that the command line can read them without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ctrlrl.config import Config


@dataclass(frozen=True, kw_only=True)
class PPOConfig(Config):
    """Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347). Defaults are the paper's for MuJoCo
    (table 3) unless noted."""

    section: ClassVar[str] = "agent"
    gamma: float = 0.99
    """Discount per environment step, in (0, 1]."""
    advantage: Literal["gae", "grpo", "rloo", "gigpo"] = "gae"
    """Estimator of advantages: by a critic; or without one, by what others of the same task came to, where
    environments are in groups (language.group_size): over the group's standard deviation (arXiv:2402.03300), against
    the mean of the others (arXiv:2402.14740), or GRPO's with that of steps at which the same was seen
    (arXiv:2505.10978)."""
    step_weight: float = 1.0
    """Weight of what gigpo finds step by step."""
    gae_lambda: float = 0.95
    """Trace decay of generalized advantage estimation, in [0, 1]."""
    epochs: int = 10
    """Passes over each rollout."""
    minibatch_size: int = 256
    """Rows per gradient update; a rollout is split into the nearest whole number of minibatches. The paper has 64."""
    lr: float = 3e-4
    """Adam step size of policy and critic."""
    critic_lr: float | None = None
    """Another one for the critic: of a language model 10 to 30 times the policy's (TWOSOME, arXiv:2401.14151). What
    the two share steps by lr."""
    critic_only: int = 0
    """First updates in which the critic alone learns, and the policy stays as it is (TWOSOME)."""
    lr_schedule: Literal["constant", "adaptive"] = "constant"
    """adaptive: after each minibatch divided by 1.5 where the policy moved by more than twice desired_kl, multiplied by
    it where it moved by less than half, between 1e-5 and 1e-2 (rsl_rl)."""
    desired_kl: float = 0.01
    """What the adaptive step size aims at."""
    target_kl: float | None = None
    """No further epoch on a rollout once the mean divergence of one exceeds 1.5 times this; by default all are made."""
    clip: float = 0.2
    """Largest change of the probability ratio that still pays."""
    clip_high: float | None = None
    """Another one for a ratio that rises: leaves what is unlikely more room (DAPO, arXiv:2503.14476, has 0.28)."""
    value_clip: float | None = None
    """Largest change of a value that still pays, in units of the (normalized) return; by default there is none."""
    value_coef: float = 0.5
    """Weight of the value loss, which is a mean square (Stable-Baselines3)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, summed over the decisions of a row."""
    kl_coef: float = 0.0
    """Weight of the divergence from the policy as the training began with it, which is kept beside; 0: none."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How it is estimated: k1 is taken from rewards, k2 (half the squared log-ratio) or k3 (ratio - 1 - log-ratio) is
    added to the loss (Schulman 2020, Approximating KL divergence)."""
    max_grad_norm: float = 0.5
    """Gradients of policy and critic together are shortened to this (Stable-Baselines3, CleanRL)."""
    normalize_advantage: bool = True
    """Standardize advantages within each minibatch; those of groups are as their papers have them."""
    normalize_obs: bool = True
    """Standardize observations by statistics of the rollouts before; images are scaled by 255 in any case (CleanRL)."""
    min_obs_std: float = 0.0
    """Smallest standard deviation that they are divided by, in their units: what hardly moves is not blown up."""
    normalize_reward: bool = True
    """Divide rewards by the running standard deviation of the discounted return, and clip them at 10 (CleanRL); not
    those of groups."""
    ratio: Literal["auto", "joint", "per-decision"] = "auto"
    """Whether a row with several decisions (MultiDiscrete, tokens) has one probability ratio or one for each; auto: one
    for each token."""
    credit: Literal["auto", "joint", "per-decision"] = "auto"
    """Whether such a row has one advantage or, of tokens by gae, one for each; auto: one for each token."""
    decision_gamma: float = 1.0
    """Discount from one token to the next of an answer: 1 is POAD's (arXiv:2405.15821); gamma counts each token as a
    step."""
    stale_rollouts: int = 0
    """Earlier rollouts that are learned from again beside each new one, by a decoupled ratio (AReaL, arXiv:2505.24298):
    clipped around the policy as the update begins, and weighted by how much likelier that makes what was done than the
    policy that did it."""
    stale_weight: float = 5.0
    """The largest such weight."""
    hidden: tuple[int, ...] = (64, 64)
    """Hidden layers of the policy and of the critic."""
    activation: Literal["tanh", "relu", "elu"] = "tanh"
    """Between hidden layers."""
    log_std: float = 0.0
    """Initial log standard deviation of Box actions, in half ranges where they are bounded."""
    recurrent: Literal["none", "gru", "lstm"] = "none"
    """A layer that remembers, between the observation and the hidden layers, in policy and critic each."""
    recurrent_size: int = 64
    """Its units."""
    sequence_length: int = 32
    """Steps of the sequences that a recurrent agent learns from; gradients reach no further back."""
    action_mask: str | None = None
    """Observation entry that says which discrete actions exist; by default `action_mask` where there is one."""
    policy_obs: tuple[str, ...] | None = None
    """Observation entries the policy reads; by default `policy` where there is such a group, else all."""
    critic_obs: tuple[str, ...] | None = None
    """Observation entries the critic reads; by default `policy` and `privileged`, else all."""
    execution: Literal["auto", "eager", "compiled", "captured"] = "auto"
    """How an update runs: as written, by torch.compile, or as a CUDA graph; the same within rounding. auto compiles
    trainings of 15,000 updates and more on a CPU, where a C++ compiler is installed, and says so."""

    def check(self) -> None:
        self.require("gamma", 0 < self.gamma <= 1, "in (0, 1]")
        self.require("gae_lambda", 0 <= self.gae_lambda <= 1, "in [0, 1]")
        self.require("step_weight", self.step_weight >= 0, "0 or more")
        self.require("decision_gamma", 0 < self.decision_gamma <= 1, "in (0, 1]")
        self.require("kl_coef", self.kl_coef >= 0, "0 or more")
        fits = self.kl_coef == 0 or self.kl_estimator != "k1" or self.advantage == "gae"
        self.require("kl_estimator", fits, "k2 or k3, where groups tell: k1 is taken from rewards by a critic's")
        self.require("credit", self.credit != "per-decision" or self.advantage == "gae", "joint, where groups tell")
        fits = self.credit != "per-decision" or self.ratio != "joint"
        self.require("ratio", fits, "per-decision, where the credit is")
        fits = self.recurrent == "none" or (self.advantage == "gae" and not self.stale_rollouts)
        self.require("recurrent", fits, "none, where groups tell or earlier rollouts are learned from again")
        self.require("stale_rollouts", 0 <= self.stale_rollouts <= 1000, "between 0 and 1,000")
        self.require("stale_weight", self.stale_weight >= 1, "at least 1")
        self.require("epochs", 1 <= self.epochs <= 1000, "between 1 and 1,000")
        self.require("min_obs_std", self.min_obs_std >= 0, "at least 0")
        self.require("minibatch_size", 2 <= self.minibatch_size <= 10**8, "between 2 and 100,000,000")
        self.require("lr", 0 < self.lr < 1, "in (0, 1)")
        adaptive = self.lr_schedule == "adaptive"
        self.require("lr", not adaptive or 1e-5 <= self.lr <= 1e-2, "between 1e-5 and 1e-2 where it is adaptive")
        self.require("critic_lr", self.critic_lr is None or 0 < self.critic_lr < 1, "in (0, 1), or null for lr")
        self.require("critic_only", self.critic_only >= 0, "at least 0")
        fits = self.advantage == "gae" or (self.critic_lr is None and not self.critic_only)
        self.require("advantage", fits, "gae with critic_lr or critic_only: others have no critic")
        self.require("desired_kl", self.desired_kl > 0, "above 0")
        self.require("target_kl", self.target_kl is None or self.target_kl > 0, "above 0, or null for none")
        self.require("clip", 0 < self.clip < 1, "in (0, 1)")
        self.require("clip_high", self.clip_high is None or self.clip_high > 0, "above 0, or null for clip")
        self.require("value_clip", self.value_clip is None or self.value_clip > 0, "above 0, or null for none")
        self.require("value_coef", self.value_coef >= 0, "0 or more")
        self.require("entropy_coef", self.entropy_coef >= 0, "0 or more")
        self.require("max_grad_norm", self.max_grad_norm > 0, "above 0")
        self.require("hidden", all(1 <= width <= 100_000 for width in self.hidden), "widths between 1 and 100,000")
        self.require("log_std", -20 <= self.log_std <= 5, "between -20 and 5")
        self.require("recurrent_size", 1 <= self.recurrent_size <= 100_000, "between 1 and 100,000")
        self.require("sequence_length", 1 <= self.sequence_length <= 100_000, "between 1 and 100,000")
