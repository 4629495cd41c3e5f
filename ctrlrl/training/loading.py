"""Using a run that is on disk: its policy, its returns, a video."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctrlrl.algorithms.registry import find_algorithm
from ctrlrl.config import TrainConfig
from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.vector import RenderFailure
from ctrlrl.errors import UsageError
from ctrlrl.nn.cpu import prepare_cpu
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.policy import Policy
from ctrlrl.runs.checkpoint import load_checkpoint
from ctrlrl.runs.files import write_errors_explained, write_json
from ctrlrl.runs.folder import RunFolder
from ctrlrl.runs.provenance import now
from ctrlrl.runs.report import write_report
from ctrlrl.runs.video import rendering_error, write_video
from ctrlrl.training.evaluation import Evaluation, evaluate, evaluation_seeds
from ctrlrl.training.setup import (
    EnvLike,
    eval_rows,
    given,
    make,
    pick_device,
    read_config,
    read_provenance,
    require_objects,
    step_of,
)

VIDEO_STEPS = 500
"""Steps of an episode that a video shows at most; rendering without a GPU takes tens of milliseconds each."""


@dataclass(frozen=True)
class Run:
    """A run on disk, with its policy in memory.

    Attributes:
        path: the run folder.
        config: the resolved configuration.
        policy: the policy of the checkpoint that was asked for.
    """

    path: Path
    config: TrainConfig
    policy: Policy

    @property
    def report(self) -> Path:
        """The report of this run."""
        return self.path / "report.html"


def load(
    run: str | Path | Run,
    *,
    checkpoint: str = "best",
    device: str = "cpu",
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
) -> Run:
    """Read a run and its policy back: `ctrlrl.load("runs/x").policy.act(obs)`.

    Args:
        run: the run folder.
        checkpoint: `best`, `last`, or a checkpoint folder's name; a run without evaluations has no `best`.
        device: where the policy's weights lie.
        network: as given to `train`.
        encoder: as given to `train`.

    Raises:
        UsageError: if there is no such run or checkpoint, it is damaged, or `network`/`encoder` are missing.
    """
    folder = RunFolder.open(run.path if isinstance(run, Run) else Path(run))
    algo, config = read_config(folder)
    provenance = read_provenance(folder)
    require_objects(provenance, network=network, encoder=encoder)
    where = pick_device(device)
    path = folder.find_checkpoint(checkpoint)
    spaces = provenance["environment"]["spaces"]
    agent = find_algorithm(algo).load_agent_class()(
        build_space(spaces["observation"]),
        build_space(spaces["action"]),
        config.agent,  # type: ignore[attr-defined]
        device=where,
        **given(network=network, encoder=encoder),
    )
    load_policy(agent.policy, path)
    return Run(folder.path, config, agent.policy.eval())


def load_policy(policy: Policy, checkpoint: Path) -> None:
    """Put the weights of `checkpoint` into `policy`.

    Raises:
        UsageError: if the checkpoint is damaged, or of another network.
    """
    state = load_checkpoint(checkpoint)
    try:
        policy.load_state_dict(state["agent"]["policy"])
    except RuntimeError as error:
        raise UsageError(f"the network is not the one of {checkpoint}: {' '.join(str(error).split())}") from None


def evaluate_run(
    run: str | Path | Run,
    *,
    checkpoint: str = "best",
    episodes: int | None = None,
    video: bool = False,
    env: EnvLike | None = None,
    device: str = "cpu",
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
) -> Evaluation:
    """Deterministic returns of a checkpoint on the fixed list of seeds; the record goes into `evaluations.jsonl`.

    With `video`, the first of the episodes is recorded under `videos/`.

    Raises:
        UsageError: as `load`; or if a video was asked for and the environment cannot be rendered here.
    """
    loaded = load(run, checkpoint=checkpoint, device=device, network=network, encoder=encoder)
    config, folder = loaded.config, RunFolder(loaded.path)
    if env is None and (own := read_provenance(folder)["custom"].keys() & {"env", "eval_env"}):
        raise UsageError(f"the run was trained from Python with an own {' and '.join(sorted(own))}; pass it: env=...")
    seeds = evaluation_seeds(episodes or config.eval_episodes)
    source = env if env is not None else config.env
    path = folder.find_checkpoint(checkpoint)
    prepare_cpu()
    vector = make(source, config, eval_rows(source, len(seeds)), "cpu")
    try:
        result = evaluate(vector, loaded.policy, seeds)
    finally:
        vector.close()
    record = {"date": now(), "kind": "eval", "step": step_of(path), "checkpoint": checkpoint, "seeds": result.seeds}
    record |= {"returns": result.returns, "lengths": result.lengths, "success": result.success, "mean": result.mean}
    record["figures"] = result.figures
    log = folder.path / "evaluations.jsonl"
    with write_errors_explained(log), open(log, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        cut_off = file.read(1) not in (b"", b"\n")  # by a full disk, say: the line before must not swallow this one
        file.write(b"\n" * cut_off + json.dumps(record).encode() + b"\n")
    if video:
        record_video(folder, loaded.policy, source, config, step=step_of(path), checkpoint=checkpoint)
    write_report(folder.path)
    return result


def record_video(
    folder: RunFolder, policy: Policy, source: EnvLike, config: TrainConfig, *, step: int, checkpoint: str
) -> Path:
    """Record the episode of the first evaluation seed, at most `VIDEO_STEPS` of it.

    Raises:
        UsageError: if the environment cannot be rendered here; names the packages that are missing.
    """
    frames: list[np.ndarray[Any, Any]] = []

    def film() -> None:
        if len(frames) < VIDEO_STEPS:
            frames.append(env.render())

    seed = evaluation_seeds(1)[0]
    try:
        env = make(source, config, 1, "cpu", render=True)
        try:
            fps = 1 / (env.control_dt or 1 / 30)
            result = evaluate(env, policy, [seed], before_step=film)
        finally:
            env.close()
    except RenderFailure as error:
        raise rendering_error(error.cause) from error
    path = folder.videos / f"{checkpoint}-{step:012d}.mp4"
    write_video(frames, path, fps)
    for old in folder.videos.glob(f"{checkpoint}-*"):
        if old.stem != path.stem:
            old.unlink()
    about = {"step": step, "checkpoint": checkpoint, "seed": seed, "return": result.mean, "fps": fps}
    write_json(path.with_suffix(".json"), {**about, "length": result.lengths[0], "frames": len(frames)})
    return path
