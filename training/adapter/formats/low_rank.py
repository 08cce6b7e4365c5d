"""Weights and products as products of a chosen rank: the nearest one, by the largest singular values.

Source: Eckart and Young 1936; the randomised range of Halko et al. 2011 (arXiv 0909.4061) where a weight is large.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT_BELOW = 512  # of the smaller side: up to there the whole decomposition is still quick
_MORE, _TURNS = 16, 6  # directions beside those asked for, and how often they are turned towards the largest


def of_matrix(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is the nearest to a matrix (out, in); fp32 on its device."""
    matrix = matrix.float()
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= _EXACT_BELOW:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        range_ = _range(matrix, min(rank + _MORE, *matrix.shape))
        left, sizes, right = torch.linalg.svd(range_.T @ matrix, full_matrices=False)
        left = range_ @ left
    return _halves(left, sizes, right, rank)


def _range(matrix: Tensor, size: int) -> Tensor:
    """Orthonormal columns (out, size) that span nearly what a matrix maps to; the same on every device."""
    drawn = torch.randn(matrix.shape[1], size, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    columns = torch.linalg.qr(matrix @ drawn)[0]
    for _ in range(_TURNS):
        columns = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ columns)[0])[0]
    return columns


def of_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of a smaller rank to ``b @ a``, exactly; the large matrix is never made."""
    if rank >= a.shape[0]:
        return a, b
    outer, upper = torch.linalg.qr(b.float())
    inner, lower = torch.linalg.qr(a.float().T)
    left, sizes, right = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return _halves(outer @ left, sizes, right @ inner.T, rank)


def _halves(left: Tensor, sizes: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both halves carry the root of the sizes, so that neither is much larger than the other."""
    root = sizes[:rank].sqrt()
    return (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()


def lost(exact: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
    """Squared Frobenius norms of what a product leaves out of a matrix, and of the matrix."""
    return float((exact - b @ a).square().sum()), float(exact.square().sum())
