"""Rebuild every file under models/prompted_avatars/ from seeds. Needs models/avatars/: training begins from it.

    python models/making/make_prompted_avatars.py            the stages whose files are not there, in order
    python models/making/make_prompted_avatars.py denoiser   one stage again: its files are replaced

A stage that is cut off goes on from its last checkpoint in models/prompted_avatars/.work/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import make_avatars as avatars  # sets the path for what follows
import portraits
import prompted_portraits
import torch
from make_avatars import bench
from occupations import OCCUPATIONS
from PIL import Image
from prompted_portraits import phrase
from stages import (
    Captured,
    Drawings,
    Options,
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
from torch import nn

from difflens_core.activations import Activations, capture, save_labels
from difflens_core.classifiers import load_classifier, save_classifier
from difflens_core.files import fingerprint, load_tensors
from difflens_core.locate import save_probes
from difflens_core.networks import (
    END,
    UNKNOWN,
    Denoiser,
    DenoiserConfig,
    DenoiserSampler,
    Guidance,
    TextEncoder,
    load_denoiser,
    load_prompted,
    save_denoiser,
    start_noise,
)
from difflens_core.report import image_grid, with_provenance
from difflens_core.sae import load_sae, save_sae
from difflens_core.steer import Recipe, load_recipe, save_recipe, weigh_latents

OUT = Path(__file__).resolve().parents[1] / "prompted_avatars"
WORK = OUT / ".work"
DENOISER_FILE = OUT / "difflens_models" / "prompted_avatars.safetensors"
CLASSIFIER_FILE = OUT / "difflens_classifiers" / "prompted_avatars.safetensors"
SAE_FILE = OUT / "difflens_saes" / "prompted_avatars.safetensors"
PROBES = OUT / "difflens_probes"
RECIPES = OUT / "difflens_recipes"
TOLD = {"author": "ComfyUI-DiffLens", "licence": "Apache-2.0", "model_name": "the avatars at work"}  # in recipes

DENOISER = {
    "images": 40_000, "steps": 2_200, "batch": 64, "lr": 1e-3, "ema": 0.999, "seed": 11, "unconditional": 0.1,
    "unknown": 0.03,
}  # fmt: skip
CLASSIFIER = {"images": 15_000, "test_images": 2_000, "epochs": 8, "batch": 100, "lr": 3e-3, "seed": 1_100}
SAE = {"pictures": 3_072, "latents": 1_024, "k": 32, "steps": 3_000, "seed": 2_100}
RECIPE = {
    "per_class": 120,
    "start": 0.2,
    "modes": {"presentation": "shift", "age": "shift"},
    "strengths": {"shift": (0.75, 1.0, 1.25, 1.5)},
    "success": 0.98,
    "tuning_pictures": 256,
    "tuning_seed": 3_100,
    "weighing_seed": 3_150,
    "weighed": ("age",),  # of presentation it keeps no more, and nurses turned masculine keep traces of long hair
}
STEERED = ("presentation", "age")
CFG = 2.0
OPENING = "portrait of "
CARD = {"pictures": 256, "seed": 4_100}


class Prompted(nn.Module):
    """Denoiser and text encoder, trained as one."""

    def __init__(self) -> None:
        super().__init__()
        self.text = TextEncoder(prompted_portraits.WORDS)
        self.denoiser = Denoiser(DenoiserConfig(context_width=self.text.width))
        weights = load_denoiser(avatars.DENOISER_FILE).state_dict()
        # Where each layer of the avatars' middle block lies once attention to the text stands between them.
        places = {f"middle_block.{old}": f"middle_block.{new}" for old, new in enumerate((0, 2, 3, 5))}
        moved = {places.get(name[:14], name[:14]) + name[14:]: tensor for name, tensor in weights.items()}
        missing, unexpected = self.denoiser.load_state_dict(moved, strict=False)
        assert not unexpected and all(name.startswith(("middle_block.1.", "middle_block.4.")) for name in missing)

    def context(self, tokens: torch.Tensor, c: Options) -> torch.Tensor:
        """What the denoiser reads of prompts (B x length tokens) in training: some empty, some words not known."""
        tokens = tokens.masked_fill((torch.rand(len(tokens)) < c["unconditional"])[:, None], END)
        forgotten = (torch.rand(tokens.shape) < c["unknown"]) & (tokens != END)
        return self.text(tokens.masked_fill(forgotten, UNKNOWN))


def train_denoiser() -> None:
    c = DENOISER
    images, _, prompts = prompted_portraits.render(c["images"], c["seed"], balanced=False)
    torch.manual_seed(c["seed"])
    model = Prompted()
    tokens = model.text.tokens(prompts)

    def loss_at(step: int) -> torch.Tensor:
        picks = torch.randint(len(images), (c["batch"],))
        context = model.context(tokens[picks], c)
        x0 = to_tensor(images[picks.numpy()])
        return denoiser_loss(lambda noisy, sigma: model.denoiser(noisy, sigma, context), x0)

    ema = train_network(model, loss_at, c, WORK / "denoiser.pt")
    save_denoiser(DENOISER_FILE, ema.denoiser, {"training": c}, ema.text)


def draw_balanced(count: int, seed: int) -> Drawings:
    return prompted_portraits.render(count, seed, balanced=True)[:2]


def train_classifier() -> None:
    hidden = "clothes"  # by what is worn at work
    nuisances = {name: classes for name, classes in portraits.NUISANCES.items() if name != hidden}
    heads = portraits.ATTRIBUTES | {"occupation": OCCUPATIONS} | nuisances
    model, accuracy = fit_classifier(draw_balanced, heads, CLASSIFIER)
    save_classifier(CLASSIFIER_FILE, model, {"training": CLASSIFIER, "accuracy": accuracy})


def capture_told(
    denoiser: Path, opening: str, c: Options, folder: Path, endings: Sequence[str] = ("",)
) -> tuple[Activations, torch.Tensor]:
    """Activations and pictures (n x H x W x 3 in [0, 1]) of every occupation; sampled once.

    Most prompts name a presentation, an age or both: of prompts that leave it open, the rare classes hardly come.
    opening, endings: what they begin and, in turn, end with; c: how many pictures, their seed, and their size unless it
    is the model's own.
    """
    model, text = load_prompted(denoiser)
    told = [*product(("", "young", "adult", "old"), ("", "male", "female"), OCCUPATIONS)]
    rounds = [(told[i % len(told)], endings[(i + i // len(told)) % len(endings)]) for i in range(c["pictures"])]
    prompts = [opening + phrase([*filter(None, words[:2])], words[2]) + ending for words, ending in rounds]
    count, context = c["pictures"], text.encode(prompts)
    sampler = DenoiserSampler(model, bench.STEPS, Guidance(context, text.encode([""]), CFG), c.get("size"))
    store = capture(
        sampler, count, c["seed"], folder=folder,
        on_batch=lambda done: print(f"capture {done}/{count}", flush=True),
    )  # fmt: skip
    return store.activations(), store.samples().movedim(1, -1) / 2 + 0.5


def guided(text: TextEncoder, opening: str, count: int, endings: Sequence[str] = ("",)) -> Guidance:
    """Guidance of `count` pictures: in a row of one occupation as many as the targets need to meet every class."""
    jobs = OCCUPATIONS[1:]
    prompts = [opening + phrase([], job) + endings[i % len(endings)] for job in jobs for i in range(count // len(jobs))]
    return Guidance(text.encode(prompts), text.encode([""]), CFG)


def captured() -> tuple[Activations, torch.Tensor]:
    return capture_told(DENOISER_FILE, OPENING, SAE, WORK / "capture")


def train_prompted_sae() -> None:
    save_sae(SAE_FILE, fit_sae(captured()[0], SAE, WORK / "sae.pt"), torch.float16)


def labelled() -> list[Captured]:
    """What was captured, and what the classifier sees of every attribute."""
    activations, pictures = captured()
    read = read_all(load_classifier(CLASSIFIER_FILE), activations, pictures)
    save_labels(WORK / "capture", read.labels)
    return [read]


def weighed(recipe: Recipe) -> Recipe:
    """The recipe with its latents weighed, if its attribute is one of which that helps."""
    if recipe.attribute not in RECIPE["weighed"]:
        return recipe
    count, (model, text) = RECIPE["tuning_pictures"], load_prompted(DENOISER_FILE)
    sampler = DenoiserSampler(model, bench.STEPS, guided(text, OPENING, count))
    return weigh_latents(recipe, sampler, load_classifier(CLASSIFIER_FILE), start_noise(count, RECIPE["weighing_seed"]))


def ways(controlled: bool) -> dict[str, dict[str, Recipe]]:
    """The recipe of each attribute, and what it is compared with, weighed where the recipe is: see `compared`."""
    files = {name: RECIPES / f"prompted_avatars_{name}.safetensors" for name in STEERED}
    found = compared(files, SAE_FILE, labelled, controlled)
    return {
        name: {way: weighed(recipe) if way == "mean difference" else recipe for way, recipe in own.items()}
        for name, own in found.items()
    }


def make_recipes() -> None:
    """Probes and recipe of the steered attributes; strengths found on tuning seeds only."""
    classifier, sae, (model, text) = load_classifier(CLASSIFIER_FILE), load_sae(SAE_FILE), load_prompted(DENOISER_FILE)
    read = labelled()
    count = RECIPE["tuning_pictures"]
    guidance = guided(text, OPENING, count)

    def try_out(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
        after, targets = bench.run(model, count, recipe, RECIPE["tuning_seed"], guidance)
        return read_attributes(classifier, after)[recipe.attribute], torch.from_numpy(targets.first(count))

    for attribute in STEERED:
        recipe, probes = make_recipe(
            attribute, portraits.ATTRIBUTES[attribute], read, sae, fingerprint(model.state_dict()), RECIPE, try_out,
            weighed,
        )  # fmt: skip
        save_probes(PROBES / f"prompted_avatars_{attribute}.safetensors", probes)
        save_recipe(RECIPES / f"prompted_avatars_{attribute}.safetensors", with_provenance(recipe, **TOLD))


def bias_rows(number: int, read: Mapping[str, torch.Tensor], drawn: Mapping[str, tuple[float, ...]]) -> list[str]:
    """Rows of a card: shares of the drawings and of what is `read` in pictures of occupation `number`."""
    seen, rows = float((read["occupation"] == number).float().mean()), []
    for attribute in STEERED:
        classes = portraits.ATTRIBUTES[attribute]
        shares = read[attribute].bincount(minlength=len(classes)) / len(read[attribute])
        told = [" / ".join(f"{share:.2f}" for share in of) for of in (drawn[attribute], shares.tolist())]
        name = f"{OCCUPATIONS[number]} | {attribute} ({' / '.join(classes)})"
        rows.append(f"| {name} | {told[0]} | {told[1]} | {seen:.3f} |")
    return rows


def make_card() -> None:
    """Contact sheet and model card, with figures measured now and those stored in the files."""
    classifier, sae, (model, text) = load_classifier(CLASSIFIER_FILE), load_sae(SAE_FILE), load_prompted(DENOISER_FILE)
    count, rows, titles, bias = CARD["pictures"], [], [], []
    for number, job in enumerate(OCCUPATIONS):
        prompt = OPENING + phrase([], job)
        guidance = Guidance(text.encode([prompt]), text.encode([""]), CFG)
        pictures, _ = bench.run(model, count, None, CARD["seed"] + number, guidance)
        rows.append((pictures[:12] * 255).round().byte().numpy())
        titles.append(prompt)
        read = read_attributes(classifier, pictures)
        bias += bias_rows(number, read, prompted_portraits.BIAS[job])
    sheet = image_grid(rows, titles, columns=12)
    Image.fromarray(sheet).save(OUT / "contact_sheet.png", optimize=True)
    recipes = recipe_rows(load_recipe(RECIPES / f"prompted_avatars_{attribute}.safetensors") for attribute in STEERED)
    accuracy = load_tensors(CLASSIFIER_FILE, "classifier")[1]["info"]["accuracy"]
    quality = sae.info["held_out"]
    card = CARD_TEXT.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        text=sum(p.numel() for p in text.parameters()) / 1e6,
        d=DENOISER, c=CLASSIFIER, s=SAE, r=RECIPE, cfg=CFG, count=count, seed=CARD["seed"],
        words=", ".join(text.words), bias="\n".join(bias), recipes=recipes, weighed=" and ".join(RECIPE["weighed"]),
        accuracy=", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in accuracy.items()),
        fvu=quality["fvu"], l0=quality["l0"], dead=100 * quality["dead"],
    )  # fmt: skip
    (OUT / "README.md").write_text(card, encoding="utf-8")


CARD_TEXT = """# The avatars at work

A small diffusion model of drawn portraits, 64 x 64 pixels, that draws by prompt. Every occupation has a bias of its
own, known because we drew the training pictures. It is there to try the conditional method on, to test it and to
measure it. It is not a model of people: its classes are what a classifier sees in a drawing.

![sampled portraits of every occupation](contact_sheet.png)

## Data
{d[images]} portraits from `models/making/prompted_portraits.py`, seed {d[seed]}, each with a prompt such as "portrait
of a smiling nurse with glasses". Five kinds in equal shares: a person in plain clothes, doctor, nurse, firefighter,
receptionist. Presentation and age have the shares below; skin tone has the same skew in all, that of the avatars. One
prompt in seven tells the presentation, one in seven the age.

Words: {words}.

## Denoiser
{parameters:.1f} M parameters, and {text:.1f} M of the text encoder, which is in the same file. The avatars' network
with attention to the text in its `middle_block` (256 x 8 x 8) and nowhere else: all that a prompt asks for passes
through that site. Training begins with the avatars' weights: {d[steps]} steps of {d[batch]} drawings, about 30 minutes
on 2 CPU cores. One prompt in ten is left empty, for guidance. Stored in fp16.

Bias, measured on {count} pictures of each occupation, guidance (cfg) {cfg:g}, seeds from {seed}; *recognised* is the
share of pictures in which the classifier sees the occupation:

| prompt | attribute | drawn | sampled | recognised |
|---|---|---|---|---|
{bias}

Guidance strengthens the bias of the drawings.

## Classifier
Trained on {c[images]} drawings in which every attribute is balanced and independent. Accuracy on {c[test_images]}
other balanced drawings: {accuracy}.

## Sparse autoencoder
TopK, {s[latents]} latents, k = {s[k]}, trained on what the prompt's half of the guided sampling puts out, for
{s[pictures]} pictures of all occupations (20 steps each), an eighth of them held out. Most of the prompts name a
presentation or an age, so that rare classes come, too. Held-out figures: FVU {fvu:.4f}, L0 {l0:.1f}, dead latents
{dead:.1f} %.

## Recipes
One recipe of an attribute serves all prompts. The {r[per_class]} best latents of every class by the class mean
difference. Their levels go by what else a picture shows. Those of {weighed} are weighed by what they do to the other
attributes, on {r[tuning_pictures]} pictures of seed {r[weighing_seed]}. Strengths: the weakest of {r[strengths][shift]}
that shows the class asked for in at least {r[success]:.0%} of its pictures, on as many pictures of the four
occupations, seed {r[tuning_seed]}. The benchmark uses other seeds.

| attribute | latents | mode | from | strength per class | gate agrees with TopK |
|---|---|---|---|---|---|
{recipes}

`difflens_probes/` holds the linear probes behind them.

## Limits
- Portraits are aligned and centred. Levels per position, which the recipes use, need that.
- Rare combinations, such as an old feminine firefighter, were seldom drawn, and the model seldom draws them when asked
  in words.
- Rebuild everything with `python models/making/make_prompted_avatars.py`. Another processor gives slightly other
  weights.
"""


STAGES = {
    "denoiser": (train_denoiser, DENOISER_FILE),
    "classifier": (train_classifier, CLASSIFIER_FILE),
    "sae": (train_prompted_sae, SAE_FILE),
    "recipes": (make_recipes, RECIPES / "prompted_avatars_presentation.safetensors"),
    "card": (make_card, OUT / "README.md"),
}

if __name__ == "__main__":
    build(STAGES, WORK, __doc__)
