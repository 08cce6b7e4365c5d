"""The real ComfyUI page in a real Chromium."""

import os
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
LOADED_S = 120


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=os.environ["LUMINA2_CHROMIUM"], args=["--no-sandbox", "--disable-gpu"]
        )
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser, server, tmp_path):
    """Opens the page with settings, and gives it with all that it logged as errors and all scripts it loaded."""
    contexts = []

    def open_page(**settings):
        for name, value in {**SETTINGS, **settings}.items():
            server.ask(f"/settings/{name}", value)
        context = browser.new_context(viewport={"width": 1600, "height": 1000})
        contexts.append(context)
        page = context.new_page()
        page.errors, page.scripts = [], []
        page.on("console", lambda said: page.errors.append(f"{said.type} {said.text} {said.location}"))
        page.on("pageerror", lambda error: page.errors.append(f"error {error} {error.stack}"))
        page.on("request", lambda request: page.scripts.append(request.url))
        page.goto(server.url)
        page.wait_for_function("!!(window.app?.graph && window.app.extensionManager)", timeout=LOADED_S * 1000)
        page.wait_for_function("!!LiteGraph.registered_node_types['TrainLumina2LoRA']", timeout=LOADED_S * 1000)
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def load_template():
    def load_template(page, name="01_quickstart_nano"):
        page.evaluate(
            """async (name) => {
                const answer = await fetch(`/api/workflow_templates/lumina2-trainer/${name}.json`)
                await app.loadGraphData(await answer.json())
            }""",
            name,
        )
        page.wait_for_function("app.graph._nodes.length > 10", timeout=LOADED_S * 1000)

    return load_template


@pytest.fixture(scope="session")
def sheet():
    """Takes pictures of all panels on a page as a row; at the end all rows are one picture, where some are wanted."""
    rows = {}

    def add(page, row):
        if os.environ.get("LUMINA2_SHOTS"):
            panels = [
                panel for panel in page.locator(".lumina2-panel:not(.lumina2-dataset)").all() if panel.is_visible()
            ]
            taken = [Image.open(BytesIO(panel.screenshot())).convert("RGB") for panel in panels]
            rows.setdefault(row, []).extend(taken)

    yield add
    if rows:
        contact_sheet(rows).save(Path(os.environ["LUMINA2_SHOTS"], "panel-states.jpg"), quality=85)


def contact_sheet(rows, width=360, label=18):
    """Rows of pictures of one width, each with its name above."""
    scaled = {
        name: [each.resize((width, round(each.height * width / each.width))) for each in taken]
        for name, taken in rows.items()
    }
    heights = [max(each.height for each in taken) + label for taken in scaled.values()]
    columns = max(map(len, scaled.values()))
    drawn = Image.new("RGB", (columns * (width + 8), sum(heights) + 8 * len(heights)), "#808080")
    top = 0
    for (name, taken), height in zip(scaled.items(), heights, strict=True):
        ImageDraw.Draw(drawn).text((4, top + 3), name, fill="white")
        for column, each in enumerate(taken):
            drawn.paste(each, (column * (width + 8), top + label))
        top += height + 8
    return drawn
