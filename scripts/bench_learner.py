#!/usr/bin/env python3
"""Speed of the whole training loop: ours, Stable-Baselines3's and SBX's, side by side in one run on one machine.

    python scripts/bench_learner.py                 # HalfCheetah-v5, 1 and 8 environments, 1 and 2 threads
    python scripts/bench_learner.py --num-envs 1 --rounds 10 --out bench.json
    python scripts/bench_learner.py --algo dsac-t --beside sac --peers --num-envs 1
    python scripts/bench_learner.py --algo ppo --num-envs 8 --segment 32768

with the interpreter of .venv. Every training has its own process (peers in virtual environments of their own, made at
the first run) and no presets. What learns from a replay has the same networks (2x256), batch 256, and as many updates
per environment step on both sides; PPO has each library's defaults (a --segment must hold whole rollouts of both). All
are warmed up first; then, round by round, each trains for --segment environment steps while the others wait. A ratio is
the median over the rounds of the ratios within a round, since the machine's speed drifts; both sides count with their
better number of threads.

Ours appears in each of --ways, EXECUTION/PRECISION of its updates: compiled/bfloat16 is what `ctrlrl train` does by
itself in trainings of 50,000 updates and more, where there is a C++ compiler and the processor multiplies bfloat16.
EXECUTION/PRECISION/N makes the updates owed every N environment steps instead of the default 8; the peers' default is
every step. --beside runs other algorithms of ours in the first of the ways, as something to compare with.

The floor is the time the updates' matrix products take at the rate of one 256x256x256 float32 product, plus the raw
simulation: once at the rate of PyTorch's default BLAS, once at the best float32 rate there is here. Both are floors of
float32: products in bfloat16 may go below.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where ctrlrl is not installed

import gymnasium as gym  # noqa: E402
import torch  # noqa: E402
from peers import recipes  # noqa: E402
from peers.gate import Gate  # noqa: E402
from peers.venv import python_of  # noqa: E402

from ctrlrl.algorithms.registry import find_algorithm  # noqa: E402
from ctrlrl.errors import CtrlrlError  # noqa: E402
from ctrlrl.nn.execution import PRECISIONS, unavailable  # noqa: E402

LEARNING_STARTS = 1_000
NAMES = {"ours": "ctrlrl", "sb3": "Stable-Baselines3", "sbx": "SBX"}


class Worker:
    """A process that waits for its turn."""

    def __init__(
        self, library: str, algo: str, num_envs: int, threads: int, options: argparse.Namespace, way: str = ""
    ) -> None:
        self.library, self.threads = library, threads
        self.name = NAMES.get(library, library) + (f", {way}" if way else "")
        if library == "beside":
            self.name = f"ctrlrl {algo}, {way}"
        if library in ("ours", "beside", "floor"):
            command = [sys.executable, str(Path(__file__).resolve()), f"--worker={library.replace('beside', 'ours')}"]
            command += ["--peers"]  # none: what they can train is no matter of this process
        else:
            command = [str(python_of(library)), str(HERE / "peers" / "speed.py"), "--library", library]
        command += ["--algo", algo, "--env", options.env, "--num-envs", str(num_envs)]
        command += ["--threads", str(threads), "--segment", str(options.segment)]
        command += ["--learning-starts", str(LEARNING_STARTS), *(["--ways", way] if way else [])]
        # XLA has no number of threads; what it may run on decides.
        cores = set(sorted(os.sched_getaffinity(0))[:threads])
        begun = time.perf_counter()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the process fails
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self.read()  # that it is warm
        self.warm_up_s = time.perf_counter() - begun
        self.rounds: list[dict[str, float]] = []

    def read(self) -> dict[str, float]:
        """The next record; ends everything with the worker's own words if it has failed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise SystemExit(f"{self.library} failed:\n{self.log.read()[-3000:]}")
        record: dict[str, float] = json.loads(line)
        return record

    def go(self) -> None:
        """One segment."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.rounds.append(self.read())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def rates(self, what: str = "steps") -> list[float]:
        """Environment steps (or updates) per second, round by round."""
        return [r[what] / r["seconds"] for r in self.rounds]


def train_ours(options: argparse.Namespace) -> None:
    """The loop of `ctrlrl train`, without evaluations and checkpoints, until the gate ends the process."""
    import ctrlrl
    from ctrlrl.training.off_policy import OffPolicyLoop

    class Gated(ctrlrl.Callback):
        gate = Gate(options.segment)

        def on_step(self, loop: OffPolicyLoop) -> None:
            self.gate(loop.env_steps, loop.updates)

    execution, precision, *every = options.ways[0].split("/")
    agent: dict[str, Any] = {"execution": execution}
    more: dict[str, Any] = {}
    if find_algorithm(options.algo).loop == "off-policy":
        agent |= {"hidden": [256, 256], "batch_size": 256, "precision": precision}
        more = {"learning_starts": options.learning_starts} | ({"update_every": int(every[0])} if every else {})
    with tempfile.TemporaryDirectory() as folder:
        ctrlrl.train(
            options.algo,
            options.env,
            preset=False,
            quiet=True,
            callbacks=[Gated()],
            steps=10**8,
            num_envs=options.num_envs,
            threads=options.threads,
            device="cpu",
            eval_every=0,
            checkpoint_every=10**8,
            out=f"{folder}/run",
            agent=agent,
            **more,
        )


def measure_floor(options: argparse.Namespace) -> None:
    """For every line on stdin: matrix product rates (GFLOP/s), and the raw simulation (microseconds per step)."""

    from ctrlrl.nn.cpu import prepare_cpu

    torch.set_num_threads(options.threads)
    a, b = torch.rand(256, 256), torch.rand(256, 256)
    half = a.bfloat16()
    env: Any = gym.make(options.env).unwrapped
    env.reset(seed=0)
    print("{}", flush=True)
    while sys.stdin.readline():
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]
        record = {"blas": 2 * 256**3 / _best(lambda: a @ b) / 1e9}
        prepare_cpu()
        record["float32"] = max(record["blas"], 2 * 256**3 / _best(lambda: a @ b) / 1e9)
        record["bfloat16"] = 2 * 256**3 / _best(lambda: half @ half) / 1e9
        if hasattr(env, "model"):
            import mujoco

            seconds = _best(lambda: mujoco.mj_step(env.model, env.data, env.frame_skip))
        else:
            seconds = 0.0  # too little to matter (classic control)
        print(json.dumps(record | {"simulation_us": seconds * 1e6}), flush=True)


def _best(work: Callable[[], object], calls: int = 200, tries: int = 5) -> float:
    """Seconds of one call, of the quickest of some tries."""
    out = []
    for _ in range(tries + 1):  # the first warms up
        begun = time.perf_counter()
        for _ in range(calls):
            work()
        out.append((time.perf_counter() - begun) / calls)
    return min(out[1:])


def step_flops(algo: str, env: str) -> float:
    """Floating-point operations of the updates' matrix products per environment step, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    from ctrlrl.algorithms.registry import train_config_class
    from ctrlrl.envs.vector import Step
    from ctrlrl.replay.buffer import ReplayBuffer
    from ctrlrl.replay.rollout import Rollout

    algorithm, config = find_algorithm(algo), train_config_class(algo)(env=env)
    if algorithm.loop == "off-policy":
        config = train_config_class(algo).from_dict({"agent": {"hidden": [256, 256], "batch_size": 256}}, base=config)
    one = gym.make(env)
    space: Any = one.observation_space
    agent = algorithm.load_agent_class()(space, one.action_space, config.agent)  # type: ignore[attr-defined]
    obs = torch.zeros(1, *space.shape)
    action, _, extras = agent.policy.act(obs)
    no = torch.zeros(1, dtype=torch.bool)
    step = Step(obs, action, torch.zeros(1), no, no, obs, ~no)
    with FlopCounterMode(display=False) as counter:
        if algorithm.loop == "on-policy":
            steps = config.rollout_steps  # type: ignore[attr-defined]
            rollout = Rollout(space, horizon=steps, num_envs=1, extras=extras)
            rollout.begin(obs)
            for _ in range(steps):
                rollout.add(step, extras)
            agent.update(rollout)
            return counter.get_total_flops() / steps
        buffer = ReplayBuffer(space, one.action_space, capacity=2, num_envs=1, extras=extras)
        buffer.begin(obs)
        buffer.add(step, extras)
        updates = agent.config.policy_delay  # of which one improves the policy
        agent.update(buffer.sample(updates, agent.config.batch_size, gamma=agent.config.gamma))
    return float(counter.get_total_flops() / updates * agent.config.utd)


def way_of(text: str) -> str:
    """`text`, if it is EXECUTION/PRECISION or EXECUTION/PRECISION/N."""
    execution, _, rest = text.partition("/")
    precision, _, every = rest.partition("/")
    if execution not in ("compiled", "eager") or precision not in PRECISIONS or not (every or "1").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not like compiled/bfloat16 or eager/float32/1")
    return text


def main() -> None:
    """Run the rounds and print the table."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="sac")
    parser.add_argument("--beside", nargs="+", default=[], metavar="ALGO", help="others of ours to compare with")
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, cores)}))
    parser.add_argument(
        "--peers", nargs="*", default=["sb3", "sbx"], choices=["sb3", "sbx"], help="libraries to compare with"
    )
    parser.add_argument("--ways", nargs="+", type=way_of, metavar="EXECUTION/PRECISION[/N]")
    parser.add_argument("--segment", type=int, default=1_000, help="environment steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    parser.add_argument("--worker", choices=["ours", "floor"], help=argparse.SUPPRESS)
    parser.add_argument("--learning-starts", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        algorithm = find_algorithm(options.algo)
        for other in options.beside:
            find_algorithm(other)
    except CtrlrlError as error:
        parser.error(str(error))
    if not options.ways:
        replays = ["compiled/bfloat16", "compiled/bfloat16/1", "compiled/float32", "eager/float32"]
        options.ways = replays if algorithm.loop == "off-policy" else ["compiled/float32", "eager/float32"]
    for peer in options.peers:
        if options.algo not in recipes.ALGORITHMS[peer]:
            parser.error(f"{peer} trains {', '.join(recipes.ALGORITHMS[peer])}, not {options.algo}: leave it out")
    if options.worker:
        options.num_envs, options.threads = options.num_envs[0], options.threads[0]
        return train_ours(options) if options.worker == "ours" else measure_floor(options)
    if max(options.threads) > cores:
        parser.error(f"--threads {max(options.threads)}: this machine has {cores} cores")

    try:
        flops = step_flops(options.algo, options.env)
    except (CtrlrlError, gym.error.Error) as error:
        parser.error(str(error))
    if any("compiled" in way for way in options.ways) and (reason := unavailable("compiled", torch.device("cpu"))):
        parser.error(f"--ways compiled/...: {reason}. Or take --ways eager/float32")
    results: dict[str, Any] = {"algo": options.algo, "env": options.env, "step_flops": flops, "cases": []}
    for num_envs in options.num_envs:
        workers = []
        kinds = [("ours", options.algo, way) for way in options.ways]
        kinds += [("beside", other, options.ways[0]) for other in options.beside]
        kinds += [(library, options.algo, "") for library in (*options.peers, "floor")]
        for library, algo, way in kinds:
            for threads in options.threads:
                print(f"warming up {library} {algo} {way}, {num_envs} envs, {threads} threads", file=sys.stderr)
                workers.append(Worker(library, algo, num_envs, threads, options, way))
        for i in range(options.rounds):
            for j in range(len(workers)):
                workers[(i + j) % len(workers)].go()  # another one first each time
            print(f"round {i + 1} of {options.rounds} done", file=sys.stderr)
        for worker in workers:
            worker.close()
        results["cases"].append(case(num_envs, workers, flops))
        print(table(results["cases"][-1], options))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def case(num_envs: int, workers: list[Worker], flops: float) -> dict[str, Any]:
    """What was measured with `num_envs` environments."""

    def median(worker: Worker, what: str = "steps") -> float:
        return statistics.median(worker.rates(what))

    trainings = [w for w in workers if w.library != "floor"]
    rows = []
    for worker in trainings:
        rates = worker.rates()
        rows.append(
            {
                "library": worker.name,
                "threads": worker.threads,
                "steps_per_s": median(worker),
                "steps_per_s_range": [min(rates), max(rates)],
                "updates_per_s": median(worker, "updates"),
                "peak_mib": worker.rounds[-1]["peak_mib"],
                "warm_up_s": worker.warm_up_s,
            }
        )
    ratios = {}
    best = {name: max((w for w in trainings if w.name == name), key=median) for name in {w.name: 0 for w in trainings}}
    for ours in (w for w in best.values() if w.library == "ours"):
        for peer in (w for w in best.values() if w.library != "ours"):
            pairs = [a / b for a, b in zip(ours.rates(), peer.rates(), strict=True)]
            ratios[f"{ours.name} / {peer.name}"] = {
                "median": statistics.median(pairs),
                "range": [min(pairs), max(pairs)],
            }
    floors = {}
    for floor in (w for w in workers if w.library == "floor"):
        same = max((w for w in trainings if w.library == "ours" and w.threads == floor.threads), key=median)
        entry = {
            name: statistics.median(r[name] for r in floor.rounds) for name in ("blas", "float32", "simulation_us")
        }
        entry["fastest"] = same.name
        entry["bfloat16"] = statistics.median(r["bfloat16"] for r in floor.rounds)
        for name in ("blas", "float32"):
            shares = [
                rate * (flops / (r[name] * 1e9) + r["simulation_us"] / 1e6)
                for rate, r in zip(same.rates(), floor.rounds, strict=True)
            ]
            entry[f"share_of_{name}_floor"] = statistics.median(shares)
        floors[str(floor.threads)] = entry
    return {"num_envs": num_envs, "rows": rows, "ours_to_peer": ratios, "floor": floors}


def table(result: dict[str, Any], options: argparse.Namespace) -> str:
    """A case as Markdown."""
    lines = [
        f"\n{options.algo}, {options.env}, {result['num_envs']} environment(s)\n",
        "| | threads | environment steps/s (range) | updates/s | peak memory | warm-up |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["steps_per_s_range"]
        lines.append(
            f"| {row['library']} | {row['threads']} | {row['steps_per_s']:.0f} ({low:.0f} to {high:.0f}) "
            f"| {row['updates_per_s']:.0f} | {row['peak_mib']:.0f} MiB | {row['warm_up_s']:.1f} s |"
        )
    lines.append("")
    for pair, ratio in result["ours_to_peer"].items():
        low, high = ratio["range"]
        times = f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"{pair}, each at its better number of threads: {times}")
    for threads, floor in result["floor"].items():
        lines.append(
            f"floor, {threads} thread(s): float32 products {floor['blas']:.0f} GFLOP/s by the default BLAS, "
            f"{floor['float32']:.0f} at best (bfloat16 {floor['bfloat16']:.0f}); "
            f"simulation {floor['simulation_us']:.0f} us a step; {floor['fastest']} runs at "
            f"{floor['share_of_blas_floor']:.0%} of the floor with the default BLAS, "
            f"{floor['share_of_float32_floor']:.0%} of the one with the best rate"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
