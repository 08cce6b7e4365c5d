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
from torch import Tensor, nn

from ..adapter.lora import without_lora
from ..config.settings import TrainSettings
from ..errors import RunError
from ..model.transformer import Lumina2Transformer
from ..objective.loss import add_noise, velocity, velocity_loss
from .batches import Batches

CHECKPOINTING_FROM = 1_000_000_000  # parameters: smaller models' activations fit without it
READ_LOSSES_EVERY = 10  # steps; each reading waits for the device once
BAD_STEPS_IN_A_ROW = 5


@dataclass
class TrainState:
    """What a checkpoint holds."""

    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: int = 0  # steps done


def new_state(weights: dict[str, nn.Parameter], settings: TrainSettings) -> TrainState:
    optimizer = torch.optim.AdamW(
        list(weights.values()),
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return TrainState(weights, optimizer)


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
    device = next(transformer.parameters()).device
    transformer.checkpoint_every = int(sum(p.numel() for p in transformer.parameters()) > CHECKPOINTING_FROM)
    weights = list(state.weights.values())
    transformer.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        while state.step < settings.steps:
            before_step(state.step)
            if settings.lora.dropout:
                torch.manual_seed((settings.seed * 1_000_003 + state.step) % 2**63)
            batch = batches.take(state.step).to(device)
            noisy = add_noise(batch.latents, batch.noise, batch.sigmas)
            seen = (noisy, 1 - batch.sigmas, batch.captions, batch.lengths)
            if batch.regularisation:
                target = _base_prediction(transformer, seen)
            else:
                target = velocity(batch.latents, batch.noise)
            loss = velocity_loss(transformer(*seen), target).mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(weights, settings.max_grad_norm, foreach=True)
            # The fused optimiser leaves everything as it is where this is 1, without the host having to know.
            state.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.step += 1
            losses.add(state.step, loss.detach())
            if state.step % settings.checkpoint_step_interval == 0 and state.step < settings.steps:
                checkpoint(state)
    losses.flush()


@torch.no_grad()
def _base_prediction(transformer: Lumina2Transformer, seen: tuple[Any, ...]) -> Tensor:
    """The target of regularisation pictures: what the base model says of the same noisy latents."""
    with without_lora(transformer):
        return transformer(*seen)


@dataclass
class Losses:
    """The loss of every step, in memory and in ``events.jsonl``; read from the device a few at a time."""

    file: Path
    learning_rate: float
    values: list[float] = field(default_factory=list)
    _pending: list[tuple[int, float, Tensor]] = field(default_factory=list)

    def add(self, step: int, loss: Tensor) -> None:
        self._pending.append((step, time.time(), loss))
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
        read = torch.stack([loss for _, _, loss in self._pending]).tolist()
        events = [
            {
                "step": step,
                "loss": loss if math.isfinite(loss) else None,
                "lr": self.learning_rate,
                "time": round(at, 3),
            }
            for (step, at, _), loss in zip(self._pending, read, strict=True)
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
