"""The live panel and the sidebar on the real page, while the nano model really trains."""

import json
import math
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from graphs import run_json

from training.cache.facts import DatasetFacts
from training.config.settings import TrainSettings
from training.files import write_json, write_tensors
from training.report.story import About

ROOT = Path(__file__).resolve().parents[2]
BUDGET = {".js": 40_000, "": 150_000}  # bytes that every page loads, and all there are
PANEL = "[...document.querySelectorAll('.lumina2-panel')].find(panel => panel.isConnected)"
WAIT_MS = 120_000


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


def test_what_every_page_loads_is_small():
    sizes = {path: path.stat().st_size for path in (ROOT / "web" / "js").iterdir()}
    for ending, most in BUDGET.items():
        assert sum(size for path, size in sizes.items() if path.name.endswith(ending)) <= most


def test_a_training_is_watched_reloaded_stopped_and_continued(open_page, load_template, server):
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"})
    load_template(page)
    train(page, run_name="watched")
    look_at_train_node(page)
    says(page, "≈ new")
    says(page, "Needs ≈")
    before = {url for url in page.scripts if "/lumina2-trainer/js/" in url}
    assert sum(url.endswith(".js") for url in before) == 1
    badge = "app.extensionManager.getSidebarTabs().find(tab => tab.id === 'lumina2-runs').iconBadge"
    assert not page.evaluate(badge)
    page.evaluate("() => { app.graph.add(LiteGraph.createNode('LoraLoaderModelOnly')) }")
    page.evaluate("app.queuePrompt(0, 1)")
    says(page, "Training")
    says(page, "Uses")
    page.wait_for_function(f"{badge} === '1'", timeout=WAIT_MS)
    page.wait_for_function(f"/[1-9]\\d+\\/100000/.test({PANEL}.innerText)", timeout=WAIT_MS)
    seen = steps_shown(page)
    page.wait_for_function(
        f"(seen) => Number({PANEL}.innerText.match(/(\\d+)\\/100000/)[1]) > seen", arg=seen, timeout=WAIT_MS
    )
    page.wait_for_function(f"{PANEL}.querySelector('.lumina2-chart-empty').hidden", timeout=WAIT_MS)

    press(page, "Pause")
    says(page, "Paused")
    press(page, "Sample now")
    prompt = page.locator(".lumina2-drawer input")
    assert prompt.is_disabled(), "no CLIP is wired: a typed prompt could not be read"
    page.keyboard.press("Escape")
    assert page.locator(".lumina2-drawer").count() == 0
    press(page, "Sample now")
    page.locator(".lumina2-drawer").get_by_role("button", name="Draw").click()
    page.locator(".lumina2-panel .lumina2-strip img").first.wait_for(timeout=WAIT_MS)
    page.locator(".lumina2-panel .lumina2-thumb").first.click()
    page.locator(".lumina2-viewer img").first.wait_for()
    shot(page, "viewer")
    page.keyboard.press("Escape")
    assert page.locator(".lumina2-viewer").count() == 0
    press(page, "⋯")
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

    press(page, "Stop & keep")
    says(page, "Stopped and kept")
    says(page, "≈ kept at")
    page.wait_for_function(f"!{badge}", timeout=WAIT_MS)
    page.wait_for_function(
        """() => {
            const { values } = app.graph._nodes.find(node => node.type === 'LoraLoaderModelOnly').widgets[0].options
            return (typeof values === 'function' ? values() : values).includes('lumina2/watched.safetensors')
        }""",
        timeout=WAIT_MS,
    )
    kept = run_json(server, "watched")
    assert kept["status"] == "stopped"
    assert steps_shown(page) == kept["step"]

    page.evaluate(
        "step => app.graph._nodes.find(n => n.type === 'TrainLumina2LoRA')"
        ".widgets.find(w => w.name === 'steps').value = step",
        kept["step"] + 4,
    )
    says(page, "≈ continues at", "≈ kept at")
    press(page, "Continue training")
    says(page, "Finished")
    assert run_json(server, "watched")["step"] == kept["step"] + 4
    press(page, "Add LoRA loader")
    page.wait_for_function(
        """() => app.graph._nodes.filter(node => node.type === 'LoraLoaderModelOnly')
               .at(-1).widgets[0].value === 'lumina2/watched.safetensors'""",
        timeout=WAIT_MS,
    )


def write_run(server, name, status="finished", step=300, target=300, message="", left_out=(), **settings):
    """A run's folder as training leaves it, with samples of the base model and of the last step, and its LoRA."""
    folder = server.base / "output" / "lumina2" / name
    written = TrainSettings(steps=target).written() | settings
    record = {"name": name, "folder": name, "identity": name, "status": status, "step": step, "target": target}
    write_json(folder / "run.json", record | {"settings": written})
    facts = DatasetFacts("photos", 16, 1, sizes=("1024×1024", "832×1216"))
    write_json(folder / "report.json", {"about": asdict(About(datasets=(facts,), left_out=tuple(left_out)))})
    checkpoint = folder / f"checkpoint-{step}"
    write_json(checkpoint / "checkpoint.json", {"identity": name, "step": step})
    lora = server.base / "models" / "loras" / "lumina2" / f"{name}.safetensors"
    about = {"lumina2_trainer.identity": name, "modelspec.title": name}
    for file in (lora, checkpoint / "lora.safetensors", checkpoint / "state.safetensors"):
        write_tensors(file, {"weight": torch.zeros(8)}, about)
    lines = [{"event": "Started", "time": 1e9, "run": name, "step": 0}]
    for n in range(1, step + 1):
        loss = 0.3 + 1 / (n + 2) + 0.05 * math.sin(n * 12.9898) * math.sin(n * 78.233)
        told = {"lr": 1e-4, "grad_norm": 0.5 + loss / 9, "memory": 8_400_000_000 + 2_000_000 * (n % 7)}
        lines.append({"step": n, "loss": loss, "time": 1e9 + n / 3, **told})
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
    if status != "running":
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
LIVE = "kyoto-style"
TOLD = {"run_id": LIVE, "node_id": "LIVE", "status": "running", "step": 231, "target": 300, "loss": 0.318}
TOLD |= {"steps_per_second": 2.9, "seconds_left": 180, "epoch": 7.2, "events": []}
CACHING = {"state": "running", "node_id": "CACHE", "display_node_id": "CACHE", "max": 20}
# What the server sends while a prompt goes on, and what the panel says then.
GOES_ON = {
    ("Waiting for its turn", "等待运行"): [("execution_start", {})],
    ("Preparing 5/20", "正在准备 5/20"): [
        ("progress_state", {"nodes": {"CACHE": CACHING | {"value": 0}}}),
        ("progress_state", {"nodes": {"CACHE": CACHING | {"value": 5}}}),
    ],
    ("Training", "训练中"): [("lumina2.run", TOLD | {"doing": "training"})],
    ("Paused", "已暂停"): [("lumina2.run", TOLD | {"doing": "paused"})],
    ("Drawing samples", "正在生成验证样图"): [("lumina2.run", TOLD | {"doing": "validating"})],
    ("Saving", "正在保存"): [("lumina2.run", TOLD | {"doing": "saving"})],
}
HANDED_OUT = [
    ("execution_success", {}),
    ("execution_start", {}),
    ("executed", {"node": "HANDED", "output": {"lumina2": [{"run_id": "handed out"}]}}),
    ("execution_success", {}),
]
TRAINED = ("Already trained: nothing to do", "已训练过：无需再训练")
TELL = """(told) => {
    const ids = {LIVE: app.graph._nodes[6].id, HANDED: app.graph._nodes[7].id, CACHE: app.graph._nodes[8].id}
    const text = JSON.stringify(told).replace(/"(LIVE|HANDED|CACHE)"/g, (_, name) => `"${ids[name]}"`)
    for (const [name, detail] of JSON.parse(text)) app.api.dispatchEvent(new CustomEvent(name, {detail}))
}"""


def panel_of(page, number):
    return page.locator(f".lumina2-panel[data-number='{number}']")


def state_of(page, number):
    return panel_of(page, number).get_by_role("status")


def show_states(page):
    """Train nodes with every state that a folder tells, one that goes on, one that is handed out, and a cache."""
    page.evaluate(
        """async (names) => {
            app.graph.clear()
            const add = (type, column, row) => {
                const node = LiteGraph.createNode(type)
                node.pos = [column * 390, row * 860]
                app.graph.add(node)
                return node
            }
            names.forEach((name, i) => {
                const node = add('TrainLumina2LoRA', i % 4, Math.floor(i / 4))
                for (const widget of node.widgets) if (widget.name === 'run_name') widget.value = name
                for (const widget of node.widgets) if (widget.name === 'steps') widget.value = 300
                node.setSize([380, node.computeSize()[1]])
            })
            add('Lumina2CacheLatents', 4, 0)
            await app.loadGraphData(app.graph.serialize())
            const [first] = app.graph._nodes
            app.canvas.ds.scale = 1 / Math.max(1, first.size[0] / 380)
            app.canvas.ds.offset = [90 - first.pos[0], 130 - first.pos[1]]
            app.canvas.setDirty(true, true)
        }""",
        [*STATES, LIVE, "handed out"],
    )
    page.wait_for_function("document.querySelectorAll('.lumina2-panel .lumina2-state').length === 8", timeout=WAIT_MS)
    page.evaluate(
        """() => app.graph._nodes.forEach((node, number) => {
            const panel = node.widgets?.find(widget => widget.name === 'lumina2_panel')
            if (panel) panel.element.dataset.number = number
        })"""
    )


@pytest.mark.parametrize(
    ("vue", "locale", "theme"),
    [(False, "en", "dark"), (False, "zh", "light"), (True, "zh", "dark"), (True, "en", "light")],
    ids=["classic en dark", "classic zh light", "Nodes 2.0 zh dark", "Nodes 2.0 en light"],
)
def test_every_state_has_its_sentence(open_page, server, sheet, check_accessible, vue, locale, theme):
    for status in ("finished", "stopped", "interrupted", "failed"):
        step = 300 if status == "finished" else 230
        write_run(server, status, status, step, message=FULL_DISK if status == "failed" else "")
    write_run(server, LIVE, "running", 230)
    write_run(server, "handed out")
    looks = {"Comfy.VueNodes.Enabled": vue, "Comfy.Locale": locale, "Comfy.ColorPalette": theme}
    page = open_page(**looks, **{"Comfy.Minimap.Visible": False})
    page.set_viewport_size({"width": 1760, "height": 2000})
    row = f"{'Nodes 2.0' if vue else 'classic'}, {locale}"
    others = {"dark", "light"} - {theme} if os.environ.get("LUMINA2_SHOTS") else ()
    for now in (theme, *others):
        page.evaluate("theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", now)
        show_states(page)
        walk_through_states(page, locale == "zh", lambda part, now=now: sheet(f"panel-{locale}", f"{row}, {now}", part))
        check_accessible(page, ".lumina2-panel")
    heights = page.evaluate("[...document.querySelectorAll('.lumina2-panel')].map(panel => panel.offsetHeight)")
    assert min(heights) >= 260, "also where the frontend ignores the widget's own minimum"
    server.ask("/settings/Comfy.ColorPalette", "dark")


def walk_through_states(page, language, look):
    for number, texts in enumerate(STATES.values()):
        state_of(page, number).get_by_text(texts[language]).wait_for(timeout=WAIT_MS)
    for number in (1, 2, 3):
        panel_of(page, number).locator(".lumina2-strip img").nth(3).wait_for(timeout=WAIT_MS)
    assert panel_of(page, 4).locator(".lumina2-error", has_text="disk is full").count() == 1
    panel_of(page, 1).get_by_text(("≈ already trained", "≈ 已训练过")[language]).wait_for(timeout=WAIT_MS)
    for number in range(len(STATES)):
        look(panel_of(page, number))
    for texts, told in GOES_ON.items():
        page.evaluate(TELL, told)
        state_of(page, 6).get_by_text(texts[language]).wait_for(timeout=WAIT_MS)
        look(panel_of(page, 6))
    page.evaluate(TELL, HANDED_OUT)
    state_of(page, 7).get_by_text(TRAINED[language]).wait_for(timeout=WAIT_MS)
    look(panel_of(page, 7))


RICH = {"optimizer": "optimi-lion", "learning_rate": 2e-5, "seed": 7, "flow_use_uniform_schedule": True}
RICH |= {"gradient_checkpointing": True, "lora_rank": 8, "lora_alpha": 4.0, "lora_use_dora": True, "lora_qkv": "split"}


@pytest.mark.parametrize(("locale", "theme"), [("en", "dark"), ("zh", "light")])
def test_the_sidebar_lists_opens_compares_copies_and_deletes(open_page, server, sheet, check_accessible, locale, theme):
    folder = write_run(server, "first", left_out=("cats/4.png is no picture. Delete it.",)).parent
    write_run(server, "second", **RICH)
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": locale, "Comfy.ColorPalette": theme})
    words = {
        "en": [
            "Compare",
            "Samples",
            "Checkpoints",
            "Data",
            "Settings",
            "Copy to a new node",
            "Delete",
            "already trained",
        ],
        "zh": ["比较", "样图", "检查点", "数据", "设置", "复制到新节点", "删除", "已训练过"],
    }[locale]
    compare, samples, checkpoints, data, settings, copy, delete, trained = words
    page.route("**/lumina2/runs*", lambda route: route.fulfill(json={"runs": []}), times=1)
    page.locator(".lumina2-runs-tab-button").click()
    sidebar = page.locator(".lumina2-sidebar")
    sidebar.locator(".lumina2-empty").get_by_role("button").click()
    page.wait_for_function("app.graph._nodes.some(node => node.type === 'TrainLumina2LoRA')", timeout=WAIT_MS)
    page.evaluate("() => { app.graph.clear(); app.api.dispatchEvent(new CustomEvent('lumina2.run', {detail: {}})) }")

    row = f"{locale}, {theme}: runs, compare, curves, samples, checkpoints, data, settings, delete"

    def look():
        sheet("sidebar", row, sidebar)
        check_accessible(page, ".lumina2-sidebar")

    sidebar.locator("[data-run=first]").wait_for(timeout=WAIT_MS)
    look()
    sidebar.get_by_label(compare).check()
    sidebar.locator("[data-run=first]").click()
    sidebar.locator("[data-run=second]").click()
    sidebar.get_by_text("first ↔ second").wait_for()
    sidebar.locator("td", has_text="seed").wait_for(timeout=WAIT_MS)
    sidebar.locator("td img").nth(5).wait_for(timeout=WAIT_MS)
    assert sidebar.locator("td img").count() == 6, "three prompts, both runs beside each other"
    look()
    sidebar.get_by_role("button").first.click()
    sidebar.get_by_label(compare).uncheck()
    sidebar.locator("[data-run=first]").click()
    sidebar.locator("canvas").first.wait_for()
    look()

    sidebar.get_by_role("tab", name=samples).click()
    sidebar.locator("td img").nth(5).click()
    viewer = page.locator(".lumina2-viewer")
    shown = viewer.locator("img").first
    last = shown.get_attribute("alt")
    viewer.get_by_role("slider").fill("80")
    assert page.locator(".lumina2-pair").evaluate("each => each.style.getPropertyValue('--cut')") == "80%"
    check_accessible(page, ".lumina2-viewer")
    viewer.get_by_role("button").last.focus()
    page.keyboard.press("ArrowRight")
    assert shown.get_attribute("alt") != last, "arrows walk"
    page.keyboard.press("ArrowLeft")
    assert shown.get_attribute("alt") == last
    page.keyboard.press("Escape")
    assert viewer.count() == 0
    look()

    sidebar.get_by_role("tab", name=checkpoints).click()
    link = sidebar.locator("a[download]")
    link.wait_for(timeout=WAIT_MS)
    with page.expect_download() as downloaded:
        link.click()
    assert downloaded.value.suggested_filename == "first-300.safetensors"
    look()
    sidebar.get_by_role("tab", name=data).click()
    sidebar.get_by_text("cats/4.png is no picture").wait_for(timeout=WAIT_MS)
    look()
    sidebar.get_by_role("button").first.click()

    sidebar.locator("[data-run=second]").click()
    sidebar.get_by_role("tab", name=settings).click()
    sidebar.locator("td", has_text="learning_rate").first.wait_for(timeout=WAIT_MS)
    look()
    sidebar.get_by_role("button", name=copy).click()
    look_at_train_node(page)
    says(page, f"≈ {trained}")
    sidebar.get_by_role("button").first.click()

    sidebar.locator("[data-run=first]").click()
    sidebar.get_by_role("button", name=delete, exact=True).click()
    sheet("sidebar", row, sidebar)
    assert (folder / "first").exists(), "it is asked once"
    page.locator(".lumina2-confirm").get_by_role("button", name=delete).click()
    sidebar.locator("[data-run=second]").wait_for(timeout=WAIT_MS)
    assert not (folder / "first").exists()
    assert (folder / "second").exists()
    server.ask("/settings/Comfy.ColorPalette", "dark")


def test_nodes_2_a_subgraph_chinese_and_folders_offered(open_page, load_template, server):
    (server.base / "input" / "holiday photos").mkdir(exist_ok=True)
    page = open_page(**{"Comfy.VueNodes.Enabled": True, "Comfy.Locale": "zh"})
    load_template(page)
    page.evaluate(
        """() => {
            app.canvas.ds.scale = 1
            app.canvas.centerOnNode(app.graph._nodes.find(node => node.type === 'Lumina2LoadDataset'))
        }"""
    )
    number = page.evaluate("app.graph._nodes.find(node => node.type === 'Lumina2LoadDataset').id")
    field = page.locator(f"[data-node-id='{number}'] input[type=text]").first
    field.click()
    page.locator(".lumina2-options li").first.wait_for(timeout=WAIT_MS)
    field.fill("holi")
    page.locator(".lumina2-options li", has_text="holiday photos").click()
    shot(page, "folders-vue")
    folder = "app.graph._nodes.find(node => node.type === 'Lumina2LoadDataset').widgets[0]"
    page.wait_for_function(f"{folder}.value === 'holiday photos'", timeout=WAIT_MS)
    page.evaluate(f"() => {{ {folder}.value = 'bundled: nano-style' }}")

    train(page, run_name="inside", steps=100_000)
    look_at_train_node(page)
    says(page, "尚未训练")
    box = page.locator(".lumina2-panel").first.bounding_box()
    assert box["height"] >= 260
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


def test_what_widgets_ask_for_is_told_at_once_and_errors_mark_them(open_page, load_template):
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"})
    load_template(page)
    train(page, run_name="asked", steps=3)
    look_at_train_node(page)
    widget = "app.graph._nodes.find(n => n.type === '{}').widgets.find(w => w.name === '{}')".format
    memory = page.locator(".lumina2-panel .lumina2-memory")
    says(page, "Needs ≈")
    needed = memory.inner_text()
    page.evaluate(f"() => {{ {widget('TrainLumina2LoRA', 'batch_size')}.value = 64 }}")
    page.wait_for_function(
        "before => !['', before].includes(document.querySelector('.lumina2-panel .lumina2-memory').innerText)",
        arg=needed,
        timeout=WAIT_MS,
    )

    press(page, "Presets")
    page.locator(".lumina2-drawer").get_by_role("button", name="8 GB").click()
    press(page, "Presets")
    page.locator(".lumina2-drawer").get_by_role("button", name="Style").click()
    values = page.evaluate(
        "Object.fromEntries(app.graph._nodes.flatMap(n => n.widgets ?? []).map(each => [each.name, each.value]))"
    )
    assert (values["batch_size"], values["steps"], values["learning_rate"]) == (1, 2000, 1e-4)
    assert (values["base_model_precision"], values["gradient_checkpointing"]) == ("int8-torchao", "on")
    assert page.evaluate(
        f"[{widget('TrainLumina2LoRA', 'rank')}.value, {widget('Lumina2LoRASettings', 'rank')}.value]"
    ) == [32, 32]

    page.evaluate(f"() => {{ {widget('Lumina2TrainingSettings', 'more')}.value = '{{\"learning_rate\": 0.0005}}' }}")
    page.wait_for_function(
        f"{widget('TrainLumina2LoRA', 'learning_rate')}.label?.includes('from config: 0.0005')", timeout=WAIT_MS
    )
    assert page.evaluate(f"{widget('TrainLumina2LoRA', 'learning_rate')}.disabled")

    page.evaluate(f"() => {{ {widget('TrainLumina2LoRA', 'run_name')}.value = 'not/allowed' }}")
    page.wait_for_function(f"{widget('TrainLumina2LoRA', 'run_name')}.label.includes('⚠')", timeout=WAIT_MS)
    page.evaluate(f"() => {{ {widget('Lumina2TrainingSettings', 'base_model_precision')}.value = 'no_change' }}")
    page.evaluate("app.queuePrompt(0, 1)")
    page.locator(".lumina2-panel .lumina2-error").wait_for(timeout=WAIT_MS)
    assert "cannot be a folder" in page.locator(".lumina2-panel .lumina2-error").inner_text()

    page.evaluate(f"() => {{ {widget('Lumina2LoadDataset', 'folder')}.value = 'no such folder' }}")
    page.evaluate("app.queuePrompt(0, 1)")
    page.wait_for_function(f"{widget('Lumina2LoadDataset', 'folder')}.label?.includes('⚠')", timeout=WAIT_MS)


def test_what_a_dataset_gave_stands_on_its_node(open_page, load_template):
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"})
    load_template(page)
    train(page, run_name="looked at", steps=2)
    page.evaluate(
        """() => {
            app.canvas.ds.scale = 1
            app.canvas.centerOnNode(app.graph._nodes.find(node => node.type === 'Lumina2LoadDataset'))
            const config = LiteGraph.createNode('Lumina2LoadConfig')
            app.graph.add(config)
            config.widgets[0].value = 'bundled: nano-simpletuner'
            config.pos = [0, -600]
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
