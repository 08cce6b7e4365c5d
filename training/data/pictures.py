"""Opening a picture as the model shall see it: upright, sRGB, over a background, scaled and cropped.

Many threads may call these at once: nothing is shared but Pillow's list of formats, and every file is closed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ..errors import DataError
from .geometry import Geometry

if TYPE_CHECKING:
    from PIL import Image

_WANTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JXL")  # no other: EPS runs a program
_ORIENTATION = 0x0112
_SIDES_SWAPPED, _X_REVERSED, _Y_REVERSED = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)  # by EXIF orientation
_HOLDS_ORIENTATION = ("exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp")  # in a picture's info
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_DRAFT_GAP = 2  # a JPEG is decoded at a reduced scale that leaves at least so many times the size asked for
_REDUCING_GAP = 3.0  # Pillow: from 3 on, hardly to be told from plain resampling
_LANCZOS_REACH_PX = 3
_PLAIN_SRGB = ("sRGB IEC61966-2.1", "sRGB built-in")  # profiles' own descriptions


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels as seen, from the header alone.

    Raises:
        DataError: the file cannot be read, or is not a picture.
    """
    with _naming(str(path)), open(path, "rb") as file:
        return size_in(file, str(path))


def size_in(head: bytes | BinaryIO, name: str) -> tuple[int, int]:
    """Width and height in pixels as seen, from the header alone.

    Args:
        head: a file that can seek, or the bytes; of a JPEG or PNG the beginning will do.
        name: what errors call it; what it ends with says nothing.

    Raises:
        DataError: it is not a picture, or larger than Pillow's limit.
    """
    file = io.BytesIO(head) if isinstance(head, bytes) else head
    with _opened(file, name) as picture:
        return _upright_size(picture)


def load_picture(path: Path, geometry: Geometry, background: str = "white") -> np.ndarray:
    """The picture in a file as (height, width, 3), uint8; see ``decode``."""
    with _naming(str(path)):
        data = path.read_bytes()
    return decode(data, str(path), geometry, background)


def decode(
    data: bytes,
    name: str,
    geometry: Geometry,
    background: str = "white",
    expected: tuple[int, int] | None = None,
) -> np.ndarray:
    """The first frame of a picture, scaled by Lanczos and cropped, as (height, width, 3), uint8, sRGB.

    Args:
        data: the whole file.
        geometry: planned for the upright picture.
        background: what shows through transparency: white, black or grey.
        expected: the upright width and height that the geometry was planned for.

    Raises:
        DataError: the picture is damaged, too large for Pillow's limit, or not of the expected size.
    """
    from PIL import Image

    g = geometry
    with _opened(io.BytesIO(data), name) as opened:
        seen = _upright_size(opened)
        if expected is not None and seen != expected:
            was, now = ("{} × {}".format(*size) for size in (expected, seen))
            raise DataError(f"{name} changed while it was read (it was {was} px, and is {now}); run again.")
        picture, (left, top, width, height) = _upright(opened, g)
        x_step, y_step = width / g.scaled_width_px, height / g.scaled_height_px
        box = (
            left + g.left_px * x_step,
            top + g.top_px * y_step,
            min(picture.width, left + (g.left_px + g.width_px) * x_step),  # a float may overshoot the edge
            min(picture.height, top + (g.top_px + g.height_px) * y_step),
        )
        part, box = _cut_around(_to_eight_bits(picture), box, x_step, y_step)
        colours = _to_srgb(part, opened.info.get("icc_profile"), background)
        scaled = colours.resize((g.width_px, g.height_px), Image.Resampling.LANCZOS, box, _REDUCING_GAP)
        return np.array(scaled)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the wanted formats that this Pillow can open, with the plug-ins that are installed."""
    from PIL import Image

    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("pillow_heif").register_heif_opener()
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("pillow_jxl")  # registers itself
    Image.init()
    return tuple(name for name in _WANTED_FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """The picture with its header read; every failure in the block becomes a DataError that names the picture."""
    from PIL import Image

    with _naming(name, file), Image.open(file, formats=_formats()) as picture:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and picture.width * picture.height > limit:  # Pillow itself only warns up to twice that
            raise Image.DecompressionBombError(f"{picture.width} × {picture.height} px")
        yield picture


@contextlib.contextmanager
def _naming(name: str, file: BinaryIO | None = None) -> Iterator[None]:
    """Any failure to read becomes a DataError: on a damaged file Pillow's decoders raise errors of every kind."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name} {_explain(error, file)}") from error


def _explain(error: Exception, file: BinaryIO | None) -> str:
    """What is wrong with a file, and what to do about it."""
    from PIL import Image, UnidentifiedImageError

    remedy = "Save it again or take it out."
    if isinstance(error, FileNotFoundError):
        return "is missing. Put it back, or run again to scan the folder anew."
    if isinstance(error, PermissionError):
        return "may not be read: permission denied. Allow this user to read it."
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has more pixels than are safe to open ({error}; the limit is {Image.MAX_IMAGE_PIXELS}). Scale it down."
    if isinstance(error, MemoryError):
        return "needs more memory than there is. Scale it down."
    if file is not None and isinstance(error, (UnidentifiedImageError, OSError, SyntaxError)):
        file.seek(0)
        start = file.read(32)
        if not start:
            return "is empty. Copy it again or take it out."
        if isinstance(error, UnidentifiedImageError):
            return _explain_unknown(start)
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return f"is truncated: it ends too early ({error}). Copy it again or take it out."
    return f"cannot be read as a picture ({error}). {remedy}"


def _explain_unknown(start: bytes) -> str:
    """Why no format opens a file that begins so."""
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        if "HEIF" not in _formats():
            return "is a HEIC picture. Install pillow-heif to read it, or save it as PNG or JPEG."
    elif start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis"):
        if "AVIF" not in _formats():
            return "is an AVIF picture. Install pillow 11.3 or later to read it, or save it as PNG or JPEG."
    elif start.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")) and "JXL" not in _formats():
        return "is a JPEG XL picture. Install pillow-jxl-plugin to read it, or save it as PNG or JPEG."
    return "is not a picture, or its beginning is damaged. Save it again or take it out."


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    width, height = picture.size
    if picture.format == "TIFF":  # some versions of Pillow swap the sides on opening, others do not: the tags are plain
        tags = picture.tag_v2  # type: ignore[attr-defined]
        width, height = tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]
    return (height, width) if _orientation(picture) in _SIDES_SWAPPED else (width, height)


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation, upright unless 2 to 8.

    An eXIf chunk behind a PNG's pixels is not seen: it would cost decoding them.
    """
    from PIL import Image

    if picture.format != "TIFF" and not any(key in picture.info for key in _HOLDS_ORIENTATION):
        return 1
    try:
        return Image.Image.getexif(picture).get(_ORIENTATION, 1)  # PNG's own getexif would decode the picture
    except Exception:  # broken EXIF says nothing about the orientation, and raises errors of every kind
        return 1


def _upright(opened: Image.Image, geometry: Geometry) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """The decoded picture turned upright, and left, top, width and height of the picture in it.

    A JPEG may be decoded at a half, quarter or eighth; its last row and column then hold less than a whole pixel.
    """
    from PIL import Image

    wanted = (_DRAFT_GAP * geometry.scaled_width_px, _DRAFT_GAP * geometry.scaled_height_px)
    orientation = _orientation(opened)
    swapped = orientation in _SIDES_SWAPPED
    drafted = opened.draft(None, wanted[::-1] if swapped else wanted)
    opened.load()
    if opened.format == "TIFF":
        orientation = _orientation(opened)  # Pillow has turned it while loading
        swapped = orientation in _SIDES_SWAPPED
    width, height = drafted[1][2:] if drafted else opened.size
    extra = (opened.width - width, opened.height - height)
    if swapped:
        width, height, extra = height, width, extra[::-1]
    left = extra[0] if orientation in _X_REVERSED else 0.0
    top = extra[1] if orientation in _Y_REVERSED else 0.0
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
    turn = (turns | {7: "TRANSVERSE", 8: "ROTATE_90"}).get(orientation)
    picture = opened.transpose(Image.Transpose[turn]) if turn else opened
    return picture, (left, top, width, height)


def _cut_around(
    picture: Image.Image, box: tuple[float, float, float, float], x_step: float, y_step: float
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """The part that Lanczos reaches from ``box`` at these steps, and the box in it: the rest need not be converted."""
    x_reach, y_reach = (math.ceil(_LANCZOS_REACH_PX * max(1.0, step) + step) for step in (x_step, y_step))
    left, top = max(0, math.floor(box[0]) - x_reach), max(0, math.floor(box[1]) - y_reach)
    right = min(picture.width, math.ceil(box[2]) + x_reach)
    bottom = min(picture.height, math.ceil(box[3]) + y_reach)
    if (left, top, right, bottom) == (0, 0, *picture.size):
        return picture, box
    cut = picture.crop((left, top, right, bottom))
    return cut, (box[0] - left, box[1] - top, box[2] - left, box[3] - top)


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey is divided by 257; of floats, 1 is white where none is above 1, else 255 is."""
    from PIL import Image

    if not picture.mode.startswith(("I", "F")):
        return picture
    values: np.ndarray = np.nan_to_num(np.asarray(picture, dtype=np.float32))
    if picture.mode != "F":
        values = values / 257
    elif values.max(initial=0) <= 1:
        values = values * 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _to_srgb(picture: Image.Image, profile: bytes | None, background: str) -> Image.Image:
    """RGB in sRGB by the picture's own colour profile, over the background where it is transparent."""
    from PIL import Image

    alpha = None
    if picture.has_transparency_data:
        picture = picture.convert("LA" if picture.mode in ("LA", "La") else "RGBA")
        alpha = picture.getchannel("A")
        picture = picture.convert("L" if picture.mode == "LA" else "RGB")
    elif picture.mode not in ("L", "CMYK"):
        picture = picture.convert("RGB")
    colours = _apply_profile(picture, profile) if profile else picture.convert("RGB")
    if alpha is None:
        return colours
    behind = Image.new("RGB", colours.size, background)
    behind.paste(colours, mask=alpha)
    return behind


def _apply_profile(picture: Image.Image, profile: bytes) -> Image.Image:
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if (source.profile.profile_description or "").startswith(_PLAIN_SRGB):
            return picture.convert("RGB")
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        converted = None  # a broken profile, or one for other channels, says nothing about the colours
    return converted or picture.convert("RGB")
