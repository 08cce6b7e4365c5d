"""Pictures of the base model and of LoRAs, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import comfy.samplers
import torch
from comfy_api.latest import io

from ..training.config.validation import Prompt, ValidationSettings
from ..training.data.prompts import SYSTEM_PROMPTS, with_system_prompt
from ..training.errors import RunError, SettingError
from . import places
from .progress import Progress
from .sockets import LoraModelSocket, ValidationSocket

if TYPE_CHECKING:
    from ..training.adapter.formats.layers import Adapters
    from ..training.model.config import TransformerConfig


class Lumina2ValidateSample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2ValidateSample",
            display_name="Validate Sample",
            category="Lumina2",
            description="Draws every prompt with the base model and every LoRA at every strength, as KSampler would.",
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
                    tooltip="Files of any format under models/loras, or checkpoints such as my-lora/checkpoint-400; "
                    "several by commas. A wired LORA_MODEL wins over them.",
                ),
                io.String.Input(
                    "strengths", default="0, 1", tooltip="One picture for each, by commas; 0 is the base model."
                ),
                LoraModelSocket.Input("lora_model", optional=True, tooltip="From Train Lumina2 LoRA."),
                io.Combo.Input(
                    "sampler_name",
                    options=list(comfy.samplers.KSampler.SAMPLERS),
                    default="euler",
                    optional=True,
                    tooltip="As in KSampler. Samples during a training are drawn with euler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(comfy.samplers.KSampler.SCHEDULERS),
                    default="simple",
                    optional=True,
                    tooltip="As in KSampler.",
                ),
                io.Int.Input(
                    "images_per_prompt",
                    default=1,
                    min=1,
                    max=100,
                    optional=True,
                    tooltip="Pictures of each prompt, each with the next seed.",
                ),
                io.String.Input(
                    "clip_score_model",
                    default="",
                    optional=True,
                    tooltip="A CLIP that judges how pictures fit their prompts: a folder, or a name on the Hugging "
                    "Face hub. Empty: no score.",
                ),
                ValidationSocket.Input(
                    "validation",
                    optional=True,
                    tooltip="Validation Settings; their prompts, size, steps, guidance, seed and score win over the "
                    "widgets.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Prompt by prompt, within it strength by strength."),
                io.Image.Output(display_name="grid", tooltip="All of them, labelled."),
                io.String.Output(display_name="report", tooltip="What was drawn and measured, as JSON."),
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
        sampler_name: str = "euler",
        scheduler: str = "simple",
        images_per_prompt: int = 1,
        clip_score_model: str = "",
        validation: ValidationSettings | None = None,
    ) -> io.NodeOutput:
        from ..training.sample.draw import picture_seed
        from . import adapters as any_format
        from .bridge import embed_text, transformer_config
        from .draw import draw, with_guidance, with_shift
        from .grid import labelled_grid

        config = transformer_config(model)  # a sentence where it is no Lumina2
        settings = validation or ValidationSettings(
            validation_prompt=prompts,
            validation_negative_prompt=negative_prompt,
            validation_num_inference_steps=steps,
            validation_guidance=guidance,
            validation_seed=seed,
            num_validation_images=images_per_prompt,
            validation_resolution=f"{width}x{height}",
            evaluation_type="clip" if clip_score_model.strip() else "none",
            evaluation_required=True,
            pretrained_evaluation_model_name_or_path=clip_score_model.strip(),
        )
        wanted = settings.prompts()
        if not wanted:
            raise SettingError("prompts is empty. Write one prompt a line.")
        columns = _columns(_loras(lora, lora_model, config), parse_strengths(strengths))
        judge, unscored = _judge(settings)
        size = settings.sizes[0]
        steps = settings.validation_num_inference_steps
        seeds = [picture_seed(settings.validation_seed, n) for n in range(settings.num_validation_images)]
        rows = [_Row(prompt, seed) for prompt in wanted for seed in seeds]

        progress = Progress(cls.hidden.unique_id, len(columns) * len(rows) * steps)
        progress.say("encoding the prompts")
        negative, _ = embed_text(clip, settings.validation_negative_prompt)
        before = SYSTEM_PROMPTS[system_prompt]
        texts = {
            p: embed_text(clip, with_system_prompt(p.text, before) if p.text else "") for p in dict.fromkeys(wanted)
        }
        drawn: dict[tuple[int, int], torch.Tensor] = {}
        for column, shown in enumerate(columns):
            patched = any_format.with_strengths(model, shown.lora, shown.strength) if shown.lora else model
            patched = with_shift(patched, settings.validation_shift)
            patched = with_guidance(patched, settings, sampler_name, scheduler)
            for number, row in enumerate(rows):
                text = f"drawing picture {len(drawn) + 1} of {len(columns) * len(rows)}"
                done_before = len(drawn) * steps
                progress.step(done_before, text)
                drawn[number, column] = draw(
                    patched,
                    vae,
                    texts[row.prompt][0],
                    negative,
                    size,
                    steps,
                    settings.validation_guidance,
                    row.seed,
                    lambda done, before=done_before, text=text: progress.step(before + done, text),
                    sampler_name,
                    scheduler,
                )
        images = torch.cat([drawn[place] for place in sorted(drawn)])
        progress.say("measuring the pictures")
        measured = _measure(images, rows, columns, judge)
        report = {
            "lora": lora if lora.strip() else ("wired" if lora_model is not None else None),
            "width_px": size.width_px,
            "height_px": size.height_px,
            "steps": steps,
            "guidance": settings.validation_guidance,
            "guidance_rescale": settings.validation_guidance_rescale,
            "cfg_trunc_ratio": settings.cfg_trunc_ratio,
            "cfg_normalization": settings.cfg_normalization,
            "sampler": sampler_name,
            "scheduler": scheduler,
            "seed": settings.validation_seed,
            "system_prompt": system_prompt,
            "negative_prompt": settings.validation_negative_prompt,
            "strengths": [shown.strength for shown in columns],
            "prompts": [
                {"name": p.name, "prompt": p.text, "tokens": len(embedding), "cut": cut}
                for p, (embedding, cut) in texts.items()
            ],
            **measured,
            **({"unscored": unscored} if unscored else {}),
        }
        titles = [f"{row.prompt.text or row.prompt.name}{f' · {row.seed}' if len(seeds) > 1 else ''}" for row in rows]
        labels = [f"{shown.label} *" if shown.label == measured["best"] else shown.label for shown in columns]
        grid = labelled_grid(images, titles, labels)
        return io.NodeOutput(images, grid, json.dumps(report, indent=2, ensure_ascii=False))


@dataclass(frozen=True)
class _Row:
    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class _Column:
    label: str
    name: str  # of the LoRA; empty: the base model
    lora: Adapters | None
    strength: float


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


def _loras(named: str, wired: dict[str, torch.Tensor] | None, config: TransformerConfig) -> list[tuple[str, Adapters]]:
    """What is compared with the base model, by name."""
    from ..training.adapter.formats.read import adapters_of, read_adapters

    if wired is not None:
        return [("wired", adapters_of(wired, {}, config, "LORA_MODEL"))]
    names = [part.strip() for part in named.replace("\n", ",").split(",") if part.strip()]
    return [(name, read_adapters(_lora_file(name), config)) for name in dict.fromkeys(names)]


def _lora_file(name: str) -> Path:
    """A file under models/loras, or a checkpoint's of a run, as ``<run>/checkpoint-400``.

    Raises:
        RunError: there is none of this name.
    """
    run, _, checkpoint = name.partition("/")
    if checkpoint.startswith("checkpoint-") and run == Path(run).name and checkpoint == Path(checkpoint).name:
        file = places.runs().root / run / checkpoint / "lora.safetensors"
        if file.is_file():
            return file
        raise RunError(f"There is no LoRA of {name!r}. Name a run and one of its checkpoints, as in its folder.")
    return places.lora_file(name)


def _columns(loras: Sequence[tuple[str, Adapters]], strengths: Sequence[float]) -> list[_Column]:
    """The base model once, where a strength is 0 or there is no LoRA, and each LoRA at each other strength."""
    columns: dict[tuple[str, float], _Column] = {}
    base = _Column("base model", "", None, 0.0)
    if not loras:
        return [base]
    for name, lora in loras:
        for strength in strengths:
            if strength == 0:
                columns.setdefault(("", 0.0), base)
                continue
            title = "LoRA" if len(loras) == 1 else name.removesuffix(".safetensors")
            columns.setdefault((name, strength), _Column(f"{title} at {strength:g}", name, lora, strength))
    return list(columns.values())


def _judge(settings: ValidationSettings) -> tuple[Any, str]:
    """The CLIP that scores, or None; and why there is none where one is wanted."""
    if settings.evaluation_type == "none":
        return None, ""
    import comfy.model_management

    from ..training.sample.clip import CLIP

    try:
        device = comfy.model_management.get_torch_device()
        return CLIP(settings.pretrained_evaluation_model_name_or_path, device), ""
    except SettingError as error:
        if settings.evaluation_required:
            raise
        return None, str(error)


def _measure(images: torch.Tensor, rows: list[_Row], columns: list[_Column], judge: Any) -> dict[str, Any]:
    """Scores of every column and picture; ``images`` (rows · columns, height, width, 3) come row by row.

    ``diversity`` is the mean distance between prompts of one seed, ``change`` the mean distance to the base model's
    picture, both on pictures of 8 × 8 fields; the best column is that of the greatest CLIP score.
    """
    from ..training.sample.clip import summary
    from ..training.sample.distances import coarse, distances, spread
    from ..training.sample.pictures import to_bytes

    small = coarse(images.movedim(-1, 1)).unflatten(0, (len(rows), len(columns)))
    told: dict[int, float] = {}
    if judge:
        asked = [n for n in range(len(images)) if rows[n // len(columns)].prompt.text]
        prompts = [rows[n // len(columns)].prompt.text for n in asked]
        told = dict(zip(asked, judge.cosines([to_bytes(images[n]) for n in asked], prompts), strict=True))
    base = next((n for n, shown in enumerate(columns) if not shown.name), None)
    columns_told, pictures = [], []
    for number, shown in enumerate(columns):
        about: dict[str, Any] = {"label": shown.label, "lora": shown.name or None, "strength": shown.strength}
        places = {row: row * len(columns) + number for row in range(len(rows))}
        cosines = {row: told[place] for row, place in places.items() if place in told}
        about |= summary(list(cosines.values())) if cosines else {}
        groups: dict[int, list[torch.Tensor]] = {}
        for row, each in enumerate(rows):
            groups.setdefault(each.seed, []).append(small[row, number])
        spreads = [spread(torch.stack(group)) for group in groups.values() if len(group) > 1]
        if spreads:
            about["diversity"] = fmean(spreads)
        if base is not None and base != number:
            about["change"] = float(distances(small[:, number], small[:, base]).diagonal().mean())
        columns_told.append(about)
        for row, each in enumerate(rows):
            picture = {"prompt": each.prompt.name, "seed": each.seed, "column": shown.label}
            pictures.append({**picture, **({"clip_score": 100 * cosines[row]} if row in cosines else {})})
    scored = [about for about in columns_told if "clip_score" in about]
    best = max(scored, key=lambda about: about["clip_score"])["label"] if len(scored) > 1 else None
    return {"columns": columns_told, "pictures": pictures, "best": best}
