"""A csv file whose rows name pictures, wherever they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ...config.dataset import TableSettings
from ...errors import DataError
from . import Found
from .local import (
    FINGERPRINT_FILES,
    HEAD_BYTES,
    REPORT_EVERY,
    no_pictures,
    read_picture,
    read_text_beside,
    stamp_at,
)
from .table import Table, captions_of, columns_of, open_csv, pixels, text_stamp


class CsvRows:
    """The pictures that a csv file names, by paths from its own folder or absolute ones.

    Captions of a picture that stands in several rows are its variants. Without caption columns the ``.txt`` beside a
    picture tells them. A picture that is not there is listed with the stamp 0: whoever reads it reports it.
    """

    def __init__(self, path: Path, settings: TableSettings) -> None:
        self._path = path
        self._root = os.path.abspath(path.parent)
        self._settings = settings
        self.name = str(path)
        self.identity: tuple[str, ...] = ("csv", os.path.abspath(path))

    def find(self, on_found: Callable[[int], None] = lambda count: None) -> Iterator[Found]:
        table = self._open()
        rows = self._rows_by_id(table)
        if not rows:
            raise no_pictures(f"The table {self.name}")
        gone = 0
        for count, picture_id in enumerate(sorted(rows), 1):
            path, own = self._file(picture_id), rows[picture_id]
            stamp = stamp_at(path)
            gone += not stamp
            if count % REPORT_EVERY == 0:
                on_found(count)
            if gone == len(rows):
                raise DataError(
                    f"None of the {gone} pictures that {self.name} names is there (such as {table.place(own[0])}, "
                    f"{path}). Paths are taken from the folder of the csv file: {self._root}."
                )
            yield Found(picture_id, stamp, *self._captions(table, own, path), *self._size(table, own[0]))
        on_found(len(rows))

    def read(self, picture_id: str) -> bytes:
        return read_picture(self._file(picture_id))

    def head(self, picture_id: str) -> bytes:
        return read_picture(self._file(picture_id), HEAD_BYTES)

    def text(self, picture_id: str) -> bytes | None:
        return read_text_beside(self._file(picture_id))

    def fingerprint(self) -> str:
        """The csv file's size and time, and those of the pictures and texts where they are not very many."""
        digest = hashlib.sha256(repr((stamp_at(str(self._path)), self._settings)).encode())
        rows = self._rows_by_id(self._open())
        for picture_id in sorted(rows) if len(rows) <= FINGERPRINT_FILES else ():
            path = self._file(picture_id)
            digest.update(f"{picture_id}\0{stamp_at(path)}\0{self._text_stamp(path)}\0".encode())
        return digest.hexdigest()

    def _open(self) -> Table:
        if not self._path.is_file():
            raise DataError(f"The csv file {self.name} does not exist. Choose the file that names your pictures.")
        return open_csv(self._path, columns_of(self._settings))

    def _rows_by_id(self, table: Table) -> dict[str, list[int]]:
        column = self._settings.filename_column
        rows: dict[str, list[int]] = {}
        for row in range(table.count):
            name = str(table.value(column, row)).strip()
            if not name or "\0" in name:
                raise DataError(f"{self.name}, {table.place(row)} names no picture in its column {column}. Mend it.")
            if "://" in name:
                raise DataError(
                    f"{self.name}, {table.place(row)} names an address ({name.partition('?')[0]}). "
                    "Download the pictures first and write their paths."
                )
            rows.setdefault(self._id(name), []).append(row)
        return rows

    def _id(self, name: str) -> str:
        """A path from the csv's folder where it lies in there, else an absolute one, with forward slashes."""
        path = os.path.normpath(os.path.join(self._root, name))
        inside = path.removeprefix(self._root.rstrip(os.sep) + os.sep)
        return inside.replace(os.sep, "/")

    def _file(self, picture_id: str) -> str:
        return os.path.join(self._root, picture_id)

    def _captions(self, table: Table, rows: list[int], path: str) -> tuple[int, tuple[str, ...] | None]:
        if not self._settings.caption_column:
            return self._text_stamp(path), None
        texts: dict[str, None] = {}
        for row in rows:
            texts |= dict.fromkeys(captions_of(lambda column, row=row: table.value(column, row), self._settings))  # type: ignore[misc]
        return text_stamp(texts), tuple(texts)

    def _text_stamp(self, path: str) -> int:
        return 0 if self._settings.caption_column else stamp_at(os.path.splitext(path)[0] + ".txt")

    def _size(self, table: Table, row: int) -> tuple[int, int]:
        columns = (self._settings.width_column, self._settings.height_column)
        width_px, height_px = (pixels(table.value(column, row)) if column else 0 for column in columns)
        return (width_px, height_px) if width_px and height_px else (0, 0)
