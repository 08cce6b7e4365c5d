"""What a run leaves on disk: checkpoints, the file for ComfyUI, and ``run.json``; each whole or as it was before."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..adapter.files import write_lora
from ..config.settings import TrainSettings
from ..errors import RunError
from ..files import remove_left_over, write_tensors
from ..optim.averages import averaged
from ..optim.state import optimizer_tensors
from .checkpoint import newest_checkpoint, remove_old_checkpoints, save_checkpoint
from .events import CheckpointSaved, Listener, LoRASaved
from .folder import Run, RunStore
from .loop import TrainState
from .processes import ALONE, Processes

SPARE_BYTES = 64 * 2**20  # left on the disk for everything else
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_WINDOWS_DISK_FULL = 112
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def is_disk_full(error: BaseException) -> bool:
    """Also where safetensors says so, which has no error number."""
    number = _OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    code = int(number[1]) if number else getattr(error, "errno", None)
    return code in ((_WINDOWS_DISK_FULL,) if number and os.name == "nt" else _DISK_FULL)


class Keeper:
    """Writes for one run; ``run`` is what ``run.json`` says.

    Args:
        modules: the base weight of each module that can have an adapter, by the module's name.
        about: what the file says of its data.
        processes: of the run; all call each method, and the leader writes.
    """

    def __init__(
        self,
        store: RunStore,
        run: Run,
        settings: TrainSettings,
        modules: Mapping[str, Tensor],
        tell: Listener,
        about: Mapping[str, str],
        processes: Processes = ALONE,
    ) -> None:
        self.store, self.settings, self.modules, self.tell = store, settings, modules, tell
        self.about = about
        self.processes = processes
        self.full = settings.full_fine_tune
        self.folder, self.file = store.path(run), store.file(run.folder, self.full)
        if processes.leads:
            for path in (self.folder / "run.json", self.file, self._beside("ema"), self._beside("best")):
                remove_left_over(path)
        self._save(run)

    def _beside(self, suffix: str) -> Path:
        return self.file.with_stem(f"{self.file.stem}-{suffix}")

    def _save(self, run: Run) -> Run:
        self.processes.lead(lambda: self.store.save(run))
        self.run = run
        return run

    def exported(self, state: TrainState) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What is trained as ComfyUI reads it, and what its file says of itself."""
        with averaged(state.optimizer):
            tensors, about = state.adapter.export()
        return tensors, self._metadata(state.step) | about

    def checkpoint(self, state: TrainState, lora: tuple[dict[str, Tensor], dict[str, str]] | None = None) -> None:
        """Raises RunError where the disk is full; the checkpoints before are whole then."""
        tensors, metadata = (None, {}) if self.full else lora or self.exported(state)
        self.check_space(state, sum(tensor.nbytes for tensor in (tensors or {}).values()))
        with self._disk_full(state):
            saved = save_checkpoint(self.folder, self.run.identity, state, tensors, metadata, self.processes)
        self.processes.lead(lambda: remove_old_checkpoints(self.folder, self.settings.checkpoints_total_limit))
        self._save(replace(self.run, step=state.step))
        self.tell(CheckpointSaved(state.step, saved.path))

    def end(self, state: TrainState, status: str, note: str = "") -> dict[str, Tensor]:
        """A last checkpoint and the file for ComfyUI; the EMA beside it.

        Returns:
            What the file holds.
        """
        tensors, metadata = self.exported(state)
        self.checkpoint(state, (tensors, metadata))
        self.write(state, self.file, tensors, metadata)
        if state.ema:
            with state.ema.in_place():
                averages, _ = state.adapter.export()
            self.write(state, self._beside("ema"), averages, metadata)
        self.note(status, note)
        return tensors

    def write(self, state: TrainState, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        def write() -> None:
            if self.full:
                write_tensors(path, tensors, metadata)
            else:
                write_lora(path, tensors, self.modules, metadata)

        with self._disk_full(state):
            self.processes.lead(write)
        self.tell(LoRASaved(state.step, path))

    def write_beside(self, state: TrainState, suffix: str) -> None:
        """A file for ComfyUI of this step's weights, named after the run's own."""
        self.write(state, self._beside(suffix), *self.exported(state))

    def note(self, status: str, note: str = "") -> Run:
        """Write ``run.json`` alone."""
        notes = (*self.run.notes, note) if note else self.run.notes
        return self._save(replace(self.run, status=status, notes=notes))

    def set_learning_rate(self, rate: float) -> None:
        self._save(replace(self.run, learning_rate=rate))

    def check_space(self, state: TrainState, exported: int = 0) -> None:
        """Raises RunError where the disk has no room for one more checkpoint of this run.

        Args:
            exported: bytes of the file for ComfyUI in it; where they are not known yet, as many as are trained.
        """
        self.processes.lead(lambda: self._check_space(state, exported))

    def _check_space(self, state: TrainState, exported: int) -> None:
        tensors, _ = optimizer_tensors(state.optimizer)
        weights = {**state.adapter.weights, **state.adapter.frozen}
        one = sum(weight.numel() * weight.element_size() for weight in weights.values())
        needed = sum(tensor.nbytes for tensor in tensors.values()) + one + (0 if self.full else exported or one)
        needed += sum(average.nbytes for average in state.ema.state().values()) if state.ema else 0
        needed *= self.processes.count if state.shards else 1
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < needed + SPARE_BYTES:
            raise self.no_space(state, f"needs {_size(needed)} and {_size(free)} are free")

    @contextmanager
    def _disk_full(self, state: TrainState) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if is_disk_full(error):
                raise self.no_space(state) from error
            raise

    def no_space(self, state: TrainState, what: str = "does not fit") -> RunError:
        """What to raise; it says which checkpoint is there."""
        kept = newest_checkpoint(self.folder)
        before = f"The checkpoint of step {kept.step} is whole; the run goes on from it." if kept else ""
        return RunError(
            f"The disk of {self.folder} is full: a checkpoint of step {state.step} {what}. Free some space and queue "
            f"again. {before}".strip()
        )

    def _metadata(self, step: int) -> dict[str, str]:
        """What a LoRA file says of itself, in the field's own keys."""
        settings = self.settings
        return {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "lumina-2" if self.full else "lumina-2/lora",
            "modelspec.implementation": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
            "modelspec.title": self.run.folder,
            "modelspec.prediction_type": "flow",
            "ss_base_model_version": "lumina2",
            "ss_steps": str(step),
            "ss_learning_rate": str(self.run.learning_rate or settings.optimizer.learning_rate),
            "ss_optimizer": settings.optimizer.optimizer,
            "ss_lr_scheduler": settings.optimizer.lr_scheduler,
            "ss_seed": str(settings.seed),
            **self.about,
            "lumina2_trainer.settings": json.dumps(settings.written()),
            "lumina2_trainer.identity": self.run.identity,
        }


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GB"
