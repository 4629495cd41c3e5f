#!/usr/bin/env python3
"""Memory that a language model's answers take beside what `language.generation-gib` counts for them.

    python scripts/bench_memory.py

Of Llamas of several sizes: the peak of a process that writes answers, or scores candidates, above the one before, with
a budget and without. Fails where one takes more than its budget (or, without, than what is counted).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

CELLS = [  # units, layers, units between, heads of keys, tokens of a prompt, rows, MiB
    (256, 6, 512, 8, 400, 32, None),
    (256, 6, 512, 8, 400, 64, 200),
    (256, 6, 1024, 2, 400, 32, None),
    (512, 4, 2048, 8, 200, 32, None),
    (64, 2, 128, 8, 400, 64, None),
]
ANSWER, CANDIDATES = 8, 8


def measure(
    free: bool, units: int, layers: int, between: int, heads: int, length: int, rows: int, mib: int | None
) -> tuple[float, float]:
    """MiB taken and allowed, to write answers (`free`) or to score candidates."""
    import torch
    import transformers

    from ctrlrl.language.model import LanguageModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": units, "intermediate_size": between, "num_hidden_layers": layers, "num_attention_heads": 8}
    config = transformers.LlamaConfig(vocab_size=100, num_key_value_heads=heads, **sizes)
    model = LanguageModel(transformers.LlamaForCausalLM(config))
    allowed = float("inf") if mib is None else mib * 2**20

    @torch.no_grad()
    def work(rows: int, length: int) -> None:
        if free:
            model.generate(torch.randint(2, 100, (rows, length)), length=ANSWER, ends=(1,), memory=allowed)
            return
        candidates = torch.randint(2, 100, (-(-rows // CANDIDATES), CANDIDATES, ANSWER))
        model.score(torch.randint(2, 100, (len(candidates), length)), candidates, None, memory=allowed)

    work(1, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(rows, length)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return taken, mib or rows * model.bytes_of_row(length + ANSWER) / 2**20


def main() -> int:
    """Measure each cell in processes of their own, and print the table."""
    if len(sys.argv) == 2:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
        return 0
    print("| units, layers | prompts' tokens, answers | budget | written: taken, of MiB | scored: taken, of MiB |")
    print("|---|---|---|---|---|")
    over = False
    for cell in CELLS:
        told = []
        for free in (True, False):
            command = [sys.executable, __file__, json.dumps([free, *cell])]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            taken, allowed = json.loads(done.stdout.splitlines()[-1])
            over |= taken > allowed
            told.append(f"{taken:,.0f} of {allowed:,.0f}")
        budget = "none" if cell[-1] is None else f"{cell[-1]} MiB"
        print(f"| {cell[0]}, {cell[1]} | {cell[4]}, {cell[5]} | {budget} | {' | '.join(told)} |", flush=True)
    return int(over)


if __name__ == "__main__":
    raise SystemExit(main())
