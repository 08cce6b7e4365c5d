"""What an imported configuration is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..adapter import AdapterSettings, FullSettings, LoRASettings, LyCORISSettings
from ..paths import find_place
from ..report import ReportSettings
from ..settings import Config, TrainSettings
from ..validation import ValidationSettings
from .table import OPTIONS

_UNKNOWN_STEPS = 2**31  # until the dataset tells how many an epoch has
_BESIDE: tuple[type, ...] = (ValidationSettings, ReportSettings)  # groups of settings that decide no weight
_KINDS = {bool: "bool", int: "int", float: "float", str: "text"}  # of our own settings, by their defaults


@dataclass(frozen=True)
class Places:
    """What a configuration says beside the settings, under SimpleTuner's names."""

    run_name: str = ""
    output_dir: str = ""
    data_backend_config: str = ""
    resume_from_checkpoint: str = "latest"
    pretrained_model_name_or_path: str = ""
    pretrained_transformer_model_name_or_path: str = ""
    pretrained_vae_model_name_or_path: str = ""
    revision: str = ""
    tokenizer_max_length: int = 256
    system_prompt: str = "superior"  # a name of data.prompts.SYSTEM_PROMPTS; SimpleTuner knows this one only
    cache_dir_text: str = ""
    cache_dir_vae: str = ""


@dataclass(frozen=True)
class Imported:
    """A configuration, understood."""

    values: Mapping[str, Any]  # settings by the names of ``TrainSettings.written``, validation's and report's as well
    adapter: AdapterSettings
    epochs: int = 0  # passes over the pictures, where ``values`` tells no steps
    places: Places = Places()
    datasets: Mapping[str, Any] = field(default_factory=dict)  # hold where a dataset says nothing else
    report: tuple[str, ...] = field(default=(), compare=False)  # sentences for the user
    folders: tuple[Path, ...] = field(default=(), compare=False)  # where relative paths are looked for, in order

    @property
    def config(self) -> Config:
        """What a LUMINA2_CONFIG carries."""
        places = {name: getattr(self.places, name) for name in ("tokenizer_max_length", "system_prompt")}
        for name in ("cache_dir_text", "cache_dir_vae"):
            if written := getattr(self.places, name):
                places[name] = find_place(written, self.folders)
        return Config(self.values, self.adapter, self.places.run_name, {**self.dataset_defaults, **places})

    def settings(self, steps: int = 0) -> TrainSettings:
        """Everything that a training is told.

        Args:
            steps: optimiser steps, where ``epochs`` tells how long it goes.
        """
        start = TrainSettings(steps=steps or self.values.get("steps", _UNKNOWN_STEPS), adapter=self.adapter)
        return self.config.training(start)

    @property
    def dataset_defaults(self) -> dict[str, Any]:
        """What ``read_databackend`` takes."""
        return {**self.datasets, **({"seed": self.values["seed"]} if "seed" in self.values else {})}

    def check(self) -> None:
        """Raises SettingError where a value is out of range, or two contradict each other."""
        self.settings()
        _ = self.config.validation, self.config.report


def beside_defaults() -> dict[str, Any]:
    """Settings that decide no weight, by name, as they are by default."""
    return {each.name: each.default for kind in _BESIDE for each in fields(kind)}


@cache
def own_kinds() -> dict[str, str]:
    """Our settings that SimpleTuner has no option for, and those whose names differ, by name."""
    found: dict[str, Any] = {"system_prompt": "", **beside_defaults()}
    for adapter in (LoRASettings(), LyCORISSettings(), FullSettings()):
        found |= TrainSettings(adapter=adapter).written()
    kinds = {option.ours: option.kind for option in OPTIONS.values()}
    return {name: kinds.get(name) or _KINDS.get(type(value), "any") for name, value in found.items()}
