"""Steer in a stock graph draws what the core draws: several recipes, an SAE, a mask, calibrated shares."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from expected import sampled, shipped
from graphs import to_api
from small_graphs import AVATARS, Avatars, latents, text_of

from difflens_core.classifiers import load_classifier
from difflens_core.sae import load_sae
from difflens_core.steer import joined, save_recipe


@pytest.fixture(scope="module")
def other_site(server):
    """The recipe for age, moved to a site behind the middle block where it does something else."""
    folder = server.base / "models" / "difflens_recipes"
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(folder / "behind.safetensors", shipped("age", site="after_middle.0", mode="add"))


def test_recipes_compose_in_node_order_at_one_site_and_at_two(server, other_site):
    graph = Avatars(pictures=4)
    model = graph.model[0]
    for name in ("avatars_age", "avatars_skin_tone", "behind"):
        model = graph.steer(graph.recipe(name), model)[0]
    saved = graph.save(graph.draw(model))
    found = latents(server, server.run(to_api(graph)), saved).clamp(-1, 1)
    recipes = [shipped("age"), shipped("skin_tone"), shipped("age", site="after_middle.0", mode="add")]
    torch.testing.assert_close(found, sampled(recipes, 4), atol=2e-3, rtol=0)
    for fewer in (recipes[:2], recipes[1:]):
        assert float((found - sampled(fewer, 4)).abs().max()) > 0.1


def test_a_recipe_of_two_sites_steers_at_both_and_its_pictures_are_counted_once(server):
    folder = server.base / "models" / "difflens_recipes"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [shipped("age", site=site, mode="add", hold=False) for site in ("middle_block", "after_middle.0")]
    save_recipe(folder / "both_sites.safetensors", joined(*parts))
    graph = Avatars(pictures=4)
    steered = graph.steer(graph.recipe("both_sites"))
    drawn = graph.draw(steered[0])
    saved, pictures = graph.save(drawn), graph.pictures(drawn)
    shown = graph.show(graph.report(pictures, pictures, "age", targets=steered[1])[1])
    entry = server.run(to_api(graph))
    torch.testing.assert_close(latents(server, entry, saved).clamp(-1, 1), sampled(parts, 4), atol=2e-3, rtol=0)
    assert "Steer: " not in text_of(entry, shown)


def test_the_sae_and_a_mask_on_steer_do_what_the_core_does(server):
    graph = Avatars(pictures=3)
    sae = graph.sae()
    left = graph.add("SolidMask", value=1.0, width=32, height=64)
    black = graph.add("SolidMask", value=0.0, width=64, height=64)
    mask = graph.add("MaskComposite", destination=black[0], source=left[0], x=0, y=0, operation="add")
    full = graph.save(graph.draw_steered(mode="move", sae=sae))
    masked = graph.save(graph.draw_steered(mode="move", sae=sae, mask=mask[0]))
    nothing = graph.save(graph.draw_steered(mode="move", mask=black[0]))
    plain = graph.save(graph.draw())
    entry = server.run(to_api(graph))
    full, masked, nothing, plain = (latents(server, entry, node) for node in (full, masked, nothing, plain))
    assert plain.shape == (3, 3, 64, 64) and plain.std() > 0.1 and torch.equal(nothing, plain)
    recipe, more = [shipped("age", mode="move")], {"sae": load_sae(AVATARS / "difflens_saes" / "avatars.safetensors")}
    torch.testing.assert_close(full.clamp(-1, 1), sampled(recipe, 3, **more), atol=2e-3, rtol=0)
    half = torch.zeros(1, 64, 64)
    half[..., :32] = 1
    expected = sampled(recipe, 3, mask=half, **more)
    torch.testing.assert_close(masked.clamp(-1, 1), expected, atol=2e-3, rtol=0)
    assert float((masked - full).abs().max()) > 0.1


def test_steer_asks_for_the_shares_that_were_calibrated(server):
    folder = server.base / "models" / "difflens_recipes"
    folder.mkdir(parents=True, exist_ok=True)
    record = {"target": [0.5, 0.5], "ask": [0.25, 0.75], "only_where_needed": False}
    save_recipe(folder / "asks_more.safetensors", replace(shipped("presentation"), info={"calibration": record}))
    graph = Avatars(pictures=8)
    steered = graph.steer(graph.recipe("asks_more"))
    before, after = (graph.pictures(graph.draw(model)) for model in (None, steered[0]))
    report = graph.report(before, after, "presentation", targets=steered[1])
    shown = graph.show(report[1])
    after = json.loads(text_of(server.run(to_api(graph)), shown))["after"]
    assert after["success"] >= 0.75 and after["shares"][1] >= 0.6


def test_pictures_queued_one_by_one_with_default_widgets_are_balanced(server):
    """As an artist queues them: every prompt another noise, nothing else said; the mix is that of one batch."""
    shown, classifier = [], load_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    for seed in range(700, 708):
        graph = Avatars(pictures=1)
        steered = graph.steer(graph.recipe("avatars_presentation"))
        del steered.inputs["run"]
        saved = graph.save(graph.draw(steered[0], seed=seed))
        images = latents(server, server.run(to_api(graph)), saved).movedim(1, -1) / 2 + 0.5
        shown += classifier.classify(images.clamp(0, 1))["presentation"].argmax(dim=1).tolist()
    assert shown.count(0) == shown.count(1) == 4
