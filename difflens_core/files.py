"""Reading and writing the pack's files: safetensors with JSON metadata, written whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import pickletools
import re
import uuid
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

METADATA_KEY = "difflens"


LONGEST_MESSAGE, ITS_END = 1000, 300  # letters; of the end, which says what to do


class DiffLensError(ValueError):
    """Something the user gave does not fit. The message says what was found, what was expected and what to do.

    It is one line of printable letters and not too long, whatever a stranger's file calls its parts.
    """

    def __init__(self, message: str):
        message = "".join(letter if letter.isprintable() else " " for letter in message)
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE - ITS_END]} ... {message[-ITS_END:]}"
        super().__init__(message)


class NotWritten(DiffLensError):
    """A file could not be written. The message says why and what to do."""


def digest(*parts: bytes | str) -> str:
    """Twelve hex digits that tell one sequence of bytes from another, however it is cut into parts."""
    found = sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:12]


# Steps of a mark's second part for each octave: a tensor grown by a tenth is three of them. Of smaller tensors than
# MANY the rounding of single numbers would be seen.
LEVELS, MANY = 24, 512


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A mark that tells one set of weights from another, and is the same in fp32, fp16, bf16 and fp8.

    Twelve hex digits of what rounding leaves alone, names, shapes and signs; after a "-" the logarithms of the larger
    tensors' root mean squares, added up. Rounding may move that by one, where it lies between two steps: compare by
    `same_weights`. "" if there are no weights.
    """
    level = 0.0
    parts: list[bytes | str] = []
    for name, weight in sorted(weights.items()):
        values = weight.detach().cpu().float().contiguous()
        parts += [f"{name}{tuple(values.shape)}", np.packbits(values.signbit().numpy()).tobytes()]
        square = float(values.double().square().mean()) if values.numel() >= MANY else 0.0
        level += math.log2(square) / 2 if square else 0.0
    return f"{digest(*parts)}-{round(LEVELS * level)}" if parts else ""


def same_weights(mark: str, other: str) -> bool:
    """Whether two marks of `fingerprint` or of `sums_mark` are of the same weights."""
    one, two = (re.fullmatch(r"([0-9a-f]{12})-(-?\d+)", text) for text in (mark, other))
    if not one or not two:
        return mark == other
    return one[1] == two[1] and abs(int(one[2]) - int(two[2])) <= 1


def made_by(mark: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether the mark in a file is that of these weights, in any precision, or the one that version 0.4 gave them."""
    return same_weights(mark, fingerprint(weights)) or mark == sums_mark(weights)


def sums_mark(tensors: Mapping[str, Tensor]) -> str:
    """Twelve hex digits of names, shapes and rounded sums: the mark of weights in files of version 0.4 and before."""
    return digest(
        *(f"{name}{tuple(t.shape)}{float(t.detach().cpu().double().sum()):.3e}" for name, t in sorted(tensors.items()))
    )


def finite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of fp8 in fp32, because hardly anything can be computed in it.

    Raises `DiffLensError` if one holds NaN or infinite numbers, or none that can be read.
    """
    found = {}
    for name, tensor in tensors.items():
        try:
            small = tensor.is_floating_point() and tensor.element_size() == 1
            found[name] = tensor.float() if small else tensor
            single = found[name].float() if tensor.dtype == torch.float64 else found[name]  # which may not hold it
            fine = not tensor.is_floating_point() or bool(torch.isfinite(single).all())
        except (NotImplementedError, RuntimeError) as error:  # sparse, packed, or without any content
            raise DiffLensError(
                f"tensor {name} is of a kind that cannot be read here ({tensor.dtype}, {tensor.layout}, on "
                f"{tensor.device}). Save it as an ordinary tensor."
            ) from error
        if not fine:
            raise DiffLensError(f"tensor {name} holds NaN or infinite numbers. The file is damaged.")
    return found


def refuse_whole_numbers(tensors: Mapping[str, Tensor], counts: Collection[str] = ()) -> None:
    """Raise `DiffLensError` if a tensor holds whole numbers, unless the last part of its name is one of `counts`."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and name.rpartition(".")[2] not in counts:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DiffLensError(
                f"tensor {name} holds whole numbers ({kind}), so its weights are quantised in a way that is not known "
                "here. Use the file in fp32, fp16, bf16 or fp8."
            )


def as_half(tensor: Tensor) -> Tensor:
    """The tensor in fp16, or in fp32 if its numbers are too large or too small for that."""
    largest, limits = float(tensor.detach().abs().max()) if tensor.numel() else 0.0, torch.finfo(torch.float16)
    return tensor.half() if not largest or limits.smallest_normal <= largest <= limits.max else tensor.float()


UNIT = ".unit"  # what the name of the units ends with that a tensor `in_bytes` is counted in


def in_bytes(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The tensors, those of these names in whole numbers up to 127 of a unit of each line, along their last axis."""
    stored = dict(tensors)
    for name in names & stored.keys():
        tensor = stored[name].detach().float()
        largest = tensor.abs().amax(dim=-1) if tensor.shape[-1] else tensor.new_zeros(tensor.shape[:-1])
        unit = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
        stored[name], stored[name + UNIT] = (tensor / unit[..., None]).round().to(torch.int8), unit
    return stored


def out_of_bytes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `in_bytes` was given, in fp32. Raises `DiffLensError` if units do not fit."""
    read = {name: tensor for name, tensor in tensors.items() if not name.endswith(UNIT)}
    for name in tensors.keys() - read.keys():
        whole, unit = read.get(name.removesuffix(UNIT)), tensors[name]
        if whole is None or whole.dtype != torch.int8 or whole.shape[:-1] != unit.shape:
            raise DiffLensError(f"{name} does not fit what it is the unit of. The file is damaged.")
        read[name.removesuffix(UNIT)] = whole * unit.float()[..., None]
    return read


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


# --- what a stranger's file must not do ---


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
