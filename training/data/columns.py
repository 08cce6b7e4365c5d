"""Columns on disk: what they hold as one hash."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow


def hash_columns(table: pyarrow.Table) -> str:
    """Hash of names and values, whatever the chunks and buffers they lie in; nulls count as empty."""
    import pyarrow

    digest = hashlib.sha256()
    for name in table.column_names:
        digest.update(name.encode())
        column = table[name].combine_chunks()
        if pyarrow.types.is_list(column.type):
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            column = column.flatten()
        if pyarrow.types.is_string(column.type):
            _add_strings(digest, column)
        else:
            digest.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).tobytes())
    return digest.hexdigest()


def _add_strings(digest: Any, column: pyarrow.Array) -> None:
    import pyarrow
    import pyarrow.compute

    filled = pyarrow.compute.fill_null(column, "")
    digest.update(pyarrow.compute.binary_length(filled).to_numpy(zero_copy_only=False).tobytes())
    _, offsets, data = filled.buffers()
    if data is not None:
        ends = np.frombuffer(offsets, np.int32)[filled.offset : filled.offset + len(filled) + 1]
        digest.update(memoryview(data)[ends[0] : ends[-1]])
