"""`ctrlrl export RUN --out BUNDLE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ctrlrl.cli.parse import parse
from ctrlrl.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a policy as a bundle: what a controller needs, and nothing that it must trust blindly."""

    source: Positional[str]
    """Run folder; with --from sb3 the zip that Stable-Baselines3 saved, with --from onnx an ONNX file."""
    out: str
    """Folder of the bundle; must not hold anything yet."""
    origin: Annotated[Literal["run", "sb3", "onnx"], arg(name="from")] = "run"
    """What the policy was trained with."""
    checkpoint: str = "best"
    """Of a run: best, last, or a checkpoint's name."""
    base: str | None = None
    """MODULE:FUNCTION that the run's policy builds on: it is imported only if named here too."""
    name: str | None = None
    """What the bundle calls itself; by default what the run or the file is called."""
    vec_normalize: str | None = None
    """Of sb3: what VecNormalize.save wrote, if the model was trained with one. It is read as data; nothing in it is
    run."""
    control_dt: float | None = None
    """Of sb3: seconds between two actions."""
    spec: str | None = None
    """Of onnx: a JSON file that says what the model observes and does (docs/bundle.md)."""


def run(arguments: Sequence[str]) -> int:
    """Export; returns the exit code."""
    options = parse(Export, arguments, "export")
    own = {"run": {"checkpoint", "name", "base"}, "sb3": {"name", "vec_normalize", "control_dt"}, "onnx": {"spec"}}
    for field in ("checkpoint", "base", "name", "vec_normalize", "control_dt", "spec"):
        default = Export.__dataclass_fields__[field].default
        if getattr(options, field) != default and field not in own[options.origin]:
            raise UsageError(f"--{field.replace('_', '-')} does nothing with --from {options.origin}")
    if options.origin == "onnx" and options.spec is None:
        raise UsageError("an ONNX file does not say what it observes and does: --spec FILE (docs/bundle.md)")
    from ctrlrl.deploy.report import summary
    from ctrlrl.training.export_foreign import export_onnx, export_sb3
    from ctrlrl.training.export_run import export_run

    out = Path(options.out)
    if options.origin == "sb3":
        extra = {"vec_normalize": options.vec_normalize, "name": options.name, "control_dt": options.control_dt}
        bundle = export_sb3(options.source, out, **extra)  # type: ignore[arg-type]
    elif options.origin == "onnx":
        bundle = export_onnx(options.source, str(options.spec), out)
    else:
        bundle = export_run(options.source, out, checkpoint=options.checkpoint, name=options.name, base=options.base)
    print("\n".join(summary(bundle)))
    return 0
