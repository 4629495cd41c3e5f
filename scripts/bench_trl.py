#!/usr/bin/env python3
"""PPO with group advantages on a language model beside TRL's GRPOTrainer: rewards, speed and memory of both.

    python scripts/bench_trl.py
    python scripts/bench_trl.py --seeds 2 --turns 3 --turn 512      # a quick look
    python scripts/bench_trl.py --hidden 256 --layers 6             # a larger model

with the interpreter of .venv; TRL has a virtual environment of its own, made at the first run. A tiny model that was
taught arithmetic in part (`ctrlrl language make-lm`) answers questions such as `what is 3 * 5 - 2 ?` in one turn
(text/Calculator without calls), and is trained on from its own answers: `ctrlrl train ppo --agent.advantage grpo
--language.group-size 8 --language.form tokens`, and GRPOTrainer with the environment as its reward function.

For each seed both have a process. They take turns of --turn completions, one trains while the other waits, and who is
first changes. The first turn of each has what is set up once, and counts for the rewards alone. A ratio is the median
over the turns of ratios within a turn.

Alike: the model to start from, prompts as token ids (compared before the training) without chat template and beginning
of text, tasks of the same distribution, the reward, groups, completions of a batch, passes over it and rows of an
update, the longest completion, temperature 1, no other sampling rule, clipping at 0.2 per token, advantages over the
group's standard deviation, the mean over the tokens of an update (TRL's loss `bnpo`; `dapo`, its default, is the same
with one update per pass), no divergence, Adam with a constant step size, 0.9, 0.999 and 1e-5, gradients up to 0.5,
float32, one thread.

Not alike: TRL adds 1e-4 to a group's deviation, ours 1e-6. To write answers TRL reads the prompt of a group once for
each, and goes on with all until the last has ended; ours does not. With one update per batch (--passes 1) TRL spares
the log-probabilities before it, which ours always computes. TRL logs and saves nothing here, ours writes its records
as `ctrlrl train` does. Neither evaluates.

Fails where something breaks, or where ours ends clearly below: each seed of ours below each of TRL's, by more than 0.02
and twice the standard error on average.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where ctrlrl is not installed

from peers.gate import Gate  # noqa: E402
from peers.venv import python_of  # noqa: E402

from ctrlrl.config import LanguageConfig  # noqa: E402
from ctrlrl.envs.text.registry import make_text_env  # noqa: E402
from ctrlrl.errors import CtrlrlError  # noqa: E402

ENV = "text/Calculator"
ENV_KWARGS = {"budget": 0, "terms": 2, "largest": 5, "max_turns": 1}
TOKENS = 4
"""Of a completion at most: `answer 12`, its end, and one to go wrong with."""
EPISODES, EPOCHS = 300, 16
"""Demonstrations that the model to start from has seen, and how often: it knows some of the answers."""
FIRST_TASK = 10_000_000
"""Seed of TRL's first task; the demonstrations' are others."""
NAMES = {"ours": "ctrlrl", "trl": "TRL"}
LEAST = 0.02
"""What a difference of rewards is at least, to be one."""
Pair = dict[str, list[dict[str, float]]]
"""Of a seed the records of the turns, by the names of `NAMES`."""


class Trainer:
    """A process that waits for its turn."""

    def __init__(self, command: Sequence[str], settings: dict[str, Any]) -> None:
        cores = set(sorted(os.sched_getaffinity(0))[: settings["threads"]])
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the process fails
        self.process = subprocess.Popen(
            [*command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self._read()
        self.turns: list[dict[str, float]] = []

    def go(self) -> None:
        """One turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.turns.append(self._read())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, float]:
        """The next record; ends everything with the process's own words if it has failed."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                record: dict[str, float] = json.loads(line)
                return record
        self.process.wait()
        self.log.seek(0)
        raise SystemExit(f"a training failed:\n{self.log.read()[-3000:]}")


def train_ours(s: dict[str, Any]) -> None:
    """What `ctrlrl train ppo` does with these settings, until the gate ends the process."""
    import ctrlrl
    from ctrlrl.training.on_policy import OnPolicyLoop

    class Gated(ctrlrl.Callback):
        gate, tokens, reward = Gate(s["turn"], warm_updates=0), 0, 0.0

        def on_start(self, loop: OnPolicyLoop) -> None:
            self.gate(0, 0, tokens=0, reward=0.0)

        def on_step(self, loop: OnPolicyLoop) -> None:  # each is a whole rollout, which has been learned from
            self.tokens += int((loop.rollout.extras["decision"] >= 0).sum())
            self.reward += float(loop.rollout.reward.sum())
            self.gate(loop.env_steps, loop.updates, tokens=self.tokens, reward=self.reward)

    ctrlrl.train(
        "ppo",
        s["env"],
        env_kwargs=s["env_kwargs"],
        language={"model": s["model"], "form": "tokens", "group_size": s["group"], "candidate_tokens": s["tokens"]},
        agent={
            "advantage": "grpo",
            "epochs": s["epochs"],
            "minibatch_size": s["minibatch"],
            "lr": s["lr"],
            "clip": 0.2,
            "max_grad_norm": 0.5,
            "kl_coef": 0.0,
        },
        num_envs=s["batch"],
        rollout_steps=s["batch"],
        steps=s["completions"],
        seed=s["seed"],
        threads=s["threads"],
        device="cpu",
        eval_every=0,
        checkpoint_every=10**8,
        out=s["out"],
        quiet=True,
        callbacks=[Gated()],
    )


def make_start(out: Path, options: argparse.Namespace) -> None:
    """The model that both start from."""
    from ctrlrl.language.make_lm import make_lm
    from ctrlrl.language.tiny_config import TinyConfig

    sizes = {"hidden": options.hidden, "layers": options.layers}
    config = TinyConfig(episodes=options.demonstrations, epochs=EPOCHS, **sizes)
    figures = make_lm(lambda: make_text_env(ENV, ENV_KWARGS), out, config, language=LanguageConfig(form="tokens"))
    print(f"the start: {figures['parameters']:,} weights, right in {figures['accuracy']:.0%} of the demonstrations")


def tasks_of(model: Path, count: int) -> list[dict[str, Any]]:
    """Tasks: seed, prompt, and its ids as ours gives them to the model."""
    from ctrlrl.language.model import load_tokenizer
    from ctrlrl.language.prompts import Prompts
    from ctrlrl.language.text_vector import TextVector

    language = LanguageConfig(model=str(model), form="tokens", candidate_tokens=TOKENS)
    env, say = make_text_env(ENV, ENV_KWARGS), Prompts()
    vector = TextVector([env], load_tokenizer(language), language, name=ENV)
    tasks = []
    for seed in range(FIRST_TASK, FIRST_TASK + count):
        obs = vector.reset([seed])
        assert isinstance(obs, dict)
        ids = [i for name in ("goal", "prompt") for i in obs[name][0].tolist() if i >= 0]
        state = env.reset(seed)
        prompt = say.goal(state.goal) + say.prompt(state.goal, state.observation, [], 0)
        tasks.append({"seed": seed, "prompt": prompt, "ids": ids})
    return tasks


def finals(runs: Sequence[Sequence[float]]) -> list[float]:
    """Of each seed the mean reward of its last turns, a quarter of them."""
    return [statistics.fmean(run[-max(1, len(run) // 4) :]) for run in runs]


def clearly_below(ours: Sequence[float], theirs: Sequence[float]) -> bool | None:
    """Whether our finals are outside the noise below theirs; None where a seed alone cannot tell."""
    if min(len(ours), len(theirs)) < 2:
        return None
    noise = 2 * (statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)) ** 0.5
    missing = statistics.fmean(theirs) - statistics.fmean(ours)
    return max(ours) < min(theirs) and missing > max(noise, LEAST)


def tables(pairs: Sequence[Pair]) -> str:
    """What was measured, as Markdown."""
    lines = ["| mean reward of completions |", "|---" * (1 + len(NAMES) * len(pairs)) + "|"]
    lines[0] += "".join(f" {name}, seed {seed} |" for seed in range(len(pairs)) for name in NAMES.values())
    for turn, first in enumerate(pairs[0]["ours"]):
        size = round(first["steps"])
        cells = [f"{pair[who][turn]['reward'] / pair[who][turn]['steps']:.3f}" for pair in pairs for who in NAMES]
        lines.append(f"| {turn * size:,} to {(turn + 1) * size:,} | " + " | ".join(cells) + " |")
    lines += ["", "| | completions /s | tokens /s | tokens of one | peak memory, MiB |", "|---|---|---|---|---|"]

    def rates(who: str, what: str) -> list[float]:
        return [turn[what] / turn["seconds"] for pair in pairs for turn in pair[who][1:]]

    for who, name in NAMES.items():
        turns = [turn for pair in pairs for turn in pair[who]]
        length = sum(turn["tokens"] for turn in turns) / sum(turn["steps"] for turn in turns)
        speeds = " | ".join(f"{statistics.median(rates(who, what)):,.0f}" for what in ("steps", "tokens"))
        lines.append(f"| {name} | {speeds} | {length:.2f} | {max(turn['peak_mib'] for turn in turns):,.0f} |")
    cells = []
    for what in ("steps", "tokens"):
        ratios = [a / b for a, b in zip(rates("ours", what), rates("trl", what), strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    lines.append(f"| times TRL's | {' | '.join(cells)} | | |")
    return "\n".join(lines)


def main() -> int:
    """Run the turns and print the tables."""
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        train_ours(json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--turn", type=int, default=4096, help="completions of a turn")
    parser.add_argument("--batch", type=int, default=64, help="completions that are made at a time")
    parser.add_argument("--minibatch", type=int, default=64, help="completions of an update")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--passes", type=int, default=2, help="over each batch")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--demonstrations", type=int, default=EPISODES, help="that the model to start from has seen")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    options = parser.parse_args()
    for larger, smaller in (("turn", "batch"), ("batch", "minibatch"), ("batch", "group")):  # turns hold whole batches
        if getattr(options, larger) % getattr(options, smaller):
            parser.error(f"--{larger} must be a multiple of --{smaller}")
    if options.turns < 2 or options.seeds < 1:
        parser.error("--turns is 2 or more, of which the first does not count for the speed, and --seeds 1 or more")
    commands = {
        "ours": [sys.executable, str(Path(__file__).resolve()), "--worker"],
        "trl": [str(python_of("trl")), str(HERE / "peers" / "trl_grpo.py")],
    }
    pairs: list[Pair] = []
    with tempfile.TemporaryDirectory() as folder:
        model, tasks = Path(folder) / "model", Path(folder) / "tasks.json"
        make_start(model, options)
        completions = options.turns * options.turn
        tasks.write_text(json.dumps(tasks_of(model, completions // options.group)))
        settings = {"env": ENV, "env_kwargs": ENV_KWARGS, "tokens": TOKENS, "completions": completions}
        settings |= {"model": str(model), "tasks": str(tasks), "epochs": options.passes}
        settings |= {name: getattr(options, name) for name in ("turn", "batch", "minibatch", "group", "lr", "threads")}
        for seed in range(options.seeds):
            both = {
                who: Trainer(command, settings | {"seed": seed, "out": f"{folder}/{who}-{seed}"})
                for who, command in commands.items()
            }
            for turn in range(options.turns):
                for who in sorted(both, reverse=bool(turn % 2)):
                    both[who].go()
                print(f"seed {seed}: turn {turn + 1} of {options.turns} done", file=sys.stderr, flush=True)
            for trainer in both.values():
                trainer.close()
            pairs.append({who: trainer.turns for who, trainer in both.items()})
    pinned = (HERE / "peers" / "trl.txt").read_text().split()
    print(f"{next(one for one in pinned if one.startswith('trl=='))}; {options.batch} completions at a time, ", end="")
    print(f"{options.group} of a prompt, {options.minibatch} in an update, {options.passes} passes, lr {options.lr}\n")
    print(tables(pairs))
    rewards = {who: [[turn["reward"] / turn["steps"] for turn in pair[who]] for pair in pairs] for who in NAMES}
    last = {who: finals(runs) for who, runs in rewards.items()}
    below = clearly_below(last["ours"], last["trl"])
    means = ", ".join(f"{name} {statistics.fmean(last[who]):.3f}" for who, name in NAMES.items())
    word = {None: "one seed cannot tell", True: "CLEARLY BELOW", False: "not clearly below"}[below]
    print(f"\nreward of the last quarter: {means}: {word}")
    if options.out:
        options.out.write_text(json.dumps({"settings": vars(options) | {"out": None}, "seeds": pairs}, indent=1) + "\n")
    return int(bool(below))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CtrlrlError as error:
        sys.exit(f"error: {error}")
