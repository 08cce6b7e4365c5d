"""Masks: how much each place of a picture counts in the loss, as entries beside its latents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dataset import Dataset, Part, Rows, open_rows, record_contents
from ..data.pictures import decode
from ..data.sources.opening import open_source
from ..errors import DataError, SettingError
from .store import Catalog, Writer, key_of

NAMED = 20


def masks_of(dataset: Dataset, part: Part) -> Part | None:
    """The dataset that holds the masks of a part; None where it has none.

    Raises:
        SettingError: it names masks that are not there, or is encoded while training.
    """
    name = part.settings.mix.conditioning_data
    if not name:
        return None
    found = next((other for other in dataset.parts if other.settings.id == name), None)
    if found is None or found.settings.mix.dataset_type != "conditioning":
        raise SettingError(
            f"Dataset {part.settings.id!r} takes its masks from {name!r} (conditioning_data), which is no dataset of "
            "masks here. Wire the dataset of masks in too, or take conditioning_data out."
        )
    cache = part.settings.cache
    if cache.vae_cache_disable or cache.vae_cache_clear_each_epoch:
        raise SettingError(
            f"Dataset {part.settings.id!r} has masks, which are cached with its latents: switch vae_cache_disable "
            "and vae_cache_clear_each_epoch off."
        )
    return found


def cache_masks(
    rows: Rows, shapes: np.ndarray, masks: Part, catalog: Catalog, write_batch_size: int
) -> tuple[list[str], list[str]]:
    """The key of each picture's mask, empty where it has none, and a sentence for each that cannot be used.

    A mask belongs to the picture of the same name, whatever they end with, and is scaled and cropped as it is. Its
    red channel says how much a place counts: averaged over each place of the latent, kept in 8 bits as (1, h, w).

    Args:
        rows: the pictures.
        shapes: (N, 3) channels, height and width of their latents; 0 where there is none.
        catalog: where the entries go.
    """
    found = open_rows(masks)
    contents = found.contents.to_pylist()
    by_name = {_stem(id): place for place, id in enumerate(found.ids.to_pylist())}
    ids = rows.ids.to_pylist()
    places = [by_name.get(_stem(id), -1) if shapes[row, 0] else -1 for row, id in enumerate(ids)]
    source = open_source(masks.settings, Path(masks.spool))
    plan = rows.plan

    def key(row: int, content: str) -> str:
        g = plan.geometry(row)
        cut = [g.scaled_width_px, g.scaled_height_px, g.left_px, g.top_px, g.width_px, g.height_px]
        return key_of(mask=content, cut=cut, size=shapes[row, 1:].tolist())

    def made(row: int) -> tuple[str, str, Tensor | None, str]:
        place = places[row]
        id = found.ids[place].as_py()
        try:
            data = source.read(id)
            content = hashlib.sha256(data).hexdigest()
            name = key(row, content)
            if name in catalog:
                return content, name, None, ""
            _same_aspect(rows.sizes[row], found.sizes[place], id)
            pixels = decode(data, id, plan.geometry(row), "black")[..., 0]
        except DataError as error:
            return "", "", None, str(error)
        size = tuple(shapes[row, 1:].tolist())
        mean = F.adaptive_avg_pool2d(torch.from_numpy(pixels).float()[None, None], size)
        return content, name, mean[0].round().to(torch.uint8), ""

    keys = ["" if place < 0 or not contents[place] else key(row, contents[place]) for row, place in enumerate(places)]
    there = catalog.find(keys) >= 0 if keys else np.zeros(0, bool)
    waiting = [row for row, place in enumerate(places) if place >= 0 and not there[row]]
    problems: list[str] = []
    known: dict[int, str] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, Writer(catalog, write_batch_size) as writer:
        for start in range(0, len(waiting), 4 * write_batch_size):
            part = waiting[start : start + 4 * write_batch_size]
            for row, (content, name, mask, problem) in zip(part, pool.map(made, part), strict=True):
                keys[row] = name
                if problem:
                    problems.append(problem)
                    continue
                known[places[row]] = content
                if mask is not None:
                    writer.add(name, mask)
    record_contents(masks, found, known)
    without = [rows.ids[row].as_py() for row, place in enumerate(places) if place < 0 and shapes[row, 0]]
    if without:
        problems.append(f"{len(without)} pictures have no mask and count everywhere (first: {without[0]})")
    return keys, problems[:NAMED]


def _stem(id: str) -> str:
    return PurePosixPath(id).with_suffix("").as_posix()


def _same_aspect(picture: Sequence[int], mask: Sequence[int], id: str) -> None:
    if abs(picture[0] * mask[1] - picture[1] * mask[0]) > 0.02 * picture[1] * mask[0]:
        raise DataError(
            f"The mask {id} is {mask[0]} × {mask[1]} px and its picture {picture[0]} × {picture[1]}: another shape. "
            "Make them alike."
        )
