"""A graph as ComfyUI's page opens it: every node with its sockets, widgets, size and place."""

from __future__ import annotations

import itertools
import uuid

from .graph import NOTE, Graph, Node

AFTER_SEED = "fixed"  # value of the widget "control after generate", which ComfyUI puts below a seed

# Pixels on ComfyUI's canvas.
WIDTH, TITLE, SLOT, WIDGET, PADDING = 320, 30, 22, 26, 20
GAP, GROUP_GAP, GROUP_TITLE = 60, 60, 60
# Type or title: (width, height beyond its slots and widgets). The large ones draw a picture or text on themselves.
SIZES = {
    NOTE: (400, 540),
    "DiffLensCompare": (760, 560),
    "DiffLensTrainSAE": (460, 300),
    "DiffLensTrainProbes": (460, 300),
    "DiffLensAttribute": (460, 300),
    "DiffLensReport": (520, 340),
    "DiffLensSiteScan": (560, 340),
    "DiffLensRankByEffect": (560, 340),
    "DiffLensExplore": (560, 620),
    "DiffLensCalibrate": (560, 340),
    "DiffLensCrossEffects": (560, 340),
    "DiffLensDiagnose": (760, 480),
    "PreviewAny": (520, 260),
    "The report in words": (520, 700),  # as high as the report beside it
    "SaveImage": (460, 260),
    "PreviewImage": (460, 300),
}
MULTILINE = 80  # extra height of a text box
COLOURS = ("#3f789e", "#8A8", "#a1309b", "#b58b2a", "#88A", "#b06634")


def declared_inputs(info: dict, node: Node) -> list[tuple[str, str, dict]]:
    """(name, type, options) of the inputs in the order on the node; a growing input becomes its slots."""
    found = []
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, []):
            declared = info["input"][kind][name]
            type_, options = declared[0], declared[1] if len(declared) > 1 else {}
            if type_ == "COMFY_AUTOGROW_V3":
                (inner,) = options["template"]["input"]["required"].values()
                used = [key for key in node.inputs if key.startswith(f"{name}.")]
                found += [(key, inner[0], {}) for key in used]
                found.append((f"{name}.{options['template']['prefix']}{len(used)}", inner[0], {}))
            else:
                found.append((name, "COMBO" if isinstance(type_, list) else type_, options))
    unknown = set(node.inputs) - {name for name, _, _ in found}
    if unknown:
        raise SystemExit(f"{node.type} has no input {', '.join(sorted(unknown))}.")
    return found


def is_widget(type_: str, options: dict) -> bool:
    return type_ in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO") and not options.get("forceInput")


def to_ui(graph: Graph, object_info: dict) -> dict:
    """The graph as ComfyUI opens it."""
    nodes, links = [], []
    for order, node in enumerate(graph.nodes):
        item = {
            "id": node.id, "type": node.type, "pos": [0, 0], "size": [0, 0], "flags": {}, "order": order, "mode": 0,
            "inputs": [], "outputs": [], "properties": {"Node name for S&R": node.type}, "widgets_values": [],
        }  # fmt: skip
        if node.title:
            item["title"] = node.title
        width, extra = SIZES.get(node.title) or SIZES.get(node.type, (WIDTH, 0))
        if node.type == NOTE:
            item |= {"properties": {}, "color": "#432", "bgcolor": "#653", "widgets_values": [node.inputs["text"]]}
        else:
            info = object_info[node.type]
            if info["python_module"].partition(".")[0] != "custom_nodes":
                item["properties"]["cnr_id"] = "comfy-core"
            for name, type_, options in declared_inputs(info, node):
                value = node.inputs.get(name)
                if is_widget(type_, options):
                    item["widgets_values"].append(value)
                    if options.get("control_after_generate", name in ("seed", "noise_seed")):
                        item["widgets_values"].append(AFTER_SEED)
                    extra += MULTILINE if options.get("multiline") else 0
                    continue
                link = None
                if value is not None:
                    link = len(links) + 1
                    links.append([link, value.node.id, value.slot, node.id, len(item["inputs"]), type_])
                item["inputs"].append({"name": name, "type": type_, "link": link})
            for name, type_ in zip(info["output_name"], info["output"], strict=True):
                item["outputs"].append({"name": name, "type": type_, "links": []})
        slots = max(len(item["inputs"]), len(item["outputs"]))
        item["size"] = [
            width,
            slots * SLOT + len(item["widgets_values"]) * WIDGET * (node.type != NOTE) + extra + PADDING,
        ]
        nodes.append(item)
    by_id = {item["id"]: item for item in nodes}
    for link, origin, slot, *_ in links:
        by_id[origin]["outputs"][slot]["links"].append(link)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, graph.name)), "revision": 0,
        "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links,
        "groups": place(graph, by_id), "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def place(graph: Graph, items: dict[int, dict]) -> list[dict]:
    """Set every node's position, in rows and columns within its group, and return the groups drawn around them."""
    groups, x = [], 0
    for number, (title, columns) in enumerate(graph.groups):
        left = x
        x += PADDING
        rows = itertools.zip_longest(
            *[[items[node.id]["size"][1] for node in column] for column in columns], fillvalue=0
        )
        heights = [max(row) + TITLE + PADDING for row in rows]
        for column in columns:
            for row, node in enumerate(column):
                items[node.id]["pos"] = [x, GROUP_TITLE + TITLE + sum(heights[:row])]
            x += max(items[node.id]["size"][0] for node in column) + GAP
        x += PADDING - GAP
        groups.append(
            {
                "id": number + 1,
                "title": title,
                "bounding": [left, 0, x - left, GROUP_TITLE + sum(heights)],
                "color": COLOURS[number % len(COLOURS)],
                "font_size": 24,
                "flags": {},
            }  # fmt: skip
        )
        x += GROUP_GAP
    return groups
