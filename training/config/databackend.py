"""SimpleTuner's ``multidatabackend.json``: read into typed settings, and written back."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import SettingError
from .dataset import (
    CacheSettings,
    CaptionSettings,
    CaptionShuffle,
    DatasetSettings,
    GeometrySettings,
    MixSettings,
    SourceSettings,
    TableSettings,
)

Group = TypeVar("Group")

# What a key that is absent from an imported file means to SimpleTuner, where that is not our own default.
_SIMPLETUNER: dict[str, Any] = {
    "caption_strategy": "filename",
    "crop": False,
    "crop_aspect": "square",
    "csv_url_column": "url",
    "identifier_includes_extension": False,  # of a parquet block
}
_NO_EFFECT_HERE = """
metadata_backend metadata_update_interval skip_file_discovery preserve_data_backend_cache vae_cache_scan_behaviour
hash_filenames compress_cache vae_cache_ondemand text_cache_ondemand override_dataset_config num_proc csv_cache_dir
disable_after_epoch_step delete_unwanted_images delete_problematic_images delete_nsfw_images train_batch_size
text_embeds conditioning video audio grounding s2v_datasets slider_strength
conditioning_image_embeds cache_dir_conditioning_image_embeds conditioning_image_embed_batch_size disable_validation
composite_image_config bbox_column memory_filesystem_path memory_filesystem_size memory_filesystem_sudo cache_dir
"""
# Keys that SimpleTuner also knows for the whole training: its config.json may tell what a dataset leaves out.
_TOLD_GLOBALLY = """
resolution resolution_type minimum_image_size maximum_image_size target_downsample_size aspect_bucket_alignment
aspect_bucket_rounding caption_strategy instance_prompt prepend_instance_prompt only_instance_prompt vae_batch_size
write_batch_size vae_cache_disable vae_cache_clear_each_epoch aws_max_pool_connections text_encoder_batch_size
text_cache_disable
"""
_NO_EFFECT, _GLOBAL = frozenset(_NO_EFFECT_HERE.split()), frozenset(_TOLD_GLOBALLY.split())
# Written even where they are the default, so that no global key takes their place.
_ALWAYS = _GLOBAL - {"instance_prompt", "aws_max_pool_connections"} | {"crop", "crop_aspect", "crop_style"}
_SECRETS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
_CSV = {"csv_file": "path", "csv_caption_column": "caption_column", "csv_url_column": "filename_column"}
_CSV |= {f"csv_{f.name}": f.name for f in fields(TableSettings) if f.name not in _CSV.values()}
_TABLE_TYPES = {f.name: str(f.type) for f in fields(TableSettings)}
_BY_HAND = ("id", "type", "dataset_type", "filter_func", "crop_aspect_buckets", "caption_filter_list")  # when written
_STORAGE = ("type", *(f.name for f in fields(SourceSettings) if f.name.startswith("aws_")))


@dataclass(frozen=True)
class TextCacheSettings:
    """How text embeddings are made and kept."""

    cache_dir: str = ""  # empty: the common one
    write_batch_size: int = 128
    text_encoder_batch_size: int = 1
    text_cache_disable: bool = False  # encoded when needed, nothing written
    caption_filter_list: tuple[str, ...] = ()  # of every dataset, before a dataset's own

    def __post_init__(self) -> None:
        for name in ("write_batch_size", "text_encoder_batch_size"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; choose at least 1.")


@dataclass(frozen=True)
class Backends:
    """What a ``multidatabackend.json`` says."""

    datasets: tuple[DatasetSettings, ...]
    text_cache: TextCacheSettings = TextCacheSettings()
    notes: tuple[str, ...] = ()  # sentences on what was left out or has no effect


# Reading


def read_databackend(path: Path, defaults: Mapping[str, Any] | None = None) -> Backends:
    """Reads a file; comments and trailing commas are allowed.

    Args:
        path: the file.
        defaults: the keys of SimpleTuner's ``config.json``, which hold where a dataset says nothing else.

    Raises:
        SettingError: the file cannot be read, or as ``parse_databackend``.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SettingError(f"{path} does not exist; correct data_backend_config.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} cannot be read ({error}); it has to be a JSON file in UTF-8.") from None
    try:
        entries = json.loads(plain_json(text))
    except json.JSONDecodeError as error:
        raise SettingError(f"{path}, line {error.lineno}, is not JSON ({error.msg}); correct it there.") from None
    return parse_databackend(entries, str(path), defaults, [Path(), *path.absolute().parents])


_STRING = r'"(?:[^"\\\n]|\\.)*"'
_COMMENT = re.compile(rf"({_STRING})|//[^\n]*|#[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"({_STRING})|,(?=\s*[\]}}])", re.DOTALL)


def plain_json(text: str) -> str:
    """JSON without the comments (``//``, ``#``, ``/* */``) and trailing commas; its lines keep their numbers."""
    text = _COMMENT.sub(lambda match: match[1] or " " + "\n" * match[0].count("\n"), text)
    return _TRAILING_COMMA.sub(lambda match: match[1] or "", text)


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
) -> dict[str, _Entry]:
    """The entries by id, but for those that are disabled."""
    read: dict[str, _Entry] = {}
    for number, values in enumerate(entries, 1):
        name = values.get("id")
        if not isinstance(name, str) or not name.strip():
            raise SettingError(f'{place}, dataset {number}, has no id; add "id": "a name of its own".')
        if name in read or name in left_out:
            raise SettingError(f'{place} holds two datasets with the id "{name}"; rename one of them.')
        entry = _Entry(values, f'{place}, dataset "{name}"', defaults, unused)
        entry.take("id")
        if any([entry.typed("disabled", "bool", False), entry.typed("disable", "bool", False)]):
            left_out.add(name)
            notes.append(f'"{name}" is disabled and left out.')
        else:
            entry.fill_in(notes)
            read[name] = entry
    return read


class _Entry:
    """The keys of one entry, or of a block inside it; each is taken once and what is left at the end is unknown."""

    def __init__(
        self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any], unused: dict[str, None]
    ) -> None:
        self.where = where
        self._values = {key: value for key, value in values.items() if value is not None}
        self._defaults = defaults
        self._unused = unused
        self._known: set[str] = set()

    def fill_in(self, notes: list[str]) -> None:
        """Forgets secrets and replaces ``{env:NAME}`` in every text."""
        for name in _SECRETS:
            value = self._values.pop(name, "")
            if value and value != f"{{env:{name.upper()}}}":
                notes.append(f"{self.where}: {name} is taken from the environment only: set {name.upper()}.")
        self._values = self._filled(self._values)

    def _filled(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._filled(each) for key, each in value.items()}
        if isinstance(value, list):
            return [self._filled(each) for each in value]
        return re.sub(r"\{env:([^}]*)\}", self._variable, value) if isinstance(value, str) else value

    def _variable(self, match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise SettingError(
                f"{self.where}: the environment variable {match[1]} is not set; set it, or write the value itself "
                f"instead of {match[0]}."
            )
        return os.environ[match[1]]

    def peek(self, name: str) -> Any:
        value = self._values.get(name)
        return value if isinstance(value, str) else None

    def is_bare(self) -> bool:
        """It names nothing to read pictures from."""
        return not {"instance_data_dir", "dataset_name", "csv_file", "aws_bucket_name"}.intersection(self._values)

    def holds(self, name: str) -> bool:
        return name in self._values

    def ignore(self, name: str) -> None:
        self._known.add(name)
        self._values.pop(name, None)

    def take(self, name: str) -> Any:
        """The value as it stands in the file or in the defaults; None where it is in neither."""
        self._known.add(name)
        value = self._values.pop(name, None)
        return self._defaults.get(name) if value is None and name in _GLOBAL else value

    def typed(self, name: str, kind: str, default: Any) -> Any:
        """The value as ``kind``, which is the annotation of a field; ``default`` where there is none."""
        value = self.take(name)
        if value is None:
            return default
        wanted, convert = _KINDS[kind]
        try:
            return convert(value)
        except (KeyError, ValueError, TypeError, OverflowError):
            raise SettingError(f"{self.where}: {name} is {value!r}; {wanted} is wanted.") from None

    def training_seed(self) -> int:
        return int(_Entry(self._defaults, "config.json", {}, {}).typed("seed", "int", 0))

    def block(self, name: str) -> _Entry:
        values = self.take(name) or {}
        if not isinstance(values, dict):
            raise SettingError(f"{self.where}: {name} is {values!r}; a block {{…}} of settings is wanted.")
        return _Entry(values, f"{self.where}, {name}", {}, self._unused)

    def group(self, cls: type[Group], others: Mapping[str, Any], **values: Any) -> Group:
        """A group of settings: ``values`` as they are, its other fields from the keys of their names."""
        for f in fields(cls):  # type: ignore[arg-type]
            if f.name not in values:
                default = None if f.default is MISSING else f.default
                values[f.name] = self.typed(f.name, str(f.type), others.get(f.name, default))
        return self.make(cls, values)

    def make(self, cls: type[Group], values: Mapping[str, Any]) -> Group:
        try:
            return cls(**values)
        except SettingError as error:
            raise SettingError(f"{self.where}: {error}") from None

    def finish(self) -> None:
        """Notes what has no effect.

        Raises:
            SettingError: a key is left that nobody knows.
        """
        for name in self._values:
            if name not in _NO_EFFECT:
                near = difflib.get_close_matches(name, sorted(self._known | _NO_EFFECT), 1)
                remedy = f'did you mean "{near[0]}"?' if near else "take it out."
                raise SettingError(f'{self.where}: there is no setting "{name}"; {remedy}')
            self._unused[name] = None


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[str(value).strip().lower()]


def _number(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _whole(value: Any) -> int:
    number = _number(value)
    if not number.is_integer():
        raise ValueError
    return int(value) if isinstance(value, (int, str)) and str(value).strip().lstrip("+-").isdigit() else int(number)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _texts(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise TypeError
    return tuple(text for text in map(_text, texts) if text)


def _aspects(value: Any) -> tuple[tuple[float, float], ...]:
    if not isinstance(value, list):
        raise TypeError
    weighted = [each if isinstance(each, dict) else {"aspect": each} for each in value]
    if any(set(each) - {"aspect", "aspect_ratio", "weight"} for each in weighted):
        raise ValueError
    # SimpleTuner names the aspect one way in one place and another way in another.
    return tuple(
        (_number(each.get("aspect", each.get("aspect_ratio"))), _number(each.get("weight", 1))) for each in weighted
    )


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return value


_TEXTS = "tuple[str, ...]"
# By the annotations of the fields.
_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bool": ("true or false", _boolean),
    "int": ("a whole number", _whole),
    "float": ("a number", _number),
    "float | None": ("a number", _number),
    "str": ("a text", _text),
    _TEXTS: ("a text or a list of texts", _texts),
    "tuple[tuple[float, float], ...]": ('a list of aspects such as 0.75 or {"aspect": 0.75, "weight": 0.5}', _aspects),
    "Mapping[str, object]": ("a block {…} of conditions", _mapping),
}


def _datasets(id: str, kind: str, entry: _Entry, cache_dirs: Mapping[str, str]) -> list[DatasetSettings]:
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
        _SIMPLETUNER,
        caption_shuffle=shuffle.group(CaptionShuffle, {"seed": entry.training_seed()}),
    )
    shuffle.finish()
    geometry = {
        f.name: entry.typed(f.name, str(f.type), _SIMPLETUNER.get(f.name, f.default))
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
        sized = _Entry({"resolution": resolution}, entry.where, {}, {})
        made.append(DatasetSettings(name, source, sized.group(GeometrySettings, {}, **geometry), captions, mix, cache))
    return made


def _only_mask(entry: _Entry, masks: Any) -> str:
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


def _source(entry: _Entry) -> SourceSettings:
    kind = entry.typed("type", "str", "local")
    block = entry.block("huggingface")
    conditions = block.typed("filter_func", "Mapping[str, object]", {})
    csv = kind == "csv" or any(entry.holds(name) for name in _CSV)
    parquet = entry.block("parquet") if entry.holds("parquet") else None
    if csv and parquet:
        raise SettingError(f"{entry.where} names a csv file and a parquet block; keep one of them.")
    if kind == "huggingface":
        columns = entry.typed("caption_column", _TEXTS, TableSettings.caption_column)
        table = block.group(TableSettings, {"caption_column": columns})
    elif csv:
        named = {
            name: entry.typed(key, _TABLE_TYPES[name], _SIMPLETUNER.get(key, getattr(TableSettings, name)))
            for key, name in _CSV.items()
        }
        table = TableSettings(**named)
    elif parquet:
        table = parquet.group(TableSettings, _SIMPLETUNER)
        parquet.finish()
    else:
        table = TableSettings()
    block.finish()
    return entry.group(SourceSettings, {}, type=kind, table=table, filter_func=conditions)


def _text_cache(
    entries: Mapping[str, _Entry], place: str, folders: Sequence[Path], notes: list[str]
) -> TextCacheSettings:
    caches = {}
    default = []
    for name, entry in entries.items():
        if entry.typed("default", "bool", False):
            default.append(name)
        filters = _filter_list(entry, folders)
        caches[name] = entry.group(TextCacheSettings, {}, caption_filter_list=filters)
        for key in _STORAGE:
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


def _filter_list(entry: _Entry, folders: Sequence[Path]) -> tuple[str, ...]:
    """The entries of ``caption_filter_list``: a list, or the path of a text file (one a line) or JSON file."""
    value = entry.take("caption_filter_list")
    if isinstance(value, str) and value.endswith((".txt", ".json")):
        path = Path(find_path(value, folders))
        try:
            text = path.read_text(encoding="utf-8-sig")
            value = json.loads(text) if path.suffix == ".json" else text.splitlines()
        except (OSError, ValueError) as error:
            raise SettingError(f"{entry.where}: caption_filter_list {path} cannot be read ({error}).") from None
    return tuple(_Entry({"caption_filter_list": value}, entry.where, {}, {}).typed("caption_filter_list", _TEXTS, ()))


# Writing


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
    entry |= _differing(source, {}, _ALWAYS)
    if source.type == "aws":
        entry |= {name: f"{{env:{name.upper()}}}" for name in _SECRETS[:2]}
    entry |= _table(source, captions.caption_strategy)
    entry |= _differing(geometry, _SIMPLETUNER, _ALWAYS)
    if geometry.crop_aspect_buckets:
        weighted = any(weight != 1 for _, weight in geometry.crop_aspect_buckets)
        entry["crop_aspect_buckets"] = [
            {"aspect": aspect, "weight": weight} if weighted else aspect
            for aspect, weight in geometry.crop_aspect_buckets
        ]
    entry |= _differing(captions, _SIMPLETUNER, _ALWAYS)
    if captions.caption_shuffle != CaptionShuffle():
        entry["caption_shuffle"] = _differing(captions.caption_shuffle, {}, frozenset({"enable", "seed"}))
    if captions.caption_filter_list:
        entry["caption_filter_list"] = list(captions.caption_filter_list)
    entry |= _differing(dataset.mix, {}, frozenset())
    return entry | _differing(dataset.cache, {"vae_cache_clear_each_epoch": random}, _ALWAYS)


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
        return {key: columns[name] for key, name in _CSV.items() if name in columns}
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
            str(f.type) in _KINDS
            and f.name not in _BY_HAND
            and (f.name in always or value != others.get(f.name, f.default))
        ):
            told[f.name] = _plain(value)
    return told


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Folders


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
    place = find_path(cache_dir, folders)
    if cache_dir and folders and not Path(place).is_absolute() and not Path(place).exists():
        place = str(folders[0] / place)
    return replace(settings, source=found, cache=replace(settings.cache, cache_dir_vae=place))


def find_path(written: str, folders: Sequence[Path]) -> str:
    """The first of ``folders`` that has ``written``, as one path; ``written`` where it is absolute or in none."""
    if not written or "://" in written:
        return written
    path = Path(written).expanduser()
    if path.is_absolute():
        return str(path)
    return next((str(folder / path) for folder in folders if (folder / path).exists()), written)
