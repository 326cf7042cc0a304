"""What the portraits wear at work: clothes and headwear of four occupations, on the canvas of `portraits`."""

from __future__ import annotations

import numpy as np
from PIL.ImageDraw import ImageDraw

OCCUPATIONS = ("person", "doctor", "nurse", "firefighter", "receptionist")

Colour = tuple[int, int, int]

_WHITE: Colour = (250, 250, 252)
_FOLD: Colour = (196, 202, 214)
_TUBE: Colour = (52, 56, 70)
_METAL: Colour = (206, 212, 222)
_SCRUBS: Colour = (96, 206, 206)
_SEAM: Colour = (48, 150, 156)
_RED: Colour = (216, 30, 44)
_COAT: Colour = (44, 46, 58)
_BAND: Colour = (246, 226, 44)
_HELMET: Colour = (206, 34, 30)
_BRIM: Colour = (150, 20, 22)
_BADGE: Colour = (250, 212, 60)
_BLAZER: Colour = (70, 54, 96)
_LAPEL: Colour = (48, 34, 70)

_ANGLES = np.linspace(0.0, np.pi, 25)


def _torso(cx: float, top: float, shoulder: float) -> list[tuple[float, float]]:
    """The body's outline, as wide as `shoulder` on both sides of cx, from `top` down."""
    xs = cx + shoulder * np.sign(np.cos(_ANGLES)) * np.abs(np.cos(_ANGLES)) ** 0.72
    return list(zip(xs.tolist(), (262 - (262 - top) * np.sin(_ANGLES) ** 0.72).tolist(), strict=True))


def dress(
    d: ImageDraw, job: str, cx: float, neck: float, shoulder: float, top: float, chin: float, shirt: Colour
) -> None:
    """Clothes of an occupation over the plain ones. The shirt below keeps its colour where it shows."""
    body, wide = _torso(cx, top, shoulder), neck + 12
    if job == "doctor":
        d.polygon(body, fill=_WHITE)
        d.polygon([(cx - wide, top - 4), (cx + wide, top - 4), (cx, top + 62)], fill=shirt)
        for s in (-1, 1):
            d.polygon([(cx + s * wide, top - 6), (cx + s * (wide + 16), top + 4), (cx, top + 66)], fill=_FOLD)
            d.line([(cx + s * (neck + 4), top - 8), (cx + s * (neck + 12), top + 16), (cx + s * 22, top + 40)],
                   fill=_TUBE, width=7)  # fmt: skip
        d.ellipse((cx + 12, top + 32, cx + 34, top + 54), fill=_METAL, outline=_TUBE, width=4)
    elif job == "nurse":
        d.polygon(body, fill=_SCRUBS)
        for s in (-1, 1):
            d.line([(cx + s * wide, top - 6), (cx, top + 34)], fill=_SEAM, width=9)
        d.rectangle((cx + 26, top + 28, cx + 48, top + 50), fill=_WHITE)
        d.rectangle((cx + 34, top + 31, cx + 40, top + 47), fill=_RED)
        d.rectangle((cx + 29, top + 36, cx + 45, top + 42), fill=_RED)
    elif job == "firefighter":
        d.polygon(body, fill=_COAT)
        d.rectangle((cx - shoulder, top + 26, cx + shoulder, top + 38), fill=_BAND)
        d.rectangle((cx - 5, top, cx + 5, 262), fill=_BAND)
        d.polygon([(cx - wide, top - 12), (cx + wide, top - 12), (cx + wide + 6, top + 8), (cx, top + 20),
                   (cx - wide - 6, top + 8)], fill=_COAT)  # fmt: skip
    else:
        d.polygon(body, fill=_BLAZER)
        d.polygon([(cx - wide, top - 4), (cx + wide, top - 4), (cx, top + 60)], fill=_WHITE)
        for s in (-1, 1):
            d.polygon([(cx + s * wide, top - 6), (cx + s * (wide + 14), top + 8), (cx, top + 62)], fill=_LAPEL)
        d.polygon([(cx - 15, top + 2), (cx + 15, top + 16), (cx + 15, top + 2), (cx - 15, top + 16)], fill=shirt)
        d.rectangle((cx + 34, top + 32, cx + 60, top + 44), fill=_BADGE)


def cover_head(d: ImageDraw, job: str, cx: float, cy: float, w: float, up: float, long_hair: bool) -> None:
    """What an occupation wears on the head, over the hair and below wrinkles, eyes and brows."""
    crown, half = cy - up - 15, w + (12 if long_hair else 8)
    if job == "nurse":
        d.polygon([(cx - 32, crown + 22), (cx - 38, crown - 10), (cx + 38, crown - 10), (cx + 32, crown + 22)],
                  fill=_WHITE)  # fmt: skip
        d.rectangle((cx - 4, crown - 7, cx + 4, crown + 17), fill=_RED)
        d.rectangle((cx - 12, crown + 1, cx + 12, crown + 9), fill=_RED)
    elif job == "firefighter":
        rim = cy - 36
        xs, ys = cx + half * np.cos(_ANGLES), rim - (rim - crown + 8) * np.sin(_ANGLES) ** 0.8
        d.polygon(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=_HELMET)
        d.rounded_rectangle((cx - half - 14, rim - 6, cx + half + 14, rim + 5), radius=5, fill=_BRIM)
        d.polygon([(cx - 15, rim - 30), (cx + 15, rim - 30), (cx + 12, rim - 8), (cx, rim - 1), (cx - 12, rim - 8)],
                  fill=_BADGE)  # fmt: skip
    elif job == "receptionist":
        d.arc((cx - half, crown - 2, cx + half, cy + up), 182, 358, fill=_TUBE, width=8)
        for s in (-1, 1):
            d.rounded_rectangle((cx + s * half - 9, cy - 10, cx + s * half + 9, cy + 22), radius=7, fill=_TUBE)
        d.line([(cx - half, cy + 18), (cx - w + 8, cy + 44), (cx - 24, cy + 48)], fill=_TUBE, width=5)
        d.ellipse((cx - 29, cy + 43, cx - 19, cy + 53), fill=_TUBE)
