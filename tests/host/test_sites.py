"""Every kind of site in ComfyUI's own networks: the right module, the right rows, the right tokens.

In this process, on tiny random networks of the host's classes (`inside.py`).
"""

from __future__ import annotations

import pytest
import torch
from guiders import control_net, free_u

PICTURES = 2
UNETS = ("SD1.5", "SDXL")
# Blocks of every family, and the block that gets what they put out.
DITS = [
    ("Flux", "double_blocks.0", "double_blocks.1"),
    ("Flux", "single_blocks.0", "single_blocks.1"),
    ("SD3", "joint_blocks.0", "joint_blocks.1"),
    ("Qwen-Image", "transformer_blocks.0", "transformer_blocks.1"),
    ("Wan", "blocks.0", "blocks.1"),
    ("Lumina", "layers.0", "layers.1"),
    ("Z-Image", "layers.0", "layers.1"),
    ("Z-Image", "noise_refiner.0", "noise_refiner.1"),
    ("HunyuanVideo", "double_blocks.0", "double_blocks.1"),
    ("HunyuanVideo", "single_blocks.0", "single_blocks.1"),
]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of another batch or of fp16, measured by the spread of what is expected."""
    spread = float(expected.float().std())
    torch.testing.assert_close(found.float(), expected.float(), atol=4e-3 * spread, rtol=4e-3)


def captured(inside, model, positive, latent, sites, steps=1, pictures=PICTURES, **guidance):
    """Activations of every site, S x B x C x H x W, and the samples."""
    store = inside.host.capture(
        model, positive, latent, pictures, steps, "euler", "normal", 5, tuple(sites), **guidance
    )  # fmt: skip
    inside.forget()
    return [store.activations(site).values for site in sites], store.samples()


class Spy:
    """A patch behind the middle block that notes what comes by."""

    def __init__(self):
        self.seen = []

    def __call__(self, args):
        self.seen.append((args["transformer_options"]["cond_or_uncond"], args["h"].clone()))
        return args


def with_spy(model, spy):
    clone = model.clone()
    clone.set_model_middle_block_after_patch(spy)
    return clone


# --- graphs that put rows together in their own ways ---


def graph(inside, family, how):
    """A model, positives of which the first counts, a negative and a latent."""
    model = inside.model(family)
    positive, negative = inside.prompt(family, 1), inside.prompt(family, 2)
    latent = inside.latent(family, PICTURES)
    if how in ("several positives", "[0, 0] then [1]"):
        positive = positive + inside.prompt(family, 3)
    elif how.startswith("an area"):
        (tokens, more), *_ = positive
        positive = [[tokens, more | {"area": (8, 16, 8, 0), "strength": 1.0, "set_area_to_bounds": False}]]
        positive += inside.prompt(family, 3) if how == "an area and all" else []
    elif how == "ControlNet":
        control = {"control": control_net(inside), "control_apply_to_uncond": False}
        positive = [[tokens, more | control] for tokens, more in positive]
    elif how == "another aspect ratio":
        latent = inside.latent(family, PICTURES, 24, 8)
    if how in ("separate calls", "[0, 0] then [1]", "an area, separate calls"):
        negative = inside.prompt(family, 2, tokens=15)  # too unlike in length to be run together
    if how in ("LoRA", "FreeU"):
        model = inside.with_lora(model) if how == "LoRA" else free_u(model)
    return model, positive, negative, latent


GRAPHS = [("SD1.5", how) for how in (
    "guidance", "several positives", "separate calls", "[0, 0] then [1]", "an area", "an area and all",
    "an area, separate calls", "ControlNet", "LoRA", "FreeU", "another aspect ratio",
)] + [("SDXL", how) for how in ("guidance", "several positives", "separate calls", "another aspect ratio")]  # fmt: skip


@pytest.mark.parametrize(("family", "how"), GRAPHS)
def test_a_capture_keeps_the_rows_of_the_first_positive(inside, family, how):
    model, positive, negative, latent = graph(inside, family, how)
    sites = ("middle_block", "down_blocks.2.attentions.1 update", "output_blocks.3.1")
    found, _ = captured(inside, model, positive, latent, sites, negative=negative, cfg=4.0)
    alone, _ = captured(inside, model, positive[:1], latent, sites)
    other, _ = captured(inside, model, negative, latent, sites)
    for rows, expected, wrong in zip(found, alone, other, strict=True):
        close(rows, expected)
        far = 0.1 * expected.float().std()
        assert rows.shape != wrong.shape or (rows.float() - wrong.float()).abs().max() > far
        assert (rows[:, 0].float() - rows[:, 1].float()).abs().max() > far, "pictures are alike"
    if how in ("ControlNet", "LoRA"):
        plain, _ = captured(inside, inside.model(family), inside.prompt(family, 1), latent, sites)
        # The middle block is read before a ControlNet adds to it: what it puts out is what a recipe was made on.
        assert torch.equal(plain[0], found[0]) == (how == "ControlNet") and not torch.equal(plain[2], found[2])


@pytest.mark.parametrize(
    ("family", "how", "conditioning"),
    [(*graph, "positive") for graph in GRAPHS]
    + [("SD1.5", how, kind) for how in ("guidance", "[0, 0] then [1]") for kind in ("negative", "both")],
)
def test_steering_changes_every_row_it_is_for_and_no_other(inside, family, how, conditioning):
    model, positive, negative, latent = graph(inside, family, how)
    width = 64
    push = torch.randn(PICTURES, width, 1, 1, generator=torch.Generator().manual_seed(6))
    before, after = Spy(), Spy()
    steered = inside.host.apply_site(
        model, "mid_block", lambda h, progress, images: h + push[images], "Steer", conditioning
    )
    for by, spy in ((model, before), (steered, after)):
        inside.sample(with_spy(by, spy), positive, negative, 4.0, latent)
    kinds = {"positive": [0], "negative": [1], "both": [0, 1]}[conditioning]
    seen = []
    for (kind, h), (_, new) in zip(before.seen, after.seen, strict=True):
        for i, which in enumerate(kind):
            rows = slice(i * PICTURES, (i + 1) * PICTURES)
            expected = h[rows] + push if which in kinds else h[rows]
            close(new[rows], expected)  # a ControlNet adds to what was pushed, in another order
            seen.append(which)
    # ComfyUI gives a positive for an area a negative of its own.
    assert {0, 1} == {*seen} and seen.count(0) == len(positive) and seen.count(1) == 1 + (how[:7] == "an area")
    assert len(before.seen) > 1 or how in ("guidance", "several positives", "LoRA", "FreeU", "another aspect ratio")


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_captured_pictures_are_those_of_a_ksampler_at_that_guidance(inside, cfg):
    model, positive, negative, latent = graph(inside, "SD1.5", "guidance")
    _, samples = captured(inside, model, positive, latent, ["middle_block"], 3, negative=negative, cfg=cfg)
    assert torch.equal(samples, inside.sample(model, positive, negative, cfg, latent, 3, seed=5))
    with pytest.raises(inside.DiffLensError, match="cfg is 4, .* none is connected"):
        captured(inside, model, positive, latent, ["middle_block"], cfg=4.0)


def test_the_capture_node_passes_on_its_guidance_and_sites(inside):
    model, positive, negative, latent = graph(inside, "SD1.5", "guidance")
    node = inside.pack_module("nodes.capture").CaptureActivations
    activations, images = node.execute(
        model, positive, latent, inside.host.pixel_space_vae(), PICTURES, 1, "euler", "normal", 5,
        "mid_block.attentions.0 update, mid_block", negative=negative, cfg=4.0,
    ).result  # fmt: skip
    (expected, _), samples = captured(
        inside, model, positive, latent, ["mid_block.attentions.0 update", "mid_block"], negative=negative, cfg=4.0
    )
    assert activations.site == "mid_block.attentions.0 update" and torch.equal(activations.values, expected)
    assert torch.equal(images, inside.host.pixel_space_vae().decode(samples))


# --- names ---

NAMES = {
    "SD1.5": {
        "mid_block": "middle_block", "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1 update": "middle_block.2 update", "down_blocks.2.attentions.1": "input_blocks.8.1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op", "conv_in": "input_blocks.0.0",
        "up_blocks.1.attentions.1": "output_blocks.4.1", "up_blocks.1.resnets.2": "output_blocks.5.0",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2": "input_blocks.4.1.transformer_blocks.0.attn2",
        "input_blocks.8.1 update": "input_blocks.8.1 update",
    },
    "SDXL": {
        "mid_block": "middle_block", "mid_block.attentions.0 update": "middle_block.1 update",
        "down_blocks.2.attentions.1 update": "input_blocks.8.1 update",
        "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.attentions.1 update": "output_blocks.1.1 update",
    },
    "Flux": {
        "transformer_blocks.1": "double_blocks.1", "single_transformer_blocks.0 update": "single_blocks.0 update",
    },
    "SD3": {"transformer_blocks.2": "joint_blocks.2"},
    "Qwen-Image": {"transformer_blocks.1": "transformer_blocks.1"},
}  # fmt: skip


@pytest.mark.parametrize("family", NAMES)
def test_sites_go_by_the_hosts_and_by_diffusers_names(inside, family):
    model = inside.model(family)
    for name, own in NAMES[family].items():
        assert inside.host.own_name(model, name) == own
        inside.host.site_width(model, name)


@pytest.mark.parametrize(("site", "message"), [
    ("down_blocks.2", "no module down_blocks.2"), ("attic", "no module attic"), ("up_blocks.9", "no module up"),
    ("middle_block update", "Use the last module in it: middle_block.2 update"),
    ("output_blocks.3", "Use the last module in it: output_blocks.3.1"),
])  # fmt: skip
def test_a_site_that_is_not_there_or_never_run_is_refused(inside, site, message):
    with pytest.raises(inside.DiffLensError, match=message):
        inside.host.site_width(inside.model("SD1.5"), site)


@pytest.mark.parametrize(("family", "stacks"), [
    ("Flux", ("double_blocks", "single_blocks")), ("HunyuanVideo", ("double_blocks", "single_blocks")),
    ("Z-Image", ("noise_refiner", "layers")),
])  # fmt: skip
def test_some_sites_of_a_transformer_are_blocks_of_its_stacks(inside, family, stacks):
    model = inside.model(family)
    sites = inside.host.some_sites(model)
    assert sites == [f"{stack}.{i}" for stack in stacks for i in (0, 1)]
    captured(inside, model, inside.prompt(family, 1), inside.latent(family), sites)


# --- tokens ---


def streams(family, name, given):
    """Text and picture tokens that a block gets (text is None where it travels apart)."""
    if name.startswith("double"):
        return given["txt"], given["img"]
    if family == "Z-Image":  # both filled up to 32 or 64
        text = 0 if name.startswith("noise") else 32
        return given[0][:, :text], given[0][:, text : text + 48]
    if family in ("Flux", "HunyuanVideo", "Lumina"):
        return given[0][:, :8], given[0][:, 8:]
    if family == "SD3":
        return given[0], given[1]
    if family == "Qwen-Image":
        return given["encoder_hidden_states"], given["hidden_states"]
    return None, given[0]


def watched(inside, family, model, names, positive, latent, whole=False):
    """The streams that the blocks `names` get in the first step of sampling, or all that they get."""
    seen, handles = {}, []
    for name in names:

        def before(_module, args, kwargs, name=name):
            given = {**dict(enumerate(args)), **kwargs}
            seen[name] = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}

        block = model.model.diffusion_model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
    try:
        inside.sample(model, positive, latent=latent, seed=5)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[name] if whole else streams(family, name, seen[name]) for name in names]


@pytest.mark.parametrize(("family", "site", "following"), DITS)
def test_what_is_captured_of_a_block_are_its_picture_tokens_in_their_places(inside, family, site, following):
    model, latent = inside.model(family), inside.latent(family, PICTURES, 12, 16, 1 + 2 * (family == "Wan"))
    positive, negative = inside.prompt(family, 1), inside.prompt(family, 2)
    (_, img), (_, after) = watched(inside, family, model, [site, following], positive, latent)
    grid = (6 * (3 if family == "Wan" else 1), 8)
    sites = [site, f"{site} update"]
    (output, update), samples = captured(inside, model, positive, latent, sites, negative=negative, cfg=3.0)
    assert output.shape[3:] == grid
    close(output[0].flatten(2).transpose(1, 2), after)
    close(update[0].flatten(2).transpose(1, 2), after - img)
    assert torch.equal(samples, inside.sample(model, positive, negative, 3.0, latent, seed=5))


@pytest.mark.parametrize("ending", ["", " update"])
@pytest.mark.parametrize(("family", "site", "following"), DITS)
def test_steering_a_block_changes_its_picture_tokens_alone(inside, family, site, following, ending):
    model, latent, positive = inside.model(family), inside.latent(family, PICTURES, 12, 16), inside.prompt(family, 1)
    push = torch.randn(
        PICTURES, {"SD3": 64, "Z-Image": 288}.get(family, 48), 6, 8, generator=torch.Generator().manual_seed(6)
    )
    steered = inside.host.apply_site(model, site + ending, lambda h, _, images: h + push[images], "Steer")
    ((text, picture),) = watched(inside, family, model, [following], positive, latent)
    ((new_text, new_picture),) = watched(inside, family, steered, [following], positive, latent)
    torch.testing.assert_close(new_picture - picture, push.flatten(2).transpose(1, 2), atol=1e-3, rtol=1e-3)
    assert text is None or torch.equal(text, new_text)


def test_tokens_inside_a_u_net_lie_as_its_map_does(inside):
    """The last thing that a transformer does is to lay its tokens out and add them to its input."""
    model, latent = inside.model("SD1.5"), inside.latent("SD1.5", PICTURES, 24, 8)
    sites = ("output_blocks.9.1.proj_out update", "output_blocks.9.1 update", "output_blocks.9.1.transformer_blocks.0")
    with pytest.raises(inside.DiffLensError, match="no module"):
        captured(inside, model, inside.prompt("SD1.5", 1), latent, ["output_blocks.9.1.transformer_blocks.7"])
    (_, update, tokens), _ = captured(inside, model, inside.prompt("SD1.5", 1), latent, sites)
    project = model.model.diffusion_model.output_blocks[9][1].proj_out
    close(project(tokens[0].float()), update[0])
    assert tokens.shape == update.shape == (1, PICTURES, 32, 24, 8)


# Of a family reference pictures, a site, the block after it, and where in what that gets the picture's 48 tokens are.
REFERENCES = [
    ("Flux", {"reference_latents": [torch.ones(1, 16, 8, 8)]}, "double_blocks.0", "double_blocks.1", slice(0, 48)),
    ("Flux", {"reference_latents": [torch.ones(1, 16, 8, 8)]}, "single_blocks.0", "single_blocks.1", slice(8, 56)),
    ("HunyuanVideo", {"ref_latent": torch.ones(1, 16, 1, 12, 16)}, "double_blocks.0", "double_blocks.1", slice(48, 96)),
    ("HunyuanVideo", {"ref_latent": torch.ones(1, 16, 1, 12, 16)}, "single_blocks.0", "single_blocks.1",
     slice(56, 104)),
    ("Z-Image", {"reference_latents": [torch.ones(1, 16, 8, 8)]}, "noise_refiner.0", "noise_refiner.1", slice(32, 80)),
    ("Z-Image", {"reference_latents": [torch.ones(1, 16, 8, 8)]}, "layers.0", "layers.1", slice(96, 144)),
]  # fmt: skip


@pytest.mark.parametrize(("family", "reference", "site", "following", "place"), REFERENCES)
def test_tokens_of_reference_pictures_stay_out_of_it(inside, family, reference, site, following, place):
    pictures = 1 if family == "HunyuanVideo" else PICTURES  # of more with a reference the host makes an error
    model, latent = inside.model(family), inside.latent(family, pictures, 12, 16)
    ((tokens, more),) = inside.prompt(family, 1)
    positive = [[tokens, more | reference]]
    (found,), _ = captured(inside, model, positive, latent, [site], pictures=pictures)
    (plain,), _ = captured(inside, model, [[tokens, more]], latent, [site], pictures=pictures)
    assert found.shape == plain.shape and found.shape[3:] == (6, 8) and not torch.equal(found, plain)
    given = watched(inside, family, model, [following], positive, latent, whole=True)[0]
    close(found[0].flatten(2).transpose(1, 2), (given["img"] if "img" in given else given[0])[:, place])


def test_tokens_of_which_nobody_knows_the_pictures_are_refused(inside):
    with pytest.raises(inside.DiffLensError, match="8 tokens, the picture has 64, .* not known"):
        captured(
            inside, inside.model("Flux"), inside.prompt("Flux", 1), inside.latent("Flux"), ["double_blocks.0.txt_mlp"]
        )


def test_block_patches_of_other_nodes_compose_with_a_site(inside):
    """`patches_replace` wraps the block, and the site reads what the block itself puts out."""
    model, latent, positive = inside.model("Flux"), inside.latent("Flux"), inside.prompt("Flux", 1)
    doubled = model.clone()

    def twice(args, more):
        out = more["original_block"](args)
        return {"img": out["img"] * 2, "txt": out["txt"]}

    doubled.set_model_patch_replace(twice, "dit", "double_block", 0)
    (inner, outer), _ = captured(inside, doubled, positive, latent, ["double_blocks.0", "double_blocks.1"])
    (plain, plain_outer), _ = captured(inside, model, positive, latent, ["double_blocks.0", "double_blocks.1"])
    assert torch.equal(inner, plain) and not torch.equal(outer, plain_outer)


# --- from the capture to a steered picture ---

CHAINS = [
    ("SD1.5", "mid_block", 1), ("SD1.5", "middle_block", 2), ("SD1.5", "down_blocks.2.attentions.1 update", 1),
    ("SDXL", "mid_block", 1), ("SDXL", "up_blocks.0.attentions.1 update", 1), ("Flux", "double_blocks.1", 1),
    ("Flux", "single_blocks.0 update", 1), ("SD3", "transformer_blocks.1", 1), ("Wan", "blocks.0", 1),
    ("Qwen-Image", "transformer_blocks.0", 1), ("Lumina", "layers.0", 1), ("Z-Image", "layers.0 update", 1),
    ("HunyuanVideo", "double_blocks.1", 1),
]  # fmt: skip


def random_sae(inside, activations, kernel):
    """An SAE with random directions and the capture's own means."""
    module = inside.pack_module("difflens_core.sae.autoencoder")
    normalisation = module.fit_normalisation(activations)
    decoder = torch.nn.functional.normalize(torch.randn(96, activations.width * kernel**2), dim=1)
    zeros = torch.zeros(96), torch.zeros(decoder.shape[1])
    return module.SparseAutoencoder(
        decoder.clone(), zeros[0], decoder, zeros[1], normalisation, 8, activations.site, kernel=kernel
    )


@pytest.mark.parametrize(("family", "site", "kernel"), CHAINS)
def test_capture_probe_attribute_and_steer_at_every_kind_of_site(inside, family, site, kernel):
    torch.manual_seed(0)
    model, latent = inside.model(family), inside.latent(family, 4)
    positive, negative, classes = inside.prompt(family, 1), inside.prompt(family, 2), ("dark", "light")
    store = inside.host.capture(
        model, positive, latent, 8, 2, "euler", "normal", 5, (site,), negative=negative, cfg=3.0
    )
    inside.forget()
    activations, labels = store.activations(), torch.arange(8) % 2
    sae = random_sae(inside, activations, kernel)
    probes = inside.pack_module("difflens_core.locate").train_probes(activations, sae, labels, "tone", classes)
    attribute = inside.pack_module("difflens_core.locate").attribute_features
    found = attribute(activations, sae, probes, labels)
    assert attribute(activations, sae, probes, labels, "integrated gradients").completeness < 1e-4
    steer = inside.pack_module("difflens_core.steer")
    path = inside.host.temporary_file("chain.safetensors")
    steer.save_recipe(path, steer.build_recipe(found, sae, probes, activations, labels, count=10))
    recipe = steer.load_recipe(path)
    assert recipe.site == site and recipe.kernel == kernel
    latent = inside.latent(family)
    plain = inside.sample(model, positive, negative, 3.0, latent, 2)
    for mode in ("shift", "scale"):
        settings = steer.with_settings(recipe, mode=mode, strength=3.0)
        steered = inside.host.apply_site(model, site, steer.Steering(settings, lambda images: images % 2), "Steer")
        drawn = inside.sample(steered, positive, negative, 3.0, latent, 2)
        assert not torch.equal(drawn, plain) and torch.isfinite(drawn).all()
