"""What a dataset gives, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..training.data.captions import CaptionEditor
from ..training.data.dataset import Dataset, open_rows
from ..training.data.pictures import decode
from ..training.data.sources.opening import open_source
from ..training.errors import DataError
from .grid import captioned_sheet
from .progress import Progress
from .sockets import DatasetSocket


class Lumina2PreviewDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2PreviewDataset",
            display_name="Preview Dataset",
            category="Lumina2",
            description="Shows the crops that the model will see, with their captions, the sizes, and what was left "
            "out and why.",
            inputs=[
                DatasetSocket.Input("dataset", tooltip="The dataset to look at."),
                io.Int.Input(
                    "limit",
                    default=24,
                    min=1,
                    max=100000,
                    control_after_generate=False,
                    tooltip="How many pictures to show.",
                ),
                io.Int.Input(
                    "first",
                    default=0,
                    min=0,
                    max=10**9,
                    control_after_generate=False,
                    optional=True,
                    tooltip="The picture to begin with, counted from 0.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The crops with their captions on one sheet."),
                io.String.Output(display_name="report", tooltip="Counts, sizes, and what was left out and why."),
                io.Image.Output(
                    display_name="crops", is_output_list=True, tooltip="The crops alone, for a captioning node."
                ),
                io.String.Output(display_name="captions", is_output_list=True, tooltip="The first caption of each."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, dataset: Dataset, limit: int, first: int = 0) -> io.NodeOutput:
        progress = Progress(cls.hidden.unique_id)
        crops: list[np.ndarray] = []
        captions: list[str] = []
        for part in dataset.parts:
            rows = open_rows(part)
            source = open_source(part.settings, Path(part.spool))
            edit = CaptionEditor(part.settings.captions)
            begin, first = min(first, len(rows)), max(first - len(rows), 0)
            for row in range(begin, min(len(rows), begin + limit - len(crops))):
                progress.step(len(crops), f"reading picture {len(crops) + 1}", limit)
                id, size = rows.ids[row].as_py(), tuple(rows.sizes[row].tolist())
                background = part.settings.geometry.alpha_background
                crops.append(decode(source.read(id), id, rows.plan.geometry(row), background, size))
                variants = edit(tuple(rows.captions[row].as_py()), id)
                captions.append(variants[0] if variants else "")
        if not crops:
            raise DataError(f"There are only {dataset.pictures} pictures: set first below that.")
        report = "\n".join(line for one in dataset.reports for line in one.lines())
        sheet = captioned_sheet(crops, captions)
        progress.say(dataset.reports[0].lines()[0])
        pictures: list[Any] = [torch.from_numpy(crop.copy()).float().div_(255)[None] for crop in crops]
        return io.NodeOutput(sheet, report, pictures, captions, ui=ui.PreviewImage(sheet, cls=cls))
