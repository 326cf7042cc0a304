"""Make the pictures of the help pages: every node as ComfyUI's page draws it, in web/docs/<node>.webp.

A page that does not show its picture yet gets it below its heading.

    python scripts/make_help_pictures.py

Needs playwright and a Chromium, as the tests of the page do.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from environment import REPOSITORY, ensure_browser
from host import NODE_PREFIX, Server
from PIL import Image
from playwright.sync_api import Page, sync_playwright

FOLDER = REPOSITORY / "web" / "docs"
MOST = 30_000  # bytes of a picture
WIDTH = 420  # of a node
READY = "node => window.app?.extensionManager && window.LiteGraph?.registered_node_types?.[node]"
SHOW = """async ([type, width]) => {
  for (const old of [...app.graph.nodes]) app.graph.remove(old) // clearing would give the next its number and values
  const node = LiteGraph.createNode(type)
  node.pos = [200, 150]
  app.graph.add(node)
  node.setSize([width, node.computeSize()[1]])
  app.canvas.ds.scale = 1
  app.canvas.ds.offset = [0, 0]
  await new Promise(done => setTimeout(done, 700))
  return node.id
}"""


def save(picture: Image.Image, path: Path) -> None:
    """As a WebP of no more than MOST bytes."""
    for quality in range(85, 20, -10):
        written = io.BytesIO()
        picture.save(written, "WEBP", quality=quality)
        if written.tell() <= MOST:
            break
    path.write_bytes(written.getvalue())


def draw(page: Page, node: str) -> Image.Image:
    """The node as the page draws it."""
    node_id = page.evaluate(SHOW, [node, WIDTH])
    return Image.open(io.BytesIO(page.locator(f'[data-node-id="{node_id}"]').first.screenshot())).convert("RGB")


def show(node: str) -> None:
    """Put the picture into the node's help page, if it is not there."""
    page = FOLDER / f"{node}.md"
    text = page.read_text(encoding="utf-8")
    if f"({node}.webp)" not in text:
        heading, rest = text.split("\n\n", 1)
        page.write_text(f"{heading}\n\n![The node]({node}.webp)\n\n{rest}", encoding="utf-8")


def main() -> None:
    with Server() as server, sync_playwright() as playwright:
        for setting in ("Comfy.TutorialCompleted", "Comfy.VueNodes.Enabled"):
            server.request(f"/settings/{setting}", json.dumps(True).encode())
        browser = playwright.chromium.launch(executable_path=str(ensure_browser()), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1400})
        page.goto(server.url)
        page.wait_for_function(READY, arg=f"{NODE_PREFIX}Debias", timeout=180_000)
        for node in (name for name in server.object_info() if name.startswith(NODE_PREFIX)):
            save(draw(page, node), FOLDER / f"{node}.webp")
            show(node)
            print(node)
        browser.close()


if __name__ == "__main__":
    main()
