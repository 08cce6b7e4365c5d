"""Settings that a train node can be given by wire."""

from __future__ import annotations

from comfy_api.latest import io

from ..training.config.adapter import TARGETS, LoRASettings
from .sockets import AdapterSocket


class Lumina2LoRASettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2LoRASettings",
            display_name="LoRA Settings",
            category="Lumina2",
            description="Size and place of the LoRA. What is set here wins over the train node's rank.",
            inputs=[
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="How much it can learn: 8–32 for most uses, 64–128 with care.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="The LoRA acts with alpha / rank; 0 means equal to the rank.",
                ),
                io.Float.Input(
                    "dropout",
                    default=0.0,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    tooltip="The share of its inputs that is left out in each step, against overfitting.",
                ),
                io.Combo.Input(
                    "targets",
                    options=list(TARGETS),
                    tooltip="attention: least. attention+ff: also the feed-forward layers, better for styles. "
                    "blocks: also their modulation. all: every linear layer.",
                ),
            ],
            outputs=[AdapterSocket.Output(display_name="adapter")],
        )

    @classmethod
    def execute(cls, rank: int, alpha: float, dropout: float, targets: str) -> io.NodeOutput:
        return io.NodeOutput(LoRASettings(rank, alpha, dropout, targets))
