"""A ComfyUI graph in the making, and the form in which `/prompt` takes it."""

from __future__ import annotations

from dataclasses import dataclass, field

NOTE = "MarkdownNote"  # ComfyUI's page opens it; to the server it is nothing


@dataclass(frozen=True)
class Link:
    """An output of a node."""

    node: Node
    slot: int


@dataclass
class Node:
    """A node of a graph: its inputs are values, or links from other nodes. `node[1]` is its second output."""

    id: int
    type: str
    title: str | None
    inputs: dict

    def __getitem__(self, slot: int) -> Link:
        return Link(self, slot)


@dataclass
class Graph:
    """A workflow: named groups from left to right, each of columns, each of nodes from top to bottom."""

    name: str
    groups: list[tuple[str, list[list[Node]]]] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        return [node for _, columns in self.groups for column in columns for node in column]

    def group(self, title: str) -> None:
        self.groups.append((title, [[]]))

    def column(self) -> None:
        self.groups[-1][1].append([])

    def add(self, type: str, title: str | None = None, **inputs: object) -> Node:
        node = Node(len(self.nodes) + 1, type, title, inputs)
        self.groups[-1][1][-1].append(node)
        return node

    def note(self, text: str) -> None:
        self.add(NOTE, "Read me", text=text)


def to_api(graph: Graph) -> dict:
    """The graph as `/prompt` takes it; notes are left out."""
    return {
        str(node.id): {
            "class_type": node.type,
            "inputs": {
                name: [str(value.node.id), value.slot] if isinstance(value, Link) else value
                for name, value in node.inputs.items()
            },
            **({"_meta": {"title": node.title}} if node.title else {}),
        }
        for node in graph.nodes
        if node.type != NOTE
    }
