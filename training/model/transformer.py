"""Lumina2's transformer under ComfyUI's parameter names, so that its weights can be used where they lie.

The network reads a noisy latent, a time t (0 = noise, 1 = picture) and a caption, and predicts the velocity
``z - ε`` from noise to picture. Architecture: Qin et al. 2025, "Lumina-Image 2.0" (arXiv 2503.21758), as in
diffusers' ``Lumina2Transformer2DModel``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from ..errors import ModelError
from .config import TransformerConfig
from .fused import add_normed, norm_gain, split_heads, swiglu
from .linear import Linear, computed_in
from .packing import Spans, interleave, last_rows, pack
from .swap import BlockSwap, Copies, CudaCopies

_KEPT = {  # what selective checkpointing does not compute again: the products
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
                 "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
}  # fmt: skip


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys; q, k and v in one product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.eps = config.heads, config.kv_heads, config.norm_eps
        self.qkv = Linear(config.dim, sum(config.qkv_rows), bias=False)
        self.out = Linear(config.dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, turns: Tensor, spans: Spans) -> Tensor:
        q_gain, k_gain = self.q_norm.weight, self.k_norm.weight
        gain = torch.cat((q_gain.expand(self.heads, -1), k_gain.expand(self.kv_heads, -1))).float()
        mixed = []
        for q, k, v in split_heads(self.qkv(x), gain, self.heads, turns, spans, self.eps):
            heads = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            mixed.append(heads.transpose(1, 2).reshape(-1, x.shape[-1]))
        return self.out(mixed[0] if len(mixed) == 1 else torch.cat(mixed))


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """Attention and feed-forward between sandwich norms; scaled and gated by the time where ``modulated``."""

    def __init__(self, config: TransformerConfig, modulated: bool = True) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention_norm2 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm1 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm2 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.time_dim, 4 * config.dim))
        self.modulated, self.eps = modulated, config.norm_eps

    def forward(self, x: Tensor, turns: Tensor, spans: Spans, time: Tensor | None) -> Tensor:
        """Tokens (N, dim), their rotary angles, which belong to which sample, and the time embedding (B, time_dim)."""
        before_a, after_a, before_f, after_f = self._gains(time)
        mixed = self.attention(norm_gain(x, before_a, spans, self.eps), turns, spans)
        x = add_normed(x, mixed, after_a, spans, self.eps)
        mixed = self.feed_forward(norm_gain(x, before_f, spans, self.eps))
        return add_normed(x, mixed, after_f, spans, self.eps)

    def _gains(self, time: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What each norm's output is multiplied with, (width,) or (B, width) fp32: scales before, gates after."""
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        before_a, after_a, before_f, after_f = (norm.weight.float() for norm in norms)
        if self.modulated:
            scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(time).float().chunk(4, -1)
            before_a, after_a = (1 + scale_a) * before_a, gate_a.tanh() * after_a
            before_f, after_f = (1 + scale_f) * before_f, gate_f.tanh() * after_f
        return before_a, after_a, before_f, after_f


class TimeEmbedder(nn.Module):
    FREQUENCIES = 256

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        out = config.time_dim
        self.mlp = nn.Sequential(Linear(self.FREQUENCIES, out), nn.SiLU(), Linear(out, out))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.FREQUENCIES // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1).to(dtype))


class FinalLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = Linear(config.dim, config.patch**2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.time_dim, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale = self.adaLN_modulation(time).unsqueeze(1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale))


class Lumina2Transformer(nn.Module):
    """See the module's docstring; ``config`` decides the size.

    Attributes:
        compute_dtype: what it computes in; None: what its weights are stored in, or fp32 where the CPU lacks that.
        checkpoint_every: blocks' activations are computed again in the backward pass, of every n-th block; 0: of none.
        checkpoint_selective: of those blocks the matrix products are kept, and only the rest is computed again.
        checkpoint_offload: what is kept for the backward pass waits in the CPU's memory.
        swap: what brings the weights of some blocks when their turn comes: see ``swap_blocks``.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.checkpoint_every, self.checkpoint_selective, self.checkpoint_offload = 0, False, False
        self.swap: BlockSwap | None = None
        self.x_embedder = Linear(config.patch**2 * config.channels, config.dim)
        self.noise_refiner = nn.ModuleList(Block(config) for _ in range(config.refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(config.refiner_layers))
        self.t_embedder = TimeEmbedder(config)
        self.cap_embedder = nn.Sequential(
            nn.RMSNorm(config.caption_dim, eps=config.norm_eps), Linear(config.caption_dim, config.dim)
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_layer = FinalLayer(config)
        self._angles = lru_cache(256)(partial(_angles, config))
        self._turns = lru_cache(64)(self._packed_turns)

    @classmethod
    def from_weights(cls, config: TransformerConfig, weights: Mapping[str, Tensor]) -> Lumina2Transformer:
        """A transformer *on the very memory* of ``weights`` (our names), frozen; nothing is copied.

        Raises:
            ModelError: a weight is missing or has another shape than ``config`` asks for.
        """
        with torch.device("meta"):
            transformer = cls(config)
        for name, expected in transformer.state_dict().items():
            if name not in weights:
                raise ModelError(f"The model lacks the weight {name!r}: not a Lumina2 transformer.")
            if weights[name].shape != expected.shape:
                raise ModelError(
                    f"The weight {name!r} is {tuple(weights[name].shape)}; this Lumina2 needs {tuple(expected.shape)}."
                )
        names = list(transformer.state_dict())
        transformer.load_state_dict({n: weights[n] for n in names}, assign=True)
        return transformer.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        stored = self.final_layer.linear.weight
        return self.compute_dtype or computed_in(stored.dtype, stored.device)

    def compile_blocks(self) -> None:
        """Fuse the elementwise work of each block, without breaks in its graph; sizes may change."""
        for block in (*self.noise_refiner, *self.context_refiner, *self.layers):
            block.compile(dynamic=True, fullgraph=True)

    def swap_blocks(self, count: int, copies: Copies | None = None) -> int:
        """Have the frozen weights of the last main blocks wait in the CPU's memory.

        Args:
            copies: how they come to the device; by default as quickly as it can.

        Returns:
            How many blocks do.
        """
        device = self.final_layer.linear.weight.device
        chosen = self.layers[max(len(self.layers) - count, 0) :]
        copies = copies or (CudaCopies if device.type == "cuda" else Copies)(device)
        self.swap = BlockSwap(list(chosen), copies)
        return len(chosen)

    def forward(self, latents: Tensor, t: Tensor, captions: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The velocity ``z - ε``.

        Samples whose captions have one length are best next to each other: they share their attention's call.

        Args:
            latents: (B, channels, height, width) noisy latents; height and width multiples of the patch.
            t: (B,) in [0, 1]; 0 is noise, 1 the picture.
            captions: (B, tokens, caption_dim) text embeddings, padded on the right.
            lengths: how many tokens of each caption count; known on the host, so nothing waits for the device.

        Returns:
            (B, channels, height, width), in the dtype that it computes in.
        """
        return self.predict(latents, t, self.refine(captions, lengths), lengths)

    def refine(self, captions: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The caption embedder and the context refiner: (B, tokens, caption_dim) to (all tokens, dim), packed.

        It depends on the caption alone, so that it can be kept where neither of the two is trained.
        """
        spans = Spans.of_lengths(lengths)
        packed = pack(captions, lengths).to(self.dtype)
        weight: Tensor = self.cap_embedder[0].weight  # type: ignore[assignment]
        text = self.cap_embedder[1](norm_gain(packed, weight.float(), spans, self.config.norm_eps))
        turns = self._turns(0, 0, lengths, text.device)[0]
        for number, block in enumerate(self.context_refiner):
            text = self._run(number, block, text, turns, spans, None)
        return text

    def predict(self, latents: Tensor, t: Tensor, text: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The velocity, of refined captions; see ``forward`` and ``refine``."""
        patch, dtype = self.config.patch, self.dtype
        batch, _, height, width = latents.shape
        rows, columns = height // patch, width // patch

        time = self.t_embedder(t, dtype)
        patches = latents.to(dtype).unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
        image = self.x_embedder(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2))

        images = Spans.of_lengths((rows * columns,) * batch)
        texts, both = Spans.of_lengths(lengths), Spans.of_lengths(tuple(n + rows * columns for n in lengths))
        _, image_turns, turns = self._turns(rows, columns, lengths, image.device)
        for number, block in enumerate(self.noise_refiner):
            image = self._run(number, block, image, image_turns, images, time)
        joint = interleave(text, image, texts, images)
        for number, block in enumerate(self.layers):
            joint = self._run(number, block, joint, turns, both, time)
        out = self.final_layer(last_rows(joint, both, rows * columns), time)
        out = out.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))
        return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)

    def _packed_turns(
        self, rows: int, columns: int, lengths: tuple[int, ...], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotary tables (…, D/2, 2) of the text's, the picture's and all tokens of a batch, packed."""
        tables = [self._angles(rows, columns, tokens) for tokens in lengths]
        text = torch.cat([table[:n] for table, n in zip(tables, lengths, strict=True)])
        image = torch.cat([table[n:] for table, n in zip(tables, lengths, strict=True)])
        return text.to(device), image.to(device), torch.cat(tables).to(device)

    def _run(
        self, number: int, block: nn.Module, x: Tensor, turns: Tensor, spans: Spans, time: Tensor | None
    ) -> Tensor:
        if self.swap is None:
            return self._checkpointed(number, block, x, turns, spans, time)
        self.swap.enter(block)
        out = self._checkpointed(number, block, x, turns, spans, time)
        self.swap.leave(block, out)
        return out

    def _checkpointed(
        self, number: int, block: nn.Module, x: Tensor, turns: Tensor, spans: Spans, time: Tensor | None
    ) -> Tensor:
        every = self.checkpoint_every
        if not every or number % every or not torch.is_grad_enabled():
            return block(x, turns, spans, time)
        contexts = _keep_products if self.checkpoint_selective else noop_context_fn
        waiting = save_on_cpu(pin_memory=x.is_cuda) if self.checkpoint_offload else nullcontext()
        with waiting:
            return checkpoint(block, x, turns, spans, time, use_reentrant=False, context_fn=contexts)


def _keep_products() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    def policy(_: object, op: object, *__: object, **___: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _angles(config: TransformerConfig, rows: int, columns: int, tokens: int) -> Tensor:
    """Cosines and sines (tokens + rows·columns, D/2, 2) of one caption length and picture size, fp32 on the CPU.

    Caption token i stands at (i, 0, 0), the patch in row r and column c at (tokens, r, c).

    Raises:
        ModelError: the caption or the picture is too large for the rotary table.
    """
    if tokens >= config.axes_len[0] or max(rows, columns) > config.axes_len[1]:
        raise ModelError(
            f"Lumina2 reads at most {config.axes_len[0] - 1} caption tokens and {config.axes_len[1]} patches a side; "
            f"got {tokens} tokens and {rows} × {columns} patches."
        )
    place = torch.zeros(tokens + rows * columns, 3, dtype=torch.float64)
    place[:tokens, 0] = torch.arange(tokens)
    place[tokens:, 0] = tokens
    place[tokens:, 1] = torch.arange(rows).repeat_interleave(columns)
    place[tokens:, 2] = torch.arange(columns).repeat(rows)
    angle = torch.cat(
        [
            place[:, axis, None] * config.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
            for axis, d in enumerate(config.axes_dim)
        ],
        1,
    )
    return torch.stack((angle.cos(), angle.sin()), -1).float()
