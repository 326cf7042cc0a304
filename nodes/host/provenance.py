"""What the page and a picture's file tell of the recipes that a graph names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from server import PromptServer

from ...difflens_core.files import digest
from ...difflens_core.report import provenance, provenance_text
from .files import RECIPES, full_path, info_of, spelled
from .progress import node_id, tell

NAMED = {"DiffLensLoadRecipe": "recipe_name", "DiffLensDebias": "recipe"}  # inputs that name recipes, by node
KEY = "difflens_recipes"  # in PNGs, beside "prompt" and "workflow"


def tell_recipe(name: str) -> None:
    """Show on the node that is being executed whose a listed recipe is, what for, and its licence."""
    tell(node_id(), provenance_text(info_of(RECIPES, name)))


def serve_provenance() -> None:
    """Let ComfyUI ask us about every graph that is queued."""
    PromptServer.instance.add_on_prompt_handler(with_recipes)


def with_recipes(data: dict[str, Any]) -> dict[str, Any]:
    """A queued graph, with the recipes that it names beside its workflow, which goes into the pictures' files.

    Here and not in the nodes, which ComfyUI does not run again where it has their outputs. A recipe that the graph
    itself makes is told by the workflow.
    """
    beside = (data.get("extra_data") or {}).get("extra_pnginfo")
    names = {spelled(name) for name in named_in(data.get("prompt")) if full_path(RECIPES, name)}
    if names and isinstance(beside, dict):
        beside[KEY] = [recipe_told(name) for name in sorted(names)]
    return data


def named_in(prompt: Any) -> Iterator[str]:
    for node in prompt.values() if isinstance(prompt, dict) else ():
        name = node.get("inputs", {}).get(NAMED.get(node.get("class_type"))) if isinstance(node, dict) else None
        if isinstance(name, str):
            yield name


def recipe_told(name: str) -> dict[str, Any]:
    """What is told of a listed recipe; the fingerprint is of its file."""
    path = full_path(RECIPES, name)
    return {"name": name, "fingerprint": digest(path.read_bytes()), **provenance(info_of(RECIPES, name))}
