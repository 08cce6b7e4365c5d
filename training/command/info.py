"""``info``: what a run, a checkpoint, a LoRA file, a dataset or a configuration holds."""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path
from typing import Any

from ..adapter.files import PREFIX
from ..config.databackend.read import read_databackend
from ..config.dataset import DatasetSettings, SourceSettings
from ..config.paths import resolve
from ..config.settings import TrainSettings
from ..config.simpletuner.read import read_config
from ..data.dataset import load_dataset
from ..errors import ModelError, RunError
from ..run.checkpoint import read_checkpoint
from ..run.events import read_losses
from ..run.folder import RunStore
from .answer import Answer, table
from .check import holds_datasets

RECENT = 20  # steps that a run's last loss is the mean of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a run's or checkpoint's folder, a folder of pictures, or a file")


def run(options: argparse.Namespace) -> Answer:
    """Tell what lies at a path.

    Raises:
        Lumina2Error: there is nothing, or nothing that is known here.
    """
    path: Path = options.path
    if (path / "run.json").is_file():
        found = run_info(path)
    elif (path / "checkpoint.json").is_file():
        found = checkpoint_info(path)
    elif path.is_dir():
        found = dataset_info(DatasetSettings(path.name, SourceSettings(instance_data_dir=str(path))), path)
    elif path.suffix == ".json":
        found = _file_info(path)
    else:
        found = lora_info(path)
    return Answer(found, table(found))


def run_info(folder: Path) -> dict[str, Any]:
    """Where a run stands, and its settings that differ from the defaults."""
    run = RunStore(folder.absolute().parent, folder).read(folder.absolute().name)
    if run is None:
        raise RunError(f"{folder / 'run.json'} is damaged; the run's checkpoints and LoRA file are still of use.")
    losses = read_losses(folder / "events.jsonl", run.step)[-RECENT:]
    defaults = TrainSettings().written()
    changed = {
        name: value for name, value in run.settings.items() if defaults.get(name, ...) not in (value, _plain(value))
    }
    checkpoints = sorted(
        int(path.parent.name.rsplit("-", 1)[-1]) for path in folder.glob("checkpoint-*/checkpoint.json")
    )
    return {
        "run": run.folder,
        "status": run.status,
        "step": run.step,
        "target": run.target,
        "loss": sum(losses) / len(losses) if losses else None,
        "checkpoints": checkpoints,
        "model": run.model,
        "notes": list(run.notes),
        "settings": changed,
    }


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def checkpoint_info(folder: Path) -> dict[str, Any]:
    found = read_checkpoint(folder)
    if found is None:
        raise RunError(f"The checkpoint {folder} is damaged. Delete it: the one before is taken then.")
    size = sum(path.stat().st_size for path in folder.iterdir())
    lora = lora_info(found.lora) if found.lora.exists() else {}
    return {"checkpoint": str(folder), "step": found.step, "training": found.identity, "bytes": size} | (
        {"lora": {name: lora[name] for name in ("format", "layers", "ranks", "parameters")}} if lora else {}
    )


def dataset_info(settings: DatasetSettings, place: Path) -> dict[str, Any]:
    """What the settings make of the pictures; the index is kept nowhere."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        (report,) = load_dataset(settings, Path(scratch)).reports
    return {"dataset": report.id, "pictures": report.pictures, "used": report.kept, "report": report.lines()}


def _file_info(path: Path) -> dict[str, Any]:
    if not holds_datasets(path):
        config = read_config(path)
        places = {name: value for name, value in vars(config.places).items() if value}
        return {"config": str(path), **places, "report": list(config.report)}
    backends = read_databackend(path)
    folders = [Path(), *path.absolute().parents]
    reports = [dataset_info(resolve(each, folders), path) for each in backends.datasets]
    lines = [*backends.notes, *(line for each in reports for line in each["report"])]
    return {
        "datasets": [each["dataset"] for each in reports],
        "pictures": sum(each["pictures"] for each in reports),
        "used": sum(each["used"] for each in reports),
        "report": lines,
    }


def lora_info(path: Path) -> dict[str, Any]:
    """Format, layers, ranks and metadata of a LoRA file.

    Raises:
        ModelError: the file is missing, or is not a LoRA in safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors ({error}).") from error
    down = {key: shape for key, shape in shapes.items() if key.endswith(("lora_A.weight", "lora_down.weight"))}
    if not down:
        raise ModelError(f"{path} holds no LoRA: none of its {len(shapes)} tensors is named lora_A or lora_down.")
    return {
        "file": str(path),
        "format": "ComfyUI" if all(key.startswith(PREFIX) for key in shapes) else "another",
        "layers": len(down),
        "ranks": sorted({shape[0] for shape in down.values()}),
        "parameters": sum(prod(shape) for shape in shapes.values()),
        "metadata": metadata,
    }
