"""Out of memory, in a sentence: what the forecast was, what is there, and which switches would make it fit."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..adapter.adapter import add_adapter
from ..config.adapter import started_anyhow
from ..config.settings import TrainSettings
from ..errors import Lumina2Error
from ..model.config import TransformerConfig
from .forecast import GB, Shape, forecast, measure, savings, ways_of


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU, for which torch has no exception of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def what_would_fit(
    config: TransformerConfig, settings: TrainSettings, largest: tuple[int, int], weight: Tensor, computed: torch.dtype
) -> str:
    """What was forecast of a run, and what switches would save.

    Args:
        largest: height and width, in latent cells, of the largest picture.
        weight: one that is stored as the model's are, where they are not quantised.
    """
    device, precision, optimizer = weight.device, settings.precision, settings.optimizer
    adapter = started_anyhow(settings.adapter)
    try:
        measured = measure(
            config,
            Shape(settings.batch_size, *largest),
            lambda transformer: add_adapter(transformer, adapter, 0),
            weight.dtype,
            computed,
            tuple({"none", "full", *ways_of(precision, 1)}),
        )
        choice = (precision, optimizer.optimizer, optimizer.fused_backward, device.type)
        found, saved = forecast(measured, *choice), savings(measured, *choice)
    except (Lumina2Error, RuntimeError, NotImplementedError):  # nothing that explains an error may hide it
        return "Lower batch_size or the resolution, or switch gradient_checkpointing on."
    there = device_memory(device)
    known = f" of {_gb(there)}" if there else ""
    said = f"The forecast was {_gb(found.total)}{known} on {device}"
    if there and found.total <= there:
        said += ": other programs seem to hold the rest, so close them"
    fitting = {name: size for name, size in saved.items() if there is None or found.total - size <= there}
    switches = ", ".join(f"{name} (saves {_gb(size)})" for name, size in (fitting or saved).items())
    if not switches:
        return f"{said}. Lower the resolution, or train fewer layers."
    together = "" if fitting else ", several of them together"
    return f"{said}. It would fit with {switches}{together}."


def device_memory(device: torch.device) -> int | None:
    """Bytes that a device has in all; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None
    except (AttributeError, ValueError, OSError):
        return None


def _gb(count: int) -> str:
    return f"{count / GB:.2f} GB"
