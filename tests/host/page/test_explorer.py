"""The feature explorer in ComfyUI's page: opened, used, previewed, saved and loaded, with mouse and keys."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from graphs import to_api
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from small_graphs import Avatars

from difflens_core.steer import load_recipe

PATIENCE = 180_000  # milliseconds for what is drawn or loaded on two slow cores
HOSTILE = "<img src=x onerror='window.fell = 1'>"


class Explored(Avatars):
    """The features of a recipe or an SAE on a small capture, two pictures steered by them, and a preview."""

    def __init__(self, recipe: str | None = "avatars_presentation", steps: int = 4) -> None:
        super().__init__(2)
        small, self.latent = self.latent, self.add("EmptyLatentImage", width=64, height=64, batch_size=8)
        captured, self.latent = self.capture(pictures=32, steps=4), small
        labels = self.labels(captured)
        given = {"recipe": self.recipe(recipe)} if recipe else {"sae": self.sae()}
        self.explorer = self.add(
            "DiffLensExplore",
            activations=captured[0],
            images=captured[1],
            labels=labels,
            choice="",
            save_as="",
            **given,
        )
        sae = {} if recipe else given
        drawn = self.draw(self.steer(self.explorer[0], target="feminine", strength=2.0, **sae)[0])
        drawn.inputs["steps"] = steps
        self.preview = self.add("PreviewImage", images=self.pictures(drawn)[0])


def load(page: Page, graph: Explored, name: str) -> None:
    page.evaluate("document.querySelector('dialog.difflens-explorer')?.close()")  # of a test that failed
    page.evaluate("([graph, name]) => app.loadApiJson(graph, name)", [to_api(graph), name])
    page.wait_for_function("id => app.graph.getNodeById(id)?.widgets?.length", arg=graph.explorer.id, timeout=PATIENCE)


def open_explorer(page: Page) -> Locator:
    """Through the side bar, as a person would."""
    if not page.locator(".difflens-tab").count():
        page.get_by_role("button", name="Features: look at").click()
    page.locator(".difflens-open").click()
    dialog = page.locator("dialog.difflens-explorer")
    expect(dialog).to_be_visible(timeout=PATIENCE)
    return dialog


def run_it(dialog: Locator) -> None:
    """Run the node for its cards, and wait until they are drawn."""
    dialog.get_by_role("button", name="Run it now").click()
    expect(dialog.locator(".card .strip").first).to_be_visible(timeout=PATIENCE)
    expect(dialog.get_by_role("button", name="Cancel")).to_be_hidden(timeout=PATIENCE)


def choice(page: Page, graph: Explored) -> dict:
    text = page.evaluate(
        "id => app.graph.getNodeById(id).widgets.find(w => w.name === 'choice').value", graph.explorer.id
    )
    return json.loads(text)["features"] if text else {}


def status(dialog: Locator) -> Locator:
    return dialog.locator(".runs .status")


def shown_now(dialog: Locator) -> list[str]:
    return dialog.locator("figure").last.locator("img").evaluate_all("images => images.map(image => image.src)")


def preview(dialog: Locator) -> list[bytes]:
    """Press Preview, and return the pictures that come."""
    before = shown_now(dialog) if dialog.locator("figure").count() else []
    dialog.get_by_role("button", name="Preview").click()
    expect(dialog.get_by_role("button", name="Cancel")).to_be_hidden(timeout=PATIENCE)
    now = shown_now(dialog)
    assert now and now != before, f"no other pictures came: {status(dialog).text_content()}"
    files = [dialog.page.request.get(address).body() for address in now]  # which tell of the workflow, too
    return [Image.open(io.BytesIO(file)).convert("RGB").tobytes() for file in files]


@contextmanager
def without_errors(page: Page) -> Iterator[None]:
    errors: list[str] = []

    def note(error: Exception) -> None:
        errors.append(str(error))

    page.on("pageerror", note)
    yield
    page.remove_listener("pageerror", note)
    assert not errors and not page.evaluate("window.fell")


def test_features_are_ticked_weighed_named_previewed_saved_and_loaded_the_same(page, server, shots, request):
    graph, name = Explored(), f"seen_{request.node.callspec.id}"
    with without_errors(page):
        load(page, graph, name)
        dialog = open_explorer(page)
        run_it(dialog)
        cards = dialog.locator(".card")
        assert cards.count() == 240 and dialog.locator(".count").text_content() == "240 of 240 ticked"
        assert choice(page, graph) == {}
        first = preview(dialog)

        # All but one away, by mouse; that one named, grouped and weighed by its own fields.
        dialog.get_by_role("button", name="Untick").click()
        assert len(choice(page, graph)) == 240
        nothing = preview(dialog)
        assert nothing != first, "without any feature the pictures are others"
        card = cards.first
        number = card.get_attribute("data-feature")
        card.get_by_role("checkbox").check()
        slider = card.get_by_role("slider")
        slider.focus()
        for _ in range(10):
            slider.press("ArrowRight")
        card.locator(".name").fill(HOSTILE)
        card.locator(".name").press("Enter")
        card.locator(".group").fill("hair")
        card.locator(".group").press("Enter")
        wish = choice(page, graph)[number]
        assert wish == {"weight": 1.5, "name": HOSTILE, "group": "hair"}, "ticked is as in the recipe"
        assert dialog.locator("section .title").first.input_value() == "hair"
        card.focus()
        page.keyboard.press("f")  # where the name is text
        expect(dialog.locator(".lens")).to_contain_text(HOSTILE)
        page.keyboard.press("Escape")
        one = preview(dialog)
        assert one not in (first, nothing)
        page.screenshot(path=shots / f"explorer_{request.node.callspec.id}.png")

        # The keys: two more, beside it.
        card.focus()
        page.keyboard.press("Home")
        for _ in range(2):
            page.keyboard.press("ArrowRight")
            page.keyboard.press("Space")
        assert dialog.locator(".count").text_content() == "3 of 240 ticked"
        page.keyboard.press("-")
        last = page.evaluate("document.activeElement.dataset.feature")
        assert choice(page, graph)[last] == {"weight": 0.9}

        dialog.get_by_role("textbox", name="Name of the copy").fill(name)
        dialog.get_by_role("button", name="Save").click()
        expect(status(dialog)).to_have_text(f"Saved as {name}.safetensors.", timeout=PATIENCE)
        saved = load_recipe(server.base / "models" / "difflens_recipes" / f"{name}.safetensors")
        off = {number for number, wish in choice(page, graph).items() if wish.get("on") is False}
        assert len(saved.features) == 3 and not off & set(map(str, saved.features.tolist()))
        weights = dict(zip(map(str, saved.features.tolist()), saved.weight.tolist(), strict=True))
        assert weights[number] == 1.5 and weights[last] == pytest.approx(0.9)
        assert saved.info["named"] == {number: {"name": HOSTILE, "group": "hair"}}
        three = preview(dialog)

        # Another recipe under the same name is refused, in the dialog.
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        dialog = open_explorer(page)
        expect(dialog.locator(".count")).to_have_text("3 of 240 ticked", timeout=PATIENCE)
        dialog.get_by_role("button", name="Reset").click()
        dialog.get_by_role("textbox", name="Name of the copy").fill(name)
        dialog.get_by_role("button", name="Save").click()
        expect(status(dialog)).to_contain_text("is there already and holds another recipe", timeout=PATIENCE)
        page.keyboard.press("Escape")

        loaded = Explored(name)
        load(page, loaded, f"{name} again")
        dialog = open_explorer(page)
        run_it(dialog)
        assert dialog.locator(".count").text_content() == "3 of 3 ticked"
        card = dialog.locator(f".card[data-feature='{number}']")
        assert card.locator(".name").input_value() == HOSTILE and card.locator(".group").input_value() == "hair"
        assert card.get_by_role("slider").input_value() == "1.5"
        assert preview(dialog) == three, "a recipe draws the same once it is saved and loaded"
        page.keyboard.press("Escape")


def test_a_preview_is_cancelled_from_the_dialog_and_can_be_drawn_again(page):
    graph = Explored(steps=2000)
    load(page, graph, "long")
    dialog = open_explorer(page)
    run_it(dialog)
    dialog.get_by_role("button", name="Preview").click()
    expect(dialog.locator("progress")).to_have_js_property("max", 4000, timeout=PATIENCE)
    dialog.get_by_role("button", name="Cancel").click()
    expect(status(dialog)).to_have_text("Cancelled.", timeout=PATIENCE)
    expect(dialog.get_by_role("button", name="Cancel")).to_be_hidden()
    page.keyboard.press("Escape")


def test_a_change_draws_by_itself_where_that_is_wished(page):
    load(page, Explored(), "live")
    dialog = open_explorer(page)
    run_it(dialog)
    dialog.get_by_label("as I change").check()
    expect(dialog.locator("figure img")).to_have_count(2, timeout=PATIENCE)
    expect(dialog.get_by_role("button", name="Cancel")).to_be_hidden(timeout=PATIENCE)
    dialog.get_by_role("button", name="Untick").click()
    expect(dialog.locator("figure img")).to_have_count(4, timeout=PATIENCE)
    page.keyboard.press("Escape")


def test_what_fires_under_the_pointer_is_told(page, shots, request):
    load(page, Explored(), "hover")
    dialog = open_explorer(page)
    run_it(dialog)
    strip = dialog.locator(".card .strip").first
    lens = dialog.locator(".lens")
    box = strip.bounding_box()
    found = set()
    for share in (0.05, 0.12, 0.16, 0.2, 0.28):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.3 * box["height"])
        expect(lens).to_be_visible()
        found.add(lens.inner_text())
    assert len(found) > 1, "it depends on the place"
    page.screenshot(path=shots / f"hover_{request.node.callspec.id}.png")
    page.mouse.move(5, 5)
    expect(lens).to_be_hidden()
    card = dialog.locator(".card").first
    card.focus()
    page.keyboard.press("f")
    expect(lens).to_be_visible()
    assert card.get_attribute("data-feature") in lens.inner_text() and "marked" in card.get_attribute("class")
    page.keyboard.press("Escape")
    expect(lens).to_be_hidden()
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_hundreds_of_features_are_drawn_only_where_they_are_seen(page, shots, request):
    load(page, Explored(None), "many")
    dialog = open_explorer(page)
    run_it(dialog)
    assert dialog.locator(".count").text_content() == "0 of 500 ticked"
    assert dialog.locator(".strip").count() < 100
    took = page.evaluate(
        """() => { const box = document.querySelector('dialog .head select'), began = performance.now();
           for (const name of ['number', 'most']) { box.value = name; box.dispatchEvent(new Event('change')) }
           return performance.now() - began }"""
    )
    assert took < 3000, "two new orders of 500 cards, on a machine that is busy"
    dialog.locator(".card").last.scroll_into_view_if_needed()
    expect(dialog.locator(".card").last.locator(".strip")).to_be_visible(timeout=PATIENCE)
    assert dialog.locator(".strip").count() < 300
    page.screenshot(path=shots / f"many_{request.node.callspec.id}.png")
    page.keyboard.press("Escape")


def test_light_and_at_200_percent_everything_is_in_reach(open_page, server, shots):
    with open_page(server, {"Comfy.ColorPalette": "light", "Comfy.VueNodes.Enabled": True}) as (page, _):
        load(page, Explored(), "light")
        dialog = open_explorer(page)
        run_it(dialog)
        preview(dialog)
        page.screenshot(path=shots / "explorer_light.png")
        page.set_viewport_size({"width": 800, "height": 500})  # what is left of 1600 x 1000
        page.screenshot(path=shots / "explorer_200.png")
        wider = dialog.evaluate("""dialog => [...dialog.querySelectorAll('*')].filter(
            found => found.getClientRects().length && found.getBoundingClientRect().right > innerWidth + 1).length""")
        assert not wider
        for label in ("Preview", "Save", "Untick", "Close"):
            dialog.get_by_role("button", name=label, exact=True).scroll_into_view_if_needed()
        dialog.locator(".card").nth(5).scroll_into_view_if_needed()
        page.screenshot(path=shots / "explorer_200_cards.png")
    server.request("/settings/Comfy.ColorPalette", b'"dark"')
