"""Drawing pictures as ComfyUI's own KSampler does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from torch import Tensor

from ..training.config.validation import ValidationSettings
from ..training.sample.guidance import guide, guided_steps


def with_lora(model: Any, lora: dict[str, Tensor], strength: float) -> Any:
    """MODEL with a LoRA on it, by ComfyUI's own loading; MODEL itself stays as it is."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0] if strength else model


def with_shift(model: Any, shift: float) -> Any:
    """MODEL with another noise schedule shift, as ModelSamplingAuraFlow sets it; 0: as it is."""
    if not shift:
        return model

    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    sampling = Sampling(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1.0)
    changed = model.clone()
    changed.add_object_patch("model_sampling", sampling)
    return changed


def with_guidance(model: Any, settings: ValidationSettings, sampler: str, scheduler: str) -> Any:
    """MODEL with the settings' way of guidance; itself where that is KSampler's own."""
    normalise, rescale = settings.cfg_normalization, settings.validation_guidance_rescale
    if not normalise and not rescale and settings.cfg_trunc_ratio == 1:
        return model
    steps = settings.validation_num_inference_steps
    levels = comfy.samplers.KSampler(model, steps, model.load_device, sampler, scheduler).sigmas.tolist()
    guided = guided_steps(steps, settings.cfg_trunc_ratio)
    # Samplers that look between two levels are guided down to half way behind the last guided one.
    until = (levels[guided - 1] + levels[guided]) / 2 if guided else float("inf")

    def predict(args: dict[str, Any]) -> Tensor:
        if float(args["sigma"].max()) <= until:
            return args["cond"]
        # Both are the predictions times sigma, which neither the lengths' nor the spreads' ratio minds.
        return guide(args["cond"], args["uncond"], args["cond_scale"], normalise, rescale)

    changed = model.clone()
    changed.set_model_sampler_cfg_function(predict)
    return changed


def draw(
    model: Any,
    vae: Any,
    caption: Tensor,
    negative: Tensor,
    size_px: tuple[int, int],
    steps: int,
    guidance: float,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
    sampler: str = "euler",
    scheduler: str = "simple",
) -> Tensor:
    """One picture, (1, height, width, 3) in [0, 1].

    Args:
        caption, negative: embeddings (tokens, width).
        size_px: width and height.
        on_step: called after each step with the steps done; what it raises ends the drawing.
        sampler, scheduler: by ComfyUI's names.
    """
    width, height = size_px
    empty = torch.zeros(1, vae.latent_channels, height // 8, width // 8)
    empty = comfy.sample.fix_empty_latent_channels(model, empty)
    noise = comfy.sample.prepare_noise(empty, seed)
    latents = comfy.sample.sample(
        model,
        noise,
        steps,
        guidance,
        sampler,
        scheduler,
        [[caption[None], {}]],
        [[negative[None], {}]],
        empty,
        callback=lambda step, *_: on_step(step + 1),
        disable_pbar=True,
        seed=seed,
    )
    return vae.decode(latents)
