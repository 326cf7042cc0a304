"""SAEs of other programs: against their formulas in float64, and against the programs themselves where installed."""

from __future__ import annotations

import importlib
import json
import os
import warnings

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from foreign import CASES, SPARSIFY, C, K, N, dictionary, largest, make, told_the_time, write
from safetensors.torch import save_file
from torch.nn import functional as F

from difflens_core.activations import UPDATE, reads_update
from difflens_core.files import DiffLensError
from difflens_core.sae import SparseAutoencoder, load_any_sae, load_class_features, save_sae


def dense(sae: SparseAutoencoder, h: torch.Tensor) -> torch.Tensor:
    latents = sae.encode(h, 0)
    return torch.zeros(*latents.indices.shape[:-1], sae.latents).scatter_add(-1, latents.indices, latents.values)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


def check(sae: SparseAutoencoder, h: torch.Tensor, z: torch.Tensor, rows: torch.Tensor) -> None:
    """Encodings (B x P x N) and reconstruction (B x P x C) of h."""
    assert (z != 0).any() and (z == 0).any()
    close(dense(sae, h), z)
    close(sae.reconstruct(h, 0), rows.transpose(1, 2).reshape(h.shape))


def rows_of(h: torch.Tensor) -> torch.Tensor:
    return h.flatten(2).transpose(1, 2)


# --- by formula ---


@pytest.mark.parametrize("name", ["odd.pt", "odd.safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_a_foreign_sae_does_what_its_formula_says(toys, tmp_path, case, name):
    tensors, config, formula = make(toys, case)
    sae, text = load_any_sae(write(tmp_path, tensors, config, name))
    h = toys.random(8)(5, C, 3, 2) * 2
    check(sae, h, *formula(rows_of(h.double())))
    assert f"activation: {CASES[case]}" in text and "20 latents, 6 channels, kernel 1" in text
    assert reads_update(sae.site) == (case == "sdxl-unbox")


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_reference_difflens_is_two_convolutions(toys, tmp_path, kernel):
    draw = toys.random(9)
    encoder, bias, b_dec = draw(N, C, kernel, kernel), draw(N) * 0.3, draw(C)
    decoder = draw(N, C, kernel, kernel) if kernel > 1 else draw(C, N, 1, 1)
    tensors = {"encoder.weight": encoder, "encoder.bias": bias, "decoder.weight": decoder, "decoder.bias": b_dec}
    sae, text = load_any_sae(write(tmp_path, tensors, SPARSIFY | {"num_latents": 0}))
    h = draw(4, C, 3, 3)
    pre = F.conv2d(h.double(), encoder.double(), bias.double())  # B x N x map
    z = largest(pre.movedim(1, -1)).movedim(-1, 1)
    convolve = F.conv_transpose2d if kernel > 1 else F.conv2d
    close(dense(sae, h), z.flatten(2).transpose(1, 2))
    close(sae.reconstruct(h, 0), convolve(z, decoder.double(), b_dec.double()))
    assert (sae.kernel, sae.channels, sae.width) == (kernel, C, C * kernel**2) and "format: the reference" in text
    assert ("whole 3 x 3 map" in text) == (kernel == 3)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_weights_of_other_precisions_come_back_in_fp32(toys, tmp_path, dtype):
    tensors, config, _ = make(toys, "sparsify")
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    sae, _ = load_any_sae(write(tmp_path, tensors, config))
    assert sae.encoder.dtype == torch.float32 and torch.equal(sae.encoder, tensors["encoder.weight"].float())


OLD = {"expansion_factor": 32, "normalize_decoder": True, "k": K, "signed": False, "d_in": C}


def test_a_configuration_of_an_old_sparsify_needs_no_number_of_latents(toys, tmp_path):
    tensors, _, formula = make(toys, "sparsify")
    sae, text = load_any_sae(write(tmp_path, tensors, OLD))
    h = toys.random(8)(5, C, 3, 2) * 2
    check(sae, h, *formula(rows_of(h.double())))
    assert "format: EleutherAI sparsify" in text
    assert load_any_sae(write(tmp_path / "none", tensors, OLD | {"num_latents": None}))[0].latents == N


def test_options_that_only_concern_training_do_not_matter(toys, tmp_path):
    tensors, config, _ = make(toys, "sparsify")
    known = {"multi_topk": True, "activation": "topk", "skip_connection": False, "something_new": False}
    assert load_any_sae(write(tmp_path / "a", tensors, config | known))[0].k == K
    tensors, config, _ = make(toys, "SAELens topk")
    known = {"decoder_init_norm": 0.1, "aux_loss_coefficient": 1.0, "something_new": None}
    assert load_any_sae(write(tmp_path / "b", tensors, config | known))[0].k == K


def test_a_loaded_sae_survives_our_own_file(toys, tmp_path):
    h = toys.random(8)(5, C, 3, 2) * 2
    for case in CASES:
        sae, _ = load_any_sae(write(tmp_path / case, *make(toys, case)[:2]))
        save_sae(tmp_path / "own.safetensors", sae)
        found, text = load_any_sae(tmp_path / "own.safetensors")
        assert torch.equal(found.reconstruct(h, 0), sae.reconstruct(h, 0)) and "format: DiffLens" in text
        assert (found.site, found.info) == (sae.site, sae.info)


def test_our_own_file_and_its_folder(toys, tmp_path):
    save_sae(tmp_path / "own.safetensors", toys.sae())
    for path in (tmp_path / "own.safetensors", tmp_path):
        sae, text = load_any_sae(path)
        assert torch.equal(sae.encoder, toys.sae().encoder) and "the output of middle" in text
    assert load_any_sae(tmp_path, " other ")[0].site == "other"


# --- the site, what lies beside, chosen features ---


def test_the_site_comes_from_the_caller_the_file_or_the_folder(toys, tmp_path):
    tensors, config, _ = make(toys, "sdxl-unbox")
    folder = write(tmp_path / "unet.down_blocks.2.attentions.1_k10_hidden5120" / "final", tensors, config)
    sae, text = load_any_sae(folder)
    assert sae.site == "down_blocks.2.attentions.1 update" and "site was read off the folder's name" in text
    assert "the update of down_blocks.2.attentions.1" in text
    for given in ("mid_block.attentions.0", "mid_block.attentions.0 update "):
        assert load_any_sae(folder, given)[0].site == "mid_block.attentions.0 update"
    assert load_any_sae(write(tmp_path / "a", *make(toys, "SAELens topk")[:2]))[0].site == "mid"
    sae, text = load_any_sae(write(tmp_path / "b", tensors, config))
    assert sae.site == UPDATE and "the update of a site that the file does not name" in text
    deep = write(tmp_path / "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0", tensors, config)
    assert load_any_sae(deep)[0].site == deep.name + UPDATE


def test_of_a_block_of_two_streams_only_the_pictures_is_read(toys, tmp_path):
    tensors, config, _ = make(toys, "finebooru topk")
    for name, site in {
        "cc3m-single_transformer_blocks.9": "single_transformer_blocks.9",
        "cc3m-transformer_blocks.18-1": "transformer_blocks.18",
    }.items():
        assert load_any_sae(write(tmp_path / name, tensors, config))[0].site == site
    with pytest.raises(DiffLensError, match="reads the text's tokens at transformer_blocks.18, .* ends in -1"):
        load_any_sae(write(tmp_path / "cc3m-transformer_blocks.18-0", tensors, config))


# --- DifFRACT, whose encoder is told the time ---


def at_time(tensors: dict, x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoding and reconstruction of rows x (... x C) as the program does it."""
    wave = get_timestep_embedding(torch.tensor([t]), len(tensors["time_mlp.0.bias"]))
    for layer in ("time_mlp.0", "time_mlp.2"):
        wave = F.silu(wave @ tensors[f"{layer}.weight"].T + tensors[f"{layer}.bias"])
    scale, shift = (wave @ tensors["mod_linear.weight"].T + tensors["mod_linear.bias"]).chunk(2, dim=-1)
    z = torch.relu((x * (1 + scale) + shift) @ tensors["encoder.weight"].T + tensors["encoder.bias"])
    return z, z @ tensors["decoder.weight"].T + tensors["decoder.bias"]


def test_an_encoder_that_is_told_the_time_encodes_as_its_program_does(toys, tmp_path):
    tensors, h = told_the_time(toys), toys.random(8)(5, C, 3, 2) * 2
    torch.save(tensors, tmp_path / "sae_img_6.pt")
    sae, text = load_any_sae(tmp_path / "sae_img_6.pt")
    assert sae.site == "double_blocks.6.img_mlp" and "told the time" in text and "format: DifFRACT" in text
    save_sae(tmp_path / "own.safetensors", sae)
    for own in (sae, load_any_sae(tmp_path / "own.safetensors")[0], sae.to("cpu")):
        for progress in (0.0, 0.25, 0.5, 0.75):
            step = own.normalisation.step_at(progress)
            z, rows = at_time(tensors, rows_of(h), 1 - progress)
            latents = own.encode(h, step)
            found = torch.zeros(5, 6, N).scatter_add(-1, latents.indices, latents.values)
            torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)
            again = own.reconstruct(h, step)
            torch.testing.assert_close(again, rows.transpose(1, 2).reshape(h.shape), rtol=1e-4, atol=1e-4)


def test_layers_of_the_time_that_do_not_fit_are_refused(toys, tmp_path):
    for name in ("time_mlp.0.bias", "time_mlp.2.weight", "mod_linear.weight", "mod_linear.bias"):
        tensors = told_the_time(toys)
        torch.save(tensors | {name: tensors[name][:-1]}, tmp_path / "sae_img_6.pt")
        with pytest.raises(DiffLensError, match="do not fit 6 channels"):
            load_any_sae(tmp_path / "sae_img_6.pt")


@pytest.mark.parametrize(
    ("name", "what"), [("transcoder_img_6", "a transcoder"), ("sae_txt_6", "text's tokens"), ("mine", "not known")]
)
def test_what_reads_something_else_with_the_same_tensors_is_refused(toys, tmp_path, name, what):
    torch.save(told_the_time(toys), tmp_path / f"{name}.pt")
    with pytest.raises(DiffLensError, match=f"By its name this is .*{what}"):
        load_any_sae(tmp_path / f"{name}.pt")


def test_other_files_beside_the_weights_do_not_matter(toys, tmp_path):
    write(tmp_path, *make(toys, "sdxl-unbox")[:2], "state_dict.pth")
    torch.save(torch.ones(N), tmp_path / "mean.pt")
    save_file({"sparsity": torch.ones(N)}, tmp_path / "sparsity.safetensors")
    (tmp_path / "optimizer.pt").write_bytes(b"no tensors")
    assert load_any_sae(tmp_path)[0].latents == N
    write(tmp_path, *make(toys, "sdxl-unbox")[:2], "another.pt")
    with pytest.raises(DiffLensError, match="expected one file .* found another.pt, state_dict.pth"):
        load_any_sae(tmp_path)
    assert load_any_sae(tmp_path / "another.pt")[0].latents == N


def test_class_features_are_latents_of_flat_ids(tmp_path):
    torch.save(torch.tensor([3 + 2 * N, 7, 3, 7 + N, 0]), tmp_path / "male.pt")
    torch.save(torch.tensor([19], dtype=torch.int32), tmp_path / "female.pt")
    found = load_class_features(tmp_path, N)
    assert {name: ids.tolist() for name, ids in found.items()} == {"female": [19], "male": [3, 7, 0]}
    assert [*load_class_features(tmp_path, N, ("male", "female"))] == ["male", "female"]
    assert [*load_class_features(tmp_path, N, ("male",))] == ["male"]
    with pytest.raises(DiffLensError, match="has no feature file of old, but female, male"):
        load_class_features(tmp_path, N, ("male", "old"))
    torch.save(torch.tensor([0.5]), tmp_path / "old.pt")
    with pytest.raises(DiffLensError, match="old.pt: expected a list of feature ids"):
        load_class_features(tmp_path, N)
    with pytest.raises(DiffLensError, match="no feature file"):
        load_class_features(tmp_path / "none", N)


# --- bad input ---


def changed(toys, case, tensor=None, **settings):
    """A case with one tensor replaced (None: left out) and settings of its configuration changed."""
    tensors, config, _ = make(toys, case)
    if tensor:
        name, value = tensor
        tensors = {key: old for key, old in tensors.items() if key != name} | ({} if value is None else {name: value})
    return tensors, config | settings


BAD = {
    "NaN": ("sparsify", ("W_dec", torch.full((N, C), torch.nan)), {}, "W_dec holds NaN"),
    "infinity": ("AutoEncoderNew", ("decoder.bias", torch.full((C,), torch.inf)), {}, "decoder.bias holds NaN or inf"),
    "k too large": ("sdxl-unbox", None, {"k": 21}, "k is 21, expected 1 to 20"),
    "no k": ("sparsify", None, {"k": None}, "says k None, expected a positive number"),
    "another width": ("sparsify", ("W_dec", torch.ones(N, 5)), {}, r"decoder has shape \(20, 5\), expected \(20, 6\)"),
    "another bias": ("sparsify", ("b_dec", torch.ones(5)), {}, r"mean has shape \(1, 5\), expected \(1, 6\)"),
    "the width of another SAE": ("sparsify", None, {"d_in": 7}, "6 channels, the configuration says d_in 7"),
    "the size of another SAE": ("SAELens topk", None, {"d_sae": 40}, "20 latents of 6 .* says d_sae 40"),
    "another format's settings": ("SAELens topk", None, {"architecture": "gated"}, "SAELens, but .* its kind is gated"),
    "another class": ("AutoEncoder", None, dictionary("GatedAutoEncoder"), "but .* its kind is GatedAutoEncoder"),
    "a missing tensor": ("sparsify", ("b_dec", None), {}, "not an SAE of a known format. Tensors: W_dec, encoder"),
    "a skip connection": ("sparsify", ("W_skip", torch.ones(C, C)), {}, "not an SAE of a known format"),
    "a transcoder": ("sparsify", None, {"transcode": True}, "trained with transcode, which is not supported"),
    "signed latents": ("sparsify", None, {"signed": True}, "trained with signed, which is not supported"),
    "an n-gram table": ("sparsify", None, {"gram_lookup": True}, "trained with gram_lookup"),
    "an unknown option": ("sparsify", None, {"rectify": "twice"}, "sets rectify 'twice', which is not known here"),
    "an unknown option of unbox": ("sdxl-unbox", None, {"mirror": True}, "sets mirror True, which is not known"),
    "an unknown option of SAELens": ("SAELens topk", None, {"noise": 0.5}, "sets noise 0.5, which is not known"),
    "integers": ("sparsify", ("W_dec", torch.ones(N, C, dtype=torch.int8)), {}, "W_dec holds whole numbers .int8."),
    "NaN in fp8": ("sparsify", ("b_dec", torch.full((C,), torch.nan).to(torch.float8_e4m3fn)), {}, "b_dec holds NaN"),
    "groupmax": ("sparsify", None, {"activation": "groupmax"}, "trained with groupmax"),
    "layer norm": ("SAELens topk", None, {"normalize_activations": "layer_norm"}, r"normalised \(layer_norm\)"),
    "an old SAELens": ("SAELens standard", None, {"metadata": None}, "SAELens before version 6"),
    "thresholds of TopK": ("SAELens jumprelu", None, {"architecture": "topk", "k": 4}, "do not go together"),
    "no thresholds": ("SAELens topk", None, {"architecture": "jumprelu"}, "do not go together"),
    "no BatchTopK threshold": ("BatchTopKSAE", ("threshold", None), {}, "lacks its inference threshold"),
    "another k": ("AutoEncoderTopK", ("k", torch.tensor(5)), {}, "weights say k 5, the configuration 4"),
    "a wrong number of thresholds": ("JumpReluAutoEncoder", ("threshold", torch.ones(3)), {}, r"shape \(3,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_saes_are_refused_in_one_sentence(toys, tmp_path, case):
    base, tensor, settings, message = BAD[case]
    write(tmp_path, *changed(toys, base, tensor, **settings))
    with pytest.raises(DiffLensError, match=f"odd.pt: .*{message}") as caught:
        load_any_sae(tmp_path)
    assert "\n" not in str(caught.value)


def test_gated_saes_are_refused_by_name(tmp_path):
    tensors = {name: torch.ones(N) for name in ("r_mag", "gate_bias", "mag_bias", "decoder_bias")}
    tensors |= {"encoder.weight": torch.ones(N, C), "decoder.weight": torch.ones(C, N)}
    with pytest.raises(DiffLensError, match="its kind is GatedAutoEncoder.*gated SAEs and transcoders are not supp"):
        load_any_sae(write(tmp_path, tensors, dictionary("GatedAutoEncoder")))


def test_a_kernel_must_be_square(toys, tmp_path):
    tensors = {"encoder.weight": torch.ones(N, C, 2, 3), "decoder.weight": torch.ones(N, C, 2, 3)}
    tensors |= {"encoder.bias": torch.ones(N), "decoder.bias": torch.ones(C)}
    with pytest.raises(DiffLensError, match="kernels are 2 x 3 and 2 x 3, expected squares"):
        load_any_sae(write(tmp_path, tensors, SPARSIFY))


def test_a_configuration_must_be_there_and_readable(toys, tmp_path):
    tensors, config, _ = make(toys, "AutoEncoderTopK")
    write(tmp_path, tensors, config)
    (tmp_path / "config.json").unlink()
    with pytest.raises(DiffLensError, match="odd.pt: .*dictionary_learning, but .* does not: there is none. Put"):
        load_any_sae(tmp_path)
    for text, message in (("{", "not readable JSON"), ("[]", "holds a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DiffLensError, match=f"odd.pt: config.json beside it .*{message}"):
            load_any_sae(tmp_path)


@pytest.mark.parametrize("name", ["a.pt", "a.pth"])
@pytest.mark.parametrize("kept", [0, 5, 9, 100, -300, -1])
def test_a_file_that_is_cut_off_is_refused(toys, tmp_path, name, kept):
    path = write(tmp_path, *make(toys, "sparsify")[:2], name) / name
    path.write_bytes(path.read_bytes()[:kept])
    for given in (path, tmp_path):
        with pytest.raises(DiffLensError, match=f"^{name}: .*(cut off|damaged)"):
            load_any_sae(given)


def test_a_sparse_tensor_is_refused_in_words(toys, tmp_path):
    tensors, config, _ = make(toys, "sparsify")
    write(tmp_path, tensors, config, "a.pth")
    torch.save(tensors | {"W_dec": tensors["W_dec"].to_sparse()}, tmp_path / "a.pth")
    with pytest.raises(DiffLensError, match="a.pth: .*W_dec is of a kind that cannot be read here.*sparse"):
        load_any_sae(tmp_path)


def test_parameters_in_a_file_do_not_bring_their_gradients(toys, tmp_path):
    tensors, config, _ = make(toys, "sparsify")
    write(tmp_path, tensors, config, "a.pth")
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, tmp_path / "a.pth")
    assert not load_any_sae(tmp_path)[0].encoder.requires_grad


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["DIFFLENS_TEST_PAYLOAD"],)


@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_pickle_is_never_run(toys, tmp_path, monkeypatch, old):
    monkeypatch.setenv("DIFFLENS_TEST_PAYLOAD", str(tmp_path / "ran"))
    tensors, config, _ = make(toys, "sparsify")
    write(tmp_path, tensors, config, "a.pth")
    torch.save(tensors | {"more": Payload()}, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    for given in (tmp_path / "a.pth", tmp_path):
        with pytest.raises(DiffLensError, match="a.pth: holds pickled objects .* never loaded") as caught:
            load_any_sae(given)
        assert "weights_only" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_what_is_no_sae_is_refused(tmp_path):
    with pytest.raises(DiffLensError, match="gone: no such file or folder"):
        load_any_sae(tmp_path / "gone")
    with pytest.raises(DiffLensError, match="expected one file with an SAE's weights in this folder, found none"):
        load_any_sae(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(DiffLensError, match="list.pt: not an SAE of a known format. Tensors: none"):
        load_any_sae(tmp_path / "list.pt")


def test_a_whole_map_sae_wants_its_map(toys, tmp_path):
    draw = toys.random(9)
    tensors = {"encoder.weight": draw(N, C, 3, 3), "encoder.bias": draw(N)}
    tensors |= {"decoder.weight": draw(N, C, 3, 3), "decoder.bias": draw(C)}
    sae, _ = load_any_sae(write(tmp_path, tensors, SPARSIFY))
    with pytest.raises(DiffLensError, match="map of 4 x 2, expected 3 x 3"):
        sae.encode(draw(1, C, 4, 2), 0)


# --- by the programs themselves ---


def peer(module: str):
    """The module, if it is installed or `scripts/test.py` says it must be; its warnings are its own."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get("DIFFLENS_LIBRARIES"):
            return importlib.import_module(module)
        return pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)


def shaken(module: torch.nn.Module, seed: int = 11) -> torch.nn.Module:
    """The module with random parameters, thresholds positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator) * (0.3 if weight.ndim == 1 else 1.0)
            weight.copy_(drawn.abs() if "threshold" in name else drawn)
    return module


def test_sparsify_itself(toys, tmp_path):
    sparsify = peer("sparsify")
    theirs = shaken(sparsify.SparseCoder(C, sparsify.SparseCoderConfig(num_latents=N, k=K)))
    theirs.save_to_disk(tmp_path)
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path)
    h = toys.random(8)(5, C, 3, 2) * 2
    with torch.no_grad():
        values, indices, _ = theirs.encode(rows_of(h).flatten(0, 1))
        rows = theirs.decode(values, indices)
    z = torch.zeros(len(values), N).scatter_add(1, indices, values)
    check(load_any_sae(tmp_path)[0], h, z.view(5, 6, N), rows.view(5, 6, C))


DICTIONARY = {
    "AutoEncoderTopK": ("top_k", "TopKTrainer", {"k": K, "threshold_start_step": 0}),
    "BatchTopKSAE": ("batch_top_k", "BatchTopKTrainer", {"k": K, "threshold_start_step": 0}),
    "MatryoshkaBatchTopKSAE": (
        "matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer",
        {"k": K, "threshold_start_step": 0, "group_fractions": [0.25, 0.75]},
    ),
    "JumpReluAutoEncoder": ("jumprelu", "JumpReluTrainer", {"target_l0": 4.0}),
    "AutoEncoder": ("standard", "StandardTrainer", {"warmup_steps": 0, "sparsity_warmup_steps": None}),
}  # fmt: skip


@pytest.mark.parametrize("kind", DICTIONARY)
def test_dictionary_learning_itself(toys, tmp_path, kind):
    """Trains for three steps, saves as its trainSAE does and loads by its own loader."""
    peer("dictionary_learning")
    module, name, settings = DICTIONARY[kind]
    trainers = importlib.import_module(f"dictionary_learning.trainers.{module}")
    trainer = getattr(trainers, name)(
        steps=9999, activation_dim=C, dict_size=N, layer=0, lm_name="none", device="cpu", seed=1, lr=1e-2, **settings
    )
    shaken(trainer.ae)
    for step in range(3):
        trainer.update(step, toys.random(step)(64, C))
    trainer.ae.scale_biases(1.5)  # as if the activations had been divided by 1.5
    torch.save(trainer.ae.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer.config}))
    theirs = type(trainer.ae).from_pretrained(tmp_path / "ae.pt", device="cpu")
    h = toys.random(8)(5, C, 3, 2) * 2
    with torch.no_grad():
        z = theirs.encode(rows_of(h).flatten(0, 1))
        rows = theirs.decode(z)
    sae, text = load_any_sae(tmp_path)
    check(sae, h, z.view(5, 6, N), rows.view(5, 6, C))
    assert "format: dictionary_learning" in text


def test_the_newer_standard_sae_of_dictionary_learning_itself(toys, tmp_path):
    peer("dictionary_learning")
    theirs = shaken(importlib.import_module("dictionary_learning.dictionary").AutoEncoderNew(C, N))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps(dictionary("AutoEncoderNew")))
    h = toys.random(8)(5, C, 3, 2) * 2
    with torch.no_grad():
        z = theirs.encode(rows_of(h))
        rows = theirs.decode(z)
    check(load_any_sae(tmp_path)[0], h, z, rows)


SAELENS = {
    "Standard": {}, "TopK": {"k": K}, "JumpReLU": {}, "BatchTopK": {"k": float(K)},
    "MatryoshkaBatchTopK": {"k": float(K), "matryoshka_widths": [5, N]},
}  # fmt: skip


@pytest.mark.parametrize("subtracted", [True, False])
@pytest.mark.parametrize("kind", SAELENS)
def test_saelens_itself(toys, tmp_path, kind, subtracted):
    """Saves a training SAE for use and as a checkpoint; both are what it loads for use itself."""
    saelens = peer("sae_lens")
    settings = {"d_in": C, "d_sae": N, "apply_b_dec_to_input": subtracted, **SAELENS[kind]}
    config = getattr(saelens, f"{kind}TrainingSAEConfig")(**settings)
    training = shaken(getattr(saelens, f"{kind}TrainingSAE")(config))
    if hasattr(training, "topk_threshold"):
        training.topk_threshold.fill_(1.3)
    training.save_model(tmp_path / "checkpoint")
    training.save_inference_model(tmp_path / "inference")
    theirs = saelens.SAE.load_from_disk(tmp_path / "inference")
    h = toys.random(8)(5, C, 3, 2) * 2
    with torch.no_grad():
        z = theirs.encode(rows_of(h))
        rows = theirs.decode(z)
    for folder in ("inference", "checkpoint"):
        sae, text = load_any_sae(tmp_path / folder)
        check(sae, h, z, rows)
        assert "format: SAELens" in text
