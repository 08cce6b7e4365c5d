"""Noising and the loss, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.objective import ObjectiveSettings


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """``x_t = (1 − σ)·z + σ·ε`` in fp32; ``latents`` and ``noise`` (B, C, H, W), ``sigmas`` (B,)."""
    sigma = sigmas.float().view(-1, 1, 1, 1)
    return (1 - sigma) * latents.float() + sigma * noise.float()


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """What the network is trained towards: ``z − ε`` in fp32."""
    return latents.float() - noise.float()


def slider_target(neutral: Tensor, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Where a slider leads: ``v(caption) + s·(v(positive) − v(negative))``, each the base model's velocity, in fp32.

    Args:
        scale: s, with the sign of the strength that the adapter acts with.

    Source: Gandikota et al. 2023, "Concept Sliders" (arXiv 2311.12092), eq. 8.
    """
    return neutral.float() + scale * (positive.float() - negative.float())


def perturbation(settings: ObjectiveSettings, step: int) -> float:
    """How much noise is added to the noise that the network sees, ``step`` training steps after the first.

    ``input_perturbation``, falling linearly to 0 over ``input_perturbation_steps`` where they are given.
    """
    over = settings.input_perturbation_steps
    return settings.input_perturbation * (max(0.0, 1 - step / over) if over else 1.0)


def perturb(noise: Tensor, more: Tensor, strength: float) -> Tensor:
    """The noise in x_t: ``ε + p·N``; the target keeps ``noise``. All (B, C, H, W), ``more`` standard normal.

    Source: Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models".
    """
    return noise.float() + strength * more.float()


def huber_constants(sigmas: Tensor, settings: ObjectiveSettings) -> Tensor:
    """Where the loss turns from quadratic to linear, for each noise level: (B,), fp32.

    ``constant`` c₀; ``exponential`` c₀^σ, from 1 at the picture to c₀ at noise; ``snr`` (1 − c₀)/(1 + r)² + c₀ with
    r = √((1 − σ)/(σ + 10⁻⁴)), from about c₀ at the picture to 1 at noise.
    """
    c, sigmas = settings.huber_c, sigmas.float()
    if settings.huber_schedule == "constant":
        return torch.full_like(sigmas, c)
    if settings.huber_schedule == "exponential":
        return c**sigmas
    ratio = ((1 - sigmas) / (sigmas + 1e-4)).sqrt()
    return (1 - c) / (1 + ratio).square() + c


def sample_losses(
    prediction: Tensor, target: Tensor, sigmas: Tensor, settings: ObjectiveSettings, weight: Tensor | None = None
) -> Tensor:
    """The loss of each sample, (B,), in fp32: the mean over its elements.

    With d the error and c of ``huber_constants``: ``l2`` d²; ``huber`` 2c(√(d² + c²) − c), which is d² where d ≪ c;
    ``smooth_l1`` 2(√(d² + c²) − c). All times σ² with ``sigma_squared_weighting``: since x + σ·v foresees the
    picture, that is the error of the picture.

    Args:
        prediction: (B, C, H, W) velocity.
        target: of the same shape.
        sigmas: (B,) noise levels.
        weight: of every element, such as a mask (B, 1, H, W) in [0, 1]; the mean is over all elements nevertheless.
    """
    squared = (prediction.float() - target.float()).square()
    if settings.loss_type != "l2":
        c = huber_constants(sigmas, settings).view(-1, 1, 1, 1)
        squared = 2 * squared / ((squared + c.square()).sqrt() + c)  # 2(√(d² + c²) − c) without its cancellation
        if settings.loss_type == "huber":
            squared = c * squared
    if weight is not None:
        squared = squared * weight
    losses = squared.mean((1, 2, 3))
    return sigmas.float().square() * losses if settings.sigma_squared_weighting else losses


def chosen_masks(masks: Tensor, uniform: Tensor, settings: ObjectiveSettings) -> Tensor:
    """Masks (B, 1, H, W), all 1 for the samples that are not to be masked this time; ``uniform`` (B,) in [0, 1)."""
    masked = (uniform < settings.masked_loss_probability).view(-1, 1, 1, 1)
    return torch.where(masked, masks, torch.ones_like(masks))


def batch_loss(losses: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """The mean over a batch of ``losses`` (B,), each times its weight: a weight of 0.5 halves a sample's gradient."""
    return (losses * weights).mean()
