"""From a configuration to a run: `train` starts one, `resume` goes on with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctrlrl.algorithms.registry import find_algorithm, train_config_class
from ctrlrl.config import OfflineConfig, TrainConfig, changed_fields
from ctrlrl.data.store import environment_of
from ctrlrl.errors import UsageError
from ctrlrl.nn.encoder import EncoderFactory
from ctrlrl.nn.mlp import NetworkFactory
from ctrlrl.runs.checkpoint import load_checkpoint
from ctrlrl.runs.folder import RunFolder, default_path, require_space, require_vacant
from ctrlrl.runs.metrics import Writer
from ctrlrl.runs.provenance import (
    command_line,
    describe_environment,
    describe_machine,
    describe_source,
    differences,
    now,
)
from ctrlrl.training.base_policy import BaseLike, evidence_kept, keep_base, kept_base
from ctrlrl.training.base_session import Session
from ctrlrl.training.callbacks import Callback
from ctrlrl.training.loading import Run
from ctrlrl.training.offline_session import OfflineSession
from ctrlrl.training.online_session import OnlineSession
from ctrlrl.training.setup import (
    EnvLike,
    given,
    language_of,
    name_of,
    read_config,
    read_provenance,
    require_objects,
    require_same_language,
)


def train(
    algo: str,
    env: EnvLike | None = None,
    *,
    eval_env: EnvLike | None = None,
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
    base: BaseLike | None = None,
    callbacks: Sequence[Callback] = (),
    writers: Sequence[Writer] = (),
    config: TrainConfig | None = None,
    preset: str | bool | None = True,
    quiet: bool = False,
    **fields: Any,
) -> Run:
    """Train a policy and return the finished run; the same as `ctrlrl train ALGO --env ENV`.

    Args:
        algo: `sac`, ... (see `ctrlrl algos`).
        env: an ID; or an environment object, a vector environment, or a function that makes one environment. What
            learns from a dataset alone is evaluated there, by default on what the dataset names.
        eval_env: what to evaluate on, where `env` is an object that cannot be made a second time.
        network: `factory(in_features, out_features)`, in place of the multilayer perceptrons.
        encoder: `factory(observation_space)`, from observations (B, ...) to features (B, F), as a network of yours.
        base: of algorithms that build on a policy (`resfit`): where that is, as `--base`; or the policy itself, or a
            function from observations (N, ...) to actions (N, ...).
        callbacks: called between steps.
        writers: take every record, beside `metrics.jsonl` and TensorBoard.
        config: the whole configuration, instead of `fields`.
        preset: whether to start from the settings for this family of environments, where there are any; together
            with `config`, the name of the preset that is in it already.
        quiet: print nothing.
        fields: of the configuration: `steps=20_000, seed=1, agent={"gamma": 0.98}, buffer={"n_step": 3}`.

    Raises:
        UsageError: on bad input, before anything is written.
        BadBaseAction: what the base would do is no action; what it was asked is in the run's folder.
        EnvironmentFailure, NonFiniteError, Interrupted: as they happen; the run is saved and can be resumed.
    """
    algorithm = find_algorithm(algo)
    cls = train_config_class(algo)
    if isinstance(base, str | Path):
        fields, base = {**fields, "base": str(base)}, None
    if config is None:
        required = {"env": "" if env is None else name_of(env)}
        if issubclass(cls, OfflineConfig):
            required["data"] = str(fields.get("data", ""))
        used = algorithm.preset_for(required["env"] or environment_of(fields.get("data"))) if preset else None
        config = cls.from_dict(fields, base=cls.from_dict((used.values if used else {}) | required))
        preset = used.name if used else None
        if used and not quiet:
            print(f"preset {used.name}: {used.values} ({used.reason})")
    subject = Path(config.data).name if isinstance(config, OfflineConfig) else config.env
    out = Path(config.out) if config.out else default_path(algo, subject, config.seed)
    config = replace(config, out=str(out))
    require_vacant(out)

    with evidence_kept(out, "data"):
        session = _session_class(algo)(algo, config, env, eval_env, network, encoder, base=base, quiet=quiet)
    try:
        asked, config = config, session.config
        with evidence_kept(out, f"{0:012d}"):
            session.begin(callbacks)
        require_space(out, session.disk_needed())
        folder = RunFolder.create(out)
        with folder.locked():
            custom = {"env": env, "eval_env": eval_env, "network": network, "encoder": encoder, "base": base}
            if (kept := getattr(config, "base", None)) is not None:
                keep_base(kept, folder)
            folder.write_json(
                "provenance",
                {"command": command_line(), "started": now()}
                | describe_machine(session.device, session.threads)
                | {"git": describe_source(), "environment": _environment(session)}
                | session.described()
                | language_of(config, session.agent.policy)
                | {"changed": changed_fields(asked, _plain(cls, config))}
                | {
                    "custom": {
                        k: name_of(v)
                        for k, v in custom.items()
                        if v is not None and not (k == "env" and isinstance(v, str))
                    }
                }
                | {"sessions": [{"started": now(), "from_step": 0, "command": command_line(), "notes": []}]},
            )
            if session.history is not None:
                folder.write_json("history", session.history)
            folder.write_json("config", {"algo": algo, "preset": preset or None, **config.to_dict()})
            return session.run(folder, callbacks, writers)
    finally:
        session.close()


def resume(
    run: str | Path,
    *,
    steps: int | None = None,
    updates: int | None = None,
    checkpoint: str = "last",
    device: str | None = None,
    env: EnvLike | None = None,
    eval_env: EnvLike | None = None,
    network: NetworkFactory | None = None,
    encoder: EncoderFactory | None = None,
    base: BaseLike | None = None,
    callbacks: Sequence[Callback] = (),
    writers: Sequence[Writer] = (),
    quiet: bool = False,
) -> Run:
    """Go on with a run exactly where its checkpoint left it; a larger `steps`, or `updates` of what learns from a
    dataset alone, extends it.

    `env`, `eval_env`, `network`, `encoder`, `base` and `callbacks` must be given again where `train` got objects; they
    are not saved. What was written after the checkpoint is deleted, once everything has been read back. A run that is
    extended keeps the evaluation at its former end.

    Raises:
        UsageError: if there is no such run or checkpoint, it is damaged, or another process trains it; nothing was
            changed then.
    """
    folder = RunFolder.open(Path(run))
    with folder.locked():
        algo, config = read_config(folder)
        path = folder.find_checkpoint(checkpoint)
        if not path.name.startswith("step-"):
            raise UsageError(f"{path.name} holds weights only; resume from one of the step-... checkpoints")
        state = load_checkpoint(path)
        done = state["loop"]["env_steps"]
        unit, other = ("updates", steps) if isinstance(config, OfflineConfig) else ("steps", updates)
        if other is not None:
            raise UsageError(f"the length of {folder.path} is counted in {unit}: extend it by --{unit}")
        budget = updates if unit == "updates" else steps
        if budget is not None and budget < done:
            raise UsageError(
                f"{folder.path} has done {done:,} {unit} already; --{unit} must be at least that, got {budget}"
            )
        config = replace(config, **given(**{unit: budget}, device=device))
        provenance = read_provenance(folder)
        require_objects(provenance, env=env, eval_env=eval_env, network=network, encoder=encoder, base=base)
        if len(state["callbacks"]) != len(callbacks):
            raise UsageError(
                f"the run was trained with {len(state['callbacks'])} callbacks, now there are {len(callbacks)}; "
                "pass the same ones, in the same order"
            )

        source = env if env is not None else config.env or None
        made = {"base": base if base is not None else kept_base(folder, getattr(config, "base", None))}
        with evidence_kept(folder.path, "data"):
            session = _session_class(algo)(
                algo, config, source, eval_env, network, encoder, **made, quiet=quiet, resumed=True
            )
        try:
            config = session.config
            _require_same_data(provenance, session)
            require_same_language(config, session.agent.policy, provenance)
            machine = describe_machine(session.device, session.threads) | {"git": describe_source()}
            changed = differences(provenance, machine)
            notes = [f"the last bits may differ from an uninterrupted run: {', '.join(changed)}"] if changed else []
            with evidence_kept(folder.path, f"{done:012d}"):
                notes += session.restore(folder, state, callbacks)
            # Everything has been read back: only now is anything changed.
            folder.forget_after(path, state["best"]["checkpoint"] if state["best"] else None)
            entry = {"started": now(), "from_step": done, "command": command_line(), "notes": notes}
            provenance["sessions"].append(entry)
            folder.write_json("provenance", provenance)
            folder.write_json("config", {**folder.read_json("config"), **config.to_dict()})
            return session.run(folder, callbacks, writers, state=state, notes=notes)
        finally:
            session.close()


def _session_class(algo: str) -> type[Session]:
    return OfflineSession if find_algorithm(algo).loop == "offline" else OnlineSession


def _environment(session: Session) -> dict[str, Any]:
    return describe_environment(session.name, session.observation_space, session.action_space, session.control_dt)


def _plain(cls: type[TrainConfig], config: TrainConfig) -> TrainConfig:
    """The defaults, for the same environment and data."""
    data = {"data": config.data} if isinstance(config, OfflineConfig) else {}
    return cls.from_dict({"env": config.env, "out": config.out, **data})


def _require_same_data(provenance: dict[str, Any], session: Session) -> None:
    """Raise UsageError if the dataset is no longer what the run has learned from."""
    before, now_there = provenance.get("data"), session.described().get("data")
    if before is not None and now_there is not None and before.get("content_hash") != now_there["content_hash"]:
        raise UsageError(
            f"the dataset {now_there['path']} has changed since the run began ({before.get('transitions'):,} "
            f"transitions then, {now_there['transitions']:,} now): put the former one there, or start with --init-from"
        )
