"""Matrix products whose weights may be stored smaller than they are computed with.

A weight that is stored in another dtype is turned into the input's for one product and again in its backward pass;
nothing of that is kept. So a bf16 or int8 model trains on a CPU that computes in fp32, at the memory of what is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Read = Callable[[torch.dtype], Tensor]  # a weight in a dtype; good until the next one is read

_scratch = threading.local()


def computed_in(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products of weights stored so are computed in: fp32 where the CPU has no instructions for it."""
    if device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return stored
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported() and stored is torch.bfloat16
    return stored if supported else torch.float32


def scratch(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory on the CPU that the next call in this thread hands out again: without it each product would fault in
    pages of its own."""
    buffers: dict[torch.dtype, Tensor] = _scratch.__dict__.setdefault("buffers", {})
    held = buffers.get(dtype)
    if held is None or held.numel() < shape.numel():
        held = buffers[dtype] = torch.empty(shape.numel(), dtype=dtype)
    return held[: shape.numel()].view(shape)


def release_scratch() -> None:
    """Give back what ``scratch`` holds in this thread."""
    _scratch.__dict__.clear()


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever its weight is stored in."""

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype; good until the next one is read."""
        if self.weight.dtype == dtype or self.weight.device.type != "cpu":
            return self.weight.to(dtype)
        return scratch(self.weight.shape, dtype).copy_(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, None if self.bias is None else self.bias.to(x.dtype)
        if weight.dtype == x.dtype:
            return F.linear(x, weight, bias)
        if weight.requires_grad:
            return _TrainedLinear.apply(x, weight, bias, self.read)
        return _FrozenLinear.apply(x, bias, self.read)


def lora_linear(x: Tensor, base: Linear, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x Wᵀ + bias + scale · (x Aᵀ) Bᵀ`` of a frozen layer, in one function that keeps only its inputs.

    Args:
        x: (N, in).
        a: (rank, in), b: (out, rank), in any floating dtype; products are computed in that of ``x``.
    """
    bias = None if base.bias is None else base.bias.to(x.dtype)
    return _LoRALinear.apply(x, bias, base.read, a, b, scale)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, read: Read) -> Tensor:
        ctx.read = read
        return F.linear(x, read(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        d_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        return (grad @ ctx.read(grad.dtype) if needs_x else None), d_bias, None


class _TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, read: Read) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.read = read
        return F.linear(x, read(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        d_x = grad @ ctx.read(grad.dtype) if ctx.needs_input_grad[0] else None
        d_weight = (rows.T @ x.flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, (rows.sum(0) if ctx.needs_input_grad[2] else None), None


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, read: Read, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = x @ a.to(x.dtype).T
        ctx.save_for_backward(x, inner, a, b)
        ctx.read, ctx.scale = read, scale
        # Not in place: selective checkpointing keeps the first product as it was.
        return torch.addmm(F.linear(x, read(x.dtype), bias), inner, b.to(x.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        d_inner = (grad @ b.to(grad.dtype)).mul_(ctx.scale)
        d_b = (grad.T @ inner).to(b.dtype).mul_(ctx.scale)
        d_a = (d_inner.T @ x).to(a.dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (grad @ ctx.read(grad.dtype)).addmm_(d_inner, a.to(grad.dtype))
        return d_x, (grad.sum(0) if ctx.needs_input_grad[1] else None), None, d_a, d_b, None
