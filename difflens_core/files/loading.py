"""Reading the pack's files, which are safetensors with JSON metadata, and those of other programs."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from .errors import DiffLensError
from .guards import check_pytorch, check_room, not_readable, parse_json, tensors_in
from .numbers import finite
from .writing import METADATA_KEY


@contextmanager
def unchanged(file: BinaryIO) -> Iterator[None]:
    """Raise OSError if somebody writes to the open file meanwhile: it may have been read half old, half new."""
    before = os.fstat(file.fileno())
    yield
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError("another program wrote to it while it was read: run again when that is done")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    It is read, not mapped as `safe_open` does: whoever wrote over a mapped file would change the tensors or end us.
    """
    with path.open("rb") as file, unchanged(file):
        content = file.read()
    tensors = dict(sorted(load(content).items()))  # which also checks the header, and has another order each time
    check_room(tensors.values(), path)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, header.get("__metadata__") or {}


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Let the `DiffLensError`s raised inside begin with the file's name, and all that goes wrong there become such.

    For what makes something of a file alone, and so can only fail because of what is in it.
    """
    name = Path(path).name
    try:
        yield
    except DiffLensError as error:
        raise DiffLensError(f"{name}: {str(error).removeprefix(f'{name}: ')}") from error
    except Exception as error:  # settings and tensors that are made up bring up anything
        reason = " ".join(str(error).split())[:300]
        raise DiffLensError(f"{name}: its settings are damaged ({reason}). Copy or download it again.") from error


def load_tensors(path: str | Path, kind: str, needs: Iterable[str] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and info that `save_tensors` wrote under `kind`.

    Raises `DiffLensError` if the file is missing, truncated, of another kind, holds NaN or infinite numbers, or
    lacks one of `needs` (names of tensors or of info).
    """
    path = Path(path)
    if not path.is_file():
        raise DiffLensError(f"{path}: no such file. Expected a DiffLens {kind} file (.safetensors).")
    try:
        tensors, metadata = read_safetensors(path)
    except DiffLensError:
        raise
    except Exception as error:  # headers that lie bring up anything, as the unpickler does
        raise not_readable(path, "safetensors", error) from error
    with reading(path):
        info = told(metadata)
    found = info.pop("kind", None)
    if found != kind:
        what = f"a DiffLens {found} file" if found else "a safetensors file without DiffLens metadata"
        raise DiffLensError(f"{path.name}: this is {what}, expected a DiffLens {kind} file.")
    try:
        tensors = finite(tensors)
    except DiffLensError as error:
        raise DiffLensError(f"{path.name}: {error}") from error
    missing = [name for name in needs if name not in tensors and name not in info]
    if missing:
        raise DiffLensError(f"{path.name}: lacks {', '.join(missing)}. Expected a {kind} file written by DiffLens.")
    return tensors, info


def told(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What the metadata of a safetensors file tells that `save_tensors` wrote; nothing if it is another's."""
    return parse_json((metadata or {}).get(METADATA_KEY, "{}"), "its metadata")


def difflens_info(path: str | Path) -> dict[str, Any]:
    """What `save_tensors` wrote beside the tensors, with the kind; nothing of any other file or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return told(file.metadata())
    except (SafetensorError, OSError, ValueError):
        return {}


def difflens_kind(path: str | Path) -> str | None:
    """Kind of a file that `save_tensors` wrote ("denoiser", "sae", ...), None of any other file or a damaged one."""
    return difflens_info(path).get("kind")


def read_content(path: str | Path) -> Any:
    """What a safetensors or PyTorch file of another program holds, told apart by content; nothing in it is run.

    Raises `DiffLensError` if it is cut off or holds more than tensors and plain values.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(9)[8:] == b"{":
                return read_safetensors(path)[0]
            check_pytorch(path)
            file.seek(0)
            with unchanged(file):
                content = torch.load(file, map_location="cpu", weights_only=True)
            check_room(tensors_in(content), path)
            return content
    except DiffLensError:
        raise
    except Exception as error:  # damaged files bring up anything: IndexError, KeyError, TypeError, MemoryError, ...
        # torch's own message advises to load it unsafely
        if isinstance(error, pickle.UnpicklingError) and looks_pickled(path):
            raise DiffLensError(
                f"{path.name}: holds pickled objects that are not plain tensors, or is damaged. Such objects can run "
                "code and are never loaded. Save the state_dict alone."
            ) from None
        raise not_readable(path, "safetensors or PyTorch", error) from error


def looks_pickled(path: Path) -> bool:
    """Whether a file begins as those of torch.save do, or another pickle."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"PK", b"\x80"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file, told apart by content; nothing in it is run."""
    content = read_content(path)
    if isinstance(content, Tensor):
        return {"": content.detach()}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    items = content.items() if isinstance(content, dict) else ()
    return {str(name): value.detach() for name, value in items if isinstance(value, Tensor)}
