"""
Orthonormal bases of the columns of tall matrices.
"""

import math
from typing import List, Optional, Sequence, Tuple

import torch
from olmo_core.config import StrEnum

from .precision import full_precision

__all__ = ["Orthonormalization", "orthonormalize"]

SKETCH_MULTIPLE = 128
"""The rows of the sketch are a multiple of this, as in Dion."""


class Orthonormalization(StrEnum):
    """How the orthonormal basis is computed."""

    rcqr = "rcqr"
    """Randomised Cholesky QR (Dion, arXiv:2504.05295): nearly all in matrix products."""

    qr = "qr"
    """Householder QR."""


@full_precision()
def orthonormalize(
    x: torch.Tensor,
    method: Orthonormalization = Orthonormalization.rcqr,
    generators: Optional[Sequence[torch.Generator]] = None,
    oversampling: float = 1.25,
) -> torch.Tensor:
    """
    The ``Q`` of ``x = Q R`` with a positive diagonal of ``R``, for each matrix of a stack. Columns
    that depend on those before them, up to rounding, are replaced by arbitrary ones orthonormal to
    all others. A zero matrix gives zero, one that is not finite NaN.

    :param x: Shape ``(k, m, r)`` with ``m >= r``.
    :param method: How it is computed. Of matrices too small for a sketch, by Householder QR.
    :param generators: For the sketches, one per matrix, on the device of ``x``; default is the
        global one.
    :param oversampling: Rows of the sketch, relative to ``r``.

    :returns: Shape ``(k, m, r)``, in float64 if ``x`` is, else in float32.
    :raises ValueError: If ``m < r``.
    """
    k, m, r = x.shape
    if m < r:
        raise ValueError(f"{m} rows have no {r} orthonormal columns")
    if generators is not None and len(generators) != k:
        raise ValueError(f"{len(generators)} generators for {k} matrices")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    top = x.abs().amax(-2, keepdim=True)
    finite = top.isfinite().all(-1, keepdim=True)
    alive = (top > 0).any(-1, keepdim=True)
    # Per column, which changes no Q: what depends on what shows in R whatever the scales are.
    # A power of two divides without rounding.
    top = top.clamp(min=torch.finfo(x.dtype).tiny)
    x = x / (top / (2 * torch.frexp(top).mantissa))

    rows = math.ceil(oversampling * r / SKETCH_MULTIPLE) * SKETCH_MULTIPLE
    if method == Orthonormalization.qr or rows >= m:
        q = _householder(x)
    else:
        q = _cholesky(*_precondition(x, _sketch(x, rows, generators), _fill(x, generators)))
    q.masked_fill_(~(alive & _is_orthonormal(q)), 0)
    return q.masked_fill_(~finite, torch.nan)


def _householder(x: torch.Tensor) -> torch.Tensor:
    q, r = torch.linalg.qr(x)
    return q * _signs(r).unsqueeze(-2)


def _global(k: int) -> List[Optional[torch.Generator]]:
    return [None] * k


def _sketch(
    x: torch.Tensor, rows: int, generators: Optional[Sequence[torch.Generator]]
) -> torch.Tensor:
    """Shape ``(k, rows, m)``, from N(0, 1 / rows): keeps lengths, on average."""
    noise = [
        torch.randn(rows, x.shape[-2], generator=generator, dtype=x.dtype, device=x.device)
        for generator in generators or _global(x.shape[0])
    ]
    return torch.stack(noise).mul_(rows**-0.5)


def _fill(x: torch.Tensor, generators: Optional[Sequence[torch.Generator]]) -> torch.Tensor:
    """Shape ``(k, m, r)``: random columns of about unit length, in general position."""
    noise = [
        torch.rand(*x.shape[1:], generator=generator, dtype=x.dtype, device=x.device)
        for generator in generators or _global(x.shape[0])
    ]
    # Variance 1 / m; uniform is cheaper than normal on CPU.
    return torch.stack(noise).sub_(0.5).mul_((12 / x.shape[-2]) ** 0.5)


def _precondition(
    x: torch.Tensor, sketch: torch.Tensor, fill: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    :returns: ``y = x R^-1`` with ``S x = Q R``, of a condition number near that of ``S`` on a
        subspace, its columns permuted; and the permutation, of shape ``(k, r)``.
    """
    r = torch.linalg.qr(sketch @ x, mode="r").R
    size = r.diagonal(dim1=-2, dim2=-1).abs()
    # Of a column that depends on those before it no more than rounding is left, which is relative
    # to the column's length and grows as a random walk with the number of terms. What is kept has
    # a few times more, so that y stays well conditioned.
    eps = torch.finfo(x.dtype).eps
    dependent = size <= 2 * eps * sketch.shape[-2] ** 0.5 * torch.linalg.vector_norm(r, dim=-2)

    # Dependent columns go last, that no other is made orthogonal to rounding of theirs.
    order = dependent.to(torch.uint8).argsort(dim=-1, stable=True)
    dependent = dependent.gather(-1, order).unsqueeze(-2)
    r = torch.linalg.qr(_take_columns(r, order), mode="r").R
    r = r * _signs(r).unsqueeze(-1)
    r = torch.where(dependent, torch.eye(r.shape[-1], dtype=r.dtype, device=r.device), r)
    x = torch.where(dependent, fill, _take_columns(x, order))
    return torch.linalg.solve_triangular(r, x, upper=True, left=False), order


def _cholesky(y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``y L^-T`` with ``y^T y = L L^T``, its columns put back from ``order``."""
    lower = torch.linalg.cholesky_ex(y.mT @ y).L
    q = torch.linalg.solve_triangular(lower.mT, y, upper=True, left=False)
    return _take_columns(q, order.argsort(dim=-1))


def _is_orthonormal(q: torch.Tensor) -> torch.Tensor:
    """
    Whether ``q^T q v = v`` for a vector, which finds what is far from it in a fraction of the time
    of ``q^T q``. Shape ``(k, 1, 1)``; false where ``q`` is not finite.
    """
    # No symmetry of q is likely to hide behind these.
    v = torch.arange(1, q.shape[-1] + 1, dtype=q.dtype, device=q.device).sin().unsqueeze(-1)
    error = torch.linalg.vector_norm(q.mT @ (q @ v) - v, dim=(-2, -1), keepdim=True)
    return error <= torch.finfo(q.dtype).eps ** 0.5 * torch.linalg.vector_norm(v)


def _signs(r: torch.Tensor) -> torch.Tensor:
    """Of the diagonal of ``r``, with 1 for 0; shape ``(k, r)``."""
    return 1 - 2 * (r.diagonal(dim1=-2, dim2=-1) < 0).to(r.dtype)


def _take_columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.gather(-1, order.unsqueeze(-2).expand(x.shape))
