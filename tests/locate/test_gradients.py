"""General Integrated Gradients: against the one-pass form, a closed form, and on the avatars' real network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from difflens_core.classifiers import load_classifier
from difflens_core.locate import integrated_gradients, integrated_gradients_of, picture_objective
from difflens_core.networks import load_denoiser, start_noise
from difflens_core.sae import load_sae

AVATARS = Path(__file__).resolve().parents[2] / "models" / "avatars"


def probe_objective(sae, probes, h, step: int, target):
    """The probe's probability of `target` on the reconstruction, written as a function of the hidden state."""
    error = h - sae.reconstruct(h, step)

    def objective(at, pictures):
        rows = sae.normalisation.apply(at - error[pictures], step)
        return probes.logits(rows, step).softmax(dim=1).gather(1, target[pictures, None])[:, 0]

    return objective


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_it_equals_the_one_pass_form_for_a_linear_probe(toys, batch):
    sae, probes, h = toys.sae(), toys.probes(), toys.activations(pictures=6).values[1]
    target = torch.tensor([0, 1, 2, 2, 1, 0])
    latents, found, error = integrated_gradients_of(probe_objective(sae, probes, h, 1, target), h, sae, 1, batch=batch)
    expected, _ = integrated_gradients(latents, sae, probes, 1, target)
    assert torch.equal(latents.indices, sae.encode(h, 1).indices)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert float(error.max()) < 1e-6 and float(found.abs().max()) > 1e-2


def test_what_the_sae_does_not_explain_stays_along_the_path(toys):
    """F(h) = (sum of h)^2 / 2 has the IG z_n scale <D_n, 1> (mean of the sums at both ends)."""
    sae, h = toys.sae(), toys.activations(pictures=3).values[1]
    latents, found, _ = integrated_gradients_of(lambda at, who: at.flatten(1).sum(1) ** 2 / 2, h, sae, 1, points=3)
    rows = sae.decoder.sum(dim=1)[latents.indices] * sae.normalisation.scale[1]
    added = (latents.values * rows).sum(dim=(1, 2))
    middle = h.flatten(1).sum(dim=1) - added / 2
    torch.testing.assert_close(found, latents.values * rows * middle[:, None, None], atol=1e-3, rtol=1e-4)


def test_too_few_points_are_told_by_the_completeness_error(toys):
    sae, probes, h = toys.sae(), toys.probes(20.0), toys.activations(pictures=6).values[1]
    objective = probe_objective(sae, probes, h, 1, torch.zeros(6, dtype=torch.int64))
    few, many = (integrated_gradients_of(objective, h, sae, 1, points)[2] for points in (2, 64))
    assert float(many.max()) < 1e-4 < 1e-2 < float(few.max())


def test_half_precision_states_go_through_the_objective_as_they_are(toys):
    sae, h, seen = toys.sae(), toys.activations(pictures=2).values[1].half(), []

    def objective(at, pictures):
        seen.append(at.dtype)
        return at.float().square().flatten(1).sum(dim=1)

    _, ig, error = integrated_gradients_of(objective, h, sae, 1)
    assert set(seen) == {torch.float16} and ig.dtype == torch.float32 and float(error.max() / ig.abs().sum()) < 1e-2


def test_it_works_in_inference_mode_as_hosts_run_nodes(toys):
    with torch.inference_mode():
        sae, h = toys.sae(), toys.activations(pictures=2).values[1] * 1.0
        _, ig, error = integrated_gradients_of(lambda at, who: at.flatten(1).sum(dim=1).tanh(), h, sae, 1)
    assert float(error.max()) < 1e-3 and torch.isfinite(ig).all()


def test_completeness_through_the_rest_of_the_avatars_network_and_the_classifier():
    model = load_denoiser(AVATARS / "difflens_models" / "avatars.safetensors")
    classifier = load_classifier(AVATARS / "difflens_classifiers" / "avatars.safetensors")
    sae = load_sae(AVATARS / "difflens_saes" / "avatars.safetensors")
    step, noise = sae.normalisation.step_at(0.5), start_noise(2, seed=5)[1:]
    with torch.no_grad():
        halfway = 0.5 * model(noise, torch.ones(1)) + 0.5 * noise
        h, emb = model.encode(halfway, torch.full((1,), 0.5))
        h = model.middle_block(h, emb)
        shown = classifier(model.decode(h, emb))["age"].argmax(dim=1)
        explained = (sae.reconstruct(h, step) - sae.normalisation.mean[step][:, None, None]) / sae.normalisation.scale[
            step
        ]
        explained = (explained - sae.decoder_bias[:, None, None]) * sae.normalisation.scale[step]
    objective = picture_objective(lambda h, pictures: model.decode(h, emb[pictures]), classifier, "age", shown)
    _, ig, error = integrated_gradients_of(objective, h, sae, step, points=256, batch=32)
    with torch.no_grad():
        gain = float(objective(h, torch.tensor([0])) - objective(h - explained, torch.tensor([0])))
    assert gain > 0.5  # the latents decide what is shown
    assert abs(float(ig.sum()) - gain) < 0.02 and float(error) < 0.02
