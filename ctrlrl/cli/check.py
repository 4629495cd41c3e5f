"""`ctrlrl check BUNDLE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from ctrlrl.cli.parse import parse


@dataclass(frozen=True, kw_only=True)
class Check:
    """Compare a bundle's checksums, replay its goldens in every runtime that there is here, and say what it is."""

    bundle: Positional[str]
    """Bundle folder."""


def run(arguments: Sequence[str]) -> int:
    """Check; returns the exit code."""
    options = parse(Check, arguments, "check")
    from ctrlrl.deploy.bundle import Bundle
    from ctrlrl.deploy.report import summary
    from ctrlrl.deploy.runtimes import RUNTIMES, make_runtime

    bundle = Bundle.open(options.bundle)
    print("\n".join(summary(bundle)))
    for name in bundle.manifest.network.runtimes:
        if not RUNTIMES[name].available():
            print(f"{name:<12}not checked: it is not installed here")
            continue
        print(f"{name:<12}goldens reproduced, largest difference {bundle.replay(make_runtime(name, bundle)):.2g}")
    if bundle.measured:
        print(f"measured    goldens reproduced, largest difference {bundle.replay_features():.2g}")
    elif bundle.manifest.is_robot:
        print("measured    no goldens: whether names, frames and scales are right is not known")
    return 0
