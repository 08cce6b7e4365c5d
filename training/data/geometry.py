"""From pictures' sizes to the sizes that are trained on, and the crops between them: a million at a time, by numpy.

A picture's plan follows from its own size (and its own draws) alone, never from the other pictures or their order.

Source of the formulas: the reference's §2.2 to §2.4, which describes SimpleTuner's documented rules.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..config.dataset import GeometrySettings

NO_SIZE, TOO_SMALL, TOO_TALL, TOO_WIDE, TOO_MUCH_ENLARGED = 1, 2, 3, 4, 5
REASONS = (
    "",
    "no size",
    "smaller than minimum_image_size",
    "aspect below minimum_aspect_ratio",
    "aspect above maximum_aspect_ratio",
    "would be enlarged by more than max_upscale_threshold",
)
"""Why a picture is left out, for a report; ``Plan.dropped`` counts into it, 0 being kept."""

_SNAPPED_EDGE_PX = {0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048}  # of a square crop, by megapixels
_SNAP_MP = 0.05
_TOLERANCE = 1e-9  # a decimal such as 1.2 is not exact in binary: what just meets a limit must not fail it


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes what is trained on: scale to (scaled), then cut (bucket) out at (left, top)."""

    scaled_width_px: int
    scaled_height_px: int
    left_px: int
    top_px: int
    width_px: int
    height_px: int


@dataclass(frozen=True)
class Plan:
    """The geometries of N pictures as columns of length N: int32, 0 where the picture is dropped."""

    scaled_width_px: np.ndarray
    scaled_height_px: np.ndarray
    left_px: np.ndarray
    top_px: np.ndarray
    width_px: np.ndarray
    height_px: np.ndarray
    dropped: np.ndarray  # int8: which of REASONS

    @property
    def kept(self) -> np.ndarray:
        """True for each picture that is trained on, bool (N,)."""
        return self.dropped == 0

    def take(self, rows: np.ndarray) -> Plan:
        """The plans of some pictures."""
        return Plan(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def geometry(self, i: int) -> Geometry:
        """The plan of picture ``i``, which must be kept."""
        return Geometry(
            scaled_width_px=int(self.scaled_width_px[i]),
            scaled_height_px=int(self.scaled_height_px[i]),
            left_px=int(self.left_px[i]),
            top_px=int(self.top_px[i]),
            width_px=int(self.width_px[i]),
            height_px=int(self.height_px[i]),
        )


def needs_draws(settings: GeometrySettings) -> bool:
    """Whether ``plan_crops`` needs draws, and so an epoch's plan differs from another's."""
    return settings.crop and (settings.crop_style == "random" or settings.crop_aspect == "random")


def plan_crops(
    width_px: np.ndarray, height_px: np.ndarray, settings: GeometrySettings, draws: np.ndarray | None = None
) -> Plan:
    """The bucket, the scale and the crop of each picture, or the reason why it is dropped.

    Args:
        width_px: upright widths, (N,); height_px: their heights.
        draws: uniforms in [0, 1) of each picture, (N, 3): aspect, left, top; see ``draw_for``.

    Raises:
        ValueError: the settings need draws, and there are none.
    """
    if needs_draws(settings) and draws is None:
        raise ValueError("These settings draw at random: draws are needed.")
    width, height = np.asarray(width_px, dtype=np.float64), np.asarray(height_px, dtype=np.float64)
    sized = (width > 0) & (height > 0)
    width, height = np.where(sized, width, 1.0), np.where(sized, height, 1.0)
    bucket = _choose_bucket(width, height, settings, draws)
    dropped = np.where(sized, _find_reason(width, height, bucket, settings), NO_SIZE).astype(np.int8)
    scaled = _scale(width, height, bucket, settings)
    left, top = (_offset(scaled[k] - bucket[k], settings.crop_style, draws, 1 + k) for k in (0, 1))
    columns = np.where(dropped == 0, (*scaled, left, top, *bucket), 0).astype(np.int32)
    return Plan(
        scaled_width_px=columns[0],
        scaled_height_px=columns[1],
        left_px=columns[2],
        top_px=columns[3],
        width_px=columns[4],
        height_px=columns[5],
        dropped=dropped,
    )


def draw_for(ids: Sequence[str], seed: int, epoch: int) -> np.ndarray:
    """Uniforms in [0, 1), float64 (N, 3): a function of each picture's id, the seed and the epoch, not of the order.

    Two ids of one CRC-32 share their draws, which does no harm to their being uniform.
    Source of the mixing: splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    mask, golden = 2**64 - 1, np.uint64(0x9E3779B97F4A7C15)
    names = np.fromiter((zlib.crc32(i.encode("utf-8", "surrogatepass")) for i in ids), np.uint64, count=len(ids))
    run = _mix(_mix(np.array([seed & mask], np.uint64)) ^ np.array([epoch & mask], np.uint64))
    start = _mix(names ^ run)[:, None]
    bits = _mix(start + golden * np.arange(1, 4, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _is_square(settings: GeometrySettings) -> bool:
    return settings.crop and settings.crop_aspect == "square"


def _area_px(size: float, settings: GeometrySettings) -> float:
    """The pixels that a size of type area or pixel_area means; 1 megapixel is 1,000,000."""
    return size**2 if settings.resolution_type == "pixel_area" else round(size * 1e6, 3)


def _aspect(width: np.ndarray, height: np.ndarray, settings: GeometrySettings) -> np.ndarray:
    return _round_aspect(width / height, settings)


def _round_aspect(aspect: np.ndarray, settings: GeometrySettings) -> np.ndarray:
    """Halves go to the even digit; never 0, which no bucket can have."""
    digits = settings.aspect_bucket_rounding
    return np.maximum(np.round(aspect, digits), 10.0**-digits)


def _align(side: np.ndarray | float, settings: GeometrySettings) -> np.ndarray:
    """The nearest multiple of the alignment (of two, the one of even count), at least one."""
    unit = settings.aspect_bucket_alignment
    return np.maximum(np.rint(np.asarray(side) / unit), 1) * unit


def _bucket_at(aspect: np.ndarray, settings: GeometrySettings) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of the bucket of each rounded aspect.

    Area: E = align(⌊√area⌋), W = align(E·√a), H = align(E/√a). Pixel: the shorter edge R, the other R·a (or R/a).
    Source: reference §2.2.
    """
    if settings.resolution_type == "pixel":
        edge = settings.resolution
        return (
            _align(edge * np.maximum(aspect, 1.0), settings),
            _align(edge / np.minimum(aspect, 1.0), settings),
        )
    square = _align(_square_edge(settings), settings)
    root = np.sqrt(aspect)
    return _align(square * root, settings), _align(square / root, settings)


def _square_edge(settings: GeometrySettings) -> int:
    area = _area_px(settings.resolution, settings)
    if _is_square(settings):
        for megapixels, edge in _SNAPPED_EDGE_PX.items():
            if abs(area / 1e6 - megapixels) <= _SNAP_MP + _TOLERANCE:
                return edge
    return math.isqrt(int(area))


def _choose_bucket(
    width: np.ndarray, height: np.ndarray, settings: GeometrySettings, draws: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of each picture's bucket; 0 × 0 where every listed aspect would enlarge it too much."""
    if _is_square(settings):
        side = _bucket_at(np.ones_like(width), settings)
        return side[0], side[1]
    if not settings.crop or settings.crop_aspect == "preserve":
        return _bucket_at(_aspect(width, height, settings), settings)
    listed = np.array([aspect for aspect, _ in settings.crop_aspect_buckets])
    wide, high = _bucket_at(_round_aspect(listed, settings), settings)
    if settings.crop_aspect == "closest":
        choice = _pick_closest(width, height, listed, (wide, high), settings)
    else:
        assert draws is not None
        choice = _pick_random(width, height, draws[:, 0], (wide, high), settings)
    # Choice -1 is none: the 0 that is appended stands at that place.
    return np.append(wide, 0)[choice], np.append(high, 0)[choice]


def _pick_closest(
    width: np.ndarray,
    height: np.ndarray,
    listed: np.ndarray,
    buckets: tuple[np.ndarray, np.ndarray],
    settings: GeometrySettings,
) -> np.ndarray:
    """Which listed aspect is nearest by its log ratio (the first of equals), int64 (N,); -1: none may be used."""
    own = np.log(width / height)
    choice, nearest = np.full(len(width), -1), np.full(len(width), np.inf)
    for k, (aspect, wide, high) in enumerate(zip(listed, *buckets, strict=True)):
        distance = np.abs(own - math.log(aspect))
        better = (distance < nearest - _TOLERANCE) & ~_enlarges(width, height, (wide, high), settings)
        choice[better], nearest[better] = k, distance[better]
    return choice


def _pick_random(
    width: np.ndarray,
    height: np.ndarray,
    draws: np.ndarray,
    buckets: tuple[np.ndarray, np.ndarray],
    settings: GeometrySettings,
) -> np.ndarray:
    """Which listed aspect is drawn, by the weights of those that may be used, int64 (N,); -1: none may."""
    sides = list(zip(*buckets, strict=True))
    weights = [
        weight * ~_enlarges(width, height, bucket, settings)
        for bucket, (_, weight) in zip(sides, settings.crop_aspect_buckets, strict=True)
    ]
    total = sum(weights, np.zeros(len(width)))
    aim = draws * total  # less than the total even by rounding, as draws are below 1
    choice, running = np.full(len(width), -1), np.zeros(len(width))
    for k, weight in enumerate(weights):
        running += weight
        choice[(choice < 0) & (running > aim)] = k
    return choice


def _enlarges(
    width: np.ndarray, height: np.ndarray, bucket: tuple[np.ndarray, np.ndarray], settings: GeometrySettings
) -> np.ndarray:
    """Where covering the bucket would enlarge the sides by more than max_upscale_threshold, bool (N,)."""
    if settings.max_upscale_threshold is None:
        return np.zeros(len(width), dtype=bool)
    factor = np.maximum(bucket[0] / width, bucket[1] / height)
    return factor > 1 + settings.max_upscale_threshold + _TOLERANCE


def _find_reason(
    width: np.ndarray, height: np.ndarray, bucket: tuple[np.ndarray, np.ndarray], settings: GeometrySettings
) -> np.ndarray:
    """Which of REASONS drops each picture, the first that does, (N,); 0: none."""
    aspect = _aspect(width, height, settings)
    none = np.zeros(len(width), dtype=bool)
    tall = aspect < settings.minimum_aspect_ratio - _TOLERANCE
    wide = aspect > settings.maximum_aspect_ratio + _TOLERANCE if settings.maximum_aspect_ratio else none
    enlarged = (bucket[0] == 0) | _enlarges(width, height, bucket, settings)
    return np.select(
        [_is_too_small(width, height, settings), tall, wide, enlarged],
        [TOO_SMALL, TOO_TALL, TOO_WIDE, TOO_MUCH_ENLARGED],
        default=0,
    )


def _is_too_small(width: np.ndarray, height: np.ndarray, settings: GeometrySettings) -> np.ndarray:
    """Source: reference §2.3; for a square crop an area asks for both edges of its square."""
    minimum = settings.minimum_image_size
    if settings.resolution_type == "pixel":
        return np.minimum(width, height) < minimum
    area = _area_px(minimum, settings)
    if _is_square(settings):
        return np.minimum(width, height) < math.isqrt(int(area))
    return width * height < area


def _scale(
    width: np.ndarray, height: np.ndarray, bucket: tuple[np.ndarray, np.ndarray], settings: GeometrySettings
) -> tuple[np.ndarray, np.ndarray]:
    """The size that each picture is scaled to: its own aspect, covering the bucket; without a crop, the bucket.

    A picture larger than maximum_image_size is scaled to target_downsample_size, unless that does not cover the bucket.
    """
    if not settings.crop:
        return bucket
    wide, high = bucket
    by_width = wide * height >= high * width  # the width is what limits: it meets the bucket exactly
    scaled_width = np.where(by_width, wide, np.maximum(wide, np.rint(width * high / height)))
    scaled_height = np.where(by_width, np.maximum(high, np.rint(height * wide / width)), high)
    if not settings.maximum_image_size:
        return scaled_width, scaled_height
    larger, factor = _shrink_to_target(width, height, settings)
    return (
        np.where(larger, np.maximum(scaled_width, np.rint(width * factor)), scaled_width),
        np.where(larger, np.maximum(scaled_height, np.rint(height * factor)), scaled_height),
    )


def _shrink_to_target(
    width: np.ndarray, height: np.ndarray, settings: GeometrySettings
) -> tuple[np.ndarray, np.ndarray]:
    """Which pictures are larger than maximum_image_size, and the factor that brings each to target_downsample_size.

    An area is compared with the picture's; a pixel size, like the resolution, is that of the shorter edge.
    """
    if settings.resolution_type == "pixel":
        shorter = np.minimum(width, height)
        return shorter > settings.maximum_image_size, settings.target_downsample_size / shorter
    area = width * height
    larger = area > _area_px(settings.maximum_image_size, settings)
    return larger, np.sqrt(_area_px(settings.target_downsample_size, settings) / area)


def _offset(extra: np.ndarray, style: str, draws: np.ndarray | None, column: int) -> np.ndarray:
    """Where the crop begins, of ``extra`` + 1 places."""
    if style == "random" and draws is not None:
        return np.floor(draws[:, column] * (extra + 1))
    return extra // 2 if style == "center" else np.zeros_like(extra)
