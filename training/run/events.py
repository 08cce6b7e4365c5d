"""What a run tells while it goes on, to whoever listens; and the file that keeps it, ``events.jsonl``.

A listener is called with every event, in order, on the run's own thread. What it raises ends the run as an interrupt
would, with everything saved: a listener whose own trouble shall not do that (a tracker, the hub) catches it itself.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from .folder import Run


@dataclass(frozen=True)
class Started:
    """The run begins, or goes on, behind step ``step``; what was logged of later steps counts no more."""

    run: Run
    step: int
    epoch_steps: float = 0.0  # optimiser steps that go once through all pictures


@dataclass(frozen=True)
class Said:
    """A sentence for the user."""

    text: str


@dataclass(frozen=True)
class Between:
    """Between two steps, or while something longer goes on: where a listener may raise to end the run."""

    step: int  # steps done
    loss: float  # the mean of the last ones; not a number before there is one
    doing: str = "training"  # or validating, saving, paused


@dataclass(frozen=True)
class StepDone:
    """One step, told some steps later, since the device is asked for several at once."""

    step: int
    loss: float | None  # None: not a number, and no weight was changed
    lr: float
    grad_norm: float | None
    time: float  # seconds since 1970, when it was done
    memory: int | None = None  # bytes that the device holds, at its peak
    parts: dict[str, float] = field(default_factory=dict)  # the loss by dataset and by quartile of the noise level


@dataclass(frozen=True)
class CheckpointSaved:
    step: int
    path: Path


@dataclass(frozen=True)
class LoRASaved:
    """A file for ComfyUI: at the end, or asked for in mid-run."""

    step: int
    path: Path


@dataclass(frozen=True)
class LearningRateSet:
    step: int
    lr: float


@dataclass(frozen=True)
class Paused:
    step: int


@dataclass(frozen=True)
class Resumed:
    step: int


@dataclass(frozen=True)
class Sample:
    """A picture of a validation."""

    path: str  # relative to the run's folder, with forward slashes
    name: str  # the prompt's short name
    prompt: str
    seed: int
    ema: bool = False
    score: float | None = None  # CLIP's cosine × 100


@dataclass(frozen=True)
class Validated:
    """Pictures were drawn with the weights of a step."""

    step: int
    samples: tuple[Sample, ...]
    scores: dict[str, float] = field(default_factory=dict)
    asked: bool = False  # by "Sample now", out of turn


@dataclass(frozen=True)
class Evaluated:
    """The held-out loss at fixed noise and levels."""

    step: int
    loss: float
    scores: dict[str, float] = field(default_factory=dict)  # by dataset, "ema", …
    best: bool = False  # lower than every one before
    stop: bool = False  # early stopping: it has not fallen for long enough


@dataclass(frozen=True)
class Ended:
    """The run is over. ``status`` as in ``run.json``."""

    status: str
    step: int
    message: str
    seconds: float  # since it started


Event = (
    Started
    | Said
    | Between
    | StepDone
    | CheckpointSaved
    | LoRASaved
    | LearningRateSet
    | Paused
    | Resumed
    | Validated
    | Evaluated
    | Ended
)
Listener = Callable[[Event], None]


def to_all(listeners: Iterable[Listener]) -> Listener:
    """One listener that passes every event to each, in order."""
    each = tuple(listeners)

    def listen(event: Event) -> None:
        for listener in each:
            listener(event)

    return listen


def written(event: Event) -> dict[str, Any]:
    """An event as JSON knows it: ``event`` is its name; a step's line has none, since nearly every line is one."""
    values = {name: _plain(value) for name, value in asdict(event).items() if value not in (None, {}, ())}
    if isinstance(event, StepDone):
        return {"loss": None, **values}
    if isinstance(event, Started):
        values["run"] = event.run.folder
    return {"event": type(event).__name__, "time": round(time.time(), 3), **values}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


class Journal:
    """Listens, and appends what is worth keeping to ``events.jsonl``; lines are whole or the last one is cut."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Between):
            self.write([event])

    def write(self, events: Iterable[Event]) -> None:
        lines = "".join(json.dumps(written(event), ensure_ascii=False) + "\n" for event in events)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            if file.tell() and not _ends_with_newline(file):
                lines = "\n" + lines  # what a crash cut stays a line of its own
            file.write(lines.encode())


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def read_events(file: Path) -> list[dict[str, Any]]:
    """All lines of a run that still count, in order: what lies behind the step that a run went on from does not.

    A line without ``event`` is a step's; each step is there once.
    """
    found: list[dict[str, Any]] = []
    if not file.exists():
        return found
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):  # a prompt may hold other line ends
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # the end of a line that a crash cut
        if not isinstance(event, dict):
            continue
        if event.get("event") == "Started":
            found = [each for each in found if each.get("step", 0) <= event["step"]]
        found.append(event)
    return found


def read_losses(file: Path, until: int) -> list[float]:
    """The loss of each step up to ``until``, without those that were not a number."""
    found = {
        each["step"]: each["loss"] for each in read_events(file) if "event" not in each and each.get("loss") is not None
    }
    return [found[step] for step in sorted(found) if step <= until]
