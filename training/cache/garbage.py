"""Taking out what no dataset refers to any more."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import CacheError
from .manifest import FOLDER, newest_manifests, read_manifest
from .store import Store

GRACE_HOURS = 24.0


@dataclass(frozen=True)
class Collected:
    """What a collection found."""

    entries: int
    referred: int  # entries that a list names
    removed: int
    bytes_freed: int
    lists_removed: int


def collect_garbage(folder: Path, grace_hours: float = GRACE_HOURS, dry_run: bool = False) -> Collected:
    """Remove entries that the newest list of no dataset names, and lists that a newer one replaced.

    A list whose pictures are gone (their index is) refers to nothing. What was written within the last hours stays,
    since a cache node writes its list last.

    Raises:
        CacheError: the folder is no cache.
    """
    if not (folder / FOLDER).is_dir():
        raise CacheError(
            f"{folder} is no cache: it has no folder {FOLDER}. Name the latents or text folder of a cache."
        )
    lists = [path for path in newest_manifests(folder) if _sources_are_there(path)]
    named: set[str] = set()
    for path in lists:
        table = read_manifest(path)
        for column in {"key", "flipped", "keys", "mask"} & set(table.column_names):
            values = table[column].combine_chunks()
            named |= set((values.flatten() if column == "keys" else values).to_pylist())
        named |= set(json.loads((table.schema.metadata or {}).get(b"subject", b"{}")).get("also", []))
    catalog = Store(str(folder)).open()
    unnamed = {key.decode() for key in catalog.keys()} - named  # noqa: SIM118 - these keys are an array
    size = _size(folder)
    latest = time.time() - grace_hours * 3600
    removed = 0 if dry_run else catalog.remove(unnamed, written_before=latest)
    old = [p for p in (folder / FOLDER).glob("*.parquet") if p not in lists and p.stat().st_mtime < latest]
    if not dry_run:
        for path in old:
            path.unlink()
    return Collected(
        entries=len(catalog) + removed,
        referred=len(catalog) + removed - len(unnamed),
        removed=len(unnamed) if dry_run else removed,
        bytes_freed=0 if dry_run else size - _size(folder),
        lists_removed=len(old),
    )


def _sources_are_there(path: Path) -> bool:
    """Whether the indices that a list was made from still exist; what came from the graph always counts as there."""
    subject = json.loads((read_manifest(path).schema.metadata or {}).get(b"subject", b"{}"))
    parts = subject.get("latents", subject.get("texts", []))
    return parts == "given" or any(Path(part[0]).exists() for part in parts)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
