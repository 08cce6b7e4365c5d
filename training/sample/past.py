"""What a run's log says of its samples and evaluations, so that a run that goes on agrees with one that never ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..run.events import read_events


@dataclass
class Past:
    """Goes on with the run."""

    folder: Path
    validated: set[int] = field(default_factory=set)  # steps; not those that were asked for out of turn
    base: set[str] = field(default_factory=set)  # paths of the base model's pictures
    losses: dict[int, float] = field(default_factory=dict)  # held-out, by step


def read_past(folder: Path) -> Past:
    past = Past(folder)
    for event in read_events(folder / "events.jsonl"):
        kind, step = event.get("event"), event.get("step", 0)
        if kind == "Validated" and not event.get("asked"):
            past.validated.add(step)
            if step == 0:
                past.base |= {each["path"] for each in event.get("samples", ())}
        elif kind == "Evaluated":
            loss = event.get("loss")
            past.losses[step] = math.nan if loss is None else loss
    return past
