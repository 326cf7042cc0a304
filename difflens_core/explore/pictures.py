"""Small pictures for the cards, and pictures that are lit where a feature fires."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

THUMBNAIL = 128  # pixels of the longer side, at most
SHEET = 256  # thumbnails on a sheet
DIM, GLOW, AMBER = 0.6, 0.3, (255.0, 190.0, 60.0)


def thumbnails(images: Tensor, pictures: Tensor) -> np.ndarray:
    """Some of the images (n x H x W x 3 in [0, 1]) as small uint8 pictures (len(pictures) x h x w x 3)."""
    height, width = images.shape[1:3]
    scale = min(1.0, THUMBNAIL / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    made = []
    for number in pictures.tolist():
        picture = Image.fromarray(images[number, :, :, :3].clamp(0, 1).mul(255).round().byte().cpu().numpy())
        made.append(np.asarray(picture.resize(size, Image.Resampling.BOX)))
    return np.stack(made)


def sheets(small: np.ndarray) -> list[np.ndarray]:
    """Small pictures (n x h x w x 3) side by side on square sheets of `SHEET`, from left to right and down."""
    columns = math.isqrt(SHEET)
    made = []
    for first in range(0, len(small), SHEET):
        part = small[first : first + SHEET]
        rows = math.ceil(len(part) / columns)
        sheet = np.zeros((rows * columns, *small.shape[1:]), np.uint8)
        sheet[: len(part)] = part
        tiles = sheet.reshape(rows, columns, *small.shape[1:]).swapaxes(1, 2)
        made.append(tiles.reshape(rows * small.shape[1], columns * small.shape[2], 3))
    return made


def lit(picture: np.ndarray, heat: Tensor) -> np.ndarray:
    """The picture (H x W x 3, uint8), dark where the map (h x w in [0, 1]) is 0, warm and light where it is 1."""
    height, width = picture.shape[:2]
    light = torch.nn.functional.interpolate(heat.float()[None, None], (height, width), mode="bicubic")
    share = light[0, 0].clamp(0, 1).numpy()[:, :, None]
    shown = picture * (1 - DIM * (1 - share))
    return (shown + GLOW * share * (np.array(AMBER) - shown)).round().astype(np.uint8)


def as_jpeg(picture: np.ndarray) -> bytes:
    """A picture (H x W x 3, uint8) as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return file.getvalue()
