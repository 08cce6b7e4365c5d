"""What a dataset gives, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..training.data.captions import CaptionEditor, length_report
from ..training.data.dataset import Dataset, decode_row, open_rows
from ..training.data.prompts import SYSTEM_PROMPTS, with_system_prompt
from ..training.data.sources.opening import open_source
from ..training.errors import DataError
from .grid import captioned_sheet
from .progress import Progress
from .sockets import DatasetSocket

DEFAULT_TOKENS = 256  # of Cache Text Embeds


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
                    tooltip="How many pictures to show; all of them, to caption all.",
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
                io.Clip.Input("clip", optional=True, tooltip="Lumina2's text encoder, to report caption lengths."),
                io.Combo.Input(
                    "system_prompt",
                    options=list(SYSTEM_PROMPTS),
                    optional=True,
                    tooltip="What stands before every caption when their lengths are counted.",
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
    def execute(
        cls, dataset: Dataset, limit: int, first: int = 0, clip: Any = None, system_prompt: str = "superior"
    ) -> io.NodeOutput:
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
                id = rows.ids[row].as_py()
                crops.append(decode_row(part, rows, row, source.read(id)))
                variants = edit(tuple(rows.captions[row].as_py()), id)
                captions.append(variants[0] if variants else "")
        if not crops:
            raise DataError(f"There are only {dataset.pictures} pictures: set first below that.")
        report = "\n".join(line for one in dataset.reports for line in one.lines())
        if clip is not None:
            progress.say("counting tokens")
            report += "\n" + _lengths(dataset, clip, SYSTEM_PROMPTS[system_prompt])
        sheet = captioned_sheet(crops, captions)
        progress.say(dataset.reports[0].lines()[0])
        pictures: list[Any] = [torch.from_numpy(crop.copy()).float().div_(255)[None] for crop in crops]
        return io.NodeOutput(sheet, report, pictures, captions, ui=ui.PreviewImage(sheet, cls=cls))


def _lengths(dataset: Dataset, clip: Any, system_prompt: str) -> str:
    """How long all captions are in the text encoder's own tokens, the system prompt's included."""
    from .bridge import token_counter

    texts = []
    for part in dataset.parts:
        rows, edit = open_rows(part), CaptionEditor(part.settings.captions)
        pairs = zip(rows.ids.to_pylist(), rows.captions.to_pylist(), strict=True)
        texts += [with_system_prompt(caption, system_prompt) for id, raw in pairs for caption in edit(tuple(raw), id)]
    found = length_report(texts, token_counter(clip), DEFAULT_TOKENS)
    bars = ", ".join(f"{n * 32}–{n * 32 + 31}: {count}" for n, count in enumerate(found.histogram) if count)
    lines = [f"{found.texts} captions of {found.mean:.0f} tokens on average, at most {found.longest} ({bars})"]
    if found.over:
        lines.append(f"{found.over} captions are longer than {DEFAULT_TOKENS} tokens and will be cut:")
        lines += [f"  {length} tokens: …{text[-80:]}" for text, length in found.cut]
    return "\n".join(lines)
