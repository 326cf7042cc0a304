"""What a file or folder with a model holds, told by its content; everything else refused with a word on what it is."""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from difflens_core.files import DiffLensError
from difflens_core.networks import AdmConfig, load_checkpoint, unet2d_class
from difflens_core.networks.unet2d import infer_unet2d

SMALL = AdmConfig(
    model_channels=32, channels=(32, 64), attention=(1,), head_channels=0, heads=2, resblock_updown=False, classes=3
)


@pytest.fixture
def weights(toys) -> dict:
    return toys.adm(SMALL).state_dict()


def write(path: Path, content: object) -> Path:
    torch.save(content, path) if path.suffix == ".pt" else save_file(content, path)
    return path


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_an_adm_file_is_read_whatever_its_name(tmp_path, weights, ending):
    found = load_checkpoint(write(tmp_path / f"ema_0.9999_500000.{ending}", weights), heads=2)
    assert found.config == SMALL and found.classes == 3 and found.widths == (32, 64)
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in weights.items())
    assert (found.schedule.prediction, found.schedule.clip, len(found.schedule.betas)) == ("epsilon", 1.0, 1000)
    assert (
        "architecture: ADM U-Net, channels 32, 64" in found.report and "linear and epsilon are assumed" in found.report
    )
    found = load_checkpoint(tmp_path / f"ema_0.9999_500000.{ending}", "cosine", "v_prediction", 4, True)
    assert found.config == replace(SMALL, heads=4, new_attention_order=True)
    assert float(found.schedule.betas[-1]) == 0.999 and found.schedule.prediction == "v_prediction"


def test_weights_are_found_in_what_training_programs_save(tmp_path, weights):
    old = {name: tensor * 0 for name, tensor in weights.items()}
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    for number, content in enumerate(
        [{"model": old, "ema": weights, "step": 3}, {"state_dict": wrapped}, {"model": {"model": wrapped}}]
    ):
        found = load_checkpoint(write(tmp_path / f"{number}.pt", content), heads=2)
        assert all(torch.equal(found.weights[name], tensor) for name, tensor in weights.items())


def test_averaged_weights_beside_the_file_are_pointed_out(tmp_path, weights):
    for name in ("model000100.pt", "ema_0.9999_000100.pt", "ema_0.9999_000200.pt"):
        write(tmp_path / name, weights)
    reports = [load_checkpoint(path, heads=2).report for path in sorted(tmp_path.glob("*.pt"))]
    assert [("ema_0.9999_000100.pt beside it" in report) for report in reports] == [False, False, True]


@pytest.fixture
def folder(toys, tmp_path) -> Path:
    """A UNet2DModel of classes, predicting v, as a pipeline of diffusers saves it."""
    model = toys.unet2d(num_class_embeds=4, norm_eps=1e-4)
    model.save_pretrained(tmp_path / "pipeline" / "unet")
    (tmp_path / "pipeline" / "scheduler").mkdir()
    scheduler = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "prediction_type": "v_prediction"}
    (tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return tmp_path / "pipeline" / "unet"


def test_a_folder_of_diffusers_is_read_with_its_scheduler(toys, folder):
    found = load_checkpoint(folder)
    model = unet2d_class()(**found.config)
    model.load_state_dict(found.weights)
    x, t, y = toys.random(1)(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([0, 3])
    expected = toys.unet2d(num_class_embeds=4, norm_eps=1e-4)(x, t, y).sample
    assert torch.equal(model.eval()(x, t, y).sample, expected)
    assert found.classes == 4 and found.schedule.prediction == "v_prediction"
    assert load_checkpoint(folder, prediction="sample").schedule.prediction == "sample"
    (folder / "scheduler_config.json").write_text('{"num_train_timesteps": 250, "clip_sample": false}')
    nearer = load_checkpoint(folder)
    assert len(nearer.schedule.betas) == 250 and "250 timesteps" in nearer.report and nearer.schedule.clip is None


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers_per_block": 2, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 3, "out_channels": 6},
        {"downsample_type": "resnet", "upsample_type": "resnet", "add_attention": False},
        {"time_embedding_type": "learned", "num_train_timesteps": 100, "attn_norm_num_groups": 32},
    ],
)
def test_a_single_file_of_diffusers_is_read_by_its_weights(toys, tmp_path, settings):
    habits = {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
    model = toys.unet2d(**habits, norm_eps=1e-6, **settings)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old_name(name: str) -> str:
        head, _, tail = name.partition(".to_")
        part, _, end = f"to_{tail}".rpartition(".")
        return f"{head}.{old[part]}.{end}" if tail else name

    renamed = {old_name(name): tensor for name, tensor in model.state_dict().items()}
    found = load_checkpoint(write(tmp_path / "ddpm.safetensors", renamed))
    again = unet2d_class()(**found.config).eval()
    again.load_state_dict(found.weights)
    x, t = toys.random(1)(2, 3, 16, 16), torch.tensor([3, 99])
    y = torch.tensor([0, 2]) if "num_class_embeds" in settings else None
    assert torch.equal(again(x, t, y).sample, model(x, t, y).sample)
    assert "no config.json" in found.report


def test_a_file_is_said_to_need_diffusers_where_it_is_not_installed(toys, tmp_path, monkeypatch):
    path = write(tmp_path / "ddpm.safetensors", toys.unet2d().state_dict())
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DiffLensError, match="ddpm.safetensors: .* is not installed. Run .* pip install diffusers"):
        load_checkpoint(path)


# --- what is refused ---

OTHERS = {
    "LoRA": ("input_blocks.1.0.in_layers.2.lora_up.weight", "a LoRA, not a model. .* Load LoRA"),
    "LoRA of diffusers": ("unet.down_blocks.0.resnets.0.conv1.lora_A.weight", "a LoRA"),
    "SD checkpoint": (
        "model.diffusion_model.input_blocks.0.0.weight",
        "a checkpoint of a prompt model .* Use Load Checkpoint",
    ),
    "SD U-Net": (
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        "the U-Net of a prompt model .* Use Load Diffusion Model",
    ),
    "SD U-Net of diffusers": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "the U-Net of a prompt model",
    ),
    "Flux": ("double_blocks.0.img_attn.qkv.weight", "a diffusion transformer .DiT.. Use Load Diffusion Model"),
    "DiT": ("blocks.0.adaLN_modulation.1.weight", "a diffusion transformer"),
    "DiT of diffusers": ("transformer_blocks.0.attn1.to_q.weight", "a diffusion transformer"),
    "VAE": ("decoder.conv_in.weight", "a VAE. Use Load VAE"),
    "text encoder": ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder. Use Load CLIP"),
    "ControlNet": ("control_model.input_hint_block.0.weight", "a ControlNet. Use Load ControlNet Model"),
    "classifier": ("input_blocks.0.0.weight", "guided-diffusion's classifier"),
    "SAE": ("W_enc", "a sparse autoencoder. Use Load SAE"),
    "something": ("layer1.0.conv1.weight", "not a model that this node knows .its tensors: layer1.0.conv1.weight"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_of_other_families_are_named_with_the_node_that_loads_them(tmp_path, kind):
    name, words = OTHERS[kind]
    path = write(tmp_path / "file.safetensors", {name: torch.zeros(4, 4)})
    with pytest.raises(DiffLensError, match=f"^file.safetensors: (this is )?{words}"):
        load_checkpoint(path)


class Danger:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_damaged_and_dangerous_files_are_refused(tmp_path, weights):
    good = write(tmp_path / "good.pt", weights).read_bytes()
    (tmp_path / "half.pt").write_bytes(good[: len(good) // 2])
    write(tmp_path / "half.safetensors", weights)
    half = (tmp_path / "half.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(half[: len(half) // 2])
    for name in ("half.pt", "half.safetensors"):
        with pytest.raises(DiffLensError, match=f"^{name}: not a readable .* cut off: copy or download it again"):
            load_checkpoint(tmp_path / name)
    torch.save(weights | {"extra": Danger()}, tmp_path / "danger.pt")
    with pytest.raises(DiffLensError, match="^danger.pt: holds pickled objects .* never loaded. Save the state_dict"):
        load_checkpoint(tmp_path / "danger.pt")
    write(tmp_path / "opt000100.pt", {"state": {0: {"step": 1}}, "param_groups": []})
    with pytest.raises(DiffLensError, match="^opt000100.pt: this is the state of an optimiser"):
        load_checkpoint(tmp_path / "opt000100.pt")
    write(tmp_path / "nan.pt", weights | {"out.2.bias": torch.full((6,), torch.nan)})
    with pytest.raises(DiffLensError, match="^nan.pt: tensor out.2.bias holds NaN"):
        load_checkpoint(tmp_path / "nan.pt", heads=2)


def test_weights_in_fp8_are_read_and_whole_numbers_are_refused(toys, tmp_path, weights):
    for name, content in (("adm", weights), ("unet2d", toys.unet2d().state_dict())):
        small = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in content.items()}
        found = load_checkpoint(write(tmp_path / f"{name}.safetensors", small), heads=2)
        assert all(torch.equal(found.weights[key], tensor.float()) for key, tensor in small.items())
        whole = write(tmp_path / f"{name}_int8.pt", {key: tensor.to(torch.int8) for key, tensor in content.items()})
        with pytest.raises(DiffLensError, match=f"^{name}_int8.pt: tensor .* holds whole numbers .int8."):
            load_checkpoint(whole, heads=2)


@pytest.mark.parametrize(("channels", "words"), [(1, "1 channels. Expected 3"), (6, "6 channels. It is an upsampler")])
def test_models_of_other_channels_are_refused(toys, tmp_path, channels, words):
    path = write(tmp_path / "odd.pt", toys.adm(replace(SMALL, in_channels=channels)).state_dict())
    with pytest.raises(DiffLensError, match=f"^odd.pt: this model takes pictures of {words}"):
        load_checkpoint(path, heads=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel, expected .* use Load Diffusion Model"),
        ({"time_embedding_type": "fourier"}, "score-based model"),
        ({"class_embed_type": "identity"}, "class_embed_type identity is not supported"),
        ({"mid_block_type": None}, "no mid block"),
        ({"rotate": "left", "halve": False}, "sets rotate, which the installed diffusers does not know"),
        ({"block_out_channels": [32, 96]}, "do not fit its configuration"),
        ({"block_out_channels": [32]}, "cannot build a UNet2DModel of its configuration"),
    ],
)
def test_folders_of_other_models_are_refused(folder, change, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(DiffLensError, match=f"^unet: .*{words}"):
        load_checkpoint(folder)


def test_a_folder_that_was_not_downloaded_whole_says_what_is_missing(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DiffLensError, match="no weights beside config.json. Expected diffusion_pytorch_model.safet"):
        load_checkpoint(folder)
    (folder / "config.json").write_text('{"_class_name": "UNet2D')
    with pytest.raises(DiffLensError, match="config.json is not readable JSON"):
        load_checkpoint(folder)


def test_an_incomplete_single_file_of_diffusers_names_what_is_missing(toys):
    weights = toys.unet2d().state_dict()
    del weights["down_blocks.1.resnets.0.conv1.weight"]
    with pytest.raises(DiffLensError, match="not a complete UNet2DModel .looking for 'down_blocks.1.resnets.0.conv1"):
        infer_unet2d(weights)


# --- memory ---


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still there."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            if storage._cdata not in self.known | old:
                self.add(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self.add, storage._cdata, -storage.nbytes())
        return out

    def add(self, key: int, size: int) -> None:
        self.known ^= {key}
        self.live += size
        self.peak = max(self.peak, self.live)


@pytest.mark.parametrize("family", ["adm", "wide adm", "unet2d"])
def test_the_estimate_of_memory_is_near_what_is_used(toys, tmp_path, family):
    wide = {"channels": (32, 96), "res_blocks": 2, "classes": 0}
    if family == "unet2d":
        model = toys.unet2d(block_out_channels=(64, 96))
    else:
        model = toys.adm(replace(SMALL, **(wide if family == "wide adm" else {"classes": 0})))
    found = load_checkpoint(write(tmp_path / "model.safetensors", model.state_dict()), heads=2)
    x = toys.random(1)(2, 3, 32, 32)
    with torch.inference_mode(), Live() as memory:
        model(x, torch.tensor([5, 9]))
    used = memory.peak / 4 / (2 * 32 * 32)
    assert 0.75 * used < found.live_values < 1.5 * used
