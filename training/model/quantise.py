"""Frozen linear layers that store less than they compute with.

Each turns its weight into the input's dtype for one product and again in the backward pass, as ``Linear.read`` says;
nothing of that is kept. int8 is torchao's own arithmetic (one scale a row, absolute maximum over 127) without its
tensor subclasses: a step on those took 1.1 (weight-only) to 1.8 times as long (quantised training) on a CPU, and they
have no dtype of their own to compute in.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from .linear import Linear, scratch
from .precision import lacking

MULTIPLE = 16  # layers whose sides are no multiple of this stay as they are
# What translates between the network and the outside: under a hundredth of the weights, and every token passes here.
LEFT_OUT = ("x_embedder", "t_embedder", "cap_embedder", "final_layer")


class StoredLinear(Linear):
    """A frozen layer whose ``weight`` holds codes."""

    weight: nn.Parameter

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.store(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def store(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _keep(self, codes: Tensor) -> None:
        self.weight = nn.Parameter(codes, requires_grad=False)


class RowScaledLinear(StoredLinear):
    """One byte a weight and one fp32 scale a row."""

    scale: Tensor
    stored, largest = torch.int8, 127.0

    def store(self, weight: Tensor) -> None:
        values = weight.detach().to(torch.float32, copy=True)
        scale = values.abs().amax(1, keepdim=True).div_(self.largest).clamp_(min=torch.finfo(torch.float32).tiny)
        values.div_(scale)
        self._keep((values.round_() if self.stored is torch.int8 else values).to(self.stored))
        self.register_buffer("scale", scale)

    def read(self, dtype: torch.dtype) -> Tensor:
        if self.weight.device.type == "cpu":
            return scratch(self.weight.shape, dtype).copy_(self.weight).mul_(self.scale)
        return self.weight.to(dtype).mul_(self.scale)


class Int8Linear(RowScaledLinear):
    pass


class Fp8Linear(RowScaledLinear):
    """e4m3, as torchao's ``Float8WeightOnlyConfig`` per row."""

    stored, largest = torch.float8_e4m3fn, 448.0


class Int4Linear(StoredLinear):
    """Two weights a byte; a bf16 scale and smallest value for each group of a row, as torchao's tile-packed int4."""

    scale: Tensor
    smallest: Tensor
    GROUP = 128

    def store(self, weight: Tensor) -> None:
        rows, columns = weight.shape
        group = next(size for size in (self.GROUP, 64, 32, 16) if columns % size == 0)
        values = weight.detach().float().view(rows, -1, group)
        low, high = values.aminmax(dim=2, keepdim=True)
        scale = ((high - low) / 15).clamp_(min=torch.finfo(torch.float32).tiny).bfloat16()
        low = low.bfloat16()
        codes = ((values - low.float()) / scale.float()).round_().clamp_(0, 15).to(torch.uint8).view(rows, columns)
        self._keep(codes[:, 0::2] | codes[:, 1::2] << 4)
        self.register_buffer("scale", scale)
        self.register_buffer("smallest", low)

    def read(self, dtype: torch.dtype) -> Tensor:
        codes = torch.stack((self.weight & 15, self.weight >> 4), 2).view(len(self.weight), self.scale.shape[1], -1)
        return (codes.to(dtype) * self.scale.to(dtype)).add_(self.smallest.to(dtype)).flatten(1)


class NF4Linear(StoredLinear):
    """bitsandbytes' normal-float 4: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314)."""

    def store(self, weight: Tensor) -> None:
        functional: Any = importlib.import_module("bitsandbytes.functional")
        codes, self.state = functional.quantize_4bit(weight.detach().contiguous(), quant_type="nf4")
        self._keep(codes)

    def read(self, dtype: torch.dtype) -> Tensor:
        functional: Any = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(self.weight, self.state).to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)
        self.state.to(self.weight.device)
        return self


STORED: dict[str, type[StoredLinear]] = {
    "int8-torchao": Int8Linear,
    "int8wo": Int8Linear,
    "fp8-torchao": Fp8Linear,
    "int4-torchao": Int4Linear,
    "nf4": NF4Linear,
}


def is_quantised(name: str, rows: int, columns: int) -> bool:
    """Whether the layer of this name and size is stored smaller in a quantised model."""
    return not name.startswith(LEFT_OUT) and rows % MULTIPLE == 0 and columns % MULTIPLE == 0


def quantise(transformer: nn.Module, mode: str, via: torch.device | None = None) -> list[str]:
    """Store a transformer's frozen linear layers smaller, one after the other; each original is let go at once.

    Norms, embedders and the output layer stay as they are, and so do layers with a side that 16 does not divide.

    Args:
        mode: a ``base_model_precision`` other than no_change.
        via: the device on which the codes are computed; by default where the weights lie.

    Returns:
        The names of the layers that are stored smaller now.

    Raises:
        SettingError: a layer is trained, or the device lacks what the mode needs.
    """
    chosen = [
        (name, layer)
        for name, layer in transformer.named_modules()
        if type(layer) is Linear and is_quantised(name, layer.out_features, layer.in_features)
    ]
    if chosen:
        missing = lacking(mode, chosen[0][1].weight.device)
        if missing:
            raise SettingError(missing)
    done = []
    while chosen:
        name, layer = chosen.pop(0)
        if layer.weight.requires_grad:
            raise SettingError(
                f"{name} is trained and cannot be stored as {mode}; set base_model_precision to no_change."
            )
        home = layer.weight.device
        parent, _, own = name.rpartition(".")
        stored = STORED[mode](layer.weight.data.to(via or home), layer.bias)
        setattr(transformer.get_submodule(parent), own, stored.to(home))
        done.append(name)
    return done
