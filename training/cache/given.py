"""Latents and embeddings that another node made, kept like our own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config.dataset import MixSettings
from ..errors import DataError
from .latents import LatentCache, LatentPart
from .manifest import write_manifest
from .store import KEY_LENGTH, Store, Writer
from .texts import TextCache


def keep_given(
    latents: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    empty: Tensor | None,
    latent_store: Store,
    text_store: Store,
    mix: MixSettings | None = None,
) -> tuple[LatentCache, TextCache]:
    """Put latents (C, h, w) and the embedding (tokens, width) of each into the stores, named by what they hold.

    Args:
        empty: the empty caption's embedding; without one, caption dropout uses zeros of one token.

    Raises:
        DataError: the counts differ, or a shape is not what a latent or an embedding has.
    """
    if len(latents) != len(embeddings) or not latents:
        raise DataError(
            f"There are {len(latents)} latents and {len(embeddings)} conditionings. Give one conditioning a latent, "
            "in the same order."
        )
    for number, (latent, embedding) in enumerate(zip(latents, embeddings, strict=True)):
        if latent.ndim != 3 or embedding.ndim != 2:
            raise DataError(
                f"Latent {number} has the shape {tuple(latent.shape)} and its conditioning {tuple(embedding.shape)}; "
                "a picture's latent (channels, height, width) and an embedding (tokens, width) are needed."
            )
    none = torch.zeros(1, embeddings[0].shape[1]) if empty is None else empty
    latent_keys = _keep(latents, latent_store)
    text_keys = _keep([e.to(torch.bfloat16) for e in (*embeddings, none)], text_store)
    ids = [f"{number:08d}" for number in range(len(latents))]
    part = np.zeros(len(ids), np.int16)
    shapes = np.array([tuple(latent.shape) for latent in latents], np.int32)
    columns = {
        "part": part,
        "id": ids,
        "key": latent_keys,
        "flipped": [""] * len(ids),
        "channels": shapes[:, 0],
        "height": shapes[:, 1],
        "width": shapes[:, 2],
        "repeats": np.full(len(ids), (mix or MixSettings()).repeats, np.int32),
        "row": np.arange(len(ids), dtype=np.int32),
    }
    digest = hashlib.sha256("".join(latent_keys + text_keys).encode()).hexdigest()
    listed = write_manifest(Path(latent_store.folder), {"latents": "given", "digest": digest}, columns)
    texts = {"part": part, "id": ids, "keys": [[key] for key in text_keys[:-1]]}
    said = write_manifest(Path(text_store.folder), {"texts": "given", "digest": digest, "also": text_keys[-1:]}, texts)
    parts = (LatentPart("latents", latent_store, mix or MixSettings()),)
    return LatentCache(str(listed), parts, len(ids)), TextCache(text_store, str(said), len(ids), text_keys[-1])


def _keep(tensors: Sequence[Tensor], store: Store) -> list[str]:
    catalog = store.open()
    keys = []
    with Writer(catalog, 128) as writer:
        for tensor in tensors:
            plain = tensor.detach().cpu().contiguous()
            data = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
            keys.append(hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode() + data).hexdigest()[:KEY_LENGTH])
            if keys[-1] not in catalog:
                writer.add(keys[-1], plain)
    return keys
