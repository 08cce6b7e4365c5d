"""``convert`` and ``export`` of the command line.

    python <plugin folder> convert FILE… [--to comfyui] [--output FILE] [--base MODEL] [--rank N] [--dtype fp32]
    python <plugin folder> export MODEL TARGET --to comfyui|all-in-one|diffusers [--base FOLDER] [--dtype keep]

``convert`` writes a LoRA in another format; several become one.
``export`` writes a whole model in another layout.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from ...model.config import TransformerConfig
from ...model.loading import load_transformer
from .checkpoint import LAYOUTS, STORED, export_model
from .combine import combine
from .layers import Weights, no_base
from .read import read_adapters
from .write import DTYPES, FORMATS, write_adapters


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", help="a LoRA of any format; several become one")
    parser.add_argument("--to", choices=list(FORMATS), default="comfyui", help="the format to write")
    parser.add_argument("--output", type=Path, help="the file to write; default: beside the first, named by format")
    parser.add_argument("--base", type=Path, help="the base model, a folder or a file: needed for DoRA and OFT")
    parser.add_argument("--rank", type=int, default=0, help="reduce LoRAs, and what the format cannot express, to it")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the weights in the file")


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """Write a LoRA in another format, or several as one.

    Raises:
        ModelError, SettingError: a file cannot be read, or not be written so; or the output is there already.
    """
    config, base = opened_base(options.base)
    given = [(read_adapters(path, config), 1.0) for path in options.files]
    first: Path = options.files[0]
    output: Path = options.output or first.with_name(f"{first.stem}-{options.to}.safetensors")
    if output.exists():
        raise ModelError(f"{output} is there already. Name another --output, or remove it first.")
    notes: list[str] = []
    adapters = given[0][0]
    if len(given) > 1 or options.rank:
        combined = combine(given, options.rank, base)
        adapters = combined.adapters
        notes.append(combined.note)
    result = write_adapters(output, adapters, options.to, base, options.rank, options.dtype)
    return {
        "written": str(output),
        "format": options.to,
        "layers": len(adapters.layers),
        "tensors": len(result.tensors),
        "relative_error": result.relative_error,
        "notes": [*notes, *result.notes],
    }


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a folder in diffusers' layout, or a single .safetensors file")
    parser.add_argument("target", type=Path, help="the file, or for diffusers the folder, to write")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="the layout to write")
    parser.add_argument("--base", type=Path, help="a folder that gives what the model lacks: text encoder, VAE")
    parser.add_argument("--dtype", choices=list(STORED), default="keep", help="of the weights that are written")


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Write a whole model in another layout; see ``export_model``."""
    return export_model(options.model, options.target, options.to, options.base, options.dtype)


def opened_base(path: Path | None) -> tuple[TransformerConfig | None, Weights]:
    """A base model's sizes and weights; without one, sizes are read off LoRAs and weights cannot be asked for."""
    if path is None:
        return None, no_base
    model = load_transformer(path, dtype=None)

    @lru_cache(2)
    def weight(module: str) -> Tensor:
        return model.get_parameter(f"{module}.weight").detach().to(torch.float32)

    return model.config, weight
