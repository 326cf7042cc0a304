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
def open_page(browser: Browser) -> Callable[..., AbstractContextManager[tuple[Page, list[str]]]]:
    """`opened` for tests that want a page of their own."""
    return partial(opened, browser)


@pytest.fixture(scope="module", params=RENDERERS)
def page_and_console(
    request: pytest.FixtureRequest, browser: Browser, server: Server
) -> Iterator[tuple[Page, list[str]]]:
    with opened(browser, server, {"Comfy.VueNodes.Enabled": RENDERERS[request.param]}) as both:
        yield both


@pytest.fixture(scope="module")
def page(page_and_console: tuple[Page, list[str]]) -> Page:
    """The page with the pack in it, in each of ComfyUI's two ways to draw nodes."""
    return page_and_console[0]


@pytest.fixture(scope="module")
def console(page_and_console: tuple[Page, list[str]]) -> list[str]:
    """What the page's console has said since it was opened."""
    return page_and_console[1]


@pytest.fixture(scope="module")
def renderer(page: Page) -> str:
    return "Vue" if page.evaluate("app.extensionManager.setting.get('Comfy.VueNodes.Enabled')") else "canvas"
