"""What the benchmarks of people in scenes print, write and draw of one prompt, size and attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from debias import measured
from PIL import Image
from torch import Tensor

from difflens_core.report import image_grid

SHOWN = ("presentation", "age", "skin_tone", "hair_colour", "glasses", "occupation", "background")


def shown_beside(attribute: str) -> list[str]:
    """The attributes that are to stay while one is steered."""
    return [name for name in SHOWN if name != attribute]


def heading(shown: Sequence[str]) -> str:
    """The titles above `row`."""
    return f"  {'':18s} FD [95 % interval] hard          success  {' '.join(name[:10] for name in shown)}  change"


def row(way: str, found: Mapping[str, Any], shown: Sequence[str]) -> str:
    """A way's outcome (see `debias.outcome`), with the shares that keep their class."""
    kept = " ".join(f"{100 * found['kept'][name]:{len(name[:10])}.1f}" for name in shown)
    return f"  {measured(way, dict(found))}  {kept}  {found['pixel_change']:.3f}"


def figures(way: str, job: str, size: tuple[int, int], attribute: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same for programs."""
    told = {name: found[name] for name in ("fd", "success", "kept", "pixel_change")}
    return {"way": way, "prompt": job, "size": list(size), "attribute": attribute, **told}


def save_grid(file: Path, ways: Mapping[str, Tensor]) -> None:
    """The first twelve pictures (n x H x W x 3 in [0, 1]) of each way, one row each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [(pictures[:12] * 255).round().byte().numpy() for pictures in ways.values()]
    Image.fromarray(image_grid(rows, list(ways), columns=12)).save(file)
