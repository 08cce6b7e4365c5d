"""What makes two trainings the same training, and what a re-queued one should do.

A run is known by what decides its weights, steps excepted: never by its name, a path or a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..cache.latents import LatentCache
from ..cache.texts import TextCache
from ..config.settings import TrainSettings, deciding
from .checkpoint import Checkpoint, newest_checkpoint
from .folder import Run, RunStore

IDENTITY_VERSION = 1  # raised when a default changes, since settings at their defaults are left out


def data_identity(latents: LatentCache, texts: TextCache) -> list[list[Any]]:
    """Cache keys of latents and texts with what mixes them, sorted so that no file name matters."""
    keys = {entry.sample: entry.keys for entry in texts.entries}
    return sorted([entry.key, list(keys.get(entry.sample, ())), entry.repeats] for entry in latents.entries)


def run_identity(
    settings: TrainSettings, data: Iterable[Any], model: str, attempt: int, start: Checkpoint | None
) -> str:
    """Hash of what decides the weights.

    Args:
        model: the MODEL's fingerprint.
        start: the checkpoint that training starts from, where it is not the base model.
    """
    decides = {
        "version": IDENTITY_VERSION,
        "settings": deciding(settings),
        "data": list(data),
        "model": model,
        "attempt": attempt,
        "start": [start.identity, start.step] if start else None,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Decision:
    """What to do: hand ``run`` out where it is ``done``; else train on from ``checkpoint``, or from the start."""

    run: Run | None  # None: a new run in ``folder``
    folder: str
    done: bool
    checkpoint: Checkpoint | None
    message: str


def decide(store: RunStore, name: str, identity: str, steps: int, continue_token: int) -> Decision:
    """Look the identity up among the runs of this name: the four rules of re-queueing."""
    run = next((r for r in store.family(name) if r.identity == identity), None)
    if run is None:
        folder = store.free_folder(name)
        taken = f" ({name} is another training, left as it is)" if folder != name else ""
        return Decision(None, folder, False, None, f"training into {folder}{taken}")
    checkpoint = newest_checkpoint(store.path(run))
    trained = run.step if checkpoint or store.lora(run.folder).exists() else 0  # what was deleted is not there
    if trained >= steps:
        return Decision(run, run.folder, True, checkpoint, f"already trained: {trained} steps, {steps} asked")
    if trained and run.status == "stopped" and steps <= run.target and continue_token <= run.continue_token:
        return Decision(run, run.folder, True, checkpoint, f"stopped and kept at step {trained}")
    if checkpoint is None:
        return Decision(run, run.folder, False, None, "no checkpoint was written: starting over in the same folder")
    return Decision(run, run.folder, False, checkpoint, f"continuing from step {checkpoint.step}")
