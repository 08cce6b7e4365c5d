"""What makes two trainings the same training, and what a re-queued one should do.

A run is known by what decides its weights, steps excepted: never by its name, a path or a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.latents import LatentCache, LatentPart
from ..cache.texts import TextCache, TextRows
from ..config.dataset import MixSettings
from ..config.settings import FREE, TrainSettings, deciding
from ..errors import SettingError
from .batches import Examples, join
from .checkpoint import Checkpoint, damaged_checkpoints, newest_checkpoint
from .folder import Run, RunStore

IDENTITY_VERSION = 2  # raised when a default changes, since settings at their defaults are left out
MOST_SAID = 5  # settings that are named where other runs have others


def data_identity(latents: LatentCache, texts: TextCache) -> list[Any]:
    """A hash of each dataset's cache keys with what mixes it, sorted so that neither names nor order matter."""
    said = texts.rows()
    return sorted(
        json.dumps(
            [_part_hash(examples, said), _mixing(part), part.caption_dropout, part.online is not None, part.flips],
            sort_keys=True,
        )
        for examples, part in zip(join(latents, texts), latents.parts, strict=True)
        if len(examples.rows)
    )


def _part_hash(examples: Examples, said: TextRows) -> str:
    """Of keys, captions and repeats; of sizes and names where the pictures are encoded while training."""
    digest = hashlib.sha256()
    for column in (examples.keys, examples.flipped, examples.repeats.astype("<i8"), examples.shapes.astype("<i8")):
        digest.update(np.ascontiguousarray(column).tobytes())
    if (examples.masks != b"").any():
        digest.update(np.ascontiguousarray(examples.masks).tobytes())
    for row in examples.captions.tolist():
        digest.update("".join(said.variants(row)).encode() + b"\0")
        if said.taught_variants(row) != said.variants(row):
            digest.update("".join(said.taught_variants(row)).encode() + b"\1")
    return digest.hexdigest()


def _mixing(part: LatentPart) -> dict[str, Any]:
    """Mixing settings that differ from their defaults."""
    defaults, names = MixSettings(), {f.name for f in fields(MixSettings)} - {"repeats", "max_num_samples"}
    values = {name: getattr(part.mix, name) for name in sorted(names)}
    return {name: value for name, value in values.items() if value != getattr(defaults, name)}


def run_identity(
    settings: TrainSettings,
    data: Iterable[Any],
    model: str,
    attempt: int,
    start: Checkpoint | None,
    processes: int = 1,
) -> str:
    """Hash of what decides the weights.

    Of several processes and of accumulation only the product counts: the batches of a step are the same ones.

    Args:
        model: the MODEL's fingerprint.
        start: the checkpoint that training starts from, where it is not the base model.
    """
    decided = deciding(settings)
    if (batches := settings.optimizer.gradient_accumulation_steps * processes) > 1:
        decided["gradient_accumulation_steps"] = batches
    for name in ("lora_init_lora", "lycoris_init_lora"):
        if decided.get(name):  # what it holds, wherever it lies
            decided[name] = _file_hash(Path(decided[name]))
    decides = {
        "version": IDENTITY_VERSION,
        "settings": decided,
        "data": list(data),
        "model": model,
        "attempt": attempt,
        "start": [start.identity, start.step] if start else None,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(2**20):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise SettingError(f"init_lora is {path}, which cannot be read ({error}). Choose a LoRA file.") from None


@dataclass(frozen=True)
class Decision:
    """What to do: hand ``run`` out where it is ``done``; else train on from ``checkpoint``, or from the start."""

    run: Run | None  # None: a new run in ``folder``
    folder: str
    done: bool
    checkpoint: Checkpoint | None
    message: str


def decide(store: RunStore, name: str, identity: str, steps: int, continue_token: int, full: bool = False) -> Decision:
    """Look the identity up among the runs of this name: the four rules of re-queueing."""
    run = next((r for r in store.family(name) if r.identity == identity), None)
    if run is None:
        folder = store.free_folder(name)
        taken = f" ({name} is another training, left as it is)" if folder != name else ""
        return Decision(None, folder, False, None, f"training into {folder}{taken}")
    checkpoint = newest_checkpoint(store.path(run))
    kept = checkpoint or store.file(run.folder, full).exists()
    trained = run.step if kept else 0  # what was deleted is not there
    cut_short = run.status == "running" and checkpoint  # killed, maybe before its file was written
    if trained >= steps and not cut_short:
        return Decision(run, run.folder, True, checkpoint, f"already trained: {trained} steps, {steps} asked")
    if trained and run.status == "stopped" and steps <= run.target and continue_token <= run.continue_token:
        return Decision(run, run.folder, True, checkpoint, f"stopped and kept at step {trained}")
    damaged = damaged_checkpoints(store.path(run), checkpoint.step if checkpoint else -1)
    skipped = f" ({', '.join(damaged)} cannot be read)" if damaged else ""
    if checkpoint is None:
        return Decision(run, run.folder, False, None, f"no checkpoint is there: starting over in {run.folder}{skipped}")
    return Decision(run, run.folder, False, checkpoint, f"continuing from step {checkpoint.step}{skipped}")


def said_of_others(decision: Decision, family: list[Run], settings: TrainSettings) -> list[str]:
    """Why no run of this name is gone on with; or what becomes of a schedule where one is, with more or fewer steps.

    Args:
        family: the runs of this name.
    """
    run, optimizer = decision.run, settings.optimizer
    if run:
        on = decision.checkpoint and not decision.done and optimizer.scheduled and run.target != settings.steps
        spans = f"lr_scheduler {optimizer.lr_scheduler} spans {settings.steps} steps from here on, not {run.target}"
        return [spans] if on else []
    unlike = [
        (each.folder, [line for line in differences(each, settings) if line.partition(":")[0] not in FREE])
        for each in family
    ]
    if not unlike:
        return []
    folder, lines = min(unlike, key=lambda found: len(found[1]))
    listed = lines[:MOST_SAID] + ["…"] * (len(lines) > MOST_SAID)
    return [f"other than in {folder}: {', '.join(listed) or 'pictures, captions, MODEL, kind of adapter or attempt'}"]


def differences(before: Run | None, settings: TrainSettings) -> list[str]:
    """What is set otherwise than in another run."""
    if not before:
        return []
    now = json.loads(json.dumps(settings.written()))
    return [f"{key}: {before.settings[key]} → {v}" for key, v in now.items() if before.settings.get(key, v) != v]
