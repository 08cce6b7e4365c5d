"""The five nodes of a training put on an empty canvas, wired and run with nothing but mouse and keyboard."""

import contextlib

from graphs import run_json
from playwright.sync_api import TimeoutError as PageTimeoutError

NODES = {  # as the search box finds them: their kinds, and where they are put
    "Load Lumina2 (Diffusers)": ("Lumina2LoadDiffusers", (300, 150)),
    "Load Dataset": ("Lumina2LoadDataset", (300, 450)),
    "Cache Latents": ("Lumina2CacheLatents", (720, 150)),
    "Cache Text Embeds": ("Lumina2CacheTextEmbeds", (720, 450)),
    "Train Lumina2 LoRA": ("TrainLumina2LoRA", (1130, 150)),
}
WIRES = [
    ("Lumina2LoadDiffusers", "VAE", "Lumina2CacheLatents", "vae"),
    ("Lumina2LoadDataset", "dataset", "Lumina2CacheLatents", "dataset"),
    ("Lumina2LoadDiffusers", "CLIP", "Lumina2CacheTextEmbeds", "clip"),
    ("Lumina2LoadDataset", "dataset", "Lumina2CacheTextEmbeds", "dataset"),
    ("Lumina2LoadDiffusers", "MODEL", "TrainLumina2LoRA", "model"),
    ("Lumina2CacheLatents", "latents", "TrainLumina2LoRA", "latents"),
    ("Lumina2CacheTextEmbeds", "embeds", "TrainLumina2LoRA", "embeds"),
]
SLOT = """([kind, slot, isInput]) => {
    const node = app.graph._nodes.find(node => node.type === kind)
    const slots = isInput ? node.inputs : node.outputs
    const [x, y] = node.getConnectionPos(isInput, slots.findIndex(each => each.name === slot))
    const place = app.canvas.ds.convertOffsetToCanvas([x, y])
    const box = app.canvas.canvas.getBoundingClientRect()
    return [box.left + place[0], box.top + place[1]]
}"""
LIMIT_MS = 120_000


def put(page, name, place):
    """Double click, type its name, Enter."""
    search = page.locator("input[role=combobox][placeholder$='...']")  # "Search Nodes...", or "Add a node..."
    for patience_ms in (5_000, 10_000, LIMIT_MS):  # a page that has just opened may not be listening yet
        page.mouse.dblclick(*place)
        with contextlib.suppress(PageTimeoutError):
            search.wait_for(timeout=patience_ms)
            break
    search.fill(name)
    page.get_by_role("option").filter(has_text=name).first.wait_for(timeout=LIMIT_MS)
    page.keyboard.press("Enter")
    search.wait_for(state="detached", timeout=LIMIT_MS)
    page.mouse.click(*place)  # a newer page's new node hangs at the pointer until then


def wire(page, source, output, target, input):
    """From one slot to the other with the mouse."""
    page.mouse.move(*page.evaluate(SLOT, [source, output, False]))
    page.mouse.down()
    page.mouse.move(*page.evaluate(SLOT, [target, input, True]), steps=8)
    page.mouse.up()


def test_the_five_nodes_are_put_wired_and_run_by_hand(open_page, server, wait_for_lora):
    page = open_page(**{"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en"})
    page.evaluate("() => { app.graph.clear(); app.canvas.ds.reset() }")
    for count, (name, (kind, place)) in enumerate(NODES.items(), 1):
        put(page, name, place)
        page.wait_for_function(
            "([kind, count]) => app.graph._nodes.length === count && app.graph._nodes.some(n => n.type === kind)",
            arg=[kind, count],
            timeout=LIMIT_MS,
        )
    for wired in WIRES:
        wire(page, *wired)
    prompt = page.evaluate("app.graphToPrompt().then(p => p.output)")
    kinds = {key: node["class_type"] for key, node in prompt.items()}
    found = {
        (kinds[value[0]], node["class_type"], name)
        for node in prompt.values()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    assert found == {(source, target, input) for source, _, target, input in WIRES}
    page.evaluate(
        """(values) => {
            for (const widget of app.graph._nodes.flatMap(node => node.widgets ?? []))
                if (widget.name in values) widget.value = values[widget.name]
        }""",
        {"dtype": "fp32", "resolution": 64, "run_name": "by hand", "steps": 2},
    )
    page.get_by_test_id("queue-button").click()
    wait_for_lora(page, "by hand")
    assert run_json(server, "by hand")["step"] == 2
