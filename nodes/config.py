"""SimpleTuner's configuration, loaded and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..training.config.adapter import AdapterSettings, LoRASettings
from ..training.config.databackend.keys import Backends
from ..training.config.databackend.write import write_databackend
from ..training.config.optim import OptimizerSettings
from ..training.config.paths import find_path
from ..training.config.settings import Config, TrainSettings, check_run_name
from ..training.config.simpletuner.imported import Imported, Places
from ..training.config.simpletuner.read import read_config
from ..training.config.simpletuner.write import LYCORIS_NAME, from_settings, write_config
from ..training.data.dataset import Dataset
from ..training.errors import Lumina2Error
from ..training.files import write_json
from . import places
from .sockets import AdapterSocket, ConfigSocket, DatasetSocket, ValidationSocket

SAVED = "configs"  # under output/lumina2, a folder each


class Lumina2LoadConfig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2LoadConfig",
            display_name="Load Training Config",
            category="Lumina2",
            description="Reads a SimpleTuner config.json, and tells what was understood of it.",
            inputs=[
                io.String.Input(
                    "file",
                    default="",
                    tooltip="The config.json: a full path, or one under ComfyUI's input folder. An example: "
                    "bundled: nano-simpletuner.",
                ),
                io.Boolean.Input(
                    "adopt_our_defaults",
                    default=False,
                    tooltip="What the file leaves out is as it is best here; off: as SimpleTuner has it, so that it "
                    "trains the same.",
                ),
            ],
            outputs=[
                ConfigSocket.Output(display_name="config", tooltip="For a train node; it wins over the widgets there."),
                ValidationSocket.Output(display_name="validation", tooltip="For Cache Text Embeds: the samples."),
                io.String.Output(
                    display_name="dataset_file", tooltip="For Load Dataset Config: its data_backend_config."
                ),
                io.String.Output(display_name="report", tooltip="What was understood, and what has no effect."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(
        cls, file: str | None = None, adopt_our_defaults: bool | None = None, **_: object
    ) -> str | float:
        if not file or not file.strip() or adopt_our_defaults is None:
            return float("nan")
        try:
            imported = _read(file, adopt_our_defaults)
        except Lumina2Error as error:
            return str(error)
        return repr((imported, imported.report))

    @classmethod
    def execute(cls, file: str, adopt_our_defaults: bool) -> io.NodeOutput:
        imported = _read(file, adopt_our_defaults)
        report = "\n".join(_report(imported))
        written = imported.places.data_backend_config
        data_file = str(Path(find_path(written, imported.folders)).absolute()) if written else ""
        config = imported.config
        return io.NodeOutput(config, config.validation, data_file, report, ui=ui.PreviewText(report))


def _read(file: str, adopt_our_defaults: bool) -> Imported:
    return read_config(places.config_file(file), adopt_our_defaults, base=Path(folder_paths.base_path))


def _report(imported: Imported) -> list[str]:
    settings = imported.settings()
    kind = type(settings.adapter).__name__.removesuffix("Settings")
    length = f"{imported.epochs} epochs" if imported.epochs else f"{settings.steps} steps"
    first = f"{imported.places.run_name or 'A run'}: {kind}, {length}, {settings.optimizer.optimizer}"
    lines = [f"{first} at {settings.optimizer.learning_rate:g}, batch size {settings.batch_size}.", *imported.report]
    if imported.datasets:
        lines.append(f"For datasets and caches, where config is wired into them: {', '.join(imported.datasets)}.")
    if imported.epochs:
        lines.append("The train node's own steps are taken: set them there, or max_train_steps in the file.")
    model = imported.places.pretrained_model_name_or_path
    return [*lines, f"The wired MODEL is trained, whatever the file names ({model})."]


class Lumina2SaveConfig(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Lumina2SaveConfig",
            display_name="Save Training Config",
            category="Lumina2",
            description="Writes settings as a SimpleTuner config.json, for the command line or for SimpleTuner itself.",
            inputs=[
                io.String.Input("name", default="my-lora", tooltip="Names the run, and the folder of the file."),
                io.Int.Input("steps", default=1000, min=1, max=10_000_000, tooltip="Optimiser steps in all."),
                io.Float.Input("learning_rate", default=1e-4, min=1e-8, max=1.0, step=1e-6, round=1e-10,
                               tooltip="0.0001 is a good start for a LoRA."),
                io.Int.Input("batch_size", default=1, min=1, max=1024, tooltip="Pictures a step."),
                io.Int.Input("seed", default=42, min=0, max=2**64 - 1, control_after_generate=False,
                             tooltip="Decides everything that is random."),
                ConfigSocket.Input("config", optional=True,
                                   tooltip="Training Settings; what they set wins over the widgets here."),
                AdapterSocket.Input("adapter", optional=True, tooltip="LoRA or LyCORIS Settings."),
                DatasetSocket.Input("dataset", optional=True,
                                    tooltip="Written beside it as multidatabackend.json."),
                ValidationSocket.Input("validation", optional=True, tooltip="Validation Settings."),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The path of the config.json.")],
            is_output_node=True,
            not_idempotent=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        name: str,
        steps: int,
        learning_rate: float,
        batch_size: int,
        seed: int,
        config: Config | None = None,
        adapter: AdapterSettings | None = None,
        dataset: Dataset | None = None,
        validation: Any = None,
    ) -> io.NodeOutput:
        config = config or Config({})
        start = TrainSettings(
            steps=steps,
            batch_size=batch_size,
            seed=seed,
            adapter=adapter or config.adapter or LoRASettings(),
            optimizer=OptimizerSettings(learning_rate=learning_rate),
        )
        others = {**vars(config.report), **vars(validation or config.validation)}
        run_name = check_run_name(name)
        data_file = "multidatabackend.json" if dataset else ""
        told = Places(run_name, str(places.runs().root), data_file)
        written = write_config(from_settings(config.training(start), others, told))
        files: dict[str, Any] = {"config.json": written.config}
        if written.lycoris is not None:
            files[LYCORIS_NAME] = written.lycoris
        if dataset:
            files[data_file] = write_databackend(Backends(tuple(part.settings for part in dataset.parts)))
        folder = _own_folder(places.runs().root / SAVED, run_name, files)
        for file, content in files.items():
            write_json(folder / file, content)
        path = str(folder / "config.json")
        return io.NodeOutput(path, ui=ui.PreviewText("\n".join([path, *written.notes])))


def _own_folder(root: Path, name: str, files: dict[str, Any]) -> Path:
    """The first of ``name``, ``name-2``, … that is free, or holds the very same already."""
    number, folder = 1, root / name
    while folder.exists() and any(_content(folder / file) != content for file, content in files.items()):
        number += 1
        folder = root / f"{name}-{number}"
    return folder


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
