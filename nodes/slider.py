"""A LoRA whose strength leads from one prompt to another."""

from __future__ import annotations

from comfy_api.latest import io

from ..training.config.settings import Config
from ..training.errors import SettingError
from .sockets import ConfigSocket


class Lumina2SliderSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2SliderSettings",
            display_name="Slider Settings",
            category="Lumina2",
            description="Trains a slider in place of the pictures: a LoRA whose strength leads from one prompt to "
            "another. Wire it into Cache Text Embeds and into the train node.",
            inputs=[
                io.String.Input(
                    "positive",
                    default="",
                    multiline=True,
                    tooltip="What there is more of at strength 1: a smiling face.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    tooltip="What there is more of at strength -1: a sad face. Empty: the empty prompt.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.05,
                    max=20.0,
                    step=0.1,
                    tooltip="How far strength 1 leads: so many times from the negative prompt to the positive one.",
                ),
                ConfigSocket.Input("config", optional=True, tooltip="Settings that these are added to; these win."),
            ],
            outputs=[ConfigSocket.Output(display_name="config", tooltip="For Cache Text Embeds and the train node.")],
        )

    @classmethod
    def execute(cls, positive: str, negative: str, scale: float, config: Config | None = None) -> io.NodeOutput:
        if not positive.strip():
            raise SettingError("positive is empty. Write what strength 1 leads to, or take the Slider Settings out.")
        before = config or Config({})
        own = {"slider_positive": positive.strip(), "slider_negative": negative.strip(), "slider_scale": scale}
        chosen = Config({**before.values, **own}, before.adapter, before.run_name)
        chosen.check()
        return io.NodeOutput(chosen)
