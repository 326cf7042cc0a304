"""Write the workflows that `graphs` describes: each becomes two files.

    python scripts/make_workflows.py               write workflows/*.json and workflows/api/*.json
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
from graphs import FOLDER, GRAPHS, Graph, to_api, to_ui
from host import Server


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_thumbnail(server: Server, graph: Graph) -> None:
    """Run the graph and save its comparison, 512 pixels wide."""
    from PIL import Image

    saved = [ref for ref in server.images(server.run(to_api(graph))) if ref["type"] == "output"]
    picture = Image.open(io.BytesIO(server.get_image(saved[0]))).convert("RGB")
    picture.thumbnail((512, 512), Image.Resampling.LANCZOS)
    picture.save(FOLDER / f"{graph.name}.jpg", quality=88)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--thumbnails", action="store_true", help="run the workflows and save their results as pictures"
    )
    options = parser.parse_args()
    with Server() as server:
        object_info = server.object_info()
        for graph in (make() for make in GRAPHS):
            write(FOLDER / f"{graph.name}.json", to_ui(graph, object_info))
            write(FOLDER / "api" / f"{graph.name.replace(' ', '_')}.json", to_api(graph))
            if options.thumbnails:
                try:
                    write_thumbnail(server, graph)
                except HostError as error:  # the paper's workflows need weights that few have
                    print(f"  no picture: {error}")
            print(graph.name)


if __name__ == "__main__":
    main()
