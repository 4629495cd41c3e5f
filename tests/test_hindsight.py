"""Goals replaced in the replay memory against plain lists of what happened, for goals in vectors and goals of text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")

import ctrlrl
from ctrlrl.config import LanguageConfig
from ctrlrl.envs.make import make_env
from ctrlrl.envs.text.base import TextEnv, TextState, TextStep
from ctrlrl.envs.text.registry import make_text_env
from ctrlrl.envs.vector import Step
from ctrlrl.errors import Interrupted, UsageError
from ctrlrl.language.make_lm import PLAIN, make_lm, seen_at_random, word_tokenizer
from ctrlrl.language.text_vector import TextVector
from ctrlrl.language.tiny_config import TinyConfig
from ctrlrl.replay.buffer import ReplayBuffer
from ctrlrl.replay.hindsight import Hindsight
from ctrlrl.runs.record import load_run
from ctrlrl.training.collector import random_actions
from tests.runs import SMALL, InterruptAt, assert_same

GAMMA = 0.5
ACTION = gym.spaces.Box(-1, 1, (1,))
REWARDS = (-0.25, 1.0)  # of a goal that is missed, and reached
OUTCOMES = st.sampled_from(["on", "on", "on", "on", "terminated", "truncated", "both", "invalid"])
HISTORIES = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.lists(OUTCOMES, min_size=n, max_size=n), min_size=1, max_size=40)
)


def near(achieved: Tensor, desired: Tensor) -> Tensor:
    """Rewards of numbers that are within 2 of each other."""
    return torch.where((achieved - desired).abs()[:, 0] <= 2, REWARDS[1], REWARDS[0])


def among(achieved: Tensor, desired: Tensor) -> Tensor:
    return (achieved == desired[:, None]).all(-1).any(-1)


NUMBERS = Hindsight(achieved=slice(0, 1), desired=slice(2, 3), reward=near, share=0.75)
"""Of one vector [achieved, what else is seen, desired]."""
WORDS = Hindsight(
    desired="goal", reward=lambda a, d: torch.where(among(a, d), *REWARDS[::-1]), reached=among, most=3, share=0.75
)
"""Of ids, of which any number of goals can hold."""


class Model:
    """What happened, as lists for each environment, and the buffer that is to know it."""

    def __init__(self, kind: Hindsight, n: int, capacity: int, seed: int = 0) -> None:
        self.kind, self.n, self.words = kind, n, kind is WORDS
        self.random = np.random.default_rng(seed)
        self.buffer = self.empty(capacity)
        self.capacity, self.seen = capacity, 0
        self.rows: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self.goals = [self.draw() for _ in range(n)]
        self.obs = self.look()
        self.buffer.begin(self.whole(self.obs))

    def empty(self, capacity: int) -> ReplayBuffer:
        space: gym.Space[Any] = gym.spaces.Box(-np.inf, np.inf, (3,))
        if self.words:
            ids = gym.spaces.Box(-1, 9, (2,), np.int32)
            space = gym.spaces.Dict({"goal": ids, "prompt": gym.spaces.Box(0, 10**6, (1,), np.int32)})
        scaled = {"reward_scale": 2.0, "reward_shift": 1.0}
        return ReplayBuffer(
            space, ACTION, capacity=max(capacity, self.n), num_envs=self.n, hindsight=self.kind, **scaled
        )

    def draw(self) -> list[int]:
        """A goal; few, so that they are reached."""
        return [int(self.random.integers(4)), 7] if self.words else [int(self.random.integers(-5, 5))]

    def look(self) -> list[dict[str, Any]]:
        """Observations of all environments, numbered, without goals."""
        self.seen += self.n
        achieved = [
            [self.draw() for _ in range(self.random.integers(4))] if self.words else self.draw() for _ in range(self.n)
        ]
        return [{"id": self.seen + i, "achieved": a} for i, a in enumerate(achieved)]

    def whole(self, obs: list[dict[str, Any]]) -> Any:
        goals = torch.tensor(self.goals)
        ids = torch.tensor([[one["id"]] for one in obs])
        if self.words:
            return {"goal": goals.int(), "prompt": ids.int()}
        return torch.cat([torch.tensor([one["achieved"] for one in obs]), ids, goals], 1).float()

    def add(self, outcomes: list[str]) -> None:
        final, action = self.look(), torch.rand(self.n, 1)
        valid = [o != "invalid" for o in outcomes]
        won = [self.holds(final[i], self.goals[i]) and valid[i] for i in range(self.n)]
        terminated = [o in ("terminated", "both") or (self.words and won[i]) for i, o in enumerate(outcomes)]
        truncated = [o in ("truncated", "both") for o in outcomes]
        reward = [REWARDS[won[i]] if valid[i] else 0.0 for i in range(self.n)]
        then = self.whole(final)
        fresh, following = self.look(), list(final)
        for i in range(self.n):
            row = {"obs": self.obs[i]["id"], "goal": self.goals[i], "next": final[i], "reward": reward[i]}
            row |= {"terminated": terminated[i], "ended": terminated[i] or truncated[i], "valid": valid[i]}
            self.rows[i].append(row)
            if row["ended"] or not valid[i]:
                self.goals[i], following[i] = self.draw(), fresh[i]
        achieved = None
        if self.words:
            achieved = torch.full((self.n, 3, 2), -1, dtype=torch.int32)
            for i, one in enumerate(final):
                for k, goal in enumerate(one["achieved"]):
                    achieved[i, k] = torch.tensor(goal)
        flags = [torch.tensor(x) for x in (terminated, truncated)]
        self.obs = following
        self.buffer.add(
            Step(self.whole(following), action, torch.tensor(reward), *flags, then, torch.tensor(valid), {}, achieved)
        )

    def holds(self, seen: dict[str, Any], goal: list[int]) -> bool:
        return goal in seen["achieved"] if self.words else abs(seen["achieved"][0] - goal[0]) <= 2

    def later(self, row: int, env: int) -> list[list[int]]:
        """What was achieved after a transition and those that follow in its episode, in their order."""
        goals, rows = [], self.rows[env]
        while row < len(rows) and rows[row]["valid"]:
            achieved = rows[row]["next"]["achieved"]
            goals += achieved if self.words else [achieved]
            if rows[row]["ended"]:
                break
            row += 1
        return goals

    def expected(self, index: int, chosen: bool, drawn: np.float32) -> dict[str, Any]:
        row, env = divmod(index, self.n)
        it, goals = self.rows[env][row], self.later(row, env)
        followed = row + 1 < len(self.rows[env]) and self.rows[env][row + 1]["valid"]
        out = {"goal": it["goal"], "terminated": it["terminated"], "reward": it["reward"]}
        if chosen and goals:
            out["goal"] = goals[min(int(np.float32(len(goals)) * drawn), len(goals) - 1)]
            won = self.holds(it["next"], out["goal"])
            out["reward"] = REWARDS[won]
            if self.words:  # what ended by the former goal goes on
                out["terminated"] = won or (it["terminated"] and not self.holds(it["next"], it["goal"]))
        out["end"] = it["ended"] or out["terminated"] or not followed
        return out | {"obs": it["obs"], "next": it["next"]["id"]}


def check(model: Model, rows: int = 60) -> set[int]:
    """Draw a batch, and tell from a copy of its generator what it must be."""
    buffer = model.buffer
    same = torch.Generator()
    same.set_state(buffer.generator.get_state())
    torch.randint(len(buffer), (rows,), generator=same)
    drawn = torch.rand(2, rows, generator=same).numpy()
    batch = buffer.sample(1, rows, gamma=GAMMA)[0]
    for b in range(rows):
        want = model.expected(int(batch.index[b]), bool(drawn[0, b] < 0.75), drawn[1, b])
        assert float(batch.reward[b]) == pytest.approx(2 * (want["reward"] + 1))
        assert float(batch.discount[b]) == (0.0 if want["terminated"] else GAMMA)
        assert bool(batch.end[b]) == want["end"]
        for seen, name in ((batch.obs, "obs"), (batch.next_obs, "next")):
            if isinstance(seen, dict):
                assert (seen["goal"][b].tolist(), seen["prompt"][b].tolist()) == (want["goal"], [want[name]])
            else:
                assert seen[b, 1:].tolist() == [want[name], *want["goal"]]
    assert torch.equal(buffer.generator.get_state(), same.get_state())
    return set(batch.index.tolist())


@pytest.mark.parametrize("kind", [NUMBERS, WORDS], ids=["numbers", "words"])
@settings(max_examples=80, deadline=None)
@given(history=HISTORIES, capacity=st.integers(1, 60), seed=st.integers(0, 1000), afresh=st.integers(0, 40))
def test_goals_are_what_the_episode_came_to(
    kind: Hindsight, history: list[list[str]], capacity: int, seed: int, afresh: int
) -> None:
    """Of episodes overwritten in part or longer than the ring, that go on, are cut, or are left without an end."""
    model = Model(kind, len(history[0]), capacity, seed)
    for t, outcomes in enumerate(history):
        model.add(outcomes)
        if t == afresh:  # an environment could not be continued
            model.goals = [model.draw() for _ in range(model.n)]
            model.obs = model.look()
            model.buffer.begin(model.whole(model.obs))
            for rows in model.rows:
                rows.append({"valid": False})
        kept = range(max(0, len(model.rows[0]) - model.buffer.rows), len(model.rows[0]))
        if len(model.buffer):
            valid = {r * model.n + i for r in kept for i in range(model.n) if model.rows[i][r]["valid"]}
            assert check(model) <= valid


@pytest.mark.parametrize("kind", [NUMBERS, WORDS], ids=["numbers", "words"])
@settings(max_examples=40, deadline=None)
@given(history=HISTORIES, capacity=st.integers(1, 60), cuts=st.sets(st.integers(0, 40)))
def test_saved_in_segments_and_loaded_it_gives_the_same_goals(
    kind: Hindsight, history: list[list[str]], capacity: int, cuts: set[int]
) -> None:
    model = Model(kind, len(history[0]), capacity)
    segments, written = [], 0
    for t, outcomes in enumerate(history):
        model.add(outcomes)
        if t in cuts or t == len(history) - 1:
            start = max(written, model.buffer.oldest_row)
            written = model.buffer.total_rows
            segments.append((start, model.buffer.export_rows(start, written)))
    other = copy.copy(model)
    other.buffer = model.empty(capacity)
    for start, rows in segments:
        other.buffer.load_rows(start, rows, total_rows=model.buffer.total_rows)
    other.buffer.generator.set_state(model.buffer.generator.get_state())
    for _ in range(3):
        if len(model.buffer):
            a, b = model.buffer.sample(2, 16, gamma=GAMMA), other.buffer.sample(2, 16, gamma=GAMMA)
            for name in ("reward", "discount", "end", "index"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            one, two = (x.next_obs if isinstance(x.next_obs, dict) else {"": x.next_obs} for x in (a, b))
            assert all(torch.equal(value, two[name]) for name, value in one.items())
        state = model.random.bit_generator.state
        other.rows, other.goals, other.obs, other.seen = (
            [list(r) for r in model.rows],
            *copy.deepcopy((model.goals, model.obs, model.seen)),
        )
        torch.manual_seed(0)
        model.add(history[0])
        model.random.bit_generator.state = state
        torch.manual_seed(0)
        other.add(history[0])


def played(env: Any, kind: Hindsight, steps: int, seed: int) -> tuple[ReplayBuffer, list[Step]]:
    """Random actions into a buffer; and the steps, as they were."""
    generator = torch.Generator().manual_seed(seed)
    obs = env.reset(seed)
    buffer = ReplayBuffer(
        env.observation_space, env.action_space, capacity=10**4, num_envs=env.num_envs, hindsight=kind
    )
    buffer.begin(obs)
    steps_made = []
    for _ in range(steps):
        mask = obs["candidate_mask"][:, None] if isinstance(obs, dict) else None
        step = env.step(random_actions(env.action_space, env.num_envs, generator, mask))
        obs = step.obs
        buffer.add(step)
        steps_made.append(step)
    return buffer, steps_made


@pytest.mark.parametrize("name", ["PandaReach-v0", "PandaLift-v0"])
def test_a_simulated_task_says_what_its_goals_are(name: str) -> None:
    """The reward that is recomputed is the task's own, to the bit, and goals come to be reached."""
    env = make_env(name, num_envs=4, env_kwargs={"reward": "sparse"})
    goals = env.goals
    assert goals is not None and goals.reached is None
    buffer, _ = played(env, Hindsight(**vars(goals), share=0.5), 130, 0)
    plain = ReplayBuffer(env.observation_space, env.action_space, capacity=10**4, num_envs=4)
    plain.load_rows(0, buffer.export_rows(0, 130), total_rows=130)
    plain.generator.set_state(buffer.generator.get_state())
    for batch, former in ((buffer.sample(1, 3000, gamma=0.9)[0], plain.sample(1, 3000, gamma=0.9)[0]),):
        assert torch.equal(batch.index, former.index) and torch.equal(batch.end, former.end)
        assert torch.equal(batch.discount, former.discount)  # the task goes on at the goal
        assert isinstance(batch.obs, Tensor) and isinstance(batch.next_obs, Tensor)
        assert isinstance(former.obs, Tensor) and isinstance(former.next_obs, Tensor)
        assert torch.equal(goals.reward(former.next_obs[:, :3], former.obs[:, 3:6]), former.reward)
        assert torch.equal(goals.reward(batch.next_obs[:, :3], batch.obs[:, 3:6]), batch.reward)
        assert torch.equal(batch.obs[:, 3:6], batch.next_obs[:, 3:6])
        for one, other in ((batch.obs, former.obs), (batch.next_obs, former.next_obs)):
            assert torch.equal(one[:, :3], other[:, :3]) and torch.equal(one[:, 6:], other[:, 6:])
        changed = (batch.obs[:, 3:6] != former.obs[:, 3:6]).any(1)
        assert abs(float(changed.float().mean()) - 0.5) < 0.03
        assert torch.equal(batch.reward[~changed], former.reward[~changed])
        assert float((batch.reward[changed] == 0).float().mean()) > float((former.reward == 0).float().mean())
    assert make_env(name, num_envs=1).goals is None  # its dense reward is no function of goals alone


@pytest.mark.parametrize("kind", [NUMBERS, WORDS], ids=["numbers", "words"])
def test_the_memory_of_a_transition_is_told(kind: Hindsight) -> None:
    def taken(capacity: int) -> int:
        buffer = Model(kind, 2, capacity).buffer
        parts = [*buffer._obs.values(), *buffer._columns.values(), *vars(buffer._futures).values(), buffer._order]
        return sum(part.nbytes for part in [*parts, buffer._reach] if isinstance(part, Tensor))

    told = Model(kind, 2, 2).buffer.transition_bytes  # by the smallest, of every one
    assert told == (taken(3000) - taken(1000)) / 2000 == Model(kind, 2, 1000).buffer.transition_bytes


def test_without_hindsight_nothing_else_is_drawn() -> None:
    model = Model(NUMBERS, 2, 50)
    for t in range(40):
        model.add([("on", "on", "truncated", "terminated")[(t + i) % 4] for i in range(2)])
    plain = ReplayBuffer(gym.spaces.Box(-np.inf, np.inf, (3,)), ACTION, capacity=50, num_envs=2, seed=4)
    plain.load_rows(15, model.buffer.export_rows(15, 40), total_rows=40)
    same = torch.Generator().manual_seed(4)
    for _ in range(2):
        index = torch.randint(len(plain), (2 * 8,), generator=same).view(2, 8) + 15 * 2
        batch = plain.sample(2, 8, gamma=GAMMA)
        assert torch.equal(batch.index, index) and torch.equal(plain.generator.get_state(), same.get_state())


class Recorded:
    """A text environment, and the states that it came to."""

    def __init__(self, env: TextEnv) -> None:
        self.env, self.came_to = env, list[TextState]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, answer: str) -> TextStep:
        step = self.env.step(answer)
        self.came_to.append(step.state)
        return step


SIZES = LanguageConfig(prompt_tokens=80, goal_tokens=12, candidate_tokens=3, max_candidates=6)


def spoken(env_id: str, n: int, **kwargs: Any) -> TextVector:
    texts = seen_at_random(make_text_env(env_id, kwargs), 60, 0) | {PLAIN.goal(" ".join(map(str, range(20))))}
    envs: list[Any] = [Recorded(make_text_env(env_id, kwargs)) for _ in range(n)]
    return TextVector(envs, word_tokenizer(texts), SIZES, name=env_id, achieved=True)


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("text/FrozenLake", {"time_penalty": 0.01}),
        ("text/Maze", {"max_turns": 30}),
        ("text/BabyAI-GoToLocal", {"max_turns": 20, "time_penalty": 0.02}),
    ],
)
def test_other_goals_of_text_are_rewarded_as_the_environment_says(env_id: str, kwargs: dict[str, Any]) -> None:
    if "BabyAI" in env_id:
        pytest.importorskip("minigrid")
    env = spoken(env_id, 3, **kwargs)
    kind = Hindsight(**vars(env.goals), share=0.8)
    buffer, steps = played(env, kind, 160, 5)
    assert len(steps) == 160 and "achieved" not in env.observation_space.spaces  # type: ignore[attr-defined]
    states = [inner.came_to for inner in env._envs]  # type: ignore[attr-defined]
    said = {tuple(env._goal(goal)): goal for own in states for one in own for goal in (one.goal, *one.achieved)}
    batch = buffer.sample(1, 4000, gamma=GAMMA)[0]
    assert isinstance(batch.obs, dict) and isinstance(batch.next_obs, dict)
    assert torch.equal(batch.obs["goal"], batch.next_obs["goal"])
    others, wins = 0, 0
    for b in range(4000):
        row, i = divmod(int(batch.index[b]), 3)
        state, ids = states[i][row], batch.obs["goal"][b]
        goal = said[tuple(ids[ids >= 0].tolist())]
        reward, terminated = env._envs[i].reward_of(goal, state)
        assert float(batch.reward[b]) == pytest.approx(reward)
        assert float(batch.discount[b]) == (0.0 if terminated else GAMMA)
        assert bool(batch.end[b]) or not terminated
        others += goal != state.goal
        wins += goal in state.achieved
    assert others > 400 and wins > 100


def test_goals_that_cannot_be_told_apart_are_refused() -> None:
    lake = Recorded(make_text_env("text/FrozenLake", {"holes": 0.0}))
    lake.max_achieved = 1
    words = {PLAIN.goal("go to row 4 column 4"), PLAIN.prompt("", "row of , edge ice hole . up down left right", [], 0)}
    envs: list[Any] = [lake]
    sizes = LanguageConfig(prompt_tokens=40, goal_tokens=9, candidate_tokens=2, max_candidates=4)
    env = TextVector(envs, word_tokenizer(words), sizes, name="lake", achieved=True)
    env.reset(0)
    with pytest.raises(UsageError, match=r"'go to row 1 column 2' has words that the model does not know"):
        env.step(torch.tensor([1]))
    plain = TextVector(envs, word_tokenizer(words), sizes, name="lake")
    plain.reset(0)
    assert plain.goals is None and plain.step(torch.tensor([1])).achieved is None
    game: list[Any] = [make_text_env("text/GuessNumber")]
    assert TextVector(game, word_tokenizer(words), sizes, name="game", achieved=True).goals is None


REACH: dict[str, Any] = {"env_kwargs": {"reward": "sparse"}, "preset": None, "num_envs": 4}
LAKE = {"size": 3, "holes": 0.1, "max_turns": 8}


def lake(folder: Path) -> dict[str, Any]:
    """Settings of a training on a small lake, with a tiny model of random weights."""
    made = TinyConfig(hidden=32, heads=2, layers=1, episodes=4, epochs=1, lr=1e-9)
    sizes = {"prompt_tokens": 40, "goal_tokens": 10, "candidate_tokens": 1, "max_candidates": 4}
    make_lm(lambda: make_text_env("text/FrozenLake", LAKE), folder / "lm", made, vocabulary_episodes=60)
    agent = {"entropy_penalty": 0.0, "batch_size": 16, "actor_lr": 1e-3, "critic_lr": 1e-3, "gamma": 0.9}
    language = sizes | {"model": str(folder / "lm"), "critic_hidden": 16, "normalize": "token"}
    return {"env_kwargs": LAKE, "language": language, "agent": agent, "num_envs": 4, "preset": None}


@pytest.mark.parametrize("which", ["numbers", "words"])
def test_stopped_and_resumed_equals_uninterrupted(which: str, tmp_path: Path) -> None:
    if which == "words":
        algo, env, own = "sac-discrete", "text/FrozenLake", lake(tmp_path) | {"steps": 200}
        own["buffer"] = {"capacity": 120, "hindsight": 0.8}
    else:
        algo, env, own = "sac", "PandaReach-v0", REACH | {"steps": 640, "agent": SMALL["agent"]}
        own["buffer"] = {"capacity": 400, "hindsight": 0.8}
    settings = SMALL | own | {"eval_every": 0, "agent": own["agent"] | {"utd": 0.25}}
    ctrlrl.train(algo, env, out=str(tmp_path / "whole"), callbacks=[InterruptAt(10**9)], **settings)
    with pytest.raises(Interrupted):
        ctrlrl.train(algo, env, out=str(tmp_path / "parts"), callbacks=[InterruptAt(170)], **settings)
    ctrlrl.resume(tmp_path / "parts", callbacks=[InterruptAt(10**9)], quiet=True)
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_what_it_does_not_go_with_is_refused(tmp_path: Path) -> None:
    def refused(match: str, algo: str, env: str, **settings: Any) -> None:
        settings = SMALL | {"preset": None, "out": str(tmp_path / "r")} | settings
        with pytest.raises(UsageError, match=match):
            ctrlrl.train(algo, env, **settings)
        assert not (tmp_path / "r").exists()

    def still(obs: Tensor) -> Tensor:
        return torch.zeros(len(obs), 7)

    def buffer(**other: Any) -> dict[str, Any]:
        return {"buffer": {"hindsight": 0.8} | other}

    refused(r"buffer\.hindsight must be between 0 and 1, got 1\.5", "sac", "Pendulum-v1", buffer={"hindsight": 1.5})
    refused(r"buffer\.n_step must be 1 where goals are replaced", "sac", "Pendulum-v1", **buffer(n_step=3))
    refused("needs a task whose reward is a function of goals, and Pendulum-v1 is", "sac", "Pendulum-v1", **buffer())
    refused("and PandaReach-v0 is none", "td3", "PandaReach-v0", **buffer())
    refused(r"its policy said .* \(base_action\)", "policy-decorator", "PandaReach-v0", base=still, **REACH, **buffer())
    with pytest.raises(UsageError, match="hindsight goals go with n_step = 1, got 2"):
        model = Model(NUMBERS, 1, 9)
        model.add(["on"])
        model.buffer.sample(1, 1, gamma=GAMMA, n_step=2)


def test_what_words_do_not_go_with_is_refused(tmp_path: Path) -> None:
    settings = SMALL | lake(tmp_path) | {"buffer": {"hindsight": 0.8}, "out": str(tmp_path / "r")}
    entropy = settings | {"agent": settings["agent"] | {"entropy_penalty": 0.5}}
    with pytest.raises(UsageError, match=r"\(entropy\): leave it out\. Of sac-discrete --agent\.entropy-penalty 0"):
        ctrlrl.train("sac-discrete", "text/FrozenLake", **entropy)
    with pytest.raises(UsageError, match=r"and text/GuessNumber is none: .* text/FrozenLake"):
        ctrlrl.train("sac-discrete", "text/GuessNumber", **settings | {"env_kwargs": {"high": 4}})


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_panda_learns_from_a_sparse_reward_with_hindsight_alone(seed: int, tmp_path: Path) -> None:
    """100 steps of -1 each; the scripted expert has -12 with actions of the joints. Observations are standardized, as
    in the paper: differences of centimetres matter."""
    agent = {"gamma": 0.9, "utd": 0.5, "hidden": [128, 128], "normalize_obs": True, "initial_alpha": 0.05}
    agent |= {"actor_lr": 1e-3, "critic_lr": 1e-3, "alpha_lr": 1e-3, "execution": "eager"}
    settings = {"steps": 9600, "learning_starts": 1600, "update_every": 16, "num_envs": 16, "agent": agent}
    settings |= {"env_kwargs": {"reward": "sparse", "action": "tool"}, "preset": None, "seed": seed, "threads": 1}
    settings |= {"eval_every": 9600, "eval_episodes": 16, "checkpoint_every": 10**6, "video": False, "quiet": True}
    last = {}
    for share in (0.8, 0.0):
        buffer = {"capacity": 50_000, "hindsight": share}
        run = ctrlrl.train("sac", "PandaReach-v0", out=str(tmp_path / str(share)), buffer=buffer, **settings)
        last[share] = load_run(run.path).evaluations[-1].mean
    assert last[0.8] > -40 and last[0.0] < -90
