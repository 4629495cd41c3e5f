"""PPO in trainings: probes, memory, masks, stopping and going on, cores."""

from __future__ import annotations

import copy
import json

import gymnasium as gym
import numpy as np
import pytest
import torch

import ctrlrl
from ctrlrl.algorithms.ppo import PPO
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.algorithms.registry import train_config_class
from ctrlrl.envs.vector import Step
from ctrlrl.errors import UsageError
from ctrlrl.replay.rollout import Rollout
from ctrlrl.runs.checkpoint import load_checkpoint
from ctrlrl.runs.folder import RunFolder
from ctrlrl.training import on_policy
from ctrlrl.training import online_session as session
from ctrlrl.training.on_policy import OnPolicyLoop
from tests import runs
from tests.runs import assert_same
from tests.standins import MODULE, WalkEnv
from tests.test_ppo import ACT, OBS, PLAIN

SMALL = {name: value for name, value in runs.SMALL.items() if name != "learning_starts"} | {
    "num_envs": 3,
    "rollout_steps": 60,
    "agent": {"hidden": [16, 16], "minibatch_size": 16, "epochs": 2},
}


class Probe(gym.Env):
    """One step an episode, or two: observation 1 after -1; the reward is a function of observation and action."""

    def __init__(self, reward, length=1, space=None):
        self.reward, self.length = reward, length
        self.observation_space = gym.spaces.Box(-1, 1, (1,))
        self.action_space = space or gym.spaces.Box(-0.4, 0.4, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        self.obs = np.float32([-1.0 if self.length > 1 else self.np_random.choice([-1.0, 1.0])])
        return self.obs, {}

    def step(self, action):
        reward, self.t = self.reward(self.obs[0], action), self.t + 1
        self.obs = np.float32([1.0])
        return self.obs, float(reward), self.t >= self.length, False, {}


def train_probe(tmp_path, reward, length=1, space=None, **agent):
    fields = {"normalize_reward": False, "normalize_obs": False, "hidden": [32], "lr": 3e-3, "minibatch_size": 64}
    settings = SMALL | {"num_envs": 4, "rollout_steps": 256, "steps": 4_096, "eval_every": 0, "checkpoint_every": 10**6}
    env = lambda: Probe(reward, length, space)  # noqa: E731
    agents = []

    class Keep(ctrlrl.Callback):
        def on_end(self, loop):
            agents.append(loop.agent)

    settings |= {"agent": fields | agent, "callbacks": [Keep()]}
    ctrlrl.train("ppo", env, out=str(tmp_path / "r"), **settings)
    return agents[0]


def values_of(agent: PPO) -> list[float]:
    return agent.critic(torch.tensor([[-1.0], [1.0]])).tolist()


def test_probe_values(tmp_path):
    agent = train_probe(tmp_path, lambda obs, action: obs)
    assert values_of(agent) == pytest.approx([-1.0, 1.0], abs=0.1)


def test_probe_a_delayed_reward_is_discounted_once(tmp_path):
    agent = train_probe(tmp_path, lambda obs, action: float(obs > 0), length=2, gamma=0.5)
    assert values_of(agent) == pytest.approx([0.5, 1.0], abs=0.1)


@pytest.mark.parametrize("space", [None, gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([2, 3])])
def test_probe_the_policy_follows_the_action_that_pays(tmp_path, space):
    def reward(obs, action):
        if space is None:
            return obs * action[0] / 0.4
        best = 1 if obs > 0 else 0
        return np.mean(np.asarray(action) == best)

    agent = train_probe(tmp_path, reward, space=space)
    action = agent.policy.act(torch.tensor([[-1.0], [1.0]]))[0]
    if space is None:
        assert action[0] < -0.2 and action[1] > 0.2
    else:
        assert (action[0] == 0).all() and (action[1] == 1).all()


class Recall(gym.Env):
    """What is shown at first must be done two steps later; in between nothing is seen."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown, self.t = int(self.np_random.integers(2)), 0
        return np.float32([2 * self.shown - 1]), {}

    def step(self, action):
        self.t += 1
        last = self.t == 3
        return np.float32([0.0]), float(last and action == self.shown), last, False, {}


@pytest.mark.parametrize(("recurrent", "low", "high"), [("none", 0.3, 0.7), ("gru", 0.95, 1.0), ("lstm", 0.95, 1.0)])
def test_probe_only_a_policy_with_memory_can_recall(tmp_path, recurrent, low, high):
    settings = SMALL | {"num_envs": 8, "rollout_steps": 384, "steps": 7_680, "eval_every": 7_680, "eval_episodes": 60}
    agent = {"hidden": [16], "lr": 5e-3, "minibatch_size": 96, "epochs": 4, "sequence_length": 6}
    settings |= {"agent": agent | {"recurrent": recurrent, "recurrent_size": 16}, "checkpoint_every": 10**6}
    run = ctrlrl.train("ppo", Recall, out=str(tmp_path / "r"), **settings)
    assert low <= ctrlrl.evaluate(run, env=Recall, checkpoint="last").mean <= high


@pytest.mark.parametrize(
    ("env", "more"),
    [
        ("Pendulum-v1", {}),
        ("CartPole-v1", {"backend": "workers", "num_envs": 2}),
        ("Pendulum-v1", {"agent": SMALL["agent"] | {"recurrent": "lstm", "recurrent_size": 8, "sequence_length": 8}}),
        ("Acrobot-v1", {"agent": SMALL["agent"] | {"lr_schedule": "adaptive", "recurrent": "gru"}}),
    ],
)
def test_stopped_in_a_rollout_and_resumed_equals_uninterrupted(tmp_path, env, more):
    settings = SMALL | more
    ctrlrl.train("ppo", env, out=str(tmp_path / "whole"), **settings)
    ctrlrl.train(
        "ppo", env, out=str(tmp_path / "parts"), **settings | {"steps": 150}
    )  # an evaluation is due there, too
    ctrlrl.resume(tmp_path / "parts", steps=400, quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_episodes_that_cannot_go_on_are_cut_in_the_rollout():
    rollout = Rollout(OBS, horizon=4, num_envs=2, extras={"decision": torch.zeros(2, 1)}, policy_state={})
    first, second, fresh = (torch.full((2, 5), x) for x in (1.0, 2.0, 9.0))
    no = torch.zeros(2, dtype=torch.bool)
    rollout.begin(first)
    rollout.add(Step(second, no, torch.ones(2), no, no, second, ~no), {"decision": torch.zeros(2, 1)})
    again = Rollout(OBS, horizon=4, num_envs=2, extras={"decision": torch.zeros(2, 1)}, policy_state={})
    again.load_state_dict(copy.deepcopy(rollout.state_dict()))
    again.begin(fresh, [True, False])
    assert again.truncated[0].tolist() == [True, False] and again.start[1].tolist() == [True, False]
    assert again.obs[1, :, 0].tolist() == [9.0, 2.0] and again.final_obs[0, :, 0].tolist() == [2.0, 2.0]


def test_a_training_shorter_than_a_rollout_says_so(tmp_path):
    run = ctrlrl.train("ppo", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL | {"steps": 30, "eval_every": 0})
    assert (
        "no update will run: a rollout takes 60 steps, and the training 30" in (run.path / "metrics.jsonl").read_text()
    )


class Masked(gym.Env):
    """Of three actions two exist, in turns; each costs something but the first one there is. With features of each."""

    def __init__(self, candidates: bool = False) -> None:
        spaces = {"obs": gym.spaces.Box(-1, 1, (2,)), "action_mask": gym.spaces.Box(0, 1, (3,), np.int8)}
        if candidates:
            spaces["candidates"] = gym.spaces.Box(-1, 1, (3, 2))
        self.observation_space, self.action_space = gym.spaces.Dict(spaces), gym.spaces.Discrete(3, start=1)

    def observe(self):
        self.allowed = np.ones(3, np.int8)
        self.allowed[self.t % 3] = 0
        obs = {"obs": np.float32([self.t / 10, 1]), "action_mask": self.allowed}
        if "candidates" in self.observation_space.spaces:
            obs["candidates"] = self.np_random.uniform(-1, 1, (3, 2)).astype(np.float32)
        return {name: obs[name] for name in self.observation_space.spaces}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        assert self.allowed[action - 1], "an action that does not exist"
        reward, self.t = -float(action - 1 != self.allowed.argmax()), self.t + 1
        obs = self.observe()
        if self.t == 6:
            obs["action_mask"] = np.zeros(3, np.int8)  # nothing can be done any more
        return obs, reward, self.t == 6, False, {}


@pytest.mark.parametrize("recurrent", ["none", "lstm"])
@pytest.mark.parametrize("candidates", [False, True])
def test_masked_actions_are_never_taken_and_get_no_gradient(tmp_path, recurrent, candidates):
    how = {"num_envs": 2, "rollout_steps": 30, "eval_every": 90, "checkpoint_every": 50}
    agent = {"hidden": [16], "minibatch_size": 15, "recurrent": recurrent, "recurrent_size": 8, "sequence_length": 5}
    settings = SMALL | how | {"agent": agent, "env": lambda: Masked(candidates)}
    ctrlrl.train("ppo", out=str(tmp_path / "whole"), **settings | {"steps": 130})
    ctrlrl.train("ppo", out=str(tmp_path / "parts"), **settings | {"steps": 90})
    ctrlrl.resume(tmp_path / "parts", steps=130, quiet=True, env=settings["env"])
    assert_same(tmp_path / "whole", tmp_path / "parts")

    env = Masked(candidates)
    trained = PPO(env.observation_space, env.action_space, PPOConfig(**PLAIN))
    assert not {"action_mask", "candidates"} & {*trained.policy.encoder.names}
    obs = {name: torch.as_tensor(value)[None] for name, value in env.reset(seed=0)[0].items()}
    distribution = trained.policy.distribution(obs)
    assert distribution.probs.flatten().tolist()[0] == 0
    out = trained.policy.trunk[-1].weight
    (gradient,) = torch.autograd.grad(distribution.log_prob(torch.tensor([[1]])).sum(), out)
    assert candidates or (not gradient[0].any() and gradient[1].any())


def test_a_mask_for_actions_that_are_not_discrete_is_refused():
    with pytest.raises(UsageError, match=r"agent\.action_mask names 'legal', but there is nothing to mask"):
        PPO(OBS, ACT, PPOConfig(action_mask="legal"))


@pytest.mark.parametrize("recurrent", ["none", "gru"])
def test_reset_rows_of_a_vector_environment_are_no_transitions(tmp_path, recurrent):
    """Gymnasium's own autoreset takes a step of its own, here every second one."""

    class Short(Probe):
        def __init__(self):
            super().__init__(lambda obs, action: obs)

    env = gym.vector.SyncVectorEnv([Short] * 4)
    agent = {"hidden": [8], "minibatch_size": 4, "recurrent": recurrent, "recurrent_size": 8, "sequence_length": 8}
    settings = SMALL | {"num_envs": 4, "rollout_steps": 36, "steps": 400, "eval_every": 0, "agent": agent}
    run = ctrlrl.train("ppo", env, out=str(tmp_path / "r"), **settings)
    state = load_checkpoint(RunFolder(run.path).find_checkpoint("last"))
    count = state["agent"]["policy"]["normalizer.entries.obs.count"].item()
    assert state["loop"]["env_steps"] == 400 and 350 < count <= 400  # each transition once, none of a reset


def test_a_rollout_that_does_not_fit_into_memory_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"a rollout of 1,000,000,000 steps takes .* lower --rollout-steps"):
        ctrlrl.train("ppo", "Pendulum-v1", out=str(tmp_path / "r"), **SMALL | {"rollout_steps": 10**9, "num_envs": 1})
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_cartpole_without_velocities_needs_memory(tmp_path):
    """With memory it balances until the time limit of 500 steps; without it falls after some 50."""
    returns = {}
    for recurrent in ("gru", "none"):
        agent = {"recurrent": recurrent, "sequence_length": 16, "minibatch_size": 256, "lr": 1e-3}
        returns[recurrent] = [
            ctrlrl.evaluate(
                ctrlrl.train(
                    "ppo", MODULE + "ctrlrl-test/MaskedCartPole-v0", out=str(tmp_path / f"{recurrent}-{seed}"),
                    seed=seed, steps=60_000, eval_every=20_000, threads=1, video=False, quiet=True, agent=agent,
                ),
                checkpoint="last",
            ).mean
            for seed in range(2)
        ]  # fmt: skip
    assert min(returns["gru"]) > 450, returns
    assert max(returns["none"]) < 150, returns


def test_cores_are_for_environments_and_for_large_networks(tmp_path, monkeypatch):
    ppo = train_config_class("ppo")
    assert OnPolicyLoop.shares_environments(ppo(env="X-v0", steps=50_000))
    assert not OnPolicyLoop.shares_environments(ppo(env="X-v0", steps=49_999))
    for hidden, threads in (((64, 64), 1), ((64, 512), 4)):
        config = ppo(env="X-v0", agent=PPOConfig(hidden=hidden))
        assert OnPolicyLoop.learner_threads(config, PPO(OBS, ACT, config.agent), 4) == threads

    monkeypatch.setattr(on_policy, "_SHARED_FROM", 0)
    shares, make = [], session.make

    def watched(*args, **how):
        env = make(*args, **how)
        shares.append(len(getattr(env, "_workers", [])))
        return env

    monkeypatch.setattr(session, "make", watched)

    def run(name, env=MODULE + "ctrlrl-test/Walk-v0", **how):
        shares.clear()
        how = SMALL | {"out": str(tmp_path / name), "threads": 2} | how
        return ctrlrl.train("ppo", env, **how)

    one, two = run("one", threads=1), run("two")
    assert shares == [2, 2]
    assert two.config.backend == "auto" and json.loads((two.path / "provenance.json").read_text())["threads"] == 1
    one, two = one.policy.state_dict(), two.policy.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    short = {"steps": 60, "eval_every": 0}
    run("here", backend="gymnasium", **short)
    assert shares == [0]
    run("asked", backend="workers", threads=1, **short)
    assert shares == [1]
    monkeypatch.setattr(on_policy, "_SHARED_FROM", 10**9)
    run("shared", backend="parallel", **short)
    assert shares == [2]


def test_an_id_that_workers_do_not_know_stays_in_this_process_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(on_policy, "_SHARED_FROM", 0)
    gym.register("ctrlrl-test/Mine-v0", entry_point=WalkEnv, max_episode_steps=20)
    how = SMALL | {"threads": 2, "steps": 60, "eval_every": 0}
    try:
        run = ctrlrl.train("ppo", "ctrlrl-test/Mine-v0", out=str(tmp_path / "run"), **how)
        with pytest.raises(UsageError, match="registered in this process, but not in its worker"):
            ctrlrl.train("ppo", "ctrlrl-test/Mine-v0", out=str(tmp_path / "no"), **how | {"backend": "parallel"})
    finally:
        del gym.registry["ctrlrl-test/Mine-v0"]
    assert "which alone knows ctrlrl-test/Mine-v0" in (run.path / "metrics.jsonl").read_text()
