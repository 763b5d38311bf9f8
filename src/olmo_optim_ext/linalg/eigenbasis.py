"""
Eigenbases of symmetric matrices: found exactly, and followed while the matrices change.
"""

from typing import Tuple

import torch

from .precision import full_precision
from .structured import orthonormal_columns, symmetric_product

__all__ = ["eigenbasis", "gram_average", "power_step"]

Found = Tuple[torch.Tensor, torch.Tensor]


@full_precision()
def gram_average(gram: torch.Tensor, x: torch.Tensor, beta: float) -> torch.Tensor:
    """
    ``beta gram + (1 - beta) x x^T``.

    :param gram: Shape ``(k, m, m)``.
    :param x: Shape ``(k, m, n)``, of the same dtype.
    """
    return symmetric_product(x, gram, beta, 1 - beta)


def eigenbasis(gram: torch.Tensor, float64_on_failure: bool = True) -> Found:
    """
    Orthonormal eigenvectors, in rows, that of the largest eigenvalue first. Those of the null
    space, and of eigenvalues that are alike, are arbitrary.

    :param gram: Symmetric, ``(k, m, m)``, float32 or float64. On CUDA the host waits for the result
        (a fact of ``torch.linalg.eigh``).
    :param float64_on_failure: Try again in float64 where the eigenvalues are not found.

    :returns: The eigenvectors ``(k, m, m)``, of a matrix without any the identity, and which
        matrices have some, ``(k,)``.
    """
    found = [_eigenvectors(each, float64_on_failure) for each in gram]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return _kept_if_finite(torch.stack(found), identity)


def _eigenvectors(gram: torch.Tensor, float64_on_failure: bool) -> torch.Tensor:
    for dtype in (gram.dtype, torch.float64) if float64_on_failure else (gram.dtype,):
        try:
            return torch.linalg.eigh(gram.to(dtype)).eigenvectors.mT.flip(0).to(gram.dtype)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # LinAlgError, or what a library of the device says
            continue
    return torch.full_like(gram, torch.nan)


@full_precision()
def power_step(gram: torch.Tensor, basis: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """
    One step of orthogonal iteration towards the eigenbasis: ``gram`` times each vector of the
    basis, orthonormalised, after they were sorted by their Rayleigh quotients, the largest first.

    :param gram: Symmetric, ``(k, m, m)``.
    :param basis: Orthonormal rows, ``(k, m, m)``.

    :returns: The new basis; for each of its rows the row of the old one that it came from, ``(k,
        m)``; and where the new basis is finite, ``(k,)``. Elsewhere the old one is returned.
    """
    product = basis @ gram
    order = (basis * product).sum(-1).argsort(dim=-1, descending=True, stable=True)
    product = product.gather(-2, order.unsqueeze(-1).expand_as(product))
    # LAPACK takes and gives matrices column by column: no copy of rows that are taken as columns.
    new, found = _kept_if_finite(orthonormal_columns(product.mT).mT, basis)
    unsorted = torch.arange(order.shape[-1], device=order.device)
    return new, torch.where(found.unsqueeze(-1), order, unsorted), found


def _kept_if_finite(new: torch.Tensor, old: torch.Tensor) -> Found:
    found = new.sum((-2, -1)).isfinite()
    return torch.where(found[:, None, None], new, old), found
