"""Captions, and perhaps sizes, from a parquet, JSONL or csv file that names the pictures of another source."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.dataset import TableSettings
from ...errors import DataError, SettingError
from . import Found, Source
from .local import stamp_at


@dataclass(frozen=True)
class Table:
    """The columns of a table that were asked for; ``value(column, row)`` reads one cell."""

    count: int
    value: Callable[[str, int], object]
    place: Callable[[int], str]  # "row 3" or "line 4" of a row's number


class WithTable:
    """The pictures of a source with what a table says of them.

    A row fits a picture whose path under the source, or else whose bare name, stands in the filename column.
    ``identifier_includes_extension`` says which is looked for first, the name with its extension or without.
    """

    def __init__(self, inner: Source, settings: TableSettings, folder: Path) -> None:
        if not settings.path:
            raise SettingError('path is ""; write where the table of captions lies (.parquet, .jsonl or .csv).')
        self._inner = inner
        self._settings = settings
        self._folder = folder
        self._path = folder / settings.path
        self.name = f"{inner.name} with {settings.path}"
        self.identity: tuple[str, ...] = (*inner.identity, "table", os.path.abspath(self._path))

    def find(self, on_found: Callable[[int], None] = lambda count: None) -> Iterator[Found]:
        settings = self._settings
        table = open_table(self._path, columns_of(settings))
        rows = self._rows_by_name(table)
        for found in self._inner.find(on_found):
            row = next((rows[key] for key in self._keys(found.id) if key in rows), None)
            if row is None:
                yield found._replace(captions=(), caption_stamp=0)
                continue
            texts = captions_of(lambda column, row=row: table.value(column, row), settings)  # type: ignore[misc]
            found = found._replace(captions=texts, caption_stamp=text_stamp(texts))
            if settings.width_column and settings.height_column:
                width_px, height_px = (
                    pixels(table.value(column, row)) for column in (settings.width_column, settings.height_column)
                )
                if width_px and height_px:
                    found = found._replace(width_px=width_px, height_px=height_px)
            yield found

    def read(self, picture_id: str) -> bytes:
        return self._inner.read(picture_id)

    def head(self, picture_id: str) -> bytes:
        return self._inner.head(picture_id)

    def text(self, picture_id: str) -> bytes | None:
        return self._inner.text(picture_id)

    def fingerprint(self) -> str:
        parts = (self._inner.fingerprint(), stamp_at(str(self._path)), self._settings)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _rows_by_name(self, table: Table) -> dict[str, int]:
        column = self._settings.filename_column
        root = os.path.abspath(self._folder).replace("\\", "/") + "/"
        rows: dict[str, int] = {}
        for row in range(table.count):
            value = table.value(column, row)
            if value is None or value == "":
                raise DataError(
                    f"{self._path}, {table.place(row)}: the column {column} is empty. Name a picture there."
                )
            name = str(value).replace("\\", "/").removeprefix("./").removeprefix(root)
            first = rows.setdefault(name, row)
            if first != row:
                raise DataError(
                    f"{self._path} names {name} twice ({table.place(first)} and {table.place(row)}). "
                    "Keep one of them; a list of captions is written as a list in one row."
                )
        return rows

    def _keys(self, picture_id: str) -> tuple[str, ...]:
        bare = picture_id.rpartition("/")[2]
        whole, stems = (picture_id, bare), (os.path.splitext(picture_id)[0], os.path.splitext(bare)[0])
        return (*whole, *stems) if self._settings.identifier_includes_extension else (*stems, *whole)


def columns_of(settings: TableSettings) -> tuple[str, ...]:
    """The columns that settings name, each once."""
    names = (
        settings.filename_column,
        *settings.caption_column,
        settings.fallback_caption_column,
        settings.width_column,
        settings.height_column,
    )
    return tuple(dict.fromkeys(name for name in names if name))


def captions_of(value: Callable[[str], object], settings: TableSettings) -> tuple[str, ...]:
    """Captions of a row: those of all caption columns, or of the fallback column where they are empty."""
    texts = tuple(text for column in settings.caption_column for text in texts_of(value(column)))
    if not texts and settings.fallback_caption_column:
        texts = texts_of(value(settings.fallback_caption_column))
    return texts


def texts_of(value: object) -> tuple[str, ...]:
    """The texts of a cell: a list holds several; None and blanks are none."""
    if isinstance(value, (list, tuple)):
        return tuple(text for item in value for text in texts_of(item))
    if value is None or value != value:  # NaN is how some tools write an empty cell
        return ()
    text = str(value).strip()
    return (text,) if text else ()


def text_stamp(texts: Iterable[str]) -> int:
    """Captions as one number that changes when they do; 0 for none."""
    joined = "\0".join(texts).encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big") >> 1 if joined else 0


def pixels(value: object) -> int:
    """A cell as a size in pixels; 0 where it is none."""
    try:
        return max(int(float(value)), 0)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return 0


def reach(value: object, path: Sequence[str]) -> object:
    """The value that a path of keys leads to in nested mappings; None where it breaks off."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def split_column(column: str, names: Iterable[str]) -> tuple[str, list[str]]:
    """A column and the keys within it: "meta.text" is a column of that name, or else ``text`` in ``meta``."""
    if column in names:
        return column, []
    top, *path = column.split(".")
    return top, path


def check_columns(what: str, columns: Iterable[str], names: Sequence[str]) -> None:
    """Raises DataError where a column is not there."""
    missing = [column for column in columns if split_column(column, names)[0] not in names]
    if missing:
        there = ", ".join(names) or "none"
        raise DataError(f"{what} has no column {', '.join(missing)}. Choose among those that it has: {there}.")


def open_table(path: Path, columns: Sequence[str]) -> Table:
    """Read some columns of a parquet, JSONL or csv file.

    Raises:
        DataError: the file or a column is missing, or a line cannot be read.
    """
    if not path.exists():
        raise DataError(f"The table {path} does not exist. Check its path; it is taken from the dataset's folder.")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json", ".ndjson"):
        return _open_json_lines(path, columns)
    if suffix in (".csv", ".tsv"):
        return open_csv(path, columns)
    return _open_parquet(path, columns)


def _open_parquet(path: Path, columns: Sequence[str]) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise SettingError("Parquet files need the package pyarrow. Install it: pip install pyarrow") from None
    try:
        names = parquet.read_schema(path).names
        check_columns(f"The table {path}", columns, names)
        places = {column: split_column(column, names) for column in columns}
        cells = parquet.read_table(path, columns=sorted({top for top, _ in places.values()})).combine_chunks()
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, "parquet", error) from error

    def value(column: str, row: int) -> object:
        top, keys = places[column]
        return reach(cells.column(top)[row].as_py(), keys)

    return Table(cells.num_rows, value, lambda row: f"row {row + 1}")


def _open_json_lines(path: Path, columns: Sequence[str]) -> Table:
    cells: dict[str, list[object]] = {column: [] for column in columns}
    lines: list[int] = []
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = _json_object(path, number, line)
                seen.update(row)
                lines.append(number)
                for column in columns:
                    top, keys = split_column(column, row)
                    cells[column].append(reach(row.get(top), keys))
    except OSError as error:
        raise _damaged(path, "JSONL", error) from error
    check_columns(f"The table {path}", columns, sorted(seen))
    return Table(len(lines), lambda column, row: cells[column][row], lambda row: f"line {lines[row]}")


def _json_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise DataError(f"{path}, line {number} is not JSON ({error}). Mend it, or take it out.") from None
    if not isinstance(row, dict):
        raise DataError(f'{path}, line {number} is not an object. Write one per line: {{"filename": "a.png", …}}')
    return row


def open_csv(path: Path, columns: Sequence[str]) -> Table:
    """Read some columns of a csv file (comma, or tab in a .tsv) whose first line names them."""
    cells: dict[str, list[str]] = {column: [] for column in columns}
    lines: list[int] = []
    start = 1
    csv.field_size_limit(16 * 2**20)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            names = next(reader, [])
            check_columns(f"The table {path}", columns, names)
            places = {column: names.index(split_column(column, names)[0]) for column in columns}
            start = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(names):
                    raise DataError(
                        f"{path}, line {start} has {len(row)} values, the first line names {len(names)} columns. "
                        'Put text that holds a comma in "quotation marks".'
                    )
                if row:
                    lines.append(start)
                    for column, place in places.items():
                        cells[column].append(row[place])
                start = reader.line_num + 1
    except UnicodeDecodeError:
        raise DataError(f"{path}, line {_undecodable_line(path)} is not UTF-8. Save the table as UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {start} is not csv ({error}). Mend it, or take it out.") from error
    except OSError as error:
        raise _damaged(path, "csv", error) from error
    return Table(len(lines), lambda column, row: cells[column][row], lambda row: f"line {lines[row]}")


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        return next(number for number, line in enumerate(file, 1) if "\ufffd" in line.decode(errors="replace"))


def _damaged(path: Path, kind: str, error: Exception) -> DataError:
    reason = str(error).partition("\n")[0]
    return DataError(f"The table {path} cannot be read as {kind} ({reason}). Check that the file is whole.")
