"""Writing files, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from .errors import NotWritten

METADATA_KEY = "difflens"


def save_tensors(path: str | Path, kind: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON-able `info` as one safetensors file, through a temporary name.

    `kind` ("sae", "recipe", ...) is stored so that `load_tensors` can refuse a file of another kind.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Not save_file, whose files only their owner may read.
    write_whole(path, save(contiguous, {METADATA_KEY: json.dumps({"kind": kind, **info})}))


REMEDIES = {
    errno.ENOSPC: "Make room on the disk",
    errno.EDQUOT: "Make room on the disk",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.EISDIR: "Choose another name",
    errno.EEXIST: "Choose another name",
    errno.ENOTDIR: "Choose another name",
    errno.EROFS: "Choose a folder that can be written to",
}  # fmt: skip


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Let an `OSError` inside become a `NotWritten` that says what could not be written, why and what to do."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "See that its folder can be written to and no program has it open")
        raise NotWritten(f"{path} could not be written: {error.strerror or error}. {remedy}.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. What is there at the end takes its place, so that nobody ever finds half of it.

    Its folder is made if need be. Raises `NotWritten`.
    """
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.tmp")
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # else this would hide what went wrong before
                temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file as `replacing` does.

    A file that holds just that is left alone, so that its time says when it changed. Raises `NotWritten`.
    """
    path = Path(path)
    with written(path):
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return
    with replacing(path) as temporary:
        temporary.write_bytes(content)
