"""A ComfyUI graph in the making, and the form in which `/prompt` takes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

NOTE = "MarkdownNote"  # ComfyUI's page opens it; to the server it is nothing


@dataclass(frozen=True)
class Link:
    """An output of a node."""

    node: Node
    slot: int


@dataclass(frozen=True)
class Inlet:
    """An input of a subgraph, as the nodes in it see it; value: what a widget shows that is not told otherwise."""

    name: str
    value: object = None


@dataclass(frozen=True)
class Subgraph:
    """A graph that the page draws as one node; `/prompt` gets the nodes in it. Its name is the node's type.

    inputs: what the nodes in it take from outside, see `Inlet`, in the order on the node; outputs: by name.
    """

    inside: Graph
    inputs: tuple[str, ...]
    outputs: dict[str, Link]
    description: str
    aliases: tuple[str, ...] = ()  # words by which the page's search finds it

    @property
    def name(self) -> str:
        return self.inside.name


@dataclass
class Node:
    """A node of a graph: its inputs are values, or links from other nodes. `node[1]` is its second output."""

    id: int
    type: str | Subgraph
    title: str | None
    inputs: dict
    folded: bool = False  # drawn as its title alone
    width: int | None = None  # in the page; None: what its type usually has

    def __getitem__(self, slot: int) -> Link:
        return Link(self, slot)


@dataclass
class Graph:
    """A workflow: named groups from left to right, each of columns, each of nodes from top to bottom.

    form: what the page shows of it in its app mode, (inputs as pairs of a node and a widget's name, output nodes).
    opens_as_form: whether that is how it opens. first_id: of its nodes; the page numbers those of a subgraph anew
    unless they differ from all others.
    """

    name: str
    groups: list[tuple[str, list[list[Node]]]] = field(default_factory=list)
    form: tuple[list[tuple[Node, str]], list[Node]] | None = None
    opens_as_form: bool = False
    first_id: int = 1

    @property
    def nodes(self) -> list[Node]:
        return [node for _, columns in self.groups for column in columns for node in column]

    @property
    def subgraphs(self) -> list[Subgraph]:
        """Those in the graph, each once."""
        return list({node.type.name: node.type for node in self.nodes if isinstance(node.type, Subgraph)}.values())

    def group(self, title: str) -> None:
        self.groups.append((title, [[]]))

    def column(self) -> None:
        self.groups[-1][1].append([])

    def add(self, type: str | Subgraph, title: str | None = None, **inputs: object) -> Node:
        node = Node(self.first_id + len(self.nodes), type, title, inputs)
        self.groups[-1][1][-1].append(node)
        return node

    def note(self, text: str) -> None:
        self.add(NOTE, "Read me", text=text)

    def save(self, title: str, images: Link, prefix: str) -> Node:
        """Save what another node shows already, so that this one need not."""
        return self.fold(self.add("SaveImage", title, images=images, filename_prefix=prefix))

    def fold(self, node: Node) -> Node:
        node.folded = True
        return node


def to_api(graph: Graph) -> dict:
    """The graph as `/prompt` takes it; notes are left out, and the nodes of subgraphs stand for themselves."""
    return dict(flattened(graph, "", {}))


def flattened(graph: Graph, prefix: str, given: dict) -> Iterator[tuple[str, dict]]:
    """Id and description of every node; given: what the inputs of the subgraph that this graph is stand for."""

    def told(value: object) -> object:
        if isinstance(value, Inlet):
            return given[value.name]
        return name_of(prefix, value) if isinstance(value, Link) else value

    for node in graph.nodes:
        inputs = {name: told(value) for name, value in node.inputs.items()}
        if isinstance(node.type, Subgraph):
            yield from flattened(node.type.inside, f"{prefix}{node.id}:", inputs)
        elif node.type != NOTE:
            title = {"_meta": {"title": node.title}} if node.title else {}
            yield f"{prefix}{node.id}", {"class_type": node.type, "inputs": inputs, **title}


def name_of(prefix: str, link: Link) -> list:
    """The output as `/prompt` names it; an output of a subgraph is that of a node in it."""
    node = link.node
    if isinstance(node.type, Subgraph):
        return name_of(f"{prefix}{node.id}:", [*node.type.outputs.values()][link.slot])
    return [f"{prefix}{node.id}", link.slot]
