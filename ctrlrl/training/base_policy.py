"""Policies that another is built on: where they come from, whether they fit, and what they would do in a dataset."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ctrlrl.data.store import Dataset
from ctrlrl.deploy.bundle import Bundle
from ctrlrl.envs.sim_vector import SimVector
from ctrlrl.envs.spaces import build_space
from ctrlrl.envs.spec import SimTask
from ctrlrl.envs.tasks.registry import is_robot_task, make_robot_task
from ctrlrl.envs.vector import VectorEnv
from ctrlrl.errors import BadBaseAction, CtrlrlError, UsageError
from ctrlrl.nn.policy import Policy
from ctrlrl.nn.residual import Base, CallablePolicy
from ctrlrl.runs.checkpoint import save_checkpoint
from ctrlrl.runs.folder import RunFolder
from ctrlrl.training.base_fit import box_of, require_bundle_fits, require_run_fits
from ctrlrl.training.base_onnx import BundlePolicy, OnnxPolicy
from ctrlrl.tree import Obs

BaseLike = str | Path | Policy | Callable[[Obs], Any]
"""A run's folder, a bundle's, an ONNX file, MODULE:FUNCTION, a policy, or a function of observations."""

ROWS = 1024
"""Episodes of a dataset that are gone through together."""


def open_base(
    source: BaseLike,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    task: SimTask | None = None,
    control_dt: float | None = None,
) -> Policy:
    """The policy at `source`, for environments of these spaces.

    Args:
        source: where it is.
        observation_space: of one environment.
        action_space: of one environment.
        task: of the environment, where it is one of ours: terms of observations are compared by name.
        control_dt: s between two of its actions, where that is known.

    Raises:
        UsageError: there is none, or it observes or does something else; names each difference.
    """
    if isinstance(source, Policy):
        return source
    if not isinstance(source, str | Path):
        box_of(action_space)
        return CallablePolicy(source)
    path = Path(source)
    if (path / "manifest.json").is_file():
        bundle, own = Bundle.open(path), (observation_space, action_space)
        require_bundle_fits(str(path), bundle.manifest, own_spaces=own, own_task=task, own_dt=control_dt)
        return BundlePolicy(bundle, action_space)
    if (path / "config.json").is_file():
        return _open_run(path, observation_space, action_space, task, control_dt)
    if path.suffix == ".onnx" and path.is_file():
        return OnnxPolicy(path, observation_space, action_space)
    if _is_code(str(source)):
        return _call(str(source), observation_space, action_space)
    raise UsageError(
        f"--base {source}: no run (config.json), bundle (manifest.json) or ONNX file is there; MODULE:FUNCTION is a "
        "function that makes a policy"
    )


def keep_base(source: BaseLike, folder: RunFolder) -> None:
    """Copy what is on disk into the run, which then needs nothing else to be used or resumed."""
    if not isinstance(source, str | Path) or not Path(source).exists():
        return  # a function is imported again, and an object given again
    path, own = Path(source), folder.base
    if path.is_file():
        import onnx

        own.mkdir()
        onnx.save(onnx.load(path), own / path.name)  # with weights that lay beside it
        return
    if (path / "manifest.json").is_file():
        shutil.copytree(path, own)
        return
    run = RunFolder(path)
    own.mkdir()
    for name in ("config.json", "provenance.json"):
        shutil.copy2(path / name, own / name)
    checkpoint = _checkpoint_of(run)
    shutil.copytree(checkpoint, own / "checkpoints" / checkpoint.name)
    if run.base.exists():
        shutil.copytree(run.base, own / "base")


def kept_base(folder: RunFolder, configured: str | None) -> str | None:
    """Where the base of a run is: in the run, or what its configuration names to be imported.

    Raises:
        UsageError: it is gone.
    """
    if not folder.base.is_dir():
        if configured is not None and not _is_code(configured):
            raise UsageError(f"{folder.base}, the copy of the policy that the run builds on, is missing; restore it")
        return configured
    files = list(folder.base.glob("*.onnx"))
    single = files and not (folder.base / "manifest.json").is_file()
    return str(files[0] if single else folder.base)


def trusted_base(base: BaseLike | None, folder: RunFolder, configured: str | None) -> BaseLike | None:
    """The base of a run that is only looked at, which may be somebody else's: nothing is imported because it says so.

    Raises:
        UsageError: its base is code, and the user has not named it; or it is gone.
    """
    kept = base if base is not None else kept_base(folder, configured)
    if base is None and isinstance(kept, str) and _is_code(kept):
        raise UsageError(
            f"{folder.path} builds on {kept}, which would be imported and called: if you trust it, say --base {kept}"
        )
    return kept


def _is_code(source: str) -> bool:
    """Whether it is MODULE:FUNCTION, and nothing on disk."""
    return ":" in source and not Path(source).exists()


def task_of(env: VectorEnv) -> SimTask | None:
    """The task of environments of ours."""
    return env.task if isinstance(env, SimVector) else None


@torch.no_grad()
def base_actions(dataset: Dataset, base: Base, device: torch.device) -> Tensor:
    """What `base` would have done at each observation (T + E, A) of a dataset, in [-1, 1]: its memory begins anew with
    each episode and goes on with what the episode showed.

    Raises:
        BadBaseAction: it would have done something that is no action.
    """
    lengths, starts = np.asarray(dataset.lengths), np.asarray(dataset.starts) + np.arange(dataset.num_episodes)
    order = np.argsort(-lengths, kind="stable")  # the longest first, so that those that go on are the first rows
    out: Tensor | None = None
    for begin in range(0, len(order), ROWS):
        own = order[begin : begin + ROWS]
        state = base.policy.initial_state(len(own))
        for t in range(int(lengths[own[0]]) + 1):
            going = int((lengths[own] >= t).sum())
            rows = starts[own[:going]] + t
            state = {name: value[:going] for name, value in state.items()}

            def where(i: int, t: int = t, rows: Any = rows, own: Any = own) -> str:
                return f"step {t} of episode {own[i]} of {dataset.path} (row {rows[i]} of its observations)"

            unit, state = base.act(_observations(dataset, rows, device), state, where)
            if out is None:
                out = torch.zeros(dataset.num_transitions + dataset.num_episodes, unit.shape[1], device=device)
            out[torch.from_numpy(rows).to(device)] = unit
    assert out is not None
    return out


def keep_evidence(error: BadBaseAction, folder: Path, name: str) -> Path:
    """Write what the base was asked, and what it gave, into the run's folder; returns where."""
    kept, again = folder / f"bad-base-action-{name}", 1
    while kept.exists():  # of a session that stopped there, too
        again += 1
        kept = folder / f"bad-base-action-{name}-{again}"
    save_checkpoint(folder, kept.name, error.evidence)
    return kept


@contextlib.contextmanager
def evidence_kept(folder: Path, name: str) -> Iterator[None]:
    """Keep the evidence where a base has no action before there is a loop to do so: for what a dataset shows (`data`),
    or for the first observations of step `name`."""
    try:
        yield
    except BadBaseAction as error:
        try:
            step = f"Step {int(name):,}; what" if name.isdecimal() else "What"
            ending = f"{step} it was asked: {keep_evidence(error, folder, name)}"
            if not (folder / "config.json").exists():
                ending += f". The run has not begun: delete {folder}, or choose another --out, once the base is mended"
        except (CtrlrlError, OSError) as another:
            ending = f"Besides, what it was asked could not be written: {another}"
        error.args = (f"{error}\n{ending}",)
        raise


def _observations(dataset: Dataset, rows: np.ndarray[Any, Any], device: torch.device) -> Obs:
    def one(column: Any) -> Tensor:
        value = torch.from_numpy(np.array(column[rows])).to(device)
        return value.float() if value.is_floating_point() else value

    own = dataset.observation
    return {name: one(column) for name, column in own.items()} if isinstance(own, dict) else one(own)


def _call(source: str, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Policy:
    module, _, name = source.partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"--base {source}: {error}. MODULE must be importable (PYTHONPATH), and have FUNCTION"
        ) from None
    if not callable(make):
        raise UsageError(f"--base {source} is no function: it is called with the spaces, and gives a policy")
    made = make(observation_space, action_space)
    if isinstance(made, Policy):
        return made
    if not callable(made):
        raise UsageError(
            f"--base {source} gave a {type(made).__name__}; expected a function of observations, or a policy "
            "(ctrlrl.nn.policy.Policy)"
        )
    box_of(action_space)
    return CallablePolicy(made)


def _open_run(
    path: Path,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    task: SimTask | None,
    control_dt: float | None,
) -> Policy:
    from ctrlrl.training.loading import load
    from ctrlrl.training.setup import read_config, read_provenance

    folder = RunFolder.open(path)
    _, config = read_config(folder)
    environment = read_provenance(folder)["environment"]
    spaces = environment["spaces"]
    require_run_fits(
        str(path),
        (build_space(spaces["observation"]), build_space(spaces["action"])),
        make_robot_task(config.env, config.env_kwargs) if is_robot_task(config.env) else None,
        environment.get("control_dt"),
        own_spaces=(observation_space, action_space),
        own_task=task,
        own_dt=control_dt,
    )
    inner = kept_base(folder, getattr(config, "base", None))
    if isinstance(inner, str) and _is_code(inner):
        raise UsageError(
            f"--base {path}: that run builds on {inner} itself, which would be imported and called. If you trust it: "
            f"ctrlrl export {path} --base {inner} --out BUNDLE, and --base BUNDLE"
        )
    return load(path, checkpoint=_checkpoint_of(folder).name).policy


def _checkpoint_of(folder: RunFolder) -> Path:
    """The best one, or the last where nothing was evaluated."""
    return folder.find_checkpoint("best" if any(folder.checkpoints.glob("best-*")) else "last")
