"""What a device computes in, what it lacks, and the loss scale that fp16 needs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.precision import PrecisionSettings
from ..errors import SettingError
from .linear import computed_in

_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


@dataclass(frozen=True)
class Computing:
    """How the products of a run are computed; weights may be stored in less."""

    dtype: torch.dtype
    loss_scaling: bool = False  # see LossScale
    notes: tuple[str, ...] = ()  # what the user is told


def choose_computing(settings: PrecisionSettings, device: torch.device) -> Computing:
    """What to compute in on a device.

    ``auto`` is bf16 where the device has instructions for it and fp32 elsewhere. bf16 is computed in fp32, which is
    more exact, by a CPU without such instructions; they would be emulated there at a hundredth of the speed.

    Raises:
        SettingError: the device cannot compute in what was asked for, or lacks what ``base_model_precision`` needs.
    """
    missing = lacking(settings.base_model_precision, device)
    if missing:
        raise SettingError(missing)
    asked = settings.mixed_precision
    if asked == "auto":
        return Computing(torch.bfloat16 if fast_bf16(device) else torch.float32)
    dtype = _NAMES[asked]
    if asked == "bf16" and not fast_bf16(device):
        if device.type != "cpu":
            return Computing(dtype, notes=(f"{device} has no bf16 instructions; mixed_precision no is quicker there",))
        return Computing(torch.float32, notes=("this CPU has no bf16 instructions: bf16 is stored, fp32 is computed",))
    if asked == "fp16":
        if device.type == "cpu":
            raise SettingError(f"mixed_precision is fp16, which {device} does not train in; choose auto.")
        warning = "fp16 overflows where bf16 does not: prefer auto, and watch for skipped steps"
        return Computing(dtype, loss_scaling=True, notes=(warning,))
    return Computing(dtype)


def fast_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16."""
    if device.type == "cpu":
        return computed_in(torch.bfloat16, device) == torch.bfloat16
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


def lacking(base_model_precision: str, device: torch.device) -> str:
    """What keeps frozen weights from being stored so on a device, and the remedy; empty where nothing does."""
    refusal = f"base_model_precision is {base_model_precision}, which "
    if base_model_precision == "int4-torchao" and device.type not in ("cuda", "xpu"):
        return f"{refusal}needs a CUDA or XPU device, and this is {device}; choose int8-torchao."
    if base_model_precision == "fp8-torchao" and device.type == "mps":
        return f"{refusal}{device} has no numbers for; choose int8-torchao."
    if base_model_precision == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        return f"{refusal}needs the package bitsandbytes: pip install bitsandbytes, or choose int8-torchao."
    return ""


class LossScale:
    """Keeps fp16 gradients out of the range where they vanish: the loss is multiplied, the gradients divided.

    Halved after a step that is not finite and doubled after ``PATIENCE`` finite ones in a row, on the device, so that
    nothing waits. Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740).
    """

    START, PATIENCE = 2.0**16, 2000

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), self.START, device=device)
        self.good = torch.zeros((), device=device)  # finite steps since the factor changed

    def scale(self, loss: Tensor) -> Tensor:
        return loss.float() * self.factor

    def unscale(self, gradients: list[Tensor]) -> None:
        """In place; what overflowed stays not finite, so that the caller's norm shows it."""
        torch._foreach_mul_(gradients, self.factor.reciprocal())

    def update(self, finite: Tensor) -> None:
        """``finite``: 0-dimensional, true where the step was taken."""
        good = torch.where(finite, self.good + 1, 0)
        grow = good >= self.PATIENCE
        self.factor = torch.where(finite, torch.where(grow, self.factor * 2, self.factor), self.factor / 2)
        self.good = torch.where(grow, 0, good)

    def state(self) -> dict[str, Tensor]:
        return {"factor": self.factor, "good": self.good}

    def load(self, state: dict[str, Tensor]) -> None:
        self.factor, self.good = (state[name].to(self.factor.device) for name in ("factor", "good"))
