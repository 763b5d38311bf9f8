"""
Preconditioners ``P = Q^T Q`` of matrices with ``Q = Q_L (x) Q_R``, fitted on a Lie group so that
they whiten (Li, arXiv:1512.04202; PSGD Kron).

Everything here is of stacks: ``x`` is ``(k, m, n)``. A factor is a matrix, ``(k, m, m)`` on the
left and ``(k, n, n)`` on the right, or the diagonal of one, ``(k, m)`` and ``(k, n)``; ``None`` is
the identity, which is not fitted.
"""

from typing import List, Optional, Sequence, Tuple

import torch

from .precision import full_precision
from .structured import symmetric_product, upper_times, upper_times_upper

__all__ = [
    "Factors",
    "balanced",
    "fit_by_division",
    "fit_by_products",
    "precondition",
    "spectral_norm_bound",
]

Factors = Sequence[Optional[torch.Tensor]]
"""``Q_L`` and ``Q_R``."""

PROCRUSTES_STEP = 1 / 8
"""The longest step of :func:`_towards_symmetric`, as in the authors' code."""


def _is_diagonal(q: torch.Tensor) -> bool:
    return q.ndim == 2


def _times(
    q: Optional[torch.Tensor], x: torch.Tensor, side: int, transpose: bool, triangular: bool
) -> torch.Tensor:
    """``q x`` or ``q^T x`` on the left, ``x q^T`` or ``x q`` on the right."""
    if q is None:
        return x
    if _is_diagonal(q):
        return x * (q.unsqueeze(-2) if side else q.unsqueeze(-1))
    if side:
        return _times(q, x.mT, 0, transpose, triangular).mT
    return upper_times(q, x, transpose) if triangular else (q.mT if transpose else q) @ x


@full_precision()
def precondition(factors: Factors, x: torch.Tensor, triangular: bool) -> torch.Tensor:
    """
    ``P x = Q_L^T Q_L x Q_R^T Q_R``.

    :param triangular: Whether factors are upper triangular, where they are not diagonal.
    """
    for side, q in enumerate(factors):
        x = _times(q, _times(q, x, side, False, triangular), side, True, triangular)
    return x


def _divide(factors: Factors, x: torch.Tensor) -> torch.Tensor:
    """``Q_L^-T x Q_R^-1``, of upper triangular and of diagonal factors."""
    left, right = factors
    if left is not None:
        if _is_diagonal(left):
            x = x / left.unsqueeze(-1)
        else:
            x = torch.linalg.solve_triangular(left.mT, x, upper=False)
    if right is not None:
        if _is_diagonal(right):
            x = x / right.unsqueeze(-2)
        else:
            x = torch.linalg.solve_triangular(right, x, upper=True, left=False)
    return x


def _second_moment(x: torch.Tensor, side: int, diagonal: bool) -> torch.Tensor:
    """``x x^T`` on the left, ``x^T x`` on the right; or the diagonal of it."""
    if diagonal:
        return x.square().sum(-2 if side else -1)
    return symmetric_product(x.mT if side else x)


def spectral_norm_bound(a: torch.Tensor) -> torch.Tensor:
    """
    A lower bound of the spectral norm of positive semidefinite matrices ``(k, m, m)``, often close
    to it: two power steps from the longest column. Shape ``(k,)``.
    """
    top = a.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]
    # A column whose square overflows is as good as the longest.
    longest = torch.linalg.vector_norm(a, dim=-1).argmax(-1)
    scale = torch.where(top > 0, top, 1.0)
    x = a.gather(-1, longest[:, None, None].expand(-1, a.shape[-2], 1)) / scale
    x = a @ (x / scale)
    length = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = a @ (x / torch.where(length > 0, length, 1.0) / scale)
    return torch.linalg.vector_norm(x, dim=(-2, -1)) * top[:, 0, 0]


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each tensor of a stack, ``(k,)``."""
    return torch.linalg.vector_norm(x.flatten(1), ord=torch.inf, dim=1)


def _like(scalars: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``(k,)`` shaped to be multiplied with a stack."""
    return scalars.view(-1, *[1] * (x.ndim - 1))


@full_precision()
def fit_by_division(
    factors: Factors, grad: torch.Tensor, probe: torch.Tensor, lr: float, alive: torch.Tensor
) -> List[Optional[torch.Tensor]]:
    """
    A step towards ``P = E[g g^T]^-1/2``. With ``A = Q_L g Q_R^T``, ``B = Q_L^-T v Q_R^-1`` and on
    the left ``T_1 = A A^T`` and ``T_2 = B B^T`` (on the right ``A^T A`` and ``B^T B``)::

        Q <- Q - lr triu(T_1 - T_2) Q / |T_1 + T_2|

    with :func:`spectral_norm_bound`. Of a diagonal factor ``T_1`` and ``T_2`` are diagonals, and
    the norm is their largest. This is form ``dQ = E Q`` of psgd_torch.

    :param factors: Upper triangular, or diagonal.
    :param probe: ``v``, standard normal, shaped like the gradient ``g``.
    :param alive: Which matrices are fitted, ``(k,)``. Without a gradient factors would grow without
        bound.

    :returns: The new factors; the old ones of matrices that are not fitted, and of those whose new
        ones are not finite.
    """
    a, b = grad, _divide(factors, probe)
    for side, q in enumerate(factors):
        a = _times(q, a, side, False, triangular=True)
    new: List[Optional[torch.Tensor]] = []
    for side, q in enumerate(factors):
        if q is None:
            new.append(None)
            continue
        diagonal = _is_diagonal(q)
        step, total = (_second_moment(x, side, diagonal) for x in (a, b))
        total += step
        step.mul_(2).sub_(total)
        bound = _largest(total) if diagonal else spectral_norm_bound(total)
        del total
        step *= _like(lr / bound.clamp(min=torch.finfo(bound.dtype).tiny), q)
        if diagonal:
            new.append(torch.addcmul(q, step, q, value=-1.0))
        else:
            new.append(upper_times_upper(step.triu_(), q, added=q, alpha=-1.0))
    return _kept_unless(alive, new, factors)


@full_precision()
def fit_by_products(
    factors: Factors,
    lipschitz: Factors,
    grad: torch.Tensor,
    lr: float,
    alive: torch.Tensor,
    beta: float = 0.9,
) -> Tuple[List[Optional[torch.Tensor]], List[Optional[torch.Tensor]]]:
    """
    A step towards the same without division: ``dQ = Q^1/2 E Q^3/2`` of psgd_torch ("PRO"). With
    ``h = P g``, on the left ``T = h h^T`` (on the right ``h^T h``) and ``c = numel(g) / m`` (``/
    n``)::

        L <- max(beta L + (1 - beta) l, l),  l = |T| + c
        Q <- Q - lr / L (T Q - c Q)

    and then a rotation that brings ``Q`` nearer to a symmetric positive definite matrix, which
    changes no ``P``.

    :param factors: Full, or diagonal.
    :param lipschitz: ``L`` of each factor, ``(k, 1)``.
    :param grad: ``g``, damped.
    :param alive: As for :func:`fit_by_division`.

    :returns: The new factors and the new ``L``; the old ones as :func:`fit_by_division`.
    """
    h = precondition(factors, grad, triangular=False)
    new: List[Optional[torch.Tensor]] = []
    new_lipschitz: List[Optional[torch.Tensor]] = []
    for side, (q, bound) in enumerate(zip(factors, lipschitz)):
        if q is None or bound is None:
            new.append(None)
            new_lipschitz.append(None)
            continue
        diagonal = _is_diagonal(q)
        moment = _second_moment(h, side, diagonal)
        target = grad[0].numel() / q.shape[-1]
        norm = _largest(moment) if diagonal else spectral_norm_bound(moment)
        least = (norm + target).unsqueeze(-1)
        bound = torch.maximum(beta * bound + (1 - beta) * least, least)
        rate = _like(lr / bound.squeeze(-1), q)
        if diagonal:
            new.append(q - rate * (moment * q - target * q))
        else:
            moved = q * (1 + rate * target) - rate * (moment @ q)
            del moment
            new.append(_towards_symmetric(moved))
        new_lipschitz.append(bound)
    return _kept_unless(alive, new, factors), _kept_unless(alive, new_lipschitz, lipschitz)


def _towards_symmetric(q: torch.Tensor) -> torch.Tensor:
    """
    A rotation of ``q`` towards the one that solves ``min_U |U q - I|_F`` over orthogonal ``U``:
    ``exp(a R) q`` to second order, with ``R = q^T - q`` over its norm, and the ``a`` of a line
    search on the trace, at most :data:`PROCRUSTES_STEP`.
    """
    generator = q.mT - q
    # R is skew: R^T R is positive semidefinite, with the square of its norm.
    norm = spectral_norm_bound(symmetric_product(generator.mT)).sqrt()
    generator /= _like(norm.clamp(min=torch.finfo(q.dtype).tiny), q)
    once = generator @ q
    twice = generator @ once
    slope, curvature = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (once, twice))
    best = -slope / torch.where(curvature < 0, curvature, -1.0)
    length = torch.where(curvature < 0, best.clamp(max=PROCRUSTES_STEP), PROCRUSTES_STEP)
    length = _like(length, q)
    return twice.mul_(0.5 * length).add_(once).mul_(length).add_(q)


def _kept_unless(alive: torch.Tensor, new: Factors, old: Factors) -> List[Optional[torch.Tensor]]:
    for q in new:
        if q is not None:
            alive = alive & q.flatten(1).sum(1).isfinite()
    return [
        None if q is None or before is None else torch.where(_like(alive, q), q, before, out=q)
        for q, before in zip(new, old)
    ]


def balanced(factors: Factors) -> List[Optional[torch.Tensor]]:
    """Both factors scaled to have largest elements alike, which changes no ``P``."""
    sizes = [_largest(q) for q in factors if q is not None]
    if len(sizes) < 2:
        return list(factors)
    mean = (sizes[0].log() / 2 + sizes[1].log() / 2).exp()
    return [None if q is None else q * _like(mean / size, q) for q, size in zip(factors, sizes)]
