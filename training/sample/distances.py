"""Distances between pictures that need no other network: coarse latents, which tell layout and colours.

A picture whose nearest training picture comes ever closer is being learned by heart; prompts whose pictures come ever
closer to each other are no longer told apart.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.latents import LatentCache

SIDE = 8  # of a coarse latent, whatever the picture's shape
AMONG = 256  # training pictures that are compared with


def coarse(latents: Tensor) -> Tensor:
    """(B, C, h, w) in the transformer's units to (B, C·64): the mean in each of 8 × 8 fields, fp32 on the CPU."""
    return F.adaptive_avg_pool2d(latents.float(), SIDE).flatten(1).cpu()


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) root mean square differences of coarse latents (N, D) and (M, D); about 1 between unlike pictures."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") / a.shape[1] ** 0.5


def nearest(drawn: Tensor, known: Tensor) -> float:
    """The mean, over the drawn pictures (N, D), of the distance to the nearest known one (M, D)."""
    return float(distances(drawn, known).amin(1).mean())


def spread(drawn: Tensor) -> float:
    """The mean distance between any two of (N, D), N > 1."""
    return float(torch.nn.functional.pdist(drawn).mean() / drawn.shape[1] ** 0.5)


def training_pictures(latents: LatentCache, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """Coarse latents (M, D) of up to 256 pictures that are trained on; M is 0 where none is cached.

    Args:
        scale: from the VAE's units to the transformer's.
    """
    images = latents.rows()
    parts = [
        number
        for number, part in enumerate(latents.parts)
        if part.mix.dataset_type == "image" and not part.mix.is_regularisation_data and not part.online
    ]
    rows = np.flatnonzero(np.isin(images.part, parts))
    rows = rows[np.argsort(images.key[rows], kind="stable")][:AMONG]
    entries = {number: latents.parts[number].store.open() for number in parts}
    found = [coarse(scale(entries[int(images.part[row])].read(images.key[row].decode())[None].float())) for row in rows]
    return torch.cat(found) if found else torch.empty(0, 0)
