"""
The orthogonal polar factor: for ``X = U S V^T``, the matrix ``U V^T``.
"""

from typing import Optional

import torch
from olmo_core.config import StrEnum

__all__ = ["PolarMethod", "polar", "newton_schulz_flops"]

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
    """Floating point operations of the Newton-Schulz iteration on a ``(rows, cols)`` matrix."""
    m, n = min(rows, cols), max(rows, cols)
    return steps * (4 * m * m * n + 2 * m * m * m)


def _exact(x: torch.Tensor) -> torch.Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    u, s, vh = torch.linalg.svd(x.to(work), full_matrices=False)
    # Directions without signal must stay without update.
    cut = s[..., :1] * max(x.shape[-2:]) * torch.finfo(work).eps
    return ((u * (s > cut).unsqueeze(-2)) @ vh).to(x.dtype)


def _newton_schulz(x: torch.Tensor, steps: int) -> torch.Tensor:
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix is the smaller of the two
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_norm_dtype(x))
    x = x / norm.clamp(min=NORM_FLOOR).to(x.dtype)
    # On CPU one matrix at a time is faster than a batch (see plans/engine.md), and 2-D products
    # do not depend on what else is in the stack.
    if x.shape[0] == 1:
        y = x[0]
        for _ in range(steps):
            gram = y @ y.mT
            y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        x = y.unsqueeze(0)
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _norm_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
