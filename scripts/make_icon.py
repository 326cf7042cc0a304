"""Draw the pack's icon and banner for ComfyUI's registry: people who all look alike, and who do not under a lens.

python scripts/make_icon.py      writes docs/icon.png and docs/banner.png
"""

from __future__ import annotations

from math import hypot
from pathlib import Path

from environment import REPOSITORY
from PIL import Image, ImageDraw, ImageFont

FINER = 4  # pixels drawn for each that is kept, so that edges are smooth
GROUND, ALIKE, RIM, PAPER = "#1f2430", "#5b6478", "#f2c14e", "#2b3242"
APART = ("#f2c14e", "#e4572e", "#17bebb", "#a3d977", "#c792ea")
Point = tuple[float, float]


class Drawing:
    """A picture of so many pixels, on which shapes are placed by their centres."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.image = Image.new("RGB", (width * FINER, height * FINER), GROUND)
        self.draw = ImageDraw.Draw(self.image)

    def disc(self, at: Point, radius: float, fill: str) -> None:
        (x, y), r = (FINER * at[0], FINER * at[1]), FINER * radius
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill)

    def person(self, at: Point, size: float, fill: str) -> None:
        """Head and shoulders, `size` pixels high, around a centre."""
        (x, y), s = (FINER * at[0], FINER * at[1]), FINER * size
        self.draw.ellipse((x - 0.22 * s, y - 0.5 * s, x + 0.22 * s, y - 0.06 * s), fill)
        self.draw.chord((x - 0.42 * s, y + 0.02 * s, x + 0.42 * s, y + 0.98 * s), 180, 360, fill)

    def crowd(self, lens: Point, radius: float, every: float) -> None:
        """People in rows over the whole picture, and a lens through which they differ."""
        handle = [FINER * (c + r * radius) for r in (0.7, 1.5) for c in lens]
        self.draw.line(handle, RIM, round(FINER * radius / 4))
        self.disc((lens[0] + 1.5 * radius, lens[1] + 1.5 * radius), radius / 8, RIM)
        self.disc(lens, 1.12 * radius, RIM)
        self.disc(lens, radius, PAPER)
        columns, rows = (int(length / every) for length in self.size)
        for row in range(rows):
            for column in range(columns):
                at = every * (column + 0.5), every * (row + 0.5)
                away = hypot(at[0] - lens[0], at[1] - lens[1]) / radius
                if away < 0.8:
                    self.person(at, 0.72 * every, APART[(column + 2 * row) % len(APART)])
                elif away > 1.35 and not self.on_handle(at, lens, radius):
                    self.person(at, 0.72 * every, ALIKE)

    @staticmethod
    def on_handle(at: Point, lens: Point, radius: float) -> bool:
        x, y = (a - c for a, c in zip(at, lens, strict=True))
        return x > 0 and y > 0 and abs(x - y) < 0.6 * radius and x < 2 * radius

    def save(self, path: Path) -> None:
        self.image.resize(self.size, Image.Resampling.LANCZOS).quantize(64).save(path, optimize=True)


def main() -> None:
    """Write both, in the shapes that the registry asks for: a square of at most 400 pixels, and 21:9."""
    icon = Drawing(400, 400)
    icon.crowd((166.7, 166.7), 116, 66.7)
    icon.save(REPOSITORY / "docs" / "icon.png")
    banner = Drawing(1260, 540)
    banner.crowd((945, 225), 175, 90)
    banner.draw.rectangle((0, 0, FINER * 630, FINER * 540), GROUND)
    for text, size, y in (("DiffLens", 120, 170), ("fair mixes from diffusion models", 36, 320)):
        font = ImageFont.load_default(FINER * size)
        banner.draw.text((FINER * 60, FINER * y), text, "white", font)
    banner.save(REPOSITORY / "docs" / "banner.png")


if __name__ == "__main__":
    main()
