"""What the nodes need of ComfyUI itself; only the files called host*.py touch its internals."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import numpy as np
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy.weight_adapter import WeightAdapterBase
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor, nn

from ..difflens_core.activations import (
    DTYPES,
    INDEX,
    SAMPLES,
    UPDATE,
    Draw,
    Index,
    Shard,
    Store,
    find_site,
    noise_batches,
    record,
)
from ..difflens_core.activations import Edit as SiteEdit
from ..difflens_core.activations import edit_site as hooked
from ..difflens_core.files import DiffLensError, digest, fingerprint
from ..difflens_core.networks import Denoiser, ResBlock, Stack, checkpoints
from ..difflens_core.sae import CONFIGS, WEIGHTS
from .host_sites import Picture, own_name

log = logging.getLogger("difflens")
SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS

# --- files ---

MODELS, SAES, CLASSIFIERS, RECIPES = "difflens_models", "difflens_saes", "difflens_classifiers", "difflens_recipes"
STORES = "difflens_activations"
SHIPPED = [Path(__file__).resolve().parent.parent / "models" / name for name in ("avatars", "prompted_avatars")]


def register_folders() -> None:
    """Make the pack's kinds of file known: the user's folder, then extra_model_paths.yaml's, then the shipped ones."""
    endings = {kind: {".safetensors"} for kind in (MODELS, RECIPES)} | {CLASSIFIERS: {*WEIGHTS}}
    # A folder of activations is known by its index, one of another program's SAE by its configuration.
    # Models of other programs come as files, or as folders that are known by their configuration.
    endings[MODELS] |= {*checkpoints.WEIGHTS, Path(checkpoints.CONFIG).suffix}
    endings |= {STORES: {Path(INDEX).suffix}, SAES: {*WEIGHTS, Path(CONFIGS[0]).suffix}}
    for kind, ending in endings.items():
        extra, _ = folder_paths.folder_names_and_paths.get(kind, ([], set()))
        user = str(Path(folder_paths.models_dir) / kind)
        folder_paths.folder_names_and_paths[kind] = (
            [user, *extra, *(str(shipped / kind) for shipped in SHIPPED)],
            ending,
        )


def list_files(kind: str) -> list[str]:
    return folder_paths.get_filename_list(kind)


def find_file(kind: str, name: str) -> str:
    """Path of a listed file. Raises `DiffLensError` if it is gone."""
    try:
        return folder_paths.get_full_path_or_raise(kind, name)
    except FileNotFoundError:
        folder = folder_paths.get_folder_paths(kind)[0]
        raise DiffLensError(f"{name} was not found. Put it into {folder} or choose another file.") from None


def folders_and_files(kind: str, configs: Sequence[str], endings: Sequence[str]) -> tuple[set[Path], set[Path]]:
    """Listed folders that hold one of `configs`, and the files of those endings that lie in none of them."""
    paths = [Path(name) for name in list_files(kind)]
    folders = {path.parent for path in paths if path.name in configs and path.parent.name}
    return folders, {path for path in paths if path.suffix in endings and not folders & set(path.parents)}


def list_saes() -> list[str]:
    """Names that `find_sae` takes: folders with a configuration, and the files that lie in none of those.

    A .pt file in a folder without a configuration is no SAE; it may name features (`list_feature_folders`).
    """
    folders, files = folders_and_files(SAES, CONFIGS, WEIGHTS)
    features = {path for path in files if path.suffix == ".pt" and path.parent.name}
    return sorted(map(str, folders | files - features))


def list_feature_folders() -> list[str]:
    """Names that `find_features` takes: folders with .pt files that no configuration makes an SAE."""
    paths = [Path(name) for name in list_files(SAES)]
    configured = {path.parent for path in paths if path.name in CONFIGS}
    found = {path.parent for path in paths if path.suffix == ".pt" and path.parent.name}
    return sorted(map(str, found - configured))


def find_features(name: str) -> Path:
    """A listed folder with feature files. Raises `DiffLensError` if it is gone."""
    files = [path for path in list_files(SAES) if Path(path).parent == Path(name) and Path(path).suffix == ".pt"]
    return Path(find_file(SAES, files[0] if files else name)).parent


def find_sae(name: str) -> str:
    """Path of a listed SAE, a file or a folder. Raises `DiffLensError` if it is gone."""
    for config in CONFIGS:
        if path := folder_paths.get_full_path(SAES, str(Path(name) / config)):
            return str(Path(path).parent)
    return find_file(SAES, name)


def new_file(kind: str, name: str) -> tuple[Path, str]:
    """Path in the user's folder for a file to be saved as `name`, and the name under which lists will show it.

    `name` may lead into sub-folders, never out of the folder. A file of that name is replaced.
    """
    parts = name_parts(name.strip().removesuffix(".safetensors"))
    listed = Path(*parts[:-1], f"{parts[-1]}.safetensors")
    return Path(folder_paths.get_folder_paths(kind)[0]) / listed, str(listed)


def new_output(prefix: str, ending: str) -> Path:
    """Path in ComfyUI's output folder for a new file, numbered as Save Image numbers its own."""
    where = "/".join(name_parts(prefix.strip()))
    folder, name, number, _, _ = folder_paths.get_save_image_path(where, folder_paths.get_output_directory())
    return Path(folder) / f"{name}_{number:05}_{ending}"


def name_parts(name: str) -> list[str]:
    """The folders and the file that a user's name asks for. Raises `DiffLensError` if it could lead elsewhere."""
    parts = re.split(r"[\\/]", name)
    if not all(re.fullmatch(r"\w[\w .()+-]{0,99}(?<![ .])", part) for part in parts):
        raise DiffLensError(
            f"{name!r} cannot be a file name. Use letters, digits, spaces and _ - + . ( ), beginning with a letter "
            "or digit; / puts the file into a sub-folder."
        )
    return parts


def list_stores() -> list[str]:
    """Folders with activations, by the name that `find_store` takes."""
    return [str(path.parent) for path in map(Path, list_files(STORES)) if path.name == INDEX]


def find_store(name: str) -> Path:
    """Folder of a listed store. Raises `DiffLensError` if it is gone."""
    return Path(find_file(STORES, str(Path(name) / INDEX))).parent


def new_store(name: str) -> Path:
    """Folder in the user's folder for activations to be saved as `name`; it may be there already."""
    return new_file(STORES, name)[0].with_suffix("")


def temporary_file(name: str) -> Path:
    """Path in ComfyUI's temp folder, which it empties when it starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


register_folders()

# --- errors, progress, pictures ---


@contextmanager
def named(node: str) -> Iterator[None]:
    """Let the `DiffLensError`s raised inside begin with the node's name."""
    try:
        yield
    except DiffLensError as error:
        text = str(error).removeprefix(f"{node}: ")
        raise DiffLensError(f"{node}: {text}") from error


def clear_errors(execute: Callable) -> Callable:
    """Decorator of a node's `execute`: errors begin with the node's display name."""

    @functools.wraps(execute)
    def wrapper(cls: type[io.ComfyNode], *args: Any, **kwargs: Any) -> io.NodeOutput:
        with named(cls.define_schema().display_name):
            return execute(cls, *args, **kwargs)

    return wrapper


Preview = tuple[str, Image.Image, int]


def progress_bar(total: int) -> Callable[[int, Preview | None], None]:
    """A function to call with the work done so far and maybe a preview; it raises when the user has pressed Cancel."""
    bar = comfy.utils.ProgressBar(total)

    def report(done: int, preview: Preview | None = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total, preview)

    return report


def progress_of_total() -> Callable[[int, int], None]:
    """Like `progress_bar` for work whose size is only known on the way: call it with the work done and the total."""
    return lambda done, total: progress_bar(total)(done)


def preview(picture: np.ndarray) -> Preview:
    """A picture (H x W x 3, uint8) for `progress_bar`."""
    return "JPEG", Image.fromarray(picture), max(picture.shape[:2])


def to_image(picture: np.ndarray) -> Tensor:
    """A picture (H x W x 3, uint8) as an IMAGE (1 x H x W x 3 in [0, 1])."""
    return torch.from_numpy(picture).float().div(255)[None]


def drawn(cls: type[io.ComfyNode], image: Tensor, *outputs: Any, text: str | None = None) -> io.NodeOutput:
    """Outputs of a node that also draws `image` on itself; `text` joins it in the prompt's history."""
    shown = ui.PreviewImage(image, cls=cls).as_dict()
    if text is not None:
        shown["text"] = (text,)
    return io.NodeOutput(*outputs, ui=shown)


@contextmanager
def training() -> Iterator[None]:
    """Lift ComfyUI's inference mode. Tensors that the autograd graph keeps must be cloned inside."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def training_device(needed: int) -> torch.device:
    """The device that ComfyUI computes on, with `needed` bytes freed of models that can be loaded again."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(needed, device)
    return device


# --- models on pixels ---


def after_middle(
    h: Tensor, x: Tensor, emb: Tensor, context: Any, y: Tensor | None, timesteps: Tensor, transformer_options: dict
) -> Tensor:
    """h, the middle block's output, after the `middle_block_after_patch`es, called as ComfyUI's own UNet calls them."""
    transformer_options["block"] = ("middle", 0)
    for patch in transformer_options.get("patches", {}).get("middle_block_after_patch", ()):
        h = patch({
            "h": h, "x": x, "emb": emb, "context": context, "y": y, "timesteps": timesteps,
            "transformer_options": transformer_options,
        })["h"]  # fmt: skip
    return h


def unconditional_conditioning() -> list:
    """A CONDITIONING that says nothing. A tensor, because nodes that zero or join conditionings want one."""
    return [[torch.zeros(1, 1, 1), {}]]


def pixel_space_vae() -> comfy.sd.VAE:
    """The VAE that only maps [-1, 1] to [0, 1] and back."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


FINGERPRINT = "difflens_fingerprint"  # attachment of a MODEL


def model_fingerprint(model: ModelPatcher) -> str:
    """Tells the weights of a MODEL from others': all of a denoiser's, the first eight by name of larger models.

    Those of its file, without LoRAs: they are in the network only while it is loaded, and would change the mark. Our
    loader leaves the mark of models that it may load in fp16, taken before they were rounded.
    """
    if mark := model.get_attachment(FINGERPRINT):
        return mark
    module = model.model.diffusion_model
    prefix, weights = "diffusion_model.", module.state_dict()
    weights |= {key[len(prefix) :]: kept.weight for key, kept in model.backup.items() if key.startswith(prefix)}
    chosen = sorted(weights) if isinstance(module, Denoiser) else sorted(weights)[:8]
    return fingerprint({name: weights[name] for name in chosen})


def patches_mark(model: ModelPatcher) -> str:
    """Tells the patches on a MODEL from others', "" if it has none. Stable from one start of the server to the next.

    ComfyUI's own mark, patches_uuid, is drawn anew for every patch. Patches of weights, such as LoRAs, count with
    their strengths and tensors. What acts while sampling counts by its place and kind: its settings cannot be read.
    """
    found = described((model.patches, model.object_patches, model.wrappers, model.model_options))
    return "" if found == described(({}, {}, {}, {})) else digest(found)


def described(value: Any) -> str:
    """Text that is the same for equal patches, whichever objects hold them."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {float(value.double().sum()):.6e}"
    if isinstance(value, WeightAdapterBase):
        return f"{value.name} {described(value.weights)}"
    if isinstance(value, dict):
        parts = [f"{key}: {text}" for key, inner in value.items() if (text := described(inner)) != "{}"]
        return "{" + ", ".join(sorted(parts)) + "}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(described, value))})"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


# --- reading and editing a site while ComfyUI samples ---

Edit = Callable[[Tensor, float, Tensor], Tensor]
EditRows = Callable[[Tensor, dict], Tensor]


def progress_of(model: ModelPatcher) -> Callable[[float], float]:
    """A function from sigma to the share of timesteps behind it: 0 is pure noise, 1 the picture.

    1 - sigma for flow models. A node that changes the model's sampling belongs before the one that calls this.
    """
    model_sampling = model.get_model_object("model_sampling")
    first = float(model_sampling.timestep(torch.as_tensor(model_sampling.sigma_max)))

    def progress(sigma: float) -> float:
        share = 1 - float(model_sampling.timestep(torch.tensor(sigma))) / first
        return min(1.0, max(0.0, round(share, 6)))

    return progress


UNEDITED = "difflens_unedited"  # entry of transformer_options: in this evaluation all sites stay as they are

# Which conditioning an edit is for: entries of `cond_or_uncond`, in which 0 is the positive.
CONDITIONINGS = {"positive": (0,), "negative": (1,), "both": (0, 1)}
# For the chunks of a batch, of which each follows a conditioning: is an edit for them?
Follows = Callable[[dict], list[bool]]


def follows(conditioning: str) -> Follows:
    """For chunks that follow a conditioning (one of CONDITIONINGS)."""
    return lambda options: [kind in CONDITIONINGS[conditioning] for kind in options["cond_or_uncond"]]


def edit_rows(h: Tensor, options: dict, edit: Edit, chosen: Sequence[bool]) -> Tensor:
    """Let `edit(rows, sigma, images)` change the chosen chunks of h.

    h holds a chunk of the latent batch for every entry of `cond_or_uncond`. Returns h itself if every chunk comes
    back as it was, or if the sampler asks for the unedited model (UNEDITED). Reads one sigma, which on a GPU waits for
    the device once an evaluation.
    """
    if options.get(UNEDITED):
        return h
    if h.ndim != 4:
        raise DiffLensError(
            f"the site puts out {h.ndim} dimensions, expected batch x channels x height x width, or batch x tokens x "
            "channels."
        )
    sigma = float(options["sigmas"][0])
    chunks = h.chunk(len(chosen))
    edited = [
        edit(chunk, sigma, torch.arange(len(chunk))) if mine else chunk
        for chunk, mine in zip(chunks, chosen, strict=True)
    ]
    if all(new is old for new, old in zip(edited, chunks, strict=True)):
        return h
    return torch.cat(edited)


class MiddleBlockPatch:
    """Edit as a `middle_block_after_patch`: hooks on the mid block of ComfyUI's UNet never fire."""

    def __init__(self, edit: EditRows):
        self.edit = edit

    def __call__(self, args: dict) -> dict:
        return {"h": self.edit(args["h"], args["transformer_options"])}


class HookWrapper:
    """Edit as a forward hook that lives for one evaluation of the model.

    Around APPLY_MODEL, because SD3's network runs no DIFFUSION_MODEL wrappers.
    """

    def __init__(self, site: str, edit: EditRows):
        self.site, self.edit = site, edit

    def __call__(self, executor: WrapperExecutor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "sigmas" in a)
        network = executor.class_obj.diffusion_model
        with hooked(network, self.site, lambda h: self.edit(h, options), Picture(network, self.site, x)):
            return executor(x, *args, **kwargs)


MIDDLE_BLOCK = "middle_block"


def site_width(model: ModelPatcher, site: str) -> int | None:
    """Channels that `site` puts out, None if only running the model can tell.

    Raises `DiffLensError` if the model has no such module, or one whose output cannot be reached.
    """
    network, site = model.model.diffusion_model, own_name(model, site)
    module = find_site(network, site)
    if site == MIDDLE_BLOCK:
        if isinstance(network, Denoiser):
            return network.config.width
        if isinstance(module, nn.Sequential):
            module = module[-1]
    elif isinstance(module, TimestepEmbedSequential) or type(module) is nn.ModuleList:
        name = site.removesuffix(UPDATE)
        raise DiffLensError(
            f"{name} only groups modules and is never run itself. Use the last module in it: "
            f"{site.replace(name, f'{name}.{len(module) - 1}')}."
        )
    return getattr(module, "out_channels", None)


def edit_site(model: ModelPatcher, site: str, edit: Edit, node: str, chosen: Follows) -> ModelPatcher:
    """A clone of the model in which `edit(rows, sigma, images)` changes what is read at `site` in the chosen rows.

    Errors that come up while sampling begin with the name `node`.
    """
    site_width(model, site)
    clone, site = model.clone(), own_name(model, site)

    def apply(h: Tensor, options: dict) -> Tensor:
        with named(node):
            return edit_rows(h, options, edit, chosen(options))

    if site == MIDDLE_BLOCK:
        clone.set_model_middle_block_after_patch(MiddleBlockPatch(apply))
    else:
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "difflens", HookWrapper(site, apply))
    return clone


def apply_site(model: ModelPatcher, site: str, fn: Edit, node: str, conditioning: str = "positive") -> ModelPatcher:
    """A clone of the model in which `fn(h, progress, images)` changes what `site` puts out.

    h: B x C x H x W, rows of the `conditioning` only; progress: 0 to 1; images: B, places in the latent
    batch. If fn gives h back, the result is bit-identical. Raises `DiffLensError` if the model lacks the site.
    """
    progress = progress_of(model)
    return edit_site(model, site, lambda h, sigma, images: fn(h, progress(sigma), images), node, follows(conditioning))


def empty_latents(model: ModelPatcher, positive: list, latent: dict) -> Tensor:
    """The latents that a sampler starts from, with the channels of the model. Refuses empty inputs."""
    if not positive:
        raise DiffLensError("the positive conditioning is empty. Connect one, such as Load Unconditional Model's.")
    if len(latent["samples"]) == 0:
        raise DiffLensError("the latent image holds no picture. Set the batch size of Empty Latent Image to 1 or more.")
    keys = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], *(latent.get(key) for key in keys))


class Watch:
    """Keeps what `sites` put out at the noise levels `sigmas` while `model`, a clone, samples one batch.

    Of the rows, those that follow the first positive conditioning: there may be several, and negatives.
    """

    def __init__(self, model: ModelPatcher, sites: tuple[str, ...], sigmas: Tensor, dtype: torch.dtype):
        self.sites, self.sigmas, self.dtype = sites, sigmas, dtype
        for site in sites:
            model = edit_site(model, site, functools.partial(self.keep, site), "Capture Activations", self.chosen)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "difflens", self.begin)
        self.model = model
        self.clear()

    def begin(self, executor: WrapperExecutor, *args: Any, **kwargs: Any) -> Any:
        self.first = executor.class_obj.conds["positive"][0]["uuid"]
        return executor(*args, **kwargs)

    def chosen(self, options: dict) -> list[bool]:
        # Where only the positive is for an area, ComfyUI makes a negative for it that goes by the same uuid.
        pairs = zip(options["cond_or_uncond"], options["uuids"], strict=True)
        return [kind == 0 and uuid == self.first for kind, uuid in pairs]

    def clear(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.seen: set[tuple[str, int]] = set()

    def keep(self, site: str, h: Tensor, sigma: float, images: Tensor) -> Tensor:
        step = int((self.sigmas - sigma).abs().argmin())
        if abs(float(self.sigmas[step]) - sigma) <= 1e-4 * sigma:
            by_position = h.movedim(1, -1)
            if site not in self.values:
                self.values[site] = torch.empty(len(self.sigmas), *by_position.shape, dtype=self.dtype)
            self.values[site][step] = by_position
            self.seen.add((site, step))
        return h

    def take(self) -> dict[str, Tensor]:
        """S x b x H x W x C of every site. Raises `DiffLensError` if a step was not seen."""
        for site in self.sites:
            steps = sum(site == seen for seen, _ in self.seen)
            if steps < len(self.sigmas):
                raise DiffLensError(
                    f"{site} was read at {steps} of {len(self.sigmas)} steps: either the sampler leaves the schedule "
                    "or the model does not run this module at all of them. Use sampler euler and a site that it runs."
                )
        values = self.values
        self.clear()
        return values


def content(tensors: Sequence[Tensor]) -> Iterator[bytes | str]:
    """What tells one set of tensors from another, for `digest`."""
    for tensor in tensors:
        yield f"{tuple(tensor.shape)}"
        yield tensor.cpu().float().numpy().tobytes()


def check_guidance(negative: list | None, cfg: float) -> None:
    """Raises `DiffLensError` if there is nothing to guide away from."""
    if cfg != 1 and not negative:
        raise DiffLensError(
            f"cfg is {cfg:g}, which guides away from a negative, but none is connected. Connect it, or set cfg to 1."
        )


def conditioning_tensors(conditioning: list) -> list[Tensor]:
    """The tensors of a CONDITIONING, in order."""
    return [t for main, more in conditioning for t in (main, *more.values()) if isinstance(t, Tensor)]


def run_mark(
    model: ModelPatcher, positive: list, latent: dict, negative: list | None, cfg: float, *settings: Any
) -> str:  # fmt: skip
    """Tells what is sampled, and how, from anything else: model, patches, conditionings, latent and `settings`."""
    start = [empty_latents(model, positive, latent)[:1], *conditioning_tensors([*positive, *(negative or [])])]
    return digest(model_fingerprint(model), patches_mark(model), f"{cfg}{settings}", *content(start))


def capture(
    model: ModelPatcher,
    positive: list,
    latent: dict,
    pictures: int,
    steps: int,
    sampler_name: str,
    scheduler: str,
    seed: int,
    sites: tuple[str, ...],
    span: tuple[float, float] = (0.0, 1.0),
    dtype: str = "float16",
    folder: Path | None = None,
    negative: list | None = None,
    cfg: float = 1.0,
) -> Store:
    """Sample `pictures` pictures in batches as large as `latent`, keeping what `sites` put out for the positive.

    Kept are the steps whose progress lies in `span`, in memory or in `folder`, where a capture that was cut off is
    gone on with (`record`). The store's samples are the finished latents. Picture k starts from the noise that a stock
    KSampler draws for place k of a batch of `pictures`, so the batch size changes nothing (samplers that add noise on
    the way excepted).
    """
    start, batch = empty_latents(model, positive, latent), len(latent["samples"])
    schedule = comfy.samplers.KSampler(model, steps, "cpu", sampler_name, scheduler, model_options=model.model_options)
    passed = [*map(progress_of(model), schedule.sigmas[:-1].tolist())]
    kept = [step for step, progress in enumerate(passed) if span[0] <= progress <= span[1]]
    if not kept:
        raise DiffLensError(f"no step lies between {span[0]} and {span[1]} of the sampling. Widen the span.")
    check_guidance(negative, cfg)
    inputs = digest(*content([start, *conditioning_tensors(positive)]))
    info = {"steps": steps, "sampler": sampler_name, "scheduler": scheduler, "latent and conditioning": inputs}
    if cfg != 1:
        info |= {"cfg": cfg, "negative": digest(*content(conditioning_tensors(negative)))}
    info |= {"patches": mark} if (mark := patches_mark(model)) else {}
    progress = tuple(passed[step] for step in kept)
    index = Index(sites, progress, pictures, min(batch, pictures), seed, model_fingerprint(model), dtype, info)
    watch = Watch(model, sites, schedule.sigmas[kept], DTYPES[dtype])
    report = progress_bar(pictures * steps)
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def draw(first: int, noise: Tensor) -> Shard:
        def on_step(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            done = first * steps + len(x0) * (step + 1)
            report(done, previewer and previewer.decode_latent_to_preview_image("JPEG", x0))

        samples = comfy.sample.sample(
            watch.model, noise.to(start.dtype), steps, cfg, sampler_name, scheduler, positive, negative or positive,
            start[: len(noise)], callback=on_step, disable_pbar=True, seed=(seed + first) % 2**64,
        )  # fmt: skip
        return watch.take() | {SAMPLES: samples.cpu()}

    return record(index, noise_batches(start.shape[1:], pictures, seed, batch), draw, folder)


def drawer(
    model: ModelPatcher, positive: list, latent: dict, vae: comfy.sd.VAE, pictures: int, steps: int, sampler_name: str,
    scheduler: str, seed: int, node: str, negative: list | None = None, cfg: float = 1.0,
) -> Draw:  # fmt: skip
    """`Draw` that samples from the noises of a run of `pictures`; Cancel works at every step.

    Edits act on what the positive conditioning draws. Errors that come up while sampling begin with the name `node`.
    """
    check_guidance(negative, cfg)
    start = comfy.utils.repeat_to_batch_size(empty_latents(model, positive, latent), pictures)
    noise = comfy.sample.prepare_noise(start, seed)

    def draw(edits: Sequence[SiteEdit], which: Tensor) -> Tensor:
        edited = model
        for edit in edits:
            edited = apply_site(edited, edit.site, edit, node)
        samples = comfy.sample.sample(
            edited, noise[which], steps, cfg, sampler_name, scheduler, positive, negative or positive, start[which],
            callback=lambda *_: comfy.model_management.throw_exception_if_processing_interrupted(),
            disable_pbar=True, seed=seed,
        )  # fmt: skip
        return vae.decode(samples).float().cpu()

    return draw


def some_sites(model: ModelPatcher) -> list[str]:
    """Sites of a network worth a scan, from its input to its output.

    Of a U-Net as ComfyUI builds it the last module of three blocks before and after the middle (some distilled ones
    have nothing there); of diffusers' the last residual block of every level; of other networks the modules right below
    it that put out a map, as far as their type tells, with the first of each stack (the first and the last convolution
    only touch pixels), and three of each list of blocks.
    """
    network = model.model.diffusion_model

    def three(name: str) -> list[str]:
        blocks = getattr(network, name)
        chosen = sorted({len(blocks) // 4, len(blocks) // 2, len(blocks) - 1})
        last = [f".{len(block) - 1}" if isinstance(block, TimestepEmbedSequential) else "" for block in blocks]
        return [f"{name}.{i}{last[i]}" for i in chosen]

    if hasattr(network, "input_blocks") and hasattr(network, "output_blocks"):
        middle = [] if network.middle_block is None else [MIDDLE_BLOCK]
        return [*three("input_blocks"), *middle, *three("output_blocks")]
    if hasattr(network, "down_blocks"):  # diffusers
        down, up = (
            [f"{name}.{i}.resnets.{len(block.resnets) - 1}" for i, block in enumerate(getattr(network, name))]
            for name in ("down_blocks", "up_blocks")
        )
        return [*down, MIDDLE_BLOCK, *up]
    found = []
    for name, module in network.named_children():
        if type(module) is nn.ModuleList:
            found += three(name)
        if isinstance(module, Stack):
            found.append(f"{name}.0")
        if isinstance(module, (Stack, ResBlock, nn.Conv2d)) and name not in ("conv_in", "conv_out"):
            found.append(name)
    return found
