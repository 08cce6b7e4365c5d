"""What an adapter file holds, whatever it is called there: one layer for a module, or for its rows of q, k or v.

Every scale (alpha, rank, multiplier) is inside the factors, so that equal factors mean an equal change of the weight.

Sources: Hu et al. 2021, LoRA (arXiv 2106.09685); Yeh et al. 2023, LoHa and LoKr (arXiv 2309.14859); Chavan et al.
2023, GLoRA (arXiv 2306.07967); Qiu et al. 2023, OFT (arXiv 2306.07280); Liu et al. 2024, DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from ...errors import ModelError
from ...model.config import TransformerConfig
from ...model.transformer import Lumina2Transformer

Place = tuple[str, str]  # a module of ours, and which of its rows: "" all, or "q", "k" or "v" of the fused weight
Weights = Callable[[str], Tensor]  # a module's weight of the base model, by its name
PARTS = ("q", "k", "v")
FUSED = "attention.qkv"


@dataclass(frozen=True)
class Layer:
    """What is added to the rows of one weight.

    Attributes:
        kind: lora, loha, lokr, glora, oft (in blocks or butterflies), ia3 or diff.
        factors: fp32, every scale inside: ``A`` (rank, in) and ``B`` (out, rank) of a lora; else LyCORIS's names.
        magnitude: DoRA's m, the length of each row (out, 1) or column (1, in) of the weight with what is added.
        comfyui_scale: the same as ComfyUI wants it of rows, (out, 1): m · ‖W‖ / ‖W + ΔW‖.
        bias: what is added to the bias (out,).
    """

    kind: str
    factors: Mapping[str, Tensor]
    magnitude: Tensor | None = None
    comfyui_scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def dora(self) -> bool:
        return self.magnitude is not None or self.comfyui_scale is not None

    @property
    def by_columns(self) -> bool:
        return self.magnitude is not None and self.magnitude.shape[0] == 1 and self.magnitude.shape[1] > 1

    @property
    def reads_base(self) -> bool:
        """What it adds depends on the base's weight."""
        return self.dora or self.kind in ("glora", "oft", "ia3")

    @property
    def rank(self) -> int:
        """Of its product; of a kind without one 1."""
        inner = {"lora": "A", "loha": "hada_w1_b", "glora": "b2"}.get(self.kind)
        if inner:
            return self.factors[inner].shape[0]
        return next((self.factors[n].shape[0] for n in ("lokr_w2_b", "lokr_w1_b") if n in self.factors), 1)

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """Rows and columns of the weight that it fits; None: of any."""
        f = self.factors
        if self.kind == "lora":
            return f["B"].shape[0], f["A"].shape[1]
        if self.kind == "loha":
            return f["hada_w1_a"].shape[0], f["hada_w1_b"].shape[1]
        if self.kind == "lokr":
            first, second = whole_shape(f, "lokr_w1"), whole_shape(f, "lokr_w2")
            return first[0] * second[0], first[1] * second[1]
        if self.kind == "glora":
            return f["b1"].shape[0], f["b2"].shape[1]
        if self.kind == "oft":
            return f["oft_blocks"].shape[-3] * f["oft_blocks"].shape[-2], None
        if self.kind == "ia3":
            rows, columns = f["weight"].shape
            return (None, columns) if rows == 1 and columns > 1 else (rows, None)
        if not f:
            return (len(self.bias), None) if self.bias is not None else (None, None)
        return f["diff"].shape[0], (f["diff"].shape[1] if f["diff"].ndim > 1 else None)


@dataclass(frozen=True)
class Adapters:
    """A whole file: its layers by place, the model they fit, and what the file says of itself.

    ``config`` has the sizes that decide names and rows; where it was read off the file, others are those of
    Lumina-Image-2.0.
    """

    config: TransformerConfig
    layers: Mapping[Place, Layer]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, dict[str, Layer]]:
        """The layers of each module by their rows."""
        modules: dict[str, dict[str, Layer]] = {}
        for (module, part), layer in self.layers.items():
            modules.setdefault(module, {})[part] = layer
        return modules

    def rows(self, place: Place) -> slice:
        """Which rows of the module's weight a place is."""
        part = place[1]
        if not part:
            return slice(None)
        sizes = self.config.qkv_rows
        start = sum(sizes[: PARTS.index(part)])
        return slice(start, start + sizes[PARTS.index(part)])

    def delta(self, module: str, base: Weights) -> Tensor:
        """What the file adds to a module's weight at strength 1, (out, in) fp32."""
        parts = {part: layer for part, layer in self.modules[module].items() if layer.factors}
        if "" in parts:
            return change(parts[""], lambda: base(module))
        total = torch.zeros(shapes(self.config)[module])
        for part, layer in parts.items():
            rows = self.rows((module, part))
            total[rows] = change(layer, lambda rows=rows: base(module)[rows])  # type: ignore[misc]
        return total


@lru_cache(8)
def shapes(config: TransformerConfig) -> dict[str, torch.Size]:
    """The weight of every module, linear layers and norms, by name."""
    with torch.device("meta"):
        weights = Lumina2Transformer(config).state_dict()
    return {name.removesuffix(".weight"): w.shape for name, w in weights.items() if name.endswith(".weight")}


@torch.no_grad()
def add_to(transformer: Lumina2Transformer, adapters: Adapters) -> None:
    """Put what a file adds at strength 1 into a transformer's own weights, in the dtype that they have."""

    def weight(module: str) -> Tensor:
        return transformer.get_parameter(f"{module}.weight")

    for module, parts in adapters.modules.items():
        own = weight(module)
        own.copy_(own.float() + adapters.delta(module, weight).to(own.device))
        for part, layer in parts.items():
            if layer.bias is not None:
                rows = transformer.get_parameter(f"{module}.bias")[adapters.rows((module, part))]
                rows += layer.bias.to(rows.device, rows.dtype)


def no_base(module: str) -> Tensor:
    """The base's weights where none were given."""
    raise ModelError(
        f"What the file adds to {module} depends on the base model's weights (DoRA, GLoRA, OFT, IA3). Wire the MODEL "
        "that it belongs to, or name it with --base."
    )


def change(layer: Layer, weight: Callable[[], Tensor]) -> Tensor:
    """What a layer adds to its rows of a weight at strength 1, (out, in) fp32.

    Args:
        weight: gives these rows of the base's weight; only asked where they matter.
    """
    if not layer.reads_base:
        return _product(layer, None)
    base = weight().detach().float().cpu()
    added = _product(layer, base)
    if not layer.dora:
        return added
    adapted = base + added
    return adapted * _gain(layer, base, adapted) - base


def with_lengths(layer: Layer, weight: Callable[[], Tensor]) -> Layer:
    """A DoRA layer that knows its lengths both ways."""
    if not layer.dora or layer.by_columns or (layer.magnitude is not None and layer.comfyui_scale is not None):
        return layer
    base = weight().detach().float().cpu()
    adapted = base + _product(layer, base)
    gain = _gain(layer, base, adapted)
    magnitude = gain * _lengths(adapted) if layer.magnitude is None else layer.magnitude
    scale = gain * _lengths(base) if layer.comfyui_scale is None else layer.comfyui_scale
    return replace(layer, magnitude=magnitude, comfyui_scale=scale)


def as_dora(layer: Layer, weight: Callable[[], Tensor]) -> Layer:
    """A layer that knows DoRA's own lengths; one without any keeps those that it has."""
    if layer.magnitude is not None:
        return layer
    if layer.dora:
        return with_lengths(layer, weight)
    base = weight().detach().float().cpu()
    return replace(layer, magnitude=_lengths(base + _product(layer, base)))


def _gain(layer: Layer, base: Tensor, adapted: Tensor) -> Tensor:
    """What each row, or column, of the adapted weight is multiplied with."""
    if layer.magnitude is not None:
        return layer.magnitude / adapted.norm(dim=0 if layer.by_columns else 1, keepdim=True)
    assert layer.comfyui_scale is not None
    return layer.comfyui_scale / _lengths(base)


def _lengths(weight: Tensor) -> Tensor:
    return weight.norm(dim=1, keepdim=True)


def _product(layer: Layer, weight: Tensor | None) -> Tensor:
    f = layer.factors
    if layer.kind == "lora":
        return f["B"] @ f["A"]
    if layer.kind == "loha":
        return (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    if layer.kind == "lokr":
        return torch.kron(whole_factor(f, "lokr_w1"), whole_factor(f, "lokr_w2"))
    if layer.kind == "diff":
        return f["diff"]
    assert weight is not None
    if layer.kind == "glora":
        return weight @ f["a1"] @ f["a2"] + f["b1"] @ f["b2"]
    if layer.kind == "ia3":
        return weight * f["weight"]
    return _turned_less(weight, f["oft_blocks"], f.get("rescale"))


def _turned_less(weight: Tensor, blocks: Tensor, rescale: Tensor | None) -> Tensor:
    """How the rows of a weight change when they are turned in blocks (3 dimensions) or by butterflies (4)."""
    from lycoris.functional import boft, diag_oft  # type: ignore[import-untyped]

    columns = weight.T.contiguous()
    if blocks.ndim == 4:
        return boft.bypass_forward_diff(columns, blocks, rescale).T
    return diag_oft.bypass_forward_diff(columns, columns, blocks, rescale).T


def whole_factor(factors: Mapping[str, Tensor], name: str) -> Tensor:
    return factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]


def whole_shape(factors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name in factors:
        return factors[name].shape[0], factors[name].shape[1]
    return factors[f"{name}_a"].shape[0], factors[f"{name}_b"].shape[1]
