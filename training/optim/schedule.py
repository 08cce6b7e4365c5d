"""The learning rate over a run."""

from __future__ import annotations

import math

import torch

from ..config.optim import OptimizerSettings
from .backward import AnyOptimizer


def learning_rate_factor(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """What the learning rate of one optimiser step is multiplied with.

    It rises over ``lr_warmup_steps``, from 1/(W + 1) so that no step is without effect; what is left of the run is
    one period of the scheduler, at whose end it would come to its lowest value.

    Args:
        step: optimiser steps done, 0 to ``total_steps`` − 1.

    Returns:
        Above 0 and at most 1. With p from 0 to 1 over the run after the warm-up, between ``lr_end`` and 1:
        cosine ½(1 + cos πp); with restarts the same as often as ``lr_num_cycles``; polynomial (1 − p)^``lr_power``;
        sine ½(1 + sin πp), so from half up to 1 and back; linear 1 − p, down to 0.
    """
    warmup = settings.lr_warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total_steps - warmup, 1), 1)
    cycle = done * settings.lr_num_cycles % 1
    match settings.lr_scheduler:
        case "linear":
            return 1 - done
        case "cosine":
            height = (1 + math.cos(math.pi * done)) / 2
        case "cosine_with_restarts":
            height = (1 + math.cos(math.pi * cycle)) / 2
        case "sine":
            height = (1 + math.sin(math.pi * cycle)) / 2
        case "polynomial":
            height = (1 - done) ** settings.lr_power
        case _:
            return 1.0
    lowest = settings.lr_end / settings.learning_rate
    return lowest + (1 - lowest) * height


def set_learning_rate(optimizer: AnyOptimizer, factor: float) -> None:
    """Give every group so much of the learning rate that it was built with."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):  # torchao keeps it so
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
