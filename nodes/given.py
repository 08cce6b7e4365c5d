"""Datasets from what other nodes made: pictures, latents and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..training.cache.given import keep_given
from ..training.config.dataset import (
    CaptionSettings,
    DatasetSettings,
    GeometrySettings,
    MixSettings,
    SourceSettings,
)
from ..training.data.captions import OVERWRITE, write_captions
from ..training.data.dataset import Dataset, load_dataset, open_rows
from ..training.data.sources.memory import store_images
from ..training.errors import DataError
from .dataset import CROPS, load_parts
from .places import cache, cache_root
from .progress import Progress
from .sockets import DatasetSocket, EmbedsSocket, LatentsSocket


class Lumina2DatasetFromImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2DatasetFromImages",
            display_name="Dataset from Images",
            category="Lumina2",
            description="Makes a dataset of pictures and captions that come from other nodes.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures, as batches or as a list."),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="A caption for each picture, wired from a captioning node. One caption is used for all; "
                    "typed ones go one a line.",
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=1,
                    max=16384,
                    step=64,
                    control_after_generate=False,
                    tooltip="Pictures are scaled to about this number squared pixels; 1024 is best for Lumina2.",
                ),
                io.Combo.Input(
                    "crop", options=[c for c in CROPS if c not in ("closest", "random")], tooltip="As in Load Dataset."
                ),
                io.Int.Input(
                    "repeats",
                    default=0,
                    min=0,
                    max=10000,
                    control_after_generate=False,
                    tooltip="Extra passes over these pictures in an epoch; 0 shows each once.",
                ),
                DatasetSocket.Input("dataset", optional=True, tooltip="Another dataset to add these pictures to."),
            ],
            outputs=[DatasetSocket.Output(display_name="dataset", tooltip="Pictures, crops and captions.")],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
        )

    @classmethod
    def execute(
        cls,
        images: list[torch.Tensor],
        captions: list[str],
        resolution: list[int],
        crop: list[str],
        repeats: list[int],
        dataset: list[Dataset] | None = None,
    ) -> io.NodeOutput:
        pictures = [
            (picture[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            for batch in images
            for picture in (batch if batch.ndim == 4 else batch[None])
        ]
        said = [np.ascontiguousarray(picture) for picture in pictures]
        folder = cache_root() / "images"
        digest = store_images(folder, said, _one_for_each(captions, len(pictures)))
        settings = DatasetSettings(
            id=f"images-{digest[:8]}",
            source=SourceSettings("memory", str(folder / f"{digest}.json")),
            geometry=GeometrySettings(
                resolution=resolution[0],
                crop=crop[0] != "none",
                crop_aspect=crop[0] if crop[0] != "none" else "preserve",
            ),
            captions=CaptionSettings("csv"),  # the captions come with the pictures
            mix=MixSettings(repeats=repeats[0]),
        )
        return load_parts(_only(cls.hidden.unique_id), (settings,), dataset[0] if dataset else None)


class Lumina2DatasetFromLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2DatasetFromLatents",
            display_name="Dataset from Latents",
            category="Lumina2",
            description="Takes latents and conditionings of other nodes, such as Make Training Dataset and Load "
            "Training Dataset, as they are.",
            inputs=[
                io.Latent.Input("latents", tooltip="Latents of the Flux VAE, as a list."),
                io.Conditioning.Input("conditioning", tooltip="One conditioning a latent, in the same order."),
                io.Conditioning.Input(
                    "empty",
                    optional=True,
                    tooltip="The conditioning of an empty prompt, for caption dropout; without one it is a zero.",
                ),
            ],
            outputs=[
                LatentsSocket.Output(display_name="latents", tooltip="For the train node."),
                EmbedsSocket.Output(display_name="embeds", tooltip="For the train node."),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(
        cls, latents: list[dict[str, Any]], conditioning: list[Any], empty: list[Any] | None = None
    ) -> io.NodeOutput:
        pictures = [latent for one in latents for latent in one["samples"]]
        embeddings = [embedding for one in conditioning for embedding in _embeddings(one)]
        nothing = _embeddings(empty[0])[0] if empty else None
        kept = keep_given(pictures, embeddings, nothing, cache("latents"), cache("text"))
        Progress(_only(cls.hidden.unique_id)).say(f"{len(pictures)} latents and captions")
        return io.NodeOutput(*kept)


class Lumina2SaveCaptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2SaveCaptions",
            display_name="Save Captions",
            category="Lumina2",
            description="Writes a text file beside each picture of a dataset.",
            inputs=[
                DatasetSocket.Input(
                    "dataset",
                    tooltip="The pictures, of local folders. Where they have no captions yet, load them with "
                    "caption_strategy filename: textfile would leave them out.",
                ),
                io.String.Input(
                    "captions",
                    force_input=True,
                    tooltip="A caption for each picture, in the dataset's order: Preview Dataset gives the pictures to "
                    "a captioning node in that order.",
                ),
                io.Combo.Input(
                    "overwrite",
                    options=list(OVERWRITE),
                    tooltip="keep existing: pictures that have a caption keep it. replace: the new one stays. add a "
                    "line: the new one becomes a variant.",
                ),
            ],
            outputs=[DatasetSocket.Output(display_name="dataset", tooltip="Pictures, crops and captions.")],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, dataset: list[Dataset], captions: list[str], overwrite: list[str]) -> io.NodeOutput:
        progress = Progress(_only(cls.hidden.unique_id))
        pictures = []
        for part in dataset[0].parts:
            if part.settings.source.type != "local":
                raise DataError(
                    f"Dataset {part.settings.id!r} is no local folder: captions cannot be written beside its pictures."
                )
            folder = Path(part.settings.source.instance_data_dir)
            pictures += [folder / id for id in open_rows(part).ids.to_pylist()]
        written = write_captions(pictures, captions, overwrite[0])
        parts = tuple(
            load_dataset(_with_text_files(part.settings), cache_root()) for part in dataset[0].parts
        )  # fmt: skip
        empty = f", {len(written.empty)} empty (first: {written.empty[0]})" if written.empty else ""
        progress.say(f"{written.written} captions written, {written.added} added, {written.kept} kept{empty}")
        return io.NodeOutput(
            Dataset(tuple(p.parts[0] for p in parts), tuple(report for p in parts for report in p.reports))
        )


def _with_text_files(settings: DatasetSettings) -> DatasetSettings:
    from dataclasses import replace

    return replace(settings, captions=replace(settings.captions, caption_strategy="textfile"))


def _one_for_each(captions: list[str], pictures: int) -> list[str]:
    """Wired captions as they are; a single text of as many lines as there are pictures is one a line."""
    if len(captions) == 1 and pictures > 1:
        lines = [line.strip() for line in captions[0].splitlines() if line.strip()]
        captions = lines if len(lines) == pictures else captions * pictures
    if len(captions) != pictures:
        raise DataError(f"{len(captions)} captions for {pictures} pictures: give one caption each, in the same order.")
    if not all(caption.strip() for caption in captions):
        raise DataError("A caption is empty. Write what the pictures show, or wire a captioning node in.")
    return captions


def _embeddings(conditioning: Any) -> list[torch.Tensor]:
    """Embeddings (tokens, width) of one conditioning, without the padding that its mask shows."""
    found = []
    for embedding, extra in conditioning:
        mask = extra.get("attention_mask")
        for row in range(len(embedding)):
            length = int(mask[row].sum()) if mask is not None else embedding.shape[1]
            found.append(embedding[row, :length].float())
    return found


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value
