"""Checkpoints: all that a run needs to go on, in safetensors, whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter.lora import load_lora
from ..errors import RunError
from ..files import read_json, write_json, write_tensors

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
    step: int,
    weights: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    lora: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> Checkpoint:
    """Write ``checkpoint-<step>``: first beside its place, then moved there at once, so that it is never half."""
    place = run_folder / f"checkpoint-{step}"
    working = run_folder / f".checkpoint-{step}.tmp"
    shutil.rmtree(working, ignore_errors=True)
    state = {f"adapter.{name}": weight for name, weight in weights.items()}
    for name, weight in weights.items():
        state.update({f"{kind}.{name}": value for kind, value in optimizer.state[weight].items()})
    write_tensors(working / "state.safetensors", state)
    write_tensors(working / "lora.safetensors", lora, metadata)
    write_json(working / "checkpoint.json", {"identity": identity, "step": step})
    shutil.rmtree(place, ignore_errors=True)
    os.replace(working, place)
    return Checkpoint(place, identity, step)


def load_checkpoint(
    checkpoint: Checkpoint, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Put the weights and the optimiser's state back.

    Raises:
        ModelError: the checkpoint is of another adapter.
        RunError: the checkpoint is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(checkpoint.path / "state.safetensors")
    except (OSError, SafetensorError):
        raise RunError(
            f"The checkpoint {checkpoint.path} is damaged. Delete it: the one before is taken then."
        ) from None
    kinds: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        kind, _, name = key.partition(".")
        kinds.setdefault(kind, {})[name] = value
    load_lora(weights, kinds.pop("adapter"), str(checkpoint.path))
    for name, weight in weights.items():
        optimizer.state[weight] = {kind: values[name].to(weight.device) for kind, values in kinds.items()}


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where it is not whole."""
    try:
        content = read_json(path / "checkpoint.json")
    except (OSError, ValueError):
        return None
    return Checkpoint(path, content["identity"], content["step"])


def newest_checkpoint(run_folder: Path) -> Checkpoint | None:
    return max(_checkpoints(run_folder), key=lambda checkpoint: checkpoint.step, default=None)


def remove_old_checkpoints(run_folder: Path, keep: int) -> None:
    for checkpoint in sorted(_checkpoints(run_folder), key=lambda c: c.step)[:-keep]:
        shutil.rmtree(checkpoint.path, ignore_errors=True)


def _checkpoints(run_folder: Path) -> list[Checkpoint]:
    folders = [path for path in run_folder.glob("checkpoint-*") if _FOLDER.fullmatch(path.name)]
    return [checkpoint for checkpoint in map(read_checkpoint, folders) if checkpoint]
