"""Noise levels: σ = 1 is noise, σ = 0 the picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import SettingError


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move flow-matching noise levels towards noise: ``s·σ / (1 + (s − 1)·σ)``.

    Args:
        sigmas: noise levels in [0, 1], any shape; 1 is pure noise.
        shift: > 0; 1 leaves the levels as they are, 6 is Lumina2's inference default.

    Raises:
        SettingError: ``shift`` is not positive.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23.
    """
    if shift <= 0:
        raise SettingError(f"The noise schedule shift must be positive, not {shift}.")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def auto_shift(height: int, width: int) -> float:
    """The shift that suits a latent of ``height`` × ``width``: more noise for larger pictures.

    ``exp(μ)`` with μ linear in the number of 2 × 2 patches, 0.5 at 256 and 1.15 at 4096; 3.158 at 1024 px.
    Source: the dynamic shift of diffusers' FlowMatchEulerDiscreteScheduler.
    """
    patches = (height // 2) * (width // 2)
    return math.exp(0.5 + (patches - 256) * (1.15 - 0.5) / (4096 - 256))


def logit_normal_sigmas(normal: Tensor, scale: float = 1.0) -> Tensor:
    """``sigmoid(scale · N)`` of standard normal draws ``normal``: most weight on the middle levels."""
    return torch.sigmoid(scale * normal)


def sampling_sigmas(steps: int, shift: float) -> Tensor:
    """The ``steps + 1`` noise levels of inference, 1 down to 0, evenly spaced before the shift.

    Equal to diffusers' flow-matching schedule, and to ComfyUI's "simple" scheduler where ``steps`` divides 1000.
    """
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    return torch.cat((shift_sigmas(even, shift), even.new_zeros(1))).float()
