"""The pack as a new user meets it: from the templates or a graph of one's own to the first debiased picture."""

from __future__ import annotations

import json
import time

import pytest
from graphs import FOLDER, sampler, to_api
from host import PACK_NAME
from small_graphs import NAMES, Avatars, latents

PICTURE = "[...document.querySelectorAll('img')].some(image => image.naturalWidth > 200 && image.src.includes('/view'))"
DRAWN = 180_000  # milliseconds in which a run ends
STOCK = {  # a graph such as a user has: nothing of ours but the loader of the model
    "1": {"class_type": "DiffLensLoadPromptedModel", "inputs": {"model_name": "prompted_avatars.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "portrait of a doctor", "clip": ["1", 1]}},
    "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
    "4": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 7,
            "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        },
    },
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
    "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
}  # fmt: skip
# What the server tells of a node that is done and showed the time left and a chart that grew, as its last picture is.
END = """async () => {
  const {api} = await import('/scripts/api.js')
  const nodeId = String(app.graph.nodes.find(node => node.type === 'DiffLensDebias').id)
  const preview = {blob: new Blob(['chart']), nodeId, displayNodeId: nodeId, jobId: 'job'}
  api.dispatchCustomEvent('b_preview_with_metadata', preview)
  if (!app.nodePreviewImages[nodeId]) throw new Error('the page shows no preview')
  api.dispatchCustomEvent('progress_text', {nodeId, text: ''})
  const images = [{filename: 'chart.png', type: 'temp', subfolder: ''}]
  api.dispatchCustomEvent('executed', {node: nodeId, display_node: nodeId, output: {images}, prompt_id: 'job'})
}"""
SLOT = """([type, kind, slot]) => {
  const node = app.graph.nodes.find(node => node.type === type)
  const [x, y] = node.getConnectionPos(kind === 'input', node[`${kind}s`].findIndex(one => one.name === slot))
  const {scale, offset} = app.canvas.ds
  return [(x + offset[0]) * scale, (y + offset[1]) * scale]
}"""

SETTLED = """() => new Promise(resolve => {
  let last = '', since = 0
  const look = now => {
    const at = JSON.stringify([app.canvas.ds.offset, app.canvas.ds.scale, app.graph.nodes.map(node => [...node.pos])])
    if (at !== last) { last = at; since = now }
    now - since > 300 ? resolve() : requestAnimationFrame(look)
  }
  requestAnimationFrame(look)
})"""  # a node that hangs on the mouse follows it frame by frame

# Puts the blueprint between the loaders and the sampler, and tells what it holds.
CONNECT = """() => {
  const placed = app.graph.nodes.find(node => node.subgraph), all = [placed, ...placed.subgraph.nodes]
  const known = all.slice(1).every(node => node.type in LiteGraph.registered_node_types)
  const by = type => app.graph.nodes.find(node => node.type === type)
  const link = (node, output, input) => node.connect(output, placed, placed.inputs.findIndex(one => one.name === input))
  for (const [output, input] of ['model', 'positive', 'vae'].entries()) link(by('DiffLensLoadModel'), output, input)
  link(by('EmptyLatentImage'), 0, 'latent_image')
  link(by('DiffLensLoadClassifier'), 0, 'classifier')
  placed.connect(0, by('KSampler'), 0)
  return {known, red: all.some(node => node.has_errors), values: placed.widgets.map(widget => widget.value)}
}"""


@pytest.fixture(scope="module")
def canvas(open_page, server):
    """A page as it is after a first start, in the way that it draws unless told otherwise."""
    with open_page(server, {"Comfy.VueNodes.Enabled": False}) as (page, _):
        page.set_default_timeout(60_000)
        yield page


def fewer(page) -> None:
    """Two pictures in two steps, so that a run is short; not one of the clicks that are counted."""
    page.evaluate(
        """() => { const each = graph => graph.nodes.forEach(node => { if (node.subgraph) each(node.subgraph)
             for (const widget of node.widgets ?? []) if (['pictures', 'batch_size', 'steps'].includes(widget.name))
               widget.value = 2 }); each(app.graph) }"""
    )


def wait_until_running(server, running: bool = True) -> None:
    """Wait until the server runs a workflow, or none. A function that the page waits for may not be an async one."""
    end = time.monotonic() + DRAWN / 1000
    while bool(json.loads(server.request("/queue"))["queue_running"]) != running:
        assert time.monotonic() < end, f"running is not {running}"
        time.sleep(0.1)


def search(page, words: str, found: str) -> None:
    """Type words into the search box for nodes, and wait until `found` is among the results."""
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.keyboard.type(words)
    page.get_by_test_id("result-item").filter(has_text=found).first.wait_for()


def put_from_search(page, words: str, found: str, is_it: str, x: int, y: int) -> None:
    """Put the first result at a place of the screen; is_it: what is true of this `node` alone, in JavaScript."""
    search(page, words, found)
    page.keyboard.press("Enter")
    page.wait_for_function(f"app.graph.nodes.some(node => {is_it})")
    page.mouse.move(x, y, steps=5)
    page.evaluate(SETTLED)
    page.mouse.click(x, y)
    page.evaluate(SETTLED)


def open_templates(page) -> None:
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Templates").first.click()
    page.get_by_text(PACK_NAME, exact=True).first.wait_for()


def test_three_clicks_from_the_templates_to_the_first_picture(canvas, shots):
    open_templates(canvas)
    canvas.get_by_text(PACK_NAME, exact=True).first.click()  # 1: the pack among the extensions
    card = canvas.get_by_test_id(f"template-workflow-{NAMES[0]}")
    card.wait_for()
    canvas.screenshot(path=str(shots / "templates.png"))
    card.click()  # 2: the starter
    canvas.wait_for_function("app.graph.nodes.some(node => node.type === 'DiffLensDebias')")
    fewer(canvas)
    canvas.get_by_test_id("queue-button").click()  # 3: Run
    canvas.wait_for_function(
        "app.graph.nodes.find(node => node.type === 'DiffLensCompare').imgs?.length", timeout=DRAWN
    )
    canvas.screenshot(path=str(shots / "first picture.png"))
    text = canvas.locator(".dom-widget", has_text="Recipe for presentation").locator(".overflow-y-auto")
    hidden = text.evaluate("box => box.scrollHeight - box.clientHeight")
    assert "Licence" in text.inner_text() and hidden <= 0, f"{hidden} pixels of what Debias says are not seen"
    canvas.evaluate(END)
    canvas.wait_for_function("!app.graph.nodes.some(node => node.widgets?.some(one => one.name.startsWith('$$node')))")
    canvas.wait_for_function("!Object.keys(app.nodePreviewImages).length")


def test_the_panel_at_the_right_shows_the_shares_of_the_recipe_that_is_chosen(canvas, open_panel):
    canvas.keyboard.press("Escape")
    canvas.evaluate("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('DiffLensDebias')) }")
    with open_panel(canvas, "app.graph.nodes[0]") as panel:
        for name, value in (("recipe", "avatars_presentation.safetensors"), ("mix", "own shares")):
            panel.get_by_role("combobox", name=name, exact=True).click()
            canvas.get_by_role("option", name=value, exact=True).click()
        panel.get_by_role("spinbutton", name="feminine %").click()
        canvas.keyboard.press("Control+a")
        canvas.keyboard.type("7")
        canvas.keyboard.press("Enter")
        told = canvas.evaluate("app.graph.nodes[0].widgets.map(widget => widget.value)")
    assert told == ["avatars_presentation.safetensors", "own shares", 50, 7, 1]


@pytest.mark.parametrize(
    ("query", "name"),
    [("difflens", 0), ("fairness", 0), ("diversity", 0), ("bias", 1), ("SAE", 2), ("stereotype", 4)],
)
def test_the_templates_are_found(canvas, query, name):
    open_templates(canvas)
    canvas.get_by_role("dialog").get_by_role("textbox").first.fill(query)
    canvas.get_by_test_id(f"template-workflow-{NAMES[name]}").wait_for()
    canvas.keyboard.press("Escape")


@pytest.mark.parametrize("query", ["gender", "race", "skin", "representation", "inclusive", "same face", "stereotype"])
def test_the_node_is_found_by_the_words_of_an_artist(canvas, query):
    canvas.keyboard.press("Escape")
    search(canvas, query, "Debias")
    canvas.keyboard.press("Escape")


def test_five_clicks_from_a_graph_of_ones_own_to_the_first_picture(canvas, shots):
    canvas.keyboard.press("Escape")
    canvas.evaluate("async graph => { app.loadApiJson(graph, 'mine') }", STOCK)
    canvas.wait_for_function("app.graph.nodes.length === 6")
    canvas.evaluate(
        """() => { let x = 100; for (const node of app.graph.nodes) { node.pos = [x, 600]; x += 430 }
             app.canvas.ds.scale = 0.55; app.canvas.ds.offset = [60, 100]; app.canvas.setDirty(true, true) }"""
    )
    canvas.mouse.move(600, 200)
    # 1: the search box, which a double click opens; by its command it listens at once. 2: where the node shall be
    put_from_search(canvas, "debias", "Debias", "node.type === 'DiffLensDebias'", 400, 200)
    for origin, target in (
        (("DiffLensLoadPromptedModel", "output", "MODEL"), ("DiffLensDebias", "input", "model")),  # 3
        (("DiffLensDebias", "output", "MODEL"), ("KSampler", "input", "model")),  # 4
    ):
        (x, y), (to_x, to_y) = (canvas.evaluate(SLOT, list(slot)) for slot in (origin, target))
        canvas.mouse.move(x, y)
        canvas.mouse.down()
        canvas.mouse.move((x + to_x) / 2, (y + to_y) / 2, steps=4)
        canvas.mouse.move(to_x, to_y, steps=4)
        canvas.mouse.up()
    sent = canvas.evaluate("async () => (await app.graphToPrompt()).output")
    (debias,) = [node_id for node_id, node in sent.items() if node["class_type"] == "DiffLensDebias"]
    canvas.screenshot(path=str(shots / "own graph.png"))
    assert sent[debias]["inputs"]["model"] == ["1", 0] and sent["4"]["inputs"]["model"] == [debias, 0]
    canvas.evaluate(  # the graph is the small model's, and the list begins with another's recipe
        """() => { const widget = app.graph.nodes.find(node => node.type === 'DiffLensDebias').widgets[0]
             widget.value = 'prompted_avatars_presentation.safetensors'; widget.callback?.(widget.value) }"""
    )
    canvas.evaluate("app.graph.nodes.find(node => node.type === 'PreviewImage').imgs = undefined")
    canvas.get_by_test_id("queue-button").click()  # 5: Run
    canvas.wait_for_function("app.graph.nodes.find(node => node.type === 'PreviewImage').imgs?.length", timeout=DRAWN)


@pytest.mark.parametrize(
    ("values", "sent"),
    [
        (["from_kai.safetensors", "even mix", 0.7], {"recipe": "from_kai.safetensors", "strength": 0.7}),
        (["from_kai.safetensors", "own shares", 20, 80, 0.7], {"recipe": "from_kai.safetensors", "strength": 0.7}),
        (  # saved while it was missing, and put into its folder since
            ["avatars_age.safetensors", 0.7],
            {"recipe": "avatars_age.safetensors", "recipe.mix": "even mix", "strength": 0.7},
        ),
    ],
)
def test_a_graph_with_a_recipe_that_is_not_here_keeps_its_strength(canvas, values, sent):
    canvas.keyboard.press("Escape")
    graph = json.loads((FOLDER / f"{NAMES[1]}.json").read_text(encoding="utf-8"))
    (node,) = [node for node in graph["nodes"] if node["type"] == "DiffLensDebias"]
    node["widgets_values"] = values
    canvas.evaluate("graph => app.loadGraphData(graph, true, true, 'shared')", graph)
    found = canvas.evaluate("async () => (await app.graphToPrompt()).output")[str(node["id"])]["inputs"]
    assert {name: value for name, value in found.items() if name != "model"} == sent


def test_cancel_in_the_page_ends_a_workflow_and_the_server_goes_on(canvas, server):
    canvas.keyboard.press("Escape")
    file = json.loads((server.pack / "workflows" / f"{NAMES[3]}.json").read_text(encoding="utf-8"))
    canvas.evaluate("async file => { await app.loadGraphData(file) }", file)
    seen = set(json.loads(server.request("/history")))
    canvas.get_by_test_id("queue-button").click()
    wait_until_running(server)
    canvas.get_by_role("button", name="Cancel current run").first.click()
    wait_until_running(server, False)
    (entry,) = [entry for id_, entry in json.loads(server.request("/history")).items() if id_ not in seen]
    assert "execution_interrupted" in [kind for kind, _ in entry["status"]["messages"]], "the run was not cancelled"

    graph = Avatars()
    unsteered = graph.save(sampler(graph, None, graph.model[0], graph.model[1], graph.latent, 3))
    assert latents(server, server.run(to_api(graph)), unsteered).std() > 0.1


def test_the_blueprint_is_found_fits_a_graph_and_runs(canvas, server, shots):
    """Its run is cancelled once it has begun: the same nodes run to their end in the test of workflow 02."""
    (file,) = (json.loads(path.read_text(encoding="utf-8")) for path in (server.pack / "subgraphs").glob("*.json"))
    canvas.keyboard.press("Escape")
    own = Avatars(8)
    preview = own.add("PreviewImage", images=own.pictures(own.draw())[0])
    canvas.evaluate("graph => app.loadApiJson(graph, 'for the blueprint')", to_api(own))
    canvas.wait_for_function("id => app.graph.getNodeById(id)", arg=preview.id)
    put_from_search(canvas, "find and debias", "DiffLens find and debias", "node.subgraph", 700, 300)
    placed = canvas.evaluate(CONNECT)
    canvas.screenshot(path=str(shots / "blueprint.png"))
    assert placed["values"] == file["nodes"][0]["widgets_values"]
    assert placed["known"] and not placed["red"]
    canvas.get_by_test_id("queue-button").click()
    wait_until_running(server)
    assert not canvas.evaluate("app.lastNodeErrors"), "what the server says of the nodes"
    canvas.get_by_role("button", name="Cancel current run").first.click()
    wait_until_running(server, False)


def test_a_workflow_in_app_mode_is_a_form_that_draws(canvas, shots):
    canvas.keyboard.press("Escape")
    open_templates(canvas)
    canvas.get_by_text(PACK_NAME, exact=True).first.click()
    canvas.get_by_test_id(f"template-workflow-{NAMES[1]}").click()
    form = canvas.get_by_test_id("linear-widgets")
    form.wait_for()
    shown = form.inner_text().split("\n")
    for label in ("recipe", "mix", "strength", "seed", "pictures"):
        assert label in shown, f"the form does not ask for {label}: {shown}"
    fewer(canvas)
    canvas.screenshot(path=str(shots / "form before.png"))
    canvas.get_by_role("button", name="Run", exact=True).last.click()
    canvas.wait_for_function(PICTURE, timeout=DRAWN)
    canvas.screenshot(path=str(shots / "form.png"))
