"""Which rows are steered under every guider and way of batching, and that it is said when none is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from guiders import SEED, guider_of, patched, sampled, with_hooks
from spy import Spy

from difflens_core.networks import AdmConfig

PICTURES = 3
AVATARS = Path(__file__).resolve().parents[2] / "models" / "avatars"
FAMILIES = {
    "SD1.5": "middle_block", "SDXL": "output_blocks.3.1", "Flux": "double_blocks.1", "SD3": "joint_blocks.1",
    "Qwen-Image": "transformer_blocks.0", "Wan": "blocks.0", "ADM": "middle_block",
}  # fmt: skip
GUIDERS = ("cfg", "dual", "dual, nested", "perpendicular", "basic")
BATCHES = (
    "one batch", "separate calls", "cut out of a batch", "a later run", "an area", "a mask", "several prompts",
    "a part of the sampling", "a LoRA of its own", "windows", "a weaker pass",
)  # fmt: skip
ONLY = {  # where they are tried, if not everywhere
    "an area": (("SD1.5", "SDXL"), ("cfg", "dual", "dual, nested")),
    "a LoRA of its own": (("SD1.5", "Flux", "Wan"), ("cfg", "dual", "perpendicular")),
    "windows": (("SD1.5", "Flux", "SD3"), ("cfg", "perpendicular", "basic")),  # along the batch
    "a weaker pass": (("SD1.5", "SDXL"), ("cfg", "basic")),
}
ADM_SIZES = AdmConfig(
    model_channels=32, channels=(32, 64), attention=(2,), head_channels=0, heads=4, resblock_updown=False, classes=9
)


@pytest.fixture(scope="module")
def adm(inside, toys, tmp_path_factory):
    """A small ADM with classes as MODEL."""
    path = tmp_path_factory.mktemp("pixels") / "adm.pt"
    torch.save(toys.adm(ADM_SIZES).state_dict(), path)
    return inside.host.load_model(str(path), "linear", "sample")[0]


def prompt_of(inside, family, seed, tokens=8):
    if family == "ADM":
        return inside.host.class_conditioning(seed, ADM_SIZES.classes)
    return inside.prompt(family, seed, tokens=tokens)


def prompts_of(inside, family, batch):
    """A positive, a negative and a third conditioning for a way of batching."""
    positive, negative, third = (prompt_of(inside, family, seed) for seed in (1, 2, 3))
    if batch == "separate calls":
        negative = prompt_of(inside, family, 2, tokens=15)
    more = {
        "an area": {"area": (8, 16, 8, 0), "strength": 1.0},
        "a mask": {"mask": torch.linspace(0, 1, 256).reshape(1, 16, 16), "mask_strength": 1.0},
        "a part of the sampling": {"start_percent": 0.0, "end_percent": 0.2},
    }.get(batch, {})
    if more or batch == "several prompts":
        positive = [[tokens, settings | more] for tokens, settings in positive]
        positive += prompt_of(inside, family, 4)  # another for all of the picture
    return positive, negative, third


def push(inside):
    return Push(inside.pack_module("difflens_core.targets").Log())


class Push:
    """An edit that adds what is each picture's own. log: tells the number of the batch's first picture in the deal."""

    def __init__(self, log):
        self.log, self.numbers, self.places = log, [], []

    def __call__(self, h, progress, images):
        numbers = images + self.log.first
        self.numbers.append(numbers.tolist())
        self.places.append(images.tolist())
        return h + self.of(numbers, h)

    def of(self, numbers, h):
        return numbers[:, None, None, None].to(h) * torch.linspace(-1, 1, h.shape[1])[:, None, None]


@pytest.mark.parametrize("kind", GUIDERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("conditioning", ["positive", "negative"])
def test_exactly_the_rows_of_the_conditioning_are_edited_with_their_pictures_numbers(
    inside, adm, family, batch, kind, conditioning
):
    families, guiders = ONLY.get(batch, (FAMILIES, GUIDERS))
    if family not in families or kind not in guiders or (conditioning, kind) == ("negative", "basic"):
        pytest.skip("tried with other families and guiders")
    model, log = adm if family == "ADM" else inside.model(family), inside.pack_module("difflens_core.targets").Log()
    positive, negative, third = prompts_of(inside, family, batch)
    if batch == "a LoRA of its own":
        positive = with_hooks(inside, model, positive)
    cut, run = ([6, 1, 4] if batch == "cut out of a batch" else None), 2 * (batch == "a later run")
    before, edit, after = Spy(inside, FAMILIES[family]), Push(log), Spy(inside, FAMILIES[family])
    steered = inside.host.apply_site(
        before.on(patched(model, batch)), FAMILIES[family], edit, "Steer", conditioning, run=run, log=log
    )
    guider = guider_of(inside, kind, after.on(steered), positive, negative, third)
    latent = {"samples": torch.zeros(1, 3, 16, 16)} if family == "ADM" else inside.latent(family, 1)
    sampled(inside, guider, {"samples": latent["samples"].repeat_interleave(PICTURES, 0)}, cut)

    numbers = cut or [run * PICTURES + i for i in range(PICTURES)]
    names = {cond["uuid"]: name for name, conds in guider.original_conds.items() for cond in conds}
    # ComfyUI makes a negative for an area under the positive's uuid. Where a uuid comes at several places, the place
    # decides, and what it stands for is told by uuids that come there alone.
    places = {uuid: {place for one, place, _ in before.chunks if one == uuid} for uuid, _, _ in before.chunks}
    roles = {next(iter(where)): names[uuid] for uuid, where in places.items() if len(where) == 1}
    edited = 0
    for (uuid, place, plain), (_, _, changed) in zip(before.chunks, after.chunks, strict=True):
        if (names[uuid] if len(places[uuid]) == 1 else roles[place]) != conditioning:
            assert torch.equal(plain, changed)
            continue
        shown = torch.tensor(edit.numbers[edited])
        edited += 1
        assert set(shown.tolist()) <= set(numbers) and (batch == "windows" or shown.tolist() == numbers)
        torch.testing.assert_close(changed, plain + edit.of(shown, plain))
    assert edited == len(edit.numbers) >= 2 and set(sum(edit.numbers, [])) == set(numbers)
    assert log.said == [] and log.numbers[0].tolist() == numbers
    assert set(sum(edit.places, [])) == set(cut or range(PICTURES)), "masks go by a picture's place in its batch"


class Held(Push):
    """An edit that remembers what it is given, and pushes or not. One that holds is given every map and then that of
    the unsteered pictures.
    """

    def __init__(self, log, amount):
        super().__init__(log)
        self.amount, self.seen, self.given = amount, [], []

    def acts(self, progress):
        return True

    def __call__(self, h, progress, images, shown=None):
        self.seen.append(h.clone())
        self.given.append(shown)
        return h + self.amount * self.of(images + 1, h)


@pytest.mark.parametrize("kind", ["cfg", "dual, nested", "perpendicular"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", ["SD1.5", "Flux"])
def test_a_run_that_is_held_is_drawn_as_it_is_first_and_keeps_no_trace_of_that(inside, family, batch, kind):
    """What an edit is given is what the same evaluation saw when nothing was changed, whoever else is in the graph."""
    families, guiders = ONLY.get(batch, (FAMILIES, GUIDERS))
    if family not in families or kind not in guiders:
        pytest.skip("tried with other families and guiders")
    model, latent = patched(inside.model(family), batch), inside.latent(family, PICTURES)
    cut = [6, 1, 4] if batch == "cut out of a batch" else None

    def drawn(amount, hold):
        log = inside.pack_module("difflens_core.targets").Log()
        edit, (positive, negative, third) = Held(log, amount), prompts_of(inside, family, batch)
        if batch == "a LoRA of its own":
            positive = with_hooks(inside, model, positive)
        steered = inside.host.apply_site(
            model, FAMILIES[family], edit, "Steer", run=2 * (batch == "a later run"), log=log, hold=hold
        )
        guider = guider_of(inside, kind, steered, positive, negative, third)
        pictures = sampled(inside, guider, latent, cut)
        assert log.said == [] and len(log.numbers) == 1
        return pictures, edit

    plain, free = drawn(0, hold=False)
    again, echo = drawn(0, hold=True)
    pushed, push = drawn(1, hold=True)
    assert torch.equal(plain, again) and not torch.equal(plain, pushed)
    assert 2 * len(free.seen) == len(echo.seen) == len(push.seen) >= 4
    for expected, one, other in zip(free.seen, echo.seen[1::2], push.seen[1::2], strict=True):
        assert torch.equal(one, expected) and torch.equal(other, expected)
    assert not torch.equal(push.seen[-2], free.seen[-1])


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heun", "dpmpp_3m_sde", "dpmpp_2m_sde", "uni_pc", "lcm"])
def test_what_is_drawn_as_it_is_first_is_drawn_with_the_same_noise(inside, sampler):
    def drawn(amount, hold):
        edit = Held(inside.pack_module("difflens_core.targets").Log(), amount)
        held = inside.host.apply_site(inside.model("U-Net"), "mid_block", edit, "Steer", hold=hold)
        torch.manual_seed(7)
        pictures = inside.sample(
            held, inside.prompt("U-Net", 1), latent=inside.latent("U-Net"), steps=4, sampler=sampler
        )
        return pictures, edit

    (plain, free), (again, _), (_, push) = drawn(0, False), drawn(0, True), drawn(1, True)
    assert torch.equal(plain, again)
    assert all(torch.equal(one, seen) for one, seen in zip(push.seen[1::2], free.seen, strict=True))


@pytest.mark.parametrize("sampler", ["dpm_adaptive", "dpm_fast"])
def test_a_sampler_that_chooses_its_steps_is_held_by_the_nearest(inside, sampler):
    edit = Held(inside.pack_module("difflens_core.targets").Log(), 1)
    held = inside.host.apply_site(inside.model("U-Net"), "mid_block", edit, "Steer", hold=True)
    inside.sample(held, inside.prompt("U-Net", 1), latent=inside.latent("U-Net"), steps=8, sampler=sampler)
    assert edit.given and all(given is not None for given in edit.given)


def test_two_that_hold_at_one_site_are_drawn_twice_in_all_and_one_elsewhere_says_that_it_does_not(inside):
    Log = inside.pack_module("difflens_core.targets").Log
    edits = first, between, second, negative, last = [Held(Log(), amount) for amount in (1, 0.5, 0.1, 0.1, 0.1)]
    model, places = inside.model("SD1.5"), [*["middle_block"] * 4, "input_blocks.1.1"]
    for edit, place in zip(edits, places, strict=True):
        model = inside.host.apply_site(
            model, place, edit, "Steer", "negative" if edit is negative else "positive", log=edit.log,
            hold=edit is not between,
        )  # fmt: skip
    positive, other = inside.prompt("SD1.5", 1), inside.prompt("SD1.5", 2)
    inside.sample(model, positive, other, 2.0, inside.latent("SD1.5", PICTURES), steps=3)
    assert [len(edit.seen) for edit in (first, between, second, negative, last)] == [6, 6, 6, 3, 3]
    images = torch.arange(PICTURES)
    for step in range(3):
        unsteered = between.seen[step]
        assert torch.equal(first.seen[2 * step + 1], unsteered)
        torch.testing.assert_close(second.seen[2 * step + 1], unsteered + first.of(images + 1, unsteered))
    assert negative.given == last.given == [None] * 3
    assert first.log.said == second.log.said == between.log.said == [] and len(between.log.numbers) == 1
    assert "holds at middle_block (positive), so this one at middle_block (negative) did not" in negative.log.said[0]
    assert "so this one at input_blocks.1.1 (positive) did not" in last.log.said[0]


def test_cancel_while_a_run_is_drawn_for_the_first_time_leaves_the_model_as_it_was(inside):
    model = inside.model("SD1.5")
    plain = inside.sample(model, inside.prompt("SD1.5", 1), latent=inside.latent("SD1.5"), steps=3)
    edit = Held(inside.pack_module("difflens_core.targets").Log(), 1)
    held = inside.host.apply_site(model, "middle_block", edit, "Steer", hold=True)
    management = inside.comfy.model_management
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        inside.sample(held, inside.prompt("SD1.5", 1), latent=inside.latent("SD1.5"), steps=3)
    assert edit.seen == []
    again = inside.sample(model, inside.prompt("SD1.5", 1), latent=inside.latent("SD1.5"), steps=3)
    assert torch.equal(plain, again)


def test_windows_along_the_batch_hold_their_pictures(inside):
    """Windows of two of three pictures that overlap, the second one behind a picture that steadies it."""
    edit = Push(inside.pack_module("difflens_core.targets").Log())
    steered = inside.host.apply_site(inside.model("SD1.5"), "middle_block", edit, "Steer")
    inside.sample(patched(steered, "windows"), inside.prompt("SD1.5", 1), latent=inside.latent("SD1.5", PICTURES))
    assert edit.numbers == [[0, 1], [0, 1, 2]]


@pytest.mark.parametrize("family", ["SVD", "Wan", "AnimateDiff"])
def test_frames_of_a_clip_are_one_picture(inside, family):
    """Of a batch that is a clip, of frames in the latent, and of a pack that tells by its documented entry."""
    log = inside.pack_module("difflens_core.targets").Log()
    edit, name = Push(log), "SD1.5" if family == "AnimateDiff" else family
    model, latent = inside.model(name).clone(), inside.latent(name, 1, frames=5)["samples"]
    if family == "AnimateDiff":
        told = {"full_length": 5, "context_length": 2, "sub_idxs": None}
        model.model_options["transformer_options"]["ad_params"] = told
    batch = 2 if family == "Wan" else 5
    steered = inside.host.apply_site(
        model, "blocks.0" if family == "Wan" else "middle_block", edit, "Steer", run=-1, deal=f"clips {family}", log=log
    )
    for seed in (1, 2):
        inside.sample(
            steered, inside.prompt(name, 1, tokens=1), latent={"samples": latent.repeat_interleave(batch, 0)}, seed=seed
        )
    assert edit.numbers == ([[0, 1], [2, 3]] if family == "Wan" else [[0] * 5, [1] * 5])
    assert [numbers.tolist() for numbers in log.numbers] == edit.numbers


def said(inside, model, wrap=None, steps=4, cfg=1.0, behind=lambda model: model, **settings):
    """What the log says after a run of a steered SD 1.5; wrap, behind: what changes the MODEL behind Steer."""
    log = inside.pack_module("difflens_core.targets").Log()
    conditioning = settings.pop("conditioning", "positive")
    steered = inside.host.apply_site(model, "mid_block", Push(log), "Steer", conditioning, log=log, **settings)
    if wrap:
        steered.set_model_unet_function_wrapper(wrap)
    steered = behind(steered)
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


def cached(name, first=0.0):
    """ComfyUI's own node that answers predictions from earlier ones, set to answer all that it may."""
    from comfy_extras import nodes_easycache

    node = getattr(nodes_easycache, f"{name}Node")
    return lambda model: node.execute(model, 1e9, first, 1.0, False).result[0]


@pytest.mark.parametrize("place", ["before Steer", "behind Steer"])
@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_predictions_that_comfyuis_caches_answer_are_counted(inside, name, place):
    cache, model = cached(name), inside.model("SD1.5")
    behind = {"behind": cache} if place == "behind Steer" else {}
    (sentence,) = said(inside, model if behind else cache(model), steps=10, cfg=3.0, **behind)
    assert re.search(r"in \d of the 10 predictions", sentence)


def test_a_cache_that_answers_every_prediction_that_is_due_is_an_error(inside):
    with pytest.raises(inside.DiffLensError, match="was run in none of the . predictions"):
        said(inside, inside.model("SD1.5"), steps=10, behind=cached("EasyCache"), span=(0.5, 0.8))


def test_a_conditioning_that_comes_for_a_part_of_the_sampling_only_is_said(inside):
    def often(args):  # as packs do that save the negative at late steps
        conds = args["conds"] if float(args["sigma"][0]) > 3 else [args["conds"][0], None]
        return inside.comfy.samplers.calc_cond_batch(
            args["model"], conds, args["input"], args["sigma"], args["model_options"]
        )

    def behind(model):
        model.set_model_sampler_calc_cond_batch_function(often)
        return model

    (sentence,) = said(inside, inside.model("SD1.5"), steps=6, cfg=3.0, behind=behind, conditioning="negative")
    assert re.search(r"came in \d of the 6 predictions", sentence)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_fast", "dpm_adaptive", "uni_pc", "dpmpp_3m_sde", "lcm"])
def test_no_sampler_is_taken_for_a_cache(inside, sampler):
    log = inside.pack_module("difflens_core.targets").Log()
    steered = inside.host.apply_site(inside.model("U-Net"), "mid_block", Push(log), "Steer", log=log)
    inside.sample(steered, inside.prompt("U-Net", 1), latent=inside.latent("U-Net"), steps=25, sampler=sampler)
    assert log.said == []


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
        for by in (old, inside.host.apply_site(old, "mid_block", push(inside), "Steer"))
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
            inside.host.apply_site(model, site, push(inside), "Steer"),
            inside.prompt(family, 1),
            latent=inside.latent(family),
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
        edited = inside.host.apply_site(model, "single_blocks.0", push(inside), "Steer")
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
        run=-1, deal=name, log=deal.log,
    )  # fmt: skip
    for batch, seed in zip(batches, seeds, strict=True):
        inside.sample(edited, inside.prompt("U-Net", 1), latent=inside.latent("U-Net", batch), seed=seed)
    return given


def test_steer_numbers_runs_unasked_unless_it_is_told_which(inside):
    run, hold = inside.pack_module("nodes.steer").Steer.define_schema().inputs[-2:]
    assert (run.id, run.default, run.optional) == ("run", -1, True)
    assert (hold.id, hold.default, hold.optional) == ("hold", "from recipe", True)


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
    first = [
        deal.first(1, 2, "", "prompt 1"),
        deal.first(5, 2, "drawn", "prompt 1"),  # hires fix
        deal.first(6, 2, "", "prompt 2"),
        deal.first(9, 2, "drawn", "prompt 3"),  # the second pass alone, with another seed: the first one is cached
        deal.first(1, 2, "", "prompt 4"),
    ]
    assert first == [(0, ""), (0, ""), (2, ""), (0, ""), (0, "")]


def test_pictures_that_others_drew_are_dealt_out_as_any(inside):
    """A photograph as the start of sixteen queued singles."""
    deal = inside.pack_module("nodes.host.runs").Deal()
    assert [deal.first(seed, 1, "photograph", f"prompt {seed}")[0] for seed in range(16)] == [*range(16)]


def test_a_second_pass_of_a_part_of_the_pictures_is_said(inside):
    deal = inside.pack_module("nodes.host.runs").Deal()
    deal.first(1, 4, "", "prompt 1")
    number, sentence = deal.first(2, 1, "a face", "prompt 1")
    assert number == 4 and "1 picture went through Steer once more after a run of 4" in sentence


def test_a_batch_of_more_pictures_holds_those_of_its_seed(inside):
    deal = inside.pack_module("nodes.host.runs").Deal()
    assert [deal.first(seed, count, "", None)[0] for seed, count in ((1, 2), (1, 4), (2, 2))] == [0, 0, 4]


def test_different_pictures_under_one_noise_are_numbered_by_place(inside):
    """LatentBatchSeedBehavior "fixed"."""
    numbers = inside.pack_module("nodes.host.runs").picture_numbers
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(SEED)).repeat(3, 1, 1, 1)
    assert numbers(noise, torch.zeros_like(noise), SEED).tolist() == [0, 0, 0]
    assert numbers(noise, torch.arange(3.0)[:, None, None, None].expand_as(noise), SEED).tolist() == [0, 1, 2]
    assert numbers(torch.rand_like(noise), torch.zeros_like(noise), SEED).tolist() == [0, 1, 2]  # drawn elsewhere


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
