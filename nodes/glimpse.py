"""What Load Dataset shows of a dataset on its own node: how much there is, what is wrong, and the first crops."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..training.data.dataset import Dataset, Part, decode_row, open_rows
from ..training.data.sources.opening import open_source
from ..training.errors import Lumina2Error

CROPS, CROP_PX = 6, 96
PROBLEMS = 20  # sentences that are shown; the others are counted


def glimpse(dataset: Dataset) -> dict[str, Any]:
    """Counts, sizes as [width, height, pictures] in px, problems as sentences, and crops as data URLs."""
    problems = list(dataset.skipped)
    return {
        "pictures": dataset.pictures,
        "buckets": [list(bucket) for report in dataset.reports if not report.masks for bucket in report.buckets],
        "enlarged": sum(report.enlarged for report in dataset.reports),
        "left_out": sum(count for report in dataset.reports for _, count, _ in report.dropped),
        "problems": problems[:PROBLEMS],
        "more_problems": max(len(problems) - PROBLEMS, 0),
        "crops": [crop for part in dataset.parts for crop in _crops(part, CROPS)][:CROPS],
    }


def _crops(part: Part, count: int) -> list[str]:
    """The first pictures as they are trained on; none where they cannot be read, which is not what this node is for."""
    if part.settings.mix.dataset_type == "conditioning":
        return []
    try:
        rows, source = open_rows(part), open_source(part.settings, Path(part.spool))
        return [
            _data_url(Image.fromarray(decode_row(part, rows, row, source.read(rows.ids[row].as_py()))))
            for row in range(min(count, len(rows)))
        ]
    except (Lumina2Error, OSError, ValueError):
        return []


def _data_url(picture: Image.Image) -> str:
    picture.thumbnail((CROP_PX, CROP_PX))
    written = BytesIO()
    picture.convert("RGB").save(written, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}"
