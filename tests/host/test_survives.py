"""Steering goes on working under samplers, compilers and offloading, and at strength 0 changes no bit under any."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from difflens_core.steer import Steering

SAMPLERS = ("euler", "dpmpp_2m", "heun", "dpm_2", "dpmpp_sde", "dpm_adaptive")
OFF_SCHEDULE = ("dpm_2", "dpmpp_sde", "dpm_adaptive")  # they evaluate between the steps
# A site that a patch reaches and one that a hook reaches, with its channels and positions.
SITES = {("U-Net", "mid_block"): (64, 64), ("Flux", "double_blocks.1"): (48, 64)}
STEPS = 3
AVATARS = Path(__file__).resolve().parents[2] / "models" / "avatars"


def steered(inside, toys, model, family, site, strength, seen=None):
    width, positions = SITES[family, site]
    recipe = toys.recipe(width=width, positions=positions, steps=4, mode="move", strength=(strength,) * 3)
    steering = Steering(replace(recipe, site=site), lambda images: images % 3)

    def edit(h, progress, images):
        if seen is not None:
            seen.append(progress)
        return steering(h, progress, images)

    return inside.host.apply_site(model, site, edit, "Steer")


def draw(inside, model, family, sampler="euler"):
    return inside.sample(model, inside.prompt(family, 1), latent=inside.latent(family), steps=STEPS, sampler=sampler)


def check(inside, toys, model, family, site, sampler="euler", seen=None):
    """What a steered model draws; unsteered and at strength 0 it draws the same. `seen` gets the progress met."""
    plain = draw(inside, model, family, sampler)
    found = draw(inside, steered(inside, toys, model, family, site, 1.0, seen), family, sampler)
    assert (found - plain).abs().max() > 0.01 * plain.std() and torch.isfinite(found).all()
    assert torch.equal(draw(inside, steered(inside, toys, model, family, site, 0.0), family, sampler), plain)
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("family", "site"), SITES)
def test_with_every_sampler(inside, toys, family, site, sampler):
    model, seen = inside.model(family), []
    check(inside, toys, model, family, site, sampler, seen)
    schedule = inside.schedule(model, STEPS, sampler)
    passed = [*map(inside.host.progress_of(model), schedule)]
    between = [at for at in seen if min(abs(at - step) for step in passed) > 1e-4]
    assert bool(between) == (sampler in OFF_SCHEDULE)


@pytest.mark.parametrize(("family", "site"), SITES)
def test_under_torch_compile(inside, toys, family, site):
    """The stock node, with the backend that traces the network but needs no compiler for the machine."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model = inside.model(family)

    def compiled(patcher):
        return TorchCompileModel.execute(patcher, "eager").result[0]

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    expected = draw(inside, steered(inside, toys, model, family, site, 1.0), family)
    of_compiled = check(inside, toys, compiled(model), family, site)
    compiled_last = draw(inside, compiled(steered(inside, toys, model, family, site, 1.0)), family)
    for found in (of_compiled, compiled_last):
        torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.std()), rtol=1e-3)
    assert counters["frames"]["ok"] > 0, "nothing was compiled"


@pytest.mark.parametrize("hold", ["off", "on"])
def test_at_other_sizes_and_on_its_side_a_recipe_is_stretched_and_says_so(inside, toys, hold):
    model, steer = inside.model("U-Net"), inside.pack_module("nodes.steer").Steer
    recipe = toys.recipe(width=64, positions=64, steps=4, mode="move", strength=(1.0,) * 3)
    recipe = replace(recipe, site="mid_block", model="", map=(8, 8))
    for height, width in ((16, 16), (24, 16), (16, 24)):
        latent = inside.latent("U-Net", height=height, width=width)
        steered, dealt = steer.execute(
            model, recipe, "uniform", 1.0, "from recipe", 0.0, 1.0, 0, 0, run=0, hold=hold
        ).result
        plain, found = (inside.sample(m, inside.prompt("U-Net", 1), latent=latent, steps=3) for m in (model, steered))
        assert (found - plain).abs().max() > 0.01 * plain.std() and torch.isfinite(found).all()
        sentences = [] if height == width else [f"stretched to {height // 2} x {width // 2}"]
        assert all(part in said for part, said in zip(sentences, dealt[0].log.said, strict=True))


@pytest.mark.parametrize("hold", [False, True])
def test_an_experiment_says_once_that_its_recipe_is_stretched(inside, toys, hold):
    recipe = toys.recipe(width=64, positions=64, steps=4, mode="move", strength=(1.0,) * 3)
    recipe = replace(recipe, site="mid_block", model="", map=(8, 8), hold=hold)
    drawer, steering = inside.pack_module("difflens_core.activations").Drawer, inside.pack_module("difflens_core.steer")
    for height, sentences in ((16, 0), (24, 1)):
        sampler = inside.host.HostSampler(
            inside.model("U-Net"), inside.prompt("U-Net", 1), inside.latent("U-Net", height=height), 2, "euler",
            "normal", 0, node="Calibrate",
        )  # fmt: skip
        draw, edit = drawer(sampler, torch.randn(4, *sampler.shape)), steering.Steering(recipe, torch.Tensor.long)
        for images in torch.arange(4).split(2):
            draw.latents([edit], images)
        assert len(sampler.said) == sentences and all("stretched to 12 x 8" in said for said in sampler.said)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("family", ["avatars", "U-Net"])
def test_steer_under_inductor_with_unsteered_runs_before_and_after(inside, toys, family):
    """The real nodes in the order that went wrong: a compiled graph of the unsteered model knows of no edit."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    steer = inside.pack_module("nodes.steer").Steer
    if family == "avatars":
        model = inside.host.load_unconditional(str(AVATARS / "difflens_models" / "avatars.safetensors"))
        recipe = inside.pack_module("difflens_core.steer").load_recipe(
            AVATARS / "difflens_recipes" / "avatars_presentation.safetensors"
        )
        positive, latent = inside.host.unconditional_conditioning(), {"samples": torch.zeros(4, 3, 64, 64)}
    else:
        model = inside.model(family)
        width, positions = SITES[family, "mid_block"]
        recipe = toys.recipe(width=width, positions=positions, steps=4, mode="move", strength=(1.0,) * 3)
        recipe = replace(recipe, site="mid_block", model="")
        positive, latent = inside.prompt(family, 1), inside.latent(family)

    def steered(patcher):
        return steer.execute(patcher, recipe, "uniform", 1.0, "from recipe", 0.0, 1.0, 0, 0).result[0]

    def compiled(patcher):
        return TorchCompileModel.execute(patcher, "inductor").result[0]

    def drawn(patcher):
        return inside.sample(patcher, positive, latent=latent, steps=3)

    torch._dynamo.reset()
    expected, plain = drawn(steered(model)), drawn(model)
    close = {"atol": 2e-3 * float(plain.std()), "rtol": 2e-3}
    behind = compiled(model)
    for found, wanted in (
        (drawn(behind), plain), (drawn(compiled(steered(model))), expected), (drawn(steered(behind)), expected),
        (drawn(behind), plain), (drawn(compiled(model)), plain),
    ):  # fmt: skip
        torch.testing.assert_close(found, wanted, **close)
    assert (expected - plain).abs().max() > 0.05 * plain.std()
    torch._dynamo.reset()


@pytest.mark.parametrize(("family", "site"), SITES)
def test_with_weights_that_are_brought_in_one_by_one(inside, toys, family, site):
    """The state that a card too small for the model has it in, with a LoRA applied on the way."""
    model, moved = inside.with_lora(inside.model(family)), []

    def offload(patcher):
        patcher.unpatch_model(torch.device("cpu"))
        patcher.patch_model(torch.device("cpu"), lowvram_model_memory=1)
        modules = patcher.model.diffusion_model.modules()
        moved.append(sum(len(getattr(module, "weight_function", ())) for module in modules))

    expected = draw(inside, steered(inside, toys, model, family, site, 1.0), family)
    offloaded = model.clone()
    offloaded.add_callback_with_key(inside.CallbacksMP.ON_PRE_RUN, "test", offload)
    found = check(inside, toys, offloaded, family, site)
    assert len(moved) == 3 and min(moved) > 1, "no weight was changed on the way"
    torch.testing.assert_close(found, expected, atol=1e-3 * float(expected.std()), rtol=1e-3)
    assert not torch.equal(
        expected, draw(inside, steered(inside, toys, inside.model(family), family, site, 1.0), family)
    )


def test_what_has_no_room_in_memory_is_refused_with_advice(inside):
    assert inside.host.training_device(10**6, "Take less.").type == "cpu"
    with pytest.raises(inside.DiffLensError, match=r"takes 1000000.0 GB of memory, where .* are free. Take less."):
        inside.host.training_device(10**15, "Take less.")
