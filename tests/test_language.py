"""A language model as policy and critic: what it scores, what it is asked for, and that agents learn with it."""

from __future__ import annotations

import copy
import functools
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
import transformers

import ctrlrl
from ctrlrl.algorithms.bc import BC
from ctrlrl.algorithms.bc_config import BCConfig
from ctrlrl.algorithms.iql_discrete import IQLDiscrete
from ctrlrl.algorithms.iql_discrete_config import IQLDiscreteConfig
from ctrlrl.algorithms.ppo import PPO
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.algorithms.sac_discrete import SACDiscrete
from ctrlrl.algorithms.sac_discrete_config import SACDiscreteConfig
from ctrlrl.cli.main import run as command
from ctrlrl.config import LanguageConfig
from ctrlrl.envs.make import make_env
from ctrlrl.envs.text.base import TextEnv, TextState, TextStep
from ctrlrl.envs.text.registry import make_text_env
from ctrlrl.errors import UsageError
from ctrlrl.language.adapter import text_environments, word_starts
from ctrlrl.language.backbone import LanguageBackbone, Tokens
from ctrlrl.language.make_lm import PLAIN, make_lm, word_tokenizer
from ctrlrl.language.model import LanguageModel, digest_of, load_model
from ctrlrl.language.prompts import ChatPrompts
from ctrlrl.language.text_vector import TextVector
from ctrlrl.language.tiny_config import TinyConfig
from ctrlrl.replay.rollout import Rollout
from ctrlrl.runs.record import load_run
from ctrlrl.training.collect import RandomPolicy, collect
from ctrlrl.training.collector import Collector
from tests.runs import assert_same

V = 50
KINDS = ["llama", "gpt2", "qwen2", "opt"]


def causal(kind: str, seed: int = 0) -> Any:
    """A small random model; GPT-2 counts positions in columns unless told otherwise."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **sizes))
    if kind == "opt":
        opt = transformers.OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, **sizes)
        return transformers.OPTForCausalLM(opt)
    rest = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest |= {"num_key_value_heads": 2}
    if kind == "mistral":  # which looks back no further than a window
        return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=5, **sizes, **rest))
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **rest))
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **rest))


def model_of(kind: str = "llama", **how: Any) -> LanguageModel:
    return LanguageModel(causal(kind))


def texts(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (3, 9) of 9, 4 and 1 tokens, candidates (3, 4, 3) of 1 to 3, and which of them exist. The token 1, with
    which the model pads, is among them."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, V, (3, 9), generator=g)
    prompt[0, 4] = prompt[1, 7] = 1
    prompt[1, :5], prompt[2, :8] = -1, -1
    candidates = torch.randint(0, V, (3, 4, 3), generator=g)
    candidates[:, 1, 1:], candidates[:, 2, 2:] = -1, -1
    candidates[0, 0, 2] = 1
    exists = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    return prompt, candidates, exists


def by_hand(model: LanguageModel, prompt: Tensor, candidate: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of a candidate's tokens after a prompt: one text without padding, cache or positions."""
    before, after = prompt[prompt >= 0], candidate[candidate >= 0]
    logits = model.causal(torch.cat([before, after])[None]).logits[0] / temperature
    log_probs = logits.log_softmax(-1)[len(before) - 1 : -1]
    return log_probs.gather(-1, after[:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_each_text_alone(kind: str) -> None:
    """Fails without positions (GPT-2), with masks made from ids, with a blank between prompt and answer, or where the
    first token is predicted from padding."""
    model, (prompt, candidates, exists) = model_of(kind), texts()
    log_prob, there = model.score(prompt, candidates, exists, temperature=1.5)
    features = model.features(prompt, candidates, exists)
    for b in range(3):
        for i in range(4):
            length = int((candidates[b, i] >= 0).sum()) if exists[b, i] else 0
            assert there[b, i].tolist() == [j < length for j in range(3)]
            if length:
                expected = by_hand(model, prompt[b], candidates[b, i], 1.5)
                assert torch.allclose(log_prob[b, i, :length], expected, atol=1e-4)
                text = torch.cat([prompt[b][prompt[b] >= 0], candidates[b, i, :length]])[None]
                last = model.causal(text, output_hidden_states=True).hidden_states[-1][0, -1]
                assert torch.allclose(features[b, i], last, atol=1e-4)
            assert bool((log_prob[b, i, length:] == 0).all())
    logits, at_end, _ = model.read(prompt)
    for b in range(3):
        out = model.causal(prompt[b][prompt[b] >= 0][None], output_hidden_states=True)
        assert torch.allclose(logits[b], out.logits[0, -1], atol=1e-4)
        assert torch.allclose(at_end[b], out.hidden_states[-1][0, -1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_candidates_are_scored_some_after_the_others_where_memory_is_short(kind: str) -> None:
    model, (prompt, candidates, exists) = model_of(kind), texts()
    log_prob, there = model.score(prompt, candidates, exists)
    rows: list[int] = []
    go_on = model.go_on
    model.go_on = lambda ids, *rest, **how: (rows.append(len(ids)), go_on(ids, *rest, **how))[1]  # type: ignore[method-assign, func-returns-value]
    for number in (0.5, 3.5, 100):
        rows.clear()
        memory = number * (model.bytes_of_row(prompt.shape[1] + candidates.shape[2]) + 2 * 12 * V)
        again, too = model.score(prompt, candidates, exists, memory=memory)
        assert torch.equal(too, there) and torch.allclose(again, log_prob, atol=1e-5)
        assert max(rows) == min(max(1, int(number)), int(exists.sum())) and sum(rows) == int(exists.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_prompts_through_the_cache(kind: str) -> None:
    model, (prompt, candidates, exists) = model_of(kind), texts()
    weights = list(model.parameters())
    ours = torch.autograd.grad(model.score(prompt, candidates, exists)[0].sum(), weights)
    total = sum(by_hand(model, prompt[b], candidates[b, i]).sum() for b in range(3) for i in range(4) if exists[b, i])
    theirs = torch.autograd.grad(total, weights)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=2e-4)


def test_the_cache_has_its_present_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training would begin with a warning of transformers."""
    warned: list[str] = []
    monkeypatch.setattr(transformers.utils.generic.logger, "warning_once", warned.append)
    model_of().score(*texts())
    assert not warned


def test_goal_and_prompt_are_one_text() -> None:
    space = gym.spaces.Dict({n: gym.spaces.Box(-1, V - 1, (s,), "int32") for n, s in (("goal", 3), ("prompt", 4))})
    goal, prompt = torch.tensor([[-1, 5, 6], [-1, -1, -1]]), torch.tensor([[-1, -1, 7, 8], [1, 2, 3, 4]])
    ids = Tokens(space)({"goal": goal, "prompt": prompt})
    assert ids.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]  # no column that nobody needs
    goal[1, 2] = 9
    assert Tokens(space)({"goal": goal, "prompt": prompt}).tolist() == [[-1, 5, 6, 7, 8], [9, 1, 2, 3, 4]]
    with pytest.raises(UsageError, match="a language model reads the entries 'goal' and 'prompt'"):
        Tokens(gym.spaces.Box(0, 1, (3,)))


def test_candidates_are_normalized_as_asked() -> None:
    model, (prompt, candidates, exists) = model_of(), texts()
    begins = torch.zeros(V, dtype=torch.bool)
    begins[candidates[0, 0, 2]] = True  # and the first token does always, with a blank before it or not
    log_prob = model.score(prompt, candidates, exists)[0][0, 0]
    for how, count in (("sum", 1), ("token", 3), ("word", 2)):
        policy = LanguageBackbone(model, LanguageConfig(normalize=how), begins, (1,))(1, 1)  # type: ignore[arg-type]
        got = policy(prompt, candidates, exists)[0, 0]
        assert torch.allclose(got, log_prob.sum() / count, atol=1e-6)
    assert word_starts(word_tokenizer({"turn left", "go"}), 7).tolist() == [True] * 5 + [False] * 2


def test_an_adapter_is_all_that_is_trained_and_saved(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain = causal("llama")
    plain.save_pretrained(tmp_path / "lm")
    config = LanguageConfig(model=str(tmp_path / "lm"), lora_rank=4, lora_targets=("q_proj", "v_proj"))
    torch.manual_seed(1)
    model, (prompt, candidates, exists) = load_model(config), texts()
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
        adapted = model.score(prompt, candidates, exists)[0]
        with model.plain():
            before = model.score(prompt, candidates, exists)[0]
        reference = LanguageModel(plain).score(prompt, candidates, exists)[0]
    assert torch.allclose(before, reference, atol=1e-5) and not torch.allclose(adapted, before, atol=1e-2)
    state = model.state_dict()
    assert state and all("lora" in name for name in state)
    other = load_model(config)
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other.score(prompt, candidates, exists)[0], adapted)
    assert digest_of(other) == digest_of(model)
    with pytest.raises(UsageError, match=r"language\.lora_targets"):
        load_model(LanguageConfig(model=str(tmp_path / "lm"), lora_rank=4, lora_targets=("nothing",)))
    with pytest.raises(UsageError, match="no causal language model at"):
        load_model(LanguageConfig(model=str(tmp_path)))


class Echo(TextEnv):
    """Say the word that is shown, before three turns are over; the words on offer differ."""

    max_turns = 3
    words = ("red", "green", "blue", "dark blue")

    def __init__(self) -> None:
        self._random = torch.Generator()

    def reset(self, seed: int | None = None) -> TextState:
        if seed is not None:
            self._random.manual_seed(seed)
        self._turn = 0
        self._word = int(torch.randint(4, (1,), generator=self._random))
        return self._shown()

    def step(self, answer: str) -> TextStep:
        self._turn += 1
        right = answer == self.words[self._word]
        over = right or self._turn == self.max_turns
        return TextStep(self._shown(), float(right), right, over and not right, True, right if over else None)

    def get_state(self) -> dict[str, Any]:
        return {"turn": self._turn, "word": self._word, "random": self._random.get_state().tolist()}

    def set_state(self, state: dict[str, Any]) -> TextState:
        self._turn, self._word = state["turn"], state["word"]
        self._random.set_state(torch.tensor(state["random"], dtype=torch.uint8))
        return self._shown()

    def expert(self) -> str:
        return self.words[self._word]

    def _shown(self) -> TextState:
        commands = self.words[self._turn % 2 :] + self.words[: self._turn % 2]
        return TextState(f"say {self.words[self._word]}", commands if self._turn else commands[::-1], "say it back")


SMALL = LanguageConfig(
    prompt_tokens=16, goal_tokens=6, candidate_tokens=3, max_candidates=5, history=1, critic_hidden=32
)


def said() -> set[str]:
    words = {PLAIN.goal("say it back"), PLAIN.prompt("", "say", [("say", "red")], 1)}
    return words | {PLAIN.command(word) for word in Echo.words}


def echo(n: int = 4, config: LanguageConfig = SMALL) -> TextVector:
    return TextVector([Echo() for _ in range(n)], word_tokenizer(said()), config, name="echo")


def right_answers(env: TextVector) -> torch.Tensor:
    return torch.tensor([s.commands.index(e.expert() or "") for s, e in zip(env._states, env._envs, strict=True)])


def tiny(seed: int = 0, hidden: int = 32, config: LanguageConfig = SMALL) -> LanguageBackbone:
    torch.manual_seed(seed)
    size = len(word_tokenizer(said()))
    sizes = {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=size, **sizes))
    return LanguageBackbone(LanguageModel(made), config, torch.ones(size, dtype=torch.bool), (1,))


def test_what_is_said_is_told_in_tokens_once() -> None:
    env = echo(3)
    tokenizer = word_tokenizer(said())
    obs = env.reset([5, 6, 7])
    assert isinstance(obs, dict) and all(env.observation_space[n].contains(v[0].numpy()) for n, v in obs.items())
    ends, returns = 0, torch.zeros(3)
    for t in range(12):
        for row in range(3):
            shown, past = env._states[row], env.transcript[row][-1:]
            prompt = obs["prompt"][row]
            assert tokenizer.decode(prompt[prompt >= 0]) == " ".join(
                PLAIN.prompt(shown.goal, shown.observation, past, 1).split()
            )
            assert bool((prompt.sign().diff() >= 0).all()) or prompt[0] >= 0  # padded on the left alone
            offered = [tokenizer.decode(c[c >= 0]) for c in obs["candidates"][row][obs["candidate_mask"][row] > 0]]
            assert offered == list(shown.commands)
        action = right_answers(env) if t % 4 == 3 else torch.zeros(3, dtype=torch.int64)
        step = env.step(action)
        ended = step.terminated | step.truncated
        returns += step.reward
        assert torch.equal(ended, ~step.log["success"].isnan()) and torch.equal(
            ended, ~step.log["episode/turns"].isnan()
        )
        for row in ended.nonzero().squeeze(-1).tolist():
            final, fresh = step.final_obs["prompt"][row], step.obs["prompt"][row]
            assert "state : say" in tokenizer.decode(final[final >= 0]) and (final >= 0).sum() > (fresh >= 0).sum()
            ends += 1
        assert bool(step.valid.all()) and torch.equal(step.action, action)
        obs = step.obs
    assert ends >= 6
    with pytest.raises(UsageError, match="no candidate 4; environment 0 offers 4"):
        env.step(torch.full((3,), 4))
    with pytest.raises(UsageError, match=r"'say it back' has 5 tokens: language\.goal_tokens"):
        echo(1, LanguageConfig(goal_tokens=3)).reset(0)
    with pytest.raises(UsageError, match=r"offers 4 commands: language\.max_candidates"):
        echo(1, LanguageConfig(max_candidates=3)).reset(0)
    short = echo(1, LanguageConfig(prompt_tokens=3))
    short.reset(0)
    while not bool((step := short.step(torch.zeros(1, dtype=torch.int64))).truncated | step.terminated):
        pass
    assert float(step.log["episode/cut"][0]) == 1


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_conversation_is_told_by_the_models_template() -> None:
    tokenizer = word_tokenizer(said() | {"<|system|> <|user|> <|assistant|> <eos>"})
    config = LanguageConfig(**{**SMALL.to_dict(), "chat": True, "prompt_tokens": 40, "goal_tokens": 10})
    with pytest.raises(UsageError, match=r"has no chat template: leave language\.chat out"):
        TextVector([Echo()], tokenizer, config, name="echo")
    tokenizer.chat_template = TEMPLATE
    env = TextVector([Echo()], tokenizer, config, name="echo")
    obs = env.reset(0)
    for _ in range(3):
        assert isinstance(obs, dict)
        ids = torch.cat([obs["goal"][0], obs["prompt"][0]])
        messages = [{"role": "system", "content": "say it back"}]
        for shown, answer in env.transcript[0][-1:]:
            messages += [{"role": "user", "content": shown}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": env._states[0].observation})
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids[ids >= 0]) == " ".join(whole.split())
        obs = env.step(torch.zeros(1, dtype=torch.int64)).obs
    assert ChatPrompts(tokenizer, "m").goal("") == "" and ChatPrompts(tokenizer, "m").command("go") == "go"
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(UsageError, match=r"of m refuses a system's.*no system here; leave language\.chat out"):
        ChatPrompts(tokenizer, "m").goal("this")
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(UsageError, match="does not begin with what the system says"):
        ChatPrompts(tokenizer, "m").prompt("this", "that", [], 0)


def test_text_goes_on_exactly() -> None:
    env, other, g = echo(), echo(), torch.Generator().manual_seed(0)
    env.reset(3)
    for _ in range(10):
        env.step(torch.randint(4, (4,), generator=g))
    obs, reasons = other.set_state(env.get_state(), seed=0)
    assert reasons == [None] * 4 and isinstance(obs, dict)
    for _ in range(10):
        action = torch.randint(4, (4,), generator=g)
        one, two = env.step(action), other.step(action)
        for name in obs:
            assert torch.equal(one.obs[name], two.obs[name]) and torch.equal(one.final_obs[name], two.final_obs[name])
        assert torch.equal(one.reward, two.reward)
        for name, value in one.log.items():
            assert torch.equal(value.nan_to_num(9.0), two.log[name].nan_to_num(9.0)), name


def ppo(config: LanguageConfig = SMALL, **settings: Any) -> PPO:
    env = echo(config=config)
    numbers = {"lr": 1e-3, "minibatch_size": 32, "epochs": 2, "normalize_reward": False} | settings
    return PPO(env.observation_space, env.action_space, PPOConfig(**numbers), seed=1, network=tiny(config=config))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("critic", ["separate", "small", "shared", "joint"])
def test_the_first_ratio_is_one(temperature: float, critic: str) -> None:
    """Dropout, a temperature of acting alone, other padding in another batch, or a stale cache would move it."""
    config = LanguageConfig(**{**SMALL.to_dict(), "temperature": temperature, "critic": critic})
    agent, env = ppo(config), echo(config=config)
    obs = env.reset(0)
    policy = agent.policy
    extras = policy.act(obs, explore=False)[2]
    rollout = Rollout(env.observation_space, horizon=16, num_envs=4, extras=extras)
    rollout.begin(obs)
    collector = Collector(env, policy, obs, seed=0)
    assert collector is not None
    for _ in range(16):
        action, _, extras = policy.act(obs, explore=True)
        step = env.step(action)
        rollout.add(step, extras)
        obs = step.obs
    data, _ = agent.prepare(rollout)
    for rows in torch.arange(64).split(7):
        part = data.map(lambda x, rows=rows: x[rows])
        log_ratio = policy.distribution(part.obs).log_prob(part.decision) - part.log_prob
        assert float(log_ratio.detach().abs().max()) < 1e-4
    metrics, steps = agent.update(rollout)
    assert steps == 4 and float(metrics["kl"]) >= 0 and bool(torch.isfinite(torch.stack(list(metrics.values()))).all())


@pytest.mark.parametrize("critic", ["separate", "small", "shared"])
def test_critics_train_what_is_their_own_alone(critic: str) -> None:
    config = LanguageConfig(**{**SMALL.to_dict(), "critic": critic})
    env = echo(config=config)
    agent = SACDiscrete(
        env.observation_space, env.action_space, SACDiscreteConfig(), seed=1, network=tiny(config=config)
    )
    own, theirs = list(agent.policy.parameters()), list(agent.critics.parameters())
    assert {id(p) for p in own}.isdisjoint(map(id, theirs))
    assert {id(p) for p in agent.target_critics.parameters()}.isdisjoint(map(id, theirs))
    heads = sum(p.numel() for name, p in agent.critics.named_parameters() if ".heads." in name)
    assert (sum(p.numel() for p in theirs) == heads) == (critic == "shared")
    agent.value(agent.critics, env.reset(0)).square().mean().backward()
    assert all(p.grad is None for p in own)
    assert sum(float(p.grad.abs().sum()) for p in theirs if p.grad is not None) > 0
    words = [p for name, p in agent.critics.named_parameters() if name.endswith("embed_tokens.weight")]
    assert bool(words) == (critic != "shared") and all(bool((p.grad != 0).any()) for p in words)  # through all layers


@pytest.mark.parametrize("critic", ["joint", "shared"])
def test_the_loss_of_ppos_critic_trains_the_policys_model_where_it_is_joint(critic: str) -> None:
    """As GLAM's does."""
    config = LanguageConfig(**{**SMALL.to_dict(), "critic": critic})
    agent = ppo(config)
    assert agent.critic is not None
    assert {id(p) for p in agent.policy.parameters()}.isdisjoint(map(id, agent.critic.parameters()))
    agent.critic(echo(config=config).reset(0)).square().mean().backward()
    read = [p for name, p in agent.policy.named_parameters() if "lm_head" not in name]
    trained = [p.grad is not None and bool((p.grad != 0).any()) for p in read]
    assert all(trained) if critic == "joint" else not any(trained)


def test_critics_that_have_an_optimizer_of_their_own_cannot_be_joint() -> None:
    config = LanguageConfig(**{**SMALL.to_dict(), "critic": "joint"})
    env = echo(config=config)
    for agent in (SACDiscrete, IQLDiscrete):
        with pytest.raises(UsageError, match=r"language\.critic joint is for ppo.*separate, small, shared or frozen"):
            agent(env.observation_space, env.action_space, network=tiny(config=config))


def test_a_small_encoder_is_smaller_than_the_model_and_reads_every_token() -> None:
    config = LanguageConfig(**{**SMALL.to_dict(), "critic": "small", "critic_hidden": 16})
    network = tiny(hidden=64, config=config)
    critics = network.critics(2, 1, candidates=True)
    assert sum(p.numel() for p in critics.parameters()) < sum(p.numel() for p in network.model.parameters()) / 3
    obs = echo(config=config).reset(0)
    assert isinstance(obs, dict)
    ids, candidates = network.encoder(echo(config=config).observation_space)(obs), obs["candidates"]
    values = critics(ids, candidates, None)
    for column in range(ids.shape[1]):
        other = ids.clone()
        other[:, column] = torch.where(ids[:, column] >= 0, (ids[:, column] + 1) % network.model.vocabulary, -1)
        moved = (critics(other, candidates, None) != values)[0, :, 0]  # (B,)
        assert torch.equal(moved, ids[:, column] >= 0)
    with pytest.raises(UsageError, match=r"language\.critic_hidden.*multiple of 8"):
        LanguageConfig(critic="small", critic_hidden=12)


def play(policy: Any, explore: bool = False, n: int = 64) -> float:
    """Success over the first episodes of n environments."""
    env = echo(n)
    obs, done, won = env.reset(77), torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    while not bool(done.all()):
        step = env.step(policy.act(obs, explore=explore)[0])
        won |= ~done & step.terminated
        done |= step.terminated | step.truncated
        obs = step.obs
    return float(won.float().mean())


SETTINGS: dict[str, Any] = {"threads": 1, "video": False, "quiet": True, "eval_every": 0, "checkpoint_every": 10**6}


def test_before_learning_starts_a_language_model_acts_itself(tmp_path: Path) -> None:
    taken: list[tuple[Tensor, Tensor]] = []

    class Look(ctrlrl.Callback):
        def on_end(self, loop: Any) -> None:
            batch = loop.buffer.sample(1, 200, gamma=0.9)[0]
            taken.append((batch.action, loop.agent.policy.act(batch.obs, explore=False)[0]))

    config = LanguageConfig(**{**SMALL.to_dict(), "normalize": "token", "temperature": 1e-3})  # it draws the likeliest
    settings = SETTINGS | {"steps": 64, "learning_starts": 1000, "num_envs": 8, "callbacks": [Look()]}
    ctrlrl.train("sac-discrete", echo(8, config), network=tiny(config=config), out=str(tmp_path / "t"), **settings)
    ctrlrl.train("sac-discrete", "CartPole-v1", out=str(tmp_path / "c"), **settings)
    shares = [float((mine == likeliest).float().mean()) for mine, likeliest in taken]
    assert shares[0] > 0.95 and 0.2 < shares[1] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "sac-discrete"])
def test_the_same_agents_learn_text_and_cart_pole(algo: str, tmp_path: Path) -> None:
    """One class each, from `algorithms/`: it is given another network, and is told nothing of language.

    Of a model that knows nothing a sum over tokens would make answers of two words a fiftieth as likely as of one."""
    config = LanguageConfig(**{**SMALL.to_dict(), "normalize": "token"})
    network = tiny(seed=2, config=config)
    if algo == "ppo":
        agent = {"lr": 2e-3, "minibatch_size": 64, "epochs": 4, "normalize_reward": False, "gamma": 0.9}
        text = SETTINGS | {"steps": 3072, "rollout_steps": 256, "num_envs": 16, "agent": agent}
        cart: dict[str, Any] = {"steps": 12_000, "rollout_steps": 1024, "agent": {"hidden": [32], "lr": 3e-3}}
    else:
        agent = {"actor_lr": 2e-3, "critic_lr": 2e-3, "batch_size": 32, "gamma": 0.9, "alpha_lr": 1e-2, "utd": 0.5}
        text = SETTINGS | {"steps": 1600, "learning_starts": 200, "num_envs": 8, "agent": agent}
        cart = {"steps": 6_000, "learning_starts": 500, "agent": {"hidden": [64, 64], "utd": 1.0, "batch_size": 64}}
    before = play(_policy_of(algo, tiny(seed=2, config=config)))
    run = ctrlrl.train(algo, echo(text["num_envs"], config), network=network, out=str(tmp_path / "text"), **text)
    after = play(run.policy)
    assert after >= 0.95 and after > before + 0.2
    done = ctrlrl.train(algo, "CartPole-v1", out=str(tmp_path / "cart"), **SETTINGS | {"num_envs": 4} | cart)
    assert ctrlrl.evaluate(done, checkpoint="last", episodes=10).mean > 100


def _policy_of(algo: str, network: LanguageBackbone) -> Any:
    env = echo()
    made: dict[str, Any] = {"ppo": PPO, "sac-discrete": SACDiscrete}
    return made[algo](env.observation_space, env.action_space, seed=0, network=network).policy


def test_a_tiny_model_is_made_saved_and_read_back(tmp_path: Path) -> None:
    lines: list[str] = []
    config = TinyConfig(hidden=32, episodes=60, epochs=40, lr=5e-3)
    figures = make_lm(Echo, tmp_path / "lm", config, language=SMALL, vocabulary_episodes=20, say=lines.append)
    assert figures["accuracy"] > 0.95 and len(lines) == 41 and figures["words"] == len(word_tokenizer(said()))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]
    env = TextVector([Echo() for _ in range(4)], tokenizer, SMALL, name="echo")
    network = LanguageBackbone(LanguageModel(model), SMALL, torch.ones(len(tokenizer), dtype=torch.bool), (1,))
    policy = PPO(env.observation_space, env.action_space, seed=0, network=network).policy
    assert play(policy) > 0.95
    with pytest.raises(UsageError, match="is not empty: choose another --out"):
        make_lm(Echo, tmp_path / "lm", config)


def test_imitation_and_iql_take_the_model_too() -> None:
    env, g = echo(32), torch.Generator().manual_seed(0)
    obs = env.reset(0)
    assert isinstance(obs, dict)
    right = right_answers(env)
    agents: list[Any] = [
        BC(env.observation_space, env.action_space, BCConfig(lr=2e-3), network=tiny()),
        IQLDiscrete(
            env.observation_space, env.action_space, IQLDiscreteConfig(actor_lr=3e-3, critic_lr=3e-3), network=tiny()
        ),
    ]
    for agent in agents:
        before = copy.deepcopy(agent.policy.state_dict())
        for _ in range(30 if isinstance(agent, BC) else 80):
            action = torch.where(torch.rand(32, generator=g) < 0.5, right, torch.randint(4, (32,), generator=g))
            if isinstance(agent, BC):
                action = right
            reward = (action == right).float()
            batch = _batch(obs, action, reward)
            metrics = agent.update(batch)
        with torch.no_grad():
            hit = (agent.policy.act(obs)[0] == right).float().mean()
        assert float(hit) > 0.9, (type(agent), metrics)
        assert any(not torch.equal(value, before[name]) for name, value in agent.policy.state_dict().items())


def _batch(obs: dict[str, Tensor], action: Tensor, reward: Tensor) -> Any:
    from ctrlrl.replay.batch import Batch

    def one(x: Tensor) -> Tensor:
        return x[None]

    stacked = {name: one(value) for name, value in obs.items()}
    return Batch(
        obs=stacked,
        action=one(action),
        reward=one(reward),
        discount=torch.zeros(1, len(action)),
        next_obs=stacked,
        end=torch.ones(1, len(action), dtype=torch.bool),
        index=torch.zeros(1, len(action), dtype=torch.int64),
        extras={},
        next_extras={},
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_is_resumed_told_and_exported(rank: int, tmp_path: Path, capsys: Any) -> None:
    """The whole way by the command line, on a task that is registered."""
    lm, run, env = tmp_path / "lm", tmp_path / "run", "text/GuessNumber"
    options = ["--env-kwargs", '{"high": 4, "max_turns": 3}', "--language.max-candidates", "4"]
    small = ["--language.prompt-tokens", "40", "--language.candidate-tokens", "2"]
    made = ["--episodes", "20", "--epochs", "2", "--hidden", "16", "--heads", "2", "--layers", "1"]
    assert command(["language", "make-lm", "--env", env, "--out", str(lm), *made, *options, *small]) == 0
    assert "words, right in" in capsys.readouterr().out
    lora = ["--language.lora-rank", str(rank), "--language.lora-targets", "q_proj", "v_proj"] if rank else []
    train = ["train", "ppo", "--env", env, *options, *small, *lora, "--language.model", str(lm), "--num-envs", "4"]
    train += ["--rollout-steps", "16", "--agent.epochs", "1", "--agent.minibatch-size", "8", "--eval-episodes", "4"]
    train += ["--threads", "1", "--eval-every", "32", "--checkpoint-every", "20", "--agent.lr", "1e-3"]
    assert command([*train, "--steps", "96", "--out", str(tmp_path / "whole")]) == 0
    assert command([*train, "--steps", "32", "--out", str(run)]) == 0
    assert command(["resume", str(run), "--steps", "96"]) == 0
    assert_same(tmp_path / "whole", run)
    page = (run / "report.html").read_text()
    assert "What is said" in page and "goal: " in page and "no pictures" in page
    capsys.readouterr()
    assert command(["eval", str(run), "--episodes", "6"]) == 0
    greedy = capsys.readouterr().out
    assert command(["eval", str(run), "--episodes", "6", "--sample"]) == 0
    sampled = capsys.readouterr().out
    assert "success" in greedy and "turns" in greedy and greedy != sampled
    assert command(["language", "export", str(run), "--out", str(tmp_path / "out")]) == 0
    policy = ctrlrl.load(run).policy
    model = next(m for m in policy.modules() if isinstance(m, LanguageModel))
    ids = torch.tensor([[2, 3, 4, 5]])
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(out(ids).logits[0, -1], model.read(ids)[0][0], atol=1e-4)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == model.vocabulary
    code = command(["language", "export", str(run), "--out", str(tmp_path / "lora"), "--adapter"])
    assert code == (0 if rank else 2)
    if rank:
        assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    else:
        assert "has no adapter" in capsys.readouterr().err


def test_another_model_in_its_place_is_noticed(tmp_path: Path) -> None:
    options = {"max_candidates": 4, "prompt_tokens": 40, "candidate_tokens": 2, "model": str(tmp_path / "lm")}
    options |= {"lora_rank": 2, "lora_targets": ["q_proj"]}
    kwargs = {"high": 4, "max_turns": 3}
    lm = TinyConfig(hidden=16, heads=2, layers=1, episodes=10, epochs=1)
    made = lambda: make_text_env("text/GuessNumber", kwargs)  # noqa: E731
    make_lm(made, tmp_path / "lm", lm, vocabulary_episodes=10)
    small = {"steps": 32, "num_envs": 4, "rollout_steps": 16, "agent": {"epochs": 1, "minibatch_size": 8}}
    settings = SETTINGS | small | {"language": options, "env_kwargs": kwargs}
    run = ctrlrl.train("ppo", "text/GuessNumber", out=str(tmp_path / "run"), **settings)
    shutil.rmtree(tmp_path / "lm")
    make_lm(made, tmp_path / "lm", TinyConfig(**{**lm.to_dict(), "seed": 1}), vocabulary_episodes=10)
    for again in (functools.partial(ctrlrl.load, checkpoint="last"), ctrlrl.resume):
        with pytest.raises(UsageError, match=r"is no longer the one that the run was trained with \(frozen\)"):
            again(run.path)
    for algo, wrong, said in (
        ("sac", {}, "a language model is for bc, iql-discrete, ppo, sac-discrete so far, not for sac"),
        ("ppo", {"pixels": 32}, "leave pixels out"),
        ("ppo", {"language": options | {"prompt_tokens": 5000}}, r"the model reads 512 tokens; .* = 5,034"),
    ):
        given = {"steps": 32, "num_envs": 4, "language": options, "env_kwargs": kwargs, "out": str(tmp_path / "no")}
        with pytest.raises(UsageError, match=said):
            ctrlrl.train(algo, "text/GuessNumber", **SETTINGS | given | wrong)


MAZE: dict[str, Any] = {"max_candidates": 4, "prompt_tokens": 30, "candidate_tokens": 2}


def maze_model(folder: Path, seed: int, episodes: int = 10) -> str:
    """A tiny model for the maze; with few episodes it knows fewer words."""
    lm = TinyConfig(hidden=16, heads=2, layers=1, episodes=2, epochs=1, seed=seed)
    make_lm(lambda: make_text_env("text/Maze", {"max_turns": 8}), folder, lm, vocabulary_episodes=episodes)
    return str(folder)


def test_what_was_learned_or_collected_with_another_model_is_refused(tmp_path: Path) -> None:
    """Of an adapter the weights below it, of a dataset the words of its tokens."""
    same, other = maze_model(tmp_path / "a", 0), maze_model(tmp_path / "b", 1)
    fewer = maze_model(tmp_path / "c", 0, episodes=0)
    agent = {"batch_size": 8, "entropy_penalty": 0.0, "q_clip": 0.0}
    small = SETTINGS | {
        "steps": 16,
        "num_envs": 4,
        "learning_starts": 8,
        "agent": agent,
        "env_kwargs": {"max_turns": 8},
    }
    lora = MAZE | {"lora_rank": 2, "lora_targets": ["q_proj"]}

    def train(name: str, model: str, **more: Any) -> ctrlrl.Run:
        settings = small | {"language": lora | {"model": model}, "out": str(tmp_path / name)} | more
        return ctrlrl.train("sac-discrete", "text/Maze", **settings)

    run = train("run", same, eval_every=16, eval_episodes=1)
    with pytest.raises(
        UsageError, match=r"--init-from .*another model than .*/b \(frozen.*\), and an adapter fits its own"
    ):
        train("no", other, init_from=str(run.path))
    train("yes", same, init_from=str(run.path))
    data = collect(run.path, tmp_path / "data", tier="replay", reference_episodes=1).path
    for algo, settings in (
        (
            "bc",
            {"updates": 2, "language": MAZE, "agent": {"batch_size": 8}, "threads": 1, "quiet": True, "eval_every": 0},
        ),
        ("sac-discrete", small | {"language": MAZE}),
    ):
        for model, fits in ((fewer, False), (other, True)):
            given = settings | {"language": MAZE | {"model": model}, "data": str(data)}
            given |= {"out": str(tmp_path / f"{algo}-{fits}")}
            if fits:  # the same words in the same order, whatever the weights
                ctrlrl.train(algo, "text/Maze", **given)
                continue
            with pytest.raises(UsageError, match=r"tokens of .*data are those of another tokenizer than that of .*/c"):
                ctrlrl.train(algo, "text/Maze", **given)


def test_a_model_is_evaluated_before_it_learns(tmp_path: Path) -> None:
    """Also where it writes its answers; so that what a report calls before is."""
    for algo, form in (("sac-discrete", "candidates"), ("ppo", "tokens")):
        config = LanguageConfig(**{**SMALL.to_dict(), "form": form})
        more = {"steps": 64, "num_envs": 8, "eval_every": 32, "eval_episodes": 4, "eval_env": echo(4, config)}
        more |= {"rollout_steps": 32} if algo == "ppo" else {"learning_starts": 32}
        run = ctrlrl.train(
            algo, echo(8, config), network=tiny(config=config), out=str(tmp_path / algo), **SETTINGS | more
        )
        steps = [one.step for one in load_run(run.path).evaluations]
        assert steps == [0, 32, 64]


def test_random_answers_are_those_on_offer() -> None:
    env = echo(3)
    policy, obs = RandomPolicy(env, 0), env.reset(0)
    for _ in range(20):
        obs = env.step(policy.act(obs)[0]).obs


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a text environment is for a language model: --language\.model DIR"):
        ctrlrl.train("ppo", "text/Maze", steps=10, out=str(tmp_path / "a"))
    with pytest.raises(UsageError, match=r"no folder /nowhere \(language\.model\)"):
        ctrlrl.train("ppo", "text/Maze", steps=10, language={"model": "/nowhere"}, out=str(tmp_path / "a"))
    with pytest.raises(UsageError, match="two networks for one policy"):
        model = {"model": str(tmp_path)}
        ctrlrl.train("ppo", echo(8), steps=10, language=model, network=tiny(), out=str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_text_environments_are_listed_and_say_what_they_need(capsys: Any) -> None:
    assert command(["envs"]) == 0
    assert "text/GuessNumber" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"text/Maze speaks text, .*--language\.model DIR"):
        make_env("text/Maze")


def test_a_prompt_tells_as_many_turns_as_there_were() -> None:
    past = [(f"shown {i}", f"answer {i}") for i in range(4)]
    for history in (0, 1, 3, 9):
        for t in range(5):
            told = PLAIN.prompt("", "now", past[:t], history)
            assert [i for i in range(4) if f"answer {i}\n" in told] == list(range(4))[max(0, t - history) : t]


def test_a_tied_output_is_frozen_with_its_embedding() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    tied = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    )
    adapter = peft.get_peft_model(tied, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = LanguageModel(adapter.get_base_model(), adapter=adapter)
    assert all("lora" in name for name in model.state_dict())
    copied = copy.deepcopy(model)
    own = {id(p) for p in model.parameters() if not p.requires_grad}
    assert own == {id(p) for p in copied.parameters() if not p.requires_grad}  # there once, however many read it
    assert not {id(p) for p in model.parameters() if p.requires_grad} & {id(p) for p in copied.parameters()}
    copied.load_state_dict(model.state_dict())


def test_commands_that_the_model_cannot_tell_apart_are_refused_and_a_model_made_anew_is_read(tmp_path: Path) -> None:
    small, path = TinyConfig(hidden=16, layers=1, heads=2, episodes=3, epochs=1), tmp_path / "model"
    make_lm(lambda: make_text_env("text/GuessNumber", {"high": 4}), path, small)
    language = LanguageConfig(model=str(path))
    env = text_environments("text/GuessNumber", language, num_envs=1, env_kwargs={"high": 16})
    with pytest.raises(UsageError, match=r"the command '5' has words that the model does not know.*make-lm"):
        env.reset(0)
    shutil.rmtree(path)
    make_lm(lambda: make_text_env("text/GuessNumber", {"high": 16}), path, small)
    text_environments("text/GuessNumber", language, num_envs=1, env_kwargs={"high": 16}).reset(0)


def test_numbers_may_be_written_digit_by_digit(tmp_path: Path) -> None:
    """A word for each is more than demonstrations show: most sums of the calculator could not be told, or written."""
    tokenizer = word_tokenizer({"what is 17 * 23 ?", PLAIN.command("answer -4")}, digits=True)
    for text in ("what is 905 * 3 ?", "answer -396"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text
    unknown = {}
    for digits in (False, True):
        config = TinyConfig(hidden=16, heads=2, layers=1, episodes=10, epochs=1, digits=digits)
        out = tmp_path / str(digits)
        figures = make_lm(lambda: make_text_env("text/Calculator"), out, config, vocabulary_episodes=5)
        language = LanguageConfig(model=str(out), form="tokens", candidate_tokens=16)
        env = text_environments("text/Calculator", language, num_envs=8, env_kwargs={"max_turns": 1})
        env.reset(0)
        told = env.step(torch.full((8, 16), -1)).log["episode/unknown"].mean()
        unknown[digits] = figures["unknown"], float(told)
    assert min(unknown[False]) > 0.2 and unknown[True] == (0, 0)
