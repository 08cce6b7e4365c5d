"""The elementwise half of a block with few passes over memory, and its gradients.

Each function is plain arithmetic under a compiler, which fuses it by itself, and else an autograd function that keeps
only its inputs and one number a row. All take rows of tokens ``(N, …)``; ``spans`` says which rows belong to which
sample: see ``training.model.packing``. Norms are computed in fp32 whatever the dtype; their gains are fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import Spans


def norm_gain(x: Tensor, gain: Tensor, spans: Spans, eps: float) -> Tensor:
    """``RMSNorm(x) · gain``, the gain of each token's sample.

    Args:
        x: (N, width).
        gain: (width,) or (B, width) fp32.
    """
    if torch.compiler.is_compiling():
        return (_normed(x, eps) * _rows(gain, spans)).to(x.dtype)
    return _NormGain.apply(x, gain, spans, eps)


def add_normed(x: Tensor, branch: Tensor, gain: Tensor, spans: Spans, eps: float) -> Tensor:
    """``x + gain · RMSNorm(branch)``, the gain of each token's sample.

    Args:
        x, branch: (N, width).
        gain: (width,) or (B, width) fp32.
    """
    if torch.compiler.is_compiling():
        return x + (_normed(branch, eps) * _rows(gain, spans)).to(x.dtype)
    return _AddNormed.apply(x, branch, gain, spans, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``; both (N, width)."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    return _SwiGLU.apply(gate, up)


def split_heads(
    qkv: Tensor, gain: Tensor, queries: int, turns: Tensor, spans: Spans, eps: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each span, the first two normalised over each head and turned by their places.

    Args:
        qkv: (N, (query + key + value heads) · D), in that order.
        gain: (query + key heads, D) fp32, the norms'.
        queries: how many heads ask.
        turns: (N, D/2, 2) fp32: cosine and sine of the angle of each pair of neighbours in a head.

    Returns:
        (samples, heads, tokens, D) of each kind.
    """
    if torch.compiler.is_compiling():
        heads, width = gain.shape
        qk, values = qkv.unflatten(-1, (-1, width)).tensor_split((heads,), 1)
        first, second = (_normed(qk, eps) * gain).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = turns[:, None].unbind(-1)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2).to(qkv.dtype)
        parts = _by_span(turned, values, queries, spans)
    else:
        parts = list(_SplitHeads.apply(qkv, gain, queries, turns, spans, eps))
    return list(zip(parts[0::3], parts[1::3], parts[2::3], strict=True))


def _normed(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], None, eps)


def _rows(gain: Tensor, spans: Spans) -> Tensor:
    """(width,) or (B, width) as it multiplies (N, width)."""
    if gain.dim() == 1 or len(gain) == 1:
        return gain
    return torch.cat([part.repeat_interleave(span.tokens, 0) for span, part in spans.with_samples(gain)])


def _by_span(turned: Tensor, values: Tensor, queries: int, spans: Spans) -> list[Tensor]:
    """Queries, keys and values of one span after the other, each (samples, heads, tokens, D), as views."""
    kinds = (turned[:, :queries], turned[:, queries:], values)
    return [span.of(kind).transpose(1, 2) for span in spans for kind in kinds]


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1/√(mean x² + eps) over the last dimension, kept, in fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _scaled(x: Tensor, rows: Tensor) -> Tensor:
    """``x · rows`` in one pass, rounded once to the dtype of ``x``; ``rows`` (…, 1) fp32."""
    return torch.mul(x, rows, out=torch.empty_like(x))


def _times_gain(x: Tensor, gain: Tensor, spans: Spans, out: Tensor) -> Tensor:
    """``out = x · gain`` with the gain of each token's sample; ``out`` may be ``x``."""
    gain = gain.to(x.dtype)
    if gain.dim() == 1 or len(gain) == 1:
        return torch.mul(x, gain, out=out)
    for span, part in spans.with_samples(gain):
        torch.mul(span.of(x), part[:, None], out=span.of(out))
    return out


def _gain_gradient(grad: Tensor, normed: Tensor, gain: Tensor, spans: Spans) -> Tensor:
    """The gradient towards the gain of ``normed``, in whose memory it is computed."""
    product = normed.mul_(grad)
    if gain.dim() == 1:
        return product.sum(0, dtype=gain.dtype)
    return torch.cat([span.of(product).sum(1, dtype=gain.dtype) for span in spans])


def _norm_gradient(grad: Tensor, x: Tensor, inverse: Tensor, out: Tensor) -> Tensor:
    """``out``: the gradient towards ``x`` from that towards ``x · inverse``, whose memory is used."""
    along = (grad * x).sum(-1, keepdim=True, dtype=torch.float32).mul_(inverse.square()).div_(-x.shape[-1])
    return torch.mul(torch.addcmul(grad, x, along, out=grad), inverse, out=out)


class _NormGain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, spans: Spans, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, gain, inverse)
        ctx.spans = spans
        out = _scaled(x, inverse)
        return _times_gain(out, gain, spans, out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        d_x = d_gain = None
        if ctx.needs_input_grad[1]:
            d_gain = _gain_gradient(grad, _scaled(x, inverse), gain, ctx.spans)
        if ctx.needs_input_grad[0]:
            d_normed = _times_gain(grad, gain, ctx.spans, torch.empty_like(x))
            d_x = _norm_gradient(d_normed, x, inverse, d_normed)
        return d_x, d_gain, None, None


class _AddNormed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gain: Tensor, spans: Spans, eps: float) -> Tensor:
        inverse = _inverse_rms(branch, eps)
        ctx.save_for_backward(branch, gain, inverse)
        ctx.spans = spans
        out = _scaled(branch, inverse)
        gain = gain.to(x.dtype)
        if gain.dim() == 1 or len(gain) == 1:
            return torch.addcmul(x, out, gain, out=out)
        for span, part in spans.with_samples(gain):
            torch.addcmul(span.of(x), span.of(out), part[:, None], out=span.of(out))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gain, inverse = ctx.saved_tensors
        d_branch = d_gain = None
        if ctx.needs_input_grad[2]:
            d_gain = _gain_gradient(grad, _scaled(branch, inverse), gain, ctx.spans)
        if ctx.needs_input_grad[1]:
            d_normed = _times_gain(grad, gain, ctx.spans, torch.empty_like(branch))
            d_branch = _norm_gradient(d_normed, branch, inverse, d_normed)
        return grad, d_branch, d_gain, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = grad * up
        del up  # under checkpointing nothing else holds it, and this is the moment when a step needs the most
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, F.silu(gate).mul_(grad)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, gain: Tensor, queries: int, turns: Tensor, spans: Spans, eps: float
    ) -> tuple[Tensor, ...]:
        qk, values = _parts(qkv.detach(), gain)
        inverse = _inverse_rms(qk, eps)
        ctx.save_for_backward(qkv, gain, turns, inverse)
        ctx.queries, ctx.spans = queries, spans
        normed = torch.mul(qk, inverse, out=qkv.new_empty(qk.shape, dtype=torch.float32))
        return tuple(_by_span(_turn(normed.mul_(gain), turns).to(qkv.dtype), values, queries, spans))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, gain, turns, inverse = ctx.saved_tensors
        qk, _ = _parts(qkv, gain)
        d_qkv = torch.empty_like(qkv)
        d_qk, d_values = _parts(d_qkv, gain)
        straight = qkv.new_empty(qk.shape, dtype=torch.float32)
        for part, grad in zip(_by_span(straight, d_values, ctx.queries, ctx.spans), grads, strict=True):
            part.copy_(grad)
        _turn(straight, turns, back=True)
        d_gain = None
        if ctx.needs_input_grad[1]:
            d_gain = (straight * qk).mul_(inverse).sum(0)
        _norm_gradient(straight.mul_(gain), qk, inverse, d_qk)
        return d_qkv, d_gain, None, None, None, None


def _parts(qkv: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Views (N, heads, D) of the queries and keys, which ``gain`` belongs to, and of the values."""
    heads, width = gain.shape
    whole = qkv.view(len(qkv), -1, width)
    return whole[:, :heads], whole[:, heads:]


def _turn(x: Tensor, turns: Tensor, back: bool = False) -> Tensor:
    """Each pair of the last dimension turned by its angle, in place: a complex product. ``x`` fp32 (N, heads, D)."""
    angles = torch.view_as_complex(turns)[:, None]
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(angles.conj() if back else angles)
    return x
