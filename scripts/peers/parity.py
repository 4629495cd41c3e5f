"""One update of d3rlpy on a made-up batch, written down whole: `parity_d3rlpy.py` starts it and repeats it with ours.

The file --out (npz) holds, in the --dtype of all computation: the batch (`batch/...`, actions in [-1, 1]), the weights
before and after (`before/MODULE.NAME`, `after/...`), the gradients (`gradient/...`, from Adam's first moment), the
losses that d3rlpy reports (`loss/...`), and the random numbers in the order in which they were drawn (`noise/0-normal`,
...).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import d3rlpy
import numpy as np
import torch
from d3rlpy.torch_utility import TorchMiniBatch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from offline import ALGORITHMS, make_algorithm

OBS, ACT = 17, 6
"""HalfCheetah's."""
Arrays = dict[str, Any]


def make_batch(rows: int, seed: int) -> Arrays:
    """Made-up transitions, every fifth of which ends its task; float32 numbers, whatever they are computed in."""
    draws = np.random.default_rng(seed)
    return {
        "obs": draws.standard_normal((rows, OBS), np.float32),
        "action": draws.uniform(-1, 1, (rows, ACT)).astype(np.float32),
        "reward": draws.standard_normal((rows, 1), np.float32),
        "next_obs": draws.standard_normal((rows, OBS), np.float32),
        "next_action": draws.uniform(-1, 1, (rows, ACT)).astype(np.float32),
        "terminal": (np.arange(rows) % 5 == 0).astype(np.float32)[:, None],
    }


@contextlib.contextmanager
def recorded_noise(out: Arrays) -> Iterator[None]:
    """What d3rlpy draws meanwhile, as `noise/NUMBER-KIND`."""

    def keep(kind: str, drawn: torch.Tensor) -> torch.Tensor:
        out[f"noise/{sum(name.startswith('noise/') for name in out)}-{kind}"] = drawn.detach().numpy().copy()
        return drawn

    normal, standard, uniform = torch.randn, torch.distributions.normal._standard_normal, torch.Tensor.uniform_
    torch.randn = lambda *a, **k: keep("normal", normal(*a, **k))
    torch.distributions.normal._standard_normal = lambda *a, **k: keep("normal", standard(*a, **k))
    torch.Tensor.uniform_ = lambda *a, **k: keep("uniform", uniform(*a, **k))
    try:
        yield
    finally:
        torch.randn, torch.distributions.normal._standard_normal = normal, standard
        torch.Tensor.uniform_ = uniform


def modules_of(algo: Any) -> dict[str, torch.nn.Module]:
    """The networks and learned numbers by d3rlpy's names."""
    fields = ((field.name, getattr(algo.impl.modules, field.name)) for field in dataclasses.fields(algo.impl.modules))
    return {name: value for name, value in fields if isinstance(value, torch.nn.Module)}


def weights(algo: Any) -> Arrays:
    """A copy of every parameter, by MODULE.NAME."""
    return {
        f"{module}.{name}": value.detach().numpy().copy()
        for module, network in modules_of(algo).items()
        for name, value in network.named_parameters()
    }


def gradients(algo: Any) -> Arrays:
    """Of the parameters that an optimizer stepped once, by MODULE.NAME."""
    wrappers = [getattr(algo.impl.modules, field.name) for field in dataclasses.fields(algo.impl.modules)]
    moments: dict[Any, Any] = {}
    for wrapper in wrappers:
        if hasattr(wrapper, "optim"):
            moments |= {parameter: state["exp_avg"] for parameter, state in wrapper.optim.state.items()}
    return {
        f"{module}.{name}": (moments[value] / 0.1).numpy().copy()
        for module, network in modules_of(algo).items()
        for name, value in network.named_parameters()
        if value in moments
    }


def norm_first(critics: torch.nn.Module) -> None:
    """Put each LayerNorm of d3rlpy's critics before its ReLU, where ours has it; d3rlpy has it behind."""
    for critic in critics:
        layers = list(critic.encoder._layers)
        for i in range(len(layers) - 1):
            if isinstance(layers[i], torch.nn.ReLU) and isinstance(layers[i + 1], torch.nn.LayerNorm):
                layers[i : i + 2] = layers[i + 1], layers[i]
        critic.encoder._layers = torch.nn.Sequential(*layers)


def main() -> None:
    """Make one update and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algo", choices=ALGORITHMS, required=True)
    parser.add_argument("--agent", type=json.loads, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "float64"), required=True)
    parser.add_argument("--critic-eps", type=float, required=True, help="of the critics' Adam")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, options.dtype))
    d3rlpy.seed(options.seed)
    batch = make_batch(options.rows, options.seed)
    algo = make_algorithm(options.algo, options.agent, mean=np.zeros(OBS), std=np.ones(OBS))
    algo.create_impl((OBS,), ACT)
    for name, network in modules_of(algo).items():
        network.to(torch.get_default_dtype())  # some parameters are made in float32 whatever is asked for
        if "q_funcs" in name:
            norm_first(network)
        if name.startswith("targ_"):  # which are copies so far, and would hide which of the two is asked
            with torch.no_grad():
                for value in network.parameters():
                    value.mul_(1 + 0.1 * torch.randn_like(value))
    if hasattr(algo.impl.modules, "critic_optim"):
        algo.impl.modules.critic_optim.optim.param_groups[0]["eps"] = options.critic_eps
    tensors = {name: torch.tensor(value, dtype=torch.get_default_dtype()) for name, value in batch.items()}
    theirs = TorchMiniBatch(
        observations=tensors["obs"],
        actions=tensors["action"],
        rewards=tensors["reward"],
        next_observations=tensors["next_obs"],
        next_actions=tensors["next_action"],
        returns_to_go=torch.zeros_like(tensors["reward"]),
        terminals=tensors["terminal"],
        intervals=torch.ones_like(tensors["reward"]),
        device="cpu:0",
    )
    record: Arrays = {f"batch/{name}": value for name, value in batch.items()}
    record |= {f"before/{name}": value for name, value in weights(algo).items()}
    with recorded_noise(record):
        losses = algo.impl.update(theirs, 0)  # step 0 is one of those that improve the policy
    record |= {f"loss/{name}": np.float64(value) for name, value in losses.items()}
    record |= {f"after/{name}": value for name, value in weights(algo).items()}
    record |= {f"gradient/{name}": value for name, value in gradients(algo).items()}
    np.savez(options.out, **record)


if __name__ == "__main__":
    main()
