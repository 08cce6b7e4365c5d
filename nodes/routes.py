"""What the page asks the server: runs, their curves and pictures, what Run would do; and commands to a run.

Paths lie inside the runs' folders and are never absolute. What changes something is a POST of JSON, which no other site
can send by a form, and is refused where the browser says that another site sent it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import folder_paths
from aiohttp import web

from ..training.errors import Lumina2Error, RunError, SettingError
from ..training.run import history
from ..training.run.control import Control, active
from ..training.run.curves import curves
from . import foresight, places

PREFIX = "/lumina2"
MOST_FOLDERS = 200
THUMBNAILS = (64, 1024)  # px, least and most
Answer = Callable[[dict[str, Any]], Any]


def add_routes() -> None:
    """Put all of them under ``/lumina2``, once, where there is a server."""
    from server import PromptServer

    table = getattr(getattr(PromptServer, "instance", None), "routes", None)
    if table is None or any(getattr(route, "path", "").startswith(PREFIX) for route in table):
        return
    for name, answer in READS.items():
        table.get(f"{PREFIX}/{name}")(_read(answer))
    for name, answer in POSTS.items():
        table.post(f"{PREFIX}/{name}")(_post(answer))
    table.get(f"{PREFIX}/sample")(sample)
    table.get(f"{PREFIX}/checkpoint")(checkpoint)


def _read(answer: Answer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await _answered(answer, dict(request.query))

    return handle


def _post(answer: Answer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        if request.content_type != "application/json" or request.headers.get("Sec-Fetch-Site") == "cross-site":
            return _error("Only this ComfyUI's own page may ask for that.", 403)
        try:
            sent = await request.json()
        except json.JSONDecodeError:
            sent = None
        if not isinstance(sent, dict):
            return _error("A JSON object is wanted.", 400)
        return await _answered(answer, sent)

    return handle


async def _answered(answer: Answer, sent: dict[str, Any]) -> web.Response:
    """The answer as JSON, worked out in a thread, so that other requests do not wait for the disk."""
    try:
        return web.json_response(await asyncio.to_thread(answer, sent))
    except Lumina2Error as error:
        return _error(str(error), 404 if isinstance(error, RunError) else 400)


def _error(sentence: str, status: int) -> web.Response:
    return web.json_response({"error": sentence}, status=status)


def _run(sent: dict[str, Any]) -> Any:
    return history.find(places.runs(), str(sent.get("run_id", "")))


def _whole(sent: dict[str, Any], name: str) -> int:
    try:
        return int(sent.get(name, 0))
    except (TypeError, ValueError):
        raise SettingError(f"{name} is {sent[name]!r}; a whole number is wanted.") from None


def runs(sent: dict[str, Any]) -> dict[str, Any]:
    """All runs; with ``name`` those that carry it."""
    found = history.summaries(places.runs())
    return {"runs": [run for run in found if "name" not in sent or run["name"] == sent["name"]]}


def run(sent: dict[str, Any]) -> dict[str, Any]:
    from ..training.report.story import About

    store, asked = places.runs(), _run(sent)
    found = history.describe(store, asked)
    name = found["file"]["name"] if found["file"] else None
    data = asdict(About.read(store.path(asked)))
    return {**found, "lora_name": f"{places.SUBFOLDER}/{name}" if name else None, "data": data}


def summary(sent: dict[str, Any]) -> dict[str, Any]:
    return history.summary(places.runs(), _run(sent))


def curve(sent: dict[str, Any]) -> dict[str, Any]:
    """The curves of a run, or with ``after`` what was added since."""
    store, found = places.runs(), _run(sent)
    return curves(store.path(found) / "events.jsonl", max(_whole(sent, "after"), 0))


def samples(sent: dict[str, Any]) -> dict[str, Any]:
    return history.samples(places.runs(), _run(sent))


async def sample(request: web.Request) -> web.StreamResponse:
    """A picture of a run; with ``size`` as a thumbnail of at most so many pixels."""
    try:
        path = history.picture(places.runs(), _run(dict(request.query)), request.query.get("path", ""))
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}
        if "size" not in request.query:
            return web.FileResponse(path, headers=headers)
        least, most = THUMBNAILS
        size = min(max(_whole(dict(request.query), "size"), least), most)
        body = await asyncio.to_thread(_thumbnail, path, size)
        return web.Response(body=body, content_type="image/webp", headers=headers)
    except Lumina2Error as error:
        return _error(str(error), 404)


async def checkpoint(request: web.Request) -> web.StreamResponse:
    """The LoRA of a checkpoint, to be kept on the machine that looks at the page."""
    try:
        asked, step = _run(dict(request.query)), _whole(dict(request.query), "step")
        path = history.checkpoint_lora(places.runs(), asked, step)
    except Lumina2Error as error:
        return _error(str(error), 404)
    name = quote(f"{asked.folder}-{step}.safetensors")
    headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{name}", "X-Content-Type-Options": "nosniff"}
    return web.FileResponse(path, headers=headers)


def simpletuner(sent: dict[str, Any]) -> dict[str, Any]:
    """A run's settings as SimpleTuner's files, by name."""
    return {"files": history.simpletuner_files(_run(sent))}


def ended(sent: dict[str, Any]) -> dict[str, Any]:
    """How many runs have ended since a time, in seconds since 1970."""
    return {"ended": history.ended_since(places.runs(), float(_whole(sent, "since")))}


def _thumbnail(path: Path, size: int) -> bytes:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError):
        raise RunError(f"The picture {path.name} is damaged.") from None
    picture.thumbnail((size, size))
    written = BytesIO()
    picture.save(written, "WEBP", quality=88)
    return written.getvalue()


def folders(sent: dict[str, Any]) -> dict[str, Any]:
    """Folders under ComfyUI's input folder that begin with what was typed, and the bundled datasets."""
    typed = str(sent.get("typed", "")).strip().strip('"').replace("\\", "/")
    root = Path(folder_paths.get_input_directory()).resolve()
    parent, _, begin = typed.rpartition("/")
    place = (root / parent).resolve() if not Path(typed).is_absolute() else None
    found: list[str] = [name for name in places.BUNDLED if name.startswith(typed)]
    if place is not None and place.is_relative_to(root) and place.is_dir():
        with os.scandir(place) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__")))
        before = f"{parent}/" if parent else ""
        found += [before + name for name in names if name.casefold().startswith(begin.casefold())]
    return {"folders": found[:MOST_FOLDERS], "more": max(len(found) - MOST_FOLDERS, 0)}


def presets(sent: dict[str, Any]) -> dict[str, Any]:
    from .presets import presets as all_of_them

    return all_of_them()


def plan(sent: dict[str, Any]) -> dict[str, Any]:
    return foresight.plan(foresight.Shown.read(sent.get("node")))


def forecast(sent: dict[str, Any]) -> dict[str, Any]:
    return foresight.forecast_of(foresight.Shown.read(sent.get("node")))


def dataset(sent: dict[str, Any]) -> dict[str, Any]:
    """What a dataset's node showed when it ran, for where ComfyUI took it from its cache and sends nothing."""
    return foresight.glimpse_of(foresight.Shown.read(sent.get("node")))


def _control(sent: dict[str, Any]) -> Control:
    found = _run(sent)
    control = active(places.runs().path(found))
    if control is None:
        raise RunError(f"The training run {found.folder!r} does not go on in this ComfyUI, so it takes no commands.")
    return control


def command(send: Callable[[Control, dict[str, Any]], None]) -> Answer:
    def answer(sent: dict[str, Any]) -> dict[str, Any]:
        send(_control(sent), sent)
        return {"ok": True}

    return answer


def _set_learning_rate(control: Control, sent: dict[str, Any]) -> None:
    try:
        rate = float(sent.get("rate", ""))
    except (TypeError, ValueError):
        raise SettingError(f"The learning rate is {sent.get('rate')!r}; choose a number, for example 0.0001.") from None
    control.set_learning_rate(rate)


def delete(sent: dict[str, Any]) -> dict[str, Any]:
    """Delete a run, and let ComfyUI's cache forget what it gave, or Run would hand out files that are gone."""
    from server import PromptServer

    gone = history.delete(places.runs(), _run(sent))
    PromptServer.instance.prompt_queue.set_flag("free_memory", True)
    return {"deleted": gone}


def delete_checkpoint(sent: dict[str, Any]) -> dict[str, Any]:
    history.delete_checkpoint(places.runs(), _run(sent), _whole(sent, "step"))
    return {"ok": True}


def publish(sent: dict[str, Any]) -> dict[str, Any]:
    """Put a checkpoint's LoRA under ``models/loras``."""
    return {"lora_name": f"{places.SUBFOLDER}/{history.publish(places.runs(), _run(sent), _whole(sent, 'step'))}"}


READS: dict[str, Answer] = {
    "runs": runs,
    "run": run,
    "summary": summary,
    "curves": curve,
    "samples": samples,
    "simpletuner": simpletuner,
    "presets": presets,
    "ended": ended,
    "folders": folders,
}
POSTS: dict[str, Answer] = {
    "plan": plan,
    "forecast": forecast,
    "dataset": dataset,
    "stop": command(lambda control, _: control.stop()),
    "pause": command(lambda control, _: control.pause()),
    "resume": command(lambda control, _: control.resume()),
    "save": command(lambda control, _: control.save()),
    "sample": command(lambda control, sent: control.sample(str(sent.get("prompt", "")))),
    "learning-rate": command(_set_learning_rate),
    "delete": delete,
    "delete-checkpoint": delete_checkpoint,
    "publish": publish,
}
