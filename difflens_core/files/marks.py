"""Marks by which files, settings and weights are known again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from hashlib import sha256

import numpy as np
from torch import Tensor


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
