#!/usr/bin/env python3
"""Evaluation returns of one algorithm over environments x seeds, one single-threaded training per core.

    python scripts/bench_returns.py --algo sac --env HalfCheetah-v5 Hopper-v5 --seeds 0 1 2 --out runs/returns
    python scripts/bench_returns.py --algo sac --env Hopper-v5 --seeds 0 --out runs/returns-utd4 -- --agent.utd 4
    python scripts/bench_returns.py --peer sbx --algo td3 --env Walker2d-v5 --seeds 1 2 --out runs/returns

(with the interpreter of .venv)

Each cell is one `ctrlrl train` in OUT/ALGO-ENV-SEED, its output in OUT/ALGO-ENV-SEED.log; flags after `--` go to it.
The same command again goes on: cells that are finished are skipped, the others resumed. At the end, and with
--only-report at any time, OUT/returns.json gets every run's evaluations, and OUT/comparison.html, OUT/returns.svg and
OUT/returns.md the comparison, with --peers also with other libraries' returns (docs/data/peer_returns.json, say).

With --peer a cell is a training of another library in a virtual environment of its own, with its defaults; its file is
OUT/PEER-ALGO-ENV-SEED.json, and all of a peer go into OUT/returns-PEER.json. Peers start a cell that was cut off anew.

Exit codes: 0 all cells finished, 1 some failed, 2 bad input (nothing was started), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import numpy as np
from cells import Cell, Interrupted, OwnCell, PeerCell, Scheduler, read_json
from peers import recipes
from peers import venv as peers
from peers.venv import python_of

from ctrlrl.cli.train import describe_preset
from ctrlrl.errors import CtrlrlError
from ctrlrl.files import write_json
from ctrlrl.runs.comparison import compare, console_summary, write_comparison, write_picture, write_table
from ctrlrl.runs.peers import load_peers
from ctrlrl.runs.record import load_run

RANDOM_EPISODES = 20
OURS = ("--env", "--seed", "--steps", "--out", "--threads", "--eval-every", "--eval-episodes", "--dry-run", "--help")


def random_returns(env: str, **how: Any) -> list[float]:
    """Returns of `RANDOM_EPISODES` episodes with uniformly random actions, on the seeds of evaluations.

    `how` goes to `make_env`.
    """
    import torch

    from ctrlrl.envs.make import make_env
    from ctrlrl.nn.policy import Policy
    from ctrlrl.training.collector import random_actions
    from ctrlrl.training.evaluation import evaluate, evaluation_seeds

    class Random(Policy):
        def __init__(self) -> None:
            super().__init__()
            self.draws = torch.Generator().manual_seed(0)

        def act(self, obs: Any, state: Any = None, *, explore: bool = False) -> Any:
            return random_actions(vector.action_space, vector.num_envs, self.draws), {}, {}

    torch.set_num_threads(1)
    vector = make_env(env, **how)
    try:
        return evaluate(vector, Random(), evaluation_seeds(RANDOM_EPISODES)).returns
    finally:
        vector.close()


def own_results(out: Path) -> dict[str, Any]:
    """Every run in `out`, in the format of a peers file (see `ctrlrl.runs.peers`)."""
    runs = [load_run(file.parent) for file in sorted(out.glob("*/config.json"))]
    facts = [run.provenance for run in runs]
    versions = sorted({f"ctrlrl {one.get('ctrlrl')} at {one.get('git', {}).get('commit', '?')[:10]}" for one in facts})
    versions += sorted({f"{k} {v}" for one in facts for k, v in one.get("packages", {}).items() if k != "safetensors"})
    dates = sorted({one["started"][:10] for one in facts if "started" in one})
    return {
        "what": f"Deterministic evaluation returns of {', '.join(versions)}, measured {between(dates)}",
        "protocol": "each run's command; one thread each; evaluations are episodes with the policy's mode on an "
        "environment of their own, on fixed seeds; returns is the list of episode returns",
        "library": "ctrlrl",
        "runs": [
            {
                "algo": run.algo,
                "env": run.env,
                "seed": run.seed,
                "complete": run.state == "finished",
                "command": run.provenance.get("command"),
                "evals": [
                    {"step": one.step, "mean": one.mean, "returns": one.returns.round(4).tolist()}
                    for one in run.evaluations
                ],
            }
            for run in runs
        ],
    }


def peer_results(peer: str, out: Path) -> dict[str, Any]:
    """Every run of `peer` in `out`, in the format of a peers file."""
    runs = [read_json(file) for file in sorted(out.glob(f"{peer}-*.json"))]
    libraries = sorted({run["library"] for run in runs})
    versions = sorted({f"{name} {version}" for run in runs for name, version in run["packages"].items()})
    dates = sorted({run["started"][:10] for run in runs})
    return {
        "what": f"Deterministic evaluation returns of {', '.join(libraries)} ({', '.join(versions)}), "
        f"measured {between(dates)}",
        "protocol": " ".join((peers.HERE / "returns.py").read_text().split('"""')[1].split("\n\n")[1].split()),
        "library": libraries[0] if libraries else peer,
        "runs": [{key: run[key] for key in ("algo", "env", "seed", "complete", "evals")} for run in runs],
    }


def between(dates: Sequence[str]) -> str:
    """The first and the last of sorted dates."""
    return " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "at an unknown time"


def write_results(path: Path, results: dict[str, Any], envs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write `results` and the random policy's returns in `envs` (environment: arguments of `make_env`) to `path`."""
    known = read_json(path).get("random", {}) if path.exists() else {}
    for env, how in envs.items():
        if env not in known:
            try:
                returns = random_returns(env, **how)
            except CtrlrlError as error:  # what was trained is worth its report all the same
                print(f"no returns of a random policy on {env}: {error}", file=sys.stderr)
                continue
            known[env] = {"mean": sum(returns) / len(returns), "returns": [round(one, 4) for one in returns]}
    results |= {"random": known}
    write_json(path, results)
    print(f"returns: {path}")
    return results


def parse_arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the script, and the flags after `--`."""
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="sac", help="what to train: ctrlrl algos lists them (default: sac)")
    parser.add_argument("--peer", choices=tuple(recipes.LIBRARIES), help="train with this library instead of ours")
    parser.add_argument("--env", nargs="+", required=True, help="environments")
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps of each run (default: 100,000)")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--jobs", type=int, default=cores(), help="runs at once (default: one per core)")
    parser.add_argument("--eval-every", type=int, default=10_000, help="default: 10,000 steps")
    parser.add_argument("--eval-episodes", type=int, default=10, help="default: 10")
    parser.add_argument("--peers", nargs="+", default=[], metavar="FILE", help="returns of peers to compare with")
    parser.add_argument("--only-report", action="store_true", help="train nothing, report what there is")
    options = parser.parse_args(words[:cut])
    options.env, options.seeds = list(dict.fromkeys(options.env)), list(dict.fromkeys(options.seeds))
    flags = list(words[cut + 1 :])
    if taken := [flag for flag in flags if flag.partition("=")[0].replace("_", "-") in OURS]:
        parser.error(f"{taken[0]} is this script's to give, not for after --")
    if options.peer and flags:
        parser.error("peers run with their defaults: leave out what follows --")
    if options.peer and options.algo not in recipes.ALGORITHMS[options.peer]:
        parser.error(f"{options.peer} trains {', '.join(recipes.ALGORITHMS[options.peer])}, not {options.algo}")
    if options.peer and options.peers:
        parser.error("--peers compares runs of ours; with --peer there are none")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    return options, flags


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def own_cells(options: argparse.Namespace, flags: Sequence[str]) -> list[OwnCell]:
    """One cell per environment and seed, all environments of a seed before the next seed.

    Raises:
        UsageError: on flags that `ctrlrl train` does not take, or a folder that holds a run with other settings.
    """
    every = ("--eval-every", str(options.eval_every), "--eval-episodes", str(options.eval_episodes))
    cells = [
        OwnCell(options.algo, env, seed, options.steps, options.out, (*every, *flags))
        for seed in options.seeds
        for env in options.env
    ]
    presets = {preset.name: preset for cell in cells if (preset := cell.resolved[1])}
    for preset in presets.values():
        print(describe_preset(preset).replace("; --no-preset", "; -- --no-preset"))
    for cell in cells:
        cell.require_same_settings()
    return cells


def peer_cells(options: argparse.Namespace) -> list[PeerCell]:
    """One cell per environment and seed, all environments of a seed before the next seed.

    Raises:
        UsageError: where a file holds a run with another protocol.
    """
    protocol = (options.peer, options.eval_every, options.eval_episodes)
    cells = [
        PeerCell(f"{options.peer}-{options.algo}", env, seed, options.steps, options.out, *protocol)
        for seed in options.seeds
        for env in options.env
    ]
    for cell in cells:
        cell.require_same_settings()
    return cells


def main(words: Sequence[str]) -> int:
    """Run; returns the exit code."""
    options, flags = parse_arguments(words)
    for file in options.peers:
        load_peers(file)  # refused now, and not after hours of training
    own = [] if options.peer else own_cells(options, flags)
    cells: Sequence[Cell] = peer_cells(options) if options.peer else own
    failed: list[tuple[Cell, str]] = []
    if not options.only_report:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.peer:
            python_of(options.peer)  # now, and not while others wait
        scheduler = Scheduler(cells, options.jobs, options.out)
        try:
            scheduler.run()
        except Interrupted:
            print(f"interrupted; go on with the same command: {shlex.join([sys.executable, *sys.argv])}")
            return 130
        failed = scheduler.failed
    if options.peer:
        results = peer_results(options.peer, options.out)
        write_results(options.out / f"returns-{options.peer}.json", results, {env: {} for env in options.env})
    else:
        envs = {own_cell.env: own_cell.env_options for own_cell in own}
        results = write_results(options.out / "returns.json", own_results(options.out), envs)
        folders = sorted(file.parent for file in options.out.glob("*/config.json"))
        if folders:
            random = {env: np.array(known["returns"]) for env, known in results["random"].items()}
            comparison = compare(folders, peers=options.peers, random=random)
            print(console_summary(comparison))
            print(f"comparison: {write_comparison(comparison, options.out / 'comparison.html')}")
            print(f"picture: {write_picture(comparison, options.out / 'returns.svg')}")
            if comparison.verdicts:
                print(f"table: {write_table(comparison, options.out / 'returns.md')}")
    for cell, how in failed:
        log = options.out / f"{cell.name}.log"
        tail = "".join(f"    {line}\n" for line in log.read_text(errors="replace").splitlines()[-15:])
        print(f"{cell.name} failed with {how}; the end of {log}:\n{tail}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CtrlrlError as error:
        print(f"bench_returns: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
