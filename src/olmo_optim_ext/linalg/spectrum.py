"""
Measures of a matrix's singular values. :func:`lanczos` does the work on the device, without a
synchronisation; :func:`effective_rank_of` and :func:`stable_rank_of` read its few numbers later,
on the host, in NumPy: there nothing can wait for a device.
"""

from typing import List, Tuple

import numpy as np
import torch

from .precision import full_precision

__all__ = [
    "PROBES",
    "STEPS",
    "effective_rank",
    "effective_rank_of",
    "lanczos",
    "lanczos_flops",
    "orthogonality_error",
    "ranks_of",
    "stable_rank_of",
]

PROBES = 16
STEPS = 32
"""
With these the effective rank is exact to rounding up to a short side of 512, and within 3% at 1024
(see the tests).
"""

CONVERGED = 0.05
"""Relative residual of a singular value that stands for itself, not for a part of the spectrum."""

EQUAL = 1e-4
"""Relative distance of singular values that are one, several times."""

ZERO = 1e-6
"""Relative size of singular values that are rounding of zero."""

ABSENT = 1e-2
"""Multiplicity, as measured, of singular values that only rounding has brought in."""


@full_precision()
def lanczos(x: torch.Tensor, probes: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """
    Block Lanczos on the Gram matrix of the short side of ``A = x / |x|_F``, as Golub-Kahan
    bidiagonalisation (Golub, Luk, Overton 1981), which does not square the singular values:
    ``A^T U_i = V_{i-1} b_i^T + V_i a_i`` and ``A V_i = U_i a_i^T + U_{i+1} b_{i+1}``, all ``U`` and
    all ``V`` orthonormal. The first ``U`` spans the probes.

    :param x: Shape ``(k, m, n)``.
    :param probes: Random signs, of shape ``(k, min(m, n), p)``. Where ``p * steps`` exceeds the
        short side, fewer steps are taken, and what there is no room for in the last block is zero.
    :param steps: At most so many blocks.

    :returns: Shape ``(k, 2, steps, p, p)``, with the steps and ``p`` taken: the blocks ``a_i``,
        then ``b_i``, where ``b_1 = sqrt(min(m, n) / p) I``. All finite if ``x`` is.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    short, long = sorted(x.shape[-2:])
    if probes.shape[:2] != (x.shape[0], short):
        raise ValueError(f"probes have shape {tuple(probes.shape)} for x of {tuple(x.shape)}")
    width, steps = _blocks(short, probes.shape[-1], steps)
    a = _unit_norm((x.mT if x.shape[-2] > x.shape[-1] else x).to(work))
    if _reduces(short, long, width * steps):
        a = torch.linalg.qr(a.mT, mode="r").R.mT

    first = torch.linalg.qr(probes[..., :width].to(work)).Q
    eye = torch.eye(width, dtype=work, device=x.device)
    betas = [(eye * (short / width) ** 0.5).expand(x.shape[0], -1, -1)]
    alphas: List[torch.Tensor] = []
    left, right = first, a.new_zeros(x.shape[0], a.shape[-1], 0)
    block = first
    for step in range(steps):
        block, alpha = _next_block(a.mT @ block, right)
        alphas.append(alpha)
        right = torch.cat([right, block], -1)
        if step < steps - 1:
            block, beta = _next_block(a @ block, left)
            betas.append(beta)
            left = torch.cat([left, block], -1)
    return torch.stack([torch.stack(alphas, 1), torch.stack(betas, 1)], 1)


def lanczos_flops(rows: int, cols: int, probes: int = PROBES, steps: int = STEPS) -> int:
    """Floating point operations of :func:`lanczos` on a ``(rows, cols)`` matrix, at most."""
    short, long = sorted((rows, cols))
    width, steps = _blocks(short, probes, steps)
    size = width * steps
    return min(
        _iteration_flops(short, long, size),
        _reduction_flops(short, long) + _iteration_flops(short, short, size),
    )


def ranks_of(coefficients: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """:func:`effective_rank_of` and :func:`stable_rank_of`, in the time of one."""
    measured = [_measure(item) for item in coefficients.astype(np.float64)]
    effective = [_exp_entropy(values, counts) for values, counts in measured]
    return np.array(effective), np.array([_stable_rank(values) for values, _ in measured])


def effective_rank_of(coefficients: np.ndarray) -> np.ndarray:
    """
    ``exp(H(s / sum s))`` with the entropy ``H`` of the singular values ``s`` (Roy and Vetterli
    2007), of which Lanczos gives values and multiplicities, see :func:`_measure`.

    :param coefficients: From :func:`lanczos`.

    :returns: Shape ``(k,)``, float64. A zero matrix has effective rank 0.
    """
    items = coefficients.astype(np.float64)
    return np.array([_exp_entropy(*_measure(item)) for item in items])


def stable_rank_of(coefficients: np.ndarray) -> np.ndarray:
    """
    ``|x|_F^2 / s_max^2``, from above.

    :param coefficients: From :func:`lanczos`.

    :returns: Shape ``(k,)``, float64. A zero matrix has stable rank 0.
    """
    return np.array([_stable_rank(_decompose(x)[1]) for x in coefficients.astype(np.float64)])


def effective_rank(x: torch.Tensor) -> np.ndarray:
    """
    ``exp(H(s / sum s))`` of all singular values; synchronises.

    :param x: Shape ``(k, m, n)``.

    :returns: Shape ``(k,)``, float64.
    """
    values = torch.linalg.svdvals(x.double()).cpu().numpy()
    return np.array([_exp_entropy(item, np.ones_like(item)) for item in values])


@full_precision()
def orthogonality_error(x: torch.Tensor) -> torch.Tensor:
    """
    ``|G - I|_F / sqrt(min(m, n))`` with the Gram matrix ``G`` of the short side: for a nearly
    orthogonal matrix, the root mean square of ``s^2 - 1``.

    :param x: Shape ``(k, m, n)``.

    :returns: Shape ``(k,)``, at least float32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    gram = x.mT @ x if x.shape[-2] > x.shape[-1] else x @ x.mT
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.matrix_norm(gram) / gram.shape[-1] ** 0.5


def _blocks(short: int, probes: int, steps: int) -> Tuple[int, int]:
    """Width and number of the blocks: no more than fill the short side."""
    width = min(probes, short)
    return width, min(steps, -(-short // width))


def _reduces(short: int, long: int, size: int) -> bool:
    """Whether it pays to go on with the triangular factor of a wide matrix."""
    reduced = _reduction_flops(short, long) + _iteration_flops(short, short, size)
    return reduced < _iteration_flops(short, long, size)


def _reduction_flops(short: int, long: int) -> int:
    return 2 * short * short * long


def _iteration_flops(short: int, long: int, size: int) -> int:
    # Two products with the matrix; each block is freed twice of all before it, on both sides.
    return 4 * short * long * size + 4 * (short + long) * size * size


def _unit_norm(x: torch.Tensor) -> torch.Tensor:
    """Divided by its Frobenius norm, where no square overflows or is lost; zero stays zero."""
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
    return x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=tiny)


def _next_block(block: torch.Tensor, basis: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """``block = Q R`` without its part in the span of ``basis``."""
    q, r = torch.linalg.qr(block - basis @ (basis.mT @ block))
    # Of a column that was nearly all in the span the rest is rounding, which is not orthogonal to
    # it, and of zero QR makes any unit vector: go on in a direction that is new, or with zero.
    q, again = torch.linalg.qr(q - basis @ (basis.mT @ q))
    fresh = again.diagonal(dim1=-2, dim2=-1).abs() > 0.5
    return q * fresh.unsqueeze(-2), (again * fresh.unsqueeze(-1)) @ r


def _decompose(item: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SVD of the block bidiagonal ``U^T A V`` of one matrix, of shape ``(2, steps, p, p)``."""
    steps, p = item.shape[1:3]
    matrix = np.zeros((steps, p, steps, p))
    for i in range(steps):
        matrix[i, :, i] = item[0, i].T
        if i > 0:
            matrix[i, :, i - 1] = item[1, i]
    return np.linalg.svd(matrix.reshape(steps * p, steps * p))


def _measure(item: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """
    Singular values and how often each is there, the sum of which is the short side.

    The first block measures multiplicities, as in Gauss quadrature: ``b_1^2 |tau|^2`` with the
    first ``p`` entries ``tau`` of the left singular vector. This is right on average, but with a
    relative deviation of ``sqrt(2 / p)``, too much for the few values that matter most. Now of a
    value that the space contains, a block of ``p`` finds all copies, up to ``p``: where it finds
    fewer, each counts once. What is left is scaled to give the two sums that are known, of the
    multiplicities, ``min(m, n)``, and of the squares, 1.
    """
    steps, p = item.shape[1:3]
    left, values, right = _decompose(item)
    weight = item[1, 0, 0, 0] ** 2
    short = weight * p
    measured = weight * (left[:p] ** 2).sum(0)
    if values[0] == 0:
        return values, measured

    # The next beta is not known; the last is as good.
    residual = np.linalg.norm(item[1, -1], 2) * np.linalg.norm(right[:, -p:], axis=-1)
    full = steps * p >= short - 0.5
    there = (measured > ABSENT) & (values > ZERO * values[0])
    there &= (residual < CONVERGED * values) | full
    starts = values[:-1] - values[1:] > EQUAL * values[:-1]
    cluster = np.concatenate([[0], np.cumsum(starts)])
    copies = np.bincount(cluster, weights=there)[cluster]
    once = there & (copies < p)

    rest = np.where(once, 0.0, measured)
    count = max(short - once.sum(), 0.0)
    square = max(1 - (values[once] ** 2).sum(), 0.0)
    return values, np.where(once, 1.0, _with_sums(values, rest, count, square))


def _with_sums(values: np.ndarray, weights: np.ndarray, count: float, square: float) -> np.ndarray:
    """``weights * (a + c values^2)`` with ``sum = count`` and ``sum * values^2 = square``."""
    if weights.sum() == 0:
        return weights
    basis = np.stack([np.ones_like(values), (values / values[0]) ** 2])
    wanted = np.array([count, square / values[0] ** 2])
    weights = weights * (wanted[0] / weights.sum())
    gram = (basis * weights) @ basis.T
    missing = wanted - (basis * weights).sum(1)
    factor = 1 + np.linalg.pinv(gram, rcond=1e-10, hermitian=True) @ missing @ basis
    return weights * factor.clip(min=0)


def _stable_rank(values: np.ndarray) -> float:
    return float(values[0] ** -2) if values[0] > 0 else 0.0


def _exp_entropy(values: np.ndarray, weights: np.ndarray) -> float:
    total = (weights * values).sum()
    if total == 0:
        return 0.0
    share = values[values > 0] / total
    return float(np.exp(-(weights[values > 0] * share * np.log(share)).sum()))
