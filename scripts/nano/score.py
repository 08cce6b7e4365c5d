"""How near pictures come to a style, and the sheets that show it.

    python scripts/nano/score.py DRAWN STYLE OUT

DRAWN holds the pictures of Validate Sample at strengths 0 and 1, prompt by prompt; STYLE the pictures of the style.
``before.png``, ``after.png`` and ``before_after.png`` are written to OUT; stdout is one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ENLARGED, COLUMNS, GAP_PX = 2, 4, 16


def statistics(pictures: np.ndarray) -> np.ndarray:
    """Eight numbers of a set (N, height, width, 3) in [0, 1], each the mean over the set.

    Mean and deviation of red, green and blue, the saturation (largest less smallest channel), and the steepness of
    edges (mean absolute difference of neighbouring grey values).
    """
    grey = pictures.mean(3)
    edges = np.abs(np.diff(grey, axis=1)).mean((1, 2)) + np.abs(np.diff(grey, axis=2)).mean((1, 2))
    saturation = (pictures.max(3) - pictures.min(3)).mean((1, 2))
    columns = [pictures.mean((1, 2)), pictures.std((1, 2)), saturation[:, None], edges[:, None]]
    return np.concatenate(columns, 1).mean(0)


def style_distance(pictures: np.ndarray, style: np.ndarray) -> float:
    """Euclidean distance between the statistics of two sets."""
    return float(np.linalg.norm(statistics(pictures) - statistics(style)))


def read(paths: list[Path]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in paths])


def sheet(pictures: np.ndarray) -> Image.Image:
    count, height, width, _ = pictures.shape
    rows = -(-count // COLUMNS)
    page = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    for number, picture in enumerate((pictures * 255).round().astype(np.uint8)):
        page.paste(Image.fromarray(picture), (number % COLUMNS * width, number // COLUMNS * height))
    return page.resize((page.width * ENLARGED, page.height * ENLARGED), Image.Resampling.NEAREST)


def main() -> None:
    drawn, style, out = map(Path, sys.argv[1:])
    pictures, wanted = read(sorted(drawn.glob("*.png"))), read(sorted(style.glob("*.png")))
    before, after = pictures[0::2], pictures[1::2]
    left, right = sheet(before), sheet(after)
    both = Image.new("RGB", (left.width + GAP_PX + right.width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + GAP_PX, 0))
    result: dict[str, float | str] = {}
    for name, picture in (("before", left), ("after", right), ("before_after", both)):
        picture.save(out / f"{name}.png")
        result[name] = str(out / f"{name}.png")
    result["style_distance_before"] = round(style_distance(before, wanted), 4)
    result["style_distance_after"] = round(style_distance(after, wanted), 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
