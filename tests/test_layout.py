"""The house: top-level folders import as ctrlrl.*, nothing is missing from the wheel, dependencies point one way."""

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ctrlrl
from tests.scripts import ROOT

TOP = ("algorithms", "envs", "robots")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def source_of(module: str) -> Path:
    parts = module.split(".")[1:]
    return ROOT / "ctrlrl" / Path(*parts) if not parts or parts[0] not in TOP else ROOT / Path(*parts)


def test_every_subpackage_is_listed_for_the_wheel():
    folders = [ROOT / "ctrlrl", *(ROOT / name for name in TOP)]
    found = set()
    for folder in folders:
        for init in folder.rglob("__init__.py"):
            relative = init.parent.relative_to(ROOT)
            if relative.parts[0] == "ctrlrl" and len(relative.parts) > 1 and relative.parts[1] in TOP:
                continue  # the links, seen again
            found.add(".".join(relative.parts if relative.parts[0] == "ctrlrl" else ("ctrlrl", *relative.parts)))
    assert found == set(project()["tool"]["setuptools"]["packages"])


def test_the_links_are_relative_and_point_at_the_folders():
    for name in TOP:
        link = ROOT / "ctrlrl" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("name", TOP)
def test_a_bare_import_is_refused(name):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode != 0
    assert f"import ctrlrl.{name}, not {name}" in done.stderr


def test_python_m_works_in_a_bare_checkout():
    done = subprocess.run([sys.executable, "-m", "ctrlrl", "algos"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sac ")


def test_every_module_is_found_and_imports():
    names = [m.name for m in pkgutil.walk_packages(ctrlrl.__path__, "ctrlrl.") if not m.name.endswith("__main__")]
    assert {"ctrlrl.algorithms.sac", "ctrlrl.envs.vector", "ctrlrl.robots", "ctrlrl.cli.train"} <= set(names)
    for name in names:
        importlib.import_module(name)


# What each part may import of ctrlrl; `errors`, `tree`, `config` and `cores` are for all.
ALLOWED = {
    "nn": {"nn"},
    "envs": {"envs", "robots"},
    "robots": {"robots"},
    "data": {"data", "envs", "runs"},
    "replay": {"replay", "envs", "data"},
    "runs": {"runs", "envs", "replay"},
    "algorithms": {"algorithms", "nn", "replay"},
    "deploy": {"deploy", "nn", "envs", "robots", "runs"},
    "language": {"language", "nn", "envs"},
    "training": {"training", "language", "algorithms", "nn", "replay", "runs", "envs", "data", "deploy", "robots"},
    "cli": {"cli", "training", "language", "algorithms", "runs", "envs", "robots", "data", "deploy"},
}


@pytest.mark.parametrize("part", ALLOWED)
def test_dependencies_point_one_way(part):
    folder = ROOT / part if part in TOP else ROOT / "ctrlrl" / part
    common = {"errors", "files", "tree", "config", "cores", "mirror", "tokens"}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("ctrlrl."):
                    assert name.split(".")[1] in ALLOWED[part] | common, f"{path} imports {name}"
