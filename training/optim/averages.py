"""Averages of the weights over the steps: to look at and to save, while training goes on with the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..config.optim import OptimizerSettings
from ..errors import RunError
from .backward import AnyOptimizer, plain_optimizers


def ema_decay(step: int, settings: OptimizerSettings) -> float:
    """How much of the average stays when ``step`` steps are done; 0: it becomes the weights themselves.

    ``min(ema_decay, (1 + n) / (10 + n))`` for n = step − 1, and 0 for n = 0. With ``ema_warmup_steps`` W it is 0 for
    n < W and ``ema_decay`` after. Where only every k-th step is averaged, that to the power of k.
    """
    n, warmup = step - 1, settings.ema_warmup_steps
    if n < max(warmup, 1):
        return 0.0
    decay = settings.ema_decay if warmup else min(settings.ema_decay, (1 + n) / (10 + n))
    return decay**settings.ema_update_interval


class EMA:
    """The exponential moving average of the weights, in fp32 whatever they are in: bf16 would lose small steps.

    Args:
        weights: by name; they are read, and written only within ``in_place``.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], settings: OptimizerSettings) -> None:
        self.weights, self.settings = weights, settings
        device = "cpu" if settings.ema_device == "cpu" else None
        self.averages = {
            name: weight.detach().to(device=device, dtype=torch.float32, copy=True) for name, weight in weights.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights in, after ``step`` steps are done; nothing where that is no multiple of the interval."""
        if step % self.settings.ema_update_interval:
            return
        part = 1 - ema_decay(step, self.settings)
        for name, average in self.averages.items():
            average.lerp_(self.weights[name].to(average.device).float(), part)

    def state(self) -> dict[str, Tensor]:
        """The averages by name, fp32; they go on changing."""
        return dict(self.averages)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on with saved averages.

        Raises:
            RunError: they are of other weights.
        """
        for name in {*self.averages, *state}:
            here, there = self.averages.get(name), state.get(name)
            if here is None or there is None or here.shape != there.shape:
                raise RunError(
                    f"The checkpoint's EMA is of other weights: {name} is missing on one side or of another size. "
                    "Use the same adapter, or switch use_ema off."
                )
            here.copy_(there)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the weights are their averages; after it they are what they were, bit for bit."""
        weights = list(self.weights.values())
        with _kept(weights):
            _write(weights, list(self.averages.values()))
            yield


@contextmanager
def averaged(optimizer: AnyOptimizer) -> Iterator[None]:
    """Within the block the weights are those to look at and to save; after it what they were, bit for bit.

    A schedule-free optimiser trains at one point and averages to another, which is meant here. With others nothing
    happens. A checkpoint to go on from is written outside.
    """
    plain = [each for each in plain_optimizers(optimizer) if "train_mode" in each.defaults]
    with _kept([weight for each in plain for group in each.param_groups for weight in group["params"]]):
        for each in plain:
            each.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for each in plain:
                each.train()  # type: ignore[attr-defined]


@contextmanager
def _kept(weights: list[nn.Parameter]) -> Iterator[None]:
    """Put the weights back at the end. Undoing arithmetic would not: it rounds."""
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        _write(weights, before)


@torch.no_grad()
def _write(weights: list[nn.Parameter], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
