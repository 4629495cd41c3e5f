"""Answers written token by token: what a model writes, credit for each token, groups, and nearness to a reference."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import ctrlrl
from ctrlrl.algorithms.bc import BC
from ctrlrl.algorithms.bc_config import BCConfig
from ctrlrl.algorithms.ppo import PPO
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.cli.main import run as command
from ctrlrl.config import LanguageConfig
from ctrlrl.envs.vector import Step
from ctrlrl.errors import UsageError
from ctrlrl.language.model import LanguageModel
from ctrlrl.language.text_vector import _WAITING, TextVector
from ctrlrl.replay.group_advantages import Groups, gigpo, grpo, rloo
from ctrlrl.replay.rollout import Rollout
from ctrlrl.runs.record import load_run
from ctrlrl.tokens import TokenSpace
from ctrlrl.training.collector import Collector
from tests.language import (
    END,
    KINDS,
    SMALL,
    Echo,
    V,
    answers,
    batch_of,
    by_hand,
    echo,
    model_of,
    texts,
    tiny,
    written_data,
)
from tests.runs import assert_same

FREE = LanguageConfig(**{**SMALL.to_dict(), "form": "tokens"})
GROUPED = LanguageConfig(**{**FREE.to_dict(), "group_size": 2})


def agent_of(config: LanguageConfig = FREE, n: int = 4, **settings: Any) -> tuple[PPO, TextVector]:
    env = echo(n, config)
    numbers = {"lr": 1e-3, "minibatch_size": 32, "epochs": 2, "normalize_reward": False} | settings
    made = PPO(env.observation_space, env.action_space, PPOConfig(**numbers), seed=1, network=tiny(config=config))
    return made, env


def collected(agent: PPO, env: TextVector, horizon: int = 12) -> Rollout:
    obs = env.reset(0)
    extras = agent.policy.act(obs, explore=False)[2]
    rollout = Rollout(
        env.observation_space, horizon=horizon, num_envs=env.num_envs, extras=extras, groups=env.task_groups
    )
    rollout.begin(obs)
    for _ in range(horizon):
        action, _, extras = agent.policy.act(obs, explore=True)
        step = env.step(action)
        rollout.add(step, extras)
        obs = step.obs
    return rollout


# What a model writes.


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_scored_as_in_each_text_alone(kind: str) -> None:
    model, (prompt, candidates, _) = model_of(kind), texts()
    answers = candidates[:, 1].clone()  # one token each
    answers[0] = candidates[0, 0]  # and one of three
    log_prob, entropy = model.token_log_prob(prompt, answers, 1.5)
    _, features = model.answer(prompt, answers, logits=False)
    for b in range(3):
        length = int((answers[b] >= 0).sum())
        assert torch.allclose(log_prob[b, :length], by_hand(model, prompt[b], answers[b], 1.5), atol=1e-4)
        assert bool((log_prob[b, length:] == 0).all()) and bool((entropy[b, length:] == 0).all())
        text = torch.cat([prompt[b][prompt[b] >= 0], answers[b, :length]])[None]
        out = model.causal(text, output_hidden_states=True)
        after = (out.logits[0, -length - 1 : -1] / 1.5).log_softmax(-1)
        assert torch.allclose(entropy[b, :length], -(after.exp() * after).sum(-1), atol=1e-4)
        assert torch.allclose(features[b, :length], out.hidden_states[-1][0, -length - 1 : -1], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_is_likeliest_one_row_after_the_other(kind: str) -> None:
    model, (prompt, _, _) = model_of(kind), texts()
    prompt = torch.cat([prompt, prompt[:1], torch.full_like(prompt[:1], -1)])  # one twice, and one that is empty
    expected = torch.full((5, 6), -1)
    end = 0
    for b in range(4):
        said = prompt[b][prompt[b] >= 0]
        for i in range(6):
            token = int(model.causal(said[None]).logits[0, -1].argmax())
            if b == 1 and i == 2:
                end = token  # so that a row ends before the others
            expected[b, i], said = token, torch.cat([said, torch.tensor([token])])
    for b in range(4):
        stop = (expected[b] == end).nonzero()
        if len(stop):
            expected[b, int(stop[0]) + 1 :] = -1
    assert (expected[1, 3:] == -1).all() and (expected[4] == -1).all()
    for memory in (math.inf, 1.0):  # all together, and one by one
        assert torch.equal(model.generate(prompt, length=6, ends=(end,), memory=memory), expected)
    heads, between = (4, 128) if kind == "gpt2" else (4, 4 * 32) if kind == "opt" else (2, 64)
    assert model.bytes_of_row(10) == (2 * 2 * 8 * heads + 24 * 32 + 2 * between) * 10 * 4 + 12 * V


def test_what_is_drawn_is_as_likely_as_it_is_scored() -> None:
    model, (prompt, _, _) = model_of(), texts()
    g, n = torch.Generator().manual_seed(0), 20_000
    answers = model.generate(prompt[:1].expand(n, -1), length=2, ends=(END,), temperature=0.5, generator=g)
    assert bool((answers[answers[:, 0] == END][:, 1] == -1).all())
    kinds, counts = torch.unique(answers, dim=0, return_counts=True)
    log_prob, _ = model.token_log_prob(prompt[:1].expand(len(kinds), -1), kinds, 0.5)
    expected = log_prob.detach().sum(-1).exp() * n
    often = expected.detach() > 5
    statistic = ((counts - expected).square() / expected)[often].sum()
    degrees = int(often.sum())
    assert degrees > 50 and abs(float(statistic) - degrees) < 5 * math.sqrt(2 * degrees)


def test_an_empty_prompt_is_no_reason_for_nan() -> None:
    model, (prompt, candidates, _) = model_of(), texts()
    prompt[1] = -1
    log_prob, _ = model.token_log_prob(prompt, candidates[:, 0])
    assert bool(torch.isfinite(log_prob).all()) and bool(torch.isfinite(model.read(prompt)[1]).all())
    assert torch.allclose(log_prob[0], by_hand(model, prompt[0], candidates[0, 0]), atol=1e-4)


# What PPO makes of it.


@pytest.mark.parametrize("settings", [{}, {"advantage": "grpo"}, {"ratio": "joint"}, {"critic": "shared"}])
def test_the_first_ratio_is_one(settings: dict[str, Any]) -> None:
    critic = {"critic": settings.pop("critic")} if "critic" in settings else {}
    config = GROUPED if settings.get("advantage") else FREE
    agent, env = agent_of(LanguageConfig(**{**config.to_dict(), **critic, "temperature": 0.7}), **settings)
    rollout = collected(agent, env)
    data, _ = agent.prepare(rollout)
    assert bool((rollout.extras["decision"] >= 0).any(-1).eq(rollout.valid).all())
    for rows in torch.arange(48).split(7):
        part = data.map(lambda x, rows=rows: x[rows])
        log_ratio = (agent.policy.distribution(part.obs).score(part.decision)[0] - part.log_prob) * part.mask
        assert float(log_ratio.detach().abs().max()) < 1e-4
    metrics, steps = agent.update(rollout)
    assert steps >= 2 and bool(torch.isfinite(torch.stack(list(metrics.values()))).all())
    assert (agent.critic is None) == ("advantage" in settings)
    assert data.advantage.shape[-1] == (3 if not settings else 1)


@pytest.mark.parametrize("within", [1.0, 0.9])
def test_credit_of_each_token(within: float) -> None:
    """POAD's recursion (arXiv:2405.15821), written out turn by turn and token by token; with a discount at every token
    the naive one."""
    agent, env = agent_of(gamma=0.9, gae_lambda=0.8, decision_gamma=within)
    rollout = collected(agent, env)
    data, _ = agent.prepare(rollout)
    shape = (12, 4, 3)
    advantage, value = data.advantage.view(shape).double(), data.value.view(shape).double()
    made = rollout.extras["decision"] >= 0
    assert agent.critic is not None
    for n in range(4):
        following: float = 0.0
        with torch.no_grad():
            next_value = float(agent.critic({k: v[-1] for k, v in rollout.obs.items()})[n])  # type: ignore[union-attr]
        for t in reversed(range(12)):
            tokens = int(made[t, n].sum())
            over, cut = bool(rollout.ended[t, n]), bool(rollout.truncated[t, n] & ~rollout.terminated[t, n])
            if cut:
                final = {k: v[t, n : n + 1] for k, v in rollout.final_obs.items()}  # type: ignore[union-attr]
                next_value = float(agent.critic(final).detach())
            for j in reversed(range(tokens)):
                if j == tokens - 1:
                    gamma = 0.0 if bool(rollout.terminated[t, n]) else 0.9
                    delta = float(rollout.reward[t, n]) + gamma * next_value - float(value[t, n, j])
                    following = delta + 0.8 * (0.0 if over else gamma * following)
                else:
                    delta = within * float(value[t, n, j + 1]) - float(value[t, n, j])
                    following = delta + 0.8 * within * following
                assert float(advantage[t, n, j]) == pytest.approx(following, abs=1e-4), (t, n, j)
            assert bool((advantage[t, n, tokens:] == 0).all())
            next_value = float(value[t, n, 0])


def test_nearness_to_where_it_began() -> None:
    agent, env = agent_of(kl_coef=0.5, lr=3e-3, minibatch_size=48, epochs=1)
    other, _ = agent_of(kl_coef=0.0, lr=3e-3, minibatch_size=48, epochs=1)
    assert agent.reference is not None and other.reference is None
    with torch.no_grad():  # as if weights had been read after it was made
        for p in agent.policy.parameters():
            p.mul_(1.01)
    start = copy.deepcopy(agent.policy.state_dict())
    rollout = collected(agent, env)
    metrics, _ = agent.update(rollout)
    assert float(metrics["kl_reference"]) == pytest.approx(0, abs=1e-5)
    metrics, _ = agent.update(rollout)
    for name, value in agent.reference.state_dict().items():
        assert torch.equal(value, start[name])
    data, _ = agent.prepare(rollout)
    away = data.reference - data.log_prob
    now = -torch.where(data.mask, away, 0).sum(-1).mean()
    assert float(now) != 0
    again = PPO(env.observation_space, env.action_space, agent.config, seed=5, network=tiny(9, config=FREE))
    again.load_state_dict(agent.state_dict())
    assert torch.equal(again.prepare(rollout)[0].reference, data.reference)
    for kind in ("k1", "k2", "k3"):
        near, env = agent_of(kl_coef=5.0, kl_estimator=kind, lr=3e-3, epochs=4)
        far, _ = agent_of(kl_coef=1e-6, kl_estimator=kind, lr=3e-3, epochs=4)
        rollout, moved = collected(near, env), []
        for one in (near, far):
            for _ in range(3):
                metrics, _ = one.update(rollout)
            moved.append(float(metrics["kl_reference"]))
        assert abs(moved[0]) < abs(moved[1]), kind


# Groups.


def test_group_estimators_are_their_papers() -> None:
    g, (t, n, size, rows) = torch.Generator().manual_seed(0), (8, 6, 3, 4)
    valid = torch.ones(t, n, dtype=torch.bool)
    valid[2:4, 1] = valid[7:, 4] = False
    reward = torch.randint(3, (t, n), generator=g).float() * valid
    observed = torch.randint(3, (t, n), generator=g)
    groups = Groups(reward, valid, observed, size, rows, 0.9, 0.5)
    by_grpo, by_rloo, by_gigpo = grpo(groups), rloo(groups), gigpo(groups)
    for k in range(2):
        for first in range(0, n, size):
            members = range(first, first + size)
            part = reward[k * rows : (k + 1) * rows]
            returns = [float(part[:, i].sum()) for i in members]
            mean = sum(returns) / size
            deviation = math.sqrt(sum((r - mean) ** 2 for r in returns) / (size - 1))
            steps = [(i, j) for i in members for j in range(rows) if valid[k * rows + j, i]]
            to_come = {(i, j): sum(0.9 ** (m - j) * float(part[m, i]) for m in range(j, rows)) for i, j in steps}
            for i, j in steps:
                at = k * rows + j, i
                own = returns[i - first]
                others = [r for m, r in enumerate(returns) if m != i - first]
                assert float(by_grpo[at]) == pytest.approx((own - mean) / (deviation + 1e-6), abs=1e-4)
                assert float(by_rloo[at]) == pytest.approx(own - sum(others) / (size - 1), abs=1e-5)
                same = [to_come[s] for s in steps if observed[k * rows + s[1], s[0]] == observed[at]]
                centre = sum(same) / len(same)
                spread = math.sqrt(sum((x - centre) ** 2 for x in same) / max(len(same) - 1, 1))
                step = (to_come[i, j] - centre) / (spread + 1e-6)
                assert float(by_gigpo[at]) == pytest.approx(float(by_grpo[at]) + 0.5 * step, abs=1e-4)
    for advantage in (by_grpo, by_rloo, by_gigpo):
        assert bool((advantage[~valid] == 0).all())


@pytest.mark.parametrize("history", [0, 2])
def test_gigpo_compares_steps_at_which_the_same_was_shown_whatever_was_before(history: int) -> None:
    """As its authors do: with a history in the prompt no two of them would be alike."""
    config = LanguageConfig(**{**GROUPED.to_dict(), "history": history})
    agent, env = agent_of(config, advantage="gigpo", step_weight=1.0)
    shown: list[list[str]] = []
    step = env.step
    env.step = lambda action: (shown.append([s.observation for s in env._states]), step(action))[1]  # type: ignore[method-assign, func-returns-value]
    rollout = collected(agent, env, horizon=2 * Echo.max_turns)
    assert rollout.anchor is not None and len(shown) == rollout.horizon
    numbers = rollout.anchor.tolist()
    told: dict[str, int] = {}
    for said, row in zip(shown, numbers, strict=True):
        for text, number in zip(said, row, strict=True):
            assert told.setdefault(text, number) == number
    assert len(set(told.values())) == len(told) > 2
    saved = rollout.state_dict()
    again = Rollout(
        env.observation_space,
        horizon=rollout.horizon,
        num_envs=4,
        extras={k: v[0] for k, v in rollout.extras.items()},
        groups=(2, 3),
    )
    again.load_state_dict(saved)
    assert torch.equal(again.anchor, rollout.anchor)  # type: ignore[arg-type]
    saved["columns"].pop("anchor")  # of a version before
    with pytest.raises(UsageError, match="resume from one at the end of a rollout"):
        again.load_state_dict(saved)
    metrics, _ = agent.update(rollout)
    returns = rollout.reward.view(2, Echo.max_turns, 2, 2).sum(1)
    assert float(metrics["groups_alike"]) == float((returns[..., 0] == returns[..., 1]).float().mean())


def test_groups_are_given_the_same_tasks_and_wait_for_each_other() -> None:
    env, g = echo(4, GROUPED), torch.Generator().manual_seed(0)
    size, rows = env.task_groups or (0, 0)
    assert (size, rows) == (2, Echo.max_turns) and env.may_be_invalid
    obs = env.reset(3)
    seen: list[list[str]] = []
    for t in range(3 * rows):
        if t % rows == 0:
            seen.append([state.observation for state in env._states])
            assert bool((obs["prompt"] >= 0).any(-1).all())  # type: ignore[index]
        waits = env._waits.copy()
        state = env.get_state()
        action = torch.randint(2, 10, (4, 3), generator=g)
        if t % rows == 1:  # the first answers rightly
            word = env._tokenizer.encode(" " + (env._envs[0].expert() or ""), add_special_tokens=False)
            action[0] = torch.tensor([*word, END, -1][:3])
        step = env.step(action)
        assert step.valid.tolist() == [not waiting for waiting in waits]
        assert bool((step.reward[waits] == 0).all())
        again = echo(4, GROUPED)
        _, reasons = again.set_state(state, seed=0)
        same = again.step(action)
        assert reasons == [None] * 4 and all(torch.equal(same.obs[k], step.obs[k]) for k in step.obs)  # type: ignore[index]
        obs = step.obs
    assert all(row[0] == row[1] and row[2] == row[3] for row in seen)
    assert len({row[0] for row in seen} | {row[2] for row in seen}) > 1  # not the same task for ever


def test_who_waits_is_no_fault_that_is_counted() -> None:
    agent, env = agent_of(GROUPED, advantage="grpo")
    collector = Collector(env, agent.policy, env.reset(0), seed=0)
    env._states[0], env._waits[0] = _WAITING, True
    step, _, _ = collector.step(random=False)
    assert collector.finished(step)[1] == 3 and "invalid_rows" not in collector.figures()


@pytest.mark.parametrize("form", ["tokens", "candidates"])
def test_all_may_wait_at_once(form: str) -> None:
    config = LanguageConfig(**{**GROUPED.to_dict(), "form": form})
    agent, env = agent_of(config, advantage="grpo")
    obs = env.reset(0)
    extras = agent.policy.act(obs, explore=False)[2]
    rollout = Rollout(env.observation_space, horizon=3, num_envs=4, extras=extras, groups=env.task_groups)
    rollout.begin(obs)
    for t in range(3):
        action, _, extras = agent.policy.act(obs, explore=True)
        if t == 0:  # all are right
            right = [env._envs[i].expert() or "" for i in range(4)]
            action = torch.full((4, 3), -1)
            for i, word in enumerate(right):
                ids = [*env._tokenizer.encode(" " + word, add_special_tokens=False), END]
                action[i, : len(ids)] = torch.tensor(ids)
            if form == "candidates":
                action = torch.tensor([env._states[i].commands.index(word) for i, word in enumerate(right)])
            extras = {"decision": action if form == "tokens" else action[:, None]}
        step = env.step(action)
        rollout.add(step, extras)
        obs = step.obs
    assert rollout.valid.tolist() == [[True] * 4, [False] * 4, [False] * 4]
    metrics, steps = agent.update(rollout)
    assert steps > 0 and bool(torch.isfinite(torch.stack(list(metrics.values()))).all())


def test_equal_returns_are_no_reason_to_move() -> None:
    for value, count in ((0.7, 64), (0.9606, 64), (5.3, 8)):
        reward = torch.full((1, count), value)
        same = Groups(reward, reward > 0, torch.zeros(1, count, dtype=torch.int64), count, 1, 0.99, 1.0)
        for estimator in (grpo, rloo, gigpo):
            assert float(estimator(same).abs().max()) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sums on a GPU, whose order may be another each time")
def test_steps_are_compared_to_the_same_bits_on_a_gpu() -> None:
    reward = torch.tensor([0.1, 0.2, 0.3]).repeat(1, 4096).cuda()
    groups = Groups(reward, reward > 0, torch.zeros_like(reward).long(), reward.shape[1], 1, 0.99, 1.0)
    assert all(torch.equal(gigpo(groups), gigpo(groups)) for _ in range(20))


def test_words_that_the_tokenizer_does_not_know_are_never_written() -> None:
    model, (prompt, _, _) = model_of(), texts()
    model.words = 5
    answers = model.generate(prompt.repeat(100, 1), length=3, ends=(END,), generator=torch.Generator().manual_seed(0))
    assert int(answers.max()) == 4
    kinds = torch.cartesian_prod(torch.arange(5)[:5], torch.tensor([END]))
    log_prob, entropy = model.token_log_prob(prompt[:1].expand(5, -1), kinds)
    assert float(log_prob[:, 0].detach().exp().sum()) == pytest.approx(1, abs=1e-5) and float(
        entropy.detach().max()
    ) <= math.log(5)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="4 environments make up no groups of 3"):
        echo(4, LanguageConfig(**{**FREE.to_dict(), "group_size": 3}))
    agent, env = agent_of(advantage="rloo")
    with pytest.raises(UsageError, match=r"--language\.group-size"):
        agent.require(collected(agent, env))
    agent, env = agent_of(GROUPED, advantage="rloo")
    with pytest.raises(UsageError, match=r"make --rollout-steps a multiple of \d+"):
        agent.require(collected(agent, env, Echo.max_turns + 1))
    agent, env = agent_of(GROUPED)
    with pytest.raises(UsageError, match=r"language\.group_size is for agent\.advantage grpo"):
        agent.require(collected(agent, env))
    with pytest.raises(UsageError, match="k2 or k3, where groups tell"):
        PPOConfig(advantage="grpo", kl_coef=0.1, kl_estimator="k1")
    with pytest.raises(UsageError, match="with credit for each: leave it at 1"):
        agent_of(decision_gamma=0.9, credit="joint")
    with pytest.raises(UsageError, match="answers of tokens need a language model"):
        PPO(_box()[0], env.action_space)
    with pytest.raises(UsageError, match="credit per-decision is for answers made of tokens"):
        PPO(*_box(), PPOConfig(credit="per-decision"))
    with pytest.raises(UsageError, match="joint, where groups tell"):
        PPOConfig(credit="per-decision", advantage="grpo")
    with pytest.raises(UsageError, match="per-decision, where the credit is"):
        PPOConfig(credit="per-decision", ratio="joint")
    with pytest.raises(UsageError, match="answers of tokens need a language model"):
        BC(_box()[0], env.action_space)
    with pytest.raises(UsageError, match="policy gaussian is for Box actions"):
        BC(env.observation_space, env.action_space, BCConfig(policy="gaussian"), network=tiny(config=FREE))
    assert isinstance(env.action_space, TokenSpace) and env.action_space.shape == (3,)


def _box() -> tuple[Any, Any]:
    import gymnasium as gym

    return gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,))


# The whole way.


def training(advantage: str, folder: Path) -> list[str]:
    """The command that trains a tiny model made in `folder`, but for `--steps` and `--out`."""
    lm, env = folder / "lm", "text/GuessNumber"
    options = ["--env-kwargs", '{"high": 4, "max_turns": 3, "free": true}', "--language.candidate-tokens", "3"]
    options += ["--language.prompt-tokens", "40"]
    made = ["--episodes", "20", "--epochs", "2", "--hidden", "16", "--heads", "2", "--layers", "1"]
    assert command(["language", "make-lm", "--env", env, "--out", str(lm), *made, *options]) == 0
    train = ["train", "ppo", "--env", env, *options, "--language.model", str(lm), "--num-envs", "4"]
    train += ["--rollout-steps", "36", "--agent.epochs", "1", "--agent.minibatch-size", "12", "--eval-episodes", "4"]
    train += ["--threads", "1", "--eval-every", "24", "--checkpoint-every", "10", "--agent.kl-coef", "0.01"]
    return [*train, "--agent.advantage", advantage, *(["--language.group-size", "2"] if advantage != "gae" else [])]


@pytest.mark.parametrize("advantage", ["gae", "gigpo"])
def test_a_run_is_resumed_and_exported(advantage: str, tmp_path: Path, capsys: Any) -> None:
    train, run = training(advantage, tmp_path), tmp_path / "run"
    assert "words, right in" in capsys.readouterr().out
    assert command([*train, "--steps", "72", "--out", str(tmp_path / "whole")]) == 0
    assert command([*train, "--steps", "48", "--out", str(run)]) == 0
    assert command(["resume", str(run), "--steps", "72"]) == 0
    assert_same(tmp_path / "whole", run)
    assert "goal: " in (run / "report.html").read_text()
    capsys.readouterr()
    assert command(["eval", str(run), "--episodes", "6", "--sample"]) == 0
    assert "tokens" in capsys.readouterr().out
    assert command(["language", "export", str(run), "--out", str(tmp_path / "out")]) == 0


def test_groups_begin_together_after_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a stretch of the rollout is no longer an episode, or members of a group are given other tasks."""
    train, run = training("grpo", tmp_path), tmp_path / "run"
    step, update, calls, tasks, begun = TextVector.step, PPO.update, 0, [], []

    def fails_once(env: TextVector, action: Tensor) -> Step:
        nonlocal calls
        if env.task_groups:
            calls += 1
            if calls == 5:  # within an episode, and a rollout
                raise RuntimeError("out of coffee")
            if env._clock == 0:
                tasks.append([e._secret for e in env._envs])
        return step(env, action)

    def looks(agent: PPO, rollout: Rollout) -> Any:
        begun.append((rollout.start[:-1] & rollout.valid).view(-1, 3, 4))
        return update(agent, rollout)

    monkeypatch.setattr(TextVector, "step", fails_once)
    monkeypatch.setattr(PPO, "update", looks)
    with pytest.raises(RuntimeError, match="out of coffee"):
        command([*train, "--steps", "100", "--out", str(run)])
    assert not begun
    assert command(["resume", str(run)]) == 0
    assert len(begun) >= 2 and all(bool(each[:, 0].all()) and not bool(each[:, 1:].any()) for each in begun)
    assert len(tasks) >= 6 and all(row[0] == row[1] and row[2] == row[3] for row in tasks)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"advantage": "grpo"}, {"advantage": "rloo"}, {"advantage": "gigpo"}])
def test_it_learns_to_answer(settings: dict[str, Any]) -> None:
    """From random weights. Where groups tell, nothing is learned of a task that none of a group ever solves, as it can
    be with the word of three tokens, here, which a random model writes once in thousands of times: such a task is won
    by none or by all of its group. All others are won."""
    config = FREE if not settings else LanguageConfig(**{**FREE.to_dict(), "group_size": 8})
    numbers = {"lr": 3e-3, "entropy_coef": 0.01} if not settings else {"lr": 2e-3, "entropy_coef": 0.003}
    agent, env = agent_of(config, 32, minibatch_size=128, epochs=2, **numbers, **settings)
    for _ in range(60 if not settings else 100):
        rollout = collected(agent, env, 2 * Echo.max_turns)
        agent.update(rollout)
    assert isinstance(agent.policy.trunk.model, LanguageModel)
    if not settings:
        assert float((rollout.reward[rollout.ended] > 0).float().mean()) > 0.9
        return
    won = rollout.reward.view(2, Echo.max_turns, 4, 8).sum(1).mean(-1)  # of each group, (2, 4)
    assert isinstance(rollout.obs, dict)
    long = env._tokenizer.encode("dark", add_special_tokens=False)[0]
    hard = (rollout.obs["prompt"][:: Echo.max_turns][:2] == long).any(-1).view(2, 4, 8)[..., 0]  # of the first turns
    assert float(won[~hard].mean()) > 0.9 and int((~hard).sum()) >= 4
    assert bool(((won[hard] < 0.1) | (won[hard] > 0.9)).all())


# Imitation of what was written.


def test_answers_of_tokens_are_imitated() -> None:
    """The loss is an answer's negative log-likelihood: as of each text alone, without what comes after its end."""
    env = echo(32, FREE)
    obs = env.reset(0)
    assert isinstance(obs, dict)
    right = answers(env)
    agent = BC(env.observation_space, env.action_space, BCConfig(lr=3e-3), seed=1, network=tiny(config=FREE))
    model = next(m for m in agent.policy.modules() if isinstance(m, LanguageModel))
    loss, metrics = agent.losses(obs, right)
    prompts = agent.policy.encoder(obs)  # type: ignore[union-attr]
    for row in range(4):
        written = right[row].long()
        alone = by_hand(model, prompts[row], written[written >= 0])
        assert float(loss[row]) == pytest.approx(-float(alone.sum()), abs=1e-4)
    assert float(metrics["log_prob_of_token"]) == pytest.approx(-float(loss.sum()) / int((right >= 0).sum()), abs=1e-5)
    for _ in range(60):
        agent.update(batch_of(obs, right, torch.zeros(32)))
    written = agent.policy.act(obs)[0]
    assert float((written == right).all(-1).float().mean()) > 0.9


def test_a_run_that_writes_is_collected_and_imitated(tmp_path: Path) -> None:
    data, settings = written_data(tmp_path)
    assert isinstance(data.action_space, TokenSpace) and data.action.dtype == "int32"
    again = ctrlrl.train("bc", "text/GuessNumber", updates=4, out=str(tmp_path / "bc"), **settings)
    assert [one.step for one in load_run(again.path).evaluations] == [0, 4]
