"""
Averaged gradients and the linear minimisation oracles that need no whole matrix (Pethick et al.,
arXiv:2502.07529): what Scion does with embeddings, the head and vectors.
"""

from typing import Any, Dict, Mapping, Sequence, Tuple

import torch

from ..engine.elementwise import ElementwiseRule, Scalar, WholeSums
from ..engine.moments import Beta, Moment
from ..linalg.norms import EPS, ScionNorm
from .moments import MOMENTUM

__all__ = ["LMO_MOMENTS", "LMO_RULES", "averaged"]


def averaged(grad: torch.Tensor, momentum: torch.Tensor, new: Any, old: Any) -> torch.Tensor:
    """``d <- (1 - a) d + a g``, with ``new = a`` and ``old = 1 - a``."""
    return momentum * old + grad * new


def sign_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    size = group["lr"] * (group["radius"] / group["fan_in"])
    return size, group["momentum"], 1 - group["momentum"]


def sign_update(
    param: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    """``lr radius sign(d) / n_in``."""
    size, new, old = scalars.unbind()
    momentum = averaged(grad, momentum, new, old)
    return size * momentum.sign(), momentum


def rms_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    return group["lr"] * group["radius"], group["momentum"], 1 - group["momentum"]


def sum_of_squares(
    param: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    """``sum(d^2)``, with ``d`` already updated."""
    _, new, old = scalars.unbind()
    return (averaged(grad, momentum, new, old).square().sum(dtype=torch.float64),)


def reciprocal_rms(
    sums: Sequence[torch.Tensor], numel: Scalar, scalars: Sequence[torch.Tensor]
) -> Tuple[torch.Tensor, ...]:
    return (((sums[0] / numel).sqrt() + EPS).reciprocal(),)


def rms_update(
    param: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    """``lr radius d / (rms(d) + eps)``, with the RMS over the whole parameter."""
    size, new, old, scale = scalars.unbind()
    momentum = averaged(grad, momentum, new, old)
    return (size * scale) * momentum, momentum


LMO_MOMENTS = (Moment("momentum", 1, Beta("momentum", new=True), corrected=False),)

LMO_RULES: Dict[str, ElementwiseRule] = {
    str(ScionNorm.sign): ElementwiseRule(MOMENTUM, sign_scalars, sign_update, moments=LMO_MOMENTS),
    str(ScionNorm.rms): ElementwiseRule(
        MOMENTUM,
        rms_scalars,
        rms_update,
        WholeSums(sum_of_squares, reciprocal_rms),
        moments=LMO_MOMENTS,
    ),
}
"""By norm."""
