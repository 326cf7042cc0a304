"""Every node in ComfyUI's page: its sockets and widgets are there, in both renderers."""

from __future__ import annotations


def test_every_node_has_the_sockets_and_widgets_that_it_declares(page, object_info):
    """A widget that the page cannot draw would be missing without a word."""
    nodes = {name: info for name, info in object_info.items() if name.startswith("DiffLens")}
    found = page.evaluate(
        """names => { app.graph.clear(); return Object.fromEntries(names.map(name => {
             const node = LiteGraph.createNode(name); app.graph.add(node);
             return [name, {inputs: node.inputs.map(i => i.name), outputs: node.outputs.map(o => o.name),
                            widgets: (node.widgets ?? []).map(w => w.name)}] })) }""",
        list(nodes),
    )
    for name, info in nodes.items():
        declared = [*info["input"].get("required", {}), *info["input"].get("optional", {})]
        shown = {seen.partition(".")[0] for kind in ("inputs", "widgets") for seen in found[name][kind]}
        missing = set(declared) - shown
        assert not missing, f"{name}: the page does not show {', '.join(sorted(missing))}"
        assert found[name]["outputs"] == info["output_name"], name
