"""The edit that a recipe makes to a site's output during one sampling step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from ..activations import GRID, Shown, into_frames, out_of_frames
from ..files import DiffLensError
from ..locate import Changes, FrameProbes, Levels, contrast
from ..sae import SparseAutoencoder
from ..targets import LEFT_ALONE
from .recipe_files import same_rows
from .recipes import READING, TWIN, WITHOUT_LEVELS, Recipe

DEVICE_TENSORS = ("encoder", "bias", "threshold", "member", "probe_weight", "probe_bias")
MAPPED = ("reach", "shift", "add")  # modes that add differences of levels, and these alone
BY_LEVELS = ("reach", "shift", "add", "add own", "move", "clamp")
CHUNK = 2**22  # pre-activations of the full SAE that are held at once
CACHE_BYTES = 2**26  # for the decoded maps
GROUP = 16  # pre-activations a group in `kth_largest`


@dataclass(frozen=True)
class Steering:
    """A recipe with a class for every picture of the run, as a callable that edits the site's output.

    `target_of(images)` gives the class (B, int64) that pictures `images` (B, their indices in the run) are asked to
    show; LEFT_ALONE leaves a picture exactly as it is. The latents z of the recipe are changed to z' and the
    difference is written back through the decoder:
    h' = h + scale_t D w (z' - z), with w the recipe's weight of each latent; what the SAE does not explain stays as it
    was. With c the asked class, s its strength, and "own" the latents that belong to c, per step and position:

    reach          z' = z + s (1 - way) (level_c - level_own), own being the probe's likeliest other class and way, at
                   most 1, how far z has come from level_own to level_c: <z - level_own, d> / <d, d> with d the
                   difference of the levels, over latents and positions; what has arrived is left alone
    shift          z' = z + s (level_c - level_own), own being the probe's guess (its probabilities weigh the
                   levels); pictures that already head for c are left alone
    add            z' = z + s (level_c - mean of the other classes' levels)
    add own        the same on c's own latents; those of its rivals stay
    add fixed      z' = z + s on c's own latents, z - s on all others of the recipe
    add own fixed  z' = z + s on c's own latents, as in the DiffLens paper
    move           z' = z + s (level_c - z), with s at most 1
    clamp          z' = z + s (min(z, level_c) - z), with s at most 1: only takes away what exceeds the level
    scale          z' = (1 + s) z on c's own latents, as in the DiffLens paper
    ablate         z' = (1 - s) z on c's own latents, with s at most 1
    twin           z' = z + s change_c, as `Changes` tells it of the finished, unsteered picture

    Levels are those of pictures with the traits that the recipe's probes read, if they tell of any. Where it
    reads a frame, all of this is done in the subject's frame.
    A latent is active where its pre-activation exceeds the recipe's threshold; with `sae` (the one that the recipe
    was made from) where it is among the k largest, exactly. mask: M x height x width in [0, 1], a picture each or
    one for all, resized to the site's map; the edit is multiplied by it. Steps whose progress lies outside
    [recipe.start, recipe.end] are left alone. Nothing is changed in place.
    """

    recipe: Recipe
    target_of: Callable[[Tensor], Tensor]
    sae: SparseAutoencoder | None = None
    mask: Tensor | None = field(default=None, compare=False)
    _moved: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)
    _levels: dict[torch.device, Levels] = field(default_factory=dict, compare=False, repr=False)
    _frames: dict[torch.device, FrameProbes] = field(default_factory=dict, compare=False, repr=False)
    _decoded: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)
    _changes: dict[torch.device, Changes] = field(default_factory=dict, compare=False, repr=False)
    _sized: dict[tuple[int, int], Steering] = field(default_factory=dict, compare=False, repr=False)
    # What is told of pictures that are being drawn, until they are drawn: it serves at every step.
    _told: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary, compare=False, repr=False)

    def __post_init__(self) -> None:
        recipe, sae = self.recipe, self.sae
        if recipe.further:
            raise ValueError("a Steering edits one site: `steerings` makes those of a recipe of several")
        if sae is None:
            if recipe.needs_sae and recipe.mode in (*READING, TWIN):
                raise DiffLensError(
                    f"recipe for {recipe.attribute}: mode {recipe.mode!r} must know where the latents are active, and "
                    "only their SAE can tell. Give the SAE as well, or use mode add fixed or add own fixed."
                )
            return
        fits = sae.width == recipe.width and int(recipe.features.max()) < sae.latents
        if not fits or not same_rows(sae.decoder[recipe.features], recipe.decoder):
            raise DiffLensError(
                f"recipe for {recipe.attribute}: it was made from another SAE than the one given ({sae.latents} "
                f"latents of width {sae.width}). Use the one it was made from, or none."
            )

    @property
    def site(self) -> str:
        return self.recipe.site

    @property
    def holds(self) -> bool:
        """Whether pictures are to be drawn twice, see `activations.draw_held`."""
        return self.recipe.hold and any(self.recipe.strength)

    def acts(self, progress: float) -> bool:
        """Whether it is for this part of the sampling."""
        return self.recipe.start <= round(progress, 6) <= self.recipe.end  # as its start and end are

    @property
    def rivals(self) -> SparseAutoencoder | None:
        """The full SAE whose other latents compete with the recipe's; without TopK their own thresholds decide."""
        return self.sae if self.sae and self.sae.activation == "topk" else None

    def __call__(self, h: Tensor, progress: float, images: Tensor, shown: Shown | None = None) -> Tensor:
        """Edited copy of h (B x C x H x W, any float type); images: B, indices in the run, on the CPU.

        shown: what the site put out at the last step of the same pictures when they were drawn without steering: then
        what else a picture shows is read off that, see `activations.Held`.
        """
        recipe = self.recipe
        if not any(recipe.strength):
            return h
        self.check(h)  # also before its part of the sampling begins: sooner is better
        if self.stretch(h):
            return self.sized(h)(h, progress, images, shown)
        if not self.acts(progress):
            return h
        t = self.tensors(h.device)
        step = recipe.normalisation.step_at(progress)
        target = self.target_of(images)
        steered = target != LEFT_ALONE
        if not steered.any():
            return h
        target, steered = target.clamp(min=0).to(h.device), steered.to(h.device)
        if recipe.mode == TWIN:
            change = self.twin_change(self.unsteered(shown), target, step, t).reshape(h.shape)
            return torch.where(steered[:, None, None, None], h + self.masked(change, h, images), h)
        read = (h, step) if shown is None else (shown.h, recipe.normalisation.step_at(shown.progress))
        frames = self.frames(*read, t)
        if shown is not None:
            steered = steered & ~self.empty(shown)
        edited = h + self.change(h, target, self.traits(*read, t, frames), step, t, images, frames)
        return torch.where(steered[:, None, None, None], edited, h)

    def change(
        self, h: Tensor, target: Tensor, traits: Tensor | None, step: int, t: dict[str, Tensor], images: Tensor,
        frames: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What is added to h, of its shape and type.

        target: B; traits: B x G of the pictures, or None; frames: B x 4 of their subjects, or None.
        """
        recipe = self.recipe
        change_of = self.map_change if recipe.mode in MAPPED else self.read_change
        change = self.laid(change_of(self.columns(h, frames), target, traits, step, t), h, frames)
        return self.masked(change, h, images)

    def masked(self, change: Tensor, h: Tensor, images: Tensor) -> Tensor:
        """A change of h, where the mask lets it be, in its type."""
        if self.mask is not None:
            change = change * resized(self.mask, h, images).unflatten(2, h.shape[2:])
        return change.to(h.dtype)

    def unsteered(self, shown: Shown | None) -> Shown:
        """What mode twin reads. Raises `DiffLensError` if the pictures were not drawn without steering before."""
        if shown is None:
            raise DiffLensError(
                f"recipe for {self.recipe.attribute}: mode twin looks at the finished picture, but only recipes of one "
                "site can hold at once. Steer by this recipe alone, or by others of its site."
            )
        return shown

    def twin_change(self, shown: Shown, target: Tensor, step: int, t: dict[str, Tensor]) -> Tensor:
        """What mode twin adds (B x width x P) to pictures that end as shown, asked for classes `target` (B)."""
        changes, last = self.changes(shown.h.device), self.recipe.normalisation.step_at(shown.progress)
        if shown.h not in self._told:
            rows = self.normalised(shown.h, last, t).unflatten(2, shown.h.shape[2:])
            self._told[shown.h] = changes.told(rows, target)
        told = self._told[shown.h]
        amount = (t["strength"][target] * t["scale"][step])[:, None, None]
        return amount * changes.change(told, step, self.changed_rows(t)).flatten(2)

    def changes(self, device: torch.device) -> Changes:
        """The recipe's changes on `device`, moved once."""
        if device not in self._changes and self.recipe.changes:
            self._changes[device] = self.recipe.changes.to(device)
        return self._changes[device]

    def changed_rows(self, t: dict[str, Tensor]) -> Tensor:
        """What a unit of each map of the changes adds to normalised rows: E x width."""
        decoder = t["decoder"]
        if decoder.device not in self._decoded:
            maps = self.changes(decoder.device).maps
            self._decoded[decoder.device] = maps @ decoder
        return self._decoded[decoder.device]

    def laid(self, change: Tensor, h: Tensor, frames: Tensor | None) -> Tensor:
        """A change of what `columns` gives (B x width x P, or 1 for all positions) as one of h, in fp32."""
        change = change.unflatten(1, (self.recipe.channels, -1)).flatten(2)
        if frames is None:
            return change.expand(-1, -1, h.shape[2:].numel()).reshape(h.shape)
        maps = change.expand(-1, -1, GRID**2).unflatten(2, (GRID, GRID))
        return out_of_frames(maps, frames, (h.shape[2], h.shape[3]))

    def map_change(
        self, rows: Tensor, target: Tensor, traits: Tensor | None, step: int, t: dict[str, Tensor]
    ) -> Tensor:
        """Change (B x width x P) of such rows in a mode of MAPPED.

        A combination of a few decoded maps: cheaper than decoding B pictures' latents.
        """
        share = F.one_hot(target, len(self.recipe.classes)).float()
        if self.recipe.mode == "add":
            share = contrast(share.T).T
        else:
            logits = F.linear(self.pooled(rows, step, t), t["probe_weight"][step], t["probe_bias"][step])
            if self.recipe.mode == "shift":
                share = share - logits.softmax(dim=1)
            else:
                own = logits.scatter(1, target[:, None], -torch.inf).argmax(dim=1)
                left = 1 - self.way(rows, own, target, traits, step, t)
                share = left[:, None] * (share - F.one_hot(own, len(self.recipe.classes)))
        share, levels = t["strength"][target][:, None] * share, self.levels(rows.device)
        maps = self.decoded_maps(t)
        if maps is None:
            return torch.matmul(t["decoder"].T, t["scale"][step] * levels.level(share, traits, step))
        amounts = t["scale"][step] * levels.amounts(share, traits, step)
        return levels.over_places(amounts, maps)

    def way(
        self, rows: Tensor, own: Tensor, target: Tensor, traits: Tensor | None, step: int, t: dict[str, Tensor]
    ) -> Tensor:
        """How far the latents of rows (B x width x P) have come from `own`'s levels to `target`'s: B, at most 1."""
        z = self.read(rows, step, t)
        start, end = (self.level(classes, traits, step) for classes in (own, target))
        gap = end - start
        come = ((z - start) * gap).flatten(1).sum(dim=1) / gap.square().flatten(1).sum(dim=1).clamp(min=1e-12)
        return come.clamp(max=1)

    def level(self, classes: Tensor, traits: Tensor | None, step: int) -> Tensor:
        """Level (B x F x P) of `classes` (B), for pictures with such traits."""
        share = F.one_hot(classes, len(self.recipe.classes)).float()
        return self.levels(classes.device).level(share, traits, step)

    def pooled(self, rows: Tensor, step: int, t: dict[str, Tensor]) -> Tensor:
        """Mean over positions of the normalised rows (B x width x P): B x width."""
        return (rows.mean(dim=2, dtype=torch.float32) - t["mean"][step]) / t["scale"][step]

    def frames(self, h: Tensor, step: int, t: dict[str, Tensor]) -> Tensor | None:
        """Frames (B x 4) of the subjects of activations h, None if the recipe does not read them."""
        if self.recipe.frame is None:
            return None
        probes = self.moved(self.recipe.frame, h.device)
        return probes.find(self.normalised(h, step, t), (h.shape[2], h.shape[3]), step)

    def moved(self, probes: FrameProbes, device: torch.device) -> FrameProbes:
        """The recipe's probes of frames on `device`, moved once."""
        if device not in self._frames:
            self._frames[device] = probes.to(device)
        return self._frames[device]

    def normalised(self, h: Tensor, step: int, t: dict[str, Tensor]) -> Tensor:
        """Activations h as normalised rows: B x C x P, fp32."""
        return (h.flatten(2).float() - t["mean"][step][:, None]) / t["scale"][step]

    def empty(self, shown: Shown) -> Tensor:
        """Which pictures (B) have no subject for a recipe to follow: they are left as they are."""
        step, h = self.recipe.normalisation.step_at(shown.progress), shown.h
        if self.recipe.frame is None:
            return torch.zeros(len(h), dtype=torch.bool, device=h.device)
        probes = self.moved(self.recipe.frame, h.device)
        return probes.empty(self.normalised(h, step, self.tensors(h.device)), step)

    def missed(self, last: Mapping[tuple[int, ...], Shown], held: bool) -> str:
        """A sentence if some pictures have no subject, or "".

        last: of a batch's pictures, what the site put out in the end; held: without steering, so that they were left
        alone.
        """
        empty: dict[int, bool] = {}
        for pictures, shown in last.items():
            empty |= zip(pictures, self.empty(shown).tolist(), strict=True)
        if not any(empty.values()):
            return ""
        became = "left as they are" if held else "changed at a guessed place; with hold on they stay as they are"
        return (
            f"the recipe for {self.recipe.attribute} follows the subject of a picture, and found none in "
            f"{sum(empty.values())} of {len(empty)}, which were {became}."
        )

    def columns(self, h: Tensor, frames: Tensor | None) -> Tensor:
        """Activations h as the recipe reads them (B x width x P), in frames (B x 4) if there are any."""
        return self.recipe.columns(h if frames is None else into_frames(h, frames))

    def traits(self, h: Tensor, step: int, t: dict[str, Tensor], frames: Tensor | None = None) -> Tensor | None:
        """What else the pictures of activations h show (B x G), None if the edit does not go by it."""
        if not self.recipe.levels.attributes or self.recipe.mode not in BY_LEVELS:
            return None
        return self.levels(h.device).traits(self.pooled(self.columns(h, frames), step, t), step)

    def levels(self, device: torch.device) -> Levels:
        """The recipe's levels on `device`, moved once."""
        if device not in self._levels:
            self._levels[device] = self.recipe.levels.to(device)
        return self._levels[device]

    def decoded_maps(self, t: dict[str, Tensor]) -> Tensor | None:
        """What a unit of each of the levels' maps adds to normalised rows: R x width x D, None if too large."""
        maps, decoder = self.recipe.levels.maps, t["decoder"]
        if maps.shape[0] * decoder.shape[1] * maps.shape[2] * 4 > CACHE_BYTES:
            return None
        if decoder.device not in self._decoded:
            own = self.levels(decoder.device).maps
            self._decoded[decoder.device] = torch.einsum("rfd,fc->rcd", own, decoder)
        return self._decoded[decoder.device]

    def read_change(
        self, rows: Tensor, target: Tensor, traits: Tensor | None, step: int, t: dict[str, Tensor]
    ) -> Tensor:
        """Change (B x width x P, or B x width x 1 if the same everywhere) of such rows in a mode outside MAPPED."""
        mode, strength, own = self.recipe.mode, t["strength"][target][:, None, None], t["member"][target][:, :, None]
        if mode == "add own":
            share = contrast(F.one_hot(target, len(self.recipe.classes)).float().T).T
            change = strength * own * self.levels(rows.device).level(share, traits, step)
        elif mode in ("add fixed", "add own fixed"):
            change = strength * (2 * own - 1 if mode == "add fixed" else own)
        elif mode in ("scale", "ablate"):
            change = (strength if mode == "scale" else -strength.clamp(max=1)) * own * self.read(rows, step, t)
        else:
            gap = self.level(target, traits, step) - self.read(rows, step, t)
            change = strength.clamp(max=1) * (gap if mode == "move" else gap.clamp(max=0))
        return torch.matmul(t["decoder"].T, t["scale"][step] * change)

    def read(self, rows: Tensor, step: int, t: dict[str, Tensor]) -> Tensor:
        """Activity of the recipe's latents (B x F x P) in such rows (B x width x P)."""
        x = (rows.float() - t["mean"][step][:, None]) / t["scale"][step]
        if "modulation" in t:
            gain, offset = t["modulation"][step][..., None]
            x = x * (1 + gain) + offset
        sae = self.rivals
        if not sae:
            pre = torch.matmul(t["encoder"], x) + t["bias"][:, None]
            return torch.where(pre > t["threshold"][:, None], pre, 0.0)
        parts, count = [], len(self.recipe.features)
        for chunk in x.transpose(1, 2).flatten(0, 1).split(max(1, CHUNK // sae.latents)):
            pre = torch.addmm(t["sae_bias"], chunk, t["sae_encoder"].T)
            own = pre[:, :count]
            parts.append(torch.where((own >= kth_largest(pre, sae.k)) & (own > 0), own, 0.0))
        return torch.cat(parts).unflatten(0, (len(x), -1)).transpose(1, 2)

    def check(self, h: Tensor) -> None:
        """Raise `DiffLensError` if h is not what the recipe was made on."""
        recipe, positions = self.recipe, self.recipe.levels.positions
        if h.shape[1] != recipe.channels:
            raise DiffLensError(
                f"recipe for {recipe.attribute}: {recipe.site} of this model is {h.shape[1]} wide, the recipe was made "
                f"on {recipe.channels}. Use a recipe made on this model."
            )
        if recipe.kernel > 1:
            if tuple(h.shape[2:]) != (recipe.kernel, recipe.kernel):
                raise DiffLensError(
                    f"recipe for {recipe.attribute}: the map at {recipe.site} is {' x '.join(map(str, h.shape[2:]))}, "
                    f"the recipe reads all of a {recipe.kernel} x {recipe.kernel} one. Sample at the size it was made "
                    "on."
                )
        elif self.stretch(h) and (not recipe.grid or (h.shape[3] == 1) != (recipe.grid[1] == 1)):
            made_on = " x ".join(map(str, recipe.map)) if recipe.map else f"{positions} positions"
            raise DiffLensError(
                f"recipe for {recipe.attribute}: the map at {recipe.site} is {h.shape[2]} x {h.shape[3]}, the recipe "
                f"was made on {made_on}, and how the one lies on the other is not known. Use a recipe made on this "
                "model, or mode scale."
            )

    def stretch(self, h: Tensor) -> str:
        """A sentence if the recipe was made on a map of another size than h (B x C x H x W), or ""."""
        recipe = self.recipe
        anywhere = recipe.mode in (*WITHOUT_LEVELS, TWIN) or recipe.frame is not None or recipe.levels.positions == 1
        if anywhere or recipe.kernel > 1 or recipe.fits(h.shape[2], h.shape[3]):
            return ""
        made_on, here = (" x ".join(map(str, size)) for size in (recipe.grid or (), h.shape[2:]))
        return (
            f"the recipe for {recipe.attribute} knows where things are on a map of {made_on}, and was stretched to "
            f"{here}: it suits pictures in which things are at the same places."
        )

    def sized(self, h: Tensor) -> Steering:
        """The same edit by a recipe for maps of the size of h, stretched once."""
        size = (h.shape[2], h.shape[3])
        if size not in self._sized:
            recipe = self.recipe.stretched(*size)
            self._sized[size] = replace(
                self,
                recipe=recipe,
                _moved={},
                _levels={},
                _frames={},
                _decoded={},
                _changes={},
                _sized={},
                _told=WeakIdKeyDictionary(),
            )
        return self._sized[size]

    def release(self) -> None:
        """Give back what is held outside main memory. It is moved there again when it is needed."""
        for kept in (self._moved, self._levels, self._frames, self._decoded, self._changes):
            for device in [device for device in kept if device.type != "cpu"]:
                del kept[device]
        for sized in self._sized.values():
            sized.release()

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The recipe's tensors on `device`, moved once."""
        if device not in self._moved:
            moved = {name: getattr(self.recipe, name).to(device) for name in DEVICE_TENSORS}
            moved["member"] = moved["member"].float()
            moved["decoder"] = self.recipe.writes.to(device)
            moved |= {"mean": self.recipe.means.to(device)}
            moved |= {"scale": self.recipe.normalisation.scale.to(device)}
            moved |= {"strength": torch.tensor(self.recipe.strength, device=device)}
            if self.recipe.normalisation.modulation is not None:
                moved |= {"modulation": self.recipe.normalisation.modulation.to(device)}
            if sae := self.rivals:
                # The recipe's latents first, so that one product gives them and their rivals for the k places.
                others = torch.ones(sae.latents, dtype=torch.bool)
                others[self.recipe.features] = False
                order = torch.cat([self.recipe.features, others.nonzero().flatten()])
                moved |= {"sae_encoder": sae.encoder[order].to(device)}
                moved |= {"sae_bias": sae.encoder_bias[order].to(device)}
            self._moved[device] = moved
        return self._moved[device]


def steerings(
    recipe: Recipe, target_of: Callable[[Tensor], Tensor], sae: SparseAutoencoder | None = None,
    mask: Tensor | None = None,
) -> list[Steering]:  # fmt: skip
    """The edits of a recipe, one for each of its sites. sae: that of one of them, told by its site."""
    if sae and recipe.further and sae.site not in recipe.sites:
        raise DiffLensError(
            f"recipe for {recipe.attribute}: the SAE is of {sae.site}, the recipe of {', '.join(recipe.sites)}. Give "
            "one that it was made from, or none."
        )
    return [
        Steering(part, target_of, sae if sae and (not recipe.further or sae.site == part.site) else None, mask)
        for part in recipe.parts
    ]


def resized(mask: Tensor, h: Tensor, images: Tensor) -> Tensor:
    """The mask (M x height x width) of `images` at the size of h: B x 1 x P, or 1 x 1 x P if there is one for all."""
    if 1 < len(mask) <= (last := int(images.max())):
        raise DiffLensError(
            f"there are {len(mask)} masks and at least {last + 1} pictures. Give one mask for all, or one for each "
            "picture of the batch."
        )
    mask = F.interpolate(mask[:, None].to(h.device, torch.float32), h.shape[2:], mode="area").flatten(2)
    return mask if len(mask) == 1 else mask[images.to(h.device)]


def kth_largest(rows: Tensor, k: int) -> Tensor:
    """The k-th largest number of each row (R x N): R x 1.

    Faster than topk over all: the k groups with the largest maxima hold k numbers that none elsewhere exceeds.
    """
    if rows.shape[1] % GROUP or rows.shape[1] < 2 * GROUP * k:
        return rows.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    grouped = rows.unflatten(1, (GROUP, -1))
    best = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1)
    return candidates.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
