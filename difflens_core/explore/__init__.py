"""What single latents do in captured pictures, for a person who looks: where they fire, which of them together."""

from .activity import CHUNK, PICTURES, Activity, check_explored, observe, probe_classes
from .cards import best_first, cards, feature_table
from .choices import Wish, chosen, parse_choice
from .of_sae import recipe_to_choose_from
from .pictures import as_jpeg, lit, sheets, thumbnails
from .together import fire_together

__all__ = [
    "Activity",
    "CHUNK",
    "PICTURES",
    "Wish",
    "as_jpeg",
    "best_first",
    "cards",
    "check_explored",
    "chosen",
    "feature_table",
    "fire_together",
    "lit",
    "observe",
    "parse_choice",
    "probe_classes",
    "recipe_to_choose_from",
    "sheets",
    "thumbnails",
]
