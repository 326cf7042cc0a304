"""Which latents carry an attribute: probes, attribution, and how well single latents tell the classes apart."""

from .attribution import METHODS, Attribution, attribute_features, balancing_weights, contrast, integrated_gradients
from .gradients import integrated_gradients_of, picture_objective
from .probes import Probes, load_probes, save_probes, train_probes
from .separation import Separation, measure_separation

__all__ = [
    "Attribution",
    "METHODS",
    "Probes",
    "Separation",
    "attribute_features",
    "balancing_weights",
    "contrast",
    "integrated_gradients",
    "integrated_gradients_of",
    "load_probes",
    "measure_separation",
    "picture_objective",
    "save_probes",
    "train_probes",
]
