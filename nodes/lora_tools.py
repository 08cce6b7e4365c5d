"""LoRAs made of others, or of two models: merged, baked in, extracted, resized."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io, ui
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..training.adapter.formats import DTYPE_NAMES
from ..training.config.settings import check_run_name
from ..training.errors import SettingError
from . import places
from .lora import DTYPE_TOOLTIP, LORA_TOOLTIP, NAME_TOOLTIP
from .progress import Counting, Progress
from .sockets import LoraModelSocket

AS_LORA, AS_MODEL = "LoRA", "model"


def named_loras(text: str) -> list[tuple[str, float]]:
    """One LoRA a line, ``name`` or ``name: strength``; a colon inside a path is no strength."""
    found = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, colon, number = line.rpartition(":")
        try:
            found.append((name.strip(), float(number)) if colon else (line, 1.0))
        except ValueError:
            found.append((line, 1.0))
    return found


def _given(combined: Any, base: Any, name: str, dtype: str) -> tuple[dict[str, Tensor], str, str]:
    """LORA_MODEL, the kept file's name and the report."""
    from ..training.adapter.formats.write import written
    from . import adapters as any_format

    result = written(combined.adapters, "comfyui", base, dtype=dtype)
    kept = any_format.keep(combined.adapters, name, result)
    report = "\n".join([f"{kept}: {combined.note}", *result.notes])
    return any_format.lora_model(combined.adapters, base), kept, report


class Lumina2MergeLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2MergeLoRA",
            display_name="Merge LoRAs",
            category="Lumina2",
            description="Makes one LoRA of several, of any format and rank; or bakes them into a model's file.",
            inputs=[
                io.String.Input(
                    "loras",
                    default="",
                    multiline=True,
                    tooltip="One a line, a name under models/loras and its strength: lumina2/style.safetensors: 0.8",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Of the merged LoRA at most; the error is told. 0: exact, the ranks add up.",
                ),
                io.Combo.Input(
                    "save_as",
                    options=[AS_LORA, AS_MODEL],
                    tooltip="LoRA: a file under models/loras. model: MODEL with them baked in, under "
                    "models/diffusion_models.",
                ),
                io.String.Input("name", default="merged", tooltip="The new file's name. Another is never overwritten."),
                io.Combo.Input(
                    "dtype", options=list(DTYPE_NAMES), tooltip="Of the LoRA's weights. bf16: half the size."
                ),
                io.Model.Input("model", optional=True, tooltip="Needed to bake them in, and for DoRA, OFT and GLoRA."),
                LoraModelSocket.Input("lora_model", optional=True, tooltip="One more LoRA, by wire, at strength 1."),
            ],
            outputs=[
                LoraModelSocket.Output(display_name="LORA_MODEL", tooltip="The merged LoRA."),
                io.Model.Output(display_name="MODEL", tooltip="MODEL with the merged LoRA on it; needs a MODEL."),
                io.String.Output(display_name="name", tooltip="The new file's name, under its folder of models."),
                io.String.Output(display_name="report", tooltip="Layers, rank and error."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(
        cls,
        loras: str,
        rank: int,
        save_as: str,
        name: str,
        dtype: str,
        model: Any = None,
        lora_model: dict[str, Tensor] | None = None,
    ) -> io.NodeOutput:
        from ..training.adapter.formats.combine import combine
        from . import adapters as any_format

        progress = Progress(cls.hidden.unique_id)
        if save_as == AS_MODEL and model is None:
            raise SettingError("save_as is model, and no MODEL is wired. Wire the one that they are baked into.")
        progress.say("merging")
        base = any_format.weights_of(model)
        given = [(any_format.opened(file, None, model), strength) for file, strength in named_loras(loras)]
        given += [(any_format.opened("", lora_model, model), 1.0)] if lora_model is not None else []
        combined = combine(given, rank, base)
        adapted: Any = ExecutionBlocker("Wire a MODEL into Merge LoRAs to get one with them on it.")
        if model is not None:
            adapted = any_format.with_strengths(model, combined.adapters, 1.0)
        if save_as == AS_LORA:
            tensors, kept, report = _given(combined, base, name, dtype)
        else:
            tensors, kept = any_format.lora_model(combined.adapters, base), _baked(adapted, name, progress)
            report = f"{kept}: {combined.note}"
        return io.NodeOutput(tensors, adapted, kept, report, ui=ui.PreviewText(report))


def _baked(model: Any, name: str, progress: Progress) -> str:
    """Write MODEL as it is in effect to models/diffusion_models/lumina2; its name for a loader."""
    from ..training.adapter.formats.checkpoint import Entry, write_entries
    from .bridge import engine_transformer

    store = places.runs()
    path = store.file(store.free_folder(check_run_name(name)), full=True)
    progress.say(f"writing {path.name}")
    with torch.inference_mode(False):
        weights = engine_transformer(model).state_dict()
        entries = {n: Entry.of(w.detach()) for n, w in weights.items()}
        stored = weights["x_embedder.weight"]
        entries["norm_final.weight"] = Entry.of(torch.ones(stored.shape[0], dtype=stored.dtype))
        write_entries(path, entries, {"modelspec.architecture": "lumina-2", "modelspec.title": path.stem})
    return f"{places.SUBFOLDER}/{path.name}"


class Lumina2ExtractLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2ExtractLoRA",
            display_name="Extract LoRA",
            category="Lumina2",
            description="Makes a LoRA of what a fine-tuned model has learned over its base.",
            inputs=[
                io.Model.Input("model_tuned", tooltip="What was changed: a fine-tune, or a model with LoRAs on it."),
                io.Model.Input("model_base", tooltip="The model that it was made from."),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=0,
                    max=4096,
                    tooltip="Of each layer at most; the error is told. 0: exact, as large as the model.",
                ),
                io.String.Input("name", default="extracted", tooltip=NAME_TOOLTIP),
                io.Combo.Input("dtype", options=list(DTYPE_NAMES), tooltip=DTYPE_TOOLTIP),
            ],
            outputs=[
                LoraModelSocket.Output(display_name="LORA_MODEL", tooltip="On the base it gives the tuned model."),
                io.String.Output(display_name="lora_name", tooltip="The file's name under models/loras."),
                io.String.Output(display_name="report", tooltip="Layers, rank and error."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model_tuned: Any, model_base: Any, rank: int, name: str, dtype: str) -> io.NodeOutput:
        from ..training.adapter.formats.combine import extract
        from . import adapters as any_format
        from .bridge import transformer_config

        progress, config = Progress(cls.hidden.unique_id), transformer_config(model_base)
        progress.say("reading both models")
        base, tuned = any_format.snapshot(model_base), any_format.snapshot(model_tuned)
        device, watch = comfy.model_management.get_torch_device(), Counting(progress, "layer")
        combined = extract(base, tuned, config, rank, device, watch)
        tensors, kept, report = _given(combined, any_format.weights_of(None), name, dtype)
        return io.NodeOutput(tensors, kept, report, ui=ui.PreviewText(report))


class Lumina2ResizeLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2ResizeLoRA",
            display_name="Resize LoRA",
            category="Lumina2",
            description="Gives a LoRA a smaller rank, as near to it as that rank can be.",
            inputs=[
                io.String.Input(
                    "lora",
                    default="",
                    tooltip=f"{LORA_TOOLTIP} A wired LORA_MODEL wins.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="Of each layer at most; smaller ones stay. The error is told.",
                ),
                io.String.Input("name", default="", tooltip="The new file's name. Empty: the old one and the rank."),
                io.Combo.Input("dtype", options=list(DTYPE_NAMES), tooltip=DTYPE_TOOLTIP),
                LoraModelSocket.Input("lora_model", optional=True, tooltip="A LoRA by wire; it wins over the name."),
                io.Model.Input("model", optional=True, tooltip="Needed for DoRA, OFT and GLoRA."),
            ],
            outputs=[
                LoraModelSocket.Output(display_name="LORA_MODEL", tooltip="The resized LoRA."),
                io.String.Output(display_name="lora_name", tooltip="The file's name under models/loras."),
                io.String.Output(display_name="report", tooltip="Layers, rank and error."),
            ],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(
        cls,
        lora: str,
        rank: int,
        name: str,
        dtype: str,
        lora_model: dict[str, Tensor] | None = None,
        model: Any = None,
    ) -> io.NodeOutput:
        from ..training.adapter.formats.combine import combine
        from . import adapters as any_format

        base = any_format.weights_of(model)
        combined = combine([(any_format.opened(lora, lora_model, model), 1.0)], rank, base)
        default = any_format.like(lora if lora_model is None else "lora", f"rank-{rank}")
        tensors, kept, report = _given(combined, base, name.strip() or default, dtype)
        return io.NodeOutput(tensors, kept, report, ui=ui.PreviewText(report))
