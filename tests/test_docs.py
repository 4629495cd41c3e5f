"""The README is always true: its Python runs, and so do its commands."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex

import pytest
import torch

from ctrlrl.algorithms.registry import ALGORITHMS
from ctrlrl.cli.main import COMMANDS
from ctrlrl.cli.main import run as ctrlrl_command
from tests.scripts import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Two threads on two cores stand still when something else runs beside the tests."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)


def test_python_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {"obs": torch.zeros(1, 3)}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["action"].shape == (1, 1)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_commands_in_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("ctrlrl ")]
    assert len(commands) == 7
    for command in commands:
        assert ctrlrl_command(shlex.split(command)[1:]) == 0, command
    assert list((tmp_path / "runs/pendulum/videos").glob("*.mp4"))


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_page_with_its_fields(name):
    """All of them; or, for a variant of an algorithm, what it adds or changes and a link to that algorithm's page."""
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert f"ctrlrl train {name} --env" in page
    pages = {algorithm.load_config_class(): algorithm.name for algorithm in ALGORITHMS.values()}
    config, *bases = ALGORITHMS[name].load_config_class().__mro__
    parent = next((base for base in bases if base in pages), None)
    assert parent is None or f"({pages[parent]}.md)" in page
    inherited = {} if parent is None else {field.name: field.default for field in dataclasses.fields(parent)}
    for field in dataclasses.fields(config):
        if (
            field.name not in inherited
            or field.default != inherited[field.name]
            or field.name in config.__annotations__
        ):
            assert f"`agent.{field.name.replace('_', '-')}`" in page, field.name


def test_every_command_is_in_the_readme():
    for command in COMMANDS:
        assert f"ctrlrl {command}" in README
