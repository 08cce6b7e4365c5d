"""From sizes to buckets and crops: a table worked out by hand from the reference's formulas, and what always holds."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config.dataset import GeometrySettings
from training.data.geometry import REASONS, Geometry, Plan, draw_for, needs_draws, plan_crops

SMALL = "smaller than minimum_image_size"
BELOW = "aspect below minimum_aspect_ratio"
ABOVE = "aspect above maximum_aspect_ratio"
ENLARGED = "would be enlarged by more than max_upscale_threshold"

SQUARE = {"crop_aspect": "square"}
WHOLE = {"crop": False}
# The sample of SimpleTuner's documentation.
SAMPLE = SQUARE | {"minimum_image_size": 512, "maximum_image_size": 2048, "target_downsample_size": 1024}
HALF = {"resolution": 512}
ONE_OR_TWO = HALF | {"crop_aspect": "closest", "crop_aspect_buckets": ((1.0, 1), (2.0, 1))}
DRAWN = HALF | {"crop_aspect": "random", "crop_aspect_buckets": ((1.0, 1), (2.0, 3))}
RANDOM = SQUARE | {"crop_style": "random"}


def pixel(edge: float) -> dict[str, Any]:
    return {"resolution_type": "pixel", "resolution": edge}


def area(megapixels: float) -> dict[str, Any]:
    return {"resolution_type": "area", "resolution": megapixels}


SHRUNK_PX = pixel(512) | SQUARE | {"maximum_image_size": 1024, "target_downsample_size": 768}

# Worked out with pencil and calculator, never by running the code: width, height, settings, (aspect, left, top) draws,
# then (scaled width, scaled height, left, top, bucket width, bucket height) or the reason.
GOLDEN: list[tuple[int, int, dict[str, Any], tuple[float, float, float], tuple[int, ...] | str]] = [
    # pixel_area, preserve: E = 1024, W = E·√a, H = E/√a, in 64s
    (1024, 1024, {}, (0, 0, 0), (1024, 1024, 0, 0, 1024, 1024)),
    (100, 100, {}, (0, 0, 0), (1024, 1024, 0, 0, 1024, 1024)),
    # a 1.78: W 1366.2 = 21.35 units, H 767.5 = 11.99 units; 1920·768/1080 = 1365.3
    (1920, 1080, {}, (0, 0, 0), (1365, 768, 10, 0, 1344, 768)),
    # a .56: W 766.3 = 11.97 units, H 1368.4 = 21.38 units
    (1080, 1920, {}, (0, 0, 0), (768, 1365, 0, 10, 768, 1344)),
    # a 1.33: W 1180.9 = 18.45 units, H 887.9 = 13.87 units; 1600·896/1200 = 1194.7
    (1600, 1200, {}, (0, 0, 0), (1195, 896, 21, 0, 1152, 896)),
    # a .75: W 886.8 = 13.86 units, H 1182.4 = 18.48 units
    (1200, 1600, {}, (0, 0, 0), (896, 1195, 0, 21, 896, 1152)),
    # a 1.5: W 1254.1 = 19.60 units, H 836.1 = 13.06 units; now the width limits: 1000·1280/1500 = 853.3
    (1500, 1000, {}, (0, 0, 0), (1280, 853, 0, 10, 1280, 832)),
    # a .67: W 838.2 = 13.10 units, H 1251.0 = 19.55 units
    (1000, 1500, {}, (0, 0, 0), (853, 1280, 10, 0, 832, 1280)),
    # a 2: W 1448.2 = 22.63 units, H 724.1 = 11.31 units
    (2000, 1000, {}, (0, 0, 0), (1472, 736, 0, 16, 1472, 704)),
    # E 512, a 1.33: W 590.5 = 9.23 units, H 444.0 = 6.94 units; 640·448/480 = 597.3
    (640, 480, HALF, (0, 0, 0), (597, 448, 10, 0, 576, 448)),
    # 720 = 11.25 units
    (720, 720, {"resolution": 720}, (0, 0, 0), (704, 704, 0, 0, 704, 704)),
    # Alignment 32: 1366.2 = 42.69 units; 1080·1376/1920 = 774
    (1920, 1080, {"aspect_bucket_alignment": 32}, (0, 0, 0), (1376, 774, 0, 3, 1376, 768)),
    # Alignment 16: 1366.2 = 85.39 units, 767.5 = 47.97 units
    (1920, 1080, {"aspect_bucket_alignment": 16}, (0, 0, 0), (1365, 768, 2, 0, 1360, 768)),
    # Aspect 1.78 rounded to no digit is 2: the bucket 1472 × 704; 1080·1472/1920 = 828
    (1920, 1080, {"aspect_bucket_rounding": 0}, (0, 0, 0), (1472, 828, 0, 62, 1472, 704)),
    # Clamped: a 10, E 64: W 202.4 = 3.16 units, H 20.2 = 0.32 units, but never below one
    (1000, 100, {"resolution": 64}, (0, 0, 0), (640, 64, 224, 0, 192, 64)),
    (30, 30, {"resolution": 16, "aspect_bucket_alignment": 16}, (0, 0, 0), (16, 16, 0, 0, 16, 16)),
    # Snapping of squares: 720² = .5184 MP is near .5, so 768²; 2048² = 4.19 MP is not near 4
    (720, 720, SQUARE | {"resolution": 720}, (0, 0, 0), (768, 768, 0, 0, 768, 768)),
    (2048, 2048, SQUARE | {"resolution": 2048}, (0, 0, 0), (2048, 2048, 0, 0, 2048, 2048)),
    # area
    (1000, 1000, area(1.0), (0, 0, 0), (1024, 1024, 0, 0, 1024, 1024)),  # 1000 = 15.6 units
    (800, 800, area(0.25), (0, 0, 0), (512, 512, 0, 0, 512, 512)),  # 500 = 7.8 units
    (1000, 1000, area(0.5), (0, 0, 0), (704, 704, 0, 0, 704, 704)),  # 707 = 11.05 units
    (1000, 1000, area(0.5) | SQUARE, (0, 0, 0), (768, 768, 0, 0, 768, 768)),
    (1000, 1000, area(0.46) | SQUARE, (0, 0, 0), (768, 768, 0, 0, 768, 768)),
    (1000, 1000, area(0.45) | SQUARE, (0, 0, 0), (768, 768, 0, 0, 768, 768)),  # .05 is within
    (1000, 1000, area(0.44) | SQUARE, (0, 0, 0), (640, 640, 0, 0, 640, 640)),  # 663 = 10.4 units
    (600, 600, area(0.3) | SQUARE, (0, 0, 0), (512, 512, 0, 0, 512, 512)),
    (600, 600, area(0.31) | SQUARE, (0, 0, 0), (576, 576, 0, 0, 576, 576)),  # 556 = 8.7 units
    (3000, 2000, area(2.0) | SQUARE, (0, 0, 0), (2304, 1536, 384, 0, 1536, 1536)),
    # E: 1414 = 22.1 units, 1408; a 1.5: W 1724.4 = 26.9 units, H 1149.6 = 17.96 units
    (3000, 2000, area(2.0), (0, 0, 0), (1728, 1152, 0, 0, 1728, 1152)),
    (4000, 4000, area(4.0) | SQUARE, (0, 0, 0), (2048, 2048, 0, 0, 2048, 2048)),
    (1920, 1080, area(1.0) | SQUARE, (0, 0, 0), (1820, 1024, 398, 0, 1024, 1024)),
    # pixel: shorter edge R, other R·a: 1024·1.78 = 1822.7 = 28.5 units
    (1920, 1080, pixel(1024), (0, 0, 0), (1820, 1024, 14, 0, 1792, 1024)),
    # 1024/.56 = 1828.6 = 28.6 units: a is rounded before, so portrait is not quite landscape turned
    (1080, 1920, pixel(1024), (0, 0, 0), (1044, 1856, 10, 0, 1024, 1856)),
    (800, 600, pixel(512), (0, 0, 0), (704, 528, 0, 8, 704, 512)),  # 681.0 = 10.6 units
    (1000, 800, pixel(500) | SQUARE, (0, 0, 0), (640, 512, 64, 0, 512, 512)),
    (1000, 500, pixel(500), (0, 0, 0), (1024, 512, 0, 0, 1024, 512)),  # R is not aligned before · a
    (640, 480, pixel(480), (0, 0, 0), (683, 512, 21, 0, 640, 512)),  # 7.5 units: to the even 8; 638.4 = 9.98 units
    (544, 544, pixel(544) | SQUARE, (0, 0, 0), (512, 512, 0, 0, 512, 512)),  # 8.5 units: to the even 8
    (50, 50, pixel(20) | SQUARE, (0, 0, 0), (64, 64, 0, 0, 64, 64)),
    # crop false: straight to the bucket of the picture's own aspect
    (1920, 1080, WHOLE, (0, 0, 0), (1344, 768, 0, 0, 1344, 768)),
    (1500, 1000, WHOLE | SQUARE, (0, 0, 0), (1280, 832, 0, 0, 1280, 832)),
    (800, 600, WHOLE | pixel(512), (0, 0, 0), (704, 512, 0, 0, 704, 512)),
    (1600, 1200, WHOLE | {"crop_style": "random"}, (0.5, 0.5, 0.5), (1152, 896, 0, 0, 1152, 896)),
    (4000, 3000, WHOLE | SAMPLE, (0, 0, 0), (1152, 896, 0, 0, 1152, 896)),
    # crop_style: 797 places to begin at
    (1920, 1080, SQUARE | {"crop_style": "corner"}, (0.5, 0.5, 0.5), (1820, 1024, 0, 0, 1024, 1024)),
    (1920, 1080, RANDOM, (0.9, 0.25, 0.5), (1820, 1024, 199, 0, 1024, 1024)),  # .25·797 = 199.25
    (1920, 1080, RANDOM, (0, 0.999999, 0), (1820, 1024, 796, 0, 1024, 1024)),
    (1080, 1920, RANDOM, (0, 0.9, 0.25), (1024, 1820, 0, 199, 1024, 1024)),
    # The sample: 2.07 MP is not larger than 2048² = 4.19 MP
    (1920, 1080, SAMPLE, (0, 0, 0), (1820, 1024, 398, 0, 1024, 1024)),
    # Larger, but the target of 1182 × 887 does not cover the bucket
    (4000, 3000, SAMPLE, (0, 0, 0), (1365, 1024, 170, 0, 1024, 1024)),
    # A target of 2048² that does: 4000·2048/√12e6 = 2364.8, 3000·… = 1773.6
    (4000, 3000, SAMPLE | {"target_downsample_size": 2048}, (0, 0, 0), (2365, 1774, 670, 375, 1024, 1024)),
    (2048, 2048, SAMPLE | {"target_downsample_size": 2048}, (0, 0, 0), (1024, 1024, 0, 0, 1024, 1024)),
    (2049, 2048, SAMPLE | {"target_downsample_size": 2048}, (0, 0, 0), (2048, 2048, 512, 512, 1024, 1024)),
    (1024, 511, SAMPLE, (0, 0, 0), SMALL),
    # pixel: the shorter edge 1500 is larger than 1024, so to 768; 1024 is not
    (2000, 1500, SHRUNK_PX, (0, 0, 0), (1024, 768, 256, 128, 512, 512)),
    (2000, 1024, SHRUNK_PX, (0, 0, 0), (1000, 512, 244, 0, 512, 512)),
    # area: 2 MP to .5 MP halves the sides; bucket a 2, E 512: W 724.1 = 11.3 units, H 362.0 = 5.7 units
    (
        2000,
        1000,
        area(0.25) | {"maximum_image_size": 1.0, "target_downsample_size": 0.5},
        (0, 0, 0),
        (1000, 500, 148, 58, 704, 384),
    ),
    # minimum_image_size
    (511, 2000, pixel(512) | {"minimum_image_size": 512}, (0, 0, 0), SMALL),
    (512, 512, pixel(512) | {"minimum_image_size": 512}, (0, 0, 0), (512, 512, 0, 0, 512, 512)),
    (500, 499, area(0.25) | {"minimum_image_size": 0.25}, (0, 0, 0), SMALL),
    (500, 500, area(0.25) | {"minimum_image_size": 0.25}, (0, 0, 0), (512, 512, 0, 0, 512, 512)),
    (600, 400, HALF | {"minimum_image_size": 512}, (0, 0, 0), SMALL),
    (1024, 256, HALF | {"minimum_image_size": 512}, (0, 0, 0), (1024, 256, 0, 0, 1024, 256)),
    (1024, 256, HALF | SQUARE | {"minimum_image_size": 512}, (0, 0, 0), SMALL),
    # Square: both edges at least ⌊√300000⌋ = 547, although 547² is less than 300000
    (547, 547, area(0.25) | SQUARE | {"minimum_image_size": 0.3}, (0, 0, 0), (512, 512, 0, 0, 512, 512)),
    (546, 2000, area(0.25) | SQUARE | {"minimum_image_size": 0.3}, (0, 0, 0), SMALL),
    # Aspects, rounded: .497 is .5, 2.004 is 2
    (400, 1000, {"minimum_aspect_ratio": 0.5}, (0, 0, 0), BELOW),
    (497, 1000, HALF | {"minimum_aspect_ratio": 0.5}, (0, 0, 0), (384, 773, 0, 34, 384, 704)),
    (2100, 1000, {"maximum_aspect_ratio": 2}, (0, 0, 0), ABOVE),
    (2004, 1000, HALF | {"maximum_aspect_ratio": 2}, (0, 0, 0), (770, 384, 33, 0, 704, 384)),
    (2100, 1000, SQUARE | {"maximum_aspect_ratio": 2}, (0, 0, 0), ABOVE),
    (40, 1000, HALF | {"minimum_image_size": 512, "minimum_aspect_ratio": 0.5}, (0, 0, 0), SMALL),
    # max_upscale_threshold: 1024/853 = 1.2005, 1024/854 = 1.199
    (853, 853, SQUARE | {"max_upscale_threshold": 0.2}, (0, 0, 0), ENLARGED),
    (854, 854, SQUARE | {"max_upscale_threshold": 0.2}, (0, 0, 0), (1024, 1024, 0, 0, 1024, 1024)),
    (1023, 1024, {"max_upscale_threshold": 0}, (0, 0, 0), ENLARGED),
    (1024, 1024, {"max_upscale_threshold": 0}, (0, 0, 0), (1024, 1024, 0, 0, 1024, 1024)),
    # 768/640 is 1.2 exactly, but 1.2 is not in binary
    (640, 640, pixel(768) | {"max_upscale_threshold": 0.2}, (0, 0, 0), (768, 768, 0, 0, 768, 768)),
    (600, 600, WHOLE | {"max_upscale_threshold": 0.2}, (0, 0, 0), ENLARGED),
    # closest: ln 1.45 = .372 is nearer to ln 2 = .693 than to 0; the difference would say otherwise
    (1450, 1000, ONE_OR_TWO, (0, 0, 0), (704, 486, 0, 51, 704, 384)),
    (1400, 1000, ONE_OR_TWO, (0, 0, 0), (717, 512, 102, 0, 512, 512)),
    # ln 1.41 = .344: nearer to 1, which needs 512/500; 2 needs no enlargement
    (705, 500, ONE_OR_TWO | {"max_upscale_threshold": 0}, (0, 0, 0), (704, 499, 0, 57, 704, 384)),
    (300, 300, ONE_OR_TWO | {"max_upscale_threshold": 0}, (0, 0, 0), ENLARGED),
    # random: a quarter of the draws is aspect 1
    (800, 800, DRAWN, (0.24, 0, 0), (512, 512, 0, 0, 512, 512)),
    (800, 800, DRAWN, (0.26, 0, 0), (704, 704, 0, 160, 704, 384)),
    (600, 600, DRAWN | {"max_upscale_threshold": 0}, (0.9, 0, 0), (512, 512, 0, 0, 512, 512)),
    (300, 300, DRAWN | {"max_upscale_threshold": 0}, (0.9, 0, 0), ENLARGED),
    (800, 800, DRAWN | {"crop_aspect_buckets": ((1.0, 0), (2.0, 1))}, (0, 0, 0), (704, 704, 0, 160, 704, 384)),
    (800, 800, DRAWN | {"crop_aspect_buckets": ((2.0, 3), (1.0, 0))}, (1 - 2**-53, 0, 0), (704, 704, 0, 160, 704, 384)),
    (0, 100, {}, (0, 0, 0), "no size"),
    (100, -1, {}, (0, 0, 0), "no size"),
]


def plan(width: Any, height: Any, settings: GeometrySettings, draws: Any = None) -> Plan:
    return plan_crops(np.atleast_1d(width), np.atleast_1d(height), settings, draws)


@pytest.mark.parametrize(("width", "height", "overrides", "draws", "expected"), GOLDEN)
def test_plan_is_the_one_worked_out_by_hand(
    width: int,
    height: int,
    overrides: dict[str, Any],
    draws: tuple[float, float, float],
    expected: tuple[int, ...] | str,
) -> None:
    planned = plan(width, height, GeometrySettings(**overrides), np.array([draws]))
    if isinstance(expected, str):
        assert REASONS[planned.dropped[0]] == expected
        assert not planned.kept[0]
    else:
        assert planned.kept[0], REASONS[planned.dropped[0]]
        assert planned.geometry(0) == Geometry(*expected)


SIDES = st.integers(1, 6000)
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=30)
RESOLUTIONS = st.one_of(
    st.tuples(st.just("pixel"), st.integers(16, 2048)),
    st.tuples(st.just("pixel_area"), st.integers(16, 2048)),
    st.tuples(st.just("area"), st.floats(0.01, 4.5)),
)


@st.composite
def any_settings(draw: st.DrawFn) -> GeometrySettings:
    kind, resolution = draw(RESOLUTIONS)
    maximum = draw(st.sampled_from([0, resolution, resolution * 2]))
    return GeometrySettings(
        resolution_type=kind,
        resolution=resolution,
        aspect_bucket_alignment=draw(st.sampled_from([64, 32, 16])),
        aspect_bucket_rounding=draw(st.integers(0, 4)),
        crop=draw(st.booleans()),
        crop_aspect=draw(st.sampled_from(["square", "preserve", "closest", "random"])),
        crop_style=draw(st.sampled_from(["center", "random", "corner"])),
        crop_aspect_buckets=((0.5, 1), (0.75, 2), (1.0, 0.5), (1.5, 0), (2.0, 1)),
        minimum_image_size=draw(st.sampled_from([0, resolution / 4])),
        maximum_image_size=maximum,
        target_downsample_size=draw(st.sampled_from([resolution * 0.75, resolution])),
        max_upscale_threshold=draw(st.sampled_from([None, 0.0, 0.5])),
    )


def columns(planned: Plan) -> np.ndarray:
    return np.array([getattr(planned, f.name) for f in fields(Plan)])


def draws_of(count: int) -> np.ndarray:
    return draw_for([f"{i}.png" for i in range(count)], seed=3, epoch=1)


@given(SIZES, any_settings())
def test_the_crop_lies_in_the_scaled_picture_and_its_sides_are_aligned(
    sizes: list[tuple[int, int]], settings: GeometrySettings
) -> None:
    width, height = np.array(sizes).T
    planned = plan(width, height, settings, draws_of(len(sizes)))
    p = columns(planned)[:, planned.kept]
    assert (p[:6] >= 0).all()
    assert (p[2] + p[4] <= p[0]).all()
    assert (p[3] + p[5] <= p[1]).all()
    assert (p[4:6] % settings.aspect_bucket_alignment == 0).all()
    assert (p[4:6] > 0).all()
    assert (columns(planned)[:6, ~planned.kept] == 0).all()


@given(SIZES, any_settings())
def test_the_scaled_picture_keeps_the_aspect_when_it_is_cropped(
    sizes: list[tuple[int, int]], settings: GeometrySettings
) -> None:
    settings = replace(settings, crop=True)
    width, height = np.array(sizes).T
    planned = plan(width, height, settings, draws_of(len(sizes)))
    # One factor for both sides, but that each is rounded by at most half a pixel.
    across, down = planned.scaled_width_px / width, planned.scaled_height_px / height
    allowed = 0.5 / width + 0.5 / height + 1e-9
    assert (abs(across - down)[planned.kept] <= allowed[planned.kept]).all()


@given(st.permutations(range(12)), any_settings(), st.data())
def test_a_permutation_of_pictures_permutes_the_plan(
    order: list[int], settings: GeometrySettings, data: st.DataObject
) -> None:
    sizes = np.array(data.draw(st.lists(st.tuples(SIDES, SIDES), min_size=12, max_size=12)))
    draws = draws_of(12)
    here = columns(plan(*sizes.T, settings, draws))
    there = columns(plan(*sizes[order].T, settings, draws[order]))
    assert (here[:, order] == there).all()


@given(st.floats(0.25, 4), st.integers(256, 2048), st.sampled_from([64, 32, 16]))
def test_the_bucket_has_the_area_but_for_the_alignment(aspect: float, resolution: int, alignment: int) -> None:
    settings = GeometrySettings(resolution=resolution, aspect_bucket_alignment=alignment)
    p = plan(round(4000 * aspect), 4000, settings).geometry(0)
    # Each side and E are off by at most half a unit: relative errors add up.
    allowed = 1.0
    for side in (p.width_px, p.height_px, resolution, resolution):
        allowed *= 1 + alignment / 2 / (side - alignment / 2)
    assert resolution**2 / allowed <= p.width_px * p.height_px <= resolution**2 * allowed


@given(st.integers(1, 40), st.integers(1, 40), any_settings())
def test_a_picture_of_its_buckets_size_is_not_scaled(across: int, down: int, settings: GeometrySettings) -> None:
    # Where the bucket of a picture has the picture's size, and nothing is larger than the maximum, nothing is done.
    settings = replace(settings, maximum_image_size=0)
    size = (across * settings.aspect_bucket_alignment, down * settings.aspect_bucket_alignment)
    p = plan(*size, settings, draws_of(1)).geometry(0)
    if (p.width_px, p.height_px) == size:
        assert p == Geometry(*size, 0, 0, *size)


@given(st.floats(0.5, 4), st.integers(4, 32))
def test_planning_twice_is_planning_once_for_pixel_and_square(aspect: float, units: int) -> None:
    # Exact where R is a multiple of the alignment, and rounding the aspect to 2 digits moves the longer side by less
    # than half a unit: R·.005 (landscape) and R·.005/a² (portrait).
    edge = 64 * units
    for settings in (
        GeometrySettings(resolution_type="pixel", resolution=edge),
        GeometrySettings(resolution_type="pixel", resolution=edge, crop_aspect="square"),
    ):
        if aspect < 1 and edge * 0.005 / aspect**2 >= 20:
            continue
        once = plan(round(5000 * aspect), 5000, settings).geometry(0)
        twice = plan(once.width_px, once.height_px, settings).geometry(0)
        assert twice == Geometry(once.width_px, once.height_px, 0, 0, once.width_px, once.height_px)


@given(st.floats(0.5, 2), st.integers(8, 32))
def test_planning_twice_moves_an_area_bucket_by_at_most_a_unit(aspect: float, units: int) -> None:
    # Not exact: where both sides were rounded up (or down), the aspect is the same but the area is not.
    settings = GeometrySettings(resolution=64 * units)
    once = plan(round(5000 * aspect), 5000, settings).geometry(0)
    twice = plan(once.width_px, once.height_px, settings).geometry(0)
    assert abs(twice.width_px - once.width_px) <= 64
    assert abs(twice.height_px - once.height_px) <= 64


@pytest.mark.parametrize(("wide", "high"), [(1, 1), (2, 1), (5, 4), (5, 2), (4, 1), (5, 1)])
@given(factor=st.integers(10, 1000), kind=st.sampled_from(["pixel", "pixel_area"]), resolution=st.integers(64, 2048))
def test_a_turned_picture_has_the_turned_plan(wide: int, high: int, factor: int, kind: str, resolution: int) -> None:
    # Exact where both w/h and h/w have at most two digits; others may differ by a unit, as 1920 × 1080 does by pixel.
    settings = GeometrySettings(resolution_type=kind, resolution=resolution)
    p = plan(wide * factor, high * factor, settings).geometry(0)
    turned = plan(high * factor, wide * factor, settings).geometry(0)
    assert turned == Geometry(p.scaled_height_px, p.scaled_width_px, p.top_px, p.left_px, p.height_px, p.width_px)


@given(st.floats(1, 3), st.integers(64, 1536))
def test_a_turned_bucket_differs_by_at_most_a_unit(aspect: float, resolution: int) -> None:
    settings = GeometrySettings(resolution=resolution)
    p = plan(round(5000 * aspect), 5000, settings).geometry(0)
    turned = plan(5000, round(5000 * aspect), settings).geometry(0)
    assert abs(turned.width_px - p.height_px) <= 64
    assert abs(turned.height_px - p.width_px) <= 64


@given(SIZES, any_settings())
def test_nothing_is_enlarged_beyond_the_threshold(sizes: list[tuple[int, int]], settings: GeometrySettings) -> None:
    settings = replace(settings, max_upscale_threshold=0.25)
    width, height = np.array(sizes).T
    planned = plan(width, height, settings, draws_of(len(sizes)))
    across = planned.width_px / width
    down = planned.height_px / height
    assert (np.maximum(across, down) <= 1.25 + 1e-6).all()


def test_random_aspects_follow_their_weights() -> None:
    count = 20_000
    settings = GeometrySettings(**DRAWN)
    planned = plan(np.full(count, 800), np.full(count, 800), settings, draws_of(count))
    assert (planned.width_px == 704).mean() == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / count))


def test_random_crops_reach_every_offset_alike() -> None:
    count = 34_000
    settings = GeometrySettings(resolution=64, crop_aspect="square", crop_style="random")
    planned = plan(np.full(count, 80), np.full(count, 64), settings, draws_of(count))
    counts = np.bincount(planned.left_px, minlength=17)
    assert len(counts) == 17
    assert abs(counts - 2000).max() < 5 * math.sqrt(2000)


def test_settings_that_draw_at_random_need_draws() -> None:
    for overrides in (RANDOM, DRAWN):
        settings = GeometrySettings(**overrides)
        assert needs_draws(settings)
        with pytest.raises(ValueError, match="draws are needed"):
            plan(800, 800, settings)
    for overrides in ({}, SQUARE, ONE_OR_TWO, WHOLE | {"crop_style": "random", "crop_aspect": "random"}):
        settings = GeometrySettings(**({"crop_aspect_buckets": ((1.0, 1),)} | overrides))
        assert not needs_draws(settings)
        assert plan(800, 800, settings).kept.all()


def test_draws_belong_to_the_picture_not_to_the_order() -> None:
    names = ["a.png", "猫/ß.jpg", "\udcff.webp", "b.png"]
    draws = draw_for(names, seed=7, epoch=3)
    assert draws.shape == (4, 3)
    assert (draw_for(names[::-1], seed=7, epoch=3) == draws[::-1]).all()
    assert (draw_for(names[1:2], seed=7, epoch=3) == draws[1:2]).all()


def test_draws_change_with_seed_epoch_and_picture_and_are_uniform() -> None:
    names = [f"{i}.png" for i in range(4000)]
    runs = [draw_for(names, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (2**70, 0))]
    table = np.concatenate(runs, axis=1)
    assert table.min() >= 0
    assert table.max() < 1
    # Every column is uniform, and none tells anything about another (4 standard deviations or more).
    assert abs(table.mean(axis=0) - 0.5).max() < 4.5 * math.sqrt(1 / 12 / 4000)
    assert abs(table.var(axis=0) - 1 / 12).max() < 0.006
    correlation = np.corrcoef(np.concatenate(runs[:5], axis=1).T) - np.eye(15)
    assert abs(correlation).max() < 0.08


def test_draws_are_the_same_on_every_machine() -> None:
    # Frozen: a change of these changes every run that has random crops.
    assert draw_for(["cats/004.png"], seed=42, epoch=2).tolist() == [
        [0.8344214674012911, 0.4155854393782925, 0.9933358065878606]
    ]


def test_no_pictures_have_an_empty_plan() -> None:
    empty = np.array([], dtype=np.int64)
    assert len(plan_crops(empty, empty, GeometrySettings(**RANDOM), draw_for([], 0, 0)).dropped) == 0
