"""``estimate`` of the command line: how much memory a training will need, and what would save how much.

python <plugin folder> estimate [--resolution 1024] [--batch-size 1] [--rank 16 | --full] [--device cuda] [--json]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..adapter.adapter import add_adapter
from ..config.adapter import FullSettings, LoRASettings
from ..config.precision import BASE_PRECISION, CHECKPOINTING_BACKENDS, MIXED_PRECISION, PrecisionSettings
from ..errors import ModelError, SettingError
from ..files import read_json
from ..model.config import MAX_CAPTION_TOKENS, TransformerConfig
from ..model.linear import computed_in
from .forecast import GB, PRESETS, Forecast, Shape, forecast, measure, savings

_PART_NAMES = {
    "weights": "model weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimiser states",
    "activations": "activations",
    "base": "process or driver",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a folder in diffusers' layout; default: Lumina-Image-2.0's sizes")
    parser.add_argument("--resolution", type=int, default=1024, help="side of the pictures in px")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="of a caption")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--targets", default="attention", help="what the LoRA changes")
    parser.add_argument("--full", action="store_true", help="a full fine-tune, no LoRA")
    parser.add_argument("--optimizer", default="torch-adamw")
    parser.add_argument("--fused-backward", action="store_true", help="each weight changes as its gradient arrives")
    parser.add_argument("--mixed-precision", choices=MIXED_PRECISION, default="auto")
    parser.add_argument("--base-model-precision", choices=BASE_PRECISION, default="no_change")
    parser.add_argument("--no-gradient-checkpointing", action="store_true")
    parser.add_argument("--gradient-checkpointing-interval", type=int, default=1)
    parser.add_argument("--gradient-checkpointing-selective", action="store_true")
    parser.add_argument("--gradient-checkpointing-backend", choices=CHECKPOINTING_BACKENDS, default="torch")
    parser.add_argument("--musubi-blocks-to-swap", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda: the GPU's memory")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")


def estimate(options: argparse.Namespace) -> dict[str, Any]:
    """The forecast, its parts and what switches would save; bytes.

    Raises:
        SettingError: an option is out of range or contradicts another.
        ModelError: the model's folder has no sizes.
    """
    for name, least, most in (("resolution", 64, 8192), ("batch_size", 1, 4096), ("tokens", 1, MAX_CAPTION_TOKENS)):
        value = getattr(options, name)
        if not least <= value <= most:
            raise SettingError(f"{name} is {value}; choose a number from {least} to {most}.")
    precision = PrecisionSettings(
        mixed_precision=options.mixed_precision,
        base_model_precision=options.base_model_precision,
        gradient_checkpointing=not options.no_gradient_checkpointing,
        gradient_checkpointing_interval=options.gradient_checkpointing_interval,
        gradient_checkpointing_selective=options.gradient_checkpointing_selective,
        gradient_checkpointing_backend=options.gradient_checkpointing_backend,
        musubi_blocks_to_swap=options.musubi_blocks_to_swap,
    )
    if options.full:
        precision.check_full_fine_tune()
    elif options.fused_backward:
        raise SettingError("fused_backward is True; an adapter's gradients are small: choose it with --full only.")
    side = options.resolution // 16 * 2
    adapter = FullSettings() if options.full else LoRASettings(rank=options.rank, targets=options.targets)
    measured = measure(
        _config(options.model),
        Shape(options.batch_size, side, side, options.tokens),
        lambda transformer: add_adapter(transformer, adapter, 0),
        computed=_computed(options.mixed_precision, options.device),
        ways=("none", "full", *(("selective",) if options.gradient_checkpointing_selective else ())),
    )
    choice = (precision, options.optimizer, options.fused_backward, options.device)
    found = forecast(measured, *choice)
    return {
        "device": options.device,
        "total": found.total,
        "parts": found.parts(),
        "savings": savings(measured, *choice),
        "preset": fitting_preset(found) if options.device == "cuda" else None,
        "notes": list(found.notes),
    }


def fitting_preset(found: Forecast) -> int | None:
    """The smallest GPU, in GB, that has a preset and room for this."""
    return next((size for size in PRESETS if found.total <= size * GB), None)


def lines(found: dict[str, Any]) -> str:
    """The same as a table."""
    rows = [f"{_PART_NAMES[name]:20} {size / GB:7.2f} GB" for name, size in found["parts"].items() if size]
    rows.append(f"{'in all':20} {found['total'] / GB:7.2f} GB on {found['device']}")
    rows += [f"{setting:48} saves {size / GB:6.2f} GB" for setting, size in found["savings"].items()]
    return "\n".join([*rows, *found["notes"]])


def _config(folder: Path | None) -> TransformerConfig:
    if folder is None:
        return TransformerConfig()
    for path in (folder / "transformer" / "config.json", folder / "config.json"):
        if path.exists():
            return TransformerConfig.from_diffusers(read_json(path))
    raise ModelError(f"{folder} has no config.json of a transformer. Choose a folder in diffusers' layout.")


def _computed(mixed_precision: str, device: str) -> torch.dtype:
    """On a GPU that is not here, what one with bf16 instructions computes in."""
    if mixed_precision == "no":
        return torch.float32
    return torch.bfloat16 if device == "cuda" else computed_in(torch.bfloat16, torch.device("cpu"))
