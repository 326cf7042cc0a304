"""The edit that a recipe makes to a site's output during one sampling step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .files import DiffLensError
from .recipes import Recipe

DEVICE_TENSORS = ("encoder", "bias", "threshold", "decoder", "member", "levels", "probe_weight", "probe_bias")


@dataclass(frozen=True)
class Steering:
    """A recipe with a class for every picture of the run, as a callable that edits the site's output.

    `target_of(images)` gives the class (B, int64) that pictures `images` (B, their indices in the run) are asked to
    show. The latents z of the recipe are changed to z' and the difference is written back through the decoder:
    h' = h + scale_t D (z' - z); what the SAE does not explain stays as it was. With c the asked class and s its
    strength, per step and position:

    shift  z' = z + s (level_c - level_own), own being the probe's guess (its probabilities weigh the levels);
           pictures that already head for c are left alone
    add    z' = z + s (level_c - mean of the other classes' levels)
    move   z' = z + s (level_c - z), cannot overshoot
    scale  z' = (1 + s) z on the latents of class c only, as in the DiffLens paper

    Steps whose progress lies outside [recipe.start, recipe.end] are left alone. Nothing is changed in place.
    """

    recipe: Recipe
    target_of: Callable[[Tensor], Tensor]
    _moved: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, h: Tensor, progress: float, images: Tensor) -> Tensor:
        """Edited copy of h (B x C x H x W, any float type); images: B, indices in the run, on the CPU."""
        recipe = self.recipe
        if not any(recipe.strength) or not recipe.start <= progress <= recipe.end:
            return h
        self.check(h)
        t = self.tensors(h.device)
        step = recipe.normalisation.step_at(progress)
        target = self.target_of(images).to(h.device)
        strength = t["strength"][target][:, None, None]
        x = (h.flatten(2).transpose(1, 2).float() - t["mean"][step]) / t["scale"][step]
        change = strength * self.direction(x, target, step, t)
        return h + (change * t["scale"][step]).transpose(1, 2).reshape(h.shape).to(h.dtype)

    def direction(self, x: Tensor, target: Tensor, step: int, t: dict[str, Tensor]) -> Tensor:
        """Change of the normalised rows x (B x P x C) at strength 1."""
        levels = t["levels"][step].float()  # K x F x P
        if self.recipe.mode in ("shift", "add"):
            # Decoding K class maps is cheaper than decoding B pictures' latents.
            maps = torch.einsum("kfp,fc->kpc", levels, t["decoder"])
            k = len(maps)
            if self.recipe.mode == "add":
                return ((maps - maps.mean(dim=0)) * (k / (k - 1)))[target]
            own = F.linear(x.mean(dim=1), t["probe_weight"][step], t["probe_bias"][step]).softmax(dim=1)
            return maps[target] - torch.einsum("bk,kpc->bpc", own, maps)
        pre = F.linear(x, t["encoder"], t["bias"])
        z = torch.where(pre > t["threshold"], pre, 0.0)
        if self.recipe.mode == "move":
            return (levels[target].transpose(1, 2) - z) @ t["decoder"]
        return (z * t["member"][target][:, None]) @ t["decoder"]

    def check(self, h: Tensor) -> None:
        """Raise `DiffLensError` if h is not what the recipe was made on."""
        recipe, positions = self.recipe, self.recipe.levels.shape[-1]
        if h.shape[1] != recipe.width:
            raise DiffLensError(
                f"recipe for {recipe.attribute}: {recipe.site} of this model is {h.shape[1]} wide, the recipe was made "
                f"on {recipe.width}. Use a recipe made on this model."
            )
        if h.shape[2:].numel() != positions and recipe.mode != "scale":
            raise DiffLensError(
                f"recipe for {recipe.attribute}: the map at {recipe.site} has {h.shape[2:].numel()} positions, the "
                f"recipe was made on {positions}. Sample at the size it was made on, or use mode scale."
            )

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The recipe's tensors on `device`, moved once."""
        if device not in self._moved:
            moved = {name: getattr(self.recipe, name).to(device) for name in DEVICE_TENSORS}
            moved |= {"mean": self.recipe.normalisation.mean.to(device)}
            moved |= {"scale": self.recipe.normalisation.scale.to(device)}
            moved |= {"strength": torch.tensor(self.recipe.strength, device=device)}
            self._moved[device] = moved
        return self._moved[device]
