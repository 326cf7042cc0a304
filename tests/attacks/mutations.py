"""Broken and hostile copies of good files, by what the files are: each is told by a seed.

A copy is made by one to three changes. Those of a known structure leave all around them right (lengths, checksums), so
that they get as far into the loader as they can.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

Draw = random.Random
Change = Callable[[bytes, Draw], bytes]

TEXTS = (
    "", "a" * 5000, "../../outside", "/etc/passwd", "C:\\outside", "NUL", "CON.safetensors", "naïve 名前 🙂", "a\nb",
    "\x1b[31m", "\u202egnp.exe", "\ud800", "\0", "<script>alert(1)</script>", "%s{0}", "None", "1e999", "topk",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 255, 4097, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**40, 0.5, -0.5, 1e-320, 1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], [1, 2, 3], {"a": 1}, ["a", "b"], [0.5] * 9)
LARGEST_CHANGED = 10**7  # elements: an earlier change may have made a tensor of gigabytes out of one number
DTYPES = (
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.uint8, torch.uint16,
)  # fmt: skip
# safetensors' names of them and some that there are not.
NAMED_DTYPES = (
    "F64",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "F6_E2M3",
    "I8",
    "I64",
    "U64",
    "BOOL",
    "C64",
    "F32",
    "X",
)


def mutated(files: Mapping[str, bytes], seed: str) -> dict[str, bytes]:
    """The files with one to three changes in one of them, or in several."""
    draw, found = Draw(seed), dict(files)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        name = draw.choice(sorted(found))
        change = draw.choice(changes_of(name, found[name]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about sparse and quantised tensors
                found[name] = change(found[name], draw)
        except Exception:  # an earlier change left no structure for this one
            found[name] = broken_bytes(found[name], draw)
    return found


def changes_of(name: str, content: bytes) -> list[Change]:
    """What can be done to a file of that name and content."""
    if content[8:9] == b"{":
        return [
            broken_bytes,
            in_header,
            in_header,
            in_header,
            in_info,
            in_info,
            with_length,
            other_tensors,
            other_tensors,
        ]
    if content.startswith(b"PK"):
        return [broken_bytes, in_pickle, in_pickle, in_archive, other_content, other_content]
    if content.startswith(b"\x80"):
        return [broken_bytes, broken_bytes, other_content]
    if content.startswith(b"\x89PNG"):
        return [broken_bytes, in_chunks, in_chunks]
    if name.endswith(".json"):
        return [broken_bytes, in_json, in_json, in_json, nested]
    if name.endswith((".csv", ".toml")):
        return [broken_bytes, in_lines, in_lines, nested]
    return [broken_bytes]


# --- any bytes ---


def broken_bytes(content: bytes, draw: Draw) -> bytes:
    """Bytes flipped, cut out, put in, taken from elsewhere in the file, repeated, or the end cut off."""
    at, other = draw.randrange(len(content) + 1), draw.randrange(len(content) + 1)
    n = draw.choice((1, 1, 2, 4, 8, 64, 1000))
    begin, end = content[:at], content[at:]
    return draw.choice((
        lambda: begin + draw.randbytes(n) + end[n:],
        lambda: begin + end[n:],
        lambda: begin + draw.randbytes(n) + end,
        lambda: begin + content[other : other + n] + end[n:],
        lambda: begin + bytes(n) + end[n:],
        lambda: begin + b"\xff" * n + end[n:],
        lambda: begin + content[other : other + n] * draw.choice((1, 2, 100)) + end,
        lambda: begin,
        lambda: content + content,
    ))()  # fmt: skip


def nested(content: bytes, draw: Draw) -> bytes:
    """Brackets as deep as nobody writes them."""
    deep = draw.choice((50, 2000, 100_000))
    opened, closed = draw.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"[", b""), (b"{", b"")))
    at = draw.choice((0, content.find(b":") + 1, content.find(b"=") + 1))
    return content[:at] + opened * deep + b"1" + closed * deep + draw.choice((b"", content[at:]))


# --- JSON ---


def value(draw: Draw) -> Any:
    return draw.choice(draw.choice((TEXTS, NUMBERS, OTHERS)))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container of a tree with a key of its."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        keys = node if isinstance(node, dict) else range(len(node))
        for key in list(keys):
            found.append((node, key))
            if isinstance(node[key], (dict, list)):
                waiting.append(node[key])
    return found


def change_tree(tree: Any, draw: Draw) -> None:
    """One entry somewhere in nested dictionaries and lists replaced, taken out, added, renamed or moved."""
    found = places(tree)
    if not found:
        tree[draw.choice(TEXTS)] = value(draw)
        return
    node, key = draw.choice(found)
    now, what = node[key], draw.randrange(7)
    if what == 0 and isinstance(now, (int, float)):
        node[key] = draw.choice((now + 1, now - 1, -now, now * 1000, now / 3, str(now), [now]))
    elif what == 1:
        del node[key]
    elif what == 2 and isinstance(node, dict):
        node[draw.choice(TEXTS)] = node.pop(key)
    elif what == 3:
        other, its = draw.choice(found)
        node[key] = json.loads(json.dumps(other[its]))
    elif what == 4 and isinstance(now, list):
        now *= draw.choice((2, 3, 1000))
    elif what == 5 and isinstance(now, dict):
        now[draw.choice(TEXTS)] = value(draw)
    else:
        node[key] = value(draw)


def in_json(content: bytes, draw: Draw) -> bytes:
    tree = json.loads(content)
    change_tree(tree, draw)
    return json.dumps(tree).encode()


# --- safetensors ---


def in_header(content: bytes, draw: Draw) -> bytes:
    """A header that lies about a type, a shape, an offset or a name, with its own length right."""
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    names = [name for name in header if name != "__metadata__"]
    entry = header[draw.choice(names)]
    what = draw.randrange(6)
    if what == 0:
        entry["dtype"] = draw.choice(NAMED_DTYPES)
    elif what == 1:
        entry["shape"] = [
            draw.choice((*entry["shape"], 0, 1, -1, 10**6, 2**40, 2**63 - 1)) for _ in range(draw.randrange(7))
        ]
    elif what == 2:
        entry["data_offsets"][draw.randrange(2)] = draw.choice((0, 1, len(content), 10**12, 2**63, 2**64 - 1, -1))
    elif what == 3:
        entry["data_offsets"] = list(draw.choice([header[name]["data_offsets"] for name in names]))
    elif what == 4:
        header[draw.choice(TEXTS)] = {"dtype": "F32", "shape": [draw.choice((0, 2**40)), 0], "data_offsets": [0, 0]}
    else:
        change_tree(header, draw)
    return with_header(header, content[8 + n :])


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def in_info(content: bytes, draw: Draw) -> bytes:
    """Settings of ours that lie, in a file that is right."""
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    metadata = header.setdefault("__metadata__", {})
    text = metadata.get("difflens", "{}").encode()
    change = draw.choice((in_json, in_json, in_json, in_json, nested, broken_bytes))
    metadata["difflens"] = change(text, draw).decode(errors="replace")
    return with_header(header, content[8 + n :])


def with_length(content: bytes, draw: Draw) -> bytes:
    """A length of the header that is not its own."""
    n = int.from_bytes(content[:8], "little")
    lie = draw.choice((0, 1, n - 1, n + 1, len(content), 10**8, 10**8 + 1, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", lie) + content[8:]


def other_tensors(content: bytes, draw: Draw) -> bytes:
    """A whole file whose tensors are not those that are expected."""
    n = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + n]).get("__metadata__")
    tensors: dict[str, Any] = load(content)
    change_tensors(tensors, draw)
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def change_tensors(tensors: dict[str, Any], draw: Draw) -> None:
    """One tensor of another type, shape, value or name."""
    small = (name for name, found in tensors.items() if isinstance(found, Tensor) and found.numel() <= LARGEST_CHANGED)
    name = draw.choice(sorted(small))
    now = tensors[name]
    what = draw.randrange(6)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[draw.choice((*TEXTS, *map(str, tensors), name + ".extra", f"9/{name}"))] = now
    elif what == 2:
        tensors[name] = now.to(draw.choice(DTYPES))
    elif what == 3 and now.numel():
        flat = now.clone().flatten()
        if flat.is_floating_point():
            flat[draw.randrange(len(flat))] = draw.choice((torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-40, 0.0))
        else:
            flat[draw.randrange(len(flat))] = draw.choice((-1, 0, 1, 99, 127))
        tensors[name] = flat.view(now.shape)
    elif what == 4:
        tensors[name] = torch.zeros_like(now)
    else:
        tensors[name] = reshaped(now, draw)


def reshaped(tensor: Tensor, draw: Draw) -> Tensor:
    return draw.choice((
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor.movedim(0, -1),
        lambda: tensor[:0],
        lambda: tensor[:1],
        lambda: tensor[..., :1],
        lambda: torch.cat([tensor, tensor]),
        lambda: tensor.new_zeros(()),
        lambda: tensor.new_zeros((10**6, 10**6, 0)),
        lambda: tensor.new_zeros([draw.randrange(4) for _ in range(tensor.ndim)]),
    ))()  # fmt: skip


# --- PyTorch ---


class Code:
    """What would make a folder if somebody unpickled it."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("code_was_run",)


class Called:
    """What is made by a call when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.made = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.made


def hostile_objects(draw: Draw, some: Tensor) -> Any:
    """One thing that a pickle can hold and a state_dict does not."""
    return draw.choice((
        lambda: Code(),
        lambda: Called(bytearray, 10**10),
        lambda: Called(torch.FloatTensor, 10**10),
        lambda: some.new_zeros(1).expand(10**5, 10**5),
        lambda: torch.as_strided(some.new_zeros(9), (3, 10**9), (1, 0)),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (10**9, 10**9)),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.nn.Parameter(torch.ones(3)),
        lambda: torch.empty(10**9, device="meta"),
        lambda: torch.ones(3, dtype=torch.complex64),
        lambda: value(draw),
        lambda: {"state_dict": {"model": {"ema": 1}}},
        lambda: set(range(9)),
    ))()  # fmt: skip


def other_content(content: bytes, draw: Draw) -> bytes:
    """A whole file, zipped or of the older kind, that holds something else."""
    found = torch.load(io.BytesIO(content), weights_only=True)
    state = found
    for _ in range(3):  # not for ever: an earlier change may have put it into itself
        if isinstance(state, dict) and not any(isinstance(part, Tensor) for part in state.values()):
            state = next(part for part in state.values() if isinstance(part, dict))
    if not isinstance(state, dict):
        found = state = {"": found}
    what = draw.randrange(4)
    if what == 0:
        some = next(part for part in state.values() if isinstance(part, Tensor))
        state[draw.choice((*map(str, state), "more"))] = hostile_objects(draw, some)
    elif what == 1:
        key = draw.choice(("ema", "state_dict", "model"))
        found = draw.choice(({key: found}, [found], {key: {key: found}}, list(state.values()), None, "text", 7))
        if isinstance(found, dict) and draw.random() < 0.3:
            found[key] = found
    else:
        change_tensors(state, draw)
    if isinstance(found, dict) and set(found) == {""}:
        found = found[""]
    file = io.BytesIO()
    torch.save(found, file, _use_new_zipfile_serialization=content.startswith(b"PK") != (draw.random() < 0.1))
    return file.getvalue()


def entries_of(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def zipped(entries: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def in_pickle(content: bytes, draw: Draw) -> bytes:
    """The pickle damaged, in an archive whose checksums are right; numbers in it are lied about now and then."""
    entries = entries_of(content)
    at = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    name, told = entries[at]
    if draw.random() < 0.5:
        numbers = [
            i for i, byte in enumerate(told) if byte in b"KMJ"
        ]  # what a small, a middle or a large one begins with
        place = draw.choice(numbers)
        lie = pickle.dumps(draw.choice((0, 1, 7, 10**3, 10**6, 2**31 - 1, -1)), 2)[2:-1]
        size = {ord("K"): 2, ord("M"): 3, ord("J"): 5}[told[place]]
        told = told[:place] + lie + told[place + size :]
    else:
        told = broken_bytes(told, draw)
    entries[at] = name, told
    return zipped(entries)


def in_archive(content: bytes, draw: Draw) -> bytes:
    """An archive with other entries, other names, or packed so that it holds far more than it is."""
    entries, how = entries_of(content), zipfile.ZIP_STORED
    at = draw.randrange(len(entries))
    name, told = entries[at]
    what = draw.randrange(6)
    if what == 0:
        how = zipfile.ZIP_DEFLATED
    elif what == 1:
        entries[at], how = (name, bytes(2 * 10**6)), zipfile.ZIP_DEFLATED
    elif what == 2:
        del entries[at]
    elif what == 3:
        entries[at] = draw.choice(("../../outside", "/etc/outside", "archive/../data.pkl", name + "\0", "NUL")), told
    elif what == 4:
        entries[at] = name, broken_bytes(told, draw)
    else:
        entries.append((name, told[: draw.randrange(len(told) + 1)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two entries of one name
        return zipped(entries, how)


# --- pictures and text ---


def in_chunks(content: bytes, draw: Draw) -> bytes:
    """A PNG whose sizes lie, or whose chunks are others, with checksums that are right."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        n = int.from_bytes(content[at : at + 4], "big")
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + n]))
        at += 12 + n
    which = draw.randrange(len(chunks))
    kind, told = chunks[which]
    what = draw.randrange(6)
    if what == 0:
        sides = [draw.choice((0, 1, 64, 9999, 10**5, 2**31 - 1)) for _ in range(2)]
        chunks[0] = b"IHDR", struct.pack(">II", *sides) + chunks[0][1][8:]
    elif what == 1:
        chunks[0] = b"IHDR", chunks[0][1][:8] + bytes(draw.choice((0, 1, 2, 3, 4, 6, 8, 16, 255)) for _ in range(5))
    elif what == 2:
        del chunks[which]
    elif what == 3:
        chunks.insert(which, draw.choice(chunks))
    elif what == 4:
        chunks[which] = kind, broken_bytes(told, draw)
    else:
        chunks.insert(1, (draw.choice((b"iCCP", b"zTXt", b"tRNS", b"PLTE")), b"a\0\0" + zlib.compress(bytes(10**6))))
    body = b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    )
    return content[:8] + body


def in_lines(content: bytes, draw: Draw) -> bytes:
    """A table or settings with a word replaced, or a line doubled, moved or taken out."""
    lines = content.decode(errors="replace").splitlines(keepends=True)
    at = draw.randrange(len(lines))
    what = draw.randrange(4)
    if what == 0:
        del lines[at]
    elif what == 1:
        lines.insert(draw.randrange(len(lines)), lines[at])
    elif what == 2:
        lines[at] *= 1000 if len(lines[at]) < 1000 else 1
    else:
        sign = draw.choice((",", " = "))
        words = lines[at].rstrip("\r\n").split(sign)
        words[draw.randrange(len(words))] = draw.choice(
            (str(value(draw)), json.dumps(value(draw)), '"', "'''", "[[", "9" * 5000)
        )
        lines[at] = sign.join(words) + "\n"
    return "".join(lines).encode(errors="surrogatepass")
