"""Recipes, and the edit that they make while a picture is sampled."""

from .building import build_recipe, recipe_from_features
from .controls import mean_difference, random_features, with_latents
from .directions import additive, directions_of, load_ml_act, save_directions
from .plans import plan_in_words, plan_moves, planned_targets
from .recipe_files import as_stored, load_recipe, save_recipe
from .recipes import MODES, TWIN, WITHOUT_LEVELS, Recipe, at_dose, check_one_site, joined, of_latents, with_settings
from .steering import BY_LEVELS, Steering, steerings
from .weighing import weigh_latents

__all__ = [
    "BY_LEVELS",
    "MODES",
    "Recipe",
    "Steering",
    "TWIN",
    "WITHOUT_LEVELS",
    "additive",
    "as_stored",
    "at_dose",
    "build_recipe",
    "check_one_site",
    "directions_of",
    "joined",
    "load_ml_act",
    "load_recipe",
    "mean_difference",
    "of_latents",
    "plan_in_words",
    "plan_moves",
    "planned_targets",
    "random_features",
    "recipe_from_features",
    "save_directions",
    "save_recipe",
    "steerings",
    "weigh_latents",
    "with_latents",
    "with_settings",
]
