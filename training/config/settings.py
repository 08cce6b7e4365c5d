"""The settings of a training, checked when they are made; behind this nothing checks them again."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from ..errors import SettingError
from .adapter import AdapterSettings, FullSettings, LoRASettings, LyCORISSettings
from .checks import require
from .objective import ObjectiveSettings
from .optim import OptimizerSettings
from .precision import PrecisionSettings
from .report import ReportSettings
from .validation import ValidationSettings

RESUME = ("continue", "from checkpoint")
_WINDOWS_NAMES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the weights beside model and data, and how long and how often to save.

    Raises:
        SettingError: a value is out of range, or two settings contradict each other.
    """

    steps: int = 1000
    batch_size: int = 1
    seed: int = 42
    adapter: AdapterSettings = field(default_factory=LoRASettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    data_backend_sampling: str = "auto-weighting"  # datasets are drawn by their sizes, or "uniform"
    disable_bucket_pruning: bool = True  # False leaves out sizes of which there are fewer pictures than a batch
    checkpoint_step_interval: int = 500
    checkpoints_total_limit: int = 5

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "choose at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "choose at least 1")
        require(0 <= self.seed < 2**64, "seed", self.seed, "choose a number from 0 to 18446744073709551615")
        for name in ("checkpoint_step_interval", "checkpoints_total_limit"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "choose at least 1")
        self.optimizer.check_run(self.steps, self.full_fine_tune)
        if self.full_fine_tune:
            self.precision.check_full_fine_tune()
        if self.objective.slider:
            remedy = "only what has a strength becomes a slider: train a LoRA or LyCORIS without DoRA, or empty it"
            adapter = self.adapter
            lengths = isinstance(adapter, LoRASettings) and adapter.use_dora
            lengths = lengths or (isinstance(adapter, LyCORISSettings) and adapter.dora_wd)
            fits = not self.full_fine_tune and not lengths
            require(fits, "slider_positive", self.objective.slider_positive, remedy)

    @property
    def full_fine_tune(self) -> bool:
        return isinstance(self.adapter, FullSettings)

    def written(self) -> dict[str, Any]:
        """Every setting by name, as text, number, truth value, list or mapping: what ``run.json`` shows.

        Those of a LoRA begin with ``lora_``, of LyCORIS with ``lycoris_``, of a full fine-tune with ``full_``.
        """
        return _written(self, "")


@dataclass(frozen=True)
class Config:
    """Settings that were chosen, by name: those of ``TrainSettings.written``, ``ValidationSettings`` and
    ``ReportSettings``. What a LUMINA2_CONFIG carries.

    Raises:
        SettingError: a name is unknown.
    """

    values: Mapping[str, Any]
    adapter: AdapterSettings | None = None  # what kind is trained, where nothing else says so
    run_name: str = ""  # for a node that names none
    data: Mapping[str, Any] = field(default_factory=dict)  # of datasets and caches, under SimpleTuner's names

    def __post_init__(self) -> None:
        known = {*TrainSettings().written(), *_adapter_names(), *_names(ValidationSettings), *_names(ReportSettings)}
        for name in self.values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"do you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}."
                raise SettingError(f"There is no setting {name!r}; {hint}")

    def check(self) -> None:
        """Raises SettingError where a value is not possible in any run."""
        full = self.values.get("fused_backward")  # what only a full fine-tune may do
        adapter: AdapterSettings = FullSettings() if full else LoRASettings()
        self.training(TrainSettings(steps=2**31, adapter=adapter, optimizer=OptimizerSettings(learning_rate=0.1)))
        _ = self.validation, self.report

    def training(self, settings: TrainSettings) -> TrainSettings:
        """``settings`` with what was chosen; an adapter's own where the adapter is of that kind."""
        known = settings.written()
        return with_values(settings, {name: value for name, value in self.values.items() if name in known})

    @property
    def slider(self) -> tuple[str, ...]:
        """The prompts of a slider, which need embeddings beside the captions'."""
        names = ("slider_positive", "slider_negative") if self.values.get("slider_positive") else ()
        return tuple(str(self.values.get(name, "")).strip() for name in names)

    @property
    def validation(self) -> ValidationSettings:
        return ValidationSettings(**{n: self.values[n] for n in _names(ValidationSettings) if n in self.values})

    @property
    def report(self) -> ReportSettings:
        return ReportSettings(**{n: self.values[n] for n in _names(ReportSettings) if n in self.values})


def _names(group: Any) -> list[str]:
    return [each.name for each in fields(group)]


def _adapter_names() -> set[str]:
    return {name for kind in (LoRASettings, LyCORISSettings, FullSettings) for name in _written_adapter(kind())}


def _written_adapter(adapter: AdapterSettings) -> dict[str, Any]:
    return _written(adapter, _prefix("adapter", adapter))


def with_values(settings: TrainSettings, values: Mapping[str, Any]) -> TrainSettings:
    """Settings with other values, by the names of ``TrainSettings.written``.

    Raises:
        SettingError: a value is not possible.
    """
    return _with(settings, "", {**settings.written(), **values})


def _with(group: Any, prefix: str, values: Mapping[str, Any]) -> Any:
    changed: dict[str, Any] = {}
    for each in fields(group):
        value = getattr(group, each.name)
        if is_dataclass(value):
            changed[each.name] = _with(value, _prefix(each.name, value), values)
        else:
            changed[each.name] = values[_name(prefix, each.name)]
    return replace(group, **changed)


def _prefix(name: str, group: Any) -> str:
    """What the names of a group's settings begin with."""
    if name == "adapter":
        return f"{type(group).__name__.removesuffix('Settings').lower()}_"
    return "scheduled_sampling_" if name == "scheduled_sampling" else ""


def _name(prefix: str, name: str) -> str:
    return name if name.startswith(prefix) else prefix + name


def _written(group: Any, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in fields(group):
        value = getattr(group, each.name)
        if is_dataclass(value):
            found |= _written(value, _prefix(each.name, value))
        else:
            found[_name(prefix, each.name)] = value
    return found


FREE = {  # settings that do not decide the weights
    "steps",
    "checkpoint_step_interval",
    "checkpoints_total_limit",
    "ema_device",
    *(f.name for f in fields(PrecisionSettings) if f.name not in ("mixed_precision", "base_model_precision")),
}


def deciding(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide the weights and differ from their defaults, by name and as written.

    Defaults are left out, so that a new option leaves the identity of old runs as it was.
    """
    defaults = TrainSettings(adapter=type(settings.adapter)()).written()
    changed = {
        name: value for name, value in settings.written().items() if name not in FREE and value != defaults[name]
    }
    kind = type(settings.adapter).__name__
    return changed if kind == "LoRASettings" else {**changed, "adapter": kind}


def check_run_name(name: str) -> str:
    """The name without spaces around it.

    Raises:
        SettingError: it cannot be a folder's name on every system.
    """
    name = name.strip()
    fits = re.fullmatch(r"[\w\-. ]{1,80}", name) and not name.startswith(".") and not name.endswith(".")
    if not fits or name.split(".")[0].upper() in _WINDOWS_NAMES:
        raise SettingError(
            f"The run name {name!r} cannot be a folder. Use up to 80 letters, digits, spaces and '-_.', "
            "not a '.' at either end, and no name that Windows keeps for itself."
        )
    return name
