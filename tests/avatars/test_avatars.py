"""The shipped avatars: what the model card says must hold for the files that are there."""

from pathlib import Path

import portraits
import pytest
import torch
from what_is_seen import read

from difflens_core.activations import Activations, Kept, Shown, edit_site
from difflens_core.classifiers import load_classifier
from difflens_core.files import made_by
from difflens_core.locate import LabelledPictures
from difflens_core.measure.fairness import kept_share
from difflens_core.networks import load_denoiser, sample, start_noise
from difflens_core.sae import load_sae
from difflens_core.steer import Steering, load_recipe, mean_difference, with_settings
from difflens_core.steer.recipe_files import same_rows
from difflens_core.targets import Targets

AVATARS = Path(__file__).resolve().parents[2] / "models" / "avatars"
STEPS = 20
ATTRIBUTES = tuple(portraits.ATTRIBUTES)


@pytest.fixture(scope="module")
def model():
    return load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")


@pytest.fixture(scope="module")
def classifier():
    return load_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")


@pytest.fixture(scope="module")
def captured(model):
    """96 pictures and what the site put out while they were sampled."""
    keep = Kept("middle_block", range(STEPS))
    pictures = sample(model, start_noise(96, seed=21), STEPS, kept=[keep])
    return pictures, Activations(keep.taken().movedim(-1, 2), torch.arange(STEPS) / STEPS, "middle_block")


def recipe_of(attribute):
    return load_recipe(AVATARS / "difflens_recipes" / f"avatars_{attribute}.safetensors")


def test_shipped_files_stay_under_60_megabytes():
    assert sum(path.stat().st_size for path in AVATARS.rglob("*") if ".work" not in path.parts) < 60e6


def test_classifier_reads_balanced_drawings_it_never_saw(classifier):
    images, traits = portraits.render(400, seed=987, balanced=True)
    probabilities = classifier.classify(torch.from_numpy(images).float() / 255)
    for attribute in ATTRIBUTES:
        right = (probabilities[attribute].argmax(1).numpy() == traits[attribute]).mean()
        assert right >= 0.97, f"{attribute}: {right:.3f}"


def test_sampled_pictures_keep_the_drawn_bias(classifier, captured):
    found = read(classifier, captured[0])
    for attribute, shares in portraits.BIAS.items():
        common = max(range(len(shares)), key=shares.__getitem__)
        share = float((found[attribute] == common).float().mean())
        assert abs(share - shares[common]) < 0.2, f"{attribute}: {share:.2f} sampled, {shares[common]:.2f} drawn"


def test_swapping_the_site_output_swaps_every_attribute(model, classifier, captured):
    """The site causes the picture: another picture's site output, at every step, carries over all its classes."""
    pictures, activations = captured
    x, partner = start_noise(96, seed=21)[:48], activations.values[:, 48:].float()
    for step, sigma in enumerate(torch.linspace(1, 0, STEPS + 1)[:-1]):
        with torch.inference_mode(), edit_site(model, "middle_block", lambda h, s=step: partner[s]):
            x0 = model(x, sigma.expand(48))
        x = x0 + (x - x0) * (1 - 1 / (STEPS * float(sigma)))
    wanted, shown = read(classifier, pictures[48:]), read(classifier, x.clamp(-1, 1))
    for attribute in ATTRIBUTES:
        assert kept_share(wanted[attribute].numpy(), shown[attribute].numpy()) >= 0.97, attribute


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_mean_difference_without_an_sae_moves_the_attribute(model, classifier, captured, attribute):
    """Plain class means of a few raw activations: the site obeys before any SAE exists."""
    pictures, activations = captured
    seen = LabelledPictures(activations, read(classifier, pictures)[attribute], {})
    recipe = mean_difference(recipe_of(attribute), [seen])
    raw = with_settings(recipe, mode="shift", strength=1.0)
    ends = [0, len(recipe.classes) - 1]  # a difference overshoots the middle classes of an ordered attribute
    for wanted in ends:
        shares = tuple(float(c == wanted) for c in range(len(recipe.classes)))
        steering = Steering(raw, Targets(attribute, recipe.classes, shares).of)
        pictures = sample(model, start_noise(16, seed=22), STEPS, [steering])
        assert float((read(classifier, pictures)[attribute] == wanted).float().mean()) >= 0.8


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_shipped_recipe_shows_the_class_asked_for(model, classifier, attribute):
    recipe = recipe_of(attribute)
    targets = Targets(attribute, recipe.classes, (1 / len(recipe.classes),) * len(recipe.classes), seed=3)
    pictures = sample(model, start_noise(48, seed=23), 20, [Steering(recipe, targets.of)])
    assert kept_share(targets.first(48), read(classifier, pictures)[attribute].numpy()) >= 0.9


def test_recipes_and_sae_belong_to_the_shipped_model(model):
    sae = load_sae(AVATARS / "difflens_saes" / "avatars.safetensors")
    assert sae.width == model.config.width
    for attribute in ATTRIBUTES:
        recipe = recipe_of(attribute)
        assert made_by(recipe.model, model.state_dict())
        assert same_rows(sae.decoder[recipe.features], recipe.decoder)


@pytest.mark.parametrize(
    "file", sorted(AVATARS.parent.glob("*/difflens_recipes/**/*.safetensors")), ids=lambda f: f.stem
)
def test_every_shipped_recipe_and_control_steers_without_an_sae(file):
    recipe = load_recipe(file)
    h = torch.randn(2, 256, 8, 8, generator=torch.Generator().manual_seed(5))
    edited = Steering(recipe, lambda images: images % len(recipe.classes))(h, 0.5, torch.arange(2), Shown(h, 0.95))
    assert edited.isfinite().all() and not torch.equal(edited, h)
