"""python -m difflens_core.commands, and what `difflens` runs: also where what it needs is not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Names what is not installed: `pip install .` takes neither torch nor more,
    as ComfyUI has them.
    """
    try:
        from .cli import run

        return run(arguments)
    except ModuleNotFoundError as error:
        print(f'difflens: {error.name} is not installed. In the repository: pip install ".[commands]"', file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
