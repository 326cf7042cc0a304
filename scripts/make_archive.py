"""The archive of the pack that ComfyUI's registry takes: the repository without what .gitignore and .comfyignore name.

The registry's own program makes it when a version is published; this one makes the same, to be tested and looked at.

    python scripts/make_archive.py difflens.zip
"""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

from environment import REPOSITORY
from pathspec import GitIgnoreSpec

LARGEST = 50_000_000  # bytes


def archived(root: Path = REPOSITORY) -> list[str]:
    """Names of the archive's files, with "/" between folders on every system, sorted."""
    lines = [(root / name).read_text(encoding="utf-8") for name in (".gitignore", ".comfyignore")]
    left_out, found = GitIgnoreSpec.from_lines("\n".join([".git", *lines]).splitlines()), []
    for folder, folders, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not left_out.match_file(f"{(inside / name).as_posix()}/")]
        found += [(inside / name).as_posix() for name in files]
    return sorted(name for name in found if not left_out.match_file(name))


def make_archive(path: Path, root: Path = REPOSITORY) -> None:
    """Write the archive, as the registry's program compresses it."""
    names = archived(root)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(root / name, name)


def main() -> int:
    """Write the archive to the path in the command, tell its size; 1 if it is too large."""
    path = Path(sys.argv[1])
    make_archive(path)
    size = path.stat().st_size
    print(f"{path}: {size / 1e6:.1f} MB, {(LARGEST - size) / 1e6:.1f} MB below the limit")
    return int(size >= LARGEST)


if __name__ == "__main__":
    sys.exit(main())
