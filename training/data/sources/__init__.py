"""Where pictures come from: one small interface, each kind of source in its own file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

EXTENSIONS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
)


class Found(NamedTuple):
    """One picture as a source lists it, without having read it."""

    id: str  # stable within the source: the path under its folder with forward slashes, or the row's number
    stamp: int  # changes when the picture changes: its size and time, below 2**63
    caption_stamp: int = 0  # the same of its caption, where that is a file of its own
    captions: tuple[str, ...] | None = None  # where the source itself tells them
    width_px: int = 0  # where the source itself tells them, upright; 0: read the picture's header
    height_px: int = 0
    repeats: int | None = None  # extra passes that a kohya folder name asks for


class Source(Protocol):
    """Pictures, and captions that lie beside them. Safe to use from several threads after ``find``."""

    name: str  # for sentences: the folder or address as the user wrote it
    identity: tuple[str, ...]  # what tells this source from others; no secret in it

    def find(self, on_found: Callable[[int], None] = lambda count: None) -> Iterator[Found]:
        """All pictures, sorted by id. ``on_found`` is called now and then with how many were found so far.

        Raises:
            DataError: the source does not exist, may not be read, or holds no picture.
        """

    def read(self, id: str) -> bytes:
        """The whole file of a picture.

        Raises:
            DataError: it is gone or cannot be read.
        """

    def head(self, id: str) -> bytes:
        """Enough of the file to tell the picture's size (the whole file where that is simpler)."""

    def text(self, id: str) -> bytes | None:
        """The ``.txt`` beside a picture; None where there is none or the source has no files."""

    def fingerprint(self) -> str:
        """Changes when a picture or caption is added, removed or edited; quick, and reads no picture."""


def stamp_of(size_bytes: int, modified_ns: int) -> int:
    """Size and time of a file as one number that changes when either does."""
    return (modified_ns * 1_000_003 + size_bytes) % 2**63
