"""
What optimizers for matrices report of a step: on the device, without a sync, a few tensors for each
matrix; on the host, later, the numbers that they stand for.
"""

from typing import Dict, Mapping

import numpy as np
import torch

from ..engine.matrix import Owned
from ..engine.random import random_signs
from ..linalg.spectrum import PROBES, lanczos, orthogonality_error, ranks_of

__all__ = [
    "FAILED",
    "has_failed",
    "orthogonal_report",
    "thin_report",
    "to_numbers",
    "update_rms",
]

SPECTRUM, GRAM = "spectrum", "gram"
FAILED = "failed orthogonalisations"

LARGEST = 1.5
"""
Root mean square of the singular values beyond which an orthogonalisation has diverged: iterations
of all methods leave them below 1.25, and rows of like size do not change their sum of squares.
"""

STEPS = 16
"""Of Lanczos: half of what its module takes, in an eighth of the time on the host."""


def orthogonal_report(
    owned: Owned, updates: torch.Tensor, scale: float, seed: int
) -> Dict[str, torch.Tensor]:
    """
    Of matrices ``x`` and of what an orthogonalisation made of them.

    :param updates: Shape ``(k, out, in)``, before :paramref:`scale`.
    """
    shape = (min(owned.x.shape[-2:]), PROBES)
    probes = [random_signs(shape, seed, owned.call, n, "report", owned.x) for n in owned.names]
    return {
        SPECTRUM: lanczos(owned.x, torch.stack(probes), STEPS),
        "orthogonality error": orthogonality_error(updates),
        "update RMS": update_rms(updates, scale),
        FAILED: has_failed(owned.x, updates).float(),
    }


def has_failed(x: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """
    Whether an orthogonalisation gave what it cannot: something that is not finite, zero of a matrix
    that is not, or singular values far above 1. ``(k,)``.

    :param updates: Shape ``(k, m, n)``, like ``x``.
    """
    norm = torch.linalg.matrix_norm(updates.to(torch.promote_types(updates.dtype, torch.float32)))
    vanished = (norm == 0) & x.ne(0).any(-1).any(-1)
    return vanished | ~(norm <= LARGEST * min(x.shape[-2:]) ** 0.5)


def update_rms(updates: torch.Tensor, scale: float) -> torch.Tensor:
    """Of the elements of each matrix of ``scale * updates``."""
    return updates.float().square().mean((-2, -1)).sqrt() * scale


def thin_report(
    gram: torch.Tensor, lengths: torch.Tensor, n_out: int, n_in: int, scale: float
) -> Dict[str, torch.Tensor]:
    """
    Of an update ``P V^T`` with orthonormal ``P``, where ``R = B^T P``, and ``V`` is ``R`` with its
    columns divided by their lengths.

    :param gram: ``R^T R``, ``(r, r)``.
    :param lengths: By which columns were divided, ``(r,)``.
    """
    gram_of_v = gram / lengths / lengths.unsqueeze(-1)
    error = gram_of_v - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    square = gram_of_v.diagonal().sum()
    return {
        GRAM: gram,
        "orthogonality error": torch.linalg.matrix_norm(error) / len(gram) ** 0.5,
        "update RMS": (square / (n_out * n_in)).sqrt() * scale,
    }


def to_numbers(report: Mapping[str, np.ndarray]) -> Dict[str, float]:
    """
    The report of one matrix as numbers: ``effective rank`` (exp of the entropy of the singular
    values over their sum), ``stable rank`` (``|x|_F^2 / |x|_2^2``), and what else is in it. Of thin
    factors these are of what they capture of the matrix. Host code.
    """
    out: Dict[str, float] = {}
    if SPECTRUM in report:
        effective, stable = ranks_of(report[SPECTRUM][None])
        out["effective rank"], out["stable rank"] = float(effective[0]), float(stable[0])
    if GRAM in report:
        squares = np.linalg.eigvalsh(report[GRAM].astype(np.float64)).clip(min=0)
        values = np.sqrt(squares)
        share = values[values > 0] / max(values.sum(), np.finfo(np.float64).tiny)
        out["effective rank"] = float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0
        out["stable rank"] = float(squares.sum() / squares[-1]) if squares[-1] > 0 else 0.0
    others = {key: float(value) for key, value in report.items() if key not in (SPECTRUM, GRAM)}
    return {**out, **others}
