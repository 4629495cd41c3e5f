"""What tests of language models share: small models, texts scored by hand, and words to be said back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import ctrlrl
from ctrlrl.config import LanguageConfig
from ctrlrl.data.store import Dataset
from ctrlrl.envs.text.base import TextEnv, TextState, TextStep
from ctrlrl.envs.text.registry import make_text_env
from ctrlrl.language.backbone import LanguageBackbone
from ctrlrl.language.make_lm import PLAIN, make_lm, word_tokenizer
from ctrlrl.language.model import LanguageModel
from ctrlrl.language.text_vector import TextVector
from ctrlrl.language.tiny_config import TinyConfig
from ctrlrl.training.collect import collect

V = 50
END = 1
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


def batch_of(obs: dict[str, Tensor], action: Tensor, reward: Tensor) -> Any:
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


def answers(env: TextVector, *, right: bool = True) -> Tensor:
    """(N, 3) int32: the word that each `Echo` shows, or the next one, and the end where there is room for it."""
    out = torch.full((env.num_envs, 3), -1, dtype=torch.int32)
    for row, one in enumerate(env._envs):
        word = Echo.words[(Echo.words.index(one.expert() or "") + (not right)) % len(Echo.words)]
        ids = [*env._tokenizer.encode(" " + word, add_special_tokens=False), END][:3]
        out[row, : len(ids)] = torch.tensor(ids)
    return out


def written_data(folder: Path) -> tuple[Dataset, dict[str, Any]]:
    """Data of a tiny model that writes, which is in `folder` too, and settings of a training from it."""
    small = {"threads": 1, "video": False, "quiet": True, "checkpoint_every": 10**6, "eval_episodes": 2}
    kwargs, lm = {"free": True}, TinyConfig(hidden=16, heads=2, layers=1, episodes=10, epochs=1)
    make_lm(lambda: make_text_env("text/GuessNumber", kwargs), folder / "lm", lm, vocabulary_episodes=10)
    language = {"model": str(folder / "lm"), "candidate_tokens": 4, "prompt_tokens": 40}
    small |= {"env_kwargs": kwargs, "language": language}
    more = {"steps": 32, "num_envs": 4, "rollout_steps": 16, "agent": {"epochs": 1, "minibatch_size": 8}}
    run = ctrlrl.train("ppo", "text/GuessNumber", out=str(folder / "run"), eval_every=32, **small | more)
    data = collect(run.path, folder / "data", tier="expert", steps=40, num_envs=4, reference_episodes=1)
    return data, small | {"data": str(data.path), "eval_every": 4, "agent": {"batch_size": 8}}
