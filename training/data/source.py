"""The pictures of a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_KOHYA = re.compile(r"(\d+)_.+")


def find_pictures(folder: Path) -> list[Path]:
    """All pictures of a folder and its subfolders, sorted by their path.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"The folder {folder} {what}. Choose the folder that holds your pictures.")
    pictures = sorted(path for path in _files(folder) if path.suffix.lower() in EXTENSIONS)
    if not pictures:
        raise DataError(
            f"The folder {folder} holds no pictures. Put some in ({', '.join(EXTENSIONS)}), or choose another."
        )
    return pictures


def _files(folder: Path) -> Iterator[Path]:
    """Files of a tree, hidden ones left out; links to folders are not followed, so that no loop can catch us."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def repeats_of(picture: Path, folder: Path, repeats: int) -> int:
    """Extra passes of a picture in an epoch: kohya's folder name ``10_name`` asks for 10 passes, else ``repeats``."""
    for parent in (*picture.relative_to(folder).parents[:-1], Path(folder.name)):
        match = _KOHYA.fullmatch(parent.name)
        if match:
            return max(int(match[1]) - 1, 0)
    return repeats


def folder_fingerprint(folder: Path) -> str:
    """Changes when a file of the folder is added, removed, renamed or written: names, sizes and times of all."""
    import hashlib

    digest = hashlib.sha256()
    for path in sorted(_files(folder)):
        status = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="replace"))
    return digest.hexdigest()
