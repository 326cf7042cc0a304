"""Rebuild every file under models/avatars/ from seeds.

    python models/making/make_avatars.py            the stages whose files are not there, in order
    python models/making/make_avatars.py denoiser   one stage again: its files are replaced

A stage that is cut off goes on from its last checkpoint in models/avatars/.work/.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "models" / "making"), str(ROOT / "benchmarks")]

import debias as bench  # noqa: E402
import portraits  # noqa: E402
from stages import (  # noqa: E402
    Captured,
    Drawings,
    build,
    compared,
    denoiser_loss,
    fit_classifier,
    fit_sae,
    make_recipe,
    read_all,
    read_attributes,
    recipe_rows,
    to_tensor,
    train_network,
)

from difflens_core.activations import Activations, capture, save_labels  # noqa: E402
from difflens_core.classifiers import load_classifier, save_classifier  # noqa: E402
from difflens_core.files import fingerprint, load_tensors  # noqa: E402
from difflens_core.locate import save_probes  # noqa: E402
from difflens_core.networks import (  # noqa: E402
    Denoiser,
    DenoiserSampler,
    load_denoiser,
    save_denoiser,
)
from difflens_core.report import image_grid, with_provenance  # noqa: E402
from difflens_core.sae import load_sae, save_sae  # noqa: E402
from difflens_core.steer import Recipe, load_recipe, random_features, save_recipe  # noqa: E402

OUT = ROOT / "models" / "avatars"
WORK = OUT / ".work"
DENOISER_FILE = OUT / "difflens_models" / "avatars.safetensors"
CLASSIFIER_FILE = OUT / "difflens_classifiers" / "avatars.safetensors"
SAE_FILE = OUT / "difflens_saes" / "avatars.safetensors"
PROBES = OUT / "difflens_probes"
RECIPES = OUT / "difflens_recipes"
TOLD = {"author": "ComfyUI-DiffLens", "licence": "Apache-2.0", "model_name": "the avatars"}  # in recipes
CONTROL = RECIPES / "controls" / "presentation_random.safetensors"
STEPS = 20

DENOISER = {"images": 40_000, "steps": 2_600, "batch": 64, "lr": 1e-3, "ema": 0.999, "seed": 1}
CLASSIFIER = {"images": 12_000, "test_images": 2_000, "epochs": 8, "batch": 100, "lr": 3e-3, "seed": 1_000}
SAE = {"pictures": 3_072, "latents": 1_024, "k": 32, "steps": 3_000, "seed": 2_000}

RECIPE = {
    "per_class": 120,
    "start": 0.2,
    "modes": {"presentation": "shift", "age": "shift", "skin_tone": "shift"},
    "strengths": {"shift": (0.75, 1.0, 1.5, 2.0)},
    "success": 0.98,
    "tuning_pictures": 192,
    "tuning_seed": 3_000,
}
CARD = {"pictures": 512, "seed": 4_000}


def train_denoiser() -> None:
    c = DENOISER
    images, _ = portraits.render(c["images"], seed=c["seed"], balanced=False)
    torch.manual_seed(c["seed"])
    model = Denoiser()

    def loss_at(step: int) -> torch.Tensor:
        return denoiser_loss(model, to_tensor(images[torch.randint(len(images), (c["batch"],)).numpy()]))

    save_denoiser(DENOISER_FILE, train_network(model, loss_at, c, WORK / "denoiser.pt"), {"training": c})


def draw_balanced(count: int, seed: int) -> Drawings:
    return portraits.render(count, seed, balanced=True)


def train_classifier() -> None:
    heads = portraits.ATTRIBUTES | portraits.NUISANCES
    model, accuracy = fit_classifier(draw_balanced, heads, CLASSIFIER)
    save_classifier(CLASSIFIER_FILE, model, {"training": CLASSIFIER, "accuracy": accuracy})


def captured() -> tuple[Activations, torch.Tensor]:
    """Activations and pictures (n x H x W x 3 in [0, 1]) of the SAE's seed; sampled once."""
    count = SAE["pictures"]
    store = capture(
        DenoiserSampler(load_denoiser(DENOISER_FILE), STEPS), count, SAE["seed"], folder=WORK / "capture",
        on_batch=lambda done: print(f"capture {done}/{count}", flush=True),
    )  # fmt: skip
    return store.activations(), store.samples().movedim(1, -1) / 2 + 0.5


def train_avatar_sae() -> None:
    save_sae(SAE_FILE, fit_sae(captured()[0], SAE, WORK / "sae.pt"), torch.float16)


def labelled() -> list[Captured]:
    """What was captured, and what the classifier sees of every attribute."""
    classifier = load_classifier(CLASSIFIER_FILE)
    activations, pictures = captured()
    read = read_all(classifier, activations, pictures)
    save_labels(WORK / "capture", read.labels)
    return [read]


def ways(controlled: bool) -> dict[str, dict[str, Recipe]]:
    """The recipe of each attribute, and what it is compared with: see `compared`."""
    files = {name: RECIPES / f"avatars_{name}.safetensors" for name in portraits.ATTRIBUTES}
    return compared(files, SAE_FILE, labelled, controlled)


def make_recipes() -> None:
    """Probes and recipe of every attribute, and a control for workflow 10; strengths found on tuning seeds only."""
    model, classifier, sae = load_denoiser(DENOISER_FILE), load_classifier(CLASSIFIER_FILE), load_sae(SAE_FILE)
    read = labelled()

    def try_out(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
        count = RECIPE["tuning_pictures"]
        after, targets = bench.run(model, count, recipe, RECIPE["tuning_seed"])
        return read_attributes(classifier, after)[recipe.attribute], torch.from_numpy(targets.first(count))

    for attribute, classes in portraits.ATTRIBUTES.items():
        recipe, probes = make_recipe(attribute, classes, read, sae, fingerprint(model.state_dict()), RECIPE, try_out)
        save_probes(PROBES / f"avatars_{attribute}.safetensors", probes)
        save_recipe(RECIPES / f"avatars_{attribute}.safetensors", with_provenance(recipe, **TOLD))
        if attribute == "presentation":
            save_recipe(CONTROL, with_provenance(random_features(recipe, sae, seed=1), **TOLD))


def make_card() -> None:
    """Contact sheet and model card, with figures measured now and those stored in the files."""
    model, classifier, sae = load_denoiser(DENOISER_FILE), load_classifier(CLASSIFIER_FILE), load_sae(SAE_FILE)
    count = CARD["pictures"]
    pictures, _ = bench.run(model, count, seed=CARD["seed"])
    read = classifier.classify(pictures)
    drawings, _ = portraits.render(24, seed=CARD["seed"], balanced=False)
    sampled = (pictures[:72] * 255).round().byte().numpy()
    sheet = image_grid([sampled, drawings], ["Sampled, not steered", "Drawn"], columns=12)
    Image.fromarray(sheet).save(OUT / "contact_sheet.png", optimize=True)
    bias = []
    for attribute, classes in portraits.ATTRIBUTES.items():
        shares = read[attribute].argmax(1).bincount(minlength=len(classes)) / count
        for name, drawn, share in zip(classes, portraits.BIAS[attribute], shares.tolist(), strict=True):
            bias.append(f"| {attribute} | {name} | {drawn:.2f} | {share:.3f} |")
    recipes = recipe_rows(
        load_recipe(RECIPES / f"avatars_{attribute}.safetensors") for attribute in portraits.ATTRIBUTES
    )
    accuracy = load_tensors(CLASSIFIER_FILE, "classifier")[1]["info"]["accuracy"]
    quality = sae.info["held_out"]
    text = CARD_TEXT.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        d=DENOISER, c=CLASSIFIER, s=SAE, r=RECIPE, count=count, seed=CARD["seed"],
        bias="\n".join(bias), recipes=recipes,
        accuracy=", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in accuracy.items()),
        fvu=quality["fvu"], l0=quality["l0"], dead=100 * quality["dead"],
    )  # fmt: skip
    (OUT / "README.md").write_text(text, encoding="utf-8")


CARD_TEXT = """# The avatars

A small unconditional diffusion model of drawn portraits, 64 x 64 pixels, whose bias is known because we drew the
training pictures. It is there to try the method on, to test it and to measure it. It is not a model of people:
its classes are what a classifier sees in a drawing.

![sampled and drawn portraits](contact_sheet.png)

## Data
{d[images]} portraits from `models/making/portraits.py`, seed {d[seed]}. Presentation, age and skin tone are drawn
independently of one another with the shares below. Background, clothes, hair colour, glasses, expression and beard
are free (beards only on masculine adults and seniors).

## Denoiser
{parameters:.1f} M parameters, no long skips: all that the picture shows passes through `middle_block` (256 x 8 x 8).
It predicts the clean picture under a rectified-flow schedule. {d[steps]} steps of {d[batch]} drawings; about
45 minutes on 2 CPU cores. Stored in fp16.

Bias, measured on {count} pictures of seed {seed}:

| attribute | class | share drawn | share sampled |
|---|---|---|---|
{bias}

## Classifier
Trained on {c[images]} drawings in which every attribute is balanced and independent. Accuracy on {c[test_images]}
other balanced drawings: {accuracy}.

## Sparse autoencoder
TopK, {s[latents]} latents, k = {s[k]}, trained on the activations of {s[pictures]} sampled pictures (20 steps each),
an eighth of them held out. Held-out figures: FVU {fvu:.4f}, L0 {l0:.1f}, dead latents {dead:.1f} %.

## Recipes
The {r[per_class]} best latents of every class by the class mean difference. Their levels go by what
else a picture shows. Strengths: the weakest of {r[strengths][shift]} that shows the class asked for in at least
{r[success]:.0%} of its pictures, on as many pictures of seed {r[tuning_seed]}. The benchmark uses other seeds.

| attribute | latents | mode | from | strength per class | gate agrees with TopK |
|---|---|---|---|---|---|
{recipes}

`difflens_probes/` holds the linear probes behind them, one a step and attribute
(`difflens_core.locate.probes.load_probes`).
`difflens_recipes/controls/` holds a recipe that does nothing, of as many random latents and the same edit norm:
workflow 10 asks why.

## Limits
- Portraits are aligned and centred. Levels per position, which the recipes use, need that.
- The attributes are independent in the data, so nothing here shows how the method copes with entangled ones.
- Sampling at another size than 64 x 64 is not supported.
- Rebuild everything with `python models/making/make_avatars.py`. Another processor gives slightly other weights.
"""


STAGES = {
    "denoiser": (train_denoiser, DENOISER_FILE),
    "classifier": (train_classifier, CLASSIFIER_FILE),
    "sae": (train_avatar_sae, SAE_FILE),
    "recipes": (make_recipes, RECIPES / "avatars_skin_tone.safetensors"),
    "card": (make_card, OUT / "README.md"),
}


if __name__ == "__main__":
    build(STAGES, WORK, __doc__)
