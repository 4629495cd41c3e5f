#!/usr/bin/env python3
"""One agent's update by itself: eager, compiled and captured, in turns, and where its time goes.

    python scripts/bench_update.py                                    # on this machine's CPU
    python scripts/bench_update.py --device cuda --ways eager/float32 compiled/float32 captured/float32
    python scripts/bench_update.py --ways compiled/bfloat16 --profile # the operations it consists of

with the interpreter of .venv. A way is EXECUTION/PRECISION, as in --agent.execution and --agent.precision. Each starts
from the same weights and gets the same batches. After 20 updates the weights must agree with those of the first way of
the same precision within a tenth of the distance that they moved, or the exit code is 1: Adam turns last bits of
gradients near zero into whole steps. Of compiled/bfloat16 the difference is only told.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import gymnasium as gym
import numpy as np
import torch
import torch._inductor.config

from ctrlrl.algorithms.registry import find_algorithm
from ctrlrl.nn.cpu import prepare_cpu
from ctrlrl.nn.execution import EXECUTIONS, PRECISIONS
from ctrlrl.replay.batch import Batch
from ctrlrl.runs.checkpoint import pack

OBS, ACT = gym.spaces.Box(-np.inf, np.inf, (17,)), gym.spaces.Box(-1, 1, (6,))
"""HalfCheetah's."""
AGREEMENT = 0.1
"""Largest difference of a weight after `COMPARED` updates, as a share of the farthest that one of its tensor moved."""
COMPARED = 20


def batch(size: int, seed: int, device: torch.device) -> Batch:
    """A made-up batch [1, size, ...]."""
    g = torch.Generator().manual_seed(seed)
    made = Batch(
        obs=torch.randn(1, size, 17, generator=g),
        action=torch.rand(1, size, 6, generator=g) * 2 - 1,
        reward=torch.randn(1, size, generator=g),
        discount=torch.full((1, size), 0.99),
        next_obs=torch.randn(1, size, 17, generator=g),
        end=torch.zeros(1, size, dtype=torch.bool),
        index=torch.zeros(1, size, dtype=torch.int64),
        extras={},
        next_extras={},
    )
    return made.map(lambda value: value.to(device))


def networks(agent: Any) -> dict[str, torch.Tensor]:
    """A copy of all weights of policy, critics and targets."""
    packed = pack(agent.state_dict())[0]
    return {name: value for name, value in packed.items() if "/trunk." in f"/{name}" or "ensemble" in name}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="sac")
    parser.add_argument("--device", default="cpu")
    ways = [f"{execution}/{precision}" for execution in EXECUTIONS for precision in PRECISIONS]
    cpu = ["eager/float32", "compiled/float32", "compiled/bfloat16"]
    parser.add_argument("--ways", nargs="+", choices=ways, default=cpu, metavar="EXECUTION/PRECISION")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, help="of the CPU; by default PyTorch's choice")
    parser.add_argument("--updates", type=int, default=200, help="of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="print the operations of the first way named")
    options = parser.parse_args()
    prepare_cpu(options.threads)
    if options.profile:
        torch._inductor.config.cpp.enable_kernel_profile = True  # compiled loops appear by their names
    device = torch.device(options.device)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    batches = [batch(options.batch_size, seed, device) for seed in range(10)]

    make = find_algorithm(options.algo).load_agent_class()
    agents, weights, ready = {}, {}, {}
    start: dict[str, torch.Tensor] = {}
    for way in options.ways:
        execution, precision = way.split("/")
        begun = time.perf_counter()
        agent = make(OBS, ACT, device=device)
        config = replace(agent.config, execution=execution, precision=precision, batch_size=options.batch_size)
        agents[way] = agent = make(OBS, ACT, config, device=device)
        start = start or networks(agent)
        for i in range(COMPARED):
            agent.update(batches[i % 10])
        wait()
        ready[way] = time.perf_counter() - begun
        weights[way] = networks(agent)
        for i in range(20):
            agent.update(batches[i % 10])

    rates: dict[str, list[float]] = {way: [] for way in agents}
    for _ in range(options.rounds):
        for way, agent in agents.items():
            wait()
            begun = time.perf_counter()
            for i in range(options.updates):
                agent.update(batches[i % 10])
            wait()
            rates[way].append(options.updates / (time.perf_counter() - begun))

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.algo}, batch {options.batch_size}, torch {torch.__version__}, {name}\n")
    first = options.ways[0]
    print(f"| execution/precision | updates/s (range) | to {first} | ready after | weights' difference to {first} |")
    print("|---|---|---|---|---|")
    agree = True
    for way, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates[first], strict=True))

        def apart(other: str, way: str = way) -> float:
            """Largest difference of a weight, as a share of how far the farthest of its tensor went."""
            pairs = ((weights[way][name] - value, value - start[name]) for name, value in weights[other].items())
            return max(float(difference.abs().max() / gone.abs().max()) for difference, gone in pairs)

        if way != "compiled/bfloat16":  # fused operations do not round in between
            peer = next(other for other in options.ways if other.endswith(way[way.index("/") :]))
            agree = agree and apart(peer) <= AGREEMENT
        spread = f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"
        print(f"| {way} | {spread} | {ratio:.2f} | {ready[way]:.1f} s | {apart(first):.1%} of their way |")
    if not agree:
        print(
            f"\nweights of one precision differ by more than {AGREEMENT:.0%} of their way in {COMPARED} updates",
            file=sys.stderr,
        )
    if options.profile:
        profile(lambda i: agents[first].update(batches[i % 10]), wait, device)
    return 0 if agree else 1


def profile(
    update: Callable[[int], object], wait: Callable[[], None], device: torch.device, updates: int = 100
) -> None:
    """Print which operations the time of an update goes to, and on a GPU how much of it no kernel runs."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    begun = time.perf_counter()
    with recording(activities=activities) as recorded:
        for i in range(updates):
            update(i)
        wait()
    elapsed = (time.perf_counter() - begun) * 1e6 / updates
    on_gpu = device.type == "cuda"
    spent: dict[str, list[float]] = {}
    for e in recorded.key_averages():
        if on_gpu and str(e.device_type) != "DeviceType.CUDA":
            continue
        key = "loops that torch.compile fused" if "cpp_fused" in e.key else e.key
        key = "calling the compiled graph" if key.startswith("## Call") else key
        us, count = spent.get(key, [0.0, 0])
        spent[key] = [us + (e.self_device_time_total if on_gpu else e.self_cpu_time_total), count + e.count]
    rows = [(us, count, key) for key, (us, count) in spent.items()]
    busy = sum(time for time, _, _ in rows) / updates
    print(f"\none update under the profiler: {elapsed:.0f} us, {'kernels' if on_gpu else 'operations'} {busy:.0f} us\n")
    print("| | us per update | calls | share |")
    print("|---|---|---|---|")
    for us, count, key in sorted(rows, reverse=True)[:20]:
        print(f"| {key[:60]} | {us / updates:.0f} | {count / updates:.1f} | {us / updates / busy:.0%} |")


if __name__ == "__main__":
    sys.exit(main())
