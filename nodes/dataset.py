"""Datasets from folders."""

from __future__ import annotations

from comfy_api.latest import io

from ..training.data.captions import STRATEGIES
from ..training.data.dataset import Dataset, append, load_dataset
from ..training.data.geometry import ALIGNMENT_PX, CROPS
from ..training.data.source import folder_fingerprint
from .places import dataset_folder
from .progress import Progress
from .sockets import DatasetSocket


class Lumina2LoadDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2LoadDataset",
            display_name="Load Dataset",
            category="Lumina2",
            description="Reads the pictures of a folder and their captions.",
            inputs=[
                io.String.Input(
                    "folder",
                    default="bundled: nano-style",
                    tooltip="The folder with your pictures: a full path, or one under ComfyUI's input folder. "
                    "bundled: nano-style, nano-style-heldout and nano-concept come with the plugin.",
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=ALIGNMENT_PX,
                    max=4096,
                    step=ALIGNMENT_PX,
                    tooltip="Pictures are scaled to about this number squared pixels; 1024 is best for Lumina2.",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    tooltip="preserve: the picture's own aspect, cut to multiples of 64. square: the middle square.",
                ),
                io.Combo.Input(
                    "caption_strategy",
                    options=list(STRATEGIES),
                    tooltip="textfile: cat.txt beside cat.png, each line a variant. filename: the name itself. "
                    "instanceprompt: the same text for all.",
                ),
                io.String.Input(
                    "instance_prompt",
                    default="",
                    tooltip="The caption of every picture where caption_strategy is instanceprompt, best with a "
                    "trigger word: a photo of zorblax.",
                ),
                io.Int.Input(
                    "repeats",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="Extra passes over these pictures in an epoch; 0 shows each once. "
                    "A folder named 10_cats asks for 10 passes by itself.",
                ),
                DatasetSocket.Input("dataset", optional=True, tooltip="Another dataset to add these pictures to."),
            ],
            outputs=[DatasetSocket.Output(display_name="dataset")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **_: object) -> str | float:
        if not folder or not folder.strip():  # linked, so that its value is not known here, or left empty
            return float("nan")
        place = dataset_folder(folder)
        return folder_fingerprint(place) if place.is_dir() else "missing"

    @classmethod
    def execute(
        cls,
        folder: str,
        resolution: int,
        crop: str,
        caption_strategy: str,
        instance_prompt: str,
        repeats: int,
        dataset: Dataset | None = None,
    ) -> io.NodeOutput:
        progress = Progress(cls.hidden.unique_id)
        loaded = load_dataset(
            dataset_folder(folder),
            resolution,
            crop,
            caption_strategy,
            instance_prompt,
            repeats,
            lambda done, total: progress.step(done, f"reading picture {done + 1} of {total}", total),
        )
        sizes = {(s.geometry.width_px, s.geometry.height_px) for s in loaded.samples}
        skipped = f"; {len(loaded.skipped)} skipped: {loaded.skipped[0]}" if loaded.skipped else ""
        progress.say(f"{len(loaded.samples)} pictures in {len(sizes)} sizes{skipped}")
        return io.NodeOutput(append(dataset, loaded) if dataset else loaded)
