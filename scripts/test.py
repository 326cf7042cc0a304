"""Run every check: style, unit tests, and tests in a real ComfyUI.

    python scripts/test.py               all of it; the first run makes two environments in .cache (about 5 GB)
    python scripts/test.py -k plots -x   further arguments go to pytest, which then runs in the first one alone

The second environment holds the other programs whose SAEs we read: each must read a file as we do.

Standard library only. Exits with 0 if all is well. Nothing is written outside the cache folder but temporary files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from environment import REPOSITORY, HostError, cache_folder, ensure_comfyui, ensure_environment, ensure_libraries

PACKAGES = ("pytest>=8", "hypothesis>=6", "ruff>=0.9", "diffusers>=0.42", "torchmetrics>=1.8")


def checks(python: Path, libraries: Path | None, pytest_arguments: list[str]) -> dict[str, list[str]]:
    """Each check's name and command."""
    cache = cache_folder()
    run = [str(python), "-m"]
    ruff = ["--cache-dir", str(cache / "ruff"), "--exclude", ".cache", "."]
    pytest = ["pytest", "-o", f"cache_dir={cache / 'pytest'}"]
    found = {
        "style": [*run, "ruff", "check", *ruff],
        "format": [*run, "ruff", "format", "--check", *ruff],
        "tests": [*run, *pytest, *pytest_arguments],
    }
    if libraries:
        found["libraries"] = [str(libraries), "-m", *pytest, "tests/sae/test_formats.py"]
    return found


def main() -> int:
    """Make the environments, run the checks; returns 0, or the exit code of the last that failed."""
    pytest_arguments = sys.argv[1:]
    try:
        python = ensure_environment(PACKAGES)
        ensure_comfyui()
        libraries = None if pytest_arguments else ensure_libraries()
    except HostError as error:
        print(error, file=sys.stderr)
        return 1
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(cache_folder() / "hypothesis")
    failed = 0
    for name, command in checks(python, libraries, pytest_arguments).items():
        print(f"--- {name}", flush=True)
        there = {"DIFFLENS_LIBRARIES": "1"} if name == "libraries" else {}
        failed = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **there}).returncode or failed
    return failed


if __name__ == "__main__":
    sys.exit(main())
