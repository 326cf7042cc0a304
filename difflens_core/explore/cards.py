"""All that the explorer in the page shows of each feature, and the same in words."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..steer import Recipe
from .activity import Activity
from .of_sae import class_scores
from .together import fire_together

DIGITS = 4  # of the numbers in the cards


def cards(
    recipe: Recipe, activity: Activity, labels: Tensor, classes: tuple[str, ...], progress: Tensor, on: bool
) -> dict[str, Any]:
    """What the page is told, as JSON, of a recipe of one site.

    labels: B, or NO_CLASS; progress: S, of the steps; on: whether features are ticked at first. `shown` are the
    pictures that stand in any card, in the order of the thumbnails; `top` and `places` mean them by their place in it.
    Maps are base64 of bytes, 255 being the feature's largest number: `heat` of each feature's top pictures, F x T x H x
    W; `places` and `strength` of the shown pictures, H x W x R of the strongest features' rows (two bytes, the lower
    first) and how active they are.
    """
    shown = activity.shown
    place = torch.searchsorted(shown, activity.top)
    largest = activity.peak[:, :1].clamp(min=1e-12)
    scores = class_scores(activity.means, labels[: len(activity.means)], len(classes))
    groups = fire_together(activity.alike)
    strongest = activity.strongest[shown]
    strength = activity.strength[shown] / largest[:, 0][strongest]
    named = recipe.info.get("named", {})
    ranking = recipe.info.get("scores") or [None] * len(recipe.features)
    weight = [1.0] * len(recipe.features) if recipe.weight is None else rounded(recipe.weight)
    features = [
        {
            "id": number, "on": on, "weight": weight[row], "group": "", "name": "", **named.get(str(number), {}),
            "of": recipe.member[:, row].nonzero().flatten().tolist(),
            "together": int(groups[row]), "score": ranking[row], "tells": rounded(scores[row]),
            "fires": round(float(activity.fires[row]), 6), "peak": rounded(activity.peak[row]),
            "top": place[row].tolist(), "activity": rounded(activity.by_class[row]),
        }
        for row, number in enumerate(recipe.features.tolist())
    ]  # fmt: skip
    return {
        "attribute": recipe.attribute, "site": recipe.site, "classes": list(classes),
        "pictures": activity.pictures.tolist(), "ranking": recipe.info.get("ranking", ""),
        "progress": rounded(progress), "map": list(activity.heat.shape[2:]), "shown": len(shown),
        "rivals": strongest.shape[3], "features": features,
        "heat": in_base64(in_bytes(activity.heat / largest[:, :, None, None])),
        "places": in_base64(strongest.numpy().astype("<u2")), "strength": in_base64(in_bytes(strength)),
    }  # fmt: skip


def rounded(numbers: Tensor) -> list[Any]:
    """Numbers as lists of few digits."""
    return np.round(numbers.double().numpy(), DIGITS).tolist()


def in_bytes(shares: Tensor) -> np.ndarray:
    """Numbers of [0, 1] as bytes."""
    return shares.clamp(0, 1).mul(255).round().byte().numpy()


def in_base64(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def feature_table(recipe: Recipe, activity: Activity, found: dict[str, Any]) -> str:
    """A line for each feature, best first. found: its `cards`."""
    classes = found["classes"]
    heads = "".join(f"{name:>12.11}" for name in classes)
    lines = [f"{'feature':>8}  {'tells':14}{'AUC':>6}{'fires':>9}{heads}  together  name"]
    for row in best_first(found):
        feature = found["features"][row]
        best = int(np.argmax(feature["tells"]))
        activities = "".join(f"{value:12.4f}" for value in activity.by_class[row].mean(dim=1).tolist())
        tells = classes[best] if feature["tells"][best] > 0.5 else "-"
        group = feature["together"] or "-"
        lines.append(
            f"{'#' + str(feature['id']):>8}  {tells:14.13}{feature['tells'][best]:6.2f}{feature['fires']:9.2%}"
            f"{activities}{group:>10}  {feature['name']}".rstrip()
        )
    return "\n".join(lines)


def best_first(found: dict[str, Any]) -> list[int]:
    """Rows of the features by how well they tell a class, or how active they become."""
    features = found["features"]
    return sorted(
        range(len(features)), key=lambda row: (-max(features[row]["tells"]), -features[row]["peak"][0])
    )  # fmt: skip
