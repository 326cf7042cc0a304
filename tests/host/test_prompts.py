"""Several prompts in one conditioning: each picture has its own, whatever the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

STEPS, PICTURES = 2, 5


def prompts(inside, family, count):
    """`count` random prompts as one conditioning, and each alone."""
    alone = [inside.prompt(family, seed) for seed in range(1, count + 1)]
    more = {name: torch.cat([of[0][1][name] for of in alone]) for name in alone[0][0][1]}
    return [[torch.cat([of[0][0] for of in alone]), more]], alone


@pytest.mark.parametrize("family", ["SD1.5", "SDXL", "Flux"])
def test_every_picture_has_its_own_prompt_whatever_the_batch(inside, family):
    together, alone = prompts(inside, family, 3)
    negative = inside.prompt(family, 9)
    cfg = 1.0 if family == "Flux" else 3.0

    def drawn(positive, images):
        sampler = inside.host.HostSampler(
            inside.model(family), positive, inside.latent(family), STEPS, "euler", "normal", 0, negative, cfg
        )
        noise = torch.randn(PICTURES, *sampler.shape, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            return sampler.sample(noise[images], torch.tensor(images))

    expected = torch.cat([drawn(alone[i % 3], [i]) for i in range(PICTURES)])
    for batches in ([[0, 1, 2, 3, 4]], [[0, 1], [2, 3], [4]], [[4, 2], [0, 1, 3]]):
        found = torch.empty_like(expected)
        for images in batches:
            found[images] = drawn(together, images)
        torch.testing.assert_close(found, expected, atol=4e-3 * float(expected.std()), rtol=4e-3)
    assert (expected[0] - drawn(alone[1], [0])[0]).abs().max() > 0.01 * expected.std()
    inside.forget()


def test_a_stock_ksampler_gives_them_in_turn(inside):
    together, alone = prompts(inside, "SD1.5", 2)
    model, latent = inside.model("SD1.5"), inside.latent("SD1.5", 4)
    found = inside.sample(model, together, inside.prompt("SD1.5", 9), 3.0, latent, STEPS)
    for number, prompt in enumerate(alone):
        own = inside.sample(model, prompt, inside.prompt("SD1.5", 9), 3.0, latent, STEPS)
        torch.testing.assert_close(found[number::2], own[number::2], atol=4e-3 * float(own.std()), rtol=4e-3)


def test_steer_gives_every_prompt_the_mix(inside, toys):
    """Prompts come in turn, and so do classes: each prompt must have its share of both."""
    together, _ = prompts(inside, "SD1.5", 2)
    recipe = toys.recipe(width=64, positions=4, steps=4, mode="add")
    recipe = replace(recipe, site="middle_block", model="", classes=("a", "b", "c"))
    steered, (dealt,) = inside.pack_module("nodes.steer").Steer.execute(
        inside.model("SD1.5"), recipe, "1, 1, 0", 1.0, "from recipe", 0.0, 1.0, 0, 0
    ).result  # fmt: skip
    for seed in range(3):
        inside.sample(steered, together, latent=inside.latent("SD1.5", 4), seed=seed)
    asked = dealt.shown_last(12)
    assert dealt.log.prompts == 2 and dealt.log.said == []
    for mine in (asked, asked[0::2], asked[1::2]):
        assert abs((mine == 0).sum() - len(mine) / 2) <= 1


@pytest.mark.parametrize("kind", ["SD1", "SDXL"])
def test_prompts_are_rows_and_short_ones_are_repeated(inside, kind):
    clip, encode = inside.random_clip(kind), inside.pack_module("nodes.host.prompts").encode_prompts
    lines = ["a doctor", "a nurse " + "with a very long beard " * 20]
    ((text, more),) = encode(clip, lines)
    for row, line in enumerate(lines):
        ((own, told),) = clip.encode_from_tokens_scheduled(clip.tokenize(line))
        assert own.shape[1] == (77, 154)[row]
        torch.testing.assert_close(text[row], own[0].repeat(154 // own.shape[1], 1))
        torch.testing.assert_close(more["pooled_output"][row], told["pooled_output"][0])


def test_prompts_that_cannot_be_repeated_are_refused(inside):
    """A T5 reads all tokens at once, and its networks see where they stand."""
    encode = inside.pack_module("nodes.host.prompts").encode_prompts
    with pytest.raises(inside.DiffLensError, match="cannot be put together. Shorten the longest: 'a nurse with"):
        encode(inside.random_clip("T5"), ["a doctor", "a nurse " + "with a very long beard " * 60])


def test_the_node_reads_a_prompt_a_line(inside, toys, tmp_path):
    from difflens_core.networks import TextEncoder, save_denoiser

    torch.manual_seed(9)
    text = TextEncoder(("doctor", "nurse"), width=16, length=4).eval()
    save_denoiser(tmp_path / "prompted.safetensors", toys.denoiser(context_width=16), {}, text)
    _, clip = inside.host.load_prompted(str(tmp_path / "prompted.safetensors"))
    node = inside.pack_module("nodes.prompts").PromptList
    ((found, _),) = node.execute(clip, "a doctor\n\n  a nurse \n").result[0]
    own = [clip.encode_from_tokens_scheduled(clip.tokenize(line))[0][0] for line in ("a doctor", "a nurse")]
    torch.testing.assert_close(found, torch.cat(own))
    assert len(node.execute(clip, " \n").result[0][0][0]) == 1
