"""
What rules with Adam's two moments share.
"""

from typing import Any, Mapping, Sequence, Tuple

import torch

from ..engine.elementwise import Scalar, bias_correction

__all__ = ["MOMENTS", "adam_scalars", "adam_moments"]

MOMENTS = ("exp_avg", "exp_avg_sq")


def adam_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    """
    ``lr / (1 - b1^t)``, ``1 / sqrt(1 - b2^t)``, ``eps``, ``b1``, ``1 - b1``, ``b2``, ``1 - b2``.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    return (
        lr / bias_correction(beta1, step),
        bias_correction(beta2, step).rsqrt(),
        group["eps"],
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
    )


def adam_moments(
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    betas: Sequence[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    ``m <- b1 m + (1 - b1) g`` and ``v <- b2 v + (1 - b2) g^2``.

    :param betas: ``b1``, ``1 - b1``, ``b2``, ``1 - b2``.
    """
    beta1, rest1, beta2, rest2 = betas
    return exp_avg * beta1 + grad * rest1, exp_avg_sq * beta2 + grad * grad * rest2
