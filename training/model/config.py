"""The measures of a Lumina2 transformer, of any size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError

MAX_CAPTION_TOKENS = 299  # the rotary table has 300 rows and the picture needs the one after the caption


@dataclass(frozen=True)
class TransformerConfig:
    """Defaults are those of Lumina-Image-2.0 (2.6 B parameters)."""

    dim: int = 2304
    layers: int = 26
    refiner_layers: int = 2
    heads: int = 24
    kv_heads: int = 8
    caption_dim: int = 2304
    ffn_dim: int = 9216
    patch: int = 2
    channels: int = 16
    axes_dim: tuple[int, int, int] = (32, 32, 32)
    axes_len: tuple[int, int, int] = (300, 512, 512)
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.heads * sum(self.axes_dim) != self.dim:
            raise ModelError(
                f"Not a Lumina2 transformer: {self.heads} heads of {sum(self.axes_dim)} "
                f"do not fill a width of {self.dim}."
            )
        if self.heads % self.kv_heads:
            raise ModelError(f"Not a Lumina2 transformer: {self.heads} heads do not share {self.kv_heads} KV heads.")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v inside the fused ``attention.qkv`` weight."""
        return self.dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def time_dim(self) -> int:
        return min(self.dim, 1024)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """From the ``config.json`` of diffusers' ``Lumina2Transformer2DModel``.

        Raises:
            ModelError: the file describes another class of model.
        """
        name = config.get("_class_name", "Lumina2Transformer2DModel")
        if name != "Lumina2Transformer2DModel":
            raise ModelError(f"The transformer is a {name}; a Lumina2Transformer2DModel is needed.")
        dim, multiple = config.get("hidden_size", 2304), config.get("multiple_of", 256)
        inner = int(4 * dim * (config.get("ffn_dim_multiplier") or 1))
        return cls(
            dim=dim,
            layers=config.get("num_layers", 26),
            refiner_layers=config.get("num_refiner_layers", 2),
            heads=config.get("num_attention_heads", 24),
            kv_heads=config.get("num_kv_heads", 8),
            caption_dim=config.get("cap_feat_dim", 1024),
            ffn_dim=-(-inner // multiple) * multiple,
            patch=config.get("patch_size", 2),
            channels=config.get("in_channels", 16),
            axes_dim=tuple(config.get("axes_dim_rope", (32, 32, 32))),
            axes_len=tuple(config.get("axes_lens", (300, 512, 512))),
            norm_eps=config.get("norm_eps", 1e-5),
        )
