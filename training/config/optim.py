"""How weights are changed by their gradients: optimiser, learning rate, clipping and averages. SimpleTuner's names."""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SettingError
from .checks import require

OPTIMIZERS = (
    "adamw_bf16",
    "torch-adamw",
    *(f"optimi-{name}" for name in ("stableadamw", "adamw", "lion", "adan", "radam", "ranger", "sgd")),
    *(f"ao-{name}" for name in ("adamw8bit", "adamw4bit", "adamfp8", "adamwfp8")),
    *(f"bnb-{name}{bits}" for name in ("adagrad", "adam", "adamw", "lion", "ademamix") for bits in ("", "8bit")),
    "prodigy",
    "adamw_schedulefree",
    "adafactor",
)
_ALIASES = {"lion": "optimi-lion"}
# Those whose update is no larger than its learning rate by themselves, and those that can be told a smaller rate.
CLIP_THEMSELVES = ("optimi-stableadamw", "optimi-lion", "bnb-lion", "bnb-lion8bit", "adafactor")
CAN_BE_CLIPPED = ("adamw_bf16", "torch-adamw", "ao-adamw8bit", "ao-adamw4bit", "ao-adamfp8", "ao-adamwfp8")
SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "sine",
)
CLIP_METHODS = ("norm", "value", "update")
EMA_DEVICES = ("accelerator", "cpu")


@dataclass(frozen=True)
class OptimizerSettings:
    """None of these decides what is learned, all of them how fast and how steadily.

    Raises:
        SettingError: a value is unknown or out of range, or two settings contradict each other.
    """

    optimizer: str = "torch-adamw"
    learning_rate: float = 1e-4
    optimizer_config: str | Mapping[str, Any] = ""  # "eps=1e-6,amsgrad=true": further arguments; kept as such a text
    optimizer_beta1: float | None = None  # None: the optimiser's own; only together with …
    optimizer_beta2: float | None = None
    weight_decay: float | None = None  # None: the optimiser's own; 0.01 for torch-adamw
    max_grad_norm: float = 1.0  # the largest gradient; 0: no clipping
    grad_clip_method: str = "norm"  # of all together, each "value", or in fused_backward each tensor's "update"
    gradient_accumulation_steps: int = 1  # batches that one step is made of
    fused_backward: bool = False  # each weight is changed as soon as its gradient is there, which then is freed
    # The learning rate over the run
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0  # optimiser steps in which it rises, with every scheduler
    lr_num_cycles: int = 1  # of cosine_with_restarts and sine
    lr_power: float = 0.8  # of polynomial
    lr_end: float = 4e-7  # where the cosines, sine and polynomial come down to
    # A running average of the weights
    use_ema: bool = False
    ema_decay: float = 0.995
    ema_update_interval: int = 1  # steps
    ema_warmup_steps: int = 0  # steps in which the average is the weights themselves
    ema_device: str = "accelerator"  # where it lies: beside the weights, or in the CPU's memory

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, remedy: str) -> None:
            require(holds, name, getattr(self, name), remedy)

        for name in ("learning_rate", "max_grad_norm", "lr_power", "lr_end", "ema_decay"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 1 and 1.0 are the same setting
        object.__setattr__(self, "optimizer", _ALIASES.get(self.optimizer, self.optimizer))
        check("optimizer", self.optimizer in OPTIMIZERS, _nearest(self.optimizer))
        object.__setattr__(self, "optimizer_config", _written(parse_optimizer_config(self.optimizer_config)))
        for name, choices in (
            ("grad_clip_method", CLIP_METHODS),
            ("lr_scheduler", SCHEDULERS),
            ("ema_device", EMA_DEVICES),
        ):
            check(name, getattr(self, name) in choices, f"choose one of {', '.join(choices)}")
        check("learning_rate", 0 < self.learning_rate <= 1, "choose about 0.0001")
        for name in ("optimizer_beta1", "optimizer_beta2"):
            value = getattr(self, name)
            check(name, value is None or 0 <= value < 1, "choose at least 0 and less than 1")
        for name in ("max_grad_norm", "lr_warmup_steps", "ema_warmup_steps", "lr_end"):
            check(name, 0 <= getattr(self, name) < math.inf, "choose 0 or more")
        decay = self.weight_decay
        check("weight_decay", decay is None or 0 <= decay < math.inf, "choose 0 or more, or leave it out")
        for name in ("gradient_accumulation_steps", "lr_num_cycles", "ema_update_interval"):
            check(name, getattr(self, name) >= 1, "choose at least 1")
        check("lr_power", 0 < self.lr_power < math.inf, "choose above 0, such as 1")
        check("ema_decay", 0 <= self.ema_decay < 1, "choose at least 0 and less than 1")
        if self.lr_scheduler in ("cosine", "cosine_with_restarts", "polynomial", "sine"):
            remedy = f"choose at most learning_rate ({self.learning_rate})"
            check("lr_end", self.lr_end <= self.learning_rate, remedy)
        self._check_arguments()
        self._check_optimizer()
        self._check_fused_backward()

    def _check_arguments(self) -> None:
        if (self.optimizer_beta1 is None) != (self.optimizer_beta2 is None):
            raise SettingError(
                f"optimizer_beta1 is {self.optimizer_beta1} and optimizer_beta2 is {self.optimizer_beta2}; "
                "give both or neither."
            )
        for setting, argument in (
            ("learning_rate", "lr"),
            ("optimizer_beta1", "betas"),
            ("weight_decay", "weight_decay"),
            ("lr_warmup_steps", "warmup_steps"),
        ):
            value = getattr(self, setting)
            given = value is not None and (setting != "lr_warmup_steps" or value > 0)
            if given and argument in self.arguments:
                raise SettingError(f"optimizer_config sets {argument}, which {setting} does; leave one of them out.")

    def _check_optimizer(self) -> None:
        if self.schedule_free:
            require(
                self.lr_scheduler in ("constant", "constant_with_warmup"),
                "lr_scheduler",
                self.lr_scheduler,
                f"{self.optimizer} needs no schedule: choose constant, with lr_warmup_steps if you like",
            )
            require(not self.use_ema, "use_ema", True, f"{self.optimizer} averages the weights itself: switch it off")
            require(self.optimizer_beta1 != 0, "optimizer_beta1", 0, f"{self.optimizer} needs it above 0, such as 0.9")
        if self.optimizer == "prodigy":
            remedy = "prodigy finds the learning rate, and this multiplies it: choose 1"
            require(self.learning_rate >= 0.01, "learning_rate", self.learning_rate, remedy)

    def _check_fused_backward(self) -> None:
        clipping = self.grad_clip_method if self.max_grad_norm else "none"
        if not self.fused_backward:
            remedy = "only fused_backward clips updates: choose norm or value"
            require(clipping != "update", "grad_clip_method", clipping, remedy)
            return
        steps = self.gradient_accumulation_steps
        remedy = "fused_backward keeps no gradient to add to: choose 1, or switch fused_backward off"
        require(steps == 1, "gradient_accumulation_steps", steps, remedy)
        remedy = "fused_backward never has all gradients at once: choose update or value, or max_grad_norm 0"
        require(clipping != "norm", "grad_clip_method", clipping, remedy)
        remedy = "prodigy measures all weights together: choose another, or switch fused_backward off"
        require(self.optimizer != "prodigy", "optimizer", self.optimizer, remedy)
        if clipping == "update":
            clips = (*CAN_BE_CLIPPED, *CLIP_THEMSELVES)
            remedy = f"{self.optimizer} cannot clip updates: choose value, or one of {', '.join(clips)}"
            require(self.optimizer in clips, "grad_clip_method", clipping, remedy)

    @property
    def arguments(self) -> dict[str, Any]:
        """``optimizer_config`` by name."""
        return parse_optimizer_config(self.optimizer_config)

    @property
    def scheduled(self) -> bool:
        """Whether the learning rate follows a curve that spans the whole run."""
        return self.lr_scheduler not in ("constant", "constant_with_warmup")

    @property
    def schedule_free(self) -> bool:
        """Whether the optimiser averages its weights itself, in place of a schedule and of EMA."""
        return self.optimizer == "adamw_schedulefree"

    def check_run(self, optimizer_steps: int, full_fine_tune: bool) -> None:
        """What only a run tells.

        Raises:
            SettingError: the warm-up is as long as the run, or there is nothing to free in the backward pass.
        """
        require(
            self.lr_warmup_steps < optimizer_steps,
            "lr_warmup_steps",
            self.lr_warmup_steps,
            f"the run has {optimizer_steps} optimiser steps: choose fewer",
        )
        remedy = "the gradients of a LoRA are small: switch it off, or train all weights"
        require(full_fine_tune or not self.fused_backward, "fused_backward", True, remedy)


def parse_optimizer_config(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """``"eps=1e-6,amsgrad=true,betas=(0.9,0.99)"`` as numbers, truth values, tuples and texts by name.

    Raises:
        SettingError: a part is no ``name=value``, or a name comes twice.
    """
    if isinstance(config, Mapping):
        return {str(name): tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^(\[]*[)\]])", config):  # not the commas inside brackets
        name, equals, value = part.partition("=")
        name = name.strip()
        if not part.strip():
            continue
        if not equals or not name.isidentifier():
            raise SettingError(f"optimizer_config has {part.strip()!r}; write name=value, with commas between.")
        if name in found:
            raise SettingError(f"optimizer_config has {name} twice; leave one out.")
        found[name] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "inf": math.inf}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return tuple(value) if isinstance(value, list) else value


def _written(arguments: Mapping[str, Any]) -> str:
    """The same however it was given: as text that JSON, a hash and SimpleTuner take."""

    def parts() -> Iterator[str]:
        for name in sorted(arguments):
            value = arguments[name]
            yield f"{name}={str(value).lower() if value is None or isinstance(value, bool) else value}"

    return ",".join(parts())


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), [*OPTIMIZERS, *_ALIASES], n=1, cutoff=0)
    return f"do you mean {near[0]}? There are {', '.join(OPTIMIZERS)}"
