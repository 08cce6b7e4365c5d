"""The pictures that the nano model learns from: Noto emoji with their names as captions.

Source: the npm package ``emoji-datasource-google``; its pictures are Google's Noto Emoji (Apache-2.0).
"""

from __future__ import annotations

import json
import subprocess
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PACKAGE = "emoji-datasource-google@16.0.0"
SIDE_PX = 64
HELD_OUT_ONE_IN = 13


@dataclass(frozen=True)
class Emoji:
    """All emoji: straight-alpha pictures, their captions, and which are kept out of training."""

    colour: Tensor  # N, 3, 64, 64 in [0, 1], multiplied by alpha
    alpha: Tensor  # N, 1, 64, 64 in [0, 1]
    names: list[str]
    held_out: Tensor  # N, bool

    def on(self, background: Tensor | float = 1.0) -> Tensor:
        """The pictures in [-1, 1] over a background in [0, 1]; white unless told."""
        return (self.colour + (1 - self.alpha) * background) * 2 - 1


def fetch_package(work: Path) -> Path:
    """The unpacked npm package, downloaded once into ``work``."""
    folder = work / "package"
    if not (folder / "emoji.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", PACKAGE], cwd=work, check=True, capture_output=True, text=True
        )
        with tarfile.open(work / packed.stdout.split()[-1]) as archive:
            wanted = [m for m in archive if m.name.endswith("emoji.json") or "/img/google/64/" in m.name]
            archive.extractall(work, wanted, filter="data")
    return folder


def load_emoji(package: Path) -> Emoji:
    """Every emoji but flags, skin tones and obsolete ones, in the package's order."""
    colour, alpha, names, held_out = [], [], [], []
    for entry in json.loads((package / "emoji.json").read_text()):
        path = package / "img" / "google" / "64" / entry["image"]
        if entry.get("obsoleted_by") or entry["category"] in ("Flags", "Component") or not path.exists():
            continue
        with Image.open(path) as picture:
            rgba = np.asarray(picture.convert("RGBA").resize((SIDE_PX, SIDE_PX)), dtype=np.float32) / 255
        colour.append(rgba[..., :3] * rgba[..., 3:])
        alpha.append(rgba[..., 3:])
        names.append(entry["name"].lower())
        held_out.append(zlib.crc32(entry["image"].encode()) % HELD_OUT_ONE_IN == 0)

    def stack(planes: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(planes)).permute(0, 3, 1, 2).contiguous()

    return Emoji(stack(colour), stack(alpha), names, torch.tensor(held_out))
