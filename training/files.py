"""The one layer through which files are written: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import glob
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it, flushed to disk, if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_before(path), suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def flush_folder(folder: Path) -> None:
    """So that what was renamed in it stays so if the power fails; Windows does it by itself."""
    if os.name != "nt":
        with suppress(OSError):  # a network folder that cannot
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _before(path: Path) -> str:
    """What the temporary file's name begins with."""
    return f".{path.name[:40]}."


def remove_left_over(path: Path) -> None:
    """Remove what processes that were killed left half of ``path``; nobody else may be writing it.

    Long names are cut, so that theirs might be another file's, and stay.
    """
    if len(path.name) <= 40:
        for temporary in path.parent.glob(f"{glob.escape(_before(path))}*.tmp"):
            with suppress(OSError):
                temporary.unlink()


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; tensors may lie on any device."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, dict(metadata or {}))
