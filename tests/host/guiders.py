"""Ways in which graphs put a run together: guiders, patches of other nodes, hooks and ControlNets, all small."""

from __future__ import annotations

import torch

SEED = 5


def with_hooks(inside, model, conditioning):
    """The conditioning with a LoRA that is for it alone."""
    hooks = inside.comfy.hooks
    weights = model.model.state_dict()
    name = next(key for key, weight in weights.items() if key.startswith("diffusion_model.") and weight.ndim == 2)
    difference = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(8))
    group = hooks.create_hook_lora({f"{name.removesuffix('.weight')}.diff": 0.1 * difference}, 1.0, 0.0)
    return hooks.set_hooks_for_conditioning(conditioning, group)


def patched(model, batch):
    """The MODEL behind ComfyUI's own node for a way of batching."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    if batch == "windows":
        (model,) = ContextWindowsManualNode.execute(
            model, 2, 1, "standard_static", 1, False, "pyramid", 0, False, [], False, [], True
        ).result
    if batch == "a weaker pass":
        (model,) = PerturbedAttentionGuidance.execute(model, 2.0).result
    return model


def guider_of(inside, kind, model, positive, negative, third):
    """A guider and its sampling settings."""
    if kind == "cfg":
        guider = inside.comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(3.0)
    elif kind == "perpendicular":
        from comfy_extras.nodes_perpneg import Guider_PerpNeg

        guider = Guider_PerpNeg(model)
        guider.set_conds(positive, negative, third)
        guider.set_cfg(3.0, 1.0)
    elif kind == "basic":
        from comfy_extras.nodes_custom_sampler import Guider_Basic

        guider = Guider_Basic(model)
        guider.set_conds(positive)
    else:
        from comfy_extras.nodes_custom_sampler import Guider_DualCFG

        guider = Guider_DualCFG(model)
        guider.set_conds(positive, third, negative)
        guider.set_cfg(3.0, 2.0, kind == "dual, nested")
    return guider


def sampled(inside, guider, latent, numbers=None, steps=2, sampler="euler"):
    """What the guider draws from noises of one seed; numbers: places in a larger batch that they are cut from."""
    start = inside.comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent["samples"])
    noise = inside.comfy.sample.prepare_noise(start, SEED, numbers)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = inside.comfy.samplers.calculate_sigmas(sampling, "normal", steps)
    chosen = inside.comfy.samplers.sampler_object(sampler)
    try:
        return guider.sample(noise, start, chosen, sigmas, seed=SEED, disable_pbar=True)
    finally:
        inside.forget()


def control_net(inside):
    """A small ControlNet with random weights, given a picture."""
    from comfy.cldm.cldm import ControlNet as Network
    from comfy.controlnet import ControlNet
    from comfy.ops import disable_weight_init

    sizes = {k: v for k, v in inside.UNET.items() if k not in ("out_channels", "transformer_depth_output")}
    network = Network(**sizes, hint_channels=3, num_heads=8, operations=disable_weight_init, dtype=torch.float32)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) / max(1, weight[0].numel()) ** 0.5)
    control = ControlNet(network, load_device=torch.device("cpu"))
    return control.set_cond_hint(torch.randn(1, 3, 128, 128, generator=draw), 1.0, (0.0, 1.0))


def free_u(model):
    from comfy_extras.nodes_freelunch import FreeU

    return FreeU.execute(model, 1.3, 1.4, 0.9, 0.2).result[0]
