"""Pictures that came from the graph, kept in a content-addressed folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DataError
from ...files import atomic_path, read_json, write_json
from . import Found
from .local import HEAD_BYTES, REPORT_EVERY, no_pictures, read_picture
from .table import text_stamp

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DIGITS = 40  # of a SHA-256, in names


def store_images(folder: Path, pictures: Sequence[NDArray[np.uint8]], captions: Sequence[str]) -> str:
    """Write pictures (h, w, 3) as PNG files, each once, and the list of them with their captions.

    Returns:
        The list's digest, under which ``StoredImages`` finds it: the same pictures and captions give the same one.
    """
    from PIL import Image

    if len(pictures) != len(captions):
        raise DataError(f"There are {len(pictures)} pictures but {len(captions)} captions. Give one caption to each.")
    names = []
    for picture in pictures:
        content = f"{picture.shape}".encode() + picture.tobytes()
        path = folder / f"{hashlib.sha256(content).hexdigest()[:_DIGITS]}.png"
        if not path.exists():
            with atomic_path(path) as temporary:
                Image.fromarray(picture).save(temporary, format="PNG", compress_level=1)
        names.append(path.name)
    rows = [list(row) for row in zip(names, captions, strict=True)]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:_DIGITS]
    write_json(folder / f"{digest}.json", rows)
    return digest


class StoredImages:
    """What ``store_images`` wrote. A picture may stand there twice, so its id is its place in the list and its name."""

    def __init__(self, folder: Path, digest: str) -> None:
        self._folder = folder
        self._digest = digest
        self.name = str(folder / f"{digest}.json")
        self.identity: tuple[str, ...] = ("memory", digest)

    def find(self, on_found: Callable[[int], None] = lambda count: None) -> Iterator[Found]:
        try:
            rows = read_json(self._folder / f"{self._digest}.json")
        except (OSError, ValueError) as error:
            raise DataError(
                f"The stored pictures {self.name} are gone or damaged. Run the node that makes the dataset again."
            ) from error
        if not rows:
            raise no_pictures(f"The list {self.name}")
        for number, (name, caption) in enumerate(rows):
            captions = (caption,) if caption.strip() else ()
            if number and not number % REPORT_EVERY:
                on_found(number)
            stamp = int(name[:15], 16)  # the content's hash
            yield Found(f"{number:06d}-{name}", stamp, text_stamp(captions), captions)
        on_found(len(rows))

    def read(self, picture_id: str) -> bytes:
        return read_picture(self._path(picture_id))

    def head(self, picture_id: str) -> bytes:
        return read_picture(self._path(picture_id), HEAD_BYTES)

    def text(self, picture_id: str) -> bytes | None:
        return None

    def fingerprint(self) -> str:
        return self._digest

    def _path(self, picture_id: str) -> str:
        return str(self._folder / picture_id.partition("-")[2])
