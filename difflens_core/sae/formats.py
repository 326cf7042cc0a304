"""SAEs that other programs wrote, read into a `SparseAutoencoder` with the same encodings and reconstructions.

A format is recognised by the names and dimensions of its tensors and by its configuration, the cfg.json or config.json
beside the weights; the names of files say nothing. Every reader follows what the program itself does when it uses the
SAE. Where that takes a vector off the activations before encoding and puts it back after decoding, the vector becomes
the mean of our normalisation. Only tensors are read, never pickled code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..activations import UPDATE, reads_update
from ..files import DiffLensError, finite, read_json, read_tensors, reading, refuse_whole_numbers
from .autoencoder import TENSORS, SparseAutoencoder, load_sae
from .readers import COUNTS, DIFFRACT, FORMATS, Config, Tensors, dict_class

WEIGHTS = (".safetensors", ".pt", ".pth")
CONFIGS = ("cfg.json", "config.json")


def load_any_sae(path: str | Path, site: str = "") -> tuple[SparseAutoencoder, str]:
    """The SAE in a file or folder of any known format, in fp32, and a report of what was found and assumed.

    `site` names the module where the file does not, or corrects it. An SAE that is known to read updates has them for
    its site. Raises `DiffLensError` for what is no SAE, cannot be used the way its own program does, or is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise DiffLensError(f"{path}: no such file or folder. Expected an SAE.")
    weights, tensors = find_weights(path) if path.is_dir() else (path, read_tensors(path))
    notes: list[str] = []
    if "normalisation.mean" in tensors:
        sae, name = load_sae(weights), "DiffLens"
    else:
        with reading(weights):
            sae, name = convert(tensors, read_config(weights.parent), notes)
            computed = {name: getattr(sae, name) for name in (*TENSORS, "threshold")}
            finite({name: tensor for name, tensor in computed.items() if tensor is not None})
        sae = replace(sae, info={"format": name})
        if name == DIFFRACT:
            sae = replace(sae, site=site_of_diffract(weights))
    module = site.strip() or sae.site.removesuffix(UPDATE) or site_in_names(weights, notes)
    if reads_update(sae.site) and not reads_update(module):  # whoever names the module need not know that
        module += UPDATE
    sae = replace(sae, site=module)
    return sae, report(sae, name, notes)


def convert(tensors: Tensors, config: Config, notes: list[str]) -> tuple[SparseAutoencoder, str]:
    """SAE and name of the one format that tensors and configuration belong to."""
    tensors = finite(tensors)
    alike = [format for format in FORMATS if format.holds(tensors)]
    for format in alike:
        if format.fits(config):
            refuse_whole_numbers(tensors, COUNTS)
            full = {name: tensor.float() for name, tensor in tensors.items()}
            return format.read(full, config, notes), format.name
    kind = config.get("architecture") or dict_class(config)
    found = f"its kind is {kind}" if kind else f"it has {', '.join(list(config)[:8])}" if config else "there is none"
    if alike:
        names = " or ".join(format.name for format in alike)
        raise DiffLensError(
            f"the weights look like an SAE of {names}, but the configuration beside them does not: {found}. "
            f"Put the SAE's own {' or '.join(CONFIGS)} into its folder."
        )
    known = ", ".join(dict.fromkeys(format.name for format in FORMATS))
    raise DiffLensError(
        f"not an SAE of a known format. Tensors: {', '.join(list(tensors)[:8]) or 'none'}; configuration: {found}. "
        f"Known are DiffLens, {known}; gated SAEs and transcoders are not supported."
    )


def report(sae: SparseAutoencoder, name: str, notes: Iterable[str]) -> str:
    """What was loaded, a line each."""
    k = f", k {sae.k}" if sae.k else ""
    if sae.threshold is not None:
        low, high = float(sae.threshold.min()), float(sae.threshold.max())
        k += f", threshold {low:.4g}" + (f" to {high:.4g}" if high > low else "")
    place = f"the whole {sae.kernel} x {sae.kernel} map at once" if sae.kernel > 1 else "every position"
    lines = [
        f"format: {name}",
        f"activation: {sae.activation}{k}",
        f"size: {sae.latents} latents, {sae.channels} channels, kernel {sae.kernel} ({place})",
        f"reads: the {'update' if reads_update(sae.site) else 'output'} of "
        f"{sae.site.removesuffix(UPDATE) or 'a site that the file does not name'}",
    ]
    return "\n".join(lines + [f"note: {note}" for note in notes])


def find_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The one file in `folder` whose tensors look like an SAE's. Other files beside it are left alone."""
    found, refused = {}, None
    for path in sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS):
        try:
            tensors = read_tensors(path)
        except DiffLensError as error:
            refused = refused or error
            continue
        if tensors.keys() & {"encoder", "encoder.weight", "W_enc"}:
            found[path] = tensors
    if not found and refused:
        raise refused
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DiffLensError(f"{folder.name}: expected one file with an SAE's weights in this folder, found {names}.")
    return found.popitem()


def read_config(folder: Path) -> Config:
    """The configuration in `folder`; empty if there is none."""
    for path in (folder / name for name in CONFIGS):
        if path.is_file():
            return read_json(path, f"{path.name} beside it")
    return {}


SITE = re.compile(
    r"(?:(?:down|up|input|output|(?:single_)?transformer)_blocks|mid_block|middle_block)"
    r"(?:\.(?:\d+|[a-z][a-z0-9_]*))*"
)


def site_in_names(weights: Path, notes: list[str]) -> str:
    """Site that the folders around a file are named after, as sparsify, sdxl-unbox and Krea name them; "" if none.

    Krea's names of blocks with two streams end in the stream's number, 0 for the text's.
    """
    for name in (weights.parent.name, weights.parent.parent.name):
        if found := SITE.search(name):
            if found[0].startswith("transformer_blocks") and name[found.end() :] == "-0":
                raise DiffLensError(
                    f"{name}: the folder's name says that this SAE reads the text's tokens at {found[0]}, which are no "
                    "part of the picture. Use the one that ends in -1."
                )
            notes.append(f"the site was read off the folder's name, {name}")
            return found[0]
    return ""


def site_of_diffract(weights: Path) -> str:
    """Site of an SAE of DifFRACT, which only the file's name tells, and whether it is one at all."""
    found = re.fullmatch(r"(sae|transcoder)_(img|txt)_(\d+)", weights.stem)
    if not found or found[1] == "transcoder" or found[2] == "txt":
        what = {"transcoder": "a transcoder", "sae": "an SAE of the text's tokens"}[found[1]] if found else "not known"
        raise DiffLensError(
            f"{weights.name}: only its name tells what a {DIFFRACT} file is: sae_img_ and the block's number, for "
            f"an SAE of the picture's tokens. By its name this is {what}. Use one that is, under its own name."
        )
    return f"double_blocks.{found[3]}.img_mlp"


def load_class_features(folder: str | Path, latents: int, classes: Sequence[str] = ()) -> dict[str, Tensor]:
    """Chosen latents of every class, best first, from the reference DiffLens files {class}.pt in `folder`.

    Each holds flat ids, id = position * latents + latent. `classes`: those to read, in this order; all by their names
    if empty. Returns latent ids (int64), each once.
    """
    files = {path.stem: path for path in sorted(Path(folder).glob("*.pt"))}
    if not files:
        raise DiffLensError(f"{folder}: holds no feature file ({{class}}.pt).")
    if missing := [name for name in classes if name not in files]:
        raise DiffLensError(f"{Path(folder).name} has no feature file of {', '.join(missing)}, but {', '.join(files)}.")
    features = {}
    for name in classes or files:
        ids = read_tensors(files[name]).get("")
        with reading(files[name]):
            if ids is None or ids.ndim != 1 or ids.is_floating_point() or (ids < 0).any():
                raise DiffLensError("expected a list of feature ids, as the reference DiffLens writes them.")
            features[name] = torch.tensor(list(dict.fromkeys((ids % latents).tolist())), dtype=torch.int64)
    return features
