"""
Products of which the structure is known, triangular factors or a symmetric result, in blocks: what
is zero or known is not computed. All of stacks ``(k, m, n)``.
"""

from typing import List, Optional, Tuple

import torch

__all__ = ["orthonormal_columns", "symmetric_product", "upper_times", "upper_times_upper"]

BLOCK, MAX_BLOCKS = 128, 8
"""Blocks are large enough for a matrix product to be fast, and few."""


def _blocks(n: int) -> List[Tuple[int, int]]:
    count = max(1, min(n // BLOCK, MAX_BLOCKS))
    borders = [n * i // count for i in range(count + 1)]
    return list(zip(borders, borders[1:]))


def symmetric_product(
    x: torch.Tensor, added: Optional[torch.Tensor] = None, beta: float = 0.0, alpha: float = 1.0
) -> torch.Tensor:
    """
    ``x x^T``; with :paramref:`added`, ``beta added + alpha x x^T``.

    :param x: Shape ``(k, m, n)``.
    :param added: Symmetric, ``(k, m, m)``.
    """
    out = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    for begin, end in _blocks(x.shape[1]):
        rows, others = x[:, begin:end], x[:, :end].mT
        if added is None:
            part = rows @ others
        else:
            part = torch.baddbmm(added[:, begin:end, :end], rows, others, beta=beta, alpha=alpha)
        out[:, begin:end, :end] = part
        out[:, :begin, begin:end] = part[:, :, :begin].mT
    return out


def upper_times(q: torch.Tensor, x: torch.Tensor, transpose: bool = False) -> torch.Tensor:
    """
    ``q x``, or ``q^T x``.

    :param q: Upper triangular, ``(k, m, m)``.
    :param x: Shape ``(k, m, n)``.
    """
    out = x.new_empty(x.shape)
    for begin, end in _blocks(q.shape[-1]):
        if transpose:
            torch.bmm(q[:, :end, begin:end].mT, x[:, :end], out=out[:, begin:end])
        else:
            torch.bmm(q[:, begin:end, begin:], x[:, begin:], out=out[:, begin:end])
    return out


def upper_times_upper(
    a: torch.Tensor, b: torch.Tensor, added: torch.Tensor, alpha: float
) -> torch.Tensor:
    """
    ``added + alpha a b``.

    :param a: And the others: upper triangular, ``(k, m, m)``.
    """
    blocks = _blocks(a.shape[-1])
    if len(blocks) == 1:
        return torch.baddbmm(added, a, b, alpha=alpha)
    out = added.clone()
    for top, bottom in blocks:
        for begin, end in blocks:
            if begin >= top:
                left, right = a[:, top:bottom, top:end], b[:, top:end, begin:end]
                out[:, top:bottom, begin:end] += alpha * (left @ right)
    return out


def orthonormal_columns(x: torch.Tensor) -> torch.Tensor:
    """The ``Q`` of Householder's ``x = Q R``, without ``R``; square ``x``, ``(k, m, m)``."""
    return torch.linalg.householder_product(*torch.geqrf(x))
