"""What goes wrong elsewhere with the tokenizers and models that people have: words that are several tokens, texts that
are tokenized in more than one way, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import tokenizers
import transformers

from ctrlrl.algorithms.ppo import PPO
from ctrlrl.algorithms.ppo_config import PPOConfig
from ctrlrl.config import LanguageConfig
from ctrlrl.envs.text.registry import make_text_env
from ctrlrl.language.adapter import backbone, text_environments, word_starts
from ctrlrl.language.backbone import LanguageBackbone, LanguagePolicy
from ctrlrl.language.model import LanguageModel
from ctrlrl.language.text_vector import TextVector
from tests.language import KINDS, causal
from tests.test_tokens import collected

END = "<eos>"


def byte_pairs(size: int = 300) -> Any:
    """A byte-level BPE tokenizer as GPT-2's, Llama 3's and Qwen's are, of a few merges."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet)
    told = ["goal : go to row 3 column 3\nstate : you are in row 1 column 2 . walls up , down .\naction : move left"]
    model.train_from_iterator(told + ["move up , move down , move left , move right"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END, pad_token=END)


def maze(form: str, n: int = 4, **config: Any) -> tuple[TextVector, Any]:
    tokenizer = byte_pairs()
    sizes = {"prompt_tokens": 80, "goal_tokens": 40, "candidate_tokens": 8, "max_candidates": 4, "critic_hidden": 16}
    envs = [make_text_env("text/Maze", {"max_turns": 5}) for _ in range(n)]
    return TextVector(envs, tokenizer, LanguageConfig(**sizes, form=form, **config), name="maze"), tokenizer


def agent_on(env: TextVector, kind: str) -> PPO:
    tokenizer, causal_model = env._tokenizer, causal(kind)
    causal_model.resize_token_embeddings(len(tokenizer))
    network = LanguageBackbone(
        LanguageModel(causal_model), env._config, word_starts(tokenizer, len(tokenizer)), (tokenizer.eos_token_id,)
    )
    numbers = {"lr": 1e-3, "minibatch_size": 8, "epochs": 1, "normalize_reward": False}
    return PPO(env.observation_space, env.action_space, PPOConfig(**numbers), seed=1, network=network)


def test_prompt_and_answer_have_the_tokens_of_the_text_they_are_together() -> None:
    """A prompt that ends in a blank, or an answer without the one before it, would be other tokens than a model has
    read anywhere."""
    env, tokenizer = maze("candidates")
    obs = env.reset(0)
    assert isinstance(obs, dict)
    for row, state in enumerate(env._states):
        before = [i for name in ("goal", "prompt") for i in obs[name][row].tolist() if i >= 0]
        for i, command in enumerate(state.commands):
            answer = [token for token in obs["candidates"][row, i].tolist() if token >= 0]
            text = f"goal : {state.goal}\nstate : {state.observation}\naction : {command}"
            assert before + answer == tokenizer.encode(text, add_special_tokens=False)
            assert len(answer) > 1 and answer != tokenizer.encode(command, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["candidates", "tokens"])
def test_the_first_ratio_is_one_of_every_kind_of_model(kind: str, form: str) -> None:
    """Though it is put into training mode: dropout, which GPT-2 and OPT have by default, would make another policy of
    it in the update."""
    env, _ = maze(form)
    agent = agent_on(env, kind)
    agent.policy.train()
    rollout = collected(agent, env, horizon=6)
    agent.policy.train()
    data, _ = agent.prepare(rollout)
    for rows in torch.arange(24).split(5):
        part = data.map(lambda x, rows=rows: x[rows])
        log_ratio = (agent.policy.distribution(part.obs).score(part.decision)[0] - part.log_prob).detach()
        assert float(torch.where(part.mask, log_ratio, 0.0).abs().max()) < 1e-4
    metrics, updates = agent.update(rollout)
    assert updates == 3 and bool(torch.isfinite(torch.stack(list(metrics.values()))).all())


def test_what_was_written_is_learned_from_though_its_text_has_other_tokens() -> None:
    """A model that is random writes what no tokenizer would make of the text."""
    env, tokenizer = maze("tokens")
    agent = agent_on(env, "llama")
    said: list[list[str]] = []
    step = env.step
    as_said = env._as_said
    env._as_said = lambda row, action: (said[-1].append(as_said(row, action)[0]), as_said(row, action))[1]  # type: ignore[method-assign, func-returns-value]
    env.step = lambda action: (said.append([]), step(action))[1]  # type: ignore[method-assign, func-returns-value]
    rollout = collected(agent, env, horizon=6)
    decision, others = rollout.extras["decision"], 0
    data, _ = agent.prepare(rollout)
    log_prob = data.log_prob.view(6, 4, -1)
    model = next(m for m in agent.policy.modules() if isinstance(m, LanguageModel))
    for t in range(6):
        for row in range(4):
            written = [token for token in decision[t, row].tolist() if token >= 0]
            others += (
                tokenizer.encode(said[t][row], add_special_tokens=False)
                != written[: written.index(0) if 0 in written else None]
            )
            assert isinstance(rollout.obs, dict)
            before = [i for name in ("goal", "prompt") for i in rollout.obs[name][t, row].tolist() if i >= 0]
            logits = model.causal(torch.tensor([before + written])).logits[0, len(before) - 1 : -1, : model.words]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(written)[:, None])[:, 0]
            assert torch.allclose(log_prob[t, row, : len(written)], expected.detach(), atol=1e-4)
    assert others > 12  # of 24


def test_a_text_begins_as_the_model_has_read_them_and_ends_where_it_says(tmp_path: Path) -> None:
    """Llama's and Gemma's begin with a token that a tokenizer adds by itself; turns of their conversations end with
    another one than texts do, which the model's folder says."""
    tokenizer = byte_pairs()
    begin, turn = "<bos>", "<end_of_turn>"
    tokenizer.add_special_tokens({"bos_token": begin, "additional_special_tokens": [turn]})
    first, over = tokenizer.convert_tokens_to_ids([begin, turn])
    template = tokenizers.processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, first)])
    tokenizer.backend_tokenizer.post_processor = template
    made = causal("llama")
    made.resize_token_embeddings(len(tokenizer))
    made.generation_config.eos_token_id = [0, over]
    made.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    sizes = {"prompt_tokens": 80, "goal_tokens": 40, "candidate_tokens": 6, "form": "tokens", "critic_hidden": 16}
    config = LanguageConfig(model=str(tmp_path / "lm"), **sizes)
    env = text_environments("text/Maze", config, num_envs=2, env_kwargs={"max_turns": 5}, achieved=True)
    obs = env.reset(0)
    assert isinstance(obs, dict)
    for row, state in enumerate(env._states):
        ids = [i for name in ("goal", "prompt") for i in obs[name][row].tolist() if i >= 0]
        text = f"goal : {state.goal}\nstate : {state.observation}\naction :"
        assert ids == tokenizer.encode(text) and ids[0] == first
    written = torch.tensor([[5, over, -1, -1, -1, -1], [5, 6, 7, 8, 9, 10]])
    for _ in range(5):
        step = env.step(written)
    assert step.achieved is not None and int(step.achieved[0, 0][step.achieved[0, 0] >= 0][0]) == first
    assert step.log["episode/unended"].tolist() == [0, 1] and step.log["episode/tokens"].tolist() == [2, 6]
    policy = backbone(config)(1, 1)
    assert isinstance(policy, LanguagePolicy)
    prompt = torch.cat([obs["goal"], obs["prompt"]], -1).gather(
        -1, (torch.cat([obs["goal"], obs["prompt"]], -1) >= 0).long().argsort(dim=-1, stable=True)
    )
    answers = policy.generate(prompt.repeat(300, 1), torch.Generator().manual_seed(0))
    for end in (0, over):
        at = (answers == end).nonzero()
        assert len(at) > 3
        for row, column in at.tolist():
            assert bool((answers[row, column + 1 :] == -1).all())
