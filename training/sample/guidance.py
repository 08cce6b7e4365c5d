"""Classifier-free guidance on two predictions of the velocity; it does not matter how they are scaled."""

from __future__ import annotations

from torch import Tensor


def guide(wanted: Tensor, unwanted: Tensor, guidance: float, normalise: bool = False, rescale: float = 0.0) -> Tensor:
    """``u + g·(c − u)`` of the predictions c for the prompt and u for the negative one, each (B, C, H, W).

    Args:
        normalise: each row of the picture keeps the length that it has in c, as in Lumina2's own pipeline.
        rescale: φ, how far each sample gets back the spread that it has in c: ``φ·v·std(c)/std(v) + (1 − φ)·v``.

    Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance"; for φ Lin et al. 2023, "Common Diffusion Noise
    Schedules and Sample Steps are Flawed", eq. 14 to 16.
    """
    guided = unwanted + guidance * (wanted - unwanted)
    if normalise:
        guided = guided * (wanted.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    if rescale:
        spread = wanted.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
        guided = guided * (rescale * spread + 1 - rescale)
    return guided


def guided_steps(steps: int, trunc_ratio: float) -> int:
    """In how many steps guidance acts: step i of n, from 0, is guided where (i + 1) / n ≤ ``trunc_ratio``."""
    return sum((step + 1) / steps <= trunc_ratio for step in range(steps))
