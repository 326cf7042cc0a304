"""Which rows are steered under every guider and way of batching, and that it is said when none is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

PICTURES, SEED = 3, 5
AVATARS = Path(__file__).resolve().parents[2] / "models" / "avatars"
FAMILIES = {
    "SD1.5": "middle_block", "SDXL": "output_blocks.3.1", "Flux": "double_blocks.1", "SD3": "joint_blocks.1",
    "Qwen-Image": "transformer_blocks.0", "Wan": "blocks.0",
}  # fmt: skip
GUIDERS = ("cfg", "dual", "dual, nested", "perpendicular", "basic")
BATCHES = ("one batch", "separate calls", "cut out of a batch", "a later run", "an area")


def guider_of(inside, kind, model, positive, negative, third):
    """A guider and its sampling settings."""
    if kind == "cfg":
        guider = inside.comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(3.0)
    elif kind == "perpendicular":
        from comfy_extras.nodes_perpneg import Guider_PerpNeg

        guider = Guider_PerpNeg(model)
        guider.set_conds(positive, negative, third)
        guider.set_cfg(3.0, 1.0)
    elif kind == "basic":
        from comfy_extras.nodes_custom_sampler import Guider_Basic

        guider = Guider_Basic(model)
        guider.set_conds(positive)
    else:
        from comfy_extras.nodes_custom_sampler import Guider_DualCFG

        guider = Guider_DualCFG(model)
        guider.set_conds(positive, third, negative)
        guider.set_cfg(3.0, 2.0, kind == "dual, nested")
    return guider


class Spy:
    """Sees from outside what a site puts out, chunk by chunk, and under which uuid the network was run."""

    def __init__(self, inside, model, site):
        self.chunks, self.site = [], site
        self.model = model.clone()
        self.model.add_wrapper_with_key(inside.comfy.patcher_extension.WrappersMP.APPLY_MODEL, "spy", self.watch)
        self.name = inside.pack_module("nodes.host.sites").run_name
        self.picture = inside.pack_module("nodes.host.sites").Picture
        self.hooked = inside.pack_module("difflens_core.activations").edit_site

    def watch(self, executor, x, *args, **kwargs):
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "sigmas" in a)
        network, found = executor.class_obj.diffusion_model, []
        site = self.name(network, self.site)
        with self.hooked(network, site, lambda h: found.append(h.clone()) or h, self.picture(network, site, x)):
            out = executor(x, *args, **kwargs)
        self.chunks += zip(options["uuids"], found[0].chunk(len(options["uuids"])), strict=True)
        return out


class Push:
    """An edit that adds what is each picture's own, and notes what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, h, progress, images):
        self.given.append((h.clone(), images))
        return h + images[:, None, None, None].to(h) * torch.linspace(-1, 1, h.shape[1])[:, None, None]


def sampled(inside, guider, latent, numbers=None, steps=2):
    """What the guider draws from noises of one seed; numbers: places in a larger batch that they are cut from."""
    start = inside.comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"])
    noise = inside.comfy.sample.prepare_noise(start, SEED, numbers)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = inside.comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    euler = inside.comfy.samplers.sampler_object("euler")
    try:
        return guider.sample(noise, start, euler, sigmas, seed=SEED, disable_pbar=True)
    finally:
        inside.forget()


@pytest.mark.parametrize("kind", GUIDERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conditioning", ["positive", "negative"])
def test_exactly_the_rows_of_the_conditioning_are_edited_with_their_pictures_numbers(
    inside, family, batch, kind, conditioning
):
    if conditioning == "negative" and kind == "basic":
        pytest.skip("a basic guider has no negative")
    if batch == "an area" and (family not in ("SD1.5", "SDXL") or kind in ("perpendicular", "basic")):
        pytest.skip("areas are tried where ComfyUI's U-Nets take them")
    model, edit = inside.model(family), Push()
    positive, negative, third = (inside.prompt(family, seed) for seed in (1, 2, 3))
    if batch == "separate calls":
        negative = inside.prompt(family, 2, tokens=15)
    if batch == "an area":
        positive = [[tokens, more | {"area": (8, 16, 8, 0), "strength": 1.0}] for tokens, more in positive]
        positive += inside.prompt(family, 4)  # another for all of the picture
    cut, run = ([6, 1, 4] if batch == "cut out of a batch" else None), 2 * (batch == "a later run")
    spy = Spy(inside, model, FAMILIES[family])
    steered = inside.host.apply_site(spy.model, FAMILIES[family], edit, "Steer", conditioning, run=run)
    guider = guider_of(inside, kind, steered, positive, negative, third)
    sampled(inside, guider, inside.latent(family, PICTURES), cut)
    names = {cond["uuid"]: name for name, conds in guider.original_conds.items() for cond in conds}
    if batch == "an area":  # ComfyUI makes a negative for the area under the same uuid: rows differ, numbers do not
        assert len(edit.given) == 2 * (2 if conditioning == "positive" else 2)
    else:
        expected = [rows for uuid, rows in spy.chunks if names[uuid] == conditioning]
        assert len(expected) == len(edit.given) == 2
        for (rows, _), wanted in zip(edit.given, expected, strict=True):
            torch.testing.assert_close(rows, wanted)
    numbers = cut or [run * PICTURES + i for i in range(PICTURES)]
    assert all(images.tolist() == numbers for _, images in edit.given)


def said(inside, model, wrap=None, steps=4, cfg=1.0, **settings):
    """What the log says after a run of a steered SD 1.5; wrap: changes the MODEL behind Steer."""
    log = inside.pack_module("difflens_core.targets").Log()
    conditioning = settings.pop("conditioning", "positive")
    steered = inside.host.apply_site(model, "mid_block", Push(), "Steer", conditioning, log=log, **settings)
    if wrap:
        steered.set_model_unet_function_wrapper(wrap)
    inside.sample(steered, inside.prompt("SD1.5", 1), inside.prompt("SD1.5", 2), cfg, inside.latent("SD1.5"), steps)
    return log.said


def test_a_run_that_was_steered_as_asked_says_nothing(inside):
    assert said(inside, inside.model("SD1.5")) == []


def test_a_guider_that_does_not_tell_when_it_predicts_is_followed_by_its_evaluations(inside):
    class Own(inside.comfy.samplers.CFGGuider):
        def __call__(self, *args, **kwargs):
            return self.predict_noise(*args, **kwargs)

    seen = []
    steered = inside.host.apply_site(
        inside.model("SD1.5"), "mid_block", lambda h, progress, images: seen.append(progress) or h, "Steer"
    )
    guider = Own(steered)
    guider.set_conds(inside.prompt("SD1.5", 1), inside.prompt("SD1.5", 2))
    guider.set_cfg(3.0)
    sampled(inside, guider, inside.latent("SD1.5"), steps=3)
    assert len(seen) == 3 and seen == sorted(set(seen)) and seen[0] == 0


def test_a_window_without_a_step_is_said(inside):
    (sentence,) = said(inside, inside.model("SD1.5"), span=(0.1, 0.11))
    assert "no step of the sampling lies between 10% and 11%" in sentence


def test_a_conditioning_that_never_comes_is_said(inside):
    (sentence,) = said(inside, inside.model("SD1.5"), conditioning="negative")
    assert "never came" in sentence and "cfg 1" in sentence


def test_steps_that_a_cache_answers_are_counted(inside):
    kept = {}

    def every_other(apply_model, args):
        calls = kept["calls"] = kept.get("calls", -1) + 1
        if calls % 2 == 0:
            kept["out"] = apply_model(args["input"], args["timestep"], **args["c"])
        return kept["out"]

    (sentence,) = said(inside, inside.model("SD1.5"), every_other)
    assert "in 2 of the 4 predictions" in sentence


def test_a_network_that_others_run_is_an_error(inside):
    with pytest.raises(inside.DiffLensError, match="Steer: middle_block was never run"):
        said(inside, inside.model("SD1.5"), lambda apply_model, args: 0 * args["input"])


def test_rows_of_tiles_are_refused_before_a_wrong_one_is_steered(inside):
    def tiled(apply_model, args):
        x, c = args["input"], dict(args["c"])
        tiles = torch.cat([x[..., :8], x[..., 8:]])
        c["c_crossattn"] = torch.cat([c["c_crossattn"]] * 2)
        left, right = apply_model(tiles, torch.cat([args["timestep"]] * 2), **c).chunk(2)
        return torch.cat([left, right], dim=-1)

    with pytest.raises(inside.DiffLensError, match="Steer: the network is run on 8 rows for 2 conditionings of 2 pic"):
        said(inside, inside.model("SD1.5"), tiled, cfg=3.0)


def test_a_network_whose_forward_knows_no_patches_is_steered(inside):
    """Packs replace ComfyUI's U-Net by older copies of its code, which lack the patch behind the middle block."""
    model, wrappers = inside.model("SD1.5"), inside.comfy.patcher_extension.WrappersMP

    def without_patches(executor, *args, **kwargs):
        for found in (*args, *kwargs.values()):
            if isinstance(found, dict):
                found.pop("patches", None)
        return executor(*args, **kwargs)

    old = model.clone()
    old.add_wrapper_with_key(wrappers.DIFFUSION_MODEL, "old", without_patches)
    plain, steered = (
        inside.sample(by, inside.prompt("SD1.5", 1), latent=inside.latent("SD1.5"))
        for by in (old, inside.host.apply_site(old, "mid_block", Push(), "Steer"))
    )
    assert torch.equal(plain[0], steered[0]) and not torch.equal(plain[1], steered[1])  # picture 0 is pushed by 0


@pytest.mark.parametrize(("family", "site"), [("Flux", "double_blocks.1"), ("Qwen-Image", "transformer_blocks.0")])
def test_a_block_that_was_compiled_by_itself_is_steered(inside, family, site):
    model = inside.model(family)
    network, (stack, number) = model.model.diffusion_model, site.split(".")
    blocks, kept = getattr(network, stack), getattr(network, stack)[int(number)]
    blocks[int(number)] = torch.compile(kept, backend="eager")
    try:
        plain = inside.sample(model, inside.prompt(family, 1), latent=inside.latent(family))
        found = inside.sample(
            inside.host.apply_site(model, site, Push(), "Steer"), inside.prompt(family, 1), latent=inside.latent(family)
        )
    finally:
        blocks[int(number)] = kept
        torch._dynamo.reset()
    torch.testing.assert_close(plain[0], found[0])
    assert (plain[1] - found[1]).abs().max() > 0.01 * plain.std()


def test_a_single_block_that_is_not_told_where_its_picture_is_is_steered_alike(inside):
    model = inside.model("Flux")
    block = model.model.diffusion_model.single_blocks[0]
    whole = block.forward

    def steered():
        edited = inside.host.apply_site(model, "single_blocks.0", Push(), "Steer")
        return inside.sample(edited, inside.prompt("Flux", 1), latent=inside.latent("Flux"))

    expected = steered()
    block.forward = lambda *args, transformer_options=None, **kwargs: whole(*args, **kwargs)
    try:
        hook = block.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "transformer_options"}),
            with_kwargs=True, prepend=True,
        )  # fmt: skip
        found = steered()
    finally:
        hook.remove()
        block.forward = whole
    torch.testing.assert_close(found, expected)


# --- a deal that goes on ---


def classes_of(inside, batches, seeds):
    """Classes that pictures of runs of such sizes and seeds are asked for, numbered as Steer does unasked."""
    model, given = inside.model("U-Net"), []
    name = f"deal {len(inside.pack_module('nodes.host.runs').DEALS)}"
    deal = inside.pack_module("difflens_core.targets").Targets(name, ("a", "b"), (0.5, 0.5))
    edited = inside.host.apply_site(
        model, "mid_block", lambda h, progress, images: given.append(deal.of(images).tolist()) or h, "Steer",
        run=-1, deal=name,
    )  # fmt: skip
    for batch, seed in zip(batches, seeds, strict=True):
        inside.sample(edited, inside.prompt("U-Net", 1), latent=inside.latent("U-Net", batch), seed=seed)
    return given


def test_steer_numbers_runs_unasked_unless_it_is_told_which(inside):
    run = inside.pack_module("nodes.steer").Steer.define_schema().inputs[-1]
    assert (run.id, run.default, run.optional) == ("run", -1, True)


@pytest.mark.parametrize("batches", [[1] * 16, [4] * 4, [3, 1, 5, 2, 5]])
def test_pictures_queued_apart_are_as_balanced_as_a_batch(inside, batches):
    seeds = torch.randint(2**40, (len(batches),), generator=torch.Generator().manual_seed(1)).tolist()
    dealt = [label for run in classes_of(inside, batches, seeds) for label in run]
    assert abs(sum(dealt) - len(dealt) / 2) <= 1


def test_a_seed_that_was_drawn_before_gets_the_classes_it_had(inside):
    found = classes_of(inside, [2, 2, 1, 2, 2], [7, 8, 9, 7, 8])
    assert found[3:] == found[:2]


def test_a_second_pass_keeps_the_classes_of_the_pictures_it_goes_on_with(inside):
    deal = inside.pack_module("nodes.host.runs").Deal()
    assert [deal.first(1, 2, False), deal.first(5, 2, True), deal.first(6, 2, False), deal.first(1, 2, False)] == [
        0, 0, 2, 0,
    ]  # fmt: skip
    assert deal.first(9, 3, True) == 4, "pictures from elsewhere"


# --- progress ---


def sampling_of(kind, **settings):
    import comfy.model_sampling as known

    class Config:
        sampling_settings = settings

    return type("Sampling", (getattr(known, kind), known.EPS), {})(Config())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("ModelSamplingDiscrete", {}), ("ModelSamplingDiscreteFlow", {"shift": 3.0}),
     ("ModelSamplingFlux", {"shift": 1.15}),
     ("ModelSamplingContinuousEDM", {"sigma_max": 700.0, "sigma_min": 0.002}),
     ("ModelSamplingContinuousEDM", {"sigma_max": 1.0, "sigma_min": 0.002}),
     ("ModelSamplingContinuousV", {}), ("ModelSamplingDiscrete", {"zsnr": True})],
)  # fmt: skip
def test_progress_is_comfyuis_percent_and_rises_strictly(inside, kind, settings):
    sampling = sampling_of(kind, **settings)
    holder = type("Patcher", (), {"get_model_object": lambda self, name: sampling})()
    progress = inside.host.progress_of(holder)
    for percent in (0.03, 0.25, 0.5, 0.77, 0.97):
        assert math.isclose(progress(float(sampling.percent_to_sigma(percent))), percent, abs_tol=2e-3)
    sigmas = inside.comfy.samplers.calculate_sigmas(sampling, "simple", 20)[:-1].tolist()
    found = [*map(progress, sigmas)]
    assert all(one < other for one, other in zip(found, found[1:], strict=False))
    assert 0 <= found[0] < 0.06 and found[-1] < 1 and progress(0.0) == 1 and progress(1e9) == 0


def test_progress_is_that_of_the_sampling_in_force_when_the_run_begins(inside):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    seen = []
    steered = inside.host.apply_site(
        inside.model("SD3"), "joint_blocks.1", lambda h, progress, images: seen.append(progress) or h, "Steer"
    )
    shifted = ModelSamplingSD3().patch(steered, 9.0)[0]
    inside.sample(shifted, inside.prompt("SD3", 1), latent=inside.latent("SD3"), steps=3)
    assert seen == [*map(inside.host.progress_of(shifted), inside.schedule(shifted, 3)[:-1])]
    assert seen != [*map(inside.host.progress_of(steered), inside.schedule(shifted, 3)[:-1])]
