"""
The orthogonal polar factor: for ``X = U S V^T``, the matrix ``U V^T``.
"""

from typing import Optional, Tuple

import torch
from olmo_core.config import StrEnum

__all__ = ["PolarMethod", "newton_schulz_flops", "polar", "uses_gram_form"]

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""
Of the quintic ``a x + b x^3 + c x^5``, chosen by Keller Jordan (kellerjordan.github.io/posts/muon)
for the largest slope at zero: five steps bring singular values above 1e-3 or so into about
[0.68, 1.14], not to 1.
"""

NORM_FLOOR = 1e-7
"""Smaller Frobenius norms are not scaled up to 1, as in ``torch.optim.Muon``."""


class PolarMethod(StrEnum):
    """How the polar factor is computed."""

    newton_schulz = "newton_schulz"
    """Quintic Newton-Schulz iteration: matrix products only, singular values near 1."""

    svd = "svd"
    """Exact, by singular value decomposition. Slow; for studies and tests."""


def polar(
    x: torch.Tensor,
    method: PolarMethod = PolarMethod.newton_schulz,
    steps: int = 5,
    dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """
    The orthogonal polar factor of each matrix of a stack. Zero matrices give zero.

    :param x: Shape ``(k, m, n)``.
    :param method: How it is computed.
    :param steps: Newton-Schulz iterations.
    :param dtype: Dtype of the Newton-Schulz products and of its result; default is that of ``x``.

    :returns: Shape ``(k, m, n)``.
    """
    if method == PolarMethod.svd:
        return _exact(x)
    return _newton_schulz(x if dtype is None else x.to(dtype), steps)


def newton_schulz_flops(rows: int, cols: int, steps: int = 5) -> int:
    """
    Floating point operations of the Newton-Schulz iteration on a ``(rows, cols)`` matrix in float32
    or float64: those of the form that needs fewer, see :func:`uses_gram_form`.
    """
    return min(_plain_flops(rows, cols, steps), _gram_flops(rows, cols, steps))


def uses_gram_form(rows: int, cols: int, steps: int, dtype: torch.dtype) -> bool:
    """
    Whether Newton-Schulz iterates on the Gram matrix of a ``(rows, cols)`` matrix and not on the
    matrix: where that needs fewer operations, which from two steps on is beyond an aspect ratio of
    1.5. Never in half precision, in which squared singular values are too coarse.
    """
    if dtype not in (torch.float32, torch.float64):
        return False
    return _gram_flops(rows, cols, steps) < _plain_flops(rows, cols, steps)


def _plain_flops(rows: int, cols: int, steps: int) -> int:
    # A step is the Gram matrix, its square, and the polynomial times the matrix.
    m, n = min(rows, cols), max(rows, cols)
    return steps * (4 * m * m * n + 2 * m * m * m)


def _gram_flops(rows: int, cols: int, steps: int) -> int:
    # The Gram matrix and its polynomial times the matrix once. A step squares the Gram matrix;
    # the first needs no product for Q, the last none of the two for the next Gram matrix.
    m, n = min(rows, cols), max(rows, cols)
    return 4 * m * m * n + 2 * m * m * m * (steps + (steps - 1) + 2 * (steps - 1))


def _exact(x: torch.Tensor) -> torch.Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    u, s, vh = torch.linalg.svd(x.to(work), full_matrices=False)
    # Directions without signal must stay without update.
    cut = s[..., :1] * max(x.shape[-2:]) * torch.finfo(work).eps
    return ((u * (s > cut).unsqueeze(-2)) @ vh).to(x.dtype)


def _newton_schulz(x: torch.Tensor, steps: int) -> torch.Tensor:
    rows, cols = x.shape[-2:]
    form = _gram_form if uses_gram_form(rows, cols, steps, x.dtype) else _plain_form
    # On CPU one matrix at a time is faster than a batch (see plans/engine.md), and 2-D products
    # do not depend on what else is in the stack.
    if x.shape[0] == 1:
        return form(x[0], steps, rows > cols).unsqueeze(0)
    return form(x, steps, rows > cols)


def _plain_form(x: torch.Tensor, steps: int, tall: bool) -> torch.Tensor:
    """
    ``y <- a y + W y`` with ``W = b R + c R^2`` and ``R = y y^T``, from ``y = x / |x|``.

    :param x: Shape ``(m, n)`` or ``(k, m, n)``.
    :param tall: Multiply from the right, with the smaller ``R = y^T y``.
    """
    y, gram, _, scale = _normalise(x, tall)
    y.mul_(scale)
    rest = _rest_of_quintic(gram)
    del gram
    for step in range(steps):
        if step > 0:
            rest = _rest_of_quintic(_gram(y, tall))
        y = _times_quintic(y, rest, right=tall)
        del rest  # or it would lie beside the next Gram matrix
    return y


def _gram_form(x: torch.Tensor, steps: int, tall: bool) -> torch.Tensor:
    """
    The same with all factors collected, which are polynomials of the first ``R``: with
    ``P = a I + W``, ``Q <- P Q`` and ``R <- P R P``, and in the end ``y = Q x / |x|``. Rounding of
    ``R`` grows by ``a^2`` a step where there is little signal: in float32 the result is within
    1e-3 of the plain form's on the worst spectra, and as exact where they are flat.
    """
    y, gram, top, scale = _normalise(x, tall)
    del y
    q = None
    for step in range(steps):
        rest = _rest_of_quintic(gram)
        if step < steps - 1:
            gram = _times_quintic(gram, rest)
            gram = _times_quintic(gram, rest)
        if q is None:
            q = rest
            q.diagonal(dim1=-2, dim2=-1).add_(NEWTON_SCHULZ_COEFFICIENTS[0])
        else:
            q = _times_quintic(q, rest)
    del gram, rest
    assert q is not None
    q.mul_(scale / top)
    return x @ q if tall else q @ x


def _normalise(
    x: torch.Tensor, tall: bool
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    :returns: ``y = x / top`` with ``top`` a power of two near the largest absolute value, so that
        no square of ``y`` overflows and not all underflow; the Gram matrix of ``x / |x|``; and
        ``top`` and ``scale``, with which ``x / |x| = scale y``, of shape ``(1, 1)`` or
        ``(k, 1, 1)``.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    top = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True)).to(work)
    top = top.clamp(min=torch.finfo(work).tiny)
    top = top / (2 * torch.frexp(top).mantissa)  # a power of two divides without rounding
    y = x / top.to(x.dtype)
    gram = _gram(y, tall)
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=work)[..., None, None].sqrt()
    scale = 1 / torch.maximum(norm, NORM_FLOOR / top)
    return y, gram.mul_(scale * scale), top, scale


def _gram(y: torch.Tensor, tall: bool) -> torch.Tensor:
    return y.mT @ y if tall else y @ y.mT


def _rest_of_quintic(gram: torch.Tensor) -> torch.Tensor:
    """``W = b R + c R^2``. The quintic's factor is ``P = a I + W``; rounding the sum would cost."""
    _, b, c = NEWTON_SCHULZ_COEFFICIENTS
    return _add_product(gram, gram, gram, beta=b, alpha=c)


def _times_quintic(y: torch.Tensor, rest: torch.Tensor, right: bool = True) -> torch.Tensor:
    """``y P`` or ``P y``."""
    first, second = (y, rest) if right else (rest, y)
    return _add_product(y, first, second, beta=NEWTON_SCHULZ_COEFFICIENTS[0])


def _add_product(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, beta: float, alpha: float = 1
) -> torch.Tensor:
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    return add_product(x, first, second, beta=beta, alpha=alpha)
