"""Calibration and cross effects on a toy model in which it is known what every strength does."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import CLASSES, UNIFORM, Draws, Toy, recipe

from difflens_core.experiments import CalibrationOptions, asked_shares, calibrate, plan_is_stale
from difflens_core.experiments.calibration import search, weakest_clear
from difflens_core.files import DiffLensError
from difflens_core.measure import pictures_for_fd, solve_shares
from difflens_core.report import calibration_text, dose_chart
from difflens_core.sae import SparseAutoencoder
from difflens_core.steer import Recipe, at_dose, joined, load_recipe, save_recipe, with_settings
from difflens_core.steer.recipes import UNKNOWN


def run(toy: Toy, steered: Recipe, target=UNIFORM, **options):
    mixes = []
    found = calibrate(
        steered, toy, toy.ages, target, CalibrationOptions(**options), batch=50, on_mix=lambda *mix: mixes.append(mix)
    )
    check_mixes(mixes, found.info["calibration"])
    return found


def check_mixes(mixes: list, record: dict) -> None:
    """Told are the mix as it is, and one a round."""
    assert [name for name, _ in mixes] == ["as it is", *["steered"] * len(record["rounds"])]
    assert mixes[0][1] == pytest.approx(record["start"]["shares"])
    for (_, shares), tried in zip(mixes[1:], record["rounds"], strict=True):
        assert shares.sum() == pytest.approx(1) and tried["fd"] == pytest.approx(
            np.linalg.norm(shares - record["target"]), abs=0.1
        )


@pytest.mark.parametrize("target", [UNIFORM, np.array([0.5, 0.0, 0.5]), np.array([0.1, 0.8, 0.1])])
@pytest.mark.parametrize("only_where_needed", [False, True])
def test_the_target_is_reached_on_fresh_noises(target, only_where_needed):
    toy = Toy()
    found = run(toy, recipe(), target, only_where_needed=only_where_needed)
    record = found.info["calibration"]
    assert record["reached"] and record["fresh"]["fd"] < 0.02 and record["start"]["fd"] > 0.1
    assert record["drawn"] <= 1280 and max(toy.drawn) < 2 * 256
    # What the record says must hold on noises that the calibration never saw.
    asked = asked_shares(found, target, only_where_needed)
    assert np.isclose(asked.sum(), 1) and np.abs(asked - target).max() < 0.05


def test_where_needed_no_more_pictures_change_than_must():
    record = run(Toy(), recipe(), only_where_needed=True).info["calibration"]
    fresh = record["fresh"]
    assert fresh["changed"] == pytest.approx(fresh["needed"], abs=0.015) and fresh["needed"] > 0.3
    everyone = run(Toy(), recipe()).info["calibration"]
    assert everyone["fresh"]["success"] > 0.97


def test_a_faint_recipe_gets_more_strength_and_a_loud_one_less():
    strengths = [run(Toy(), recipe(power)).strength for power in (0.5, 2.0)]
    for faint, loud in zip(*strengths, strict=True):
        assert faint > 1.0 > loud


def test_of_several_sites_each_does_its_part():
    """Two that hold half of what is needed take less strength together than one alone, and are told as they are."""
    half = recipe(0.5)
    alone, both = run(Toy(), half), run(Toy(), joined(half, replace(half, site="another")))
    assert both.info["calibration"]["reached"] and both.sites == ("site", "another")
    assert all(one > together for one, together in zip(alone.strength, both.strength, strict=True))
    assert all(part.strength == both.strength for part in both.parts)


def test_the_weakest_clear_strength_is_taken():
    doses = run(Toy(), recipe(), clear=0.9).info["calibration"]["doses"]
    for name, strength in zip(CLASSES, run(Toy(), recipe(), clear=0.9).strength, strict=True):
        weaker = [seen for dose, seen in doses[name] if dose < strength]
        assert max(weaker) < 0.9


def test_a_recipe_that_does_nothing_is_called_out():
    record = run(Toy(), recipe(power=0.0)).info["calibration"]
    assert not record["reached"] and "show it too seldom" in record["why"] and "Diagnose" in record["why"]
    assert record["fresh"]["fd"] == pytest.approx(record["start"]["fd"], abs=0.1)


def test_shares_make_up_for_a_class_that_partly_fails():
    """A third of the pictures cannot be turned senior: more must be asked."""
    toy = Toy()
    stubborn = torch.arange(len(toy.h)) % 3 == 0

    @Draws
    def draw(edits, which):
        drawn = Toy.__call__(toy, edits, which)
        # Stubborn pictures that would turn senior become adult instead.
        senior = stubborn[which] & (drawn.mean(dim=(2, 3))[:, :3].argmax(dim=1) == 2)
        drawn[senior, 1], drawn[senior, 2] = 2.0, 0.0
        return drawn

    found = calibrate(recipe(), draw, toy.ages, np.array([0.3, 0.5, 0.2]), CalibrationOptions(budget=2500), 50)
    record = found.info["calibration"]
    assert record["ask"][2] > 0.26 and len(record["rounds"]) > 1
    assert record["rounds"][-1]["fd"] < 0.03 < record["rounds"][0]["fd"]


def test_a_calibration_that_was_cut_off_goes_on_without_drawing_anything_twice(tmp_path):
    whole, cut = Toy(), Toy()
    expected = run(whole, recipe())
    folder, options = tmp_path / "trials", CalibrationOptions()

    def cancel(done, doses):
        if done >= 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(recipe(), cut, cut.ages, UNIFORM, options, 50, folder, cancel)
    assert len([*folder.iterdir()]) > 9 and 500 <= len(cut.drawn) < 550
    found = calibrate(recipe(), cut, cut.ages, UNIFORM, options, 50, folder)
    assert found.strength == expected.strength and found.info == expected.info
    assert len(cut.drawn) == len(whole.drawn)


def test_a_calibration_with_pictures_that_do_not_count_can_be_cut_off(tmp_path):
    def stop_at(count):
        def stop(done, doses):
            if done >= count:
                raise KeyboardInterrupt

        return stop

    toy, options, folder = Toy(), CalibrationOptions(), tmp_path / "trials"
    expected = calibrate(recipe(), Toy(), ages_of_faces, UNIFORM, options, 50)
    assert expected.info["calibration"]["start"]["no_face"] > 0
    with pytest.raises(KeyboardInterrupt):
        calibrate(recipe(), toy, ages_of_faces, UNIFORM, options, 50, folder, stop_at(500))
    assert calibrate(recipe(), toy, ages_of_faces, UNIFORM, options, 50, folder).info == expected.info


def test_the_same_seed_gives_the_same_calibration_whatever_the_batch():
    records = [
        calibrate(recipe(), Toy(), Toy.ages, UNIFORM, CalibrationOptions(), batch).info["calibration"]
        for batch in (7, 64)
    ]
    assert records[0]["ask"] == pytest.approx(records[1]["ask"], abs=1e-5)
    assert records[0]["rounds"][-1]["strength"] == records[1]["rounds"][-1]["strength"]


def test_the_record_travels_with_the_recipe(tmp_path):
    found = run(Toy(), recipe())
    save_recipe(tmp_path / "r.safetensors", found)
    loaded = load_recipe(tmp_path / "r.safetensors")
    assert loaded.info["calibration"] == json.loads(json.dumps(found.info["calibration"]))
    assert asked_shares(loaded, UNIFORM).tolist() == found.info["calibration"]["ask"]
    assert asked_shares(loaded, UNIFORM, only_where_needed=True).tolist() == UNIFORM.tolist()
    assert asked_shares(loaded, np.array([0.5, 0.3, 0.2])).tolist() == [0.5, 0.3, 0.2]
    assert asked_shares(recipe(), UNIFORM).tolist() == UNIFORM.tolist()


def test_calibrated_shares_count_only_for_what_was_calibrated():
    found, ask = run(Toy(), recipe()), [0.3, 0.3, 0.4]
    record = found.info["calibration"]
    found = replace(found, info={"calibration": record | {"ask": ask}})
    assert asked_shares(found, UNIFORM).tolist() == asked_shares(at_dose(found, 1.0), UNIFORM).tolist() == ask
    others = [with_settings(found, **other) for other in ({"mode": "add"}, {"start": 0.3}, {"end": 0.8})]
    for other in (*others, at_dose(found, 0.5)):
        assert asked_shares(other, UNIFORM).tolist() == UNIFORM.tolist()
    # A record of an older version holds only the strengths, in its rounds.
    rounds = [one | {"ask": ask} for one in record["rounds"]]
    old = {name: record[name] for name in ("target", "only_where_needed")} | {"ask": ask, "rounds": rounds}
    found = replace(found, info={"calibration": old})
    assert asked_shares(found, UNIFORM).tolist() == ask
    assert asked_shares(at_dose(found, 1.1), UNIFORM).tolist() == UNIFORM.tolist()


def test_a_plan_for_a_calibrated_recipe_is_stale_under_other_settings():
    found, ask = run(Toy(), recipe(), only_where_needed=True), [0.3, 0.3, 0.4]
    found = replace(found, info={"calibration": found.info["calibration"] | {"ask": ask}})
    assert not plan_is_stale(found, found, ask) and not plan_is_stale(found, at_dose(found, 1.0), ask)
    assert plan_is_stale(found, at_dose(found, 0.5), ask)
    assert plan_is_stale(found, with_settings(found, mode="add"), ask)
    assert plan_is_stale(found, None, ask), "a mask, or another conditioning"
    assert not plan_is_stale(found, None, UNIFORM), "a plan that does not go by the calibration"
    assert not plan_is_stale(recipe(), None, ask)


def test_a_target_that_is_not_excluded_is_not_reached_yet():
    found = run(Toy(), recipe(), budget=120).info["calibration"]
    assert found["fresh"]["within"] and not found["reached"] and found["fresh"]["outcome"] == "not excluded"
    needed = pictures_for_fd(0.05, UNIFORM)
    assert f"{needed} would tell: a budget of {5 * needed}" in found["why"]
    assert run(Toy(), recipe()).info["calibration"]["reached"], "256 fresh pictures tell"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_strength_keeps_its_sign(sign):
    found = run(Toy(), replace(recipe(sign), strength=(sign,) * 3))
    assert found.info["calibration"]["reached"] and all(sign * own > 0.1 for own in found.strength)
    for points in found.info["calibration"]["doses"].values():
        assert all(sign * dose >= 0 for dose, _ in points)


def ages_of_faces(pictures: torch.Tensor) -> torch.Tensor:
    """The classes of age; NaN for the few pictures with a dark corner, which says nothing of the class."""
    dark = pictures[:, 0, 0, 0] - pictures[:, 0].mean(dim=(1, 2)) < -0.15
    return torch.where(dark[:, None], torch.nan, Toy.ages(pictures))


@pytest.mark.parametrize("only_where_needed", [False, True])
def test_pictures_without_a_face_do_not_count(only_where_needed):
    toy, options = Toy(), CalibrationOptions(only_where_needed=only_where_needed)
    found = calibrate(recipe(), toy, ages_of_faces, UNIFORM, options, 50)
    record, fresh = found.info["calibration"], found.info["calibration"]["fresh"]
    seen = [ages_of_faces(toy.h[first : first + 256]) for first in (0, 256)]
    known = [~p.isnan().any(dim=1) for p in seen]
    assert 0.04 < record["start"]["no_face"] < 0.15 and record["start"]["no_face"] == (~known[0]).sum() / 256
    mix = torch.bincount(seen[0][known[0]].argmax(dim=1), minlength=3) / known[0].sum()
    assert record["start"]["shares"] == pytest.approx(mix.tolist())
    assert fresh["counted"] == known[1].sum() and fresh["no_face"] == 1 - fresh["counted"] / 256
    assert np.isfinite(found.strength).all() and fresh["success"] > 0.95 and record["reached"], record["why"]
    assert "No face was found in" in calibration_text("age", CLASSES, record)


def test_a_model_that_draws_no_faces_cannot_be_calibrated():
    with pytest.raises(DiffLensError, match="a face was found in 0 of 256"):
        calibrate(recipe(), Toy(), lambda pictures: torch.full((len(pictures), 3), torch.nan), UNIFORM)


def test_a_recipe_that_needs_its_sae_is_calibrated_with_it():
    needs = replace(recipe(), mode="reach", threshold=torch.full((3,), UNKNOWN))
    axes, none = torch.eye(6), torch.zeros(6)
    sae = SparseAutoencoder(axes, none, axes, none, needs.normalisation, 2, "site")
    with pytest.raises(DiffLensError, match="only their SAE can tell"):
        run(Toy(), needs)
    assert calibrate(needs, Toy(), Toy.ages, UNIFORM, batch=50, sae=sae).info["calibration"]["reached"]


def test_the_record_in_words_and_its_chart():
    record = run(Toy(), recipe(), only_where_needed=True).info["calibration"]
    text = calibration_text("age", CLASSES, record)
    assert f"FD {record['start']['fd']:.3f} before, {record['fresh']['fd']:.3f} after" in text and "at least" in text
    assert dose_chart("age", record["doses"]).shape == (440, 720, 3)


@pytest.mark.parametrize(
    ("target", "budget", "says"), [((0, 0, 1), 1280, "one class only"), (UNIFORM, 60, "too small")]
)
def test_what_cannot_be_calibrated_is_refused(target, budget, says):
    with pytest.raises(DiffLensError, match=says):
        run(Toy(), recipe(), np.array(target), budget=budget)


def test_the_monotone_fit_forgives_one_unlucky_measurement():
    doses = [(0.0, 0.1), (0.5, 0.6), (1.0, 0.97), (1.5, 0.95), (2.0, 1.0)]
    assert weakest_clear(doses, 0.95) == 1.0
    assert weakest_clear(doses, 0.99) == 2.0
    assert weakest_clear([(0.0, 0.1), (1.0, 0.996), (1.5, 0.9995)], 0.999) == 1.5
    assert weakest_clear([(0.0, 0.1), (1.0, 0.4), (3.0, 0.4)], 0.99) == 1.0  # more does not help


def test_shares_are_solved_so_that_the_answer_is_the_target():
    response = np.array([[0.9, 0.1, 0.0], [0.05, 0.9, 0.05], [0.0, 0.3, 0.7]])
    shares = solve_shares(np.array([0.3, 0.4, 0.3]), response)
    assert response.T @ shares == pytest.approx([0.3, 0.4, 0.3], abs=1e-4) and shares.sum() == pytest.approx(1)
    # Not to be had: no class shows more than 0.7 of the last one.
    best = solve_shares(np.array([0.0, 0.1, 0.9]), response)
    assert best == pytest.approx([0, 0, 1], abs=1e-3)


def test_strengths_above_one_are_not_tried_where_they_count_as_one():
    moving = replace(recipe(), mode="move")
    doses = run(Toy(), moving).info["calibration"]["doses"]
    assert max(dose for points in doses.values() for dose, _ in points) <= 1.0


def test_shares_that_come_back_end_the_search(toys):
    """What each class shows turns with the share that is asked for, so that the two shares solved for take turns."""

    class Turning:
        recipe = replace(toys.recipe(), classes=("a", "b"), strength=(1.0, 1.0))
        known: dict = {}
        rounds = 0

        def read(self, numbers, asked, strength):
            self.rounds += 1
            assert self.rounds < 20, "for ever"
            often = float((asked == 0).mean()) > 0.6
            told = np.array([[0.9, 0.1], [0.6, 0.4]] if often else [[0.75, 0.25], [0.1, 0.9]])
            return told[asked]

    options = CalibrationOptions(budget=300, tolerance=0.02)
    unsteered, target = np.tile([0.5, 0.5], (60, 1)), np.array([0.7, 0.3])
    rounds = search(Turning(), np.arange(60), unsteered, target, options, np.zeros(2), np.ones(2), lambda *mix: None)
    asks = [tuple(np.round(tried["ask"], 3)) for tried in rounds]
    assert 2 < len(asks) == len(set(asks)) and min(tried["fd"] for tried in rounds) > 0.01
