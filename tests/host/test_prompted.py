"""The model that draws by prompt, loaded by our node and driven by ComfyUI's own CLIP Text Encode and KSampler."""

from __future__ import annotations

import re

import pytest
import torch
from graphs import FOLDER, Graph, Node, sampler, steer, to_api
from host import HostError
from small_graphs import latents

from difflens_core.activations import Kept, open_store
from difflens_core.classifiers import AttributeClassifier, load_classifier, save_classifier
from difflens_core.networks import Guidance, TextEncoder, load_prompted, sample, save_denoiser, start_noise
from difflens_core.steer import Steering, load_recipe
from difflens_core.targets import Targets

FILES = FOLDER.parent / "models" / "prompted_avatars"
CFG, STEPS, SEED = 2.0, 4, 5


class Prompts(Graph):
    """A graph with the prompted avatars loaded."""

    def __init__(self, pictures: int = 2):
        super().__init__("prompts")
        self.group("all")
        self.model = self.add("DiffLensLoadPromptedModel", model_name="prompted_avatars.safetensors")
        self.latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=pictures)

    def text(self, prompt: str) -> Node:
        return self.add("CLIPTextEncode", text=prompt, clip=self.model[1])

    def draw(self, prompt: str, cfg: float = CFG, model: Node | None = None) -> Node:
        drawn = sampler(
            self, None, (model or self.model)[0], self.text(prompt)[0], self.latent, SEED, self.text("")[0], cfg
        )
        drawn.inputs["steps"] = STEPS
        return self.add("SaveLatent", samples=drawn[0], filename_prefix="latents/prompted")


def drawn_by_the_core(prompt: str, cfg: float = CFG, edits: tuple = ()) -> torch.Tensor:
    model, text = load_prompted(FILES / "difflens_models" / "prompted_avatars.safetensors")
    guidance = Guidance(text.encode([prompt]), text.encode([""]), cfg)
    return sample(model, start_noise(2, SEED), STEPS, edits, guidance=guidance)


def test_stock_nodes_draw_what_the_core_draws(server):
    graph = Prompts()
    nurse, doctor, unguided = graph.draw("portrait of a nurse"), graph.draw("a doctor"), graph.draw("a doctor", 1.0)
    entry = server.run(to_api(graph))
    for node, how in ((nurse, ("portrait of a nurse",)), (doctor, ("a doctor",)), (unguided, ("a doctor", 1.0))):
        found = latents(server, entry, node).clamp(-1, 1)
        torch.testing.assert_close(found, drawn_by_the_core(*how), atol=2e-3, rtol=0)
    assert not torch.allclose(latents(server, entry, nurse), latents(server, entry, doctor), atol=0.2)


def test_steering_a_prompt_equals_the_core(server):
    graph = Prompts()
    recipe = graph.add("DiffLensLoadRecipe", recipe_name="prompted_avatars_age.safetensors")
    steered = graph.draw("a doctor", model=steer(graph, None, graph.model[0], recipe[0]))
    plain = graph.draw("a doctor")
    entry = server.run(to_api(graph))
    recipe = load_recipe(FILES / "difflens_recipes" / "prompted_avatars_age.safetensors")
    targets = Targets(recipe.attribute, recipe.classes, (1 / 3,) * 3)
    found = latents(server, entry, steered)
    expected = drawn_by_the_core("a doctor", edits=(Steering(recipe, targets.of),))
    torch.testing.assert_close(found.clamp(-1, 1), expected, atol=5e-3, rtol=0)
    assert not torch.allclose(found, latents(server, entry, plain), atol=0.1)


def test_words_can_be_weighed(server):
    graph = Prompts()
    prompts = ("a nurse", "a (nurse:1.0)", "a (nurse:1.5)", "a (nurse:0.0)")
    saved = [graph.draw(prompt) for prompt in prompts]
    entry = server.run(to_api(graph))
    plain, one, more, none = (latents(server, entry, node) for node in saved)
    assert torch.equal(plain, one) and not torch.allclose(plain, more, atol=1e-2)
    assert not torch.allclose(plain, none, atol=0.1)


def test_a_long_prompt_is_read_to_its_end(server):
    graph = Prompts()
    words = "a " * 20
    saved = [graph.draw(words + end) for end in ("doctor", "nurse")]
    entry = server.run(to_api(graph))
    assert not torch.allclose(*(latents(server, entry, node) for node in saved), atol=0.1)


def test_files_and_texts_of_other_models_are_refused(server):
    for node, name, expected in (
        ("DiffLensLoadPromptedModel", "avatars", "draws without prompts. Load it with Load Unconditional Model"),
        ("DiffLensLoadModel", "prompted_avatars", "draws by prompt. Load it with Load Prompted Model"),
    ):
        graph = Graph("wrong")
        graph.group("all")
        loaded = graph.add(node, model_name=f"{name}.safetensors")
        latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
        text = loaded[1] if node.endswith("LoadModel") else graph.add("CLIPTextEncode", text="", clip=loaded[1])[0]
        drawn = sampler(graph, None, loaded[0], text, latent, 0)
        graph.add("SaveLatent", samples=drawn[0], filename_prefix="latents/wrong")
        with pytest.raises(HostError, match=expected):
            server.run(to_api(graph))
    graph = Prompts()
    other = graph.add("DiffLensLoadModel", model_name="avatars.safetensors")
    drawn = sampler(graph, None, graph.model[0], other[1], graph.latent, 0)
    graph.add("SaveLatent", samples=drawn[0], filename_prefix="latents/wrong")
    with pytest.raises(HostError, match="Connect CLIP Text Encode with the CLIP of the same Load Prompted Model"):
        server.run(to_api(graph))


def test_from_a_prompt_to_a_recipe_with_another_prompt_as_baseline(server):
    """Capture under guidance equals the core's; integrated gradients begin at the other prompt's activations."""
    graph, count = Prompts(4), 24

    def capture(prompt: str, save_as: str = "") -> Node:
        return graph.add(
            "DiffLensCapture", model=graph.model[0], positive=graph.text(prompt)[0], latent_image=graph.latent[0],
            vae=graph.model[2], pictures=count, steps=STEPS, sampler_name="euler", scheduler="simple", seed=SEED,
            site="middle_block", negative=graph.text("")[0], cfg=CFG, save_as=save_as,
        )  # fmt: skip

    captured, baseline = capture("portrait of a person", "by prompt"), capture("portrait of a woman")
    sae = graph.add("DiffLensLoadSAE", sae_name="prompted_avatars.safetensors", site="")
    classifier = graph.add(
        "DiffLensLoadClassifier", classifier_name="prompted_avatars.safetensors", face_detector="none"
    )
    labels = graph.add("DiffLensClassify", images=captured[1], classifier=classifier[0], attribute="presentation")
    probes = graph.add("DiffLensTrainProbes", activations=captured[0], sae=sae[0], labels=labels[0])
    inputs = {"model": graph.model[0], "activations": captured[0], "sae": sae[0], "probes": probes[0]}
    tables = [
        graph.add(
            "DiffLensAttribute", **inputs, labels=labels[0], method="integrated gradients", features_per_class=5, **more
        )
        for more in ({}, {"baseline": baseline[0]})
    ]
    shown = [graph.add("PreviewAny", source=table[2]) for table in tables]
    entry = server.run(to_api(graph))
    plain, based = (entry["outputs"][str(node.id)]["text"][0] for node in shown)
    assert "presentation, by integrated gradients" in plain and plain != based
    for text in (plain, based):
        assert all(1 <= text.count(f" {name} ") <= 5 for name in ("masculine", "feminine")), text
    model, text = load_prompted(FILES / "difflens_models" / "prompted_avatars.safetensors")
    keep, guidance = (
        Kept("middle_block", range(STEPS)),
        Guidance(text.encode(["portrait of a person"]), text.encode([""]), CFG),
    )
    sample(model, start_noise(count, SEED)[:4], STEPS, guidance=guidance, kept=[keep])
    store = open_store(server.base / "models" / "difflens_activations" / "by prompt")
    found = store.activations().part(0, 4).values.float()
    torch.testing.assert_close(found, keep.taken().movedim(-1, 2).float(), atol=2e-2, rtol=2e-2)


def test_a_recipe_is_learned_from_twins_whose_prompts_differ_in_a_word(server):
    """Twins of the server start from one noise, and what Attribute Features makes of them steers as in the core."""
    graph, count = Prompts(8), 48
    prompts = graph.add("DiffLensPrompts", clip=graph.model[1], text="portrait of a man\nportrait of a woman")
    captured = graph.add(
        "DiffLensCapture", model=graph.model[0], positive=prompts[0], latent_image=graph.latent[0], vae=graph.model[2],
        pictures=count, steps=STEPS, sampler_name="euler", scheduler="simple", seed=SEED, site="middle_block",
        negative=graph.text("")[0], cfg=CFG, save_as="twins", twins=2,
    )  # fmt: skip
    sae = graph.add("DiffLensLoadSAE", sae_name="prompted_avatars.safetensors", site="")
    # One that reads nothing but presentation: of few pictures hardly any two have all else alike.
    classifier = graph.add("DiffLensLoadClassifier", classifier_name="presentation.safetensors", face_detector="none")
    whole = load_classifier(FILES / "difflens_classifiers" / "prompted_avatars.safetensors")
    alone = AttributeClassifier({"presentation": whole.attributes["presentation"]})
    alone.load_state_dict({name: whole.state_dict()[name] for name in alone.state_dict()})
    save_classifier(server.base / "models" / "difflens_classifiers" / "presentation.safetensors", alone, {})
    labels = graph.add("DiffLensClassify", images=captured[1], classifier=classifier[0], attribute="presentation")
    probes = graph.add("DiffLensTrainProbes", activations=captured[0], sae=sae[0], labels=labels[0])
    found = graph.add(
        "DiffLensAttribute", model=graph.model[0], activations=captured[0], sae=sae[0], probes=probes[0],
        labels=labels[0], method="class mean difference", features_per_class=40, other_size=captured[0],
        other_labels=labels[0],
    )  # fmt: skip
    graph.add("DiffLensSaveRecipe", recipe=found[0], name="twins")
    table = graph.add("PreviewAny", source=found[2])
    steered = graph.draw("a doctor", model=steer(graph, None, graph.model[0], found[0], "feminine"))
    entry = server.run(to_api(graph))
    told = entry["outputs"][str(table.id)]["text"][0]
    assert "of the same noise that differ in their class alone" in told
    pairs = int(re.search(r"Learned from (\d+) pairs", told)[1])
    assert pairs % 2 == 0 and pairs >= 16, "those of both captures"
    models = server.base / "models"
    store = open_store(models / "difflens_activations" / "twins")
    assert store.activations().twins == 2
    model, text = load_prompted(FILES / "difflens_models" / "prompted_avatars.safetensors")
    guidance = Guidance(text.encode(["portrait of a man", "portrait of a woman"] * 4), text.encode([""]), CFG)
    expected = sample(model, start_noise(count // 2, SEED)[:4].repeat_interleave(2, dim=0), STEPS, guidance=guidance)
    torch.testing.assert_close(store.samples()[:8].clamp(-1, 1), expected, atol=1e-2, rtol=0)
    recipe = load_recipe(next((models / "difflens_recipes").glob("twins*.safetensors")))
    asked = Targets(recipe.attribute, recipe.classes, (0.0, 1.0))
    drawn = latents(server, entry, steered).clamp(-1, 1)
    guidance = Guidance(text.encode(["a doctor"]), text.encode([""]), CFG)
    expected = sample(model, start_noise(8, SEED), STEPS, [Steering(recipe, asked.of)], guidance=guidance)
    torch.testing.assert_close(drawn, expected, atol=1e-2, rtol=0)
    del found.inputs["other_labels"]
    with pytest.raises(HostError, match="Attribute Features: other_size and other_labels belong together"):
        server.run(to_api(graph))


def test_a_model_of_any_size_draws_what_the_core_draws_and_refuses_what_it_cannot(server, toys):
    torch.manual_seed(4)
    text = TextEncoder(("a", "doctor"), width=16, length=8)
    folder = server.base / "models" / "difflens_models"
    folder.mkdir(parents=True, exist_ok=True)
    save_denoiser(folder / "any_size.safetensors", toys.denoiser(context_width=16, any_size=True), {}, text)
    graph = Prompts()
    graph.model.inputs["model_name"] = "any_size.safetensors"
    graph.latent.inputs |= {"width": 24, "height": 16}
    drawn = graph.draw("a doctor", 1.0)
    found = latents(server, server.run(to_api(graph)), drawn)
    model, text = load_prompted(folder / "any_size.safetensors")
    expected = sample(model, start_noise(2, SEED, 16, 24), STEPS, guidance=Guidance(text.encode(["a doctor"]), None))
    assert found.shape == (2, 3, 16, 24)
    torch.testing.assert_close(found.clamp(-1, 1), expected, atol=2e-3, rtol=0)
    graph.latent.inputs |= {"width": 16, "height": 16}
    graph.latent = graph.add("RebatchLatents", latents=graph.latent[0], batch_size=2)
    graph.draw("a doctor", 1.0)
    expected = "sides are multiples of 8 pixels, from 8 on, got a latent of 3 x 2 x 2. A node between"
    with pytest.raises(HostError, match=expected):
        server.run(to_api(graph))
