"""Make ``example_workflows`` from their descriptions, in the real page: it knows what its nodes need.

    LUMINA2_CHROMIUM=… COMFYUI_PATH=… python -m scripts.templates.make [--run] [name …]

Writes a workflow for each; with ``--run`` those whose thumbnail is not drawn (``thumbnails.py``) are run too, on the
bundled model, and what one draws is its thumbnail.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts")]

from comfy_server import Server  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402

from .descriptions import RUN_INSTEAD, TEMPLATES  # noqa: E402
from .layout import COLORS, Group, Node, notes, place  # noqa: E402
from .thumbnails import DRAWN  # noqa: E402

OUT = ROOT / "example_workflows"
SLACK = 1.08  # other frontends draw widgets a little taller
THUMBNAIL_PX = (512, 288)
GROUND = "#202020"

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
}

BUILD = """async ({nodes, groups}) => {
    app.graph.clear()
    const made = {}
    for (const each of nodes) {
        const node = LiteGraph.createNode(each.type)
        if (!node) throw new Error('no node ' + each.type)
        app.graph.add(node)
        made[each.key] = node
        if (each.title) node.title = each.title
        if (each.color) [node.color, node.bgcolor] = each.color
        if (each.models?.length) node.properties.models = each.models
        for (const [name, value] of Object.entries(each.widgets)) {
            const widget = name ? node.widgets.find(w => w.name === name) : node.widgets[0]
            if (!widget) throw new Error(`${each.type} has no widget ${name}`)
            widget.value = value
        }
    }
    for (const each of nodes)
        for (const [input, from] of Object.entries(each.wires)) {
            const [key, output] = from.split('.')
            const source = made[key], target = made[each.key]
            const slot = source?.outputs.findIndex(o => o.name === output)
            const place = target.inputs.findIndex(i => i.name === input)
            if (!(slot >= 0 && place >= 0)) throw new Error(`no wire ${from} to ${each.type}.${input}`)
            if (!source.connect(slot, target, place)) throw new Error(`${from} does not fit ${each.type}.${input}`)
        }
    await new Promise(resolve => setTimeout(resolve, 300))
    return Object.fromEntries(nodes.map(each => [each.key, Math.ceil(made[each.key].computeSize()[1])]))
}"""

ARRANGE = """({placed, groups}) => {
    const nodes = app.graph._nodes
    for (const each of placed) {
        const node = nodes[each.index]
        node.pos = [each.x, each.y]
        node.setSize([each.width, each.height])
    }
    const saved = app.graph.serialize()
    saved.groups = groups
    return JSON.stringify(saved)
}"""

PROMPT = "async workflow => { await app.loadGraphData(workflow); return (await app.graphToPrompt()).output }"


def main(arguments: list[str]) -> None:
    run, names = "--run" in arguments, [each for each in arguments if each != "--run"]
    chosen = {name: groups for name, groups in TEMPLATES.items() if not names or name in names}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]), Path(folder) / "base")
        with server:
            for setting, value in SETTINGS.items():
                server.ask(f"/settings/{setting}", value)
            browser = playwright.chromium.launch(
                executable_path=os.environ["LUMINA2_CHROMIUM"], args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1600, "height": 900})
            page.goto(server.url)
            page.wait_for_function(
                "!!(window.app?.graph && LiteGraph.registered_node_types['TrainLumina2LoRA'])", timeout=120_000
            )
            for name, groups in chosen.items():
                workflow = build(page, name, groups)
                text = json.dumps(workflow, indent=1, ensure_ascii=False)
                (OUT / f"{name}.json").write_text(text + "\n", encoding="utf-8")
                if run and name not in DRAWN:
                    on_nano = build(page, name, RUN_INSTEAD.get(name, groups))
                    server.run(page.evaluate(PROMPT, on_nano))
                    thumbnail(server.base / "output" / "lumina2", OUT / f"{name}.jpg")
                print(name, len(workflow["nodes"]), "nodes")
            browser.close()


def build(page: Page, name: str, groups: tuple[Group, ...]) -> dict[str, Any]:
    nodes = [*notes(groups), *(node for group in groups for column in group.columns for node in column)]
    heights = page.evaluate(BUILD, {"nodes": [written(node) for node in nodes], "groups": []})
    heights = {key: round(height * SLACK) for key, height in heights.items()}
    placed, frames = place(groups, heights)
    index = {node.key: number for number, node in enumerate(nodes)}
    spots = [
        {"index": index[each.node.key], "x": each.x, "y": each.y, "width": each.width, "height": each.height}
        for each in placed
    ]
    workflow: dict[str, Any] = json.loads(page.evaluate(ARRANGE, {"placed": spots, "groups": frames}))
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"lumina2-trainer/{name}"))  # the same each time
    workflow["extra"] = {"ds": {"scale": 0.55, "offset": [40, 120]}}
    return workflow


def written(node: Node) -> dict[str, Any]:
    return {
        "key": node.key,
        "type": node.type,
        "widgets": dict(node.widgets),
        "wires": dict(node.wires),
        "title": node.title,
        "color": COLORS.get(node.color),
        "models": [dict(each) for each in node.models],
    }


def thumbnail(pictures: Path, path: Path) -> None:
    """What was drawn last, the pictures without and with what was trained, as large as they fit."""
    drawn = sorted(pictures.glob("compare_*.png"), key=lambda file: file.stat().st_mtime)
    opened = [Image.open(file).convert("RGB") for file in drawn[-4:]]
    columns = 2 if len(opened) > 1 else 1
    rows = -(-len(opened) // columns)
    width, height = opened[0].size
    scale = min((THUMBNAIL_PX[0] - 16) / (columns * (width + 8)), (THUMBNAIL_PX[1] - 16) / (rows * (height + 8)))
    thumb = Image.new("RGB", THUMBNAIL_PX, GROUND)
    cell = (round((width + 8) * scale), round((height + 8) * scale))
    left, top = ((THUMBNAIL_PX[0] - columns * cell[0]) // 2, (THUMBNAIL_PX[1] - rows * cell[1]) // 2)
    for number, each in enumerate(opened):
        small = each.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
        thumb.paste(small, (left + number % columns * cell[0], top + number // columns * cell[1]))
        each.close()
    thumb.save(path, quality=85)
    for file in drawn:
        file.unlink()


if __name__ == "__main__":
    main(sys.argv[1:])
