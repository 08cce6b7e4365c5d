"""LoKr in the shapes that PEFT makes, and changes of a weight that turn out to be Kronecker products.

Source: Van Loan and Pitsianis 1993, "Approximation with Kronecker products": a matrix is one where its blocks, each
written as a row, are multiples of one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .layers import Layer, Place, change, no_base

_WITHIN = 1e-6  # relative: what fp32 factors lose by being multiplied out
_FACTORS = (-1, *range(2, 65))  # that are tried where no layer tells


def peft_lokr(layers: Mapping[Place, Layer]) -> dict[Place, Layer] | None:
    """The layers as LoKrs in the shapes that PEFT makes with one factor, by which diffusers reads them.

    A difference or a LoRA is taken for a LoKr where it is exactly that, as for q, k and v that were trained apart and
    written in one.

    Returns:
        None where they are none, and where all are plain LoRAs.
    """
    kinds = {layer.kind for layer in layers.values()}
    if not kinds <= {"lokr", "lora", "diff"} or kinds == {"lora"} or any(map(_not_plain, layers.values())):
        return None
    known = {layer.factors["lokr_w1"].shape[0] for layer in layers.values() if "lokr_w1" in layer.factors}
    for factor in (*sorted(known), -1) if known else _FACTORS:
        found = dict[Place, Layer]()
        for place, layer in layers.items():
            made = _shaped(layer, factor)
            if made is None:
                break
            found[place] = made
        else:
            return found
    return None


def _not_plain(layer: Layer) -> bool:
    return layer.dora or layer.bias is not None or any(factor.ndim != 2 for factor in layer.factors.values())


def _shaped(layer: Layer, factor: int) -> Layer | None:
    from peft.tuners.lokr.layer import factorization

    rows, columns = (factorization(side or 1, factor)[0] for side in layer.extent)
    if layer.kind == "lokr":
        return layer if layer.factors["lokr_w1"].shape == (rows, columns) else None
    return as_lokr(change(layer, lambda: no_base("")), (rows, columns))


def with_whole_first(layer: Layer) -> Layer:
    """A LoKr whose first, small factor is not factored further: PEFT would want that of every layer or of none."""
    if "lokr_w1_a" not in layer.factors:
        return layer
    rest = {name: factor for name, factor in layer.factors.items() if not name.startswith("lokr_w1")}
    return replace(layer, factors={"lokr_w1": layer.factors["lokr_w1_a"] @ layer.factors["lokr_w1_b"], **rest})


def as_lokr(matrix: Tensor, shape: tuple[int, int]) -> Layer | None:
    """The LoKr whose product a matrix (out, in) is, its first factor of a shape; None: it is no such product."""
    if any(side % part for side, part in zip(matrix.shape, shape, strict=True)):
        return None
    blocks = matrix.double().unflatten(1, (shape[1], -1)).unflatten(0, (shape[0], -1)).transpose(1, 2)
    inner = blocks.shape[2:]
    rows = blocks.reshape(shape[0] * shape[1], -1)
    lengths = rows.norm(dim=1)
    second = rows[lengths.argmax()]
    first = rows @ second / second.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    if (rows - torch.outer(first, second)).norm() > _WITHIN * lengths.norm():
        return None
    return Layer("lokr", {"lokr_w1": first.view(shape).float(), "lokr_w2": second.view(inner).float()})
