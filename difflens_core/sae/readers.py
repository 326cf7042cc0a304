"""One reader for every program whose SAEs we know: see `formats`.

Every reader follows what the program itself does when it uses the SAE. Where that takes a vector off the activations
before encoding and puts it back after decoding, the vector becomes the mean of our normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import UPDATE
from ..files import DiffLensError
from .autoencoder import Normalisation, SparseAutoencoder

Tensors = Mapping[str, Tensor]
Config = Mapping[str, Any]
Reader = Callable[[Tensors, Config, list[str]], SparseAutoencoder]  # the list takes what the user should know


@dataclass(frozen=True)
class Format:
    """A program's way to store an SAE.

    tensors: dimensions of every tensor; optional: names of more that may be there; fits: is a configuration of this
    format; read: makes the SAE.
    """

    name: str
    tensors: Mapping[str, int]
    fits: Callable[[Config], bool]
    read: Reader
    optional: frozenset[str] = frozenset()

    def holds(self, tensors: Tensors) -> bool:
        found = {name: tensor.ndim for name, tensor in tensors.items() if name not in self.optional}
        return found == self.tensors


def build(
    encoder: Tensor,
    encoder_bias: Tensor,
    decoder: Tensor,
    shift: Tensor | None = None,
    decoder_bias: Tensor | None = None,
    **settings: Any,
) -> SparseAutoencoder:
    """SAE from an encoder and a decoder N x width.

    shift: C, taken off the activations before encoding and put back after decoding; decoder_bias: width.
    """
    width = encoder.shape[1]
    shift = torch.zeros(width // settings.get("kernel", 1) ** 2) if shift is None else shift
    decoder_bias = torch.zeros(width) if decoder_bias is None else decoder_bias
    parts = encoder, encoder_bias, decoder, decoder_bias
    encoder, encoder_bias, decoder, decoder_bias = (part.float().contiguous() for part in parts)
    normalisation = Normalisation(torch.zeros(1), shift.float()[None], torch.ones(1))
    if "threshold" in settings:
        settings["threshold"] = settings["threshold"].float()
    settings = {"k": 0, "site": "", **settings}
    return SparseAutoencoder(encoder, encoder_bias, decoder, decoder_bias, normalisation, **settings)


def agree(config: Config, sae: SparseAutoencoder, width: str, latents: str) -> SparseAutoencoder:
    """The SAE, whose sizes are what the entries `width` and `latents` of the configuration say (0 or absent: any)."""
    for name, found in ((width, sae.channels), (latents, sae.latents)):
        if config.get(name, found) not in (found, 0, None):
            raise DiffLensError(
                f"the weights have {sae.latents} latents of {sae.channels} channels, the configuration says {name} "
                f"{config[name]}. They seem to belong to different SAEs."
            )
    return sae


def whole(config: Config, name: str) -> int:
    """A count from the configuration; an average may have a fraction."""
    value = config.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 2**31:
        raise DiffLensError(f"the configuration says {name} {value!r}, expected a positive number.")
    return round(value)


def unit_decoder(sae: SparseAutoencoder) -> SparseAutoencoder:
    """The SAE with decoder rows of unit length, which their latents take on; a threshold is for those."""
    norms = sae.decoder.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    bias = sae.encoder_bias * norms
    return replace(sae, encoder=sae.encoder * norms[:, None], encoder_bias=bias, decoder=sae.decoder / norms[:, None])


def refuse_unknown(config: Config, known: Iterable[str], program: str) -> None:
    """Raise `DiffLensError` for an option that is set and not `known` to leave the use of the SAE as we read it."""
    if unknown := [f"{name} {value!r}" for name, value in config.items() if name not in known and value]:
        raise DiffLensError(
            f"its configuration sets {', '.join(unknown)}, which is not known here for {program}, so the SAE would "
            "be used otherwise than it was trained. It is not supported."
        )


def is_sparsify(config: Config) -> bool:
    return {"expansion_factor", "k", "d_in"} <= config.keys()


# Options that concern training, or that the readers look at.
SPARSIFY = (
    "expansion_factor", "num_latents", "k", "d_in", "normalize_decoder", "multi_topk", "activation", "batch_topk",
    "lookup_max_order", "gram_table_hash",
)  # fmt: skip
UNBOX = ("n_dirs_local", "d_model", "k", "auxk", "dead_steps_threshold", "comms")
SAELENS_OPTIONS = (
    "architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "metadata", "k",
    "normalize_activations", "reshape_activations", "rescale_acts_by_decoder_norm", "decoder_init_norm",
    "use_sparse_activations", "aux_loss_coefficient", "topk_threshold_lr", "matryoshka_widths",
    "use_matryoshka_aux_loss", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale", "jumprelu_ste_to_input", "pre_act_loss_coefficient", "l0_coefficient", "l0_warm_up_steps",
    "l1_coefficient", "l1_warm_up_steps", "lp_norm",
)  # fmt: skip
# Tensors that hold whole numbers.
COUNTS = ("k", "group_sizes", "stats_last_nonzero")


def read_difflens(tensors: Tensors, config: Config, notes: list[str]) -> SparseAutoencoder:
    """The reference DiffLens: a convolution, whose kernel is 1 x 1 or as large as the map."""
    encoder, decoder = tensors["encoder.weight"], tensors["decoder.weight"]
    kernel = encoder.shape[-1]
    if encoder.shape[-2:] != decoder.shape[-2:] or encoder.shape[-2] != kernel:
        shapes = [" x ".join(map(str, weight.shape[-2:])) for weight in (encoder, decoder)]
        raise DiffLensError(f"the kernels are {shapes[0]} and {shapes[1]}, expected squares of one size.")
    if kernel == 1:
        decoder = decoder.transpose(0, 1)  # an ordinary convolution; larger ones are transposed convolutions
    refuse_unknown(config, SPARSIFY, "the reference DiffLens")
    notes.append(
        "the decoder's bias is not subtracted before encoding, as in the reference's training and locating (its "
        "Stable Diffusion sampler subtracts it)"
    )
    sae = build(
        encoder.flatten(1), tensors["encoder.bias"], decoder.flatten(1),
        decoder_bias=tensors["decoder.bias"].repeat_interleave(kernel**2), k=whole(config, "k"), kernel=kernel,
    )  # fmt: skip
    return agree(config, sae, "d_in", "num_latents")


UNLIKE_SPARSIFY = (
    "transcode", "skip_connection", "embed_skip", "gram_lookup", "signed", "input_unit_norm", "sample_topk",
)  # fmt: skip


def read_sparsify(tensors: Tensors, config: Config, notes: list[str]) -> SparseAutoencoder:
    """EleutherAI sparsify, and SAeUron, which adds options to it."""
    unlike = [name for name in UNLIKE_SPARSIFY if config.get(name)]
    unlike += [config["activation"]] if config.get("activation", "topk") != "topk" else []
    if unlike:
        raise DiffLensError(f"it was trained with {', '.join(unlike)}, which is not supported.")
    refuse_unknown(config, SPARSIFY, "sparsify")
    if config.get("batch_topk"):
        notes.append("trained with BatchTopK, used with the k largest at every position, as SAeUron itself does")
    sae = build(
        tensors["encoder.weight"], tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"], k=whole(config, "k")
    )
    return agree(config, sae, "d_in", "num_latents")


def read_unbox(tensors: Tensors, config: Config, notes: list[str]) -> SparseAutoencoder:
    """sdxl-unbox. Its mean.pt and std.pt are statistics of the latents, not of the input."""
    refuse_unknown(config, UNBOX, "sdxl-unbox")
    notes.append("it reads the update of its block, as all SAEs of sdxl-unbox do; no file says so")
    sae = build(
        tensors["encoder.weight"], tensors["latent_bias"], tensors["decoder.weight"].T, tensors["pre_bias"],
        k=whole(config, "k"), site=UPDATE,
    )  # fmt: skip
    return agree(config, sae, "d_model", "n_dirs_local")


def dict_class(config: Config) -> str | None:
    """The class that dictionary_learning's configuration names."""
    trainer = config.get("trainer")
    return trainer.get("dict_class") if isinstance(trainer, dict) else None


def read_dictionary(tensors: Tensors, config: Config, notes: list[str]) -> SparseAutoencoder:
    """dictionary_learning. What its trainer divided the activations by is multiplied into what it saves."""
    trainer, rest = config["trainer"], {}
    kind = trainer["dict_class"]
    if isinstance(trainer.get("submodule_name"), str):
        rest["site"] = trainer["submodule_name"]
    if "k" in tensors:
        rest["k"] = int(tensors["k"])
        if trainer.get("k", rest["k"]) != rest["k"]:
            raise DiffLensError(
                f"the weights say k {rest['k']}, the configuration {trainer['k']}. One is another SAE's."
            )
    if "BatchTopK" in kind:
        if "threshold" not in tensors:
            raise DiffLensError("it lacks its inference threshold. Save it with a newer dictionary_learning.")
        rest |= {"activation": "batchtopk", "threshold": tensors["threshold"]}
        if tensors["threshold"] < 0:
            notes.append("its threshold was never fitted: every positive latent counts, as in dictionary_learning")
    if "W_enc" in tensors:
        parts = tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"]
    else:
        parts = tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"].T
    if kind == "JumpReluAutoEncoder":
        sae = build(*parts, None, tensors["b_dec"], activation="jumprelu", threshold=tensors["threshold"], **rest)
    elif kind == "AutoEncoderNew":
        sae = build(*parts, None, tensors["decoder.bias"], activation="relu", **rest)
    elif kind == "AutoEncoder":
        notes.append("the decoder was scaled to unit length, as dictionary_learning does when it loads one")
        sae = unit_decoder(build(*parts, tensors["bias"], activation="relu", **rest))
    else:
        sae = build(*parts, tensors["b_dec"], **rest)
    return agree(trainer, sae, "activation_dim", "dict_size")


SAELENS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
SAELENS |= {"batchtopk": "batchtopk", "matryoshka_batchtopk": "batchtopk"}  # training checkpoints


def read_saelens(tensors: Tensors, config: Config, notes: list[str]) -> SparseAutoencoder:
    """SAELens 6."""
    activation, metadata = SAELENS[config["architecture"]], config.get("metadata")
    if not isinstance(metadata, dict):
        raise DiffLensError("it was written by SAELens before version 6. Load it with SAELens 6 and save it again.")
    refuse_unknown(config, SAELENS_OPTIONS, "SAELens")
    normalised = config.get("normalize_activations", "none")
    if normalised != "none" or config.get("reshape_activations", "none") != "none":
        raise DiffLensError(
            f"it wants activations normalised ({normalised}) or reshaped in a way that is not in the file. Fold the "
            "normalisation into the weights with SAELens, or use an SAE without."
        )
    rest: dict[str, Any] = {"site": metadata.get("hook_name") or ""}
    gate = {"jumprelu": "threshold", "batchtopk": "topk_threshold"}.get(activation)
    if tensors.keys() & {"threshold", "topk_threshold"} != ({gate} if gate else set()):
        raise DiffLensError(f"architecture {config['architecture']} and the thresholds in the file do not go together.")
    if gate:
        rest["threshold"] = tensors[gate]
    if activation in ("topk", "batchtopk"):
        rest["k"] = whole(config, "k")
    parts = tensors["W_enc"].T, tensors["b_enc"], tensors["W_dec"]
    if trained := metadata.get("training_architecture"):
        notes.append(f"trained as {trained}")
    subtracted = config.get("apply_b_dec_to_input", True)
    biases = (tensors["b_dec"], None) if subtracted else (None, tensors["b_dec"])
    sae = build(*parts, *biases, activation=activation, **rest)
    if config.get("rescale_acts_by_decoder_norm"):
        sae = unit_decoder(sae)
    return agree(config, sae, "d_in", "d_sae")


def is_finebooru(config: Config) -> bool:
    return {"features", "pages"} <= config.keys()


def read_finebooru(tensors: Tensors, config: Config, notes: list[str]) -> SparseAutoencoder:
    """finebooru, which trained the Flux SAEs of Krea. Without a k the latents take on the lengths of their rows."""
    refuse_unknown(config, ("features", "pages", "k", "bandwidth", "jumpthreshold"), "finebooru")
    parts = tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"].T, tensors["bias"]
    if "logthres" in tensors:
        sae = build(*parts, activation="jumprelu", threshold=tensors["logthres"].exp())
    elif config.get("k"):
        sae = build(*parts, k=whole(config, "k"))
    else:
        sae = unit_decoder(build(*parts, activation="relu"))
    return agree(config, sae, "features", "pages")


TIMES = 33  # steps for which an encoder that is told the time is worked out


def read_diffract(tensors: Tensors, config: Config, notes: list[str]) -> SparseAutoencoder:
    """DifFRACT: what the encoder reads is modulated by the time, from 1 at pure noise to 0 at the picture.

    Its transcoders have the same tensors, and only the file's name tells: see `formats.site_of_diffract`.
    """
    width, size = tensors["encoder.weight"].shape[1], tensors["time_mlp.0.weight"].shape[1]
    sizes = dict(zip(TOLD, (size, size, 2 * width), strict=True))
    if size % 2 or any(
        (tensors[f"{of}.weight"].shape, tensors[f"{of}.bias"].shape) != ((n, size), (n,)) for of, n in sizes.items()
    ):
        raise DiffLensError(f"the layers that the time goes through do not fit {width} channels. The file is damaged.")
    progress = torch.linspace(0, 1, TIMES)
    waves = (1 - progress)[:, None] * torch.logspace(0, -4, size // 2)
    x = torch.cat([waves.sin(), waves.cos()], dim=1)
    for layer in ("time_mlp.0", "time_mlp.2"):
        x = F.silu(F.linear(x, tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]))
    modulation = F.linear(x, tensors["mod_linear.weight"], tensors["mod_linear.bias"]).unflatten(1, (2, width))
    notes.append(
        "its encoder is told the time, which is taken to be the share of the sampling that lies ahead, as in FLUX.1 "
        "schnell; other models of Flux shift it"
    )
    sae = build(
        tensors["encoder.weight"], tensors["encoder.bias"], tensors["decoder.weight"].T,
        decoder_bias=tensors["decoder.bias"], activation="relu",
    )  # fmt: skip
    return replace(
        sae, normalisation=Normalisation(progress, torch.zeros(TIMES, width), torch.ones(TIMES), modulation)
    )  # fmt: skip


def of_classes(*names: str) -> Callable[[Config], bool]:
    return lambda config: dict_class(config) in names


LINEAR = {"encoder.weight": 2, "encoder.bias": 1, "decoder.weight": 2}
MATRICES = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1}
DICTIONARY = "dictionary_learning"
DIFFRACT = "DifFRACT"
TOLD = ("time_mlp.0", "time_mlp.2", "mod_linear")  # layers that the time goes through
FORMATS = (
    Format(
        "the reference DiffLens", {"encoder.weight": 4, "encoder.bias": 1, "decoder.weight": 4, "decoder.bias": 1},
        is_sparsify, read_difflens,
    ),
    Format(
        "EleutherAI sparsify or SAeUron", {"encoder.weight": 2, "encoder.bias": 1, "W_dec": 2, "b_dec": 1},
        is_sparsify, read_sparsify,
    ),
    Format(
        "sdxl-unbox", {"encoder.weight": 2, "latent_bias": 1, "decoder.weight": 2, "pre_bias": 1},
        lambda config: {"n_dirs_local", "d_model", "k"} <= config.keys(), read_unbox, frozenset({"stats_last_nonzero"}),
    ),
    Format(
        DICTIONARY, LINEAR | {"b_dec": 1, "k": 0}, of_classes("AutoEncoderTopK", "BatchTopKSAE"), read_dictionary,
        frozenset({"threshold"}),
    ),
    Format(
        DICTIONARY, MATRICES | {"k": 0, "group_sizes": 1}, of_classes("MatryoshkaBatchTopKSAE"), read_dictionary,
        frozenset({"threshold"}),
    ),
    Format(DICTIONARY, LINEAR | {"bias": 1}, of_classes("AutoEncoder"), read_dictionary),
    Format("finebooru", LINEAR | {"bias": 1}, is_finebooru, read_finebooru, frozenset({"logthres"})),
    Format(
        DIFFRACT,
        LINEAR | {"decoder.bias": 1} | {f"{of}.weight": 2 for of in TOLD} | {f"{of}.bias": 1 for of in TOLD},
        lambda config: True, read_diffract,
    ),
    Format(DICTIONARY, LINEAR | {"decoder.bias": 1}, of_classes("AutoEncoderNew"), read_dictionary),
    Format(DICTIONARY, MATRICES | {"threshold": 1}, of_classes("JumpReluAutoEncoder"), read_dictionary),
    Format(
        "SAELens", MATRICES, lambda config: str(config.get("architecture")) in SAELENS, read_saelens,
        frozenset({"threshold", "topk_threshold"}),
    ),
)  # fmt: skip
