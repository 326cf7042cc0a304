"""Run the checks: style, types, and tests by themselves and in a real ComfyUI.

Standard library only. Exits with 0 if all is well. Nothing is written outside the cache folder but temporary files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from environment import (
    REPOSITORY,
    HostError,
    cache_folder,
    ensure_browser,
    ensure_comfyui,
    ensure_environment,
    ensure_libraries,
)

PACKAGES = (
    "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "ruff>=0.9", "mypy>=1.15", "diffusers>=0.42",
    "torchmetrics>=1.8", "kornia>=0.7.1", "transformers>=4.50", "playwright>=1.50", "pathspec>=1.0",
)  # fmt: skip
WORKERS = 2  # processes that share the test files; each starts a ComfyUI of its own
HELP = """
  python scripts/test.py               style, format, types, and all tests that are not slow; the first run makes an
                                       environment in .cache (about 3 GB), and on Debian, as root, installs Chromium
  python scripts/test.py --unit        without the tests in ComfyUI, and without getting a ComfyUI
  python scripts/test.py --slow        also the slow tests, and SAEs read by the programs that write such files; the
                                       first run makes a second environment for those (about 2 GB)
  python scripts/test.py -k plots -x   further arguments go to pytest (those programs are then left out)
"""


def checks(python: Path, libraries: Path | None, pytest_arguments: list[str]) -> dict[str, list[str]]:
    """Each check's name and command."""
    cache = cache_folder()
    run = [str(python), "-m"]
    ruff = ["--cache-dir", str(cache / "ruff"), "--exclude", ".cache", "."]
    pytest = ["pytest", "-o", f"cache_dir={cache / 'pytest'}"]
    found = {
        "style": [*run, "ruff", "check", *ruff],
        "format": [*run, "ruff", "format", "--check", *ruff],
        "types": [*run, "mypy", "--cache-dir", str(cache / "mypy")],
        "tests": [*run, *pytest, "-n", str(WORKERS), "--dist", "loadfile", *pytest_arguments],
    }
    if libraries:
        found["libraries"] = [str(libraries), "-m", *pytest, "tests/sae/test_formats.py"]
    return found


def without_browser() -> list[str]:
    """What pytest is to leave out because this machine has no browser and can get none: said, not an error."""
    try:
        ensure_browser()
    except HostError as error:
        print(f"{error} Those tests are left out.", file=sys.stderr)
        return ["--ignore=tests/host/page"]
    return []


def main() -> int:
    """Make the environments, run the checks; returns 0, or the exit code of the last that failed."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--unit | --slow] [arguments of pytest]", description=__doc__.splitlines()[0], epilog=HELP,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--unit", action="store_true", help="only what needs no ComfyUI")
    how.add_argument("--slow", action="store_true", help="also what takes long")
    options, further = parser.parse_known_args()
    try:
        python = ensure_environment(PACKAGES, comfyui=not options.unit)
        if not options.unit:
            ensure_comfyui()
        libraries = ensure_libraries() if options.slow and not further else None
    except HostError as error:
        print(error, file=sys.stderr)
        return 1
    left_out = ["--ignore=tests/host"] if options.unit else without_browser()
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // WORKERS))  # or they wait for one another
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(cache_folder() / "hypothesis")
    chosen = left_out + ["-m", ""] * options.slow
    failed = 0
    for name, command in checks(python, libraries, chosen + further).items():
        print(f"--- {name}", flush=True)
        there = {"DIFFLENS_LIBRARIES": "1"} if name == "libraries" else {}
        failed = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **there}).returncode or failed
    return failed


if __name__ == "__main__":
    sys.exit(main())
