"""Drawing pictures as ComfyUI's own KSampler does: euler, simple."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.sd
import torch
from torch import Tensor


def with_lora(model: Any, lora: dict[str, Tensor], strength: float) -> Any:
    """MODEL with a LoRA on it, by ComfyUI's own loading; MODEL itself stays as it is."""
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0] if strength else model


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
) -> Tensor:
    """One picture, (1, height, width, 3) in [0, 1].

    Args:
        caption, negative: embeddings (tokens, width).
        size_px: width and height.
        on_step: called after each step with the steps done; what it raises ends the drawing.
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
        "euler",
        "simple",
        [[caption[None], {}]],
        [[negative[None], {}]],
        empty,
        callback=lambda step, *_: on_step(step + 1),
        disable_pbar=True,
        seed=seed,
    )
    return vae.decode(latents)
