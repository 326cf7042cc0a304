"""Which latents carry an attribute: scores by the probes' gradients and by the classes' activity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from ..activations import Activations, cells_of
from ..classifiers import NO_CLASS
from ..files import DiffLensError
from ..sae import Latents, SparseAutoencoder, nearest_step
from .probes import Probes, check_labels

QUADRATURE_POINTS = 32
# Logits that change by less than this (over the temperature) are integrated to float64 rounding by that many points.
PANEL_RANGE = 10.0
CELLS = 64  # of a map, whose means stand for their positions where those are more
SUPPORT = 8  # pictures that are enough to tell what a class shows of another attribute
TIED = 0.2  # of the pictures that would show two classes together by chance


@dataclass(frozen=True)
class Attribution:
    """Scores of every latent for every class of an attribute.

    scores: K x N, summed over steps and positions, averaged over the pictures of the class; progress: S, of the steps;
    completeness: largest |sum of IG - (p(1) - p(0))| met, None for other methods; difference: how much more active a
    latent is in the pictures of a class than in those of the others, mean over steps and positions, K x N; margin: half
    of its 95 % interval over pictures, K x N, see `class_differences`.
    """

    scores: Tensor
    progress: Tensor
    completeness: float | None
    attribute: str
    classes: tuple[str, ...]
    method: str
    difference: Tensor
    margin: Tensor

    def own(self, count: int) -> list[Tensor]:
        """The at most `count` best latents of every class that speak for it, best first.

        They have a score above 0 and are more active in the class than in the others. Scores alone do not tell: the
        contrastive ones of two classes are the same, and gradients may favour both where the probes of several steps
        differ. So of two classes a latent is one's only. Of more it may be two's: what adults and seniors share tells
        both from the young.
        """
        if count > self.scores.shape[1]:
            raise DiffLensError(f"asked for the top {count} of {self.scores.shape[1]} latents. Ask for fewer.")
        best = self.scores.masked_fill(self.difference <= 0, 0.0).topk(count, dim=1)
        return [latents[score > 0] for latents, score in zip(best.indices, best.values, strict=True)]

    @property
    def stands_for(self) -> Tensor:
        """The class that every latent stands for (N): the one that uses it most.

        Not the one whose difference is surest, which would favour classes with many pictures; how sure it is, the
        interval says.
        """
        return self.difference.argmax(dim=0)


def precise(x: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def path_integral(start: Tensor, change: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Integral over a in [0, 1] of the gradient of softmax(l(a) / temperature)_target with respect to l.

    l(a) = start + a change; start, change: B x K; target: B (class index). Returns B x K, in float64.
    Gauss-Legendre quadrature (the integrand is analytic) on as many equal panels of [0, 1] as the steepest picture
    needs, exact to float64 rounding.
    """
    start, change = precise(start) / temperature, precise(change) / temperature
    nodes, weights = (torch.from_numpy(x).to(start.device) for x in np.polynomial.legendre.leggauss(QUADRATURE_POINTS))
    delta = F.one_hot(target, change.shape[1])[:, None]
    panels = max(1, math.ceil(float((change.amax(dim=1) - change.amin(dim=1)).max()) / PANEL_RANGE))
    total = torch.zeros_like(change)
    for panel in range(panels):
        a = (panel + (nodes + 1) / 2) / panels
        p = (start[:, None] + a[:, None] * change[:, None]).softmax(dim=-1)
        p_target = p.gather(-1, target[:, None, None].expand(-1, len(a), 1))
        total += (weights[:, None] * p_target * (delta - p)).sum(dim=1)
    return total / (2 * panels * temperature)


def difference(latents: Latents, baseline: Latents) -> Latents:
    """`latents` minus `baseline`, sparse (values B x P x 2k, which may be negative): a latent may stand there twice."""
    values = torch.cat([latents.values, -baseline.values], dim=-1)
    return Latents(values, torch.cat([latents.indices, baseline.indices], dim=-1))


def integrated_gradients(
    latents: Latents, sae: SparseAutoencoder, probes: Probes, step: int, target: Tensor, temperature: float = 1.0,
    baseline: Latents | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Exact IG (Sundararajan et al. 2017) of the probe's softmax_target with respect to the active latents.

    The path begins at `baseline`, or at no latents at all, and adds `latents` (values B x P x k): to go from one
    picture's latents to another's, give their `difference`. Because decoder and probe are linear, the logits are linear
    along the path, and IG_n = z_n <D_n, W^T v / P> with v from `path_integral`: no autograd. In float64.
    Returns IG of the entries of `latents` (B x P x k) and the completeness error of every picture (B).
    """
    pictures, positions, _ = latents.values.shape
    values = precise(latents.values).flatten(1) / positions
    index, target = (x.to(values.device) for x in (latents.indices.flatten(1), target))
    weight = precise(probes.weight[step])
    # N x K, what a unit of each latent adds to the logits. In parts: a whole map's decoder is large.
    read = torch.cat([precise(part) @ weight.T for part in sae.decoder.split(1024)])

    def logits_of(index: Tensor, values: Tensor) -> Tensor:
        return values.new_zeros(pictures, sae.latents).scatter_add_(1, index, values) @ read

    start = (weight @ precise(sae.decoder_bias) + precise(probes.bias[step])).expand(pictures, -1)
    if baseline:
        origin = baseline.indices.flatten(1).to(values.device)
        start = start + logits_of(origin, precise(baseline.values).flatten(1) / positions)
    change = logits_of(index, values)
    v = path_integral(start, change, target, temperature)
    ig = (values * (v @ read.T).gather(1, index)).view(latents.values.shape)

    def probability(logits: Tensor) -> Tensor:
        return (logits / temperature).softmax(dim=-1).gather(1, target[:, None])[:, 0]

    gain = probability(start + change) - probability(start)
    device = latents.values.device
    return ig.float().to(device), (ig.sum(dim=(1, 2)) - gain).abs().float().to(device)


def activation_gradient(
    latents: Latents, sae: SparseAutoencoder, probes: Probes, step: int, target: Tensor, temperature: float = 1.0
) -> Tensor:
    """Activation times gradient (Shrikumar et al. 2017) of the probe's log-odds of `target` (B): B x P x k.

    log p_y / (1 - p_y) = l_y - logsumexp of the other logits; unlike p_y it does not go flat where the probe is sure.
    Closed form: z_n <D_n, W^T v / P> with v = 1 for y and minus the softmax over the other classes for them.
    """
    pooled = sae.decode(latents).mean(dim=1)
    logits = F.linear(pooled, probes.weight[step], probes.bias[step]) / temperature
    own = F.one_hot(target, logits.shape[1]).bool()
    v = torch.where(own, 1.0, -logits.masked_fill(own, -torch.inf).softmax(dim=1)) / temperature
    read = v @ (probes.weight[step] @ sae.decoder.T)  # B x N
    per_latent = read.gather(1, latents.indices.flatten(1)).view(latents.values.shape)
    return latents.values * per_latent / latents.values.shape[1]


def add_by_class(total: Tensor, rows: Tensor, latents: Latents, labels: Tensor, cells: Tensor) -> None:
    """Add sparse rows (B x P x k, at latents.indices) to `total` (K x N x C), by the pictures' classes (B) and the
    positions' cells (P).
    """
    _, size, count = total.shape
    at = (labels[:, None, None] * size + latents.indices) * count + cells[:, None]
    total.view(-1).index_add_(0, at.flatten(), rows.flatten())


def balancing_weights(labels: Tensor, others: Iterable[Tensor], rounds: int = 20, limit: float = 4.0) -> Tensor:
    """Weights (B) under which every class of `labels` shows the same mix of each other attribute.

    labels and each of `others`: B, int64; pictures of NO_CLASS weigh nothing. Without them a rare class lends its
    pictures' chance features to its levels: if most of the seniors captured happen to be light-skinned, steering to
    senior would lighten the skin. Raking (Deming & Stephan 1940): the weights are scaled to one attribute's overall
    shares after the other. No picture weighs more than `limit` times the mean. An attribute that is `tied` to the
    classes (the hair of seniors is hardly ever black) is left out: no weights can balance it.
    """
    known = labels != NO_CLASS
    labels, classes = labels[known], int(labels.max()) + 1
    others = [other for other in (other[known] for other in others) if not tied(labels, other)]
    weights = torch.ones(len(labels))
    for _ in range(rounds):
        for other in others:
            cells = labels * (int(other.max()) + 1) + other
            found = torch.zeros(classes * (int(other.max()) + 1)).index_add_(0, cells, weights).view(classes, -1)
            overall = torch.bincount(other, minlength=found.shape[1]) / len(other)
            wanted = found.sum(dim=1, keepdim=True) * overall
            weights = weights * (wanted / found.clamp(min=1e-12)).flatten()[cells]
            weights = weights.clamp(max=limit * float(weights.mean()))
    return torch.zeros(len(known)).masked_scatter_(known, weights)


def foreign(together: Tensor, share: float = TIED) -> Tensor:
    """To which classes (rows) a trait (column) is foreign: bool, as `together` (pictures, see `seen_together`).

    A trait may be told by the class: some class hardly ever shows it, in less than `share` of the pictures that would
    show both if the two had nothing to do with each other, of which there must be `SUPPORT` to tell. Such a trait is
    foreign to that class and to all that show it less than they would: a classifier misreads some pictures.
    """
    cells = together.double()
    expected = cells.sum(dim=1, keepdim=True) * cells.sum(dim=0) / cells.sum().clamp(min=1)
    told = ((expected >= SUPPORT) & (cells < share * expected)).any(dim=0)
    return told & (cells < expected)


def tied(labels: Tensor, other: Tensor) -> bool:
    """Whether a class of `other` hardly ever comes with a class of `labels` (both B, int64, or NO_CLASS)."""
    together = seen_together(labels, int(labels.max()) + 1, other, int(other.max()) + 1)
    return bool(foreign(together).any())


def seen_together(labels: Tensor, classes: int, other: Tensor, size: int) -> Tensor:
    """Pictures (classes x size) of each class of `labels` (B) that show each class of `other` (B); NO_CLASS is none."""
    known = (labels != NO_CLASS) & (other != NO_CLASS)
    return torch.bincount(labels[known] * size + other[known], minlength=classes * size).view(classes, size)


METHODS = ("contrastive", "integrated gradients", "activation x gradient", "class mean difference")


@torch.no_grad()
def attribute_features(
    activations: Activations,
    sae: SparseAutoencoder,
    probes: Probes,
    labels: Tensor,
    method: str = "class mean difference",
    weights: Tensor | None = None,
    temperature: float = 1.0,
    baseline: Activations | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> Attribution:
    """Score every latent for every class over a batch of captured pictures.

    integrated gradients: mean exact IG over the pictures of the class, summed over positions and steps.
    activation x gradient: the same with `activation_gradient`.
    class mean difference: what the mean activity in the class is more than in the others, squared and times |D_n|^2:
    how much of the classes' difference the latent writes, wherever in the map. Mean over positions, sum over steps. Of
    maps with more than `CELLS` positions by cells of them, so that no more than K x N x CELLS numbers are held.
    contrastive: that difference, with its sign and over all positions, times (probe weight of the class minus the
    others' mean, through the decoder): it also ranks latents of a class that the probe already predicts without any
    latent, where IG from zero says nothing.
    Whose a latent is, `Attribution.own` decides for all methods.
    labels: B, int64, NO_CLASS for a picture that does not count.
    weights: B, how much each picture counts in its class's mean activity (`balancing_weights`); all alike if None.
    baseline: where the path of integrated gradients begins instead of at no latents: the same noises drawn under
    another prompt, such as that of another class (the DiffLens paper's way for Stable Diffusion).
    It runs where the SAE is; the result is on the CPU.
    """
    if method not in METHODS:
        raise DiffLensError(f"attribution method {method!r} is unknown. Use one of: {', '.join(METHODS)}.")
    check_labels(labels, probes.classes, activations.pictures, probes.attribute)
    if baseline:
        check_baseline(baseline, activations, method)
    classes, size = len(probes.classes), sae.latents
    device = sae.device
    labels, probes = labels.to(device), probes.to(device)
    known, labels = labels != NO_CLASS, labels.clamp(min=0)
    counts = torch.bincount(labels, known.float(), minlength=classes)
    weights = known.float() if weights is None else weights.to(device) * known
    shares = weights / torch.bincount(labels, weights, minlength=classes)[labels]  # of the picture in its class
    cells = cells_of(activations.map if sae.kernel == 1 else (1, 1), CELLS).to(device)
    many, positions = torch.bincount(cells), len(cells)
    scores, activity = torch.zeros(classes, size, device=device), torch.zeros(len(labels), size, device=device)
    level = torch.zeros(classes, size, len(many), device=device)
    by_gradient = method in ("integrated gradients", "activation x gradient")
    worst = torch.zeros((), device=device)
    for s, progress in enumerate(activations.progress):
        step, part = probes.step_at(float(progress)), torch.zeros(classes, size, 1, device=device)
        level.zero_()
        for first, values in activations.batches(s):
            own = slice(first, first + len(values))
            latents = sae.encode(values.to(device), sae.normalisation.step_at(float(progress)))
            activity[own].scatter_add_(1, latents.indices.flatten(1), latents.values.flatten(1))
            if not by_gradient:
                add_by_class(level, latents.values * shares[own, None, None], latents, labels[own], cells)
                continue
            if method == "integrated gradients":
                origin = None
                if baseline:
                    at = nearest_step(baseline.progress, float(progress))
                    other = torch.cat([part for _, part in baseline.part(own.start, own.stop).batches(at)]).to(device)
                    origin = sae.encode(other, sae.normalisation.step_at(float(progress)))
                    latents = difference(latents, origin)
                rows, error = integrated_gradients(latents, sae, probes, step, labels[own], temperature, origin)
                worst = torch.maximum(worst, error.max())
            else:
                rows = activation_gradient(latents, sae, probes, step, labels[own], temperature)
            add_by_class(part, rows * known[own, None, None], latents, labels[own], torch.zeros_like(cells))
        if by_gradient:
            scores += part[:, :, 0] / counts[:, None]
        elif method == "contrastive":
            scores += contrast(level.sum(dim=2)) / positions * contrast(probes.weight[step] @ sae.decoder.T)
        else:
            written = (contrast(level / many).square() * many).sum(dim=2) / positions
            scores += written * sae.decoder.square().sum(dim=1)
        on_step(s + 1)
    activity /= positions * len(activations.progress)
    more, margin = class_differences(activity, labels, shares, classes)
    return Attribution(
        scores.cpu(), activations.progress, float(worst) if method == "integrated gradients" else None,
        probes.attribute, probes.classes, method, more.cpu(), margin.cpu(),
    )  # fmt: skip


def class_differences(activity: Tensor, labels: Tensor, shares: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean activity of each class minus the mean of the others', and half of its 95 % interval, both K x N.

    activity: B x N, of every picture; labels: B; shares: B, what a picture weighs in its class, 1 in all. Pictures are
    independent draws. With m the mean of a class, s^2 the variance within it and n its pictures, m's squared error is
    s^2 / n, and for a difference sum_k g_k m_k

        error^2 = sum_k g_k^2 s_k^2 / n_k,   degrees of freedom = error^4 / sum_k (g_k^2 s_k^2 / n_k)^2 / (n_k - 1)

    (Welch 1947, for more than two means), by Student's t. With weights, n = 1 / sum of shares^2 (Kish 1965) and
    s^2 = sum of shares (a - m)^2 / (1 - 1 / n).
    """
    means, errors, counts = [], [], []
    for c in range(classes):
        own = labels == c
        share, rows = shares[own], activity[own]
        count = 1 / share.square().sum()
        means.append(share @ rows)
        errors.append(share @ (rows - means[-1]).square() / (count - 1))
        counts.append(count)
    gains = contrast(torch.eye(classes, device=activity.device))
    parts = gains.square()[:, :, None] * torch.stack(errors)  # K x K x N, what each class adds to an error^2
    total = parts.sum(dim=1)
    freedom = 1 / ((parts / total[:, None]).square() / (torch.stack(counts) - 1)[:, None]).sum(dim=1)
    freedom = freedom.nan_to_num(1.0)  # of a latent that is never active
    quantile = torch.from_numpy(stats.t.ppf(0.975, freedom.cpu().numpy())).float().to(total.device)
    return gains @ torch.stack(means), quantile * total.sqrt()


def check_baseline(baseline: Activations, activations: Activations, method: str) -> None:
    """Raise `DiffLensError` unless `baseline` can be where the path to `activations` begins."""
    if method != "integrated gradients":
        raise DiffLensError(
            f"a baseline serves integrated gradients, not {method}. Choose that method, or no baseline."
        )
    found, expected = (
        (a.site, a.model, a.pictures, a.width, a.positions, len(a.progress)) for a in (baseline, activations)
    )
    if found != expected:
        names = ("site", "model", "pictures", "channels", "positions", "steps")
        pairs = zip(names, found, expected, strict=True)
        wrong = ", ".join(f"{name} {other} instead of {own}" for name, other, own in pairs if other != own)
        raise DiffLensError(
            f"the baseline does not fit the activations ({wrong}). Capture it with the same settings and seed, only "
            "under another prompt."
        )


def contrast(per_class: Tensor) -> Tensor:
    """Each class (first axis) minus the mean of the others."""
    k = len(per_class)
    return (per_class - per_class.mean(dim=0)) * (k / (k - 1))
