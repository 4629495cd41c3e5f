"""`ctrlrl data import`, `data inspect`, `data collect`, `data distill`, `data export`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from ctrlrl.errors import UsageError, nearest

COMMANDS = {
    "import": "make a dataset of files in another format",
    "inspect": "what is in a dataset, and what may be wrong with it",
    "collect": "make a dataset of a run: random, medium, expert, or what it stored while it learned",
    "distill": "make a dataset of several runs, to learn one policy of them from",
    "export": "write a dataset as Minari or LeRobot files",
}


def run(arguments: Sequence[str]) -> int:
    """Run one of the commands; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
        print(f"usage: ctrlrl data COMMAND ...\n\n{lines}\n\nctrlrl data COMMAND --help lists its options.")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        raise UsageError(f"no command 'data {name}'.{nearest(name, COMMANDS)} There are: {', '.join(COMMANDS)}")
    code: int = importlib.import_module(f"ctrlrl.cli.data_{name}").run(rest)
    return code
