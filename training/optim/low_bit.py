"""torchao's AdamW with states of 4 or 8 bits, so that it runs everywhere and can be repeated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import SettingError
from .adamw_bf16 import noise_seed


def with_repeatable_steps(cls: Callable[..., torch.optim.Optimizer], seed: int) -> Callable[..., torch.optim.Optimizer]:
    """The same optimiser, with steps that do not need a compiler, and whose noise is a function of seed and step.

    torchao compiles each step. That needs a C++ compiler on a CPU, and on a GPU triton, a C compiler and, for fp8,
    the 8.9 generation; where those are missing, and on CPUs, the same arithmetic runs uncompiled.
    bf16 weights are rounded with torch's own random numbers, which are seeded for a step and put back after it.

    Raises:
        SettingError: torch is too old to be told not to compile.
    """
    if not hasattr(torch.compiler, "set_stance"):
        raise SettingError("The optimizers ao-… need torch 2.6 or newer; choose adamw_bf16, which is small, too.")

    class RepeatableSteps(cls):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            first = self.param_groups[0]
            device = first["params"][0].device
            done = int(self.state[first["params"][0]].get("step", 0))
            with torch.random.fork_rng([device] if device.type == "cuda" else []), _compiling_or_not(device):
                torch.manual_seed(noise_seed(seed, done, first["names"][0]))
                return super().step(closure)

    return RepeatableSteps


def _compiling_or_not(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cuda" and find_spec("triton") and _c_compiler() and torch.cuda.get_device_capability() >= (8, 9):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _c_compiler() -> str | None:
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang", "cl")
    return next((found for name in names if name and (found := shutil.which(name))), None)
