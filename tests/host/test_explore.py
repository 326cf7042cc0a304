"""Site Scan, Rank by Effect and captures: on small networks in this process (see `inside.py`), and on the avatars."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from expected import shipped
from graphs import to_api
from small_graphs import AVATARS, Avatars, cancel_in, image_of, text_of

from difflens_core.steer import load_recipe

STEPS, PICTURES, SEED, CFG = 2, 3, 5, 3.0
SCHEDULE = ("euler", "normal")
SITES = {
    "SD1.5": [
        "input_blocks.3.0", "input_blocks.6.0", "input_blocks.11.0", "middle_block",
        "output_blocks.3.1", "output_blocks.6.1", "output_blocks.11.1",
    ],
    "SDXL": [
        "input_blocks.2.0", "input_blocks.4.1", "input_blocks.8.1", "middle_block",
        "output_blocks.2.2", "output_blocks.4.1", "output_blocks.8.0",
    ],
    "avatars": [
        "encoder", "down", "middle_block.0", "middle_block", "after_middle.0", "after_middle", "up", "decoder.0",
        "decoder",
    ],
}  # fmt: skip
SITES["SDXL without a middle"] = [site for site in SITES["SDXL"] if site != "middle_block"]


@dataclass
class Given:
    """What is sampled; the batch is smaller than the number of pictures."""

    model: object
    positive: list
    negative: list
    latent: dict

    def draw(self, inside, cfg: float = CFG) -> torch.Tensor:
        """What a stock KSampler draws from one batch of all pictures."""
        start = {"samples": self.latent["samples"][:1].repeat(PICTURES, 1, 1, 1)}
        return inside.sample(self.model, self.positive, self.negative, cfg, start, STEPS, seed=SEED)

    def drawer(self, inside, negative: list | None, cfg: float):
        vae = inside.host.pixel_space_vae()
        return inside.host.drawer(
            self.model, self.positive, self.latent, vae, PICTURES, STEPS, *SCHEDULE, SEED, "Scan", negative, cfg
        )


@pytest.fixture(scope="module", params=[*SITES])
def given(inside, request) -> Given:
    kind = request.param
    if kind == "avatars":
        nothing = inside.host.unconditional_conditioning()
        latent = {"samples": torch.zeros(2, 3, 64, 64)}
        return Given(
            inside.host.load_unconditional(str(AVATARS / "difflens_models" / "avatars.safetensors")),
            nothing,
            nothing,
            latent,
        )
    family = kind.partition(" ")[0]
    model = inside.model(family)
    if family != kind:
        make, sizes, _ = inside.SMALL[family]
        model = inside.random_model(make, sizes | {"transformer_depth_middle": -2})
    return Given(model, inside.prompt(family, 1), inside.prompt(family, 2), inside.latent(family))


@pytest.fixture
def sites(inside, given, request) -> list[str]:
    """Those that the host proposes, which must be those that are written down here."""
    found = inside.host.some_sites(given.model)
    assert found == SITES[request.node.callspec.params["given"]]
    return found


def hook(model, site: str, change):
    """A plain forward hook; ComfyUI's U-Net never calls its middle block itself, but the modules in it."""
    module = model.model.diffusion_model.get_submodule(site)
    return (module[-1] if isinstance(module, torch.nn.Sequential) else module).register_forward_hook(change)


@dataclass
class Mirror:
    """Edit that adds to each picture its mirror image, times another factor each.

    Not merely a louder picture: the norm behind the last block would undo that.
    """

    site: str

    def __call__(self, h: torch.Tensor, progress: float, images: torch.Tensor) -> torch.Tensor:
        assert 0 <= progress <= 1
        return mirrored(h, 0.5 * (1 + images))


def mirrored(h: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return h + factors[:, None, None, None] * h.flip(-1)


def test_every_proposed_site_is_captured(inside, given, sites):
    """Guided and in batches of 2, against plain hooks and one batch, whose second half is the positive's."""
    store = inside.host.capture(
        given.model, given.positive, given.latent, PICTURES, STEPS, *SCHEDULE, SEED, tuple(sites), dtype="bfloat16",
        negative=given.negative, cfg=CFG,
    )  # fmt: skip
    inside.forget()
    seen = {site: [] for site in sites}
    with ExitStack() as stack:
        for site in sites:
            keep = hook(given.model, site, lambda _module, _inputs, h, site=site: seen[site].append(h[PICTURES:]))
            stack.callback(keep.remove)
        drawn = given.draw(inside)
    torch.testing.assert_close(store.samples(), drawn, atol=1e-3, rtol=1e-3)
    for site in sites:
        expected, found = torch.stack(seen[site]), store.activations(site).values.float()
        assert found.shape == expected.shape and expected.std() > 0.01, site
        torch.testing.assert_close(found, expected, atol=2e-2 * float(expected.std()), rtol=1e-2, msg=site)


def test_every_proposed_site_is_edited_while_sampling_with_guidance(inside, given, sites):
    draw, numbers, vae = (
        given.drawer(inside, given.negative, CFG),
        torch.arange(PICTURES),
        inside.host.pixel_space_vae(),
    )
    plain = vae.decode(given.draw(inside))
    for site in sites:

        def mirror(_module, _inputs, h):
            return torch.cat([h[:PICTURES], mirrored(h[PICTURES:], 0.5 * (1 + numbers))])

        handle = hook(given.model, site, mirror)
        expected = vae.decode(given.draw(inside))
        handle.remove()
        found = draw([Mirror(site)], numbers)
        torch.testing.assert_close(found, expected, atol=3e-3, rtol=0, msg=site)
        assert float((found - plain).abs().amax(dim=(1, 2, 3)).min()) > 0.01, site
    assert torch.equal(draw([], numbers), plain)
    with pytest.raises(inside.DiffLensError, match="cfg is 3, .* none is connected"):
        given.drawer(inside, None, CFG)


class Tone:
    """Classifier that tells light pictures from dark ones."""

    def __init__(self, middle: torch.Tensor):
        self.attributes, self.middle = {"tone": ("dark", "light")}, middle

    def classify(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        light = (100 * (images.mean(dim=(1, 2, 3)) - self.middle)).sigmoid()
        return {"tone": torch.stack([1 - light, light], dim=1)}


def test_site_scan_tries_every_proposed_site_with_guidance(inside, given, sites):
    vae, scan = inside.host.pixel_space_vae(), inside.pack_module("nodes.explore").SiteScan
    start = given.latent["samples"][:1].repeat(6, 1, 1, 1)
    drawn = inside.sample(given.model, given.positive, given.negative, CFG, {"samples": start}, STEPS, seed=SEED)
    classifier = Tone(vae.decode(drawn).mean(dim=(1, 2, 3)).median() + 1e-6)
    table, _, chart = scan.execute(
        given.model, given.positive, given.latent, vae, classifier, "tone", "", 6, 1, 1.0, STEPS, *SCHEDULE, SEED,
        given.negative, CFG,
    ).result  # fmt: skip
    inside.forget()
    parts = inside.pack_module("difflens_core.experiments.scan").PARTS
    rows = [line.split("  ")[0] for line in table.splitlines()]
    assert all(rows.count(site) == len(parts) for site in sites), table
    together = [row.count(" + ") for row in rows if " + " in row]
    assert together in ([], [1], [1, 2]), "the best two and three, until all pictures turn"
    assert chart.shape[-1] == 3 and chart.std() > 0


def patched(model, strength: float, seed: int = 4):
    """A clone with a LoRA on one weight."""
    from comfy.weight_adapter import LoRAAdapter

    draw, clone = torch.Generator().manual_seed(seed), model.clone()
    up, down = torch.randn(32, 2, generator=draw), torch.randn(2, 288, generator=draw)
    key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    assert clone.add_patches({key: LoRAAdapter(set(), (up, down, 2.0, None, None, None))}, strength) == [key]
    return clone


def test_a_capture_is_only_gone_on_with_by_a_model_with_the_same_patches(inside, tmp_path):
    host, model = inside.host, inside.model("SD1.5")
    mark = host.patches_mark(patched(model, 0.5))
    assert host.patches_mark(model) == "" and host.patches_mark(patched(model, 0.5)) == mark
    edited = [host.apply_site(model, site, Mirror(site), "Scan") for site in ("middle_block", "input_blocks.3.0")]
    again = host.apply_site(model, "middle_block", Mirror("middle_block"), "Scan")
    assert host.patches_mark(again) == host.patches_mark(edited[0])
    others = [patched(model, 0.6), patched(model, 0.5, seed=6), *edited, model]
    assert len({mark, *map(host.patches_mark, others)}) == 6

    def capture(by) -> torch.Tensor:
        store = host.capture(
            by, inside.prompt("SD1.5", 1), inside.latent("SD1.5"), PICTURES, STEPS, *SCHEDULE, SEED, ("middle_block",),
            folder=tmp_path / "store",
        )  # fmt: skip
        inside.forget()
        return store.samples()

    first = capture(patched(model, 0.5))
    assert torch.equal(capture(patched(model, 0.5)), first)
    for other in (model, patched(model, 0.6)):
        with pytest.raises(inside.DiffLensError, match=f"begun with other settings: patches {mark}, now"):
            capture(other)


# --- on a server ---


def test_the_site_scan_finds_sites_by_itself_and_shows_that_they_steer(server):
    graph = Avatars(pictures=16)
    scan = graph.experiment("DiffLensSiteScan", attribute="age", sites="", pictures=48, per_class=1, strength=1.0)
    words, numbers = graph.show(scan[0]), graph.show(scan[1])
    entry = server.run(to_api(graph))
    rows = json.loads(text_of(entry, numbers))["rows"]
    assert list(dict.fromkeys(row["site"] for row in rows)) == SITES["avatars"]
    whole = {row["site"]: row["success"] for row in rows if row["part"] == "whole"}
    assert whole["middle_block"] >= 0.5
    assert all(row["success"] <= 0.5 for row in rows if row["part"] == "reversed")
    assert len(text_of(entry, words).splitlines()) == 2 + len(rows) == 2 + 5 * 9
    assert image_of(server, entry, scan).shape == (440, 720, 3)


def test_features_are_ranked_by_their_effect(server):
    graph = Avatars(pictures=32)
    ranked = graph.experiment(
        "DiffLensRankByEffect", recipe=graph.recipe("avatars_presentation"), change="amplify", strength=5.0,
        pictures=2, features_per_class=7,
    )  # fmt: skip
    graph.add("DiffLensSaveRecipe", recipe=ranked[0], name="by_effect")
    table = graph.show(ranked[2])
    entry = server.run(to_api(graph), timeout=600)
    assert len(text_of(entry, table).splitlines()) == 2 + len(shipped("presentation").features)
    kept = load_recipe(server.base / "models" / "difflens_recipes" / "by_effect.safetensors")
    assert kept.member.sum(dim=1).tolist() == [7, 7] and kept.info["ranking"] == "amplify, 2 pictures a feature"
    assert set(kept.features.tolist()) < set(shipped("presentation").features.tolist())


def test_a_scan_can_be_cancelled(server):
    graph = Avatars()
    scan = graph.experiment(
        "DiffLensSiteScan", attribute="age", sites="middle_block", pictures=2000, per_class=2, strength=1.0
    )
    cancel_in(server, graph, scan)


def test_experiments_refuse_exactly_the_samplers_that_treat_equal_noises_unlike(inside):
    """Two equal noises in one batch come out alike, or the sampler is refused."""
    check = inside.pack_module("nodes.host.sampling").check_noiseless
    model, positive = inside.model("U-Net"), inside.prompt("U-Net", 1)
    given = {"latent": inside.latent("U-Net"), "steps": 3, "noise": torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1)}
    for sampler in ("euler", "dpmpp_2m", "res_multistep", "uni_pc", "ddim", "euler_ancestral", "dpmpp_sde", "lcm"):
        drawn = inside.sample(model, positive, sampler=sampler, **given)
        if (drawn[0] - drawn[1]).abs().max() > 1e-3 * drawn.std():
            with pytest.raises(inside.DiffLensError, match=f"sampler {sampler} adds noise"):
                check(sampler)
        else:
            check(sampler)
