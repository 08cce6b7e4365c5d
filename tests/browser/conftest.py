"""The real ComfyUI page in a real Chromium."""

import os
import time
from io import BytesIO
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
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
    """Opens the page with settings, and gives it with all scripts that it loaded; in the end none had an error of ours.

    (What the server refuses is no error of the page; and of every node it asks api.comfy.org, which policy forbids.)
    """
    contexts, errors = [], []

    def open_page(**settings):
        for name, value in {**SETTINGS, **settings}.items():
            server.ask(f"/settings/{name}", value)
        context = browser.new_context(viewport={"width": 1600, "height": 1000})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LOADED_S * 1000)
        page.scripts = []
        page.on("console", lambda said: errors.append(f"{said.text} {said.location}") if said.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(f"{error} {error.stack}"))
        page.on("request", lambda request: page.scripts.append(request.url))
        page.goto(server.url)
        page.wait_for_function("!!(window.app?.graph && window.app.extensionManager)", timeout=LOADED_S * 1000)
        page.wait_for_function("!!LiteGraph.registered_node_types['TrainLumina2LoRA']", timeout=LOADED_S * 1000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in errors if "lumina2-trainer" in text or ("lumina2" in text and "/api/" not in text)] == []


@pytest.fixture(autouse=True)
def nothing_goes_on(server):
    """A test that fails in mid-training holds up no other."""
    yield
    server.ask("/queue", {"clear": True})
    server.ask("/interrupt", {})


@pytest.fixture
def wait_for_lora(server):
    """Waits until a run's file is there."""

    def wait_for_lora(page, run):
        lora = server.base / "models" / "loras" / "lumina2" / f"{run}.safetensors"
        deadline = time.monotonic() + LOADED_S
        while not lora.exists():
            assert time.monotonic() < deadline
            page.wait_for_timeout(200)

    return wait_for_lora


@pytest.fixture
def check_accessible():
    """What axe finds wrong in a part of the page is an error: contrast, names, roles, keyboard."""

    def check_accessible(page, selector):
        found = Axe().run(page, selector, {"resultTypes": ["violations"]}).response["violations"]
        told = [
            f"{each['id']}: {node['html'][:200]} {node['failureSummary']}" for each in found for node in each["nodes"]
        ]
        assert told == [], "\n".join(told)

    return check_accessible


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
    """Takes pictures of parts of a page, as rows of sheets; at the end each sheet is a file, where some are wanted."""
    sheets = {}

    def add(name, row, part):
        if os.environ.get("LUMINA2_SHOTS"):
            taken = Image.open(BytesIO(part.screenshot())).convert("RGB")
            sheets.setdefault(name, {}).setdefault(row, []).append(taken)

    yield add
    for name, rows in sheets.items():
        contact_sheet(rows).save(Path(os.environ["LUMINA2_SHOTS"], f"{name}.jpg"), quality=85)


def contact_sheet(rows, width=320, label=18):
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
