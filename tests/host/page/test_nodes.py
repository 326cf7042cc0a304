"""Every node in ComfyUI's page: its sockets and widgets are there, and keep what is set, in both renderers."""

from __future__ import annotations

import pytest

MOUNT = """async names => {
  app.graph.clear()
  const nodes = names.map((name, i) => {
    const node = LiteGraph.createNode(name)
    node.pos = [400 * (i % 6), 700 * Math.floor(i / 6)]
    app.graph.add(node)
    return node
  })
  app.canvas.ds.scale = 0.5  // so that the Vue renderer draws the widgets, too
  app.canvas.ds.offset = [100, 100]
  await new Promise(done => setTimeout(done, 1500))
  return Object.fromEntries(nodes.map(node => [node.type, {
    inputs: node.inputs.map(input => input.name), outputs: node.outputs.map(output => output.name),
    widgets: (node.widgets ?? []).map(widget => widget.name),
    drawn: Boolean(document.querySelector(`[data-node-id="${node.id}"]`)),
  }]))
}"""
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
# Sets every widget to something else, and what a choice brings as well; returns what each node was told, by its id.
SET = """() => {
  const other = widget => {
    const values = widget.options?.values
    const list = typeof values === 'function' ? values(widget) : values
    if (Array.isArray(list)) return list.at(-1) === widget.value ? list[0] : list.at(-1)
    if (typeof widget.value === 'boolean') return !widget.value
    if (typeof widget.value !== 'number') return 'a <b>line</b>\\nand another'
    const {min = 0, max = 100, step2 = 1} = widget.options
    return widget.value + step2 <= max ? widget.value + step2 : widget.value - step2
  }
  for (const node of app.graph.nodes) {
    const done = new Set()
    for (let widget; (widget = (node.widgets ?? []).find(one => !done.has(one.name)));) {
      done.add(widget.name)
      if (widget.type === 'button') continue
      widget.value = other(widget)
      widget.callback?.(widget.value, app.canvas, node)
    }
  }
}"""
TOLD = """() => Object.fromEntries(app.graph.nodes.map(node => [`${node.type} ${node.id}`,
  Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value]))]))"""
SAVE_AND_OPEN = """async () => {
  const file = JSON.stringify(app.graph.serialize())
  app.graph.clear()
  await app.loadGraphData(JSON.parse(file))
}"""


@pytest.fixture(scope="module")
def ours(object_info) -> dict[str, dict]:
    return {name: info for name, info in object_info.items() if name.startswith("DiffLens")}


@pytest.fixture(scope="module")
def mounted(page, ours) -> dict[str, dict]:
    """All our nodes in one graph, and what the page shows of each."""
    return page.evaluate(MOUNT, list(ours))


def test_every_node_has_the_sockets_and_widgets_that_it_declares(mounted, ours, renderer):
    """A widget that the page cannot draw would be missing without a word."""
    for name, info in ours.items():
        declared = info["input"].get("required", {}) | info["input"].get("optional", {})
        kinds = {key: kind for key, (kind, *_) in declared.items()}
        seen = {kind: {one.partition(".")[0] for one in mounted[name][kind]} for kind in ("inputs", "widgets")}
        set_by_hand = {key for key, kind in kinds.items() if kind in WIDGETS}  # these have a socket as well
        missing = (set_by_hand - seen["widgets"]) | (kinds.keys() - seen["inputs"])
        assert not missing, f"{name}: the page does not show {', '.join(sorted(missing))}"
        assert mounted[name]["outputs"] == info["output_name"], name
        assert mounted[name]["drawn"] == (renderer == "Vue"), name


def test_every_widget_keeps_what_it_is_set_to(page, mounted, ours):
    before = page.evaluate(TOLD)
    page.evaluate(SET)
    told = page.evaluate(TOLD)
    page.evaluate(SAVE_AND_OPEN)
    kept = page.evaluate(TOLD)
    assert len(told) == len(ours) and kept.keys() == told.keys()
    for node, widgets in told.items():
        assert kept[node] == widgets, f"{node}: saved and opened again, its widgets differ"
    changed = [
        (node, name) for node, widgets in before.items() for name in widgets if told[node][name] != widgets[name]
    ]
    assert len(changed) > 100, "the test itself sets nothing"
    assert told[next(node for node in told if node.startswith("DiffLensDebias"))]["recipe.mix"] == "own shares"


def test_the_page_speaks_the_language_that_is_set(open_page, server):
    """Names of nodes, sockets and widgets, and our own button."""
    try:
        with open_page(server, {"Comfy.Locale": "zh"}) as (page, _):
            page.wait_for_function("LiteGraph.registered_node_types.DiffLensDebias.title === '去偏见'")
            debias, explore = page.evaluate(
                """() => ['DiffLensDebias', 'DiffLensExplore'].map(name => {
                  const node = LiteGraph.createNode(name)
                  return [...node.inputs, ...node.outputs].map(one => one.localized_name)
                    .concat(node.widgets.map(one => one.label ?? one.name))
                })"""
            )
    finally:
        server.request("/settings/Comfy.Locale", b'"en"')
    assert {"模型", "目标", "配方", "比例", "强度"} <= set(debias)
    assert {"激活值", "图片表", "浏览特征…"} <= set(explore)
