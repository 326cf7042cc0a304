"""The SAE's maths against loops and dense products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from difflens_core.activations import Activations
from difflens_core.files import DiffLensError, load_tensors, save_tensors
from difflens_core.locate import attribute_features, integrated_gradients_of, train_probes
from difflens_core.sae import Latents, load_sae, measure_sae, save_sae
from difflens_core.sae.autoencoder import fit_normalisation, top_k
from difflens_core.steer import Steering, build_recipe, recipe_from_features


def dense(latents: Latents, size: int) -> torch.Tensor:
    return torch.zeros(*latents.indices.shape[:-1], size).scatter_add(-1, latents.indices, latents.values)


def test_encode_keeps_the_k_largest_positive_pre_activations(toys):
    sae, h = toys.sae(), toys.activations(pictures=3).values[1]
    latents, norm = sae.encode(h, 1), sae.normalisation
    assert latents.values.shape == latents.indices.shape == (3, 4, 4)
    for b in range(3):
        for position in range(4):
            x = (h[b, :, position // 2, position % 2].double() - norm.mean[1].double()) / norm.scale[1].double()
            pre = [float(row.double() @ x + bias.double()) for row, bias in zip(sae.encoder, sae.encoder_bias)]  # noqa: B905
            best = sorted(range(20), key=lambda n: -pre[n])[:4]
            assert latents.indices[b, position].tolist() == best
            assert latents.values[b, position].tolist() == pytest.approx([max(0, pre[n]) for n in best], abs=1e-5)


def test_reconstruct_undoes_the_normalisation(toys):
    sae, h = toys.sae(), toys.activations(pictures=3).values[2]
    z = dense(sae.encode(h, 2), 20)
    rows = (z @ sae.decoder + sae.decoder_bias) * sae.normalisation.scale[2] + sae.normalisation.mean[2]
    expected = torch.stack([rows[:, p] for p in range(4)], dim=2).view(h.shape)
    torch.testing.assert_close(sae.reconstruct(h, 2), expected)


@pytest.mark.parametrize(("at", "row"), [(0.0, 0), (0.16, 0), (0.17, 1), (0.6, 2), (1.0, 2)])
def test_a_sampling_step_uses_the_nearest_row(toys, at, row):
    assert toys.normalisation().step_at(at) == row


def test_fit_normalisation_is_the_mean_and_the_rms_distance_of_every_step(toys):
    values = toys.activations(pictures=5).values
    fitted = fit_normalisation(Activations(values, torch.tensor([0.0, 0.5, 0.9]), "middle"))
    for s in range(3):
        rows = values[s].double().movedim(1, -1).reshape(-1, 6)
        torch.testing.assert_close(fitted.mean[s].double(), rows.mean(dim=0), atol=1e-6, rtol=0)
        assert float(fitted.scale[s]) == pytest.approx(
            float((rows - rows.mean(dim=0)).square().mean().sqrt()), abs=1e-5
        )


def test_a_step_without_variation_gets_a_twentieth_of_the_largest_scale(toys):
    values = torch.cat([torch.ones(1, 5, 6, 2, 2), toys.random(0)(1, 5, 6, 2, 2)])
    fitted = fit_normalisation(Activations(values, torch.tensor([0.0, 0.5]), "middle"))
    assert float(fitted.scale[0]) == pytest.approx(float(fitted.scale[1]) / 20)


@pytest.mark.parametrize("value", [0.0, 0.1, 123.4])
def test_constant_activations_are_refused(value):
    with pytest.raises(DiffLensError, match="nothing to train on"):
        fit_normalisation(Activations(torch.full((2, 5, 3, 4, 4), value).half(), torch.tensor([0.0, 0.5]), "middle"))


def test_activations_of_another_width_are_refused(toys):
    with pytest.raises(DiffLensError, match="width 7, expected 6"):
        toys.sae().encode(torch.zeros(1, 7, 2, 2), 0)


@pytest.mark.parametrize(
    "change", [{"k": 0}, {"k": 21}, {"decoder": torch.ones(20, 5)}, {"encoder_bias": torch.ones(3)}]
)
def test_an_sae_that_does_not_fit_together_is_refused(toys, change):
    with pytest.raises(DiffLensError, match="SAE: .* expected"):
        replace(toys.sae(), **change)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_round_trip(toys, tmp_path, dtype, tolerance):
    sae, path = toys.sae(), tmp_path / "s.safetensors"
    save_sae(path, sae, dtype)
    found = load_sae(path)
    for name in ("encoder", "encoder_bias", "decoder", "decoder_bias"):
        torch.testing.assert_close(getattr(found, name), getattr(sae, name), atol=tolerance, rtol=tolerance)
    for name in ("progress", "mean", "scale"):
        assert torch.equal(getattr(found.normalisation, name), getattr(sae.normalisation, name))
    assert (found.k, found.site, found.info) == (sae.k, sae.site, {})


KINDS = {
    "batchtopk": {"threshold": torch.tensor(0.8)},
    "jumprelu": {"k": 0, "threshold": torch.linspace(-1, 2, 20)},
    "relu": {"k": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_with_a_threshold_keep_what_exceeds_it(toys, kind):
    sae, h = replace(toys.sae(), activation=kind, **KINDS[kind]), toys.activations(pictures=5).values[1]
    x = sae.normalisation.apply(h, 1).double()
    pre = x @ sae.encoder.double().T + sae.encoder_bias
    z = torch.where(pre > KINDS[kind].get("threshold", 0.0), pre, 0.0).clamp(min=0)
    latents = sae.encode(h, 1)
    torch.testing.assert_close(dense(latents, 20).double(), z, atol=1e-5, rtol=1e-5)
    active = (z > 0).sum(dim=-1)
    assert latents.values.shape[-1] == active.max() > active.min() and (latents.values.diff(dim=-1) <= 0).all()
    assert all(len(set(row.tolist())) == len(row) for row in latents.indices.flatten(0, 1))
    rows = (z @ sae.decoder.double() + sae.decoder_bias) * sae.normalisation.scale[1] + sae.normalisation.mean[1]
    expected = rows.transpose(1, 2).reshape(h.shape)
    torch.testing.assert_close(sae.reconstruct(h, 1).double(), expected, atol=1e-5, rtol=1e-5)
    alone = torch.cat([sae.reconstruct(picture[None], 1) for picture in h])
    torch.testing.assert_close(alone, sae.reconstruct(h, 1), atol=1e-6, rtol=1e-6)


def test_a_position_without_active_latents_decodes_to_the_bias(toys):
    sae = replace(toys.sae(), activation="batchtopk", threshold=torch.tensor(1e9))
    latents = sae.encode(toys.activations().values[0], 0)
    assert latents.values.shape[-1] == 1 and not latents.values.any()
    assert torch.equal(sae.decode(latents), sae.decoder_bias.expand(12, 4, 6))


def whole_map(toys):
    """An SAE of rows of 6 channels x 2 x 2 positions."""
    return replace(toys.sae(width=24), normalisation=toys.normalisation(), kernel=2)


def test_a_whole_map_is_one_position(toys):
    sae, h = whole_map(toys), toys.activations(pictures=3).values[1]
    norm = sae.normalisation
    x = ((h - norm.mean[1][:, None, None]) / norm.scale[1]).flatten(1)
    latents = sae.encode(h, 1)
    expected = top_k(x @ sae.encoder.T + sae.encoder_bias, 4)
    torch.testing.assert_close(dense(latents, 20)[:, 0], dense(expected, 20))
    rows = (dense(expected, 20) @ sae.decoder + sae.decoder_bias).view(h.shape)
    torch.testing.assert_close(sae.reconstruct(h, 1), rows * norm.scale[1] + norm.mean[1][:, None, None])
    assert (sae.channels, sae.width, latents.values.shape) == (6, 24, (3, 1, 4))
    assert measure_sae(sae, toys.activations()).l0 <= 4
    for wrong, message in ((h[:, :5], "width 5, expected 6"), (h[..., :1], "map of 2 x 1, expected 2 x 2")):
        with pytest.raises(DiffLensError, match=message):
            sae.encode(wrong, 1)


@pytest.mark.parametrize("kind", ["jumprelu", "relu", "whole map"])
def test_probes_and_attribution_work_with_every_kind(toys, kind):
    sae = whole_map(toys) if kind == "whole map" else replace(toys.sae(), activation=kind, **KINDS[kind])
    activations, labels = toys.activations(), torch.arange(12) % 3
    probes = train_probes(activations, sae, labels, "age", toys.classes)
    found = attribute_features(activations, sae, probes, labels, "integrated gradients")
    assert found.completeness < 1e-5 and found.scores.any()
    _, ig, error = integrated_gradients_of(lambda h, _: h.square().sum(dim=(1, 2, 3)), activations.values[1], sae, 1)
    assert ig.abs().max() > 0.1 and float(error.max()) < 1e-3
    recipe = build_recipe(found, sae, probes, activations, labels, count=3)
    if kind == "whole map":
        assert (recipe.kernel, recipe.channels, recipe.width, recipe.levels.positions) == (2, 6, 24, 1)
        assert 0.8 < recipe.info["gate_agreement"] <= 1
        return
    assert recipe.info["gate_agreement"] == 1.0
    assert torch.equal(recipe.threshold, sae.gate.expand(20)[recipe.features]) and (recipe.threshold >= 0).all()


@pytest.mark.parametrize("kind", [*KINDS, "whole map"])
def test_every_kind_survives_a_file_and_a_move(toys, tmp_path, kind):
    sae = whole_map(toys) if kind == "whole map" else replace(toys.sae(), activation=kind, **KINDS[kind])
    save_sae(tmp_path / "s.safetensors", sae)
    h = toys.activations().values[0]
    for found in (load_sae(tmp_path / "s.safetensors"), sae.to("cpu")):
        assert torch.equal(found.reconstruct(h, 0), sae.reconstruct(h, 0))
        assert (found.activation, found.kernel, found.site, found.k) == (sae.activation, sae.kernel, "middle", sae.k)


def test_files_of_version_0_2_told_updates_apart_by_another_word(toys, tmp_path):
    path = tmp_path / "s.safetensors"
    save_sae(path, toys.sae())
    tensors, info = load_tensors(path, "sae")
    for reads, site in (("output", "middle"), ("update", "middle update")):
        save_tensors(path, "sae", tensors, info | {"reads": reads})
        assert load_sae(path).site == site


def test_files_of_version_0_1_load(toys, tmp_path):
    sae, path = toys.sae(), tmp_path / "s.safetensors"
    save_sae(path, sae)
    tensors, info = load_tensors(path, "sae")
    save_tensors(path, "sae", tensors, {name: info[name] for name in ("k", "site", "info")})
    found = load_sae(path)
    assert (found.activation, found.threshold, found.kernel, found.site) == ("topk", None, 1, "middle")
    save_tensors(path, "sae", tensors, info | {"k": 99})
    with pytest.raises(DiffLensError, match="s.safetensors: SAE: k is 99"):
        load_sae(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gated"}, "activation is 'gated'"),
        ({"activation": "jumprelu"}, "need a threshold, found none for jumprelu"),
        ({"threshold": torch.ones(20)}, "need a threshold, found one for topk"),
        ({"activation": "jumprelu", "threshold": torch.ones(3)}, r"threshold has shape \(3,\), expected \(20,\)"),
        ({"kernel": 2}, "a row of 6 numbers is no map of 2 x 2"),
        ({"kernel": 0}, "no map of 0 x 0"),
    ],
)
def test_kinds_that_do_not_fit_together_are_refused(toys, change, message):
    with pytest.raises(DiffLensError, match=message):
        replace(toys.sae(), **change)


@pytest.mark.parametrize("kind", KINDS)
def test_steering_by_a_kind_with_a_threshold_changes_what_exceeds_it(toys, kind):
    sae, h = replace(toys.sae(), activation=kind, **KINDS[kind]), toys.activations(pictures=3).values[0]
    recipe = recipe_from_features(sae, "age", {"old": [2, 7, 11]}, strength=0.5)
    z = dense(sae.encode(h, 0), 20)
    z[..., [n for n in range(20) if n not in (2, 7, 11)]] = 0
    assert (z > 0).any()
    change = (0.5 * z @ sae.decoder * sae.normalisation.scale[0]).transpose(1, 2).reshape(h.shape)
    for given in (sae, None):  # the thresholds are in the recipe, but TopK is not
        if kind == "topk" and given is None:
            with pytest.raises(DiffLensError, match="only their SAE can tell. Give the SAE as well"):
                Steering(recipe, torch.zeros_like)
            continue
        torch.testing.assert_close(Steering(recipe, torch.zeros_like, given)(h, 0.0, torch.arange(3)), h + change)


@pytest.mark.parametrize(
    "damage",
    [{"k": "many"}, {"k": None}, {"activation": 5}, {"kernel": "x"}, {"info": 3}],
    ids=str,
)  # fmt: skip
def test_settings_of_another_kind_are_refused_in_one_sentence(toys, tmp_path, damage):
    path = tmp_path / "s.safetensors"
    save_sae(path, toys.sae())
    tensors, info = load_tensors(path, "sae")
    save_tensors(path, "sae", tensors, info | damage)
    with pytest.raises(DiffLensError, match="s.safetensors: ") as caught:
        load_sae(path)
    assert "\n" not in str(caught.value)
