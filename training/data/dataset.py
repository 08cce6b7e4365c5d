"""A dataset: which pictures, cut how, said what. A handle of paths and numbers, never of pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DataError, SettingError
from .captions import STRATEGIES, read_captions
from .geometry import CROPS, Geometry, plan_crop
from .pictures import picture_size
from .source import find_pictures, repeats_of


@dataclass(frozen=True)
class Sample:
    """One picture of a dataset. ``id`` joins what the caches hold of it; it is no part of any key."""

    id: str
    path: str
    content: str  # hash of the file's bytes
    geometry: Geometry
    captions: tuple[str, ...]
    repeats: int  # extra passes in an epoch


@dataclass(frozen=True)
class Dataset:
    """Samples of one or more folders, and what was left out."""

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...] = ()  # a sentence for each picture that cannot be used
    parts: int = 1


def load_dataset(
    folder: Path,
    resolution: int,
    crop: str = "preserve",
    caption_strategy: str = "textfile",
    instance_prompt: str = "",
    repeats: int = 0,
    on_picture: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Read sizes, captions and content hashes of a folder; pictures that cannot be read are skipped and named.

    Args:
        resolution: the side in pixels of a square of the area that is trained on.
        on_picture: called with (done, total) before each picture; what it raises ends the reading.

    Raises:
        DataError: no such folder, no usable picture, or captions are missing.
        SettingError: a setting is out of range.
    """
    if crop not in CROPS:
        raise SettingError(f"crop is {crop!r}; choose one of {', '.join(CROPS)}.")
    if caption_strategy not in STRATEGIES:
        raise SettingError(f"caption_strategy is {caption_strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    pictures = find_pictures(folder)
    captions = read_captions(pictures, caption_strategy, instance_prompt, folder)
    samples, skipped = [], []
    for number, (path, variants) in enumerate(zip(pictures, captions, strict=True)):
        on_picture(number, len(pictures))
        try:
            width_px, height_px = picture_size(path)
        except DataError as error:
            skipped.append(str(error))
            continue
        samples.append(
            Sample(
                id=path.relative_to(folder).as_posix(),
                path=str(path),
                content=hashlib.sha256(path.read_bytes()).hexdigest(),
                geometry=plan_crop(width_px, height_px, resolution, crop),
                captions=variants,
                repeats=repeats_of(path, folder, repeats),
            )
        )
    if not samples:
        raise DataError(f"None of the {len(pictures)} pictures in {folder} can be read. The first: {skipped[0]}")
    return Dataset(tuple(samples), tuple(skipped))


def append(first: Dataset, second: Dataset) -> Dataset:
    """Both together; ids are told apart by the number of the part."""
    renamed = tuple(replace(sample, id=f"{first.parts + 1}:{sample.id}") for sample in second.samples)
    return Dataset(first.samples + renamed, first.skipped + second.skipped, first.parts + 1)
