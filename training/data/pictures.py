"""Opening a picture as the model shall see it: upright, sRGB, over white, scaled and cropped."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from .geometry import Geometry

if TYPE_CHECKING:
    from PIL import Image

_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels as seen, from the header alone.

    Raises:
        DataError: the file is not a picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(_ORIENTATION) in _TURNED
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({error}).") from error
    return (height, width) if turned else (width, height)


def load_picture(path: Path, geometry: Geometry) -> np.ndarray:
    """The picture as (height, width, 3), uint8.

    Raises:
        DataError: the file is damaged.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = _to_srgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({error}).") from error
    g = geometry
    scaled = picture.resize((g.scaled_width_px, g.scaled_height_px), Image.Resampling.LANCZOS)
    return np.asarray(scaled.crop((g.left_px, g.top_px, g.left_px + g.width_px, g.top_px + g.height_px)))


def _to_srgb(picture: Image.Image) -> Image.Image:
    """RGB in sRGB by the picture's own colour profile, transparency over white, 16-bit grey scaled to 8."""
    from PIL import Image, ImageCms

    if picture.mode in ("I", "I;16", "I;16B", "I;16L"):
        deep = np.asarray(picture, dtype=np.float32)
        picture = Image.fromarray((deep / 257).round().clip(0, 255).astype(np.uint8))
    if picture.mode == "F":
        picture = Image.fromarray(np.asarray(picture).clip(0, 255).astype(np.uint8))
    profile = picture.info.get("icc_profile")
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            picture = converted or picture
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile says nothing about the colours: they are taken as they are
    colours = picture.convert("RGB")
    if alpha is None:
        return colours
    white = Image.new("RGB", picture.size, "white")
    white.paste(colours, mask=alpha)
    return white
