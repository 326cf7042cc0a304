"""The diagnosis on a toy model whose fault is known, because it was built in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import Draws

from difflens_core.activations import Activations
from difflens_core.classifiers.readings import NO_FACE
from difflens_core.experiments import UNSTEERED, Diagnosis, diagnose
from difflens_core.experiments.checks import BAD, DOUBTFUL, GOOD, NOT_CHECKED
from difflens_core.experiments.diagnose import evenly, overall
from difflens_core.experiments.outcomes import DOSES
from difflens_core.files import DiffLensError
from difflens_core.locate import Levels
from difflens_core.report import diagnosis_chart, diagnosis_text
from difflens_core.sae import Normalisation, SparseAutoencoder
from difflens_core.steer import Recipe, at_dose

CLASSES, STEPS, WIDTH, PICTURES = ("dark", "light"), 3, 8, 8
SITE, FEATURES, CHOICE, DOSE = range(4)  # places of the checks


def codes(count: int = 64) -> torch.Tensor:
    """What the deciding site puts out for each noise (n x 8 x 2 x 2): channel 0 is the class, a quarter light."""
    code = torch.randn(count, WIDTH, 2, 2, generator=torch.Generator().manual_seed(0))
    code[:, 0] = torch.where(torch.arange(count) % 4 == 0, 1.0, -1.0)[:, None, None] + 0.1 * code[:, 0]
    return code


@Draws
def draw(edits, which: torch.Tensor) -> torch.Tensor:
    """Red is channel 0 of what "decides" put out at the last step, green channel 1, blue 4; "idle" is for nothing."""
    rows = torch.arange(len(which))
    for step in range(STEPS):
        for site in ("idle", "decides"):
            h = codes()[which]
            for edit in edits:
                h = edit(h, step / STEPS, rows) if edit.site == site else h
    return (h[:, [0, 1, 4]].movedim(1, -1) / 8 + 0.5).clamp(0, 1)


def read(images: torch.Tensor) -> dict[str, torch.Tensor]:
    light = (80 * (images[..., 0].mean(dim=(1, 2)) - 0.5)).sigmoid()
    return {"tone": torch.stack([1 - light, light], dim=1)}


NORMALISATION = Normalisation(torch.arange(STEPS) / STEPS, torch.zeros(STEPS, WIDTH), torch.ones(STEPS))
AXES = torch.stack([torch.eye(WIDTH), -torch.eye(WIDTH)], dim=1).flatten(0, 1)  # +e0, -e0, +e1, -e1, ...


def make_sae(directions: torch.Tensor = AXES) -> SparseAutoencoder:
    """A latent for every half axis: with k 8 of the 16 it explains everything."""
    count = len(directions)
    return SparseAutoencoder(
        directions, torch.zeros(count), directions, torch.zeros(WIDTH), NORMALISATION, WIDTH, "decides"
    )


def make_recipe(features: torch.Tensor, **settings) -> Recipe:
    """Shift by those of AXES; of each pair the first is high in light, the second in dark, the first pair most."""
    size = torch.where(torch.arange(len(features)) < 2, 1.0, 0.05)
    light = (torch.arange(len(features)) % 2 == 0).float() * size
    levels = torch.stack([size - light, light])[None, :, :, None].expand(STEPS, -1, -1, 4)
    weight = torch.stack([-AXES[0], AXES[0]]).expand(STEPS, -1, -1) * 10
    return Recipe(
        "tone", CLASSES, "decides", "", features, AXES[features], torch.zeros(len(features)),
        torch.zeros(len(features)), AXES[features], torch.stack([size > light, light > 0]), Levels.of(levels), weight,
        torch.zeros(STEPS, 2), NORMALISATION, **{"strength": (1.0, 1.0), **settings},
    )  # fmt: skip


RIGHT = make_recipe(torch.arange(8))


def captured() -> tuple[Activations, torch.Tensor]:
    code = codes()
    labels = (code[:, 0].mean(dim=(1, 2)) > 0).long()
    return Activations(code.expand(STEPS, -1, -1, -1, -1), NORMALISATION.progress, "decides"), labels


def verdicts(found: Diagnosis) -> list[str]:
    return [check.verdict for check in found.checks]


def run(recipe: Recipe, sae: SparseAutoencoder | None = None, labelled: bool = False, **more) -> Diagnosis:
    activations, labels = captured() if labelled else (None, None)
    other = "idle" if recipe.site == "decides" else "decides"
    return diagnose(recipe, draw, read, PICTURES, [other], sae, activations, labels, 5, **more)


def test_a_recipe_that_works_has_nothing_wrong():
    found = run(RIGHT, make_sae(), labelled=True)
    assert found.verdict == "Nothing wrong found." and verdicts(found) == [GOOD] * 4
    site, features, choice, dose = (check.figures for check in found.checks)
    assert site == {"sites": {"decides": 1.0, "idle": 0.0}, "recipe": 1.0}
    assert features["fvu"] < 1e-6 and features["auc"]["latents"] > 0.95 and features["dead"] == 0
    assert choice == {"features": [2, 2, 4, 8], "best": [1.0] * 4, "random": [0.0] * 4}
    assert dose["strength"] == sorted([0.0, *DOSES]) and dose["success"][:2] == [0, 0] and dose["success"][3] == 1
    assert all(low <= p <= high for p, (low, high) in zip(dose["probability"], dose["interval"], strict=True))
    words = diagnosis_text(found)
    assert words.startswith("tone: Nothing wrong found.\nSteered: 16 pictures") and "Next:" not in words
    assert diagnosis_chart(found).shape == (880, 1440, 3)


def test_features_that_change_pictures_but_not_the_class_are_the_wrong_ones():
    found = run(make_recipe(torch.tensor([2, 3, 4, 5, 8, 9])), make_sae(), labelled=True)
    assert found.verdict.startswith("Wrong features: they change the pictures") and found.checks[CHOICE].verdict == BAD
    assert verdicts(found)[:2] == [GOOD, GOOD] and "Attribute Features" in found.checks[CHOICE].advice


def test_features_that_change_nothing_do_not_move_the_output():
    found = run(make_recipe(torch.tensor([14, 15])), make_sae())
    assert found.verdict.startswith("Features do not move the output: at no strength does a picture change")
    assert verdicts(found) == [GOOD, NOT_CHECKED, NOT_CHECKED, BAD]


@pytest.mark.parametrize("mode", ["shift", "add"])
def test_a_reversed_sign_is_named(mode):
    found = run(replace(RIGHT, levels=Levels.of(RIGHT.levels.dense().flip(1)), mode=mode), make_sae())
    assert found.verdict.startswith(
        "Steers backwards: turned are 0% (dark 0%, light 0%), at the reversed strength 100%"
    )
    assert verdicts(found) == [GOOD, NOT_CHECKED, GOOD, BAD]


def test_a_site_that_decides_nothing_is_named_with_a_better_one():
    found = run(replace(RIGHT, site="idle"), labelled=True)
    assert found.verdict.startswith("Wrong site: the class means of decides turn 100%") and "idle" in found.verdict
    assert found.checks[SITE].verdict == BAD and "Capture at decides" in found.checks[SITE].advice


def test_latents_blind_to_the_class_are_not_disentangled():
    blind = AXES.clone()
    blind[:, 0] = 0
    encoder = replace(RIGHT, encoder=blind[:8], decoder=blind[:8])
    found = run(encoder, make_sae(blind), labelled=True)
    assert found.verdict.startswith("Features not disentangled: ") and verdicts(found)[:2] == [GOOD, BAD]
    figures = found.checks[FEATURES].figures
    assert figures["fvu"] < 0.2 and figures["auc"]["latents"] < 0.65 < 0.95 < figures["auc"]["raw"]


def test_an_sae_that_explains_little_is_not_disentangled():
    found = run(RIGHT, replace(make_sae(), k=1), labelled=True)
    assert found.checks[FEATURES].verdict == BAD and found.checks[FEATURES].figures["fvu"] > 0.5
    assert "larger k" in found.checks[FEATURES].advice


def test_a_weak_recipe_and_one_that_serves_one_class_alone():
    found = run(at_dose(RIGHT, 0.4))
    assert found.verdict.startswith("Too weak: ") and found.checks[DOSE].advice == "Set strength to 1.5 in Steer."
    assert found.checks[CHOICE].verdict == GOOD
    found = run(replace(RIGHT, strength=(1.0, 0.0)))
    assert found.checks[DOSE].verdict == DOUBTFUL and "Saturated: turned are 50% (dark 100%, light 0%)" in found.verdict
    assert found.verdict.startswith("Nothing fails, but this is doubtful. ")


def test_one_class_alone_leaves_the_site_unchecked():
    @Draws
    def only_dark(edits, which):
        return draw(edits, which - which % 4 + 1)

    found = diagnose(RIGHT, only_dark, read, PICTURES, ["idle"])
    assert found.checks[SITE].verdict == NOT_CHECKED and "two classes must be shown" in found.checks[SITE].evidence
    assert found.verdict == "Nothing wrong found."


def test_a_recipe_without_levels_is_steered_as_a_whole():
    recipe = replace(RIGHT, levels=Levels.of(RIGHT.levels.dense()[..., :0]), mode="add own fixed", strength=(3.0, 3.0))
    found = run(recipe, make_sae())
    assert found.checks[CHOICE].figures == {"features": [8], "best": [1.0], "random": None}
    assert found.verdict == "Nothing wrong found."


def test_the_first_failure_in_causal_order_is_the_verdict():
    checks = run(RIGHT).checks
    order = {0: BAD, 1: NOT_CHECKED, 2: BAD, 3: DOUBTFUL}
    changed = [replace(check, verdict=order[i], evidence=f"fault {i}") for i, check in enumerate(checks)]
    assert overall(changed) == "fault 0"
    assert overall(changed[1:]) == "fault 2"
    assert overall(changed[3:]) == "Nothing fails, but this is doubtful. fault 3"
    assert overall(changed[1:2]) == "Nothing wrong found."


def test_progress_tells_every_picture_and_can_cancel():
    seen, turned = [], []
    found = run(
        RIGHT, make_sae(), labelled=True, on_picture=lambda done, total: seen.append((done, total)),
        on_dose=turned.append,
    )  # fmt: skip
    dose = found.checks[DOSE].figures
    assert turned[-1] == list(zip(dose["strength"], dose["success"], strict=True))
    assert [len(points) for points in turned] == list(range(2, len(dose["strength"]) + 1))
    dones, totals = zip(*seen, strict=True)
    assert list(dones) == sorted(dones) and dones[-1] == totals[-1] and all(d <= t for d, t in seen)
    assert len(set(totals[UNSTEERED * PICTURES // 5 + 1 :])) <= 2

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(RIGHT, on_picture=cancel)


def test_pictures_without_a_face_cannot_be_steered():
    def faceless(images):
        return read(images) | {"no face": torch.ones(len(images))}

    with pytest.raises(DiffLensError, match="no face was found in the 32 unsteered pictures"):
        diagnose(RIGHT, draw, faceless, PICTURES)


def test_names_are_taken_evenly():
    assert evenly(list("abcdefg"), 3) == ["a", "d", "g"] and evenly(["a", "b"], 4) == ["a", "b"] and evenly([], 4) == []


def test_pictures_without_a_face_do_not_count():
    """Every ninth noise shows no face; at a reversed strength none does."""

    def faces(images):
        red = images[..., 0].mean(dim=(1, 2))
        gone = red < 0.3 if len(images) < UNSTEERED * PICTURES else torch.arange(len(images)) % 9 == 0
        return read(images) | {NO_FACE: gone.float()}

    found = diagnose(RIGHT, draw, faces, PICTURES)
    assert found.pictures == 8 + 7, "of eight light ones, one has no face"
    assert "No face was found in 4 of 32 pictures" in diagnosis_text(found)
    dose = found.checks[DOSE].figures
    lost = dict(zip(dose["strength"], dose["no_face"], strict=True))
    assert lost[1.0] == 0 and dose["success"][dose["strength"].index(1.0)] == 1 and lost[-1.0] > 0
    assert np.isfinite(dose["slope"]) and np.isfinite(dose["probability"]).all()
