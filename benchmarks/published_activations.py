"""Three published ways to steer by activations, written from their papers, to compare with.

Linear-AcT moves the mean of every channel, MidSteer the activations of every position, EquiSteer what the
cross-attention puts out. All are fitted in closed form to pictures of prompts that name their class. In the papers one
source turns into one target, here every picture is steered towards a class of its own; each docstring says how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from published import TargetOf
from torch import Tensor
from torch.nn import functional as F

from difflens_core.activations import Activations, Edit
from difflens_core.networks import Denoiser
from difflens_core.networks.denoiser import CrossAttention

SHRINKAGE = 0.01  # of MidSteer's covariance, in shares of its mean variance
MARGIN = 1.05  # of EquiSteer's gate, over the most that the pictures of prompts without a class reach


def norm_sites(model: Denoiser) -> tuple[str, ...]:
    """The normalisations of the blocks of `middle_block`, in order."""
    return tuple(f"middle_block.{i}.norm" for i in range(len(model.middle_block)))


def attention_sites(model: Denoiser) -> tuple[str, ...]:
    """What the cross-attentions add, in order."""
    blocks = enumerate(model.middle_block)
    return tuple(f"middle_block.{i} update" for i, block in blocks if isinstance(block, CrossAttention))


def step_of(progress: float, steps: int) -> int:
    """Number of the step before which a share `progress` of the sampling lies."""
    return round(progress * steps)


def at_step(activations: Activations, step: int) -> Tensor:
    """All pictures of a step (N x C x H x W)."""
    return torch.cat([values.float() for _, values in activations.batches(step)])  # autocast takes no fp16


# --- Linear-AcT ---


@dataclass(frozen=True)
class LinearAcT:
    """Linear-AcT (Rodriguez et al. 2025, arXiv 2410.23054) at one site.

    Of every channel the mean m over positions becomes m + strength (w m + b - m) if it lies where the source's means
    did; all positions move alike. maps: S x K x 4 x C, w, b and that range for every step and class asked for.
    """

    site: str
    maps: Tensor
    target_of: TargetOf
    strength: float = 1.0

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        return transported(h, self.maps[step_of(progress, len(self.maps)), self.target_of(images)], self.strength)


def transported(h: Tensor, maps: Tensor, strength: float) -> Tensor:
    """h' of h (B x C x H x W) by maps (B x 4 x C, or 4 x C for all)."""
    means = h.float().mean(dim=(2, 3))
    weight, bias, low, high = maps.unbind(dim=-2)
    change = strength * (weight * means + bias - means) * ((low <= means) & (means <= high))
    return h + change[..., None, None].to(h.dtype)


def affine_map(source: Tensor, target: Tensor) -> Tensor:
    """w, b, least and greatest source (4 x C): of every channel the line closest to the optimal transport.

    source: n x C; target: m x C. In one dimension, transport pairs the sorted samples; of another number of target
    samples it takes the quantiles.
    """
    x = source.double().sort(dim=0).values
    y = torch.quantile(target.double(), torch.linspace(0, 1, len(x), dtype=torch.float64), dim=0)
    centred = x - x.mean(dim=0)
    weight = (centred * y).sum(dim=0) / centred.square().sum(dim=0)
    return torch.stack([weight, y.mean(dim=0) - weight * x.mean(dim=0), x[0], x[-1]]).float()


@dataclass(frozen=True)
class Fitting:
    """The edit that fits maps (S x 4 x C, written to) of a site while all source pictures are drawn in one batch.

    target: S x m x C, means of the target's pictures. Each map is applied as soon as it is fitted, so the later layers,
    and the later steps, are fitted to what the earlier ones make of the source.
    """

    site: str
    target: Tensor
    maps: Tensor

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        step = step_of(progress, len(self.maps))
        self.maps[step] = affine_map(h.float().mean(dim=(2, 3)), self.target[step])
        return transported(h, self.maps[step], 1.0)


def fit_linear_act(
    draw: Callable[[Sequence[Edit], Tensor], object], captured: Sequence[Activations], classes: Tensor
) -> Tensor:
    """Maps (L x S x K x 4 x C) of the sites captured, which lie in the network in this order.

    draw(edits, pictures): samples the pictures of these numbers again, at once, under edits. classes: N, of the
    captured pictures. A class's source are the pictures of all others together. As in the paper the sites are outputs
    of normalisations, here those of `middle_block`: with the blocks' own outputs, or all of the network's
    normalisations, 8 pictures kept less at the same success.
    """
    means = [torch.stack([at_step(a, s).mean(dim=(2, 3)) for s in range(len(a.progress))]) for a in captured]
    count, (steps, _, width) = int(classes.max()) + 1, means[0].shape
    maps = torch.empty(len(captured), steps, count, 4, width)
    for k in range(count):
        fittings = [
            Fitting(a.site, own[:, classes == k], site_maps[:, k])
            for a, own, site_maps in zip(captured, means, maps, strict=True)
        ]
        draw(fittings, (classes != k).nonzero().flatten())
    return maps


# --- MidSteer ---


@dataclass(frozen=True)
class MidSteer:
    """MidSteer (Gaintseva et al. 2026, arXiv 2605.05220): at every position and step, for a source class s and target t

        h' = h - strength (mu_s - mu_t) [(mu_s - mu)^T C^-1 (h - mu) / ((mu_s - mu)^T C^-1 (mu_s - mu))]_+

    As in the authors' code, several pairs go one after another: here every class but the one asked for is a source.
    What shows none of it is left alone, by the clipping. means: S x K x C x H x W, of the classes, mu is their mean;
    readout: the same shape, what h - mu is multiplied by. The paper steers what attention puts out, with one mean for
    all positions; here it is `site`, which all of the picture passes.
    """

    means: Tensor
    readout: Tensor
    target_of: TargetOf
    strength: float = 1.0
    site: str = "middle_block"

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        step = step_of(progress, len(self.means))
        means, readout, edited = self.means[step], self.readout[step], h.float()
        target, centre = means[self.target_of(images)], means.mean(dim=0)
        for source, read in zip(means, readout, strict=True):  # the target's own difference is 0
            score = ((edited - centre) * read).sum(dim=1, keepdim=True).relu()
            edited = edited - self.strength * score * (source - target)
        return edited.to(h.dtype)


def fit_midsteer(activations: Activations, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Means and readout of `MidSteer` from pictures of these classes (N).

    C is the covariance of all pictures around each position's mean, shared by the positions and shrunk.
    """
    means, readout = [], []
    for step in range(len(activations.progress)):
        values = at_step(activations, step)
        own = torch.stack([values[classes == k].mean(dim=0) for k in range(int(classes.max()) + 1)])
        rows = (values - own.mean(dim=0)).movedim(1, -1).flatten(0, 2).double()
        covariance = rows.T @ rows / len(rows)
        covariance += SHRINKAGE * covariance.diagonal().mean() * torch.eye(len(covariance))
        apart = (own - own.mean(dim=0)).double()
        read = torch.einsum("cd,kdhw->kchw", covariance.inverse(), apart)
        means.append(own)
        readout.append((read / (read * apart).sum(dim=1, keepdim=True)).float())
    return torch.stack(means), torch.stack(readout)


# --- EquiSteer ---


@dataclass
class Gate:
    """Which of the pictures being drawn EquiSteer leaves alone, as their prompt names a class.

    Told once, at the first step, by what the first cross-attention puts out (`site`): a picture is left alone if its
    strongest position goes further along a direction (K x C) than that class's threshold (K).
    """

    site: str
    directions: Tensor
    thresholds: Tensor
    open: Tensor = field(init=False)  # B

    def look(self, h: Tensor) -> None:
        self.open = (strongest(h.float(), self.directions) <= self.thresholds).all(dim=1)


@dataclass(frozen=True)
class EquiSteer:
    """EquiSteer (Gaintseva et al. 2026, arXiv 2607.01147) at one cross-attention.

    directions: S x K x C of unit length, sizes: S x K. From what the cross-attention puts out (`site`) all classes'
    directions are taken away, made orthogonal to each other; `strength` times the size of the class asked for is added
    along its own, and every position gets its length back. The paper draws the class, here it is given; its gate looks
    at a prompt, in its code at a batch, here at each picture. It has no source classes.
    """

    site: str
    directions: Tensor
    sizes: Tensor
    gate: Gate
    target_of: TargetOf
    strength: float = 1.0

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        step, target, given = step_of(progress, len(self.sizes)), self.target_of(images), h.float()
        if step == 0 and self.site == self.gate.site:
            self.gate.look(h)
        directions, sizes = self.directions[step], self.sizes[step]
        basis = torch.linalg.qr(directions.T).Q  # C x K
        cleared = given - torch.einsum("ck,dk,bdhw->bchw", basis, basis, given)
        steered = cleared + self.strength * (sizes[target, None] * directions[target])[..., None, None]
        steered = F.normalize(steered, dim=1) * given.norm(dim=1, keepdim=True)
        return torch.where(self.gate.open[:, None, None, None], steered.to(h.dtype), h)


def strongest(h: Tensor, directions: Tensor) -> Tensor:
    """How far (B x K) the position of h (B x C x H x W) that goes furthest goes along each direction (K x C)."""
    return torch.einsum("bchw,kc->bkhw", h, directions).amax(dim=(2, 3))


def fit_equisteer(named: Activations, unnamed: Activations, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions (S x K x C), sizes (S x K) and thresholds (S x K) of one site.

    named, unnamed: what it puts out for pictures whose prompts name their class (N) and for the same without. A
    direction is the mean difference over pictures and positions. Size is how far along it the strongest position of a
    class's pictures goes in the mean. The paper's threshold lies midway between that and the mean of those without.
    Here "doctor" says male and old nearly as loudly as a prompt that names it, and the gate would shut on just the
    prompts that need it: so a threshold is at least `MARGIN` times the most that any picture without reaches.
    """
    member = F.one_hot(classes).float()
    member = member / member.sum(dim=0)  # N x K, each class's weights sum to 1
    directions, sizes, thresholds = [], [], []
    for step in range(len(named.progress)):
        told, untold = at_step(named, step), at_step(unnamed, step)
        own = F.normalize(member.T @ (told - untold).mean(dim=(2, 3)), dim=1)
        size, reached = (strongest(told, own) * member).sum(dim=0), strongest(untold, own)
        directions.append(own)
        sizes.append(size)
        thresholds.append(torch.maximum((size + reached.mean(dim=0)) / 2, MARGIN * reached.amax(dim=0)))
    return torch.stack(directions), torch.stack(sizes), torch.stack(thresholds)
