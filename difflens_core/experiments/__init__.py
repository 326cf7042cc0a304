"""What is found out by sampling pictures: where an attribute is decided, by which features, and at what dose."""

from .calibration import CalibrationOptions, Doses, asked_shares, calibrate, check_calibration, plan_is_stale
from .checks import Check
from .cross_effects import CrossEffect, cross_effects
from .diagnose import Diagnosis, diagnose
from .effects import EFFECTS, Effects, causal_effect, keep_effective
from .outcomes import UNSTEERED
from .scan import SiteEffect, scan_sites

__all__ = [
    "CalibrationOptions",
    "Check",
    "CrossEffect",
    "Diagnosis",
    "Doses",
    "EFFECTS",
    "Effects",
    "SiteEffect",
    "UNSTEERED",
    "asked_shares",
    "plan_is_stale",
    "calibrate",
    "check_calibration",
    "causal_effect",
    "cross_effects",
    "diagnose",
    "keep_effective",
    "scan_sites",
]
