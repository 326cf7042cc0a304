"""Nodes that read files and write recipes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.activations import UPDATE
from ..difflens_core.classifiers import load_any_classifier, load_face_finder
from ..difflens_core.files import DiffLensError
from ..difflens_core.report import example_grid, example_of, with_provenance
from ..difflens_core.sae import SparseAutoencoder, load_any_sae, load_class_features
from ..difflens_core.steer import WITHOUT_LEVELS, Recipe, load_recipe, recipe_from_features, save_recipe
from ..difflens_core.targets import parse_numbers
from . import host
from .host import HostedClassifier
from .sockets import CATEGORY, SAE, Classifier, RecipeSocket

NO_DETECTOR = "none"


class LoadSAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensLoadSAE",
            display_name="Load SAE",
            category=CATEGORY,
            description="Loads a sparse autoencoder that was trained on a model's activations, by this pack or by "
            "another program.",
            search_aliases=[
                "sparse autoencoder",
                "sparsify",
                "SAeUron",
                "sdxl-unbox",
                "dictionary_learning",
                "SAELens",
            ],
            inputs=[
                io.Combo.Input(
                    "sae_name",
                    options=host.list_saes(),
                    tooltip="A file in models/difflens_saes, or a folder there with a cfg.json or config.json, as "
                    "other programs write them; or the one that comes with the pack.",
                ),
                io.String.Input(
                    "site",
                    default="",
                    optional=True,
                    tooltip="Module that the SAE was trained on, for files of other programs that do not name it, such "
                    "as middle_block. Empty: what the file says.",
                ),
            ],
            outputs=[
                SAE.Output(display_name="sae", tooltip="The SAE, for Train Probes and Attribute Features."),
                io.String.Output(
                    display_name="report", tooltip="What was loaded: format, activation, size, site, what was assumed."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, sae_name: str | None = None) -> bool | str:
        return host.check_name(host.SAES, sae_name, host.list_saes())

    @classmethod
    def fingerprint_inputs(cls, sae_name: str | None = None, **_: Any) -> str:
        return host.name_state(host.SAES, sae_name)

    @classmethod
    @host.clear_errors
    def execute(cls, sae_name: str, site: str = "") -> io.NodeOutput:
        sae, report = load_any_sae(host.find_sae(sae_name), site)
        if not sae.site.removesuffix(UPDATE):
            raise DiffLensError(
                f"{sae_name} does not say which module it was trained on. Type its name into site, such as "
                "middle_block. (" + report.replace("\n", "; ") + ")"
            )
        return io.NodeOutput(sae, report)


class LoadFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensLoadFeatures",
            display_name="Load Feature Files",
            category=CATEGORY,
            description="Makes a recipe of an SAE and a folder that names the features of every class, as the "
            "reference DiffLens writes them: male.pt and female.pt, for example.",
            search_aliases=["reference", "bias features", "paper"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=host.list_feature_folders(),
                    tooltip="A folder in models/difflens_saes with a .pt file for every class.",
                ),
                SAE.Input("sae", tooltip="The SAE whose features the files name."),
                io.String.Input(
                    "attribute",
                    default="",
                    tooltip="What the classes are of, such as age. Empty: the folder's name. Fairness Report wants the "
                    "classifier's name.",
                ),
                io.String.Input(
                    "classes",
                    default="",
                    tooltip="Names of the files to read, in the order that the numbers below and Steer's target are "
                    "in. Empty: all of them by the alphabet. Fairness Report wants the classifier's order.",
                ),
                io.String.Input(
                    "features_per_class",
                    default="30",
                    tooltip='How many to take of every class, best first: one number, or one a class ("30, 100, 30, '
                    '30").',
                ),
                io.Combo.Input(
                    "mode",
                    options=list(WITHOUT_LEVELS),
                    default="scale",
                    tooltip="How Steer changes them. scale: times 1 + strength; ablate: times 1 - strength; both need "
                    "the SAE at Steer too if it is a TopK one. add own fixed: plus the strength; add fixed: that, and "
                    "minus the strength for the other classes' features.",
                ),
                io.String.Input(
                    "strength",
                    default="1",
                    tooltip='One number, or one a class ("0.43, 0"). The paper\'s scale of 1.43 is a strength of 0.43.',
                ),
            ],
            outputs=[
                RecipeSocket.Output(display_name="recipe", tooltip="The recipe, for Steer."),
                io.String.Output(display_name="report", tooltip="The features of every class, best first."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        return host.check_name(host.SAES, folder, host.list_feature_folders())

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **_: Any) -> str:
        return host.name_state(host.SAES, folder)

    @classmethod
    @host.clear_errors
    def execute(
        cls, folder: str, sae: SparseAutoencoder, attribute: str, classes: str, features_per_class: str, mode: str,
        strength: str,
    ) -> io.NodeOutput:  # fmt: skip
        path, names = host.find_features(folder), classes.replace(",", " ").split()
        features = load_class_features(path, sae.latents, names)
        counts = parse_numbers(features_per_class, features, "features_per_class", int)
        features = {name: ids[:count] for (name, ids), count in zip(features.items(), counts, strict=True)}
        strengths = tuple(parse_numbers(strength, features, "strength"))
        recipe = recipe_from_features(sae, attribute.strip() or path.name, features, mode, strengths)
        lines = [f"{name}: {len(ids)} features, {', '.join(f'#{i}' for i in ids)}" for name, ids in features.items()]
        return io.NodeOutput(recipe, "\n".join([f"{recipe.attribute}, at {recipe.site}", *lines]))


class LoadClassifier(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensLoadClassifier",
            display_name="Load Attribute Classifier",
            category=CATEGORY,
            description="Loads a classifier that reads attributes off pictures: one of the pack's, FairFace's, or any "
            "ResNet. It tells what a picture looks like, not what a person is.",
            search_aliases=["FairFace", "ResNet", "torchvision"],
            inputs=[
                io.Combo.Input(
                    "classifier_name",
                    options=host.list_files(host.CLASSIFIERS),
                    tooltip="A file in models/difflens_classifiers, or the one that comes with the pack.",
                ),
                io.Combo.Input(
                    "face_detector",
                    options=[NO_DETECTOR, *host.list_detectors()],
                    default=NO_DETECTOR,
                    optional=True,
                    tooltip="Weights of kornia's face detector YuNet, in the same folder: the largest face is cut out, "
                    "as FairFace expects, and pictures without a face are told apart. none: whole pictures.",
                ),
            ],
            outputs=[
                Classifier.Output(
                    display_name="classifier", tooltip="The classifier, for every node that asks for one."
                ),
                io.String.Output(display_name="report", tooltip="What was loaded: format, attributes, classes."),
            ],
        )

    @classmethod
    def validate_inputs(cls, classifier_name: str | None = None, face_detector: str | None = NO_DETECTOR) -> bool | str:
        listed = host.list_files(host.CLASSIFIERS)
        found = host.check_name(host.CLASSIFIERS, classifier_name, listed)
        detectors = [NO_DETECTOR, *listed]
        return host.check_name(host.CLASSIFIERS, face_detector, detectors) if found is True else found

    @classmethod
    def fingerprint_inputs(
        cls, classifier_name: str | None = None, face_detector: str | None = NO_DETECTOR, **_: Any
    ) -> str:  # fmt: skip
        return "; ".join(host.name_state(host.CLASSIFIERS, name) for name in (classifier_name, face_detector))

    @classmethod
    @host.clear_errors
    def execute(cls, classifier_name: str, face_detector: str = NO_DETECTOR) -> io.NodeOutput:
        faces = None
        if face_detector != NO_DETECTOR:
            faces = load_face_finder(host.find_file(host.CLASSIFIERS, face_detector))
        classifier, report = load_any_classifier(host.find_file(host.CLASSIFIERS, classifier_name), faces)
        return io.NodeOutput(HostedClassifier(classifier), report)


class LoadRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensLoadRecipe",
            display_name="Load Recipe",
            category=CATEGORY,
            description="Loads a recipe: the features that carry one attribute of one model, and how to steer by them.",
            inputs=[
                io.Combo.Input(
                    "recipe_name",
                    options=host.list_recipes(),
                    tooltip="A file in models/difflens_recipes, or one of those that come with the pack. Those in "
                    "controls steer by random features, to compare others with.",
                )
            ],
            outputs=[RecipeSocket.Output(display_name="recipe", tooltip="The recipe, for Steer.")],
        )

    @classmethod
    def validate_inputs(cls, recipe_name: str | None = None) -> bool | str:
        return host.check_name(host.RECIPES, recipe_name, host.list_files(host.RECIPES))

    @classmethod
    def fingerprint_inputs(cls, recipe_name: str | None = None, **_: Any) -> str:
        return host.name_state(host.RECIPES, recipe_name)

    @classmethod
    @host.clear_errors
    def execute(cls, recipe_name: str) -> io.NodeOutput:
        recipe = load_recipe(host.find_file(host.RECIPES, recipe_name))
        host.tell_recipe(recipe_name)
        try:
            example = example_of(recipe)
        except DiffLensError as error:
            host.warn(cls, [str(error)])
            example = None
        return io.NodeOutput(recipe) if example is None else host.drawn(cls, host.to_image(example), recipe)


class SaveRecipe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensSaveRecipe",
            display_name="Save Recipe",
            category=CATEGORY,
            description="Saves a recipe into models/difflens_recipes, where Load Recipe finds it. "
            "A recipe of the same name is replaced.",
            inputs=[
                RecipeSocket.Input("recipe", tooltip="A recipe from Attribute Features."),
                io.String.Input(
                    "name", default="my_recipe", tooltip="File name without ending; a / puts it into a sub-folder."
                ),
                io.String.Input(
                    "author",
                    default="",
                    optional=True,
                    tooltip="Who made it, for those who get the file. Empty: as the recipe tells already.",
                ),
                io.String.Input(
                    "licence",
                    default="",
                    optional=True,
                    tooltip="How it may be used, such as CC-BY-4.0. Mind the model's own licence. Empty: as the recipe "
                    "tells already.",
                ),
                io.String.Input(
                    "model_name",
                    default="",
                    optional=True,
                    tooltip="What people call the model that it is for. Empty: as the recipe tells already.",
                ),
                io.Image.Input(
                    "example",
                    optional=True,
                    tooltip="What the recipe does, such as the picture of Compare Images: up to eight pictures, kept "
                    "small in the file and shown on Load Recipe.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The name under which Load Recipe lists the file.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, **_: Any) -> str:
        """A file that was deleted or replaced is written again. A file that is as it should be is not touched."""
        return host.on_disk(host.new_file(host.RECIPES, name)[0]) if name else ""

    @classmethod
    @host.clear_errors
    def execute(
        cls, recipe: Recipe, name: str, author: str = "", licence: str = "", model_name: str = "",
        example: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        path, listed = host.new_file(host.RECIPES, name)
        shown = b"" if example is None else example_grid(example)
        save_recipe(path, with_provenance(recipe, author, licence, model_name, shown))
        return io.NodeOutput(listed)
