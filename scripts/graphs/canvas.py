"""A graph as ComfyUI's page opens it: every node with its sockets, widgets, size and place."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator

from .graph import NOTE, Graph, Inlet, Link, Node, Subgraph
from .sources import models_of

AFTER_SEED = "fixed"  # value of the widget "control after generate", which ComfyUI puts below a seed
NESTED = "COMFY_DYNAMICCOMBO_V3"  # a list, of which each choice brings widgets of its own
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", NESTED)
OUTSIDE, BACK_OUTSIDE = -10, -20  # ids that the page gives to a subgraph's inputs and outputs
# Where the page looks when a workflow opens, read by web/opening.js: its upper left corner beside the page's own
# controls, at a size at which notes can be read.
OPENING = {"scale": 1.0, "offset": [75, 105]}

# Pixels on ComfyUI's canvas.
WIDTH, TITLE, SLOT, WIDGET, PADDING, BADGE = 320, 30, 22, 26, 20, 18
GAP, GROUP_GAP, GROUP_TITLE = 40, 40, 60
BETWEEN = 44  # two nodes: room for the line that the page puts below a faulty one
# Type or title: (width, height beyond its slots and widgets). The large ones draw a picture or text on themselves.
SIZES = {
    NOTE: (400, 0),
    "DiffLensCompare": (760, 560),
    "Before and after": (500, 330),
    "DiffLensCapture": (WIDTH, 260),  # how many pictures of each class it has
    "DiffLensTrainSAE": (460, 360),
    "DiffLensTrainProbes": (460, 300),
    "DiffLensAttribute": (460, 300),
    "DiffLensReport": (520, 340),
    "DiffLensSiteScan": (560, 340),
    "DiffLensRankByEffect": (560, 340),
    "DiffLensExplore": (560, 620),
    "DiffLensCalibrate": (560, 340),
    "DiffLensCrossEffects": (560, 340),
    "DiffLensDiagnose": (760, 480),
    "DiffLensJudge": (400, 120),
    "DiffLensDebias": (WIDTH, 80),  # what its recipe is for, whose and of which model
    "DiffLensLoadRecipe": (WIDTH, 80),
    "PreviewAny": (520, 260),
    "The report in words": (520, 700),  # as high as the report beside it
    "PreviewImage": (460, 300),
}
MULTILINE = 80  # extra height of a text box
LETTER, LINE, PARAGRAPH = 5.4, 15.5, 10  # of a note's text: width, height, what is between two paragraphs
COLOURS = ("#3f789e", "#4a8a4a", "#a1309b", "#9a7420", "#7272a0", "#b06634")  # titles are legible in light and dark


def name_based_id(name: str) -> str:
    """A UUID that is the same whenever the files are made."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def declared_inputs(object_info: dict, node: Node) -> list[tuple[str, str, dict]]:
    """(name, type, options) of the inputs in the order on the node."""
    if isinstance(node.type, Subgraph):
        found = [(name, type_, options) for name, (type_, options, _) in inlets(node.type, object_info).items()]
    else:
        info = object_info[node.type]
        found = [
            one
            for kind in ("required", "optional")
            for name in info["input_order"].get(kind, [])
            for one in spread(name, info["input"][kind][name], node)
        ]
    unknown = set(node.inputs) - {name for name, _, _ in found}
    if unknown:
        raise SystemExit(f"{node.title or node.type} has no input {', '.join(sorted(unknown))}.")
    return found


def spread(name: str, declared: list, node: Node) -> Iterator[tuple[str, str, dict]]:
    """An input as the page shows it: one that grows becomes its slots, a nested list its own widgets."""
    type_, options = declared[0], declared[1] if len(declared) > 1 else {}
    if type_ == "COMFY_AUTOGROW_V3":
        (inner,) = options["template"]["input"]["required"].values()
        used = [key for key in node.inputs if key.startswith(f"{name}.")]
        for key in [*used, f"{name}.{options['template']['prefix']}{len(used)}"]:
            yield key, inner[0], {}
        return
    yield name, "COMBO" if isinstance(type_, list) else type_, options
    if type_ == NESTED:
        (chosen,) = [option["inputs"] for option in options["options"] if option["key"] == node.inputs[name]]
        for inner_name, inner in chosen.get("required", {}).items():
            yield from spread(f"{name}.{inner_name}", inner, node)


def inlets(subgraph: Subgraph, object_info: dict) -> dict[str, tuple[str, dict, list[tuple[Node, str]]]]:
    """Type, options and targets (node, input) of what the nodes of a subgraph take from outside, by name."""
    found: dict[str, tuple[str, dict, list[tuple[Node, str]]]] = {}
    for node in subgraph.inside.nodes:
        for name, type_, options in declared_inputs(object_info, node):
            value = node.inputs.get(name)
            if isinstance(value, Inlet):
                found.setdefault(value.name, (type_, options, []))[2].append((node, name))
    return {name: found[name] for name in subgraph.inputs}


def first_value(targets: list[tuple[Node, str]]) -> object:
    """What the widget of an inlet shows at first; None for a socket."""
    node, name = targets[0]
    return node.inputs[name].value


def declared_outputs(object_info: dict, type_: str | Subgraph) -> list[tuple[str, str]]:
    """(name, type) of the outputs."""
    if isinstance(type_, Subgraph):
        inner = {name: declared_outputs(object_info, link.node.type)[link.slot] for name, link in type_.outputs.items()}
        return [(name, socket) for name, (_, socket) in inner.items()]
    info = object_info[type_]
    return list(zip(info["output_name"], info["output"], strict=True))


def is_widget(type_: str, options: dict) -> bool:
    return type_ in WIDGETS and not options.get("forceInput")


def to_ui(graph: Graph, object_info: dict) -> dict:
    """The graph as ComfyUI opens it."""
    items, links = draw(graph, object_info)
    definitions = [define(subgraph, object_info) for subgraph in graph.subgraphs]
    return {
        "id": name_based_id(graph.name), "revision": 0, "last_node_id": max(items), "last_link_id": len(links),
        "nodes": [*items.values()], "links": [[*link.values()] for link in links], "groups": place(graph, items),
        **({"definitions": {"subgraphs": definitions}} if definitions else {}),
        "config": {}, "extra": {"difflens_opening": OPENING, **form_of(graph)}, "version": 0.4,
    }  # fmt: skip


def to_blueprint(subgraph: Subgraph, object_info: dict) -> dict:
    """A subgraph as ComfyUI offers it among its nodes."""
    graph = Graph(subgraph.name)
    graph.group("")
    values = {name: first_value(targets) for name, (_, _, targets) in inlets(subgraph, object_info).items()}
    graph.add(subgraph, subgraph.name, **{name: value for name, value in values.items() if value is not None})
    ui = to_ui(graph, object_info)
    searched = {"BlueprintDescription": subgraph.description, "BlueprintSearchAliases": [*subgraph.aliases]}
    return ui | {"groups": [], "extra": searched}


def form_of(graph: Graph) -> dict:
    """What the page's app mode shows of the graph."""
    if graph.form is None:
        return {}
    inputs, outputs = graph.form
    shown = {"inputs": [[node.id, name] for node, name in inputs], "outputs": [node.id for node in outputs]}
    return {"linearMode": graph.opens_as_form, "linearData": shown}


def define(subgraph: Subgraph, object_info: dict) -> dict:
    """A subgraph as the page keeps it."""
    items, links = draw(subgraph.inside, object_info)
    place(subgraph.inside, items)
    inputs, outputs = [], []
    for slot, (name, (type_, _, targets)) in enumerate(inlets(subgraph, object_info).items()):
        ids = []
        for node, socket in targets:
            ids.append(len(links) + 1)
            (target_slot,) = [i for i, seen in enumerate(items[node.id]["inputs"]) if seen["name"] == socket]
            items[node.id]["inputs"][target_slot]["link"] = ids[-1]
            links.append(link_of(ids[-1], OUTSIDE, slot, node.id, target_slot, type_))
        inputs.append({"id": name_based_id(f"{subgraph.name} in {name}"), "name": name, "type": type_, "linkIds": ids})
    for slot, ((name, type_), link) in enumerate(
        zip(declared_outputs(object_info, subgraph), subgraph.outputs.values(), strict=True)
    ):
        links.append(link_of(len(links) + 1, link.node.id, link.slot, BACK_OUTSIDE, slot, type_))
        items[link.node.id]["outputs"][link.slot]["links"].append(len(links))
        outputs.append(
            {
                "id": name_based_id(f"{subgraph.name} out {name}"), "name": name, "type": type_,
                "linkIds": [len(links)],
            }
        )  # fmt: skip
    right = max(item["pos"][0] + item["size"][0] for item in items.values())
    return {
        "id": name_based_id(subgraph.name), "version": 1, "revision": 0, "config": {}, "name": subgraph.name,
        "description": subgraph.description,
        "state": {"lastGroupId": 0, "lastNodeId": max(items), "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": OUTSIDE, "bounding": [-240, GROUP_TITLE, 160, 40 + 20 * len(inputs)]},
        "outputNode": {"id": BACK_OUTSIDE, "bounding": [right + GAP, GROUP_TITLE, 160, 40 + 20 * len(outputs)]},
        "inputs": inputs, "outputs": outputs, "widgets": [], "nodes": [*items.values()], "groups": [],
        "links": links, "extra": {},
    }  # fmt: skip


def link_of(id_: int, origin: int, origin_slot: int, target: int, target_slot: int, type_: str) -> dict:
    return {
        "id": id_, "origin_id": origin, "origin_slot": origin_slot, "target_id": target, "target_slot": target_slot,
        "type": type_,
    }  # fmt: skip


def draw(graph: Graph, object_info: dict) -> tuple[dict[int, dict], list[dict]]:
    """The nodes by id, at no place yet, and the links between them."""
    items = {node.id: item_of(node, order, object_info) for order, node in enumerate(graph.nodes)}
    links: list[dict] = []
    for node in graph.nodes:
        for slot, socket in enumerate(items[node.id]["inputs"]):
            value = node.inputs.get(socket["name"])
            if isinstance(value, Link):
                socket["link"] = len(links) + 1
                links.append(link_of(len(links) + 1, value.node.id, value.slot, node.id, slot, socket["type"]))
                items[value.node.id]["outputs"][value.slot]["links"].append(len(links))
    return items, links


def item_of(node: Node, order: int, object_info: dict) -> dict:
    """A node of the page without its place and its links."""
    boxed = isinstance(node.type, Subgraph)
    named = node.type.name if boxed else node.type
    width, extra = SIZES.get(node.title) or SIZES.get(named, (WIDTH, 0))
    width = node.width or width
    item: dict = {
        "id": node.id, "type": name_based_id(named) if boxed else named, "pos": [0, 0], "size": [0, 0],
        "flags": {"collapsed": True} if node.folded else {}, "order": order, "mode": 0, "inputs": [], "outputs": [],
        "properties": {}, "widgets_values": [],
    }  # fmt: skip
    if node.title:
        item["title"] = node.title
    if node.type == NOTE:
        text = node.inputs["text"]
        return item | {
            "color": "#432", "bgcolor": "#653", "widgets_values": [text], "size": [width, height_of_note(text, width)],
        }  # fmt: skip
    if not boxed:
        item["properties"]["Node name for S&R"] = named
        if object_info[named]["python_module"].partition(".")[0] != "custom_nodes":
            item["properties"]["cnr_id"] = "comfy-core"
        else:
            extra += BADGE
    sockets, linked, item["widgets_values"], boxes = inputs_of(node, object_info)
    item["inputs"] = sockets + linked
    item["outputs"] = [
        {"name": name, "type": type_, "links": []} for name, type_ in declared_outputs(object_info, node.type)
    ]
    if missing := models_of(item["widgets_values"]):
        item["properties"]["models"] = missing
    height = max(len(sockets), len(item["outputs"])) * SLOT + len(item["widgets_values"]) * WIDGET + boxes * MULTILINE
    item["size"] = [width, height + extra + PADDING]
    return item


def inputs_of(node: Node, object_info: dict) -> tuple[list[dict], list[dict], list, int]:
    """Sockets, sockets of widgets that can be told by a link, values of the widgets, and how many are boxes of text."""
    boxed = isinstance(node.type, Subgraph)
    sockets: list[dict] = []
    linked: list[dict] = []
    values: list = []
    boxes = 0
    for name, type_, options in declared_inputs(object_info, node):
        value = node.inputs.get(name)
        if not is_widget(type_, options):
            label = {"label": name.partition(".")[2]} if "." in name else {}
            sockets.append({"name": name, "type": type_, "link": None, **label})
            continue
        boxes += bool(options.get("multiline"))
        if isinstance(value, (Link, Inlet)) or boxed:
            linked.append({"name": name, "type": type_, "widget": {"name": name}, "link": None})
        if isinstance(value, (Link, Inlet)):
            value = value.value if isinstance(value, Inlet) else options.get("default")
        values.append(value)
        if options.get("control_after_generate", name in ("seed", "noise_seed")) and not boxed:
            values.append(AFTER_SEED)
    return sockets, linked, values, boxes


def height_of_note(text: str, width: int) -> int:
    """Enough for all of it."""
    lines = [line for line in text.split("\n") if line]
    wrapped = [math.ceil(len(line) * LETTER / (width - (60 if line[0] in "-1234567890" else 30))) for line in lines]
    return round(sum(wrapped) * LINE + len(lines) * PARAGRAPH + 2 * PADDING)


def place(graph: Graph, items: dict[int, dict]) -> list[dict]:
    """Set every node's position, in columns within its group, and return the groups drawn around them.

    In columns with as many nodes each, those of a row begin at one height.
    """
    groups, x = [], 0
    for number, (title, columns) in enumerate(graph.groups):
        left, bottom = x, 0
        x += PADDING
        for column in columns:
            alike = [other for other in columns if len(other) == len(column)]
            y = GROUP_TITLE + TITLE
            for row, node in enumerate(column):
                items[node.id]["pos"] = [x, y]
                y += max(height_of(items[other[row].id]) for other in alike) + TITLE + BETWEEN
            x += max(items[node.id]["size"][0] for node in column) + GAP
            bottom = max(bottom, y - TITLE - BETWEEN + PADDING)
        x += PADDING - GAP
        groups.append(
            {
                "id": number + 1,
                "title": title,
                "bounding": [left, 0, x - left, bottom],
                "color": COLOURS[number % len(COLOURS)],
                "font_size": 24,
                "flags": {},
            }  # fmt: skip
        )
        x += GROUP_GAP
    return groups


def height_of(item: dict) -> int:
    return 0 if item["flags"].get("collapsed") else item["size"][1]
