"""From a picture's size to the size that is trained on, and the crop between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

CROPS = ("preserve", "square")
ALIGNMENT_PX = 64  # sides are multiples of this


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes what is trained on: scale to (scaled), then cut (bucket) out at (left, top)."""

    scaled_width_px: int
    scaled_height_px: int
    left_px: int
    top_px: int
    width_px: int
    height_px: int


def plan_crop(width_px: int, height_px: int, resolution: int, crop: str) -> Geometry:
    """The bucket for a picture: about ``resolution``² pixels, sides multiples of 64, and the centre of the picture.

    ``square`` cuts the middle square out; ``preserve`` keeps the picture's aspect but for the rounding to 64.
    The bucket depends on the aspect alone, so it does not depend on the other pictures.
    """
    aspect = 1.0 if crop == "square" else width_px / height_px
    area = max(resolution, ALIGNMENT_PX) ** 2
    bucket_width = _aligned(math.sqrt(area * aspect))
    bucket_height = _aligned(math.sqrt(area / aspect))
    scale = max(bucket_width / width_px, bucket_height / height_px)
    scaled_width = max(bucket_width, round(width_px * scale))
    scaled_height = max(bucket_height, round(height_px * scale))
    return Geometry(
        scaled_width_px=scaled_width,
        scaled_height_px=scaled_height,
        left_px=(scaled_width - bucket_width) // 2,
        top_px=(scaled_height - bucket_height) // 2,
        width_px=bucket_width,
        height_px=bucket_height,
    )


def _aligned(side: float) -> int:
    return max(1, round(side / ALIGNMENT_PX)) * ALIGNMENT_PX
