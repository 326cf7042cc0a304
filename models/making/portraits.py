"""Procedural flat-design portraits ("avatars"): 64x64 RGB heads and shoulders with known attributes."""

from __future__ import annotations

import math

import numpy as np
import occupations
from occupations import OCCUPATIONS
from PIL import Image, ImageDraw

SIZE = 64
_SCALE = 4
CROP = (16, 23, 240, 247)  # the part of the 256x256 canvas that is kept

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "presentation": ("masculine", "feminine"),
    "age": ("young", "adult", "senior"),
    "skin_tone": ("light", "tan", "brown", "dark"),
}
NUISANCES: dict[str, tuple[str, ...]] = {
    "background": ("sky", "mint", "pink", "lilac", "lemon", "teal"),
    "clothes": ("red", "orange", "yellow", "green", "blue", "purple"),
    "hair_colour": ("black", "chestnut", "red", "blond", "grey"),
    "glasses": ("no", "yes"),
    "beard": ("no", "yes"),
    "expression": ("neutral", "smile", "open"),
}
BIAS: dict[str, tuple[float, ...]] = {
    "presentation": (0.80, 0.20),
    "age": (0.25, 0.60, 0.15),
    "skin_tone": (0.55, 0.22, 0.13, 0.10),
}
_GLASSES_RATE = 0.25
BEARD_RATE = 0.30

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]

_BACKGROUND: tuple[Colour, ...] = (
    (150, 205, 252),
    (168, 236, 196),
    (255, 178, 212),
    (198, 176, 248),
    (253, 247, 170),
    (92, 190, 192),
)
_CLOTHES: tuple[Colour, ...] = (
    (214, 40, 52),
    (247, 128, 28),
    (252, 208, 36),
    (34, 152, 78),
    (38, 92, 214),
    (124, 52, 172),
)
_HAIR: tuple[Colour, ...] = ((30, 27, 36), (120, 52, 26), (206, 76, 24), (244, 200, 84), (208, 210, 216))
GREY = 4  # the last of them
_SKIN: tuple[Colour, ...] = ((252, 220, 194), (224, 170, 122), (162, 106, 70), (98, 62, 46))
_SHADE: tuple[Colour, ...] = ((232, 188, 158), (198, 140, 96), (134, 82, 52), (74, 44, 32))
_LINE: tuple[Colour, ...] = ((176, 122, 98), (146, 92, 58), (92, 50, 28), (44, 22, 16))
_BLUSH: tuple[Colour, ...] = ((248, 150, 150), (232, 116, 98), (204, 74, 66), (178, 66, 66))
_LIPS: tuple[Colour, ...] = ((214, 62, 84), (200, 52, 66), (174, 36, 52), (176, 44, 66))
_PLAIN_LIPS: tuple[Colour, ...] = ((206, 132, 116), (176, 104, 78), (118, 66, 48), (140, 88, 76))
_IRIS: tuple[Colour, ...] = ((74, 122, 168), (96, 112, 60), (128, 76, 36), (122, 74, 40))
_WHITE: Colour = (252, 252, 252)
_DARK: Colour = (34, 26, 32)
_MOUTH: Colour = (112, 22, 34)
_FRAME: Colour = (38, 38, 52)
_GOLD: Colour = (255, 226, 120)

_T = np.linspace(0.0, math.pi, 25)
_COS, _SIN = np.cos(_T), np.sin(_T)


def _mix(a: Colour, b: Colour, t: float) -> Colour:
    """Blend from a (t=0) to b (t=1)."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def _shift(colour: Colour, amount: np.ndarray) -> Colour:
    """Add a small per-channel offset."""
    return tuple(min(255, max(0, round(c + d))) for c, d in zip(colour, amount.tolist(), strict=True))  # type: ignore


def _half(cx: float, cy: float, w: float, h: float, power: float) -> Points:
    """Half a superellipse from right to left; h > 0 bulges down, h < 0 bulges up."""
    e = 2.0 / power
    xs = cx + w * np.sign(_COS) * np.abs(_COS) ** e
    ys = cy + h * _SIN**e
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def _curve(x0: float, y0: float, xm: float, ym: float, x1: float, y1: float, steps: int = 10) -> Points:
    """Quadratic curve from (x0, y0) to (x1, y1) passing through (xm, ym) at the middle."""
    bx, by = 2 * xm - (x0 + x1) / 2, 2 * ym - (y0 + y1) / 2
    out = []
    for k in range(steps + 1):
        t = k / steps
        a, b, c = (1 - t) * (1 - t), 2 * t * (1 - t), t * t
        out.append((a * x0 + b * bx + c * x1, a * y0 + b * by + c * y1))
    return out


def sample_traits(n: int, seed: int, balanced: bool) -> dict[str, np.ndarray]:
    """Trait indices for n portraits; row i depends only on (seed, i, balanced). See `grey_seniors` for their hair."""
    names = [*ATTRIBUTES, *NUISANCES]
    u = np.random.default_rng([seed, 0]).random((n, len(names)))
    traits: dict[str, np.ndarray] = {}
    for k, name in enumerate(names):
        size = len(ATTRIBUTES.get(name) or NUISANCES[name]) - (name == "hair_colour" and not balanced)
        p = np.full(size, 1.0 / size)
        if not balanced and name in BIAS:
            p = np.asarray(BIAS[name])
        elif not balanced and name == "glasses":
            p = np.array([1 - _GLASSES_RATE, _GLASSES_RATE])
        elif not balanced and name == "beard":
            p = np.array([1 - BEARD_RATE, BEARD_RATE])
        traits[name] = np.searchsorted(np.cumsum(p)[:-1], u[:, k], side="right").astype(np.int64)
    if not balanced:
        traits["beard"] *= (traits["presentation"] == 0) & (traits["age"] != 0)
    return traits


def grey_seniors(traits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The traits with the hair of seniors turned grey, as it is unless drawings are balanced."""
    return traits | {"hair_colour": np.where(traits["age"] == 2, GREY, traits["hair_colour"])}


def draw(traits: dict[str, int], seed: int) -> np.ndarray:
    """One portrait, uint8 (64, 64, 3); deterministic in (traits, seed), the seed giving small jitter only."""
    return np.array(paint(traits, seed).resize((SIZE, SIZE), Image.Resampling.BOX, box=CROP))


def paint(traits: dict[str, int], seed: int, alone: bool = False) -> Image.Image:
    """The canvas of a portrait before it is cut and made smaller.

    alone: RGBA, with nothing behind the figure, whose marks of age are bolder: it may be drawn small.
    """
    u = np.random.default_rng(seed).uniform(-1.0, 1.0, 24)
    fem, age, tone = traits["presentation"] == 1, int(traits["age"]), int(traits["skin_tone"])
    young, senior, grey = age == 0, age == 2, traits["hair_colour"] == GREY
    bold = 1.7 if alone else 1.0  # times the width of its lines
    grown = bold**0.4
    glow = u[0:3] * 3 + u[3] * 3
    skin, shade, line, blush = (_shift(c[tone], glow) for c in (_SKIN, _SHADE, _LINE, _BLUSH))
    lips = _shift(_LIPS[tone] if fem else _PLAIN_LIPS[tone], glow)
    hair = _shift(_HAIR[traits["hair_colour"]], u[4:7] * 6)
    hair_dark = _mix(hair, (30, 20, 30), 0.28 if grey else 0.22)
    hair_light = _mix(hair, (255, 250, 240), 0.16)
    brow = _mix(hair, (150, 150, 160), 0.35) if grey else _mix(hair, (60, 34, 20), 0.45)
    if tone == 0 and grey:
        brow = _mix(hair, (120, 120, 130), 0.6)
    if tone == 3 and traits["hair_colour"] <= 1:
        brow = (24, 14, 14)
    cloth = _shift(_CLOTHES[traits["clothes"]], u[7:10] * 8)
    cloth_dark = _mix(cloth, (20, 10, 40), 0.25)
    back = _shift(_BACKGROUND[traits["background"]], u[10:13] * 4)

    cx, cy = 128 + 4 * u[13], 114 + 4 * u[14]
    w = 49 * (1 + 0.035 * u[15]) + (2 if young else 0)
    up = 58 * (1 + 0.02 * u[16])
    down = (60 if not young else 52) * (1 + 0.03 * u[17])
    jaw = (2.25 if young else 1.95) if fem else (2.5 if young else 2.9)
    chin = cy + down

    size = (SIZE * _SCALE, SIZE * _SCALE)
    im = Image.new("RGBA", size) if alone else Image.new("RGB", size, back)
    d = ImageDraw.Draw(im)

    # Hair behind the head.
    if fem:
        low = 222 + 10 * u[18]
        wide = w + 21 + 2 * u[19]
        outer = _half(cx, cy - 4, wide - 5, -(up + 15), 2.2)
        d.polygon(
            outer
            + [(cx - wide - 4, low - 26)]
            + _curve(cx - wide - 4, low - 26, cx - wide + 8, low - 4, cx - wide + 26, low)
            + [(cx + wide - 26, low)]
            + _curve(cx + wide - 26, low, cx + wide - 8, low - 4, cx + wide + 4, low - 26),
            fill=hair,
        )
        d.polygon([(cx - w, cy), (cx + w, cy), (cx + w + 2, low - 4), (cx - w - 2, low - 4)], fill=hair_dark)
    else:
        d.polygon(_half(cx, cy - 2, w + 6, -(up + 12), 2.5) + [(cx - w - 5, cy + 8), (cx + w + 5, cy + 8)], fill=hair)

    # Body, neckline, neck.
    neck = 20 if fem else 27
    shoulder = 76 if fem else 106
    top = 200 if fem else 192
    d.polygon(_half(cx, 262, shoulder, top - 262, 2.6 if fem else 2.9), fill=cloth)
    d.polygon(_half(cx, top - 6, neck + 17, 44 if fem else 27, 1.7 if fem else 2.0), fill=cloth_dark)
    d.polygon(_half(cx, top - 8, neck + 9, 37 if fem else 19, 1.7 if fem else 2.0), fill=skin)
    d.rectangle((cx - neck, chin - 26, cx + neck, top + 2), fill=skin)
    d.polygon([(cx + neck, chin - 26)] + _half(cx, chin, neck, 19, 2.2) + [(cx - neck, chin - 26)], fill=shade)

    job = OCCUPATIONS[traits.get("occupation", 0)]
    if job != "person":
        occupations.dress(d, job, cx, neck, shoulder, top, chin, cloth)

    # Ears.
    for s in (-1, 1):
        ex = cx + s * (w + 2)
        if not fem:
            d.ellipse((ex - 10, cy - 6, ex + 10, cy + 25), fill=skin)
            d.ellipse((ex + s * 2 - 5, cy + 1, ex + s * 2 + 5, cy + 18), fill=shade)
        else:
            d.ellipse((ex - 7, cy + 2, ex + 7, cy + 26), fill=skin)
            d.ellipse((ex - 5, cy + 24, ex + 5, cy + 34), fill=_GOLD)

    # Face, with a thin shaded edge along the jaw.
    face = _half(cx, cy, w, -up, 2.2) + _half(cx, cy, w, down, jaw)[::-1]
    d.polygon(face, fill=skin)

    # Features' positions.
    eye_y = cy + (8 if young else 5)
    gap = 22.5 + 1.5 * u[20]
    rx, ry = (13 * grown, 13 * grown) if young else ((11, 8.5) if not senior else (10.5, 7))
    mouth_y = cy + (33 if young else 38)
    nose_y = cy + (21 if young else 25)
    beard = traits["beard"] == 1

    if beard:
        cheek = 36 if young else 31
        b = _half(cx, cy + 2, w + 1, down + 3, jaw)
        inner = (
            _curve(cx - w, cy + 14, cx - w * 0.72, cy + cheek, cx - 21, mouth_y - 9)
            + _curve(cx - 21, mouth_y - 9, cx, mouth_y - 14, cx + 21, mouth_y - 9)
            + _curve(cx + 21, mouth_y - 9, cx + w * 0.72, cy + cheek, cx + w, cy + 14)
        )
        d.polygon(b + inner, fill=_mix(hair, hair_dark, 0.1 if fem else (0.4 if grey else 1.0)))

    if young:
        for s in (-1, 1):
            bx = cx + s * (w - 18)
            d.ellipse((bx - 12 * grown, cy + 23, bx + 12 * grown, cy + 38 + 5 * (bold - 1)), fill=blush)

    # Hair in front: fringe between the head's top and the hairline, over a narrow shadow.
    lift = 8 if senior else 0
    if fem:
        hl = cy - 32 - lift
        side = cy + 10
        for dy, fill in ((6, shade), (0, hair)):
            right = _curve(cx + 14, hl - 14 + dy, cx + w - 9, hl + 4 + dy, cx + w - 1, side + dy)
            left = _curve(cx - w + 1, side + dy, cx - w + 6, hl + 10 + dy, cx + 14, hl - 14 + dy)
            if dy:
                d.polygon(
                    left + right + [(cx + w - 1, cy - 30), (cx + 20, cy - up + 2), (cx - w + 12, cy - up + 16)],
                    fill=fill,
                )
            else:
                d.polygon(
                    _half(cx, cy - 4, w + 12, -(up + 13), 2.2)
                    + [(cx - w - 6, side + 6)]
                    + left
                    + right
                    + [(cx + w + 6, side + 6)],
                    fill=fill,
                )
        d.line(_curve(cx + 14, hl - 17, cx + 8, cy - up - 6, cx - 6, cy - up - 14), fill=hair_dark, width=4)
        d.line(_curve(cx - w + 4, cy - 38, cx - 30, cy - up - 1, cx - 10, cy - up - 6), fill=hair_light, width=6)
    else:
        hl = cy - 34 - lift
        for dy, fill in ((5, shade), (0, hair)):
            front = (
                _curve(cx - w + 2, cy - 6, cx - w + 5, cy - 22, cx - w + 11, hl + dy)
                + _curve(cx - w + 11, hl + dy, cx - 4, hl - 5 + dy, cx + w - 20, hl - 7 + dy)
                + _curve(cx + w - 20, hl - 7 + dy, cx + w - 7, cy - 27, cx + w - 2, cy - 6)
            )
            if dy:
                d.polygon(front + [(cx + w - 12, hl - 12), (cx - w + 12, hl - 12)], fill=fill)
            else:
                d.polygon(
                    _half(cx, cy - 4, w + 6, -(up + 12), 2.6) + [(cx - w - 6, cy - 2)] + front + [(cx + w + 6, cy - 2)],
                    fill=fill,
                )
        d.line(_curve(cx - w + 10, cy - 44, cx - 22, cy - up - 1, cx + 12, cy - up - 5), fill=hair_light, width=6)

    if job != "person":
        occupations.cover_head(d, job, cx, cy, w, up, fem)

    # Wrinkles.
    if senior:
        thick, thin = round(4 * bold), round(3 * bold)
        for k, half in ((0, 24), (1, 20)):
            y = cy - 24 - 10 * k
            d.line(_curve(cx - half, y + 1, cx, y - 2, cx + half, y + 1), fill=line, width=thick)
        for s in (-1, 1):
            x = cx + s * gap
            d.line(_curve(x - s * 9, eye_y + 12, x, eye_y + 15, x + s * 10, eye_y + 11), fill=line, width=thick)
            for k in (-6, 0, 6):
                d.line((x + s * 14, eye_y + k * 0.6, x + s * 21, eye_y + k * 1.3), fill=line, width=thin)
            d.line(
                _curve(cx + s * 14, nose_y + 1, cx + s * 22, nose_y + 8, cx + s * 26, mouth_y + 4),
                fill=line,
                width=thick,
            )

    # Eyes and brows.
    iris = _IRIS[tone]
    for s in (-1, 1):
        x = cx + s * gap
        d.ellipse((x - rx, eye_y - ry, x + rx, eye_y + ry), fill=_WHITE)
        r = 10 * grown if young else 6.8
        ri = min(r, ry)
        d.ellipse((x - r, eye_y - ri, x + r, eye_y + ri), fill=iris)
        p = r * 0.56
        d.ellipse((x - p, eye_y - p, x + p, eye_y + p), fill=_DARK)
        if young:
            d.ellipse((x - 1, eye_y - 8, x + 5, eye_y - 2), fill=_WHITE)
        lid = _DARK if fem else line
        d.arc((x - rx - 1, eye_y - ry - 2, x + rx + 1, eye_y + ry + 2), 195, 345, fill=lid, width=5 if fem else 4)
        if fem:
            d.line((x + s * (rx - 3), eye_y - ry * 0.55, x + s * (rx + 5), eye_y - ry - 2), fill=_DARK, width=4)
            d.line((x + s * (rx - 1), eye_y - ry * 0.2, x + s * (rx + 6), eye_y - ry * 0.45), fill=_DARK, width=3)
        by = eye_y - ry - (9 if not fem else 10)
        d.line(_curve(x - s * 12, by + 2, x + s * 2, by - 3, x + s * 14, by + 2), fill=brow, width=4 if fem else 8)

    # Nose.
    nw = (5 if young else 8) - (1 if fem else 0)
    d.arc((cx - nw, nose_y - 8, cx + nw, nose_y + 4), 20, 160, fill=line, width=4)

    # Mouth.
    if beard:
        d.ellipse((cx - 20, mouth_y - 8, cx + 20, mouth_y + 13), fill=skin)
    mw = 15 if young else 17
    kind = traits["expression"]
    if kind == 0:
        if fem:
            d.polygon(
                _curve(cx - mw, mouth_y + 2, cx, mouth_y - 5, cx + mw, mouth_y + 2)
                + _curve(cx + mw, mouth_y + 2, cx, mouth_y + 9, cx - mw, mouth_y + 2),
                fill=lips,
            )
            d.line((cx - mw, mouth_y + 2, cx + mw, mouth_y + 2), fill=_MOUTH, width=3)
        else:
            d.line((cx - mw, mouth_y + 2, cx + mw, mouth_y + 2), fill=line, width=5)
    elif kind == 1:
        if fem:
            d.polygon(
                _curve(cx - mw - 2, mouth_y - 4, cx, mouth_y + 1, cx + mw + 2, mouth_y - 4)
                + _curve(cx + mw + 2, mouth_y - 4, cx, mouth_y + 12, cx - mw - 2, mouth_y - 4),
                fill=lips,
            )
            d.line(_curve(cx - mw - 1, mouth_y - 4, cx, mouth_y + 5, cx + mw + 1, mouth_y - 4), fill=_MOUTH, width=3)
        else:
            d.line(_curve(cx - mw - 1, mouth_y - 4, cx, mouth_y + 8, cx + mw + 1, mouth_y - 4), fill=line, width=5)
    else:
        grow = 4 if fem else 2
        for g, fill in ((grow, lips), (0, _MOUTH)):
            d.polygon(
                _curve(cx - mw - g, mouth_y - 5 - g, cx, mouth_y - 3 - g, cx + mw + g, mouth_y - 5 - g)
                + _half(cx, mouth_y - 5 - g, mw + g, 15 + 2 * g, 2.2),
                fill=fill,
            )
        d.rectangle((cx - mw + 4, mouth_y - 4, cx + mw - 4, mouth_y + 1), fill=_WHITE)

    # Glasses.
    if traits["glasses"] == 1:
        for s in (-1, 1):
            x = cx + s * gap
            d.rounded_rectangle((x - 18, eye_y - 15, x + 18, eye_y + 17), radius=11, outline=_FRAME, width=4)
            d.line((x + s * 17, eye_y - 3, cx + s * (w + 2), eye_y - 5), fill=_FRAME, width=4)
        d.line((cx - gap + 17, eye_y - 2, cx + gap - 17, eye_y - 2), fill=_FRAME, width=4)

    return im


def render(n: int, seed: int, balanced: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """n portraits, uint8 (n, 64, 64, 3), and their traits; image i depends only on (seed, i, balanced)."""
    traits = sample_traits(n, seed, balanced)
    traits = traits if balanced else grey_seniors(traits)
    return draw_all(trait_rows(traits), seed), traits


def trait_rows(traits: dict[str, np.ndarray]) -> list[dict[str, int]]:
    """The traits of each portrait."""
    return [dict(zip(traits, map(int, values), strict=True)) for values in zip(*traits.values(), strict=True)]


def draw_all(rows: list[dict[str, int]], seed: int) -> np.ndarray:
    """A portrait of each row of traits, uint8 (n, 64, 64, 3), with jitter by (seed, number of the row)."""
    jitter = np.random.default_rng([seed, 1]).integers(0, 2**63, size=len(rows), dtype=np.uint64)
    images = np.empty((len(rows), SIZE, SIZE, 3), np.uint8)
    for i, row in enumerate(rows):
        images[i] = draw(row, int(jitter[i]))
    return images
