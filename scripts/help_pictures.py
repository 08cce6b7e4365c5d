"""Draws the pictures of the nodes' help pages: each node on ComfyUI's page, set as its page's example says.

LUMINA2_CHROMIUM=$(which chromium) python -m scripts.help_pictures [--url http://127.0.0.1:8188] [NODE …]

They go to ``web/docs/<node>/{en,zh}.webp``; without names, all nodes are drawn. Without ``--url`` a ComfyUI is started.
The machine needs a Chinese font, such as Debian's fonts-noto-cjk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "web" / "docs"
LANGUAGES = ("en", "zh")
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.NodeBadge.NodeIdBadgeMode": "None",
}
JSON = {"Content-Type": "application/json"}
SCALE, MARGIN_PX, WIDTH_PX, QUALITY = 1.4, 12, 360, 72

TRIGGER = "a photo of zorblax"
LORA = "lumina2/zorblax.safetensors"
FOREIGN = "pytorch_lora_weights.safetensors"

# What each page's example sets; the rest of the node is as it comes.
EXAMPLES: dict[str, dict[str, Any]] = {
    "Lumina2LoadDiffusers": {"folder": "lumina2-nano (bundled)", "dtype": "auto"},
    "Lumina2LoadDataset": {
        "folder": "my-photos",
        "resolution": 1024,
        "crop": "preserve",
        "caption_strategy": "instanceprompt",
        "instance_prompt": TRIGGER,
    },
    "Lumina2DatasetOptions": {"caption_shuffle": True, "shuffle_count": 3, "keep_tokens": 1, "tag_dropout": 0.1},
    "Lumina2LoadDatasetConfig": {"file": "my-training/multidatabackend.json"},
    "Lumina2DatasetFromImages": {"captions": TRIGGER, "resolution": 512, "crop": "square"},
    "Lumina2DatasetFromLatents": {},
    "Lumina2SaveCaptions": {"overwrite": "keep existing"},
    "Lumina2PreviewDataset": {"limit": 16},
    "Lumina2CacheLatents": {"batch_size": 4},
    "Lumina2CacheTextEmbeds": {"system_prompt": "superior", "max_tokens": 256},
    "Lumina2LoRASettings": {"rank": 32, "alpha": 32, "targets": "attention+ff"},
    "Lumina2LyCORISSettings": {"algo": "lokr", "linear_dim": 10000, "factor": 8},
    "Lumina2TrainingSettings": {
        "optimizer": "adamw_bf16",
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": "on",
        "checkpoint_step_interval": 250,
    },
    "Lumina2SliderSettings": {"positive": "a smiling face", "negative": "a crying face", "scale": 2},
    "Lumina2LoadConfig": {"file": "bundled: nano-simpletuner"},
    "Lumina2SaveConfig": {"name": "zorblax", "steps": 1000, "learning_rate": 0.0001},
    "Lumina2ReportSettings": {"tensorboard": True},
    "TrainLumina2LoRA": {"run_name": "zorblax", "steps": 1000, "learning_rate": 0.0001, "rank": 16},
    "TrainLumina2Full": {"run_name": "my-model", "steps": 2000, "learning_rate": 0.00001, "batch_size": 2},
    "Lumina2LoadRun": {"run": "zorblax", "checkpoint": "checkpoint-500"},
    "Lumina2ValidateSample": {
        "prompts": f"{TRIGGER} on a beach\na photo of a dog",
        "lora": LORA,
        "strengths": "0, 0.5, 1",
    },
    "Lumina2ValidationSettings": {
        "validation_prompt": f"{TRIGGER} on a beach\na photo of a dog",
        "validation_step_interval": 100,
    },
    "Lumina2PushToHub": {"run_or_lora": "zorblax", "repo_id": "zorblax-lumina2"},
    "Lumina2LoadLoRA": {"lora": FOREIGN, "strength": 0.8, "block_strengths": "0-9: 0.5"},
    "Lumina2SaveLoRA": {"name": "zorblax", "format": "diffusers", "dtype": "bf16"},
    "Lumina2ConvertLoRA": {"lora": FOREIGN, "format": "comfyui", "dtype": "bf16"},
    "Lumina2MergeLoRA": {"loras": f"{LORA}: 1\nlumina2/watercolour.safetensors: 0.6", "name": "zorblax-watercolour"},
    "Lumina2ExtractLoRA": {"rank": 32, "name": "my-model-lora"},
    "Lumina2ResizeLoRA": {"lora": LORA, "rank": 8},
}

_SHOW = """([name, values, width]) => {
    app.graph.clear()
    const node = LiteGraph.createNode(name)
    app.graph.add(node)
    for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name]
    const size = node.computeSize()
    node.setSize([Math.max(width, size[0]), size[1]])
    app.canvas.ds.scale = 1
    app.canvas.centerOnNode(node)
    app.canvas.setDirty(true, true)
}"""
_READY = """() => {
    const panel = document.querySelector('.lumina2-panel')  // of a train node; it asks how much memory will be needed
    return !panel || (panel.querySelector('.lumina2-state') && !/…/.test(panel.innerText))
}"""
_BOX = """() => {
    const node = app.graph._nodes[0], [x, y] = app.canvas.ds.offset
    const canvas = app.canvas.canvas.getBoundingClientRect()
    const title = LiteGraph.NODE_TITLE_HEIGHT
    return {x: canvas.x + node.pos[0] + x, y: canvas.y + node.pos[1] + y - title,
            width: node.size[0], height: node.size[1] + title}
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", nargs="*", metavar="NODE", help="the nodes to draw")
    parser.add_argument("--url", help="a ComfyUI with the plugin that runs already")
    options = parser.parse_args()
    with served(options.url) as url:
        draw(url, options.nodes or list(EXAMPLES))


@contextlib.contextmanager
def served(url: str | None) -> Iterator[str]:
    if url:
        yield url
        return
    sys.path.insert(0, str(Path(__file__).parent))
    import environment
    from comfy_server import Server

    made = environment.ensure()
    with (
        tempfile.TemporaryDirectory() as base,
        Server(made.python.absolute(), made.comfyui.resolve(), Path(base)) as server,
    ):
        yield server.url


def draw(url: str, nodes: list[str]) -> None:
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["LUMINA2_CHROMIUM"], args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 1500}, device_scale_factor=SCALE)
        page.set_default_timeout(300_000)
        for language in LANGUAGES:
            for name, value in {**SETTINGS, "Comfy.Locale": language}.items():
                page.request.post(f"{url}/settings/{name}", data=json.dumps(value), headers=JSON)
            page.goto(url)
            page.wait_for_function("!!window.LiteGraph?.registered_node_types?.TrainLumina2LoRA && !!app.graph")
            page.wait_for_timeout(3000)  # the page's own tab opens over its canvas
            for name in nodes:
                page.evaluate(_SHOW, [name, EXAMPLES[name], WIDTH_PX])
                page.wait_for_timeout(1000)  # text fields come after the canvas
                page.wait_for_function(_READY)
                box = page.evaluate(_BOX)
                around = {"x": box["x"] - MARGIN_PX, "y": box["y"] - MARGIN_PX}
                sides = {side: box[side] + 2 * MARGIN_PX for side in ("width", "height")}
                shot = Image.open(BytesIO(page.screenshot(clip={**around, **sides}))).convert("RGB")
                shot.save(DOCS / name / f"{language}.webp", quality=QUALITY, method=6)
        browser.close()


if __name__ == "__main__":
    main()
