"""Drawn pictures as files that say what they show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..files import atomic_path

RECIPE = "lumina2"  # a key of a PNG's text, beside ``parameters``, which other programs read


def to_bytes(picture: Tensor) -> np.ndarray:
    """(height, width, 3) in [0, 1] to uint8."""
    pixels: np.ndarray = picture.detach().float().clamp(0, 1).mul(255).round().byte().cpu().numpy()
    return pixels


def save_picture(path: Path, pixels: np.ndarray, recipe: Mapping[str, Any]) -> None:
    """Write a PNG of pixels (height, width, 3), uint8, whole or not at all, with its recipe as text."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_itxt("parameters", parameters(recipe))
    text.add_itxt(RECIPE, json.dumps(recipe, ensure_ascii=False))
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=text, compress_level=1)


def read_recipe(path: Path) -> dict[str, Any]:
    """What ``save_picture`` was told; empty where there is no such picture."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            recipe = json.loads(picture.info.get(RECIPE, "{}"))
    except (OSError, ValueError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def parameters(recipe: Mapping[str, Any]) -> str:
    """The recipe in the words that picture viewers and other interfaces look for."""
    size = f"{recipe['width']}x{recipe['height']}"
    return (
        f"{recipe['prompt']}\nNegative prompt: {recipe['negative_prompt']}\nSteps: {recipe['steps']}, Sampler: Euler, "
        f"Schedule type: Simple, CFG scale: {recipe['guidance']:g}, Seed: {recipe['seed']}, Size: {size}, "
        f"Shift: {recipe['shift']:g}"
    )
