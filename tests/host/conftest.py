"""A real ComfyUI with the pack in it, started once for all host tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "scripts"), str(Path(__file__).resolve().parent)]

from host import Server  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started with an empty base folder; the models are those that the pack ships."""
    with Server(base=tmp_path_factory.mktemp("comfyui"), boot_timeout=900) as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict:
    return server.object_info()


@pytest.fixture(scope="session")
def inside() -> ModuleType:
    """ComfyUI and the pack in this process, for tests that look at the host's own objects: see `inside.py`."""
    return importlib.import_module("inside")
