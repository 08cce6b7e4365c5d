"""Scheduled sampling: the network is trained on latents that it has denoised itself, as they are met at inference.

Sources: Bengio et al. 2015, "Scheduled Sampling"; Huang et al. 2025, "ReflexFlow" (arXiv 2512.04904).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.objective import ScheduledSamplingSettings
from .loss import add_noise
from .sigmas import shift_sigmas

# (latents (b, C, H, W), noise levels (b,), which samples of the batch these are) -> velocity z − ε, (b, C, H, W)
Predict = Callable[[Tensor, Tensor, list[int]], Tensor]


def rollout_probability(settings: ScheduledSamplingSettings, step: int) -> float:
    """How likely a sample is denoised by the network itself, ``step`` training steps after the first."""
    if step < settings.start_step:
        return 0.0
    if not settings.ramp_steps:
        return settings.probability
    done = min((step - settings.start_step) / settings.ramp_steps, 1.0)
    if settings.ramp_shape == "cosine":
        done = 0.5 - 0.5 * math.cos(math.pi * done)
    return settings.prob_start + (settings.prob_end - settings.prob_start) * done


def step_offsets(uniform: Tensor, settings: ScheduledSamplingSettings) -> Tensor:
    """How many steps above its own level a sample starts: (B,), whole, 0 to K = ``max_step_offset``.

    ``uniform`` gives each number alike, ``biased_early`` round(K·u²), ``biased_late`` round(K·(1 − u²)).
    """
    most, uniform = settings.max_step_offset, uniform.double()
    if settings.strategy == "uniform":
        return (uniform * (most + 1)).long().clamp(max=most)
    square = uniform.square()
    return (most * (square if settings.strategy == "biased_early" else 1 - square)).round().long()


def plan_rollout(
    sigmas: Tensor, chance: Tensor, place: Tensor, settings: ScheduledSamplingSettings, step: int
) -> Tensor | None:
    """The noise levels that each sample of a batch passes on the way to its own.

    Args:
        sigmas: (B,) the levels that are trained on.
        chance: (B,) uniform draws in [0, 1): whether a sample is denoised by the network.
        place: (B,) uniform draws in [0, 1): from how far.
        step: training steps before this one.

    Returns:
        (B, n + 1) in fp32, falling from the source, which is at most 1, to exactly ``sigmas``. Ways that are shorter
        than n stand still at first; that of a sample which is not denoised does so all along. None: no sample is.
    """
    chosen = chance < rollout_probability(settings, step)
    offsets = step_offsets(place, settings) * chosen
    longest = int(offsets.max())
    if longest == 0:
        return None
    steps, shift = (settings.grid_steps, settings.grid_shift) if settings.grid_steps else (1000, 1.0)
    back = torch.minimum(torch.arange(longest, -1, -1), offsets[:, None])
    # The steps of inference are even before the shift; a shift of 1/s undoes one of s, in fp64 to the last bit of fp32.
    even = shift_sigmas(sigmas.double()[:, None], 1 / shift) + back / steps
    return shift_sigmas(even.clamp(max=1), shift).float()


def rolled_out(levels: Tensor | None) -> list[int]:
    """The samples that are denoised by the network at all; ``levels`` of ``plan_rollout``."""
    return [] if levels is None else (levels[:, 0] > levels[:, -1]).nonzero().flatten().tolist()


@torch.no_grad()
def roll_out(predict: Predict, latents: Tensor, noise: Tensor, levels: Tensor, order: int = 1) -> Tensor:
    """Latents (B, C, H, W) in fp32 at the last of ``levels``, denoised by the network from the first of them.

    Each step runs once for all samples that move in it; one that stands still costs nothing and is ``add_noise`` at
    its level.

    Args:
        latents: (B, C, H, W) the pictures.
        noise: of the same shape.
        levels: (B, n + 1) falling noise levels of each sample, on the CPU, so that nothing waits for the device.
        order: 1 Euler, 2 Heun.
    """
    on_device = levels.to(latents.device)
    x = add_noise(latents, noise, on_device[:, 0])
    for step in range(levels.shape[1] - 1):
        rows = (levels[:, step] > levels[:, step + 1]).nonzero().flatten().tolist()
        if not rows:
            continue
        here, there = on_device[rows, step], on_device[rows, step + 1]
        length = (here - there).view(-1, 1, 1, 1)
        before = x[rows]
        slope = predict(before, here, rows).float()  # z − ε: the way that x goes while σ falls
        if order == 2:
            slope = (slope + predict(before + length * slope, there, rows).float()) / 2
        x[rows] = before + length * slope
    return x


def exposure_weight(clean: Tensor, rolled: Tensor, alpha: float) -> Tensor:
    """Weight (B, C, H, W) of each element's loss: ``1 + α·|c − b| / mean|c − b|``, the mean over the sample.

    It is 1 + α in the mean, whatever the size of the picture, and never negative.

    Args:
        clean: (B, C, H, W) c, what the network says of the noised picture.
        rolled: b, what it says of the latents that it has denoised itself.
    """
    bias = (clean.float() - rolled.float()).abs()
    return 1 + alpha * bias / bias.mean((1, 2, 3), keepdim=True).clamp_min(1e-12)


def direction_loss(prediction: Tensor, latents: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far a velocity points past the picture: ``‖p̂ − d̂‖² = 2 − 2·cos(p, z − x)`` of each sample, (B,).

    Args:
        prediction: (B, C, H, W) velocity p at ``x``.
        latents: the pictures z.
        x: where the samples are.
        mask: (B, 1, H, W) in [0, 1]; where it is 0 no direction counts.
    """
    wanted, prediction = latents.float() - x, prediction.float()
    if mask is not None:
        wanted, prediction = wanted * mask, prediction * mask
    return 2 - 2 * F.cosine_similarity(prediction.flatten(1), wanted.flatten(1), dim=1)
