"""Weights and products as products of a chosen rank: the nearest one, by the largest singular values.

Source: Eckart and Young 1936; the randomised range of Halko et al. 2011 (arXiv 0909.4061) where a weight is large.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT_BELOW = 512  # of the smaller side: up to there the whole decomposition is still quick


def of_matrix(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is the nearest to a matrix (out, in); fp32 on its device."""
    matrix = matrix.float()
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= _EXACT_BELOW or matrix.is_cuda:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            left, sizes, right = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=8)
            right = right.T
    return _halves(left, sizes, right, rank)


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
