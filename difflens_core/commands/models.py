"""What a study samples: a pipeline of diffusers or one of the avatars' denoisers, and what reads the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..activations import Sampler
from ..classifiers import ImageClassifier, load_any_classifier, load_face_finder
from ..files import DiffLensError
from ..networks import DenoiserSampler, DiffusersSampler, FlowSampler, Guidance, load_denoiser, load_prompted
from .study import Study

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INDEX = "model_index.json"


def open_model(study: Study) -> Sampler:
    """The study's model as a sampler, on its device. Raises `DiffLensError` if there is none, or of another kind."""
    path = study.path(study.model)
    if path.suffix == ".safetensors":
        return avatars(study, path)
    if path.is_dir() and not (path / INDEX).exists():
        raise DiffLensError(f"{path} has no {INDEX}. Give a folder that diffusers' save_pretrained wrote.")
    return pipeline(study, str(path) if path.is_dir() else study.model)


def open_classifier(study: Study) -> tuple[ImageClassifier, tuple[str, ...]]:
    """What reads the study's pictures, and the classes of its attribute."""
    faces = load_face_finder(study.path(study.face_detector)) if study.face_detector else None
    classifier, _ = load_any_classifier(study.path(study.classifier), faces)
    if study.attribute not in classifier.attributes:
        known = ", ".join(classifier.attributes)
        raise DiffLensError(f"{study.classifier} knows no attribute {study.attribute!r}. It knows: {known}.")
    return classifier, classifier.attributes[study.attribute]


def decided_by(model: Sampler) -> dict[str, Any]:
    """All that decides a picture besides its noise and edits, JSON-able: tells whether one that is there is current."""
    return {"model": model.fingerprint, "progress": list(model.progress), "shape": list(model.shape), **model.info}


def draws_twice(model: Sampler) -> bool:
    """Whether guidance takes a second evaluation of the network at each step; not where a model is distilled."""
    if isinstance(model, DenoiserSampler):
        return model.guidance is not None and model.guidance.cfg != 1
    return isinstance(model, DiffusersSampler) and model.negative is not None and model.cfg != 1


def avatars(study: Study, path: Path) -> DenoiserSampler:
    """A denoiser that the pack ships, prompted or not."""
    size = (study.size[0], study.size[1]) if study.size else None
    if not study.prompts:
        return DenoiserSampler(load_denoiser(path), study.steps, size=size)
    model, text = load_prompted(path)
    if text is None:
        raise DiffLensError(f"{path} draws without prompts: leave out prompts.")
    context = text.encode([*study.prompts])
    return DenoiserSampler(model, study.steps, Guidance(context, text.encode([study.negative]), study.cfg), size)


def pipeline(study: Study, name: str) -> DiffusersSampler:
    """A pipeline of diffusers: Stable Diffusion 1 and 2, SDXL, 3, Flux, or an unconditional one."""
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=DTYPES[study.dtype], use_safetensors=True)
    except KeyError:
        raise DiffLensError(f"dtype is {study.dtype!r}, expected one of {', '.join(DTYPES)}.") from None
    except (OSError, ValueError) as error:
        raise DiffLensError(f"model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    pipe.to(study.computes_on)
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    prompted = hasattr(pipe, "encode_prompt")
    if network is None:
        raise DiffLensError(f"{name} is a {type(pipe).__name__}, which has neither a unet nor a transformer.")
    if prompted != bool(study.prompts):
        how, do = ("from", "give") if prompted else ("without", "leave out")
        raise DiffLensError(f"{name} draws {how} prompts: {do} prompts.")
    size = latent_size(pipe, study.size)
    with torch.inference_mode():
        positive, negative = conditioning(pipe, study, size) if prompted else ({}, None)
    kind = FlowSampler if hasattr(pipe, "transformer") else DiffusersSampler
    network, vae = network.eval().requires_grad_(False), getattr(pipe, "vae", None)
    if vae is not None:
        vae.eval().requires_grad_(False)
    return kind(network, pipe.scheduler, study.steps, positive, negative, study.cfg, vae, size=size)


def latent_size(pipe: Any, size: Sequence[int]) -> tuple[int, int] | None:
    """Height and width of the latents of pictures of a size in pixels, None for the network's own."""
    scale = getattr(pipe, "vae_scale_factor", 1)
    if not size:
        own = getattr(pipe, "default_sample_size", None)  # of Flux, whose network has none
        return (own, own) if type(pipe).__name__.startswith("Flux") and own else None
    step = 2 * scale if hasattr(pipe, "transformer") else scale
    if len(size) != 2 or any(side <= 0 or side % step for side in size):
        raise DiffLensError(f"size is {list(size)}, expected height and width, multiples of {step}.")
    return size[0] // scale, size[1] // scale


def conditioning(pipe: Any, study: Study, size: tuple[int, int] | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The network's arguments for the prompts (a row each), and for what to guide away from."""
    prompts, kind = [*study.prompts], type(pipe).__name__
    if kind.startswith("Flux"):
        embeds, pooled, _ = pipe.encode_prompt(prompts, None)
        given = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if pipe.transformer.config.guidance_embeds:  # distilled: guided by a number, without a second evaluation
            return given | {"guidance": torch.tensor([study.cfg])}, None
        return given, None
    away = [study.negative] * len(prompts)
    if kind.startswith("StableDiffusionXL"):
        encoded = pipe.encode_prompt(prompts, negative_prompt=away, do_classifier_free_guidance=True)
        return tuple(with_size(pipe, size, *encoded[i::2]) for i in range(2))  # type: ignore[return-value]
    if kind.startswith("StableDiffusion3"):
        encoded = pipe.encode_prompt(prompts, None, None, negative_prompt=away, do_classifier_free_guidance=True)
        names = ("encoder_hidden_states", "pooled_projections")
        return tuple(dict(zip(names, encoded[i::2], strict=True)) for i in range(2))  # type: ignore[return-value]
    if kind.startswith("StableDiffusion"):
        encoded = pipe.encode_prompt(prompts, pipe.device, 1, True, away)
        return tuple({"encoder_hidden_states": one} for one in encoded)  # type: ignore[return-value]
    raise DiffLensError(
        f"{study.model} is a {kind}. Known are Stable Diffusion 1, 2, 3, SDXL, Flux, and pipelines without prompts."
    )


def with_size(pipe: Any, size: tuple[int, int] | None, embeds: Tensor, pooled: Tensor) -> dict[str, Any]:
    """SDXL's arguments: its prompt, and that the picture is of its size and not cut."""
    height, width = (side * pipe.vae_scale_factor for side in size or (pipe.unet.config.sample_size,) * 2)
    times = torch.tensor([[height, width, 0, 0, height, width]]).to(embeds)
    return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
