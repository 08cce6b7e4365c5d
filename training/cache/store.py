"""Tensors by the hash of what they were made from, many to a safetensors file.

A file is written whole or not at all and never changed afterwards, so two processes may fill one folder at the same
time, and whatever ends them leaves nothing half written. Each entry carries a checksum.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CacheError
from ..files import write_tensors

if TYPE_CHECKING:
    from torch import Tensor

KEY_LENGTH = 40  # hexadecimal digits
DIMENSIONS = 4  # of an entry, at most
_ENTRY = np.dtype(
    [
        ("key", f"S{KEY_LENGTH}"),
        ("file", np.int32),
        ("begin", np.int64),  # bytes from the file's start
        ("end", np.int64),
        ("crc", np.uint32),
        ("dtype", np.int8),
        ("shape", np.int32, DIMENSIONS),  # 0 behind the last dimension
        ("note", bool),
    ]
)
_DTYPES = ("F32", "BF16", "F16", "U8", "F64", "I64", "I32")


def key_of(**made_from: Any) -> str:
    """The name of an entry: another picture, crop, text or model gives another one, so nothing stale is ever read."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


@dataclass(frozen=True)
class Store:
    """A folder of entries of one kind."""

    folder: str

    def open(self) -> Catalog:
        """What the folder holds now."""
        return Catalog(Path(self.folder)).refresh()

    def state(self) -> tuple[bool, int]:
        """Differs after the folder was deleted, or an entry was found damaged: then it has to be filled again."""
        repairs = _repairs(Path(self.folder))
        return Path(self.folder).is_dir(), repairs.stat().st_size if repairs.exists() else 0


class Catalog:
    """Where each entry of a folder lies. Found again by ``refresh`` where another process adds or removes files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[str] = []  # files that could not be read; they were removed
        self._files: list[str | None] = []  # None: gone
        self._entries = np.empty(0, _ENTRY)  # sorted by key
        self._notes: dict[str, dict[str, str]] = {}  # of the few entries that have some

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> np.ndarray:
        """All keys, sorted, as S40."""
        return self._entries["key"]

    def refresh(self) -> Catalog:
        """Read the headers of files that are new, and forget those that are gone."""
        there = {path.name for path in self.folder.glob("*.safetensors")}
        known = {name for name in self._files if name}
        added = [self._read_header(name) for name in sorted(there - known)]
        gone = [number for number, name in enumerate(self._files) if name and name not in there]
        if not gone and not added:
            return self
        for number in gone:
            self._files[number] = None
        kept = self._entries[~np.isin(self._entries["file"], gone)] if gone else self._entries
        merged = np.concatenate([kept, *added])
        self._entries = merged[np.argsort(merged["key"], kind="stable")]
        return self

    def find(self, keys: Sequence[str] | np.ndarray) -> np.ndarray:
        """The place of each key, -1 where it is not there: what ``shapes`` takes."""
        wanted = np.asarray(keys, dtype=f"S{KEY_LENGTH}")
        there = self._entries["key"]  # once: another thread may replace the entries meanwhile
        if not len(there):
            return np.full(len(wanted), -1)
        places = np.searchsorted(there, wanted).clip(max=len(there) - 1)
        return np.where(there[places] == wanted, places, -1)

    def __contains__(self, key: str) -> bool:
        return bool(self.find([key])[0] >= 0)

    def shapes(self, places: np.ndarray) -> np.ndarray:
        """(N, 4): the shape of each entry, 0 behind its last dimension."""
        return self._entries["shape"][places]

    def notes(self, key: str) -> dict[str, str]:
        return self._notes.get(key, {})

    def noted(self, places: np.ndarray) -> np.ndarray:
        """Which entries have notes."""
        return self._entries["note"][places]

    def write(self, tensors: Mapping[str, Tensor], notes: Mapping[str, dict[str, str]] | None = None) -> None:
        """Commit entries as one file: they are all there, or none is."""
        if not tensors:
            return
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        sums = {key: zlib.crc32(_bytes_of(tensor)) for key, tensor in plain.items()}
        name = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:32] + ".safetensors"
        metadata = {"crc32": json.dumps(sums), "notes": json.dumps({k: v for k, v in (notes or {}).items() if v})}
        write_tensors(self.folder / name, plain, metadata)
        if name not in self._files:
            added = np.sort(self._read_header(name), order="key")
            self._entries = np.insert(self._entries, np.searchsorted(self.keys(), added["key"]), added)

    def read(self, key: str) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            CacheError: the entry is missing or damaged; a damaged one is taken out, so that it is made again.
        """
        for _ in range(2):
            place = self.find([key])[0]
            if place < 0:
                break
            entry = self._entries[place]
            name = self._files[entry["file"]]
            try:
                with (self.folder / str(name)).open("rb") as file:
                    file.seek(int(entry["begin"]))
                    data = bytearray(file.read(int(entry["end"] - entry["begin"])))
            except FileNotFoundError:  # another process collected garbage: the entry is in another file now
                self.refresh()
                continue
            if len(data) == entry["end"] - entry["begin"] and zlib.crc32(data) == entry["crc"]:
                return _tensor(data, _DTYPES[entry["dtype"]], entry["shape"])
            self.remove({key})
            _repairs(self.folder).open("a").write(f"{key}\n")
            raise CacheError(
                f"The cache entry {key} in {self.folder / str(name)} is damaged and was taken out. Run the cache "
                "node again: it is made anew."
            )
        raise CacheError(f"The cache entry {key} is missing in {self.folder}. Run the cache node again to make it.")

    def remove(self, keys: set[str], written_before: float | None = None) -> int:
        """Take entries out, by writing the files that hold them anew; how many entries that took out.

        Args:
            written_before: a time; files written later are left as they are.
        """
        removed = 0
        concerned = np.isin(self._entries["key"], np.array(sorted(keys), dtype=f"S{KEY_LENGTH}"))
        for number in np.unique(self._entries["file"][concerned]):
            path = self.folder / str(self._files[number])
            if written_before is not None and path.stat().st_mtime >= written_before:
                continue
            entries = self._entries[self._entries["file"] == number]
            stay = [entry for entry in entries if entry["key"].decode() not in keys]
            removed += len(entries) - len(stay)
            whole = dict(self._whole(path, stay))
            self.write(whole, {key: self._notes[key] for key in whole if key in self._notes})
            with suppress(FileNotFoundError):
                path.unlink()
        self.refresh()
        return removed

    def _whole(self, path: Path, entries: list[Any]) -> Iterator[tuple[str, Tensor]]:
        """Those of a file's entries that are not damaged."""
        data = path.read_bytes()
        for entry in entries:
            part = bytearray(data[int(entry["begin"]) : int(entry["end"])])
            if zlib.crc32(part) == entry["crc"]:
                yield entry["key"].decode(), _tensor(part, _DTYPES[entry["dtype"]], entry["shape"])

    def _read_header(self, name: str) -> np.ndarray:
        """The entries of a file; none, and the file removed and named, where it is damaged."""
        path = self.folder / name
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                size = path.stat().st_size
                header = json.loads(file.read(length)) if length < size else {}
            metadata = header.pop("__metadata__")
            sums = json.loads(metadata["crc32"])
            start = 8 + length
            rows = np.empty(len(header), _ENTRY)
            notes = json.loads(metadata.get("notes", "{}"))
            for row, (key, value) in enumerate(header.items()):
                begin, end = value["data_offsets"]
                shape = (*value["shape"], *(0,) * (DIMENSIONS - len(value["shape"])))
                dtype = _DTYPES.index(value["dtype"])
                rows[row] = (key, len(self._files), start + begin, start + end, sums[key], dtype, shape, key in notes)
            if not len(rows) or rows["end"].max() != size:
                raise ValueError("its length is not what its header says")
        except FileNotFoundError:
            return np.empty(0, _ENTRY)
        except (ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
            self.damaged.append(f"The cache file {path} is damaged ({error}); what it held is made again.")
            with suppress(OSError):
                path.unlink()
            return np.empty(0, _ENTRY)
        self._files.append(name)
        self._notes |= notes
        return rows


@dataclass
class Writer:
    """Gathers entries and commits them ``batch_size`` at a time; what is pending is committed at the end, too."""

    catalog: Catalog
    batch_size: int
    _tensors: dict[str, Tensor] = field(default_factory=dict)
    _notes: dict[str, dict[str, str]] = field(default_factory=dict)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.commit()

    def add(self, key: str, tensor: Tensor, **notes: str) -> None:
        self._tensors[key], self._notes[key] = tensor, notes
        if len(self._tensors) >= self.batch_size:
            self.commit()

    def pending(self, key: str) -> Tensor | None:
        """An entry that is not committed yet."""
        return self._tensors.get(key)

    def commit(self) -> None:
        tensors, self._tensors = self._tensors, {}
        notes, self._notes = self._notes, {}
        self.catalog.write(tensors, notes)
        self.catalog.refresh()  # what another process wrote is not made twice


def _repairs(folder: Path) -> Path:
    return folder / "repairs.txt"


def _bytes_of(tensor: Tensor) -> Any:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()


def _tensor(data: bytearray, dtype: str, shape: np.ndarray) -> Tensor:
    import torch

    kinds = dict(
        zip(
            _DTYPES,
            (
                torch.float32,
                torch.bfloat16,
                torch.float16,
                torch.uint8,
                torch.float64,
                torch.int64,
                torch.int32,
            ),
            strict=True,
        )
    )
    size = [int(side) for side in shape if side]
    return torch.frombuffer(data, dtype=kinds[dtype]).reshape(size)
