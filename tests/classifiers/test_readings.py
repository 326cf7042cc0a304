"""Readings of a classifier as labels, as a table, and what they leave out."""

from __future__ import annotations

import csv
import io

import torch

from difflens_core.classifiers import (
    NO_CLASS,
    decided,
    faces_missing,
    label_table,
    other_attributes,
    seen,
    seen_classes,
    shares_left_out,
)
from difflens_core.classifiers.readings import MISTAKE, NO_FACE, left_out

READ = {
    "race": torch.tensor([[0.2, 0.8], [0.7, 0.3]]),
    f"race{MISTAKE}": torch.tensor([[0.1, 0.2], [0.3, 0.1]]),
    "age": torch.tensor([[0.9, 0.1], [0.4, 0.6]]),
    left_out("race"): torch.tensor([0.25, 0.5]),
    NO_FACE: torch.tensor([0.0, 1.0]),
}


CLASSES = {"race": ("a", "b"), f"race{MISTAKE}": ("a", "b"), "age": ("young", 'o,"ld')}


def test_labels_travel_as_csv():
    rows = list(csv.reader(io.StringIO(label_table(READ, CLASSES, "race"))))
    assert rows == [
        ["picture", "race", "p(a)", "p(b)", "race: other classes", "no face", "age"],
        ["1", "b", "0.2000", "0.8000", "0.2500", "0.0000", "young"],
        ["2", "", "0.7000", "0.3000", "0.5000", "1.0000", ""],
    ]
    assert (
        label_table({"age": READ["age"]}, {"age": CLASSES["age"]}, "age").splitlines()[2] == '2,"o,""ld",0.4000,0.6000'
    )


def test_a_picture_without_a_face_has_no_class():
    probabilities = seen(READ, "age")
    assert probabilities[0].tolist() == READ["age"][0].tolist() and probabilities[1].isnan().all()
    assert seen_classes(probabilities).tolist() == [0, NO_CLASS]
    assert seen_classes(seen({"age": READ["age"]}, "age")).tolist() == [0, 1], "no face was looked for"
    assert faces_missing(seen_classes(probabilities)).startswith("No face was found in 1 of 2 pictures")


def test_other_readings_of_an_attribute_are_no_other_attributes():
    assert other_attributes(CLASSES, "race") == ["age"]
    assert other_attributes(CLASSES, f"race{MISTAKE}") == ["age"]
    assert other_attributes(CLASSES, "age") == ["race"]


def test_what_is_left_out_is_reported_by_reason():
    assert shares_left_out(READ, "race") == {"no face": 0.5, "other classes": 0.25}
    assert shares_left_out(READ, "age") == {"no face": 0.5}
    assert decided({"age": READ["age"]}).tolist() == [True, True]
