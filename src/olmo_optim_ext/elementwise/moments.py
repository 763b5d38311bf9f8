"""
What rules with Adam's two moments share, those with one momentum, and those that may adapt.
"""

from typing import Any, Mapping, Sequence, Tuple

import torch

from ..engine.elementwise import ElementwiseRule, Scalar, bias_correction, first_or
from ..engine.moments import ADAM_MOMENTS

__all__ = [
    "ADAM",
    "MOMENTS",
    "MOMENTUM",
    "adam_moments",
    "adam_scalars",
    "adam_update",
    "adapts",
    "heavy_ball",
    "heavy_ball_scalars",
]

MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = ("momentum",)


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


def adam_update(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """``lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)``."""
    step_size, rsqrt_correction2, eps, *betas = scalars.unbind()
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, betas)
    denom = exp_avg_sq.sqrt() * rsqrt_correction2 + eps
    return step_size * (exp_avg / denom), exp_avg, exp_avg_sq


ADAM = ElementwiseRule(MOMENTS, adam_scalars, adam_update, moments=ADAM_MOMENTS)


def heavy_ball_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    """What :func:`heavy_ball` needs: of ``momentum``, ``dampening`` and ``nesterov``."""
    mu = group["momentum"]
    # As in torch, without momentum there is no dampening.
    new = first_or(step, 1.0, 1 - group["dampening"]) if mu != 0 else 1.0
    return (mu, new, mu, 1.0) if group["nesterov"] else (mu, new, 1.0, 0.0)


def heavy_ball(
    grad: torch.Tensor, momentum: torch.Tensor, scalars: Sequence[torch.Tensor]
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    ``u <- mu u + (1 - dampening) g``, without dampening in the first update, as in
    ``torch.optim.SGD``.

    :returns: ``u``, or ``g + mu u`` with Nesterov's momentum; and ``u``.
    """
    mu, new, of_momentum, of_grad = scalars
    momentum = momentum * mu + grad * new
    return momentum * of_momentum + grad * of_grad, momentum


def adapts(group: Mapping[str, Any]) -> float:
    """1 if parameters of the group have a ratio of norms, 0 if theirs is 1."""
    return float(group["weight_decay"] != 0 or group["always_adapt"])
