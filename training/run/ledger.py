"""Losses and gradient norms of the last steps, kept on the device and read several at once: reading waits for it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RunError
from .events import Event, Listener, Said, StepDone

READ_EVERY = 10  # steps; each reading waits for the device once
BAD_STEPS_IN_A_ROW = 5


class NotFiniteError(RunError):
    """Several steps in a row, ``steps``, had no finite loss or gradient; the state is the one before them."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        super().__init__(
            f"Loss or gradient is not a number for {steps} steps in a row, which changed no weight. Lower the "
            "learning rate, or load the model in bf16 or fp32 if it is in fp16; the weights before are kept."
        )


@dataclass(frozen=True)
class Part:
    """One batch of a step."""

    losses: Tensor  # (B,) on the device
    sigmas: Tensor  # (B,) on the CPU
    dataset: str  # empty where there is only one


@dataclass(frozen=True)
class _Entry:
    step: int
    at: float
    lr: float
    loss: Tensor
    norm: Tensor
    parts: list[Part]


@dataclass
class Ledger:
    """``losses`` holds every finite loss of the run so far; ``tell`` hears of each step."""

    tell: Listener
    losses: list[float]
    tolerant: bool = False  # fp16: gradients overflow until the loss scale fits, which is nothing bad
    skipped: int = 0  # steps since the start that changed no weight
    _pending: list[_Entry] = field(default_factory=list)
    _bad: int = 0  # in a row

    def add(self, step: int, lr: float, loss: Tensor, norm: Tensor, parts: list[Part]) -> None:
        self._pending.append(_Entry(step, time.time(), lr, loss, norm, parts))

    def read(self, at_least: int = 1) -> None:
        """Tell what is pending, if there are so many steps.

        Raises:
            NotFiniteError: several steps in a row had no finite loss or gradient.
        """
        if len(self._pending) < at_least:
            return
        before = self.skipped
        for event in self.take():
            self.tell(event)
        if self._bad >= BAD_STEPS_IN_A_ROW:
            raise NotFiniteError(self._bad)
        if self.skipped and not before and not self.tolerant:
            self.tell(Said("A step's loss or gradient is not a number: such steps change no weight, and are counted."))

    def take(self) -> list[Event]:
        """What is pending, as events."""
        if not self._pending:
            return []
        entries, self._pending = self._pending, []
        device = entries[0].loss.device
        flat = [entry.loss.reshape(1) for entry in entries] + [entry.norm.reshape(1).to(device) for entry in entries]
        flat += [part.losses for entry in entries for part in entry.parts]
        read = torch.cat([each.float() for each in flat]).tolist()
        losses, norms, each = read[: len(entries)], read[len(entries) : 2 * len(entries)], read[2 * len(entries) :]
        memory, found, place = memory_used(device), [], 0
        for entry, loss, norm in zip(entries, losses, norms, strict=True):
            sums: dict[str, list[float]] = defaultdict(list)
            for part in entry.parts:
                for sigma, one in zip(part.sigmas.tolist(), each[place:], strict=False):
                    sums[f"sigma_q{min(int(sigma * 4), 3) + 1}"].append(one)
                    if part.dataset:
                        sums[f"dataset {part.dataset}"].append(one)
                place += len(part.losses)
            good = math.isfinite(loss) and (math.isfinite(norm) or self.tolerant)
            self._bad = 0 if good else self._bad + 1
            self.skipped += not math.isfinite(norm)
            if good:
                self.losses.append(loss)
            found.append(
                StepDone(
                    entry.step,
                    loss if good else None,
                    entry.lr,
                    norm if math.isfinite(norm) else None,
                    round(entry.at, 3),
                    memory,
                    {name: sum(values) / len(values) for name, values in sorted(sums.items())} if good else {},
                )
            )
        return list(found)

    def recent(self, steps: int = 20) -> float:
        """The mean of the last losses; not a number before there is one."""
        last = self.losses[-steps:]
        return sum(last) / len(last) if last else math.nan


def memory_used(device: torch.device) -> int | None:
    """Bytes: the most that torch has held on a CUDA device, else what this process holds; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource

        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (ImportError, OSError):
        return None
