"""From one layer over q, k and v to a layer for each, and back: the same change of every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .layers import PARTS, Layer, whole_factor


def split_layer(layer: Layer, rows: Sequence[int]) -> dict[str, Layer] | None:
    """Layers of q, k and v that add what one over all of them does; None: its kind cannot.

    A LoRA's parts share A; of B's columns each part keeps those that do not serve another part alone. So do a LoHa's.
    """
    factors = None if layer.by_columns else _split_factors(layer, rows)
    if factors is None:
        return None

    def own(tensor: Tensor | None, n: int) -> Tensor | None:
        return None if tensor is None else tensor.split(list(rows))[n].clone()

    return {
        part: Layer(layer.kind, factors[n], own(layer.magnitude, n), own(layer.comfyui_scale, n), own(layer.bias, n))
        for n, part in enumerate(PARTS)
    }


def _split_factors(layer: Layer, rows: Sequence[int]) -> list[dict[str, Tensor]] | None:
    f, sizes = layer.factors, list(rows)
    if layer.kind == "lora":
        return _unstacked(f, "A", "B", sizes)
    if layer.kind == "loha":
        both = (_unstacked(f, f"hada_w{n}_b", f"hada_w{n}_a", sizes) for n in "12")
        return [one | other for one, other in zip(*both, strict=True)]
    by_row = {
        "glora": ("b1",),
        "diff": ("diff",),
        "ia3": ("weight",) if layer.kind == "ia3" and f["weight"].shape[0] > 1 else (),
    }.get(layer.kind)
    if layer.kind == "lokr":
        first = "lokr_w1" if "lokr_w1" in f else "lokr_w1_a"
        inner = sum(sizes) // f[first].shape[0]
        if any(size % inner for size in sizes):
            return None  # a block of the second factor would reach over two parts
        by_row, sizes = (first,), [size // inner for size in sizes]
    if layer.kind == "oft":
        width = f["oft_blocks"].shape[-1]
        if f["oft_blocks"].ndim == 4 or "rescale" in f or any(size % width for size in sizes):
            return None
        by_row, sizes = ("oft_blocks",), [size // width for size in sizes]
    if by_row is None:
        return None
    return [{k: (t.split(sizes)[n] if k in by_row else t).clone() for k, t in f.items()} for n in range(len(PARTS))]


def _unstacked(f: Mapping[str, Tensor], inner: str, outer: str, sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    """The product ``outer @ inner`` of the rows of each part; see ``_stacked``."""
    parts = f[outer].split(list(sizes))
    used = torch.stack([part.abs().amax(0) > 0 for part in parts])
    pieces = []
    for n, part in enumerate(parts):
        kept = used[n] | ~used.any(0)
        kept = kept if kept.any() else torch.arange(len(kept)) == 0
        pieces.append({inner: f[inner][kept].clone(), outer: part[:, kept].clone()})
    return pieces


def join_layers(parts: Mapping[str, Layer], rows: Sequence[int]) -> Layer | None:
    """One layer that adds what those of q, k and v do, nothing where a part has none.

    LoRAs that share A stay at its rank; else A is stacked and B set along a diagonal, and the ranks add up; so do the
    two products of a LoHa. A LoKr becomes the LoRA that it is.

    Returns:
        None where their kinds cannot be joined, or a LoHa or LoKr would be larger than the difference of the weight.
    """
    some = next(iter(parts.values()))
    kinds, doras = {layer.kind for layer in parts.values()}, {layer.dora for layer in parts.values()}
    if len(kinds) > 1 or len(doras) > 1 or any(layer.by_columns for layer in parts.values()):
        return None
    if some.dora and len(parts) < len(PARTS):
        return None
    kind, factors = _joined(some.kind, {part: layer.factors for part, layer in parts.items()}, rows)
    if not factors:
        return None
    magnitude = [parts[p].magnitude for p in PARTS if p in parts]
    scale = [parts[p].comfyui_scale for p in PARTS if p in parts]
    if some.dora and not (all(m is not None for m in magnitude) or all(s is not None for s in scale)):
        return None
    return Layer(kind, factors, _whole(magnitude), _whole(scale))


def _joined(kind: str, parts: Mapping[str, Mapping[str, Tensor]], rows: Sequence[int]) -> tuple[str, dict[str, Tensor]]:
    """Kind and factors of one layer; no factors where there is none."""
    if kind == "lora":
        return kind, _stacked(parts, "A", "B", rows)
    if kind == "diff":
        width = next(iter(parts.values()))["diff"].shape[1]
        zero = {part: torch.zeros(size, width) for part, size in zip(PARTS, rows, strict=True)}
        return kind, {"diff": torch.cat([parts[p]["diff"] if p in parts else zero[p] for p in PARTS])}
    if kind == "loha":
        factors = _stacked(parts, "hada_w1_b", "hada_w1_a", rows) | _stacked(parts, "hada_w2_b", "hada_w2_a", rows)
        width = factors["hada_w1_b"].shape[1]
    elif kind == "lokr":
        kind, rank = "lora", sum(map(_lokr_rank, parts.values()))
        width = _columns(next(iter(parts.values())))
        if rank * (sum(rows) + width) >= sum(rows) * width:
            return kind, {}
        factors = _stacked({part: _lokr_as_lora(f) for part, f in parts.items()}, "A", "B", rows)
    else:
        return kind, {}
    small = sum(factor.numel() for factor in factors.values()) < sum(rows) * width
    return kind, factors if small else {}


def _stacked(
    parts: Mapping[str, Mapping[str, Tensor]], inner: str, outer: str, rows: Sequence[int]
) -> dict[str, Tensor]:
    """The product ``outer @ inner`` of all rows from those of each part."""
    first = next(iter(parts.values()))[inner]
    if all(torch.equal(factors[inner], first) for factors in parts.values()):
        empty = [torch.zeros(size, first.shape[0]) for size in rows]
        b = [parts[p][outer] if p in parts else e for p, e in zip(PARTS, empty, strict=True)]
        return {inner: first.clone(), outer: torch.cat(b)}
    a = [parts[p][inner] for p in PARTS if p in parts]
    b = [parts[p][outer] if p in parts else torch.zeros(n, 0) for p, n in zip(PARTS, rows, strict=True)]
    return {inner: torch.cat(a), outer: torch.block_diag(*b)}


def _lokr_as_lora(f: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``w1 ⊗ (a·b)`` as ``(w1 ⊗ a)(I ⊗ b)`` or ``(I ⊗ a)(w1 ⊗ b)``, whichever rank is smaller."""
    first, (a, b) = whole_factor(f, "lokr_w1"), _second(f)
    height, width = first.shape
    if width <= height:
        return {"B": torch.kron(first, a), "A": torch.kron(torch.eye(width), b)}
    return {"B": torch.kron(torch.eye(height), a), "A": torch.kron(first, b)}


def _columns(f: Mapping[str, Tensor]) -> int:
    return whole_factor(f, "lokr_w1").shape[1] * _second(f)[1].shape[1]


def _lokr_rank(f: Mapping[str, Tensor]) -> int:
    return min(whole_factor(f, "lokr_w1").shape) * _second(f)[1].shape[0]


def _second(f: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A LoKr's second factor as a product."""
    if "lokr_w2" not in f:
        return f["lokr_w2_a"], f["lokr_w2_b"]
    whole = f["lokr_w2"]
    high = whole.shape[0] > whole.shape[1]
    return (whole, torch.eye(whole.shape[1])) if high else (torch.eye(whole.shape[0]), whole)


def _whole(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(PARTS) else None
