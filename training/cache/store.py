"""A folder of safetensors files, each named by the hash of what it was made from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CacheError
from ..files import write_tensors

if TYPE_CHECKING:
    from torch import Tensor


def key_of(**made_from: Any) -> str:
    """The name of an entry: another picture, crop, text or model gives another one, so nothing stale is ever read."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Store:
    """Entries of one kind in one folder, each a single tensor."""

    folder: str

    def path(self, key: str) -> Path:
        return Path(self.folder, key[:2], f"{key}.safetensors")

    def header(self, key: str) -> tuple[tuple[int, ...], dict[str, str]] | None:
        """Shape and notes of an entry, without reading it; None where there is none or it is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(key), framework="pt") as file:
                return tuple(file.get_slice("entry").get_shape()), dict(file.metadata() or {})
        except (FileNotFoundError, SafetensorError):
            return None

    def write(self, key: str, tensor: Tensor, **notes: str) -> None:
        write_tensors(self.path(key), {"entry": tensor}, notes)

    def read(self, key: str) -> Tensor:
        """The tensor, on the CPU.

        Raises:
            CacheError: the entry is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path(key))["entry"]
        except (FileNotFoundError, SafetensorError, KeyError):
            raise CacheError(
                f"The cache entry {self.path(key)} is missing or damaged. Run the cache node again: it is made anew."
            ) from None
