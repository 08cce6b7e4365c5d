"""What goes into a step: latents, noise, levels and captions, read ahead by one thread.

Everything random is drawn on the CPU from (seed, number of the sample since the run began), so that a batch is a
function of the seed and the step, whatever came before and on whatever device it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.latents import LatentCache
from ..cache.store import Store
from ..cache.texts import TextCache
from ..config.settings import TrainSettings
from ..data.sampler import Sampler
from ..errors import DataError
from ..objective.sigmas import auto_shift, logit_normal_sigmas, shift_sigmas

KEPT_BYTES = 2**30  # of cache entries, so that a small dataset is read from disk once


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (B, C, h, w) fp32, in the transformer's units
    noise: Tensor  # (B, C, h, w) fp32
    sigmas: Tensor  # (B,) fp32, 1 is noise
    captions: Tensor  # (B, tokens, width), padded on the right
    lengths: tuple[int, ...]  # tokens of each caption that count

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(move(self.latents), move(self.noise), move(self.sigmas), move(self.captions), self.lengths)


class Batches:
    """Batches by step, from 0.

    Args:
        scale_latents: from the VAE's units to the transformer's.

    Raises:
        DataError: a picture has no caption in ``texts``.
    """

    def __init__(
        self,
        latents: LatentCache,
        texts: TextCache,
        settings: TrainSettings,
        scale_latents: Callable[[Tensor], Tensor],
    ) -> None:
        captions = {entry.sample: entry.keys for entry in texts.entries}
        without = [entry.sample for entry in latents.entries if entry.sample not in captions]
        if without:
            raise DataError(
                f"{len(without)} of {len(latents.entries)} pictures have no cached caption (first: {without[0]}). "
                "Wire the same dataset into Cache Latents and Cache Text Embeds."
            )
        self._latents, self._texts, self._settings = latents, texts, settings
        self._scale = scale_latents
        # An order that no file name decides: by what the entries hold.
        ordered = sorted(latents.entries, key=lambda entry: (entry.key, captions[entry.sample], entry.repeats))
        self._examples = [(entry.key, captions[entry.sample]) for entry in ordered]
        self.sampler = Sampler(
            [entry.shape for entry in ordered],
            [entry.repeats for entry in ordered],
            settings.batch_size,
            settings.seed,
        )
        self._kept: dict[str, Tensor] = {}
        self._kept_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> Batch:
        """The batch of a step; the next one is made ready meanwhile."""
        ready = self._ahead[1] if self._ahead and self._ahead[0] == step else self._thread.submit(self.make, step)
        batch = ready.result()
        self._ahead = (step + 1, self._thread.submit(self.make, step + 1))
        return batch

    def make(self, step: int) -> Batch:
        rows = self.sampler.batch(step)
        latents, noise, normal, captions = [], [], [], []
        for place, row in enumerate(rows):
            key, variants = self._examples[row]
            generator = _generator(self._settings.seed, step * len(rows) + place)
            latents.append(self._read(self._latents.store, key))
            noise.append(torch.randn(latents[-1].shape, generator=generator))
            normal.append(torch.randn((), generator=generator))
            variant, dropped = torch.rand(2, generator=generator).tolist()
            text = variants[int(variant * len(variants))]
            if dropped < self._settings.caption_dropout:
                text = self._texts.empty
            captions.append(self._read(self._texts.store, text))
        clean = self._scale(torch.stack(latents).float())
        sigmas = logit_normal_sigmas(torch.stack(normal))
        batch = Batch(
            latents=clean,
            noise=torch.stack(noise),
            sigmas=shift_sigmas(sigmas, auto_shift(*clean.shape[2:])),
            captions=nn.utils.rnn.pad_sequence(captions, batch_first=True),
            lengths=tuple(len(caption) for caption in captions),
        )
        return batch.pinned() if torch.cuda.is_available() else batch

    def _read(self, store: Store, key: str) -> Tensor:
        if key in self._kept:
            return self._kept[key]
        tensor = store.read(key)
        if self._kept_bytes + tensor.nbytes <= KEPT_BYTES:
            self._kept[key] = tensor
            self._kept_bytes += tensor.nbytes
        return tensor


def _generator(seed: int, sample: int) -> torch.Generator:
    mixed = np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) % 2**63)
