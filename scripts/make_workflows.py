"""Write the workflows that `graphs` describes: each becomes two files.

    python scripts/make_workflows.py               write workflows/*.json, workflows/api/*.json and subgraphs/*.json
    python scripts/make_workflows.py --thumbnails  run them as well and write workflows/*.jpg (needs Pillow)

`<name>.json` opens in ComfyUI; `api/<name_with_underscores>.json` is what `/prompt` takes. A real server is asked
for the order of every node's inputs.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

from environment import HostError
from graphs import BLUEPRINTS, FOLDER, GRAPHS, SUBGRAPHS, Graph, to_api, to_blueprint, to_ui
from host import Server
from PIL import Image, ImageDraw


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save_picture(picture: Image.Image, name: str) -> None:
    """512 pixels wide, beside the workflow."""
    picture.thumbnail((512, 512), Image.Resampling.LANCZOS)
    picture.save(FOLDER / f"{name}.jpg", quality=88)


def picture_of_run(server: Server, graph: Graph) -> Image.Image:
    """Run the graph and return its comparison."""
    shown = server.images(server.run(to_api(graph)))
    saved = [reference for reference in shown if reference["type"] == "output"] or shown
    return Image.open(io.BytesIO(server.get_image(saved[0]))).convert("RGB")


def picture_of_graph(ui: dict) -> Image.Image:
    """The graph's groups and nodes as boxes, for a graph that cannot be run here."""
    right = max(group["bounding"][0] + group["bounding"][2] for group in ui["groups"])
    bottom = max(group["bounding"][3] for group in ui["groups"])
    scale = 1024 / right
    picture = Image.new("RGB", (1024, max(512, round(bottom * scale))), "#222")
    pen = ImageDraw.Draw(picture)
    for group in ui["groups"]:
        x, y, width, height = (side * scale for side in group["bounding"])
        pen.rectangle((x, y, x + width, y + height), outline=group["color"], width=3)
    for node in ui["nodes"]:
        size = [node["size"][0], 0] if node["flags"].get("collapsed") else node["size"]
        x, y, width, height = (side * scale for side in [node["pos"][0], node["pos"][1] - 30, size[0], size[1] + 30])
        pen.rounded_rectangle((x, y, x + width, y + height), 6, fill=node.get("bgcolor", "#444"))
        pen.text((x + 4, y + 2), node.get("title", node["type"].removeprefix("DiffLens"))[: round(width / 7)], "#eee")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--thumbnails", action="store_true", help="run the workflows and save their results as pictures"
    )
    options = parser.parse_args()
    with Server() as server:
        object_info = server.object_info()
        for subgraph in (make() for make in SUBGRAPHS):
            write(BLUEPRINTS / f"{subgraph.name}.json", to_blueprint(subgraph, object_info))
        for graph in (make() for make in GRAPHS):
            ui = to_ui(graph, object_info)
            write(FOLDER / f"{graph.name}.json", ui)
            write(FOLDER / "api" / f"{graph.name.replace(' ', '_')}.json", to_api(graph))
            if options.thumbnails:
                try:
                    picture = picture_of_run(server, graph)
                except HostError:  # it needs weights that few have
                    picture = picture_of_graph(ui)
                save_picture(picture, graph.name)
            print(graph.name)


if __name__ == "__main__":
    main()
