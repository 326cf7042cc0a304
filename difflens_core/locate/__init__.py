"""Which latents carry an attribute: probes, attribution, levels, and how well single latents tell the classes apart."""

from .attribution import (
    METHODS,
    Attribution,
    attribute_features,
    balancing_weights,
    contrast,
    integrated_gradients,
    tied,
)
from .changes import CHANGES, Changes, LabelledPictures, fit_changes
from .frames import FRAME, FrameProbes, fit_frames, in_frames
from .gradients import integrated_gradients_of, picture_objective
from .levels import LEVELS, Labelled, Levels, RowsOf, channel_rows, fit_levels, in_maps, latent_rows
from .probes import Probes, check_labels, load_probes, save_probes, train_probes
from .separation import Separation, auc, measure_separation, pooled

__all__ = [
    "Attribution",
    "CHANGES",
    "Changes",
    "FRAME",
    "FrameProbes",
    "LEVELS",
    "Labelled",
    "Levels",
    "METHODS",
    "Probes",
    "RowsOf",
    "Separation",
    "LabelledPictures",
    "attribute_features",
    "auc",
    "balancing_weights",
    "channel_rows",
    "check_labels",
    "contrast",
    "fit_changes",
    "fit_frames",
    "fit_levels",
    "in_frames",
    "in_maps",
    "integrated_gradients",
    "integrated_gradients_of",
    "latent_rows",
    "load_probes",
    "measure_separation",
    "picture_objective",
    "pooled",
    "save_probes",
    "tied",
    "train_probes",
]
