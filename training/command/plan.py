"""From the command line to everything that a training is told: both files read, paths found, nothing opened yet."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.databackend import Backends, TextCacheSettings, find_path, read_databackend, resolve
from ..config.dataset import DatasetSettings
from ..config.simpletuner.imported import Imported
from ..config.simpletuner.read import parse_config, read_config
from ..errors import SettingError
from ..run.folder import RunStore

PLUGIN = Path(__file__).resolve().parents[2]
USUAL = ("config.json", "config/config.json")  # where a configuration is looked for
SUBFOLDER = "lumina2"  # of ComfyUI's models/loras and models/diffusion_models


@dataclass(frozen=True)
class Plan:
    """What was understood of a configuration and its dataset file."""

    file: Path | None  # the config.json; None: the command line said everything
    config: Imported
    data_file: Path
    backends: Backends
    datasets: tuple[DatasetSettings, ...]  # with paths as they were found
    output: Path  # where runs lie, each in a folder of its own

    @property
    def report(self) -> tuple[str, ...]:
        """What the user is told of both files."""
        return (*self.config.report, f"Datasets: {self.data_file}. Runs: {self.output}.", *self.backends.notes)

    @property
    def caches(self) -> Path:
        return self.output / ".cache"

    @property
    def text_cache(self) -> TextCacheSettings:
        return self.backends.text_cache

    @property
    def text_folder(self) -> Path:
        named = self.text_cache.cache_dir or self.config.places.cache_dir_text
        return absolute(named, self.config.folders) if named else self.caches / "text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help=f"SimpleTuner's kind; default: {' or '.join(USUAL)}")
    parser.add_argument("--adopt-our-defaults", action="store_true", help="where the file says nothing")
    parser.add_argument("--device", default="", help="cuda, xpu, mps or cpu; default: the best there is")
    parser.set_defaults(rest=[])
    parser.epilog = (
        "Any option of config.json may follow and wins over the file: --learning_rate 1e-5 --use_ema --seed=7"
    )


def overrides(rest: Sequence[str]) -> dict[str, Any]:
    """Options as they follow on the command line: ``--name value``, ``--name=value``, or ``--name`` for true.

    Raises:
        SettingError: something stands where a name should.
    """
    found: dict[str, Any] = {}
    waiting = list(rest)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise SettingError(f"The command line has {word!r} where an option should stand; write --name value.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        found[name] = value
    return found


def open_plan(options: argparse.Namespace) -> Plan:
    """Read what ``add_arguments`` names.

    Raises:
        SettingError: a file is missing or not understood.
    """
    changed = overrides(options.rest)
    file = options.config or next((Path(name) for name in USUAL if Path(name).is_file()), None)
    if file is None and not changed:
        raise SettingError(
            f"There is no {' or '.join(USUAL)} here. Name one with --config, or have one written: "
            f'python "{PLUGIN}" init <folder of pictures>.'
        )
    if file is None:
        config = parse_config({}, "The command line", options.adopt_our_defaults, changed)
    else:
        config = read_config(file, options.adopt_our_defaults, changed)
    return plan(config, file)


def plan(config: Imported, file: Path | None = None) -> Plan:
    """With the dataset file that a configuration names.

    Raises:
        SettingError: it is missing or not understood.
    """
    written = config.places.data_backend_config or "multidatabackend.json"
    data_file = Path(find_path(written, config.folders))
    backends = read_databackend(data_file, config.dataset_defaults)
    folders = (*config.folders, *data_file.absolute().parents)
    datasets = tuple(_dataset(each, backends, config, folders) for each in backends.datasets)
    return Plan(file, config, data_file, backends, datasets, absolute(config.places.output_dir, config.folders))


def absolute(written: str, folders: Sequence[Path]) -> Path:
    """A folder that may not be there yet: where one of ``folders`` has it, else in the working folder."""
    return Path(find_path(written, folders)).expanduser().absolute()


def _dataset(
    settings: DatasetSettings, backends: Backends, config: Imported, folders: Sequence[Path]
) -> DatasetSettings:
    filters = backends.text_cache.caption_filter_list + settings.captions.caption_filter_list
    cache = settings.cache
    if config.places.cache_dir_vae and not cache.cache_dir_vae:
        cache = replace(cache, cache_dir_vae=config.places.cache_dir_vae)
    captions = replace(settings.captions, caption_filter_list=filters)
    return resolve(replace(settings, captions=captions, cache=cache), folders)


def run_store(output: Path) -> RunStore:
    """Where runs and what they train lie: beside ``<ComfyUI>/output/lumina2`` in ComfyUI's own folders for models."""
    models = output.parent.parent / "models"
    if output.parent.name == "output" and (models / "loras").is_dir():
        return RunStore(output, models / "loras" / SUBFOLDER, models / "diffusion_models" / SUBFOLDER)
    return RunStore(output, output / "loras", output / "models")
