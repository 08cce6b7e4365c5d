"""The list of what a cache node gave: parquet files beside the entries, named by their content, never changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.columns import hash_columns
from ..errors import CacheError
from ..files import atomic_path

if TYPE_CHECKING:
    import pyarrow

FOLDER = "manifests"


def write_manifest(store: Path, subject: Mapping[str, Any], columns: Mapping[str, Any]) -> Path:
    """Keep columns; the path depends on what they hold and on the subject alone.

    Args:
        store: the folder of the entries.
        subject: what the list is of (pictures, settings, encoder); a newer list of the same subject replaces this
            one when garbage is collected.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(dict(columns)).combine_chunks()
    about = json.dumps(subject, sort_keys=True)
    name = hashlib.sha256(about.encode()).hexdigest()[:16]
    path = store / FOLDER / f"{name}-{hash_columns(table)[:24]}.parquet"
    if path.exists():
        path.touch()
    else:
        with atomic_path(path) as temporary:
            pyarrow.parquet.write_table(table.replace_schema_metadata({"subject": about}), temporary)
    return path


def read_manifest(path: Path) -> pyarrow.Table:
    """The columns.

    Raises:
        CacheError: the file is gone or damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).combine_chunks()
    except (OSError, pyarrow.ArrowInvalid):
        raise CacheError(f"The cache's list {path} is missing or damaged. Run the cache nodes again.") from None


def newest_manifests(store: Path) -> list[Path]:
    """The newest list of each subject."""
    newest: dict[str, Path] = {}
    for path in sorted((store / FOLDER).glob("*.parquet"), key=lambda p: p.stat().st_mtime_ns):
        newest[path.name.split("-")[0]] = path
    return list(newest.values())
