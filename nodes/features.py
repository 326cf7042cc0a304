"""The node that shows single features, and lets a person choose among them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.activations import Activations as CapturedActivations
from ..difflens_core.explore import (
    CHUNK,
    PICTURES,
    Activity,
    Wish,
    as_jpeg,
    best_first,
    cards,
    check_explored,
    chosen,
    feature_table,
    lit,
    observe,
    parse_choice,
    probe_classes,
    recipe_to_choose_from,
    sheets,
    thumbnails,
)
from ..difflens_core.files import DiffLensError, digest
from ..difflens_core.report import image_grid, with_provenance
from ..difflens_core.sae import SparseAutoencoder
from ..difflens_core.steer import Recipe, as_stored, load_recipe, save_recipe
from . import host
from .attribute import SMALLER_SAE, check_sae, locating_bytes
from .sockets import CATEGORY, SAE, Activations, Labels, LabelsSocket, RecipeSocket

DRAWN = 6  # features on the contact sheet
ALL = "all"  # the class of pictures of which no classes are known


class ExploreFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensExplore",
            display_name="Explore Features",
            category=CATEGORY,
            description="Shows the features of a recipe or an SAE as cards: the pictures in which each fires most, and "
            "where. Tick, name, group and weigh them in the explorer, which its button opens.",
            search_aliases=[
                "feature explorer", "browse features", "heat map", "what does it do", "pick features", "interpret",
                "dashboard",
            ],
            inputs=[
                Activations.Input("activations", tooltip="From Capture Activations, or from Load Activations."),
                io.Image.Input(
                    "images",
                    tooltip="The pictures of that capture, in the same order: its second output. Of loaded "
                    "activations, the samples through VAE Decode.",
                ),
                RecipeSocket.Input(
                    "recipe", optional=True, tooltip="Whose features to show. All are ticked at first."
                ),
                SAE.Input(
                    "sae",
                    optional=True,
                    tooltip="Without a recipe: whose features to show, and none is ticked at first. With one: tells "
                    "exactly where its features fire; recipes from Load Feature Files need it.",
                ),
                LabelsSocket.Input(
                    "labels",
                    optional=True,
                    tooltip="From Classify Images, on the same pictures: which class each shows. Without, the recipe's "
                    "own probes tell.",
                ),
                io.String.Input(
                    "choice",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="What was ticked, named, grouped and weighed. The explorer writes it; empty, everything is "
                    "as it was.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Name in models/difflens_recipes for a copy of the recipe as it was chosen. Nothing is "
                    "replaced. Empty: not saved. The explorer's Save fills this in for one run.",
                ),
            ],
            outputs=[
                RecipeSocket.Output(display_name="recipe", tooltip="The recipe with what was chosen, for Steer."),
                io.String.Output(display_name="table", tooltip="A line for each feature, best first."),
                io.Image.Output(
                    display_name="sheet",
                    tooltip=f"The pictures in which the {DRAWN} best features fire most, light where they do. Also "
                    "drawn on the node.",
                ),
            ],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, save_as: str | None = None, **_: Any) -> str:
        """A file that was deleted is written again."""
        return host.on_disk(host.new_file(host.RECIPES, save_as)[0]) if save_as and save_as.strip() else ""

    @classmethod
    @host.clear_errors
    def execute(
        cls, activations: CapturedActivations, images: Tensor, recipe: Recipe | None = None,
        sae: SparseAutoencoder | None = None, labels: Labels | None = None, choice: str = "", save_as: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        wishes = parse_choice(choice)
        check_pictures(activations, images, labels)
        whole, part = recipe_of(recipe, sae, activations, labels)
        check_explored(part, activations, sae)
        numbers, classes = classes_of(part, activations, labels)
        needed = 4 * (2 * part.encoder.numel() + 3 * CHUNK) + (locating_bytes(sae) if sae else 0)
        device, report = host.training_device(needed, SMALLER_SAE), host.progress_bar(activations.pictures)
        activity = observe(part, activations, numbers, len(classes), sae, device, report)
        found = cards(part, activity, numbers, classes, activations.progress, on=recipe is not None)
        pictures = thumbnails(images, activity.shown)
        table = feature_table(part, activity, found)
        sheet = host.to_image(contact_sheet(activity, found, pictures))
        result, sentences = apply(whole, part, wishes, on=recipe is not None)
        if activations.pictures > PICTURES:
            sentences.append(f"The first {PICTURES} of {activations.pictures} pictures are shown.")
        host.warn(cls, sentences)
        host.tell(host.node_id(), " ".join([ticked(part, wishes, recipe is not None), *sentences]))
        saved = (save_new(result, save_as),) if save_as.strip() else ()
        return host.drawn(
            cls, sheet, result, table, sheet, text=table, difflens_features=(to_page(found, pictures),),
            difflens_saved=saved,
        )  # fmt: skip


def check_pictures(activations: CapturedActivations, images: Tensor, labels: Labels | None) -> None:
    """Raise `DiffLensError` unless there is a picture, and a label, for each that was captured."""
    for name, count in (("images", len(images)), ("labels", len(labels.indices) if labels else activations.pictures)):
        if count != activations.pictures:
            raise DiffLensError(
                f"there are {count} {name} for {activations.pictures} captured pictures. Connect those of the same "
                "capture."
            )


def recipe_of(
    recipe: Recipe | None, sae: SparseAutoencoder | None, activations: CapturedActivations, labels: Labels | None
) -> tuple[Recipe, Recipe]:
    """The recipe to choose from, and its part at the site of the activations."""
    if sae is not None:
        check_sae(sae, activations)
    if recipe is not None:
        here = [part for part in recipe.parts if part.site == activations.site]
        return recipe, here[0] if here else recipe.parts[0]
    if sae is None:
        raise DiffLensError("there is nothing to show. Connect a recipe, or an SAE.")
    given = (labels.indices, labels.attribute, labels.classes) if labels else (Tensor(), "", ())
    made = recipe_to_choose_from(sae, activations, *given)
    return made, made


def classes_of(
    recipe: Recipe, activations: CapturedActivations, labels: Labels | None
) -> tuple[Tensor, tuple[str, ...]]:
    """The class of each captured picture, by labels or else by the recipe's own probes, and the classes' names."""
    if labels:
        return labels.indices, labels.classes
    read = probe_classes(recipe, activations)
    if read is None:
        return activations.progress.new_zeros(activations.pictures).long(), (ALL,)
    return read, recipe.classes


def apply(
    recipe: Recipe, part: Recipe, wishes: dict[int, Wish], on: bool
) -> tuple[Recipe, list[str]]:  # fmt: skip
    """The recipe with what was chosen of its part, and what there is to say about that."""
    if not wishes and on:
        return recipe, []
    result = as_stored(chosen(recipe, part.site, wishes, on))
    sentences = []
    if unknown := [f"#{number}" for number in sorted(set(wishes) - set(part.features.tolist()))]:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        sentences.append(f"The choice names features that are not among these: {', '.join(unknown[:5])}{more}.")
    left = next(of for of in result.parts if of.site == part.site)
    if left.weight is not None and not left.weight.any():
        sentences.append("No feature is ticked, so the recipe changes nothing here.")
    return result, sentences


def ticked(part: Recipe, wishes: dict[int, Wish], on: bool) -> str:
    """How many of the features are, in a sentence."""
    given = [wishes.get(number, Wish()).on for number in part.features.tolist()]
    return f"{sum(on if own is None else own for own in given)} of {len(given)} features are ticked."


def contact_sheet(activity: Activity, found: dict[str, Any], pictures: np.ndarray) -> np.ndarray:
    """The best features' top pictures, lit where they fire, a row each."""
    rows, titles = [], []
    for row in best_first(found)[:DRAWN]:
        feature = found["features"][row]
        maps = activity.heat[row] / max(float(activity.peak[row, 0]), 1e-12)
        rows.append(np.stack([lit(pictures[at], heat) for at, heat in zip(feature["top"], maps, strict=True)]))
        best = int(np.argmax(feature["tells"]))
        tells = f", {found['classes'][best]} {feature['tells'][best]:.2f}" if feature["tells"][best] > 0.5 else ""
        titles.append(f"#{feature['id']} {feature['name']}".rstrip() + tells)
    return image_grid(rows, titles, len(rows[0]))


def to_page(found: dict[str, Any], pictures: np.ndarray) -> dict[str, str]:
    """Write what the explorer shows where the page can read it, and return its reference."""
    files = [as_jpeg(sheet) for sheet in sheets(pictures)]
    name = f"difflens_features_{digest(json.dumps(found), *files)}"
    shown = [host.hand_to_page(f"{name}_{number}.jpg", file) for number, file in enumerate(files)]
    found |= {"sheets": shown, "thumbnail": [pictures.shape[2], pictures.shape[1]]}
    return host.hand_to_page(f"{name}.json", json.dumps(found).encode())


def save_new(recipe: Recipe, name: str) -> str:
    """Save a recipe under a name that is free, or has it already, and return the name that lists show."""
    path, listed = host.new_file(host.RECIPES, name)
    recipe = with_provenance(recipe)
    if path.exists() and host.content_mark(load_recipe(path)) != host.content_mark(as_stored(recipe)):
        raise DiffLensError(
            f"{listed} is there already and holds another recipe. Choose another name; Save Recipe replaces one."
        )
    save_recipe(path, recipe)
    return listed
