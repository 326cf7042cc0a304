"""Changes: what a picture's latents do more when it shows another class, told by what they do in the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..activations import ROWS, Activations
from ..classifiers import NO_CLASS
from ..files import DiffLensError
from ..sae import Normalisation
from .attribution import SUPPORT, tied
from .levels import Labelled, principal

# Tensors of `Changes`.
CHANGES = (
    "readout", "offset", "first", "first_bias", "second", "second_bias", "last", "last_bias", "amounts", "maps",
)  # fmt: skip
PATTERNS, COURSES, HIDDEN = 64, 3, 128  # of what is read and of what changes; over the steps; of the network
AROUND = 3  # positions, at whose middle the network tells what changes
UPDATES, RATE, WEIGHT_DECAY = 1_000, 2e-3, 0.05  # of its training
EVEN = 0.3  # of what usually changes in a pair: how much must change for a pair to count in full
RIDGE = 0.05  # of a decoder row's square: latents are told apart that much at least
PAIRS, AS_THEY_ARE = 24, 12  # of an update: pairs, and pictures that show the class already and are to stay
MOST_BYTES = 2**28  # of what changes in pairs; of more, some are left out, evenly


@dataclass(frozen=True)
class Changes:
    """What F latents do more, at each step and position, in the same picture of class k, as a small network tells it.

    readout: D x W and offset: D read D patterns at every position of the finished picture, off its normalised rows, W
    wide. Two convolutions with GELU, first: J x A x A x D and second: J x A x A x J, look at each position and
    around it, and last: K x CE x J tells how much of each of E patterns changes, in each of C courses over the steps.
    amounts: S x C are these courses and maps: E x F the patterns, by which changes are told with a mean square of 1.
    first_bias, second_bias: J; last_bias: K x CE.
    """

    readout: Tensor
    offset: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    last: Tensor
    last_bias: Tensor
    amounts: Tensor
    maps: Tensor

    def told(self, rows: Tensor, target: Tensor) -> Tensor:
        """How much of what changes (B x C x E x height x width) in finished pictures, of rows B x W x height x width.

        target: B, the classes that they are to show.
        """
        x = torch.einsum("dw,bwyx->bdyx", self.readout, rows) + self.offset[:, None, None]
        for weight, bias in ((self.first, self.first_bias), (self.second, self.second_bias)):
            x = F.gelu(F.conv2d(x, weight.movedim(-1, 1), bias, padding=weight.shape[1] // 2))
        found = torch.einsum("boj,bjyx->boyx", self.last[target], x) + self.last_bias[target][:, :, None, None]
        return found.unflatten(1, (self.amounts.shape[1], -1))

    def change(self, told: Tensor, step: int, maps: Tensor | None = None) -> Tensor:
        """Change (B x F x height x width) at a step, of what was `told`; maps: instead of the own, such as decoded."""
        now = torch.einsum("c,bceyx->beyx", self.amounts[step], told)
        return torch.einsum("beyx,ef->bfyx", now, self.maps if maps is None else maps)

    def some(self, latents: Tensor) -> Changes:
        """Those of some of the latents: numbers, or F booleans."""
        return replace(self, maps=self.maps[:, latents])

    def to(self, device: torch.device) -> Changes:
        """The same on a device."""
        return Changes(*(getattr(self, name).to(device) for name in CHANGES))


def alike_pairs(labels: Tensor, twins: int, others: Labelled) -> tuple[Tensor, Tensor]:
    """All pairs (n and n, numbers of pictures) from one noise that differ in their class and in nothing else.

    The first of each pair is of the lower class. labels: B, or NO_CLASS; twins: so many pictures in turn are of one
    noise; others: other attributes' classes. One that is `tied` to the classes, as grey hair is to age, may differ too.
    """
    first = torch.arange(len(labels)).repeat_interleave(twins)
    second = first // twins * twins + torch.arange(twins).repeat(len(labels))
    fits = (labels[first] != NO_CLASS) & (labels[first] < labels[second])
    for _, of in others.values():
        if not tied(labels, of):
            fits &= of[first] == of[second]
    return first[fits], second[fits]


@torch.no_grad()
def fit_changes(
    activations: Activations,
    normalisation: Normalisation,
    decoder: Tensor,
    labels: Tensor,
    classes: tuple[str, ...],
    others: Labelled,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Changes:
    """Changes by pairs of pictures that were drawn from the same noise, of activations whose `twins` are 2 or more.

    Learned is how the rows of the picture of class k differ from those of its twin of class l, at every step and
    position p, off the rows of the picture of class l where it is finished, at p and around it; and that nothing
    changes where a picture shows k already. What is read and what is told are principal components, of the finished
    rows and of the differences; the least mean square of what is not told is sought by AdamW. It is told in latents, by
    ridge regression on their decoder (F x W): what latents do at a step is noisier than the rows that they explain.
    Where only some positions of a map were captured, each is read alone.
    on_batch is told how many pictures were read, and at each update again. Raises `DiffLensError` if two classes have
    fewer pairs than `SUPPORT`.
    """
    first, second = alike_pairs(labels, activations.twins, others)
    check_pairs(labels[first], labels[second], activations.twins, classes)
    most = MOST_BYTES // (2 * COURSES * PATTERNS * activations.positions)
    some = torch.linspace(0, len(first) - 1, min(len(first), max(SUPPORT, most))).long()
    first, second = first[some], second[some]

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        return differences(activations, normalisation, first, second, on_batch)

    readout, offset, amounts, changed_rows = patterns(parts())
    finished, changed = [], []
    for rows, more in parts():
        finished.append((torch.einsum("npw,dw->ndp", rows, readout) + offset[:, None]).half())
        changed.append(torch.einsum("mspw,sc,ew->mcep", more, amounts, changed_rows).half())
    reads = torch.cat(finished).unflatten(2, activations.map)
    tells = torch.cat(changed).flatten(1, 2).unflatten(2, activations.map)
    around = AROUND if activations.size is None else 1
    with torch.inference_mode(False), torch.enable_grad():
        network = learned(
            reads.clone(), tells.clone(), labels.clone(), (first.clone(), second.clone()), len(classes), around,
            lambda: on_batch(activations.pictures),
        )  # fmt: skip
    spread = tells.float().square().mean(dim=(0, 2, 3)).unflatten(0, (amounts.shape[1], -1)).sum(dim=0).sqrt()
    weights = weights_of(network, len(classes), spread)
    maps = spread[:, None] * in_latents(changed_rows, decoder)
    return Changes(readout=readout, offset=offset, **weights, amounts=amounts, maps=maps)


def in_latents(rows: Tensor, decoder: Tensor) -> Tensor:
    """Latents (n x F) whose decoded sum (decoder: F x W) is nearest to rows (n x W), by ridge regression."""
    products = decoder @ decoder.T
    ridge = RIDGE * products.diagonal().mean() * torch.eye(len(products))
    return torch.linalg.solve(products + ridge, decoder @ rows.T).T


def weights_of(network: nn.Sequential, classes: int, spread: Tensor) -> dict[str, Tensor]:
    """Those of `Changes`, which tells every pattern of changes (E) in units of its spread."""
    *looking, (last, last_bias) = (tuple(layer.parameters()) for layer in network if isinstance(layer, nn.Conv2d))
    weights: dict[str, Tensor] = {}
    for name, (weight, bias) in zip(("first", "second"), looking, strict=True):
        weights |= {name: weight.movedim(1, -1).contiguous(), f"{name}_bias": bias}
    unit = spread.clamp(min=1e-8).repeat(len(last_bias) // len(spread))
    told = {"last": last.flatten(1) / unit[:, None], "last_bias": last_bias / unit}
    weights |= {name: of.unflatten(0, (classes, -1)) for name, of in told.items()}
    return {name: of.detach() for name, of in weights.items()}


def differences(
    activations: Activations, normalisation: Normalisation, first: Tensor, second: Tensor,
    on_batch: Callable[[int], None],
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Of pictures in turn, their finished rows, n x P x W, and how rows of their pairs differ, m x S x P x W."""
    for start, stop in whole_groups(activations):
        part = activations.part(start, stop)

        def rows_at(s: int, part: Activations = part) -> Tensor:
            values = torch.cat([values for _, values in part.batches(s)])
            return normalisation.apply(values, normalisation.step_at(float(part.progress[s])))

        own = (first >= start) & (first < stop)
        one, other = first[own] - start, second[own] - start
        rows = [rows_at(s) for s in range(len(part.progress))]
        yield rows[-1], torch.stack([of[other] - of[one] for of in rows], dim=1)
        on_batch(stop)


def patterns(parts: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Readout and offset of finished rows, whose patterns have variance 1, amounts and maps of what differs.

    parts: as `differences` gives them.
    """
    count, total, products, changes, courses = 0, *[torch.zeros(())] * 4
    for z, more in parts:
        rows = z.flatten(0, 1).double()
        count, total, products = count + len(rows), total + rows.sum(dim=0), products + rows.T @ rows
        flat, by_step = more.flatten(0, 2), more.movedim(1, 0).flatten(1)
        changes, courses = changes + (flat.T @ flat).double(), courses + (by_step @ by_step.T).double()
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    basis = principal(covariance, PATTERNS)
    readout = (basis / (basis.T @ covariance @ basis).diagonal().sqrt()).T
    amounts, maps = principal(courses, COURSES), principal(changes, PATTERNS).T
    return tuple(of.float().contiguous() for of in (readout, -readout @ mean, amounts, maps))  # type: ignore[return-value]


def learned(
    reads: Tensor, tells: Tensor, labels: Tensor, pairs: tuple[Tensor, Tensor], classes: int, around: int,
    on_update: Callable[[], None],
) -> nn.Sequential:  # fmt: skip
    """The network of `Changes`, of what every picture reads (B x D x H x W) and what changes in pairs (n x CE x H x W).

    pairs: n and n, numbers of pictures. Its last layer tells the classes' changes one after the other.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(reads.shape[1], HIDDEN, around, padding=around // 2), nn.GELU(),
            nn.Conv2d(HIDDEN, HIDDEN, around, padding=around // 2), nn.GELU(),
            nn.Conv2d(HIDDEN, classes * tells.shape[1], 1),
        )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, UPDATES)
    shown, first, second = (labels != NO_CLASS).nonzero().flatten(), *pairs
    usual = tells.float().square().mean()
    for _ in range(UPDATES):
        chosen = torch.randint(len(first), (PAIRS,), generator=generator)
        back = torch.rand(PAIRS, generator=generator) < 0.5  # from the second's class to the first's
        stay = shown[torch.randint(len(shown), (AS_THEY_ARE,), generator=generator)]
        one, two = first[chosen], second[chosen]
        own, other = torch.where(back, two, one), torch.where(back, one, two)
        wanted = tells[chosen].float() * (1 - 2 * back.float())[:, None, None, None]
        target = torch.cat([labels[other], labels[stay]])
        told = network(reads[torch.cat([own, stay])].float()).unflatten(1, (classes, -1))
        missed = told[torch.arange(len(target)), target]
        squares = torch.cat([missed[:PAIRS] - wanted, missed[PAIRS:]]).square().mean(dim=(1, 2, 3))
        squares[:PAIRS] /= wanted.square().mean(dim=(1, 2, 3)) / usual + EVEN  # in a small figure less changes
        optimizer.zero_grad()
        squares.mean().backward()
        optimizer.step()
        schedule.step()
        on_update()
    return network


def whole_groups(activations: Activations) -> Iterator[tuple[int, int]]:
    """Pictures start .. stop - 1 in turn, some `ROWS` positions at once and all twins of a noise together."""
    some = activations.twins * max(1, ROWS // (activations.positions * activations.twins))
    for start in range(0, activations.pictures, some):
        yield start, min(start + some, activations.pictures)


def check_pairs(first: Tensor, second: Tensor, twins: int, classes: tuple[str, ...]) -> None:
    """Raise `DiffLensError` if there are too few pairs of two classes (n and n) to learn from."""
    for k, m in combinations(range(len(classes)), 2):
        count = int(((first == k) & (second == m)).sum())
        if count < SUPPORT:
            raise DiffLensError(
                f"of the pictures that were drawn from the same noise ({twins} each), {count} pairs are {classes[k]} "
                f"and {classes[m]} with all else alike; at least {SUPPORT} are needed. Let prompts that follow one "
                "another differ in the word that names the class, and capture more pictures."
            )
