"""What can be said of a training before it runs, from what stands in the page's widgets; nothing is loaded for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import folder_paths

from ..training.config.adapter import AdapterSettings, FullSettings, LoRASettings, started_anyhow
from ..training.config.optim import OptimizerSettings
from ..training.config.settings import Config, TrainSettings
from ..training.data.dataset import Dataset
from ..training.errors import Lumina2Error, SettingError
from ..training.files import read_json
from ..training.run.history import predict
from . import places
from .config import Lumina2LoadConfig
from .dataset import (
    Lumina2DatasetOptions,
    Lumina2LoadDataset,
    Lumina2LoadDatasetConfig,
    configured,
    folder_settings,
    read_parts,
)
from .glimpse import glimpse
from .loader import Lumina2LoadDiffusers, model_folders
from .settings import Lumina2LoRASettings, Lumina2LyCORISSettings, Lumina2TrainingSettings
from .slider import Lumina2SliderSettings

EVALUATED = {
    cls.__name__: cls
    for cls in (
        Lumina2LoRASettings,
        Lumina2LyCORISSettings,
        Lumina2TrainingSettings,
        Lumina2SliderSettings,
        Lumina2LoadConfig,
        Lumina2DatasetOptions,
    )
}  # they turn widgets, or the file that one names, into settings and change nothing
PASSED = {"Lumina2ReportSettings": "config"}  # what they add decides nothing here
FULL = "TrainLumina2Full"
SINGLE_FILES = {"CheckpointLoaderSimple": ("checkpoints", "ckpt_name"), "UNETLoader": ("diffusion_models", "unet_name")}
DATASET_DEFAULTS = {"probability": 1.0, "is_regularisation_data": False}  # where an older workflow has no such widget
CHAIN = 32  # nodes that are followed
MEASURED = 8  # forecasts' measurements that are kept; one takes seconds
WIDTH = 2304  # of Lumina-Image-2.0 and its fine-tunes


class UnknownError(Lumina2Error):
    """Something that only running tells."""


@dataclass(frozen=True)
class Shown:
    """A node as the page shows it: its widgets' values, and the nodes behind its inputs (None: not followed)."""

    type: str
    widgets: Mapping[str, Any]
    inputs: Mapping[str, Shown | None] = field(default_factory=dict)

    @classmethod
    def read(cls, sent: Any, depth: int = CHAIN) -> Shown:
        """Raises SettingError where what was sent is no node."""
        if not isinstance(sent, dict) or not isinstance(sent.get("type"), str) or not depth:
            raise SettingError("The page sent no node. Reload it.")
        linked = sent.get("inputs") or {}
        inputs = {name: cls.read(node, depth - 1) if node else None for name, node in linked.items()}
        return cls(sent["type"], dict(sent.get("widgets") or {}), inputs)

    def behind(self, name: str) -> Shown | None:
        """The node behind an input; None where nothing is wired.

        Raises:
            UnknownError: something is, that the page could not follow.
        """
        if name not in self.inputs:
            return None
        if (node := self.inputs[name]) is None:
            raise UnknownError(name)
        return node


def settings_of(train: Shown) -> tuple[TrainSettings, dict[str, Any]]:
    """The settings of a train node, and by widget what wires set otherwise.

    Raises:
        SettingError: a value is not possible.
        UnknownError: a wire comes from where only running tells.
    """
    widgets, wired, config = train.widgets, _evaluated(train.behind("adapter")), _evaluated(train.behind("config"))
    config = config if isinstance(config, Config) else Config({})
    try:
        settings = config.training(
            TrainSettings(
                steps=int(widgets["steps"]),
                batch_size=int(widgets["batch_size"]),
                seed=int(widgets["seed"]),
                adapter=_adapter(train, wired, config),
                optimizer=OptimizerSettings(learning_rate=float(widgets["learning_rate"])),
            )
        )
    except (KeyError, TypeError, ValueError):
        raise UnknownError("steps, learning_rate, rank, batch_size or seed") from None
    now = {
        "run_name": config.run_name if not str(widgets.get("run_name", "")).strip() else None,
        "steps": settings.steps,
        "learning_rate": settings.optimizer.learning_rate,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "rank": getattr(settings.adapter, "rank", getattr(settings.adapter, "linear_dim", None)),
    }
    return settings, {
        name: value for name, value in now.items() if name in widgets and value not in (None, "", widgets[name])
    }


def _adapter(train: Shown, wired: Any, config: Config) -> AdapterSettings:
    """As the train nodes choose it."""
    if train.type == FULL:
        own = config.adapter if isinstance(config.adapter, FullSettings) else FullSettings()
        targets, blocks = (str(train.widgets.get(name, "")).strip() for name in ("targets", "blocks"))
        return replace(own, targets=targets or own.targets, blocks=blocks or own.blocks)
    return wired or config.adapter or LoRASettings(int(train.widgets["rank"]))


def _evaluated(node: Shown | None) -> Any:
    """What a settings node gives."""
    if node is None:
        return None
    if node.type in PASSED:
        return _evaluated(node.behind(PASSED[node.type]))
    if node.type not in EVALUATED:
        raise UnknownError(node.type)
    linked = {name: _evaluated(node.behind(name)) for name in node.inputs}
    return EVALUATED[node.type].execute(**node.widgets, **{k: v for k, v in linked.items() if v is not None}).args[0]


def plan(train: Shown) -> dict[str, Any]:
    """What Run would do, and which widgets something wired wins over.

    Raises:
        SettingError: a value is not possible.
    """
    try:
        settings, overridden = settings_of(train)
        name = overridden.get("run_name", train.widgets.get("run_name"))
        if not isinstance(name, str):
            raise UnknownError("run_name")
        if train.widgets.get("resume", "continue") != "continue":
            return {"does": "from checkpoint", "checkpoint": train.widgets.get("checkpoint", ""), "over": overridden}
        found = predict(places.runs(), name, settings, int(train.widgets.get("continue_token") or 0))
    except UnknownError as what:
        return {"does": "unknown", "why": str(what), "over": {}}
    return {
        "does": found.does,
        "folder": found.folder,
        "step": found.step,
        "steps": settings.steps,
        "differs": list(found.differs),
        "over": overridden,
    }


def glimpse_of(node: Shown) -> dict[str, Any]:
    """What a dataset's node showed when it ran; its index is read again, which is quick where it ran before.

    Raises:
        UnknownError: a wire comes from where only running tells.
        SettingError, DataError: a value is not possible, or the pictures are gone.
    """
    return glimpse(_dataset(node))


def _dataset(node: Shown) -> Dataset:
    behind = node.behind("dataset")
    before = _dataset(behind) if behind else None
    widgets = dict(node.widgets)
    try:
        if node.type == Lumina2LoadDataset.__name__:
            options = _evaluated(node.behind("options")) or ()
            settings = (folder_settings(widgets.pop("folder"), options, **DATASET_DEFAULTS | widgets),)
        elif node.type == Lumina2LoadDatasetConfig.__name__:
            settings = configured(widgets["file"], _evaluated(node.behind("config"))).datasets
        else:
            raise UnknownError(node.type)
    except (KeyError, TypeError, AttributeError):
        raise UnknownError(node.type) from None
    return read_parts(settings, before, lambda done, total: None)


def forecast_of(train: Shown) -> dict[str, Any]:
    """How much memory a training would need, in bytes, with its parts and what switches would save; and what is free.

    Raises:
        SettingError: a value is not possible.
    """
    import comfy.model_management as management

    from ..training.model.precision import choose_computing
    from ..training.run.forecast import Shape, forecast, savings

    device = management.get_torch_device()
    try:
        settings, _ = settings_of(train)
        config, dtype = _model(train.behind("model"))
        side = _resolution(train.behind("latents")) // 16 * 2
    except UnknownError as what:
        return {"known": False, "why": str(what)}
    stored = dtype or management.unet_dtype(device=device, supported_dtypes=_dtypes())
    computed = choose_computing(settings.precision, device).dtype
    measured = _measured(
        config, Shape(settings.batch_size, side, side), started_anyhow(settings.adapter), stored, computed
    )
    optimizer = settings.optimizer
    choice = (settings.precision, optimizer.optimizer, optimizer.fused_backward, device.type)
    found = forecast(measured, *choice)
    return {
        "known": True,
        "device": device.type,
        "total": found.total,
        "parts": found.parts(),
        "savings": savings(measured, *choice),
        "free": int(management.get_free_memory(device)),
        "notes": list(found.notes),
    }


_kept: OrderedDict[str, Any] = OrderedDict()


def _measured(config: Any, shape: Any, adapter: AdapterSettings, stored: Any, computed: Any) -> Any:
    from ..training.adapter.adapter import add_adapter
    from ..training.run.forecast import measure

    key = repr((config, shape, adapter, stored, computed))
    if key not in _kept:
        ways = ("none", "full", "selective")
        _kept[key] = measure(config, shape, lambda model: add_adapter(model, adapter, 0), stored, computed, ways)
        while len(_kept) > MEASURED:
            _kept.popitem(last=False)
    return _kept[key]


def _dtypes() -> list[Any]:
    import torch

    return [torch.bfloat16, torch.float32]


def _model(node: Shown | None) -> tuple[Any, Any]:
    """The sizes of the model behind a MODEL wire, and the dtype that its loader asks for (None: ComfyUI's choice)."""
    import torch

    from ..training.model.config import TransformerConfig

    for loader in _chain(node, "model"):
        if loader.type == Lumina2LoadDiffusers.__name__:
            folder = model_folders().get(loader.widgets.get("folder"))
            if folder is None:
                raise UnknownError(loader.type)
            config = TransformerConfig.from_diffusers(read_json(folder / "transformer" / "config.json"))
            return config, {"bf16": torch.bfloat16, "fp32": torch.float32}.get(loader.widgets.get("dtype", ""))
        if loader.type in SINGLE_FILES:
            kind, widget = SINGLE_FILES[loader.type]
            path = folder_paths.get_full_path(kind, str(loader.widgets.get(widget, "")))
            if path and _is_of_the_known_size(Path(path)):
                return TransformerConfig(), None
            raise UnknownError(loader.type)
    raise UnknownError("model")


def _is_of_the_known_size(path: Path) -> bool:
    from ..training.model.loading import TensorFiles

    try:
        files = TensorFiles(path)
    except Lumina2Error:
        return False
    return any(name.endswith("cap_embedder.1.weight") and tuple(files.shape(name)) == (WIDTH, WIDTH) for name in files)


def _resolution(latents: Shown | None) -> int:
    """The largest edge, in pixels, of a square with as many pixels as what is trained on."""
    cache = next(iter(_chain(latents, "latents")), None)
    sides = [
        int(node.widgets["resolution"])
        for node in _chain(cache.behind("dataset") if cache else None, "dataset")
        if node.type == "Lumina2LoadDataset"
    ]
    if not sides:
        raise UnknownError("latents")
    return max(sides)


def _chain(node: Shown | None, through: str) -> Iterator[Shown]:
    """A node and those behind it by one input."""
    while node is not None:
        yield node
        node = node.behind(through)
