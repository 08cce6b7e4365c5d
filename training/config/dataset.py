"""The settings of one dataset, under the names of SimpleTuner's ``multidatabackend.json``, in groups by who reads them.

A value is checked when its group is made; behind this nothing checks it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .checks import one_of, require

SOURCE_TYPES = ("local", "csv", "huggingface", "aws", "memory")
DATASET_TYPES = ("image", "eval", "conditioning")
RESOLUTION_TYPES = ("pixel", "area", "pixel_area")
ALIGNMENTS_PX = (64, 32, 16)
CROP_ASPECTS = ("square", "preserve", "closest", "random")
CROP_STYLES = ("center", "random", "corner")
BACKGROUNDS = ("white", "black", "grey")
CAPTION_STRATEGIES = ("textfile", "filename", "instanceprompt", "csv", "parquet", "huggingface")
SPLITS = ("comma", "space", "period")
ON_BAD_IMAGE = ("skip", "stop")


@dataclass(frozen=True)
class TableSettings:
    """A parquet, JSONL or csv file that tells captions, and perhaps sizes, of pictures by file name."""

    path: str = ""
    filename_column: str = "filename"
    caption_column: tuple[str, ...] = ("caption",)  # several are variants; a dot reaches into a nested column
    fallback_caption_column: str = ""
    width_column: str = ""
    height_column: str = ""
    identifier_includes_extension: bool = True


@dataclass(frozen=True)
class SourceSettings:
    """Where pictures come from. Secrets are read from the environment when a source is opened, never kept here."""

    type: str = "local"
    instance_data_dir: str = ""  # a folder; for huggingface a local folder
    table: TableSettings = TableSettings()
    dataset_name: str = ""  # huggingface: a hub id, or a folder
    dataset_config: str = ""
    split: str = "train"
    revision: str = ""
    image_column: str = "image"
    streaming: bool = False
    filter_func: Mapping[str, object] = field(default_factory=dict)  # huggingface: min_width, quality_column, …
    aws_bucket_name: str = ""
    aws_endpoint_url: str = ""
    aws_region_name: str = ""
    aws_data_prefix: str = ""
    aws_max_pool_connections: int = 128

    def __post_init__(self) -> None:
        one_of("type", self.type, SOURCE_TYPES)
        require(self.aws_max_pool_connections >= 1, "aws_max_pool_connections", self.aws_max_pool_connections, "≥ 1")


@dataclass(frozen=True)
class GeometrySettings:
    """From a picture's size to the size that is trained on. Sizes are in the unit of ``resolution_type``."""

    resolution: float = (
        1024  # pixel: shorter edge in px; area: megapixels; pixel_area: edge in px of that area's square
    )
    resolution_type: str = "pixel_area"
    aspect_bucket_alignment: int = 64  # px; both sides are multiples of it
    aspect_bucket_rounding: int = 2  # digits of an aspect
    crop: bool = True  # False: resized to the bucket, whose aspect is the picture's but for the rounding
    crop_aspect: str = "preserve"
    crop_style: str = "center"
    crop_aspect_buckets: tuple[tuple[float, float], ...] = ()  # (aspect, weight), for closest and random
    minimum_image_size: float = 0  # 0: none
    maximum_image_size: float = 0  # 0: none; needs target_downsample_size
    target_downsample_size: float = 0
    minimum_aspect_ratio: float = 0  # width / height; 0: none
    maximum_aspect_ratio: float = 0
    max_upscale_threshold: float | None = None  # 0.2 drops what would be enlarged by more than 20 %
    horizontal_flip: bool = False  # half of the draws show the mirrored picture
    alpha_background: str = "white"  # what shows through transparency

    def __post_init__(self) -> None:
        one_of("resolution_type", self.resolution_type, RESOLUTION_TYPES)
        one_of("aspect_bucket_alignment", self.aspect_bucket_alignment, ALIGNMENTS_PX)
        one_of("crop_aspect", self.crop_aspect, CROP_ASPECTS)
        one_of("crop_style", self.crop_style, CROP_STYLES)
        one_of("alpha_background", self.alpha_background, BACKGROUNDS)
        largest = 20 if self.resolution_type == "area" else 16384
        unit = "megapixels" if self.resolution_type == "area" else "pixels"
        require(0 < self.resolution < largest, "resolution", self.resolution, f"choose {unit} below {largest}")
        for name in ("minimum_image_size", "maximum_image_size", "target_downsample_size"):
            value = getattr(self, name)
            require(0 <= value < largest, name, value, f"choose {unit} below {largest}, or 0 for none")
        if self.resolution_type == "area":
            require(self.minimum_image_size <= 5, "minimum_image_size", self.minimum_image_size, "megapixels up to 5")
        require(
            not self.maximum_image_size or self.target_downsample_size > 0,
            "maximum_image_size",
            self.maximum_image_size,
            "set target_downsample_size too: the size that larger pictures are scaled to before the crop",
        )
        require(
            not self.maximum_image_size or self.target_downsample_size <= self.maximum_image_size,
            "target_downsample_size",
            self.target_downsample_size,
            f"choose at most maximum_image_size ({self.maximum_image_size})",
        )
        require(
            not self.maximum_aspect_ratio or self.minimum_aspect_ratio <= self.maximum_aspect_ratio,
            "minimum_aspect_ratio",
            self.minimum_aspect_ratio,
            f"choose at most maximum_aspect_ratio ({self.maximum_aspect_ratio})",
        )
        threshold = self.max_upscale_threshold
        require(threshold is None or threshold >= 0, "max_upscale_threshold", threshold, "choose 0.2 for 20 %, or none")
        needs = self.crop and self.crop_aspect in ("closest", "random")
        require(
            not needs or bool(self.crop_aspect_buckets),
            "crop_aspect_buckets",
            list(self.crop_aspect_buckets),
            f'crop_aspect "{self.crop_aspect}" needs aspects to choose from, such as 1.0, 0.75, 1.33',
        )
        digits = self.aspect_bucket_rounding
        require(0 <= digits <= 6, "aspect_bucket_rounding", digits, "choose 0 to 6 digits")
        weights = [weight for _, weight in self.crop_aspect_buckets]
        require(not weights or sum(weights) > 0, "crop_aspect_buckets", weights, "one weight has to be above 0")
        bad = [a for a, weight in self.crop_aspect_buckets if not (0.05 <= a <= 20 and weight >= 0)]
        require(not bad, "crop_aspect_buckets", bad, "an aspect is width / height, from 0.05 to 20, its weight ≥ 0")


@dataclass(frozen=True)
class CaptionShuffle:
    """Variants of a caption with its tags in another order."""

    enable: bool = False
    count: int = 1  # shuffled variants of each caption
    seed: int = 0
    split_on: str = "comma"
    position_start: int = 0  # tags that keep their place at the front (kohya's keep_tokens)
    include_original: bool = True
    tag_dropout: float = 0.0  # the share of the other tags that each variant leaves out

    def __post_init__(self) -> None:
        one_of("caption_shuffle.split_on", self.split_on, SPLITS)
        require(1 <= self.count <= 1000, "caption_shuffle.count", self.count, "choose 1 to 1000")
        require(self.position_start >= 0, "caption_shuffle.position_start", self.position_start, "choose 0 or more")
        require(0 <= self.tag_dropout < 1, "caption_shuffle.tag_dropout", self.tag_dropout, "choose 0 to below 1")


@dataclass(frozen=True)
class CaptionSettings:
    """What is said of a picture."""

    caption_strategy: str = "textfile"
    instance_prompt: tuple[str, ...] = ()  # several are variants
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False
    trigger_word: str = ""  # stands first in every caption that does not hold it already
    disable_multiline_split: bool = False  # a text file is one caption, its lines joined by a space
    caption_shuffle: CaptionShuffle = CaptionShuffle()
    caption_filter_list: tuple[str, ...] = ()  # plain text or regex to take out, or s/regex/text/
    caption_dropout_probability: float | None = None  # of this dataset; None: the training's own
    trigger_class: str = ""  # what the base model reads for the trigger, in regularisation data: "dog"

    def __post_init__(self) -> None:
        one_of("caption_strategy", self.caption_strategy, CAPTION_STRATEGIES)
        require(
            not self.uses_instance_prompt or any(text.strip() for text in self.instance_prompt),
            "instance_prompt",
            "",
            "write what the pictures show; caption_strategy or prepend_instance_prompt ask for it",
        )
        require(
            not self.trigger_class or bool(self.trigger_word.strip()),
            "trigger_class",
            self.trigger_class,
            "set the trigger_word that it stands for, or leave it out",
        )
        dropout = self.caption_dropout_probability
        require(
            dropout is None or 0 <= dropout <= 1, "caption_dropout_probability", dropout, "choose 0 to 1, or leave it"
        )

    @property
    def uses_instance_prompt(self) -> bool:
        return self.only_instance_prompt or self.prepend_instance_prompt or self.caption_strategy == "instanceprompt"

    @property
    def triggers(self) -> tuple[str, ...]:
        """What calls up the pictures in a prompt: the trigger word, else the instance prompts; may be nothing."""
        prompts = self.instance_prompt if self.uses_instance_prompt else ()
        return tuple(filter(None, (text.strip() for text in ((self.trigger_word,) if self.trigger_word else prompts))))


@dataclass(frozen=True)
class MixSettings:
    """When and how often a dataset is drawn from."""

    dataset_type: str = "image"
    repeats: int = 0  # extra passes in an epoch
    probability: float = 1.0
    start_epoch: int = 1
    end_epoch: int = 0  # the last one; 0: never ends
    start_step: int = 0
    end_step: int = 0  # the first step without it; 0: never ends
    is_regularisation_data: bool = False
    max_num_samples: int = 0  # 0: all; else so many, chosen by their id
    conditioning_type: str = ""  # "mask", of a dataset_type conditioning
    conditioning_data: str = ""  # the id of the dataset that holds the masks
    timestep_sampling_offset: float | None = None  # as the objective's, for this dataset; None: that one holds
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        low, high = (
            (0.0 if self.sigma_min is None else self.sigma_min),
            (1.0 if self.sigma_max is None else self.sigma_max),
        )
        require(0 <= low < 1, "sigma_min", self.sigma_min, "choose 0 to below 1")
        require(low < high <= 1, "sigma_max", self.sigma_max, f"choose above sigma_min ({low:g}) to 1")
        offset = self.timestep_sampling_offset
        require(offset is None or -10 <= offset <= 10, "timestep_sampling_offset", offset, "choose about -1 to 1")
        one_of("dataset_type", self.dataset_type, DATASET_TYPES)
        require(0 <= self.repeats <= 1_000_000, "repeats", self.repeats, "choose 0 or more extra passes")
        require(self.probability >= 0, "probability", self.probability, "choose 0 or more")
        require(self.start_epoch >= 1, "start_epoch", self.start_epoch, "epochs count from 1")
        require(
            not self.end_epoch or self.end_epoch >= self.start_epoch,
            "end_epoch",
            self.end_epoch,
            f"choose at least start_epoch ({self.start_epoch}), or 0 for never",
        )
        require(
            not self.end_step or self.end_step > self.start_step,
            "end_step",
            self.end_step,
            f"choose more than start_step ({self.start_step}), or 0 for never",
        )
        masks = self.dataset_type == "conditioning"
        require(
            not masks or self.conditioning_type == "mask",
            "conditioning_type",
            self.conditioning_type,
            "Lumina2 has no ControlNet: only mask can be used",
        )


@dataclass(frozen=True)
class CacheSettings:
    """How latents are made and kept."""

    vae_batch_size: int = 4
    write_batch_size: int = 128  # entries that are committed at a time
    vae_cache_disable: bool = False  # encoded while training, nothing written
    vae_cache_clear_each_epoch: bool = False  # new random crops in each epoch, encoded while training
    cache_dir_vae: str = ""  # empty: the common one
    on_bad_image: str = "skip"

    def __post_init__(self) -> None:
        one_of("on_bad_image", self.on_bad_image, ON_BAD_IMAGE)
        require(self.vae_batch_size >= 1, "vae_batch_size", self.vae_batch_size, "choose at least 1")
        require(self.write_batch_size >= 1, "write_batch_size", self.write_batch_size, "choose at least 1")


@dataclass(frozen=True)
class TextCacheSettings:
    """How text embeddings are made and kept."""

    cache_dir: str = ""  # empty: the common one
    write_batch_size: int = 128
    caption_filter_list: tuple[str, ...] = ()  # of every dataset, before a dataset's own

    def __post_init__(self) -> None:
        require(self.write_batch_size >= 1, "write_batch_size", self.write_batch_size, "choose at least 1")


@dataclass(frozen=True)
class DatasetSettings:
    """One dataset."""

    id: str
    source: SourceSettings = field(default_factory=SourceSettings)
    geometry: GeometrySettings = field(default_factory=GeometrySettings)
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    mix: MixSettings = field(default_factory=MixSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)

    def __post_init__(self) -> None:
        require(
            not self.captions.trigger_class or self.mix.is_regularisation_data,
            "trigger_class",
            self.captions.trigger_class,
            "only regularisation data have a teacher that reads it: switch is_regularisation_data on, or leave it out",
        )
