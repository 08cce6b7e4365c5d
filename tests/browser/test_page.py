"""The real ComfyUI page in a real Chromium: nodes, template and texts, in both renderers and both languages."""

import json
import os
from pathlib import Path

import pytest
from graphs import is_ours, saved_values

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "01_quickstart_nano"
TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
WAIT_MS = 120_000
GROUPS = ["1 Model", "2 Pictures", "3 Prepare", "4 Train", "5 Compare"]


@pytest.mark.parametrize("vue", [False, True], ids=["classic", "Nodes 2.0"])
def test_the_template_loads_as_it_was_saved(open_page, load_template, server, vue):
    assert sorted(server.ask("/workflow_templates")["lumina2-trainer"]) == TEMPLATES
    page = open_page(**{"Comfy.VueNodes.Enabled": vue, "Comfy.Locale": "en"})
    asked = len(page.scripts)
    page.evaluate("window.setUp = app.extensions.find(each => each.name === 'lumina2-trainer').setup()")
    assert page.evaluate("window.setUp === undefined"), "it awaits nothing"
    assert [url for url in page.scripts[asked:] if "umina2" in url] == [], "it asks for nothing"
    assert [url for url in page.scripts if "/lumina2/" in url] == [], "nor did anything else of ours yet"
    load_template(page)
    saved = json.loads((ROOT / "example_workflows" / f"{TEMPLATE}.json").read_text(encoding="utf-8"))
    shown = page.evaluate("app.graph.serialize()")
    by_id = {node["id"]: node for node in shown["nodes"]}
    for node in saved["nodes"]:
        here = by_id[node["id"]]
        assert here["type"] == node["type"]
        if node["type"] != "MarkdownNote":
            assert (here.get("widgets_values") or []) == (node.get("widgets_values") or []), node["type"]
    assert [group["title"] for group in shown["groups"]] == GROUPS
    assert len(shown["links"]) == len(saved["links"])

    missing = page.evaluate(
        "app.graph._nodes.filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type]).length"
    )
    assert missing == 0
    widgets = page.evaluate(
        """app.graph._nodes.find(n => n.type === 'TrainLumina2LoRA').widgets
               .map(w => ({name: w.name, hidden: !!w.hidden, serialized: w.serialize !== false}))"""
    )
    assert {w["name"] for w in widgets if w["hidden"]} == {"continue_token", "attempt"}
    assert [w["name"] for w in widgets if not w["serialized"]] == ["lumina2_panel"]
    sent = page.evaluate("app.graphToPrompt().then(p => p.output)")
    train = next(node for node in sent.values() if node["class_type"] == "TrainLumina2LoRA")
    assert (train["inputs"]["steps"], train["inputs"]["continue_token"], train["inputs"]["attempt"]) == (500, 0, 0)

    if vue:
        page.evaluate(
            """() => {
                app.canvas.ds.scale = 1  // far out, the page draws no widgets
                app.canvas.centerOnNode(app.graph._nodes.find(node => node.type === 'TrainLumina2LoRA'))
            }"""
        )
        node = page.locator("[data-node-id]:visible").filter(has_text="Train Lumina2 LoRA")
        node.get_by_text("learning_rate").wait_for(timeout=30_000)
        assert "run_name" in node.inner_text()
        assert "continue_token" not in node.inner_text()
    ours = [url for url in page.scripts if "/extensions/lumina2-trainer/" in url and url.endswith(".js")]
    assert len(ours) == len(set(ours)) == 1, ours
    if os.environ.get("LUMINA2_SHOTS"):
        page.evaluate("app.canvas.ds.fitToBounds?.([0, 0, 3400, 1150])")
        page.wait_for_timeout(1500)
        page.screenshot(path=f"{os.environ['LUMINA2_SHOTS']}/template-{'vue' if vue else 'classic'}.png")


def test_every_template_and_saved_workflow_loads_with_its_nodes_apart_and_its_values_in_place(open_page, load_template):
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"})
    for name in TEMPLATES:
        load_template(page, name)
        unknown = page.evaluate(
            "app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
        )
        assert unknown == [], name
        boxes = page.evaluate(
            "app.graph._nodes.map(n => [n.title, n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]])"
        )
        groups = page.evaluate(
            "app.graph._groups.map(g => [g.pos[0], g.pos[1], g.pos[0] + g.size[0], g.pos[1] + g.size[1]])"
        )
        for index, (title, left, top, right, bottom) in enumerate(boxes):
            inside = [g for g in groups if g[0] <= left and g[1] <= top and right <= g[2] and bottom <= g[3]]
            assert len(inside) == 1, f"{name}: {title} lies in {len(inside)} groups"
            for other, *box in boxes[index + 1 :]:
                apart = right <= box[0] or box[2] <= left or bottom <= box[1] or box[3] <= top
                assert apart, f"{name}: {title} overlaps {other}"
    for path in sorted((ROOT / "tests" / "comfy" / "saved").glob("2026-11-24-*.json")):
        saved = json.loads(path.read_text(encoding="utf-8"))
        shown = page.evaluate(
            """async (saved) => {
                await app.loadGraphData(saved)
                const values = node => (node.widgets ?? []).map(widget => [widget.name, widget.value])
                return Object.fromEntries(app.graph._nodes.map(node => [node.id, Object.fromEntries(values(node))]))
            }""",
            saved,
        )
        for node in filter(is_ours, saved["nodes"]):
            for name, value in saved_values(node).items():
                assert shown[str(node["id"])][name] == value, f"{path.stem}: {node['type']}.{name}"


def shorter(route):
    """The quick start with six steps."""
    workflow = json.loads((ROOT / "example_workflows" / f"{TEMPLATE}.json").read_text(encoding="utf-8"))
    train = next(node for node in workflow["nodes"] if node["type"] == "TrainLumina2LoRA")
    train["widgets_values"][:2] = ["four clicks", 6]
    route.fulfill(json=workflow)


def test_four_clicks_lead_from_the_page_to_a_lora(open_page, wait_for_lora):
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"})
    page.route(f"**/workflow_templates/lumina2-trainer/{TEMPLATE}.json", shorter)
    page.locator(".templates-tab-button").click()
    page.get_by_role("dialog").get_by_text("lumina2-trainer").click()
    page.get_by_test_id(f"template-workflow-{TEMPLATE}").click()
    page.wait_for_function("app.graph._nodes.some(node => node.type === 'TrainLumina2LoRA')", timeout=WAIT_MS)
    page.get_by_test_id("queue-button").click()
    wait_for_lora(page, "four clicks")
    shown = page.locator(".lumina2-dataset")
    shown.get_by_text("pictures: 16 · buckets: 1").wait_for(timeout=WAIT_MS)
    assert shown.locator("img").count() == 6


def test_the_page_speaks_chinese(open_page):
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "zh"})
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    page.evaluate("names => names.forEach(name => app.graph.add(LiteGraph.createNode(name)))", list(chinese))
    nodes = page.evaluate(
        """Object.fromEntries(app.graph._nodes.map(node => {
            const parts = [...node.inputs, ...node.outputs, ...node.widgets ?? []]
            return [node.type, {title: node.title, labels: parts.flatMap(p => [p.label, p.localized_name])}]
        }))"""
    )
    if os.environ.get("LUMINA2_SHOTS"):
        page.screenshot(path=f"{os.environ['LUMINA2_SHOTS']}/zh.png")
    for name, texts in chinese.items():
        assert nodes[name]["title"] == texts["display_name"]
        for text in (*texts["inputs"].values(), *texts.get("outputs", {}).values()):
            assert text["name"] in nodes[name]["labels"], name
