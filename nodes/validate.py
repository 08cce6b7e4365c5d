"""Pictures of the base model and of a LoRA, side by side."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import io

from ..training.data.prompts import SYSTEM_PROMPTS, with_system_prompt
from ..training.errors import SettingError
from . import places
from .progress import Progress
from .sockets import LoraModelSocket


class Lumina2ValidateSample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2ValidateSample",
            display_name="Validate Sample",
            category="Lumina2",
            description="Draws every prompt at every strength of a LoRA, as KSampler would (euler, simple).",
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the LoRA."),
                io.Clip.Input("clip", tooltip="Lumina2's text encoder."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                io.String.Input("prompts", default="", multiline=True, tooltip="One prompt a line."),
                io.String.Input(
                    "negative_prompt",
                    default="",
                    tooltip="What the pictures shall not show; no system prompt before it.",
                ),
                io.Int.Input("width", default=1024, min=64, max=4096, step=64, tooltip="Width in pixels."),
                io.Int.Input("height", default=1024, min=64, max=4096, step=64, tooltip="Height in pixels."),
                io.Int.Input("steps", default=30, min=1, max=1000, tooltip="Sampling steps; 20–50."),
                io.Float.Input(
                    "guidance", default=4.0, min=1.0, max=30.0, step=0.1, tooltip="CFG; best from 4 to 6, 1 is none."
                ),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="Every picture starts from the same noise.",
                ),
                io.Combo.Input(
                    "system_prompt",
                    options=list(SYSTEM_PROMPTS),
                    tooltip="What stands before every prompt; the same as in training.",
                ),
                io.String.Input(
                    "lora",
                    default="",
                    tooltip="A file's name under models/loras, or empty. A wired LORA_MODEL wins over it.",
                ),
                io.String.Input(
                    "strengths", default="0, 1", tooltip="One picture for each, by commas; 0 is the base model."
                ),
                LoraModelSocket.Input("lora_model", optional=True, tooltip="From Train Lumina2 LoRA."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Prompt by prompt, within it strength by strength."),
                io.Image.Output(display_name="grid", tooltip="All of them, labelled."),
                io.String.Output(display_name="report", tooltip="What was drawn, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompts: str,
        negative_prompt: str,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        system_prompt: str,
        lora: str,
        strengths: str,
        lora_model: dict[str, torch.Tensor] | None = None,
    ) -> io.NodeOutput:
        from ..training.adapter.files import read_lora
        from .bridge import embed_text, transformer_config
        from .draw import draw, with_lora
        from .grid import labelled_grid

        transformer_config(model)  # a sentence where it is no Lumina2
        wanted = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not wanted:
            raise SettingError("prompts is empty. Write one prompt a line.")
        levels = parse_strengths(strengths)
        if lora_model is None and lora.strip():
            lora_model = read_lora(places.lora_file(lora.strip()))
        if lora_model is None:
            levels = [0.0]  # nothing to be strong with

        progress = Progress(cls.hidden.unique_id, len(levels) * len(wanted) * steps)
        progress.say("encoding the prompts")
        negative, _ = embed_text(clip, negative_prompt)
        texts = [embed_text(clip, with_system_prompt(text, SYSTEM_PROMPTS[system_prompt])) for text in wanted]
        drawn: dict[tuple[int, int], torch.Tensor] = {}
        for column, strength in enumerate(levels):
            patched = with_lora(model, lora_model or {}, strength)
            for row, (embedding, _) in enumerate(texts):
                text = f"drawing picture {len(drawn) + 1} of {len(levels) * len(texts)}"
                before = len(drawn) * steps
                progress.step(before, text)
                drawn[row, column] = draw(
                    patched,
                    vae,
                    embedding,
                    negative,
                    (width, height),
                    steps,
                    guidance,
                    seed,
                    lambda done, before=before, text=text: progress.step(before + done, text),
                )
        images = torch.cat([drawn[place] for place in sorted(drawn)])
        labels = ["base model" if strength == 0 else f"LoRA at {strength:g}" for strength in levels]
        report = {
            "lora": lora if lora.strip() else ("wired" if lora_model is not None else None),
            "width_px": width,
            "height_px": height,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "system_prompt": system_prompt,
            "negative_prompt": negative_prompt,
            "strengths": levels,
            "prompts": [
                {"prompt": prompt, "tokens": len(embedding), "cut": cut}
                for prompt, (embedding, cut) in zip(wanted, texts, strict=True)
            ],
        }
        grid = labelled_grid(images, wanted, labels)
        return io.NodeOutput(images, grid, json.dumps(report, indent=2, ensure_ascii=False))


def parse_strengths(text: str) -> list[float]:
    """Numbers by commas.

    Raises:
        SettingError: one is no number, or there is none.
    """
    try:
        numbers = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise SettingError(f"strengths is {text!r}; write numbers by commas, for example 0, 0.5, 1.")
    return numbers
