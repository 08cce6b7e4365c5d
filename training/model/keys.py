"""One model, three vocabularies: our names (ComfyUI's), diffusers' and kohya's.

Ours are those of ComfyUI's ``NextDiT``, where q, k and v are the rows of one fused ``attention.qkv`` weight.
Sources: diffusers ``single_file_utils.py`` (the map it applies to such files), ComfyUI ``ldm/lumina/model.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ModelError
from .config import TransformerConfig

_OUTSIDE_BLOCKS = {
    "x_embedder": "x_embedder",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
_INSIDE_BLOCKS = {
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "attention_norm1": "norm1.norm",
    "attention_norm2": "norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
    "adaLN_modulation.1": "norm1.linear",
}
_BLOCK = re.compile(r"((?:noise_refiner|context_refiner|layers)\.\d+)\.(.+)")


def diffusers_modules(module: str) -> tuple[str, ...]:
    """The module of ours in diffusers' names; three for ``attention.qkv`` (its rows are q, then k, then v)."""
    if module in _OUTSIDE_BLOCKS:
        return (_OUTSIDE_BLOCKS[module],)
    match = _BLOCK.fullmatch(module)
    if not match:
        raise ModelError(f"Lumina2 has no module {module!r}.")
    block, inner = match.groups()
    if inner == "attention.qkv":
        return tuple(f"{block}.attn.to_{part}" for part in "qkv")
    if inner == "attention_norm1" and block.startswith("context_refiner"):
        return (f"{block}.norm1",)  # no modulation there, so diffusers nests nothing
    if inner not in _INSIDE_BLOCKS:
        raise ModelError(f"Lumina2 has no module {module!r}.")
    return (f"{block}.{_INSIDE_BLOCKS[inner]}",)


def diffusers_weights(name: str, weight: Tensor, config: TransformerConfig) -> dict[str, Tensor]:
    """One parameter of ours under its diffusers names, as views of the same memory."""
    module, _, kind = name.rpartition(".")
    names = diffusers_modules(module)
    parts = weight.split(config.qkv_rows) if len(names) == 3 else (weight,)
    return {f"{n}.{kind}": part for n, part in zip(names, parts, strict=True)}


def from_diffusers(weights: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Diffusers' state dict under our ``names``; q, k and v are stacked.

    Raises:
        ModelError: a weight is missing, or one is left over.
    """
    left, ours = dict(weights), {}
    for name in names:
        module, _, kind = name.rpartition(".")
        sources = [f"{n}.{kind}" for n in diffusers_modules(module)]
        missing = [s for s in sources if s not in left]
        if missing:
            raise ModelError(f"The transformer lacks the weight {missing[0]!r}: not a complete Lumina2 model.")
        parts = [left.pop(s) for s in sources]
        ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if left:
        raise ModelError(f"The transformer has {len(left)} weights that Lumina2 does not know, first {min(left)!r}.")
    return ours
