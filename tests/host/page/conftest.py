"""ComfyUI's page in a real Chromium, opened on the server of the host tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest
from environment import ensure_browser
from host import Server
from playwright.sync_api import Browser, Page, sync_playwright

SCREEN = {"width": 1600, "height": 1000}
BOOT = 120_000  # milliseconds until the page is there, on two slow cores
LOADED = "node => window.app?.extensionManager && window.LiteGraph?.registered_node_types?.[node]"
RENDERERS = {"canvas": False, "Vue": True}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(ensure_browser()), args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: the folder that DIFFLENS_SHOTS names, for whoever looks at them, or one of pytest's."""
    folder = Path(os.environ.get("DIFFLENS_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def opened(
    browser: Browser, server: Server, settings: dict | None = None, node: str = "DiffLensDebias"
) -> Iterator[tuple[Page, list[str]]]:
    """The server's page once it knows a node, under settings of ComfyUI, and what its console says."""
    for name, value in {"Comfy.TutorialCompleted": True, **(settings or {})}.items():
        server.request(f"/settings/{name}", json.dumps(value).encode())
    context = browser.new_context(viewport=SCREEN)
    try:
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.goto(server.url)
        page.wait_for_function(LOADED, arg=node, timeout=BOOT)
        yield page, said
    finally:
        context.close()


@pytest.fixture(scope="session")
def open_page(browser: Browser, server: Server) -> Callable[[dict], AbstractContextManager[tuple[Page, list[str]]]]:
    """Opens the page under other settings of ComfyUI."""
    return partial(opened, browser, server)


@pytest.fixture(scope="module", params=RENDERERS)
def page(request: pytest.FixtureRequest, browser: Browser, server: Server) -> Iterator[Page]:
    """The page with the pack in it, in each of ComfyUI's two ways to draw nodes."""
    with opened(browser, server, {"Comfy.VueNodes.Enabled": RENDERERS[request.param]}) as (page, _):
        yield page
