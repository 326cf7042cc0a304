"""Sampling the avatars' network, and that its site carries the whole picture."""

from __future__ import annotations

import pytest
import torch

from difflens_core.activations import Kept, capture, edit_site
from difflens_core.files import DiffLensError, fingerprint, load_tensors, save_tensors
from difflens_core.networks import (
    Denoiser,
    DenoiserConfig,
    DenoiserSampler,
    Guidance,
    TextEncoder,
    load_denoiser,
    load_denoiser_weights,
    load_prompted,
    sample,
    save_denoiser,
    start_noise,
    tokenize,
)
from difflens_core.networks.denoiser import turned
from difflens_core.steer import Steering

SITE = "middle_block"


@pytest.fixture(scope="module")
def model(toys) -> Denoiser:
    return toys.denoiser()


def kept(model, noise, steps, edits=()):
    """What the site puts out at every step, before `edits` change it."""
    keep = Kept(SITE, range(steps))
    sample(model, noise, steps, edits, kept=[keep])
    return by_step(keep)


def by_step(keep):
    """B x C x H x W of every step."""
    return [*keep.taken().movedim(-1, 2)]


def steering(toys, **settings) -> Steering:
    recipe = toys.recipe(width=32, steps=4, **{"strength": (5.0, 5.0, 5.0), **settings})
    object.__setattr__(recipe, "site", SITE)
    return Steering(recipe, lambda images: images % 3)


def test_euler_follows_the_straight_path_to_the_predicted_picture(model):
    noise, steps = start_noise(2, 0, 16), []
    found = sample(model, noise, 5, on_step=steps.append)
    x = noise.double()
    for i in range(5):
        sigma = 1 - i / 5
        x0 = model(x.float(), torch.full((2,), sigma)).double()
        velocity = (x - x0) / sigma  # of x_t = (1 - sigma) x0 + sigma noise
        x = x - velocity / 5
    torch.testing.assert_close(found.double(), x.clamp(-1, 1), atol=1e-5, rtol=0)
    assert steps == [1, 2, 3, 4, 5] and found.std() > 0.05


def test_capture_returns_every_step_of_every_picture(model):
    captured = kept(model, start_noise(3, 0, 16), 4)
    assert len(captured) == 4 and all(h.shape == (3, 32, 2, 2) and h.dtype == torch.float16 for h in captured)
    h, emb = model.encode(start_noise(3, 0, 16), torch.ones(3))
    torch.testing.assert_close(captured[0], model.middle_block(h, emb).half(), atol=2e-3, rtol=2e-3)


def test_pictures_do_not_depend_on_how_the_run_is_cut_into_batches(model, toys):
    noise, edits = start_noise(6, 1, 16), [steering(toys)]
    keep, keep_parts = Kept(SITE, range(4)), [Kept(SITE, range(4)) for _ in range(3)]
    whole = sample(model, noise, 4, edits, kept=[keep])
    cuts = ((0, 1), (1, 3), (4, 2))
    parts = [
        sample(model, noise[i : i + n], 4, edits, torch.arange(i, i + n), kept=[part])
        for (i, n), part in zip(cuts, keep_parts, strict=True)
    ]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-5, rtol=0)
    assert not torch.allclose(whole, sample(model, noise, 4), atol=1e-2)
    cut = torch.cat([part.taken() for part in keep_parts], dim=1)
    torch.testing.assert_close(keep.taken(), cut, atol=2e-3, rtol=2e-3)


def test_noise_of_a_picture_does_not_depend_on_the_run_length_being_sampled_twice():
    assert torch.equal(start_noise(4, 3, 16), start_noise(4, 3, 16))
    assert not torch.equal(start_noise(4, 3, 16), start_noise(4, 4, 16))


def test_strength_zero_gives_bit_identical_pictures(model, toys):
    noise = start_noise(3, 2, 16)
    assert torch.equal(sample(model, noise, 3), sample(model, noise, 3, [steering(toys, strength=(0.0,) * 3)]))


def test_steering_is_called_with_the_progress_and_the_numbers_of_the_pictures(model, toys):
    edit, seen = steering(toys), []
    spy = Steering(edit.recipe, lambda images: seen.append(images.tolist()) or images % 3)
    sample(model, start_noise(2, 0, 16), 4, [spy], torch.tensor([10, 11]))
    assert seen == [[10, 11]] * 4
    late = steering(toys, start=0.75)
    unsteered, steered = (kept(model, start_noise(2, 0, 16), 4, s) for s in ([], [late]))
    assert all(torch.equal(a, b) for a, b in zip(unsteered, steered, strict=True)), "the last step edits after capture"


def test_no_hook_is_left_when_a_run_is_cancelled(model, toys):
    def cancel(_step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, start_noise(1, 0, 16), 3, [steering(toys)], kept=[Kept(SITE, range(3))], on_step=cancel)
    with pytest.raises(DiffLensError):
        sample(
            model, start_noise(1, 0, 16), 3, [Steering(toys.recipe(width=31), lambda i: i)], kept=[Kept(SITE, range(3))]
        )
    assert not any(module._forward_hooks for module in model.modules())


def test_swapping_the_site_swaps_the_picture(model):
    x, sigma = start_noise(2, 5, 16), torch.full((2,), 0.7)
    own = model(x, sigma)
    with edit_site(model, SITE, lambda h: h.flip(0)):
        swapped = model(x, sigma)
    torch.testing.assert_close(swapped, own.flip(0), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(own[0], own[1], atol=0.1)


def test_the_picture_depends_on_the_noise_level(model):
    x = start_noise(1, 0, 16)
    assert not torch.allclose(model(x, torch.tensor([0.2])), model(x, torch.tensor([0.9])), atol=1e-2)


def test_a_fresh_denoiser_passes_the_site_through_unchanged():
    model = Denoiser(DenoiserConfig(16, 32, 16, 1, 1, 2))
    h, emb = model.encode(start_noise(1, 0, 16), torch.ones(1))
    assert torch.equal(model.middle_block(h, emb), h)


def test_denoiser_round_trip(model, toys, tmp_path):
    path = tmp_path / "d.safetensors"
    save_denoiser(path, model, {"seed": 1})
    found, x = load_denoiser(path), start_noise(2, 0, 16)
    assert found.config == model.config and not found.training and found.dtype == torch.float32
    torch.testing.assert_close(found(x, torch.ones(2)), model(x, torch.ones(2)), atol=2e-2, rtol=2e-2)
    weights = load_denoiser_weights(path)[1]
    assert fingerprint(weights) == fingerprint(found.state_dict()) != fingerprint(toys.denoiser(7).state_dict())


@pytest.fixture(scope="module")
def prompted() -> tuple[Denoiser, TextEncoder]:
    torch.manual_seed(3)
    text = TextEncoder(["a", "doctor", "nurse"], width=16, length=5, depth=1)
    model = Denoiser(DenoiserConfig(16, 32, 16, 1, 1, 2, context_width=16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(text.position)
    return model.eval().requires_grad_(False), text.eval().requires_grad_(False)


def test_words_are_found_whatever_their_case_and_others_are_unknown():
    assert tokenize("A doctor, a NURSE and Zoë!", ["a", "doctor", "nurse"]) == [2, 3, 2, 4, 1, 1]
    assert tokenize("", ["a"]) == []


def test_prompts_are_filled_up_and_cut(prompted):
    _, text = prompted
    assert text.tokens(["a nurse", "", "a a a a a doctor"]).tolist() == [[2, 4, 0, 0, 0], [0] * 5, [2] * 5]
    both, alone = text.encode(["a doctor", "a nurse"]), text.encode(["a nurse"])
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_guidance_leads_from_the_empty_prompt_through_the_prompt_and_beyond(prompted):
    model, text = prompted
    noise, sigma = start_noise(2, 0, 16), torch.ones(2)
    guidance = Guidance(text.encode(["a doctor", "a nurse"]), text.encode([""]), 2.5)
    with_prompt = model(noise, sigma, guidance.context)
    without = model(noise, sigma, guidance.empty.expand(2, -1, -1))
    x0 = without + 2.5 * (with_prompt - without)
    torch.testing.assert_close(sample(model, noise, 1, guidance=guidance), x0.clamp(-1, 1), atol=1e-5, rtol=0)
    assert not torch.allclose(with_prompt, without, atol=1e-3)
    torch.testing.assert_close(
        sample(model, noise[1:], 3, guidance=guidance.of(torch.tensor([1]))),
        sample(model, noise, 3, guidance=guidance)[1:], atol=1e-5, rtol=0,
    )  # fmt: skip


def test_edits_and_capture_see_the_prompts_half_alone(prompted, tmp_path):
    model, text = prompted
    guidance = Guidance(text.encode(["a doctor"]), text.encode([""]), 3.0)
    noise, keep, calls = start_noise(2, 0, 16), Kept(SITE, range(2)), []

    class Spy:
        site = SITE

        def __call__(self, h, progress, images):
            calls.append((progress, images.tolist()))
            return h

    sample(model, noise, 2, [Spy()], torch.tensor([4, 5]), guidance, [keep])
    assert calls == [(0.0, [4, 5]), (0.5, [4, 5])] and len(keep.seen) == 2
    h, emb = model.encode(noise, torch.ones(2))
    expected = model.middle_block(h, emb, guidance.context.expand(2, -1, -1))
    torch.testing.assert_close(by_step(keep)[0], expected.half(), atol=2e-3, rtol=2e-3)
    store = capture(DenoiserSampler(model, 2, guidance), 2, 0, folder=tmp_path / "s")
    assert torch.equal(store.activations().values[0], by_step(keep)[0])
    other = Guidance(text.encode(["a nurse"]), text.encode([""]), 3.0)
    with pytest.raises(DiffLensError, match="other settings"):
        capture(DenoiserSampler(model, 2, other), 2, 0, folder=tmp_path / "s")


def test_a_prompt_enters_at_the_site_alone(prompted):
    model, text = prompted
    x, sigma = start_noise(2, 5, 16), torch.full((2,), 0.7)
    context = text.encode(["a doctor", "a nurse"])
    own = model(x, sigma, context)
    with edit_site(model, SITE, lambda h: h.flip(0)):
        torch.testing.assert_close(model(x, sigma, context), own.flip(0), atol=1e-6, rtol=1e-6)


def test_prompted_denoiser_round_trip(prompted, tmp_path):
    model, text = prompted
    path = tmp_path / "p.safetensors"
    save_denoiser(path, model, {}, text)
    found, words = load_prompted(path)
    x, sigma = start_noise(1, 0, 16), torch.ones(1)
    expected = model(x, sigma, text.encode(["a nurse"]))
    torch.testing.assert_close(found(x, sigma, words.encode(["a nurse"])), expected, atol=3e-2, rtol=3e-2)
    tensors, info = load_tensors(path, "denoiser")
    del tensors["text.position"]
    save_tensors(path, "denoiser", tensors, info)
    with pytest.raises(DiffLensError, match="do not fit a DiffLens denoiser"):
        load_prompted(path)


def test_weights_of_another_size_are_refused(model, tmp_path):
    path = tmp_path / "d.safetensors"
    save_denoiser(path, model, {})
    tensors, info = load_tensors(path, "denoiser")
    info["config"]["width"] = 64
    save_tensors(path, "denoiser", tensors, info)
    with pytest.raises(DiffLensError, match="do not fit a DiffLens denoiser"):
        load_denoiser(path)


def test_a_model_of_any_size_draws_other_heights_and_widths_with_its_places_resized(toys):
    model = toys.denoiser(any_size=True)
    sampler = DenoiserSampler(model, 3, size=(24, 16))
    assert sampler.shape == (3, 24, 16) and DenoiserSampler(model, 3).shape == (3, 16, 16)
    noise = start_noise(2, 3, 24, 16)
    drawn = sampler.sample(noise, torch.arange(2))
    assert drawn.shape == (2, 3, 24, 16)
    resized = torch.nn.functional.interpolate(model.position, (3, 2), mode="bilinear")
    h, _ = model.encode(noise, torch.ones(2))
    own = model.position.data.clone()
    model.position.data.zero_()
    without, _ = model.encode(noise, torch.ones(2))
    model.position.data.copy_(own)
    torch.testing.assert_close(h - without, resized.expand(2, -1, -1, -1), atol=1e-5, rtol=1e-5)


def test_turned_queries_and_keys_see_how_far_apart_positions_are_and_not_where_they_are():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 12, generator=generator, dtype=torch.float64)

    def product(height, width, at, of):
        everywhere = (vector.expand(1, 1, height * width, -1) for vector in (q, k))
        a, b = (turned(x, height, width).view(height, width, -1) for x in everywhere)
        return float(a[at] @ b[of])

    # Channel i and its partner 6 further on are a complex number; 3 of them turn by rows, 3 by columns.
    turns = torch.tensor([100 ** (-i / 3) for i in range(3)], dtype=torch.float64)
    by = torch.cat([-2 * turns, 1 * turns])  # two rows down, one column to the left
    expected = (torch.complex(q[:6], q[6:]) * torch.complex(k[:6], k[6:]).conj() * torch.exp(1j * by)).real.sum()
    for height, width, at, of in ((3, 4, (0, 3), (2, 2)), (9, 2, (5, 1), (7, 0))):
        assert product(height, width, at, of) == pytest.approx(float(expected), rel=1e-6)
