"""The types that travel between the nodes, and the socket of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from comfy_api.latest import io
from torch import Tensor

from ..difflens_core.locate import Labelled


@dataclass(frozen=True)
class Labels:
    """The class that a classifier sees in each picture.

    indices: n, int64, into `classes`, NO_CLASS for a picture without a face; others: for each other attribute
    of the classifier, its classes and the same; frames: n x 4 around the subjects, see `classifiers.frames_of`;
    readings: for each attribute, n x K, how probable each of its classes is.
    """

    attribute: str
    classes: tuple[str, ...]
    indices: Tensor
    others: Labelled = field(default_factory=dict)
    frames: Tensor | None = None
    readings: Mapping[str, Tensor] = field(default_factory=dict)


CATEGORY = "DiffLens"

Activations = io.Custom("DIFFLENS_ACTIVATIONS")  # difflens_core.activations.Activations
SAE = io.Custom("DIFFLENS_SAE")  # difflens_core.sae.SparseAutoencoder
Classifier = io.Custom("DIFFLENS_CLASSIFIER")  # difflens_core.classifiers.ImageClassifier
LabelsSocket = io.Custom("DIFFLENS_LABELS")  # Labels
ProbesSocket = io.Custom("DIFFLENS_PROBES")  # difflens_core.locate.Probes
RecipeSocket = io.Custom("DIFFLENS_RECIPE")  # difflens_core.steer.Recipe
JudgementsSocket = io.Custom("DIFFLENS_JUDGEMENTS")  # difflens_core.measure.Judged
TargetsSocket = io.Custom("DIFFLENS_TARGETS")  # tuple of difflens_core.targets.Targets, one an attribute
