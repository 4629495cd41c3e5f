"""What a bundle is, in lines for people."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ctrlrl.deploy.bundle import Bundle
from ctrlrl.deploy.manifest import Action, Term


def summary(bundle: Bundle) -> list[str]:
    """Lines that say what a bundle's policy reads and does, how it was trained, and what runs it."""
    return ["".join(c if c.isprintable() else "?" for c in line) for line in _lines(bundle)]


def _lines(bundle: Bundle) -> Iterator[str]:
    m = bundle.manifest
    yield f"{bundle.path}: {m.name}, trained on {m.task}" + (f" for the robot {m.robot}" if m.robot else "")
    e = m.evaluation
    if {"mean_return", "episodes"} <= e.keys():
        success = f", success {e['success']}" if "success" in e else ""
        yield f"return      {e['mean_return']} over {e['episodes']} episodes{success}"
    if m.control_dt is not None:
        physics = "" if m.timestep is None else f", physics every {1e3 * m.timestep:g} ms"
        yield f"rate        {1 / m.control_dt:g} actions a second{physics}"
    for entry in m.observation:
        size = " x ".join(map(str, entry.shape)) or "1"
        yield f"observation {entry.name}: {size} {entry.dtype}" + ("" if entry.terms else ", of which no more is known")
        for term in entry.terms:
            yield f"            {_term(term)}"
    if m.command:
        yield f"command     {'; '.join(m.command)}"
    yield f"action      {_action(m.action)}"
    if m.gravity_compensated:
        yield "            the robot carries its own weight"
    for joint in m.joints:
        if joint.driven:
            limits = "without end" if joint.lower is None else f"{joint.lower:g} to {joint.upper:g} {joint.unit}"
            gains = f", kp {joint.kp:g}, kd {joint.kd:g}" if joint.kp else ""
            effort = "" if joint.max_effort is None else f", effort up to {joint.max_effort:g}"
            yield f"            {joint.name}: {limits}{gains}{effort}"
    if (hint := saturation(bundle)) is not None:
        yield f"            {hint}"
    if m.robot is not None and m.unknown:
        yield f"controller  cannot run it: {m.unknown}"
    n = m.network
    why = f" alone: {n.why_not}" if n.why_not else ""
    memory = f", memory {', '.join(n.state)}" if n.state else ""
    yield f"network     {n.dtype}, ONNX opset {n.opset}{memory}; runs with {', '.join(n.runtimes)}{why}"
    yield f"goldens     reproduced to {n.tolerance:g}" + (", and those of measurements" if bundle.measured else "")


def saturation(bundle: Bundle) -> str | None:
    """What to do about a policy that learned with motors at their limits, which the controller's check of efforts holds
    back; None where it did not."""
    asked = bundle.asked_efforts()
    if not asked or max(asked.values()) <= 1:
        return None
    joint, share = max(asked.items(), key=lambda pair: pair[1])
    needed = math.ceil(10 * share) / 10
    return (
        f"in training it asked for up to {share:.3g} times the effort of {joint}: --safety.effort {needed:g} "
        "drives it as then, where the motors bear that"
    )


def _term(term: Term) -> str:
    unit = f" {term.unit}" if term.unit else ""
    frame = f", in the {term.frame}'s frame" if term.frame in ("base", "world") else ""
    history = f", {term.history} in a row" if term.history > 1 else ""
    late = f", {term.delay[0]} to {term.delay[1]} steps late" if term.delay != (0, 0) else ""
    return f"{term.name}: {term.size}{unit}, {term.measure}{frame}{history}{late}"


def _action(action: Action) -> str:
    size = " x ".join(map(str, action.shape)) or "1"
    late = f", {action.delay[0]} to {action.delay[1]} steps late" if action.delay != (0, 0) else ""
    smooth = f", followed within {max(action.smoothing):g} s" if any(action.smoothing) else ""
    return f"{size}, {action.kind}{f' ({action.unit})' if action.unit else ''}{late}{smooth}"
