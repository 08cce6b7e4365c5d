"""What goes into a step: latents, noise, levels and captions, read ahead by one thread.

Everything random is drawn on the CPU from (seed, number of the sample since the run began), so that a batch is a
function of the seed and the step, whatever came before and on whatever device it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.latents import Encode, LatentCache, LatentPart
from ..cache.store import Catalog, Writer, key_of
from ..cache.texts import TextCache
from ..config.dataset import MixSettings
from ..config.objective import ObjectiveSettings
from ..config.settings import TrainSettings
from ..data.dataset import Part, Rows, decode_row, open_rows
from ..data.sampler import Draw, Pool, Sampler
from ..data.sources import Source
from ..data.sources.opening import open_source
from ..errors import DataError, SettingError
from ..objective.draws import draw_sigmas, schedule_shift, stratify, stratum_order
from ..objective.loss import chosen_masks, perturb, perturbation
from ..objective.rollout import plan_rollout
from .processes import ALONE, Processes

KEPT_BYTES = 2**30  # of cache entries, so that a small dataset is read from disk once


class Captions(NamedTuple):
    """What is said of each sample of a batch."""

    captions: Tensor  # (B, tokens, width), padded on the right
    lengths: tuple[int, ...]  # tokens of each that count

    def of(self, rows: list[int]) -> Captions:
        if len(rows) == len(self.lengths):
            return self
        return Captions(self.captions[rows], tuple(self.lengths[row] for row in rows))


@dataclass(frozen=True)
class Batch:
    """Samples with captions of one length are next to each other."""

    latents: Tensor  # (B, C, h, w) fp32, in the transformer's units
    noise: Tensor  # (B, C, h, w) fp32
    sigmas: Tensor  # (B,) fp32, 1 is noise
    captions: Tensor  # (B, tokens, width), padded on the right; of the transformer's width where they are ``refined``
    lengths: tuple[int, ...]  # tokens of each caption that count
    regularisation: bool = False  # the target is the base model's own prediction
    seen_noise: Tensor | None = None  # what the network sees in place of ``noise``, where that is perturbed
    masks: Tensor | None = None  # (B, 1, h, w) fp32 in [0, 1]: how much each place counts
    refined: bool = False  # captions have been through the context refiner
    levels: Tensor | None = None  # scheduled sampling: the levels that each sample passes; stays on the CPU
    dataset: str = ""  # its id; empty where there is only one
    taught: Captions | None = None  # what the base model reads of regularisation data, where that is not the caption
    slider: tuple[Captions, Captions] | None = None  # the prompts that it leads to and from
    strength: float = 1.0  # that the adapter acts with: a slider's batches have 1 and -1 in turn

    @property
    def said(self) -> Captions:
        return Captions(self.captions, self.lengths)

    def weight(self, objective: ObjectiveSettings) -> float:
        """What its loss counts beside that of other batches."""
        return objective.prior_loss_weight if self.regularisation else 1.0

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        names = ("latents", "noise", "sigmas", "captions", "seen_noise", "masks")
        moved: dict[str, Any] = {name: move(getattr(self, name)) for name in names if getattr(self, name) is not None}

        def read(said: Captions) -> Captions:
            return said._replace(captions=move(said.captions))

        if self.taught:
            moved["taught"] = read(self.taught)
        if self.slider:
            moved["slider"] = (read(self.slider[0]), read(self.slider[1]))
        return replace(self, **moved)


@dataclass(frozen=True)
class Refiner:
    """The context refiner where nothing of it is trained: what it makes of a caption is kept beside the embedding."""

    key: str  # another one where its weights, or what they are computed in, are others
    refine: Callable[[Tensor], Tensor]  # (tokens, caption_dim) -> (tokens, dim)


@dataclass(frozen=True)
class Examples:
    """What is drawn from one dataset, in an order that no file name decides."""

    part: int
    keys: np.ndarray  # S40 of the latents; empty where they are encoded while training
    flipped: np.ndarray
    masks: np.ndarray  # S40; empty where all of a picture counts
    captions: np.ndarray  # rows of the text cache
    shapes: np.ndarray  # (N, 3)
    repeats: np.ndarray
    rows: np.ndarray  # of the pictures in their dataset


def join(latents: LatentCache, texts: TextCache) -> list[Examples]:
    """The examples of each dataset that is trained on: each latent with its captions.

    Raises:
        DataError: pictures have no caption in ``texts``.
    """
    import pyarrow
    import pyarrow.compute

    images, said = latents.rows(), texts.rows()

    def names(part: np.ndarray, id: np.ndarray) -> pyarrow.Array:
        number = pyarrow.array(part).cast(pyarrow.string())
        return pyarrow.compute.binary_join_element_wise(number, pyarrow.array(id, pyarrow.string()), "/")

    found = pyarrow.compute.index_in(names(images.part, images.id), value_set=names(said.part, said.id))
    captions = found.fill_null(-1).to_numpy(zero_copy_only=False)
    trained = np.array([part.mix.dataset_type == "image" for part in latents.parts])[images.part]
    without = np.flatnonzero(trained & (captions < 0))
    if len(without):
        raise DataError(
            f"{len(without)} of {int(trained.sum())} pictures have no cached caption (first: "
            f"{images.id[without[0]]}). Wire the same dataset into Cache Latents and Cache Text Embeds."
        )
    starts = np.concatenate([[0], said.ends[:-1]])
    first = said.keys[starts]
    examples = []
    for number, part in enumerate(latents.parts):
        rows = np.flatnonzero(trained & (images.part == number))
        if not part.online:
            rows = rows[np.lexsort((first[captions[rows]], images.key[rows]))]
        examples.append(
            Examples(
                part=number,
                keys=images.key[rows],
                flipped=images.flipped[rows],
                masks=images.mask[rows],
                captions=captions[rows],
                shapes=images.shape[rows],
                repeats=images.repeats[rows],
                rows=images.row[rows],
            )
        )
    return examples


class Batches:
    """Batches by number, from 0.

    Args:
        scale_latents: from the VAE's units to the transformer's.
        encode: the VAE, for datasets that are encoded while training.
        processes: that train together; this one takes each ``count``-th batch.

    Raises:
        DataError: a picture has no caption in ``texts``, or there is nothing to draw.
        SettingError: a dataset has to be encoded while training and there is no VAE.
    """

    def __init__(
        self,
        latents: LatentCache,
        texts: TextCache,
        settings: TrainSettings,
        scale_latents: Callable[[Tensor], Tensor],
        encode: Encode | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._settings, self._scale, self._stride = settings, scale_latents, processes.count
        self.per_step = settings.optimizer.gradient_accumulation_steps * processes.count
        self._parts = latents.parts
        self._objectives = [_objective(settings.objective, part) for part in latents.parts]
        self._examples = join(latents, texts)
        self._texts, self._empty = texts.rows(), texts.empty
        self._slider = [_key_of_prompt(texts, prompt) for prompt in settings.objective.slider or ()]
        self._text_entries = texts.store.open()
        self._entries = [None if part.online else part.store.open() for part in latents.parts]
        online = [part for part in latents.parts if part.online]
        if online and encode is None:
            raise SettingError(
                f"Dataset {online[0].id!r} is not cached (vae_cache_disable or vae_cache_clear_each_epoch): it is "
                "encoded while training. Wire a VAE into the train node, or switch the cache on."
            )
        self._online = [_Online(p.online, encode) if p.online and encode else None for p in latents.parts]
        joined = zip(self._examples, latents.parts, strict=True)
        self.sampler = Sampler(
            [_pool(examples, part.mix, self.per_step) for examples, part in joined],
            settings.batch_size,
            settings.seed,
            settings.data_backend_sampling,
            not settings.disable_bucket_pruning,
        )
        self._refiner: Refiner | None = None
        self._refined: Writer | None = None
        self._kept: dict[tuple[int, str], Tensor] = {}
        self._kept_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._refined:
            self._refined.commit()

    def refine_with(self, refiner: Refiner) -> None:
        """From now on captions are refined when they are read first, and kept so."""
        self._refiner, self._refined = refiner, Writer(self._text_entries, 128)

    @property
    def epoch_steps(self) -> float:
        """Optimiser steps that go through everything once."""
        return self.sampler.steps_per_epoch / self.per_step

    def take(self, number: int) -> Batch:
        """Batch ``number``; the next one of this process is made ready meanwhile."""
        ready = self._ahead[1] if self._ahead and self._ahead[0] == number else self._thread.submit(self.make, number)
        batch, following = ready.result(), number + self._stride
        self._ahead = (following, self._thread.submit(self.make, following))
        return batch

    def make(self, number: int) -> Batch:
        draw = self.sampler.batch(number)
        examples, part = self._examples[draw.part], self._parts[draw.part]
        settings, objective = self._settings, self._objectives[draw.part]
        dropout = objective.caption_dropout_probability if part.caption_dropout is None else part.caption_dropout
        optimizer_step = number // self.per_step
        perturbed = perturbation(objective, optimizer_step)
        size, first = len(draw.rows), number * len(draw.rows)
        shape = examples.shapes[draw.rows[0]].tolist()
        noise, more, levels, captions, taught, chances = [], [], [], [], [], []
        for place, row in enumerate(draw.rows.tolist()):
            generator = _generator(settings.seed, first + place)
            noise.append(torch.randn(shape, generator=generator))
            levels.append(torch.special.ndtr(torch.randn((), generator=generator).double()))
            chance = torch.rand(6, generator=generator)
            chances.append(chance)
            if perturbed:
                more.append(torch.randn(shape, generator=generator))
            variant, dropped = chance[:2].tolist()
            variants = self._texts.variants(examples.captions[row])
            chosen = int(variant * len(variants))
            text = self._empty if dropped < dropout else variants[chosen]
            captions.append(self._caption(text))
            if part.mix.is_regularisation_data and self._texts.taught is not None:
                read = text if text == self._empty else self._texts.taught_variants(examples.captions[row])[chosen]
                taught.append(self._caption(read))
        _, _, flip, rolls, whence, masked = torch.stack(chances).unbind(1)
        mirrored = [part.flips and chance < 0.5 for chance in flip.tolist()]
        clean = self._scale(self._latents(draw, mirrored).float())
        uniform = torch.stack(levels)
        if objective.flow_stratified:
            uniform = stratify(uniform, stratum_order(settings.seed, number, size))
        sigmas = draw_sigmas(uniform, objective, schedule_shift(objective, *clean.shape[2:]), first)
        masks = self._masks(draw, mirrored)
        noises = torch.stack(noise)
        # Samples of one caption length are next to each other: they share their attention's call.
        order = sorted(range(size), key=lambda place: len(captions[place]))
        seen = perturb(noises, torch.stack(more), perturbed) if perturbed else None
        said = _said([captions[place] for place in order])
        batch = Batch(
            latents=clean[order],
            noise=noises[order],
            sigmas=sigmas[order],
            captions=said.captions,
            lengths=said.lengths,
            regularisation=part.mix.is_regularisation_data,
            dataset=part.id if len(self._parts) > 1 else "",
            seen_noise=None if seen is None else seen[order],
            refined=self._refiner is not None,
            masks=None if masks is None else chosen_masks(masks, masked, objective)[order],
            levels=plan_rollout(
                sigmas[order], rolls[order], whence[order], objective.scheduled_sampling, optimizer_step
            ),
            taught=_said([taught[place] for place in order]) if taught else None,
        )
        if self._slider:
            positive, negative = (_said([self._caption(key)] * size) for key in self._slider)
            batch = replace(batch, slider=(positive, negative), strength=-1.0 if number % 2 else 1.0)
        return batch.pinned() if torch.cuda.is_available() else batch

    def _masks(self, draw: Draw, mirrored: list[bool]) -> Tensor | None:
        """(B, 1, h, w) in [0, 1]; None where all of every picture counts."""
        examples, entries = self._examples[draw.part], self._entries[draw.part]
        keys = examples.masks[draw.rows].tolist()
        if entries is None or not any(keys):
            return None
        everything = torch.full((1, *examples.shapes[draw.rows[0]].tolist()[1:]), 255, dtype=torch.uint8)
        masks = [self._read(entries, draw.part, key.decode()) if key else everything for key in keys]
        turned = [mask.flip(-1) if flip else mask for mask, flip in zip(masks, mirrored, strict=True)]
        return torch.stack(turned).float().div_(255)

    def _latents(self, draw: Draw, mirrored: list[bool]) -> Tensor:
        examples, entries, online = self._examples[draw.part], self._entries[draw.part], self._online[draw.part]
        if online:
            return online.latents(examples.rows[draw.rows], draw.round, mirrored)
        assert entries is not None
        keys = [
            (examples.flipped if flip else examples.keys)[row].decode()
            for row, flip in zip(draw.rows.tolist(), mirrored, strict=True)
        ]
        return torch.stack([self._read(entries, draw.part, key) for key in keys])

    def _caption(self, text: str) -> Tensor:
        if self._refiner is None or self._refined is None:
            return self._read(self._text_entries, -1, text)
        key = key_of(refined=text, by=self._refiner.key)
        known = self._kept.get((-1, key), self._refined.pending(key))
        if known is not None:
            return known
        if key in self._text_entries:
            return self._read(self._text_entries, -1, key)
        refined = self._keep((-1, key), self._refiner.refine(self._text_entries.read(text)).cpu())
        self._refined.add(key, refined)
        return refined

    def _read(self, entries: Catalog, part: int, key: str) -> Tensor:
        kept = self._kept.get((part, key))
        return self._keep((part, key), entries.read(key)) if kept is None else kept

    def _keep(self, key: tuple[int, str], tensor: Tensor) -> Tensor:
        if self._kept_bytes + tensor.nbytes <= KEPT_BYTES:
            self._kept[key] = tensor
            self._kept_bytes += tensor.nbytes
        return tensor


class _Online:
    """A dataset whose pictures are encoded when they are drawn; random crops anew in each of its rounds."""

    def __init__(self, part: Part, encode: Encode) -> None:
        self._part, self._encode = part, encode
        self._source: Source = open_source(part.settings, Path(part.spool))
        self._anew = part.settings.cache.vae_cache_clear_each_epoch
        self._rows: tuple[int, Rows] = (0, open_rows(part))

    def latents(self, rows: np.ndarray, round_: int, mirrored: list[bool]) -> Tensor:
        if self._anew and self._rows[0] != round_:
            self._rows = (round_, open_rows(self._part, round_))
        planned = self._rows[1]
        pictures = []
        for row, flip in zip(rows.tolist(), mirrored, strict=True):
            picture = decode_row(self._part, planned, row, self._source.read(planned.ids[row].as_py()))
            pictures.append(picture[:, ::-1] if flip else picture)
        with torch.no_grad():
            return self._encode(torch.from_numpy(np.stack(pictures)).float().div_(255)).cpu()


def _said(captions: list[Tensor]) -> Captions:
    return Captions(nn.utils.rnn.pad_sequence(captions, batch_first=True), tuple(map(len, captions)))


def _key_of_prompt(texts: TextCache, prompt: str) -> str:
    """Raises SettingError where it was not embedded."""
    if prompt not in texts.others:
        raise SettingError(
            f"The slider's prompt {prompt!r} was not encoded. Wire the Slider Settings into the config of Cache Text "
            "Embeds, too."
        )
    return texts.others[prompt]


def _objective(settings: ObjectiveSettings, part: LatentPart) -> ObjectiveSettings:
    """With what a dataset has of its own.

    Raises:
        SettingError: the two contradict each other.
    """
    names = ("timestep_sampling_offset", "sigma_min", "sigma_max")
    own = {name: getattr(part.mix, name) for name in names if getattr(part.mix, name) is not None}
    try:
        return replace(settings, **own)
    except SettingError as error:
        raise SettingError(f"Dataset {part.id!r}: {error}") from None


def _pool(examples: Examples, mix: MixSettings, per_step: int) -> Pool:
    buckets = np.unique(examples.shapes, axis=0, return_inverse=True)[1].reshape(-1)
    return Pool(
        buckets=buckets,
        repeats=examples.repeats,
        probability=mix.probability,
        start_epoch=mix.start_epoch,
        end_epoch=mix.end_epoch,
        start_step=mix.start_step * per_step,
        end_step=mix.end_step * per_step,
    )


def _generator(seed: int, sample: int) -> torch.Generator:
    mixed = np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) % 2**63)
