"""What is kept of prompts from turn to turn: it changes nothing but how much is read."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
import transformers

from ctrlrl.cli.main import run as command
from ctrlrl.config import LanguageConfig
from ctrlrl.language import prefixes
from ctrlrl.language.model import LanguageModel, load_model
from ctrlrl.language.prefixes import Prefixes
from ctrlrl.nn.recall import Recall, Recalling
from ctrlrl.training.collector import Collector
from ctrlrl.training.evaluation import evaluate
from ctrlrl.tree import map_obs
from tests.language import KINDS, V, causal, echo, model_of
from tests.runs import assert_same
from tests.test_tokens import FREE, agent_of

TALK = LanguageConfig(**{**FREE.to_dict(), "history": 2, "prompt_tokens": 32})


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "_WORTH", 1)


def conversation(turns: int = 7) -> list[Tensor]:
    """Prompts (6, L) turn by turn. Row 0 and 1 are told the same, 2 begins anew at turn 3, of 3 the oldest tokens are
    left out from turn 4 on, 4 waits at turn 2 and 5, and 5 goes on a little otherwise than it had."""
    g = torch.Generator().manual_seed(0)
    rows: list[list[int]] = [[] for _ in range(6)]
    out = []
    for t in range(turns):
        for row in range(6):
            more = torch.randint(0, V, (3 + (row + t) % 3,), generator=g).tolist()
            rows[row] = (rows[row] if not (row == 2 and t == 3) else []) + more
        rows[1] = list(rows[0])
        rows[5][-4] = (rows[5][-4] + 1) % V
        shown = [said[-17:] if row == 3 else said for row, said in enumerate(rows)]
        if t in (2, 5):
            shown[4] = []
        width = max(map(len, shown))
        out.append(torch.tensor([[-1] * (width - len(said)) + said for said in shown]))
    return out


def columns_read(model: LanguageModel) -> list[int]:
    """Tokens of each call from now on, with padding."""
    read: list[int] = []
    model.causal.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    return read


def read_all(kept: Prefixes, model: LanguageModel, prompt: Tensor, most: int = 99) -> tuple[Tensor, Any]:
    rows = torch.arange(len(prompt))
    return kept.read(model, prompt, rows, rows, total=len(prompt), most=most)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [99, 3])
@torch.no_grad()
def test_what_is_read_on_is_what_is_read_anew(kind: str, most: int) -> None:
    """Fails where positions count columns, where padding is looked at, or columns go to another row's."""
    model, kept, reads = model_of(kind), Prefixes(), 0
    read = columns_read(model)
    for t, prompt in enumerate(conversation()):
        read.clear()
        logits, cache = read_all(kept, model, prompt, most)
        reads += sum(read) < prompt.numel()
        expected, _, other = model.read(prompt, cache=True)
        there = (prompt >= 0).any(-1)
        assert torch.allclose(logits[there], expected[there], atol=1e-5, rtol=0), t
        seen = (prompt >= 0)[:, None, :, None]
        for layer, same in zip(cache.layers, other.layers, strict=True):
            for one, two in ((layer.keys, same.keys), (layer.values, same.values)):
                assert one.shape == two.shape and torch.allclose(one * seen, two * seen, atol=1e-5, rtol=0), t
        after = torch.randint(0, V, (6, 2), generator=torch.Generator().manual_seed(t))
        one, two = (model.go_on(after, prompt, c) for c in (cache, other))
        assert all(torch.allclose(a[there], b[there], atol=1e-5, rtol=0) for a, b in zip(one, two, strict=True))
        assert torch.isfinite(logits).all()
    assert reads >= (4 if most == 99 else 3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_answers_and_scores_are_the_same(kind: str) -> None:
    model, written, scored = model_of(kind), Prefixes(), Prefixes()
    ours, theirs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    read, less, more = columns_read(model), 0, 0
    for prompt in conversation():
        read.clear()
        one = model.generate(prompt, length=4, ends=(1,), temperature=0.7, generator=ours, kept=written)
        less += sum(read)
        read.clear()
        two = model.generate(prompt, length=4, ends=(1,), temperature=0.7, generator=theirs)
        more += sum(read)
        assert torch.equal(one, two)
        candidates = torch.randint(0, V, (6, 3, 2), generator=torch.Generator().manual_seed(1))
        candidates[:, 1, 1] = -1
        exists = (prompt >= 0).any(-1, keepdim=True).expand(-1, 3)
        one, two = (model.score(prompt, candidates, exists, 0.7, kept=k)[0] for k in (scored, None))
        assert torch.allclose(one, two, atol=1e-5, rtol=0)
    assert less < 0.8 * more


@torch.no_grad()
def test_who_has_begun_anew_shares_nothing_with_before() -> None:
    model, kept = model_of(), Prefixes()
    talk = conversation()
    read_all(kept, model, talk[2])
    shared = kept._shared(talk[3], torch.arange(6))
    lengths = (talk[2] >= 0).sum(-1)
    assert shared.tolist() == [int(lengths[0]), int(lengths[1]), 0, int(lengths[3]), 0, int(shared[5])]
    read_all(kept, model, talk[3])
    shared = kept._shared(talk[3], torch.arange(6))
    assert torch.equal(shared, (talk[3] >= 0).sum(-1) - 1)  # never all of it: the last one is asked
    read = columns_read(model)
    read_all(kept, model, talk[3])
    assert read == [6]


def test_other_weights_read_anew(tmp_path: Path) -> None:
    """After an update, after weights were read, without the adapter, and for another number of rows."""
    pytest.importorskip("peft")
    causal("llama").save_pretrained(tmp_path / "lm")
    config = LanguageConfig(model=str(tmp_path / "lm"), lora_rank=2, lora_targets=("q_proj", "v_proj"))
    adapted = load_model(config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    prompt = conversation()[6]

    def same(kept: Prefixes, model: LanguageModel, said: Tensor = prompt) -> None:
        with torch.no_grad():
            assert torch.allclose(read_all(kept, model, said)[0], model.read(said)[0], atol=1e-5, rtol=0)

    for model in (model_of(), adapted):
        kept = Prefixes()
        same(kept, model)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(weights, 0.01)
        model.read(prompt)[0].logsumexp(-1).sum().backward()
        before = copy.deepcopy(model.state_dict())
        optimizer.step()
        same(kept, model)
        model.load_state_dict(before)
        same(kept, model)
        same(kept, model, prompt[:4])
    with adapted.plain():
        same(kept, adapted, prompt[:4])
    same(kept, adapted, prompt[:4])


@torch.no_grad()
def test_what_is_kept_has_room() -> None:
    model, prompt = model_of(), conversation()[6]
    width = prompt.shape[1]
    beside = 6 * model.bytes_of_row(width + 4)
    one = (
        2
        * 4
        * sum(x.numel() for layer in model.read(prompt[:1], cache=True)[2].layers for x in (layer.keys, layer.values))
    )
    for extra, number in ((0.0, 0), (2.5, 2), (4.9, 4), (math.inf, 5)):  # rows 0 and 1 are told the same
        kept = Prefixes()
        answers = model.generate(prompt, length=4, ends=(1,), memory=beside + extra * one, kept=kept)
        assert torch.equal(answers, model.generate(prompt, length=4, ends=(1,)))
        assert len(kept._said) == number if number else not kept._layers
        assert 2 * 4 * sum(x.numel() for layer in kept._layers for x in layer) <= extra * one
        if number:
            assert (kept._place >= 0).tolist() == [row < number + 1 for row in range(6)]  # the first ones
            model.generate(prompt, length=4, ends=(1,), memory=beside - 1, kept=kept)
            assert not kept._layers
    kept, scored = Prefixes(), 6 * (model.bytes_of_row(width + 2) + 12 * V)
    model.score(prompt, prompt[:, None, -2:], None, kept=kept, memory=scored + 3.5 * one)
    assert len(kept._said) == 3
    model.score(prompt, prompt[:, None, -2:], None, kept=kept, memory=scored - 1)
    assert not kept._layers


@torch.no_grad()
def test_of_a_window_nothing_is_kept() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MistralConfig(vocab_size=V, sliding_window=5, num_key_value_heads=2, **sizes)
    model, kept = LanguageModel(transformers.MistralForCausalLM(config)), Prefixes()
    for prompt in conversation():
        assert torch.allclose(read_all(kept, model, prompt)[0], model.read(prompt)[0], atol=1e-5)
    assert not kept._layers


# Who acts.


def kept_by(recall: Recall) -> Prefixes:
    (kept,) = recall._kept
    assert isinstance(kept, Prefixes)
    return kept


@pytest.mark.parametrize("form", ["tokens", "candidates"])
def test_what_was_kept_can_be_made_again(form: str) -> None:
    """To the last bit: what goes on from a checkpoint draws as what was not interrupted."""
    config = LanguageConfig(**{**TALK.to_dict(), "form": form})
    seen, collectors = [], []
    for _ in range(2):
        agent, env = agent_of(config)
        collector = Collector(env, agent.policy, env.reset(0), seed=0)
        collector.recall = Recall(agent.policy)
        collectors.append(collector)
    first, second = collectors
    for _ in range(7):
        seen.append(map_obs(Tensor.clone, first.obs))
        first.step(random=False)
    second.recollect(seen)
    one, two = kept_by(first.recall), kept_by(second.recall)  # type: ignore[arg-type]
    assert torch.equal(one._said, two._said) and torch.equal(one._place, two._place) and one._layers
    for layer, other in zip(one._layers, two._layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, other, strict=True))
    assert all(m.kept is None for m in first.policy.modules() if isinstance(m, Recalling))


def test_evaluations_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, env = agent_of(TALK)
    collector = Collector(env, agent.policy, env.reset(0), seed=0)
    collector.recall = Recall(agent.policy)
    for _ in range(3):
        collector.step(random=False)
    kept = kept_by(collector.recall)
    said = kept._said
    evaluation = evaluate(echo(3, TALK), agent.policy, [1, 2, 3, 4])
    assert kept._said is said
    monkeypatch.setattr(prefixes, "_WORTH", 10**9)
    assert evaluate(echo(3, TALK), agent.policy, [1, 2, 3, 4]).transcripts == evaluation.transcripts


@pytest.mark.parametrize("form", ["tokens", "candidates"])
def test_a_conversation_is_resumed_in_the_midst_of_a_rollout(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, run, env = tmp_path / "lm", tmp_path / "run", "text/GuessNumber"
    options = ["--env-kwargs", '{"high": 4, "max_turns": 3, "free": true}', "--language.history", "3"]
    if form == "candidates":
        options[1] = '{"high": 4, "max_turns": 3}'
    options += ["--language.candidate-tokens", "3", "--language.prompt-tokens", "80"]
    made = ["--episodes", "20", "--epochs", "2", "--hidden", "16", "--heads", "2", "--layers", "1"]
    assert command(["language", "make-lm", "--env", env, "--out", str(lm), *made, *options]) == 0
    train = ["train", "ppo", "--env", env, *options, "--language.model", str(lm), "--num-envs", "4"]
    train += ["--rollout-steps", "36", "--agent.epochs", "1", "--agent.minibatch-size", "12", "--eval-episodes", "4"]
    train += ["--threads", "1", "--eval-every", "24", "--checkpoint-every", "1000"]
    assert command([*train, "--steps", "72", "--out", str(tmp_path / "whole")]) == 0
    assert command([*train, "--steps", "48", "--out", str(run)]) == 0
    again: list[int] = []
    recollect = Collector.recollect
    monkeypatch.setattr(Collector, "recollect", lambda self, past: again.append(len(past)) or recollect(self, past))
    assert command(["resume", str(run), "--steps", "72"]) == 0
    assert again == [3]  # turns of the rollout so far
    assert_same(tmp_path / "whole", run)
