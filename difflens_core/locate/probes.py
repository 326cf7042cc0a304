"""Linear probes: what a picture's hidden state says, step by step, about the class it will show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import Activations
from ..classifiers import NO_CLASS
from ..files import DiffLensError, load_tensors, reading, save_tensors
from ..sae import SparseAutoencoder, nearest_step

TENSORS = ("weight", "bias", "progress", "accuracy")


@dataclass(frozen=True)
class Probes:
    """One linear probe per sampling step, on the site's rows in the SAE's normalised units, as steering reads them.

    Attribution asks it about the SAE's reconstruction of them. Logits of step s for x (B x P x width): weight[s] . mean
    over positions of x + bias[s].
    weight: S x K x width; bias: S x K; progress: S; accuracy: S, balanced accuracy on held-out pictures, 0 to 1.
    """

    weight: Tensor
    bias: Tensor
    progress: Tensor
    accuracy: Tensor
    attribute: str
    classes: tuple[str, ...]

    def to(self, device: torch.device) -> Probes:
        """The same on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def step_at(self, progress: float) -> int:
        return nearest_step(self.progress, progress)

    def logits(self, x: Tensor, step: int) -> Tensor:
        """B x K logits of normalised rows x (B x P x width)."""
        return F.linear(x.mean(dim=1), self.weight[step], self.bias[step])


def check_labels(labels: Tensor, classes: tuple[str, ...], pictures: int, attribute: str) -> None:
    """Raise `DiffLensError` unless there is one label a picture and each class is seen at least four times.

    Pictures of NO_CLASS do not count.
    """
    if len(labels) != pictures:
        raise DiffLensError(
            f"{attribute}: got {len(labels)} labels for {pictures} captured pictures. "
            "Connect the images that the same capture node put out."
        )
    if int(labels.max()) >= len(classes):
        raise DiffLensError(
            f"{attribute}: a label says class number {int(labels.max()) + 1}, but there are {len(classes)} classes. "
            "These seem to be the labels of another attribute."
        )
    counts = torch.bincount(labels[labels != NO_CLASS], minlength=len(classes)).tolist()
    rare = [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < 4]
    if rare:
        raise DiffLensError(
            f"{attribute}: too few pictures of class {', '.join(rare)} among {pictures}; at least 4 each are needed. "
            "Capture more pictures."
        )


def train_probes(
    activations: Activations,
    sae: SparseAutoencoder,
    labels: Tensor,
    attribute: str,
    classes: tuple[str, ...],
    weight_decay: float = 1e-3,
    on_step: Callable[[int], None] = lambda step: None,
) -> Probes:
    """Fit one class-balanced logistic regression per step by L-BFGS.

    labels: B, integer class of every picture, NO_CLASS for one that does not count. Every fourth picture of a class is
    held out to measure accuracy; the probe that is kept is fitted on all of them.
    """
    check_labels(labels, classes, activations.pictures, attribute)
    held_out, known = torch.zeros(len(labels), dtype=torch.bool), labels != NO_CLASS
    for index in range(len(classes)):
        held_out[(labels == index).nonzero().flatten()[::4]] = True
    fitted = []
    for s, progress in enumerate(activations.progress):
        step = sae.normalisation.step_at(float(progress))
        pooled = torch.empty(activations.pictures, sae.width)
        for first, values in activations.batches(s):
            pooled[first : first + len(values)] = sae.rows(values, step).mean(dim=1)
        fitting = known & ~held_out
        trial = fit_logistic(pooled[fitting], labels[fitting], len(classes), weight_decay)
        accuracy = balanced_accuracy(F.linear(pooled[held_out], *trial).argmax(dim=1), labels[held_out])
        fitted.append((*fit_logistic(pooled[known], labels[known], len(classes), weight_decay), accuracy))
        on_step(s + 1)
    weight, bias, accuracy = (torch.stack(parts) for parts in zip(*fitted, strict=True))
    return Probes(weight, bias, activations.progress.float(), accuracy, attribute, classes)


def fit_logistic(x: Tensor, labels: Tensor, classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression of x (B x C), every class weighing the same: weight (K x C), bias (K)."""
    mean, scale = x.mean(dim=0), x.std(dim=0).mean().clamp(min=1e-8)
    x = (x - mean) / scale
    share = 1 / torch.bincount(labels, minlength=classes).clamp(min=1).float()
    with torch.inference_mode(False), torch.enable_grad():
        x, share, labels = x.clone(), share.clone(), labels.clone()
        weight = torch.zeros(classes, x.shape[1], requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight, bias), labels, weight=share)
            loss = loss + weight_decay * weight.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
    weight = weight.detach() / scale
    return weight, bias.detach() - weight @ mean


def balanced_accuracy(predicted: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes present of the share that was recognised (scalar)."""
    right = (predicted == labels).float()
    return torch.stack([right[labels == c].mean() for c in labels.unique()]).mean()


def save_probes(path: str | Path, probes: Probes) -> None:
    tensors = {name: getattr(probes, name) for name in TENSORS}
    save_tensors(path, "probes", tensors, {"attribute": probes.attribute, "classes": list(probes.classes)})


def load_probes(path: str | Path) -> Probes:
    tensors, info = load_tensors(path, "probes", needs=[*TENSORS, "attribute", "classes"])
    with reading(path):
        weight, bias, progress, accuracy = (tensors[name].float() for name in TENSORS)
        found = Probes(weight, bias, progress, accuracy, str(info["attribute"]), tuple(map(str, info["classes"])))
        steps, classes, _ = weight.shape
        fits = bias.shape == (steps, classes) and progress.shape == accuracy.shape == (steps,)
        if not fits or not steps or len(found.classes) != classes:
            raise DiffLensError("its weights do not fit its classes and steps. The file is damaged.")
        return found
