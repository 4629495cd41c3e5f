"""IQL of tokens: updates against a reference that goes text by text, what has no part in them, what is learned."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import ctrlrl
from ctrlrl.algorithms.bc import BC
from ctrlrl.algorithms.bc_config import BCConfig
from ctrlrl.algorithms.iql import IQL
from ctrlrl.algorithms.iql_tokens import IQLTokens
from ctrlrl.algorithms.iql_tokens_config import IQLTokensConfig
from ctrlrl.algorithms.registry import train_config_class
from ctrlrl.cli.main import run as command
from ctrlrl.config import LanguageConfig
from ctrlrl.errors import UsageError
from ctrlrl.language.model import LanguageModel
from ctrlrl.replay.batch import Batch
from ctrlrl.runs.record import load_run
from ctrlrl.training.setup import networks_of, settle_execution
from tests.language import SMALL, answers, batch_of, echo, tiny, written_data
from tests.runs import assert_same

FREE = LanguageConfig(**{**SMALL.to_dict(), "form": "tokens"})


def made(config: LanguageConfig = FREE, **settings: Any) -> IQLTokens:
    env = echo(1, config)
    numbers = {"actor_lr": 1e-3, "critic_lr": 1e-3, "actor_lr_steps": 0, "expectile": 0.8} | settings
    return IQLTokens(
        env.observation_space, env.action_space, IQLTokensConfig(**numbers), seed=1, network=tiny(config=config)
    )


def transitions(n: int = 8, seed: int = 0) -> Batch:
    """[1, n, ...], rows of which episodes end or go on, with answers of one, two and three tokens."""
    env, g = echo(n, FREE), torch.Generator().manual_seed(seed)
    obs = env.reset(seed)
    assert isinstance(obs, dict)
    action = torch.where(torch.rand(n, 1, generator=g) < 0.5, answers(env), answers(env, right=False))
    action[0, 1:] = -1
    step = env.step(action)
    assert isinstance(step.obs, dict)
    batch = batch_of(obs, action, torch.randn(n, generator=g))
    after = {name: value[None] for name, value in step.obs.items()}
    return replace(batch, next_obs=after, discount=0.9 * (torch.rand(1, n, generator=g) < 0.5))


# One update.


class Reference:
    """Goes through the rows, and through the tokens of each, in float64; by autograd and torch's Adam."""

    def __init__(self, agent: IQLTokens) -> None:
        self.agent = copy.deepcopy(agent)
        for module in (self.agent.policy, self.agent.critics, self.agent.target_critics, self.agent.value):
            module.double()
        learned = (self.agent.policy, self.agent.critics, self.agent.value)
        self.adams = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in learned]

    def text(self, model: LanguageModel, obs: Any, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (L, V) of what follows each token of prompt and answer alone, from the prompt's last on,
        and features there."""
        prompt = torch.cat([obs["goal"], obs["prompt"]])
        prompt = prompt[prompt >= 0].long()
        out = model.causal(torch.cat([prompt, answer])[None], output_hidden_states=True)
        start = len(prompt) - 1
        return out.logits[0, start:].log_softmax(-1), out.hidden_states[-1][0, start:]

    def update(self, batch: Batch) -> None:
        agent = self.agent
        c, value, critics, targets = agent.config, agent.value.trunk, agent.critics.ensemble, agent.target_critics
        v_model, q_model, t_model = (m.reader.own for m in (value, critics, targets.ensemble))
        policy = agent.policy.trunk.model
        losses: list[list[Tensor]] = [[], [], []]
        for i in range(len(batch.reward)):
            obs = {name: entry[i] for name, entry in batch.obs.items()}  # type: ignore[union-attr]
            then = {name: entry[i] for name, entry in batch.next_obs.items()}  # type: ignore[union-attr]
            answer = batch.action[i][batch.action[i] >= 0].long()
            after = value.head(self.text(v_model, then, answer[:0])[1])[0, 0, 0].detach()
            v = value.head(self.text(v_model, obs, answer)[1])[0, :, 0]
            q = critics.heads(self.text(q_model, obs, answer)[1][1:])[..., 0]
            best = targets.ensemble.heads(self.text(t_model, obs, answer)[1][1:])[..., 0].amin(0).detach()
            log_probs = self.text(policy, obs, answer)[0]
            for j, token in enumerate(answer):
                inside = j < len(answer) - 1
                y = v[j + 1].detach() if inside else float(batch.reward[i]) + float(batch.discount[i]) * after
                u = best[j] - v[j]
                losses[0].append(-min(float((c.beta * u.detach()).exp()), 100.0) * log_probs[j, token])
                losses[1].append((q[:, j] - y).square().sum())
                losses[2].append((1 - c.expectile if float(u.detach()) < 0 else c.expectile) * u.square())
        for loss, adam in zip(losses, self.adams, strict=True):
            adam.zero_grad()
            torch.stack(loss).mean().backward()
            adam.step()
        with torch.no_grad():
            for target, now in zip(targets.parameters(), agent.critics.parameters(), strict=True):
                target += c.tau * (now - target)

    def assert_equals(self, agent: IQLTokens) -> None:
        for name in ("policy", "critics", "target_critics", "value"):
            theirs = dict(getattr(self.agent, name).named_parameters())
            for key, mine in getattr(agent, name).named_parameters():
                assert torch.allclose(mine.double(), theirs[key], atol=2e-5), (name, key)


def test_three_updates_equal_the_float64_reference() -> None:
    agent = made()
    with torch.no_grad():  # target critics differ from the critics, and advantages from 0
        for p in agent.target_critics.parameters():
            p.mul_(1.2)
    reference, start = Reference(agent), [p.clone() for p in agent.policy.parameters()]
    for seed in range(3):
        batch = transitions(seed=seed)
        agent.update(batch)
        reference.update(batch[0])
        reference.assert_equals(agent)
    moved = max(float((p - q).detach().abs().max()) for p, q in zip(agent.policy.parameters(), start, strict=True))
    assert moved > 1e-3


@pytest.mark.parametrize("critic", ["separate", "small", "shared"])
def test_what_is_not_said_has_no_part(critic: str) -> None:
    """A row without an answer, and columns after the longest."""
    config = LanguageConfig(**{**FREE.to_dict(), "critic": critic})
    plain, other = made(config), made(config)
    batch = transitions()
    empty = batch.map(lambda x: torch.cat([x[:, :3], x[:, :1], x[:, 3:]], 1))
    empty.action[:, 3] = -1
    wide = torch.nn.functional.pad(empty.action, (0, 2), value=-1)
    theirs = other.update(replace(empty, action=wide))
    for name, value in plain.update(batch).items():
        assert torch.allclose(value, theirs[name], atol=1e-5), name
    for mine, same in ((plain.policy, other.policy), (plain.critics, other.critics), (plain.value, other.value)):
        for p, q in zip(mine.parameters(), same.parameters(), strict=True):
            assert torch.allclose(p, q, atol=1e-5)


@pytest.mark.parametrize("critic", ["shared", "frozen"])
def test_critics_that_read_the_policys_features_train_nothing_of_it(critic: str) -> None:
    """`frozen` reads them without the adapter; target critics, though copied, read the same policy's."""
    peft = pytest.importorskip("peft")
    config = LanguageConfig(**{**FREE.to_dict(), "critic": critic, "lora_rank": 2})
    network = tiny(config=config)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapter = peft.get_peft_model(network.model.causal, settings)
    network.model = LanguageModel(adapter.get_base_model(), adapter=adapter)
    env = echo(1, config)
    agent = IQLTokens(env.observation_space, env.action_space, IQLTokensConfig(learn="value"), seed=1, network=network)
    model = agent.policy.trunk.model
    assert model.adapted and agent.target_critics.ensemble.reader._policys[0] is model
    before, heads = copy.deepcopy(agent.policy.state_dict()), [p.clone() for p in agent.critics.parameters()]
    batch = transitions()
    agent.update(batch)
    assert all(torch.equal(value, before[name]) for name, value in agent.policy.state_dict().items())
    assert any(not torch.equal(p, q) for p, q in zip(agent.critics.parameters(), heads, strict=True))
    with torch.no_grad():
        first = agent.q(agent.target_critics, batch[0].obs, batch[0].action)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(1.0)
        now = agent.q(agent.target_critics, batch[0].obs, batch[0].action)
    assert torch.equal(now, first) == (critic == "frozen")


# What it learns.


def test_it_learns_what_was_right_where_cloning_learns_both() -> None:
    env, g = echo(32, FREE), torch.Generator().manual_seed(0)
    obs = env.reset(0)
    assert isinstance(obs, dict)
    right, wrong = answers(env), answers(env, right=False)
    agents: list[Any] = [made(beta=10.0, tau=0.05)]
    agents.append(BC(env.observation_space, env.action_space, BCConfig(lr=1e-3), seed=1, network=tiny(config=FREE)))
    shares = []
    for agent in agents:
        for _ in range(600 if isinstance(agent, IQLTokens) else 150):
            good = torch.rand(32, 1, generator=g) < 0.5
            agent.update(batch_of(obs, torch.where(good, right, wrong), good[:, 0].float()))
        said = torch.stack([agent.policy.act(obs, explore=True)[0] for _ in range(20)])
        shares.append(float((said == right).all(-1).float().mean()))
    assert shares[0] > 0.9 and 0.3 < shares[1] < 0.7


# A run.


def test_a_run_is_resumed_and_exported(tmp_path: Path, capsys: Any) -> None:
    _, settings = written_data(tmp_path)
    whole, half = str(tmp_path / "whole"), str(tmp_path / "half")
    ctrlrl.train("iql-tokens", "text/GuessNumber", out=whole, updates=8, **settings)
    ctrlrl.train("iql-tokens", "text/GuessNumber", out=half, updates=4, **settings)
    assert command(["resume", half, "--updates", "8"]) == 0
    assert [one.step for one in load_run(Path(half)).evaluations] == [0, 4, 8]
    assert_same(Path(whole), Path(half))
    page = (Path(half) / "report.html").read_text()
    assert "updates/s on average" in page and "which speaks" in page
    assert command(["language", "export", half, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_what_does_not_fit_is_said() -> None:
    space, box = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,))
    with pytest.raises(UsageError, match="take iql-discrete for candidates and other Discrete actions, iql for a Box"):
        IQLTokens(space, box)
    env = echo(1, FREE)
    with pytest.raises(UsageError, match="answers of tokens need a language model"):
        IQLTokens(space, env.action_space)
    with pytest.raises(UsageError, match=r"language\.critic joint is for ppo"):
        made(LanguageConfig(**{**FREE.to_dict(), "critic": "joint"}))
    with pytest.raises(UsageError, match="IQL of tokens is for answers that a language model writes"):
        choosing = echo(1)
        IQLTokens(choosing.observation_space, choosing.action_space, network=tiny())
    with pytest.raises(UsageError, match=r"answers have up to 3 tokens.* up to 5: --language\.candidate-tokens 3"):
        longer = LanguageConfig(**{**FREE.to_dict(), "candidate_tokens": 5})
        IQLTokens(env.observation_space, env.action_space, network=tiny(config=longer))
    with pytest.raises(UsageError, match="these are tokens: take bc, iql-tokens or ppo"):
        IQL(space, env.action_space)
    language: dict[str, Any] = {"model": "nowhere", "critic": "shared"}
    given: dict[str, Any] = {"env": "text/GuessNumber", "data": "nowhere", "language": language, "out": "nowhere"}
    made_of = train_config_class("iql-tokens").from_dict
    config = made_of({"agent": {"learn": "policy"}, **given})
    with pytest.raises(UsageError, match="take separate, small or frozen for both trainings"):
        networks_of("iql-tokens", config, None)
    for execution in ("compiled", "captured"):
        config = made_of({"agent": {"execution": execution}, **given})
        with pytest.raises(UsageError, match=r"depend on its texts\. Or take --agent\.execution eager"):
            settle_execution(config, torch.device("cpu"), plain=False, resumed=False)
