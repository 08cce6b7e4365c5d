"""Euler's method over the noise levels: a pure function of the network, the noise and the levels."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..model.transformer import Lumina2Transformer

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


def guided_velocity(transformer: Lumina2Transformer, caption: Tensor, negative: Tensor, guidance: float) -> Velocity:
    """Classifier-free guidance ``u + g·(c − u)`` between two embeddings (tokens, width) of any lengths.

    At a guidance of 1 the negative side is not computed. The two sides run one by one, so nothing is padded.
    """

    def predict(latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        batch = len(latents)
        return transformer(latents, t, text.expand(batch, -1, -1), (len(text),) * batch).float()

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        wanted = predict(latents, t, caption)
        if guidance == 1:
            return wanted
        unwanted = predict(latents, t, negative)
        return unwanted + guidance * (wanted - unwanted)

    return velocity
