"""Runs as somebody sees them who did not train them: all of them, one of them, and what asking for one would do.

Everything is read from the runs' folders, so that whoever asks, and whenever, is told the same.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.adapter import FullSettings, LoRASettings, LyCORISSettings
from ..config.settings import TrainSettings, check_run_name, deciding, with_values
from ..config.simpletuner.imported import Places
from ..config.simpletuner.write import LYCORIS_NAME, from_settings, write_config
from ..errors import Lumina2Error, RunError
from ..files import atomic_path
from .checkpoint import read_checkpoint
from .control import active
from .curves import last_events, last_loss
from .events import read_events
from .folder import Run, RunStore
from .identity import decide
from .lock import in_use

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LOG_LINES = 200
OUTPUT_DIR = "output/lumina2"  # of an exported configuration; relative, since it may be read elsewhere


def find(store: RunStore, folder: str) -> Run:
    """A run by the name of its folder, which lies directly under the store's root.

    Raises:
        RunError: there is none, or the name leads elsewhere.
    """
    path = store.root / folder
    own = folder and folder == Path(folder).name and not folder.startswith(".") and path.is_dir()
    run = store.read(folder) if own and path.resolve().parent == store.root.resolve() else None
    if run is None:
        raise RunError(f"There is no training run {folder!r} here. It may have been deleted.")
    return run


def summaries(store: RunStore) -> list[dict[str, Any]]:
    """Every run in a few words, the one that was worked on last first."""
    runs = filter(None, (store.read(path.parent.name) for path in store.root.glob("*/run.json")))
    held = in_use(store.root)
    return sorted((summary(store, run, held) for run in runs), key=lambda found: found["age_s"])


def summary(store: RunStore, run: Run, held: set[str] | None = None) -> dict[str, Any]:
    """A run in a few words.

    ``status`` is that of ``run.json``, but "paused" for a running one that waits, and "interrupted" for one that says
    it runs where no process does. ``mine``: it runs in this process and takes commands.
    """
    path, control = store.path(run), active(store.path(run))
    events = last_events(path / "events.jsonl")
    running = control is not None or run.folder in (in_use(store.root) if held is None else held)
    status = run.status
    if running and status in ("running", "finished", "stopped", "interrupted", "failed"):
        status = "paused" if control is not None and control.paused else "running"
    elif status == "running":
        status = "interrupted"
    ends = [each for each in events if each.get("event") == "Ended"]
    steps = [each["step"] for each in events if "event" not in each and "step" in each]
    return {
        "run_id": run.folder,
        "name": run.name,
        "status": status,
        "mine": control is not None,
        "step": max(run.step, steps[-1]) if running and steps else run.step,
        "target": run.target,
        "loss": last_loss(events),
        "age_s": round(max(time.time() - _changed(path), 0.0), 1),
        "message": ends[-1].get("message", "") if ends and not running else "",
        "samples": sum(1 for _ in _pictures(path)),
        "full": _is_full(run),
        "continue_token": run.continue_token,
    }


def describe(store: RunStore, run: Run) -> dict[str, Any]:
    """A run in full: its summary, settings, checkpoints, files, and what it said."""
    path, file = store.path(run), store.file(run.folder, _is_full(run))
    events = [each for each in read_events(path / "events.jsonl") if "event" in each]
    return {
        **summary(store, run),
        "settings": run.settings,
        "changed": changed_settings(run),
        "start": run.start,
        "notes": list(run.notes),
        "file": {"name": file.name, "bytes": file.stat().st_size} if file.exists() else None,
        "checkpoints": [
            {"step": step, "bytes": _size(place), "lora": (place / "lora.safetensors").exists()}
            for step, place in _checkpoints(path)
        ],
        "eval": {str(each["step"]): each.get("loss") for each in events if each["event"] == "Evaluated"},
        "log": [{k: v for k, v in each.items() if k != "samples"} for each in events[-LOG_LINES:]],
    }


def samples(store: RunStore, run: Run) -> dict[str, Any]:
    """The pictures of a run: ``prompts``, and for each validation its ``step`` and the pictures by prompt."""
    prompts: dict[tuple[str, str, int], int] = {}
    rows = []
    for event in read_events(store.path(run) / "events.jsonl"):
        if event.get("event") != "Validated":
            continue
        pictures = []
        for each in event.get("samples", ()):
            key = (each.get("name", ""), each.get("prompt", ""), each.get("seed", 0))
            number = prompts.setdefault(key, len(prompts))
            pictures.append({"prompt": number, **{k: each.get(k) for k in ("path", "score", "ema")}})
        rows.append({"step": event["step"], "asked": event.get("asked", False), "pictures": pictures})
    return {"prompts": [dict(zip(("name", "prompt", "seed"), key, strict=True)) for key in prompts], "rows": rows}


def picture(store: RunStore, run: Run, relative: str) -> Path:
    """A picture inside a run's folder.

    Raises:
        RunError: it is none, is not there, or lies elsewhere, whatever links say.
    """
    home = store.path(run).resolve()
    parts = Path(relative)
    path = (home / parts).resolve()
    inside = not parts.is_absolute() and not parts.drive and path.is_relative_to(home)
    if not (inside and path.suffix.lower() in PICTURES and path.is_file()):
        raise RunError(f"The run {run.folder!r} has no picture {relative!r}.")
    return path


def changed_settings(run: Run) -> dict[str, list[Any]]:
    """Settings that differ from their defaults, each as [value, default]."""
    defaults = _plain(_default_settings(run.settings).written())
    return {
        name: [value, defaults.get(name)]
        for name, value in run.settings.items()
        if name not in defaults or value != defaults[name]
    }


@dataclass(frozen=True)
class Prediction:
    """What pressing Run would do, as far as settings tell: the MODEL and the pictures are not looked at."""

    does: str  # new, continues, trained, kept, or changed: another run of this name has other settings
    folder: str
    step: int = 0  # it would begin with, or that there are
    differs: tuple[str, ...] = ()  # settings, where other ones make it a run of its own


def predict(store: RunStore, name: str, settings: TrainSettings, continue_token: int) -> Prediction:
    """Look for a run of this name that was trained with the same settings.

    Raises:
        SettingError: the name cannot be a folder.
    """
    name = check_run_name(name)
    family = sorted(store.family(name), key=lambda run: -_changed(store.path(run)))
    wanted = _decides(settings)
    found = {run.folder: _decides_of(run) for run in family}
    same = next((run for run in family if found[run.folder] == wanted), None)
    if same is None:
        folder = store.free_folder(name)
        if not family:
            return Prediction("new", folder)
        theirs = found[family[0].folder] or {}
        return Prediction(
            "changed", folder, 0, tuple(sorted(k for k in wanted | theirs if wanted.get(k, ...) != theirs.get(k, ...)))
        )
    decision = decide(store, name, same.identity, settings.steps, continue_token, settings.full_fine_tune)
    step = decision.checkpoint.step if decision.checkpoint else 0
    if decision.done and decision.run:
        return Prediction("kept" if decision.run.step < settings.steps else "trained", same.folder, decision.run.step)
    return Prediction("continues" if step else "new", same.folder, step)


def delete(store: RunStore, run: Run) -> list[str]:
    """Delete a run's folder and what it wrote for ComfyUI, and nothing else; the names of what went.

    Raises:
        RunError: the run goes on, or a file is held by another program.
    """
    path = store.path(run)
    if active(path) is not None or run.folder in in_use(store.root):
        raise RunError(f"The training run {run.folder!r} goes on. Stop it first, then delete it.")
    gone = path.with_name(f".deleted-{run.folder}")
    files = _trained_files(store, run)
    try:
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(path, gone)  # at once: what can only be deleted in part is no longer a run
        for file in files:
            file.unlink()
    except OSError as error:
        raise RunError(f"The training run {run.folder!r} cannot be deleted: {error}. Close what uses it.") from None
    shutil.rmtree(gone, ignore_errors=True)
    return [path.name, *(file.name for file in files)]


def publish(store: RunStore, run: Run, step: int) -> str:
    """Put a checkpoint's LoRA where loaders find it, as ``<run>-<step>.safetensors``; its file's name.

    Raises:
        RunError: there is no such checkpoint, or another run's file has that name.
    """
    lora = checkpoint_lora(store, run, step)
    file = store.file(f"{run.folder}-{step}")
    if file.exists() and not _is_of(file, run):
        raise RunError(f"{file.name} is another run's. Move it out of {file.parent} first.")
    with atomic_path(file) as temporary:
        shutil.copyfile(lora, temporary)
    return file.name


def checkpoint_lora(store: RunStore, run: Run, step: int) -> Path:
    """The LoRA file of a checkpoint.

    Raises:
        RunError: there is none.
    """
    place = next((place for number, place in _checkpoints(store.path(run)) if number == step), None)
    if place is None or not (place / "lora.safetensors").exists():
        raise RunError(f"The run {run.folder!r} has no LoRA of step {step}. Choose a checkpoint that is listed.")
    return place / "lora.safetensors"


def simpletuner_files(run: Run) -> dict[str, Any]:
    """A run's settings as SimpleTuner's files, by name: ``config.json``, and what it names beside it.

    Raises:
        RunError: its settings are of a version that had others.
    """
    try:
        settings = _settings_of(run)
    except (Lumina2Error, TypeError, KeyError):
        raise RunError(f"The settings of {run.folder!r} are of another version of this plugin.") from None
    written = write_config(from_settings(settings, None, Places(run.name, OUTPUT_DIR)))
    lycoris = {} if written.lycoris is None else {LYCORIS_NAME: written.lycoris}
    return {"config.json": written.config, **lycoris}


def ended_since(store: RunStore, since_s: float) -> int:
    """How many runs ended after a time (seconds since 1970); only the newest files are read."""
    late = (path.parent.name for path in store.root.glob("*/run.json") if path.stat().st_mtime > since_s)
    held = in_use(store.root)
    runs = [store.read(folder) for folder in late]
    return sum(run is not None and run.folder not in held and active(store.path(run)) is None for run in runs)


def delete_checkpoint(store: RunStore, run: Run, step: int) -> None:
    """Delete one checkpoint of a run that does not go on.

    Raises:
        RunError: there is none, or the run goes on.
    """
    if active(store.path(run)) is not None or run.folder in in_use(store.root):
        raise RunError(f"The training run {run.folder!r} goes on. Stop it first, then delete its checkpoints.")
    for number, place in _checkpoints(store.path(run)):
        if number == step:
            shutil.rmtree(place, ignore_errors=True)
            return
    raise RunError(f"The run {run.folder!r} has no checkpoint of step {step}.")


def _trained_files(store: RunStore, run: Run) -> list[Path]:
    """What a run wrote for ComfyUI, by what each file says of itself: ``style-2`` may be of ``style`` or of its own."""
    folders = filter(None, (store.loras, store.models))
    named = (file for folder in folders for file in folder.glob("*.safetensors") if file.stem.startswith(run.folder))
    return sorted(file for file in named if _is_of(file, run))


def _is_of(file: Path, run: Run) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata() or {}
    except (OSError, SafetensorError):
        return False
    return bool(about.get("lumina2_trainer.identity") == run.identity and about.get("modelspec.title") == run.folder)


def _checkpoints(path: Path) -> list[tuple[int, Path]]:
    found = filter(None, (read_checkpoint(file.parent) for file in path.glob("checkpoint-*/checkpoint.json")))
    return sorted((checkpoint.step, checkpoint.path) for checkpoint in found)


def _pictures(path: Path) -> list[Path]:
    return [file for file in (path / "samples").rglob("*") if file.suffix.lower() in PICTURES]


def _changed(path: Path) -> float:
    times = [file.stat().st_mtime for name in ("events.jsonl", "run.json") if (file := path / name).exists()]
    return max(times, default=0.0)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _is_full(run: Run) -> bool:
    return any(name.startswith("full_") for name in run.settings)


def _default_settings(settings: dict[str, Any]) -> TrainSettings:
    """Defaults of the kind of training that some written settings are of."""
    adapter: Any = LoRASettings()
    if any(name.startswith("lycoris_") for name in settings):
        adapter = LyCORISSettings()
    elif any(name.startswith("full_") for name in settings):
        adapter = FullSettings()
    return TrainSettings(adapter=adapter)


def _decides(settings: TrainSettings) -> dict[str, Any]:
    return dict(_plain(deciding(settings)))


def _decides_of(run: Run) -> dict[str, Any] | None:
    """What decided the weights of a run; None where its settings are of a version that had others."""
    try:
        return _decides(_settings_of(run))
    except (Lumina2Error, TypeError, KeyError):
        return None


def _settings_of(run: Run) -> TrainSettings:
    defaults = replace(_default_settings(run.settings), steps=max(run.target, 1))
    return with_values(defaults, _tuples(run.settings))


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were."""

    def back(value: Any) -> Any:
        return tuple(map(back, value)) if isinstance(value, list) else value

    return {name: back(value) for name, value in values.items()}
