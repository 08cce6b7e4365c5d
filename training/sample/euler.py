"""Euler's method over the noise levels: a pure function of the network, the noise and the levels."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..model.transformer import Lumina2Transformer
from .guidance import guide

Velocity = Callable[[Tensor, Tensor], Tensor]  # (latents, t of (B,)) -> velocity z - ε


def sample_euler(
    velocity: Velocity, noise: Tensor, sigmas: Tensor, on_step: Callable[[int], None] | None = None
) -> Tensor:
    """Latents (B, C, H, W) from ``noise``, along ``sigmas`` (steps + 1, falling from 1 to 0).

    ``on_step`` is called before each step with its number, from 0; what it raises ends the sampling.
    """
    latents, levels = noise.float(), sigmas.tolist()
    for step, (level, following) in enumerate(itertools.pairwise(levels)):
        if on_step:
            on_step(step)
        t = torch.full((len(latents),), 1 - level, device=latents.device)
        latents = latents + velocity(latents, t).float() * (level - following)
    return latents


def guided_velocity(
    transformer: Lumina2Transformer,
    caption: Tensor,
    negative: Tensor,
    guidance: float,
    normalise: bool = False,
    rescale: float = 0.0,
) -> Velocity:
    """Classifier-free guidance between two embeddings (tokens, width) of any lengths; see ``guide``.

    At a guidance of 1 the negative side is not computed. The two sides run one by one, so nothing is padded; both
    texts are refined once, with the weights that are there now.
    """
    wanted = text_velocity(transformer, caption)
    if guidance == 1:
        return wanted
    unwanted = text_velocity(transformer, negative)

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        return guide(wanted(latents, t), unwanted(latents, t), guidance, normalise, rescale)

    return velocity


def text_velocity(transformer: Lumina2Transformer, text: Tensor) -> Velocity:
    """The network's velocity in fp32 for one embedding (tokens, width), which is refined once, now."""
    tokens = len(text)
    refined = transformer.refine(text[None], (tokens,))

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        batch = len(latents)
        return transformer.predict(latents, t, refined.repeat(batch, 1), (tokens,) * batch).float()

    return velocity
