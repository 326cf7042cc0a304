"""The help pages, in whatever language the page asks for."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web
from server import PromptServer

PACK = Path(__file__).parent.parent.parent  # as ComfyUI names it: a link is not followed


def serve_help() -> None:
    """Answer ComfyUI's page, which asks for a node's help in its own language first, with the help that there is.

    It would find that by itself, after an error for each node on the browser's console.
    """

    @PromptServer.instance.routes.get(rf"/extensions/{PACK.name}/docs/{{node:DiffLens\w+}}/{{locale:[\w-]+}}.md")
    async def help_page(request: web.Request) -> web.FileResponse:
        page = PACK / "web" / "docs" / f"{request.match_info['node']}.md"
        if not page.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(page, headers={"Content-Type": "text/markdown; charset=utf-8"})
