"""Pictures of every kind, made here, and what the model sees of them."""

from __future__ import annotations

import io
import math
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from training.data.geometry import Geometry
from training.data.pictures import decode, load_picture, picture_size, size_in
from training.errors import DataError


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def whole(width: int, height: int) -> Geometry:
    """Neither scaled nor cropped."""
    return Geometry(width, height, 0, 0, width, height)


def seen(data: bytes, background: str = "white") -> np.ndarray:
    return decode(data, "a.png", whole(*size_in(data, "a.png")), background)


def gradient(width: int, height: int) -> np.ndarray:
    """Smooth, and different along both axes, uint8 (height, width, 3)."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return (np.stack([x, y, (x + y) / 2], axis=-1) * 255).round().astype(np.uint8)


def texture(width: int, height: int) -> np.ndarray:
    """Detail of some pixels' size with fine noise over it, as a photograph of gravel, uint8 (height, width, 3)."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + random.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return abs(a.astype(int) - b.astype(int))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_pictures_are_turned_upright(kind: str, orientation: int) -> None:
    stored = gradient(48, 32)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    data = encoded(Image.fromarray(stored), kind, exif=exif(orientation), **options)
    expected = UPRIGHT[orientation](stored)
    assert size_in(data, "a") == expected.shape[1::-1]
    assert difference(seen(data), expected).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_drafted_jpeg_is_turned_before_it_is_cropped(orientation: int) -> None:
    # 1001 × 701 at a quarter is 251 × 176: the last row and column hold a quarter, and turn with the picture.
    # Waves of 90 pixels, 10 when scaled: a third of a pixel aside would be 20 levels.
    x, y = np.meshgrid(np.arange(1001), np.arange(701))
    waves = 128 + 50 * np.sin(x * math.tau / 90) + 50 * np.sin(y * math.tau / 90)
    stored = waves.round().astype(np.uint8)[..., None].repeat(3, axis=-1)
    data = encoded(Image.fromarray(stored), "JPEG", quality=95, exif=exif(orientation))
    upright = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](stored)))
    g = Geometry(*(round(side / 9) for side in upright.size), 11, 17, 40, 32)
    full = upright.resize((g.scaled_width_px, g.scaled_height_px), Image.Resampling.LANCZOS)
    expected = np.asarray(full.crop((11, 17, 51, 49)))
    assert difference(decode(data, "a.jpg", g), expected).max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_is_read_from_xmp_and_nonsense_is_not_an_orientation() -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    stored = gradient(48, 32)
    assert size_in(encoded(Image.fromarray(stored), pnginfo=info), "a") == (32, 48)
    assert size_in(encoded(Image.fromarray(stored), exif=exif(77)), "a") == (48, 32)
    for broken in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0rubbish", b"Exif\0\0II"):
        for kind in ("JPEG", "PNG", "WEBP"):
            data = encoded(Image.fromarray(stored), kind, exif=broken)
            assert size_in(data, "a") == (48, 32)
            assert seen(data).shape == (32, 48, 3)


def test_crop_and_scale_are_those_of_scaling_everything_and_then_cropping() -> None:
    picture = Image.fromarray(texture(400, 300))
    for g in (
        Geometry(200, 150, 37, 11, 128, 128),  # smaller
        Geometry(800, 600, 500, 300, 256, 256),  # larger
        Geometry(400, 300, 100, 200, 64, 64),  # the same
        Geometry(128, 64, 0, 0, 128, 64),  # another aspect
        Geometry(400, 300, 336, 236, 64, 64),  # to the edge
    ):
        full = picture.resize((g.scaled_width_px, g.scaled_height_px), Image.Resampling.LANCZOS)
        box = (g.left_px, g.top_px, g.left_px + g.width_px, g.top_px + g.height_px)
        result = decode(encoded(picture), "a.png", g)
        assert result.shape == (g.height_px, g.width_px, 3)
        assert result.dtype == np.uint8
        assert difference(result, np.asarray(full.crop(box))).max() <= 1, g


@pytest.mark.parametrize(("make", "mean", "most"), [(gradient, 0.3, 2), (texture, 2.2, 14)])
@pytest.mark.parametrize("divisor", [4, 8, 16])
def test_a_jpeg_decoded_at_reduced_scale_is_hardly_different(make: Any, mean: float, most: int, divisor: int) -> None:
    data = encoded(Image.fromarray(make(1600, 1200)), "JPEG", quality=90)
    size = (1600 // divisor, 1200 // divisor)
    with Image.open(io.BytesIO(data)) as opened:
        full = np.asarray(opened.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    apart = difference(decode(data, "a.jpg", whole(*size)), full)
    assert apart.mean() <= mean
    assert apart.max() <= most


def test_a_large_png_is_reduced_to_hardly_different_pixels() -> None:
    picture = Image.fromarray(texture(1600, 1200))
    full = np.asarray(picture.resize((160, 120), Image.Resampling.LANCZOS))
    apart = difference(decode(encoded(picture), "a.png", whole(160, 120)), full)
    assert apart.mean() <= 1
    assert apart.max() <= 14


def test_transparency_shows_the_background() -> None:
    rgba = np.zeros((2, 3, 4), dtype=np.uint8)
    rgba[:, :, 0] = 200
    rgba[:, 0, 3], rgba[:, 1, 3], rgba[:, 2, 3] = 0, 128, 255
    half = 128 / 255
    for background, level in (("white", 255), ("black", 0), ("grey", 128)):
        row = seen(encoded(Image.fromarray(rgba)), background)[0].astype(float)
        assert row[0].tolist() == [level] * 3
        assert row[1] == pytest.approx([200 * half + level * (1 - half), level * (1 - half), level * (1 - half)], abs=1)
        assert row[2].tolist() == [200, 0, 0]


def test_colours_under_full_transparency_do_not_bleed_when_scaled() -> None:
    rgba = np.zeros((64, 64, 4), dtype=np.uint8)
    rgba[:, :32] = (255, 0, 0, 0)
    rgba[:, 32:] = (0, 0, 255, 255)
    result = decode(encoded(Image.fromarray(rgba)), "a.png", whole(16, 16)).astype(int)
    # Only white and blue are there: red never exceeds what white brings, which is as much as green.
    assert abs(result[:, :, 0] - result[:, :, 1]).max() <= 1


def test_grey_with_alpha() -> None:
    la = np.array([[[50, 255], [50, 0]]], dtype=np.uint8)
    assert seen(encoded(Image.fromarray(la, "LA"))).tolist() == [[[50] * 3, [255] * 3]]


def test_palettes_with_and_without_transparency() -> None:
    picture = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert picture.mode == "P"
    assert seen(encoded(picture)).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    assert seen(encoded(picture, transparency=1)).tolist() == [[[10, 20, 30], [255] * 3, [70, 80, 90]]]
    several = encoded(picture, transparency=bytes([0, 255, 51]))  # 51 is a fifth: .2·70 + .8·255 = 218
    assert seen(several)[0, :, 0].tolist() == [255, 40, 218]


def test_a_colour_of_rgb_can_be_transparent() -> None:
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    assert seen(encoded(Image.fromarray(rgb), transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255] * 3]]


def test_one_bit() -> None:
    picture = Image.fromarray(np.array([[0, 255, 0]], dtype=np.uint8)).convert("1")
    assert seen(encoded(picture))[0, :, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_to_eight(kind: str) -> None:
    deep = np.array([[0, 257, 25_700, 60_000, 65_535]], dtype=np.uint16)
    result = seen(encoded(Image.fromarray(deep), kind))
    assert result[0, :, 0].tolist() == [0, 1, 100, 233, 255]  # 60000/257 = 233.5
    assert (result[..., 0] == result[..., 2]).all()


def png_of_sixteen_bits(values: np.ndarray, colour_type: int) -> bytes:
    """Pillow writes no 16-bit colour: (height, width, channels), uint16."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_with_and_without_alpha() -> None:
    rgb = np.array([[[0, 25_700, 65_535], [40_000, 257, 51_400]]], dtype=np.uint16)
    expected = np.array([[[0, 100, 255], [156, 1, 200]]])
    assert difference(seen(png_of_sixteen_bits(rgb, 2)), expected).max() <= 1
    rgba = np.concatenate([rgb, np.array([[[65_535], [0]]], dtype=np.uint16)], axis=-1)
    result = seen(png_of_sixteen_bits(rgba, 6))
    assert difference(result[0, 0], expected[0, 0]).max() <= 1
    assert result[0, 1].tolist() == [255] * 3


def test_floats_from_0_to_1_and_from_0_to_255() -> None:
    unit = np.array([[0, 0.5, 1, np.nan]], dtype=np.float32)
    assert seen(encoded(Image.fromarray(unit), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0]
    large = np.array([[-5, 0.5, 100, 300]], dtype=np.float32)
    assert seen(encoded(Image.fromarray(large), "TIFF"))[0, :, 0].tolist() == [0, 0, 100, 255]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    # No ink is white, cyan takes red away, black takes all. JPEG stores it inverted, as Adobe does.
    inks = np.zeros((16, 48, 4), dtype=np.uint8)
    inks[:, 16:32, 0] = 255
    inks[:, 32:, 3] = 255
    picture = Image.frombytes("CMYK", (48, 16), inks.tobytes())
    row = seen(encoded(picture, kind, **({"quality": 100} if kind == "JPEG" else {})))[8].astype(int)
    for x, colour in ((4, [255, 255, 255]), (24, [0, 255, 255]), (44, [0, 0, 0])):
        assert abs(row[x] - colour).max() <= 4


def test_grey_jpeg() -> None:
    assert abs(seen(encoded(Image.new("L", (16, 16), 77), "JPEG"))[8, 8].astype(int) - 77).max() <= 1


def profile_of(red: tuple[float, ...], green: tuple[float, ...], blue: tuple[float, ...], gamma: float) -> bytes:
    """An ICC profile v2 (matrix and one curve) whose primaries are these XYZ values under D50."""

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(8 + 3 + 67)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    white = (0.9642, 1.0, 0.8249)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(white)}
    tags |= {b"rXYZ": xyz(red), b"gXYZ": xyz(green), b"bXYZ": xyz(blue)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    offset, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        padded = value + bytes(-len(value) % 4)
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += padded
    size = struct.pack(">I", offset + len(body))
    head = size + bytes(4) + b"\x02\x10\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(struct.pack(">i", round(v * 65536)) for v in white)
    return head + bytes(128 - len(head)) + table + body


SRGB_PRIMARIES = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
DISPLAY_P3 = profile_of((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841), 2.2)
RED_IS_BLUE = profile_of(SRGB_PRIMARIES[2], SRGB_PRIMARIES[1], SRGB_PRIMARIES[0], 2.2)


def test_a_profile_that_swaps_channels_is_followed() -> None:
    rgb = np.array([[[200, 100, 50], [0, 255, 0], [128, 128, 128]]], dtype=np.uint8)
    # sRGB's own curve is near to 2.2: the values stay within a few levels, but in the other channels.
    assert difference(seen(encoded(Image.fromarray(rgb), icc_profile=RED_IS_BLUE)), rgb[..., ::-1]).max() <= 6
    rgba = np.concatenate([rgb, np.full((1, 3, 1), 255, dtype=np.uint8)], axis=-1)
    assert difference(seen(encoded(Image.fromarray(rgba), icc_profile=RED_IS_BLUE)), rgb[..., ::-1]).max() <= 6
    jpeg = encoded(Image.new("RGB", (16, 16), (200, 100, 50)), "JPEG", quality=100, icc_profile=RED_IS_BLUE)
    assert difference(seen(jpeg)[8, 8], np.array([50, 100, 200])).max() <= 6


def test_display_p3_is_brought_to_srgb() -> None:
    rgb = np.array([[[128, 128, 128], [150, 100, 100], [255, 255, 255]]], dtype=np.uint8)
    result = seen(encoded(Image.fromarray(rgb), icc_profile=DISPLAY_P3)).astype(int)[0]
    assert abs(result[0] - 128).max() <= 1
    assert abs(result[2] - 255).max() <= 1
    # By linear light, with the matrix from P3 to sRGB.
    to_srgb = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    linear = to_srgb @ (rgb[0, 1] / 255) ** 2.2
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert abs(result[1] - expected).max() <= 2
    assert abs(result[1] - rgb[0, 1]).max() >= 5


def test_a_profile_that_is_broken_or_of_other_channels_or_plain_srgb_changes_nothing() -> None:
    rgb = gradient(16, 8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"nonsense", DISPLAY_P3[:200], srgb):
        assert (seen(encoded(Image.fromarray(rgb), icc_profile=profile)) == rgb).all()
    grey = Image.fromarray(rgb[..., 0])
    assert (seen(encoded(grey, icc_profile=RED_IS_BLUE))[..., 0] == rgb[..., 0]).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_seen(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3  # type: ignore[attr-defined]
    assert (seen(data) == [255, 0, 0]).all()


def test_a_phones_picture_of_several_is_the_first_of_them() -> None:
    frames = [Image.new("RGB", (256, 128), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], exif=exif(6))
    assert size_in(data, "a.jpg") == (128, 256)
    result = decode(data, "a.jpg", whole(32, 64)).astype(int)
    assert abs(result - [254, 0, 0]).max() <= 2


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif() -> None:
    data = encoded(Image.fromarray(gradient(64, 48)), "AVIF", quality=100, subsampling="4:4:4")
    assert size_in(data, "a.avif") == (64, 48)
    assert difference(seen(data), gradient(64, 48)).max() <= 4


def test_bmp(tmp_path: Path) -> None:
    (tmp_path / "a.bmp").write_bytes(encoded(Image.fromarray(gradient(20, 10)), "BMP"))
    assert picture_size(tmp_path / "a.bmp") == (20, 10)
    assert (load_picture(tmp_path / "a.bmp", whole(20, 10)) == gradient(20, 10)).all()


def test_the_content_counts_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "it is a png.jpg"
    path.write_bytes(encoded(Image.fromarray(gradient(20, 10))))
    assert picture_size(path) == (20, 10)
    assert (load_picture(path, whole(20, 10)) == gradient(20, 10)).all()


def test_the_result_can_be_written_to() -> None:
    assert seen(encoded(Image.fromarray(gradient(20, 10)))).flags.writeable


def error_of(path: Path) -> str:
    """What both ways of reading say; each must fail."""
    with pytest.raises(DataError) as at_size:
        picture_size(path)
    with pytest.raises(DataError) as at_load:
        load_picture(path, whole(8, 8))
    assert str(at_size.value) == str(at_load.value)
    assert str(at_size.value).startswith(str(path))
    return str(at_size.value)


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert "is empty" in error_of(tmp_path / "a.png")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "is missing" in error_of(tmp_path / "a.png")


def test_a_folder_is_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    assert "cannot be read" in error_of(tmp_path / "a.png")


def test_text_is_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("These are words.\n" * 50)
    assert "is not a picture" in error_of(tmp_path / "a.png")


def test_postscript_is_not_opened(tmp_path: Path) -> None:
    # Pillow would run Ghostscript on it.
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    assert "is not a picture" in error_of(tmp_path / "a.eps")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    (tmp_path / "a.png").chmod(0)
    assert "permission denied" in error_of(tmp_path / "a.png")


def test_permission_denied_by_the_system_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "permission denied" in error_of(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    data = encoded(Image.fromarray(texture(160, 120)), kind)
    cut = data[: max(4, int(len(data) * share))]
    with pytest.raises(DataError, match=r"^cats/a\.x .*(truncated|cannot be read|is not a picture).*(again|out)\.$"):
        decode(cut, "cats/a.x", whole(160, 120))
    if kind == "JPEG" and share > 0.1:
        with pytest.raises(DataError, match=r"a\.x is truncated"):
            decode(cut, "cats/a.x", whole(160, 120))


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
def test_any_damage_is_a_data_error_or_a_picture() -> None:
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        good = np.frombuffer(encoded(Image.fromarray(texture(64, 48)), kind, exif=exif(6)), dtype=np.uint8)
        for _ in range(60):
            bad = good.copy()
            bad[random.integers(0, min(len(bad), 400), 3)] = random.integers(0, 256, 3)
            try:
                size_in(bad.tobytes(), "a")
                assert decode(bad.tobytes(), "a", whole(16, 16)).shape == (16, 16, 3)
            except DataError:
                pass


@pytest.mark.parametrize("limit", [150, 80, 60])  # 200 pixels: Pillow warns above the limit, and raises above twice
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(gradient(20, 10))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "more pixels than are safe" in error_of(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert picture_size(tmp_path / "a.png") == (20, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert picture_size(tmp_path / "a.png") == (20, 10)


@pytest.mark.parametrize(
    ("start", "module", "package"),
    [
        (b"\0\0\0\x18ftypheic", "pillow_heif", "pillow-heif"),
        (b"\xff\x0a\xfa\x1f", "pillow_jxl", "pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "pillow_jxl", "pillow-jxl-plugin"),
    ],
)
def test_a_kind_that_needs_a_plug_in_names_it(start: bytes, module: str, package: str) -> None:
    import importlib.util

    says = f"Install {package}" if importlib.util.find_spec(module) is None else "cannot be read|is not a picture"
    with pytest.raises(DataError, match=says):
        size_in(start + bytes(200), "a.heic")


def test_a_picture_that_changed_is_noticed() -> None:
    data = encoded(Image.fromarray(gradient(20, 10)), exif=exif(6))
    decode(data, "a.png", whole(10, 20), expected=(10, 20))
    with pytest.raises(DataError, match=r"a\.png changed while it was read .*20 × 10.*10 × 20.*; run again\."):
        decode(data, "a.png", whole(20, 10), expected=(20, 10))


def test_the_beginning_of_a_jpeg_or_png_tells_the_size() -> None:
    for kind in ("JPEG", "PNG"):
        data = encoded(Image.fromarray(texture(400, 300)), kind)
        assert size_in(data[:2000], "a") == (400, 300)


def test_files_are_closed_also_after_errors(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "good.png").write_bytes(encoded(Image.fromarray(gradient(20, 10))))
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    for _ in range(20):
        picture_size(tmp_path / "good.png")
        with pytest.raises(DataError):
            picture_size(tmp_path / "bad.png")
    descriptors = Path("/proc/self/fd")
    if descriptors.exists():
        open_files = [os.readlink(d) for d in descriptors.iterdir() if d.is_symlink()]
        assert not [name for name in open_files if name.startswith(str(tmp_path))]
    assert not [w for w in recwarn if issubclass(w.category, ResourceWarning)]


def test_many_threads_read_alike() -> None:
    data = [
        encoded(Image.fromarray(texture(200, 150)), "JPEG", exif=exif(6), icc_profile=DISPLAY_P3),
        encoded(Image.fromarray(gradient(200, 150)).convert("P"), "GIF"),
        encoded(Image.fromarray(texture(200, 150)), "PNG", icc_profile=RED_IS_BLUE),
    ]
    alone = [decode(d, "a", whole(64, 64)) for d in data]
    gate = threading.Barrier(8)

    def work(thread: int) -> bool:
        gate.wait()
        return all((decode(data[i % 3], "a", whole(64, 64)) == alone[i % 3]).all() for i in range(thread, thread + 12))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
