#!/usr/bin/env python3
"""Offline algorithms, datasets and their import: how quick they are, and what they learn, beside d3rlpy.

    python scripts/bench_offline.py speed                        # updates, sampling, import, a store of 10 million
    python scripts/bench_offline.py speed --parts updates --algo td3-bc iql cql --data DIR
    python scripts/bench_offline.py returns --algo iql --data DIR... --seeds 0 1 2 --updates 100000 --out runs/offline

(with the interpreter of .venv; d3rlpy gets a virtual environment of its own at the first run)

`speed` makes what it needs: datasets of made-up numbers in HalfCheetah's sizes. Updates: every training has its own
process and no preset, on the same dataset, with batches of 256; all are warmed up first; then, round by round, each
trains for a turn while the others wait. A ratio is the median over the rounds of the ratios within a round; both sides
count with their better number of threads. Ours appears in each of --ways, EXECUTION/PRECISION of its updates, the first
of which is what `ctrlrl train` does by itself in trainings of 50,000 updates and more on a machine like this one.
d3rlpy trains by its `fit`. The share of sampling is that of the time in which a training is in its sampler. Import:
`ctrlrl data import` of a file in D4RL's layout, beside reading and copying that file, each from the disk and not from
its cache.

`returns`: each cell is a training of one seed on one dataset, ours by `ctrlrl train` in OUT/DATASET/ALGO-DATASET-SEED,
the peer's by peers/offline.py with the same hyper-parameters in OUT/DATASET/d3rlpy-ALGO-DATASET-SEED.json, one thread
each. Flags after `--` go to `ctrlrl train`, and what they change is told to d3rlpy too. The same command again goes on.
At the end, and with --only-report at any time, OUT gets the comparison: comparison.html, returns.svg and returns.md;
and OUT/DATASET the returns of both, returns.json and returns-d3rlpy.json, which bench_returns.py takes for --peers.

Exit codes: 0 done, 1 some cells failed, 2 bad input (nothing was started), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # where ctrlrl is not installed

import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
from bench_returns import cores, own_results, peer_results, write_results  # noqa: E402
from cells import Cell, Interrupted, OwnCell, PeerCell, Scheduler  # noqa: E402
from peers.gate import Gate  # noqa: E402
from peers.venv import python_of  # noqa: E402

from ctrlrl.algorithms.registry import train_config_class  # noqa: E402
from ctrlrl.cli.train import describe_preset  # noqa: E402
from ctrlrl.data.importers.base import need  # noqa: E402
from ctrlrl.data.store import Dataset, DatasetWriter, Episode  # noqa: E402
from ctrlrl.errors import CtrlrlError, UsageError  # noqa: E402
from ctrlrl.runs.comparison import (  # noqa: E402
    Comparison,
    compare,
    console_summary,
    write_comparison,
    write_picture,
    write_table,
)
from ctrlrl.runs.verdict import judge  # noqa: E402

PEER = "d3rlpy"
ALGORITHMS = ("bc", "td3-bc", "rebrac", "iql", "cql")
"""What the peer has, by our names."""
GOALS = {"td3-bc": 2.5, "iql": 2.5, "cql": 2.0}
"""How many times the peer's updates per second ours is to make, batch 256, two cores."""
SAMPLING_GOAL = 0.05
WAYS = ("compiled/bfloat16", "compiled/float32", "eager/float32")
TURNS = {"bc": (400, 1200), "td3-bc": (300, 900), "rebrac": (200, 600), "iql": (200, 600), "cql": (30, 90)}
"""Updates of a turn, the peer's and ours: one to five seconds on two cores."""
AGENT = {"batch_size": 256}
"""What is not the default of our agents, where speeds are compared."""
OBS, ACT, LENGTH = 17, 6, 1000
"""HalfCheetah's."""
Results = dict[str, Any]


# ---- Made-up data ----------------------------------------------------------------------------------------------------


def make_store(path: Path, transitions: int) -> None:
    """A dataset of made-up numbers; every third episode ends its task."""
    draws = np.random.default_rng(0)
    spaces = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32),
        "action_space": gym.spaces.Box(-1, 1, (ACT,), np.float32),
    }
    with DatasetWriter.create(path, **spaces, env="HalfCheetah-v5") as writer:  # type: ignore[arg-type]
        for i in range(transitions // LENGTH):
            writer.add(
                Episode(
                    observation=draws.standard_normal((LENGTH + 1, OBS), np.float32),
                    action=draws.random((LENGTH, ACT), np.float32) * 2 - 1,
                    reward=draws.standard_normal(LENGTH, np.float32),
                    terminated=i % 3 == 0,
                    truncated=i % 3 != 0,
                )
            )


def make_d4rl(path: Path, transitions: int, *, compression: str | None) -> None:
    """A file of made-up numbers in D4RL's layout: its keys and dtypes."""
    h5py = need("h5py")
    draws = np.random.default_rng(0)
    seen = draws.standard_normal((transitions + 1, OBS), np.float32)
    columns = {
        "observations": seen[:-1],
        "next_observations": seen[1:],
        "actions": draws.random((transitions, ACT), np.float32) * 2 - 1,
        "rewards": draws.standard_normal(transitions, np.float32),
        "terminals": np.zeros(transitions, bool),
        "timeouts": np.arange(transitions) % LENGTH == LENGTH - 1,
        "infos/action_log_probs": draws.standard_normal(transitions, np.float32),
        "infos/qpos": draws.standard_normal((transitions, 9)),
        "infos/qvel": draws.standard_normal((transitions, 9)),
    }
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file.create_dataset(name, data=values, compression=compression)


# ---- Speed of updates ------------------------------------------------------------------------------------------------


class Worker:
    """A training in a process of its own, which waits for its turn."""

    def __init__(self, name: str, algo: str, threads: int, command: Sequence[str]) -> None:
        self.name, self.algo, self.threads = name, algo, threads
        allowed = set(sorted(os.sched_getaffinity(0))[:threads])
        begun = time.perf_counter()
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the process fails
        self.process = subprocess.Popen(
            [*command, "--algo", algo, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )
        self.read()  # that it is warm
        self.warm_up_s = time.perf_counter() - begun
        self.turns: list[dict[str, float]] = []

    def read(self) -> dict[str, float]:
        """The next record; ends everything with the process's own words if it has failed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise SystemExit(f"{self.name}, {self.algo} failed:\n{self.log.read()[-3000:]}")
        record: dict[str, float] = json.loads(line)
        return record

    def go(self) -> None:
        """One turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.turns.append(self.read())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    @property
    def rates(self) -> list[float]:
        """Updates per second, turn by turn."""
        return [turn["updates"] / turn["seconds"] for turn in self.turns]

    @property
    def sampling(self) -> float:
        """The share of the time that went into sampling."""
        return sum(turn["sampling"] for turn in self.turns) / sum(turn["seconds"] for turn in self.turns)


def settings_of(algo: str, data: Path) -> dict[str, Any]:
    """The whole configuration of our training, as its config.json has it."""
    config = train_config_class(algo).from_dict({"data": str(data), "agent": AGENT})
    return config.to_dict()


def train_ours(options: argparse.Namespace) -> None:
    """The loop of `ctrlrl train` until the gate ends the process."""
    import ctrlrl

    class Sampled(Gate):
        """Tells the time that sampling took, too."""

        spent = before = 0.0

        def _write(self, record: dict[str, float]) -> None:
            super()._write(record | {"sampling": self.spent - self.before})
            self.before = self.spent

    gate = Sampled(options.segment)

    class Gated(ctrlrl.Callback):
        def on_start(self, loop: Any) -> None:
            sample = loop.memory.sample

            def timed(*arguments: Any, **more: Any) -> Any:
                begun = time.perf_counter()
                batch = sample(*arguments, **more)
                gate.spent += time.perf_counter() - begun
                return batch

            loop.memory.sample = timed

        def on_step(self, loop: Any) -> None:
            gate(loop.updates, loop.updates)

    execution, precision = options.way.split("/")
    with tempfile.TemporaryDirectory() as folder:
        ctrlrl.train(
            options.algo,
            preset=False,
            quiet=True,
            callbacks=[Gated()],
            data=str(options.data),
            updates=10**8,
            threads=options.threads,
            device="cpu",
            eval_every=0,
            checkpoint_every=10**8,
            out=f"{folder}/run",
            agent=AGENT | {"execution": execution, "precision": precision},
        )


def measure_updates(options: argparse.Namespace, data: Path) -> Results:
    """Updates per second, algorithm by algorithm."""
    out: Results = {}
    for algo in options.algo:
        theirs, ours = TURNS[algo]
        workers = []
        for threads in options.threads:
            for way in options.ways:
                print(f"warming up {algo}, {way}, {threads} threads", file=sys.stderr)
                command = [sys.executable, str(Path(__file__).resolve()), "worker", "--data", str(data), "--way", way]
                workers.append(Worker(f"ctrlrl {way}", algo, threads, [*command, "--segment", str(ours)]))
            if not options.no_peer:
                print(f"warming up {algo}, {PEER}, {threads} threads", file=sys.stderr)
                command = [str(python_of(PEER)), str(HERE / "peers" / "offline.py"), "speed", "--data", str(data)]
                command += ["--config", json.dumps(settings_of(algo, data)), "--segment", str(theirs)]
                workers.append(Worker(PEER, algo, threads, command))
        for i in range(options.rounds):
            for j in range(len(workers)):
                workers[(i + j) % len(workers)].go()  # another one first each time
        for worker in workers:
            worker.close()
        out[algo] = summary(workers)
        print(updates_table(algo, out[algo]), flush=True)
    return out


def summary(workers: Sequence[Worker]) -> Results:
    """What was measured of one algorithm."""
    rows = [
        {
            "name": worker.name,
            "threads": worker.threads,
            "updates_per_s": statistics.median(worker.rates),
            "range": [min(worker.rates), max(worker.rates)],
            "sampling": worker.sampling,
            "peak_mib": worker.turns[-1]["peak_mib"],
            "warm_up_s": worker.warm_up_s,
        }
        for worker in workers
    ]
    best: dict[str, Worker] = {}
    for worker in workers:
        former = best.get(worker.name)
        if former is None or statistics.median(worker.rates) > statistics.median(former.rates):
            best[worker.name] = worker
    ratios = {}
    if peer := best.pop(PEER, None):
        for name, worker in best.items():
            pairs = [a / b for a, b in zip(worker.rates, peer.rates, strict=True)]
            ratios[name] = {"median": statistics.median(pairs), "range": [min(pairs), max(pairs)]}
    return {"rows": rows, "to_peer": ratios}


def updates_table(algo: str, result: Results) -> str:
    """One algorithm as Markdown."""
    lines = [f"\n{algo}, batch 256\n", "| | threads | updates/s (range) | sampling | peak memory | warm-up |"]
    lines.append("|---|---|---|---|---|---|")
    for row in result["rows"]:
        low, high = row["range"]
        lines.append(
            f"| {row['name']} | {row['threads']} | {row['updates_per_s']:.0f} ({low:.0f} to {high:.0f}) "
            f"| {row['sampling']:.1%} | {row['peak_mib']:.0f} MiB | {row['warm_up_s']:.1f} s |"
        )
    lines.append("")
    for i, (name, ratio) in enumerate(result["to_peer"].items()):
        low, high = ratio["range"]
        goal = f"; the goal is {GOALS.get(algo)}: {'' if ratio['median'] >= GOALS.get(algo, 0) else 'NOT '}reached"
        lines.append(
            f"{name}: {ratio['median']:.2f} ({low:.2f} to {high:.2f}) times {PEER}, "
            f"each with its better number of threads{goal if algo in GOALS and i == 0 else ''}"
        )
    share = result["rows"][0]["sampling"]
    lines.append(
        f"sampling takes {share:.1%} of {result['rows'][0]['name']} with {result['rows'][0]['threads']} thread(s); the "
        f"goal is below {SAMPLING_GOAL:.0%}: {'reached' if share < SAMPLING_GOAL else 'NOT reached'}"
    )
    return "\n".join(lines)


# ---- Import and store ------------------------------------------------------------------------------------------------


def measure_import(options: argparse.Namespace, folder: Path) -> list[Results]:
    """Seconds to import a file in D4RL's layout, beside reading and copying it; compressed, as D4RL's are, and not."""
    return [_import_of(options, folder, compression) for compression in ("gzip", None)]


def _import_of(options: argparse.Namespace, folder: Path, compression: str | None) -> Results:
    file, store, copy = folder / "made-up.hdf5", folder / "imported", folder / "copy.hdf5"
    print(f"writing a file of {options.import_transitions:,} transitions", file=sys.stderr)
    make_d4rl(file, options.import_transitions, compression=compression)
    command = [sys.executable, "-m", "ctrlrl", "data", "import", str(file), "--format", "d4rl", "--out", str(store)]

    def read() -> None:
        with open(file, "rb", buffering=0) as source:
            while source.read(2**20):
                pass

    def copied() -> None:
        with open(file, "rb") as source, open(copy, "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())

    def unpacked() -> None:
        with need("h5py").File(file) as source:
            for group in (source, source["infos"]):
                for item in group.values():
                    if hasattr(item, "dtype"):
                        item[()]

    def imported() -> None:
        shutil.rmtree(store, ignore_errors=True)
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"the import failed: {run.stderr[-3000:]}")

    def started() -> None:
        subprocess.run([sys.executable, "-c", "import ctrlrl.data.importers, h5py"], check=True)

    work = {"importing": imported, "starting": started, "unpacking": unpacked, "reading": read, "copying": copied}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, fn in work.items():
            forget(file)
            begun = time.perf_counter()
            fn()
            seconds[name].append(time.perf_counter() - begun)
    out = {
        "compression": compression,
        "transitions": options.import_transitions,
        "file_mib": file.stat().st_size / 2**20,
        "store_mib": sum(part.stat().st_size for part in store.rglob("*") if part.is_file()) / 2**20,
        "seconds": {name: {"median": statistics.median(s), "range": [min(s), max(s)]} for name, s in seconds.items()},
    }
    print(import_table(out), flush=True)
    return out


def forget(path: Path) -> None:
    """Have the next reader of a file wait for the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def import_table(result: Results) -> str:
    """The import as Markdown."""
    how = f"{result['compression'] or 'not'} compressed"
    lines = [
        f"\na file in D4RL's layout: {result['transitions']:,} transitions in {result['file_mib']:.0f} MiB, {how}; "
        f"the store made of it has {result['store_mib']:.0f} MiB\n",
        "| | seconds (range) | transitions/s | MiB of the file/s |",
        "|---|---|---|---|",
    ]
    names = {
        "importing": "`ctrlrl data import`",
        "starting": "of which Python and its packages",
        "unpacking": "reading its arrays by h5py",
        "reading": "reading the file",
        "copying": "copying it",
    }
    for name, title in names.items():
        middle, (low, high) = result["seconds"][name]["median"], result["seconds"][name]["range"]
        rates = [f"{result[what] / middle:,.0f}" for what in ("transitions", "file_mib")]
        if name == "starting":
            rates = ["", ""]
        lines.append(f"| {title} | {middle:.2f} ({low:.2f} to {high:.2f}) | {' | '.join(rates)} |")
    return "\n".join(lines)


def measure_store(options: argparse.Namespace, folder: Path) -> Results:
    """Opening a large dataset, and drawing batches of it, in processes of their own."""
    store = folder / "large"
    print(f"writing a dataset of {options.store_transitions:,} transitions", file=sys.stderr)
    begun = time.perf_counter()
    make_store(store, options.store_transitions)
    out: Results = {"transitions": options.store_transitions, "writing_s": time.perf_counter() - begun, "ways": {}}
    for way in ("as a training does", "mapped"):
        command = [sys.executable, str(Path(__file__).resolve()), "sampler", "--data", str(store), "--way", way]
        records = []
        for _ in range(options.rounds):
            run = subprocess.run([*command, "--threads", str(max(options.threads))], capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(f"sampling failed: {run.stderr[-3000:]}")
            records.append(json.loads(run.stdout))
        out["ways"][way] = {key: statistics.median(record[key] for record in records) for key in records[0]}
    print(store_table(out), flush=True)
    return out


def measure_sampler(options: argparse.Namespace) -> None:
    """Open --data, draw from it, and write what that took as JSON."""
    import torch

    from ctrlrl.replay.dataset import DatasetSampler
    from ctrlrl.training.loop import memory_of
    from ctrlrl.training.off_policy import groups_at_once

    torch.set_num_threads(options.threads)
    base = memory_mib()
    begun = time.perf_counter()
    dataset = Dataset.open(options.data)
    opening = time.perf_counter() - begun
    begun = time.perf_counter()
    mapped = {"resident": False} if options.way == "mapped" else {"memory": memory_of(torch.device("cpu"))}
    sampler = DatasetSampler(dataset, seed=0, **mapped)
    making = time.perf_counter() - begun
    groups = groups_at_once(dataset.observation_space, 256)
    rates = []
    for _ in range(4):  # the first warms up
        begun, batches = time.perf_counter(), 0
        while time.perf_counter() < begun + 0.5:
            sampler.sample(groups, 256, gamma=0.99)
            batches += groups
        rates.append(batches / (time.perf_counter() - begun))
    own, of_files = memory_mib()
    print(
        json.dumps(
            {
                "opening_ms": 1e3 * opening,
                "making_s": making,
                "resident": sampler.resident,
                "batches_per_s": statistics.median(rates[1:]),
                "own_mib": own - base[0],
                "mapped_mib": of_files - base[1],
            }
        )
    )


def memory_mib() -> tuple[float, float]:
    """What this process holds: of its own, and of files that are mapped, which the system can take back."""
    with open("/proc/self/status") as status:
        held = {key: value.split() for key, _, value in (line.partition(":") for line in status)}
    own, of_files = (int(held[key][0]) / 1024 for key in ("RssAnon", "RssFile"))
    return own, of_files


def store_table(result: Results) -> str:
    """The large store as Markdown."""
    lines = [
        f"\na dataset of {result['transitions']:,} transitions, written in {result['writing_s']:.1f} s\n",
        "| | opening | sampler | batches of 256/s | transitions/s | memory of its own | of mapped files |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, row in result["ways"].items():
        where = "in memory" if row["resident"] else "mapped"
        lines.append(
            f"| {way} ({where}) | {row['opening_ms']:.1f} ms | {row['making_s']:.2f} s | {row['batches_per_s']:,.0f} "
            f"| {256 * row['batches_per_s']:,.0f} | {row['own_mib']:.0f} MiB | {row['mapped_mib']:.0f} MiB |"
        )
    return "\n".join(lines)


def speed(options: argparse.Namespace) -> int:
    """Measure, print, write."""
    if max(options.threads) > cores():
        raise UsageError(f"--threads {max(options.threads)}: this machine has {cores()} cores")
    results: Results = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        if "updates" in options.parts:
            data = options.data
            if data is None:
                data = folder / "made-up"
                make_store(data, options.transitions)
            results["updates"] = measure_updates(options, data)
        if "import" in options.parts:
            results["import"] = measure_import(options, folder)
        if "store" in options.parts:
            results["store"] = measure_store(options, folder)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


# ---- Returns ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfflineCell(OwnCell):
    """A `ctrlrl train` on a dataset; `steps` are its updates."""

    data: Path

    @property
    def name(self) -> str:
        return f"{self.algo}-{self.data.name}-{self.seed}"

    @property
    def arguments(self) -> list[str]:
        own = ["--data", str(self.data), "--env", self.env, "--seed", str(self.seed), "--updates", str(self.steps)]
        return [self.algo, *own, "--threads", "1", "--no-video", "--out", str(self.path), *self.flags]


@dataclass(frozen=True)
class OfflinePeerCell(PeerCell):
    """A training of d3rlpy's on a dataset, with the hyper-parameters of `own`."""

    own: OfflineCell

    @property
    def name(self) -> str:
        return f"{PEER}-{self.own.name}"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What our run has in its config.json."""
        return self.own.resolved[0].to_dict()

    def command(self) -> list[str]:
        own = self.own
        options = {"algo": own.algo, "data": own.data, "config": json.dumps(self.settings), "env": own.env}
        options |= {"seed": own.seed, "updates": own.steps, "eval-every": self.eval_every}
        options |= {"eval-episodes": self.eval_episodes, "out": self.path}
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [str(python_of(PEER)), str(HERE / "peers" / "offline.py"), "returns", *flags]

    def require_same_settings(self) -> None:
        super().require_same_settings()
        record = self.record() or {}
        asked = {key: self.settings[key] for key in ("agent", "sampling")}
        if record.get("settings", asked) != asked:
            raise UsageError(f"{self.path} holds a run with other hyper-parameters; choose another --out")
        if record.get("data", content := Dataset.open(self.own.data).content_hash) != content:
            raise UsageError(f"{self.path} holds a run on other data than is in {self.own.data}; choose another --out")


def cells_of(options: argparse.Namespace, flags: Sequence[str]) -> list[tuple[OfflineCell, OfflinePeerCell]]:
    """Ours and the peer's for each seed and dataset, all datasets of a seed before the next seed.

    Raises:
        UsageError: a dataset that names no environment, flags that `ctrlrl train` does not take, or a folder that holds
            a run with other settings.
    """
    rhythm = ("--eval-every", str(options.eval_every), "--eval-episodes", str(options.eval_episodes))
    out = []
    for seed in options.seeds:
        for data in options.data:
            env = Dataset.open(data).env
            if env is None:
                raise UsageError(f"{data} names no environment to evaluate on; import it with --env")
            folder = options.out / data.name
            own = OfflineCell(options.algo, env, seed, options.updates, folder, (*rhythm, *flags), data)
            every = (options.eval_every, options.eval_episodes)
            out.append((own, OfflinePeerCell(options.algo, env, seed, options.updates, folder, PEER, *every, own)))
    for cell in (cell for pair in out for cell in pair):
        cell.require_same_settings()
    presets = {preset.name: preset for own, _ in out if (preset := own.resolved[1])}
    for preset in presets.values():
        print(describe_preset(preset).replace("; --no-preset", "; -- --no-preset"))
    return out


def side_by_side(own: Sequence[OfflineCell], protocol: str) -> Comparison | None:
    """Write the returns of each dataset, and compare ours with the peer's over all of them; None without runs of ours.

    In the comparison an environment is called by its name and that of the dataset.
    """
    parts: list[Comparison] = []
    envs, random = [], {}
    for cell in {cell.data: cell for cell in own}.values():
        folder = cell.out
        runs = sorted(file.parent for file in folder.glob("*/config.json"))
        if not runs:
            continue
        results = write_results(folder / "returns.json", own_results(folder), {cell.env: cell.env_options})
        peers = []
        if any(folder.glob(f"{PEER}-*.json")):
            peers.append(folder / f"returns-{PEER}.json")
            write_results(peers[0], peer_results(PEER, folder) | {"protocol": protocol}, {})
        part = compare(runs, peers=peers)
        name = f"{cell.env}, {cell.data.name}"
        envs += [replace(one, env=name) for one in part.envs]
        random[name] = np.array(results["random"].get(cell.env, {}).get("returns", []))
        parts.append(part)
    if not parts:
        return None
    return Comparison(
        runs=[run for part in parts for run in part.runs],
        envs=envs,
        verdicts=judge(envs, random),
        peers=[file for part in parts for file in part.peers],
        notes=[note for part in parts for note in part.notes],
    )


def returns(options: argparse.Namespace, flags: Sequence[str]) -> int:
    """Train what is not trained yet, and compare; returns the exit code."""
    pairs = cells_of(options, flags)
    cells: list[Cell] = [cell for pair in pairs for cell in (pair[:1] if options.no_peer else pair)]
    failed: list[tuple[Cell, str]] = []
    if not options.only_report:
        for cell in cells:
            cell.out.mkdir(parents=True, exist_ok=True)
        if not options.no_peer:
            python_of(PEER)  # now, and not while others wait
        scheduler = Scheduler(cells, options.jobs, options.out)
        try:
            scheduler.run()
        except Interrupted:
            print(f"interrupted; go on with the same command: {shlex.join([sys.executable, *sys.argv])}")
            return 130
        failed = scheduler.failed
    protocol = " ".join((HERE / "peers" / "offline.py").read_text().split('"""')[1].split("\n\n")[1].split())
    comparison = side_by_side([own for own, _ in pairs], protocol)
    if comparison is not None:
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


def parse_arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the script, and the flags after `--`."""
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True, metavar="{speed,returns}")

    quick = what.add_parser("speed", help="how quick")
    quick.add_argument(
        "--parts", nargs="+", choices=("updates", "import", "store"), default=["updates", "import", "store"]
    )
    quick.add_argument("--algo", nargs="+", choices=ALGORITHMS, default=list(GOALS))
    quick.add_argument("--data", type=Path, help="dataset to learn from (default: a made-up one)")
    quick.add_argument("--transitions", type=int, default=1_000_000, help="of the made-up one")
    quick.add_argument("--import-transitions", type=int, default=1_000_000)
    quick.add_argument("--store-transitions", type=int, default=10_000_000)
    quick.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="EXECUTION/PRECISION")
    quick.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, cores())}))
    quick.add_argument("--rounds", type=int, default=5)
    quick.add_argument("--no-peer", action="store_true", help="ours alone")
    quick.add_argument("--scratch", type=Path, help="where to make files (default: where temporary ones are)")
    quick.add_argument("--out", type=Path, help="write everything measured here, as JSON")

    good = what.add_parser("returns", help="what is learned")
    good.add_argument("--algo", choices=ALGORITHMS, required=True)
    good.add_argument("--data", nargs="+", type=Path, required=True, help="datasets, of different names")
    good.add_argument("--seeds", nargs="+", type=int, required=True)
    good.add_argument("--updates", type=int, default=100_000, help="of each run (default: 100,000)")
    good.add_argument("--eval-every", type=int, default=10_000, help="updates (default: 10,000)")
    good.add_argument("--eval-episodes", type=int, default=10, help="default: 10")
    good.add_argument("--jobs", type=int, default=cores(), help="runs at once (default: one per core)")
    good.add_argument("--no-peer", action="store_true", help="train ours alone")
    good.add_argument("--only-report", action="store_true", help="train nothing, report what there is")
    good.add_argument("--out", type=Path, required=True, help="folder of all runs")

    for name in ("worker", "sampler"):  # this script's own processes
        own = what.add_parser(name)
        own.add_argument("--algo")
        own.add_argument("--data", type=Path)
        own.add_argument("--way")
        own.add_argument("--threads", type=int)
        own.add_argument("--segment", type=int)
    options = parser.parse_args(words[:cut])
    flags = list(words[cut + 1 :])
    if options.what == "returns":
        options.data = [data.resolve() for data in options.data]
        options.seeds = list(dict.fromkeys(options.seeds))
        names = [data.name for data in options.data]
        if len(set(names)) < len(names):
            good.error(f"--data: the datasets are told apart by their names, and these are {', '.join(names)}")
        if options.jobs < 1:
            good.error(f"--jobs must be at least 1, got {options.jobs}")
        if options.updates % options.eval_every:
            good.error(f"--updates {options.updates} is no multiple of --eval-every {options.eval_every}")
        taken = [flag for flag in flags if flag.partition("=")[0].replace("_", "-") in OURS]
        if taken:
            good.error(f"{taken[0]} is this script's to give, not for after --")
    elif flags:
        parser.error(f"what follows -- is for returns, got {' '.join(flags)}")
    return options, flags


OURS = ("--env", "--data", "--seed", "--updates", "--out", "--threads", "--eval-every", "--eval-episodes", "--dry-run")


def main(words: Sequence[str]) -> int:
    """Run; returns the exit code."""
    options, flags = parse_arguments(words)
    if options.what == "worker":
        train_ours(options)
    elif options.what == "sampler":
        measure_sampler(options)
    elif options.what == "speed":
        return speed(options)
    else:
        return returns(options, flags)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CtrlrlError as error:
        print(f"bench_offline: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
