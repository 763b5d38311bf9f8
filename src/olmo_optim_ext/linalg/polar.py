"""
The orthogonal polar factor: for ``X = U S V^T``, the matrix ``U V^T``.
"""

from typing import Dict, List, Optional, Set, Tuple

import torch
from olmo_core.config import StrEnum

__all__ = [
    "PolarForm",
    "PolarMethod",
    "cubic_steps",
    "newton_schulz_flops",
    "polar",
    "uses_gram_form",
]

NORM_FLOOR = 1e-7
"""Smaller Frobenius norms are not scaled up to 1, as in ``torch.optim.Muon``."""

POLAR_EXPRESS_SAFETY = 1.01
"""
By which Polar Express (arXiv:2505.16932, appendix G) divides the argument of all polynomials but
the last of its list, and the matrix once more: rounding must not leave the interval they are for.
"""


class PolarMethod(StrEnum):
    """
    How the polar factor is computed. All but ``svd`` are matrix products only: each step takes the
    singular values through an odd polynomial ``a s + b s^3 + c s^5``.
    """

    newton_schulz = "newton_schulz"
    """
    The same quintic in each step, chosen by Keller Jordan (kellerjordan.github.io/posts/muon) for
    the largest slope at zero: five steps bring singular values above 1e-3 of the norm or so into
    about [0.68, 1.14], not to 1.
    """

    newton_schulz_tuned = "newton_schulz_tuned"
    """
    One quintic for each of five steps, found by YouJiacheng (modded-nanogpt): singular values of a
    random matrix end in about [0.97, 1.04]. Further steps repeat the last and do not converge to 1.
    """

    polar_express = "polar_express"
    """
    Polar Express, arXiv:2505.16932: the quintics whose composition is the best on [1e-3, 1], with
    the paper's safety factor. Five steps bring singular values above 1e-3 of the norm into about
    [0.85, 1.12], eight to 1.
    """

    cubic = "cubic"
    """``1.5 s - 0.5 s^3``: a step is cheaper and converges to 1, but small values grow slowly."""

    svd = "svd"
    """Exact, by singular value decomposition. Slow; for studies and tests."""


class PolarForm(StrEnum):
    """In which form the steps are computed. They differ in cost and rounding only."""

    auto = "auto"
    """Gram where it needs fewer operations, plain in half precision."""

    plain = "plain"
    """On the matrix."""

    gram = "gram"
    """On its Gram matrix, applied to the matrix every few steps."""


Coefficients = Tuple[float, float, float]

COEFFICIENTS: Dict[PolarMethod, List[Coefficients]] = {
    PolarMethod.newton_schulz: [(3.4445, -4.7750, 2.0315)],
    PolarMethod.newton_schulz_tuned: [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    PolarMethod.polar_express: [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ],
    PolarMethod.cubic: [(1.5, -0.5, 0.0)],
}
"""Of each step ``a s + b s^3 + c s^5``; steps beyond the list repeat its last entry."""


def polar(
    x: torch.Tensor,
    method: PolarMethod = PolarMethod.newton_schulz,
    steps: int = 5,
    dtype: Optional[torch.dtype] = None,
    form: PolarForm = PolarForm.auto,
) -> torch.Tensor:
    """
    The orthogonal polar factor of each matrix of a stack. Zero matrices give zero.

    :param x: Shape ``(k, m, n)``.
    :param method: How it is computed.
    :param steps: Iterations; ``svd`` has none.
    :param dtype: Dtype of the iteration's products and of its result; default is that of ``x``.
    :param form: In which form the iteration is computed.

    :returns: Shape ``(k, m, n)``.
    """
    if method == PolarMethod.svd:
        return _exact(x)
    return _newton_schulz(x if dtype is None else x.to(dtype), method, steps, form)


def cubic_steps(x: torch.Tensor, steps: int) -> torch.Tensor:
    """
    ``y <- 1.5 y - 0.5 y y^T y``, ``steps`` times from ``y = x / |x|_F``, of each matrix of a stack.
    Zero matrices give zero.

    The norm comes first because the iteration diverges from singular values beyond ``sqrt(5)``.

    :param x: Shape ``(k, m, n)``.

    :returns: Shape ``(k, m, n)``.
    """
    return polar(x, PolarMethod.cubic, steps)


def newton_schulz_flops(
    rows: int,
    cols: int,
    steps: int = 5,
    method: PolarMethod = PolarMethod.newton_schulz,
    form: PolarForm = PolarForm.auto,
) -> int:
    """
    Floating point operations of :func:`polar` on a ``(rows, cols)`` matrix in float32 or float64.
    Of ``svd`` an estimate (Golub and Van Loan, Matrix Computations, section 8.6).
    """
    if method == PolarMethod.svd:
        m, n = min(rows, cols), max(rows, cols)
        return 6 * m * m * n + 20 * m * m * m + 2 * m * m * n
    in_gram_form = uses_gram_form(rows, cols, steps, torch.float32, method, form)
    flops = _gram_flops if in_gram_form else _plain_flops
    return flops(rows, cols, _coefficients(method, steps))


def uses_gram_form(
    rows: int,
    cols: int,
    steps: int,
    dtype: torch.dtype,
    method: PolarMethod = PolarMethod.newton_schulz,
    form: PolarForm = PolarForm.auto,
) -> bool:
    """
    Whether :func:`polar` iterates on the Gram matrix of a ``(rows, cols)`` matrix and not on the
    matrix. With ``PolarForm.auto`` where that needs fewer operations, which from two steps on is
    beyond an aspect ratio of 1.5, whatever the method; never in half precision.
    """
    if method == PolarMethod.svd or form == PolarForm.plain or steps < 1:
        return False
    if form == PolarForm.gram:
        return True
    if dtype not in (torch.float32, torch.float64):
        return False
    coefficients = _coefficients(method, steps)
    return _gram_flops(rows, cols, coefficients) < _plain_flops(rows, cols, coefficients)


def _coefficients(method: PolarMethod, steps: int) -> List[Coefficients]:
    listed = COEFFICIENTS[method]
    if method == PolarMethod.polar_express:
        safety = POLAR_EXPRESS_SAFETY
        listed = [(a / safety, b / safety**3, c / safety**5) for a, b, c in listed[:-1]]
        listed.append(COEFFICIENTS[method][-1])
    return [listed[min(step, len(listed) - 1)] for step in range(steps)]


def _segment_ends(coefficients: List[Coefficients], dtype: torch.dtype) -> Set[int]:
    """
    After how many steps the Gram form applies what it has collected. Rounding of the Gram matrix
    grows by ``a^2`` a step where there is little signal, until it is computed anew. In bfloat16
    three steps without that can diverge; six of the cubic, with its small ``a``, lose nothing.
    """
    steps = len(coefficients)
    if all(c == 0 for _, _, c in coefficients):
        return {*range(6, steps, 6), steps}
    if dtype in (torch.float32, torch.float64):
        return {*range(2, steps, 3), steps}
    return {*range(2, steps, 2), steps}


def _plain_flops(rows: int, cols: int, coefficients: List[Coefficients]) -> int:
    # A step is the Gram matrix, its square unless c is 0, and the polynomial times the matrix.
    m, n = min(rows, cols), max(rows, cols)
    squares = sum(c != 0 for _, _, c in coefficients)
    return len(coefficients) * 4 * m * m * n + 2 * m * m * m * squares


def _gram_flops(rows: int, cols: int, coefficients: List[Coefficients]) -> int:
    # A segment is the Gram matrix and its polynomial times the matrix. A step squares the Gram
    # matrix unless c is 0; the first of a segment needs no product for Q, the last none of the two
    # for the next Gram matrix. So a segment saves 4 m^2 n and costs 6 m^3 for each step but one.
    m, n = min(rows, cols), max(rows, cols)
    squares = sum(c != 0 for _, _, c in coefficients)
    segments = len(_segment_ends(coefficients, torch.float32))
    products = squares + 3 * (len(coefficients) - segments)
    return segments * 4 * m * m * n + 2 * m * m * m * products


def _exact(x: torch.Tensor) -> torch.Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    u, s, vh = torch.linalg.svd(x.to(work), full_matrices=False)
    # Directions without signal must stay without update.
    cut = s[..., :1] * max(x.shape[-2:]) * torch.finfo(work).eps
    return ((u * (s > cut).unsqueeze(-2)) @ vh).to(x.dtype)


def _newton_schulz(
    x: torch.Tensor, method: PolarMethod, steps: int, form: PolarForm
) -> torch.Tensor:
    rows, cols = x.shape[-2:]
    in_gram_form = uses_gram_form(rows, cols, steps, x.dtype, method, form)
    iterate = _gram_form if in_gram_form else _plain_form
    coefficients = _coefficients(method, steps)
    margin = POLAR_EXPRESS_SAFETY if method == PolarMethod.polar_express else 1.0
    # On CPU one matrix at a time is faster than a batch (see plans/engine.md), and 2-D products
    # do not depend on what else is in the stack.
    if x.shape[0] == 1:
        return iterate(x[0], coefficients, margin, rows > cols).unsqueeze(0)
    return iterate(x, coefficients, margin, rows > cols)


def _plain_form(
    x: torch.Tensor, coefficients: List[Coefficients], margin: float, tall: bool
) -> torch.Tensor:
    """
    ``y <- a y + W y`` with ``W = b R + c R^2`` and ``R = y y^T``, from ``y = x / (margin |x|)``.

    :param x: Shape ``(m, n)`` or ``(k, m, n)``.
    :param coefficients: ``(a, b, c)`` of each step.
    :param tall: Multiply from the right, with the smaller ``R = y^T y``.
    """
    gram: Optional[torch.Tensor]
    y, gram, _, scale = _normalise(x, margin, tall)
    y.mul_(scale)
    for a, b, c in coefficients:
        if gram is None:
            gram = _gram(y, tall)
        rest = _rest(gram, b, c)
        gram = None
        y = _times(y, rest, a, right=tall)
        del rest  # or it would lie beside the next Gram matrix
    return y


def _gram_form(
    x: torch.Tensor, coefficients: List[Coefficients], margin: float, tall: bool
) -> torch.Tensor:
    """
    The same with the factors of a few steps collected, which are polynomials of the first ``R``:
    with ``P = a I + W``, ``Q <- P Q`` and ``R <- P R P``, and then ``y <- Q y`` and a new ``R``.
    The restart is that of Gram Newton-Schulz (dao-ailab.github.io/blog/2026/gram-newton-schulz):
    at condition numbers of 1e3 to 1e6 float32 is off by up to 3e-3 after five steps without it and
    by 4e-5 with it, the plain form by 1e-5. Half precision restarts more often and is then off by
    up to 0.4 in bfloat16 and 0.06 in float16, as its plain form is; on random matrices by
    up to 0.05 and 7e-3, at most about twice as much as the plain form.
    """
    gram: Optional[torch.Tensor]
    factor: Optional[torch.Tensor]
    y, gram, top, scale = _normalise(x, margin, tall)
    if x.dtype in (torch.float32, torch.float64):
        # Q can take the scale, and then nothing as large as x lies beside the first Gram matrices.
        y, factor = x, scale / top
    else:
        y.mul_(scale)  # in float16 Q has not the range for it
        factor = None
    ends = _segment_ends(coefficients, x.dtype)
    q: Optional[torch.Tensor] = None
    for step, (a, b, c) in enumerate(coefficients, 1):
        if gram is None:
            gram = _gram(y, tall)
        rest = _rest(gram, b, c)
        if step not in ends:
            gram = _times(gram, rest, a)
            gram = _times(gram, rest, a)
        if q is None:
            q = rest
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = _times(q, rest, a)
        del rest
        if step in ends:
            gram = None
            if factor is not None:
                q.mul_(factor)
                factor = None
            y = y @ q if tall else q @ y
            q = None
    return y


def _normalise(
    x: torch.Tensor, margin: float, tall: bool
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    :returns: ``y = x / top`` with ``top`` a power of two near the largest absolute value, so that
        no square of ``y`` overflows and not all underflow; the Gram matrix of
        ``x / (margin |x|)``; and ``top`` and ``scale``, with which that is ``scale y``, of shape
        ``(1, 1)`` or ``(k, 1, 1)``.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    top = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True)).to(work)
    top = top.clamp(min=torch.finfo(work).tiny)
    top = top / (2 * torch.frexp(top).mantissa)  # a power of two divides without rounding
    y = x / top.to(x.dtype)
    gram = _gram(y, tall)
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=work)[..., None, None].sqrt()
    scale = 1 / (margin * torch.maximum(norm, NORM_FLOOR / top))
    return y, gram.mul_(scale * scale), top, scale


def _gram(y: torch.Tensor, tall: bool) -> torch.Tensor:
    return y.mT @ y if tall else y @ y.mT


def _rest(gram: torch.Tensor, b: float, c: float) -> torch.Tensor:
    """``W = b R + c R^2``. The step's factor is ``P = a I + W``; rounding the sum would cost."""
    if c == 0:
        return gram * b
    return _add_product(gram, gram, gram, beta=b, alpha=c)


def _times(y: torch.Tensor, rest: torch.Tensor, a: float, right: bool = True) -> torch.Tensor:
    """``y P`` or ``P y``."""
    first, second = (y, rest) if right else (rest, y)
    return _add_product(y, first, second, beta=a)


def _add_product(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, beta: float, alpha: float = 1
) -> torch.Tensor:
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    return add_product(x, first, second, beta=beta, alpha=alpha)
