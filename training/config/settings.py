"""The settings of a LoRA training, checked when they are made; behind this nothing checks them again."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import SettingError

TARGETS = ("attention", "attention+ff", "blocks", "all")
RESUME = ("continue", "from checkpoint")
_WINDOWS_NAMES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


def _require(holds: bool, name: str, value: Any, remedy: str) -> None:
    if not holds:
        raise SettingError(f"{name} is {value}; {remedy}.")


@dataclass(frozen=True)
class LoRASettings:
    """Size and place of the adapter.

    Raises:
        SettingError: a value is out of range.
    """

    rank: int = 16
    alpha: float = 0.0  # 0: as large as the rank
    dropout: float = 0.0
    targets: str = "attention"

    def __post_init__(self) -> None:
        for name in ("alpha", "dropout"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 8 and 8.0 are the same setting
        _require(self.rank >= 1, "rank", self.rank, "choose at least 1")
        _require(self.alpha >= 0, "alpha", self.alpha, "choose a positive number, or 0 for the rank")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "choose at least 0 and less than 1")
        _require(self.targets in TARGETS, "targets", self.targets, f"choose one of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """What ``B·A`` is multiplied with: alpha over rank."""
        return (self.alpha or self.rank) / self.rank


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the weights beside model and data, and how long and how often to save.

    Raises:
        SettingError: a value is out of range.
    """

    steps: int = 1000
    learning_rate: float = 1e-4
    batch_size: int = 1
    seed: int = 42
    lora: LoRASettings = field(default_factory=LoRASettings)
    caption_dropout: float = 0.1  # the share of samples whose caption is the empty text
    data_backend_sampling: str = "auto-weighting"  # datasets are drawn by their sizes, or "uniform"
    disable_bucket_pruning: bool = True  # False leaves out sizes of which there are fewer pictures than a batch
    weight_decay: float = 0.01
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    checkpoint_step_interval: int = 500
    checkpoints_total_limit: int = 5

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", self.steps, "choose at least 1")
        _require(0 < self.learning_rate < 1, "learning_rate", self.learning_rate, "choose about 0.0001")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "choose at least 1")
        _require(0 <= self.seed < 2**64, "seed", self.seed, "choose a number from 0 to 18446744073709551615")

    def written(self) -> dict[str, Any]:
        """Every setting by name, the adapter's as ``lora_…``: what ``run.json`` shows."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lora"}
        return own | {f"lora_{f.name}": getattr(self.lora, f.name) for f in fields(self.lora)}


_NOT_IN_THE_WEIGHTS = {"steps", "checkpoint_step_interval", "checkpoints_total_limit"}


def deciding(settings: TrainSettings) -> dict[str, Any]:
    """The settings that decide the weights and differ from their defaults, by name and as written.

    Defaults are left out, so that a new option leaves the identity of old runs as it was.
    """
    defaults = TrainSettings().written()
    written = settings.written().items()
    return {name: value for name, value in written if name not in _NOT_IN_THE_WEIGHTS and value != defaults[name]}


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
