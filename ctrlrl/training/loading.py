"""Using a run that is on disk: its policy, its returns, a video."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctrlrl.algorithms.registry import find_algorithm
from ctrlrl.config import TrainConfig
from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.vector import RenderFailure, VectorEnv
from ctrlrl.envs.viewing import MAX_GRID, Grid
from ctrlrl.errors import UsageError
from ctrlrl.files import write_errors_explained, write_json
from ctrlrl.nn.cpu import prepare_cpu, products_of
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.nn.policy import Policy
from ctrlrl.runs.checkpoint import load_checkpoint
from ctrlrl.runs.folder import RunFolder
from ctrlrl.runs.provenance import now
from ctrlrl.runs.report import write_report
from ctrlrl.runs.video import Frame, rendering_error, write_video
from ctrlrl.training.base_policy import BaseLike, open_base, trusted_base
from ctrlrl.training.collector import require_finite
from ctrlrl.training.evaluation import Evaluation, evaluate, evaluation_seeds
from ctrlrl.training.setup import (
    EnvLike,
    eval_rows,
    given,
    make,
    networks_of,
    on_cpu,
    pick_device,
    read_config,
    read_provenance,
    require_objects,
    require_same_language,
    step_of,
    visible,
)
from ctrlrl.tree import Obs, obs_to

VIDEO_STEPS = 500
"""Steps of an episode that a video shows at most; rendering without a GPU takes tens of milliseconds each."""
GRID_SECONDS = 10
"""Simulated time that the video of a grid shows, for the same reason."""
GRID_FPS = 30
"""Pictures per simulated second of such a video, about: every so many control steps one."""


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
    base: BaseLike | None = None,
) -> Run:
    """Read a run and its policy back: `ctrlrl.load("runs/x").policy.act(obs)`.

    Args:
        run: the run folder.
        checkpoint: `best`, `last`, or a checkpoint folder's name; a run without evaluations has no `best`.
        device: where the policy's weights lie.
        network: as given to `train`.
        encoder: as given to `train`.
        base: as given to `train`, where that was an object, or MODULE:FUNCTION, which is imported only if named here.

    Raises:
        UsageError: if there is no such run or checkpoint, it is damaged, or `network`, `encoder` or `base` is missing.
    """
    folder = RunFolder.open(run.path if isinstance(run, Run) else Path(run))
    algo, config = read_config(folder)
    provenance = read_provenance(folder)
    require_objects(provenance, network=network, encoder=encoder, base=base)
    where = pick_device(device)
    path = folder.find_checkpoint(checkpoint)
    spaces = provenance["environment"]["spaces"]
    observation, action = build_space(spaces["observation"]), build_space(spaces["action"])
    source = trusted_base(base, folder, getattr(config, "base", None))
    agent = find_algorithm(algo).load_agent_class()(
        observation,
        action,
        config.agent,  # type: ignore[attr-defined]
        device=where,
        **given(network=networks_of(algo, config, network), encoder=encoder),
        **({} if source is None else {"base": open_base(source, observation, action)}),
    )
    require_same_language(config, agent.policy, provenance)
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
    sample: bool = False,
    video: bool = False,
    env: EnvLike | None = None,
    device: str = "cpu",
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
    base: BaseLike | None = None,
) -> Evaluation:
    """Deterministic returns of a checkpoint on the fixed list of seeds; the record goes into `evaluations.jsonl`.

    With `sample` the policy acts as it explores, with random numbers of a fixed seed. With `video`, the first of the
    episodes is recorded under `videos/`.

    Raises:
        UsageError: as `load`; or if a video was asked for and the environment cannot be rendered here.
    """
    loaded = load(run, checkpoint=checkpoint, device=device, network=network, encoder=encoder, base=base)
    config, folder = loaded.config, RunFolder(loaded.path)
    seeds = evaluation_seeds(episodes or config.eval_episodes)
    source = own_environment(loaded, env)
    path = folder.find_checkpoint(checkpoint)
    prepare_cpu()
    vector = make(source, on_cpu(config), eval_rows(source, len(seeds)), "cpu")
    try:
        loaded.policy.generator = torch.Generator(loaded.policy.device).manual_seed(0)
        result = evaluate(vector, loaded.policy, seeds, explore=sample)
    finally:
        if vector is not source:
            vector.close()
    name = f"{checkpoint}, sampled" if sample else checkpoint
    record = {"date": now(), "kind": "eval", "step": step_of(path), "checkpoint": name, "seeds": result.seeds}
    record |= {"returns": result.returns, "lengths": result.lengths, "success": result.success, "mean": result.mean}
    record["figures"] = result.figures
    if result.transcripts:
        record["transcripts"] = result.transcripts
    log = folder.path / "evaluations.jsonl"
    with write_errors_explained(log), open(log, "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        cut_off = file.read(1) not in (b"", b"\n")  # by a full disk, say: the line before must not swallow this one
        file.write(b"\n" * cut_off + json.dumps(record).encode() + b"\n")
    if video:
        record_video(folder, loaded.policy, source, config, step=step_of(path), checkpoint=checkpoint)
    write_report(folder.path)
    return result


def own_environment(run: Run, env: EnvLike | None) -> EnvLike:
    """`env`, or else what `run` was trained on.

    Raises:
        UsageError: if that was an object, which is not saved with the run.
    """
    if env is not None:
        return env
    if own := read_provenance(RunFolder(run.path))["custom"].keys() & {"env", "eval_env"}:
        raise UsageError(f"the run was trained from Python with an own {' and '.join(sorted(own))}; pass it: env=...")
    return run.config.env


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
        env = make(source, on_cpu(config), 1, "cpu", render=True)
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


def film_grid(
    run: str | Path | Run,
    rows: int,
    columns: int,
    *,
    checkpoint: str = "best",
    env: EnvLike | None = None,
    device: str = "cpu",
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
    base: BaseLike | None = None,
) -> Path:
    """Film `rows` x `columns` environments side by side, stepped together with the mode of a run's policy.

    They start from the seeds of evaluation. The video has `GRID_SECONDS` of simulated time and is written to
    `videos/grid-STEP-ROWSxCOLUMNS.mp4` of the run folder; the report shows it. Where an episode ends the next begins.

    Raises:
        UsageError: as `load`; or the numbers are out of range, the environment has no MuJoCo scene, or MuJoCo cannot
            draw here.
        NonFiniteError: an environment gave NaN or infinity.
    """
    for name, value in (("rows", rows), ("columns", columns)):
        if not 1 <= value <= MAX_GRID:
            raise UsageError(f"a grid of videos has 1 to {MAX_GRID} {name}, got {value}")
    loaded = load(run, checkpoint=checkpoint, device=device, network=network, encoder=encoder, base=base)
    folder, policy, seeds = RunFolder(loaded.path), loaded.policy, evaluation_seeds(rows * columns)
    step = step_of(folder.find_checkpoint(checkpoint))
    prepare_cpu()
    try:
        vector = make(own_environment(loaded, env), visible(loaded.config), len(seeds), "cpu")
        try:
            dt = vector.control_dt or 1 / GRID_FPS
            every = max(1, round(1 / (GRID_FPS * dt)))  # steps from one picture to the next
            obs = vector.reset(seeds)
            grid = Grid(vector, rows, columns)
            frames = _film(vector, policy, obs, grid.draw, every=every, count=max(1, round(GRID_SECONDS / dt / every)))
            path, fps = folder.videos / f"grid-{step:012d}-{rows}x{columns}.mp4", 1 / (dt * every)
            try:
                write_video(frames, path, fps)
            finally:
                grid.close()
        finally:
            if vector is not env:
                vector.close()
    except RenderFailure as error:
        raise rendering_error(error.cause) from error
    about = {"step": step, "checkpoint": checkpoint, "rows": rows, "columns": columns, "fps": fps}
    write_json(path.with_suffix(".json"), about)
    write_report(folder.path)
    return path


def _film(
    env: VectorEnv, policy: Policy, obs: Obs, draw: Callable[[], Frame], *, every: int, count: int
) -> Iterator[Frame]:
    """`count` pictures, one before each `every` steps, of environments that have just given `obs`."""
    state = policy.initial_state(env.num_envs)
    lengths = np.zeros(env.num_envs, np.int64)
    for _ in range(count):
        yield draw()
        for _ in range(every):
            with products_of(env.num_envs):
                action, state, _ = policy.act(obs_to(obs, policy.device), state, explore=False)
            step = env.step(action.to(env.device))
            require_finite(env, step, step.valid, lengths)
            fresh = step.terminated | step.truncated | ~step.valid
            lengths = np.where(fresh.cpu().numpy(), 0, lengths + 1)
            state, obs = policy.reset(state, fresh.to(policy.device)), step.obs
