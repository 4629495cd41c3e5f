"""One training of d3rlpy on a dataset of ours, in its own virtual environment: `bench_offline.py` starts it.

d3rlpy's `fit` with the hyper-parameters, networks and batch size of ours, on every transition of the dataset (the last
one before a time limit included); where d3rlpy cannot be told, it is as the library has it. Evaluations are episodes
with the policy's mode on an environment of their own, with the seeds that ctrlrl evaluates on; one thread.

`returns` writes the run as JSON to --out, whole after each evaluation; a run that is cut off starts anew. `speed`
trains in turns, as `gate.py` says. --config holds what our run has in its config.json.

What stays d3rlpy's: the first weights; of TD3+BC and ReBRAC that the first update improves the policy, and not the
second; of ReBRAC LayerNorm behind the ReLU, and a penalty also where an episode was cut, on the last action once more;
of IQL the policy's standard deviation, which begins at 0.22 and is a sigmoid's, and V in its advantage, which is the
one after its step; of CQL the next action in the target, which is the mean, the new temperature in the policy's loss,
and a loss of the critics twice ours. `scripts/parity_d3rlpy.py` shows that there is nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gate import Gate

ALGORITHMS = ("bc", "td3-bc", "rebrac", "iql", "cql")
"""What d3rlpy is trained by, in our words."""
FIRST_EVALUATION_SEED = 10_000
EPOCH = 10_000
"""Updates between two lines of d3rlpy's log: its default."""
ONLY: dict[str, dict[str, Any]] = {
    "bc": {"policy": "deterministic"},
    "iql": {"extraction": "awr", "learn": "both", "layer_norm": False, "log_std_bounds": [-5.0, 2.0]},
    "cql": {
        "action_gap": None,
        "lowest_gap": None,
        "calibrate": False,
        "subset": None,
        "target_entropy": None,
        "log_std_bounds": [-20.0, 2.0],
    },
}
"""Settings of ours that d3rlpy knows one value of."""
Array = np.ndarray[Any, Any]
EPISODE = np.dtype([("length", "<i8"), ("terminated", "?"), ("truncated", "?"), ("pad", "V6"), ("return", "<f8")])


@dataclass(frozen=True)
class Data:
    """What there is to learn from."""

    rows: Rows
    low: Array
    """(A,) the actions' bounds."""
    high: Array
    mean: Array
    """(obs,) of all observations, each counted once."""
    std: Array
    """With ours' 1e-8 in the variance; what is not d3rlpy's is that it bounds no observation at ten of them."""

    @property
    def unit_actions(self) -> Array:
        """(n, A) in [-1, 1]"""
        return ((self.rows.actions - (self.low + self.high) / 2) / ((self.high - self.low) / 2)).astype(np.float32)


@dataclass(frozen=True)
class Rows:
    """Steps one after the other, as d3rlpy takes them.

    An episode that was cut off has one row more, whose observation is what followed its last action: else d3rlpy, which
    takes an observation's successor from the next row, would lose that transition. Its action is the last one once
    more, as ours has it where a next action is asked for.
    """

    observations: Array
    """(n, ...) float32"""
    actions: Array
    """(n, A) float32"""
    rewards: Array
    """(n,) float32"""
    terminals: Array
    """(n,) whether the task ended with this step."""
    timeouts: Array
    """(n,) the added rows."""


def read(folder: Path, sampling: dict[str, Any]) -> Data:
    """A dataset as `ctrlrl/data/store.py` lays it out, with rewards scaled as `sampling` says, which is ours."""
    for key, value in (("temperature", None), ("n_step", 1)):
        if sampling[key] != value:
            raise SystemExit(f"d3rlpy is run with sampling.{key} {value} alone, and this is {sampling[key]}")
    manifest = json.loads((folder / "dataset.json").read_text())
    seen, acted = manifest["observation_space"], manifest["action_space"]
    if manifest["format"] != 1:
        raise SystemExit(f"{folder} has format {manifest['format']}; this script reads format 1")
    if any(space["type"] != "Box" or len(space["shape"]) != 1 for space in (seen, acted)):
        raise SystemExit(f"{folder}: d3rlpy is trained on vectors of numbers only; this has {seen} and {acted}")
    transitions, episodes = manifest["transitions"], manifest["episodes"]

    def column(name: str, dtype: str, rows: int, *shape: int) -> Array:
        stored = np.dtype(dtype).newbyteorder("<")
        return np.fromfile(folder / "columns" / f"{name}.bin", stored, rows * int(np.prod(shape))).reshape(rows, *shape)

    table = np.fromfile(folder / "episodes.bin", EPISODE, episodes)
    observation = column("observation", seen["dtype"], transitions + episodes, *seen["shape"])
    rows = rows_of(
        observation,
        column("action", acted["dtype"], transitions, *acted["shape"]),
        scaled(column("reward", "float32", transitions), table["return"], sampling),
        table["length"],
        table["terminated"],
    )
    low, high = (np.broadcast_to(np.asarray(acted[key], np.float64), acted["shape"]) for key in ("low", "high"))
    variance = observation.var(0, dtype=np.float64)
    return Data(rows, low, high, observation.mean(0, dtype=np.float64), np.sqrt(variance + 1e-8))


def scaled(reward: Array, returns: Array, sampling: dict[str, Any]) -> Array:
    """Rewards (N,) of episodes with `returns` (E,), as `sampling` scales them."""
    scale = sampling["reward_scale"]
    if sampling["return_range"] is not None:
        scale *= sampling["return_range"] / (returns.max() - returns.min())
    return ((reward + sampling["reward_shift"]) * scale).astype(np.float32)


def rows_of(observation: Array, action: Array, reward: Array, lengths: Array, terminated: Array) -> Rows:
    """Of observations (N + E, ...), actions (N, A) and rewards (N,) of episodes with `lengths` (E,)."""
    last = np.cumsum(lengths + 1) - 1  # (E,) the row of what followed the last action
    transition = np.arange(len(observation)) - np.repeat(np.arange(len(lengths)), lengths + 1)
    transition[last] -= 1
    after, ended = np.zeros((2, len(observation)), bool)
    after[last] = True
    ended[last[terminated] - 1] = True
    keep = np.ones(len(observation), bool)
    keep[last[terminated]] = False
    return Rows(
        observations=observation[keep].astype(np.float32),
        actions=action[transition[keep]].astype(np.float32),
        rewards=np.where(after, 0, reward[transition])[keep].astype(np.float32),
        terminals=ended[keep],
        timeouts=after[keep],
    )


def make_dataset(data: Data) -> Any:
    """d3rlpy's dataset, actions in [-1, 1]."""
    import d3rlpy

    return d3rlpy.dataset.MDPDataset(
        data.rows.observations,
        data.unit_actions,
        data.rows.rewards,
        data.rows.terminals,
        data.rows.timeouts,
        action_space=d3rlpy.constants.ActionSpace.CONTINUOUS,
    )


def require_known(algo: str, agent: dict[str, Any]) -> None:
    """End the process where ours has a setting that d3rlpy does not know."""
    for key, value in ONLY.get(algo, {}).items():
        if agent[key] != value:
            raise SystemExit(f"d3rlpy has no {algo} with {key} {agent[key]!r}, only with {value!r}")


def make_algorithm(algo: str, agent: dict[str, Any], *, mean: Array, std: Array) -> Any:
    """d3rlpy's `algo` with the numbers of ours; `mean` and `std` (obs,) are what it standardizes observations by, where
    ours does that."""
    import d3rlpy
    from d3rlpy.models.encoders import VectorEncoderFactory
    from d3rlpy.optimizers import AdamFactory
    from d3rlpy.optimizers.lr_schedulers import CosineAnnealingLRFactory
    from d3rlpy.preprocessing import StandardObservationScaler

    require_known(algo, agent)
    plain = VectorEncoderFactory(hidden_units=list(agent["hidden"]))
    settings: dict[str, Any] = {"batch_size": agent["batch_size"]}
    if agent["normalize_obs"]:
        settings["observation_scaler"] = StandardObservationScaler(mean=mean, std=std, eps=0.0)
    if algo == "bc":
        settings |= {"learning_rate": agent["lr"], "encoder_factory": plain}
        return d3rlpy.algos.BCConfig(policy_type="deterministic", **settings).create(device="cpu:0")
    settings |= {
        "gamma": agent["gamma"],
        "tau": agent["tau"],
        "n_critics": agent["num_critics"],
        "actor_learning_rate": agent["actor_lr"],
        "critic_learning_rate": agent["critic_lr"],
        "actor_encoder_factory": plain,
        "critic_encoder_factory": VectorEncoderFactory(
            hidden_units=list(agent["hidden"]), use_layer_norm=agent["layer_norm"]
        ),
    }
    if algo in ("td3-bc", "rebrac"):
        settings |= {
            "update_actor_interval": agent["policy_delay"],
            "target_smoothing_sigma": agent["target_noise"],
            "target_smoothing_clip": agent["target_noise_clip"],
        }
    if algo == "td3-bc":
        config = d3rlpy.algos.TD3PlusBCConfig(alpha=agent["alpha"], **settings)
    elif algo == "rebrac":
        config = d3rlpy.algos.ReBRACConfig(actor_beta=agent["actor_bc"], critic_beta=agent["critic_bc"], **settings)
    elif algo == "iql":
        if steps := agent["actor_lr_steps"]:
            falling = CosineAnnealingLRFactory(T_max=steps)
            settings["actor_optim_factory"] = AdamFactory(lr_scheduler_factory=falling)
        config = d3rlpy.algos.IQLConfig(
            expectile=agent["expectile"],
            weight_temp=agent["beta"],
            max_weight=agent["max_weight"],
            value_encoder_factory=plain,
            **settings,
        )
    else:
        config = d3rlpy.algos.CQLConfig(
            temp_learning_rate=agent["alpha_lr"],
            initial_temperature=agent["initial_alpha"],
            alpha_learning_rate=0.0,  # no multiplier is learned: the weight stays
            alpha_threshold=0.0,
            conservative_weight=agent["conservative_weight"],
            n_action_samples=agent["sampled_actions"],
            soft_q_backup=agent["backup_entropy"],
            max_q_backup=agent["max_target_backup"],
            **settings,
        )
    return config.create(device="cpu:0")


class Evaluations:
    """Deterministic episodes, and the file that holds their returns."""

    def __init__(self, run: dict[str, Any], env: Any, data: Data, out: Path) -> None:
        self.run, self.env, self.out = run, env, out
        self.center, self.half_range = (data.low + data.high) / 2, (data.high - data.low) / 2

    def evaluate(self, algo: Any, step: int) -> None:
        """Evaluate after `step` updates, and bring the file up to date."""
        returns = [self._episode(algo, FIRST_EVALUATION_SEED + i) for i in range(self.run["eval_episodes"])]
        mean = float(np.mean(returns))
        self.run["evals"].append({"step": step, "mean": mean, "returns": np.round(returns, 4).tolist()})
        print(f"update {step:,}: evaluation return {mean:,.1f}", flush=True)
        self.write()

    def _episode(self, algo: Any, seed: int) -> float:
        obs, _ = self.env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            unit = algo.predict(np.asarray(obs, np.float32)[None])[0]
            action = (self.center + self.half_range * unit).astype(self.env.action_space.dtype)
            obs, reward, terminated, truncated, _ = self.env.step(action)
            total, over = total + float(reward), terminated or truncated
        return total

    def write(self) -> None:
        """Replace the file in one step."""
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.run, indent=1) + "\n")
        os.replace(temporary, self.out)


def returns(options: argparse.Namespace) -> None:
    """Train, evaluate and write."""
    import d3rlpy
    import gymnasium as gym

    data = read(options.data, options.config["sampling"])
    names = ("d3rlpy", "gymnasium", "mujoco", "numpy", "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    run = {
        "library": f"d3rlpy {versions['d3rlpy']}",
        "algo": options.algo.upper(),
        "env": options.env,
        "seed": options.seed,
        "steps": options.updates,
        "eval_every": options.eval_every,
        "eval_episodes": options.eval_episodes,
        "data": json.loads((options.data / "dataset.json").read_text())["content_hash"],
        "settings": {key: options.config[key] for key in ("agent", "sampling")},
        "complete": False,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": versions,
        "evals": [],
    }
    env = gym.make(options.env, **options.config["env_kwargs"])
    evaluations = Evaluations(run, env, data, options.out)
    evaluations.write()
    d3rlpy.seed(options.seed)
    algo = make_algorithm(options.algo, options.config["agent"], mean=data.mean, std=data.std)
    for epoch, _ in algo.fitter(
        make_dataset(data), n_steps=options.updates, n_steps_per_epoch=options.eval_every, **quietly()
    ):
        evaluations.evaluate(algo, epoch * options.eval_every)
    run["complete"] = True
    evaluations.write()


def speed(options: argparse.Namespace) -> None:
    """Train until the gate ends the process."""
    import d3rlpy

    output, sys.stdout = sys.stdout, sys.stderr  # d3rlpy's log must not come between the gate's lines
    data = read(options.data, options.config["sampling"])
    d3rlpy.seed(0)
    dataset = make_dataset(data)
    sample, sampling = dataset.sample_transition_batch, 0.0

    def timed(batch_size: int) -> Any:
        nonlocal sampling
        begun = time.perf_counter()
        batch = sample(batch_size)
        sampling += time.perf_counter() - begun
        return batch

    class Sampled(Gate):
        """Tells the time that sampling took, too."""

        before = 0.0

        def _write(self, record: dict[str, float]) -> None:
            print(json.dumps(record | {"sampling": sampling - self.before}), file=output, flush=True)
            self.before = sampling

    dataset.sample_transition_batch = timed
    gate = Sampled(options.segment)
    make_algorithm(options.algo, options.config["agent"], mean=data.mean, std=data.std).fit(
        dataset,
        n_steps=10**9,
        n_steps_per_epoch=EPOCH,
        callback=lambda _, __, step: gate(step, step),
        **quietly(),
    )


def quietly() -> dict[str, Any]:
    """Arguments of `fit`, for nothing on the console and on the disk."""
    import d3rlpy

    adapter = d3rlpy.logging.NoopAdapterFactory()
    return {"show_progress": False, "logger_adapter": adapter, "save_interval": 10**9}


def main() -> None:
    """Do what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("returns", "speed"))
    parser.add_argument("--algo", choices=ALGORITHMS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a dataset of ours")
    parser.add_argument("--config", type=json.loads, required=True, help="of our training, as JSON")
    parser.add_argument("--env", help="returns: what to evaluate on")
    for name in ("seed", "updates", "eval-every", "eval-episodes"):
        parser.add_argument(f"--{name}", type=int, help="returns")
    parser.add_argument("--out", type=Path, help="returns: the file")
    parser.add_argument("--segment", type=int, help="speed: updates of a turn")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    (returns if options.what == "returns" else speed)(options)


if __name__ == "__main__":
    main()
