"""Reading and changing what a site puts out while ComfyUI samples, and telling when that did not come about.

A clone of the MODEL carries three wrappers for every edit: around a run (OUTER_SAMPLE), around a guider's prediction
(PREDICT_NOISE), and around an evaluation of the network (APPLY_MODEL), for which a forward hook lives on the site. They
see from outside how often the site should have been run and how often it was. Whatever stands in between, such as
a cache, an engine or a compiled graph, is noticed by the difference.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from torch import Tensor, nn

from ...difflens_core.activations import Edit, Held, HoldingEdit, Rehearsal, Shown
from ...difflens_core.activations import edit_site as hooked
from ...difflens_core.files import DiffLensError
from ...difflens_core.steer import Steering
from ...difflens_core.targets import Log
from .progress import TwiceShown, log, make_room, named, tell
from .runs import Account, Run, begin_run, part_of
from .sites import Picture, own_name, run_name, site_width

UNEDITED = "difflens_unedited"  # entry of transformer_options: in this evaluation all sites stay as they are
HOLDING = "difflens_holding"  # attribute of a guider while it draws a run twice
CONDITIONINGS = ("positive", "negative", "both")

# Of a run, its chunks' roles and uuids: which chunks is the edit for?
Choose = Callable[[Run, Sequence[str], Sequence[Any]], list[bool]]


def follows(conditioning: str) -> Choose:
    """For chunks of the positive, of the negative, or of all that a guider holds."""
    return lambda run, roles, uuids: [conditioning in ("both", role) for role in roles]


def follows_first(run: Run, roles: Sequence[str], uuids: Sequence[Any]) -> list[bool]:
    """For the chunk of the first positive conditioning alone: there may be several."""
    first = run.guider.conds["positive"][0]["uuid"]
    return [role == "positive" and uuid == first for role, uuid in zip(roles, uuids, strict=True)]


@dataclass(frozen=True)
class Settings:
    """How an edit goes about it.

    node: what errors begin with; span: the part of the sampling in which it changes anything; run: how many runs of as
    many pictures came before this one, whose numbers go on after theirs, or -1 to count them here, those of one `deal`
    together; mark: tells the edit from others; log: takes what a run tells; node_id: the node of the page that shows
    it; numbered: whether the edit goes by the pictures' numbers, which are looked for in their noise; hold: whether
    every run is drawn as it is first, for an edit that holds on to that; rows: the conditioning it is for.
    """

    node: str
    span: tuple[float, float] = (0.0, 1.0)
    run: int = 0
    deal: str = ""
    mark: str = ""
    log: Log = field(default_factory=Log)
    node_id: str | None = None
    numbered: bool = True
    hold: bool = False
    rows: str = ""


@dataclass
class Holding:
    """A run that is drawn twice, for all its edits that hold: the first time without any of them.

    rehearsal: what the site of the first of them puts out then, for the conditioning `rows`; edits: those that hold
    there.
    """

    rehearsal: Rehearsal
    rows: str
    rehearsing: bool = True
    edits: list[HoldingEdit] = field(default_factory=list)

    def held(self, site: str, rows: str, edit: HoldingEdit) -> Edit:
        """The edit for the second time. Elsewhere it does not hold: what it held on to would lack the others."""
        if self.elsewhere(site, rows):
            return edit
        self.edits.append(edit)
        return Held(edit, self.rehearsal, self.edits)

    def elsewhere(self, site: str, rows: str) -> str:
        """A sentence if the site or the conditioning is another one, or ""."""
        if (site, rows) == (self.rehearsal.site, self.rows):
            return ""
        first, this = (f"{place} ({of})" for place, of in ((self.rehearsal.site, self.rows), (site, rows)))
        return f"an edit before this one holds at {first}, so this one at {this} did not hold."


def unchanged(h: Tensor, progress: float, images: Tensor) -> Tensor:
    """The edit of those that hold while a run is drawn for the first time."""
    return h


@dataclass(eq=False)
class SiteEdit:
    """An edit of one site in every run of a MODEL, in the wrappers that carry it."""

    site: str
    edit: Edit | HoldingEdit
    choose: Choose
    settings: Settings
    runs: list[Run] = field(default_factory=list)  # the one under way last; a sampler may sample inside another

    @property
    def node(self) -> str:
        return self.settings.node

    def around_run(
        self, executor: WrapperExecutor, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """OUTER_SAMPLE."""
        seed = kwargs.get("seed", args[3] if len(args) > 3 else None)
        callback = kwargs.get("callback", args[1] if len(args) > 1 else None)
        guider, span, numbered = executor.class_obj, self.settings.span, self.settings.numbered

        def sample(
            edit: Edit, noise: Tensor = noise, latent_image: Tensor = latent_image, callback: Callable = callback
        ) -> tuple[Run, Any]:
            run = begin_run(guider, edit, noise, latent_image, sampler, sigmas, seed, span, numbered)
            self.runs.append(run)
            try:
                if len(args) > 1:
                    return run, executor(noise, latent_image, sampler, sigmas, args[0], callback, *args[2:], **kwargs)
                return run, executor(noise, latent_image, sampler, sigmas, *args, **kwargs | {"callback": callback})
            finally:
                self.runs.remove(run)
                if isinstance(self.edit, Steering):
                    self.edit.release()

        edit, begun = self.edit, getattr(guider, HOLDING, None)
        if begun and begun.rehearsing:
            return sample(unchanged if self.settings.hold else edit)[1]
        if not self.settings.hold:
            run, out = sample(edit)
        elif begun:
            run, out = sample(begun.held(self.site, self.settings.rows, edit))
        else:
            begun, shown = Holding(Rehearsal(self.site), self.settings.rows), TwiceShown(guider.model_patcher, callback)
            setattr(guider, HOLDING, begun)
            try:
                with undone(guider):
                    sample(begun.rehearsal, noise.clone(), latent_image.clone(), shown.first)
                begun.rehearsing = False
                run, out = sample(begun.held(self.site, self.settings.rows, edit), callback=shown.second)
            finally:
                delattr(guider, HOLDING)
        run.finish()
        with named(self.node):
            check_account(run.account, self.site)
        told = self.settings.log
        elsewhere = begun.elsewhere(self.site, self.settings.rows) if begun and self.settings.hold else ""
        short = shortfall(run.account, self.site, self.settings.span)
        held = begun and self.settings.hold and not elsewhere
        missed = ""
        if isinstance(self.edit, Steering) and self.edit.recipe.frame:
            missed = self.edit.missed(begun.rehearsal.last if held else run.last, bool(held))
        said = [*filter(None, [run.said, run.stretched, short, elsewhere, missed])]
        told.tell(self.site, (run.numbers + run.first).numpy(), said)
        for sentence in said:
            log.warning("%s: %s", self.node, sentence)
        if told.said:
            tell(self.settings.node_id, " ".join([*told.warned, *told.said]))
        return out

    def around_prediction(
        self, executor: WrapperExecutor, x: Tensor, timestep: Tensor, model_options: dict, *args: Any, **kwargs: Any
    ) -> Any:
        """PREDICT_NOISE. Reads one noise level, which on a GPU waits for the device once a prediction."""
        if self.runs and not model_options.get("transformer_options", {}).get(UNEDITED):
            self.runs[-1].told = True
            self.runs[-1].begin_prediction(float(timestep.flatten()[0]))
        return executor(x, timestep, model_options, *args, **kwargs)

    def around_evaluation(self, executor: WrapperExecutor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """APPLY_MODEL, because SD3's network runs no DIFFUSION_MODEL wrappers."""
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "sigmas" in a)
        if options.get(UNEDITED):
            return executor(x, *args, **kwargs)
        with named(self.node):
            if not self.runs:
                raise DiffLensError(
                    "the model is run outside a sampler of ComfyUI's, where pictures and conditionings cannot be told "
                    "apart. Take the model for that from before this node."
                )
            run = self.runs[-1]
            run.evaluations += 1
            if not run.told:  # a guider that predicts in a way of its own
                run.begin_prediction(float(options["sigmas"][0]))
            if not run.inside and run.evaluations > 1:  # the first is always looked at: does the recipe fit?
                return executor(x, *args, **kwargs)
            chosen = self.choose(run, run.roles(options), options["uuids"])
            if run.evaluations == 1:
                drawn_again = run.edit is unchanged or isinstance(run.edit, Rehearsal)  # only then do classes matter
                run.number(options, kwargs, 0 if drawn_again else self.settings.run, self.settings.deal)
            self.settings.log.first, self.settings.log.prompts = run.first, run.prompts
            numbers = run.rows(x, options)
        network, visited = executor.class_obj.diffusion_model, []
        with named(self.node):
            site = run_here(network, self.site)

        def change(h: Tensor) -> Tensor:
            visited.append(site)
            with named(self.node):
                return self.change(h, run, chosen, numbers)

        with uncompiled(), hooked(network, site, change, Picture(network, site, x, text_tokens(args, kwargs))):
            out = executor(x, *args, **kwargs)
        run.account.seen |= bool(visited)
        with named(self.node):  # sooner is better: before more is sampled in vain
            check_seen(run.account, self.site)
        return out

    def change(self, h: Tensor, run: Run, chosen: Sequence[bool], numbers: Tensor) -> Tensor:
        """h with the chosen chunks edited: h itself if every chunk comes back as it was."""
        run.count("reached")
        if not any(chosen):
            return h
        run.count("chosen")
        parts = part_of(h, chosen, numbers, self.site)
        if isinstance(run.edit, Rehearsal) and run.evaluations == 1:
            make_room(h.nbytes * len(run.steps), h.device)
        if isinstance(self.edit, Steering):
            run.stretched = run.stretched or self.edit.stretch(h)
            if self.edit.recipe.frame:
                mine = [part for part, mine in zip(parts, chosen, strict=True) if mine]
                run.last |= {tuple(images.tolist()): Shown(chunk, run.progress) for chunk, images in mine}
        edited = [
            run.edit(chunk, run.progress, images) if mine else chunk
            for (chunk, images), mine in zip(parts, chosen, strict=True)
        ]
        if all(new is old for new, (old, _) in zip(edited, parts, strict=True)):
            return h
        return torch.cat(edited)


@contextmanager
def undone(guider: Any) -> Iterator[None]:
    """Sampling inside leaves no trace: not in the guider's conditionings, which it works on, nor in random numbers."""
    conds = {name: of and [dict(cond) for cond in of] for name, of in guider.conds.items()}
    with torch.random.fork_rng():
        yield
    guider.conds = conds


def check_seen(account: Account, site: str) -> None:
    """Raise `DiffLensError` if the edit was due and the site was never run."""
    if account.due and not account.seen:
        raise never_run(site)


def run_here(network: nn.Module, site: str) -> str:
    """`run_name`. Raises `DiffLensError` if the network that is evaluated has no such module, as the model had."""
    try:
        return run_name(network, site)
    except DiffLensError as error:
        raise never_run(site) from error


def never_run(site: str) -> DiffLensError:
    return DiffLensError(
        f"{site} was never run while the model sampled, so it was neither read nor changed: another node replaces "
        "the network's code or runs an engine in its place. Leave that node out, or use another site."
    )


def check_account(account: Account, site: str) -> None:
    """Raise `DiffLensError` if the edit was due and nothing of it came about because the site was not run."""
    check_seen(account, site)
    if account.due and not account.reached:
        raise DiffLensError(
            f"{site} was run in none of the {account.due} predictions to be read or steered: a cache or another node "
            "answered them from what came before. Leave that node out, or let it begin later."
        )


def shortfall(account: Account, site: str, span: tuple[float, float]) -> str:
    """A sentence on what should have been done in a run and was not, or ""."""
    if account.predictions and not account.due:
        return (
            f"no step of the sampling lies between {span[0]:.0%} and {span[1]:.0%}, so nothing was steered. Widen "
            "start_percent and end_percent, or take more steps."
        )
    if account.due and not account.chosen:
        return (
            "the conditioning that was to be steered never came, so nothing was steered. At cfg 1 there is only the "
            "positive."
        )
    if account.reached < account.due:
        return (
            f"{site} was run in {account.reached} of the {account.due} predictions to be steered: a cache or another "
            "node answered the others from what came before."
        )
    if account.chosen < account.due:
        return (
            f"the conditioning that was to be steered came in {account.chosen} of the {account.due} predictions to be "
            "steered."
        )
    return ""


def text_tokens(args: Sequence[Any], kwargs: dict) -> int:
    """How many tokens of text the network is given, 0 if none."""
    text = kwargs.get("c_crossattn", args[2] if len(args) > 2 else None)
    return text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0


def uncompiled() -> AbstractContextManager:
    """While open, code that was compiled runs as it was written.

    A compiled graph leaves out hooks that came after it, and an edit is no code for a compiler. Other evaluations stay
    compiled.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled yet; it takes seconds to import
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def edit_site(model: ModelPatcher, site: str, edit: Edit, choose: Choose, settings: Settings) -> ModelPatcher:
    """A clone of the model in which `edit(rows, progress, images)` changes what is read at `site` in the chosen rows.

    rows: B x C x H x W; progress: 0 to 1; images: B, numbers of the pictures in their batch. If it gives the rows back,
    the result is bit-identical. Raises `DiffLensError` if the model lacks the site.
    """
    site_width(model, site)
    clone, carried = model.clone(), SiteEdit(own_name(model, site), edit, choose, settings)
    for kind, method in (
        (WrappersMP.OUTER_SAMPLE, carried.around_run),
        (WrappersMP.PREDICT_NOISE, carried.around_prediction),
        (WrappersMP.APPLY_MODEL, carried.around_evaluation),
    ):
        wrapper = functools.partial(method)
        wrapper.difflens_mark = f"{carried.site} {settings.span} {settings.run} {settings.mark}"
        clone.add_wrapper_with_key(kind, "difflens", wrapper)
    return clone


def apply_site(
    model: ModelPatcher, site: str, edit: Edit, node: str, conditioning: str = "positive", **settings: Any
) -> ModelPatcher:
    """`edit_site` for the rows of a conditioning (one of CONDITIONINGS); settings: further ones of `Settings`."""
    return edit_site(model, site, edit, follows(conditioning), Settings(node, rows=conditioning, **settings))
