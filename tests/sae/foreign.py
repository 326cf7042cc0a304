"""Small random SAEs of every foreign format, by hand from its documentation, and their formulas."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

N, C, K = 20, 6, 4
SPARSIFY = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K, "multi_topk": False, "d_in": C}
UNBOX = {"n_dirs_local": N, "d_model": C, "k": K, "auxk": 8, "dead_steps_threshold": 2441}


def saelens(architecture: str, **settings) -> dict:
    plain = {"d_in": C, "d_sae": N, "dtype": "float32", "device": "cpu", "normalize_activations": "none"}
    plain |= {"reshape_activations": "none", "apply_b_dec_to_input": True, "metadata": {"hook_name": "mid"}}
    return plain | {"architecture": architecture} | settings


def dictionary(kind: str, **settings) -> dict:
    return {"trainer": {"dict_class": kind, "activation_dim": C, "dict_size": N, "submodule_name": None} | settings}


def largest(pre: torch.Tensor, k: int = K) -> torch.Tensor:
    """ReLU of the k largest entries of every row."""
    return torch.where(pre >= pre.sort(dim=-1).values[..., -k, None], pre, 0.0).relu()


def above(threshold):
    return lambda pre: torch.where(pre > threshold, pre, 0.0).relu()


def linear(encoder, bias, decoder, activation, *, before=0.0, after=0.0):
    """activation(E (x - before) + bias) and its decoding D z + after, dense; rows x: ... x C."""

    def formula(x):
        z = activation((x - before) @ encoder.double().T + bias)
        return z, z @ decoder.double() + after

    return formula


def make(toys, case: str):
    """Tensors, configuration and dense formula of a small random SAE of each format, by hand from its documentation."""
    draw = toys.random(7)
    encoder, bias, decoder, b_dec = draw(N, C), draw(N) * 0.3, draw(N, C), draw(C)
    thresholds = draw(N).abs()
    lengths = decoder.double().norm(dim=1)
    matrices = {"W_enc": encoder.T, "b_enc": bias, "W_dec": decoder, "b_dec": b_dec}
    layers = {"encoder.weight": encoder, "encoder.bias": bias, "decoder.weight": decoder.T}
    centred = {"before": b_dec, "after": b_dec}
    k, one = torch.tensor(K, dtype=torch.int), torch.tensor(0.7)
    if case == "sparsify":
        tensors = {"encoder.weight": encoder, "encoder.bias": bias, "W_dec": decoder, "b_dec": b_dec}
        return tensors, SPARSIFY, linear(encoder, bias, decoder, largest, **centred)
    if case == "sdxl-unbox":
        tensors = {"encoder.weight": encoder, "decoder.weight": decoder.T, "pre_bias": b_dec, "latent_bias": bias}
        tensors["stats_last_nonzero"] = torch.zeros(N, dtype=torch.int64)
        return tensors, UNBOX, linear(encoder, bias, decoder, largest, **centred)
    if case.startswith("finebooru"):
        tensors, config = layers | {"bias": b_dec}, {"features": C, "pages": N}
        if case == "finebooru topk":
            return tensors, config | {"k": K}, linear(encoder, bias, decoder, largest, **centred)
        if case == "finebooru jumprelu":
            tensors |= {"logthres": thresholds.log()}
            return tensors, config | {"bandwidth": 0.001}, linear(encoder, bias, decoder, above(thresholds), **centred)
        wide, unit = lengths[:, None] * encoder, decoder / lengths[:, None]
        return tensors, config, linear(wide, lengths * bias, unit, torch.relu, **centred)
    if case == "AutoEncoderTopK":
        tensors = layers | {"b_dec": b_dec, "k": k, "threshold": torch.tensor(-1.0)}
        return tensors, dictionary(case, k=K), linear(encoder, bias, decoder, largest, **centred)
    if case == "BatchTopKSAE":
        tensors = layers | {"b_dec": b_dec, "k": k, "threshold": one}
        return tensors, dictionary(case, k=K), linear(encoder, bias, decoder, above(0.7), **centred)
    if case == "MatryoshkaBatchTopKSAE":
        tensors = matrices | {"k": k, "threshold": torch.tensor(-1.0), "group_sizes": torch.tensor([5, 15])}
        return tensors, dictionary(case, k=K), linear(encoder, bias, decoder, above(-1), **centred)
    if case == "JumpReluAutoEncoder":
        tensors = matrices | {"threshold": thresholds}
        return tensors, dictionary(case), linear(encoder, bias, decoder, above(thresholds), after=b_dec)
    if case == "AutoEncoderNew":
        tensors = layers | {"decoder.bias": b_dec}
        return tensors, dictionary(case), linear(encoder, bias, decoder, torch.relu, after=b_dec)
    if case == "AutoEncoder":
        wide, unit = lengths[:, None] * encoder, decoder / lengths[:, None]
        return layers | {"bias": b_dec}, dictionary(case), linear(wide, lengths * bias, unit, torch.relu, **centred)
    if case == "SAELens topk":
        return matrices, saelens("topk", k=K), linear(encoder, bias, decoder, largest, **centred)
    if case == "SAELens topk by decoder norm":
        config = saelens("topk", k=K, rescale_acts_by_decoder_norm=True)
        wide, unit = lengths[:, None] * encoder, decoder / lengths[:, None]
        return matrices, config, linear(wide, lengths * bias, unit, largest, **centred)
    if case == "SAELens jumprelu":
        config = saelens("jumprelu", apply_b_dec_to_input=False)
        tensors = matrices | {"threshold": thresholds - 0.5}  # one below zero is none: the ReLU comes after it
        return tensors, config, linear(encoder, bias, decoder, above(thresholds - 0.5), after=b_dec)
    if case == "SAELens standard":
        return matrices, saelens("standard"), linear(encoder, bias, decoder, torch.relu, **centred)
    assert case == "SAELens batchtopk"
    tensors = matrices | {"topk_threshold": one.double()}
    return tensors, saelens("batchtopk", k=4.0), linear(encoder, bias, decoder, above(0.7), **centred)


CASES = {
    "sparsify": "topk, k 4", "sdxl-unbox": "topk, k 4", "AutoEncoderTopK": "topk, k 4",
    "finebooru topk": "topk, k 4", "finebooru jumprelu": "jumprelu, threshold", "finebooru relu": "relu",
    "BatchTopKSAE": "batchtopk, k 4, threshold 0.7", "MatryoshkaBatchTopKSAE": "batchtopk, k 4, threshold -1",
    "JumpReluAutoEncoder": "jumprelu, threshold", "AutoEncoderNew": "relu", "AutoEncoder": "relu",
    "SAELens topk": "topk, k 4", "SAELens topk by decoder norm": "topk, k 4", "SAELens jumprelu": "jumprelu, threshold",
    "SAELens standard": "relu", "SAELens batchtopk": "batchtopk, k 4, threshold 0.7",
}  # fmt: skip


def write(folder: Path, tensors: dict, config: dict, name: str = "odd.pt") -> Path:
    """An SAE folder; names that end in .pt hold safetensors here and the others a pickle, to confuse the reader."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / name) if name.endswith(".pt") else torch.save({"state_dict": tensors}, folder / name)
    (folder / ("config.json" if "trainer" in config else "cfg.json")).write_text(json.dumps(config))
    return folder


def told_the_time(toys, size: int = 8) -> dict[str, torch.Tensor]:
    draw = toys.random(11)
    tensors = {"time_mlp.0.weight": draw(size, size), "time_mlp.2.weight": draw(size, size)}
    tensors |= {"mod_linear.weight": draw(2 * C, size), "encoder.weight": draw(N, C), "decoder.weight": draw(C, N)}
    biases = {name.replace("weight", "bias"): draw(tensor.shape[0]) for name, tensor in tensors.items()}
    return tensors | biases
