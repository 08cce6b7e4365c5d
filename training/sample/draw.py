"""One picture's latents: a function of the weights, the prompt, the seed and the settings, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config.validation import Size, ValidationSettings
from ..model.transformer import Lumina2Transformer
from ..objective.sigmas import sampling_sigmas
from .euler import guided_velocity, sample_euler, text_velocity
from .guidance import guided_steps

LUMINA2_SHIFT = 6.0  # static, in inference


def picture_seed(seed: int, number: int) -> int:
    """The seed of a prompt's picture ``number``, from 0: the same for every prompt, whatever others are drawn."""
    return (seed + number) % 2**64


def picture_noise(seed: int, channels: int, size: Size, downscale: int = 8) -> Tensor:
    """Noise (1, channels, h, w) in fp32, drawn on the CPU: ComfyUI's own of the same seed, and diffusers'."""
    shape = (1, channels, size.height_px // downscale, size.width_px // downscale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_latents(
    transformer: Lumina2Transformer,
    caption: Tensor,
    negative: Tensor,
    noise: Tensor,
    settings: ValidationSettings,
    shift: float = LUMINA2_SHIFT,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents (1, C, h, w) in the transformer's units, fp32, on its device; equal to diffusers' ``Lumina2Pipeline``.

    Args:
        caption, negative: embeddings (tokens, width).
        noise: of ``picture_noise``.
        shift: the model's own, where the settings name none.
        on_step: called before each step with its number, from 0; what it raises ends the drawing.
    """
    device = transformer.final_layer.linear.weight.device
    steps = settings.validation_num_inference_steps
    sigmas = sampling_sigmas(steps, settings.validation_shift or shift)
    caption, latents = caption.to(device), noise.to(device)
    first = guided_steps(steps, settings.cfg_trunc_ratio) if settings.validation_guidance != 1 else 0
    if first:
        velocity = guided_velocity(
            transformer,
            caption,
            negative.to(device),
            settings.validation_guidance,
            settings.cfg_normalization,
            settings.validation_guidance_rescale,
        )
        latents = sample_euler(velocity, latents, sigmas[: first + 1], on_step)
    if first < steps:  # Euler's method remembers nothing, so the rest is a sampling of its own
        then = (lambda step: on_step(first + step)) if on_step else None
        latents = sample_euler(text_velocity(transformer, caption), latents, sigmas[first:], then)
    return latents
