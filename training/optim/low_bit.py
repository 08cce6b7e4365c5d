"""torchao's AdamW with states of 4 or 8 bits, so that it runs everywhere, in little memory, and can be repeated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from .adamw_bf16 import noise_seed

SLICE = 2**19  # elements of a weight that take their step together where it is not compiled: see low_bit_slices


def with_repeatable_steps(cls: Callable[..., torch.optim.Optimizer], seed: int) -> Callable[..., torch.optim.Optimizer]:
    """The same optimiser, with steps that do not need a compiler, and whose noise is a function of seed and step.

    torchao compiles each step. That needs a C++ compiler on a CPU, and on a GPU triton, a C compiler and, for fp8,
    the 8.9 generation; where those are missing, and on CPUs, the same arithmetic runs uncompiled, on one slice of a
    weight after the other: it takes up to 57 bytes for each element that it works on. Most of its time there would go
    to torchao's search for codes of 8 bits, in eight rounds of gathers; so these states take the step as numbers, and
    ``write_8bit`` finds the same codes.
    bf16 weights are rounded with torch's own random numbers, which are seeded for a step and put back after it.

    Raises:
        SettingError: torch is too old to be told not to compile.
    """
    if not hasattr(torch.compiler, "set_stance"):
        raise SettingError("The optimizers ao-… need torch 2.6 or newer; choose adamw_bf16, which is small, too.")

    class RepeatableSteps(cls):  # type: ignore[misc, valid-type]
        param_groups: list[dict[str, Any]]

        def __init__(self, params: Any, **arguments: Any) -> None:
            if arguments.get("amsgrad"):
                raise ValueError("amsgrad needs states that can be compared, and codes of few bits cannot")
            super().__init__(params, **arguments)

        def step(self, closure: Any = None) -> Any:
            first = self.param_groups[0]
            device = first["params"][0].device
            done = int(self.state[first["params"][0]].get("step", 0))
            compiles = _compiles(device)
            eager: AbstractContextManager[Any] = nullcontext() if compiles else torch.compiler.set_stance("force_eager")
            with torch.random.fork_rng([device] if device.type == "cuda" else []), eager:
                torch.manual_seed(noise_seed(seed, done, first["names"][0]))
                if compiles:
                    return super().step(closure)
                loss = None if closure is None else torch.enable_grad()(closure)()
                groups = self.param_groups
                try:
                    for group in groups:
                        for weight in group["params"]:
                            if weight.grad is not None:
                                self._step_by_slices(group, weight)
                finally:
                    self.param_groups = groups
                return loss

        def _step_by_slices(self, group: dict[str, Any], weight: nn.Parameter) -> None:
            """The optimiser's own step on one slice of a weight and its states after the other."""
            state = self.state[weight]
            if not state:
                state["step"] = torch.tensor(0.0)
                state.update(exp_avg=self._new_buffer(weight, True), exp_avg_sq=self._new_buffer(weight, False))
            states = {name: value for name, value in state.items() if name != "step"}
            flat, gradient = weight.detach().view(-1), weight.grad.reshape(-1)  # type: ignore[union-attr]
            for first, last in low_bit_slices(weight.numel(), self.block_size):
                part = nn.Parameter(flat[first:last], requires_grad=False)
                part.grad = gradient[first:last]
                parts = {name: state_slice(value, first, last) for name, value in states.items()}
                numbers = {name: value.dequantize() for name, value in parts.items() if _is_8bit(value)}
                self.state[part] = {"step": state["step"].clone(), **parts, **numbers}
                self.param_groups = [{**group, "params": [part]}]
                try:
                    super().step()
                finally:
                    del self.state[part]
                for name, value in numbers.items():
                    write_8bit(value, parts[name])
            state["step"] += 1

    return RepeatableSteps


def low_bit_slices(count: int, block: int = 256) -> Iterator[tuple[int, int]]:
    """First element and end of each slice of a flat tensor; whole blocks, which share a scale."""
    size = max(SLICE // block, 1) * block
    return ((first, min(first + size, count)) for first in range(0, count, size))


def state_slice(state: Tensor, first: int, last: int) -> Tensor:
    """Some elements of a flat tensor that may be one of torchao's, in its memory; whole blocks of it."""
    if not hasattr(state, "__tensor_flatten__"):
        return state.view(-1)[first:last]
    names, about = state.__tensor_flatten__()
    count, parts = state.numel(), {}
    for name in names:
        part = getattr(state, name)
        if name != "qmap":  # what codes stand for, the same for all
            part = part.view(-1)[first * part.numel() // count : last * part.numel() // count]
        parts[name] = part
    about = [(last - first,) if isinstance(value, tuple) else value for value in about]
    return type(state).__tensor_unflatten__(parts, about)  # type: ignore[attr-defined]


def write_8bit(numbers: Tensor, state: Any) -> None:
    """Write fp32 numbers into torchao's ``OptimState8bit`` with the codes that its own copy finds.

    Each block is divided by its largest magnitude, at least 1e-12, which is its scale.
    """
    blocks = numbers.view(-1, state.block_size)
    scale = blocks.abs().amax(-1).clip(1e-12)
    thresholds = code_thresholds(tuple(state.qmap.tolist())).to(numbers.device)
    codes = torch.bucketize(blocks / scale[:, None], thresholds, out_int32=True, right=True)
    state.scale.copy_(scale)
    state.codes.copy_(codes.view(state.codes.shape))


@cache
def code_thresholds(numbers: tuple[float, ...]) -> Tensor:
    """The least fp32 number that gets each code but the first, (codes − 1,), from what the codes stand for, ascending.

    Between two of them torchao gives the upper one's code where ``number − lower ≥ (upper − lower) / 2`` in fp32
    (``torchao.optim.quant_utils.quantize_8bit_with_qmap``). The difference never falls as the number grows, so halving
    the interval down to two neighbouring fp32 numbers finds where it begins to hold.
    """
    values = torch.tensor(numbers)
    lower = values[:-1]
    half = (values[1:] - lower) * 0.5
    low, high = lower, values[1:]
    while True:
        middle = ((low.double() + high.double()) / 2).float()
        between = (low < middle) & (middle < high)
        if not between.any():
            return high
        holds = middle - lower >= half
        low, high = torch.where(between & ~holds, middle, low), torch.where(between & holds, middle, high)


def _is_8bit(state: Tensor) -> bool:
    return type(state).__name__ == "OptimState8bit"


def _compiles(device: torch.device) -> bool:
    return bool(
        device.type == "cuda"
        and find_spec("triton")
        and _c_compiler()
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def _c_compiler() -> str | None:
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang", "cl")
    return next((found for name in names if name and (found := shutil.which(name))), None)
