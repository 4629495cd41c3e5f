"""Where the source is, also where the tests run away from it, and its scripts as modules."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(os.environ.get("CTRLRL_SOURCE", Path(__file__).parents[1]))
SCRIPTS = (ROOT / "scripts").resolve()


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    """scripts/NAME.py as a module (`peers.NAME`: scripts/peers/NAME.py), and what lies beside it to be imported.

    Afterwards none of it is left for other tests, which may load it anew."""
    path, modules = sys.path.copy(), set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module(name)
    finally:
        for new in set(sys.modules) - modules:
            if _is_of_scripts(sys.modules[new]):
                del sys.modules[new]
        sys.path[:] = path


def _is_of_scripts(module: ModuleType) -> bool:
    spec = getattr(module, "__spec__", None)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]  # `peers` has no file
    return any(Path(place).is_relative_to(SCRIPTS) for place in places if place)
