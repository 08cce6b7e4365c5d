"""Where the files and folders lie that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .databackend.keys import Backends
from .dataset import DatasetSettings


def find_path(written: str, folders: Sequence[Path]) -> str:
    """The first of ``folders`` that has ``written``, as one path; ``written`` where it is absolute or in none."""
    if not written or "://" in written:
        return written
    path = Path(written).expanduser()
    if path.is_absolute():
        return str(path)
    return next((str(folder / path) for folder in folders if (folder / path).exists()), written)


def find_place(written: str, folders: Sequence[Path]) -> str:
    """``find_path`` of a folder that will be made in the first of ``folders`` where none has it."""
    found = find_path(written, folders)
    if not found or not folders or Path(found).is_absolute() or Path(found).exists():
        return found
    return str(folders[0] / found)


def resolve(settings: DatasetSettings, folders: Sequence[Path]) -> DatasetSettings:
    """The settings with paths looked for in ``folders``, in their order.

    What is read (pictures, tables, a local Hugging Face folder) stays as written where no folder has it, so that the
    sentence about it says what the user wrote. A cache that does not exist yet will be made in the first folder.
    """
    source, cache_dir = settings.source, settings.cache.cache_dir_vae
    found = replace(
        source,
        table=replace(source.table, path=find_path(source.table.path, folders)),
        instance_data_dir=find_path(source.instance_data_dir, folders),
        dataset_name=find_path(source.dataset_name, folders),
    )
    place = find_place(cache_dir, folders)
    return replace(settings, source=found, cache=replace(settings.cache, cache_dir_vae=place))


def placed(backends: Backends, folders: Sequence[Path], data: Mapping[str, Any]) -> Backends:
    """As they are used: with paths as they were found, and each dataset with the filters of all.

    Args:
        data: of a ``Config``; its cache folders hold where the file names none.
    """
    shared, filters = backends.text_cache, backends.text_cache.caption_filter_list
    datasets = []
    for settings in backends.datasets:
        captions = replace(settings.captions, caption_filter_list=filters + settings.captions.caption_filter_list)
        place = settings.cache.cache_dir_vae or data.get("cache_dir_vae", "")
        cache = replace(settings.cache, cache_dir_vae=place)
        datasets.append(resolve(replace(settings, captions=captions, cache=cache), folders))
    texts = find_place(shared.cache_dir, folders) or data.get("cache_dir_text", "")
    return replace(backends, datasets=tuple(datasets), text_cache=replace(shared, cache_dir=texts))
