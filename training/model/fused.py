"""The elementwise half of a block with few passes over memory, and its gradients.

Each function is plain arithmetic under a compiler, which fuses it by itself, and else an autograd function that keeps
only its inputs and one number a row. All take rows of tokens ``(N, …)``; ``spans`` says which rows belong to which
sample: see ``training.model.packing``. Norms are computed in fp32 whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Spans


def norm_scale(x: Tensor, weight: Tensor, scale: Tensor | None, spans: Spans, eps: float) -> Tensor:
    """``RMSNorm(x) · (1 + scale)`` of each token's sample.

    Args:
        x: (N, width).
        weight: (width,), the norm's.
        scale: (B, width), or None for the plain norm.
    """
    if torch.compiler.is_compiling():
        return (_normed(x, eps) * _rows(_gain(weight, scale, _one_plus), spans)).to(x.dtype)
    return _NormScale.apply(x, weight, scale, spans, eps)


def add_gated(x: Tensor, branch: Tensor, weight: Tensor, gate: Tensor | None, spans: Spans, eps: float) -> Tensor:
    """``x + tanh(gate) · RMSNorm(branch)``, the gate of each token's sample.

    Args:
        x, branch: (N, width).
        weight: (width,), the norm's.
        gate: (B, width), or None for 1.
    """
    if torch.compiler.is_compiling():
        return x + (_normed(branch, eps) * _rows(_gain(weight, gate, torch.tanh), spans)).to(x.dtype)
    return _AddGated.apply(x, branch, weight, gate, spans, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``; both (N, width)."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    return _SwiGLU.apply(gate, up)


def norm_rotate(x: Tensor, weight: Tensor, turns: Tensor, eps: float) -> Tensor:
    """RMSNorm over each head, then the rotary embedding of interleaved pairs.

    Args:
        x: (N, heads, D).
        weight: (D,), the norm's.
        turns: (N, D/2, 2) fp32: cosine and sine of each pair's angle.
    """
    if torch.compiler.is_compiling():
        first, second = (_normed(x, eps) * weight.float()).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turns[:, None].unbind(-1)
        return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2).to(x.dtype)
    return _NormRotate.apply(x, weight, turns, eps)


def _normed(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], None, eps)


def _rows(gain: Tensor, spans: Spans) -> Tensor:
    """(width,) or (B, width) as it multiplies (N, width)."""
    if gain.dim() == 1 or len(gain) == 1:
        return gain
    return torch.cat([part.repeat_interleave(span.tokens, 0) for span, part in spans.with_samples(gain)])


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1/√(mean x² + eps) over the last dimension, kept, in fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _scaled(x: Tensor, rows: Tensor) -> Tensor:
    """``x · rows`` in one pass, rounded once to the dtype of ``x``; ``rows`` (…, 1) fp32."""
    return torch.mul(x, rows, out=torch.empty_like(x, memory_format=torch.contiguous_format))


def _times_gain(x: Tensor, gain: Tensor, spans: Spans, out: Tensor) -> Tensor:
    """``out = x · gain`` with the gain of each token's sample; ``out`` may be ``x``."""
    if gain.dim() == 1 or len(gain) == 1:
        return torch.mul(x, gain, out=out)
    for span, part in spans.with_samples(gain):
        torch.mul(span.of(x), part[:, None], out=span.of(out))
    return out


def _sum_by_sample(x: Tensor, spans: Spans) -> Tensor:
    """(B, width): the sum of the tokens of each sample of (N, width)."""
    return torch.cat([span.of(x).sum(1) for span in spans])


def _norm_backward(grad: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """The gradient towards ``x`` from that towards ``x · inverse``, in the memory of the latter."""
    along = (grad * x).sum(-1, keepdim=True, dtype=torch.float32).mul_(inverse.pow(3)).div_(-x.shape[-1])
    return torch.addcmul(grad.mul_(inverse), x, along, out=grad)


class _NormScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, spans: Spans, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale, inverse)
        ctx.spans = spans
        out = _scaled(x, inverse)
        return _times_gain(out, _gain(weight, scale, _one_plus).to(x.dtype), spans, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, inverse = ctx.saved_tensors
        d_x = d_weight = d_scale = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            by_sample = _sum_by_sample(grad * _scaled(x, inverse), ctx.spans).float()
            factor = 1.0 if scale is None else 1 + scale.float()
            d_weight = (by_sample * factor).sum(0).to(weight.dtype)
            d_scale = None if scale is None else (by_sample * weight.float()).to(scale.dtype)
        if ctx.needs_input_grad[0]:
            gain = _gain(weight, scale, _one_plus).to(x.dtype)
            d_x = _norm_backward(_times_gain(grad, gain, ctx.spans, torch.empty_like(x)), x, inverse)
        return d_x, d_weight, d_scale, None, None


class _AddGated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, weight: Tensor, gate: Tensor | None, spans: Spans, eps: float
    ) -> Tensor:
        inverse = _inverse_rms(branch, eps)
        ctx.save_for_backward(branch, weight, gate, inverse)
        ctx.spans = spans
        out = _scaled(branch, inverse)
        gain = _gain(weight, gate, torch.tanh).to(x.dtype)
        if gain.dim() == 1 or len(gain) == 1:
            return torch.addcmul(x, out, gain, out=out)
        for span, part in spans.with_samples(gain):
            torch.addcmul(span.of(x), span.of(out), part[:, None], out=span.of(out))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, weight, gate, inverse = ctx.saved_tensors
        d_branch = d_weight = d_gate = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            by_sample = _sum_by_sample(grad * _scaled(branch, inverse), ctx.spans).float()
            opened = None if gate is None else gate.float().tanh()
            d_weight = (by_sample if opened is None else by_sample * opened).sum(0).to(weight.dtype)
            if opened is not None:
                d_gate = (by_sample * weight.float() * (1 - opened.square())).to(gate.dtype)
        if ctx.needs_input_grad[1]:
            gain = _gain(weight, gate, torch.tanh).to(branch.dtype)
            d_branch = _norm_backward(_times_gain(grad, gain, ctx.spans, torch.empty_like(branch)), branch, inverse)
        return grad, d_branch, d_weight, d_gate, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return d_gate, F.silu(gate).mul_(grad)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turns: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, turns, inverse)
        return _turned((x * inverse).mul_(weight.float()), turns).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, turns, inverse = ctx.saved_tensors
        straight = _turned(grad.float(), turns, back=True)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (straight * (x * inverse)).sum((0, 1)).to(weight.dtype)
        d_x = _norm_backward(straight.mul_(weight.float()), x, inverse).to(x.dtype)
        return d_x, d_weight, None, None


def _turned(x: Tensor, turns: Tensor, back: bool = False) -> Tensor:
    """Each pair of the last dimension turned by its angle: a complex product. ``x`` fp32 (N, heads, D)."""
    angles = torch.view_as_complex(turns)[:, None]
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * (angles.conj() if back else angles)).flatten(-2)


def _one_plus(x: Tensor) -> Tensor:
    return 1 + x


def _gain(weight: Tensor, by_sample: Tensor | None, function: Callable[[Tensor], Tensor]) -> Tensor:
    """(width,) or (B, width) fp32."""
    return weight.float() if by_sample is None else function(by_sample.float()) * weight.float()
