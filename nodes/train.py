"""Training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..training.cache.latents import LatentCache
from ..training.cache.texts import TextCache
from ..training.config.adapter import AdapterSettings, FullSettings, LoRASettings
from ..training.config.optim import OptimizerSettings
from ..training.config.settings import RESUME, Config, TrainSettings
from ..training.errors import SettingError
from . import places
from .progress import Progress, RunProgress
from .sockets import AdapterSocket, ConfigSocket, EmbedsSocket, LatentsSocket, LoraModelSocket, LossMapSocket

SAMPLES, SAMPLE_STEPS, SAMPLE_GUIDANCE = 2, 20, 4.0

LAUNCH = ("in this process", "accelerate")

if TYPE_CHECKING:
    from ..training.run.session import Outcome


class TrainLumina2LoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainLumina2LoRA",
            display_name="Train Lumina2 LoRA",
            category="Lumina2",
            description="Trains a LoRA on the cached pictures and captions. Queueing it again with the same settings "
            "hands out what was trained.",
            inputs=[
                *_sources("The Lumina2 to train on, with whatever LoRAs are on it already."),
                *_main_widgets("my-lora", "Names the LoRA file and the run's folder.", "500–2000 for most LoRAs"),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-6,
                    round=1e-9,
                    tooltip="0.0001 is a good start, 0.00005 the gentler side; 1 for prodigy.",
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="How much the LoRA can learn: 8–32 for most uses. LoRA Settings win over it.",
                ),
                *_further_widgets(),
                AdapterSocket.Input("adapter", optional=True, tooltip="LoRA Settings; they win over the rank above."),
                *_further_sources(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The model with the LoRA already on it: a LoraModelLoader behind it applies it twice.",
                ),
                LoraModelSocket.Output(display_name="LORA_MODEL", tooltip="For LoraModelLoader and SaveLoRA."),
                io.String.Output(display_name="lora_name", tooltip="The file's name under models/loras."),
                LossMapSocket.Output(display_name="LOSS_MAP", tooltip="For Plot Loss Graph."),
                io.Image.Output(
                    display_name="samples",
                    tooltip="The last samples of the validation prompts, or of the first two captions; needs a VAE.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model: Any, rank: int, adapter: AdapterSettings | None = None, **inputs: Any) -> io.NodeOutput:
        from .draw import with_lora

        config = inputs.get("config")
        chosen = adapter or (config.adapter if config else None) or LoRASettings(rank)
        if isinstance(chosen, FullSettings):
            raise SettingError("config asks for a full fine-tune. Wire it into Train Lumina2 (full fine-tune) instead.")
        trained = _train(cls.hidden.unique_id, model, chosen, **inputs)
        return trained.output(with_lora(model, trained.outcome.lora, 1.0), trained.outcome.lora)


class TrainLumina2Full(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrainLumina2Full",
            display_name="Train Lumina2 (full fine-tune)",
            category="Lumina2",
            description="Trains all weights of the model. It needs its own copy of them, and much more memory than a "
            "LoRA. Queueing it again with the same settings hands out what was trained.",
            inputs=[
                *_sources("The Lumina2 to start from; it stays as it is."),
                *_main_widgets("my-model", "Names the model file and the run's folder.", "2000–5000 for most"),
                io.Float.Input(
                    "learning_rate",
                    default=1e-5,
                    min=1e-8,
                    max=1.0,
                    step=1e-7,
                    round=1e-10,
                    tooltip="0.00001 down to 0.000001: far less than a LoRA's.",
                ),
                *_further_widgets(),
                io.String.Input(
                    "targets",
                    default="",
                    optional=True,
                    tooltip="attention, attention+ff or blocks trains only those layers. Empty: everything.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    optional=True,
                    tooltip="Which blocks: 0-12,20 of the main layers, noise_refiner, context_refiner. Empty: all.",
                ),
                *_further_sources(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The trained model."),
                io.String.Output(display_name="model_name", tooltip="The file's name under models/diffusion_models."),
                LossMapSocket.Output(display_name="LOSS_MAP", tooltip="For Plot Loss Graph."),
                io.Image.Output(
                    display_name="samples",
                    tooltip="The last samples of the validation prompts, or of the first two captions; needs a VAE.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model: Any, targets: str = "", blocks: str = "", **inputs: Any) -> io.NodeOutput:
        from .bridge import with_weights

        config = inputs.get("config")
        own = config.adapter if config and isinstance(config.adapter, FullSettings) else FullSettings()
        chosen = replace(own, targets=targets.strip() or own.targets, blocks=blocks.strip() or own.blocks)
        trained = _train(cls.hidden.unique_id, model, chosen, **inputs)
        return trained.output(with_weights(model, trained.outcome.lora))


def _sources(model: str) -> list[Any]:
    return [
        io.Model.Input("model", tooltip=model),
        LatentsSocket.Input("latents", tooltip="From Cache Latents."),
        EmbedsSocket.Input("embeds", tooltip="From Cache Text Embeds, of the same dataset."),
    ]


def _main_widgets(name: str, what: str, usual_steps: str) -> list[Any]:
    return [
        io.String.Input("run_name", default=name, tooltip=f"{what} Another training never overwrites it."),
        io.Int.Input(
            "steps",
            default=1000,
            min=1,
            max=10_000_000,
            tooltip=f"Optimiser steps in all; {usual_steps}. More steps later go on from here.",
        ),
    ]


def _further_widgets() -> list[Any]:
    return [
        io.Int.Input("batch_size", default=1, min=1, max=1024, tooltip="Pictures a step; 1–4 for most uses."),
        io.Int.Input(
            "seed",
            default=42,
            min=0,
            max=2**64 - 1,
            control_after_generate=False,
            tooltip="Decides everything that is random; the same seed gives the same result.",
        ),
        io.Combo.Input(
            "resume",
            options=list(RESUME),
            tooltip="continue: go on where this run was left. from checkpoint: start from the one named below.",
        ),
        io.String.Input(
            "checkpoint",
            default="",
            optional=True,
            tooltip="For resume from checkpoint: <run>/checkpoint-400, of this or another run.",
        ),
        io.Int.Input(
            "continue_token",
            default=0,
            min=0,
            max=2**31,
            optional=True,
            control_after_generate=False,
            tooltip="Raised to go on with a run that was stopped and kept.",
        ),
        io.Int.Input(
            "attempt",
            default=0,
            min=0,
            max=2**31,
            optional=True,
            control_after_generate=False,
            tooltip="Raised to train the same settings once more from the start.",
        ),
    ]


def _further_sources() -> list[Any]:
    return [
        io.Vae.Input(
            "vae", optional=True, tooltip="Draws the samples: of the validation prompts, or of the first two captions."
        ),
        ConfigSocket.Input(
            "config", optional=True, tooltip="Training Settings; what they set wins over the widgets here."
        ),
        io.Clip.Input("clip", optional=True, tooltip="Reads prompts that are typed into the panel in mid-run."),
        io.Combo.Input(
            "launch",
            options=list(LAUNCH),
            default=LAUNCH[0],
            optional=True,
            tooltip="accelerate: in processes of its own, one for each GPU; the model is written to disk first.",
        ),
    ]


@dataclass(frozen=True)
class Trained:
    """What a training gave, and what is still needed to draw with it."""

    outcome: Outcome
    folder: str  # under models/loras or models/diffusion_models
    draw: Callable[[Any], torch.Tensor] | None  # samples with a MODEL; None without a VAE
    progress: Progress

    def output(self, model: Any, *more: Any) -> io.NodeOutput:
        """The node's outputs: MODEL, ``more``, the file's name, the losses and the samples."""
        outcome = self.outcome
        losses: Any = {"loss": outcome.losses}
        if len(set(outcome.losses)) < 2:
            losses = ExecutionBlocker("The run logged fewer than two different losses: there is nothing to plot.")
        samples: Any = ExecutionBlocker("Wire a VAE into the train node to get samples.")
        if self.draw:
            samples = self.draw(model)
        name = f"{places.SUBFOLDER}/{outcome.run.folder}.safetensors"
        summary = f"{outcome.run.folder}: {outcome.run.step} steps. {outcome.message}. {self.folder}: {name}"
        self.progress.say(summary)
        shown = {"text": (summary,), "lumina2": [{"run_id": outcome.run.folder}]}
        return io.NodeOutput(model, *more, name, losses, samples, ui=shown)


def _train(
    node_id: str | None,
    model: Any,
    adapter: AdapterSettings,
    latents: LatentCache,
    embeds: TextCache,
    run_name: str,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    resume: str,
    checkpoint: str = "",
    continue_token: int = 0,
    attempt: int = 0,
    vae: Any = None,
    config: Config | None = None,
    clip: Any = None,
    launch: str = LAUNCH[0],
) -> Trained:
    """Train, or hand out what was trained before; what the config says wins over the widgets."""
    from ..training.report.login import check_logins
    from ..training.report.reporters import reporters
    from ..training.report.story import about_run
    from ..training.run.events import to_all
    from ..training.run.session import Request, train_lora
    from ..training.sample.validator import SampleValidator
    from .bridge import embed_text, trainable_transformer, training

    config = config or Config({})
    settings = config.training(
        TrainSettings(
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            adapter=adapter,
            optimizer=OptimizerSettings(learning_rate=learning_rate),
        )
    )
    progress = Progress(node_id, settings.steps, quiet=True)
    store = places.runs()
    request = Request(run_name.strip() or config.run_name, resume, checkpoint, continue_token, attempt)
    reported = reporters(config.report, store, progress.say, about_run(latents, embeds))
    tell = to_all([RunProgress(progress, settings.steps), reported])
    progress.say("loading the model")
    if launch != LAUNCH[0]:
        from .launch import launch as in_other_processes

        check_logins(config.report)
        outcome = in_other_processes(model, latents, embeds, settings, request, store, tell, vae=vae)
    else:
        transformer = trainable_transformer(model)
        scale, unscale = model.model.process_latent_in, model.model.process_latent_out
        limit = embeds.validation.max_tokens if embeds.validation else 256
        with training():
            validator = SampleValidator(
                embeds,
                latents,
                scale,
                decode=(lambda drawn: vae.decode(unscale(drawn))) if vae is not None else None,
                embed=(lambda text: embed_text(clip, text, limit)[0].float()) if clip is not None else None,
                shift=model.get_model_object("model_sampling").shift,
                last_step=settings.steps,
            )
            outcome = train_lora(
                transformer,
                latents,
                embeds,
                settings,
                request,
                store,
                scale,
                tell,
                encode=vae.encode if vae is not None else None,
                validator=validator,
                check=lambda: check_logins(config.report),
            )
    drawn = _drawn(store.path(outcome.run), outcome.run.step)

    def draw(trained: Any) -> torch.Tensor:
        return drawn if drawn is not None else _samples(trained, vae, latents, embeds, settings.seed, progress)

    kind = "Model" if settings.full_fine_tune else "LoRA"
    return Trained(outcome, kind, draw if vae is not None or drawn is not None else None, progress)


def _drawn(run_folder: Path, step: int) -> torch.Tensor | None:
    """The validation's pictures of a step, (N, height, width, 3) in [0, 1], those of the first one's size."""
    pictures = []
    for path in sorted((run_folder / "samples" / f"step-{step}").glob("*.png")):
        with Image.open(path) as opened:
            pictures.append(torch.from_numpy(np.array(opened.convert("RGB"))).float() / 255)
    return torch.stack([each for each in pictures if each.shape == pictures[0].shape]) if pictures else None


def _samples(
    model: Any, vae: Any, latents: LatentCache, embeds: TextCache, seed: int, progress: Progress
) -> torch.Tensor:
    """Pictures of the first captions in the first picture's size, with the LoRA on."""
    from .draw import draw

    _, height, width = latents.rows().shape[0].tolist()
    entries, said = embeds.store.open(), embeds.rows()
    negative = entries.read(embeds.empty).float()
    pictures = []
    for number in range(min(SAMPLES, embeds.count)):
        progress.say(f"drawing sample {number + 1} of {min(SAMPLES, embeds.count)}")
        pictures.append(
            draw(
                model,
                vae,
                entries.read(said.variants(number)[0]).float(),
                negative,
                (width * 8, height * 8),
                SAMPLE_STEPS,
                SAMPLE_GUIDANCE,
                seed,
                lambda _: progress.say("drawing samples"),
            )
        )
    return torch.cat(pictures)
