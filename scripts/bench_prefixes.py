#!/usr/bin/env python3
"""Turns a second of conversations that grow, with and without what is kept of their prompts from turn to turn.

    python scripts/bench_prefixes.py

with the interpreter of .venv. A policy of random weights answers with 8 tokens, or scores 4 commands of 3 tokens each.
Ways take turns, `--rounds` times, since machines are noisy; shown are the medians, and the ratio of each round's times.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import torch
import transformers
from torch import Tensor

from ctrlrl.config import LanguageConfig
from ctrlrl.language.backbone import LanguagePolicy
from ctrlrl.language.model import LanguageModel
from ctrlrl.nn.recall import Recall

VOCABULARY, ANSWER, COMMANDS = 500, 8, (4, 3)
MODELS = {"hidden 64, 2 layers": (64, 2), "hidden 256, 6 layers": (256, 6)}
TALKS = {"12 turns of 24 tokens": (16, 12, 24), "6 turns of 16 tokens": (8, 6, 16), "3 turns of 8 tokens": (4, 3, 8)}
"""Rows, turns of an episode, and tokens of each."""


def policy_of(hidden: int, layers: int) -> LanguagePolicy:
    """A policy of a Llama with random weights."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, **sizes)
    model = LanguageModel(transformers.LlamaForCausalLM(config))
    starts = torch.ones(VOCABULARY, dtype=torch.bool)
    return LanguagePolicy(model, LanguageConfig(candidate_tokens=ANSWER), starts, -1)


def conversation(rows: int, turns: int, tokens: int, *, cut: bool) -> list[Tensor]:
    """Prompts (rows, L) of three episodes in each row, turn by turn, which begin at different turns; `cut`, they tell
    the latest half of an episode at most, and the later ones begin as none before."""
    g = torch.Generator().manual_seed(0)
    said: list[list[int]] = [[] for _ in range(rows)]
    prompts = []
    for t in range(3 * turns):
        for row in range(rows):
            begins = (t + row) % turns == 0
            said[row] = ([] if begins else said[row]) + torch.randint(VOCABULARY, (tokens,), generator=g).tolist()
        told = [one[-(turns // 2) * tokens :] if cut else one for one in said]
        width = max(map(len, told))
        prompts.append(torch.tensor([[-1] * (width - len(one)) + one for one in told]))
    return prompts


@torch.no_grad()
def seconds(policy: LanguagePolicy, prompts: list[Tensor], *, free: bool, keeping: bool) -> float:
    """That it takes to answer all."""
    g, recall = torch.Generator().manual_seed(0), Recall(policy)
    commands = torch.randint(VOCABULARY, (len(prompts[0]), *COMMANDS), generator=g)
    start = time.perf_counter()
    for prompt in prompts:
        with recall if keeping else contextlib.nullcontext():
            policy.generate(prompt, g) if free else policy(prompt, commands, None)
    return time.perf_counter() - start


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is measured")
    rounds = parser.parse_args().rounds
    print(f"{'model':22}{'conversations':24}{'told':10}{'answers':10}{'without /s':>12}{'with /s':>12}{'ratio':>8}")
    for model, (hidden, layers) in MODELS.items():
        policy = policy_of(hidden, layers)
        for talk, (rows, turns, tokens) in TALKS.items():
            for cut in (False, True):
                prompts = conversation(rows, turns, tokens, cut=cut)
                for free in (True, False):
                    taken: dict[bool, list[float]] = {False: [], True: []}
                    for _ in range(rounds):
                        for keeping, times in taken.items():
                            times.append(seconds(policy, prompts, free=free, keeping=keeping))
                    ratio = statistics.median(a / b for a, b in zip(*taken.values(), strict=True))
                    without, kept = (len(prompts) * rows / statistics.median(times) for times in taken.values())
                    how = "cut" if cut else "whole", "written" if free else "scored"
                    print(
                        f"{model:22}{talk:24}{how[0]:10}{how[1]:10}{without:12.1f}{kept:12.1f}{ratio:8.2f}", flush=True
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
