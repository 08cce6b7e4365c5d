"""Pictures to latents, once each."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import Dataset, Sample
from ..data.pictures import load_picture
from ..errors import CacheError, DataError
from .store import Store, key_of

Encode = Callable[[Tensor], Tensor]  # pictures (B, height, width, 3) in [0, 1] -> latents (B, C, h, w)
Progress = Callable[[int, int], None]  # (done, total), before each batch; what it raises ends the work


@dataclass(frozen=True)
class LatentEntry:
    sample: str  # the sample's id
    key: str
    shape: tuple[int, int, int]  # channels, height, width of the latent
    repeats: int


@dataclass(frozen=True)
class LatentCache:
    """What the latents socket carries: keys into a store. The latents are the VAE's own, not scaled."""

    store: Store
    entries: tuple[LatentEntry, ...]
    skipped: tuple[str, ...] = ()


def cache_latents(
    dataset: Dataset, encode: Encode, vae: str, store: Store, batch_size: int, on_batch: Progress
) -> LatentCache:
    """Encode what is not in the store yet, batched by size; pictures are decoded ahead by threads.

    An entry that is damaged is encoded again. A picture that cannot be read is skipped and named.

    Args:
        vae: the VAE's fingerprint.

    Raises:
        CacheError: no picture of the dataset could be encoded.
    """
    keys = {s.id: key_of(picture=s.content, geometry=asdict(s.geometry), vae=vae, mode="mean") for s in dataset.samples}
    headers = {key: store.header(key) for key in set(keys.values())}
    shapes = {key: header[0] if header else None for key, header in headers.items()}
    waiting = list({keys[s.id]: s for s in dataset.samples if shapes[keys[s.id]] is None}.values())
    skipped = list(dataset.skipped)
    batches = _batches(waiting, batch_size)
    done = 0
    with ThreadPoolExecutor(4, thread_name_prefix="pictures") as threads:
        ahead = [threads.submit(_load, batch) for batch in batches[:4]]
        for number, batch in enumerate(batches):
            on_batch(done, len(waiting))
            loaded, problems = ahead.pop(0).result()
            if number + 4 < len(batches):
                ahead.append(threads.submit(_load, batches[number + 4]))
            skipped += problems
            if loaded:
                pictures = torch.from_numpy(np.stack([picture for _, picture in loaded])).float() / 255
                for (sample, _), latents in zip(loaded, encode(pictures), strict=True):
                    store.write(keys[sample.id], latents)
                    shapes[keys[sample.id]] = tuple(latents.shape)
            done += len(batch)
    on_batch(done, len(waiting))
    entries = []
    for sample in dataset.samples:
        shape = shapes[keys[sample.id]]
        if shape is not None:
            channels, height, width = shape
            entries.append(LatentEntry(sample.id, keys[sample.id], (channels, height, width), sample.repeats))
    if not entries:
        raise CacheError(f"Not one picture could be encoded. The first: {skipped[0]}")
    return LatentCache(store, tuple(entries), tuple(skipped))


def _batches(samples: list[Sample], size: int) -> list[list[Sample]]:
    groups: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.geometry.width_px, sample.geometry.height_px), []).append(sample)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _load(batch: list[Sample]) -> tuple[list[tuple[Sample, np.ndarray]], list[str]]:
    """The pictures of a batch that can be read, and a sentence for each that cannot."""
    results = [(sample, _try(sample)) for sample in batch]
    loaded = [(sample, result) for sample, result in results if isinstance(result, np.ndarray)]
    return loaded, [result for _, result in results if isinstance(result, str)]


def _try(sample: Sample) -> np.ndarray | str:
    try:
        return load_picture(Path(sample.path), sample.geometry)
    except DataError as error:
        return str(error)
