"""The live panel and the sidebar on the real page, while the nano model really trains."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from graphs import run_json

ROOT = Path(__file__).resolve().parents[2]
BUDGET = {".js": 40_000, "": 150_000}  # bytes that every page loads, and all there are
PANEL = "[...document.querySelectorAll('.lumina2-panel')].find(panel => panel.isConnected)"
WAIT_MS = 60_000


@pytest.fixture(autouse=True)
def nothing_goes_on(server):
    """A test that fails in mid-training holds up no other."""
    yield
    server.ask("/queue", {"clear": True})
    server.ask("/interrupt", {})


def shot(page, name):
    if os.environ.get("LUMINA2_SHOTS"):
        page.wait_for_timeout(400)
        page.screenshot(path=f"{os.environ['LUMINA2_SHOTS']}/{name}.png")


def look_at_train_node(page):
    page.evaluate(
        """() => {
            app.canvas.ds.scale = 1
            app.canvas.centerOnNode(app.canvas.graph._nodes.find(node => node.type === 'TrainLumina2LoRA'))
            app.canvas.setDirty(true, true)
        }"""
    )
    page.locator(".lumina2-panel .lumina2-state").first.wait_for(timeout=WAIT_MS)


def train(page, **widgets):
    """Only what leads to the train node is queued, with values in its widgets."""
    page.evaluate(
        """async (values) => {
            const keep = ['Lumina2LoadDiffusers', 'Lumina2LoadDataset', 'Lumina2CacheLatents',
                          'Lumina2CacheTextEmbeds', 'Lumina2LoRASettings', 'TrainLumina2LoRA']
            for (const node of [...app.graph._nodes]) if (!keep.includes(node.type)) app.graph.remove(node)
            const train = app.graph._nodes.find(node => node.type === 'TrainLumina2LoRA')
            for (const widget of train.widgets) if (widget.name in values) widget.value = values[widget.name]
        }""",
        {"steps": 100_000, "batch_size": 2, **widgets},
    )


def says(page, *texts):
    """Waits until the panel says one of these."""
    page.wait_for_function(
        f"(texts) => texts.some(text => {PANEL}?.innerText.includes(text))", arg=list(texts), timeout=WAIT_MS
    )


def steps_shown(page):
    found = re.search(r"(\d+)/\d+", page.evaluate(f"{PANEL}.innerText"))
    return int(found[1]) if found else 0


def press(page, label):
    page.locator(".lumina2-panel").get_by_role("button", name=re.compile(f"^{label}")).first.click()


def ours(page):
    return [text for text in page.errors if "lumina2" in text and text.startswith("error") and "/api/" not in text]


def test_what_every_page_loads_is_small():
    sizes = {path: path.stat().st_size for path in (ROOT / "web" / "js").iterdir()}
    for ending, most in BUDGET.items():
        assert sum(size for path, size in sizes.items() if path.name.endswith(ending)) <= most


def test_a_training_is_watched_reloaded_stopped_and_continued(open_page, load_template, server, sheet):
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"})
    load_template(page)
    train(page, run_name="watched")
    look_at_train_node(page)
    says(page, "≈ new")
    says(page, "Needs ≈")
    sheet(page, "while it trains")
    before = {url for url in page.scripts if "/lumina2-trainer/js/" in url}
    assert sum(url.endswith(".js") for url in before) == 1
    page.evaluate("app.queuePrompt(0, 1)")
    says(page, "Training")
    page.wait_for_function(f"/[1-9]\\d+\\/100000/.test({PANEL}.innerText)", timeout=WAIT_MS)
    seen = steps_shown(page)
    page.wait_for_function(
        f"(seen) => Number({PANEL}.innerText.match(/(\\d+)\\/100000/)[1]) > seen", arg=seen, timeout=WAIT_MS
    )
    page.wait_for_function(f"{PANEL}.querySelector('.lumina2-chart-empty').hidden", timeout=WAIT_MS)
    sheet(page, "while it trains")

    press(page, "Pause")
    says(page, "Paused")
    sheet(page, "while it trains")
    press(page, "Sample now")
    sheet(page, "while it trains")
    prompt = page.locator(".lumina2-drawer input")
    assert prompt.is_disabled(), "no CLIP is wired: a typed prompt could not be read"
    page.locator(".lumina2-drawer").get_by_role("button", name="Draw").click()
    page.locator(".lumina2-panel .lumina2-strip img").first.wait_for(timeout=WAIT_MS)
    sheet(page, "while it trains")
    page.locator(".lumina2-panel .lumina2-thumb").first.click()
    page.locator(".lumina2-viewer img").first.wait_for()
    shot(page, "viewer")
    page.keyboard.press("Escape")
    assert page.locator(".lumina2-viewer").count() == 0
    press(page, "⋯")
    sheet(page, "while it trains")
    press(page, "⋯")
    press(page, "Go on")
    says(page, "Training")

    kept, shown = page.evaluate(
        """() => {
            const train = app.graph._nodes.find(node => node.type === 'TrainLumina2LoRA')
            return [train.serialize().widgets_values.length, train.widgets.length]
        }"""
    )
    assert kept == shown - 1, "the panel is saved in no workflow"
    saved = page.evaluate("app.graph.serialize()")
    page.reload()
    page.wait_for_function("!!(window.app?.graph && window.app.extensionManager)", timeout=WAIT_MS)
    page.wait_for_function("!!LiteGraph.registered_node_types['TrainLumina2LoRA']", timeout=WAIT_MS)
    page.evaluate("async (graph) => await app.loadGraphData(graph)", saved)
    look_at_train_node(page)
    says(page, "Training")
    sheet(page, "while it trains")

    press(page, "Stop & keep")
    says(page, "Stopped and kept")
    says(page, "≈ kept at")
    kept = run_json(server, "watched")
    assert kept["status"] == "stopped"
    assert steps_shown(page) == kept["step"]
    sheet(page, "while it trains")
    page.wait_for_timeout(1500)

    page.evaluate(
        "step => app.graph._nodes.find(n => n.type === 'TrainLumina2LoRA')"
        ".widgets.find(w => w.name === 'steps').value = step",
        kept["step"] + 4,
    )
    says(page, "≈ continues at", "≈ kept at")
    press(page, "Continue training")
    says(page, "Finished")
    assert run_json(server, "watched")["step"] == kept["step"] + 4
    page.wait_for_timeout(1500)
    press(page, "Add LoRA loader")
    page.wait_for_function(
        """() => app.graph._nodes.some(node => node.type === 'LoraLoaderModelOnly'
               && node.widgets[0].value === 'lumina2/watched.safetensors')""",
        timeout=WAIT_MS,
    )
    sheet(page, "while it trains")
    assert ours(page) == []


def write_run(server, name, status="finished", step=300, target=300, message="", **settings):
    """A run's folder as training leaves it, with samples of the base model and of the last step."""
    folder = server.base / "output" / "lumina2" / name
    record = {"name": name, "folder": name, "identity": name, "status": status, "step": step, "target": target}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record | {"settings": {"steps": target, **settings}}))
    lines = [{"event": "Started", "time": 1e9, "run": name, "step": 0}]
    for n in range(1, step + 1):
        loss = 0.3 + 1 / (n + 2) + 0.05 * math.sin(n * 12.9898) * math.sin(n * 78.233)
        lines.append({"step": n, "loss": loss, "lr": 1e-3, "grad_norm": 0.5 + loss / 9, "time": 1e9 + n / 3})
        if n % 60 == 0:
            lines.append({"event": "Evaluated", "time": 1e9 + n / 3, "step": n, "loss": 0.42 + 2 / n})
    pictures = sorted((ROOT / "assets" / "nano" / "style").glob("*.png"))
    for at, first in ((0, 0), (step, 3)):
        samples = []
        for number, picture in enumerate(pictures[first : first + 3]):
            path = folder / "samples" / f"step-{at}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, path)
            relative = path.relative_to(folder).as_posix()
            samples.append({"path": relative, "name": f"emoji {number}", "prompt": f"an emoji, {number}", "seed": 42})
        lines.append({"event": "Validated", "time": 1e9, "step": at, "samples": samples})
    lines.append({"event": "Ended", "time": 1e9, "status": status, "step": step, "message": message, "seconds": 9})
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


FULL_DISK = "The disk is full: a checkpoint of step 230 does not fit. Free some space and queue again."
STATES = {
    "never run": ("Not trained yet", "尚未训练"),
    "finished": ("Finished", "已完成"),
    "stopped": ("Stopped and kept", "已停止并保留"),
    "interrupted": ("Interrupted; Run goes on from step 230", "已中断；再次运行将从第 230 步继续"),
    "failed": ("Failed", "失败"),
    "not/allowed": ("Not trained yet", "尚未训练"),
}


@pytest.mark.parametrize(
    ("vue", "locale", "theme"),
    [(False, "en", "dark"), (False, "zh", "light"), (True, "zh", "dark"), (True, "en", "light")],
    ids=["classic en dark", "classic zh light", "Nodes 2.0 zh dark", "Nodes 2.0 en light"],
)
def test_every_state_has_its_sentence_after_a_reload(open_page, server, sheet, vue, locale, theme):
    for status in ("finished", "stopped", "interrupted", "failed"):
        step = 300 if status == "finished" else 230
        write_run(server, status, status, step, message=FULL_DISK if status == "failed" else "")
    palette = {"Comfy.ColorPalette": theme, "Comfy.Minimap.Visible": False}
    page = open_page(**{"Comfy.VueNodes.Enabled": vue, "Comfy.Locale": locale, **palette})
    page.set_viewport_size({"width": 2600, "height": 900})
    page.evaluate(
        """async (names) => {
            app.graph.clear()
            names.forEach((name, i) => {
                const node = LiteGraph.createNode('TrainLumina2LoRA')
                node.widgets.find(widget => widget.name === 'run_name').value = name
                node.pos = [i * 390, 0]
                app.graph.add(node)
                node.setSize([380, node.computeSize()[1]])
            })
            await app.loadGraphData(app.graph.serialize())
            const [first] = app.graph._nodes
            app.canvas.ds.scale = 1 / Math.max(1, first.size[0] / 380)
            app.canvas.ds.offset = [90 - first.pos[0], 130 - first.pos[1]]
            app.canvas.setDirty(true, true)
        }""",
        list(STATES),
    )
    for texts in STATES.values():
        page.wait_for_function(
            "text => [...document.querySelectorAll('.lumina2-panel')].some(panel => panel.innerText.includes(text))",
            arg=texts[locale == "zh"],
            timeout=WAIT_MS,
        )
    page.wait_for_function("document.querySelectorAll('.lumina2-strip img').length >= 12", timeout=WAIT_MS)
    assert page.locator(".lumina2-error", has_text="disk is full").count() == 1
    heights = page.evaluate("[...document.querySelectorAll('.lumina2-panel')].map(panel => panel.offsetHeight)")
    assert len(heights) == len(STATES)
    assert min(heights) >= 260, "also where the frontend ignores the widget's own minimum"
    row = f"{'Nodes 2.0' if vue else 'classic'}, {locale}, {theme}"
    unnamed = page.evaluate(
        """[...document.querySelectorAll('.lumina2-panel :is(button, input, canvas, img)')].filter(element =>
               !(element.ariaLabel || element.alt || element.textContent.trim())).map(element => element.outerHTML)"""
    )
    assert unnamed == [], "screen readers would not know what these are"
    page.wait_for_timeout(1500)
    sheet(page, row)
    shot(page, f"states-{'vue' if vue else 'classic'}-{locale}-{theme}")
    server.ask("/settings/Comfy.ColorPalette", "dark")
    assert ours(page) == []


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_the_sidebar_lists_opens_compares_and_deletes(open_page, server, locale):
    folder = write_run(server, "first", seed=42, learning_rate=1e-3).parent
    write_run(server, "second", seed=7, learning_rate=1e-3)
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": locale})
    words = {"en": ["Compare", "Settings", "Delete"], "zh": ["比较", "设置", "删除"]}[locale]
    compare, settings, delete = words
    page.locator(".lumina2-runs-tab-button, [class*='lumina2-runs']").first.click()
    sidebar = page.locator(".lumina2-sidebar")
    sidebar.locator("[data-run=first]").wait_for(timeout=WAIT_MS)
    shot(page, f"sidebar-list-{locale}")
    sidebar.get_by_label(compare).check()
    sidebar.locator("[data-run=first]").click()
    sidebar.locator("[data-run=second]").click()
    sidebar.get_by_text("first ↔ second").wait_for()
    sidebar.locator("td", has_text="seed").wait_for(timeout=WAIT_MS)
    shot(page, f"sidebar-compare-{locale}")
    sidebar.get_by_role("button").first.click()
    sidebar.get_by_label(compare).uncheck()
    sidebar.locator("[data-run=first]").click()
    sidebar.locator("canvas").first.wait_for()
    shot(page, f"sidebar-curves-{locale}")
    sidebar.get_by_role("tab").nth(1).click()
    sidebar.locator("td img").first.wait_for(timeout=WAIT_MS)
    shot(page, f"sidebar-samples-{locale}")
    sidebar.get_by_role("tab", name=settings).click()
    sidebar.locator("td", has_text="learning_rate").first.wait_for(timeout=WAIT_MS)
    shot(page, f"sidebar-settings-{locale}")
    sidebar.get_by_role("button", name=delete, exact=True).click()
    shot(page, f"sidebar-delete-{locale}")
    assert (folder / "first").exists(), "it is asked once"
    page.locator(".lumina2-confirm").get_by_role("button", name=delete).click()
    sidebar.locator("[data-run=second]").wait_for(timeout=WAIT_MS)
    assert not (folder / "first").exists()
    assert (folder / "second").exists()
    assert ours(page) == []


def test_nodes_2_a_subgraph_and_chinese(open_page, load_template, server):
    page = open_page(**{"Comfy.VueNodes.Enabled": True, "Comfy.Locale": "zh"})
    load_template(page)
    train(page, run_name="inside", steps=100_000)
    look_at_train_node(page)
    says(page, "尚未训练")
    box = page.locator(".lumina2-panel").first.bounding_box()
    assert box["height"] >= 260
    shot(page, "panel-idle-vue-zh")
    page.evaluate(
        """() => {
            const train = app.graph._nodes.find(node => node.type === 'TrainLumina2LoRA')
            const { subgraph } = app.graph.convertToSubgraph(new Set([train]))
            app.canvas.openSubgraph ? app.canvas.openSubgraph(subgraph) : app.canvas.setGraph(subgraph)
        }"""
    )
    look_at_train_node(page)
    says(page, "≈ 新任务")
    page.evaluate("app.queuePrompt(0, 1)")
    says(page, "训练中")
    page.wait_for_function(f"/[1-9]\\d+\\/100000/.test({PANEL}.innerText)", timeout=WAIT_MS)
    shot(page, "panel-training-vue-zh")
    press(page, "停止并保留")
    says(page, "已停止并保留")
    assert run_json(server, "inside")["status"] == "stopped"
    shot(page, "panel-stopped-vue-zh")
    assert ours(page) == []


def test_an_error_stands_on_the_panel_and_marks_its_widget(open_page, load_template):
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"})
    load_template(page)
    train(page, run_name="not/allowed", steps=3)
    look_at_train_node(page)
    page.wait_for_function(
        "app.graph._nodes.find(n => n.type === 'TrainLumina2LoRA').widgets[0].label.includes('⚠')", timeout=WAIT_MS
    )
    page.evaluate("app.queuePrompt(0, 1)")
    page.locator(".lumina2-panel .lumina2-error").wait_for(timeout=WAIT_MS)
    assert "cannot be a folder" in page.locator(".lumina2-panel .lumina2-error").inner_text()
    shot(page, "panel-failed-classic")


def test_folders_are_offered_where_they_are_typed(open_page, load_template, server):
    (server.base / "input" / "holiday photos").mkdir(exist_ok=True)
    page = open_page(**{"Comfy.VueNodes.Enabled": True, "Comfy.Locale": "en"})
    load_template(page)
    page.evaluate(
        """() => {
            app.canvas.ds.scale = 1
            app.canvas.centerOnNode(app.graph._nodes.find(node => node.type === 'Lumina2LoadDataset'))
            const config = LiteGraph.createNode('Lumina2LoadConfig')
            app.graph.add(config)
            config.widgets[0].value = 'bundled: nano-simpletuner'
            config.pos = [0, -600]
        }"""
    )
    number = page.evaluate("app.graph._nodes.find(node => node.type === 'Lumina2LoadDataset').id")
    field = page.locator(f"[data-node-id='{number}'] input[type=text]").first
    field.click()
    options = page.locator(".lumina2-options li")
    options.first.wait_for(timeout=WAIT_MS)
    field.fill("holi")
    page.locator(".lumina2-options li", has_text="holiday photos").click()
    shot(page, "folders-vue")
    page.wait_for_function(
        "app.graph._nodes.find(n => n.type === 'Lumina2LoadDataset').widgets[0].value === 'holiday photos'",
        timeout=WAIT_MS,
    )


def test_what_a_dataset_gave_stands_on_its_node(open_page, load_template):
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"})
    load_template(page)
    train(page, run_name="looked at", steps=2)
    page.evaluate(
        """() => {
            app.canvas.ds.scale = 1
            app.canvas.centerOnNode(app.graph._nodes.find(node => node.type === 'Lumina2LoadDataset'))
            app.queuePrompt(0, 1)
        }"""
    )
    shown = page.locator(".lumina2-dataset", has=page.locator("img"))
    shown.get_by_text("pictures: 16 · buckets: 1").wait_for(timeout=WAIT_MS)
    assert shown.locator("img").count() == 6
    report = page.locator(".lumina2-report")
    report.get_by_text("lora_dropout 0.1 (ours 0.0)").wait_for(timeout=WAIT_MS, state="attached")
    assert "Switch adopt_our_defaults on" in report.text_content(), "what was understood stands on the node"
    shot(page, "dataset-classic")
    assert ours(page) == []
