"""Who may import whom: the core knows no host, its rooms import downwards, and only nodes/host touches ComfyUI."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOST = {"comfy", "comfy_extras", "comfy_execution", "comfy_api_nodes", "folder_paths", "server", "execution"}
HOST |= {"latent_preview", "node_helpers"}
LIBRARIES = {
    "torch",
    "numpy",
    "scipy",
    "safetensors",
    "PIL",
    "torchvision",
    "kornia",
    "diffusers",
    "torchmetrics",
    "tqdm",
    "tomli",
}
SLOW = {"diffusers", "kornia", "matplotlib", "torchmetrics", "torchvision", "transformers"}
# The rooms of the core from the top down: each may import from those below it, and from the files beside them.
ROOMS = [
    "commands", "report", "experiments", "explore", "steer", "locate", "measure", "classifiers", "sae", "networks",
    "activations", "files",
]  # fmt: skip
SHARED = ["targets", "deal", "processes"]  # from the top down, too; the room files lies below them
CORE = sorted(path for path in (ROOT / "difflens_core").rglob("*.py"))
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


def imports_of(path: Path) -> set[str]:
    return imported(path.read_text(encoding="utf-8"))


def label(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def faults(path: Path, names: set[str]) -> list[str]:
    """What a file of the core at `path` (below difflens_core) imports and may not."""
    room = path.parts[0] if len(path.parts) > 1 else ""
    beside = [] if room == "files" else SHARED if room else SHARED[SHARED.index(path.stem) + 1 :]
    below = beside + (ROOMS[ROOMS.index(room) + 1 :] if room else ["files"])
    up, found = "..", []
    if not room:
        up = "."
    for name in names:
        if not name.startswith("."):
            allowed = name.split(".")[0] in {*LIBRARIES, *sys.stdlib_module_names}
        elif room and not name.startswith(".."):
            allowed = (ROOT / "difflens_core" / room / f"{name[1:].split('.')[0]}.py").exists()
        else:
            # From another room by the names that it hands out, not by its files.
            allowed = name.removeprefix(up) in below
        found += [] if allowed else [name]
    return sorted(found)


def test_the_reader_of_imports_sees_every_form():
    source = "import a.b\nfrom c.d import e\ndef f():\n    from .. import g\n    from .h import i\n"
    assert imported(source) == {"a.b", "c.d", "..g", ".h"}


@pytest.mark.parametrize("path", [path for path in CORE if path.name != "__init__.py"], ids=label)
def test_the_core_imports_plain_libraries_and_rooms_below(path):
    assert not faults(path.relative_to(ROOT / "difflens_core"), imports_of(path))


def test_imports_that_point_up_around_or_out_are_faults():
    place = Path("locate/probes.py")
    assert faults(place, {"torch", "..files", "..sae", ".attribution"}) == []
    wrong = {"..steer", "..report", "..sae.autoencoder", ".missing", "comfy.sd", "matplotlib", "...nodes"}
    assert faults(place, wrong) == sorted(wrong)
    assert faults(Path("files/marks.py"), {"..targets", "..sae"}) == ["..sae", "..targets"]
    assert faults(Path("targets.py"), {".files", ".deal"}) == [] and faults(Path("deal.py"), {".targets"})


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_hands_out_its_names(room):
    module = importlib.import_module(f"difflens_core.{room}")
    assert module.__doc__.strip() and "\n" not in module.__doc__.strip()
    assert all(hasattr(module, name) for name in module.__all__)
    files = [path for path in CORE if path.parent.name == room and path.name != "__init__.py"]
    assert 4 <= len(files) <= 8


def test_every_file_of_the_core_is_in_a_room_or_shared():
    assert {path.parent.name for path in CORE} == {"difflens_core", *ROOMS}
    assert {path.stem for path in CORE if path.parent.name == "difflens_core"} == {"__init__", *SHARED}


@pytest.mark.parametrize("path", NODES, ids=label)
def test_only_host_files_touch_the_insides_of_comfyui(path):
    found = {name.split(".")[0] for name in imports_of(path)} & HOST
    assert not found or "host" in path.parts, f"imports {', '.join(sorted(found))}"
    api = {name for name in imports_of(path) if name.split(".")[0] == "comfy_api"}
    assert api <= {"comfy_api.latest"}


def at_once(source: str) -> set[str]:
    """Packages that a module imports when it is itself imported: those in functions and for types alone are not."""
    found, waiting = set(), [*ast.parse(source).body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {name.split(".")[0] for name in imported(ast.unparse(node))}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            waiting += node.orelse if types else [*ast.iter_child_nodes(node)]
    return found


def test_the_reader_of_imports_knows_which_are_at_once():
    source = "import a\nif TYPE_CHECKING:\n    import b\nelse:\n    import c\ndef f():\n    import d\n"
    assert at_once(source + "class E:\n    from e.f import g\n    def h(self):\n        import i\n") == {"a", "c", "e"}


@pytest.mark.parametrize("path", [*CORE, *NODES], ids=label)
def test_what_takes_long_to_load_is_loaded_where_it_is_needed(path):
    assert not at_once(path.read_text(encoding="utf-8")) & SLOW


def test_the_oldest_python_that_pyproject_names_can_read_every_file():
    """Its grammar alone: mypy holds the core against its standard library."""
    (minor,) = re.findall(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with pytest.raises(SyntaxError):
        ast.parse("try:\n    pass\nexcept* OSError:\n    pass", feature_version=(3, int(minor)))  # of 3.11
    for path in (ROOT / "__init__.py", *CORE, *NODES, *(ROOT / "scripts").rglob("*.py")):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, int(minor)))


def test_there_is_something_to_check():
    assert len(CORE) > 50 and len(NODES) > 15
    assert any({name.split(".")[0] for name in imports_of(path)} & HOST for path in NODES)
