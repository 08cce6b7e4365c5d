"""How fast the page is there, with the plugin and without, and how fast and small a panel's first answer is.

    LUMINA2_CHROMIUM=… COMFYUI_PATH=… python -m benchmarks.page [--repeats 5] [--steps 50000] [--json]

Starts two real ComfyUIs, one without the plugin, and opens their pages in turns in new contexts of one Chromium, so
that nothing is cached. ``start_s``: until the page can be used; ``paint_s``: until it shows something for the first
time; ``start_bare_s`` and ``paint_bare_s``: without the plugin. ``panel_s``: from a train node being added until its
panel shows the curve of a run with so many logged steps; ``panel_bytes``: what it was sent for that. Each time is the
median of the repeats. The bars: 64 kB, and a start at most 0.3 s later. With ``--json`` the last line of stdout is one
line of JSON, all else goes to stderr.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from comfy_server import PLUGIN, Server  # noqa: E402
from playwright.sync_api import Browser, Page, Response, sync_playwright  # noqa: E402

from training.config.settings import TrainSettings  # noqa: E402
from training.files import write_json  # noqa: E402

MOST_BYTES, MOST_LATER_S = 64 * 1024, 0.3
LIMIT_MS = 300_000
RUN = "measured"
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False}
READY = "!!(window.app?.graph && window.app.extensionManager && LiteGraph.registered_node_types['KSampler'])"
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
ADD_NODE = """async (run) => {
    app.graph.clear()
    const node = LiteGraph.createNode('TrainLumina2LoRA')
    node.widgets[0].value = run
    const begun = performance.now()
    app.graph.add(node)
    app.canvas.centerOnNode(node)
    const frame = () => new Promise(requestAnimationFrame)
    while (document.querySelector('.lumina2-chart-empty')?.hidden !== true) await frame()
    await frame()
    return (performance.now() - begun) / 1000
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50_000, help="logged by the run that the panel shows")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout, all else on stderr")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        found = measure(options.repeats, options.steps)
        print(
            f"page start {found['start_s']:.2f} s, without the plugin {found['start_bare_s']:.2f} s "
            f"(bar {MOST_LATER_S:+.1f} s)\n"
            f"first paint {found['paint_s']:.2f} s, without the plugin {found['paint_bare_s']:.2f} s\n"
            f"panel of {options.steps} steps {found['panel_s']:.2f} s, "
            f"{found['panel_bytes'] / 1024:.1f} kB (bar {MOST_BYTES // 1024} kB)"
        )
    if options.json:
        print(json.dumps(found))


def measure(repeats: int, steps: int) -> dict[str, Any]:
    times: dict[str, list[float]] = collections.defaultdict(list)
    sent = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        sync_playwright() as playwright,
        started(Path(folder, "with"), True) as ours,
        started(Path(folder, "without"), False) as bare,
    ):
        write_run(ours.base / "output" / "lumina2" / RUN, steps)
        browser = playwright.chromium.launch(
            executable_path=os.environ["LUMINA2_CHROMIUM"], args=["--no-sandbox", "--disable-gpu"]
        )
        for repeat in range(repeats):
            for name, server in [("", ours), ("bare_", bare)][:: 1 if repeat % 2 else -1]:
                with opened(browser, server) as (page, start_s):
                    times[f"start_{name}s"].append(start_s)
                    times[f"paint_{name}s"].append(page.evaluate(PAINTED))
                    if server is ours:
                        answers = listen(page)
                        times["panel_s"].append(page.evaluate(ADD_NODE, RUN))
                        sent = max(sent, sum(len(answer.body()) for answer in answers))
        browser.close()
    return {name: statistics.median(each) for name, each in times.items()} | {"panel_bytes": sent, "steps": steps}


@contextlib.contextmanager
def started(base: Path, plugin: bool) -> Iterator[Server]:
    server = Server(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]), base)
    if not plugin:
        os.unlink(base / "custom_nodes" / PLUGIN)
    with server:
        for name, value in SETTINGS.items():
            server.ask(f"/settings/{name}", value)
        yield server


@contextlib.contextmanager
def opened(browser: Browser, server: Server) -> Iterator[tuple[Page, float]]:
    """A page in a context of its own, and how long it took until it could be used."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    begun = time.perf_counter()
    page.goto(server.url, timeout=LIMIT_MS)
    page.wait_for_function(READY, timeout=LIMIT_MS)
    yield page, time.perf_counter() - begun
    context.close()


def listen(page: Page) -> list[Response]:
    """What the page is sent by our routes from now on."""
    answers: list[Response] = []
    page.on("response", lambda answer: answers.append(answer) if "/lumina2/" in answer.url else None)
    return answers


def write_run(folder: Path, steps: int) -> None:
    """A finished run as it lies on disk."""
    record = {"name": RUN, "folder": RUN, "identity": RUN, "status": "finished", "step": steps, "target": steps}
    folder.mkdir(parents=True)
    write_json(folder / "run.json", record | {"settings": TrainSettings(steps=steps).written()})
    lines = [{"event": "Started", "time": 0.0, "run": RUN, "step": 0}]
    for step in range(1, steps + 1):
        loss = 0.3 + 1 / (step + 2) + (step * 0.6180339887 % 1) / 10
        lines.append(
            {"step": step, "loss": loss, "lr": 1e-4, "grad_norm": loss / 3, "time": step / 3, "memory": 8 << 30}
        )
    (folder / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
