"""The archive that the registry would take: how large it is, how long it takes to load, and what comes out of it.

The server of all host tests runs the pack as it comes out of this archive.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from make_archive import LARGEST
from PIL import Image
from small_graphs import OF_SCENES

ROOT = Path(__file__).resolve().parents[2]


def told(capfd: pytest.CaptureFixture, text: str) -> None:
    """Print a figure even if the test passes."""
    with capfd.disabled():
        print(f"\n{text}", file=sys.stderr)


def test_the_archive_is_not_too_large(archive, capfd):
    size = archive.stat().st_size
    told(capfd, f"archive: {size / 1e6:.1f} MB")
    assert size < LARGEST


def test_the_archive_holds_what_the_pack_needs_and_nothing_it_is_made_with(archive):
    names = zipfile.ZipFile(archive).namelist()
    needed = [
        path.relative_to(ROOT).as_posix()
        for pattern in ("LICENSE", "workflows/**/*.json", "web/**/*.md", "models/*/*/**/*.safetensors", "subgraphs/*")
        for path in ROOT.glob(pattern)
        # With the people in scenes and their workflow the archive would be too large.
        if "scenes" not in path.parts and path.stem.replace("_", " ") != OF_SCENES
    ]
    assert len(needed) > 60 and not {*needed} - {*names}
    tops = {name.split("/")[0] for name in names}
    assert not tops & {"tests", "scripts", "benchmarks", ".git", ".cache", ".ci"}
    assert not [name for name in names if name.endswith(".pyc") or name.startswith("models/making/")]


def test_the_pack_loads_fast(inside, capfd):
    told(capfd, f"import of the pack: {inside.IMPORT_SECONDS:.2f} s of processor time")
    assert inside.IMPORT_SECONDS < 1


def test_the_nodes_of_the_archive_are_there(server, object_info):
    assert not server.pack.is_relative_to(ROOT)
    own = [name for name in object_info if name.startswith("DiffLens")]
    templates = json.loads(server.request("/workflow_templates"))
    assert len(own) >= 29 and len(templates["ComfyUI-DiffLens"]) >= 12


@pytest.mark.parametrize("name, width, height", [("icon", 400, 400), ("banner", 1260, 540)])
def test_the_pictures_for_the_registry_have_its_shapes(name, width, height):
    path = ROOT / "docs" / f"{name}.png"
    assert Image.open(path).size == (width, height) and path.stat().st_size < 100_000
