"""`ctrlrl train ALGO --env ID`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from ctrlrl.algorithms.registry import ALGORITHMS, Algorithm, Preset, find_algorithm, train_config_class
from ctrlrl.cli.parse import option, parse
from ctrlrl.config import TrainConfig, changed_fields, read_config_file
from ctrlrl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the command itself; they are not part of the run's configuration."""

    config_file: Annotated[str | None, tyro.conf.arg(name="config", metavar="FILE")] = None
    """YAML or JSON file of fields to start from (a run's config.json, say); flags go before it."""
    preset: bool = True
    """Start from the settings for this family of environments, where there are any."""
    dry_run: bool = False
    """Print the resolved configuration, mark what differs from the defaults, and stop."""
    quiet: bool = False
    """Print nothing but errors."""


def run(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, ALGORITHMS))
        names = "\n".join(f"  {a.name:<{width}} {a.title}" for a in ALGORITHMS.values())
        usage = "usage: ctrlrl train ALGO --env ID [--data DIR] [options]"
        print(f"{usage}\n\nalgorithms:\n{names}\n\nctrlrl train ALGO --help")
        return 0 if arguments else 2
    algorithm = find_algorithm(arguments[0])
    options, config, preset = resolve(algorithm, arguments[1:])
    if options.dry_run:
        print(describe(config, preset))
        return 0
    from ctrlrl.training.session import train  # imports torch: only now

    if preset and not options.quiet:
        print(describe_preset(preset))
    train(
        algorithm.name, config.env or None, config=config, preset=preset.name if preset else None, quiet=options.quiet
    )
    return 0


def resolve(algorithm: Algorithm, arguments: Sequence[str]) -> tuple[Options, TrainConfig, Preset | None]:
    """Defaults, then the environment's preset, then the config file, then flags."""
    cls = train_config_class(algorithm.name)
    path = option(arguments, "config")
    from_file = read_config_file(path) if path else {}
    named = from_file.pop("algo", algorithm.name)  # a run's config.json says what it was
    if named != algorithm.name:
        raise UsageError(f"{path} is for {named}, not for {algorithm.name}: ctrlrl train {named} --config {path}")
    data = option(arguments, "data") or from_file.get("data")
    if (
        "preset" in from_file and "out" in from_file
    ):  # a run's config.json: its preset is in its fields, its folder taken
        del from_file["preset"], from_file["out"]
        preset = None
    else:
        env = option(arguments, "env") or from_file.get("env") or _env_of(data)
        wanted = not {"--no-preset", "--no_preset"} & set(arguments) and isinstance(env, str)
        preset = algorithm.preset_for(env) if wanted and isinstance(env, str) else None
    base = cls.from_dict((preset.values if preset else {}) | _required(cls, arguments, from_file))
    base = cls.from_dict(from_file, base=base, source=path or "")
    made = dataclasses.make_dataclass(
        f"Train{algorithm.name}",
        [("run", Annotated[cls, tyro.conf.arg(name="")], dataclasses.field(default=_defaults(base)))],
        bases=(Options,),
        frozen=True,
        kw_only=True,
    )
    made.__doc__ = f"{algorithm.title}. {algorithm.paper}."
    parsed: Any = parse(made, arguments, f"train {algorithm.name}")
    return parsed, parsed.run, preset


def _defaults(base: TrainConfig) -> TrainConfig:
    """`base`, with what is still to be given marked as such."""
    for name in _REQUIRED:
        if getattr(base, name, None) == _MISSING:
            object.__setattr__(base, name, tyro.MISSING)  # frozen, and checked to be text: this is for tyro's eyes
    return base


def _env_of(data: Any) -> str | None:
    """The environment that a dataset names."""
    if not isinstance(data, str):
        return None
    from ctrlrl.data.store import environment_of  # imports gymnasium: only now

    return environment_of(data)


_REQUIRED, _MISSING = ("env", "data"), "?"


def _required(cls: type[TrainConfig], arguments: Sequence[str], from_file: dict[str, Any]) -> dict[str, Any]:
    """The fields without which there is no configuration, as far as they are given."""
    names = [f.name for f in dataclasses.fields(cls) if f.name in _REQUIRED and f.default is dataclasses.MISSING]
    return {name: option(arguments, name) or from_file.get(name) or _MISSING for name in names}


def describe(config: TrainConfig, preset: Preset | None) -> str:
    """The configuration as JSON lines; what differs from the defaults is marked."""
    changed = set(changed_fields(config, type(config).from_dict(_required(type(config), (), {})))) - {*_REQUIRED}
    lines = [describe_preset(preset)] if preset else []

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and key != "env_kwargs":
                walk(value, f"{prefix}{key}.")
            else:
                mark = "*" if f"{prefix}{key}" in changed else " "
                lines.append(f"{mark} {prefix}{key}: {json.dumps(value)}")

    walk(config.to_dict(), "")
    return "\n".join([*lines, "(* differs from the default)"])


def describe_preset(preset: Preset) -> str:
    """One line that says which preset is used and why."""
    return f"preset {preset.name}: {json.dumps(preset.values)} ({preset.reason}); --no-preset turns it off"
