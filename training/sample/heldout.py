"""The held-out loss: pictures that are never trained on, always at the same noise and levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cache.latents import LatentCache
from ..cache.texts import TextCache
from ..errors import DataError, SettingError
from ..model.transformer import Lumina2Transformer
from ..objective.loss import add_noise, velocity
from .euler import text_velocity


class HeldOut(NamedTuple):
    """A picture of a dataset of type eval."""

    part: int  # of the latents' parts
    key: str  # of its latents
    caption: str  # the key of its first caption


def held_out_pictures(latents: LatentCache, texts: TextCache, at_most: int = 0) -> list[HeldOut]:
    """The held-out pictures of each dataset in the order of their keys, which no file name decides.

    Args:
        at_most: of each dataset; 0: all.

    Raises:
        SettingError: such a dataset is not cached.
        DataError: a picture has no caption in ``texts``.
    """
    parts = [number for number, part in enumerate(latents.parts) if part.mix.dataset_type == "eval"]
    if not parts:
        return []
    for part in (latents.parts[number] for number in parts):
        if part.online:
            raise SettingError(
                f"Dataset {part.id!r} is held out (dataset_type eval) and not cached. Switch its vae_cache_disable and "
                "vae_cache_clear_each_epoch off."
            )
    images, said = latents.rows(), texts.rows()
    chosen = np.flatnonzero(np.isin(said.part, parts))
    captions = {(int(said.part[row]), said.id[row]): said.variants(row)[0] for row in chosen.tolist()}
    found: list[HeldOut] = []
    for number in parts:
        rows = np.flatnonzero(images.part == number)
        rows = rows[np.argsort(images.key[rows], kind="stable")][: at_most or None]
        for row in rows:
            caption = captions.get((number, images.id[row]))
            if caption is None:
                raise DataError(
                    f"The held-out picture {images.id[row]} has no cached caption. Wire the same dataset into Cache "
                    "Latents and Cache Text Embeds."
                )
            found.append(HeldOut(number, images.key[row].decode(), caption))
    return found


def fixed_draws(key: str, shape: tuple[int, ...], levels: int) -> tuple[Tensor, Tensor]:
    """Noise levels (levels,) and noise (levels, *shape) of a picture: a function of its key alone.

    The levels are stratified: one in each of as many equal parts of (0, 1), at a place that differs from picture to
    picture, so that all pictures together cover the whole range.
    """
    mixed = np.random.SeedSequence(int(key, 16)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed) % 2**63)
    place = torch.rand((), generator=generator)
    sigmas = (torch.arange(levels) + place) / levels
    return sigmas, torch.randn((levels, *shape), generator=generator)


def picture_losses(
    transformer: Lumina2Transformer, latent: Tensor, caption: Tensor, key: str, levels: int, tick: Callable[[], None]
) -> Tensor:
    """The squared error of the velocity at each level, (levels,), in fp32: whatever loss is trained with.

    Args:
        latent: (C, h, w) in the transformer's units.
        caption: (tokens, width).
        tick: called before each network call.
    """
    device = transformer.final_layer.linear.weight.device
    clean = latent[None].float().to(device)
    sigmas, noise = fixed_draws(key, tuple(latent.shape), levels)
    predict = text_velocity(transformer, caption.to(device))
    losses = []
    for sigma, each in zip(sigmas.split(1), noise.to(device).split(1), strict=True):
        tick()
        level = sigma.to(device)
        error = predict(add_noise(clean, each, level), 1 - level) - velocity(clean, each)
        losses.append(error.square().mean())
    return torch.stack(losses)


def judge(before: list[float], loss: float, patience: int) -> tuple[bool, bool]:
    """Whether a loss is the lowest so far, and whether ``patience`` evaluations in a row brought no such.

    Args:
        before: of earlier evaluations, in order.
        patience: 0: never enough.
    """
    best = all(loss < each for each in before)
    losses = [*before, loss]
    lowest = min(range(len(losses)), key=losses.__getitem__)  # the first of the lowest
    return best, bool(patience) and len(losses) - 1 - lowest >= patience
