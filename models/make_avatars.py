"""Rebuild every file under models/avatars/ from seeds.

    python models/make_avatars.py            all stages, in order; finished stages are skipped
    python models/make_avatars.py denoiser   one stage again

A stage that is cut off goes on from its last checkpoint in models/avatars/.work/.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "benchmarks")]

import debias as bench  # noqa: E402
import portraits  # noqa: E402

from difflens_core.activations import Activations  # noqa: E402
from difflens_core.attribution import attribute_features, balancing_weights  # noqa: E402
from difflens_core.classifier import AttributeClassifier, load_classifier, save_classifier  # noqa: E402
from difflens_core.controls import mean_difference, random_features  # noqa: E402
from difflens_core.denoiser import Denoiser, fingerprint, load_denoiser, save_denoiser  # noqa: E402
from difflens_core.files import load_tensors  # noqa: E402
from difflens_core.plots import image_grid  # noqa: E402
from difflens_core.probes import save_probes, train_probes  # noqa: E402
from difflens_core.recipes import build_recipe, load_recipe, save_recipe, with_settings  # noqa: E402
from difflens_core.sae import load_sae, save_sae  # noqa: E402
from difflens_core.sampling import capture_pictures  # noqa: E402
from difflens_core.store import save_labels  # noqa: E402
from difflens_core.training import TrainingOptions, hold_out, learning_rate_share, measure_sae, train_sae  # noqa: E402

OUT = ROOT / "models" / "avatars"
WORK = OUT / ".work"
DENOISER_FILE = OUT / "difflens_models" / "avatars.safetensors"
CLASSIFIER_FILE = OUT / "difflens_classifiers" / "avatars.safetensors"
SAE_FILE = OUT / "difflens_saes" / "avatars.safetensors"
PROBES = OUT / "difflens_probes"
RECIPES = OUT / "difflens_recipes"
STEPS = 20

DENOISER = {"images": 40_000, "steps": 2_600, "batch": 64, "lr": 1e-3, "ema": 0.999, "seed": 1}
CLASSIFIER = {"images": 12_000, "test_images": 2_000, "epochs": 8, "batch": 100, "lr": 3e-3, "seed": 1_000}
SAE = {"pictures": 3_072, "latents": 1_024, "k": 32, "steps": 3_000, "seed": 2_000}

RECIPE = {
    "per_class": 120,
    "start": 0.2,
    "strengths": (1.5, 2.0),
    "success": 0.98,
    "tuning_pictures": 192,
    "tuning_seed": 3_000,
}
CARD = {"pictures": 512, "seed": 4_000}


def to_tensor(images) -> torch.Tensor:
    """uint8 B x H x W x 3 to float B x 3 x H x W in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def denoiser_loss(predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x0: torch.Tensor) -> torch.Tensor:
    """Clean-picture loss of `predict(noisy, sigma)` under x_t = (1 - sigma) x0 + sigma noise, sigma uniform.

    The weight 1 / (sigma^2 + 0.02) lies between the x0 loss and the velocity loss, so that details count.
    """
    sigma = torch.rand(len(x0))
    s = sigma[:, None, None, None]
    noisy = (1 - s) * x0 + s * torch.randn_like(x0)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = predict(noisy, sigma)
    error = (predicted.float() - x0).square().mean(dim=(1, 2, 3))
    return (error / (sigma.square() + 0.02)).mean()


def train_network(model: nn.Module, loss_at: Callable[[], torch.Tensor], c: dict, checkpoint: Path) -> nn.Module:
    """Train `model` by the options `c`; `loss_at()` draws a batch. Returns the average of its weights (EMA)."""
    ema = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=c["lr"], betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"model": model, "ema": ema, "optimiser": optimiser}
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    began, running = time.time(), 0.0
    for step in range(start, c["steps"]):
        torch.manual_seed(c["seed"] * 1_000_003 + step)  # a resumed run sees the same batches and noise
        for group in optimiser.param_groups:
            group["lr"] = c["lr"] * learning_rate_share(step, c["steps"])
        loss = loss_at()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        keep = min(c["ema"], (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - keep)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            speed = (step + 1 - start) / (time.time() - began)
            print(f"denoiser {step + 1}/{c['steps']} loss {running:.4f} {speed:.2f} steps/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == c["steps"]:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step + 1, **state}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return ema


def train_denoiser() -> None:
    c = DENOISER
    images, _ = portraits.render(c["images"], seed=c["seed"], balanced=False)
    torch.manual_seed(c["seed"])
    model = Denoiser()

    def loss_at() -> torch.Tensor:
        return denoiser_loss(model, to_tensor(images[torch.randint(len(images), (c["batch"],)).numpy()]))

    save_denoiser(DENOISER_FILE, train_network(model, loss_at, c, WORK / "denoiser.pt"), {"training": c})


def augment(x: torch.Tensor) -> torch.Tensor:
    """Shift by up to 2 pixels, blur some, add noise: generated pictures are less crisp than drawings."""
    dx, dy = torch.randint(-2, 3, (2,)).tolist()
    x = x.roll((dy, dx), dims=(2, 3))
    blurred = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    x = torch.lerp(x, blurred, torch.rand(len(x), 1, 1, 1))
    return x + 0.1 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)


def train_classifier() -> None:
    """Classifier on balanced drawings in which no attribute gives another away."""
    c = CLASSIFIER
    torch.manual_seed(c["seed"])
    images, traits = portraits.render(c["images"], seed=c["seed"], balanced=True)
    # Not the hair colour: seniors' hair is grey whatever it says.
    heads = portraits.ATTRIBUTES | {n: c for n, c in portraits.NUISANCES.items() if n != "hair_colour"}
    labels = {name: torch.from_numpy(traits[name]) for name in heads}
    model = AttributeClassifier(heads)
    steps = c["epochs"] * (c["images"] // c["batch"])
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, c["lr"], total_steps=steps)
    for step in range(steps):
        picks = torch.randint(len(images), (c["batch"],))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(augment(to_tensor(images[picks.numpy()])))
        loss = sum(torch.nn.functional.cross_entropy(logits[n].float(), labels[n][picks]) for n in labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"classifier {step + 1}/{steps} loss {loss.item():.4f}", flush=True)
    model.eval()
    images, traits = portraits.render(c["test_images"], seed=c["seed"] + 1, balanced=True)
    probabilities = model.classify(torch.from_numpy(images).float() / 255)
    accuracy = {n: float((probabilities[n].argmax(1).numpy() == traits[n]).mean()) for n in heads}
    print("classifier accuracy on balanced held-out drawings:", accuracy, flush=True)
    save_classifier(CLASSIFIER_FILE, model, {"training": c, "accuracy": accuracy})


def captured() -> tuple[Activations, torch.Tensor]:
    """Activations and pictures (n x H x W x 3 in [0, 1]) of the SAE's seed; sampled once."""
    count = SAE["pictures"]
    store = capture_pictures(
        load_denoiser(DENOISER_FILE), count, SAE["seed"], STEPS, folder=WORK / "capture",
        on_batch=lambda done: print(f"capture {done}/{count}", flush=True),
    )  # fmt: skip
    return store.activations(), store.samples().movedim(1, -1) / 2 + 0.5


def train_avatar_sae() -> None:
    """SAE on the activations of sampled pictures; an eighth of the pictures is held out to measure it."""
    train, held_out = hold_out(captured()[0])
    options = TrainingOptions(**{name: SAE[name] for name in ("latents", "k", "steps", "seed")})

    def report(step: int, loss: torch.Tensor, _: object) -> None:
        if step % 100 == 0:
            print(f"SAE {step}/{options.steps} loss {float(loss):.4f}", flush=True)

    sae = train_sae(train, options, report, WORK / "sae.pt")
    quality = asdict(measure_sae(sae, held_out))
    print("SAE on held-out pictures:", quality, flush=True)
    save_sae(SAE_FILE, replace(sae, info={**sae.info, "held_out": quality}), torch.float16)


def make_recipes() -> None:
    """Probes, attribution, recipe and controls of every attribute; strengths found on tuning seeds only."""
    model, classifier, sae = load_denoiser(DENOISER_FILE), load_classifier(CLASSIFIER_FILE), load_sae(SAE_FILE)
    activations, pictures = captured()
    parts = [classifier.classify(part) for part in pictures.split(256)]
    read = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    save_labels(WORK / "capture", {name: (classifier.attributes[name], p.argmax(dim=1)) for name, p in read.items()})
    before, _ = bench.run(model, RECIPE["tuning_pictures"], seed=RECIPE["tuning_seed"])
    for attribute, classes in portraits.ATTRIBUTES.items():
        labels = read[attribute].argmax(dim=1)
        probes = train_probes(activations, sae, labels, attribute, classes)
        save_probes(PROBES / f"avatars_{attribute}.safetensors", probes)
        weights = balancing_weights(labels, [p.argmax(dim=1) for name, p in read.items() if name != attribute])
        attribution = attribute_features(activations, sae, probes, labels, weights=weights)
        recipe = build_recipe(
            attribution, sae, probes, activations, RECIPE["per_class"], fingerprint(model.state_dict())
        )
        recipe = with_settings(recipe, start=RECIPE["start"])
        recipe = tuned(recipe, model, classifier, before, attribute)
        controls = {
            "random": random_features(recipe, sae, seed=1),
            "mean_difference": mean_difference(recipe, activations, labels, weights),
        }
        save_recipe(RECIPES / f"avatars_{attribute}.safetensors", recipe)
        for name, control in controls.items():
            save_recipe(RECIPES / "controls" / f"{attribute}_{name}.safetensors", control)


def tuned(recipe, model: Denoiser, classifier, before: torch.Tensor, attribute: str):
    """The recipe at the weakest strength, class by class, that shows the class asked for often enough."""
    success = []
    for strength in RECIPE["strengths"]:
        after, targets = bench.run(
            model, len(before), with_settings(recipe, strength=strength), seed=RECIPE["tuning_seed"]
        )
        shown = classifier.classify(after)[attribute].argmax(dim=1).numpy()
        asked = targets.first(len(before))
        success.append([float((shown[asked == c] == c).mean()) for c in range(len(recipe.classes))])
        print(f"{attribute} strength {strength}: {success[-1]}", flush=True)
    table = torch.tensor(success, dtype=torch.float64)
    enough = table >= table.amax(dim=0).clamp(max=RECIPE["success"])
    first = enough.int().argmax(dim=0).tolist()
    strengths = tuple(RECIPE["strengths"][index] for index in first)
    figures = {"success": [success[index][c] for c, index in enumerate(first)], "tuned_on": dict(RECIPE)}
    return replace(recipe, strength=strengths, info={**recipe.info, **figures})


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
    recipes = []
    for attribute in portraits.ATTRIBUTES:
        recipe = load_recipe(RECIPES / f"avatars_{attribute}.safetensors")
        strengths = ", ".join(f"{name} {s:g}" for name, s in zip(recipe.classes, recipe.strength, strict=True))
        agreement = recipe.info["gate_agreement"]
        how = f"{recipe.mode} | {recipe.start:.0%} | {strengths}"
        recipes.append(f"| {attribute} | {len(recipe.features)} | {how} | {agreement:.3f} |")
    accuracy = load_tensors(CLASSIFIER_FILE, "classifier")[1]["info"]["accuracy"]
    quality = sae.info["held_out"]
    text = CARD_TEXT.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        d=DENOISER, c=CLASSIFIER, s=SAE, r=RECIPE, count=count, seed=CARD["seed"],
        bias="\n".join(bias), recipes="\n".join(recipes),
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
{d[images]} portraits from `models/portraits.py`, seed {d[seed]}. Presentation, age and skin tone are drawn
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
The {r[per_class]} best latents of every class by the contrastive score. Strengths: the weakest of
{r[strengths]} that shows the class asked for in at least {r[success]:.0%} of its pictures, on
{r[tuning_pictures]} pictures of seed {r[tuning_seed]}. The benchmark uses other seeds.

| attribute | latents | mode | from | strength per class | gate agrees with TopK |
|---|---|---|---|---|---|
{recipes}

`difflens_probes/` holds the linear probes behind them, one a step and attribute (`difflens_core.probes.load_probes`).
`difflens_recipes/controls/` holds what the recipes are compared with: random latents of the same count and edit norm,
and the mean difference of the raw activations.

## Limits
- Portraits are aligned and centred. Levels per position, which the recipes use, need that.
- The attributes are independent in the data, so nothing here shows how the method copes with entangled ones.
- Sampling at another size than 64 x 64 is not supported.
- Rebuild everything with `python models/make_avatars.py`. Another processor gives slightly other weights.
"""


STAGES = {
    "denoiser": (train_denoiser, DENOISER_FILE),
    "classifier": (train_classifier, CLASSIFIER_FILE),
    "sae": (train_avatar_sae, SAE_FILE),
    "recipes": (make_recipes, RECIPES / "controls" / "skin_tone_mean_difference.safetensors"),
    "card": (make_card, OUT / "README.md"),
}


def build(stages: dict[str, tuple[Callable[[], None], Path]], work: Path, asked: list[str]) -> None:
    """Run the stages asked for by name, or all those whose result is not there yet."""
    torch.set_flush_denormal(True)  # tiny Adam moments would slow the CPU many times over
    work.mkdir(parents=True, exist_ok=True)
    for name, (make, result) in stages.items():
        if name in asked or (not asked and not result.exists()):
            make()


if __name__ == "__main__":
    build(STAGES, WORK, sys.argv[1:])
