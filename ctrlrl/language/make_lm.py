"""A tiny causal language model with a tokenizer of its own, trained by imitation of scripted demonstrators, so that
there is a model to start from without a network and in minutes on a CPU.

Shapes: B prompts, n candidates.
The tokenizer has a token for each word of the texts. The model is a small Llama with random weights; given what a
policy is given, `goal`, past and `state`, it learns to prefer the demonstrator's answer among the commands, or where
there are none, to write it and then to end. The folder is one that `transformers` reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctrlrl.config import LanguageConfig
from ctrlrl.envs.text.base import TextEnv
from ctrlrl.errors import UsageError
from ctrlrl.language.model import LanguageModel, tiny_llama
from ctrlrl.language.prompts import Prompts, note_manner
from ctrlrl.language.tiny_config import TinyConfig

UNKNOWN, END = "<unk>", "<eos>"
PLAIN = Prompts()


def make_lm(
    make: Callable[[], TextEnv],
    out: str | Path,
    config: TinyConfig | None = None,
    *,
    language: LanguageConfig | None = None,
    vocabulary_episodes: int = 300,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Make such a model for the environments that `make` gives, and save it at `out`.

    Args:
        out: a folder that is not there yet, or empty.
        config: sizes and learning.
        language: how prompts are made; what is trained with the model must be made alike.
        vocabulary_episodes: episodes of random answers by which words are found, besides the demonstrations.
        say: is told how it goes.

    Returns:
        `loss` and `accuracy` over the last epoch, `words` of the vocabulary, `parameters` of the model, and `unknown`,
        the share of turns of other demonstrations in which a word stands that it does not know.

    Raises:
        UsageError: the folder holds something, or the task has no demonstrator.
    """
    c, settings = config or TinyConfig(), language or LanguageConfig()
    if settings.chat:
        raise UsageError("a tiny model knows no conversation: leave language.chat out")
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} is not empty: choose another --out; nothing was overwritten")
    env = make()
    turns, texts = demonstrations(env, c.episodes, c.seed, settings.history, settings.form)
    if len({chosen < 0 for *_, chosen in turns}) > 1:
        raise UsageError("the task offers commands now and then: --language.form tokens takes all answers as free")
    texts |= seen_at_random(env, vocabulary_episodes, c.seed)
    others = demonstrations(env, min(c.episodes, 100), c.seed + 10_000, settings.history, settings.form)[0]
    env.close()
    tokenizer = word_tokenizer(texts, digits=c.digits)
    say(f"{len(turns):,} turns of {c.episodes} demonstrations, {len(tokenizer)} words")

    torch.manual_seed(c.seed)
    causal = tiny_llama(
        len(tokenizer),
        c.hidden,
        c.layers,
        c.heads,
        c.context,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    figures = imitate(LanguageModel(causal), tokenizer, turns, c, settings, say)
    path.mkdir(parents=True, exist_ok=True)
    causal.save_pretrained(path)
    tokenizer.save_pretrained(path)
    note_manner(path, settings, tokens=turns[0][-1] < 0)
    unknown = sum(tokenizer.unk_token_id in tokenizer.encode("".join(_told(turn))) for turn in others) / len(others)
    return figures | {
        "unknown": unknown,
        "words": len(tokenizer),
        "parameters": sum(p.numel() for p in causal.parameters()),
    }


Turn = tuple[str, str, tuple[str, ...], int]
"""Goal and prompt as they are told, the commands, and which of them the demonstrator chose; of a free answer that,
alone, and -1."""


def demonstrations(env: TextEnv, episodes: int, seed: int, history: int, form: str) -> tuple[list[Turn], set[str]]:
    """The turns of a demonstrator's episodes, and all texts in them; with the form `tokens` all answers are free.

    Raises:
        UsageError: there is no demonstrator.
    """
    turns: list[Turn] = []
    texts: set[str] = set()
    for episode in range(episodes):
        state, past = env.reset(1_000_000 * (seed + 1) + episode), list[tuple[str, str]]()
        while True:
            answer = env.expert()
            if answer is None:
                raise UsageError(f"{type(env).__name__} has no scripted demonstrator to imitate")
            goal = PLAIN.goal(state.goal)
            prompt = PLAIN.prompt(state.goal, state.observation, past, history)
            texts |= {goal, prompt, *map(PLAIN.command, (*state.commands, answer))}
            if answer in state.commands or not state.commands:
                free = form == "tokens" or not state.commands
                said = (answer,) if free else state.commands
                turns.append((goal, prompt, said, -1 if free else said.index(answer)))
            past.append((state.observation, answer))
            step = env.step(answer)
            if step.terminated or step.truncated:
                break
            state = step.state
    return turns, texts


def _told(turn: Turn) -> tuple[str, ...]:
    goal, prompt, said, _ = turn
    return (goal, prompt, *map(PLAIN.command, said))


def seen_at_random(env: TextEnv, episodes: int, seed: int) -> set[str]:
    """Texts of episodes with random answers."""
    texts: set[str] = set()
    random = np.random.default_rng(seed)
    for episode in range(episodes):
        state = env.reset(2_000_000 * (seed + 1) + episode)
        while True:
            texts |= {PLAIN.goal(state.goal), PLAIN.prompt(state.goal, state.observation, [], 0)}
            texts.update(map(PLAIN.command, state.commands))
            texts.update(map(PLAIN.goal, state.achieved))
            if not state.commands:
                break
            step = env.step(state.commands[int(random.integers(len(state.commands)))])
            if step.terminated or step.truncated:
                break
            state = step.state
    return texts


def word_tokenizer(texts: set[str], *, digits: bool = False) -> Any:
    """A tokenizer with a token for each word of `texts`, and one for words it does not know; with `digits` one for each
    digit, and for the blank before a number."""
    import tokenizers
    import transformers

    pre = tokenizers.pre_tokenizers
    split: Any = pre.WhitespaceSplit()
    if digits:
        texts = texts | {"0 1 2 3 4 5 6 7 8 9"}
        split = pre.Sequence([split, pre.Metaspace(prepend_scheme="always"), pre.Digits(individual_digits=True)])
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate([UNKNOWN, END, *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = split
    if digits:
        made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, unk_token=UNKNOWN, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def imitate(
    model: LanguageModel,
    tokenizer: Any,
    turns: Sequence[Turn],
    c: TinyConfig,
    settings: LanguageConfig,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Train `model` to prefer the answers of `turns` among the commands there, or to write them; loss and accuracy of
    the last epoch, a free answer being right where each token is the likeliest."""
    goal, prompt, candidates, exists, choice = _as_ids(tokenizer, turns, settings)
    free = bool((choice < 0).any())
    both = torch.cat([goal, prompt], -1)
    both = both.gather(-1, (both >= 0).long().argsort(dim=-1, stable=True))
    both = both[:, int((both < 0).all(0).sum()) :]  # columns that nothing stands in
    optimizer = torch.optim.Adam(model.parameters(), c.lr)
    updates = c.epochs * -(-len(turns) // c.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates, c.lr / 10)
    generator = torch.Generator().manual_seed(c.seed)
    loss_sum = hits = 0.0
    for epoch in range(c.epochs):
        loss_sum = hits = 0.0
        for rows in torch.randperm(len(turns), generator=generator).split(c.batch_size):  # type: ignore[no-untyped-call]
            if free:
                answers = candidates[rows, 0]
                logits, _ = model.answer(both[rows], answers, logits=True)
                assert logits is not None
                loss = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), answers, ignore_index=-1, label_smoothing=c.smoothing
                )
                right = ((logits.argmax(-1) == answers) | (answers < 0)).all(-1)
            else:
                loss, right = _among_commands(model, both, candidates, exists, choice, rows, c.smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            loss_sum += float(loss.detach()) * len(rows)
            hits += float(right.sum())
        say(f"epoch {epoch + 1}/{c.epochs}: loss {loss_sum / len(turns):.3f}, right {hits / len(turns):.1%}")
    return {"loss": loss_sum / len(turns), "accuracy": hits / len(turns)}


def _among_commands(
    model: LanguageModel,
    prompt: torch.Tensor,
    candidates: torch.Tensor,
    exists: torch.Tensor,
    choice: torch.Tensor,
    rows: torch.Tensor,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss (0-d) of these rows, and where the right command is the likeliest (B,)."""
    log_prob, _ = model.score(prompt[rows], candidates[rows], exists[rows])
    logits = log_prob.sum(-1).masked_fill(~exists[rows], -1e9).log_softmax(-1)
    right = logits.gather(-1, choice[rows, None]).squeeze(-1)
    others = (logits * exists[rows]).sum(-1) / exists[rows].sum(-1)
    loss = -((1 - smoothing) * right + smoothing * others).mean()
    # The sum over all candidates' own likelihoods, too: a model of the texts, not of their differences alone.
    loss = loss - 0.1 * log_prob[torch.arange(len(rows)), choice[rows]].sum(-1).mean()
    return loss, logits.argmax(-1) == choice[rows]


def _as_ids(tokenizer: Any, turns: Sequence[Turn], settings: LanguageConfig) -> tuple[torch.Tensor, ...]:
    def ids(text: str) -> list[int]:
        out: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return out

    def block(rows: Sequence[Sequence[int]], *, left: bool) -> torch.Tensor:
        width = max(1, max(map(len, rows)))
        out = torch.full((len(rows), width), -1)
        for row, given in zip(out, rows, strict=True):
            if given:
                row[width - len(given) if left else 0 : width if left else len(given)] = torch.tensor(given)
        return out

    goals = block([ids(goal) if goal else [] for goal, *_ in turns], left=True)
    prompts = block([ids(prompt)[-settings.prompt_tokens :] for _, prompt, *_ in turns], left=True)
    most = max(len(commands) for _, _, commands, _ in turns)
    end = [tokenizer.eos_token_id] if any(chosen < 0 for *_, chosen in turns) else []
    said = [[ids(PLAIN.command(command)) + end for command in commands] for _, _, commands, _ in turns]
    flat = block([one for row in said for one in [*row, *[[]] * (most - len(row))]], left=False)
    candidates = flat.view(len(turns), most, -1)
    choice = torch.tensor([chosen for *_, chosen in turns])
    return goals, prompts, candidates, (candidates >= 0).any(-1), choice
