"""Noising and the loss, in fp32."""

from __future__ import annotations

from torch import Tensor


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """``x_t = (1 − σ)·z + σ·ε`` in fp32; ``latents`` and ``noise`` (B, C, H, W), ``sigmas`` (B,)."""
    sigma = sigmas.float().view(-1, 1, 1, 1)
    return (1 - sigma) * latents.float() + sigma * noise.float()


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """What the network is trained towards: ``z − ε`` in fp32."""
    return latents.float() - noise.float()


def velocity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error against a velocity: the mean of each sample, (B,), in fp32. All (B, C, H, W)."""
    return (prediction.float() - target.float()).square().mean((1, 2, 3))
