"""Validation Settings: what is drawn and measured while a run trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..training.config.validation import CLIP, EMA_VALIDATION, EVALUATIONS, ValidationSettings
from .sockets import ValidationSocket


class Lumina2ValidationSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2ValidationSettings",
            display_name="Validation Settings",
            category="Lumina2",
            description="What is drawn and measured while a run trains. Wire it into Cache Text Embeds, or into "
            "Validate Sample.",
            inputs=[
                io.String.Input(
                    "validation_prompt",
                    default="",
                    multiline=True,
                    tooltip="One prompt a line. Without any prompt the first two captions are drawn.",
                ),
                io.String.Input(
                    "validation_negative_prompt",
                    default="",
                    multiline=True,
                    tooltip="What the pictures shall not show; no system prompt before it.",
                ),
                io.String.Input(
                    "validation_resolution",
                    default="1024x1024",
                    tooltip="Width x height in pixels, several by commas. 64x64 for the bundled nano model.",
                ),
                io.Int.Input(
                    "validation_num_inference_steps", default=30, min=1, max=1000, tooltip="Sampling steps; 20–50."
                ),
                io.Float.Input(
                    "validation_guidance",
                    default=4.0,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="CFG; best from 4 to 6, 1 is none.",
                ),
                io.Int.Input(
                    "validation_seed",
                    default=42,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="Every prompt starts from the same noise, at every step.",
                ),
                io.Int.Input(
                    "num_validation_images",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="Pictures of each prompt, each with the next seed.",
                ),
                io.Int.Input(
                    "validation_step_interval",
                    default=100,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between two validations. 0: only when Sample now is pressed.",
                ),
                io.Boolean.Input(
                    "validation_prompt_library",
                    default=False,
                    optional=True,
                    tooltip="Also draw the 40 prompts that come with this plugin.",
                ),
                io.String.Input(
                    "user_prompt_library",
                    default="",
                    optional=True,
                    tooltip='A JSON file of names and prompts, {"cat": "a photo of a cat"}; under the input folder.',
                ),
                io.Boolean.Input(
                    "validation_disable_unconditional",
                    default=True,
                    optional=True,
                    tooltip="Off: also draw what the model draws without a prompt.",
                ),
                io.Combo.Input(
                    "evaluation_type",
                    options=list(EVALUATIONS),
                    default="none",
                    optional=True,
                    tooltip="clip: how well each picture fits its prompt.",
                ),
                io.String.Input(
                    "pretrained_evaluation_model_name_or_path",
                    default=CLIP,
                    optional=True,
                    tooltip="The CLIP that judges: a folder, or a name on the Hugging Face hub.",
                ),
                io.Boolean.Input(
                    "evaluation_required",
                    default=False,
                    optional=True,
                    tooltip="On: without that CLIP nothing starts. Off: the pictures are drawn without a score.",
                ),
                io.Int.Input(
                    "eval_steps_interval",
                    default=0,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    tooltip="Steps between two held-out losses; needs a dataset of type eval. 0: never.",
                ),
                io.Int.Input(
                    "eval_timesteps",
                    default=8,
                    min=1,
                    max=1000,
                    optional=True,
                    tooltip="Noise levels of each held-out picture: more are more exact, and slower.",
                ),
                io.Int.Input(
                    "num_eval_images",
                    default=32,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    tooltip="Held-out pictures of each dataset, at most. 0: all.",
                ),
                io.Boolean.Input(
                    "keep_best",
                    default=False,
                    optional=True,
                    tooltip="Keep the LoRA of the lowest held-out loss as a file of its own.",
                ),
                io.Int.Input(
                    "early_stopping_patience",
                    default=0,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    tooltip="End the run after so many held-out losses in a row that were no new lowest. 0: off.",
                ),
                io.Combo.Input(
                    "ema_validation",
                    options=list(EMA_VALIDATION),
                    default="comparison",
                    optional=True,
                    tooltip="With an EMA: its pictures beside the others, instead of them, or none.",
                ),
                io.Boolean.Input(
                    "disable_benchmark",
                    default=False,
                    optional=True,
                    tooltip="On: leave out the base model's pictures at the start.",
                ),
                io.Float.Input(
                    "validation_guidance_rescale",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How far the contrast that guidance adds is taken back; 0.7 where pictures burn out.",
                ),
                io.Float.Input(
                    "cfg_trunc_ratio",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="Guidance acts in this share of the steps, from the first: lower is faster.",
                ),
                io.Boolean.Input(
                    "cfg_normalization",
                    default=False,
                    optional=True,
                    tooltip="Guidance keeps the prediction's length, as in diffusers. KSampler does not do this.",
                ),
                io.Float.Input(
                    "validation_shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Noise schedule shift while drawing. 0: the model's own, as KSampler.",
                ),
            ],
            outputs=[
                ValidationSocket.Output(
                    display_name="validation", tooltip="For Cache Text Embeds, which embeds the prompts."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, user_prompt_library: str = "", **_: object) -> list[Any]:
        file = library_file(user_prompt_library)  # an edited library is read again
        return [file.stat().st_mtime_ns, file.stat().st_size] if file and file.is_file() else []

    @classmethod
    def execute(cls, user_prompt_library: str = "", **values: Any) -> io.NodeOutput:
        file = library_file(user_prompt_library)
        settings = ValidationSettings(user_prompt_library=str(file or ""), **values)
        settings.prompts()  # a sentence now where the library cannot be read
        return io.NodeOutput(settings)


def library_file(named: str) -> Path | None:
    """A file as written in the widget: absolute, or under ComfyUI's input folder; None where nothing is written."""
    named = (named or "").strip().strip('"')
    return Path(folder_paths.get_input_directory()) / Path(named).expanduser() if named else None
