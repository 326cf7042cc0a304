"""Beside packs that change how a model is run, each imitated by what it does to ComfyUI and to the network.

Those that leave pictures as they are must leave steered ones and records as they are, too, on either side of Steer;
of the others a sentence tells what was not steered.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

SITES = {"U-Net": "middle_block.1.transformer_blocks.0", "Flux": "double_blocks.1"}
STEPS, PICTURES, SEED = 2, 2, 3


def push(h, progress, images):
    return h + (9 + images[:, None, None, None].to(h)) * torch.linspace(-1, 1, h.shape[1])[:, None, None]


def steered(inside, model, family, log=None):
    more = {"log": log} if log else {}
    return inside.host.apply_site(model, SITES[family], push, "Steer", **more)


def drawn(inside, model, family, cfg=3.0):
    return inside.sample(
        model, inside.prompt(family, 1), inside.prompt(family, 2), cfg, inside.latent(family, PICTURES), STEPS
    )


def captured(inside, model, family):
    store = inside.host.capture(
        model, inside.prompt(family, 1), inside.latent(family, PICTURES), PICTURES, STEPS, "euler", "normal", SEED,
        (SITES[family],),
    )  # fmt: skip
    inside.forget()
    return store.activations().values.float()


@pytest.fixture(scope="module", params=SITES)
def alone(inside, request):
    """A family and what is drawn, drawn steered, and recorded of it without other packs."""
    family = request.param
    model = inside.model(family)
    return (
        family, drawn(inside, model, family), drawn(inside, steered(inside, model, family), family),
        captured(inside, model, family),
    )  # fmt: skip


def block_of(model, family):
    return model.model.diffusion_model.get_submodule(SITES[family])


class Around(nn.Module):
    """Another pack's module in a block's place."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


# --- packs that change nothing, each a context in which it gives out the MODEL that it changes ---


@contextmanager
def another_forward(inside, model, family) -> Iterator:
    """A block's forward replaced on the module itself, for all who use it."""
    block = block_of(model, family)
    whole = block.forward
    block.forward = lambda *args, **kwargs: whole(*args, **kwargs)
    try:
        yield lambda model: model
    finally:
        del block.forward


def by_clone(change):
    """A pack that gives out a clone of the MODEL, changed."""

    @contextmanager
    def pack(inside, model, family) -> Iterator:
        def patch(model):
            clone = model.clone()
            change(clone, family)
            return clone

        yield patch
        torch._dynamo.reset()  # of those that compile

    return pack


def another_block(clone, family):
    """An object patch: while the model is loaded, the network has another module in the block's place."""
    clone.add_object_patch(f"diffusion_model.{SITES[family]}", Around(block_of(clone, family)))


def compiled_block(clone, family):
    """An object patch with the block compiled."""
    clone.add_object_patch(f"diffusion_model.{SITES[family]}", torch.compile(block_of(clone, family), backend="eager"))


def compiled_keys(clone, family):
    """Blocks compiled by ComfyUI's own helper, as packs call it."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    set_torch_compile_wrapper(clone, "eager", keys=[f"diffusion_model.{SITES[family]}"])


def by_wrapper(wrap):
    """A pack that wraps the model function."""
    return by_clone(lambda clone, family: clone.set_model_unet_function_wrapper(wrap))


def one_by_one(apply_model, args):
    """Conditionings evaluated one after the other, to save memory."""
    count = len(args["cond_or_uncond"])
    found = []
    for place, which in enumerate(args["cond_or_uncond"]):

        def part(value, place=place):
            return value.chunk(count)[place] if isinstance(value, torch.Tensor) and value.ndim else value

        options = dict(args["c"]["transformer_options"])
        options |= {"cond_or_uncond": [which], "uuids": [options["uuids"][place]]}
        c = {name: part(value) for name, value in args["c"].items() if name != "transformer_options"}
        sigmas = options["sigmas"]
        options["sigmas"] = sigmas.chunk(count)[place] if len(sigmas) == len(args["timestep"]) else sigmas
        found.append(apply_model(part(args["input"]), part(args["timestep"]), transformer_options=options, **c))
    return torch.cat(found)


def twice(apply_model, args):
    """Every evaluation made twice and averaged."""
    first, second = (apply_model(args["input"], args["timestep"], **args["c"]) for _ in range(2))
    return (first + second) / 2


@contextmanager
def replaced_samplers(inside, model, family) -> Iterator:
    """ComfyUI's own functions replaced for everybody, conditionings evaluated one at a time."""
    samplers = inside.comfy.samplers
    predict, batch = samplers.sampling_function, samplers.calc_cond_batch

    def separately(model, conds, x, timestep, model_options):
        found = []
        for place in range(len(conds)):
            alone = [cond if place == i else None for i, cond in enumerate(conds)]
            found.append(batch(model, alone, x, timestep, model_options)[place])
        return found

    samplers.sampling_function = lambda *args, **kwargs: predict(*args, **kwargs)
    samplers.calc_cond_batch = separately
    try:
        yield lambda model: model
    finally:
        samplers.sampling_function, samplers.calc_cond_batch = predict, batch


@contextmanager
def replaced_guider(inside, model, family) -> Iterator:
    """Methods of ComfyUI's guider replaced on the class."""
    guider = inside.comfy.samplers.CFGGuider
    predict, sample = guider.predict_noise, guider.outer_sample
    guider.predict_noise = lambda self, *args, **kwargs: predict(self, *args, **kwargs)
    guider.outer_sample = lambda self, *args, **kwargs: sample(self, *args, **kwargs)
    try:
        yield lambda model: model
    finally:
        guider.predict_noise, guider.outer_sample = predict, sample


def guided(clone, family):
    """Functions before, in place of and after ComfyUI's guidance."""
    clone.set_model_sampler_pre_cfg_function(lambda args: list(args["conds_out"]))
    clone.set_model_sampler_cfg_function(
        lambda args: args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]
    )
    clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"])


def copied_options(clone, family):
    """A clone whose options are copied through and through, as many packs do."""
    clone.model_options = copy.deepcopy(clone.model_options)


UNCHANGED = {
    "a block's forward": another_forward, "another block": by_clone(another_block),
    "a compiled block": by_clone(compiled_block), "compiled by ComfyUI's helper": by_clone(compiled_keys),
    "one conditioning at a time": by_wrapper(one_by_one),
    "evaluated twice": by_wrapper(twice), "replaced samplers": replaced_samplers, "a replaced guider": replaced_guider,
    "guidance": by_clone(guided), "copied options": by_clone(copied_options),
}  # fmt: skip


@pytest.mark.parametrize("pack", UNCHANGED)
def test_a_pack_that_changes_no_picture_changes_no_steered_one_and_no_record(inside, alone, pack):
    family, plain, expected, records = alone
    model, close = inside.model(family), {"atol": 1e-3 * float(plain.std()), "rtol": 1e-3}
    with UNCHANGED[pack](inside, model, family) as patch:
        torch.testing.assert_close(drawn(inside, patch(model), family), plain, **close)
        for found in (steered(inside, patch(model), family), patch(steered(inside, model, family))):
            torch.testing.assert_close(drawn(inside, found, family), expected, **close)
        torch.testing.assert_close(captured(inside, patch(model), family), records, **close)
    assert (expected - plain).abs().max() > 0.1 * plain.std()
    assert torch.equal(drawn(inside, model, family), plain)


# --- packs that leave something out: a sentence says what was not steered ---


class Bundle(nn.Module):
    """All blocks of a stack as one module, whose first block decides whether the others are run."""

    def __init__(self, blocks, by_call=True, every=2):
        super().__init__()
        self.blocks, self.by_call, self.every, self.calls, self.rest = [*blocks], by_call, every, 0, None

    def forward(self, img, txt, **more):
        """Of a step that is left out, what the blocks behind the first one added in the last step that was not."""
        first, *others = (block if self.by_call else block.forward for block in self.blocks)
        begun = img, txt = first(img=img, txt=txt, **more)
        if self.calls % self.every == 0:
            for block in others:
                img, txt = block(img=img, txt=txt, **more)
            self.rest = img - begun[0], txt - begun[1]
        self.calls += 1
        return begun[0] + self.rest[0], begun[1] + self.rest[1]


@contextmanager
def in_place_of(network, name, other):
    """An attribute of the network while something is evaluated, as packs swap modules."""
    kept = network._modules.pop(name)
    network._modules[name] = other
    try:
        yield
    finally:
        network._modules[name] = kept


def bundled(where, **how):
    """The double blocks of Flux replaced while the network runs: inside ComfyUI's evaluation, or around it."""

    def pack(inside, model):
        clone, network = model.clone(), model.model.diffusion_model
        stack = nn.ModuleList([Bundle(network.double_blocks, **how)])

        def around(executor, *args, **kwargs):
            with in_place_of(network, "double_blocks", stack):
                return executor(*args, **kwargs)

        def wrap(apply_model, args):
            with in_place_of(network, "double_blocks", stack):
                return apply_model(args["input"], args["timestep"], **args["c"])

        if where == "inside":
            clone.add_wrapper_with_key(inside.comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "other", around)
        else:
            clone.set_model_unet_function_wrapper(wrap)
        return clone

    return pack


def skipped(at):
    """A block left out by ComfyUI's own way to replace one, in the evaluations `at` tells."""

    def pack(inside, model):
        clone, calls = model.clone(), [0]

        def replace(args, extra):
            calls[0] += 1
            return {"img": args["img"], "txt": args["txt"]} if at(calls[0]) else extra["original_block"](args)

        clone.set_model_patch_replace(replace, "dit", "double_block", 1)
        return clone

    return pack


def engine(inside, model):
    """The whole network replaced by something that has none of its modules."""

    class Engine(nn.Module):
        dtype = torch.float32

        def forward(self, x, *args, **kwargs):
            return x

    clone = model.clone()
    clone.add_object_patch("diffusion_model", Engine())
    return clone


SAID = {
    "a cache of blocks": (bundled("inside"), "double_blocks.1 was run in 2 of the 4 predictions to be steered"),
    "a cache of blocks, the first": (bundled("inside"), ""),
    "a block left out at times": (skipped(lambda n: n > 3), "double_blocks.1 was run in 3 of the 4 predictions"),
}
REFUSED = {
    "blocks run by their forward alone": bundled("inside", by_call=False, every=1),
    "a block that is never run": skipped(lambda n: True),
    "blocks replaced from outside": bundled("outside"),
    "an engine": engine,
}


def told(inside, pack, site):
    """What is said of a steered run of Flux with a pack behind Steer and in front of it."""
    found = []
    for behind in (True, False):
        log, model = inside.pack_module("difflens_core.targets").Log(), inside.model("Flux")
        changed = model if behind else pack(inside, model)
        edited = inside.host.apply_site(changed, site, push, "Steer", log=log)
        last = pack(inside, edited) if behind else edited
        inside.sample(last, inside.prompt("Flux", 1), latent=inside.latent("Flux"), steps=4)
        found.append(log.said)
    return found


@pytest.mark.parametrize("pack", SAID)
def test_what_a_pack_leaves_out_is_said(inside, pack):
    make, sentence = SAID[pack]
    behind, before = told(inside, make, "double_blocks.1" if sentence else "double_blocks.0")
    assert behind == before and len(behind) == bool(sentence) and sentence in "".join(behind)


@pytest.mark.parametrize("pack", REFUSED)
def test_a_pack_that_keeps_a_site_from_being_steered_is_refused_in_a_sentence(inside, pack):
    model = inside.model("Flux")
    plain = drawn(inside, model, "Flux")
    with pytest.raises(inside.DiffLensError, match=r"^Steer: double_blocks\.1 was never run.* Leave that node out"):
        told(inside, REFUSED[pack], "double_blocks.1")
    assert torch.equal(drawn(inside, model, "Flux"), plain)


def tiles(apply_model, args):
    """The left half of every picture evaluated, then the right one."""
    left, right = (
        apply_model(half, args["timestep"], **args["c"]) for half in args["input"].chunk(2, dim=-1)
    )  # fmt: skip
    return torch.cat([left, right], dim=-1)


def test_tiles_of_a_picture_are_steered_each_and_the_recipe_is_stretched_to_them_which_is_said(inside, toys):
    recipe = toys.recipe(width=64, positions=64, steps=4, mode="move", strength=(1.0,) * 3)
    recipe = replace(recipe, site="mid_block", model="", map=(8, 8))
    steer, model = inside.pack_module("nodes.steer").Steer, inside.model("U-Net")
    found, dealt = steer.execute(model, recipe, "uniform", 1.0, "from recipe", 0.0, 1.0, 0, 0, run=0, hold="off").result
    for clone in (model := model.clone(), found):
        clone.set_model_unet_function_wrapper(tiles)
    plain, changed = drawn(inside, model, "U-Net"), drawn(inside, found, "U-Net")
    for half, other in zip(plain.chunk(2, dim=-1), changed.chunk(2, dim=-1), strict=True):
        assert (half - other).abs().max() > 0.01 * plain.std()
    (sentence,) = dealt[0].log.said
    assert "stretched to 8 x 4" in sentence


def test_windows_along_a_clips_frames_are_steered_as_its_picture(inside):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    seen = []
    steered = inside.host.apply_site(
        inside.model("Wan"), "blocks.0", lambda h, progress, images: seen.append(images.tolist()) or h, "Steer"
    )
    (windowed,) = ContextWindowsManualNode.execute(
        steered, 3, 1, "standard_static", 1, False, "pyramid", 2, False, [], False, [], True
    ).result
    inside.sample(windowed, inside.prompt("Wan", 1), latent=inside.latent("Wan", 1, frames=5), steps=1)
    assert seen == [[0], [0]]
