"""What was trained before, by its run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..training.adapter.files import read_lora
from ..training.errors import RunError
from ..training.run.checkpoint import read_checkpoint
from ..training.run.events import read_events, read_losses
from ..training.run.folder import Run, RunStore
from . import places
from .sockets import LoraModelSocket, LossMapSocket


class Lumina2LoadRun(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2LoadRun",
            display_name="Load Training Run",
            category="Lumina2",
            description="The LoRA of a run or of one of its checkpoints, with its losses and samples.",
            inputs=[
                io.String.Input("run", default="", tooltip="The run's folder under output/lumina2."),
                io.String.Input(
                    "checkpoint",
                    default="",
                    tooltip="checkpoint-400, or empty for what was trained in the end.",
                ),
            ],
            outputs=[
                LoraModelSocket.Output(display_name="LORA_MODEL", tooltip="For LoraModelLoader and SaveLoRA."),
                LossMapSocket.Output(display_name="LOSS_MAP", tooltip="For Plot Loss Graph."),
                io.Image.Output(display_name="samples", tooltip="The last samples drawn up to that step."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, run: str | None = None, checkpoint: str | None = None, **_: object) -> Any:
        found = places.runs().read((run or "").strip())
        return [found.status, found.step] if found else float("nan")

    @classmethod
    def execute(cls, run: str, checkpoint: str) -> io.NodeOutput:
        store = places.runs()
        found = find_run(store, run.strip())
        file, step = store.file(found.folder), found.step
        if checkpoint.strip():
            folder = store.path(found) / checkpoint.strip().rpartition("/")[2]
            saved = read_checkpoint(folder)
            if not saved:
                there = sorted(path.parent.name for path in store.path(found).glob("checkpoint-*/checkpoint.json"))
                raise RunError(
                    f"{found.folder} has no checkpoint {checkpoint!r}. There are: {', '.join(there) or '–'}."
                )
            file, step = saved.lora, saved.step
        if not file.exists():
            raise RunError(f"{found.folder} has no LoRA at {file}: it was moved, deleted, or trained in full.")
        events = store.path(found) / "events.jsonl"
        losses: Any = {"loss": read_losses(events, step)}
        if len(set(losses["loss"])) < 2:
            losses = ExecutionBlocker("The run logged fewer than two different losses: there is nothing to plot.")
        return io.NodeOutput(read_lora(file), losses, _samples(store, found, step))


def find_run(store: RunStore, name: str) -> Run:
    """Raises RunError where there is none of this folder."""
    found = store.read(name) if name and "/" not in name and "\\" not in name else None
    if found is None:
        there = sorted(path.parent.name for path in store.root.glob("*/run.json"))
        raise RunError(f"There is no training run {name!r} under {store.root}. There are: {', '.join(there) or '–'}.")
    return found


def _samples(store: RunStore, run: Run, step: int) -> Any:
    """(N, height, width, 3) in [0, 1], those of the first one's size."""
    drawn = [
        event
        for event in read_events(store.path(run) / "events.jsonl")
        if event.get("event") == "Validated" and event["step"] <= step and event.get("samples")
    ]
    pictures = []
    for sample in drawn[-1]["samples"] if drawn else []:
        path = store.path(run) / sample["path"]
        if path.exists():
            with Image.open(path) as opened:
                pictures.append(torch.from_numpy(np.array(opened.convert("RGB"))).float() / 255)
    if not pictures:
        return ExecutionBlocker("The run drew no samples. Wire a VAE and Validation Settings into its training.")
    return torch.stack([each for each in pictures if each.shape == pictures[0].shape])
