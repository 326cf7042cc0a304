"""The per-step probes: the fit against an independent optimum, honest accuracy, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from difflens_core.activations import Activations
from difflens_core.files import DiffLensError
from difflens_core.locate import save_probes, train_probes
from difflens_core.locate.probes import balanced_accuracy, check_labels, fit_logistic, load_probes


def objective(flat: np.ndarray, x: torch.Tensor, labels: torch.Tensor, decay: float) -> tuple[float, np.ndarray]:
    """Mean over classes of each class's mean cross entropy, plus decay, in float64; and its gradient."""
    flat = torch.tensor(flat, requires_grad=True)
    weight, bias = flat[:12].view(3, 4), flat[12:]
    surprise = (x @ weight.T + bias).logsumexp(dim=1) - (x * weight[labels]).sum(dim=1) - bias[labels]
    loss = sum(surprise[labels == c].mean() for c in range(3)) / 3 + decay * (weight**2).sum()
    loss.backward()
    return loss.item(), flat.grad.numpy()


def test_fit_logistic_finds_the_optimum_that_scipy_finds(toys):
    labels = torch.tensor([0] * 60 + [1] * 25 + [2] * 15)
    x = toys.random(0)(100, 4) * 3 + 5 + torch.eye(4)[labels]
    weight, bias = fit_logistic(x, labels, 3, weight_decay=1e-2)
    scale = float(x.std(dim=0).mean())  # the decay acts on weights of inputs of unit scale
    data = (x.double() - x.double().mean(dim=0)) / scale
    best = minimize(objective, np.zeros(15), args=(data, labels, 1e-2), jac=True, tol=1e-10).x
    expected = data.numpy() @ best[:12].reshape(3, 4).T + best[12:]
    found = (x @ weight.T + bias).double().numpy()
    # A constant added to every logit of a picture changes nothing.
    np.testing.assert_allclose(
        *(logits - logits.mean(axis=1, keepdims=True) for logits in (found, expected)), atol=5e-3
    )


def test_a_rare_class_weighs_as_much_as_a_common_one(toys):
    noise = toys.random(1)(1100, 1)
    labels = (torch.arange(1100) >= 1000).long()
    x = noise + labels[:, None] * 2.0
    weight, bias = fit_logistic(x, labels, 2, 1e-3)
    boundary = float((bias[0] - bias[1]) / (weight[1, 0] - weight[0, 0]))
    assert boundary == pytest.approx(1.0, abs=0.2)


def test_fit_logistic_works_where_the_host_has_gradients_off(toys):
    with torch.inference_mode():
        x, labels = toys.random(0)(20, 3), torch.arange(20) % 2
        weight, _ = fit_logistic(x, labels, 2, 1e-3)
    assert weight.abs().sum() > 0 and not weight.requires_grad


def labelled(toys, signal: float) -> tuple[Activations, torch.Tensor]:
    """A capture that hides the class in channel 0, more strongly from step to step."""
    activations, labels = toys.activations(pictures=90), torch.arange(90) % 3
    values = activations.values.clone()
    values[:, :, 0] += (signal * torch.arange(3)[:, None] * (labels - 1)).view(3, 90, 1, 1)
    return Activations(values, activations.progress, "middle"), labels


def test_probes_read_what_is_there_and_say_at_which_step(toys):
    activations, labels = labelled(toys, 6.0)
    steps = []
    probes = train_probes(activations, toys.sae(k=12), labels, "age", toys.classes, on_step=steps.append)
    assert steps == [1, 2, 3] and probes.weight.shape == (3, 3, 6) and probes.bias.shape == (3, 3)
    assert probes.accuracy[2] > 0.9 and probes.accuracy[0] < 0.6


def test_accuracy_is_measured_on_pictures_that_were_not_fitted(toys):
    activations = toys.activations(pictures=60, width=40)
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(0))
    probes = train_probes(activations, toys.sae(width=40, latents=80, k=40), labels, "age", toys.classes, 0.0)
    assert float(probes.accuracy.mean()) < 0.55, "40 channels fit 45 random labels: only held-out ones show chance"


def test_logits_read_the_mean_over_positions(toys):
    probes, x = toys.probes(), toys.random(0)(2, 4, 6)
    for b, k in np.ndindex(2, 3):
        expected = sum(float(x[b, p] @ probes.weight[1, k]) for p in range(4)) / 4 + float(probes.bias[1, k])
        assert float(probes.logits(x, 1)[b, k]) == pytest.approx(expected, abs=1e-5)
    assert probes.step_at(0.3) == 1


def test_trained_probes_read_the_rows_that_steering_reads(toys):
    activations, labels = labelled(toys, 3.0)
    sae = toys.sae(k=2)
    probes = train_probes(activations, sae, labels, "age", toys.classes)
    rows = (activations.values[2].flatten(2).transpose(1, 2) - sae.normalisation.mean[2]) / sae.normalisation.scale[2]
    weight, bias = fit_logistic(rows.mean(dim=1), labels, 3, 1e-3)
    torch.testing.assert_close(probes.logits(rows, 2), rows.mean(dim=1) @ weight.T + bias, atol=2e-2, rtol=1e-2)


def test_balanced_accuracy_is_the_mean_over_classes():
    found = balanced_accuracy(torch.tensor([0, 0, 0, 1, 0]), torch.tensor([0, 0, 0, 1, 1]))
    assert float(found) == pytest.approx((1 + 0.5) / 2)


def test_labels_that_do_not_fit_the_pictures_are_refused(toys):
    with pytest.raises(DiffLensError, match="11 labels for 12 captured pictures"):
        check_labels(torch.zeros(11, dtype=torch.int64), toys.classes, 12, "age")
    with pytest.raises(DiffLensError, match=r"adult \(3\), senior \(0\)"):
        check_labels(torch.tensor([0] * 9 + [1] * 3), toys.classes, 12, "age")
    with pytest.raises(DiffLensError, match="labels of another attribute"):
        check_labels(torch.arange(16) % 4, toys.classes, 16, "age")


def test_round_trip(toys, tmp_path):
    path = tmp_path / "p.safetensors"
    save_probes(path, toys.probes())
    found = load_probes(path)
    assert all(torch.equal(getattr(found, n), getattr(toys.probes(), n)) for n in ("weight", "bias", "progress"))
    assert (found.attribute, found.classes) == ("age", toys.classes)
