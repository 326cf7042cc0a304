"""Whose a recipe is, what it is for, how it may be used, and what it does: what its file tells people."""

from __future__ import annotations

import io
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..files import DiffLensError
from ..steer import Recipe

TOLD = ("author", "licence", "model_name")
WORDS = 200  # letters shown of each: files come from strangers
EXAMPLES, COLUMNS, SIDE = 8, 4, 512  # pictures in an example, in a row of it, and its pixels at most
LARGEST = 200_000  # bytes of an example
JPEG = "data:image/jpeg;base64,"


def with_provenance(
    recipe: Recipe, author: str = "", licence: str = "", model_name: str = "", example: bytes = b""
) -> Recipe:
    """The recipe with what its file is to tell people; what is left empty stays as it was told before.

    example: a JPEG of what this very recipe does; without one it has none, whatever it had before it was changed.
    """
    given = zip(TOLD, (author.strip(), licence.strip(), model_name.strip()), strict=True)
    info = {**recipe.info, **{name: text for name, text in given if text}}
    info.pop("example", None)
    return replace(recipe, info=info | ({"example": JPEG + b64encode(example).decode()} if example else {}))


def example_grid(pictures: Tensor) -> bytes:
    """A small JPEG of the first pictures (n x H x W x 3 in [0, 1]), some 30 KB, for `with_provenance`."""
    images = [Image.fromarray(picture) for picture in pictures[:EXAMPLES].clamp(0, 1).mul(255).byte().cpu().numpy()]
    columns = min(COLUMNS, len(images))
    for image in images:
        image.thumbnail((SIDE // columns, SIDE // columns))
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for number, image in enumerate(images):
        grid.paste(image, (number % columns * width, number // columns * height))
    written = io.BytesIO()
    grid.save(written, "JPEG", quality=75)
    return written.getvalue()


def example_of(recipe: Recipe) -> np.ndarray | None:
    """The example of a recipe, H x W x 3, uint8; None if it has none. Raises `DiffLensError` if it is no small JPEG."""
    text = recipe.info.get("example")
    if text is None:
        return None
    try:
        if not (isinstance(text, str) and text.startswith(JPEG) and len(text) < LARGEST):
            raise ValueError("not a JPEG, or too large")
        image = Image.open(io.BytesIO(b64decode(text[len(JPEG) :])), formats=("JPEG",))
        if max(image.size) > SIDE:
            raise ValueError(f"{image.width} x {image.height} pixels")
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # damaged pictures bring up anything
        raise DiffLensError(f"The recipe's example cannot be shown ({error}). It steers as well without.") from error


def provenance(file: Mapping[str, Any]) -> dict[str, Any]:
    """What goes with a picture that was steered by a recipe, of what its file tells (`files.difflens_info`)."""
    info = file["info"] if isinstance(file.get("info"), dict) else {}
    told = {"attribute": file.get("attribute"), "classes": file.get("classes"), "model": file.get("model")}
    told |= {name: short(str(info[name])) for name in (*TOLD, "control") if info.get(name)}
    return told | {"calibrated": "calibration" in info, "of_0.4": "hold" not in file}


def short(text: str) -> str:
    """At most WORDS letters of a text from a stranger's file."""
    return text if len(text) <= WORDS else text[: WORDS - 1] + "…"


def provenance_text(file: Mapping[str, Any]) -> str:
    """The same in words."""
    told, classes = provenance(file), file.get("classes")
    names = f" ({short(', '.join(map(str, classes)))})" if isinstance(classes, list) else ""
    whose = f", made by {told['author']}" if "author" in told else ""
    of = f" in {told['model_name']}" if "model_name" in told else ""
    control = [f"A control, to compare others with: {told['control']}."] if "control" in told else []
    older = ["The recipe was made by version 0.4 or before and steers as it did there: it does not hold."]
    sentences = [f"Recipe for {short(str(told['attribute']))}{names}{of}{whose}."]
    sentences.append(f"Licence: {told['licence']}." if "licence" in told else "Its file names no licence.")
    return " ".join([*control, *(older if told["of_0.4"] else []), *sentences])
