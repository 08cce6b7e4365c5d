"""Every optimiser by its name. Its library is imported when it is chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ..config.optim import OPTIMIZERS, OptimizerSettings
from ..errors import SettingError

Optimizer = torch.optim.Optimizer
Group = dict[str, Any]  # "params": the weights, "names": theirs, "lr": the learning rate


@dataclass(frozen=True)
class _Source:
    module: str
    name: str
    package: str = ""  # what pip calls it, where it does not come with torch
    fixed: Mapping[str, Any] = field(default_factory=dict)  # arguments that nobody chooses


def _optimi(name: str) -> _Source:
    return _Source("optimi", name, "torch-optimi", {"foreach": False, "gradient_release": False})


_BNB = {"adagrad": "Adagrad", "adam": "Adam", "adamw": "AdamW", "lion": "Lion", "ademamix": "AdEMAMix"}
_SOURCES = {
    "adamw_bf16": _Source(f"{__package__}.adamw_bf16", "AdamWBF16"),
    "torch-adamw": _Source("torch.optim", "AdamW", fixed={"fused": True}),
    "adafactor": _Source("torch.optim", "Adafactor"),
    "optimi-stableadamw": _optimi("StableAdamW"),
    "optimi-adamw": _optimi("AdamW"),
    "optimi-lion": _optimi("Lion"),
    "optimi-adan": _optimi("Adan"),
    "optimi-radam": _optimi("RAdam"),
    "optimi-ranger": _optimi("Ranger"),
    "optimi-sgd": _optimi("SGD"),
    "ao-adamw8bit": _Source("torchao.optim", "AdamW8bit", "torchao"),
    "ao-adamw4bit": _Source("torchao.optim", "AdamW4bit", "torchao"),
    "ao-adamfp8": _Source("torchao.optim", "AdamFp8", "torchao"),
    "ao-adamwfp8": _Source("torchao.optim", "AdamWFp8", "torchao"),
    **{
        f"bnb-{name}{bits}": _Source("bitsandbytes.optim", cls + bits, "bitsandbytes")
        for name, cls in _BNB.items()
        for bits in ("", "8bit")
    },
    "prodigy": _Source("prodigyopt", "Prodigy", "prodigyopt"),
    "adamw_schedulefree": _Source("schedulefree", "AdamWScheduleFree", "schedulefree"),
}
# What must stay as it is for a step to be what this package takes it for.
_NOT_TO_CHOOSE = {"params", "lr", "seed", "capturable", "differentiable", "foreach", "fsdp_in_use", "fused"}


def build_optimizer(groups: Sequence[Group], settings: OptimizerSettings, seed: int) -> Optimizer:
    """The optimiser that is named, over weights of possibly several learning rates.

    Each group of it also says its weights' ``names``, the name of the ``optimizer``, and as ``initial_lr`` the learning
    rate that ``set_learning_rate`` starts from.

    Args:
        groups: each with ``params``, their ``names`` and their ``lr``.
        seed: of the noise with which bf16 values are rounded.

    Raises:
        SettingError: a package is missing, or an argument is not one of this optimiser or refused by it.
    """
    name, cls = settings.optimizer, optimizer_class(settings.optimizer)
    rates = {group["lr"] for group in groups}
    if name == "prodigy" and len(rates) > 1:
        raise SettingError(
            f"prodigy has one learning rate for all weights, not {', '.join(map(str, sorted(rates)))}. "
            "Set the ratio of LoRA+ to 1, or choose another optimizer."
        )
    copies = [dict(group, initial_lr=float(group["lr"]), optimizer=name) for group in groups]
    arguments = {**_arguments(cls, settings), **_SOURCES[name].fixed}
    if name.startswith("optimi-") and "triton" not in arguments:
        arguments["triton"] = _has_triton(groups)
    if name == "adamw_bf16":
        arguments["seed"] = seed
    if name.startswith("ao-"):
        from .low_bit import with_repeatable_steps

        cls = with_repeatable_steps(cls, seed)
        bf16 = any(weight.dtype == torch.bfloat16 for group in groups for weight in group["params"])
        arguments.setdefault("bf16_stochastic_round", bf16)
    try:
        optimizer = cls(copies, lr=settings.learning_rate, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise SettingError(
            f"optimizer_config is {settings.optimizer_config!r}, which {name} refuses: {error}."
        ) from None
    if settings.schedule_free:
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def optimizer_class(name: str) -> Callable[..., Optimizer]:
    """The class behind a name.

    Raises:
        SettingError: its package is missing or too old.
    """
    source = _SOURCES[name]
    try:
        return getattr(import_module(source.module), source.name)
    except (ImportError, AttributeError) as error:
        package = source.package or "torch"
        raise SettingError(
            f"The optimizer {name} needs the package {package}, which is missing, too old or broken ({error}). "
            f"Run `pip install --upgrade {package}`, or choose one of {', '.join(_usable())}."
        ) from None


def _usable() -> list[str]:
    """Names whose package is there."""
    return [name for name in OPTIMIZERS if find_spec(_SOURCES[name].module.partition(".")[0])]


def _arguments(cls: Callable[..., Optimizer], settings: OptimizerSettings) -> dict[str, Any]:
    known = {n: p.default for n, p in inspect.signature(cls).parameters.items() if n not in _NOT_TO_CHOOSE}
    arguments = settings.arguments
    unknown = sorted(arguments.keys() - known.keys())
    if unknown:
        raise SettingError(
            f"optimizer_config has {', '.join(unknown)}, which {settings.optimizer} does not know. "
            f"It knows {', '.join(known)}."
        )
    if settings.optimizer_beta1 is not None:
        betas = known.get("betas", ())
        if len(betas) != 2:
            raise SettingError(
                f"optimizer_beta1 and optimizer_beta2 are set, and {settings.optimizer} has {len(betas)} betas. "
                + (f'Set optimizer_config to "betas={betas}" in their place.' if betas else "Leave them out.")
            )
        arguments["betas"] = (settings.optimizer_beta1, settings.optimizer_beta2)
    if settings.weight_decay is not None:
        arguments["weight_decay"] = settings.weight_decay
    return arguments


def _has_triton(groups: Sequence[Group]) -> bool:
    """Whether optimi's kernels for GPUs can run; said here, since optimi would not ask after a checkpoint is loaded."""
    devices = {weight.device.type for group in groups for weight in group["params"]}
    return devices == {"cuda"} and find_spec("triton") is not None and torch.cuda.is_bf16_supported()
