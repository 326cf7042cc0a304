"""Changes: what a picture's latents do more when it shows another class, told by what they do in the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..activations import ROWS, Activations
from ..classifiers import NO_CLASS
from ..files import DiffLensError
from ..sae import Normalisation
from .attribution import SUPPORT, foreign, seen_together
from .levels import Labelled, principal

# Tensors of `Changes`.
CHANGES = (
    "readout", "offset", "first", "first_bias", "second", "second_bias", "last", "last_bias", "amounts", "sizes",
    "maps",
)  # fmt: skip
PATTERNS, COURSES, HIDDEN = 64, 3, 128  # of what is read and of what changes; over the steps; of the network
AROUND = 3  # positions, at whose middle the network tells what changes
UPDATES, RATE, WEIGHT_DECAY = 1_000, 2e-3, 0.05  # of its training
EVEN = 0.3  # of what usually changes in a pair: how much must change for a pair to count in full
SURE = 0.15  # of a picture's largest change: where less is told, nothing changes; what is told of others is less, too
SELDOM = 0.5  # as `TIED`, of what may change in a pair: a classifier's mistakes must not keep it from changing
SOFTER, BALANCE = 2.0, 0.01  # temperature of what is read of pairs, and the ridge that balances it
RIDGE = 0.05  # of a decoder row's square: latents are told apart that much at least
PAIRS, AS_THEY_ARE = 24, 12  # of an update: pairs, and pictures that show the class already and are to stay
MOST_BYTES = 2**28  # of what changes in pairs; of more, some are left out, evenly


@dataclass(frozen=True)
class Changes:
    """What F latents do more, at each step and position, in the same picture of class k, as a small network tells it.

    readout: D x W and offset: D read D patterns at every position of the finished picture, off its normalised rows, W
    wide. Two convolutions with GELU, first: J x A x A x D and second: J x A x A x J, look at each position and
    around it, and last: K x CE x J tells how much of each of E patterns changes, in each of C courses over the steps.
    amounts: S x C are these courses and maps: E x F the patterns, by which changes are told with a mean square of 1;
    sizes: E, the norm of each pattern in the rows.
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
    sizes: Tensor
    maps: Tensor

    def told(self, rows: Tensor, target: Tensor) -> Tensor:
        """How much of what changes (B x C x E x height x width) in finished pictures, of rows B x W x height x width.

        target: B, the classes that they are to show. Small changes are what the network is not sure of, and add up
        over the steps; they are taken away by soft thresholding of what is told at a position, the largest stays.
        """
        x = torch.einsum("dw,bwyx->bdyx", self.readout, rows) + self.offset[:, None, None]
        for weight, bias in ((self.first, self.first_bias), (self.second, self.second_bias)):
            x = F.gelu(F.conv2d(x, weight.movedim(-1, 1), bias, padding=weight.shape[1] // 2))
        found = torch.einsum("boj,bjyx->boyx", self.last[target], x) + self.last_bias[target][:, :, None, None]
        found = found.unflatten(1, (self.amounts.shape[1], -1))
        size = torch.einsum("bceyx,e->byx", found.square(), self.sizes.square()).sqrt()[:, None, None]
        sure = (1 - SURE * size.amax(dim=(3, 4), keepdim=True) / size.clamp(min=1e-12)).clamp(min=0)
        return found * sure / (1 - SURE)

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
    noise; others: other attributes' classes. What a class seldom shows (`foreign`), as a feminine picture a beard, may
    differ too.
    """
    first = torch.arange(len(labels)).repeat_interleave(twins)
    second = first // twins * twins + torch.arange(twins).repeat(len(labels))
    fits = (labels[first] != NO_CLASS) & (labels[first] < labels[second])
    first, second = first[fits], second[fits]
    alike = torch.ones(len(first), dtype=torch.bool)
    for _, of in others.values():
        known = (of[first] != NO_CLASS) & (of[second] != NO_CLASS)
        lost = seldom(labels, of)
        gone = lost[labels[second], of[first]] | lost[labels[first], of[second]]
        alike &= (of[first] == of[second]) | (known & gone)
    return first[alike], second[alike]


def seldom(labels: Tensor, of: Tensor) -> Tensor:
    """Which classes of an attribute (columns) the pictures of a class (rows) seldom show. labels, of: B."""
    return foreign(seen_together(labels, int(labels.max()) + 1, of, int(of.max()) + 1), SELDOM)


@dataclass(frozen=True)
class LabelledPictures:
    """Captured pictures of one size and what a classifier sees in them.

    labels: B, their classes, or NO_CLASS; others: those of other attributes, by which `alike_pairs` goes; readings:
    B x K, how probable each class of these attributes is, by which they are weighed.
    """

    activations: Activations
    labels: Tensor
    others: Labelled
    readings: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The pairs (n and n, numbers of pictures) to learn from. Of very many some, evenly."""
        first, second = alike_pairs(self.labels, self.activations.twins, self.others)
        most = MOST_BYTES // (2 * COURSES * PATTERNS * self.activations.positions)
        some = torch.linspace(0, len(first) - 1, min(len(first), max(SUPPORT, most))).long()
        return first[some], second[some]

    @cached_property
    def weights(self) -> Tensor:
        """How often each pair is learned from: n, of sum 1.

        Twins of the same class may still differ in degree, and on the whole in one direction: skin may be a little
        darker in one class than in the other. Weighed, they do not, in nothing that is read of them.
        """
        first, second = self.pairs
        drifts = [first.new_zeros(len(first), 0).float()]
        for name, (_, of) in self.others.items():
            if name in self.readings and not seldom(self.labels, of).any():
                read = (self.readings[name].float().clamp(min=1e-30).log() / SOFTER).softmax(dim=1)
                drifts.append((read[second] - read[first])[:, 1:])
        return balanced(torch.cat(drifts, dim=1))


def balanced(values: Tensor) -> Tensor:
    """Weights (n, of sum 1) nearest to equal ones by which the values (n x D) are 0 on average.

    Entropy balancing (Hainmueller 2012), by Newton's method; a small ridge leaves a little where that would cost much.
    """
    x = values.double()
    x = x / (x - x.mean(dim=0)).square().mean(dim=0).sqrt().clamp(min=1e-6)
    slope, unit = x.new_zeros(x.shape[1]), BALANCE * torch.eye(x.shape[1], dtype=torch.float64)
    for _ in range(50):
        weights = (-x @ slope).softmax(dim=0)
        mean = weights @ x
        spread = (x - mean).T @ ((x - mean) * weights[:, None])
        slope = slope + torch.linalg.solve(spread + unit, mean - BALANCE * slope).clamp(-1, 1)
    return (-x @ slope).softmax(dim=0).float()


@dataclass(frozen=True)
class Lessons:
    """What the network learns from: what pictures read, B x D x H x W, and how n pairs differ, n x CE x H x W."""

    twins: LabelledPictures
    reads: Tensor
    tells: Tensor


@torch.no_grad()
def fit_changes(
    captures: Sequence[LabelledPictures],
    normalisation: Normalisation,
    decoder: Tensor,
    classes: tuple[str, ...],
    on_batch: Callable[[int], None] = lambda done: None,
) -> Changes:
    """Changes by pairs of pictures that were drawn from the same noise; captures: one or more, of a size each.

    Learned is how the rows of the picture of class k differ from those of its twin of class l, at every step and
    position p, off the rows of the picture of class l where it is finished, at p and around it; and that nothing
    changes where a picture shows k already. What is read and what is told are principal components, of the finished
    rows and of the differences; the least mean square of what is not told is sought by AdamW. It is told in latents, by
    ridge regression on their decoder (F x W): what latents do at a step is noisier than the rows that they explain.
    Where only some positions of a map were captured, each is read alone.
    on_batch is told how many pictures were read, and at each update again. Raises `DiffLensError` if two classes have
    fewer pairs than `SUPPORT`.
    """
    check_pairs(captures, classes)
    readout, offset, amounts, changed_rows = patterns(
        part for twins in captures for part in differences(twins, normalisation, on_batch)
    )
    lessons = []
    for twins in captures:
        reads, tells = [], []
        for rows, more in differences(twins, normalisation, on_batch):
            reads.append((torch.einsum("npw,dw->ndp", rows, readout) + offset[:, None]).half())
            tells.append(torch.einsum("mspw,sc,ew->mcep", more, amounts, changed_rows).flatten(1, 2).half())
        seen = (torch.cat(of).unflatten(2, twins.activations.map) for of in (reads, tells))
        lessons.append(Lessons(twins, *seen))
    around = AROUND if all(twins.activations.size is None for twins in captures) else 1
    pictures = sum(twins.activations.pictures for twins in captures)
    with torch.inference_mode(False), torch.enable_grad():
        network = learned(lessons, len(classes), around, lambda: on_batch(pictures))
    squares = torch.stack([of.tells.float().square().mean(dim=(0, 2, 3)) for of in lessons]).mean(dim=0)
    spread = squares.unflatten(0, (amounts.shape[1], -1)).sum(dim=0).sqrt()
    weights = weights_of(network, len(classes), spread)
    maps = spread[:, None] * in_latents(changed_rows, decoder)
    return Changes(readout=readout, offset=offset, **weights, amounts=amounts, sizes=spread, maps=maps)


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
    twins: LabelledPictures, normalisation: Normalisation, on_batch: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of pictures in turn, their finished rows, n x P x W, and how rows of their pairs differ, m x S x P x W."""
    activations, (first, second) = twins.activations, twins.pairs
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


def learned(lessons: Sequence[Lessons], classes: int, around: int, on_update: Callable[[], None]) -> nn.Sequential:
    """The network of `Changes`, of each size's lessons in turn. Its last layer tells the classes' changes in a row."""
    reads, tells = (of.shape[1] for of in (lessons[0].reads, lessons[0].tells))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(reads, HIDDEN, around, padding=around // 2), nn.GELU(),
            nn.Conv2d(HIDDEN, HIDDEN, around, padding=around // 2), nn.GELU(),
            nn.Conv2d(HIDDEN, classes * tells, 1),
        )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, UPDATES)
    usual = torch.stack([of.tells.float().square().mean() for of in lessons]).mean()
    generator = torch.Generator().manual_seed(0)
    for update in range(UPDATES):
        read, target, wanted = some_of(lessons[update % len(lessons)], generator)
        told = network(read).unflatten(1, (classes, -1))[torch.arange(len(target)), target]
        squares = torch.cat([told[:PAIRS] - wanted, told[PAIRS:]]).square().mean(dim=(1, 2, 3))
        squares[:PAIRS] /= wanted.square().mean(dim=(1, 2, 3)) / usual + EVEN  # in a small figure less changes
        optimizer.zero_grad()
        squares.mean().backward()
        optimizer.step()
        schedule.step()
        on_update()
    return network


def some_of(lessons: Lessons, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """What is read in an update, n x D x H x W, the classes asked for, n, and what the first `PAIRS` are to tell.

    The others show their class already and are to stay.
    """
    labels, (first, second) = lessons.twins.labels, lessons.twins.pairs
    shown = (labels != NO_CLASS).nonzero().flatten()
    chosen = torch.multinomial(lessons.twins.weights, PAIRS, replacement=True, generator=generator)
    back = torch.rand(PAIRS, generator=generator) < 0.5  # from the second's class to the first's
    stay = shown[torch.randint(len(shown), (AS_THEY_ARE,), generator=generator)]
    one, two = first[chosen], second[chosen]
    own, other = torch.where(back, two, one), torch.where(back, one, two)
    wanted = lessons.tells[chosen].float() * (1 - 2 * back.float())[:, None, None, None]
    return lessons.reads[torch.cat([own, stay])].float(), torch.cat([labels[other], labels[stay]]), wanted


def whole_groups(activations: Activations) -> Iterator[tuple[int, int]]:
    """Pictures start .. stop - 1 in turn, some `ROWS` positions at once and all twins of a noise together."""
    some = activations.twins * max(1, ROWS // (activations.positions * activations.twins))
    for start in range(0, activations.pictures, some):
        yield start, min(start + some, activations.pictures)


def check_pairs(captures: Sequence[LabelledPictures], classes: tuple[str, ...]) -> None:
    """Raise `DiffLensError` if there are too few pairs of two classes to learn from."""
    shown = [torch.cat([of.labels[of.pairs[i]] for of in captures]) for i in range(2)]
    for k, m in combinations(range(len(classes)), 2):
        count = int(((shown[0] == k) & (shown[1] == m)).sum())
        if count < SUPPORT:
            raise DiffLensError(
                f"of the pictures that were drawn from the same noise ({captures[0].activations.twins} each), {count} "
                f"pairs are {classes[k]} and {classes[m]} with all else alike; at least {SUPPORT} are needed. Let "
                "prompts that follow one another differ in the word that names the class, and capture more pictures."
            )
