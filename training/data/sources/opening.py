"""From a dataset's settings to its source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...config.dataset import DatasetSettings
from ...errors import SettingError
from . import Source
from .csv_rows import CsvRows
from .huggingface import HuggingFaceRows
from .local import LocalFolder
from .memory import StoredImages
from .s3 import S3Bucket
from .table import WithTable


def open_source(settings: DatasetSettings, spool: Path) -> Source:
    """The pictures of a dataset. Nothing is read yet.

    A table's path is taken from ``instance_data_dir``, or from the current folder where that is empty. For "memory"
    ``instance_data_dir`` is the list that ``store_images`` wrote, ``<digest>.json``.

    Args:
        spool: a folder where pictures of a stream are kept.

    Raises:
        SettingError: a setting that the source needs is missing.
    """
    source, strategy = settings.source, settings.captions.caption_strategy
    folder = Path(source.instance_data_dir)
    table = source.table
    tells = replace(table, caption_column=(), fallback_caption_column="")  # sizes only: captions come from elsewhere
    if source.type == "csv":
        if not table.path:
            raise SettingError('path is ""; write the csv file that names your pictures.')
        return CsvRows(folder / table.path, table if strategy == "csv" else tells)
    if source.type == "huggingface":
        return HuggingFaceRows(source if strategy == "huggingface" else replace(source, table=tells), spool)
    if source.type != "aws" and not source.instance_data_dir:
        raise SettingError('instance_data_dir is ""; choose the folder that holds your pictures.')
    if source.type == "memory":
        return StoredImages(folder.parent, folder.stem)
    inner: Source = S3Bucket(source) if source.type == "aws" else LocalFolder(folder)
    return WithTable(inner, table, folder) if strategy in ("parquet", "csv") else inner
