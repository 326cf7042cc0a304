"""Run every check: style, unit tests, and tests in a real ComfyUI.

    python scripts/test.py               all of it; the first run makes an environment in .cache
    python scripts/test.py -k plots -x   further arguments go to pytest

Standard library only. Exits with 0 if all is well. Nothing is written outside the cache folder but temporary files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from environment import REPOSITORY, HostError, cache_folder, ensure_comfyui, ensure_environment

PACKAGES = ("pytest>=8", "hypothesis>=6", "ruff>=0.9", "diffusers>=0.42")


def checks(python: Path, pytest_arguments: list[str]) -> dict[str, list[str]]:
    """Each check's name and command."""
    cache = cache_folder()
    run = [str(python), "-m"]
    ruff = ["--cache-dir", str(cache / "ruff"), "--exclude", ".cache", "."]
    return {
        "style": [*run, "ruff", "check", *ruff],
        "format": [*run, "ruff", "format", "--check", *ruff],
        "tests": [*run, "pytest", "-o", f"cache_dir={cache / 'pytest'}", *pytest_arguments],
    }


def main() -> int:
    """Make the environment, run the checks; returns 0, or the exit code of the last that failed."""
    try:
        python = ensure_environment(PACKAGES)
        ensure_comfyui()
    except HostError as error:
        print(error, file=sys.stderr)
        return 1
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(cache_folder() / "hypothesis")
    failed = 0
    for name, command in checks(python, sys.argv[1:]).items():
        print(f"--- {name}", flush=True)
        failed = subprocess.run(command, cwd=REPOSITORY).returncode or failed
    return failed


if __name__ == "__main__":
    sys.exit(main())
