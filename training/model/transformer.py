"""Lumina2's transformer under ComfyUI's parameter names, so that its weights can be used where they lie.

The network reads a noisy latent, a time t (0 = noise, 1 = picture) and a caption, and predicts the velocity
``z - ε`` from noise to picture. Architecture: Qin et al. 2025, "Lumina-Image 2.0" (arXiv 2503.21758), as in
diffusers' ``Lumina2Transformer2DModel``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ModelError
from .config import TransformerConfig

Rope = tuple[Tensor, Tensor]  # cosines and sines
Positions = tuple[Rope, Rope, Rope, Tensor | None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs, in fp32: ``x`` (B, T, heads, D), ``cos``/``sin`` (1 or B, T, 1, D/2)."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys; q, k and v in one product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim, self.rows = config.head_dim, config.qkv_rows
        self.qkv = nn.Linear(config.dim, sum(config.qkv_rows), bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).split(self.rows, -1))
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


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
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, 4 * config.dim))
        self.modulated = modulated

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, time: Tensor | None) -> Tensor:
        if not self.modulated:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rope, mask))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(time).unsqueeze(1).chunk(4, -1)
        mixed = self.attention(self.attention_norm1(x) * (1 + scale_a), rope, mask)
        x = x + gate_a.tanh() * self.attention_norm2(mixed)
        return x + gate_f.tanh() * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale_f)))


class TimeEmbedder(nn.Module):
    FREQUENCIES = 256

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        out = config.time_dim
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.FREQUENCIES // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
        angles = t.float()[:, None] * frequencies
        return self.mlp(torch.cat((angles.cos(), angles.sin()), -1).to(dtype))


class FinalLayer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, config.patch**2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale = self.adaLN_modulation(time).unsqueeze(1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale))


class Lumina2Transformer(nn.Module):
    """See the module's docstring; ``config`` decides the size."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.x_embedder = nn.Linear(config.patch**2 * config.channels, config.dim)
        self.noise_refiner = nn.ModuleList(Block(config) for _ in range(config.refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(config.refiner_layers))
        self.t_embedder = TimeEmbedder(config)
        self.cap_embedder = nn.Sequential(
            nn.RMSNorm(config.caption_dim, eps=config.norm_eps), nn.Linear(config.caption_dim, config.dim)
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_layer = FinalLayer(config)
        self._ropes: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

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
        return self.x_embedder.weight.dtype

    def rope(self, rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (tokens + rows·columns, D/2) of one caption length and picture size, kept for re-use.

        Caption token i stands at (i, 0, 0), the patch in row r and column c at (tokens, r, c).
        """
        key, device = (rows, columns, tokens), self.x_embedder.weight.device
        if key not in self._ropes or self._ropes[key][0].device != device:
            if tokens >= self.config.axes_len[0] or max(rows, columns) > self.config.axes_len[1]:
                raise ModelError(
                    f"Lumina2 reads at most {self.config.axes_len[0] - 1} caption tokens and "
                    f"{self.config.axes_len[1]} patches a side; got {tokens} tokens and {rows} × {columns} patches."
                )
            if len(self._ropes) >= 256:
                self._ropes.pop(next(iter(self._ropes)))
            place = torch.zeros(tokens + rows * columns, 3, dtype=torch.float64)
            place[:tokens, 0] = torch.arange(tokens)
            place[tokens:, 0] = tokens
            place[tokens:, 1] = torch.arange(rows).repeat_interleave(columns)
            place[tokens:, 2] = torch.arange(columns).repeat(rows)
            angles = [
                place[:, axis, None] * self.config.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
                for axis, d in enumerate(self.config.axes_dim)
            ]
            angle = torch.cat(angles, 1)
            self._ropes[key] = (angle.cos().float().to(device), angle.sin().float().to(device))
        return self._ropes[key]

    def forward(self, latents: Tensor, t: Tensor, captions: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """The velocity ``z - ε``.

        Args:
            latents: (B, channels, height, width) noisy latents; height and width multiples of the patch.
            t: (B,) in [0, 1]; 0 is noise, 1 the picture.
            captions: (B, tokens, caption_dim) text embeddings, padded on the right.
            lengths: how many tokens of each caption count; known on the host, so nothing waits for the device.

        Returns:
            (B, channels, height, width), in the dtype of the weights.
        """
        patch, dtype = self.config.patch, self.dtype
        batch, _, height, width = latents.shape
        rows, columns = height // patch, width // patch
        tokens = max(lengths)
        captions = captions[:, :tokens]

        time = self.t_embedder(t, dtype)
        text = self.cap_embedder(captions.to(dtype))
        patches = latents.to(dtype).unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
        image = self.x_embedder(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))

        text_rope, image_rope, rope, mask = self._positions(rows, columns, tokens, lengths)
        text_mask = None if mask is None else mask[..., :tokens]
        for block in self.context_refiner:
            text = self._run(block, text, text_rope, text_mask, None)
        for block in self.noise_refiner:
            image = self._run(block, image, image_rope, None, time)
        joint = torch.cat((text, image), 1)
        for block in self.layers:
            joint = self._run(block, joint, rope, mask, time)
        out = self.final_layer(joint[:, tokens:], time)
        out = out.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, columns))
        return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)

    def _positions(self, rows: int, columns: int, tokens: int, lengths: tuple[int, ...]) -> Positions:
        """Rotary tables of text, picture and both, and the mask over keys; no mask where all lengths are equal."""
        if len(set(lengths)) == 1:
            cos, sin = (table[None, :, None] for table in self.rope(rows, columns, tokens))
            mask = None
        else:
            tables = []
            for which in (0, 1):
                longest = self.rope(rows, columns, tokens)[which][:tokens]
                tables.append(
                    torch.stack([torch.cat((longest, self.rope(rows, columns, n)[which][n:])) for n in lengths])
                )
            cos, sin = (table[:, :, None] for table in tables)
            real = torch.tensor([[i < n for i in range(tokens)] + [True] * (rows * columns) for n in lengths])
            mask = real[:, None, None].to(cos.device, non_blocking=True)
        text, image = (cos[:1, :tokens], sin[:1, :tokens]), (cos[:, tokens:], sin[:, tokens:])
        return text, image, (cos, sin), mask

    def _run(self, block: nn.Module, x: Tensor, rope: Rope, mask: Tensor | None, time: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, rope, mask, time, use_reentrant=False)
        return block(x, rope, mask, time)
