"""A folder on this machine, with its subfolders."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from ...errors import DataError
from . import EXTENSIONS, Found, stamp_of

HEAD_BYTES = 256 * 1024
FINGERPRINT_FILES = 20_000  # above so many, a fingerprint looks at folders only
REPORT_EVERY = 1000
_KOHYA = re.compile(r"(\d+)_.+")
_UNDECODABLE = re.compile("[\ud800-\udfff]")
_SHOWN = re.compile("\ufffd([0-9A-F]{4})")


class _Folder(NamedTuple):
    id: str  # ends in a slash, so that it sorts among files as its content does; the source itself: ""
    path: str
    repeats: int | None


class LocalFolder:
    """Pictures of a folder and its subfolders.

    Hidden files and folders are left out. A link to a folder is followed unless its pictures are listed already, so
    that each folder is listed once and no loop can catch us. A picture that vanished or whose link is broken is listed
    with the stamp 0: whoever reads it reports it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.abspath(folder)
        self.name = shown(str(folder))
        self.identity: tuple[str, ...] = ("local", shown(self._folder))

    def find(self, on_found: Callable[[int], None] = lambda count: None) -> Iterator[Found]:
        if not os.path.isdir(self._folder):
            what = "is a file, not a folder" if os.path.exists(self._folder) else "does not exist"
            raise DataError(f"The folder {self.name} {what}. Choose the folder that holds your pictures.")
        count = 0
        for found in self._walk(_stamp):
            count += 1
            if not count % REPORT_EVERY:
                on_found(count)
            yield found
        if not count:
            raise no_pictures(f"The folder {self.name}")
        on_found(count)

    def read(self, picture_id: str) -> bytes:
        return read_picture(self._path(picture_id))

    def head(self, picture_id: str) -> bytes:
        return read_picture(self._path(picture_id), HEAD_BYTES)

    def text(self, picture_id: str) -> bytes | None:
        return read_text_beside(self._path(picture_id))

    def fingerprint(self) -> str:
        """Names, sizes and times of pictures and texts; of very many, their count and the folders' times.

        A large folder's fingerprint so misses a file that is written over in place.
        """
        stated = 0
        pictures, folders = hashlib.sha256(), hashlib.sha256()

        def stamp(entry: os.DirEntry[str]) -> int:
            nonlocal stated
            stated += 1
            return _stamp(entry) if stated <= FINGERPRINT_FILES else 0

        def add_folder(folder_id: str, status: os.stat_result) -> None:
            folders.update(f"{folder_id}\0{status.st_mtime_ns}\0".encode())

        for found in self._walk(stamp, add_folder):
            pictures.update(f"{found.id}\0{found.stamp}\0{found.caption_stamp}\0".encode())
        if stated <= FINGERPRINT_FILES:
            return pictures.hexdigest()
        folders.update(str(stated).encode())
        return folders.hexdigest()

    def _path(self, picture_id: str) -> str:
        path = os.path.join(self._folder, picture_id)
        if "\ufffd" in picture_id and not os.path.lexists(path):
            path = os.path.join(self._folder, _SHOWN.sub(lambda match: chr(int(match[1], 16)), picture_id))
        return path

    def _walk(
        self,
        stamp: Callable[[os.DirEntry[str]], int],
        on_folder: Callable[[str, os.stat_result], None] = lambda folder_id, status: None,
    ) -> Iterator[Found]:
        """Pictures sorted by id; at any time only the names of one folder and its parents are in memory."""
        visited: set[tuple[int, int]] = set()
        stack: list[Found | _Folder] = [_Folder("", self._folder, repeats_of_name(os.path.basename(self._folder)))]
        while stack:
            item = stack.pop()
            if isinstance(item, Found):
                yield item
                continue
            try:
                status = os.stat(item.path)
                if (status.st_dev, status.st_ino) in visited:
                    continue
                visited.add((status.st_dev, status.st_ino))
                children = self._children(item, stamp)
            except PermissionError:
                raise DataError(
                    f"The folder {shown(item.path)} may not be read. Give this user the right to read it "
                    f"(chmod u+rx), or move it out of {self.name}."
                ) from None
            except OSError as error:
                raise DataError(
                    f"The folder {shown(item.path)} cannot be listed ({error.strerror}). Check the disk, and try again."
                ) from error
            on_folder(item.id, status)
            children.sort(key=itemgetter(0), reverse=True)
            stack += children

    def _children(self, folder: _Folder, stamp: Callable[[os.DirEntry[str]], int]) -> list[Found | _Folder]:
        children: list[Found | _Folder] = []
        pictures: list[tuple[str, str, int]] = []
        texts: dict[str, int] = {}
        with os.scandir(folder.path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                stem, suffix = os.path.splitext(name)
                suffix = suffix.lower()
                if _is_folder(entry):
                    if not entry.is_symlink() or not self._is_listed_anyway(entry.path):
                        repeats = repeats_of_name(name)
                        inherited = folder.repeats if repeats is None else repeats
                        children.append(_Folder(f"{folder.id}{shown(name)}/", entry.path, inherited))
                elif suffix == ".txt":
                    texts[stem] = stamp(entry)
                elif suffix in EXTENSIONS:
                    pictures.append((stem, name, stamp(entry)))
        for stem, name, picture_stamp in pictures:
            picture_id = folder.id + shown(name)
            children.append(Found(picture_id, picture_stamp, texts.get(stem, 0), repeats=folder.repeats))
        return children

    def _is_listed_anyway(self, link: str) -> bool:
        """Whether a link leads to a folder that the walk reaches without it, or to one that this folder lies in."""
        try:
            parts = os.path.relpath(os.path.realpath(link), os.path.realpath(self._folder)).split(os.sep)
        except ValueError:  # on another drive
            return False
        return set(parts) <= {"."} or set(parts) == {".."} or not any(part.startswith(".") for part in parts)


def repeats_of_name(folder_name: str) -> int | None:
    """Extra passes that kohya's folder name ``10_name`` asks for: 10 passes are 9 more."""
    match = _KOHYA.fullmatch(folder_name)
    return max(int(match[1]) - 1, 0) if match else None


def shown(name: str) -> str:
    """A name as valid Unicode: a byte that is none becomes U+FFFD and its code, so that names stay apart."""
    return _UNDECODABLE.sub(lambda match: f"\ufffd{ord(match[0]):04X}", name) if not name.isascii() else name


def stamp_at(path: str) -> int:
    """The stamp of a file; 0 where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0
    return stamp_of(status.st_size, status.st_mtime_ns)


def read_picture(path: str, count_bytes: int = -1) -> bytes:
    """A picture's file, or its first ``count_bytes``."""
    try:
        with open(path, "rb") as file:
            return file.read(count_bytes)
    except FileNotFoundError:
        raise DataError(f"The picture {shown(path)} is gone. Put it back, or start again without it.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"The picture {shown(path)} cannot be read ({reason}). Check its rights and the disk."
        ) from error


def read_text_beside(path: str) -> bytes | None:
    """The ``.txt`` beside a picture; None where there is none."""
    text = os.path.splitext(path)[0] + ".txt"
    try:
        with open(text, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"The caption {shown(text)} cannot be read ({reason}). Check its rights and the disk."
        ) from error


def no_pictures(what: str) -> DataError:
    return DataError(f"{what} holds no pictures. Put some in ({', '.join(EXTENSIONS)}), or choose another.")


def _stamp(entry: os.DirEntry[str]) -> int:
    try:
        status = entry.stat()
    except OSError:
        return 0
    return stamp_of(status.st_size, status.st_mtime_ns)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or to where we may not look
        return False
