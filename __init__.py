"""ComfyUI-DiffLens: find what inside a diffusion model makes its pictures biased, and turn it down."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
