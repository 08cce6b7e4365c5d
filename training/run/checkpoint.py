"""Checkpoints: all that a run needs to go on, in safetensors, whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import RunError
from ..files import flush_folder, read_json, write_json, write_tensors
from ..optim.state import load_optimizer_tensors, optimizer_tensors
from .processes import ALONE, Processes

if TYPE_CHECKING:
    from .loop import TrainState

_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint lies, and of which training and step it is."""

    path: Path
    identity: str
    step: int

    @property
    def lora(self) -> Path:
        """Its LoRA, in ComfyUI's format."""
        return self.path / "lora.safetensors"


def save_checkpoint(
    run_folder: Path,
    identity: str,
    state: TrainState,
    exported: Mapping[str, Tensor] | None,
    metadata: Mapping[str, str],
    processes: Processes = ALONE,
) -> Checkpoint:
    """Write ``checkpoint-<step>``: first beside its place, then moved there at once, so that it is never half.

    Several processes do it together: what is spread over them is gathered, and the leader writes.

    Args:
        exported: what is trained, as ComfyUI reads it; None: not once more, where it is the model itself.
    """
    place = run_folder / f"checkpoint-{state.step}"
    working = run_folder / f".checkpoint-{state.step}.tmp"
    tensors: dict[str, Tensor] = {
        f"adapter.{name}": weight for name, weight in {**state.adapter.weights, **state.adapter.frozen}.items()
    }
    kinds, scalars = optimizer_tensors(state.optimizer)
    tensors |= {f"optimizer.{name}": value for name, value in kinds.items()}
    if state.ema:
        tensors |= {f"ema.{name}": value for name, value in state.ema.state().items()}
    if state.loss_scale:
        tensors |= {f"loss_scale.{name}": value for name, value in state.loss_scale.state().items()}
    if state.shards:
        tensors = state.shards.whole(tensors)
    about = {"identity": identity, "step": state.step, "rate_factor": state.rate_factor, "optimizer": scalars}

    def write() -> None:
        for left_over in run_folder.glob(".checkpoint-*"):  # of a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        write_tensors(working / "state.safetensors", tensors)
        if exported is not None:
            write_tensors(working / "lora.safetensors", exported, metadata)
        write_json(working / "checkpoint.json", about)
        replaced = _out_of_the_way(place)
        os.replace(working, place)
        flush_folder(run_folder)  # before any other checkpoint goes
        shutil.rmtree(replaced, ignore_errors=True)

    processes.lead(write)
    return Checkpoint(place, identity, state.step)


def _out_of_the_way(place: Path) -> Path:
    """Where a checkpoint is now, if there was one: moved at once, so that it is whole or gone whenever it is killed."""
    going = place.with_name(f".{place.name}.old")
    shutil.rmtree(going, ignore_errors=True)
    if place.exists():
        os.replace(place, going)
    return going


def load_checkpoint(checkpoint: Checkpoint, state: TrainState) -> None:
    """Put everything back as it was when the checkpoint was written.

    Raises:
        ModelError: the checkpoint is of another adapter.
        RunError: the checkpoint is damaged, or of another optimiser.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(checkpoint.path / "state.safetensors")
        about = read_json(checkpoint.path / "checkpoint.json")
    except (OSError, ValueError, SafetensorError):
        raise RunError(
            f"The checkpoint {checkpoint.path} is damaged. Delete it: the one before is taken then."
        ) from None
    parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "optimizer": {}, "ema": {}, "loss_scale": {}}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    if state.shards:
        parts = {part: state.shards.own(tensors) for part, tensors in parts.items()}
    state.adapter.load(parts["adapter"], str(checkpoint.path))
    load_optimizer_tensors(state.optimizer, parts["optimizer"], about.get("optimizer", {}))
    if state.ema:
        state.ema.load(parts["ema"] or {name: w.float() for name, w in state.adapter.weights.items()})
    if state.loss_scale and parts["loss_scale"]:
        state.loss_scale.load(parts["loss_scale"])
    state.step, state.rate_factor = checkpoint.step, about.get("rate_factor", 1.0)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where it is not whole: a file is missing, cut or no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        content = read_json(path / "checkpoint.json")
        with safe_open(path / "state.safetensors", framework="pt"):  # reads the header, and compares the size
            return Checkpoint(path, content["identity"], content["step"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def newest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """The last one that is whole."""
    return max(_checkpoints(run_folder), key=lambda checkpoint: checkpoint.step, default=None)


def damaged_checkpoints(run_folder: Path, after: int) -> list[str]:
    """The names of those behind a step that are not whole."""
    behind = [path for path in _folders(run_folder) if int(path.name.partition("-")[2]) > after]
    return sorted(path.name for path in behind if read_checkpoint(path) is None)


def remove_old_checkpoints(run_folder: Path, keep: int) -> None:
    for checkpoint in sorted(_checkpoints(run_folder), key=lambda c: c.step)[:-keep]:
        shutil.rmtree(_out_of_the_way(checkpoint.path), ignore_errors=True)


def _checkpoints(run_folder: Path) -> list[Checkpoint]:
    return [checkpoint for checkpoint in map(read_checkpoint, _folders(run_folder)) if checkpoint]


def _folders(run_folder: Path) -> list[Path]:
    return [path for path in run_folder.glob("checkpoint-*") if _FOLDER.fullmatch(path.name)]
