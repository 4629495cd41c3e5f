"""Physics steps per second of MuJoCo Warp on a device: HalfCheetah with random controls. Prints Markdown.

python scripts/bench_warp.py --device cuda --num-sims 4096
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gymnasium
import mujoco
import torch

from ctrlrl.envs.warp import WarpSim


def main() -> None:
    """Measure both orders of sums, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num-sims", type=int, default=4096)
    parser.add_argument("--substeps", type=int, default=5)
    parser.add_argument("--calls", type=int, default=200)
    args = parser.parse_args()
    assets = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
    model = mujoco.MjModel.from_xml_path(str(assets / "half_cheetah.xml"))
    print(f"HalfCheetah, {args.num_sims} simulations on {args.device}, {args.substeps} steps a call")
    print("\n| sums | calls | until the second call | steps/s | overflow |\n|---|---|---|---|---|")
    for deterministic in (True, False):
        began = time.perf_counter()
        sim = WarpSim(model, args.num_sims, args.device, solver="newton", deterministic=deterministic)
        ctrl = sim.field("ctrl")
        for _ in range(2):
            sim.step(args.substeps)
        wait(sim.device)
        ready = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(args.calls):
            ctrl.uniform_(-1, 1)
            sim.step(args.substeps)
        wait(sim.device)
        rate = args.calls * args.substeps * args.num_sims / (time.perf_counter() - began)
        print(
            f"| {'in fixed order' if deterministic else 'as threads arrive'} "
            f"| {'recorded' if sim.unrecorded is None else sim.unrecorded} | {ready:.1f} s | {rate:,.0f} "
            f"| {int(sim.overflow().sum())} of {args.num_sims} |",
            flush=True,
        )
        sim.close()


def wait(device: torch.device) -> None:
    """Until the device has done what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
