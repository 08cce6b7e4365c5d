"""Adapter files that ComfyUI reads: its names, fused qkv, every scale inside the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelError
from ..files import write_tensors
from .base import PREFIX

# What ComfyUI's loaders know behind a module's name, and whether its shape fits a weight (out, in).
_PARTS: dict[str, Callable[[torch.Size, int, int], bool]] = {
    "lora_A.weight": lambda shape, out, inner: shape[1:] == (inner,),
    "lora_B.weight": lambda shape, out, inner: shape[0] == out,
    "dora_scale": lambda shape, out, inner: shape in ((out, 1), (1, inner)),
    "diff": lambda shape, out, inner: shape == (out, inner),
    "diff_b": lambda shape, out, inner: shape == (out,),
    "lokr_w1": lambda shape, out, inner: out % shape[0] == 0 and inner % shape[1] == 0,
    "lokr_w1_a": lambda shape, out, inner: out % shape[0] == 0,
    "lokr_w1_b": lambda shape, out, inner: inner % shape[1] == 0,
    "hada_w1_a": lambda shape, out, inner: shape[0] == out,
    "hada_w1_b": lambda shape, out, inner: shape[1:] == (inner,),
    "a1.weight": lambda shape, out, inner: shape[0] == inner,
    "a2.weight": lambda shape, out, inner: shape[1:] == (inner,),
    "b1.weight": lambda shape, out, inner: shape[0] == out,
    "b2.weight": lambda shape, out, inner: shape[1:] == (inner,),
    "oft_blocks": lambda shape, out, inner: math.prod(shape[-3:-1]) == out,
    "rescale": lambda shape, out, inner: shape == (out, 1),
    "alpha": lambda shape, out, inner: shape == (),
}
_PARTS |= {name.replace("w1", "w2"): fits for name, fits in _PARTS.items() if "w1" in name}


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
    """Write an adapter in ComfyUI's format and read it back.

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
    """Hold each tensor against the weight it belongs to.

    Raises:
        ModelError: a key names no module of the model, or its sizes do not fit.
    """
    for key, weight in lora.items():
        name = key.removeprefix(PREFIX)
        part = next((part for part in _PARTS if name.endswith(f".{part}")), "")
        base = modules.get(name.removesuffix(f".{part}"))
        if base is None or not part or not key.startswith(PREFIX):
            raise ModelError(f"{source}: the key {key!r} belongs to no weight of this Lumina2.")
        if not _PARTS[part](weight.shape, *base.shape):
            raise ModelError(f"{source}: {key!r} is {tuple(weight.shape)}, the base weight {tuple(base.shape)}.")
