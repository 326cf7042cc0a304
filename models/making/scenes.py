"""People in scenes: one figure of the portraits, of free place and size, before a drawn background, by prompt.

Pictures come in four sizes. The figure stands behind something, at the picture's lower edge or a little above. Places
go in steps of `STEP` pixels, which is what one position of the network's middle stands for, and sizes in twice that: so
a small network learns to draw them in some hours on two processor cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import portraits
from occupations import OCCUPATIONS
from PIL import Image, ImageDraw
from portraits import GREY, Colour
from prompted_portraits import phrase

SIZES = ((64, 64), (64, 96), (96, 64), (96, 128))  # height and width of the pictures
SCALE = 4  # pictures are drawn so many times as large
STEP = 8
SMALLEST = 0.5  # height of the figure beside the picture's
WIDEST = 1.25  # of the figure beside the picture: more would cut into the head
BACKGROUNDS = ("window", "plant", "lamp", "shelf", "street")
ATTRIBUTES = portraits.ATTRIBUTES | {
    "hair_colour": portraits.NUISANCES["hair_colour"],
    "glasses": portraits.NUISANCES["glasses"],
    "beard": portraits.NUISANCES["beard"],
    "occupation": OCCUPATIONS,
    "background": BACKGROUNDS,
}
BIAS: dict[str, dict[str, tuple[float, ...]]] = {
    "person": {"presentation": (0.50, 0.50), "age": (0.30, 0.40, 0.30)},
    "doctor": {"presentation": (0.80, 0.20), "age": (0.10, 0.40, 0.50)},
    "nurse": {"presentation": (0.12, 0.88), "age": (0.40, 0.50, 0.10)},
    "firefighter": {"presentation": (0.90, 0.10), "age": (0.25, 0.63, 0.12)},
    "receptionist": {"presentation": (0.20, 0.80), "age": (0.60, 0.28, 0.12)},
}
_TOLD = {"presentation": 0.35, "age": 0.75, "background": 0.5, "glasses": 0.2, "shot": 0.9, "place": 0.9}
# What a prompt says of how large the figure is, beside the largest there is, and where its middle is across the
# picture, with the shares that these stay below.
SHOTS = {"wide": 0.65, "medium": 0.9, "close": 9.0}
PLACES = {"far left": 0.3, "left": 0.45, "middle": 0.55, "right": 0.7, "far right": 9.0}

_SKY: Colour = (176, 218, 248)
_FRAME: Colour = (244, 240, 232)
_LEAF: tuple[Colour, ...] = ((62, 138, 74), (92, 164, 82))
_POT: Colour = (186, 98, 62)
_GLOW: Colour = (255, 240, 176)
_SHADE: Colour = (216, 92, 72)
_WOOD: Colour = (142, 98, 62)
_BOOKS: tuple[Colour, ...] = ((188, 62, 56), (58, 104, 168), (222, 170, 70), (78, 142, 104), (128, 84, 150))
_HOUSES: tuple[Colour, ...] = ((206, 122, 96), (226, 186, 130), (150, 152, 176), (186, 112, 128))
_WALLS: tuple[Colour, ...] = ((236, 222, 202), (206, 222, 216), (226, 208, 222), (214, 218, 236))
_FRONTS: tuple[Colour, ...] = ((122, 84, 60), (96, 108, 128), (82, 116, 88))


@dataclass(frozen=True)
class Frame:
    """Where a figure stands: left and upper edge and side of its square, in pixels. It is cut off at the lower edge."""

    left: int
    top: int
    side: int

    def shares(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom as shares of a picture."""
        return (
            self.left / width, self.top / height, (self.left + self.side) / width, (self.top + self.side) / height
        )  # fmt: skip


def place(height: int, width: int, u: np.ndarray) -> Frame:
    """A frame in a picture of that size; u: 3 uniform numbers."""
    sides = range(stepped(SMALLEST * height), largest(height, width) + 1, 2 * STEP)
    side = sides[int(u[0] * len(sides))]
    head = 0.3 * side  # half of its width, with long hair
    centre = head + (width - 2 * head) * u[1] if width > 2 * head else width / 2
    return Frame(stepped(centre - side / 2), height - side - STEP * (side < height and u[2] < 0.5), side)


def stepped(pixels: float) -> int:
    """The nearest multiple of `STEP`."""
    return STEP * round(pixels / STEP)


def largest(height: int, width: int) -> int:
    """Side of the largest figures in a picture of that size."""
    return min(height, stepped(WIDEST * width))


def layout(frame: Frame, height: int, width: int) -> tuple[str, str]:
    """The words for how large a figure is and where it stands."""
    middle = (frame.left + frame.side / 2) / width
    shot = next(word for word, below in SHOTS.items() if frame.side < below * largest(height, width))
    return shot, next(word for word, below in PLACES.items() if middle < below)


def draw(traits: dict[str, int], seed: int, size: tuple[int, int]) -> tuple[np.ndarray, Frame]:
    """One picture, uint8 (height, width, 3), and its figure's frame; deterministic in the arguments."""
    height, width = size
    u = np.random.default_rng([seed, 5]).random(64)
    frame = place(height, width, u[:3])
    canvas = Image.new("RGB", (width * SCALE, height * SCALE), _WALLS[int(u[3] * len(_WALLS))])
    _SCENES[BACKGROUNDS[traits["background"]]](ImageDraw.Draw(canvas), *canvas.size, u[8:])
    side = frame.side * SCALE
    figure = portraits.paint(traits, seed, alone=True).resize(
        (side, side), Image.Resampling.BICUBIC, box=portraits.CROP
    )
    corner = frame.left * SCALE, frame.top * SCALE
    canvas.paste(figure, corner, figure)
    front = ImageDraw.Draw(canvas)
    edge = corner[1] + side - round(0.02 * side)
    if edge < height * SCALE:
        front.rectangle((0, edge, width * SCALE, height * SCALE), fill=_FRONTS[int(u[4] * len(_FRONTS))])
    return np.array(canvas.resize((width, height), Image.Resampling.BOX)), frame


def _across(width: float, apart: float, u: np.ndarray) -> list[int]:
    """Places so far apart all over the width."""
    return [SCALE * stepped((i - u[0]) * apart / SCALE) for i in range(round(width / apart) + 2)]


def _window(d: ImageDraw.ImageDraw, width: int, height: int, u: np.ndarray) -> None:
    top, low, wide = 0.08 * height, 0.6 * height, 0.55 * height
    for x in _across(width, 0.8 * height, u):
        d.rectangle((x, top, x + wide, low), fill=_SKY, outline=_FRAME, width=round(0.05 * height))
        d.line((x + wide / 2, top, x + wide / 2, low), fill=_FRAME, width=round(0.05 * height))


def _plant(d: ImageDraw.ImageDraw, width: int, height: int, u: np.ndarray) -> None:
    for i, x in enumerate(_across(width, 0.75 * height, u)):
        foot = 0.8 * height
        for k, lean in enumerate((-0.3, -0.12, 0.12, 0.3)):
            tip = (x + lean * height, (0.1 + 0.15 * abs(lean) / 0.3) * height)
            middle = x + 0.6 * lean * height
            leaf = [(x, foot), (middle - 0.07 * height, 0.45 * height), tip, (middle + 0.07 * height, 0.45 * height)]
            d.polygon(leaf, fill=_LEAF[(k + i) % 2])
        d.polygon(
            [(x - 0.13 * height, 0.76 * height), (x + 0.13 * height, 0.76 * height),
             (x + 0.09 * height, height), (x - 0.09 * height, height)], fill=_POT,
        )  # fmt: skip


def _lamp(d: ImageDraw.ImageDraw, width: int, height: int, u: np.ndarray) -> None:
    y = 0.1 * height
    for x in _across(width, 0.6 * height, u):
        d.polygon(
            [(x - 0.1 * height, y), (x + 0.1 * height, y), (x + 0.3 * height, height), (x - 0.3 * height, height)],
            fill=_GLOW,
        )
        d.line((x, 0, x, y), fill=_WOOD, width=round(0.03 * height))
        d.polygon(
            [(x - 0.05 * height, y), (x + 0.05 * height, y), (x + 0.14 * height, y + 0.15 * height),
             (x - 0.14 * height, y + 0.15 * height)], fill=_SHADE,
        )  # fmt: skip


def _shelf(d: ImageDraw.ImageDraw, width: int, height: int, u: np.ndarray) -> None:
    for row in range(2):
        board = (0.34 + 0.42 * row) * height
        for k, x in enumerate(_across(width, 0.25 * height, u)):
            tall = (0.22 + 0.04 * ((k + row) % 2)) * height
            d.rectangle((x, board - tall, x + 0.2 * height, board), fill=_BOOKS[(k + 2 * row) % len(_BOOKS)])
        d.rectangle((0, board, width, board + 0.05 * height), fill=_WOOD)


def _street(d: ImageDraw.ImageDraw, width: int, height: int, u: np.ndarray) -> None:
    d.rectangle((0, 0, width, height), fill=_SKY)
    wide = 0.55 * height
    for i, x in enumerate(_across(width, wide, u)):
        top = (0.14 + 0.16 * (i % 2)) * height
        d.rectangle((x, top, x + wide, height), fill=_HOUSES[(i + int(4 * u[1])) % len(_HOUSES)])
        for y in (top + 0.09 * height, top + 0.36 * height):
            for left in (x + 0.09 * height, x + 0.32 * height):
                d.rectangle((left, y, left + 0.14 * height, y + 0.17 * height), fill=_FRAME)


_SCENES: dict[str, Callable[[ImageDraw.ImageDraw, int, int, np.ndarray], None]] = {
    "window": _window, "plant": _plant, "lamp": _lamp, "shelf": _shelf, "street": _street,
}  # fmt: skip


def sample_traits(n: int, seed: int, balanced: bool) -> dict[str, np.ndarray]:
    """Trait indices for n pictures; row i depends only on (seed, i, balanced)."""
    traits = portraits.sample_traits(n, seed, balanced)
    u = np.random.default_rng([seed, 2]).random((n, 5))
    traits["occupation"] = (u[:, 0] * len(OCCUPATIONS)).astype(np.int64)
    traits["background"] = (u[:, 3] * len(BACKGROUNDS)).astype(np.int64)
    if not balanced:
        for column, name in ((1, "presentation"), (2, "age")):
            edges = np.cumsum([BIAS[job][name] for job in OCCUPATIONS], axis=1)[traits["occupation"], :-1]
            traits[name] = (u[:, column, None] > edges).sum(axis=1)
        beard = u[:, 4] < portraits.BEARD_RATE
        traits["beard"] = (beard & (traits["presentation"] == 0) & (traits["age"] != 0)).astype(np.int64)
        traits["hair_colour"] = np.where(traits["age"] == 2, GREY, traits["hair_colour"])
    return traits


def layouts(size: tuple[int, int]) -> list[str]:
    """How prompts end that tell where a figure is, one for each layout that pictures of a size have."""
    some = np.linspace(0, 1, 50, endpoint=False)
    found = {layout(place(*size, np.array([u, v, 0.0])), *size) for u in some for v in some}
    return [f", {shot}, {where}" for shot in SHOTS for where in PLACES if (shot, where) in found]


def describe(traits: dict[str, int], layout: tuple[str, str], u: np.ndarray) -> str:
    """A prompt that fits traits and layout; u: 6 uniform numbers that choose the wording."""
    job, fem = OCCUPATIONS[traits["occupation"]], traits["presentation"]
    noun, adjectives = job, []
    if u[0] < _TOLD["age"]:
        adjectives.append(("young", "adult", "old")[traits["age"]])
    if u[1] < _TOLD["presentation"]:
        if job == "person":
            noun = ("man", "woman")[fem]
        else:
            adjectives.append(("male", "female")[fem])
    glasses = " with glasses" if traits["glasses"] and u[2] < _TOLD["glasses"] else ""
    behind = f" and a {BACKGROUNDS[traits['background']]}" if u[3] < _TOLD["background"] else ""
    told = [word for word, of, at in zip(layout, ("shot", "place"), u[4:], strict=True) if at < _TOLD[of]]
    return ", ".join([f"{phrase(adjectives, noun)}{glasses}{behind}", *told])


WORDS = (
    "a", "an", "and", "with", "person", "man", "woman", *OCCUPATIONS[1:], "male", "female", "young", "adult", "old",
    "glasses", *BACKGROUNDS, *SHOTS, "far", "left", "middle", "right",
)  # fmt: skip


def render(
    n: int, seed: int, balanced: bool, size: tuple[int, int]
) -> tuple[np.ndarray, dict[str, np.ndarray], list[str], np.ndarray]:
    """n pictures of a size, uint8 (n, height, width, 3), their traits, prompts and frames (n x 4, as shares).

    Picture i depends only on the arguments and i.
    """
    traits = sample_traits(n, seed, balanced)
    rows = portraits.trait_rows(traits)
    jitter = np.random.default_rng([seed, 1, *size]).integers(0, 2**63, size=n, dtype=np.uint64)
    wording = np.random.default_rng([seed, 4]).random((n, 6))
    pictures, frames, prompts = np.empty((n, *size, 3), np.uint8), np.empty((n, 4), np.float32), []
    for i, row in enumerate(rows):
        pictures[i], frame = draw(row, int(jitter[i]), size)
        frames[i] = frame.shares(*size)
        prompts.append(describe(row, layout(frame, *size), wording[i]))
    return pictures, traits, prompts, frames
