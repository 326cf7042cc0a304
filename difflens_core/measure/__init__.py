"""How far a set of pictures is from a fair mix, what else changed, and how sure that is."""

from .changes import PERCEPTUAL, feature_changes, measure_changes, perceptual_network
from .correction import Correction, correct_for_errors, parse_confusion, solve_shares
from .fairness import fairness_discrepancy, kept_attributes, measure_fairness, one_hot, pixel_change, total_variation
from .groups import clear_pictures, joint_report, undecided_bounds
from .intervals import fd_interval, share_intervals, wilson_interval
from .significance import paired_test, pictures_for_fd, stuart_maxwell, target_p_value

__all__ = [
    "Correction",
    "PERCEPTUAL",
    "clear_pictures",
    "correct_for_errors",
    "fairness_discrepancy",
    "fd_interval",
    "feature_changes",
    "joint_report",
    "kept_attributes",
    "measure_changes",
    "measure_fairness",
    "one_hot",
    "paired_test",
    "parse_confusion",
    "perceptual_network",
    "pictures_for_fd",
    "pixel_change",
    "share_intervals",
    "solve_shares",
    "stuart_maxwell",
    "target_p_value",
    "total_variation",
    "undecided_bounds",
    "wilson_interval",
]
