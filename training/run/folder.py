"""The folders of runs, and the ``run.json`` in each."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..files import read_json, write_json


@dataclass(frozen=True)
class Run:
    """What ``run.json`` says of a run."""

    name: str  # as asked for; several runs may carry it
    folder: str  # its own, and its LoRA file's name
    identity: str
    status: str  # running, finished, stopped, interrupted or failed
    step: int  # steps trained
    target: int  # steps asked for
    continue_token: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = ""  # the MODEL's fingerprint
    start: str = ""  # the checkpoint it started from, where it was not the base model
    learning_rate: float = 0.0  # what it was set to in mid-run; 0: it is the settings' own
    processes: int = 1  # that train it together
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunStore:
    """All runs under one folder, and where their LoRA files go."""

    root: Path
    loras: Path
    models: Path | None = None  # for full fine-tunes: models/diffusion_models

    def path(self, run: Run) -> Path:
        return self.root / run.folder

    def file(self, folder: str, full: bool = False) -> Path:
        """What a run trained: its LoRA, or the model where that was trained in full.

        Raises:
            RunError: no place for models was named.
        """
        place = self.models if full else self.loras
        if place is None:
            raise RunError("No folder for trained models was named. Train a LoRA, or name one.")
        return place / f"{folder}.safetensors"

    def save(self, run: Run) -> Run:
        write_json(self.path(run) / "run.json", asdict(run))
        return run

    def family(self, name: str) -> list[Run]:
        """Every run that carries the name, the oldest folder name first."""
        found = (self.read(path.parent.name) for path in sorted(self.root.glob("*/run.json")))
        return [run for run in found if run and run.name == name]

    def read(self, folder: str) -> Run | None:
        """A run by its folder; None where there is none or its file is damaged (no file of it is ever replaced)."""
        known = {f.name for f in fields(Run)}
        try:
            content = read_json(self.root / folder / "run.json")
            return Run(**{k: v for k, v in content.items() if k in known} | {"folder": folder})
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError):
            return None

    def free_folder(self, name: str) -> str:
        """The first of ``name``, ``name-2``, … that no folder, LoRA file or model has, compared without case."""
        taken = {path.name.casefold() for path in self.root.glob("*")}
        for files in filter(None, (self.loras, self.models)):
            taken |= {path.stem.casefold() for path in files.glob("*.safetensors")}
        number, folder = 1, name
        while folder.casefold() in taken:
            number += 1
            folder = f"{name}-{number}"
        return folder
