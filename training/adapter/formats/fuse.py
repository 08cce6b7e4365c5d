"""From one layer over q, k and v to a layer for each, and back: the same change of every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .layers import PARTS, Layer


def split_layer(layer: Layer, rows: Sequence[int]) -> dict[str, Layer] | None:
    """Layers of q, k and v that add what one over all of them does; None: its kind cannot.

    A LoRA's parts share A; of B's columns each part keeps those that do not serve another part alone.
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
        used = torch.stack([b.abs().amax(0) > 0 for b in f["B"].split(sizes)])
        pieces = []
        for n, b in enumerate(f["B"].split(sizes)):
            kept = used[n] | ~used.any(0)
            kept = kept if kept.any() else torch.arange(len(kept)) == 0
            pieces.append({"A": f["A"][kept].clone(), "B": b[:, kept].clone()})
        return pieces
    by_row = {
        "loha": ("hada_w1_a", "hada_w2_a"),
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


def join_layers(parts: Mapping[str, Layer], rows: Sequence[int]) -> Layer | None:
    """One layer that adds what those of q, k and v do, nothing where a part has none; None: their kinds cannot.

    LoRAs that share A stay at its rank; else A is stacked and B set along a diagonal, and the ranks add up.
    """
    some = next(iter(parts.values()))
    kinds, doras = {layer.kind for layer in parts.values()}, {layer.dora for layer in parts.values()}
    if len(kinds) > 1 or len(doras) > 1 or any(layer.by_columns for layer in parts.values()):
        return None
    if some.dora and len(parts) < len(PARTS):
        return None
    if some.kind == "lora":
        factors = _join_loras(parts, rows)
    elif some.kind == "diff":
        width = some.factors["diff"].shape[1]
        zero = {part: torch.zeros(size, width) for part, size in zip(PARTS, rows, strict=True)}
        factors = {"diff": torch.cat([parts[p].factors["diff"] if p in parts else zero[p] for p in PARTS])}
    else:
        return None
    magnitude = [parts[p].magnitude for p in PARTS if p in parts]
    scale = [parts[p].comfyui_scale for p in PARTS if p in parts]
    if some.dora and not (all(m is not None for m in magnitude) or all(s is not None for s in scale)):
        return None
    return Layer(some.kind, factors, _whole(magnitude), _whole(scale))


def _join_loras(parts: Mapping[str, Layer], rows: Sequence[int]) -> dict[str, Tensor]:
    first = next(iter(parts.values())).factors["A"]
    if all(torch.equal(layer.factors["A"], first) for layer in parts.values()):
        empty = [torch.zeros(size, first.shape[0]) for size in rows]
        b = [parts[p].factors["B"] if p in parts else e for p, e in zip(PARTS, empty, strict=True)]
        return {"A": first.clone(), "B": torch.cat(b)}
    a = [parts[p].factors["A"] for p in PARTS if p in parts]
    b = [parts[p].factors["B"] if p in parts else torch.zeros(n, 0) for p, n in zip(PARTS, rows, strict=True)]
    return {"A": torch.cat(a), "B": torch.block_diag(*b)}


def _whole(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(PARTS) else None
