"""Draws the icon and the banner that ComfyUI's registry shows: a little picture on its way out of noise.

python -m scripts.registry_pictures
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
ICON, BANNER = IMAGES / "icon.png", IMAGES / "banner.png"
CELLS = 25  # a picture is so many coloured cells wide: noise on single pixels would be grey, and a large file
SKY, GLOW, SUN, FAR, NEAR = (38, 47, 96), (244, 151, 108), (255, 221, 120), (92, 74, 134), (33, 31, 66)
BACKGROUND, TEXT, QUIET = (22, 22, 34), (245, 244, 250), (169, 166, 190)


def scene(side_px: int) -> np.ndarray:
    """A sun over two hills, (side, side, 3) in [0, 255]."""
    y, x = np.mgrid[0:side_px, 0:side_px] / side_px
    drawn = np.array(SKY) + (np.array(GLOW) - SKY) * np.clip(y / 0.75, 0, 1)[..., None] ** 1.5
    for colour, inside in (
        (SUN, (x - 0.5) ** 2 + (y - 0.48) ** 2 < 0.21**2),
        (FAR, y > 0.66 + 0.06 * np.sin(7 * x + 0.4)),
        (NEAR, y > 0.8 + 0.07 * np.sin(5 * x + 3.6)),
    ):
        drawn[inside] = colour
    return drawn


def tile(side_px: int, sigma: np.ndarray | float) -> Image.Image:
    """The scene at a noise level, ``(1 − σ)·picture + σ·noise``, as training sees pictures; rounded corners.

    Args:
        sigma: in [0, 1]; one for the whole picture, or one for each cell, (CELLS, CELLS).
    """
    noise = np.random.default_rng(7).integers(0, 256, (CELLS, CELLS, 3))
    levels = np.broadcast_to(sigma, (CELLS, CELLS))[..., None]
    size = (side_px, side_px)
    sharp = Image.fromarray(scene(4 * side_px).astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
    coarse = np.asarray(sharp.resize((CELLS, CELLS), Image.Resampling.BOX), dtype=float)
    mixed = Image.fromarray(((1 - levels) * coarse + levels * noise).round().astype(np.uint8))
    clear = Image.fromarray(((levels[..., 0] == 0) * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    drawn = Image.composite(sharp, mixed.resize(size, Image.Resampling.NEAREST), clear)
    mask = Image.new("L", (4 * side_px, 4 * side_px))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side_px - 1, 4 * side_px - 1), 4 * side_px // 8, fill=255)
    drawn.putalpha(mask.resize(size, Image.Resampling.LANCZOS))
    return drawn


def icon(side_px: int = 400) -> Image.Image:
    """Noise in the lower left corner, the picture in the upper right one."""
    y, x = np.mgrid[0:CELLS, 0:CELLS] / (CELLS - 1)
    sigma = np.clip(0.95 * (y - x) + 0.16, 0, 1)
    return tile(side_px, np.where(sigma < 0.08, 0, sigma))


def banner(width_px: int = 1260, height_px: int = 540) -> Image.Image:
    """The name over five steps from noise to the picture."""
    drawn = Image.new("RGB", (width_px, height_px), BACKGROUND)
    side, gap = 200, 20
    left = (width_px - 5 * side - 4 * gap) // 2
    for number, sigma in enumerate((1, 0.75, 0.5, 0.25, 0)):
        step = tile(side, sigma)
        drawn.paste(step, (left + number * (side + gap), 260), step)
    pen = ImageDraw.Draw(drawn)
    pen.text((left, 70), "Lumina2 Trainer", fill=TEXT, font=ImageFont.load_default(84))
    pen.text((left + 4, 180), "Train Lumina-Image-2.0 inside ComfyUI", fill=QUIET, font=ImageFont.load_default(34))
    return drawn


def main() -> None:
    for path, drawn in ((ICON, icon()), (BANNER, banner())):
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(path, optimize=True)
        print(f"{path.relative_to(Path.cwd())}: {drawn.size[0]} × {drawn.size[1]}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
