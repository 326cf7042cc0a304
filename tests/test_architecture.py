"""Who may import whom: the core knows no host, and only host*.py of the nodes touch ComfyUI's insides."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = {"comfy", "comfy_extras", "comfy_execution", "comfy_api_nodes", "folder_paths", "server", "execution"}
CORE = sorted((ROOT / "difflens_core").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))


def imported(source: str) -> set[str]:
    """Dotted names of everything a module imports, anywhere in it; relative ones keep their dots."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module} if node.module else {module + alias.name for alias in node.names}
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}


def test_the_reader_of_imports_sees_every_form():
    source = "import a.b\nfrom c.d import e\ndef f():\n    from .. import g\n    from .h import i\n"
    assert imported(source) == {"a.b", "c.d", "..g", ".h"}


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_imports_only_itself_and_plain_libraries(path):
    libraries = {"torch", "numpy", "scipy", "safetensors", "PIL", "torchvision", "kornia", "diffusers", "torchmetrics"}
    allowed = {"", *libraries, *sys.stdlib_module_names}
    assert roots(path) <= allowed
    assert not [name for name in imported(path.read_text(encoding="utf-8")) if name.startswith("..")]


@pytest.mark.parametrize("path", NODES, ids=lambda path: path.name)
def test_only_host_files_touch_the_insides_of_comfyui(path):
    found = roots(path) & HOST
    assert not found or path.name.startswith("host"), f"{path.name} imports {', '.join(sorted(found))}"
    api = {name for name in imported(path.read_text(encoding="utf-8")) if name.split(".")[0] == "comfy_api"}
    assert api <= {"comfy_api.latest"}


def test_there_is_something_to_check():
    assert len(CORE) > 10 and "host.py" in {path.name for path in NODES}
    assert roots(ROOT / "nodes" / "host.py") & HOST
