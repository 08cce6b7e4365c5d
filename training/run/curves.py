"""The curves of a run, small enough for a page however long it trained, from the lines of ``events.jsonl``.

Up to ``BINS`` stretches of steps each keep their lowest, highest and mean loss, so that no spike is lost. A reader that
comes back with the place it has read to is given what was written since.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

BINS = 400
COLUMNS = 5000  # numbers in an answer: with at most 10 characters each, less than 64 kB
TAIL = 32 * 1024  # bytes that hold the last events of a run


def curves(file: Path, after: int = 0) -> dict[str, Any]:
    """What ``events.jsonl`` holds behind byte ``after``.

    Returns:
        ``next``: the byte to ask from next time. ``from``: the step behind which everything known before is void, or
        None. Lists with a value for each stretch, None where it is not known: ``step``, ``time`` (seconds since 1970),
        ``speed`` (steps per second), ``lr``, ``memory`` (bytes); ``loss`` and ``grad_norm`` as ``min``, ``max`` and
        ``mean``; ``parts``, the mean loss by dataset and quartile of the noise level. ``eval``: ``step`` and ``loss``.
    """
    lines, following = _lines(file, after)
    steps: list[dict[str, Any]] = []
    evals: list[dict[str, Any]] = []
    rewound: int | None = None
    for line in lines:
        kind = line.get("event")
        if kind is None and "step" in line:
            steps.append(line)
        elif kind == "Evaluated":
            evals.append(line)
        elif kind == "Started":
            begin = line.get("step", 0)
            steps = [each for each in steps if each["step"] <= begin]
            evals = [each for each in evals if each["step"] <= begin]
            rewound = begin if rewound is None else min(begin, rewound)
    return {"next": following, "from": rewound, **_binned(steps), "eval": _evaluations(evals)}


def last_events(file: Path) -> list[dict[str, Any]]:
    """The last lines of a run, at most ``TAIL`` bytes of them."""
    try:
        size = file.stat().st_size
    except OSError:
        return []
    lines, _ = _lines(file, max(size - TAIL, 0))  # the first may be cut, and is no JSON then
    return list(lines)


def last_loss(events: Iterable[dict[str, Any]], over: int = 20) -> float | None:
    """The mean loss of the last steps among some events; None where there is none."""
    losses = [each["loss"] for each in events if "event" not in each and each.get("loss") is not None][-over:]
    return sum(losses) / len(losses) if losses else None


def _lines(file: Path, after: int) -> tuple[Iterable[dict[str, Any]], int]:
    """Whole lines behind a byte, and the byte behind them; from the start where the file has become shorter."""
    try:
        with file.open("rb") as opened:
            if after > os.fstat(opened.fileno()).st_size:
                after = 0
            opened.seek(after)
            read = opened.read()
    except OSError:
        return [], 0
    whole = read[: read.rfind(b"\n") + 1]
    return _parsed(whole), after + len(whole)


def _parsed(lines: bytes) -> Iterable[dict[str, Any]]:
    for line in lines.splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # cut by a crash, or by where the reading began
            continue
        if isinstance(event, dict):
            yield event


def _binned(steps: list[dict[str, Any]]) -> dict[str, Any]:
    names = sorted({name for each in steps[-1:] for name in each.get("parts", {})})
    bins = min(len(steps), BINS, COLUMNS // (10 + len(names)))
    if not bins:
        return {"step": [], "time": [], "speed": [], "lr": [], "memory": [], "parts": {}} | {
            name: {"min": [], "max": [], "mean": []} for name in ("loss", "grad_norm")
        }
    starts = (np.arange(bins) * len(steps)) // bins
    ends = np.append(starts[1:], len(steps)) - 1

    def column(name: str) -> np.ndarray:
        return np.array([_number(each.get(name)) for each in steps])

    step, times, lr, memory = column("step"), column("time"), column("lr"), column("memory")
    before = np.append(0, ends[:-1])  # the first stretch is timed from its own first step
    with np.errstate(all="ignore"):
        speed = (ends - before) / (times[ends] - times[before])
    return {
        "step": step[ends].astype(int).tolist(),
        "time": [round(float(each), 1) if each == each else None for each in times[ends]],
        "speed": _written(np.where(speed > 0, speed, np.nan)),  # not where the clock was set back
        "lr": _written(lr[ends]),
        "memory": [None if each != each else int(each) for each in np.fmax.reduceat(memory, starts)],
        "loss": _spread(column("loss"), starts),
        "grad_norm": _spread(column("grad_norm"), starts),
        "parts": {
            name: _written(_mean(np.array([_number(each.get("parts", {}).get(name)) for each in steps]), starts))
            for name in names
        },
    }


def _spread(values: np.ndarray, starts: np.ndarray) -> dict[str, list[float | None]]:
    return {
        "min": _written(np.fmin.reduceat(values, starts)),
        "max": _written(np.fmax.reduceat(values, starts)),
        "mean": _written(_mean(values, starts)),
    }


def _mean(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of the numbers in each stretch; not a number where there is none."""
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(float), starts)
    with np.errstate(all="ignore"):
        mean: np.ndarray = np.add.reduceat(np.where(known, values, 0.0), starts) / counts
    return mean


def _evaluations(evals: list[dict[str, Any]]) -> dict[str, list[Any]]:
    known = [each for each in evals if each.get("loss") is not None]
    kept = known[:: -(-len(known) // BINS)] if known else []
    return {"step": [each["step"] for each in kept], "loss": _written(np.array([each["loss"] for each in kept]))}


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _written(values: np.ndarray) -> list[float | None]:
    return [None if not np.isfinite(each) else float(f"{each:.5g}") for each in values]
