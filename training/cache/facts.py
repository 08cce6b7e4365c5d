"""What may be told of the data that something was trained on: never where it lies."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

from .latents import LatentCache
from .texts import TextCache


@dataclass(frozen=True)
class DatasetFacts:
    """One dataset."""

    id: str
    pictures: int
    repeats: int = 0
    regularisation: bool = False
    sizes: tuple[str, ...] = ()  # "1024×1024", the most frequent first


def dataset_facts(latents: LatentCache) -> tuple[DatasetFacts, ...]:
    """The datasets behind a cache."""
    rows = latents.rows()
    facts = []
    for number, part in enumerate(latents.parts):
        mine = rows.part == number
        shapes, counts = np.unique(rows.shape[mine][:, 1:] * 8, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        facts.append(
            DatasetFacts(
                part.id,
                int(mine.sum()),
                part.mix.repeats,
                part.mix.is_regularisation_data,
                tuple(f"{shapes[n][1]}×{shapes[n][0]}" for n in order[:6]),
            )
        )
    return tuple(facts)


def file_metadata(latents: LatentCache, texts: TextCache) -> dict[str, str]:
    """What a trained file says of its data, in the field's own keys; a file's repeats count its first pass too."""
    facts = dataset_facts(latents)
    drawn = [each for each, part in zip(facts, latents.parts, strict=True) if part.mix.dataset_type == "image"]
    taught, kept = ([each for each in drawn if each.regularisation == regular] for regular in (False, True))
    folders = {each.id: {"n_repeats": each.repeats + 1, "img_count": each.pictures} for each in taught}
    metadata = {
        "ss_num_train_images": str(sum((each.repeats + 1) * each.pictures for each in taught)),
        "ss_num_reg_images": str(sum((each.repeats + 1) * each.pictures for each in kept)),
        "ss_dataset_dirs": json.dumps(folders),
        "lumina2_trainer.datasets": json.dumps([asdict(each) for each in facts]),
    }
    if sizes := [size for each in taught for size in each.sizes]:
        metadata["modelspec.resolution"] = sizes[0].replace("×", "x")
    if texts.triggers:
        metadata["modelspec.trigger_phrase"] = ", ".join(texts.triggers)
    return metadata
