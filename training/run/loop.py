"""The training loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.base import Adapter
from ..config.settings import TrainSettings
from ..errors import RunError
from ..model.linear import release_scratch
from ..model.packing import pack
from ..model.precision import LossScale
from ..model.transformer import Lumina2Transformer
from ..objective.loss import batch_loss
from ..objective.rollout import Predict
from ..objective.step import training_losses
from ..optim.averages import EMA
from ..optim.backward import AnyOptimizer, OptimizerInBackward
from ..optim.build import build_optimizer
from ..optim.schedule import learning_rate_factor, set_learning_rate
from ..optim.step import clip_gradients, step_optimizer
from .batches import Batch, Batches

READ_LOSSES_EVERY = 10  # steps; each reading waits for the device once
BAD_STEPS_IN_A_ROW = 5


@dataclass
class TrainState:
    """What a checkpoint holds."""

    adapter: Adapter
    optimizer: AnyOptimizer
    ema: EMA | None = None
    loss_scale: LossScale | None = None  # fp16's
    step: int = 0  # optimiser steps done


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
    losses: Losses,
    before_step: Callable[[int], None],
    checkpoint: Callable[[TrainState], Any],
) -> None:
    """Train until ``settings.steps``; ``state`` and ``losses`` are true after each step, whatever interrupts.

    A step whose gradient is not finite changes no weight.

    Args:
        before_step: called with the steps done so far; what it raises ends the training between two steps.
        checkpoint: called every ``checkpoint_step_interval`` steps, and not at the end.

    Raises:
        RunError: several losses in a row are not finite.
    """
    device = next(iter(state.adapter.weights.values())).device
    accumulated = settings.optimizer.gradient_accumulation_steps
    transformer.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            while state.step < settings.steps:
                before_step(state.step)
                factor = learning_rate_factor(state.step, settings.steps, settings.optimizer)
                set_learning_rate(state.optimizer, factor)
                total = torch.zeros((), device=device)
                for number in range(state.step * accumulated, (state.step + 1) * accumulated):
                    if state.adapter.draws:
                        torch.manual_seed((settings.seed * 1_000_003 + number) % 2**63)
                    batch = batches.take(number).to(device)
                    loss = loss_of(transformer, state.adapter, batch, settings) / accumulated
                    (state.loss_scale.scale(loss) if state.loss_scale else loss).backward()
                    total += loss.detach()
                take_step(state, settings)
                state.step += 1
                if state.ema:
                    state.ema.update(state.step)
                losses.add(state.step, total, settings.optimizer.learning_rate * factor)
                if state.step % settings.checkpoint_step_interval == 0 and state.step < settings.steps:
                    checkpoint(state)
        losses.flush()
    finally:
        release_scratch()


def loss_of(transformer: Lumina2Transformer, adapter: Adapter, batch: Batch, settings: TrainSettings) -> Tensor:
    """The loss of a batch, with its gradient."""

    def predict(x: Tensor, sigmas: Tensor, rows: list[int]) -> Tensor:
        captions, lengths = batch.captions, batch.lengths
        if len(rows) < len(lengths):
            captions, lengths = captions[rows], tuple(lengths[row] for row in rows)
        if batch.refined:
            return transformer.predict(x, 1 - sigmas, pack(captions, lengths).to(transformer.dtype), lengths)
        return transformer(x, 1 - sigmas, captions, lengths)

    def predict_as_base(x: Tensor, sigmas: Tensor, rows: list[int]) -> Tensor:
        with adapter.off():
            return predict(x, sigmas, rows)

    objective = settings.objective
    teacher: Predict | None = predict_as_base if objective.regularisation_target == "teacher" else None
    each = training_losses(
        predict,
        batch.latents,
        batch.noise,
        batch.sigmas,
        objective,
        seen_noise=batch.seen_noise,
        levels=batch.levels,
        mask=batch.masks,
        teacher=teacher if batch.regularisation else None,
    )
    return batch_loss(each, objective.prior_loss_weight if batch.regularisation else 1.0)


def take_step(state: TrainState, settings: TrainSettings) -> None:
    """Change the weights by the gradients that are there, and free those."""
    optimizer = state.optimizer
    if isinstance(optimizer, OptimizerInBackward):  # they were changed as the gradients came
        if not torch.isfinite(optimizer.take_norm()):
            raise RunError(
                "A gradient is not a number, and with fused_backward other weights have changed by then. The run ends "
                "at its last checkpoint. Lower the learning rate, or switch fused_backward off."
            )
        return
    weights = list(state.adapter.weights.values())
    if state.loss_scale:
        state.loss_scale.unscale([weight.grad for weight in weights if weight.grad is not None])
    norm = clip_gradients(weights, settings.optimizer.max_grad_norm, settings.optimizer.grad_clip_method)
    finite = torch.isfinite(norm)
    step_optimizer(optimizer, finite)
    if state.loss_scale:
        state.loss_scale.update(finite)
    optimizer.zero_grad()


@dataclass
class Losses:
    """The loss of every step, in memory and in ``events.jsonl``; read from the device a few at a time."""

    file: Path
    values: list[float] = field(default_factory=list)
    _pending: list[tuple[int, float, float, Tensor]] = field(default_factory=list)

    def add(self, step: int, loss: Tensor, learning_rate: float) -> None:
        self._pending.append((step, time.time(), learning_rate, loss))
        if len(self._pending) >= READ_LOSSES_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what is pending.

        Raises:
            RunError: the last few losses are not finite.
        """
        self.save()
        last = self.values[-BAD_STEPS_IN_A_ROW:]
        if len(last) == BAD_STEPS_IN_A_ROW and not any(map(math.isfinite, last)):
            raise RunError(
                f"The loss is not a number for {BAD_STEPS_IN_A_ROW} steps in a row. Lower the learning rate, or load "
                "the model in bf16 or fp32 if it is in fp16; the weights before are kept."
            )

    def save(self) -> None:
        if not self._pending:
            return
        read = torch.stack([loss for *_, loss in self._pending]).tolist()
        events = [
            {
                "step": step,
                "loss": loss if math.isfinite(loss) else None,
                "lr": rate,
                "time": round(at, 3),
            }
            for (step, at, rate, _), loss in zip(self._pending, read, strict=True)
        ]
        self._pending.clear()
        self.values += read
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(event) + "\n" for event in events))

    def recent(self, steps: int = 20) -> float:
        """The mean of the last finite losses; not a number before there is one."""
        finite = [value for value in self.values[-steps:] if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan


def read_losses(file: Path, until: int) -> list[float]:
    """The loss of each step up to ``until`` from ``events.jsonl``; a step that was trained twice counts once."""
    found: dict[int, float] = {}
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue  # the end of a line that a crash cut
            if event.get("loss") is not None:
                found[event["step"]] = event["loss"]
    return [found[step] for step in sorted(found) if step <= until]
