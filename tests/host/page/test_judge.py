"""Judge by Eye in ComfyUI's page: pairs are judged by keyboard, blind, and end up in the file and in the report."""

from __future__ import annotations

import re

import pytest
from graphs import to_ui
from judged import NAMES, Pairs, rows
from playwright.sync_api import Page, expect

WAIT = 120_000
PICTURES = 6
# Whether the left and the right picture of the pair on the screen are red, as a person sees it.
LOOK = """() => Promise.all([...document.querySelectorAll('.difflens-judge img')].map(async image => {
  await image.decode();
  const canvas = Object.assign(document.createElement('canvas'), {width: 4, height: 4});
  canvas.getContext('2d').drawImage(image, 0, 0, 4, 4);
  const [red, , blue] = canvas.getContext('2d').getImageData(1, 1, 1, 1).data;
  return red > blue }))"""
BUTTON = """id => { const node = app.graph.getNodeById(id), {ds, canvas} = app.canvas;
  const button = node.widgets.find(widget => widget.type === 'button'), frame = canvas.getBoundingClientRect();
  return [(node.pos[0] + node.size[0] / 2 + ds.offset[0]) * ds.scale + frame.left,
          (node.pos[1] + button.last_y + 10 + ds.offset[1]) * ds.scale + frame.top] }"""


def run(page: Page) -> None:
    """Press Run and wait until there are new pairs."""
    page.evaluate("() => { window.judging = []; return app.queuePrompt(0) }")
    page.wait_for_function("() => window.judging.length", timeout=WAIT)


def look_at(page: Page, judge: int) -> None:
    """Bring the node to the middle of the screen, in full size."""
    page.evaluate(
        """id => { const {canvas} = app; canvas.ds.scale = 1; canvas.centerOnNode(app.graph.getNodeById(id));
                   canvas.setDirty(true, true) }""",
        judge,
    )
    page.wait_for_timeout(1000)


def press_the_button(page: Page, judge: int) -> None:
    look_at(page, judge)
    shown = page.get_by_role("button", name="Judge the pairs")
    if shown.count():
        shown.click()
    else:
        page.mouse.click(*page.evaluate(BUTTON, judge))
    expect(page.locator(".difflens-judge")).to_be_visible()


def begin(page: Page, judge: int, name: str) -> None:
    press_the_button(page, judge)
    page.keyboard.press("Control+a")
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    expect(page.locator(".difflens-judge .pictures")).to_be_visible()


@pytest.fixture
def judge(page: Page, object_info: dict, request) -> tuple[int, str]:
    """The id of the node in a graph that is open and was run, and the name of its file."""
    name = "page_" + re.sub(r"\W", "", request.node.name)[-30:]
    graph = Pairs(PICTURES, save_as=name)
    page.evaluate("graph => app.loadGraphData(graph)", to_ui(graph, object_info))
    page.evaluate(
        """id => { window.judging = []; app.api.addEventListener('executed', ({detail}) => {
             if (detail.node == id) window.judging.push(detail.output) }) }""",
        str(graph.judge.id),
    )
    run(page)
    return graph.judge.id, name


def test_pairs_are_judged_by_keyboard_and_counted(page: Page, server, judge, shots, open_panel, request):
    node, name = judge
    path, way = server.output_dir / f"{name}.csv", request.node.callspec.params["page_and_console"]
    press_the_button(page, node)
    page.screenshot(path=shots / f"judge_start_{way}.png")
    page.keyboard.press("Escape")
    expect(page.locator(".difflens-judge")).to_have_count(0)
    with open_panel(page, f"app.graph.getNodeById({node})") as panel:
        panel.get_by_role("button", name="Judge the pairs").click()
        expect(page.locator(".difflens-judge")).to_be_visible()
        page.keyboard.press("Escape")

    page.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", node)
    behind = "[app.graph.nodes.length, app.extensionManager.sidebarTab.activeSidebarTabId]"
    before = page.evaluate(behind)
    begin(page, node, "anna")
    page.keyboard.press("n")  # the page's own key for its library of nodes
    expect(page.locator(".difflens-judge header")).to_contain_text(f"Pair 1 of {PICTURES}, 0 judged")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Say which looks better first")
    expected, seen = [], []
    for place in range(PICTURES):
        left, right = page.evaluate(LOOK)
        assert left != right
        seen.append(left)
        better = ("second", "neither", "first")[place % 3]
        key = "=" if better == "neither" else "ArrowLeft" if left == (better == "first") else "ArrowRight"
        page.keyboard.press(key)
        if place == 0:
            page.keyboard.press("Enter")
            expect(page.get_by_role("alert")).to_contain_text("Say what differs first")
        page.keyboard.press("2")
        page.keyboard.press("0")  # nothing: takes the 2 away
        if better != "neither":
            page.keyboard.press("1")
            page.keyboard.press("3")
        if place == 1:
            page.screenshot(path=shots / f"judge_pair_{way}.png")
        page.keyboard.press("Enter")
        expected.append((better, "nothing" if better == "neither" else "attribute hair"))
        if place == 2:  # stop, and take it up again
            expect(page.locator(".difflens-judge header")).to_contain_text(f"Pair 4 of {PICTURES}, 3 judged")
            page.keyboard.press("Escape")
            begin(page, node, "anna")
        if place + 1 < PICTURES:
            expect(page.locator(".difflens-judge header")).to_contain_text(f"Pair {place + 2} of {PICTURES}")
    expect(page.locator(".difflens-judge header")).to_contain_text(f"All {PICTURES} pairs judged")
    page.screenshot(path=shots / f"judge_end_{way}.png")
    assert [(row["better"], row["changed"]) for row in rows(path)] == expected
    assert seen.count(True) == PICTURES // 2 and {row["judge"] for row in rows(path)} == {"anna"}

    # Back to the last one, and another mind.
    page.keyboard.press("Backspace")
    expect(page.locator(".difflens-judge header")).to_contain_text(f"Pair {PICTURES} of {PICTURES}, {PICTURES} judged")
    pressed = page.locator(".difflens-judge .pictures button[aria-pressed=true]")
    assert pressed.get_attribute("data-side") == ("left" if page.evaluate(LOOK)[0] else "right")
    page.keyboard.press(" ")
    page.keyboard.press("Enter")
    expect(page.locator(".difflens-judge header")).to_contain_text(f"All {PICTURES} pairs judged")
    page.locator(".difflens-judge").get_by_role("button", name="Close").click()
    assert page.evaluate(behind) == before, "the page behind heard no key"

    run(page)
    (output,) = page.evaluate("window.judging")
    assert output["text"][0].splitlines()[0] == (
        f"To 1 person who did not know which is which, {NAMES[0]} looks better in 1 of {PICTURES} pairs, {NAMES[1]} in "
        "2, and 3 show no difference (p of no preference = 1.000)."
    )
    look_at(page, node)
    page.screenshot(path=shots / f"judge_node_{way}.png")


def test_nothing_in_the_page_tells_which_picture_is_which(page: Page, judge):
    node, _ = judge
    said, orders = [], []
    page.on("response", lambda reply: said.append(reply) if "judging" in reply.url else None)
    for name in ("ben", "eve", "kim"):
        begin(page, node, name)
        order = []
        for place in range(PICTURES):
            left, _ = page.evaluate(LOOK)
            order.append(left)
            dialog = page.locator(".difflens-judge").evaluate("dialog => dialog.outerHTML")
            assert not re.search("|".join([*NAMES, "first|second", "red|blue", "by_eye"]), dialog.lower())
            page.keyboard.press("=")
            page.keyboard.press("0")
            page.keyboard.press("Enter")
            if place + 1 < PICTURES:
                expect(page.locator(".difflens-judge header")).to_contain_text(f"Pair {place + 2} of")
        expect(page.locator(".difflens-judge header")).to_contain_text("All")
        page.keyboard.press("Escape")
        orders.append(order)
    assert all(order.count(True) == PICTURES // 2 for order in orders) and len({*map(tuple, orders)}) > 1
    listed = [reply for reply in said if "/difflens/" in reply.url]
    shown = [reply.url for reply in said if "/view?" in reply.url]
    assert listed and shown
    for reply in listed:
        assert not re.search("|".join([*NAMES, "first|second"]), reply.text())
    names = [re.search(r"filename=([^&]+)", url)[1] for url in shown]
    assert all(re.fullmatch(r"[0-9a-f]{16}\.png", name) for name in names) and len({*names}) == 2 * PICTURES


def test_it_can_be_read_in_a_light_theme_and_enlarged(page: Page, judge, shots, request):
    node, _ = judge
    way = request.node.callspec.params["page_and_console"]
    begin(page, node, "lou")
    page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
    page.wait_for_timeout(1000)
    page.screenshot(path=shots / f"judge_light_{way}.png")
    page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    size = page.viewport_size
    page.set_viewport_size({"width": size["width"] // 2, "height": size["height"] // 2})  # as at 200 %
    for side in ("left", "right"):
        box = page.locator(f".difflens-judge .pictures button[data-side={side}]").bounding_box()
        assert box["width"] > 150 and box["height"] >= 150
    page.locator(".difflens-judge").get_by_role("button", name="Next").scroll_into_view_if_needed()
    page.screenshot(path=shots / f"judge_small_{way}.png")
    wide = page.locator(".difflens-judge").evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")
    page.set_viewport_size(size)
    page.keyboard.press("Escape")
    assert wide
