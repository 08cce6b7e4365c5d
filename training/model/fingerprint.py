"""A model in 16 letters: the same from a node and from a file, whatever the precision it was loaded in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .config import TransformerConfig
from .keys import diffusers_weights

ELEMENTS = 256


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of each weight's name, shape and 256 evenly spaced elements, rounded to bf16.

    Args:
        weights: under diffusers' names, in any order, on any device.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        flat = weight.detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, min(ELEMENTS, flat.numel()), dtype=torch.float64).round().long()
        chosen = flat[places.to(flat.device)].to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(chosen.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def transformer_fingerprint(weights: Iterable[tuple[str, Tensor]], config: TransformerConfig) -> str:
    """The same from our names: q, k and v apart, and without ``norm_final``, which diffusers does not have."""
    named: list[tuple[str, Tensor]] = []
    for name, weight in weights:
        if not name.startswith("norm_final"):
            named += diffusers_weights(name, weight, config).items()
    return fingerprint(named)
