"""From the command line to everything that a training is told: both files read, paths found, nothing opened yet."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.databackend.keys import Backends
from ..config.databackend.read import read_databackend
from ..config.dataset import DatasetSettings, TextCacheSettings
from ..config.paths import find_path, find_place, placed
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
    text_cache: TextCacheSettings  # the same
    output: Path  # where runs lie, each in a folder of its own

    @property
    def report(self) -> tuple[str, ...]:
        """What the user is told of both files."""
        return (*self.config.report, f"Datasets: {self.data_file}. Runs: {self.output}.", *self.backends.notes)

    @property
    def caches(self) -> Path:
        return self.output / ".cache"

    @property
    def text_folder(self) -> Path:
        return Path(self.text_cache.cache_dir).absolute() if self.text_cache.cache_dir else self.caches / "text"


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
    used = placed(backends, (*config.folders, *data_file.absolute().parents), config.config.data)
    output = Path(find_place(config.places.output_dir, config.folders)).absolute()
    return Plan(file, config, data_file, backends, used.datasets, used.text_cache, output)


def run_store(output: Path) -> RunStore:
    """Where runs and what they train lie: beside ``<ComfyUI>/output/lumina2`` in ComfyUI's own folders for models."""
    models = output.parent.parent / "models"
    if output.parent.name == "output" and (models / "loras").is_dir():
        return RunStore(output, models / "loras" / SUBFOLDER, models / "diffusion_models" / SUBFOLDER)
    return RunStore(output, output / "loras", output / "models")
