"""Folders of pictures: written one by one, so that a run that was cut off goes on, and read in the names' order."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import DiffLensError, write_whole, written

ENDINGS, FORMATS = (".png", ".jpg", ".jpeg", ".webp"), ("PNG", "JPEG", "WEBP")
LARGEST = 2**24  # pixels of a picture: a small file can hold far more of one colour


def save_picture(folder: Path, number: int, picture: Tensor) -> None:
    """Write a picture (H x W x 3 in [0, 1]) as PNG."""
    content = io.BytesIO()
    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().numpy()).save(content, "png")
    write_whole(folder / f"{number:05}.png", content.getvalue())


def begin_folder(folder: Path, settings: Mapping[str, Any]) -> set[int]:
    """The numbers of the pictures that are there already; all older ones go if they were drawn by other settings."""
    told, text = folder / "settings.json", json.dumps(settings, indent=1, sort_keys=True).encode()
    if told.exists() and told.read_bytes() != text:
        with written(folder):
            for old in folder.glob("*.png"):
                old.unlink()
    write_whole(told, text)
    return {int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit()}


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder by name. Raises `DiffLensError` if there are none."""
    if not folder.is_dir():
        raise DiffLensError(f"{folder} is no folder. Give one with pictures, or run first: difflens steer")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)
    if not found:
        raise DiffLensError(f"{folder} holds no picture ({', '.join(ENDINGS)}).")
    return found


def read_picture(path: Path) -> np.ndarray:
    """H x W x 3, uint8. Raises `DiffLensError` if the file is no picture."""
    try:
        with path.open("rb") as file:
            check_pixels(*size_of_webp(file.read(30)))  # for this kind PIL makes the canvas when it opens the file
        with Image.open(path, formats=FORMATS) as image:  # whatever its name says: others run programs to be read
            check_pixels(image.width, image.height)
            return np.array(image.convert("RGB"))
    except Exception as error:  # damaged pictures bring up anything: OSError, SyntaxError, struct.error, ...
        raise DiffLensError(f"{path} cannot be read as a picture ({error}). Take it out, or draw it again.") from error


def check_pixels(width: int, height: int) -> None:
    """Raise `ValueError` for a picture that is too large to be opened."""
    if width * height > LARGEST:
        raise ValueError(f"{width} x {height} pixels, more than {LARGEST}")


def size_of_webp(head: bytes) -> tuple[int, int]:
    """Width and height that a WebP file tells in its first 30 bytes; 0 of any other file."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def read_folder(folder: Path) -> np.ndarray:
    """All pictures of a folder (n x H x W x 3, uint8). Raises `DiffLensError` if they are not of one size."""
    paths = pictures_in(folder)
    found = [read_picture(path) for path in paths]
    for path, picture in zip(paths, found, strict=True):
        if picture.shape != found[0].shape:
            sizes = " and ".join(f"{one.shape[1]} x {one.shape[0]}" for one in (found[0], picture))
            raise DiffLensError(f"{folder} holds pictures of {sizes} ({path.name}). Give pictures of one size.")
    return np.stack(found)


def in_words(pictures: np.ndarray) -> str:
    return f"holds {len(pictures)} pictures of {pictures.shape[2]} x {pictures.shape[1]}"


def batches(pictures: np.ndarray, size: int) -> Iterator[Tensor]:
    """Pictures (n x H x W x 3, uint8) in [0, 1], at most `size` at once."""
    for some in torch.from_numpy(pictures).split(size):
        yield some.float() / 255
