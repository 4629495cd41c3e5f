"""`ctrlrl COMMAND ...`: picks the command, and turns failures into one message and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from ctrlrl.errors import CtrlrlError, UsageError, nearest

COMMANDS = {
    "train": "train a policy: ctrlrl train sac --env HalfCheetah-v5",
    "resume": "go on with a run exactly where it stopped, or extend it",
    "eval": "deterministic returns of a run's policy, and videos",
    "play": "watch a run's policy in a window",
    "report": "one page of curves, tables and videos, for one run or to compare several",
    "data": "datasets: import, inspect, collect, export",
    "export": "write a run's policy as a bundle for a controller",
    "check": "compare a bundle's checksums and replay its goldens",
    "deploy": "drive a robot with a bundle's policy, or a simulated one",
    "language": "a tiny language model to start from",
    "envs": "list environments",
    "algos": "list algorithms",
    "robots": "list robots, and where their models are",
}


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code (0 done, 2 bad input, 3 non-finite training, 130 interrupted)."""
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_help())
            return 0 if arguments else 2
        name, *rest = arguments
        if name == "--version":
            from importlib.metadata import version

            print(f"ctrlrl {version('ctrlrl')}")
            return 0
        if name not in COMMANDS:
            raise UsageError(f"no command {name!r}.{nearest(name, COMMANDS)} Commands: {', '.join(COMMANDS)}")
        module = importlib.import_module(f"ctrlrl.cli.{name}")
        code: int = module.run(rest)
        return code
    except CtrlrlError as error:
        print(f"ctrlrl: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `ctrlrl envs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"ctrlrl: {error.filename or 'the operating system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ctrlrl: aborted", file=sys.stderr)
        return 130


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "usage: ctrlrl COMMAND ...\n\n" + "\n".join(lines) + "\n\nctrlrl COMMAND --help lists its options."
