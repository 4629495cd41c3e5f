"""What the page of one run and the page of several share: the template, formatting, videos, where a page may lie."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from ctrlrl.errors import UsageError
from ctrlrl.files import write_errors_explained
from ctrlrl.runs.plots import plain_number
from ctrlrl.runs.record import Video

_EMBEDDED_BYTES = 32 * 2**20
"""Videos are embedded up to this many bytes in all; further ones are named, so that the page still opens on a phone."""


def template(path: Path | None = None) -> jinja2.Template:
    """The template of a page, by default of the two of runs, `report.html`; it can include `style.html`."""
    path = path or Path(__file__).with_name("report.html")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["duration"] = duration
    environment.filters["date"] = _date
    return environment.get_template(path.name)


def writable_page(path: Path) -> Path:
    """`path`, where a page can be written now: its folder exists.

    Raises:
        UsageError: it is a folder, lies under a file, or its folder cannot be made.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected the name of the page; write it to {path / 'report.html'}, say")
    with write_errors_explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(f"cannot write {path}: {error.filename} is not a folder; choose another place") from error
    return path


def embed(videos: Iterable[Video]) -> list[dict[str, Any]]:
    """What the template needs of each video: name, facts, size in bytes, and base64 data (None: too large to embed)."""
    left = _EMBEDDED_BYTES
    result = []
    for video in videos:
        size = video.path.stat().st_size
        fits = size <= left
        left -= size if fits else 0
        data = base64.b64encode(video.path.read_bytes()).decode() if fits else None
        result.append({"name": video.path.name, "data": data, "size": size, "facts": video.facts})
    return result


def shown(path: Path) -> str:
    """The path as one would type it here."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(path)


def setting_text(value: Any) -> str:
    """The value of a setting in words: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def duration(seconds: float) -> str:
    """Seconds in the units in which one would say them."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else plain_number(value)


def _date(text: str) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return text
