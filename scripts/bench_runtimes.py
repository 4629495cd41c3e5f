#!/usr/bin/env python3
"""How long a policy takes for one observation, in every runtime of a bundle, beside torch and C written by hand.

    python scripts/bench_runtimes.py                  # two sizes, 4,000 calls of each
    python scripts/bench_runtimes.py --calls 20000 --rounds 5

with the interpreter of .venv. NumPy array in, NumPy array out; normalization, clips and tanh included; one thread, no
garbage collection, and real-time scheduling where that is permitted (the output says). Calls of the runtimes take
turns. "C alone" is timed inside a C program, around calls of `policy_run` from the bundle's policy.h and of a function
that was written by hand for this network, both compiled with -O3 -march=native. Prints Markdown: p50, p99, p99.9 in
microseconds, and the ratios that are claimed, of p50, over the rounds: our ONNX path to a bare call of onnxruntime, C
to C by hand.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where ctrlrl is not installed

import gymnasium as gym
import numpy as np
import torch

from ctrlrl.algorithms.registry import find_algorithm
from ctrlrl.deploy import Actor, Bundle
from ctrlrl.deploy.manifest import Action, Entry, Manifest, Network
from ctrlrl.deploy.to_onnx import ACTION, BARE, OPSET, to_onnx
from ctrlrl.errors import CtrlrlError
from ctrlrl.training.export_run import write_bundle

SIZES = ((17, (256, 256), 6), (48, (512, 256, 128), 12))
GOALS = {"onnx": 1.5, "c": 2.0}


def policy_of(observation: int, hidden: tuple[int, ...], action: int) -> torch.nn.Module:
    """TD3's policy of these sizes, with statistics."""
    torch.manual_seed(0)
    algorithm = find_algorithm("td3")
    agent = algorithm.load_agent_class()(
        gym.spaces.Box(-np.inf, np.inf, (observation,), np.float32),
        gym.spaces.Box(-1, 1, (action,), np.float32),
        algorithm.load_config_class()(hidden=hidden, normalize_obs=True),
    )
    agent.observe(torch.randn(1000, observation), torch.ones(1000, dtype=torch.bool))
    policy: torch.nn.Module = agent.policy.eval()
    return policy


def bundle_of(policy: Any, observation: int, action: int, out: Path) -> Bundle:
    """A bundle of `policy`."""
    seen = torch.randn(16, observation)
    exported = to_onnx(policy, seen[:1])
    goldens = {f"network/input/{BARE}": seen.numpy(), f"network/output/{ACTION}": policy.act(seen)[0].numpy()}
    manifest = Manifest(
        name="benchmark",
        task="none",
        control_dt=0.02,
        observation=(Entry(name=BARE, shape=(observation,)),),
        action=Action(kind="box", shape=(action,)),
        network=Network(opset=OPSET, runtimes=("onnx",)),
    )
    write_bundle(out, manifest, exported.model, goldens)
    return Bundle.open(out)


def ways(policy: Any, bundle: Bundle, observation: int) -> dict[str, Callable[[np.ndarray[Any, Any]], Any]]:
    """What is timed, by name: a function of an observation (1, O)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(bundle.content("policy.onnx"), options, providers=["CPUExecutionProvider"])
    actors = {name: Actor(bundle, name) for name in ("onnx", "numpy", "c")}

    def eager(x: np.ndarray[Any, Any]) -> Any:
        with torch.inference_mode():
            return policy.act(torch.from_numpy(x))[0].numpy()

    def through(actor: Actor) -> Callable[[np.ndarray[Any, Any]], Any]:
        return lambda x: actor.run({BARE: x})

    return {
        "torch, eager": eager,
        "onnxruntime, bare": lambda x: session.run(None, {BARE: x}),
        **{f"bundle, {name}": through(actor) for name, actor in actors.items()},
    }


def measure(
    calls: Mapping[str, Callable[[np.ndarray[Any, Any]], Any]], seen: np.ndarray[Any, Any], count: int
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Microseconds of each call, (count,); runtimes take turns of 50."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.perf_counter_ns
    for start in range(0, count, 50):
        for name, call in calls.items():
            for i in range(start, min(start + 50, count)):
                x = seen[i % len(seen)][None]
                began = clock()
                call(x)
                times[name].append((clock() - began) / 1e3)
    return {name: np.array(values) for name, values in times.items()}


HAND = """
static float h0[{widest}], h1[{widest}];
static void by_hand(const float *x, float *y) {{
    for (int i = 0; i < {inputs}; ++i) {{
        float v = (x[i] - mean[i]) * scale[i];
        h0[i] = v < -10 ? -10 : v > 10 ? 10 : v;
    }}
{layers}
    for (int j = 0; j < {outputs}; ++j) y[j] = tanhf(h{last}[j]);
}}
"""
LAYER = """    memcpy(h{b}, b{n}, sizeof b{n});
    for (int k = 0; k < {inputs}; k += 4)
        for (int j = 0; j < {outputs}; ++j)
            h{b}[j] += h{a}[k] * w{n}[k][j] + h{a}[k + 1] * w{n}[k + 1][j]
                + h{a}[k + 2] * w{n}[k + 2][j] + h{a}[k + 3] * w{n}[k + 3][j];{activation}
"""
RELU = "\n    for (int j = 0; j < {outputs}; ++j) if (h{b}[j] < 0) h{b}[j] = 0;"
MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
static double now(void) {{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e6 * t.tv_sec + 1e-3 * t.tv_nsec;
}}
static policy_memory memory;
int main(int argc, char **argv) {{
    const int count = atoi(argv[1]); (void)argc;
    policy_input in; policy_output out; float other[{outputs}], worst = 0;
    for (int i = 0; i < count; ++i) {{
        for (int k = 0; k < {inputs}; ++k) in.observation[k] = (float)((i * 7 + k * 13) % 41) / 10 - 2;
        const double a = now(); policy_run(&in, &out, &memory);
        const double b = now(); by_hand(in.observation, other);
        const double c = now();
        for (int j = 0; j < {outputs}; ++j) worst = fmaxf(worst, fabsf(other[j] - out.action[j]));
        printf("%.3f %.3f\\n", b - a, c - b);
    }}
    fprintf(stderr, "%g", worst);
    return 0;
}}
"""


def c_program(policy: Any, bundle: Bundle, folder: Path) -> Path:
    """A program that times `policy_run` and C by hand."""
    normalizer = next(iter(policy.normalizer.entries.values()))
    linear = [m for m in policy.trunk.modules() if isinstance(m, torch.nn.Linear)]
    tables = [table("mean", normalizer.shift), table("scale", normalizer.scale)]
    layers, a = [], 0
    for n, layer in enumerate(linear):
        inputs = -(-layer.in_features // 4) * 4
        weight = torch.zeros(inputs, layer.out_features)
        weight[: layer.in_features] = layer.weight.detach().T
        tables += [table(f"w{n}", weight), table(f"b{n}", layer.bias)]
        sizes = {"n": n, "a": a, "b": 1 - a, "inputs": inputs, "outputs": layer.out_features}
        layers.append(LAYER.format(activation="" if layer is linear[-1] else RELU.format(**sizes), **sizes))
        a = 1 - a
    sizes = {"inputs": linear[0].in_features, "outputs": linear[-1].out_features}
    widest = 4 + max(max(m.in_features, m.out_features) for m in linear)
    code = '#define _POSIX_C_SOURCE 199309L\n#include "policy.h"\n' + "\n".join(tables)
    code += HAND.format(widest=widest, layers="".join(layers), last=a, **sizes) + MAIN.format(**sizes)
    (folder / "main.c").write_text(code)
    (folder / "policy.h").write_bytes(bundle.content("policy.h"))
    command = [os.environ.get("CC", "cc"), "-std=c99", "-O3", "-march=native", folder / "main.c", "-o", folder / "main"]
    subprocess.run([*command, "-lm"], check=True)
    return folder / "main"


def table(name: str, value: torch.Tensor) -> str:
    """A constant array."""
    size = "".join(f"[{n}]" for n in value.shape)
    return f"static const float {name}{size} = {{{', '.join(f'{v:.9g}' for v in value.detach().flatten().tolist())}}};"


def real_time() -> bool:
    """Ask for real-time scheduling; whether it was granted."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    except (AttributeError, OSError):
        return False
    return True


def line(name: str, times: np.ndarray[Any, Any]) -> str:
    """A row of the table."""
    return f"| {name} | " + " | ".join(f"{np.percentile(times, p):.1f}" for p in (50, 99, 99.9)) + " |"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        for observation, hidden, action in SIZES:
            name = "-".join(map(str, (observation, *hidden, action)))
            with tempfile.TemporaryDirectory() as folder:
                policy = policy_of(observation, hidden, action)
                bundle = bundle_of(policy, observation, action, Path(folder) / "bundle")
                calls = ways(policy, bundle, observation)
                program = c_program(policy, bundle, Path(folder))
                seen = np.random.default_rng(0).normal(size=(256, observation)).astype(np.float32)
                measure(calls, seen, 300)
                gc.collect()
                gc.freeze()
                gc.disable()
                granted = real_time()
                found: dict[str, list[np.ndarray[Any, Any]]] = {}
                for _ in range(options.rounds):
                    for way, times in measure(calls, seen, options.calls).items():
                        found.setdefault(way, []).append(times)
                    done = subprocess.run([program, str(options.calls)], capture_output=True, text=True, check=True)
                    if not float(done.stderr) < 1e-4:
                        raise SystemExit(f"C by hand differs by {done.stderr}")
                    both = np.array([row.split() for row in done.stdout.splitlines()], np.float64)
                    found.setdefault("C alone, policy.h", []).append(both[:, 0])
                    found.setdefault("C alone, by hand", []).append(both[:, 1])
                gc.enable()
            print(f"\n{name}, {'real-time' if granted else 'ordinary'} scheduling, {options.rounds} rounds\n")
            print("| us | p50 | p99 | p99.9 |\n|---|---|---|---|")
            for way, rounds in found.items():
                print(line(way, np.concatenate(rounds)))
            for label, ours, theirs, goal in (
                ("ONNX path / bare call", "bundle, onnx", "onnxruntime, bare", GOALS["onnx"]),
                ("generated C / C by hand", "C alone, policy.h", "C alone, by hand", GOALS["c"]),
            ):
                ratios = [np.median(a) / np.median(b) for a, b in zip(found[ours], found[theirs], strict=True)]
                told = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"\n{label}: {told}, at most {goal} asked", flush=True)
    except CtrlrlError as error:
        print(f"bench_runtimes: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
