"""Clipped gradients, and steps that a gradient which is not finite leaves untaken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .adamw_bf16 import AdamWBF16


def clip_gradients(weights: Sequence[nn.Parameter], largest: float, method: str) -> Tensor:
    """Make gradients smaller in place, without waiting for the device.

    Args:
        largest: the largest norm of all together with ``method`` "norm", the largest number with "value"; 0: clip
            nothing.

    Returns:
        The norm of all gradients as they were, 0-dimensional; not finite where one of them is not.
    """
    if method == "norm" and largest:
        return nn.utils.clip_grad_norm_(weights, largest)
    norm = nn.utils.clip_grad_norm_(weights, torch.inf)  # by a factor of 1
    if largest:
        nn.utils.clip_grad_value_(weights, largest)
    return norm


def step_optimizer(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """A step that changes no weight and no state where ``finite``, a 0-dimensional truth value, is false.

    torch's fused AdamW and adamw_bf16 are told by a tensor, so that the host goes on at once and need not know.
    With every other optimiser the host waits here until the device has come so far.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False) or isinstance(optimizer, AdamWBF16):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite.item():
        optimizer.step()
