"""Reading and writing the pack's files: safetensors with JSON metadata, written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import uuid
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

METADATA_KEY = "difflens"


class DiffLensError(ValueError):
    """Something the user gave does not fit. The message says what was found, what was expected and what to do."""


def digest(*parts: bytes | str) -> str:
    """Twelve hex digits that tell one sequence of bytes from another, however it is cut into parts."""
    found = sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:12]


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Twelve hex digits that tell one set of weights from another (names, shapes and rounded sums)."""
    return digest(
        *(f"{name}{tuple(w.shape)}{float(w.detach().double().sum()):.3e}" for name, w in sorted(weights.items()))
    )


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON-able `info` as one safetensors file, through a temporary name.

    `kind` ("sae", "recipe", ...) is stored so that `load_tensors` can refuse a file of another kind.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Not save_file, whose files only their owner may read.
    write_whole(path, save(contiguous, {METADATA_KEY: json.dumps({"kind": kind, **info})}))


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file through a temporary name, so that nobody ever finds half of it. Its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | Path, kind: str, needs: Iterable[str] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and info that `save_tensors` wrote under `kind`.

    Raises `DiffLensError` if the file is missing, truncated, of another kind, holds NaN or infinite numbers, or
    lacks one of `needs` (names of tensors or of info).
    """
    path = Path(path)
    if not path.is_file():
        raise DiffLensError(f"{path}: no such file. Expected a DiffLens {kind} file (.safetensors).")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        info = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise DiffLensError(
            f"{path.name}: not a readable safetensors file ({error}). It may be cut off: copy or download it again."
        ) from error
    found = info.pop("kind", None) if isinstance(info, dict) else None
    if found != kind:
        what = f"a DiffLens {found} file" if found else "a safetensors file without DiffLens metadata"
        raise DiffLensError(f"{path.name}: this is {what}, expected a DiffLens {kind} file.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DiffLensError(f"{path.name}: tensor {name} holds NaN or infinite numbers. The file is damaged.")
    missing = [name for name in needs if name not in tensors and name not in info]
    if missing:
        raise DiffLensError(f"{path.name}: lacks {', '.join(missing)}. Expected a {kind} file written by DiffLens.")
    return tensors, info


def difflens_kind(path: str | Path) -> str | None:
    """Kind of a file that `save_tensors` wrote ("denoiser", "sae", ...), None of any other file or a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[METADATA_KEY])["kind"]
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError):
        return None


def read_content(path: str | Path) -> Any:
    """What a safetensors or PyTorch file of another program holds, told apart by content; nothing in it is run.

    Raises `DiffLensError` if it is cut off or holds more than tensors and plain values.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(9)[8:] == b"{":
                with safe_open(path, framework="pt") as tensors:
                    return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message advises to load it unsafely
        raise DiffLensError(
            f"{path.name}: holds pickled objects that are not plain tensors, or is damaged. Such objects can run code "
            "and are never loaded. Save the state_dict alone."
        ) from None
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0] or "it ends too soon"
        raise DiffLensError(
            f"{path.name}: not a readable safetensors or PyTorch file ({reason}). It may be cut off: copy or download "
            "it again."
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file, told apart by content; nothing in it is run."""
    content = read_content(path)
    if isinstance(content, Tensor):
        return {"": content}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    items = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in items if isinstance(value, Tensor)}
