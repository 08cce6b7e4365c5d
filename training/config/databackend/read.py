"""SimpleTuner's ``multidatabackend.json``, read into typed settings."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...errors import SettingError
from ..dataset import (
    CacheSettings,
    CaptionSettings,
    CaptionShuffle,
    DatasetSettings,
    GeometrySettings,
    MixSettings,
    SourceSettings,
    TableSettings,
    TextCacheSettings,
)
from ..json_text import read_json_text
from ..paths import find_path
from .entry import TEXTS, Entry
from .keys import CSV, SIMPLETUNER, STORAGE, Backends

_TABLE_TYPES = {f.name: str(f.type) for f in fields(TableSettings)}


def read_databackend(path: Path, defaults: Mapping[str, Any] | None = None) -> Backends:
    """Reads a file; comments and trailing commas are allowed.

    Args:
        path: the file.
        defaults: the keys of SimpleTuner's ``config.json``, which hold where a dataset says nothing else.

    Raises:
        SettingError: the file cannot be read, or as ``parse_databackend``.
    """
    entries = read_json_text(path, "does not exist; correct data_backend_config.")
    return parse_databackend(entries, str(path), defaults, [Path(), *path.absolute().parents])


def parse_databackend(
    entries: list[dict[str, Any]],
    place: str,
    defaults: Mapping[str, Any] | None = None,
    folders: Sequence[Path] = (Path(),),
) -> Backends:
    """Typed settings from the entries of a ``multidatabackend.json``.

    Args:
        entries: the entries.
        place: where they were found, for sentences.
        defaults: as of ``read_databackend``.
        folders: where a ``caption_filter_list`` that names a file is looked for.

    Raises:
        SettingError: a key is unknown, a value of another type or out of range, an id missing or used twice, or
            nothing is left to train on.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SettingError(f"{place} has to hold a list of datasets: [{{…}}, {{…}}].")
    notes: list[str] = []
    unused: dict[str, None] = {}
    left_out: set[str] = set()
    read = _enabled(entries, place, defaults or {}, unused, left_out, notes)
    named = {entry.peek("image_embeds") for entry in read.values()}
    kinds = {
        name: entry.typed("dataset_type", "str", "image_embeds" if name in named and entry.is_bare() else "image")
        for name, entry in read.items()
    }
    of_kind = {kind: {name: read[name] for name in read if kinds[name] == kind} for kind in {*kinds.values()}}
    text_cache = _text_cache(of_kind.pop("text_embeds", {}), place, folders, notes)
    cache_dirs = {
        name: entry.typed("cache_dir_vae", "str", entry.typed("cache_dir", "str", ""))
        for name, entry in of_kind.pop("image_embeds", {}).items()
    }
    datasets: list[DatasetSettings] = []
    origins: dict[str, str] = {}  # the entries of datasets
    masked: dict[str, str] = {}  # the masks of a dataset, where the masks tell it
    for name, entry in read.items():
        if kinds[name] == "conditioning_image_embeds" or (
            kinds[name] == "conditioning" and entry.peek("conditioning_type") != "mask"
        ):
            left_out.add(name)
            notes.append(
                f'"{name}" is left out: Lumina2 has no ControlNet, of all conditioning only masks have an effect '
                '(conditioning_type "mask").'
            )
        elif kinds[name] in of_kind:
            if kinds[name] == "conditioning":
                masked[entry.typed("source_dataset_id", "str", "")] = name
            made = _datasets(name, kinds[name], entry, cache_dirs)
            datasets += made
            origins |= {dataset.id: name for dataset in made}
    names = [dataset.id for dataset in datasets]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f'{place} holds two datasets with the id "{name}"; rename one of them.')
    if not any(dataset.mix.dataset_type == "image" for dataset in datasets):
        raise SettingError(f"{place} holds no dataset of pictures to train on; add or enable one.")
    for number, dataset in enumerate(datasets):
        masks = masked.get(origins[dataset.id], "")
        datasets[number] = _with_masks(dataset, masks, names, left_out, place, notes)
    if unused:
        notes.append(f"No effect here: {', '.join(unused)}.")
    return Backends(tuple(datasets), text_cache, tuple(notes))


def _enabled(
    entries: list[dict[str, Any]],
    place: str,
    defaults: Mapping[str, Any],
    unused: dict[str, None],
    left_out: set[str],
    notes: list[str],
) -> dict[str, Entry]:
    """The entries by id, but for those that are disabled."""
    read: dict[str, Entry] = {}
    for number, values in enumerate(entries, 1):
        name = values.get("id")
        if not isinstance(name, str) or not name.strip():
            raise SettingError(f'{place}, dataset {number}, has no id; add "id": "a name of its own".')
        if name in read or name in left_out:
            raise SettingError(f'{place} holds two datasets with the id "{name}"; rename one of them.')
        entry = Entry(values, f'{place}, dataset "{name}"', defaults, unused)
        entry.take("id")
        if any([entry.typed("disabled", "bool", False), entry.typed("disable", "bool", False)]):
            left_out.add(name)
            notes.append(f'"{name}" is disabled and left out.')
        else:
            entry.fill_in(notes)
            read[name] = entry
    return read


def _datasets(id: str, kind: str, entry: Entry, cache_dirs: Mapping[str, str]) -> list[DatasetSettings]:
    """The datasets of an entry: one for each resolution, unless it holds masks, which follow their pictures."""
    resolutions = entry.take("resolution")
    several = resolutions if isinstance(resolutions, list) else [resolutions]
    if not several:
        raise SettingError(f"{entry.where}: resolution is []; a number, or a list of numbers, is wanted.")
    if entry.peek("crop_style") == "face":
        raise SettingError(f'{entry.where}: crop_style is "face", which is not offered; use center, corner or random.')
    source = _source(entry)
    shuffle = entry.block("caption_shuffle")
    captions = entry.group(
        CaptionSettings,
        SIMPLETUNER,
        caption_shuffle=shuffle.group(CaptionShuffle, {"seed": entry.training_seed()}),
    )
    shuffle.finish()
    geometry = {
        f.name: entry.typed(f.name, str(f.type), SIMPLETUNER.get(f.name, f.default))
        for f in fields(GeometrySettings)
        if f.name != "resolution"
    }
    random = geometry["crop"] and "random" in (geometry["crop_style"], geometry["crop_aspect"])
    cache = entry.group(CacheSettings, {"vae_cache_clear_each_epoch": random})
    store = entry.typed("image_embeds", "str", "")
    if store and store not in cache_dirs:
        raise SettingError(
            f'{entry.where}: image_embeds is "{store}", but no enabled entry of dataset_type image_embeds has it.'
        )
    if store and not cache.cache_dir_vae:
        cache = replace(cache, cache_dir_vae=cache_dirs[store])
    masks = entry.take("conditioning_data")
    mix = entry.group(
        MixSettings,
        {"is_regularisation_data": entry.typed("is_regularization_data", "bool", False)},
        dataset_type=kind,
        conditioning_data=_only_mask(entry, masks),
    )
    entry.finish()
    made = []
    for resolution in several[:1] if kind == "conditioning" else several:
        name = id if len(several) == 1 or kind == "conditioning" else f"{id}-{resolution}"
        sized = Entry({"resolution": resolution}, entry.where, {}, {})
        made.append(DatasetSettings(name, source, sized.group(GeometrySettings, {}, **geometry), captions, mix, cache))
    return made


def _only_mask(entry: Entry, masks: Any) -> str:
    ids = [masks] if isinstance(masks, str) else masks or []
    if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
        raise SettingError(f"{entry.where}: conditioning_data is {masks!r}; the id of a dataset of masks is wanted.")
    if len(ids) > 1:
        raise SettingError(f"{entry.where}: conditioning_data names {len(ids)} datasets; keep one, that of the masks.")
    return ids[0] if ids else ""


def _with_masks(
    dataset: DatasetSettings,
    masks: str,
    ids: Sequence[str],
    left_out: set[str],
    place: str,
    notes: list[str],
) -> DatasetSettings:
    """The dataset with the masks that it names, else with those that name it."""
    name = dataset.mix.conditioning_data or masks
    if name in left_out:
        notes.append(f'"{dataset.id}" is trained without "{name}", which is left out.')
        name = ""
    elif name and name not in ids:
        near = difflib.get_close_matches(name, ids, 1)
        remedy = f'did you mean "{near[0]}"?' if near else "add it, or take conditioning_data out."
        raise SettingError(
            f'{place}, dataset "{dataset.id}": there is no dataset "{name}" for conditioning_data; {remedy}'
        )
    return replace(dataset, mix=replace(dataset.mix, conditioning_data=name))


def _source(entry: Entry) -> SourceSettings:
    kind = entry.typed("type", "str", "local")
    block = entry.block("huggingface")
    conditions = block.typed("filter_func", "Mapping[str, object]", {})
    csv = kind == "csv" or any(entry.holds(name) for name in CSV)
    parquet = entry.block("parquet") if entry.holds("parquet") else None
    if csv and parquet:
        raise SettingError(f"{entry.where} names a csv file and a parquet block; keep one of them.")
    if kind == "huggingface":
        columns = entry.typed("caption_column", TEXTS, TableSettings.caption_column)
        table = block.group(TableSettings, {"caption_column": columns})
    elif csv:
        named = {
            name: entry.typed(key, _TABLE_TYPES[name], SIMPLETUNER.get(key, getattr(TableSettings, name)))
            for key, name in CSV.items()
        }
        table = TableSettings(**named)
    elif parquet:
        table = parquet.group(TableSettings, SIMPLETUNER)
        parquet.finish()
    else:
        table = TableSettings()
    block.finish()
    return entry.group(SourceSettings, {}, type=kind, table=table, filter_func=conditions)


def _text_cache(
    entries: Mapping[str, Entry], place: str, folders: Sequence[Path], notes: list[str]
) -> TextCacheSettings:
    caches = {}
    default = []
    for name, entry in entries.items():
        if entry.typed("default", "bool", False):
            default.append(name)
        filters = _filter_list(entry, folders)
        if entry.peek("type") not in (None, "local", "memory"):
            notes.append(f'"{name}": captions are kept on this machine, whatever type is.')
        caches[name] = entry.group(TextCacheSettings, {}, caption_filter_list=filters)
        for key in STORAGE:
            entry.ignore(key)
        entry.finish()
    if len(default) > 1 or (len(caches) > 1 and not default):
        raise SettingError(
            f'{place}: of the text_embeds {", ".join(caches)}, {len(default) or "none"} have "default": true; '
            "give it to exactly one."
        )
    if not caches:
        return TextCacheSettings()
    chosen = default[0] if default else next(iter(caches))
    notes += [f'"{name}" is left out: all captions are kept in "{chosen}".' for name in caches if name != chosen]
    return caches[chosen]


def _filter_list(entry: Entry, folders: Sequence[Path]) -> tuple[str, ...]:
    """The entries of ``caption_filter_list``: a list, or the path of a text file (one a line) or JSON file."""
    value = entry.take("caption_filter_list")
    if isinstance(value, str) and value.endswith((".txt", ".json")):
        path = Path(find_path(value, folders))
        try:
            text = path.read_text(encoding="utf-8-sig")
            value = json.loads(text) if path.suffix == ".json" else text.splitlines()
        except (OSError, ValueError) as error:
            raise SettingError(f"{entry.where}: caption_filter_list {path} cannot be read ({error}).") from None
    return tuple(Entry({"caption_filter_list": value}, entry.where, {}, {}).typed("caption_filter_list", TEXTS, ()))
