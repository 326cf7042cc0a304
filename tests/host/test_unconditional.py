"""Unconditional models of other programs in a real ComfyUI: sampled as their own programs sample them, and steered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from graphs import Graph, Node, steer, to_api
from host import HostError, Server
from safetensors.torch import load_file, save_file

from difflens_core.activations import edit_site
from difflens_core.classifiers import AttributeClassifier, save_classifier
from difflens_core.files import fingerprint
from difflens_core.networks import AdmConfig
from difflens_core.steer import Steering, load_recipe, save_recipe
from difflens_core.targets import Targets

# 2 x 2 and 8 x 8 maps in the middle; heads that the habit of the trainers gives (four).
SMALL = AdmConfig(
    model_channels=32, channels=(32, 32, 64, 64), attention=(2,), head_channels=0, heads=4, resblock_updown=False
)
SCHEDULERS = {
    "epsilon": {"prediction_type": "epsilon"},
    "v_prediction": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    "sample": {"prediction_type": "sample", "num_train_timesteps": 250, "timestep_spacing": "trailing"},
}
CLASSES = {"epsilon": None, "v_prediction": None, "sample": 3}


@pytest.fixture(scope="session")
def folder(server: Server) -> Path:
    path = server.base / "models" / "difflens_models"
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def adm(folder, toys):
    """A class-conditional ADM, as guided-diffusion saves it."""
    model = toys.adm(replace(SMALL, classes=3))
    torch.save(model.state_dict(), folder / "ema_0.9999_000100.pt")
    return model


@pytest.fixture(scope="session")
def unet2ds(folder, toys) -> dict:
    """diffusers' models by what they predict, as folders."""
    made = {}
    for prediction, settings in SCHEDULERS.items():
        made[prediction] = toys.unet2d(num_class_embeds=CLASSES[prediction])
        made[prediction].save_pretrained(folder / prediction)
        DDIMScheduler(**settings).save_pretrained(folder / prediction)
    return made


class Custom(Graph):
    """A graph of SamplerCustoms."""

    def __init__(self, pictures: int = 2, size: int = 16):
        super().__init__("custom")
        self.group("all")
        self.latent = self.add("EmptyLatentImage", width=size, height=size, batch_size=pictures)

    def load(self, name: str, **settings: object) -> Node:
        return self.add("DiffLensLoadModel", model_name=name, **settings)

    def sample(
        self, loaded: Node, steps: int, spacing: str = "ddim", sampler: Node | None = None, model=None, positive=None
    ) -> Node:
        sigmas = self.add("DiffLensDDIMSigmas", model=loaded[0], steps=steps, spacing=spacing)
        sampler = sampler or self.add("KSamplerSelect", sampler_name="euler")
        positive = positive or loaded[1]
        drawn = self.add(
            "SamplerCustom", model=model or loaded[0], add_noise=True, noise_seed=5, cfg=1.0, positive=positive,
            negative=positive, sampler=sampler[0], sigmas=sigmas[0], latent_image=self.latent[0],
        )  # fmt: skip
        return self.add("SaveLatent", samples=drawn[0], filename_prefix="latents/custom")


def run(server: Server, graph: Graph, *saved: Node) -> list[torch.Tensor]:
    entry = server.run(to_api(graph), timeout=900)
    references = [entry["outputs"][str(node.id)]["latents"][0] for node in saved]
    return [load_file(server.output_dir / r["subfolder"] / r["filename"])["latent_tensor"] for r in references]


def noise(pictures: int = 2, size: int = 16, seed: int = 5) -> torch.Tensor:
    return torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(seed))


def ddim(predict, x: torch.Tensor, steps: int, scheduler: DDIMScheduler) -> torch.Tensor:
    """diffusers' DDIM with the direction taken from the clipped picture, as guided-diffusion does."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x, use_clipped_model_output=True).prev_sample
    return x


# --- parity ---


def test_diffusers_models_are_sampled_as_by_diffusers_own_pipeline(server, unet2ds):
    graph = Custom()
    loaded = {name: graph.load(name) for name in unet2ds}
    spacing = {"epsilon": "leading", "v_prediction": "leading", "sample": "trailing"}
    saved = [graph.sample(node, 10, spacing[name]) for name, node in loaded.items()]
    report = graph.add("PreviewAny", source=loaded["sample"][3])
    found = dict(zip(unet2ds, run(server, graph, *saved), strict=True))
    for name in ("epsilon", "v_prediction"):
        pipeline = DDIMPipeline(unet2ds[name], DDIMScheduler(**SCHEDULERS[name]))
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        pictures = pipeline(2, generator, 0.0, 10, use_clipped_model_output=True, output_type="pt").images
        torch.testing.assert_close((found[name] / 2 + 0.5).clamp(0, 1), pictures, atol=1e-4, rtol=0)
        assert float(pictures.std()) > 0.05
    # The pipeline knows no classes.
    label = torch.zeros(2, dtype=torch.long)
    expected = ddim(
        lambda x, t: unet2ds["sample"](x, t, label).sample, noise(), 10, DDIMScheduler(**SCHEDULERS["sample"])
    )
    torch.testing.assert_close(found["sample"], expected, atol=1e-4, rtol=0)
    text = server.run(to_api(graph), timeout=900)["outputs"][str(report.id)]["text"][0]
    assert "diffusers UNet2DModel" in text and "250 timesteps" in text and "predicts sample" in text


def test_an_adm_is_sampled_as_its_formulas_say_with_the_class_that_was_asked_for(server, adm):
    graph = Custom()
    loaded = [graph.load("ema_0.9999_000100.pt", class_label=label) for label in (0, 2)]
    saved = [graph.sample(node, 50) for node in loaded]
    found = run(server, graph, *saved)
    for label, latents in zip((0, 2), found, strict=True):
        y = torch.full((2,), label)
        expected = ddim(lambda x, t, y=y: adm(x, t.expand(2), y)[:, :3], noise(), 50, DDIMScheduler())
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    assert float((found[0] - found[1]).abs().max()) > 0.05


def test_shares_of_the_sampling_are_right_for_models_with_fewer_timesteps(server, unet2ds):
    """The class changes half way, which ComfyUI's own reckoning for 1000 timesteps would put at the very start."""
    graph = Custom()
    first, second = (graph.load("sample", class_label=label) for label in (0, 1))
    parts = [
        graph.add("ConditioningSetTimestepRange", conditioning=node[1], start=start, end=start + 0.5)
        for node, start in ((first, 0.0), (second, 0.5))
    ]
    both = graph.add("ConditioningCombine", conditioning_1=parts[0][0], conditioning_2=parts[1][0])
    (found,) = run(server, graph, graph.sample(first, 10, "trailing", positive=both[0]))

    def predict(x, t):
        return unet2ds["sample"](x, t, torch.full((2,), int(t < 249 / 2))).sample

    expected = ddim(predict, noise(), 10, DDIMScheduler(**SCHEDULERS["sample"]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# --- in this process: what no graph shows of a MODEL ---


@dataclass
class Hosted:
    """A model as the host loads it, and the network that was saved."""

    model: object
    network: torch.nn.Module
    sites: dict[str, int]  # those that are proposed, with their widths


@pytest.fixture(scope="module", params=["ADM", "UNet2D"])
def hosted(inside, toys, tmp_path_factory, request) -> Hosted:
    folder = tmp_path_factory.mktemp("hosted")
    if request.param == "ADM":
        network, path = toys.adm(SMALL), folder / "plain.pt"
        torch.save(network.state_dict(), path)
        widths = (32, 32, 64, 64, 64, 32, 32)
        names = [f"input_blocks.{i}" for i in (2, 4, 7)], [f"output_blocks.{i}" for i in (2, 4, 7)]
    else:
        network, path, widths = toys.unet2d(), folder / "unet2d", (32, 64, 64, 64, 32)
        network.save_pretrained(path)
        names = [f"down_blocks.{i}.resnets.0" for i in (0, 1)], [f"up_blocks.{i}.resnets.1" for i in (0, 1)]
    sites = dict(zip((*names[0], "middle_block", *names[1]), widths, strict=True))
    return Hosted(inside.host.load_model(str(path))[0], network, sites)


def draw(inside, model) -> torch.Tensor:
    nothing = inside.host.unconditional_conditioning()
    return inside.sample(model, nothing, latent={"samples": torch.zeros(2, 3, 16, 16)}, steps=3)


def test_every_proposed_site_steers_and_its_width_is_known(inside, hosted):
    assert {site: inside.host.site_width(hosted.model, site) for site in inside.host.some_sites(hosted.model)} == (
        hosted.sites
    )
    plain = draw(inside, hosted.model)
    for site in hosted.sites:
        edited = inside.host.apply_site(hosted.model, site, lambda h, progress, images: h * 1.5, "Test")
        assert not torch.equal(draw(inside, edited), plain), site


def test_the_mark_of_a_model_is_that_of_its_file_with_and_without_a_lora(inside, hosted):
    for model in (hosted.model, inside.with_lora(hosted.model)):
        assert inside.host.model_fingerprint(model) == fingerprint(hosted.network.state_dict())


def test_a_second_copy_of_the_network_draws_the_same(inside, hosted):
    copy = hosted.model.clone(force_deepcopy=True)
    assert copy.model.diffusion_model is not hosted.model.model.diffusion_model
    assert torch.equal(draw(inside, copy), draw(inside, hosted.model))


def test_the_network_runs_in_half_precision_as_on_a_gpu(inside, hosted):
    network = hosted.model.clone(force_deepcopy=True).model.diffusion_model.half()
    with torch.inference_mode():
        found = network(torch.randn(1, 3, 16, 16).half(), torch.tensor([7.0]), transformer_options={})
    assert found.dtype == torch.float16 and found.isfinite().all()
    assert hosted.model.model_dtype() == torch.float32, "on a processor"


def test_the_memory_of_an_evaluation_and_the_shares_of_the_sampling_are_told(inside, hosted):
    assert 2 * 64 * 64 * 4 * 100 < hosted.model.memory_required([2, 3, 64, 64]) < 2 * 64 * 64 * 4 * 1000
    sampling = hosted.model.get_model_object("model_sampling")
    assert float(sampling.timestep(torch.tensor(sampling.percent_to_sigma(0.5)))) in (499, 500)
    assert sampling.percent_to_sigma(0.0) > float(sampling.sigma_max) and sampling.percent_to_sigma(1.0) == 0


# --- the reference's sampling ---


@pytest.fixture(scope="session")
def recipe(server, toys):
    """A recipe for `plain.pt`."""
    path = server.base / "models" / "difflens_recipes" / "for_adm.safetensors"
    made = replace(toys.recipe(width=64), site="middle_block", model="", mode="add own fixed", strength=(6.0,) * 3)
    save_recipe(path, made)
    return load_recipe(path)


def test_the_reference_sampling_is_the_published_one(server, toys, folder, recipe):
    """Two passes a step, noise by picture, the ends unedited; written here in the variance-preserving form."""
    model, steps = toys.adm(SMALL), 6
    torch.save(model.state_dict(), folder / "plain.pt")
    graph = Custom(pictures=3)
    loaded = graph.load("plain.pt")
    steered = steer(graph, None, loaded[0], graph.add("DiffLensLoadRecipe", recipe_name="for_adm.safetensors")[0])
    two_passes = {eta: graph.add("DiffLensReferenceSampler", eta=eta) for eta in (0.0, 1.0)}
    saved = [
        graph.sample(loaded, steps, "leading", two_passes[eta], m) for eta in two_passes for m in (None, steered[0])
    ]
    *found, plain = run(server, graph, *saved, graph.sample(loaded, steps, "leading"))
    torch.testing.assert_close(found[0], plain, atol=1e-4, rtol=0)

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    a = scheduler.alphas_cumprod.double()
    edit, images = Steering(recipe, Targets("age", recipe.classes, (1 / 3,) * 3).of), torch.arange(3)
    for number, (eta, edited) in enumerate([(0.0, False), (0.0, True), (1.0, False), (1.0, True)]):
        x = noise(3).double()
        generators = [torch.Generator().manual_seed(5 + 2**62 + picture) for picture in range(3)]
        for step, t in enumerate(scheduler.timesteps.tolist()):
            now, then = float(a[t]), float(a[t - 166]) if step < steps - 1 else 1.0

            def clean(t=t, x=x, now=now):
                epsilon = model(x.float(), torch.full((3,), float(t)))[:, :3].double()
                return ((x - (1 - now) ** 0.5 * epsilon) / now**0.5).clamp(-1, 1)

            unedited = goal = clean()
            if edited and 0 < step < steps - 1:
                with edit_site(model, "middle_block", lambda h, t=t: edit(h, round(1 - t / 999, 6), images)):
                    goal = clean()
            spread = eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
            direction = (x - now**0.5 * unedited) / (1 - now) ** 0.5
            fresh = torch.stack([torch.randn(3, 16, 16, generator=g) for g in generators])
            x = then**0.5 * goal + (1 - then - spread**2) ** 0.5 * direction + spread * fresh
        torch.testing.assert_close(found[number].double(), x, atol=2e-4, rtol=0)
    for unsteered, with_recipe in ((found[0], found[1]), (found[2], found[3])):
        assert float((unsteered - with_recipe).abs().max()) > 0.01


def test_the_reference_sampling_of_a_flow_model_without_noise_is_euler(server):
    graph = Custom(pictures=2, size=64)
    loaded = graph.load("avatars.safetensors")
    reference = graph.add("DiffLensReferenceSampler", eta=0.0)
    found = run(server, graph, *(graph.sample(loaded, 4, "trailing", node) for node in (reference, None)))
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)
    assert float(found[0].std()) > 0.1


# --- the whole way ---


SAMPLE = {"prediction_type": "sample"}  # a random network's noise would make every picture black and white


@pytest.fixture(scope="session")
def classifier(server, toys) -> str:
    """A random classifier that splits the pictures of `plain.pt` in two halves."""
    torch.manual_seed(3)
    model, network = (
        AttributeClassifier({"look": ("one", "other")}, size=32).eval().requires_grad_(False),
        toys.adm(SMALL),
    )
    x = ddim(lambda x, t: network(x, t.expand(16))[:, :3], noise(16, 64, 0), 3, DDIMScheduler(**SAMPLE))
    logits = model(torch.nn.functional.interpolate(x, (32, 32), mode="bilinear", antialias=True))["look"]
    model.heads["look"].bias[1] += (logits[:, 0] - logits[:, 1]).median()
    save_classifier(server.base / "models" / "difflens_classifiers" / "look.safetensors", model, {})
    return "look.safetensors"


def test_an_adm_can_be_captured_attributed_and_steered(server, folder, toys, classifier):
    """Up to a recipe, which then changes the pictures as the core says."""
    network = toys.adm(SMALL)
    torch.save(network.state_dict(), folder / "plain.pt")
    graph = Custom(pictures=4, size=64)
    model = graph.load("plain.pt", prediction="sample")
    captured = graph.add(
        "DiffLensCapture", model=model[0], positive=model[1], latent_image=graph.latent[0], vae=model[2], pictures=16,
        steps=3, sampler_name="euler", scheduler="ddim_uniform", seed=0, site="middle_block",
    )  # fmt: skip
    sae = graph.add(
        "DiffLensTrainSAE", activations=captured[0], latents=128, k=8, steps=60, batch_size=256, learning_rate=0.001,
        seed=0, save_as="",
    )  # fmt: skip
    reads = graph.add("DiffLensLoadClassifier", classifier_name=classifier)
    labels = graph.add("DiffLensClassify", images=captured[1], classifier=reads[0], attribute="look")
    probes = graph.add("DiffLensTrainProbes", activations=captured[0], sae=sae[0], labels=labels[0])
    found = graph.add(
        "DiffLensAttribute", model=model[0], activations=captured[0], sae=sae[0], probes=probes[0], labels=labels[0],
        method="contrastive", features_per_class=10,
    )  # fmt: skip
    graph.add("DiffLensSaveRecipe", recipe=found[0], name="from_adm")
    steered = steer(graph, None, model[0], found[0], "other", 5.0)
    steered.inputs |= {"mode": "add", "hold": "off"}
    saved = [graph.sample(model, 4, "leading", model=m) for m in (model[0], steered[0])]
    plain, edited = run(server, graph, *saved)

    recipe = load_recipe(server.base / "models" / "difflens_recipes" / "from_adm.safetensors")
    assert (recipe.site, recipe.width, recipe.model) == ("middle_block", 64, fingerprint(network.state_dict()))
    assert recipe.classes == ("one", "other") and recipe.member.sum(dim=1).tolist() == [10, 10]
    edit = Steering(replace(recipe, mode="add", strength=(5.0, 5.0)), Targets("look", recipe.classes, (0.0, 1.0)).of)

    def predict(x, t):
        at = round(1 - float(t) / 999, 6)
        with edit_site(network, "middle_block", lambda h: edit(h, at, torch.arange(4))):
            return network(x, t.expand(4))[:, :3]

    expected = ddim(predict, noise(4, 64), 4, DDIMScheduler(**SAMPLE))
    torch.testing.assert_close(edited, expected, atol=1e-3, rtol=0)
    assert float((edited - plain).abs().max()) > 0.05


# --- bad input ---


def bad(name: str, size: int = 16, steps: int = 4, **settings: object) -> Graph:
    graph = Custom(size=size)
    graph.sample(graph.load(name, **settings), steps)
    return graph


BAD = {
    "half a file": (
        lambda: bad("half.pt"),
        ("Load Unconditional Model: half.pt", "cut off: copy or download it again"),
    ),
    "a LoRA": (lambda: bad("lora.safetensors"), ("lora.safetensors: this is a LoRA, not a model.", "Load LoRA")),
    "an SD U-Net": (lambda: bad("sd.safetensors"), ("sd.safetensors: this is the U-Net", "Use Load Diffusion Model")),
    "an SAE": (lambda: bad("sae.safetensors"), ("sae.safetensors: this is a DiffLens sae file. Use Load SAE",)),
    "code in a pickle": (lambda: bad("danger.pt"), ("danger.pt: holds pickled objects", "never loaded")),
    "another size": (lambda: bad("deep.pt", size=24), ("multiples of 16 pixels", "3 x 24 x 24", "Empty Latent Image")),
    "a class too many": (
        lambda: bad("ema_0.9999_000100.pt", class_label=3),
        ("class_label is 3, the model has classes 0 to 2",),
    ),
    "steps that do not go in": (lambda: bad("plain.pt", steps=60), ("DDIM Sigmas: ", "Use 59 or 63 steps")),
}


class Danger:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.fixture(scope="session")
def bad_models(folder, toys, adm) -> None:
    torch.save(toys.adm(SMALL).state_dict(), folder / "plain.pt")
    torch.save(toys.adm(replace(SMALL, channels=(32, 32, 64, 64, 64))).state_dict(), folder / "deep.pt")
    whole = (folder / "plain.pt").read_bytes()
    (folder / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"a": torch.ones(1), "b": Danger()}, folder / "danger.pt")
    save_file({"lora_unet_mid.lora_up.weight": torch.ones(2, 2)}, folder / "lora.safetensors")
    save_file({"middle_block.1.transformer_blocks.0.norm1.weight": torch.ones(2)}, folder / "sd.safetensors")
    shipped = Path(__file__).resolve().parents[2] / "models" / "avatars" / "difflens_saes" / "avatars.safetensors"
    (folder / "sae.safetensors").write_bytes(shipped.read_bytes())


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named_in_one_sentence(server, bad_models, what):
    make, words = BAD[what]
    with pytest.raises(HostError) as caught:
        server.run(to_api(make()), timeout=600)
    for word in words:
        assert word in str(caught.value)
