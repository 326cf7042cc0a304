"""How far a set of pictures is from a fair mix, what else changed, and how sure that is."""

from .changes import PERCEPTUAL, feature_changes, measure_changes, perceptual_network
from .correction import Correction, confusion_counts, correct_for_errors, parse_confusion, solve_shares
from .fairness import (
    Report,
    fairness_discrepancy,
    kept_attributes,
    kl_divergence,
    measure_fairness,
    one_hot,
    pixel_change,
    total_variation,
    unbiased_squared_fd,
)
from .groups import PromptReport, clear_pictures, joint_report, prompt_report, undecided_bounds
from .intervals import fd_interval, share_intervals, wilson_interval
from .significance import (
    PairedTest,
    fd_threshold,
    paired_test,
    pictures_for_fd,
    pictures_for_share,
    stuart_maxwell,
    target_p_value,
)

__all__ = [
    "Correction",
    "PERCEPTUAL",
    "PairedTest",
    "PromptReport",
    "Report",
    "clear_pictures",
    "confusion_counts",
    "correct_for_errors",
    "fairness_discrepancy",
    "fd_interval",
    "fd_threshold",
    "feature_changes",
    "joint_report",
    "kept_attributes",
    "kl_divergence",
    "measure_changes",
    "measure_fairness",
    "one_hot",
    "paired_test",
    "parse_confusion",
    "perceptual_network",
    "pictures_for_fd",
    "pictures_for_share",
    "pixel_change",
    "prompt_report",
    "share_intervals",
    "solve_shares",
    "stuart_maxwell",
    "target_p_value",
    "total_variation",
    "unbiased_squared_fd",
    "undecided_bounds",
    "wilson_interval",
]
