"""ResNets as classifiers of attributes, FairFace's among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import DiffLensError, finite, refuse_whole_numbers
from .faces import FaceFinder, around_faces, cut_out, largest_faces
from .readings import MISTAKE, NO_FACE, by_batches, left_out

SIZE = 224
MOST_BLOCKS = 512
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which torchvision's weights began with


@dataclass(frozen=True)
class Readout:
    """How the probabilities of an attribute come from a network's outputs.

    outputs: first output of those that share a softmax, and the one after the last; columns: for every class those of
    them that are added up; whole: what the classes leave out is shared among them, so that they sum to 1.
    """

    classes: tuple[str, ...]
    outputs: tuple[int, int]
    columns: tuple[tuple[int, ...], ...]
    whole: bool = True

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """n x classes from n x outputs."""
        part = logits[:, slice(*self.outputs)]
        sums = torch.stack([part[:, list(added)].logsumexp(dim=1) for added in self.columns], dim=1)
        return sums.log_softmax(dim=1) if self.whole else sums - part.logsumexp(dim=1, keepdim=True)

    @property
    def missing(self) -> list[int]:
        """Columns that no class has."""
        used = {column for added in self.columns for column in added}
        return [column for column in range(self.outputs[1] - self.outputs[0]) if column not in used]

    def share_left_out(self, logits: Tensor) -> Tensor:
        """n: the probability of the columns that no class has."""
        return logits[:, slice(*self.outputs)].softmax(dim=1)[:, self.missing].sum(dim=1)


# FairFace (Karkkainen and Joo 2021), the model with seven races. Outputs: 0-6 White, Black, Latino_Hispanic, East
# Asian, Southeast Asian, Indian, Middle Eastern; 7-8 Male, Female; 9-17 ages 0-2, 3-9, 10-19, ... 60-69, 70 and more.
RACES = ("white", "black", "asian", "indian")
FAIRFACE = {
    "gender": Readout(("male", "female"), (7, 9), ((0,), (1,))),
    "age": Readout(("young", "adult", "old"), (9, 18), ((0, 1, 2), (3, 4, 5, 6), (7, 8))),
    "race": Readout(RACES, (0, 7), ((0,), (1,), (3, 4), (5,))),
    # The paper's reference code takes the first four columns, so Latino_Hispanic for Asian and East Asian for Indian,
    # and does not make them sum to 1.
    f"race{MISTAKE}": Readout(RACES, (0, 7), ((0,), (1,), (2,), (3,)), whole=False),
}
# Its other model, res34_fair_align_multi_4, has as many outputs, but only the first four races: 4-6 were never trained.
FAIRFACE_4 = {
    "gender": FAIRFACE["gender"],
    "age": FAIRFACE["age"],
    "race": Readout(RACES, (0, 4), ((0,), (1,), (2,), (3,))),
}
FAIRFACE_OUTPUTS, UNUSED = 18, slice(4, 7)
FAIRFACE_NOTES = (
    "age: young is 0 to 19, adult 20 to 59, old 60 and more",
    "race: asian is East Asian and Southeast Asian; Latino_Hispanic and Middle Eastern are left out, the others are "
    "made to sum to 1",
    f"race{MISTAKE}: columns as in the reference's evaluation (Latino_Hispanic for asian, East Asian for indian), only "
    "to compare with its figures",
    "the classes are FairFace's guesses from pictures, not what people are",
)
FAIRFACE_4_NOTES = (FAIRFACE_NOTES[0], "race: the model with four races, which has no others", FAIRFACE_NOTES[-1])

UNNAMED = "race: seven races; if it is FairFace's model with four, give it FairFace's name, res34_fair_align_multi_4"


def races_of_fairface(weight: Tensor, file_name: str) -> tuple[int, str]:
    """How many races a FairFace file tells apart, 7 or 4, by its last layer (18 x width), and what to note about it.

    Rows that were never trained lie where PyTorch draws them, within 1 / sqrt(width). Training moves all rows far out
    of that. Raises `DiffLensError` if the file's name says otherwise.
    """
    named = re.search(r"multi_([47])(?!\d)", file_name)
    inside = weight.abs().amax(dim=1) <= 1.01 * weight.shape[1] ** -0.5  # with room for fp16
    trained = inside.logical_not()
    four = not trained[UNUSED].any() and bool(trained[: UNUSED.start].all())
    if not named:
        return (4, "") if four else (7, UNNAMED)
    if four == (named[1] == "4"):
        return int(named[1]), ""
    if four:
        raise DiffLensError(
            "its name says seven races, but only four of them were trained. Rename it to res34_fair_align_multi_4.pt, "
            f"or put {file_name}.json beside it, which names all its outputs: "
            '{"attributes": {"race": ["CLASS", ...], "gender": [...], "age": [...]}}.'
        )
    return 4, "race: four races by the file's name; the weights alone do not tell it from the model with seven"


class ResNetClassifier(nn.Module):
    """A ResNet with readouts; with `faces` it looks at the largest face only, and at the whole picture without one.

    size: side of the square that pictures or faces are resized to; mean, std: what each colour is normalised by.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        readouts: Mapping[str, Readout],
        size: int = SIZE,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        faces: FaceFinder | None = None,
    ):
        super().__init__()
        self.network, self.readouts, self.size, self.faces = network, dict(readouts), size, faces
        self.attributes = {name: readout.classes for name, readout in readouts.items()}
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def logits(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's outputs (B x outputs) for pictures B x 3 x H x W in [0, 1], and where no face was found."""
        if self.faces is None:
            found, told = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True), {}
        else:
            boxes = largest_faces(self.faces(x.detach()))
            found, told = cut_out(x, boxes, self.size), {NO_FACE: boxes.isnan().any(dim=1)}
        return self.network((found - self.mean) / self.std).float(), told

    @torch.inference_mode()
    def classify(self, images: Tensor, batch: int = 32) -> dict[str, Tensor]:
        """See `ImageClassifier.classify`."""

        def read(x: Tensor) -> dict[str, Tensor]:
            logits, told = self.logits(x)
            for name, readout in self.readouts.items():
                told[name] = readout.log_probabilities(logits).exp()
                if readout.missing:
                    told[left_out(name)] = readout.share_left_out(logits)
            return told

        return by_batches(images, batch, self.mean.device, read)

    def frames(self, images: Tensor, batch: int = 32) -> Tensor | None:
        """See `frames_of`: around the largest face, NaN without one, or None if it does not look for faces."""
        faces = self.faces
        if faces is None:
            return None

        def find(x: Tensor) -> dict[str, Tensor]:
            return {"frames": around_faces(largest_faces(faces(x)), x.shape[2] / x.shape[3])}

        return by_batches(images, batch, self.mean.device, find)["frames"]

    def log_probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """See `DifferentiableClassifier.log_probabilities`."""
        logits, told = self.logits(images.to(self.mean.device).movedim(-1, 1))
        return told | {name: readout.log_probabilities(logits) for name, readout in self.readouts.items()}


def build_resnet(weights: Mapping[str, Tensor]) -> tuple[nn.Module, str]:
    """A ResNet of torchvision's layout and its name, its depth read off the names of the weights."""
    weights = finite(weights)
    refuse_whole_numbers(weights, ("num_batches_tracked",))
    try:
        from torchvision.models import resnet
    except (ImportError, RuntimeError) as error:  # the latter where its build does not fit torch's
        raise DiffLensError(
            f"needs torchvision, which does not load ({error}). Install the torchvision that belongs to your torch."
        ) from error
    bottleneck = "layer1.0.conv3.weight" in weights
    blocks = [len({m[1] for name in weights if (m := re.match(rf"layer{i}\.(\d+)\.", name))}) for i in range(1, 5)]
    if sum(blocks) > MOST_BLOCKS:  # each takes time to build, and few bytes to name
        raise DiffLensError(f"its tensors name {sum(blocks)} blocks, more than any ResNet has. Choose another file.")
    with torch.device("meta"):  # no time for random weights
        kind = resnet.Bottleneck if bottleneck else resnet.BasicBlock
        network = resnet.ResNet(kind, blocks, num_classes=weights["fc.bias"].numel())
    name = f"ResNet-{sum(blocks) * (3 if bottleneck else 2) + 2}"
    full = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    try:
        network.load_state_dict(full, assign=True)
    except RuntimeError as error:
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise DiffLensError(f"looks like a {name} of torchvision, but its weights do not fit one. {reason}") from error
    return network, name
