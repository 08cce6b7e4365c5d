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


def captioned_sheet(crops: list[np.ndarray], captions: list[str], columns: int = 6) -> Tensor:
    """One picture (1, height, width, 3) of crops (h, w, 3) uint8 of any size, each with its size and caption below."""
    columns = min(columns, len(crops))
    font = _font(12)
    line, lines = 16, 4
    cell_height = CELL_PX + line * lines + MARGIN_PX
    rows = -(-len(crops) // columns)
    size = (columns * (CELL_PX + MARGIN_PX) + MARGIN_PX, rows * cell_height + MARGIN_PX)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, (crop, caption) in enumerate(zip(crops, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = MARGIN_PX + column * (CELL_PX + MARGIN_PX), MARGIN_PX + row * cell_height
        height, width = crop.shape[:2]
        scale = CELL_PX / max(height, width)
        shown = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = Image.fromarray(crop).resize(shown, Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + (CELL_PX - shown[0]) // 2, top + (CELL_PX - shown[1]) // 2))
        words = [f"{width}×{height}", *textwrap.wrap(caption, 30)[: lines - 1]]
        for place, text in enumerate(words):
            colour = (140, 140, 140) if place == 0 else (60, 60, 60)
            pen.text((left, top + CELL_PX + 2 + place * line), text, fill=colour, font=font)
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]
