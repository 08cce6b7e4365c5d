"""The index of a dataset: one parquet file with what is known of each picture without opening it again.

A row is trusted as long as the stamps of its picture and its caption (size and time) stay what they were. What a kill
interrupts goes on from the rows that were written before.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.dataset import CaptionSettings
from ..errors import DataError
from ..files import atomic_path
from .captions import read_caption
from .columns import hash_columns
from .pictures import size_in
from .sources import Found, Source

if TYPE_CHECKING:
    import pyarrow

VERSION = "1"  # of the columns' meaning; another one is read anew
SEGMENT_ROWS = 20_000
CHUNK_ROWS = 64  # that a thread reads at a time
COMMIT_EVERY_S = 10.0  # at least; longer where writing takes long

Progress = Callable[[int, int], None]  # (done, total), now and then; what it raises ends the work


@dataclass(frozen=True)
class Index:
    """Rows sorted by id; the columns are those of ``_schema``."""

    table: pyarrow.Table

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> pyarrow.ChunkedArray:
        return self.table[name]

    def numbers(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()

    def digest(self) -> str:
        """Changes when a picture or caption does; not when a content hash becomes known."""
        names = ["id", "stamp", "caption_stamp", "width_px", "height_px", "captions", "repeats", "problem"]
        return hash_columns(self.table.select(names))[:32]


def index_file(folder: Path, source: Source, captions: CaptionSettings) -> Path:
    """Where the index of a source is kept: one for each way of reading its captions."""
    name, reading = (
        hashlib.sha256(text.encode()).hexdigest()
        for text in (json.dumps(source.identity), _how_captions_are_read(captions))
    )
    return folder / f"{name[:24]}-{reading[:8]}.parquet"


def _newest_sibling(file: Path) -> tuple[Index, Mapping[str, str]] | None:
    """An index of the same pictures with other captions: their sizes and hashes are the same."""
    siblings = file.parent.glob(f"{file.name.split('-')[0]}-*.parquet")
    newest = sorted(siblings, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next(filter(None, map(read_index, newest)), None)


def read_index(file: Path) -> tuple[Index, Mapping[str, str]] | None:
    """The index and its notes; None where there is none of this version, or it is damaged: it is made anew."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file, use_threads=True, memory_map=False)
    except (FileNotFoundError, pyarrow.ArrowInvalid, OSError):
        return None
    notes = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    return (Index(table.replace_schema_metadata()), notes) if notes.get("version") == VERSION else None


def write_index(file: Path, index: Index, notes: Mapping[str, str]) -> None:
    import pyarrow.parquet

    table = index.table.replace_schema_metadata({**notes, "version": VERSION})
    with atomic_path(file) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")


def scan(
    source: Source,
    captions: CaptionSettings,
    file: Path,
    on_progress: Progress = lambda done, total: None,
    stop_on_bad: bool = False,
    threads: int = 4,
) -> Index:
    """List a source and read the headers and captions of what is new or changed.

    A picture that cannot be used keeps its row, whose ``problem`` says why.

    Args:
        stop_on_bad: raise at the first picture or caption that cannot be used.

    Raises:
        DataError: the source cannot be listed, or ``stop_on_bad``.
    """
    import pyarrow

    reading = _how_captions_are_read(captions)
    known = read_index(file) or _newest_sibling(file)
    old = known[0] if known else Index(_schema().empty_table())
    same_captions = bool(known) and known[1].get("captions") == reading  # type: ignore[index]
    found = list(source.find(lambda count: on_progress(0, max(count, 1))))
    segments: list[pyarrow.Table] = []
    committed, cost = time.monotonic(), 0.0
    read_before = old.column("id").combine_chunks()
    notes = {"captions": reading, "source": source.name, "identity": json.dumps(source.identity)}
    changed = len(found) != len(old)

    def written(tables: list[pyarrow.Table]) -> Index:
        return Index(pyarrow.concat_tables(tables or [_schema().empty_table()]))

    with ThreadPoolExecutor(threads, thread_name_prefix="scan") as pool:
        try:
            for start in range(0, len(found), SEGMENT_ROWS):
                part = found[start : start + SEGMENT_ROWS]
                places = pyarrow.compute.index_in(pyarrow.array([f.id for f in part]), value_set=read_before)
                segment, fresh = _segment(
                    part,
                    old,
                    places,
                    same_captions,
                    lambda items: _read(source, captions, items, stop_on_bad),
                    pool,
                    lambda done, at=start: on_progress(at + done, len(found)),  # type: ignore[misc]
                )
                changed = changed or fresh
                segments.append(segment)
                now = time.monotonic()
                if changed and now - committed > max(COMMIT_EVERY_S, 10 * cost):
                    # The rows behind are kept as they were known, so that no earlier work is lost either.
                    write_index(file, written([*segments, _after(old, part[-1].id)]), notes)
                    committed, cost = time.monotonic(), time.monotonic() - now
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            if segments and changed:
                write_index(file, written([*segments, _after(old, segments[-1]["id"][-1].as_py())]), notes)
            raise
    index = written(segments)
    if changed or not same_captions:
        write_index(file, index, notes)
    on_progress(len(found), len(found))
    if stop_on_bad:
        problem = index.column("problem").drop_null()
        if len(problem):
            raise DataError(problem[0].as_py())
    return index


def record_content(file: Path, ids: list[str], stamps: list[int], contents: list[str]) -> None:
    """Write down the content hashes of pictures that were read, where their rows are still the ones that were read."""
    import pyarrow
    import pyarrow.compute

    known = read_index(file)
    if not ids or not known:
        return
    index, notes = known
    places = pyarrow.compute.index_in(index.column("id").combine_chunks(), value_set=pyarrow.array(ids))
    places = places.fill_null(-1).to_numpy(zero_copy_only=False)
    fits = (places >= 0) & (np.array([*stamps, -1])[places] == index.numbers("stamp"))
    new = pyarrow.array([*contents, None]).take(pyarrow.array(np.where(fits, places, len(contents))))
    old = index.column("content").combine_chunks()
    column = pyarrow.compute.if_else(pyarrow.array(fits), new, old)
    at = index.table.schema.get_field_index("content")
    write_index(file, Index(index.table.set_column(at, "content", column)), notes)


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.string()),
            ("stamp", pa.int64()),
            ("caption_stamp", pa.int64()),
            ("width_px", pa.int32()),
            ("height_px", pa.int32()),
            ("captions", pa.list_(pa.string())),
            ("repeats", pa.int32()),  # extra passes by a kohya folder name; -1 where it asks for none
            ("content", pa.string()),  # sha256 of the file, once it was read whole
            ("problem", pa.string()),  # why the picture cannot be used
        ]
    )


def _how_captions_are_read(settings: CaptionSettings) -> str:
    """What of the settings decides the captions as the index keeps them; what is edited later does not."""
    prompts = settings.instance_prompt if settings.caption_strategy == "instanceprompt" else ()
    return json.dumps([settings.caption_strategy, settings.disable_multiline_split, prompts])


def _after(old: Index, id: str) -> pyarrow.Table:
    """The known rows behind an id."""
    import pyarrow
    import pyarrow.compute

    return old.table.filter(pyarrow.compute.greater(old.column("id"), id))


def _segment(
    part: list[Found],
    old: Index,
    places: pyarrow.Array,
    same_captions: bool,
    read: Callable[[list[tuple[Found, Mapping[str, Any] | None]]], list[dict[str, Any]]],
    pool: ThreadPoolExecutor,
    on_done: Callable[[int], None],
) -> tuple[pyarrow.Table, bool]:
    """The rows of some pictures, and whether any of them was read anew."""
    import pyarrow

    rows = places.fill_null(-1).to_numpy(zero_copy_only=False)
    if len(old):
        stamps, captions = old.numbers("stamp"), old.numbers("caption_stamp")
        same_picture = (rows >= 0) & (stamps[rows] == np.array([f.stamp for f in part]))
        same = same_picture & same_captions & (captions[rows] == np.array([f.caption_stamp for f in part]))
    else:
        same_picture = same = np.zeros(len(part), bool)
    if same.all():
        on_done(len(part))
        return old.table.take(pyarrow.array(rows)), False
    known = old.table.take(pyarrow.array(rows[same_picture])).to_pylist()
    before: dict[int, Mapping[str, Any]] = dict(zip(np.flatnonzero(same_picture).tolist(), known, strict=True))
    waiting = [(part[n], before.get(n)) for n in np.flatnonzero(~same).tolist()]
    chunks = [waiting[n : n + CHUNK_ROWS] for n in range(0, len(waiting), CHUNK_ROWS)]
    fresh: list[dict[str, Any]] = []
    for done in pool.map(read, chunks):
        fresh += done
        on_done(len(part) - len(waiting) + len(fresh))
    numbers = iter(fresh)
    table = [before[n] if ok else next(numbers) for n, ok in enumerate(same.tolist())]
    return pyarrow.Table.from_pylist(table, schema=_schema()), True


def _read(
    source: Source,
    settings: CaptionSettings,
    items: list[tuple[Found, Mapping[str, Any] | None]],
    stop_on_bad: bool,
) -> list[dict[str, Any]]:
    """Rows of pictures whose header or caption has to be read; ``before`` is what is known of the same picture."""
    rows = []
    for found, before in items:
        row: dict[str, Any] = {
            "id": found.id,
            "stamp": found.stamp,
            "caption_stamp": found.caption_stamp,
            "width_px": found.width_px,
            "height_px": found.height_px,
            "captions": [],
            "repeats": -1 if found.repeats is None else found.repeats,
            "content": before["content"] if before else None,
            "problem": None,
        }
        try:
            if before and before["width_px"] and not found.width_px:
                row["width_px"], row["height_px"] = before["width_px"], before["height_px"]
            elif not found.width_px:
                row["width_px"], row["height_px"] = _size(source, found.id)
            row["captions"] = list(read_caption(source, found, settings))
        except DataError as error:
            if stop_on_bad:
                raise
            row["problem"] = str(error)
        rows.append(row)
    return rows


def _size(source: Source, id: str) -> tuple[int, int]:
    """Upright width and height; a header that does not stand at the file's beginning asks for the whole file."""
    try:
        return size_in(source.head(id), id)
    except DataError:
        return size_in(source.read(id), id)
