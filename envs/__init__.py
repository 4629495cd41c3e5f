"""Environments: the vector-environment contract (`vector.py`), its backends, the tasks."""

if __name__ != "ctrlrl.envs":  # a second copy of every class would exist under the bare name
    raise ImportError(f"import ctrlrl.envs, not {__name__}")

from ctrlrl.envs.headless import render_headless

render_headless()
