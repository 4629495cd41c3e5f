"""The language model: what it scores, what it is asked for and how it is told, what of it is trained and saved."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import gymnasium as gym
import pytest
import torch

pytest.importorskip("transformers")
import transformers

from ctrlrl.algorithms.ppo import PPO
from ctrlrl.config import LanguageConfig
from ctrlrl.envs.text.registry import make_text_env
from ctrlrl.errors import UsageError
from ctrlrl.language.adapter import text_environments, word_starts
from ctrlrl.language.backbone import LanguageBackbone, Tokens
from ctrlrl.language.make_lm import PLAIN, make_lm, word_tokenizer
from ctrlrl.language.model import LanguageModel, digest_of, load_model
from ctrlrl.language.prompts import ChatPrompts
from ctrlrl.language.text_vector import TextVector
from ctrlrl.language.tiny_config import TinyConfig
from tests.language import (
    KINDS,
    SMALL,
    Echo,
    V,
    by_hand,
    causal,
    echo,
    model_of,
    play,
    right_answers,
    said,
    texts,
    tiny,
)


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
