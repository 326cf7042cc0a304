"""Marks: one for the same weights in every precision, none where nothing can be read, and settings that count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_graphs import AVATARS

from difflens_core.files import same_weights, sums_mark

PRECISIONS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


def made(inside, dtype: torch.dtype = torch.float32):
    """A MODEL of its own, which a test may spoil; the same weights in every precision."""
    return inside.random_model(*inside.SMALL["U-Net"][:2], dtype)


def test_a_model_has_one_mark_in_every_precision(inside):
    models = [made(inside, dtype) for dtype in PRECISIONS]
    marks = [inside.host.model_fingerprint(model) for model in models]
    assert len(set(marks[:3])) == 1 and all(inside.host.belongs(marks[0], model) for model in models)
    assert not inside.host.belongs(marks[0], inside.model("Flux"))


def test_marks_of_version_0_4_are_accepted(inside):
    model = inside.model("SD1.5")
    weights = model.model.diffusion_model.state_dict()
    old = sums_mark({name: weights[name] for name in sorted(weights)[:8]})
    assert inside.host.belongs(old, model) and inside.host.belongs(old, inside.with_lora(model))
    assert not inside.host.belongs(old, inside.model("Flux"))
    avatars = inside.host.load_unconditional(str(AVATARS / "difflens_models" / "avatars.safetensors"))
    assert inside.host.belongs("47d832941042", avatars), "the mark in the recipes that version 0.4 shipped"
    load = inside.pack_module("difflens_core.steer").load_recipe
    for attribute in ("age", "presentation"):
        recipe = load(AVATARS / "difflens_recipes" / f"avatars_{attribute}.safetensors")
        assert inside.host.belongs(recipe.model, avatars)
        assert not inside.host.belongs(recipe.model, model)


def meta(network):
    return network.to("meta")


def packed(network):
    network.input_blocks[0][0].weight = torch.nn.Parameter(torch.ones(9, dtype=torch.uint8), requires_grad=False)
    return network


def engine(network):
    return object()


@pytest.mark.parametrize("spoil", [meta, packed, engine])
def test_a_model_whose_weights_cannot_be_read_has_no_mark(inside, spoil):
    model = made(inside)
    network = spoil(model.model.diffusion_model)
    del model.model.diffusion_model
    model.model.diffusion_model = network
    assert inside.host.model_fingerprint(model) == ""
    assert inside.host.belongs("123456789abc", model) and inside.host.belongs("", model)


def test_quantised_weights_have_the_mark_of_the_model_also_with_a_lora_loaded(inside):
    from comfy.quant_ops import QuantizedTensor

    plain, model = made(inside), made(inside)
    for name, module in model.model.diffusion_model.named_modules():
        if isinstance(module, torch.nn.Linear):
            quantised = QuantizedTensor.from_float(module.weight.data, "TensorCoreFP8E4M3Layout")
            module.weight = torch.nn.Parameter(quantised, requires_grad=False)
            key = f"diffusion_model.{name}.weight"
            model.backup[key] = type("Kept", (), {"weight": quantised})  # as ComfyUI keeps it beside a LoRA
    mark = inside.host.model_fingerprint(plain)
    assert mark and inside.host.belongs(mark, model)
    model.backup.clear()
    assert inside.host.belongs(mark, model)


class Marked:
    def __init__(self, mark: str):
        self.difflens_mark = mark

    def __call__(self, args: dict) -> dict:
        return args


def scaled(factor: float):
    return lambda args: args["cond"] * factor


def test_what_acts_while_sampling_counts_with_its_settings(inside):
    model, mark = inside.model("SD1.5"), inside.host.patches_mark

    def patched(patch):
        clone = model.clone()
        clone.set_model_middle_block_after_patch(patch)
        return mark(clone)

    def guided(function):
        clone = model.clone()
        clone.set_model_sampler_cfg_function(function)
        return mark(clone)

    assert patched(Marked("a")) == patched(Marked("a")) != patched(Marked("b"))
    assert guided(scaled(0.5)) == guided(scaled(0.5)) != guided(scaled(0.7))


def test_a_recipe_and_what_steers_count_with_all_that_they_are(inside, toys):
    host = inside.host
    recipe = inside.pack_module("difflens_core.steer").Recipe(**vars(toys.recipe()))
    left, right = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    left[..., :2], right[..., 2:] = 1, 1
    values = [
        (recipe, left), (recipe, right), (recipe, None), (replace(recipe, strength=(1.0, 1.0, 1.0)), None),
        (replace(recipe, member=~recipe.member), None), (replace(recipe, probe_bias=recipe.probe_bias + 1), None),
    ]  # fmt: skip
    assert len({host.content_mark(*pair) for pair in values}) == len(values)
    assert host.recipe_mark(replace(recipe, info={"made": "later"})) == host.recipe_mark(recipe)
    assert host.recipe_mark(replace(recipe, threshold=recipe.threshold + 1)) != host.recipe_mark(recipe)


def test_settings_of_a_conditioning_count(inside):
    model, positive, latent = inside.model("SD1.5"), inside.prompt("SD1.5", 1), inside.latent("SD1.5")

    def mark(**more):
        return inside.host.run_mark(model, [[positive[0][0], more]], latent, None, 1.0)

    assert len({mark(), mark(guidance=3.5), mark(guidance=2.0), mark(class_label=1), mark(area=(8, 8, 0, 0))}) == 5
    assert mark(guidance=2.0) == mark(guidance=2.0) and mark(pooled_output=None) == mark()


def test_a_capture_that_version_0_4_began_is_gone_on_with(inside, tmp_path, monkeypatch):
    model, sampling = inside.model("U-Net"), inside.pack_module("nodes.host.sampling")
    weights = model.model.diffusion_model.state_dict()
    old = sums_mark({name: weights[name] for name in sorted(weights)[:8]})

    def capture():
        store = inside.host.capture(
            model, inside.prompt("U-Net", 1), inside.latent("U-Net"), 2, 1, "euler", "normal", 0, ("middle_block",),
            folder=tmp_path / "store",
        )  # fmt: skip
        inside.forget()
        return store

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "model_fingerprint", lambda model: old)
        begun = capture()
    assert begun.index.model == old != inside.host.model_fingerprint(model)
    assert torch.equal(capture().samples(), begun.samples())
    assert same_weights(old, capture().index.model)
