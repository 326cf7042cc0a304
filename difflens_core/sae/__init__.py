"""The sparse autoencoder that takes activations apart: training it, judging it, and reading those of other programs."""

from .autoencoder import (
    NORMALISATION,
    Latents,
    Normalisation,
    SparseAutoencoder,
    check_steps,
    fit_normalisation,
    load_sae,
    nearest_step,
    save_sae,
    sparse_decode,
)
from .formats import CONFIGS, WEIGHTS, load_any_sae, load_class_features
from .loss import ACTIVATIONS, PRECISIONS, TrainingOptions
from .quality import VALIDATION_PICTURES, Quality, hold_out, measure_sae
from .training import State, initial_sae, learning_rate_share, train_sae, training_bytes

__all__ = [
    "ACTIVATIONS",
    "CONFIGS",
    "Latents",
    "NORMALISATION",
    "Normalisation",
    "PRECISIONS",
    "Quality",
    "SparseAutoencoder",
    "State",
    "TrainingOptions",
    "VALIDATION_PICTURES",
    "WEIGHTS",
    "check_steps",
    "fit_normalisation",
    "hold_out",
    "initial_sae",
    "learning_rate_share",
    "load_any_sae",
    "load_class_features",
    "load_sae",
    "measure_sae",
    "nearest_step",
    "save_sae",
    "sparse_decode",
    "train_sae",
    "training_bytes",
]
