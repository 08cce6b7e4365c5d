"""Looking at the weights being trained where they lie: no second copy of the model, and nothing of it is disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from ..config.validation import ValidationSettings
from ..model.transformer import Lumina2Transformer
from ..optim.averages import averaged
from ..run.loop import TrainState

InPlace = Callable[[], AbstractContextManager[None]]


def variants(state: TrainState, settings: ValidationSettings) -> list[tuple[bool, InPlace]]:
    """The weights to look at: whether they are the EMA, and what puts them in place."""
    found: list[tuple[bool, InPlace]] = []
    if state.ema is None or settings.ema_validation != "ema_only":
        found.append((False, lambda: averaged(state.optimizer)))
    if state.ema is not None and settings.ema_validation != "none":
        found.append((True, state.ema.in_place))
    return found


@contextmanager
def undisturbed(transformer: Lumina2Transformer) -> Iterator[None]:
    """Within it nothing is learned and nothing dropped out; the modes and random states are afterwards as before."""
    device = transformer.final_layer.linear.weight.device
    training = [module for module in transformer.modules() if module.training]
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        transformer.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
