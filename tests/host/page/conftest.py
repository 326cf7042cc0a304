"""ComfyUI's page in a real Chromium, opened on the server of the host tests."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest
from environment import ensure_browser
from host import Server
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

SCREEN = {"width": 1600, "height": 1000}
BOOT = 120_000  # milliseconds until the page is there, on two slow cores
LOADED = "node => window.app?.extensionManager && window.LiteGraph?.registered_node_types?.[node]"
LACKING = {
    "version": 0.4,
    "nodes": [
        {
            "id": 1,
            "type": "CheckpointLoaderSimple",
            "pos": [0, 0],
            "size": [300, 100],
            "widgets_values": ["absent.safetensors"],
            "properties": {
                "models": [
                    {"name": "absent.safetensors", "url": "https://github.com/absent", "directory": "checkpoints"}
                ]
            },
        }
    ],
    "links": [],
}
# The server keeps what a page was left with, and the next test's page is not to depend on it.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.RightSidePanel.IsOpen": False}
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
    for name, value in {**SETTINGS, **(settings or {})}.items():
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


@contextmanager
def side_panel(page: Page, node: str) -> Iterator[Locator]:
    """The widgets of a node (in JavaScript) in ComfyUI's panel at the right, which is shut again."""
    set_open = "open => app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', open)"
    panel = page.get_by_test_id("section-widgets-list")
    page.evaluate(set_open, True)
    try:
        page.evaluate(f"() => app.canvas.selectNode({node})")
        yield panel
    finally:
        page.evaluate(set_open, False)
    expect(panel).to_have_count(0)


@pytest.fixture(scope="session")
def open_panel() -> Callable[[Page, str], AbstractContextManager[Locator]]:
    return side_panel


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


def kinds_of(said: list[str]) -> set[str]:
    """What a console said, with every address that stands in it left out, and without mere information."""
    return {re.sub(r"https?://[^\s'\"]+", "(address)", text) for text in said if not text.startswith("info: ")}


@pytest.fixture(scope="session")
def bare_console(browser: Browser) -> set[str]:
    """What the console says in a ComfyUI without packs, also of a graph whose model is not there."""
    with Server(None, boot_timeout=900) as bare, opened(browser, bare, node="CheckpointLoaderSimple") as (page, said):
        page.wait_for_load_state("networkidle")
        with page.expect_console_message(lambda message: "absent" in message.text, timeout=BOOT):
            page.evaluate("graph => app.loadGraphData(graph)", LACKING)
        page.wait_for_timeout(1000)  # Chromium says it twice
        return kinds_of(said)


@pytest.fixture(scope="module")
def beyond_bare(console: list[str], bare_console: set[str]) -> Callable[[], set[str]]:
    """What the page's console has said so far that a bare host's does not say."""
    return lambda: kinds_of(console) - bare_console


@pytest.fixture(scope="module")
def renderer(page: Page) -> str:
    return "Vue" if page.evaluate("app.extensionManager.setting.get('Comfy.VueNodes.Enabled')") else "canvas"
