"""Rows of a dataset of the ``datasets`` library: a local folder or one from the hub."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ...config.dataset import SourceSettings, TableSettings
from ...errors import DataError, SettingError
from ...files import atomic_path, write_text
from . import EXTENSIONS, Found
from .local import REPORT_EVERY, LocalFolder, no_pictures, read_picture, stamp_at
from .table import captions_of, check_columns, columns_of, pixels, reach, split_column, text_stamp

_FILTERS = ("collection", "quality_thresholds", "quality_column", "min_width", "min_height")


class HuggingFaceRows:
    """Pictures of a dataset in the ``datasets`` library, read without decoding them while they are listed.

    A picture's id is its row's number ("00000012.jpg"), whatever its format. Its stamp is that of its file where rows
    name files, as with an image folder; else it comes from the dataset's own fingerprint, so that any change of the
    dataset changes all stamps.

    With ``streaming`` rows pass by once and cannot be fetched again one by one. So ``find`` writes each picture into
    ``spool``, named by its content, and at the end a list of them: as long as the dataset's fingerprint stays, that
    list is read and nothing streams again. A stream that breaks off starts anew. What changes at the hub under the same
    ``revision`` is not noticed.

    ``filtered`` counts, after ``find``, the rows that ``filter_func`` left out.
    """

    def __init__(self, settings: SourceSettings, spool: Path) -> None:
        self._settings = settings
        self._table = settings.table
        self._spool = spool
        self._lock = threading.Lock()
        self._opened: _Rows | None = None
        self._streamed: list[Found] = []
        self._spooled: dict[str, str] | None = None
        self.filtered = 0
        self.name = settings.instance_data_dir or settings.dataset_name
        if not self.name:
            raise SettingError('dataset_name is ""; write a dataset of the hub, such as "user/pictures", or a folder.')
        self._folder = Path(self.name) if settings.instance_data_dir or os.path.isdir(self.name) else None
        where = os.path.abspath(self._folder) if self._folder else self.name
        self.identity: tuple[str, ...] = (
            "huggingface",
            where,
            settings.dataset_config,
            settings.split,
            settings.revision,
        )
        self._passes = row_filter(settings.filter_func, self._table)
        told = columns_of(replace(self._table, filename_column=""))  # rows need no name
        self._columns = (*told, *filter_columns(settings.filter_func))

    def find(self, on_found: Callable[[int], None] = lambda count: None) -> Iterator[Found]:
        self.filtered = count = 0
        for found in self._find_streamed(on_found) if self._settings.streaming else self._find_rows():
            count += 1
            if not count % REPORT_EVERY:
                on_found(count)
            yield found
        if not count:
            left_out = f" after filter_func left out {self.filtered}" if self.filtered else ""
            raise no_pictures(f"The dataset {self.name}{left_out}")
        on_found(count)

    def read(self, picture_id: str) -> bytes:
        if self._settings.streaming:
            return read_picture(self._spooled_path(picture_id))
        row = int(picture_id.partition(".")[0])
        rows = self._rows()
        if row >= len(rows.pictures):
            raise DataError(f"The dataset {self.name} has no row {row} any more. Start again without it.")
        cell = rows.pictures[row][self._settings.image_column]
        return picture_bytes(cell, f"{self.name}, row {row}", self._folder)

    def head(self, picture_id: str) -> bytes:
        return self.read(picture_id)

    def text(self, picture_id: str) -> bytes | None:
        return None

    def fingerprint(self) -> str:
        """Of a folder its files' names, sizes and times; else the dataset's own, which may ask the hub."""
        digest = hashlib.sha256(repr((self.identity, self._table, self._settings.filter_func)).encode())
        if self._folder:
            digest.update(folder_stamp(self._folder).encode())
        elif not self._settings.streaming:
            digest.update(self._rows().fingerprint.encode())
        return digest.hexdigest()

    def _rows(self) -> _Rows:
        with self._lock:
            if self._opened is None:
                dataset = self._load()
                self._check(dataset.column_names)
                dataset = self._undecoded(dataset).with_format(None)
                image = self._settings.image_column
                columns = sorted(self._top_columns(dataset.column_names) - {image})
                self._opened = _Rows(
                    dataset.select_columns([image]), dataset.select_columns(columns), dataset._fingerprint
                )
            return self._opened

    def _find_rows(self) -> Iterator[Found]:
        rows = self._rows()
        paths = iter(_paths(rows.pictures, self._settings.image_column))
        names = rows.texts.column_names
        for start in range(0, len(rows.pictures), REPORT_EVERY):
            batch = rows.texts[start : start + REPORT_EVERY] if names else {}
            for offset in range(min(REPORT_EVERY, len(rows.pictures) - start)):
                number = start + offset
                path = next(paths)
                row = {name: batch[name][offset] for name in names}
                if not self._passes(row):
                    self.filtered += 1
                    continue
                stamp = stamp_at(_local_path(path, self._folder)) if path else 0
                yield self._found(number, stamp or _stamp(rows.fingerprint, number), row)

    def _find_streamed(self, on_found: Callable[[int], None] = lambda count: None) -> Iterator[Found]:
        fingerprint = self.fingerprint()
        if not self._read_listing(fingerprint):
            self._stream(fingerprint, on_found)
            self._read_listing(fingerprint)
        return iter(self._streamed)

    def _read_listing(self, fingerprint: str) -> bool:
        """Take over what an earlier ``find`` streamed; False where that is of another state, or not whole."""
        try:
            with self._listing().open(encoding="utf-8") as lines:
                head = json.loads(next(lines))
                if head["fingerprint"] != fingerprint:
                    return False
                rows = [json.loads(line) for line in lines]
        except (FileNotFoundError, StopIteration, ValueError):
            return False
        if not all((self._spool / row["file"]).exists() for row in rows):
            return False
        found = [Found(**row["found"]) for row in rows]
        self._streamed = [f if f.captions is None else f._replace(captions=tuple(f.captions)) for f in found]
        self._spooled = {f.id: row["file"] for f, row in zip(found, rows, strict=True)}
        self.filtered = head["filtered"]
        return True

    def _stream(self, fingerprint: str, on_found: Callable[[int], None]) -> None:
        """Let all rows pass by once, and keep their pictures."""
        filtered = 0
        rows: list[str] = []
        for number, row in enumerate(self._streamed_rows(self._load())):
            if not self._passes(row):
                filtered += 1
                continue
            content = picture_bytes(row[self._settings.image_column], f"{self.name}, row {number}", self._folder)
            digest = hashlib.sha256(content).hexdigest()
            file = f"{digest[:2]}/{digest[:40]}"
            if not (self._spool / file).exists():
                with atomic_path(self._spool / file) as temporary:
                    temporary.write_bytes(content)
            rows.append(json.dumps({"found": self._found(number, int(digest[:15], 16), row)._asdict(), "file": file}))
            if not len(rows) % REPORT_EVERY:
                on_found(len(rows))
        write_text(self._listing(), "\n".join((json.dumps({"fingerprint": fingerprint, "filtered": filtered}), *rows)))

    def _streamed_rows(self, dataset: Any) -> Iterator[Mapping[str, Any]]:
        try:
            if dataset.column_names is not None:
                dataset = self._undecoded(dataset)
            for number, row in enumerate(dataset):
                if number == 0:
                    self._check(list(row))
                yield row
        except DataError:
            raise
        except Exception as error:  # each file system and format has errors of its own
            raise self._unreadable(error) from error

    def _found(self, number: int, stamp: int, row: Mapping[str, Any]) -> Found:
        texts = captions_of(_cells(row), self._table) if self._table.caption_column else None
        width_px, height_px = _size(row, self._table)
        return Found(f"{number:08d}.jpg", stamp, text_stamp(texts or ()), texts, width_px, height_px)

    def _spooled_path(self, picture_id: str) -> str:
        with self._lock:
            if self._spooled is None:  # the pictures were listed by an earlier process
                self._find_streamed()
            file = (self._spooled or {}).get(picture_id)
        if file is None:
            raise DataError(f"The dataset {self.name} holds no picture {picture_id} any more. Start again without it.")
        return str(self._spool / file)

    def _listing(self) -> Path:
        return self._spool / f"{hashlib.sha256(repr(self.identity).encode()).hexdigest()[:40]}.jsonl"

    def _top_columns(self, names: Iterable[str]) -> set[str]:
        names = list(names)
        return {split_column(column, names)[0] for column in self._columns}

    def _check(self, names: list[str]) -> None:
        check_columns(f"The dataset {self.name}", (self._settings.image_column, *self._columns), names)

    def _undecoded(self, dataset: Any) -> Any:
        from datasets import Image

        image = self._settings.image_column
        is_image = isinstance((dataset.features or {}).get(image), Image)
        return dataset.cast_column(image, Image(decode=False)) if is_image else dataset

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise SettingError(
                "The source huggingface needs the package datasets. Install it: pip install datasets"
            ) from None
        settings = self._settings
        try:
            if self._folder and any((self._folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                return self._saved(datasets)
            if self._folder and not self._folder.is_dir():
                raise DataError(f"The folder {self.name} does not exist. Choose the folder of the dataset.")
            return datasets.load_dataset(
                str(self._folder or self.name),
                settings.dataset_config or None,
                split=settings.split,
                revision=None if self._folder else settings.revision or None,
                streaming=settings.streaming,
            )
        except DataError:
            raise
        except Exception as error:  # the library's errors are many, and have no common class
            raise self._unreadable(error) from error

    def _saved(self, datasets: Any) -> Any:
        """What ``save_to_disk`` wrote: one split or several."""
        dataset = datasets.load_from_disk(str(self._folder))
        if isinstance(dataset, datasets.DatasetDict):
            if self._settings.split not in dataset:
                raise DataError(
                    f"The dataset {self.name} has no split {self._settings.split}. Choose among {', '.join(dataset)}."
                )
            dataset = dataset[self._settings.split]
        dataset = dataset.flatten_indices() if dataset._indices is not None else dataset
        return dataset.to_iterable_dataset() if self._settings.streaming else dataset

    def _unreadable(self, error: Exception) -> DataError:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if self._folder:
            return DataError(
                f"The dataset {self.name} cannot be read ({reason}). Check the folder, dataset_config and split."
            )
        return DataError(
            f"The dataset {self.name} cannot be loaded from the hub ({reason}). Check its name, revision, split and "
            "the connection; for a private or gated one log in with `hf auth login` or set HF_TOKEN."
        )


class _Rows(NamedTuple):
    pictures: Any  # datasets.Dataset with the image column, undecoded
    texts: Any  # datasets.Dataset with the columns that are read while listing
    fingerprint: str


def row_filter(filter_func: Mapping[str, Any], table: TableSettings) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a row passes ``filter_func``: least sizes, least qualities, and a collection that it belongs to.

    Raises:
        SettingError: a key is unknown, or one that it needs is missing.
    """
    unknown = [key for key in filter_func if key not in _FILTERS]
    if unknown:
        raise SettingError(f"filter_func has {unknown[0]!r}; choose among {', '.join(_FILTERS)}.")
    sizes = [
        (column, filter_func[key])
        for key, column in (("min_width", table.width_column), ("min_height", table.height_column))
        if filter_func.get(key)
    ]
    if any(not column for column, _ in sizes):
        raise SettingError("filter_func asks for a least size; name width_column and height_column too.")
    thresholds, quality = filter_func.get("quality_thresholds"), filter_func.get("quality_column")
    if thresholds and not quality:
        raise SettingError("filter_func has quality_thresholds; name quality_column too.")
    least = thresholds if isinstance(thresholds, Mapping) else {"": thresholds} if thresholds else {}
    collections = filter_func.get("collection") or ()
    collections = (collections,) if isinstance(collections, str) else tuple(collections)

    def passes(row: Mapping[str, Any]) -> bool:
        value = _cells(row)
        if any(pixels(value(column)) < minimum for column, minimum in sizes):
            return False
        for key, minimum in least.items():
            score = reach(value(str(quality)), [key] if key else [])
            if not isinstance(score, (int, float)) or score < minimum:
                return False
        return not collections or value("collection") in collections

    return passes


def filter_columns(filter_func: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that ``filter_func`` reads, but for those of sizes."""
    quality = (str(filter_func["quality_column"]),) if filter_func.get("quality_thresholds") else ()
    return (*quality, "collection") if filter_func.get("collection") else quality


def picture_bytes(cell: Any, place: str, folder: Path | None) -> bytes:
    """A picture's file from an undecoded cell: its bytes, or the path they lie at."""
    if isinstance(cell, (bytes, bytearray)):
        return bytes(cell)
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (None, cell)
    if content is not None:
        return bytes(content)
    if not isinstance(path, str) or not path:
        raise DataError(f"{place} holds no picture but {type(cell).__name__}. Check image_column.")
    if "://" not in path:
        return read_picture(_local_path(path, folder))
    from datasets.utils.file_utils import xopen

    try:
        with xopen(path, "rb") as file:
            return bytes(file.read())
    except Exception as error:  # a file in an archive, or at the hub: each kind has errors of its own
        raise DataError(
            f"{place} cannot be read ({type(error).__name__}). Check the connection and the disk."
        ) from error


def folder_stamp(folder: Path) -> str:
    """Changes when a file of a dataset's folder does: pictures and texts, tables and archives."""
    digest = hashlib.sha256()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and not name.lower().endswith((*EXTENSIONS, ".txt")):
                path = os.path.join(parent, name)
                digest.update(f"{os.path.relpath(path, folder)}\0{stamp_at(path)}\0".encode(errors="replace"))
    return digest.hexdigest() + LocalFolder(folder).fingerprint()


def _cells(row: Mapping[str, Any]) -> Callable[[str], object]:
    def value(column: str) -> object:
        top, keys = split_column(column, row)
        return reach(row.get(top), keys)

    return value


def _size(row: Mapping[str, Any], table: TableSettings) -> tuple[int, int]:
    value = _cells(row)
    width_px, height_px = (pixels(value(c)) if c else 0 for c in (table.width_column, table.height_column))
    return (width_px, height_px) if width_px and height_px else (0, 0)


def _stamp(fingerprint: str, number: int) -> int:
    return text_stamp((fingerprint, str(number)))


def _local_path(path: str, folder: Path | None) -> str:
    return os.path.join(folder, path) if folder else path


def _paths(pictures: Any, column: str) -> Iterator[str]:
    """Where each row's picture lies; "" where the row itself holds it. Reads no picture."""
    import pyarrow
    from pyarrow import compute

    for cells in pictures.data.column(column).chunks:
        if pyarrow.types.is_struct(cells.type):
            paths, contents = compute.struct_field(cells, "path"), compute.struct_field(cells, "bytes")
            embedded = compute.is_valid(contents).to_pylist()
            yield from ("" if inside else path or "" for path, inside in zip(paths.to_pylist(), embedded, strict=True))
        elif pyarrow.types.is_string(cells.type) or pyarrow.types.is_large_string(cells.type):
            yield from (path or "" for path in cells.to_pylist())
        else:
            yield from ("" for _ in range(len(cells)))
