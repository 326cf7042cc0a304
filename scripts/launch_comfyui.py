"""Run a ComfyUI folder's main.py as `python main.py` would, on a torch whose companions may not fit it.

    python launch_comfyui.py COMFYUI_FOLDER [ComfyUI's own options]

A machine without a GPU may hold a CPU build of torch beside CUDA builds of torchvision and torchaudio. The
compiled libraries of the two then cannot load, and ComfyUI fails at import although it needs nothing from
them. Where that is so (read from the installed version files, without importing torch) the two are made
importable; everywhere else this file changes nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import re
import runpy
import sys
import threading
from collections.abc import Callable
from pathlib import Path

EXIT_WITH_PARENT = "DIFFLENS_EXIT_WITH_PARENT"
_libraries = []  # torch.library definitions live only as long as their Library object


def is_gpu_build(package: str) -> bool | None:
    """Whether an installed torch package was compiled for a GPU; None if it is not installed.

    Reads `<package>/version.py`, which tells by `+cu130` or `+rocm7.0` in the version, or by a `cuda` or
    `hip` line that is not None.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    return bool(re.search(r"__version__ = '[^']*\+(cu\d|rocm)|^(cuda|hip)\b[^=]*= '", text, re.MULTILINE))


def mend_torchvision() -> None:
    """Declare the two operators that `import torchvision` registers fake kernels for."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def mend_torchaudio() -> None:
    """Let torchaudio's loader report its compiled library as absent, which torchaudio supports."""
    name = "torchaudio._extension.utils"
    folder = Path(importlib.util.find_spec("torchaudio").origin).parent
    spec = importlib.util.spec_from_file_location(name, folder / "_extension" / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._load_lib = lambda lib: False
    sys.modules[name] = module


class MendOnImport(importlib.abc.MetaPathFinder):
    """Run a package's mend just before its first import, so that nothing is imported earlier than usual."""

    def __init__(self, mends: dict[str, Callable[[], None]]) -> None:
        self.mends = mends

    def find_spec(self, fullname, path=None, target=None):
        """Find nothing itself: the ordinary finders go on after the mend."""
        mend = self.mends.pop(fullname, None)
        if mend:
            mend()
        return None


def needed_mends() -> dict[str, Callable[[], None]]:
    """The mends for GPU builds that stand beside a CPU build of torch."""
    if is_gpu_build("torch") is not False:
        return {}
    mends = {"torchvision": mend_torchvision, "torchaudio": mend_torchaudio}
    return {package: mend for package, mend in mends.items() if is_gpu_build(package)}


def install_mends() -> None:
    """Arrange the mends, where any is needed, for a later `import torchvision` or `import torchaudio`."""
    mends = needed_mends()
    if mends:
        sys.meta_path.insert(0, MendOnImport(mends))


def exit_with_parent() -> None:
    """End this process when the other end of its standard input closes, that is when its parent is gone."""
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Set up sys.path and sys.argv as `python main.py` does, then run it."""
    folder = Path(sys.argv[1]).resolve()
    # Only where asked, and not on Windows: a blocked read of a pipe there blocks other users of the handle.
    if os.environ.get(EXIT_WITH_PARENT) and os.name == "posix":
        threading.Thread(target=exit_with_parent, daemon=True).start()
    install_mends()
    sys.path[0] = str(folder)
    sys.argv = [str(folder / "main.py"), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
