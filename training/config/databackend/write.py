"""Typed settings of datasets, written as a ``multidatabackend.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..dataset import CaptionShuffle, DatasetSettings, SourceSettings, TableSettings
from .entry import KINDS
from .keys import ALWAYS, CSV, SECRETS, SIMPLETUNER, Backends

_BY_HAND = ("id", "type", "dataset_type", "filter_func", "crop_aspect_buckets", "caption_filter_list")


def write_databackend(backends: Backends) -> list[dict[str, Any]]:
    """The entries of a ``multidatabackend.json`` that says the same; keys that only we know stay out where unset."""
    entries = [_written(dataset) for dataset in backends.datasets]
    ids = [entry["id"] for entry in entries]
    cache: dict[str, Any] = {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True}
    while cache["id"] in ids:
        cache["id"] += "-cache"
    cache |= _differing(backends.text_cache, {}, frozenset({"write_batch_size"}))
    if backends.text_cache.caption_filter_list:  # as a list: a lone text would be the path of a file
        cache["caption_filter_list"] = list(backends.text_cache.caption_filter_list)
    return [*entries, cache]


def _written(dataset: DatasetSettings) -> dict[str, Any]:
    source, geometry, captions = dataset.source, dataset.geometry, dataset.captions
    random = geometry.crop and "random" in (geometry.crop_style, geometry.crop_aspect)
    entry: dict[str, Any] = {"id": dataset.id, "type": source.type, "dataset_type": dataset.mix.dataset_type}
    entry |= _differing(source, {}, ALWAYS)
    if source.type == "aws":
        entry |= {name: f"{{env:{name.upper()}}}" for name in SECRETS[:2]}
    entry |= _table(source, captions.caption_strategy)
    entry |= _differing(geometry, SIMPLETUNER, ALWAYS)
    if geometry.crop_aspect_buckets:
        weighted = any(weight != 1 for _, weight in geometry.crop_aspect_buckets)
        entry["crop_aspect_buckets"] = [
            {"aspect": aspect, "weight": weight} if weighted else aspect
            for aspect, weight in geometry.crop_aspect_buckets
        ]
    entry |= _differing(captions, SIMPLETUNER, ALWAYS)
    if captions.caption_shuffle != CaptionShuffle():
        entry["caption_shuffle"] = _differing(captions.caption_shuffle, {}, frozenset({"enable", "seed"}))
    if captions.caption_filter_list:
        entry["caption_filter_list"] = list(captions.caption_filter_list)
    entry |= _differing(dataset.mix, {}, frozenset())
    return entry | _differing(dataset.cache, {"vae_cache_clear_each_epoch": random}, ALWAYS)


def _table(source: SourceSettings, strategy: str) -> dict[str, Any]:
    table = source.table
    if source.type == "huggingface":
        block = _differing(replace(table, caption_column=TableSettings.caption_column), {}, frozenset())
        if source.filter_func:
            block["filter_func"] = dict(source.filter_func)
        return {"caption_column": _plain(table.caption_column)} | ({"huggingface": block} if block else {})
    if source.type == "csv" or strategy == "csv" or table.path.lower().endswith(".csv"):
        asked = frozenset({"path", "caption_column", "filename_column"})
        columns = _differing(table, {}, asked)
        return {key: columns[name] for key, name in CSV.items() if name in columns}
    if table == TableSettings():
        return {}
    always = frozenset({"path", "filename_column", "caption_column", "identifier_includes_extension"})
    return {"parquet": _differing(table, {}, always)}


def _differing(group: Any, others: Mapping[str, Any], always: frozenset[str]) -> dict[str, Any]:
    """The plain fields of a group that are not what their absence would mean, and those that are always told."""
    told = {}
    for f in fields(group):
        value = getattr(group, f.name)
        if (
            str(f.type) in KINDS
            and f.name not in _BY_HAND
            and (f.name in always or value != others.get(f.name, f.default))
        ):
            told[f.name] = _plain(value)
    return told


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
