"""One sampling run as the guider that executes it tells it: whose rows are whose, how far it is, and what was done.

Nothing here is known when a graph is built. A run begins when a guider starts to sample (OUTER_SAMPLE) and says which
conditionings it holds, which model sampling is in force, and from which noise the pictures start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...difflens_core.activations import Edit, Shown
from ...difflens_core.files import DiffLensError, digest
from .marks import content

# What an ordinary guider's places in a list of conditionings stand for, where its uuids leave it open.
BY_PLACE = {0: "positive", 1: "negative"}
NUMBERS_TRIED = 2**24  # random numbers drawn to find a row of noise among the pictures of a batch
COMPARED = 16  # of a row's numbers
ANIMATION = "ad_params"  # AnimateDiff Evolved's entry of transformer_options, by which it tells others what it does
HALVINGS = 40  # of the interval in which a sigma's percent is looked for


def progress_of(model: ModelPatcher) -> Callable[[float], float]:
    """A function from sigma to ComfyUI's percent of the sampling: 0 is pure noise, 1 the picture.

    The inverse of the `percent_to_sigma` of the model sampling that is in force, by bisection, so that it rises
    strictly under every model sampling and means what every other node's start and end percent mean.
    """
    sigma_at, known = model.get_model_object("model_sampling").percent_to_sigma, {}

    def progress(sigma: float) -> float:
        if sigma not in known:
            low, high = 0.0, 1.0
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if float(sigma_at(middle)) > sigma else (low, middle)
            known[sigma] = round((low + high) / 2, 6)
        return known[sigma]

    return progress


def picture_numbers(noise: Tensor, latent_image: Tensor, seed: int | None) -> Tensor:
    """Which picture of its batch each row of noise (B x ...) belongs to: B, int64.

    A batch is numbered from 0. The noise of pictures that were cut out of a batch (LatentFromBatch, RebatchLatents) is
    the one that they have in the whole batch, one picture's after the other's; there their numbers are found again.
    Noise from elsewhere tells nothing, and is numbered from 0 as well; so are different pictures under one noise.
    """
    plain, found = torch.arange(len(noise)), torch.full((len(noise),), -1)
    if seed is None or not noise.any():
        return plain
    given, generator = noise.detach().cpu(), torch.Generator().manual_seed(seed)
    if torch.equal(torch.randn(given.shape, dtype=given.dtype, generator=generator), given):
        return plain
    generator.manual_seed(seed)
    begins = given.flatten(1)[:, :COMPARED]
    for number in range(max(len(given), NUMBERS_TRIED // given[0].numel())):
        drawn = torch.randn((1, *given.shape[1:]), dtype=given.dtype, generator=generator)
        found[(begins == drawn.flatten(1)[:, :COMPARED]).all(dim=1)] = number
        if (found >= 0).all():
            break
    else:
        return plain
    first = torch.tensor([found.tolist().index(number) for number in found.tolist()])
    return found if torch.equal(latent_image, latent_image[first.to(latent_image.device)]) else plain


@dataclass
class Deal:
    """How far a deal has come in this server: which pictures the runs of each seed have got."""

    next: int = 0
    begun: dict[int | None, int] = field(default_factory=dict)
    went_on: dict[str, int] = field(default_factory=dict)  # of runs that started from pictures of an earlier run
    last: tuple[str | None, int, int] | None = None  # prompt of the last run, number of its first picture, how many

    def first(self, seed: int | None, count: int, start: str, prompt: str | None) -> tuple[int, str]:
        """Number of the first picture of a run of `count`, and a sentence on what could not be told, or "".

        A seed that was drawn before gets the pictures that it had, a new one those that come next. A run that starts
        from pictures (start: their mark) goes on with those that were drawn before it in the same prompt (hires fix, a
        second sampler), whatever its seed, and with the same ones when it is run alone again.
        """
        if start in self.went_on:
            return self.went_on[start], ""
        drawn = self.last[2] if start and self.last and self.last[0] == prompt else 0
        if count == drawn:
            self.went_on[start] = self.last[1]
            return self.last[1], ""
        first = self.begun.setdefault(seed, self.next)
        self.next = max(self.next, first + count)
        self.last = prompt, first, count
        if drawn:
            return first, (
                f"{count} picture{'s' * (count > 1)} went through Steer once more after a run of {drawn}, so which of "
                "them is not known, and they may have been steered to other classes than before. Take the second "
                "pass's model from before Steer, or let it have all of them."
            )
        return first, ""


def start_mark(latent_image: Tensor) -> str:
    """Tells the pictures that a run starts from from others; "" for an empty latent."""
    return digest(*content([latent_image])) if latent_image.any() else ""


def prompt_id() -> str | None:
    """The prompt that the server is executing, if it is."""
    context = get_executing_context()
    return context and context.prompt_id


DEALS: dict[str, Deal] = {}  # of this server, by what tells a deal from others


@dataclass
class Account:
    """What an edit did in one run, in noise predictions of the guider.

    due: those in its part of the sampling; reached: those of them in which the site was run; chosen: those in which a
    row was its own; seen: whether the site was run at all.
    """

    seen: bool = False
    predictions: int = 0
    due: int = 0
    reached: int = 0
    chosen: int = 0


@dataclass(eq=False)
class Run:
    """A sampling run under way, as one edit sees it.

    edit: what is done to the site; numbers: of the pictures in their batch; seed, start: of its noise, and the mark of
    the pictures it starts from; span: the part of the sampling (percent) that the edit is for; steps: progress of the
    steps of its schedule.
    """

    guider: Any
    edit: Edit
    numbers: Tensor
    seed: int | None
    start: str
    progress_at: Callable[[float], float]
    span: tuple[float, float]
    steps: list[float]
    first: int = 0  # number in the deal of the first picture of the batch
    said: str = ""
    stretched: str = ""
    last: dict[tuple[int, ...], Shown] = field(default_factory=dict)  # what a recipe was last given of each batch
    account: Account = field(default_factory=Account)
    progress: float = 0.0
    order: dict[int, str] = field(default_factory=dict)
    evaluations: int = 0
    told: bool = False  # whether the guider tells when it predicts
    counted: set[str] = field(default_factory=set)

    def number(self, options: dict, kwargs: dict, run: int, deal: str) -> None:
        """Number the pictures when their network is first run, which tells whether they are the frames of one clip.

        options: of its transformers; kwargs: what else it is given; run, deal: see `Settings`.
        """
        if kwargs.get("num_video_frames") is not None or ANIMATION in options:
            self.numbers = torch.zeros_like(self.numbers)
        count = int(self.numbers.max()) + 1
        if run >= 0:
            self.first = run * count
        else:
            self.first, self.said = DEALS.setdefault(deal, Deal()).first(self.seed, count, self.start, prompt_id())

    @property
    def prompts(self) -> int:
        """How many prompts the pictures have in turn: rows of the positive conditioning."""
        texts = [cond.get("cross_attn") for cond in self.guider.conds.get("positive") or ()]
        return max((len(text) for text in texts if isinstance(text, Tensor)), default=1)

    def begin_prediction(self, sigma: float) -> None:
        """The guider is about to predict at this noise level."""
        self.progress, self.counted = self.progress_at(sigma), set()
        self.account.predictions += 1
        self.account.due += self.inside

    def is_inside(self, progress: float) -> bool:
        return self.span[0] <= progress <= self.span[1]

    @property
    def inside(self) -> bool:
        """Whether the edit is for the prediction under way."""
        return self.is_inside(self.progress)

    def finish(self) -> None:
        """A cache may answer steps before the guider's prediction is told of them. They were due as well."""
        if self.account.predictions < len(self.steps):
            self.account.due = max(self.account.due, sum(map(self.is_inside, self.steps)))

    def count(self, what: str) -> None:
        """Count `what`, a field of the account, once a prediction that is due."""
        if self.inside and what not in self.counted:
            self.counted.add(what)
            setattr(self.account, what, getattr(self.account, what) + 1)

    def roles(self, options: dict) -> list[str]:
        """What each chunk of the batch follows by the guider's own name for it, such as "positive".

        Told by the conditionings that the guider holds. One uuid may stand for several of them: where only the positive
        is for an area, ComfyUI makes a negative for it under the same uuid. Then the place decides, whose meaning is
        read off the other chunks, or is the ordinary one for a guider with nothing but a positive and a negative.
        """
        places, uuids = options["cond_or_uncond"], options["uuids"]
        holders = [
            [name for name, conds in self.guider.conds.items() if any(cond["uuid"] == uuid for cond in conds or ())]
            for uuid in uuids
        ]
        self.order |= {place: names[0] for place, names in zip(places, holders, strict=True) if len(names) == 1}
        ordinary = set(self.guider.conds) <= set(BY_PLACE.values())
        found = []
        for place, names in zip(places, holders, strict=True):
            role = names[0] if len(names) == 1 else self.order.get(place) or (BY_PLACE.get(place) if ordinary else None)
            if role is None or (names and role not in names):
                raise DiffLensError(
                    f"{type(self.guider).__name__} runs a conditioning that is "
                    f"{' and '.join(names) or 'none of its own'}, so whose rows they are is not known. Use CFGGuider "
                    "or a KSampler, or leave out conditionings for areas."
                )
            found.append(role)
        return found

    def rows(self, x: Tensor, options: dict) -> Tensor:
        """Numbers (B, int64) of the pictures of each chunk of x, the latents that the network is run on."""
        chunks, numbers = len(options["cond_or_uncond"]), self.numbers
        window, part = options.get("context_window"), options.get(ANIMATION, {}).get("sub_idxs")
        if window is not None and window.dim == 0:
            numbers = window.get_tensor(numbers)
        elif part is not None:
            numbers = numbers[part]
        if len(x) != chunks * len(numbers):
            raise DiffLensError(
                f"the network is run on {len(x)} rows for {chunks} conditioning{'s' * (chunks > 1)} of {len(numbers)} "
                f"picture{'s' * (len(numbers) > 1)}, so which row is whose is not known. Another node cuts the batch "
                "into tiles or pieces: let it take one at a time, or leave it out."
            )
        return numbers


def begin_run(
    guider: Any, edit: Edit, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, seed: int | None,
    span: tuple[float, float], numbered: bool,
) -> Run:  # fmt: skip
    """The run that a guider begins. numbered: whether pictures' numbers are looked for in their noise."""
    progress = progress_of(guider.model_patcher)
    # This sampler decides by itself where to predict, and leaves the steps of its schedule aside.
    adaptive = "adaptive" in getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    return Run(
        guider, edit, picture_numbers(noise, latent_image, seed if numbered else None), seed, start_mark(latent_image),
        progress, span, [] if adaptive else [*map(progress, sigmas[:-1].tolist())],
    )  # fmt: skip


def part_of(h: Tensor, chosen: Sequence[bool], numbers: Tensor, site: str) -> list[tuple[Tensor, Tensor]]:
    """Each chunk of h, what the site put out for the whole batch, and the pictures of its rows.

    A network may unfold a picture into several rows (the frames of a video); they follow each other.
    """
    if h.ndim != 4:
        raise DiffLensError(
            f"the site puts out {h.ndim} dimensions, expected batch x channels x height x width, or batch x tokens x "
            "channels."
        )
    each, left = divmod(len(h), len(chosen) * len(numbers))
    if left or not each:
        raise DiffLensError(
            f"{site} puts out {len(h)} rows for {len(chosen)} x {len(numbers)} pictures, so which row is whose is not "
            "known. Use another site."
        )
    images = numbers.repeat_interleave(each)
    return [(chunk, images) for chunk in h.chunk(len(chosen))]
