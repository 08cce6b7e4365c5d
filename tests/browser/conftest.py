"""The real ComfyUI page in a real Chromium."""

import os

import pytest
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
