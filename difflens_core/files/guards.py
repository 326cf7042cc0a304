"""What a stranger's file must not do, and what to say of one that is no good."""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from torch import Tensor

from .errors import DiffLensError

ROOM, SPARE = 4, 2**20  # what a file's tensors may take: so many times its size, and so many bytes


def check_room(tensors: Iterable[Tensor], path: Path) -> None:
    """Raise `DiffLensError` if tensors would take far more memory than their file.

    A view can repeat one number as often as it likes, and a shape with a 0 in it can have any other numbers.
    """
    size, taken = path.stat().st_size, 0
    for tensor in tensors:
        taken += math.prod(max(1, n) for n in tensor.shape) * tensor.element_size()
        if taken > ROOM * size + SPARE:
            raise DiffLensError(
                f"{path.name}: its tensors would take far more memory than the file ({size} bytes) holds. It is "
                "damaged or made to do harm: choose another file."
            )


def tensors_in(content: Any) -> list[Tensor]:
    """All tensors in dictionaries and lists that may lie in one another, and even in themselves."""
    found, waiting, seen = [], [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return found


# What the pickle of a training's state names. torch allows more: a bytearray of any size, and text turned to bytes.
NAMED = re.compile(
    r"collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)|torch (Size|device|Tensor)"
    r"|torch\.serialization _get_layout|torch\.nn\.parameter Parameter|torch\._tensor _rebuild_from_type_v2"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|sparse_tensor|qtensor)"
    r"|torch (?!Untyped|Typed)\w+Storage|torch\.storage UntypedStorage|torch (b?float|u?int|complex|bool|q?u?int)\w*"
)
PICKLES = 5  # in a file of the kind that torch wrote before version 1.6, before its numbers


def check_pytorch(path: Path) -> None:
    """Raise `DiffLensError` for a PyTorch file that unpacks to more than it is, or whose pickle builds other objects.

    Whether it is whole is left to torch.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if not zipped:
        with path.open("rb") as file:
            check_pickles(file, PICKLES, path)
        return
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise DiffLensError(
                f"{path.name}: what is packed in it is larger than the file, as a zip bomb's is. Save the state_dict "
                "alone with torch.save, which packs nothing."
            )
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                check_pickles(io.BytesIO(archive.read(name)), 1, path)


class Left:
    """A file of which nobody is given room for more than is left of it: pickles promise texts of any length."""

    def __init__(self, file: BinaryIO):
        self.end = file.seek(0, os.SEEK_END)
        file.seek(0)
        self.file, self.readline, self.tell = file, file.readline, file.tell

    def read(self, n: int) -> bytes:
        return self.file.read(min(n, self.end - self.file.tell()))


def check_pickles(file: BinaryIO, count: int, path: Path) -> None:
    """Raise `DiffLensError` if one of `count` pickles in a row names what no state_dict needs."""
    left = Left(file)
    for _ in range(count):
        for operation, argument, _ in pickletools.genops(left):  # type: ignore[arg-type]
            if "GLOBAL" in operation.name and not NAMED.fullmatch(str(argument)):
                raise DiffLensError(
                    f"{path.name}: holds pickled objects that are not plain tensors ({argument}). Such objects can run "
                    "code and are never loaded. Save the state_dict alone."
                )


LARGEST_JSON = 8 * 2**20  # bytes; what Python makes of them can take 25 times as much


def parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    """The object in a JSON text that came with a file; `name` says where it stood.

    Raises `DiffLensError` if it is none, too large or nested too deeply.
    """
    if len(text) > LARGEST_JSON:
        raise DiffLensError(f"{name} is larger than {LARGEST_JSON >> 20} MB, too large for settings.")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested too deeply
        raise DiffLensError(f"{name} is not readable JSON ({error}). Copy or download it again.") from error
    if not isinstance(found, dict):
        raise DiffLensError(f"{name} holds a {type(found).__name__}, expected an object. Copy or download it again.")
    return found


def read_json(path: Path, name: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises `DiffLensError` that calls it `name` if it cannot be read or is none."""
    name = name or path.name
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_JSON + 1)
    except OSError as error:
        raise DiffLensError(f"{name} cannot be opened ({error.strerror}). Copy or download it again.") from error
    return parse_json(text, name)


# What files begin with that are taken for weights.
BEGINNINGS = {
    b"\x80": "a PyTorch file or another pickle", b"\xff\xd8\xff": "a JPEG", b"\x89PNG": "a PNG",
    b"GIF8": "a GIF", b"RIFF": "a WebP or another RIFF file", b"%PDF": "a PDF", b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "a NumPy file", b"\x1f\x8b": "a gzip archive", b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive", b"version https://git-lfs": "a pointer of Git LFS in place of the file",
}  # fmt: skip


def kind_of_file(path: Path) -> str:
    """What a file is that is not safetensors, "" if that cannot be told."""
    with path.open("rb") as file:
        head = file.read(512)
    if head[4:9] == b"\0\0\0\0{":  # the length of safetensors' header and its begin; the length may look like a pickle
        return ""
    if head.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception:  # cut off or damaged, which may bring up anything
            return ""
        return "a PyTorch file" if any(name.endswith("data.pkl") for name in names) else "a zip archive"
    if found := next((kind for start, kind in BEGINNINGS.items() if head.startswith(start)), ""):
        return found
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else a letter was cut in two
            return ""
        text = head[: error.start].decode()
    if len(head) < 16 or not all(letter.isprintable() or letter.isspace() for letter in text):
        return ""
    return "a web page" if text.lstrip().lower().startswith(("<!doctype html", "<html")) else "a text file"


def not_readable(path: Path, wanted: str, error: Exception) -> DiffLensError:
    """What to say of a file that could not be read as `wanted`."""
    kind = "" if isinstance(error, OSError) else kind_of_file(path)
    if kind and not ("PyTorch" in kind and "PyTorch" in wanted):
        return DiffLensError(f"{path.name}: not a readable {wanted} file, but {kind}. Choose another file.")
    plain = isinstance(error, (SafetensorError, OSError, RuntimeError, ValueError))
    reason = (plain and str(error).partition("\n")[0]) or "it ends too soon or is damaged"
    return DiffLensError(
        f"{path.name}: not a readable {wanted} file ({reason}). It may be cut off: copy or download it again."
    )
