"""Pictures to latents, once each."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config.dataset import MixSettings
from ..data.dataset import Dataset, Part, Rows, decode_row, open_rows, record_contents
from ..data.index import Progress
from ..data.sources import Source
from ..data.sources.opening import open_source
from ..errors import CacheError, DataError
from .manifest import read_manifest, write_manifest
from .masks import cache_masks, masks_of
from .store import KEY_LENGTH, Catalog, Store, Writer

Encode = Callable[[Tensor], Tensor]  # pictures (B, height, width, 3) in [0, 1] -> latents (B, C, h, w)

DECODERS = min(8, os.cpu_count() or 1)
BURST, BURST_BYTES = 16, 2**28  # batches, and memory at most, that are decoded before any is encoded
RECORD_EVERY_S = 30.0
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class LatentPart:
    """The latents of one dataset: where they are, and how it is mixed with the others."""

    id: str
    store: Store
    mix: MixSettings
    caption_dropout: float | None = None  # None: the training's own
    flips: bool = False  # half of the draws are mirrored
    online: Part | None = None  # encoded while training: no entry is there


@dataclass(frozen=True)
class LatentCache:
    """What the latents socket carries: a list of keys on disk. The latents are the VAE's own, not scaled."""

    manifest: str
    parts: tuple[LatentPart, ...]
    count: int
    skipped: tuple[str, ...] = field(default=(), compare=False)

    def rows(self) -> LatentRows:
        table = read_manifest(Path(self.manifest))
        shapes = np.stack([table[name].to_numpy() for name in ("channels", "height", "width")], axis=1)
        return LatentRows(
            part=table["part"].to_numpy(),
            id=table["id"].to_numpy(zero_copy_only=False),
            key=_fixed(table["key"]),
            flipped=_fixed(table["flipped"]),
            mask=_fixed(table["mask"]) if "mask" in table.column_names else np.full(len(table), b"", f"S{KEY_LENGTH}"),
            shape=shapes,
            repeats=table["repeats"].to_numpy(),
            row=table["row"].to_numpy(),
        )


class LatentRows(NamedTuple):
    """One row a picture, in columns."""

    part: np.ndarray
    id: np.ndarray  # of the picture in its dataset
    key: np.ndarray  # S40; empty where it is encoded while training
    flipped: np.ndarray  # S40: the mirrored picture's, empty where it is not shown
    mask: np.ndarray  # S40: what counts of the picture, empty where all does
    shape: np.ndarray  # (N, 3) channels, height, width of the latent
    repeats: np.ndarray
    row: np.ndarray  # of the picture among its dataset's rows


def _fixed(column: object) -> np.ndarray:
    return np.array(column.to_pylist(), dtype=f"S{KEY_LENGTH}")  # type: ignore[attr-defined]


class _Job(NamedTuple):
    """One picture to encode, as it is or mirrored."""

    row: int
    flip: bool


class _Decoded(NamedTuple):
    job: _Job
    content: str  # of the file; empty where it cannot be read
    key: str
    pixels: np.ndarray | None  # None: cannot be used, or there is an entry already
    problem: str


def cache_latents(
    dataset: Dataset,
    encode: Encode,
    vae: str,
    store: Store,
    batch_size: int = 0,
    on_batch: Progress = lambda done, total: None,
    channels: int = 16,
    downscale: int = 8,
    shares_cores: bool = False,
) -> LatentCache:
    """Encode what is not in the store yet, batched by size; pictures are decoded ahead by threads.

    A picture is read once: its hash is taken from the bytes that are decoded. An entry that is damaged is encoded
    again; a picture that cannot be read is skipped and named.

    Args:
        vae: the VAE's fingerprint.
        store: where entries go whose dataset names no folder of its own.
        batch_size: pictures encoded at a time; 0: each dataset's own ``vae_batch_size``.
        channels, downscale: of the VAE, for datasets that are encoded while training.
        shares_cores: the VAE computes on the CPU. Then pictures are decoded and encoded in turns: at once, each of the
            VAE's products would wait for the thread whose core is decoding.

    Raises:
        CacheError: no picture of the dataset could be encoded.
        DataError: a picture cannot be read and ``on_bad_image`` is stop.
    """
    lists, parts, skipped = [], [], []
    for number, part in enumerate(dataset.parts):
        settings = part.settings
        place = Store(settings.cache.cache_dir_vae) if settings.cache.cache_dir_vae else store
        rows = open_rows(part)
        masks = masks_of(dataset, part)
        holds_masks = settings.mix.dataset_type == "conditioning"
        online = settings.cache.vae_cache_disable or settings.cache.vae_cache_clear_each_epoch
        masked = [""] * len(rows)
        if holds_masks:
            keys, shapes = [masked, masked], np.zeros((len(rows), 3), int)
        elif online:
            shapes = np.stack([np.full(len(rows), channels), rows.plan.height_px // downscale,
                               rows.plan.width_px // downscale], axis=1)  # fmt: skip
            keys = [[""] * len(rows), [""] * len(rows)]
        else:
            filling = _Filling(part, rows, vae, place.open(), batch_size or settings.cache.vae_batch_size, shares_cores)
            filling.run(encode, on_batch)
            skipped += filling.problems
            keys, shapes = filling.keys, filling.shapes()
            if masks:
                masked, problems = cache_masks(rows, shapes, masks, filling.catalog, settings.cache.write_batch_size)
                skipped += problems
        kept = np.flatnonzero(shapes[:, 0] > 0)
        lists.append(
            {
                "part": np.full(len(kept), number, np.int16),
                "id": rows.ids.take(kept).to_pylist(),
                "key": [keys[0][n] for n in kept],
                "flipped": [keys[1][n] for n in kept],
                "mask": [masked[n] for n in kept],
                "channels": shapes[kept, 0],
                "height": shapes[kept, 1],
                "width": shapes[kept, 2],
                "repeats": rows.repeats[kept],
                "row": kept.astype(np.int32),
            }
        )
        parts.append(
            LatentPart(
                id=settings.id,
                store=place,
                mix=settings.mix,
                caption_dropout=settings.captions.caption_dropout_probability,
                flips=settings.geometry.horizontal_flip,
                online=part if online else None,
            )
        )
    count = sum(len(columns["id"]) for columns in lists)
    if not count:
        raise CacheError(f"Not one picture could be encoded. The first: {(*skipped, *dataset.skipped)[0]}")
    columns = {name: np.concatenate([columns[name] for columns in lists]) for name in lists[0]}
    subject = {"latents": [[p.index, asdict(p.settings.geometry), _filters(p)] for p in dataset.parts], "vae": vae}
    manifests = [write_manifest(Path(folder), subject, columns) for folder in {p.store.folder: 0 for p in parts}]
    return LatentCache(str(manifests[0]), tuple(parts), count, (*dataset.skipped, *skipped))


def _filters(part: Part) -> list[object]:
    return [part.settings.id, part.settings.mix.max_num_samples]


class LatentKeys:
    """Keys of one part's latents: quick, as there may be millions."""

    def __init__(self, part: Part, rows: Rows, vae: str) -> None:
        background = part.settings.geometry.alpha_background
        common = {"vae": vae, "mode": "mean"} | ({"background": background} if background != "white" else {})
        self._common = hashlib.sha256(json.dumps(common, sort_keys=True).encode())
        plan = rows.plan
        columns = (
            plan.scaled_width_px,
            plan.scaled_height_px,
            plan.left_px,
            plan.top_px,
            plan.width_px,
            plan.height_px,
        )
        self._cuts = np.stack(columns, axis=1).astype("<i4")

    def key(self, row: int, flip: bool, content: str) -> str:
        digest = self._common.copy()
        digest.update(content.encode() + self._cuts[row].tobytes() + (b"flip" if flip else b""))
        return digest.hexdigest()[:KEY_LENGTH]


class _Filling:
    """The filling of a store with the latents of one part."""

    def __init__(self, part: Part, rows: Rows, vae: str, catalog: Catalog, batch_size: int, shares_cores: bool) -> None:
        self.part, self.rows, self.catalog, self.batch_size = part, rows, catalog, batch_size
        self._shares_cores = shares_cores
        self.problems: list[str] = list(catalog.damaged)
        self.keys: list[list[str]] = [[""] * len(rows), [""] * len(rows)]  # as it is, and mirrored
        self._naming = LatentKeys(part, rows, vae)
        self._flips = (False, True) if part.settings.geometry.horizontal_flip else (False,)
        self._contents: dict[int, str] = {}  # of rows read just now
        self._recorded = time.monotonic()

    def run(self, encode: Encode, on_batch: Progress) -> None:
        waiting = self._waiting()
        on_batch(0, len(waiting))
        if not waiting:
            return
        source = open_source(self.part.settings, Path(self.part.spool))
        pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="pictures")
        try:
            with Writer(self.catalog, self.part.settings.cache.write_batch_size) as writer:
                read_ahead, ahead = (in_bursts, self._burst(waiting)) if self._shares_cores else (in_order, 3)
                decoded = read_ahead(pool, lambda job: self._decode(source, job), waiting, ahead * self.batch_size)
                self._encode(decoded, len(waiting), encode, writer, on_batch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._record()

    def _burst(self, waiting: list[_Job]) -> int:
        rows = [job.row for job in waiting]
        largest = 3 * int((self.rows.plan.width_px[rows].astype(np.int64) * self.rows.plan.height_px[rows]).max())
        return max(1, min(BURST, BURST_BYTES // (largest * self.batch_size)))

    def shapes(self) -> np.ndarray:
        """(N, 3) of each row's latent, 0 where there is none."""
        places = self.catalog.find(self.keys[0])
        shapes = self.catalog.shapes(places)[:, :3].copy() if len(self.catalog) else np.zeros((len(places), 3), int)
        shapes[places < 0] = 0
        if len(self._flips) > 1:
            shapes[self.catalog.find(self.keys[1]) < 0] = 0
        return shapes

    def _waiting(self) -> list[_Job]:
        """What has no entry yet, or may have none because its content is not known; pictures of a size together."""
        contents = self.rows.contents.to_pylist()
        jobs = []
        for flip in self._flips:
            known = [n for n, content in enumerate(contents) if content]
            for row in known:
                self.keys[flip][row] = self._naming.key(row, flip, contents[row])
            there = self.catalog.find(self.keys[flip]) >= 0
            jobs += [_Job(int(row), flip) for row in np.flatnonzero(~there)]
        plan = self.rows.plan
        return sorted(jobs, key=lambda job: (int(plan.width_px[job.row]), int(plan.height_px[job.row]), job.row))

    def _decode(self, source: Source, job: _Job) -> _Decoded:
        """Runs in a thread."""
        content = key = problem = ""
        pixels = None
        try:
            data = source.read(self.rows.ids[job.row].as_py())
            content = hashlib.sha256(data).hexdigest()
            key = self._naming.key(job.row, job.flip, content)
            if key not in self.catalog:
                pixels = decode_row(self.part, self.rows, job.row, data)
                if job.flip:
                    pixels = pixels[:, ::-1]
        except DataError as error:
            if self.part.settings.cache.on_bad_image == "stop":
                raise
            problem = str(error)
        return _Decoded(job, content, key, pixels, problem)

    def _encode(
        self, decoded: Iterable[_Decoded], total: int, encode: Encode, writer: Writer, on_batch: Progress
    ) -> None:
        batch: list[_Decoded] = []
        pending: set[str] = set()
        done = 0

        def flush() -> None:
            on_batch(done - len(batch), total)
            pictures = torch.from_numpy(np.stack([item.pixels for item in batch])).float().div_(255)  # type: ignore[misc]
            for item, latents in zip(batch, encode(pictures), strict=True):
                writer.add(item.key, latents)
            batch.clear()
            pending.clear()

        for item in decoded:
            if batch and item.pixels is not None and item.pixels.shape != batch[0].pixels.shape:  # type: ignore[union-attr]
                flush()
            done += 1
            if item.problem:
                self.problems.append(item.problem)
                continue
            self.keys[item.job.flip][item.job.row] = item.key
            self._contents[item.job.row] = item.content
            if item.pixels is not None and item.key not in pending and item.key not in self.catalog:
                batch.append(item)
                pending.add(item.key)
            if len(batch) == self.batch_size:
                flush()
                if time.monotonic() - self._recorded > RECORD_EVERY_S:
                    self._record()
        if batch:
            flush()
        on_batch(done, total)

    def _record(self) -> None:
        record_contents(self.part, self.rows, self._contents)
        self._contents.clear()
        self._recorded = time.monotonic()


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[_In], _Out], items: Sequence[_In], ahead: int
) -> Iterator[_Out]:
    """``function`` of each item, in order; at most ``ahead`` are under way or waiting to be taken."""
    running: deque[Future[_Out]] = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) >= ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def in_bursts(
    pool: ThreadPoolExecutor, function: Callable[[_In], _Out], items: Sequence[_In], burst: int
) -> Iterator[_Out]:
    """``function`` of each item, in order; ``burst`` at a time, and none is under way while one is taken."""
    for start in range(0, len(items), burst):
        yield from list(pool.map(function, items[start : start + burst]))
