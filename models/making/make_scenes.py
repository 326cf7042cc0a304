"""Rebuild every file under models/scenes/ from seeds. Needs models/prompted_avatars/: training begins from it.

    python models/making/make_scenes.py            the stages whose files are not there, in order
    python models/making/make_scenes.py denoiser   one stage again: its files are replaced

A stage that is cut off goes on from its last checkpoint in models/scenes/.work/.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import make_prompted_avatars as prompted  # sets the path for what follows
import numpy as np
import scenes
import torch
from make_avatars import bench
from make_prompted_avatars import CFG, Prompted, bias_rows, capture_told, guided
from occupations import OCCUPATIONS
from PIL import Image
from precision import at_precision, autocast
from prompted_portraits import phrase
from stages import (
    Captured,
    accuracies,
    attributes_loss,
    augment,
    build,
    compared,
    denoiser_loss,
    fit_readers,
    fit_sae,
    make_recipe,
    read_all,
    read_attributes,
    recipe_rows,
    to_tensor,
    train_network,
)
from torch.nn import functional as F

from difflens_core.activations import Activations, capture
from difflens_core.classifiers import FramedClassifier, cut_frame, load_classifier, save_classifier
from difflens_core.files import fingerprint, load_tensors
from difflens_core.networks import (
    Denoiser,
    DenoiserConfig,
    DenoiserSampler,
    Guidance,
    TextEncoder,
    load_denoiser,
    load_prompted,
    save_denoiser,
)
from difflens_core.report import image_grid, with_provenance
from difflens_core.sae import load_sae, save_sae
from difflens_core.steer import Recipe, load_recipe, save_recipe

OUT = Path(__file__).resolve().parents[1] / "scenes"
WORK = OUT / ".work"
DENOISER_FILE = OUT / "difflens_models" / "scenes.safetensors"
CLASSIFIER_FILE = OUT / "difflens_classifiers" / "scenes.safetensors"
SAE_FILE = OUT / "difflens_saes" / "scenes.safetensors"
RECIPES = OUT / "difflens_recipes"
STEERED = ("presentation",)
TOLD = {"author": "ComfyUI-DiffLens", "licence": "Apache-2.0", "model_name": "people in scenes"}  # in recipes

DENOISER = {
    "images": 10_000, "share": (0.3, 0.2, 0.2, 0.3), "steps": 7_000, "batch": 2_048, "lr": 1e-3, "ema": 0.999,
    "seed": 21, "unconditional": 0.1, "unknown": 0.03, "figure": 3.0, "face": 12.0, "shift": (3.0, 0.6), "told": 0.05,
}  # fmt: skip
CLASSIFIER = {"images": 16_000, "test_images": 1_000, "epochs": 6, "batch": 100, "lr": 3e-3, "seed": 1_200}
SAE = {"pictures": 1_536, "size": (96, 64), "latents": 1_024, "k": 32, "steps": 3_000, "seed": 2_200}
# From each noise a picture for each of these words: Attribute Features' twins.
TWINS = {
    "noises": {(64, 96): 1_000, (96, 64): 384},
    "seed": 9_200,
    "words": [*product(("young", "adult", "old"), ("male", "female"))],
}
RECIPE = {
    "per_class": 60,
    "start": 0.2,
    "modes": {"presentation": "twin"},
    "strengths": {"twin": (0.55, 0.65)},
    "success": 0.96,
    "tuning_pictures": 64,
    "tuning_seed": 3_200,
}
CARD = {"pictures": 64, "seed": 4_200}
CELLS = 8  # rows and columns of a figure's frame that the network learns to tell apart
LARGEST = 96  # side that the position's map is of
FACE = (0.28, 0.15, 0.72, 0.67)  # left, top, right and bottom of the face, as shares of the figure's frame


def untrained() -> Prompted:
    """Denoiser and text encoder whose layers, but for the words, begin as those of the avatars at work."""
    torch.manual_seed(DENOISER["seed"])
    model = Prompted()
    model.text = TextEncoder(scenes.WORDS)
    old = load_denoiser(prompted.DENOISER_FILE).state_dict()
    model.denoiser = Denoiser(DenoiserConfig(LARGEST, context_width=model.text.width, any_size=True))
    side = LARGEST // 8
    old["position"] = F.interpolate(old["position"], (side, side), mode="bilinear")
    model.denoiser.load_state_dict(old)
    return model.to(memory_format=torch.channels_last)  # a fifth faster


def drawings() -> list[tuple[torch.Tensor, list[str], torch.Tensor]]:
    """Pictures of every size with their prompts and frames.

    They take minutes to draw and are kept for when training goes on.
    """
    path, c = WORK / "drawings.pt", DENOISER
    if not path.exists():
        drawn = [
            scenes.render(c["images"], c["seed"] + number, False, size) for number, size in enumerate(scenes.SIZES)
        ]
        kept = [(torch.from_numpy(images), prompts, torch.from_numpy(frames)) for images, _, prompts, frames in drawn]
        torch.save(kept, path)
    return torch.load(path, weights_only=True)


def faces(frames: torch.Tensor) -> torch.Tensor:
    """Where the faces are in frames (both B x 4)."""
    corner, side = frames[:, :2].repeat(1, 2), (frames[:, 2:] - frames[:, :2]).repeat(1, 2)
    return corner + torch.tensor(FACE) * side


def inside(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Which pixels of pictures of that size lie in frames (B x 4): B x 1 x height x width, 0 or 1."""
    y, x = ((torch.arange(side) + 0.5) / side for side in size)
    left, top, right, bottom = frames[:, :, None].unbind(dim=1)
    rows, columns = (y > top) & (y < bottom), (x > left) & (x < right)
    return (rows[:, :, None] & columns[:, None]).float()[:, None]


def cells(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """What of the figure each position of the network's middle shows: B x height/8 x width/8.

    One of `CELLS` x `CELLS` cells of its frame (B x 4), or `CELLS` squared for none. The network learns to tell it in
    its middle: so it finds out much sooner that a figure is one, and where the prompt wants it.
    """
    y, x = (((torch.arange(side // 8) + 0.5) * 8 / side)[None] for side in size)
    left, top, right, bottom = frames[:, :, None].unbind(dim=1)
    row, column = (CELLS * (y - top) / (bottom - top)).floor(), (CELLS * (x - left) / (right - left)).floor()
    cell = (CELLS * row[:, :, None] + column[:, None]).long()
    beside = (row < 0) | (row >= CELLS), (column < 0) | (column >= CELLS)
    return cell.masked_fill(beside[0][:, :, None] | beside[1][:, None], CELLS**2)


def train_denoiser() -> None:
    c = DENOISER
    drawn = drawings()
    model = untrained()
    model.cells = torch.nn.Conv2d(model.denoiser.config.width, CELLS**2 + 1, 1)
    tokens = [model.text.tokens(prompts) for _, prompts, _ in drawn]

    def loss_at(step: int) -> torch.Tensor:
        number = int(torch.multinomial(torch.tensor(c["share"]), 1))
        (images, _, frames), size = drawn[number], scenes.SIZES[number]
        picks = torch.randint(len(images), (c["batch"] * 64 // (size[0] * size[1]),))
        context = model.context(tokens[number][picks], c)
        x0 = to_tensor(images[picks].numpy())
        told = []

        def predict(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            h, emb = model.denoiser.encode(noisy, sigma)
            h = model.denoiser.middle_block(h, emb, context)
            told.append(model.cells(h))
            return model.denoiser.decode(h, emb)

        frame, done = frames[picks], step / c["steps"]
        counts_more = c["figure"] * inside(frame, size) + c["face"] * inside(faces(frame), size)
        # First what stands where, of which high noise decides, then what it looks like.
        loss = denoiser_loss(predict, x0, counts_more, (1 - done) * c["shift"][0] + done * c["shift"][1])
        return loss + c["told"] * F.cross_entropy(told[0].float(), cells(frame, size))

    ema = train_network(model, loss_at, c, WORK / "denoiser.pt")
    save_denoiser(DENOISER_FILE, ema.denoiser, {"training": c}, ema.text)


def draw_balanced(count: int, seed: int) -> list[tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]]:
    """Pictures, traits and frames (x, y, side: see `FramedClassifier.found`) of every size."""
    drawn = []
    for number, size in enumerate(scenes.SIZES):
        pictures, traits, _, corners = scenes.render(count, seed + number, True, size)
        centre, side = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 3:] - corners[:, 1:2]
        drawn.append((pictures, traits, np.concatenate([centre, side], axis=1)))
    return drawn


def shaken(frames: torch.Tensor) -> torch.Tensor:
    """Frames as they may be found: a little beside, larger or smaller."""
    beside = 0.04 * torch.randn(len(frames), 2) * frames[:, 2:]
    return torch.cat([frames[:, :2] + beside, frames[:, 2:] * (1 + 0.05 * torch.randn(len(frames), 1))], dim=1)


def train_classifier() -> None:
    c = CLASSIFIER
    torch.manual_seed(c["seed"])
    whole = {"background": scenes.BACKGROUNDS}
    model = FramedClassifier({n: of for n, of in scenes.ATTRIBUTES.items() if n not in whole}, whole)
    drawn = draw_balanced(c["images"] // len(scenes.SIZES), c["seed"])

    def loss_at(step: int) -> torch.Tensor:
        pictures, traits, frames = drawn[step % len(drawn)]
        picks = torch.randint(len(pictures), (c["batch"],)).numpy()
        x, frame = augment(to_tensor(pictures[picks]), shift=0) / 2 + 0.5, torch.from_numpy(frames[picks])
        with autocast():
            logits = model.figure.logits(cut_frame(x, shaken(frame), model.size)) | model.whole.logits(x)
            missed = F.smooth_l1_loss(model.found(x).float(), frame, beta=0.02)
        return attributes_loss(logits, {n: torch.from_numpy(traits[n][picks]) for n in logits}) + 100 * missed

    fit_readers(model, loss_at, c)
    accuracy = {}
    for size, (pictures, traits, frames) in zip(
        scenes.SIZES, draw_balanced(c["test_images"], c["seed"] + 10), strict=True
    ):
        told = accuracies(model, pictures, traits, model.attributes)
        found = model.frames(torch.from_numpy(pictures).float() / 255)
        side = (found[:, 3] - found[:, 1] - torch.from_numpy(frames[:, 2])).abs().mean()
        accuracy[" x ".join(map(str, size))] = told
        print(size, told, f"side missed by {float(side):.3f}", flush=True)
    save_classifier(CLASSIFIER_FILE, model, {"training": c, "accuracy": accuracy})


def captured() -> tuple[Activations, torch.Tensor]:
    return capture_told(DENOISER_FILE, "", SAE, WORK / "capture", scenes.layouts(SAE["size"]))


def train_scenes_sae() -> None:
    save_sae(SAE_FILE, fit_sae(captured()[0], SAE, WORK / "sae.pt"), torch.float16)


def captured_twins(size: tuple[int, int], noises: int) -> tuple[Activations, torch.Tensor]:
    """Activations and pictures of every occupation at every place, by prompts that differ in what they tell."""
    model, text = load_prompted(DENOISER_FILE)
    c, endings = TWINS, scenes.layouts(size)
    prompts = [
        phrase(list(words), OCCUPATIONS[i % len(OCCUPATIONS)]) + endings[i // len(OCCUPATIONS) % len(endings)]
        for i in range(noises) for words in c["words"]
    ]  # fmt: skip
    guidance = Guidance(text.encode(prompts), text.encode([""]), CFG)
    sampler = DenoiserSampler(at_precision(model), bench.STEPS, guidance, size)
    store = capture(
        sampler, len(prompts), c["seed"], 60, span=(RECIPE["start"], 1.0),
        folder=WORK / f"twins_{size[0]}x{size[1]}",
        on_batch=lambda done: print(f"capture {size} {done}/{len(prompts)}", flush=True), twins=len(c["words"]),
    )  # fmt: skip
    return store.activations(), store.samples().movedim(1, -1) / 2 + 0.5


def labelled() -> list[Captured]:
    """The twins that were captured, size by size, and what the classifier sees of every attribute."""
    classifier = load_classifier(CLASSIFIER_FILE)
    return [read_all(classifier, *captured_twins(size, noises)) for size, noises in TWINS["noises"].items()]


def ways(controlled: bool) -> dict[str, dict[str, Recipe]]:
    """The recipe of each attribute, and what it is compared with: see `compared`."""
    files = {name: RECIPES / f"scenes_{name}.safetensors" for name in STEERED}
    return compared(files, SAE_FILE, labelled, controlled)


def make_recipes() -> None:
    """Recipes of the steered attributes; strengths found on tuning seeds only."""
    classifier, sae, (model, text) = load_classifier(CLASSIFIER_FILE), load_sae(SAE_FILE), load_prompted(DENOISER_FILE)
    read = labelled()
    count, mark = RECIPE["tuning_pictures"], fingerprint(model.state_dict())
    model = at_precision(model)

    def try_out(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
        shown, asked = [], []
        for size in scenes.SIZES:
            guidance = guided(text, "", count, scenes.layouts(size))
            after, targets = bench.run(model, count, recipe, RECIPE["tuning_seed"], guidance, size)
            shown.append(read_attributes(classifier, after)[recipe.attribute])
            asked.append(torch.from_numpy(targets.first(count)))
        return torch.cat(shown), torch.cat(asked)

    for attribute in STEERED:
        recipe, _ = make_recipe(
            attribute, scenes.ATTRIBUTES[attribute], read, sae, mark, RECIPE, try_out
        )  # fmt: skip
        save_recipe(RECIPES / f"scenes_{attribute}.safetensors", with_provenance(recipe, **TOLD))


def everywhere(text: TextEncoder, prompt: str, size: tuple[int, int], count: int) -> Guidance:
    """Guidance of `count` pictures of a prompt, in turn with every place and size of the figure."""
    endings = scenes.layouts(size)
    prompts = [prompt + endings[i % len(endings)] for i in range(count)]
    return Guidance(text.encode(prompts), text.encode([""]), CFG)


def make_card() -> None:
    """Contact sheet and model card, with figures measured now and those stored in the files."""
    classifier, sae, (model, text) = load_classifier(CLASSIFIER_FILE), load_sae(SAE_FILE), load_prompted(DENOISER_FILE)
    count, rows, titles, bias = CARD["pictures"], [], [], []
    for number, job in enumerate(OCCUPATIONS):
        prompt, size = phrase([], job), scenes.SIZES[number % len(scenes.SIZES)]
        guidance = everywhere(text, prompt, size, count)
        pictures, _ = bench.run(model, count, None, CARD["seed"] + number, guidance, size)
        rows.append((pictures[:8] * 255).round().byte().numpy())
        titles.append(f"{prompt}, {size[0]} x {size[1]}")
        read = read_attributes(classifier, pictures)
        bias += bias_rows(number, read, scenes.BIAS[job])
    sheets = [image_grid([row], [title], columns=8) for row, title in zip(rows, titles, strict=True)]
    Image.fromarray(one_below_the_other(sheets)).save(OUT / "contact_sheet.png", optimize=True)
    recipes = recipe_rows(load_recipe(RECIPES / f"scenes_{attribute}.safetensors") for attribute in STEERED)
    quality = sae.info["held_out"]
    accuracy = load_tensors(CLASSIFIER_FILE, "classifier")[1]["info"]["accuracy"]
    told = "\n".join(
        f"| {size} | {' | '.join(f'{value:.3f}' for value in of.values())} |" for size, of in accuracy.items()
    )
    names = list(next(iter(accuracy.values())))
    card = CARD_TEXT.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        text=sum(p.numel() for p in text.parameters()) / 1e6, d=DENOISER, c=CLASSIFIER, s=SAE, r=RECIPE, t=TWINS,
        cfg=CFG, words_of_twins=len(TWINS["words"]), count=count, seed=CARD["seed"], words=", ".join(text.words),
        bias="\n".join(bias), recipes=recipes,
        accuracy=f"| height x width | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}\n{told}",
        sizes=", ".join(f"{height} x {width}" for height, width in scenes.SIZES),
        made=" x ".join(map(str, SAE["size"])),
        twins=" and ".join(f"{noises} noises of {h} x {w}" for (h, w), noises in TWINS["noises"].items()),
        fvu=quality["fvu"], l0=quality["l0"], dead=100 * quality["dead"],
    )  # fmt: skip
    (OUT / "README.md").write_text(card, encoding="utf-8")


def one_below_the_other(sheets: Sequence[np.ndarray]) -> np.ndarray:
    """Sheets (H x W x 3 each) with white beside the narrow ones."""
    width = max(sheet.shape[1] for sheet in sheets)
    return np.concatenate([
        np.pad(sheet, ((0, 0), (0, width - sheet.shape[1]), (0, 0)), constant_values=255) for sheet in sheets
    ])  # fmt: skip


CARD_TEXT = """# People in scenes

A small diffusion model that draws by prompt: one figure, anywhere and of any size from half of the picture's height to
all of it, before a drawn background. Heights and widths in training: {sizes}. Every occupation has a bias of its own,
known because we drew the training pictures. It is there to try, test and measure the method on pictures that are not
aligned. It is not a model of people: its classes are what a classifier sees in a drawing.

![Samples](contact_sheet.png)

## Denoiser
{parameters:.1f} M parameters, and {text:.1f} M in a text encoder of its own: the network of the avatars at work, whose
layers it began with. Trained on {d[images]} drawings of each size, {d[steps]} steps of AdamW at {d[lr]}, EMA
{d[ema]}; a step saw {d[batch]} squares of 8 x 8 pixels. Figures counted {d[figure]:g} times more than the rest, and
their faces {d[face]:g} times more than that. High noise came first more often, low noise in the end.

It knows these words: {words}. Others are ignored. A whole prompt reads "a doctor and a plant, wide, left": how
large the figure is and where it stands can be told, and mostly was in training. A prompt that leaves both open may give
halves of two figures.

## Bias
Shares drawn, and shares that the classifier sees in {count} pictures of each prompt (cfg {cfg:g}, seeds from {seed});
last the share of pictures in which it sees the occupation asked for.

| prompt | attribute | drawn | sampled | occupation seen |
|---|---|---|---|---|
{bias}

## Classifier
It finds the figure and reads what is in its frame; the background it reads off the whole picture. Trained on
{c[images]} drawings in which every attribute is balanced and independent. Accuracy on {c[test_images]} other balanced
drawings of each size:

{accuracy}

## Sparse autoencoder
TopK, {s[latents]} latents, k = {s[k]}, trained on what the prompt's half of the guided sampling puts out, for
{s[pictures]} pictures of {made} of all occupations (20 steps each), an eighth of them held out. Held-out figures: FVU
{fvu:.4f}, L0 {l0:.1f}, dead latents {dead:.1f} %.

## Recipes
One recipe serves all prompts and sizes. Made on {twins}, each drawn by
{words_of_twins} prompts that differ in the words for presentation and age; from pairs that differ in the class alone it
knows what changes, read off each position of a picture. With at most {r[per_class]} latents of every class by the class
mean difference. Strengths: the weakest of {r[strengths][twin]} that shows the class asked for in
at least {r[success]:.0%} of its pictures, or the one that shows it most often, on {r[tuning_pictures]} pictures of
the four occupations at each size, seed {r[tuning_seed]}. The benchmark (`benchmarks/scenes.py`) uses other seeds.

| attribute | latents | mode | from | strength per class | gate agrees with TopK |
|---|---|---|---|---|---|
{recipes}

## Limits
- There is no recipe for age: one from the same twins turned 88 of 100 pictures of doctors, but only 58 of 100 kept
  their skin tone.
- Of small figures, in pictures 64 pixels high, and of very large ones fewer turn, and some change their skin tone
  ([results](../../docs/results.md#people-in-scenes)).
- One figure a picture. It stands in steps of 8 pixels, and its size goes in steps of 16.
- Rare combinations, such as an old feminine firefighter, were seldom drawn.
- Rebuild everything with `python models/making/make_scenes.py`. Another processor gives slightly other weights.
"""


STAGES = {
    "classifier": (train_classifier, CLASSIFIER_FILE),
    "denoiser": (train_denoiser, DENOISER_FILE),
    "sae": (train_scenes_sae, SAE_FILE),
    "recipes": (make_recipes, RECIPES / "scenes_presentation.safetensors"),
    "card": (make_card, OUT / "README.md"),
}

if __name__ == "__main__":
    build(STAGES, WORK, __doc__)
