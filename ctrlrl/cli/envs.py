"""`ctrlrl envs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from ctrlrl.cli.parse import parse


@dataclass(frozen=True, kw_only=True)
class Envs:
    """List environments that can be trained on; any other Gymnasium environment works as module:ID."""

    pattern: Positional[str] = ""
    """Show only IDs that contain this."""


def run(arguments: Sequence[str]) -> int:
    """Print one line per environment; returns the exit code."""
    options = parse(Envs, arguments, "envs")
    from ctrlrl.envs.make import list_envs

    for info in list_envs():
        if options.pattern.lower() in info.id.lower():
            remark = " (needs a package that is not installed)" if not info.installed else " native" * info.native
            print(f"{info.id:<36} {info.family:<18}{remark}".rstrip())
    return 0
