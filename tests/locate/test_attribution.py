"""Integrated Gradients against autograd on a dense SAE, and the sums and contrasts against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from difflens_core.activations import Activations
from difflens_core.classifiers import NO_CLASS
from difflens_core.files import DiffLensError
from difflens_core.locate import (
    METHODS,
    attribute_features,
    balancing_weights,
    contrast,
    integrated_gradients,
    measure_separation,
    train_probes,
)
from difflens_core.locate.attribution import (
    activation_gradient,
    add_by_class,
    class_differences,
    difference,
    path_integral,
    tied,
)
from difflens_core.sae import Latents, Normalisation, SparseAutoencoder
from difflens_core.steer import build_recipe

LABELS = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 2, 0, 1, 2])


def autograd_ig(latents: Latents, sae, probes, step: int, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """IG of every latent, B x P x N, by 300 Gauss points, dense matrices and autograd in float64."""
    z = torch.zeros(*latents.indices.shape[:-1], sae.latents).scatter_add(-1, latents.indices, latents.values).double()
    decoder, bias = sae.decoder.double(), sae.decoder_bias.double()
    weight, offset = probes.weight[step].double(), probes.bias[step].double()
    total = torch.zeros_like(z)
    for node, share in zip(*np.polynomial.legendre.leggauss(300), strict=True):
        point = ((node + 1) / 2 * z).requires_grad_()
        logits = (point @ decoder + bias).mean(dim=1) @ weight.T + offset
        (logits / temperature).softmax(dim=1).gather(1, target[:, None]).sum().backward()
        total += point.grad * share / 2
    return total * z


@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (8.0, 1.0), (8.0, 3.0), (1.0, 0.2)])
def test_exact_ig_equals_the_float64_autograd_integral(toys, scale, temperature):
    sae, probes, target = toys.sae(), toys.probes(scale), LABELS[:6]
    latents = sae.encode(toys.activations(pictures=6).values[1], 1)
    found, error = integrated_gradients(latents, sae, probes, 1, target, temperature)
    expected = autograd_ig(latents, sae, probes, 1, target, temperature)
    assert float((found.double() - expected.gather(-1, latents.indices)).abs().max()) < 1e-6
    assert float(error.max()) < 1e-6


@pytest.mark.parametrize(
    ("scale", "temperature"), [(0.01, 1.0), (1.0, 0.01), (1.0, 1000.0), (30.0, 0.1), (300.0, 1.0), (300.0, 100.0)]
)
def test_ig_is_complete_at_extreme_logits_and_temperatures(toys, scale, temperature):
    sae, probes = toys.sae(), toys.probes(scale)
    latents = sae.encode(toys.activations().values[0], 0)
    ig, error = integrated_gradients(latents, sae, probes, 0, LABELS, temperature)
    decoded = torch.einsum("bpk,bpkc->bc", latents.values.double(), sae.decoder.double()[latents.indices]) / 4
    start = sae.decoder_bias.double() @ probes.weight[0].double().T + probes.bias[0].double()
    p = [(logits / temperature).softmax(-1) for logits in (start, start + decoded @ probes.weight[0].double().T)]
    gain = p[1].gather(1, LABELS[:, None])[:, 0] - p[0][LABELS]
    assert float((ig.double().sum(dim=(1, 2)) - gain).abs().max()) < 1e-5
    assert float(error.max()) < 1e-5


def test_ig_from_a_baseline_equals_the_float64_autograd_integral_from_there(toys):
    sae, probes, target = toys.sae(), toys.probes(4.0), LABELS[:6]
    values = toys.activations(pictures=12).values[1]
    latents, origin = sae.encode(values[:6], 1), sae.encode(values[6:], 1)
    step = difference(latents, origin)
    found, error = integrated_gradients(step, sae, probes, 1, target, 1.5, origin)
    dense = [torch.zeros(6, 4, 20).scatter_(-1, z.indices, z.values).double() for z in (origin, latents)]
    decoder, bias = sae.decoder.double(), sae.decoder_bias.double()
    weight, offset = probes.weight[1].double(), probes.bias[1].double()
    total = torch.zeros(6, 4, 20, dtype=torch.float64)
    for node, share in zip(*np.polynomial.legendre.leggauss(300), strict=True):
        point = (dense[0] + (node + 1) / 2 * (dense[1] - dense[0])).requires_grad_()
        logits = (point @ decoder + bias).mean(dim=1) @ weight.T + offset
        (logits / 1.5).softmax(dim=1).gather(1, target[:, None]).sum().backward()
        total += point.grad * share / 2
    summed = torch.zeros(6, 4, 20).scatter_add_(-1, step.indices, found)
    torch.testing.assert_close(summed.double(), total * (dense[1] - dense[0]), atol=1e-6, rtol=0)
    assert float(error.max()) < 1e-6


def test_a_baseline_is_read_picture_by_picture_and_must_fit(toys):
    activations, sae, probes = toys.activations(), toys.sae(), toys.probes()
    other = Activations(activations.values.flip(1), activations.progress, activations.site)
    found = attribute_features(activations, sae, probes, LABELS, METHODS[1], baseline=other)
    same = attribute_features(activations, sae, probes, LABELS, METHODS[1], baseline=activations)
    assert found.completeness < 1e-6 and float(found.scores.abs().max()) > 1e-3
    assert float(same.scores.abs().max()) < 1e-6, "a picture does not differ from itself"
    steps = []
    for s in range(3):
        step = sae.encode(activations.values[s], s)
        origin = sae.encode(other.values[s], s)
        ig, _ = integrated_gradients(difference(step, origin), sae, probes, s, LABELS, 1.0, origin)
        total = torch.zeros(3, 20, 1)
        add_by_class(total, ig, difference(step, origin), LABELS, torch.zeros(4, dtype=torch.int64))
        steps.append(total[:, :, 0] / 4)
    torch.testing.assert_close(found.scores, torch.stack(steps).sum(dim=0), atol=1e-6, rtol=1e-5)
    with pytest.raises(DiffLensError, match="serves integrated gradients, not class mean"):
        attribute_features(activations, sae, probes, LABELS, baseline=other)
    with pytest.raises(DiffLensError, match="pictures 6 instead of 12"):
        attribute_features(activations, sae, probes, LABELS, METHODS[1], baseline=other.part(0, 6))


def test_ig_is_incomplete_if_a_latent_is_lost(toys):
    sae, probes = toys.sae(), toys.probes()
    latents = sae.encode(toys.activations().values[0], 0)
    ig, error = integrated_gradients(latents, sae, probes, 0, LABELS)
    assert float((ig[:, :, 1:].sum(dim=(1, 2)) - ig.sum(dim=(1, 2))).abs().max()) > 1e-3 > float(error.max())


@pytest.mark.parametrize("size", [1.0, 30.0, 400.0])
def test_path_integral_equals_adaptive_quadrature(toys, size):
    change = toys.random(0)(1, 3).double() * size
    start, target = toys.random(1)(1, 3).double() - 0.4 * change, torch.tensor([1])

    def integrand(a: float, k: int) -> float:
        p = (start + a * change)[0].softmax(-1)
        return float(p[1] * (float(k == 1) - p[k]))

    expected = [quad(integrand, 0, 1, args=(k,), epsabs=1e-11, points=[0.4], limit=200)[0] for k in range(3)]
    np.testing.assert_allclose(path_integral(start, change, target)[0].numpy(), expected, atol=1e-9)


def test_sums_by_class_and_cell_equal_loops(toys):
    latents, cells = toys.sae().encode(toys.activations().values[0], 0), torch.tensor([0, 2, 2, 1])
    sums = torch.full((3, 20, 3), 7.0)
    expected = sums.clone()
    for b, p, j in np.ndindex(12, 4, 4):
        expected[LABELS[b], latents.indices[b, p, j], cells[p]] += latents.values[b, p, j]
    add_by_class(sums, latents.values, latents, LABELS, cells)
    torch.testing.assert_close(sums, expected)


def test_weights_count_as_so_many_pictures(toys):
    """A picture that weighs 3 is worth three of it."""
    activations, sae, weights = toys.activations(), toys.sae(), 1 + torch.arange(12) % 3
    more = torch.arange(12).repeat_interleave(weights)
    several = Activations(activations.values[:, more], activations.progress, "middle")
    cut = Activations(activations.values.split(5, dim=1), activations.progress, "middle")
    expected = attribute_features(several, sae, toys.probes(), LABELS[more])
    for given in (activations, cut):
        found = attribute_features(given, sae, toys.probes(), LABELS, weights=weights.float())
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)


def test_of_large_maps_cells_are_scored_by_their_means(toys):
    """Each position of an 8 x 8 map four times over, next to each other: the cells' means are the positions."""
    sae, probes, values = toys.sae(), toys.probes(), toys.random(3)(3, 12, 6, 8, 8)
    large = values.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    small, found = (
        attribute_features(Activations(of, torch.arange(3) / 3, "middle"), sae, probes, LABELS)
        for of in (values, large)
    )
    torch.testing.assert_close(found.scores, small.scores, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(found.difference, small.difference, atol=1e-5, rtol=1e-4)


def test_balancing_weights_give_every_class_the_same_mix_of_the_other_attributes():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (600,), generator=draw)
    others = [(labels + torch.randint(3, (600,), generator=draw)) % 4, torch.randint(2, (600,), generator=draw)]
    weights = balancing_weights(labels, others)
    for other in others:
        overall = torch.bincount(other) / 600
        for c in range(3):
            mix = torch.bincount(other[labels == c], weights[labels == c], minlength=len(overall))
            if (mix > 0).all():
                torch.testing.assert_close(mix / mix.sum(), overall, atol=0.02, rtol=0)


def test_what_a_class_never_shows_is_not_balanced_away():
    """All of a class would weigh nothing."""
    labels = torch.arange(90) % 3
    grey = (labels == 2).long()
    tone = torch.arange(90) // 3 % 2
    misread = grey.clone()
    misread[0] = 1
    for hair in (grey, misread):
        weights = balancing_weights(labels, [hair, tone])
        torch.testing.assert_close(weights, balancing_weights(labels, [tone]))
        assert weights.min() > 0.5


@pytest.mark.parametrize(("shown", "found"), [(0, True), (1, True), (3, False), (8, False)])
def test_an_attribute_is_tied_to_a_class_that_hardly_ever_shows_it(shown, found):
    """20 pictures of each class; if they showed it alike, half of those that do would be class 1's."""
    labels, other = torch.arange(40) // 20, torch.zeros(40, dtype=torch.int64)
    other[:16], other[20 : 20 + shown] = 1, 1
    assert tied(labels, other) == found
    few = torch.zeros(40, dtype=torch.int64)
    few[:15] = 1
    assert not tied(labels, few), "7.5 pictures expected are too few to tell"


def test_contrast_is_each_class_minus_the_mean_of_the_others(toys):
    rows = toys.random(0)(3, 5)
    expected = [rows[i] - (rows[(i + 1) % 3] + rows[(i + 2) % 3]) / 2 for i in range(3)]
    torch.testing.assert_close(contrast(rows), torch.stack(expected))


def test_ig_scores_are_the_mean_over_the_pictures_of_the_class_summed_over_steps(toys):
    activations, sae, probes = toys.activations(), toys.sae(), toys.probes()
    expected = torch.zeros(3, 20, dtype=torch.float64)
    for s in range(3):
        latents = sae.encode(activations.values[s], s)
        ig = autograd_ig(latents, sae, probes, s, LABELS, 2.0).sum(dim=1)
        for c in range(3):
            expected[c] += ig[c == LABELS].mean(dim=0)
    steps = []
    found = attribute_features(activations, sae, probes, LABELS, METHODS[1], temperature=2.0, on_step=steps.append)
    torch.testing.assert_close(found.scores.double(), expected, atol=1e-6, rtol=0)
    assert found.completeness < 1e-6 and steps == [1, 2, 3]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_activation_times_gradient_equals_autograd_on_the_dense_sae(toys, temperature):
    sae, probes, target = toys.sae(), toys.probes(0.5), LABELS[:6]
    latents = sae.encode(toys.activations(pictures=6).values[1], 1)
    z = torch.zeros(6, 4, 20).scatter_(-1, latents.indices, latents.values).double().requires_grad_()
    pooled = (z @ sae.decoder.double() + sae.decoder_bias.double()).mean(dim=1)
    logits = pooled @ probes.weight[1].double().T + probes.bias[1].double()
    p = (logits / temperature).softmax(dim=1).gather(1, target[:, None])[:, 0]
    (p / (1 - p)).log().sum().backward()
    found = activation_gradient(latents, sae, probes, 1, target, temperature)
    torch.testing.assert_close(found.double(), (z * z.grad).gather(-1, latents.indices).detach(), atol=1e-5, rtol=1e-5)


def test_activation_times_gradient_survives_a_probe_that_is_sure(toys):
    latents = toys.sae().encode(toys.activations(pictures=6).values[1], 1)
    sure = toys.probes(1000.0)
    for target in range(3):
        found = activation_gradient(latents, toys.sae(), sure, 1, torch.full((6,), target))
        assert torch.isfinite(found).all() and float(found.abs().amax(dim=(1, 2)).min()) > 1


@pytest.mark.parametrize("method", METHODS)
def test_scores_add_up_over_steps_and_do_not_hang_on_the_number_of_positions(toys, method):
    activations, sae, probes = toys.activations(), toys.sae(), toys.probes()
    found = attribute_features(activations, sae, probes, LABELS, method)
    steps = [
        Activations(activations.values[s : s + 1], activations.progress[s : s + 1], activations.site) for s in range(3)
    ]
    alone = torch.stack([attribute_features(step, sae, probes, LABELS, method).scores for step in steps])
    torch.testing.assert_close(alone.sum(dim=0), found.scores, atol=1e-5, rtol=1e-4)
    twice = activations.values.repeat_interleave(2, dim=4)  # each position
    at = Activations(twice, activations.progress, activations.site)
    doubled = attribute_features(at, sae, probes, LABELS, method)
    torch.testing.assert_close(doubled.scores, found.scores, atol=1e-5, rtol=1e-4)
    assert (found.completeness is None) == (method != "integrated gradients")


def test_class_mean_difference_is_how_much_of_the_classes_difference_a_latent_writes(toys):
    activations, sae = toys.activations(), toys.sae()
    found = attribute_features(activations, sae, toys.probes(), LABELS)
    expected = torch.zeros(3, 20)
    for s in range(3):
        latents = sae.encode(activations.values[s], s)
        dense = torch.zeros(12, 4, 20).scatter_(-1, latents.indices, latents.values)
        means = torch.stack([dense[i == LABELS].mean(dim=0) for i in range(3)])  # K x P x N
        for c in range(3):
            others = [means[i] for i in range(3) if i != c]
            for n in range(20):
                written = (means[c] - sum(others) / 2)[:, n, None] * sae.decoder[n]  # P x width
                expected[c, n] += written.square().sum() / 4
    torch.testing.assert_close(found.scores, expected, atol=1e-5, rtol=1e-4)


def test_contrastive_scores_multiply_probe_and_activity_contrasts(toys):
    activations, sae, probes = toys.activations(), toys.sae(), toys.probes()
    expected = torch.zeros(3, 20)
    for s in range(3):
        latents = sae.encode(activations.values[s], s)
        dense = torch.zeros(12, 4, 20).scatter_(2, latents.indices, latents.values).mean(dim=1)
        level = torch.stack([dense[i == LABELS].mean(dim=0) for i in range(3)])
        for c, n in np.ndindex(3, 20):
            others = [i for i in range(3) if i != c]
            read = [float(probes.weight[s, i] @ sae.decoder[n]) for i in range(3)]
            weight = read[c] - sum(read[i] for i in others) / 2
            expected[c, n] += weight * float(level[c, n] - level[others, n].mean())
    found = attribute_features(activations, sae, probes, LABELS, "contrastive")
    torch.testing.assert_close(found.scores, expected)


def dense_activity(activations: Activations, sae) -> np.ndarray:
    """Mean activity of every latent in every picture, B x N, by dense matrices in float64."""
    found = []
    for s in range(len(activations.progress)):
        x = sae.normalisation.apply(activations.values[s], s).double() @ sae.encoder.double().T + sae.encoder_bias
        kth = x.sort(dim=-1, descending=True).values[..., sae.k - 1 : sae.k]
        found.append(torch.where((x >= kth) & (x > 0), x, 0.0).mean(dim=1))
    return torch.stack(found).mean(dim=0).numpy()


def difference_and_margin(activity: np.ndarray, labels: np.ndarray, weights: np.ndarray, c: int):
    """Of class c against the mean of the two others: Welch's interval, written out."""
    means, parts, sizes = [], [], []
    for k in range(3):
        rows, weight = activity[labels == k], weights[labels == k][:, None]
        mean, size = (weight * rows).sum(axis=0) / weight.sum(), weight.sum() ** 2 / (weight**2).sum()
        variance = (weight * (rows - mean) ** 2).sum(axis=0) / weight.sum() * size / (size - 1)
        means.append(mean)
        parts.append(variance / size * (1 if k == c else 0.25))
        sizes.append(size)
    freedom = sum(parts) ** 2 / sum(part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True))
    others = [means[k] for k in range(3) if k != c]
    return means[c] - (others[0] + others[1]) / 2, stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))


def test_difference_and_interval_equal_welch_on_dense_activity(toys):
    """With weights, and with pictures of no class, which count nowhere."""
    activations, sae, labels = toys.activations(pictures=40), toys.sae(), torch.arange(40) % 3
    labels[[3, 17, 22]] = NO_CLASS
    weights = 0.5 + torch.arange(40) % 5 / 2
    found = attribute_features(activations, sae, toys.probes(), labels, weights=weights)
    activity = dense_activity(activations, sae)
    for c in range(3):
        difference, margin = difference_and_margin(activity, labels.numpy(), weights.double().numpy(), c)
        np.testing.assert_allclose(found.difference[c].numpy(), difference, atol=1e-5)
        np.testing.assert_allclose(found.margin[c].numpy(), margin, atol=1e-5)
        assert (margin > 0.01).any()
    assert torch.equal(found.stands_for, found.difference.argmax(dim=0)) and len(found.stands_for.unique()) == 3


def test_of_two_classes_the_interval_is_that_of_welchs_test(toys):
    activations, sae, labels = toys.activations(pictures=30), toys.sae(), (torch.arange(30) % 5 == 0).long()
    probes = train_probes(activations, sae, labels, "look", ("one", "other"))
    found = attribute_features(activations, sae, probes, labels)
    activity = dense_activity(activations, sae)
    test = stats.ttest_ind(activity[labels == 1], activity[labels == 0], equal_var=False)
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose((found.difference + found.margin)[1].numpy(), interval.high, atol=1e-5)
    np.testing.assert_allclose((found.difference - found.margin)[1].numpy(), interval.low, atol=1e-5)


def test_an_interval_over_few_pictures_holds_the_true_difference_as_often_as_it_says():
    draw, held, labels = torch.Generator().manual_seed(0), [], torch.tensor([0] * 4 + [1] * 20 + [2] * 9)
    spread, shares = torch.tensor([2.0, 0.5, 1.0])[labels], 1 / labels.bincount()[labels]
    activity = torch.randn(33, 4000, generator=draw) * spread[:, None] + torch.tensor([3.0, 1.0, 0.0])[labels][:, None]
    difference, margin = class_differences(activity, labels, shares, 3)
    for c, true in enumerate((2.5, -0.5, -2.0)):
        held.append(float(((difference[c] - true).abs() < margin[c]).float().mean()))
    assert all(0.93 < share < 0.97 for share in held), held


def test_a_latent_that_is_never_active_stands_for_nobody_for_sure():
    labels = torch.arange(8) % 2
    difference, margin = class_differences(torch.zeros(8, 3), labels, torch.full((8,), 0.25), 2)
    assert not difference.any() and not margin.any()


@pytest.mark.parametrize("method", METHODS)
def test_of_two_classes_a_latent_belongs_to_the_one_that_uses_it_more(toys, method):
    """Contrastive scores of two classes are the same: both would get one list."""
    sae, labels, draw = toys.sae(), torch.arange(40) % 2, toys.random(9)
    values = draw(3, 40, 6, 2, 2) + 2 * (labels - 0.5)[:, None, None, None] * draw(6)[:, None, None]
    activations = Activations(values, torch.arange(3) / 3, "middle")
    probes = train_probes(activations, sae, labels, "look", ("one", "other"))
    found = attribute_features(activations, sae, probes, labels, method)
    use, pull = torch.zeros(2, 20), torch.zeros(20)
    for s in range(3):
        latents = sae.encode(values[s], s)
        dense = torch.zeros(40, 4, 20).scatter_(-1, latents.indices, latents.values).mean(dim=1)
        use += torch.stack([dense[labels == c].mean(dim=0) for c in (0, 1)])
        pull += (probes.weight[s, 1] - probes.weight[s, 0]) @ sae.decoder.T
    recipe = build_recipe(found, sae, probes, activations, labels, count=20)
    assert (recipe.member.sum(dim=0) == 1).all() and (recipe.member.sum(dim=1) > 0).all()
    for c, n in recipe.member.nonzero().tolist():
        assert use[c, recipe.features[n]] > use[1 - c, recipe.features[n]]
    agree = ((use[1] - use[0]) * pull > 0.1).nonzero().flatten()
    assert len(agree) >= 6 and torch.isin(agree, recipe.features).all(), "what both tell is somebody's"


@pytest.mark.parametrize("method", METHODS)
def test_the_latents_of_a_class_are_found_by_every_method(method):
    """Each of nine latents is a channel. 0 to 2 are the first class's, 3 to 5 the second's, 7 and 8 nobody's. 6 is the
    first class's at one step and, less, the second's at the other, so that gradients speak for both.
    """
    draw, labels = torch.Generator().manual_seed(0), torch.arange(80) % 2
    values = 0.3 * torch.randn(2, 80, 9, 2, 2, generator=draw).abs()
    values[:, labels == 0, 0:3] += 1
    values[:, labels == 1, 3:6] += 1
    values[0, labels == 0, 6] += 1
    values[1, labels == 1, 6] += 0.6
    activations, progress = Activations(values, torch.tensor([0.0, 0.5]), "middle"), torch.tensor([0.0, 0.5])
    unchanged = Normalisation(progress, torch.zeros(2, 9), torch.ones(2))
    sae = SparseAutoencoder(torch.eye(9), torch.zeros(9), torch.eye(9), torch.zeros(9), unchanged, 9, "middle")
    probes = train_probes(activations, sae, labels, "look", ("one", "other"))
    found = attribute_features(activations, sae, probes, labels, method)
    assert (found.scores[:, 6] > 0).all() or method == "class mean difference"
    recipe = build_recipe(found, sae, probes, activations, labels, count=9)
    one, other = ({*recipe.features[own].tolist()} for own in recipe.member)
    assert {0, 1, 2, 6} <= one and {3, 4, 5} <= other and not one & other
    assert [set(latents.tolist()) for latents in found.own(3)] == [{0, 1, 2}, {3, 4, 5}]
    assert (found.difference - found.margin)[0, :3].min() > 0.9 and found.difference[0, :3].max() < 1.1
    sure = (found.difference.abs() > found.margin)[0]
    assert sure[:7].all() and not sure[7:].any()


def test_of_three_classes_a_latent_may_be_twos(toys):
    """Adults and seniors share one that tells both from the young, though one of the two uses it more."""
    activations, sae, probes = toys.activations(), toys.sae(), toys.probes()
    found = attribute_features(activations, sae, probes, LABELS)
    own = found.own(20)
    for c in range(3):
        assert own[c].tolist() == [
            n for n in found.scores[c].argsort(descending=True).tolist()
            if found.scores[c, n] > 0 and found.difference[c, n] > 0
        ]  # fmt: skip
    members = torch.cat(own).bincount(minlength=20)
    assert members.max() == 2


@pytest.mark.parametrize("method", METHODS)
def test_pictures_without_a_face_count_nowhere(toys, method):
    whole, sae = toys.activations(pictures=15), toys.sae()
    labels, other = torch.cat([LABELS, LABELS[:3]]), torch.arange(15) % 2
    labels[[1, 5, 14]] = other[[1, 5, 14]] = NO_CLASS  # one of each class: four are left
    kept = labels != NO_CLASS
    part = Activations(whole.values[:, kept], whole.progress, whole.site)
    given = [(whole, labels, other), (part, labels[kept], other[kept])]
    weights = [balancing_weights(own, [others]) for _, own, others in given]
    assert (weights[0][~kept] == 0).all() and torch.equal(weights[0][kept], weights[1])
    probes = [train_probes(some, sae, own, "age", toys.classes) for some, own, _ in given]
    torch.testing.assert_close(probes[0].weight, probes[1].weight, atol=1e-4, rtol=1e-3)
    found, expected = (
        attribute_features(some, sae, probes[1], own, method, weight)
        for (some, own, _), weight in zip(given, weights, strict=True)
    )
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.difference, expected.difference, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.margin, expected.margin, atol=1e-6, rtol=1e-4)
    told, hoped = (measure_separation(sae, some, own, "age", toys.classes, torch.arange(5)) for some, own, _ in given)
    assert told == hoped


class WithoutFloat64(torch.Tensor):
    """A tensor as on Apple's GPUs, which know no float64, as far as Python sees."""

    device = torch.device("mps")

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_no_float64_is_asked_of_a_device_that_has_none():
    start, change = torch.zeros(1, 3), torch.tensor([[1.0, -2.0, 0.5]])
    expected = path_integral(start, change, torch.tensor([1]))
    there = [x.as_subclass(WithoutFloat64) for x in (start, change)]
    assert torch.equal(path_integral(*there, torch.tensor([1])), expected)


def test_what_cannot_be_attributed_is_refused(toys):
    activations, sae, probes = toys.activations(), toys.sae(), toys.probes()
    with pytest.raises(DiffLensError, match="'saliency' is unknown"):
        attribute_features(activations, sae, probes, LABELS, "saliency")
    with pytest.raises(DiffLensError, match="top 21 of 20"):
        attribute_features(activations, sae, probes, LABELS).own(21)
