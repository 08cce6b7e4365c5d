"""The losses of one batch, from noising to the loss: everything random comes in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.objective import ObjectiveSettings
from .loss import add_noise, sample_losses, velocity
from .rollout import Predict, direction_loss, exposure_weight, roll_out, rolled_out


def training_losses(
    predict: Predict,
    latents: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    settings: ObjectiveSettings,
    *,
    seen_noise: Tensor | None = None,
    levels: Tensor | None = None,
    mask: Tensor | None = None,
    teacher: Predict | None = None,
) -> Tensor:
    """The loss of each sample, (B,), in fp32, with its gradient.

    Args:
        predict: the network that is trained.
        latents: (B, C, H, W) the pictures z.
        noise: of the same shape, ε.
        sigmas: (B,) noise levels.
        seen_noise: the noise in what the network sees, where it is not ``noise``: of ``perturb``.
        levels: of ``plan_rollout``, whose last column is ``sigmas``, on the CPU; None: no scheduled sampling, as
            for an evaluation.
        mask: (B, 1, H, W) in [0, 1].
        teacher: for regularisation data and sliders: its velocity for the very latents that the network sees is the
            target instead of z − ε, and ReflexFlow, which aims at the picture, is left out.
    """
    everyone = list(range(len(latents)))
    seen_noise = noise if seen_noise is None else seen_noise
    if levels is None:
        x = add_noise(latents, seen_noise, sigmas)
    else:
        x = roll_out(predict, latents, seen_noise, levels, settings.scheduled_sampling.order)
    # Forward passes without a gradient come first, while no activations are kept.
    with torch.no_grad():
        target = velocity(latents, noise) if teacher is None else teacher(x, sigmas, everyone)
    reflex = settings.scheduled_sampling
    rows = rolled_out(levels) if reflex.reflexflow and teacher is None else []
    if not rows:
        return sample_losses(predict(x, sigmas, everyone), target, sigmas, settings, mask)
    with torch.no_grad():
        clean = predict(add_noise(latents[rows], seen_noise[rows], sigmas[rows]), sigmas[rows], rows)
    prediction = predict(x, sigmas, everyone)
    weight = torch.ones_like(x) if mask is None else mask.expand_as(x).clone()
    weight[rows] *= reflex.reflexflow_beta2 * exposure_weight(clean, prediction[rows].detach(), reflex.reflexflow_alpha)
    losses = sample_losses(prediction, target, sigmas, settings, weight)
    astray = direction_loss(prediction[rows], latents[rows], x[rows], None if mask is None else mask[rows])
    return losses.index_add(0, torch.tensor(rows, device=x.device), astray, alpha=reflex.reflexflow_beta1)
