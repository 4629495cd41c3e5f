#!/usr/bin/env python3
"""One update of our offline algorithms beside d3rlpy's: the same weights, the same batch, the same random numbers.

    python scripts/parity_d3rlpy.py                      # every case, in float64 and in float32
    python scripts/parity_d3rlpy.py --algo cql rebrac --dtype float64

with the interpreter of .venv. d3rlpy makes its update in an environment of its own (made at the first run) and writes
it down (`peers/parity.py`); ours starts from the weights that d3rlpy had. For each loss the table has both values, for
each network the length of the gradient and of the step that Adam made of it, and the largest difference of a number: of
a gradient relative to the largest, of a step in units of Adam's step size. Where ours is another algorithm on purpose
the table says why; a case beside it takes that difference away. Observations are not standardized, and LayerNorm stands
before the ReLU in both, where ours has it (d3rlpy has it behind).

Exit codes: 0 all agrees that should, 1 something does not.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where ctrlrl is not installed

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from peers.venv import python_of  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ctrlrl.algorithms.registry import find_algorithm  # noqa: E402
from ctrlrl.config import Config  # noqa: E402
from ctrlrl.replay.batch import Batch  # noqa: E402

ROWS = 256
LIMITS = {
    "float64": {"loss": 1e-6, "gradient": 1e-10, "step": 1e-5},  # d3rlpy sums its losses in float32
    "float32": {"loss": 1e-5, "gradient": 1e-4, "step": math.inf},  # Adam's first step is the gradient's sign
}
"""What rounding may make of a difference. A step in float32 is told and not judged: where a gradient is near zero its
sign is rounding, and Adam goes a whole step that way."""
STILL = 1e-30
"""A step size at which nothing moves."""
Record = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Case:
    """An algorithm with some settings."""

    algo: str
    what: str
    agent: dict[str, Any] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)
    """Rows of the table in which ours is to be another number, and why."""
    critic_factor: float = 1.0
    """d3rlpy's loss of the critics in units of ours."""
    critic_eps: float = 1e-8
    """What Adam adds to the root of the second moment, for d3rlpy's critics."""


V_AFTER = "d3rlpy's advantage takes V after its step, ours V before it"
ALPHA_AFTER = "d3rlpy steps the temperature first and takes the new one, ours takes the one from before"
HALF = "Adam adds its 1e-8 to gradients half as large"
CASES = [
    Case("bc", "as it is"),
    Case("td3-bc", "as it is"),
    Case("rebrac", "as it is, LayerNorm before the ReLU in both"),
    Case("rebrac", "without LayerNorm", {"layer_norm": False}),
    Case(
        "iql",
        "as it is (expectile 0.75, since d3rlpy rounds 0.7 to float32)",
        {"expectile": 0.75},
        differs={"actor loss": V_AFTER, "policy": V_AFTER, "log_std": V_AFTER},
    ),
    Case("iql", "Q and V held still", {"critic_lr": STILL, "expectile": 0.75}),
    Case(
        "cql",
        "as it is; ours draws the next action, and is given no noise there: d3rlpy takes the mean",
        differs={"actor loss": ALPHA_AFTER, "policy": ALPHA_AFTER, "step of critics": HALF, "target critics": HALF},
        critic_factor=2.0,
    ),
    Case(
        "cql",
        "entropy in the target, temperature held still, d3rlpy's critics with 2e-8 in Adam",
        {"backup_entropy": True, "alpha_lr": 0.0, "initial_alpha": 0.2},
        critic_factor=2.0,
        critic_eps=2e-8,
    ),
]
LOSSES = {
    "bc": {"actor loss": ("actor_loss", "loss")},
    "td3-bc": {"critic loss": ("critic_loss", "critic_loss"), "actor loss": ("actor_loss", "actor_loss")},
    "rebrac": {"critic loss": ("critic_loss", "critic_loss"), "actor loss": ("actor_loss", "actor_loss")},
    "iql": {
        "critic loss": ("critic_loss", "q_loss"),
        "value loss": ("value_loss", "v_loss"),
        "actor loss": ("actor_loss", "actor_loss"),
    },
    "cql": {"critic loss": ("critic_loss", "critic_loss"), "actor loss": ("actor_loss", "actor_loss")},
}
"""Row of the table: our metric, and d3rlpy's."""


def make_config(case: Case) -> Config:
    """All numbers of our agent."""
    plain = {"normalize_obs": False, "execution": "eager", "precision": "float32", "batch_size": ROWS}
    return find_algorithm(case.algo).load_config_class().from_dict(plain | case.agent)


def theirs(case: Case, dtype: str, folder: Path) -> Record:
    """d3rlpy's update."""
    out = folder / "update.npz"
    command = [str(python_of("d3rlpy")), str(HERE / "peers" / "parity.py"), "--algo", case.algo, "--dtype", dtype]
    command += [
        "--agent",
        json.dumps(make_config(case).to_dict()),
        "--rows",
        str(ROWS),
        "--seed",
        "0",
        "--out",
        str(out),
    ]
    command += ["--critic-eps", str(case.critic_eps)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"d3rlpy failed:\n{run.stderr[-3000:]}")
    with np.load(out) as file:
        return dict(file)


def network(record: Record, kind: str, module: str) -> list[np.ndarray[Any, Any]]:
    """Weights and biases of a network of d3rlpy's in the order of its layers; two heads side by side as one."""
    names = [name.removeprefix(f"{kind}/{module}.") for name in record if name.startswith(f"{kind}/{module}.")]
    layers = sorted({int(name.split(".")[2]) for name in names if name.startswith("_encoder._layers.")})
    parts = [f"_encoder._layers.{layer}" for layer in layers]
    out = [record[f"{kind}/{module}.{part}.{what}"] for part in parts for what in ("weight", "bias")]
    heads = [head for head in ("_fc", "_mu", "_logstd") if f"{head}.weight" in names]
    return out + [
        np.concatenate([record[f"{kind}/{module}.{head}.{what}"] for head in heads]) for what in ("weight", "bias")
    ]


def ensemble(record: Record, kind: str, module: str) -> list[np.ndarray[Any, Any]]:
    """d3rlpy's critics as ours stack them: weights (K, in, out), the others (K, 1, out)."""
    members = sorted({name.split("/")[1].split(".")[1] for name in record if name.startswith(f"{kind}/{module}.")})
    networks = [network(record, kind, f"{module}.{member}") for member in members]
    return [np.stack([p.T if p.ndim == 2 else p[None] for p in layer]) for layer in zip(*networks, strict=True)]


def log_std(record: Record, kind: str, bounds: Sequence[float]) -> list[np.ndarray[Any, Any]]:
    """What of d3rlpy's is IQL's log standard deviation: low + (high - low) sigmoid(p), of a learned p."""
    low, high = bounds
    share = 1 / (1 + np.exp(-record["before/policy._logstd"][0]))
    slope = (high - low) * share * (1 - share)
    if kind == "gradient":
        return [record["gradient/policy._logstd"][0] / slope]
    moved = record[f"{kind}/policy._logstd"][0] - record["before/policy._logstd"][0]
    return [low + (high - low) * share + moved]  # a step of the same length there


@dataclass
class Pair:
    """A network of ours, and the same of d3rlpy's by stage: `before`, `after`, `gradient`."""

    name: str
    ours: list[Tensor]
    theirs: dict[str, list[np.ndarray[Any, Any]]]
    optimizer: Any = None
    """None: a target, which follows."""
    factor: float = 1.0

    @property
    def gradient(self) -> list[Tensor]:
        """Of our first step, from Adam's first moment."""
        places = {id(parameter): i for i, parameter in enumerate(self.optimizer.parameters)}
        return [self.optimizer.first[places[id(parameter)]] / 0.1 for parameter in self.ours]


def pairs_of(case: Case, agent: Any, record: Record) -> list[Pair]:
    """What of ours is what of d3rlpy's."""

    def pair(name: str, ours: nn.Module, read: Any, module: str, optimizer: Any = None, factor: float = 1.0) -> Pair:
        stages = ("before", "after") if optimizer is None else ("before", "after", "gradient")
        return Pair(name, list(ours.parameters()), {s: read(record, s, module) for s in stages}, optimizer, factor)

    if case.algo == "bc":
        return [pair("policy", agent.policy.trunk, network, "imitator", agent.optimizer)]
    out = [
        pair("critics", agent.critics, ensemble, "q_funcs", agent.critic_optimizer, case.critic_factor),
        pair("policy", agent.policy.trunk, network, "policy", agent.actor_optimizer),
        pair("target critics", agent.target_critics, ensemble, "targ_q_funcs"),
    ]
    if case.algo in ("td3-bc", "rebrac"):
        out.append(pair("target policy", agent.target_policy.trunk, network, "targ_policy"))
    if case.algo == "iql":
        out.append(pair("value", agent.value.trunk, network, "value_func", agent.value_optimizer))
        stages = {
            stage: log_std(record, stage, agent.config.log_std_bounds) for stage in ("before", "after", "gradient")
        }
        out.append(Pair("log_std", [agent.policy.log_std], stages, agent.actor_optimizer))
    if case.algo == "cql":
        kinds = ("before", "after", "gradient") if "gradient/log_temp._parameter" in record else ("before", "after")
        stages = {kind: [record[f"{kind}/log_temp._parameter"][0, 0]] for kind in kinds}
        optimizer = agent.alpha_optimizer if "gradient" in stages else None
        out.append(Pair("temperature", [agent.log_alpha], stages, optimizer))
    return out


def draws_of(case: Case, record: Record) -> tuple[Tensor | None, ...]:
    """What our step takes after the batch, of the numbers that d3rlpy drew."""
    kept = [name for name in record if name.startswith("noise/")]
    drawn = [torch.from_numpy(record[name]) for name in sorted(kept, key=lambda n: int(n[6:].split("-")[0]))]
    if case.algo in ("bc", "iql"):
        return (None,)
    if case.algo in ("td3-bc", "rebrac"):
        return drawn[0], None
    *target, here, ahead, uniform, acted = drawn
    uniform = uniform.view(ROWS, len(here), -1).transpose(0, 1)  # (N, B, A)
    return torch.stack([acted, *(target or [torch.zeros_like(acted)])]), None, torch.stack([here, ahead]), uniform


def batch_of(record: Record, gamma: float, dtype: torch.dtype) -> Batch:
    """The batch, with our discount."""
    parts = {
        name.removeprefix("batch/"): torch.from_numpy(v) for name, v in record.items() if name.startswith("batch/")
    }
    parts = {name: value.to(dtype) for name, value in parts.items()}
    terminal = parts["terminal"].squeeze(-1)
    return Batch(
        obs=parts["obs"],
        action=parts["action"],
        reward=parts["reward"].squeeze(-1),
        discount=gamma * (1 - terminal),
        next_obs=parts["next_obs"],
        end=terminal.bool(),
        index=torch.arange(ROWS),
        extras={},
        next_extras={},
        next_action=parts["next_action"],
    )


def compare(case: Case, dtype: str, record: Record) -> list[list[str]]:
    """Our update, and rows of the table: what, ours, d3rlpy's, the difference, and whether it is as it should be."""
    torch.set_default_dtype(getattr(torch, dtype))
    config = make_config(case)
    settings = config.to_dict()
    space, box = gym.spaces.Box(-np.inf, np.inf, (17,)), gym.spaces.Box(-1, 1, (6,))
    agent_class = find_algorithm(case.algo).load_agent_class()
    agent = agent_class(space, box, config, encoder=lambda _: nn.Identity())  # ours would cast observations to float32
    pairs = pairs_of(case, agent, record)
    with torch.no_grad():
        for pair in pairs:
            for parameter, value in zip(pair.ours, pair.theirs["before"], strict=True):
                parameter.copy_(torch.as_tensor(value))
    before = [[parameter.detach().clone() for parameter in pair.ours] for pair in pairs]
    batch = batch_of(record, settings.get("gamma", 1.0), torch.get_default_dtype())
    metrics = agent.step(batch, *draws_of(case, record))

    rows, limits = [], LIMITS[dtype]
    for name, (mine, peer) in LOSSES[case.algo].items():
        factor = case.critic_factor if name == "critic loss" else 1.0
        a, b = factor * float(metrics[mine]), float(record[f"loss/{peer}"])
        off = abs(a - b) / max(abs(b), 1e-12)
        title = f"{name}, ours times {factor:g}" if factor != 1 else name
        rows.append([title, f"{a:.7g}", f"{b:.7g}", f"{off:.1e}", verdict(case, name, off, limits["loss"])])
    for pair, start in zip(pairs, before, strict=True):
        if "gradient" in pair.theirs:
            gradient = [pair.factor * g for g in pair.gradient]
            peers = [torch.as_tensor(value) for value in pair.theirs["gradient"]]
            off = apart(gradient, peers) / max(float(value.abs().max()) for value in peers)
            name = f"gradient of {pair.name}"
            title = f"{name}, ours times {pair.factor:g}" if pair.factor != 1 else name
            judged = verdict(case, name, off, limits["gradient"], pair.name)
            rows.append([title, f"{length(gradient):.6g}", f"{length(peers):.6g}", f"{off:.1e}", judged])
        size = step_size(pair, settings)
        if size <= STILL:
            continue
        step = [(p.detach() - s) / size for p, s in zip(pair.ours, start, strict=True)]
        peers = [(torch.as_tensor(v) - s) / size for v, s in zip(pair.theirs["after"], start, strict=True)]
        off, name = apart(step, peers), f"step of {pair.name}"
        judged = verdict(case, name, off, limits["step"], pair.name)
        rows.append([name, f"{length(step):.6g}", f"{length(peers):.6g}", f"{off:.1e}", judged])
    return rows


def step_size(pair: Pair, agent: Mapping[str, Any]) -> float:
    """What a step is measured in: Adam's step size, of a target the share of the way that it goes."""
    if pair.name.startswith("target"):
        return float(agent["tau"])
    if pair.name == "temperature":
        return float(agent["alpha_lr"])
    return float(agent["critic_lr" if pair.name in ("critics", "value") else "lr" if "lr" in agent else "actor_lr"])


def verdict(case: Case, row: str, off: float, limit: float, network: str = "") -> str:
    """What the last column says."""
    if reason := case.differs.get(row) or case.differs.get(network):
        return reason
    if math.isinf(limit):
        return "not judged"
    return "equal" if off <= limit else f"**NOT EQUAL** (limit {limit:.0e})"


def apart(ours: Sequence[Tensor], peers: Sequence[Tensor]) -> float:
    """The largest difference of a number."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, peers, strict=True))


def length(values: Sequence[Tensor]) -> float:
    """Euclidean, over all numbers."""
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))


def main() -> int:
    """Compare and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(case.algo for case in CASES))
    parser.add_argument("--algo", nargs="+", choices=names, default=names)
    parser.add_argument("--dtype", nargs="+", choices=tuple(LIMITS), default=list(LIMITS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for case in (case for case in CASES if case.algo in options.algo):
        for dtype in options.dtype:
            with tempfile.TemporaryDirectory() as folder:
                rows = compare(case, dtype, theirs(case, dtype, Path(folder)))
            print(f"\n{case.algo}, {dtype}: {case.what}\n")
            print("| | ours | d3rlpy | difference | |\n|---|---|---|---|---|")
            print("\n".join(f"| {' | '.join(row)} |" for row in rows))
            failed += sum("NOT EQUAL" in row[-1] for row in rows)
    print(f"\n{failed} of the numbers differ that should not" if failed else "\nall numbers agree that should")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
