"""What reads attributes off pictures."""

from .convolutional import AttributeClassifier, FramedClassifier, cut_frame, load_classifier, save_classifier
from .faces import load_face_finder
from .loading import load_any_classifier
from .readings import (
    NO_CLASS,
    DifferentiableClassifier,
    ImageClassifier,
    decided,
    faces_missing,
    frames_of,
    join_readings,
    label_table,
    labelled,
    labels_of,
    other_attributes,
    seen,
    seen_classes,
    shares_left_out,
)
from .resnets import ResNetClassifier
from .zero_shot import ZeroShotClassifier, class_directions, parse_prompts

__all__ = [
    "AttributeClassifier",
    "DifferentiableClassifier",
    "FramedClassifier",
    "ImageClassifier",
    "NO_CLASS",
    "ResNetClassifier",
    "ZeroShotClassifier",
    "class_directions",
    "cut_frame",
    "decided",
    "faces_missing",
    "frames_of",
    "join_readings",
    "label_table",
    "labelled",
    "labels_of",
    "load_any_classifier",
    "load_classifier",
    "load_face_finder",
    "other_attributes",
    "parse_prompts",
    "save_classifier",
    "seen",
    "seen_classes",
    "shares_left_out",
]
