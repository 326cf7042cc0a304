"""The user's model stays as it was, whatever graph it goes through and however that ends.

Random graphs of Steer, Capture and ComfyUI's own nodes, in this process, on small random networks (`inside.py`).

    python scripts/test.py --slow tests/host/test_sacred.py     the long form: 300 graphs of each kind, 500 runs
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from guiders import SEED, control_net, free_u, guider_of, patched, sampled, with_hooks
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from difflens_core.steer import Recipe

PICTURES = 2
SITES = {
    "SD1.5": ("mid_block", "down_blocks.2.attentions.1 update", "output_blocks.3.1"),
    "Flux": ("transformer_blocks.1", "single_blocks.0 update"),
}
OWN = {"SD1.5": ("LoRA", "FreeU", "a weaker pass", "windows"), "Flux": ("LoRA", "windows")}  # ComfyUI's nodes
PROMPTS = {"SD1.5": ("plain", "several", "hooks", "ControlNet"), "Flux": ("plain", "several", "hooks")}
GUIDERS = ("cfg", "dual", "dual, nested", "perpendicular", "basic")
SAMPLERS = ("euler", "dpmpp_2m", "heun", "euler_ancestral")
HOW_MANY = [3, pytest.param(300, marks=pytest.mark.slow)]


class Fault(Exception):
    """What a node of a random graph raises."""


@dataclass(frozen=True)
class Steer:
    site: str
    conditioning: str
    mode: str
    hold: str


@dataclass(frozen=True)
class Capture:
    site: str


@dataclass(frozen=True)
class Graph:
    """nodes: between the loader and the guider, in turn; fails: at which evaluation of the network, 0 at none."""

    nodes: tuple[Steer | Capture | str, ...]
    prompts: str
    guider: str
    sampler: str
    fails: int = 0
    by: str = "an error"


def graphs(family: str, faults: bool) -> st.SearchStrategy[Graph]:
    sites = st.sampled_from(SITES[family])
    steer = st.builds(
        Steer, sites, st.sampled_from(("positive", "negative", "both")), st.sampled_from(("move", "add", "ablate")),
        st.sampled_from(("on", "off")),
    )  # fmt: skip
    nodes = st.lists(steer | st.builds(Capture, sites) | st.sampled_from(OWN[family]), max_size=3)
    return st.builds(
        Graph, st.tuples(steer, nodes).map(lambda drawn: (*drawn[1], drawn[0])), st.sampled_from(PROMPTS[family]),
        st.sampled_from(GUIDERS), st.sampled_from(SAMPLERS), st.integers(1, 9) if faults else st.just(0),
        st.sampled_from(("an error", "Cancel", "no memory")),
    )  # fmt: skip


def tried(how_many: int, what: st.SearchStrategy, check: Callable) -> None:
    """check(one of them) for so many random ones: the same each time if few, others if many.

    One that fails is told as it is: they are small, and to look for a smaller one takes minutes.
    """
    few = how_many < 50
    settings(
        max_examples=how_many, deadline=None, derandomize=few, database=None, phases=[Phase.generate],
        suppress_health_check=[*HealthCheck] if few else [HealthCheck.too_slow],
    )(given(what)(check))()  # fmt: skip


@dataclass
class Bench:
    """A family's MODEL, recipes for its sites, and what it draws alone."""

    inside: ModuleType
    family: str
    recipes: dict[str, Recipe]
    seen: list[weakref.ref] = field(default_factory=list)  # the clones of the graphs that were built

    @property
    def model(self) -> Any:
        return self.inside.model(self.family)

    def steer(self, model: Any, node: Steer, strength: float) -> Any:
        recipe = replace(self.recipes[node.site], mode=node.mode)
        return self.inside.pack_module("nodes.steer").Steer.execute(
            model, recipe, "uniform", strength, "from recipe", 0.0, 1.0, 0, 0, node.conditioning, run=0, hold=node.hold
        ).result[0]  # fmt: skip

    def prompts(self, how: str) -> tuple[list, list, list]:
        positive, negative, third = (self.inside.prompt(self.family, seed) for seed in (1, 2, 3))
        if how == "several":
            positive = positive + self.inside.prompt(self.family, 4)
        elif how == "hooks":
            positive = with_hooks(self.inside, self.model, positive)
        elif how == "ControlNet":
            control = {"control": control_net(self.inside), "control_apply_to_uncond": False}
            positive = [[tokens, more | control] for tokens, more in positive]
        return positive, negative, third

    def latent(self) -> dict:
        return self.inside.latent(self.family, PICTURES)

    def failing(self, graph: Graph) -> Any:
        """A clone of the MODEL whose network fails where the graph says."""
        model, evaluations = self.model.clone(), [0]
        errors = {
            "an error": Fault, "no memory": torch.cuda.OutOfMemoryError,
            "Cancel": self.inside.comfy.model_management.InterruptProcessingException,
        }  # fmt: skip

        def count(executor: Any, *args: Any, **kwargs: Any) -> Any:
            evaluations[0] += 1
            if evaluations[0] == graph.fails:
                raise errors[graph.by]
            return executor(*args, **kwargs)

        if graph.fails:
            model.add_wrapper_with_key(self.inside.comfy.patcher_extension.WrappersMP.APPLY_MODEL, "fails", count)
        return model

    def run(self, graph: Graph, strength: float = 1.0, steered: bool = True) -> torch.Tensor:
        """What the graph draws, with or without its Steer nodes."""
        model, (positive, negative, third) = self.failing(graph), self.prompts(graph.prompts)
        self.seen.append(weakref.ref(model))
        for node in graph.nodes:
            if isinstance(node, Steer):
                model = self.steer(model, node, strength) if steered else model
            elif isinstance(node, Capture):
                self.inside.host.capture(
                    model, positive, self.latent(), PICTURES, 2, "euler", "normal", SEED, (node.site,)
                )
                self.inside.forget()
            else:
                others = {"LoRA": self.inside.with_lora, "FreeU": free_u}
                model = others[node](model) if node in others else patched(model, node)
            self.seen.append(weakref.ref(model))
        guider = guider_of(self.inside, graph.guider, model, positive, negative, third)
        torch.manual_seed(SEED)
        return sampled(self.inside, guider, self.latent(), sampler=graph.sampler)

    def plain(self) -> torch.Tensor:
        return sampled(self.inside, guider_of(self.inside, "cfg", self.model, *self.prompts("plain")), self.latent())

    def left(self) -> list[str]:
        """What is left of the graphs that were built: clones that live, and hooks."""
        gc.collect()
        hooks = [
            f"a hook of {name or 'the network'}"
            for name, module in self.model.model.diffusion_model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks
        ]
        return hooks + [f"clone {i}" for i, clone in enumerate(self.seen) if clone() is not None]


def tables(value: Any, depth: int = 8) -> Any:
    """What a MODEL holds, for comparison: its dicts and lists part by part, all else by identity."""
    if isinstance(value, dict) and depth:
        return {repr(key): tables(part, depth - 1) for key, part in value.items()}
    if isinstance(value, (list, tuple, set)) and depth:
        return [tables(part, depth - 1) for part in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else id(value)


@pytest.fixture(scope="module", params=["Flux", pytest.param("SD1.5", marks=pytest.mark.slow)])
def bench(inside, toys, request) -> Bench:
    family, recipes = request.param, {}
    for site in SITES[family]:
        shapes: list[torch.Size] = []

        def look(h, progress, images, shapes=shapes):
            shapes.append(h.shape)
            return h

        looked = inside.host.apply_site(inside.model(family), site, look, "Look")
        inside.sample(looked, inside.prompt(family, 1), latent=inside.latent(family, 1))
        _, width, height, breadth = shapes[0]
        recipe = toys.recipe(width=width, positions=height * breadth, strength=(2.0,) * 3)
        recipes[site] = replace(recipe, site=site, model="", map=(height, breadth))
    return Bench(inside, family, recipes)


@pytest.mark.parametrize("how_many", HOW_MANY)
def test_the_model_that_came_in_draws_the_same_before_during_and_after_any_graph(bench, how_many):
    """Its tables and weights are as they were, and nothing of the graph lives on."""
    ends: list[str] = []
    before, held = bench.plain(), tables(vars(bench.model))
    weights = {name: weight.clone() for name, weight in bench.model.model.state_dict().items()}
    interrupted = bench.inside.comfy.model_management.InterruptProcessingException

    def check(graph: Graph) -> None:
        bench.seen.clear()
        try:
            bench.run(graph)
            ends.append("well")
        except (Fault, interrupted, torch.cuda.OutOfMemoryError, bench.inside.DiffLensError) as error:
            ends.append(type(error).__name__)
        assert torch.equal(bench.plain(), before)
        assert tables(vars(bench.model)) == held
        now = bench.model.model.state_dict()
        assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in weights)
        assert not bench.left()

    tried(how_many, graphs(bench.family, faults=True), check)
    assert how_many < 50 or {"well", "Fault", "InterruptProcessingException"} < {*ends}


@pytest.mark.parametrize("how_many", HOW_MANY)
def test_strength_0_is_the_graph_without_steer_to_the_bit(bench, how_many):
    compared = []

    def check(graph: Graph) -> None:
        graph = replace(graph, nodes=tuple(node for node in graph.nodes if not isinstance(node, Capture)))
        try:
            steered = bench.run(graph, strength=0.0)
        except bench.inside.DiffLensError:
            assume(False)  # it says why it cannot steer here
        assert torch.equal(steered, bench.run(graph, steered=False))
        compared.append(graph)

    tried(how_many, graphs(bench.family, faults=False), check)
    assert len(compared) >= how_many / 2


@pytest.mark.parametrize("runs", [4, pytest.param(500, marks=pytest.mark.slow)])
def test_memory_is_flat(bench, runs):
    """Every third run is cancelled in the middle; all hold, with a LoRA in the network."""
    bench.seen.clear()
    steers = [Steer(site, "positive", "move", "on") for site in SITES[bench.family][:2]]
    graph = Graph(("LoRA", *steers), "plain", "cfg", "euler")
    interrupted = bench.inside.comfy.model_management.InterruptProcessingException

    def run(count: int) -> tuple[int, int]:
        """Objects and bytes in use after so many runs."""
        for number in range(count):
            try:
                bench.run(replace(graph, fails=3 * (number % 3 == 2), by="Cancel"))
            except interrupted:
                assert number % 3 == 2
        assert not bench.left()
        bench.seen.clear()
        gc.collect()
        return len(gc.get_objects()), psutil.Process().memory_info().rss

    run(3)
    objects, size = run(1)
    more, larger = run(runs)
    assert more - objects < 50 and larger - size < 32e6


@pytest.mark.parametrize("how_many", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_the_order_of_positives_and_how_a_batch_is_split_change_rounding_alone(bench, how_many):
    """Splits of a batch as RebatchLatents makes them, each with the noise that the whole batch has there."""
    positive, negative, third = bench.prompts("several")
    node = Steer(SITES[bench.family][0], "positive", "move", "off")
    model = bench.steer(bench.model, node, 1.0)

    def drawn(conditioning: list, places: list[int] | None = None) -> torch.Tensor:
        count = len(places) if places else 5
        latent = bench.inside.latent(bench.family, count)
        return sampled(
            bench.inside, guider_of(bench.inside, "cfg", model, conditioning, negative, third), latent, places
        )

    together = drawn(positive)
    spread = float(together.std())

    def check(split: tuple[list[int], list[int], bool]) -> None:
        order, cuts, reverse = split
        found, cuts = torch.empty_like(together), [0, *sorted({*cuts}), len(together)]
        for first, last in zip(cuts, cuts[1:], strict=False):
            part = order[first:last]
            found[part] = drawn(positive[::-1] if reverse else positive, part)
        torch.testing.assert_close(found, together, atol=4e-3 * spread, rtol=4e-3)

    splits = st.tuples(st.permutations(range(5)), st.lists(st.integers(1, 4), max_size=3), st.booleans())
    tried(how_many, splits, check)
    assert float((together[0] - together[1]).abs().max()) > 0.1 * spread
