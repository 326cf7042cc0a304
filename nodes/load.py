"""Nodes that read files and write recipes."""

from __future__ import annotations

from comfy_api.latest import io

from ..difflens_core.activations import UPDATE
from ..difflens_core.classifiers import load_any_classifier, load_face_finder
from ..difflens_core.files import DiffLensError
from ..difflens_core.networks import AUTO, BETAS, PREDICTIONS
from ..difflens_core.sae import SparseAutoencoder, load_any_sae, load_class_features
from ..difflens_core.steer import WITHOUT_LEVELS, Recipe, load_recipe, recipe_from_features, save_recipe
from ..difflens_core.targets import parse_numbers
from . import host, host_avatars, host_unconditional
from .host_classifiers import HostedClassifier
from .sockets import CATEGORY, SAE, Classifier, RecipeSocket

NO_DETECTOR = "none"


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensLoadModel",
            display_name="Load Unconditional Model",
            category=CATEGORY,
            description="Loads a diffusion model that draws without a prompt: the avatars, a guided-diffusion (ADM) or "
            "P2 checkpoint, or a diffusers UNet2DModel, with all that a KSampler needs.",
            search_aliases=["avatars", "unconditional", "pixel space", "ADM", "P2", "guided-diffusion", "DDPM"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host_unconditional.list_models(),
                    tooltip="A file in models/difflens_models, or a folder there with a config.json, as diffusers "
                    "writes it; or the avatars that come with the pack.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=[AUTO, *BETAS],
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Noise schedule the model was trained with. auto: what its scheduler_config.json says, "
                    "else linear. Not used for the avatars.",
                ),
                io.Combo.Input(
                    "prediction",
                    options=[AUTO, *PREDICTIONS],
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="What the model was trained to predict. auto: what its scheduler_config.json says, else "
                    "epsilon, the noise. Not used for the avatars.",
                ),
                io.Int.Input(
                    "class_label",
                    default=0,
                    min=0,
                    max=2**15,
                    optional=True,
                    advanced=True,
                    tooltip="Which class to draw, if the model was trained with classes (the report says).",
                ),
                io.Int.Input(
                    "heads",
                    default=0,
                    min=0,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Attention heads of an ADM checkpoint, which the file does not tell. 0: 64 channels each "
                    "if it changes size in its residual blocks, as P2 and nearly all of guided-diffusion; else 4.",
                ),
                io.Boolean.Input(
                    "new_attention_order",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="For ADM checkpoints trained with use_new_attention_order (guided-diffusion: ImageNet 64).",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model. Sample it at cfg 1: it has no prompt to be guided by."),
                io.Conditioning.Output(
                    display_name="unconditional",
                    tooltip="A conditioning that says nothing (or only the class), for both positive and negative.",
                ),
                io.Vae.Output(tooltip="Pixel space: turns the model's latents, which are pixels, into images."),
                io.String.Output(
                    display_name="report", tooltip="What was found in the file, what was assumed, and the picture size."
                ),
            ],
        )

    @classmethod
    @host.clear_errors
    def execute(
        cls, model_name: str, schedule: str = AUTO, prediction: str = AUTO, class_label: int = 0, heads: int = 0,
        new_attention_order: bool = False,
    ) -> io.NodeOutput:  # fmt: skip
        path = host_unconditional.find_model(model_name)
        model, report, classes = host_unconditional.load_model(path, schedule, prediction, heads, new_attention_order)
        conditioning = host_unconditional.class_conditioning(class_label, classes)
        return io.NodeOutput(model, conditioning, host.pixel_space_vae(), report)


class LoadPromptedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensLoadPromptedModel",
            display_name="Load Prompted Model",
            category=CATEGORY,
            description="Loads a small diffusion model that draws by prompt, such as the avatars at work, with all "
            "that CLIP Text Encode and a KSampler need.",
            search_aliases=["avatars", "prompt", "occupations"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=host.list_files(host.MODELS),
                    tooltip="A file in models/difflens_models, or the prompted avatars that come with the pack.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The model, for Steer, Capture Activations or a KSampler; cfg 2 suits it."),
                io.Clip.Output(
                    tooltip="Reads prompts such as: portrait of a doctor. It knows a few words only, those of the "
                    "drawings it was trained on."
                ),
                io.Vae.Output(tooltip="Pixel space: turns the model's latents, which are pixels, into images."),
            ],
        )

    @classmethod
    @host.clear_errors
    def execute(cls, model_name: str) -> io.NodeOutput:
        return io.NodeOutput(
            *host_avatars.load_prompted(host.find_file(host.MODELS, model_name)), host.pixel_space_vae()
        )


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
                    options=[NO_DETECTOR, *host.list_files(host.CLASSIFIERS)],
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
                    options=host.list_files(host.RECIPES),
                    tooltip="A file in models/difflens_recipes, or one of those that come with the pack.",
                )
            ],
            outputs=[RecipeSocket.Output(display_name="recipe", tooltip="The recipe, for Steer.")],
        )

    @classmethod
    @host.clear_errors
    def execute(cls, recipe_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_recipe(host.find_file(host.RECIPES, recipe_name)))


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
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The name under which Load Recipe lists the file.")],
            is_output_node=True,
        )

    @classmethod
    @host.clear_errors
    def execute(cls, recipe: Recipe, name: str) -> io.NodeOutput:
        path, listed = host.new_file(host.RECIPES, name)
        save_recipe(path, recipe)
        return io.NodeOutput(listed)
