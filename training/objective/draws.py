"""Which noise levels are trained on: one uniform draw of a sample decides its level, through the quantile function."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..config.objective import ObjectiveSettings
from .sigmas import auto_shift, logit_normal_sigmas, shift_sigmas

Map = Callable[[Tensor], Tensor]


def schedule_shift(settings: ObjectiveSettings, height: int, width: int) -> float:
    """The shift for latents of ``height`` × ``width``; 1 leaves the levels as they are."""
    return auto_shift(height, width) if settings.flow_schedule_auto_shift else settings.flow_schedule_shift or 1.0


def draw_sigmas(uniform: Tensor, settings: ObjectiveSettings, shift: float, first: int = 0) -> Tensor:
    """Noise levels (B,) in fp32.

    Within ``sigma_min`` and ``sigma_max`` the shifted distribution is as it would be without them: the draws are
    mapped to the part of (0, 1) that leads there.

    Args:
        uniform: (B,) draws in [0, 1), on the CPU; the level grows with them.
        shift: of ``schedule_shift``.
        first: the number of the first sample since the run began, for timesteps in turn.
    """
    uniform = uniform.double()
    if settings.flow_custom_timesteps:
        levels = torch.tensor(settings.custom_sigmas, dtype=torch.float64)
        in_turn = settings.flow_timesteps_mode == "round-robin"
        place = (first + torch.arange(len(uniform))) % len(levels) if in_turn else (uniform * len(levels)).long()
        return levels[place].float()
    cumulative, quantile = _distribution(settings)
    edges = torch.tensor([settings.sigma_min, settings.sigma_max], dtype=torch.float64)
    low, high = cumulative(
        shift_sigmas(edges, 1 / shift).clamp(0, 1)
    )  # a shift of 1/s undoes one of s, but for rounding
    sigmas = shift_sigmas(quantile(low + uniform * (high - low)), shift)
    return sigmas.clamp(settings.sigma_min, settings.sigma_max).float()


def stratify(uniform: Tensor, order: Tensor, strata: int | None = None) -> Tensor:
    """Draws (B,) of which each falls into another of ``strata`` equal parts of (0, 1): ``(order + u) / strata``.

    Each draw alone is as uniform as before, over ``order``; the mean over a batch varies less.

    Args:
        uniform: (B,) draws in [0, 1).
        order: (B,) the part of each, of ``stratum_order``; a slice of it where this is a slice of the batch.
        strata: the size of the whole batch; by default that of ``order``.
    """
    return (order.double() + uniform.double()) / (strata or len(order))


def stratum_order(seed: int, step: int, strata: int) -> Tensor:
    """A permutation of 0 … ``strata`` − 1: which sample of a step's batch gets which part."""
    # The third word keeps it apart from the streams of single samples, which are seeded by two.
    mixed = np.random.SeedSequence([seed, step, 1]).generate_state(1, np.uint64)[0]
    return torch.randperm(strata, generator=torch.Generator().manual_seed(int(mixed) % 2**63))


def _distribution(settings: ObjectiveSettings) -> tuple[Map, Map]:
    """The cumulative distribution of the levels before the shift, and its inverse. In fp64."""
    weights = settings.flow_cubic_schedule_weights
    if settings.flow_use_uniform_schedule or len(weights) == 1:
        return torch.clone, torch.clone
    if settings.flow_use_beta_schedule:
        from scipy.special import betainc, betaincinv

        a, b = settings.flow_beta_schedule_alpha, settings.flow_beta_schedule_beta
        return (
            lambda sigmas: torch.from_numpy(betainc(a, b, sigmas.numpy())),
            lambda uniform: torch.from_numpy(betaincinv(a, b, uniform.numpy())),
        )
    if weights:
        levels, below = _cubic_table(weights)
        return (
            lambda sigmas: torch.from_numpy(np.interp(sigmas.numpy(), levels, below)),
            lambda uniform: torch.from_numpy(np.interp(uniform.numpy(), below, levels)),
        )
    scale, offset = settings.flow_sigmoid_scale, settings.timestep_sampling_offset
    return (
        lambda sigmas: torch.special.ndtr(torch.logit(sigmas) / scale - offset),
        lambda uniform: logit_normal_sigmas(torch.special.ndtri(uniform) + offset, scale),
    )


@lru_cache(maxsize=8)
def _cubic_table(weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Levels, and the share below each, of a density that runs monotonely between evenly spaced ``weights``."""
    from scipy.interpolate import PchipInterpolator

    levels = np.linspace(0, 1, 4097)
    below = PchipInterpolator(np.linspace(0, 1, len(weights)), weights).antiderivative()(levels)
    return levels, below / below[-1]
