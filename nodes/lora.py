"""LoRAs of any format: converted, put on a MODEL, saved."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..training.adapter.formats import DTYPE_NAMES, FORMAT_NAMES
from .progress import Progress
from .sockets import LoraModelSocket

FORMAT_TOOLTIP = (
    "comfyui: for LoraLoader. diffusers: also PEFT. kohya: sd-scripts. lycoris: lycoris-lora on diffusers' model."
)
LORA_TOOLTIP = "A file's name under models/loras, or its whole path; any format."
RANK_TOOLTIP = "What the format cannot express becomes a LoRA of this rank; its error is told. 0: only what is exact."
NAME_TOOLTIP = "The file under models/loras/lumina2. Another is never overwritten."
DTYPE_TOOLTIP = "Of the weights in the file. bf16 is half as large."
MODEL_TOOLTIP = "The MODEL it belongs to: checked against it, and needed for DoRA, OFT, GLoRA and other sizes."


class Lumina2ConvertLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2ConvertLoRA",
            display_name="Convert LoRA",
            category="Lumina2",
            description="Reads a Lumina2 LoRA of any trainer and writes it in another format, with the same effect.",
            inputs=[
                io.String.Input("lora", default="", tooltip=LORA_TOOLTIP),
                io.Combo.Input(
                    "format",
                    options=list(FORMAT_NAMES),
                    tooltip=FORMAT_TOOLTIP,
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="The new file under models/loras/lumina2. Empty: named like the old one.",
                ),
                io.Int.Input("rank", default=0, min=0, max=4096, tooltip=RANK_TOOLTIP),
                io.Combo.Input("dtype", options=list(DTYPE_NAMES), tooltip=DTYPE_TOOLTIP),
                io.Model.Input("model", optional=True, tooltip=MODEL_TOOLTIP),
            ],
            outputs=[
                LoraModelSocket.Output(display_name="LORA_MODEL", tooltip="For LoraModelLoader, whatever the format."),
                io.String.Output(display_name="lora_name", tooltip="The new file's name under models/loras."),
                io.String.Output(display_name="report", tooltip="What was read and written, and its error."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, lora: str, format: str, name: str, rank: int, dtype: str, model: Any = None) -> io.NodeOutput:
        from ..training.adapter.formats.write import written
        from . import adapters as any_format

        Progress(cls.hidden.unique_id).say("converting")
        adapters, base = any_format.opened(lora, None, model), any_format.weights_of(model)
        result = written(adapters, format, base, rank, dtype)
        kept = any_format.keep(adapters, name.strip() or any_format.like(lora, format), result)
        report = "\n".join([f"{kept}: {len(adapters.layers)} layers as {format}", *result.notes])
        tensors = any_format.lora_model(adapters, base)
        return io.NodeOutput(tensors, kept, report, ui=ui.PreviewText(report))


class Lumina2LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2LoadLoRA",
            display_name="Load LoRA (Lumina2)",
            category="Lumina2",
            description="Puts a LoRA of any format on a Lumina2: diffusers', PEFT's and kohya's files too, whole or "
            "block by block.",
            inputs=[
                io.Model.Input("model", tooltip="The Lumina2 it is put on; it stays as it is."),
                io.String.Input(
                    "lora",
                    default="",
                    tooltip=f"{LORA_TOOLTIP} A wired LORA_MODEL wins.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-20.0, max=20.0, step=0.05, tooltip="1 is as trained, 0 is without."
                ),
                io.String.Input(
                    "block_strengths",
                    default="",
                    tooltip="Factors by block, such as 0-9: 0.5, 10-25: 1, noise_refiner: 0, other: 1. Empty: all 1.",
                ),
                LoraModelSocket.Input("lora_model", optional=True, tooltip="A LoRA by wire; it wins over the name."),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA on it.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        lora: str,
        strength: float,
        block_strengths: str,
        lora_model: dict[str, Tensor] | None = None,
    ) -> io.NodeOutput:
        from . import adapters as any_format

        adapters = any_format.opened(lora, lora_model, model)
        return io.NodeOutput(any_format.with_strengths(model, adapters, strength, block_strengths))


class Lumina2SaveLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2SaveLoRA",
            display_name="Save LoRA",
            category="Lumina2",
            description="Writes a LORA_MODEL to models/loras/lumina2 in the format of your choice.",
            inputs=[
                LoraModelSocket.Input("lora_model", tooltip="From Train Lumina2 LoRA, or any other node."),
                io.String.Input(
                    "name",
                    default="my-lora",
                    tooltip=NAME_TOOLTIP,
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMAT_NAMES),
                    tooltip=FORMAT_TOOLTIP,
                ),
                io.Combo.Input("dtype", options=list(DTYPE_NAMES), tooltip=DTYPE_TOOLTIP),
                io.Int.Input("rank", default=0, min=0, max=4096, tooltip=RANK_TOOLTIP),
                io.Model.Input("model", optional=True, tooltip=MODEL_TOOLTIP),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The file's name under models/loras.")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(
        cls, lora_model: dict[str, Tensor], name: str, format: str, dtype: str, rank: int, model: Any = None
    ) -> io.NodeOutput:
        from ..training.adapter.formats.write import written
        from . import adapters as any_format

        adapters = any_format.opened("", lora_model, model)
        result = written(adapters, format, any_format.weights_of(model), rank, dtype)
        kept = any_format.keep(adapters, name, result)
        report = "\n".join([f"{kept}: {len(adapters.layers)} layers as {format}", *result.notes])
        return io.NodeOutput(kept, ui=ui.PreviewText(report))
