"""Tensorboard and wandb, through accelerate's trackers: curves, pictures and texts of a run."""

from __future__ import annotations

import importlib.util
import math
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config.report import ReportSettings
from ..errors import RunError
from ..run.events import Ended, Evaluated, Event, Said, Sample, Started, StepDone, Validated
from ..run.folder import Run
from .story import remember, remembered

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
CLOSING_S = 120.0  # wandb sends what is left when it is closed


def packaged(settings: ReportSettings) -> list[str]:
    """The trackers of others that are wanted: those named, or with ``all`` those installed."""
    return [
        name
        for name, package in PACKAGES.items()
        if name in settings.named or (name in settings.trackers and importlib.util.find_spec(package))
    ]


def check_package(name: str) -> None:
    """Raises RunError where a tracker is not installed."""
    if not importlib.util.find_spec(PACKAGES[name]):
        raise RunError(
            f"report_to names {name}, which is not installed. Run `pip install {PACKAGES[name]}` with ComfyUI's "
            "Python, or set report_to to simpletuner, which needs nothing."
        )


class Tracker(Protocol):
    """One place that curves, pictures and texts of a run go to."""

    def log(self, values: Mapping[str, float | str], step: int) -> None: ...

    def log_pictures(self, pictures: Mapping[str, tuple[Any, str]], step: int) -> None:
        """PIL pictures with their captions, by name."""
        ...

    def close(self, failed: bool) -> None: ...


class Tensorboard:
    def __init__(self, settings: ReportSettings, run: Run, folder: Path, step: int) -> None:
        from accelerate.tracking import TensorBoardTracker

        place, name = (Path(settings.logging_dir), run.folder) if settings.logging_dir else (folder, "tensorboard")
        # What a run that is continued had logged of later steps is void.
        self._tracker = TensorBoardTracker(name, str(place), purge_step=step + 1 if step else None)
        self._tracker.start()
        table = "\n".join(f"| {key} | `{value}` |" for key, value in run.settings.items())
        self._tracker.log({"settings": f"| setting | value |\n|---|---|\n{table}"}, step=step)

    def log(self, values: Mapping[str, float | str], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def log_pictures(self, pictures: Mapping[str, tuple[Any, str]], step: int) -> None:
        import numpy as np

        arrays = {name: np.asarray(picture)[None] for name, (picture, _) in pictures.items()}
        self._tracker.log_images(arrays, step=step, dataformats="NHWC")

    def close(self, failed: bool) -> None:
        self._tracker.finish()


class Wandb:
    """A run that is continued is the same run there; its id is kept in the run's folder."""

    def __init__(self, settings: ReportSettings, run: Run, folder: Path, step: int) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        kept = remembered(folder).get("wandb_id") if step else None
        identifier = kept or uuid.uuid4().hex[:8]
        remember(folder, wandb_id=identifier)
        self._tracker = WandBTracker(
            settings.tracker_project_name,
            id=identifier,
            resume="allow",
            name=settings.tracker_run_name or run.folder,
            dir=str(folder),
            config={**run.settings, "run": run.folder, "identity": run.identity},
            # Neither ComfyUI's console nor its source code is anybody's business.
            settings=wandb.Settings(console="off", save_code=False, disable_git=True),
        )
        self._tracker.start()
        # Steps come late and a continued run goes back: the step is a value, so that nothing is refused as too old.
        self._tracker.tracker.define_metric("step")
        self._tracker.tracker.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float | str], step: int) -> None:
        self._tracker.log({**values, "step": step})

    def log_pictures(self, pictures: Mapping[str, tuple[Any, str]], step: int) -> None:
        import wandb

        shown = {name: wandb.Image(picture, caption=caption) for name, (picture, caption) in pictures.items()}
        self._tracker.log({**shown, "step": step})

    def close(self, failed: bool) -> None:
        self._tracker.tracker.finish(exit_code=int(failed))


KINDS: dict[str, type[Tensorboard] | type[Wandb]] = {"tensorboard": Tensorboard, "wandb": Wandb}


@dataclass
class Tracking:
    """Listens, and passes on to one tracker what it shows.

    Metrics have SimpleTuner's names: ``train_loss``, ``learning_rate``, ``grad_norm``, ``loss/val``; beside them
    ``memory_gb`` and ``loss/<dataset or quartile>``.
    """

    name: str
    settings: ReportSettings
    folder: Path
    tracker: Tracker | None = None
    _prompts: frozenset[str] = frozenset()
    _step: int = 0

    def __call__(self, event: Event) -> None:
        self._step = getattr(event, "step", self._step)
        if isinstance(event, Started):
            check_package(self.name)
            from accelerate import PartialState

            PartialState()  # accelerate's trackers ask it which process they are in
            self.tracker, self._prompts = None, frozenset()
            self.tracker = KINDS[self.name](self.settings, event.run, self.folder, event.step)
        elif self.tracker is None:
            return
        elif isinstance(event, StepDone):
            self.tracker.log(step_values(event), event.step)
        elif isinstance(event, Validated):
            self._log_samples(self.tracker, event.samples, event.step)
            self.tracker.log(finite(event.scores), event.step)
        elif isinstance(event, Evaluated):
            values = {"loss/val": event.loss, **{f"loss/val/{name}": score for name, score in event.scores.items()}}
            self.tracker.log(finite(values), event.step)
        elif isinstance(event, Said):
            self.tracker.log({"said": event.text}, self._step)
        elif isinstance(event, Ended):
            tracker, self.tracker = self.tracker, None
            _within(CLOSING_S, lambda: tracker.close(event.status == "failed"), self.name)

    def _log_samples(self, tracker: Tracker, samples: Sequence[Sample], step: int) -> None:
        from PIL import Image

        pictures = {}
        for number, sample in enumerate(samples):
            group = "samples-ema" if sample.ema else "samples"
            name = f"{group}/{sample.name or number}"
            while name in pictures:  # several pictures of a prompt
                name += "'"
            with Image.open(self.folder / sample.path) as picture:
                pictures[name] = (picture.convert("RGB"), f"{sample.prompt} (seed {sample.seed}, step {step})")
        if pictures:
            tracker.log_pictures(pictures, step)
        new = {f"prompts/{s.name or n}": s.prompt for n, s in enumerate(samples)}
        unknown = {name: prompt for name, prompt in new.items() if name not in self._prompts}
        if unknown:
            tracker.log(unknown, step)
            self._prompts |= unknown.keys()


def step_values(event: StepDone) -> dict[str, float | str]:
    values = {
        "train_loss": event.loss,
        "learning_rate": event.lr,
        "grad_norm": event.grad_norm,
        "memory_gb": None if event.memory is None else event.memory / 1e9,
        **{f"loss/{name}": loss for name, loss in event.parts.items()},
    }
    return finite(values)


def finite(values: Mapping[str, float | None]) -> dict[str, float | str]:
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _within(seconds: float, action: Any, name: str) -> None:
    """Raises what the action raises, or RunError where it takes too long; it goes on in the background then."""
    raised: list[Exception] = []

    def work() -> None:
        try:
            action()
        except Exception as error:  # raised again where it is waited for
            raised.append(error)

    thread = threading.Thread(target=work, name=f"closing {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise RunError(f"it did not close within {seconds:.0f} s; what it has not sent yet lies in the run's folder")
    if raised:
        raise raised[0]
