"""ResFiT's gradient updates per second beside those of the authors' released code, at equal sizes, in turns.

    python scripts/bench_resfit.py --peer CLONE [--threads 1]    # a clone of amazon-science/residual-offpolicy-rl

States of 39 numbers, 4 actions, batches of 256, ten critics of two layers of 1,024 units with LayerNorm, each fourth
update of the policy, too. Of theirs what belongs to cameras is left out (`scripts/peers/resfit_updates.py`). Both get
batches that are ready, the same threads, and turns of the same number of updates, one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import torch

from ctrlrl.algorithms.resfit import ResFiT
from ctrlrl.algorithms.resfit_config import ResFiTConfig
from ctrlrl.nn.cpu import prepare_cpu
from ctrlrl.nn.execution import multiplies_bfloat16
from ctrlrl.nn.residual import BASE, CallablePolicy
from ctrlrl.replay.batch import Batch

BATCH, OBS, ACTION, HEADS, HIDDEN = 256, 39, 4, 10, 1024


def make_batch() -> Batch:
    """Made-up transitions [1, B, ...]."""
    shape = (1, BATCH)
    base = torch.rand(2, *shape, ACTION) * 2 - 1
    return Batch(
        obs=torch.randn(*shape, OBS),
        action=torch.rand(*shape, ACTION) * 2 - 1,
        reward=(torch.rand(shape) < 0.05).float(),
        discount=0.99**3 * (torch.rand(shape) > 0.05).float(),
        next_obs=torch.randn(*shape, OBS),
        end=torch.zeros(shape, dtype=torch.bool),
        index=torch.zeros(shape, dtype=torch.int64),
        extras={BASE: base[0]},
        next_extras={BASE: base[1]},
    )


def agent_of(execution: str, precision: str) -> ResFiT:
    """Ours, of those sizes."""
    box = gym.spaces.Box(-1, 1, (ACTION,))
    config = ResFiTConfig(
        hidden=(HIDDEN, HIDDEN),
        num_critics=HEADS,
        critic_only=0,
        batch_size=BATCH,
        execution=execution,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
    )
    base = CallablePolicy(lambda obs: torch.zeros(len(obs), ACTION))
    return ResFiT(gym.spaces.Box(-9, 9, (OBS,)), box, config, base=base)


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="clone of the authors' code")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--updates", type=int, default=20, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    script = Path(__file__).parent / "peers" / "resfit_updates.py"
    peer = subprocess.Popen(
        [options.peer_python, str(script), str(options.peer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    assert peer.stdin is not None and peer.stdout is not None
    if peer.stdout.readline().strip() != "ready":
        print("the authors' code did not start", file=sys.stderr)
        return 2
    prepare_cpu(options.threads)
    batches = [make_batch() for _ in range(16)]
    kinds = [("eager", "float32"), ("compiled", "float32")]
    kinds += [("compiled", "bfloat16")] if multiplies_bfloat16() else []
    agents = {kind: agent_of(*kind) for kind in kinds}

    def ours(kind: tuple[str, str]) -> float:
        began = time.perf_counter()
        for i in range(options.updates):
            agents[kind].update(batches[i % len(batches)])
        return time.perf_counter() - began

    def theirs() -> float:
        assert peer.stdin is not None and peer.stdout is not None
        peer.stdin.write(f"{options.updates}\n")
        peer.stdin.flush()
        return float(peer.stdout.readline())

    theirs()
    for kind in kinds:
        ours(kind)  # compiles
    ratios: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    rates: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        peers = theirs()
        rates.setdefault("the authors' code", []).append(options.updates / peers)
        for kind in kinds:
            own = ours(kind)
            ratios[kind].append(peers / own)
            rates.setdefault(f"ctrlrl, {', '.join(kind)}", []).append(options.updates / own)
    peer.stdin.close()
    peer.wait()
    print(f"| updates per second, {options.threads} threads | median | times the authors' |\n|---|---|---|")
    for name, values in rates.items():
        own = next((ratios[k] for k in kinds if name == f"ctrlrl, {', '.join(k)}"), [1.0])
        share = f"{statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f})"
        print(f"| {name} | {statistics.median(values):.2f} | {share} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
