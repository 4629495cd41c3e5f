"""`python -m ctrlrl` and the `ctrlrl` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from ctrlrl.cli.main import run

    # An installed command does not look for `module:ID` in the current folder, as `python -m` does. Last, so that no
    # file there takes the place of a package.
    if not sys.flags.safe_path:
        sys.path.append(os.getcwd())
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
