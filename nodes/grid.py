"""A labelled sheet of pictures: prompts down, strengths across."""

from __future__ import annotations

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL_PX = 192  # small pictures are enlarged by a whole factor to at least this
MARGIN_PX = 8
# Fonts that draw Chinese, where a system has one; PIL's own draws Latin letters only.
FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "msyh.ttc",
    "PingFang.ttc",
    "wqy-zenhei.ttc",
    "simhei.ttf",
)


def labelled_grid(images: Tensor, prompts: list[str], labels: list[str]) -> Tensor:
    """One picture (1, height, width, 3) of ``images`` (prompts · labels, h, w, 3), which come prompt by prompt."""
    _, height, width, _ = images.shape
    factor = max(1, -(-CELL_PX // max(height, width)))
    cell_width, cell_height = width * factor, height * factor
    size = max(12, cell_width // 16)
    font = _font(size)
    line = size + 4
    columns = max(8, int(len(labels) * cell_width / (0.55 * size)))
    titles = [textwrap.wrap(prompt, columns)[:2] or [""] for prompt in prompts]
    row_heights = [cell_height + line * len(title) + 2 * MARGIN_PX for title in titles]
    sheet_width = len(labels) * (cell_width + MARGIN_PX) + MARGIN_PX
    sheet = Image.new("RGB", (sheet_width, sum(row_heights) + line + 2 * MARGIN_PX), "white")
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(labels):
        pen.text((MARGIN_PX + column * (cell_width + MARGIN_PX), MARGIN_PX), label, fill="black", font=font)
    top = line + MARGIN_PX
    for row, title in enumerate(titles):
        for number, words in enumerate(title):
            pen.text((MARGIN_PX, top + number * line), words, fill=(90, 90, 90), font=font)
        for column in range(len(labels)):
            pixels = (images[row * len(labels) + column].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            picture = Image.fromarray(pixels).resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN_PX + column * (cell_width + MARGIN_PX), top + line * len(title)))
        top += row_heights[row]
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    opened = (_open(name, size) for name in FONTS)
    return next(filter(None, opened), None) or ImageFont.load_default(size)


def _open(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None
