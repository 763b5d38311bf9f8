"""
Norms of matrices and the extreme points of their unit balls (Pethick et al., arXiv:2502.07529).
"""

import math
from typing import Callable, Dict, Optional

import torch
from olmo_core.config import StrEnum

__all__ = [
    "EPS",
    "NORMALISED",
    "ScionNorm",
    "fill_extreme",
    "normalised_columns",
    "normalised_rows",
    "spectral_scale",
]

EPS = 1e-8
"""Added to the norms of columns, rows and vectors, as in the authors' code."""


class ScionNorm(StrEnum):
    """
    The norm of a parameter, by the linear minimisation oracle: ``-LMO(d)`` minimises ``<d, x>`` on
    the unit ball. ``n_in`` are the inputs of the ``(out, in)`` matrix ``d``.
    """

    spectral = "spectral"
    """``sqrt(out / n_in) polar(d)``."""

    sign = "sign"
    """``sign(d) / n_in``."""

    rms = "rms"
    """``d / rms(d)``, over the whole parameter."""

    column = "column"
    """Each column ``d_j / (rms(d_j) n_in)``."""

    row = "row"
    """Each row ``d_i / (|d_i|_2 sqrt(n_in))``."""


def spectral_scale(n_out: int, n_in: int, at_least_one: bool) -> float:
    """The factor of :data:`ScionNorm.spectral`."""
    scale = math.sqrt(n_out / n_in)
    return max(1.0, scale) if at_least_one else scale


def normalised_columns(d: torch.Tensor, n_in: int) -> torch.Tensor:
    """
    The LMO of :data:`ScionNorm.column`. Zero columns stay zero.

    :param d: Shape ``(..., out, in)``.
    """
    rms = d.square().mean(-2, keepdim=True).sqrt()
    return d / (rms * n_in + EPS)


def normalised_rows(d: torch.Tensor, n_in: int) -> torch.Tensor:
    """
    The LMO of :data:`ScionNorm.row`. Zero rows stay zero.

    :param d: Shape ``(..., out, in)``.
    """
    norm = d.square().sum(-1, keepdim=True).sqrt()
    return d / (norm * math.sqrt(n_in) + EPS)


NORMALISED: Dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    ScionNorm.column: normalised_columns,
    ScionNorm.row: normalised_rows,
}


def fill_extreme(
    x: torch.Tensor,
    norm: str,
    n_in: Optional[int],
    at_least_one: bool,
    generator: torch.Generator,
) -> None:
    """
    Fill a matrix with a random point on the border of the unit ball, with the LMO of a Gaussian.

    :param x: Shape ``(out, in)``.
    :param norm: Any but ``rms``.
    :param n_in: The inputs in the norm; ``None`` for those of the matrix.
    :param at_least_one: Of :func:`spectral_scale`.
    """
    n_in = n_in or x.shape[1]
    drawn = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if norm == ScionNorm.sign:
        drawn.random_(2, generator=generator)
        x.copy_((drawn * 2 - 1) / n_in)
    elif norm == ScionNorm.spectral:
        torch.nn.init.orthogonal_(drawn, generator=generator)
        x.copy_(drawn * spectral_scale(x.shape[0], n_in, at_least_one))
    else:
        x.copy_(NORMALISED[norm](drawn.normal_(generator=generator), n_in))
