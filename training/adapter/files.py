"""LoRA files that load everywhere: ComfyUI's names, fused qkv, the scale inside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelError
from ..files import write_tensors

PREFIX = "diffusion_model."


def comfyui_lora(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """An adapter under ComfyUI's names, on the CPU; no tensor shares memory with another.

    ``scale`` is folded into B, so that no alpha is needed, which some loaders ignore.
    """
    return {
        PREFIX + name: (weight.detach().float() * (scale if ".lora_B." in name else 1)).cpu().clone().contiguous()
        for name, weight in weights.items()
    }


def write_lora(
    path: Path, lora: Mapping[str, Tensor], modules: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a LoRA in ComfyUI's format and read it back.

    Args:
        modules: the base weight of each module that can have an adapter, by the module's name.

    Raises:
        ModelError: a key does not fit the model, or the file does not hold what was written.
    """
    check_lora(lora, modules, str(path))
    write_tensors(path, lora, metadata)
    read = read_lora(path)
    if read.keys() != lora.keys() or not all(torch.equal(read[key], lora[key].cpu()) for key in lora):
        raise ModelError(f"{path} was written but reads differently. Check the disk, and save again.")


def read_lora(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def check_lora(lora: Mapping[str, Tensor], modules: Mapping[str, Tensor], source: str) -> None:
    """Hold each pair of A and B against the weight it belongs to.

    Raises:
        ModelError: a key names no module of the model, or its sizes do not fit.
    """
    for key, weight in lora.items():
        module, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        base = modules.get(module)
        if base is None or part not in ("A.weight", "B.weight") or not key.startswith(PREFIX):
            raise ModelError(f"{source}: the key {key!r} belongs to no weight of this Lumina2.")
        out, inner = base.shape
        fits = weight.shape[1] == inner if part == "A.weight" else weight.shape[0] == out
        if not fits:
            raise ModelError(f"{source}: {key!r} is {tuple(weight.shape)}, the base weight {tuple(base.shape)}.")
