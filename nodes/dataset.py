"""Datasets from folders, tables, Hugging Face and S3, and from SimpleTuner's own file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import folder_paths
from comfy_api.latest import io

from ..training.config.databackend.keys import Backends
from ..training.config.databackend.read import read_databackend
from ..training.config.dataset import (
    ALIGNMENTS_PX,
    BACKGROUNDS,
    CAPTION_STRATEGIES,
    CROP_STYLES,
    ON_BAD_IMAGE,
    CacheSettings,
    CaptionSettings,
    CaptionShuffle,
    DatasetSettings,
    GeometrySettings,
    MixSettings,
    SourceSettings,
    TableSettings,
    TextCacheSettings,
)
from ..training.config.paths import placed
from ..training.config.settings import Config
from ..training.data.dataset import Dataset, append, load_dataset
from ..training.data.sources.opening import open_source
from ..training.errors import Lumina2Error, SettingError
from .glimpse import glimpse
from .places import cache_root, dataset_folder
from .progress import Progress
from .sockets import ConfigSocket, DatasetOptionsSocket, DatasetSocket

CROPS = ("preserve", "square", "closest", "random", "none")
KINDS = ("image", "eval")


def _rare() -> list[Any]:
    """Options of a dataset that few need."""
    size = {"default": 0.0, "min": 0.0, "max": 16384.0, "step": 1.0, "round": 0.001, "optional": True}
    return [
        io.Combo.Input("resolution_type", options=["pixel_area", "pixel"], default="pixel_area", optional=True,
                       tooltip="The unit of resolution and sizes. pixel_area: the edge of a square of that area. "
                       "pixel: the shorter edge."),
        io.Combo.Input("aspect_bucket_alignment", options=[str(a) for a in ALIGNMENTS_PX], default="64", optional=True,
                       tooltip="Both sides are multiples of this many pixels."),
        io.Combo.Input("crop_style", options=list(CROP_STYLES), default="center", optional=True,
                       tooltip="Which part is kept: the middle, a random one, or the top left corner."),
        io.String.Input("crop_aspect_buckets", default="", optional=True,
                        tooltip="For crop closest and random: aspects (width / height) to choose from, such as "
                        "1.0, 0.75, 1.33; for random with a weight each, 1.0: 0.5, 0.75: 0.5."),
        io.Float.Input("minimum_image_size", **size, tooltip="Smaller pictures are left out. 0: none are."),
        io.Float.Input("maximum_image_size", **size,
                       tooltip="Larger pictures are first scaled to target_downsample_size, then cut. 0: off."),
        io.Float.Input("target_downsample_size", **size, tooltip="See maximum_image_size."),
        io.Float.Input("minimum_aspect_ratio", default=0.0, min=0.0, max=20.0, step=0.01, optional=True,
                       tooltip="Pictures with a smaller width / height are left out. 0: none are."),
        io.Float.Input("maximum_aspect_ratio", default=0.0, min=0.0, max=20.0, step=0.01, optional=True,
                       tooltip="Pictures with a larger width / height are left out. 0: none are."),
        io.Float.Input("max_upscale_threshold", default=-1.0, min=-1.0, max=10.0, step=0.05, optional=True,
                       tooltip="0.2 leaves out what would be enlarged by more than 20 %. -1: off."),
        io.Boolean.Input("horizontal_flip", default=False, optional=True,
                         tooltip="Show each picture mirrored half of the time. Not for text or faces you know."),
        io.Combo.Input("alpha_background", options=list(BACKGROUNDS), default="white", optional=True,
                       tooltip="What shows through transparent parts."),
        io.Boolean.Input("prepend_instance_prompt", default=False, optional=True,
                         tooltip="Put the instance prompt before every caption."),
        io.Boolean.Input("only_instance_prompt", default=False, optional=True,
                         tooltip="Use the instance prompt in place of every caption."),
        io.String.Input("trigger_word", default="", optional=True,
                        tooltip="Put first in every caption that does not hold it already."),
        io.Boolean.Input("disable_multiline_split", default=False, optional=True,
                         tooltip="A text file is one caption; off: each of its lines is a variant."),
        io.Boolean.Input("caption_shuffle", default=False, optional=True,
                         tooltip="Add variants of each caption with its comma-separated tags in another order."),
        io.Int.Input("shuffle_count", default=1, min=1, max=1000, optional=True, control_after_generate=False,
                     tooltip="How many shuffled variants each caption gets; each is embedded once."),
        io.Int.Input("keep_tokens", default=0, min=0, max=100, optional=True, control_after_generate=False,
                     tooltip="So many tags at the front keep their place."),
        io.Float.Input("tag_dropout", default=0.0, min=0.0, max=0.95, step=0.05, optional=True,
                       tooltip="The share of the other tags that each shuffled variant leaves out."),
        io.String.Input("caption_filter_list", default="", multiline=True, optional=True,
                        tooltip="One entry a line, taken out of the captions: plain text, a regular expression, or "
                        "s/this/that/ to replace."),
        io.Float.Input("caption_dropout", default=-1.0, min=-1.0, max=1.0, step=0.05, optional=True,
                       tooltip="The share of draws with an empty caption, for this dataset. -1: the training's own."),
        io.String.Input("metadata_file", default="", optional=True,
                        tooltip="A parquet, JSONL or csv file with captions by file name, for caption_strategy parquet "
                        "and csv; relative to the folder."),
        io.String.Input("filename_column", default="filename", optional=True, tooltip="Its column of file names."),
        io.String.Input("caption_column", default="caption", optional=True,
                        tooltip="Its column of captions; several, separated by commas, are variants."),
        io.Combo.Input("dataset_type", options=list(KINDS), default="image", optional=True,
                       tooltip="image: trained on. eval: held out, for the loss on pictures that were not seen."),
        io.Int.Input("start_epoch", default=1, min=1, max=10**6, optional=True, control_after_generate=False,
                     tooltip="The first epoch it is trained in."),
        io.Int.Input("end_epoch", default=0, min=0, max=10**6, optional=True, control_after_generate=False,
                     tooltip="The last epoch it is trained in. 0: all."),
        io.Int.Input("start_step", default=0, min=0, max=10**9, optional=True, control_after_generate=False,
                     tooltip="The step it joins at."),
        io.Int.Input("end_step", default=0, min=0, max=10**9, optional=True, control_after_generate=False,
                     tooltip="The step it leaves at. 0: never."),
        io.Int.Input("max_num_samples", default=0, min=0, max=10**9, optional=True, control_after_generate=False,
                     tooltip="Use only so many pictures, chosen by their names. 0: all."),
        io.Int.Input("write_batch_size", default=128, min=1, max=10**5, optional=True, control_after_generate=False,
                     tooltip="Cache entries that are written at a time: at most so many are lost in a crash."),
        io.Boolean.Input("vae_cache_disable", default=False, optional=True,
                         tooltip="Encode the pictures while training and write nothing; wire a VAE into the train "
                         "node. Saves disk space and costs time."),
        io.Boolean.Input("vae_cache_clear_each_epoch", default=False, optional=True,
                         tooltip="New random crops in every epoch, encoded while training; wire a VAE into the train "
                         "node. For crop_style random."),
        io.Combo.Input("on_bad_image", options=list(ON_BAD_IMAGE), default="skip", optional=True,
                       tooltip="What to do with a picture or caption that cannot be used: skip and name it, or stop."),
        io.Int.Input("rescan", default=0, min=0, max=2**31, optional=True, control_after_generate=False,
                     tooltip="Raise it to look at every file again. Only needed above 20,000 files, where a change "
                     "inside a file is not noticed by itself."),
        io.Float.Input("sigma_min", default=0.0, min=0.0, max=0.99, step=0.05, optional=True,
                       tooltip="Only noise levels from here are trained on with these pictures; 0 is none. Above 0.3 "
                       "they teach composition rather than detail."),
        io.Float.Input("sigma_max", default=1.0, min=0.01, max=1.0, step=0.05, optional=True,
                       tooltip="Only noise levels up to here; 1 is pure noise. Below 0.6 they teach detail."),
        io.String.Input("trigger_class", default="", optional=True,
                        tooltip="For regularisation data with a trigger word: what the base model reads in its place, "
                        "such as dog. So the trigger stays a dog where it is not your dog."),
    ]  # fmt: skip


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
                    tooltip="The folder with your pictures: a full path, or one under ComfyUI's input folder; a csv "
                    "file, hf://name or s3://bucket/prefix. "
                    "bundled: nano-style, nano-style-heldout and nano-concept come with the plugin.",
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=1,
                    max=16384,
                    step=64,
                    tooltip="Pictures are scaled to about this number squared pixels; 1024 is best for Lumina2.",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    tooltip="preserve: the picture's own aspect, cut to multiples of 64. square: the middle square. "
                    "closest, random: one of crop_aspect_buckets. none: scaled without a cut.",
                ),
                io.Combo.Input(
                    "caption_strategy",
                    options=list(CAPTION_STRATEGIES),
                    tooltip="textfile: cat.txt beside cat.png, each line a variant. filename: the name itself. "
                    "instanceprompt: the same text for all. csv, parquet: from metadata_file. huggingface: from the "
                    "dataset itself.",
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
                io.Float.Input(
                    "probability",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    optional=True,
                    tooltip="How often this dataset is drawn beside others, relative to them.",
                ),
                io.Boolean.Input(
                    "is_regularisation_data",
                    default=False,
                    optional=True,
                    tooltip="These pictures hold the model where it is: their target is what the model said before "
                    "training. Use it for pictures of the class beside pictures of your subject.",
                ),
                DatasetOptionsSocket.Input(
                    "options",
                    optional=True,
                    tooltip="Rarer options, from Dataset Options.",
                ),
            ],
            outputs=[DatasetSocket.Output(display_name="dataset", tooltip="Pictures, crops and captions.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(
        cls, folder: str | None = None, caption_strategy: str | None = None, **_: object
    ) -> str | float:
        if not folder or not folder.strip() or caption_strategy in ("csv", "parquet", None):
            return float("nan")  # linked, so that its value is not known here, or told by a file that options name
        try:
            source, name = _source(folder, dict(default_options()))
            settings = DatasetSettings(name, source, captions=CaptionSettings("filename"))
            return open_source(settings, cache_root() / "images").fingerprint()
        except Lumina2Error:
            return "missing"

    @classmethod
    def execute(
        cls,
        folder: str,
        dataset: Dataset | None = None,
        options: tuple[tuple[str, Any], ...] = (),
        probability: float = 1.0,
        is_regularisation_data: bool = False,
        **values: Any,
    ) -> io.NodeOutput:
        settings = folder_settings(
            folder, options, probability=probability, is_regularisation_data=is_regularisation_data, **values
        )
        return load_parts(cls.hidden.unique_id, (settings,), dataset)


class Lumina2DatasetOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2DatasetOptions",
            display_name="Dataset Options",
            category="Lumina2",
            description="Rarer options of Load Dataset: filters, crops, captions, gates and caches.",
            inputs=_rare(),
            outputs=[DatasetOptionsSocket.Output(display_name="options", tooltip="For Load Dataset.")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(tuple(sorted((dict(default_options()) | values).items())))


def default_options() -> tuple[tuple[str, Any], ...]:
    """Every rare option at its default."""
    return tuple((widget.id, widget.default) for widget in _rare())


class Lumina2LoadDatasetConfig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2LoadDatasetConfig",
            display_name="Load Dataset Config",
            category="Lumina2",
            description="Reads the datasets of a SimpleTuner multidatabackend.json.",
            inputs=[
                io.String.Input(
                    "file",
                    default="",
                    tooltip="The multidatabackend.json: a full path, or one under ComfyUI's input folder.",
                ),
                DatasetSocket.Input("dataset", optional=True, tooltip="Another dataset to add these to."),
                ConfigSocket.Input(
                    "config",
                    optional=True,
                    tooltip="Load Training Config: what its config.json says of datasets holds where this file says "
                    "nothing.",
                ),
            ],
            outputs=[
                DatasetSocket.Output(display_name="dataset", tooltip="Pictures, crops and captions."),
                io.String.Output(display_name="report", tooltip="What was read, and what was left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: object) -> str | float:
        if not file or not file.strip():
            return float("nan")
        try:
            settings = configured(file).datasets
            pictures = [open_source(one, cache_root() / "images").fingerprint() for one in settings]
            return " ".join([*pictures, repr(settings)])
        except SettingError:
            return float("nan")  # it may be whole with what a config says
        except Lumina2Error:
            return "missing"

    @classmethod
    def execute(cls, file: str, dataset: Dataset | None = None, config: Config | None = None) -> io.NodeOutput:
        backends = configured(file, config)
        read = load_parts(cls.hidden.unique_id, backends.datasets, dataset)
        texts = backends.text_cache if read[0].texts == TextCacheSettings() else read[0].texts
        loaded = replace(read[0], texts=texts)
        report = [*backends.notes, *(line for one in loaded.reports for line in one.lines())]
        text = "\n".join(report)
        return io.NodeOutput(loaded, text, ui={**read.ui, "text": (text,)})


def load_parts(
    node_id: str | None, settings: tuple[DatasetSettings, ...], before: Dataset | None = None
) -> io.NodeOutput:
    """The datasets, behind those that came before, with progress and a line on the node."""
    progress = Progress(node_id)
    found = read_parts(
        settings, before, lambda done, total: progress.step(done, f"reading picture {done} of {total}", total)
    )
    progress.say("; ".join(report.lines()[0] + _problems(report.problems) for report in found.reports))
    return io.NodeOutput(found, ui={"lumina2_dataset": [glimpse(found)]})


def read_parts(
    settings: tuple[DatasetSettings, ...], before: Dataset | None, on_picture: Callable[[int, int], None]
) -> Dataset:
    """The datasets, behind those that came before. Raises SettingError where there are none."""
    found = before
    for one in settings:
        loaded = load_dataset(one, cache_root(), on_picture)
        found = append(found, loaded) if found else loaded
    if found is None:
        raise SettingError("No dataset is enabled in this file. Remove disabled from one of them.")
    return found


def _problems(problems: tuple[str, ...]) -> str:
    return f"; {len(problems)} skipped: {problems[0]}" if problems else ""


def configured(file: str, config: Config | None = None) -> Backends:
    """A ``multidatabackend.json`` as it is used. Raises like ``read_databackend``."""
    path = Path(folder_paths.get_input_directory()) / Path(file.strip().strip('"')).expanduser()
    data = config.data if config else {}
    return placed(read_databackend(path, data), [Path(folder_paths.base_path), path.parent, *path.parent.parents], data)


def folder_settings(folder: str, options: Iterable[tuple[str, Any]] = (), **values: Any) -> DatasetSettings:
    """What the widgets of Load Dataset say, with what Dataset Options add. Raises like ``dataset_settings``."""
    return dataset_settings(folder, **values, **dict(default_options()) | dict(options))


def dataset_settings(
    folder: str,
    *,
    resolution: float,
    crop: str,
    caption_strategy: str,
    instance_prompt: str,
    repeats: int,
    probability: float,
    is_regularisation_data: bool,
    **rare: Any,
) -> DatasetSettings:
    """Typed settings from the widgets of Load Dataset.

    Raises:
        SettingError: a value cannot be used.
    """
    source, name = _source(folder, rare)
    threshold, dropout = rare["max_upscale_threshold"], rare["caption_dropout"]
    return DatasetSettings(
        id=name,
        source=source,
        geometry=GeometrySettings(
            resolution=resolution,
            resolution_type=rare["resolution_type"],
            aspect_bucket_alignment=int(rare["aspect_bucket_alignment"]),
            crop=crop != "none",
            crop_aspect=crop if crop != "none" else "preserve",
            crop_style=rare["crop_style"],
            crop_aspect_buckets=_aspects(rare["crop_aspect_buckets"]),
            minimum_image_size=rare["minimum_image_size"],
            maximum_image_size=rare["maximum_image_size"],
            target_downsample_size=rare["target_downsample_size"],
            minimum_aspect_ratio=rare["minimum_aspect_ratio"],
            maximum_aspect_ratio=rare["maximum_aspect_ratio"],
            max_upscale_threshold=None if threshold < 0 else threshold,
            horizontal_flip=rare["horizontal_flip"],
            alpha_background=rare["alpha_background"],
        ),
        captions=CaptionSettings(
            caption_strategy=caption_strategy,
            instance_prompt=(instance_prompt.strip(),) if instance_prompt.strip() else (),
            prepend_instance_prompt=rare["prepend_instance_prompt"],
            only_instance_prompt=rare["only_instance_prompt"],
            trigger_word=rare["trigger_word"].strip(),
            trigger_class=rare["trigger_class"].strip(),
            disable_multiline_split=rare["disable_multiline_split"],
            caption_shuffle=CaptionShuffle(
                enable=rare["caption_shuffle"],
                count=rare["shuffle_count"],
                position_start=rare["keep_tokens"],
                tag_dropout=rare["tag_dropout"],
            ),
            caption_filter_list=tuple(line for line in rare["caption_filter_list"].splitlines() if line.strip()),
            caption_dropout_probability=None if dropout < 0 else dropout,
        ),
        mix=MixSettings(
            dataset_type=rare["dataset_type"],
            repeats=repeats,
            probability=probability,
            start_epoch=rare["start_epoch"],
            end_epoch=rare["end_epoch"],
            start_step=rare["start_step"],
            end_step=rare["end_step"],
            is_regularisation_data=is_regularisation_data,
            max_num_samples=rare["max_num_samples"],
            sigma_min=rare["sigma_min"] or None,
            sigma_max=rare["sigma_max"] if rare["sigma_max"] < 1 else None,
        ),
        cache=CacheSettings(
            write_batch_size=rare["write_batch_size"],
            vae_cache_disable=rare["vae_cache_disable"],
            vae_cache_clear_each_epoch=rare["vae_cache_clear_each_epoch"],
            on_bad_image=rare["on_bad_image"],
        ),
    )


def _source(folder: str, rare: dict[str, Any]) -> tuple[SourceSettings, str]:
    """Where the pictures come from by how the folder is written, and a name for the dataset."""
    written = folder.strip().strip('"')
    columns = tuple(name.strip() for name in rare["caption_column"].split(",") if name.strip())
    table = TableSettings(rare["metadata_file"].strip(), rare["filename_column"].strip(), columns)
    if written.startswith("s3://"):
        address = urlsplit(written)
        source = SourceSettings("aws", aws_bucket_name=address.netloc, aws_data_prefix=address.path.strip("/"),
                                table=table)  # fmt: skip
        return source, address.netloc
    if written.startswith("hf://"):
        name = written.removeprefix("hf://")
        return SourceSettings("huggingface", dataset_name=name, table=table), name.rsplit("/", 1)[-1]
    place = dataset_folder(folder)
    if place.suffix.lower() == ".csv":
        file = TableSettings(place.name, table.filename_column, table.caption_column)
        return SourceSettings("csv", str(place.parent), file), place.stem
    return SourceSettings("local", str(place), table), place.name


def _aspects(written: str) -> tuple[tuple[float, float], ...]:
    """``1.0: 0.5, 0.75: 0.5`` or ``1.0, 0.75`` to pairs of aspect and weight."""
    try:
        pairs = [entry.split(":") for entry in written.split(",") if entry.strip()]
        return tuple((float(pair[0]), float(pair[1]) if len(pair) > 1 else 1.0) for pair in pairs)
    except ValueError:
        raise SettingError(
            f"crop_aspect_buckets is {written!r}; write aspects such as 1.0, 0.75, or with weights 1.0: 0.5, 0.75: 0.5."
        ) from None
