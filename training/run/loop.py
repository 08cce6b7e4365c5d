"""The training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter.base import Adapter
from ..config.settings import TrainSettings
from ..errors import RunError
from ..model.linear import release_scratch
from ..model.packing import pack
from ..model.precision import LossScale
from ..model.transformer import Lumina2Transformer
from ..objective.loss import batch_loss, slider_target
from ..objective.rollout import Predict
from ..objective.step import training_losses
from ..optim.averages import EMA
from ..optim.backward import AnyOptimizer, OptimizerInBackward
from ..optim.build import build_optimizer
from ..optim.schedule import learning_rate_factor, set_learning_rate
from ..optim.step import clip_gradients, step_optimizer
from .batches import Batch, Batches, Captions
from .ledger import READ_EVERY, Ledger, Part
from .processes import ALONE, Processes
from .shards import Shards


@dataclass
class TrainState:
    """What a checkpoint holds."""

    adapter: Adapter
    optimizer: AnyOptimizer
    ema: EMA | None = None
    loss_scale: LossScale | None = None  # fp16's
    step: int = 0  # optimiser steps done
    rate_factor: float = 1.0  # what the learning rate was changed by in mid-run
    shards: Shards | None = None  # where several processes train the whole model: the adapter holds this one's rows
    whole: bool = True  # False while weights are being changed: what an error leaves then is of no step


def new_state(adapter: Adapter, settings: TrainSettings, loss_scaling: bool = False) -> TrainState:
    """Before the first step.

    Raises:
        SettingError: the optimiser's package is missing, or its arguments do not fit.
    """
    names = {id(weight): name for name, weight in adapter.weights.items()}
    groups = [
        {**group, "names": [names[id(weight)] for weight in group["params"]]}
        for group in adapter.groups(settings.optimizer.learning_rate)
    ]
    build = OptimizerInBackward if settings.optimizer.fused_backward else build_optimizer
    device = next(iter(adapter.weights.values())).device
    return TrainState(
        adapter=adapter,
        optimizer=build(groups, settings.optimizer, settings.seed),
        ema=EMA(adapter.weights, settings.optimizer) if settings.optimizer.use_ema else None,
        loss_scale=LossScale(device) if loss_scaling else None,
    )


def train(
    transformer: Lumina2Transformer,
    state: TrainState,
    batches: Batches,
    settings: TrainSettings,
    ledger: Ledger,
    go_on: Callable[[], bool],
    processes: Processes = ALONE,
) -> None:
    """Take steps as long as ``go_on`` says so; ``state`` and ``ledger`` are true after each, whatever interrupts, and
    where ``state.whole`` is not, something did so while weights were being changed.

    A step whose gradient is not finite changes no weight.

    Args:
        go_on: called before each step and after the last one: the place for checkpoints, samples and commands.
            What it raises ends the training between two steps.

    Raises:
        RunError: several steps in a row are not finite.
    """
    device = next(iter(state.adapter.weights.values())).device
    accumulated = settings.optimizer.gradient_accumulation_steps
    transformer.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            while go_on():
                factor = learning_rate_factor(state.step, settings.steps, settings.optimizer) * state.rate_factor
                set_learning_rate(state.optimizer, factor)
                total, parts = torch.zeros((), device=device), []
                state.whole = not isinstance(state.optimizer, OptimizerInBackward)
                for number in processes.batch_numbers(state.step, accumulated):
                    if state.adapter.draws:
                        torch.manual_seed((settings.seed * 1_000_003 + number) % 2**63)
                    batch = batches.take(number)
                    with state.adapter.at(batch.strength):  # what is computed again in the backward pass, too
                        each = losses_of(transformer, state.adapter, batch.to(device), settings)
                        loss = batch_loss(each, batch.weight(settings.objective)) / accumulated
                        (state.loss_scale.scale(loss) if state.loss_scale else loss).backward()
                    total += loss.detach()
                    parts.append(Part(each.detach(), batch.sigmas, batch.dataset))
                weights = state.shards.collect() if state.shards else list(state.adapter.weights.values())
                total = processes.average(weights, total)
                state.whole = False
                norm = take_step(state, settings)
                state.step += 1
                if state.ema:
                    state.ema.update(state.step)
                ledger.add(state.step, settings.optimizer.learning_rate * factor, total, norm, parts)
                state.whole = True
                ledger.read(READ_EVERY)
        ledger.read()
    finally:
        release_scratch()


def loss_of(transformer: Lumina2Transformer, adapter: Adapter, batch: Batch, settings: TrainSettings) -> Tensor:
    """The loss of a batch, with its gradient."""
    return batch_loss(losses_of(transformer, adapter, batch, settings), batch.weight(settings.objective))


def losses_of(transformer: Lumina2Transformer, adapter: Adapter, batch: Batch, settings: TrainSettings) -> Tensor:
    """The loss of each sample, (B,), with its gradient."""

    objective = settings.objective

    def predict(x: Tensor, sigmas: Tensor, rows: list[int], said: Captions = batch.said) -> Tensor:
        captions, lengths = said.of(rows)
        if batch.refined:
            return transformer.predict(x, 1 - sigmas, pack(captions, lengths).to(transformer.dtype), lengths)
        return transformer(x, 1 - sigmas, captions, lengths)

    def predict_as_base(x: Tensor, sigmas: Tensor, rows: list[int]) -> Tensor:
        with adapter.off():
            return predict(x, sigmas, rows, batch.taught or batch.said)

    def predict_as_slider(x: Tensor, sigmas: Tensor, rows: list[int]) -> Tensor:
        with adapter.off():
            neutral, positive, negative = (
                predict(x, sigmas, rows, said) for said in (batch.said, *(batch.slider or ()))
            )
        return slider_target(neutral, positive, negative, batch.strength * objective.slider_scale)

    teacher: Predict | None = predict_as_slider if batch.slider else None
    if batch.regularisation:
        teacher = predict_as_base if objective.regularisation_target == "teacher" else None
    return training_losses(
        predict,
        batch.latents,
        batch.noise,
        batch.sigmas,
        objective,
        seen_noise=batch.seen_noise,
        levels=batch.levels,
        mask=batch.masks,
        teacher=teacher,
    )


def take_step(state: TrainState, settings: TrainSettings) -> Tensor:
    """Change the weights by the gradients that are there, and free those.

    Returns:
        The norm of all gradients, 0-dimensional.
    """
    optimizer = state.optimizer
    if isinstance(optimizer, OptimizerInBackward):  # they were changed as the gradients came
        norm = optimizer.take_norm()
        if not torch.isfinite(norm):
            raise RunError(
                "A gradient is not a number, and with fused_backward other weights have changed by then. The run ends "
                "at its last checkpoint. Lower the learning rate, or switch fused_backward off."
            )
        return norm
    weights = list(state.adapter.weights.values())
    if state.loss_scale:
        state.loss_scale.unscale([weight.grad for weight in weights if weight.grad is not None])
    largest, method = settings.optimizer.max_grad_norm, settings.optimizer.grad_clip_method
    norm = state.shards.clip(largest, method) if state.shards else clip_gradients(weights, largest, method)
    finite = torch.isfinite(norm)
    step_optimizer(optimizer, finite)
    if state.loss_scale:
        state.loss_scale.update(finite)
    optimizer.zero_grad()
    return norm
