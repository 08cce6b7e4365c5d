"""The optimiser in the backward pass: a weight is changed as soon as its gradient is there, which then is freed.

So a full fine-tune never holds the gradients of more than one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.optim import CAN_BE_CLIPPED, OptimizerSettings
from .build import Group, build_optimizer
from .low_bit import low_bit_slices, state_slice
from .step import step_optimizer


class OptimizerInBackward:
    """An optimiser for each weight, which ``loss.backward()`` itself makes step.

    In place of a global norm, which nobody knows before the backward pass ends, each tensor's update is clipped
    (``grad_clip_method`` "update"; "value" clips each number of its gradient). A gradient that is not finite leaves
    its weight and state as they were; others may have changed by then, so that such a run goes on from its last
    checkpoint. ``take_norm`` tells.

    Args:
        groups: as for ``build_optimizer``.

    Raises:
        SettingError: as ``build_optimizer``.
    """

    def __init__(self, groups: Sequence[Group], settings: OptimizerSettings, seed: int) -> None:
        self.clipping = settings.grad_clip_method if settings.max_grad_norm else "none"
        self.largest = settings.max_grad_norm
        self.narrows = self.clipping == "update" and settings.optimizer in CAN_BE_CLIPPED
        self.optimizers: list[torch.optim.Optimizer] = []
        self._hooks = []
        self._squared_norms: list[Tensor] = []
        for group in groups:
            for name, weight in zip(group["names"], group["params"], strict=True):
                one = build_optimizer([dict(group, params=[weight], names=[name])], settings, seed)
                self.optimizers.append(one)
                self._hooks.append(weight.register_post_accumulate_grad_hook(self._stepping(one)))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def take_norm(self) -> Tensor:
        """The norm of all gradients of the last backward pass, before clipping; not finite where one was not."""
        norm = torch.stack(self._squared_norms).sum().sqrt() if self._squared_norms else torch.zeros(())
        self._squared_norms.clear()
        return norm

    def remove(self) -> None:
        """Let gradients stay where they are again."""
        for hook in self._hooks:
            hook.remove()

    def _stepping(self, optimizer: torch.optim.Optimizer) -> Any:
        group = optimizer.param_groups[0]

        @torch.no_grad()
        def step(weight: nn.Parameter) -> None:
            gradient, rate = weight.grad, group["lr"]
            if gradient is None:
                return
            squared = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
            self._squared_norms.append(squared)
            if self.clipping == "value":
                gradient.clamp_(-self.largest, self.largest)
            if self.narrows:
                narrower = (self.largest / update_rms(gradient, optimizer)).clamp(max=1)
                group["lr"] = rate * narrower.nan_to_num(1)  # where no step is taken, and 0 · nan would be one
            step_optimizer(optimizer, torch.isfinite(squared))
            group["lr"], weight.grad = rate, None

        return step


AnyOptimizer = torch.optim.Optimizer | OptimizerInBackward


def plain_optimizers(optimizer: AnyOptimizer) -> list[torch.optim.Optimizer]:
    """The optimisers of which one is made up."""
    return optimizer.optimizers if isinstance(optimizer, OptimizerInBackward) else [optimizer]


def update_rms(gradient: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Root mean square of ``g / √v̂`` over one tensor, with v̂ the second moment once it has taken g in.

    About 1 in steady training, and large where gradients are suddenly much larger than they were.

    Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models", §3.5.
    """
    group = optimizer.param_groups[0]
    state = optimizer.state[group["params"][0]]
    if "exp_avg_sq" not in state:
        return torch.ones((), device=gradient.device)  # then v̂ is g² itself
    beta, total = group["betas"][1], torch.zeros((), device=gradient.device)
    flat = gradient.reshape(-1)
    for first, last in low_bit_slices(flat.numel(), getattr(optimizer, "block_size", 1)):  # the arithmetic needs memory
        squared = flat[first:last].float().square()
        moment = torch.lerp(state_slice(state["exp_avg_sq"], first, last).float(), squared, 1 - beta)
        debiased = moment.div_(1 - beta ** (state["step"] + 1))
        total += (squared / debiased.clamp_min_(group["eps"] ** 2)).sum()
    return (total / flat.numel()).sqrt()
