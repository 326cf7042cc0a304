"""All that the nodes need of ComfyUI itself: the only room that touches its internals."""

from .ddim import ddim_sigmas, reference_sampler
from .edits import CONDITIONINGS, apply_site
from .files import (
    CLASSIFIERS,
    MODELS,
    RECIPES,
    SAES,
    find_features,
    find_file,
    find_model,
    find_sae,
    find_store,
    list_feature_folders,
    list_files,
    list_models,
    list_saes,
    list_stores,
    new_file,
    new_output,
    new_store,
    temporary_file,
)
from .marks import model_fingerprint, patches_mark, recipe_mark, training_mark
from .models.avatars import load_prompted, load_unconditional
from .models.classifiers import HostedClassifier, image_embedder, text_embeddings
from .models.pixels import pixel_space_vae, unconditional_conditioning
from .models.unconditional import class_conditioning, load_model
from .progress import (
    clear_errors,
    drawn,
    log,
    preview,
    progress_bar,
    progress_of_total,
    to_image,
    training,
    training_device,
)
from .runs import progress_of
from .sampling import SAMPLERS, SCHEDULERS, capture, drawer, run_mark
from .sites import own_name, site_width, some_sites

__all__ = [
    "CLASSIFIERS",
    "CONDITIONINGS",
    "HostedClassifier",
    "MODELS",
    "RECIPES",
    "SAES",
    "SAMPLERS",
    "SCHEDULERS",
    "apply_site",
    "capture",
    "class_conditioning",
    "clear_errors",
    "ddim_sigmas",
    "drawer",
    "drawn",
    "find_features",
    "find_file",
    "find_model",
    "find_sae",
    "find_store",
    "image_embedder",
    "list_feature_folders",
    "list_files",
    "list_models",
    "list_saes",
    "list_stores",
    "load_model",
    "load_prompted",
    "load_unconditional",
    "log",
    "model_fingerprint",
    "new_file",
    "new_output",
    "new_store",
    "own_name",
    "patches_mark",
    "recipe_mark",
    "pixel_space_vae",
    "preview",
    "progress_bar",
    "progress_of",
    "progress_of_total",
    "reference_sampler",
    "run_mark",
    "site_width",
    "some_sites",
    "temporary_file",
    "text_embeddings",
    "to_image",
    "training",
    "training_device",
    "training_mark",
    "unconditional_conditioning",
]
