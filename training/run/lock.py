"""One process at a time in a run's folder, whoever started it: the command line, ComfyUI or a second ComfyUI."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..errors import RunError

_FAR = 2**30  # Windows lets nobody read the bytes that are locked, so one is locked that is not there


@contextmanager
def locked(root: Path, folder: str) -> Iterator[None]:
    """Hold ``root/.locks/<folder>.lock``; the system lets go of it when the process ends, however it ends.

    Raises:
        RunError: another process holds it; the sentence says which, and since when.
    """
    path = root / ".locks" / f"{folder}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if not _lock(file):
            raise RunError(
                f"The training run {folder!r} is in use by {_owner(path)}. Stop it there, or choose another run name."
            )
        try:
            about = {"process": os.getpid(), "computer": socket.gethostname(), "since": time.time()}
            file.truncate(0)
            file.write(json.dumps(about).encode())
            file.flush()
            yield
        finally:
            file.truncate(0)
            _unlock(file)


def in_use(root: Path) -> set[str]:
    """The folders that some process holds."""
    found = set()
    for path in (root / ".locks").glob("*.lock"):
        with path.open("a+b") as file:
            if _lock(file):
                _unlock(file)
            else:
                found.add(path.name.removesuffix(".lock"))
    return found


def _claimed(written: bytes) -> bool:
    """Whether who wrote this may go on: another computer's process, until somebody deletes the file, or one here."""
    import psutil  # type: ignore[import-untyped]

    try:
        about = json.loads(written)
        elsewhere = about["computer"] != socket.gethostname()
        return elsewhere or (about["process"] != os.getpid() and psutil.pid_exists(about["process"]))
    except (ValueError, KeyError, TypeError):
        return False  # nobody's, or of one that was killed while it wrote


def _owner(path: Path) -> str:
    try:
        about = json.loads(path.read_bytes())
        minutes = max(time.time() - about["since"], 0) / 60
        age = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes"
        remedy = "" if about["computer"] == socket.gethostname() else f" (if that has ended, delete {path})"
        return f"process {about['process']} on {about['computer']} for {age}{remedy}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


if sys.platform == "win32":
    import msvcrt

    def _lock(file: IO[Any]) -> bool:
        try:
            file.seek(_FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: IO[Any]) -> None:
        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: IO[Any]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a network folder that knows no locks: what is written there has to do
            file.seek(0)
            return not _claimed(file.read())
        return True

    def _unlock(file: IO[Any]) -> None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
