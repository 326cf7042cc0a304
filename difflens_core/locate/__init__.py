"""Which latents carry an attribute: probes, attribution, and how well single latents tell the classes apart."""

from .attribution import METHODS, Attribution, attribute_features, balancing_weights, contrast, integrated_gradients
from .probes import Probes, save_probes, train_probes
from .separation import measure_separation

__all__ = [
    "Attribution",
    "METHODS",
    "Probes",
    "attribute_features",
    "balancing_weights",
    "contrast",
    "integrated_gradients",
    "measure_separation",
    "save_probes",
    "train_probes",
]
