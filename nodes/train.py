"""Training."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..training.cache.latents import LatentCache
from ..training.cache.texts import TextCache
from ..training.config.adapter import AdapterSettings, LoRASettings
from ..training.config.optim import OptimizerSettings
from ..training.config.settings import RESUME, Config, TrainSettings, with_values
from ..training.run.session import Outcome, Request, train_lora
from . import places
from .progress import Progress, RunProgress
from .sockets import AdapterSocket, ConfigSocket, EmbedsSocket, LatentsSocket, LoraModelSocket, LossMapSocket

SAMPLES, SAMPLE_STEPS, SAMPLE_GUIDANCE = 2, 20, 4.0


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
                io.Model.Input("model", tooltip="The Lumina2 to train on, with whatever LoRAs are on it already."),
                LatentsSocket.Input("latents", tooltip="From Cache Latents."),
                EmbedsSocket.Input("embeds", tooltip="From Cache Text Embeds, of the same dataset."),
                io.String.Input(
                    "run_name",
                    default="my-lora",
                    tooltip="Names the LoRA file and the run's folder. Another training never overwrites it.",
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=10_000_000,
                    tooltip="Optimiser steps in all; 500–2000 for most LoRAs. More steps later go on from here.",
                ),
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
                io.Int.Input("batch_size", default=1, min=1, max=1024, tooltip="Pictures a step; 1–4 for most uses."),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="Decides everything that is random; the same seed trains the same LoRA.",
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
                AdapterSocket.Input("adapter", optional=True, tooltip="LoRA Settings; they win over the rank above."),
                io.Vae.Input("vae", optional=True, tooltip="Draws samples of the first two captions at the end."),
                ConfigSocket.Input(
                    "config", optional=True, tooltip="Training Settings; what they set wins over the widgets here."
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The model with the LoRA already on it: a LoraModelLoader behind it applies it twice.",
                ),
                LoraModelSocket.Output(display_name="LORA_MODEL", tooltip="For LoraModelLoader and SaveLoRA."),
                io.String.Output(display_name="lora_name", tooltip="The file's name under models/loras."),
                LossMapSocket.Output(display_name="LOSS_MAP", tooltip="For Plot Loss Graph."),
                io.Image.Output(display_name="samples", tooltip="Samples of the first two captions; needs a VAE."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        latents: LatentCache,
        embeds: TextCache,
        run_name: str,
        steps: int,
        learning_rate: float,
        rank: int,
        batch_size: int,
        seed: int,
        resume: str,
        checkpoint: str = "",
        continue_token: int = 0,
        attempt: int = 0,
        adapter: AdapterSettings | None = None,
        vae: Any = None,
        config: Config | None = None,
    ) -> io.NodeOutput:
        from .bridge import trainable_transformer, training
        from .draw import with_lora

        settings = TrainSettings(
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            adapter=adapter or LoRASettings(rank),
            optimizer=OptimizerSettings(learning_rate=learning_rate),
        )
        settings = with_values(settings, config.values if config else {})
        progress = Progress(cls.hidden.unique_id, settings.steps)
        progress.say("loading the model")
        transformer = trainable_transformer(model)
        with training():
            outcome = train_lora(
                transformer,
                latents,
                embeds,
                settings,
                Request(run_name, resume, checkpoint, continue_token, attempt),
                places.runs(),
                model.model.process_latent_in,
                RunProgress(progress, settings.steps),
                encode=vae.encode if vae is not None else None,
            )
        trained = with_lora(model, outcome.lora, 1.0)
        loss_map = {"loss": outcome.losses}
        if len(set(outcome.losses)) < 2:
            loss_map = ExecutionBlocker("The run logged fewer than two different losses: there is nothing to plot.")
        samples = ExecutionBlocker("Wire a VAE into Train Lumina2 LoRA to get samples.")
        if vae is not None:
            samples = _samples(trained, vae, latents, embeds, seed, progress)
        summary = _summary(outcome)
        progress.say(summary)
        lora_name = f"{places.SUBFOLDER}/{outcome.run.folder}.safetensors"
        return io.NodeOutput(
            trained,
            outcome.lora,
            lora_name,
            loss_map,
            samples,
            ui={"text": (summary,), "lumina2": [{"run_id": outcome.run.folder}]},
        )


def _summary(outcome: Outcome) -> str:
    run = outcome.run
    return f"{run.folder}: {run.step} steps. {outcome.message}. LoRA: {places.SUBFOLDER}/{run.folder}.safetensors"


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
