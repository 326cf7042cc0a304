"""A real ComfyUI with the pack in it, started once for all host tests."""

from __future__ import annotations

import compileall
import importlib
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "scripts"), str(Path(__file__).resolve().parent)]

from host import Server  # noqa: E402
from make_archive import make_archive  # noqa: E402


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the registry would take."""
    path = tmp_path_factory.mktemp("archive") / "pack.zip"
    make_archive(path)
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Iterator[Server]:
    """Started with an empty base folder and the pack as it comes out of its archive, models and all."""
    pack = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(pack)
    compileall.compile_dir(pack, quiet=1)
    with Server(pack, base=tmp_path_factory.mktemp("comfyui"), boot_timeout=900) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict:
    return server.object_info()


@pytest.fixture(scope="session")
def inside() -> ModuleType:
    """ComfyUI and the pack in this process, for tests that look at the host's own objects: see `inside.py`."""
    return importlib.import_module("inside")
