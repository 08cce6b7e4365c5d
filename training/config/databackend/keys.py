"""What the keys of a ``multidatabackend.json`` are to SimpleTuner and here, for reading and for writing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..dataset import DatasetSettings, SourceSettings, TableSettings, TextCacheSettings

# What a key that is absent from an imported file means to SimpleTuner, where that is not our own default.
SIMPLETUNER: dict[str, Any] = {
    "caption_strategy": "filename",
    "crop": False,
    "crop_aspect": "square",
    "csv_url_column": "url",
    "identifier_includes_extension": False,  # of a parquet block
}
_NO_EFFECT_HERE = """
metadata_backend metadata_update_interval skip_file_discovery preserve_data_backend_cache vae_cache_scan_behaviour
hash_filenames compress_cache vae_cache_ondemand text_cache_ondemand text_cache_disable override_dataset_config num_proc
csv_cache_dir disable_after_epoch_step delete_unwanted_images delete_problematic_images delete_nsfw_images
train_batch_size text_encoder_batch_size text_embeds conditioning video audio grounding s2v_datasets slider_strength
conditioning_image_embeds cache_dir_conditioning_image_embeds conditioning_image_embed_batch_size disable_validation
composite_image_config bbox_column memory_filesystem_path memory_filesystem_size memory_filesystem_sudo cache_dir
"""
# Keys that SimpleTuner also knows for the whole training: its config.json may tell what a dataset leaves out.
_TOLD_GLOBALLY = """
resolution resolution_type minimum_image_size maximum_image_size target_downsample_size aspect_bucket_alignment
aspect_bucket_rounding caption_strategy instance_prompt prepend_instance_prompt only_instance_prompt vae_batch_size
write_batch_size vae_cache_disable vae_cache_clear_each_epoch aws_max_pool_connections
"""
NO_EFFECT, GLOBAL = frozenset(_NO_EFFECT_HERE.split()), frozenset(_TOLD_GLOBALLY.split())
# Written even where they are the default, so that no global key takes their place.
ALWAYS = GLOBAL - {"instance_prompt", "aws_max_pool_connections"} | {"crop", "crop_aspect", "crop_style"}
SECRETS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
CSV = {"csv_file": "path", "csv_caption_column": "caption_column", "csv_url_column": "filename_column"}
CSV |= {f"csv_{f.name}": f.name for f in fields(TableSettings) if f.name not in CSV.values()}
STORAGE = ("type", *(f.name for f in fields(SourceSettings) if f.name.startswith("aws_")))


@dataclass(frozen=True)
class Backends:
    """What a ``multidatabackend.json`` says."""

    datasets: tuple[DatasetSettings, ...]
    text_cache: TextCacheSettings = field(default_factory=TextCacheSettings)
    notes: tuple[str, ...] = ()  # sentences on what was left out or has no effect
