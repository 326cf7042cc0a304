"""Every shipped workflow as it opens in ComfyUI's page, from the templates, in both renderers."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from graphs import FOLDER
from host import PACK_NAME
from small_graphs import NAMES, api_file

BROUGHT = {name for name in NAMES if name[:2] in ("05", "06", "11")}  # want weights that do not come with the pack
LETTERS = 10  # pixels: as high as the text of a note is at least
OPEN = """async ([pack, name]) => {
  const file = await (await fetch(`/api/workflow_templates/${pack}/${encodeURIComponent(name)}.json`)).json()
  await app.loadGraphData(file, true, true, name, {openSource: 'template'})
  return Boolean(document.querySelector('[data-testid="linear-widgets"]'))
}"""
SETTLED = """() => new Promise(done => { let left = 12; const next = () => left-- ? requestAnimationFrame(next) : done()
  next() })"""
LOOK = """() => {
  const scale = app.canvas.ds.scale
  const boxes = Object.fromEntries(app.graph.nodes.map(node => {
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
    node.updateArea()
    const [x, y, width, height] = node.boundingRect, [left, top] = app.canvas.ds.offset
    return [`${node.title} (${node.id})`, drawn
      ? [drawn.x, drawn.y, drawn.width, drawn.height]
      : [(x + left) * scale, (y + top) * scale, width * scale, height * scale]]
  }))
  const note = document.querySelector('.comfy-markdown-content, .comfy-markdown')
  const text = note.querySelector('p') ?? note
  const seen = note.getBoundingClientRect()
  return {
    boxes,
    note: {
      letters: parseFloat(getComputedStyle(text).fontSize) * seen.height / note.offsetHeight,
      box: [seen.x, seen.y, seen.width, seen.height],
      hidden: note.scrollHeight - note.clientHeight,
    },
    unknown: app.graph.nodes.map(node => node.type).filter(type => !(type in LiteGraph.registered_node_types)),
    red: app.graph.nodes.filter(node => node.has_errors).map(node => node.type),
    links: app.graph.nodes.flatMap(node => node.inputs ?? []).filter(one => app.graph.links.has(one.link)).length,
    values: Object.fromEntries(app.graph.serialize().nodes.map(node => [node.id, node.widgets_values ?? []])),
  }
}"""

# Reads the help of every node of ours in the page, as it opens from the node.
HELP = """async () => {
  app.graph.clear()
  const until = async look => { while (!look()) await new Promise(requestAnimationFrame) }
  for (const name of Object.keys(LiteGraph.registered_node_types).filter(name => name.startsWith('DiffLens'))) {
    const node = LiteGraph.createNode(name)
    app.graph.add(node)
    app.canvas.deselectAll()
    app.canvas.selectNode(node)
    await until(() => document.querySelector('[data-testid="info-button"]'))
    document.querySelector('[data-testid="info-button"]').click()
    const read = () => document.querySelector('.node-help-content')
    await until(() => read()?.innerText.startsWith(node.title) && [...read().querySelectorAll('img')].every(
      image => image.complete))
  }
}"""


@pytest.fixture(scope="module")
def looks(page, renderer, shots) -> dict[str, dict]:
    """What the page shows of every workflow, by name."""
    found = {}
    for name in NAMES:
        as_form = page.evaluate(OPEN, [PACK_NAME, name])
        if as_form:
            page.evaluate("app.extensionManager.command.execute('Comfy.ToggleLinear')")
        page.evaluate(SETTLED)
        found[name] = page.evaluate(LOOK) | {"as_form": as_form}
        found[name]["prompt"] = page.evaluate("async () => (await app.graphToPrompt()).output")
        page.screenshot(path=str(shots / f"{renderer} {name}.png"))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_missing(looks, name):
    file = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert not looks[name]["unknown"], f"the page does not know {looks[name]['unknown']}"
    assert not looks[name]["red"] or name in BROUGHT, f"marked as faulty: {looks[name]['red']}"
    assert looks[name]["links"] == len(file["links"]), "links were lost"
    for node in file["nodes"]:
        assert looks[name]["values"][str(node["id"])] == node["widgets_values"], node.get("title", node["type"])


@pytest.mark.parametrize("name", NAMES)
def test_the_page_sends_what_the_file_for_programs_holds(looks, name):
    def told(prompt: dict) -> dict:
        return {node_id: (node["class_type"], node["inputs"]) for node_id, node in prompt.items()}

    assert told(looks[name]["prompt"]) == told(api_file(name))


@pytest.mark.parametrize("name", NAMES)
def test_no_node_lies_on_another(looks, name):
    for (a, (ax, ay, aw, ah)), (b, (bx, by, bw, bh)) in combinations(looks[name]["boxes"].items(), 2):
        over = min(ax + aw, bx + bw) - max(ax, bx), min(ay + ah, by + bh) - max(ay, by)
        assert min(over) <= 1, f"{a} and {b} overlap by {over[0]:.0f} x {over[1]:.0f} pixels"


def on_screen(box: list[float]) -> bool:
    """Whether all of a box can be seen, right of the page's side bar and below its tabs."""
    x, y, width, height = box
    return x >= 60 and y >= 90 and x + width <= 1600 and y + height <= 1000


@pytest.mark.parametrize("name", NAMES)
def test_what_to_read_and_what_to_set_first_can_be_read(looks, name):
    note, boxes = looks[name]["note"], looks[name]["boxes"]
    assert note["letters"] >= LETTERS - 0.1, f"letters are {note['letters']:.1f} pixels high"
    assert on_screen(note["box"]), f"the note lies at {note['box']}"
    assert note["hidden"] <= 1, f"{note['hidden']} pixels of the note are below its edge"
    seen = [title for title, box in boxes.items() if on_screen(box)]
    assert len(seen) >= 3, f"only {seen} can be seen"


def test_the_console_says_nothing_that_a_bare_host_does_not(page, looks, beyond_bare):
    """With every workflow opened, the help of every node read, and the templates listed."""
    page.evaluate(HELP)
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_text(PACK_NAME, exact=True).first.click()
    page.get_by_test_id(f"template-workflow-{NAMES[-1]}").scroll_into_view_if_needed()
    page.wait_for_load_state("networkidle")
    page.keyboard.press("Escape")
    beyond = beyond_bare()
    assert not beyond, f"the console says what a bare host's does not: {beyond}"


def test_one_opens_as_a_form(looks):
    assert [name for name in NAMES if looks[name]["as_form"]] == [NAMES[1]]
