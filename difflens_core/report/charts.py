"""Charts and picture grids as uint8 images (H x W x 3), drawn with Pillow at twice the size and reduced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..files import DiffLensError

# Okabe & Ito (2008): told apart by colour-blind readers too.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#595959", "#B39B00")
INK, SOFT, GRID, PAPER = "#202020", "#5A5A5A", "#E2E2E2", "#FFFFFF"

# Lengths in pixels of the drawing, twice those of the result.
WIDTH, HEIGHT = 1440, 880
TITLE, TEXT = 36, 26
MARGIN, LEFT = 32, 132
SMALLEST_TILE = 96


class Chart:
    """A titled drawing with a legend and a frame for the data; `x0, y0, x1, y1` are the frame's corners."""

    def __init__(self, title: str, legend: Sequence[str], below: int):
        self.image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.text((MARGIN, MARGIN), title, WIDTH - 2 * MARGIN, "lt", TITLE)
        self.x0, self.x1, self.y1 = LEFT, WIDTH - MARGIN, HEIGHT - MARGIN - below
        self.y0 = MARGIN + TITLE + 24
        self.y0 += self.legend(legend, self.y0) + TEXT  # room for a number above the frame

    def text(
        self, at: tuple[float, float], text: str, room: float, anchor: str, size: int = TEXT, fill: str = INK
    ) -> None:
        """Write one line, cut to `room` pixels."""
        font = ImageFont.load_default(size)
        self.draw.text(at, fitted(text, font, room), fill, font, anchor)

    def legend(self, names: Sequence[str], y: int) -> int:
        """Write the names with their colours in lines below the title; returns the height used."""
        font, x, top = ImageFont.load_default(TEXT), float(LEFT), y
        for i, name in enumerate(names):
            name = fitted(name, font, WIDTH / 3)
            width = 44 + font.getlength(name) + 40
            if x + width > WIDTH - MARGIN and x > LEFT:
                x, y = LEFT, y + TEXT + 16
            self.draw.rectangle((x, y + 2, x + 28, y + 30), colour(i))
            self.draw.text((x + 40, y + 16), name, INK, font, "lm")
            x += width
        return y - top + TEXT + 16 if names else 0

    def y_axis(self, low: float, high: float) -> None:
        """Fix the vertical scale to hold low..high, with grid lines and numbers."""
        self.y_ticks = ticks(low, high)
        for value in self.y_ticks:
            y = self.y(value)
            self.draw.line((self.x0, y, self.x1, y), GRID, 2)
            self.text((self.x0 - 14, y), f"{value:g}", LEFT - 20, "rm", fill=SOFT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.y1 - (value - low) / (high - low) * (self.y1 - self.y0)

    def dashed(self, value: float) -> None:
        """A dashed horizontal line."""
        y = self.y(value)
        for x in range(int(self.x0), int(self.x1), 28):
            self.draw.line((x, y, min(x + 16, self.x1), y), INK, 3)

    def finish(self) -> np.ndarray:
        return np.asarray(self.image.reduce(2))


def bar_chart(
    title: str,
    groups: dict[str, dict[str, float]],
    reference: float | None = None,
    errors: dict[str, dict[str, tuple[float, float]]] | None = None,
) -> np.ndarray:
    """Bars in groups: groups[group][bar] = height. Returns 440 x 720 x 3, uint8.

    Where every group holds the same few bars ("before", "after") they are told apart by colour and a legend;
    otherwise each bar is named below itself and the colour tells the group. reference: height of a dashed line.
    errors[group][bar] = (low, high): ends of a whisker. Raises `DiffLensError` for no bars, NaN or infinity.
    """
    heights = [height for bars in groups.values() for height in bars.values()]
    ends = [end for bars in (errors or {}).values() for pair in bars.values() for end in pair]
    check_numbers(title, heights, [*ends, *([] if reference is None else [reference])])
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    shared = len(names) <= len(PALETTE) and all(list(bars) == names for bars in groups.values())
    below = (48 if shared else 144) + (TEXT if min(heights) < 0 else 0)
    chart = Chart(title, names if shared and len(names) > 1 else [], below)
    chart.y_axis(min([0.0, *heights, *ends]), max([0.0, *heights, *ends, reference or 0.0]))
    slot = (chart.x1 - chart.x0) / (len(heights) + 0.8 * len(groups))
    x, numbers = float(chart.x0), []
    for g, (group, bars) in enumerate(groups.items()):
        room = slot * (len(bars) + 0.8)
        chart.text((x + room / 2, HEIGHT - MARGIN - 10), group, room - 8, "ms")
        x += 0.4 * slot
        for i, (name, height) in enumerate(bars.items()):
            left, right = x + 0.06 * slot, x + 0.94 * slot
            top, bottom = sorted((chart.y(height), chart.y(0)))
            chart.draw.rectangle((left, top, right, bottom), colour(i if shared else g))
            whisker = (errors or {}).get(group, {}).get(name)
            if whisker:
                draw_whisker(chart, (left + right) / 2, min(slot / 6, 14), *map(chart.y, whisker))
                top, bottom = min(top, chart.y(whisker[1])), max(bottom, chart.y(whisker[0]))
            if slot >= 60:
                at = (left + right) / 2, top - 8 if height >= 0 else bottom + 8
                numbers.append((at, f"{height:.2f}", "ms" if height >= 0 else "mt"))
            if not shared:
                upright_text(chart, (left + right) / 2, chart.y1 + 8, name, min(TEXT, int(slot)))
            x += slot
        x += 0.4 * slot
    chart.draw.line((chart.x0, chart.y(0), chart.x1, chart.y(0)), INK, 3)
    if reference is not None:
        chart.dashed(reference)
    font = ImageFont.load_default(24)
    for at, number, anchor in numbers:  # last, on a white edge, so that no line runs through them
        chart.draw.text(at, number, INK, font, anchor, stroke_width=5, stroke_fill=PAPER)
    return chart.finish()


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    errors: dict[str, list[tuple[float, float]]] | None = None,
    y_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """Lines through (x, y) points, one colour and legend entry a series. Returns 440 x 720 x 3, uint8.

    errors[series] = (low, high) of each point: ends of a whisker; y_range: what the vertical scale holds at least.
    Raises `DiffLensError` for no points, NaN or infinity.
    """
    points = [point for line in series.values() for point in line]
    ends = [end for pairs in (errors or {}).values() for pair in pairs for end in pair]
    check_numbers(title, [value for point in points for value in point], ends)
    chart = Chart(title, list(series) if len(series) > 1 else [], 96)
    xs, ys = zip(*points, strict=True)
    chart.text((chart.x0, chart.y0 - 10), y_label, chart.x1 - chart.x0, "lt", fill=SOFT)
    chart.y0 += TEXT + 16
    chart.y_axis(min([*ys, *ends, *(y_range or ())]), max([*ys, *ends, *(y_range or ())]))
    span = max(xs) - min(xs)
    slack = 1e-6 * span
    x_ticks = [tick for tick in ticks(min(xs), max(xs)) if min(xs) - slack <= tick <= max(xs) + slack]

    def place(x: float) -> float:
        return chart.x0 + 20 + ((x - min(xs)) / span if span else 0.5) * (chart.x1 - chart.x0 - 60)

    for value in x_ticks if span else [xs[0]]:
        chart.draw.line((place(value), chart.y1, place(value), chart.y1 + 10), SOFT, 2)
        chart.text((place(value), chart.y1 + 16), f"{value:g}", 160, "mt", fill=SOFT)
    chart.text(((chart.x0 + chart.x1) / 2, HEIGHT - MARGIN), x_label, chart.x1 - chart.x0, "ms", fill=SOFT)
    for i, (name, line) in enumerate(series.items()):
        path = [(place(x), chart.y(y)) for x, y in line]
        for (x, _), whisker in zip(path, (errors or {}).get(name, ()), strict=False):
            draw_whisker(chart, x, 10, *map(chart.y, whisker))
        few = len(path) <= 40
        chart.draw.line(path, colour(i), 6 if few else 3, joint="curve")
        if few:
            for x, y in path:
                chart.draw.ellipse((x - 8, y - 8, x + 8, y + 8), colour(i))
    chart.draw.line((chart.x0, chart.y1, chart.x1, chart.y1), INK, 3)
    return chart.finish()


def image_grid(rows: list[np.ndarray], titles: list[str], columns: int) -> np.ndarray:
    """Rows of pictures (each n x H x W x 3, uint8), every row under its title, broken after `columns` pictures.

    Small pictures are enlarged by a whole factor to at least 96 pixels. Returns an H x W x 3 uint8 image. Raises
    `DiffLensError` for no pictures or pictures of different sizes.
    """
    if not rows or any(row.ndim != 4 or len(row) == 0 for row in rows):
        raise DiffLensError("a row of the picture grid is empty. Give every row at least one picture.")
    sizes = {row.shape[1:3] for row in rows}
    if len(sizes) > 1:
        found = ", ".join(f"{w} x {h}" for h, w in sorted(sizes))
        raise DiffLensError(f"the rows of the picture grid hold pictures of {found} pixels. Make them one size.")
    ((height, width),) = sizes
    factor = math.ceil(SMALLEST_TILE / min(height, width))
    columns = max(1, min(columns, max(len(row) for row in rows)))
    gap, bar = 6, 30
    tile_w, tile_h = width * factor + gap, height * factor + gap
    titles = [*titles, *[""] * len(rows)][: len(rows)]
    heights = [math.ceil(len(r) / columns) * tile_h + bar * bool(t) for r, t in zip(rows, titles, strict=True)]
    grid = Image.new("RGB", (columns * tile_w + gap, sum(heights) + gap), PAPER)
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(20)
    y = gap
    for row, title, used in zip(rows, titles, heights, strict=True):
        top = y
        if title:
            draw.text((gap, y + bar / 2 - 2), fitted(title, font, columns * tile_w - gap), INK, font, "lm")
            top += bar
        for i, picture in enumerate(row):
            tile = Image.fromarray(np.ascontiguousarray(picture[..., :3]))
            tile = tile.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            grid.paste(tile, (gap + i % columns * tile_w, top + i // columns * tile_h))
        y += used
    return np.asarray(grid)


def colour(index: int) -> str:
    """Colour of series `index`; they repeat after eight."""
    return PALETTE[index % len(PALETTE)]


def fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: float) -> str:
    """The text in one line, cut with an ellipsis where it is wider than `room` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..." if text else ""


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five, from at or below `low` to at or above `high`."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-200):
        half = 0.5 * size if size > 1e-200 else 0.5
        low, high = low - half, high + half
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def check_numbers(title: str, drawn: Iterable[float], others: Iterable[float] = ()) -> None:
    """Raise `DiffLensError` unless there is something to draw and every number is finite."""
    drawn = list(drawn)
    if not drawn:
        raise DiffLensError(f'chart "{title}": there is nothing to draw. Give at least one value.')
    if not all(math.isfinite(value) for value in [*drawn, *others]):
        raise DiffLensError(f'chart "{title}": a value is NaN or infinite. Every value must be a finite number.')


def draw_whisker(chart: Chart, x: float, half: float, low: float, high: float) -> None:
    """A vertical line from low to high (pixels) with a bar at each end."""
    chart.draw.line((x, low, x, high), INK, 3)
    for y in (low, high):
        chart.draw.line((x - half, y, x + half, y), INK, 3)


def upright_text(chart: Chart, x: float, top: float, text: str, size: int) -> None:
    """Text turned by a quarter, centred at x, hanging down from `top`."""
    font = ImageFont.load_default(max(size, 10))
    text = fitted(text, font, 92)
    box = Image.new("L", (math.ceil(font.getlength(text)) + 2, size + 12))
    ImageDraw.Draw(box).text((1, box.height / 2), text, 255, font, "lm")
    turned = box.rotate(90, expand=True)
    chart.image.paste(SOFT, (round(x - turned.width / 2), round(top)), turned)
