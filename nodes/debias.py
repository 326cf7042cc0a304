"""The one node for those who want a fair mix and no more."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..difflens_core.files import DiffLensError
from ..difflens_core.steer import load_recipe
from . import host
from .sockets import CATEGORY, TargetsSocket
from .steer import steer

EVEN, GENTLE, ONLY, AS_IT_WAS, OWN = "even mix", "gentle", "only", "as it was", "own shares"
DOSE = {GENTLE: 0.5, AS_IT_WAS: 0.0}  # times the strength; of the other choices 1


def slider(name: str) -> str:
    """The widget for a class's share: the page shows its name, in which a dot would begin another."""
    return f"{name.replace('.', ' ')} %"


def mix_of(classes: list[str]) -> io.Input:
    """What may be asked for of such classes, by their names."""
    shares = [
        io.Int.Input(
            slider(name), default=round(100 / len(classes)), min=0, max=100, display_mode=io.NumberDisplay.slider,
            tooltip=f"How many pictures are to show {name}, beside the others.",
        )
        for name in classes
    ]  # fmt: skip
    choices = [EVEN, GENTLE, *(f"{ONLY} {name}" for name in classes), AS_IT_WAS]
    options = [io.DynamicCombo.Option(choice, []) for choice in choices] + [io.DynamicCombo.Option(OWN, shares)]
    return io.DynamicCombo.Input(
        "mix", options=options, tooltip="Which pictures you want: all classes alike in number; the same gently, with "
        "half the strength; one class alone; the pictures as they were; or your own shares.",
    )  # fmt: skip


class Debias(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLensDebias",
            display_name="Debias",
            category=CATEGORY,
            description="Makes a model draw the mix of people that you choose, and leaves the rest of its pictures as "
            "they are. Goes between the model and any sampler; several can be chained, one for each attribute.",
            search_aliases=[
                "bias", "fairness", "fair", "diversity", "representation", "inclusive", "stereotype", "gender", "age",
                "race", "skin", "same face", "mix", "steer",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the recipe was made for."),
                io.DynamicCombo.Input(
                    "recipe",
                    options=[
                        io.DynamicCombo.Option(name, [mix_of(classes)]) for name, classes in host.list_classes().items()
                    ],
                    tooltip="What to balance: a recipe in models/difflens_recipes, or one of those that come with the "
                    "pack. A recipe is for one model.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="1 is what the recipe found best. Less changes fewer pictures, and less in them; 0 leaves "
                    "all as they are.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model that draws the mix. The model that came in stays as it was."),
                TargetsSocket.Output(
                    display_name="targets",
                    tooltip="The class that each picture is asked to show, for Fairness Report.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, recipe: dict | None = None, **_: Any) -> str:
        return host.name_state(host.RECIPES, recipe and recipe["recipe"])

    @classmethod
    @host.clear_errors
    def execute(cls, model: Any, strength: float, recipe: dict | None = None) -> io.NodeOutput:
        if recipe is None:  # the list, which belongs to this machine, lacks what the graph names
            named = cls.hidden.prompt[cls.hidden.unique_id]["inputs"].get("recipe")
            host.find_file(host.RECIPES, str(named), ", or bypass this node (Ctrl+B) to draw without it")
            raise DiffLensError(f"{named} is no recipe with classes to choose from. Choose another.")
        loaded = load_recipe(host.find_file(host.RECIPES, recipe["recipe"]))
        host.tell_recipe(recipe["recipe"])
        mix = recipe["mix"]
        return steer(cls, model, loaded, target_of(mix, loaded.classes), strength * DOSE.get(mix["mix"], 1.0))


def target_of(mix: dict, classes: tuple[str, ...]) -> str:
    """The target as Steer takes it. Raises `DiffLensError` if no class is asked for."""
    choice = mix["mix"]
    if choice in (EVEN, GENTLE, AS_IT_WAS):
        return "uniform"
    if choice != OWN:
        return choice.removeprefix(f"{ONLY} ")
    shares = [mix[slider(name)] for name in classes]
    if not any(shares):
        raise DiffLensError("all shares are 0, so no picture could be drawn. Raise one of them.")
    return ", ".join(str(share / sum(shares)) for share in shares)
