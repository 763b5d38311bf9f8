"""
LAMB (You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
arXiv:1904.00962, algorithm 2), as in timm and optax.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import EngineOptions
from ..engine.elementwise import (
    ElementwiseOptimizer,
    ElementwiseRule,
    Scalar,
    WholeSums,
    bias_correction,
    no_decay,
)
from ..engine.moments import ADAM_MOMENTS
from .moments import MOMENTS, adam_moments, adapts

__all__ = ["Lamb", "LambConfig"]


def lamb_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    beta1, beta2 = group["betas"]
    return (
        *(group["lr"], adapts(group), group["weight_decay"]),
        bias_correction(beta1, step).reciprocal(),
        bias_correction(beta2, step).rsqrt(),
        *(group["eps"], beta1, 1 - beta1, beta2, 1 - beta2),
    )


def _direction(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: Sequence[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``r = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p``, and the new moments."""
    weight_decay, of_m, rsqrt_correction2, eps, *betas = scalars
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, betas)
    denom = exp_avg_sq.sqrt() * rsqrt_correction2 + eps
    return of_m * (exp_avg / denom) + param * weight_decay, exp_avg, exp_avg_sq


def sums_of_squares(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """``sum(p^2)`` and ``sum(r^2)``."""
    _, _, *rest = scalars.unbind()
    direction, _, _ = _direction(param, grad, exp_avg, exp_avg_sq, rest)
    return (param * param).sum(dtype=torch.float64), (direction * direction).sum(
        dtype=torch.float64
    )


def trust_ratio(
    sums: Sequence[torch.Tensor], numel: Scalar, scalars: Sequence[torch.Tensor]
) -> Tuple[torch.Tensor, ...]:
    """``||p|| / ||r||``, 1 where either is 0 or the parameter does not adapt."""
    of_param, of_direction = sums
    one = (of_param == 0) | (of_direction == 0) | (scalars[1] == 0)
    return (torch.where(one, 1.0, of_param.sqrt() / of_direction.sqrt()),)


def lamb(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``r = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p``, ``p <- p - lr ||p|| / ||r|| r``,
    with norms over the whole parameter.
    """
    lr, _, *rest, ratio = scalars.unbind()
    direction, exp_avg, exp_avg_sq = _direction(param, grad, exp_avg, exp_avg_sq, rest)
    return (lr * ratio) * direction, exp_avg, exp_avg_sq


class Lamb(ElementwiseOptimizer):
    """
    LAMB. For the arguments see :class:`LambConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ElementwiseRule(
        MOMENTS,
        lamb_scalars,
        lamb,
        WholeSums(sums_of_squares, trust_ratio),
        decay=no_decay,
        moments=ADAM_MOMENTS,
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        always_adapt: bool = False,
        **engine: Unpack[EngineOptions],
    ):
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, always_adapt=always_adapt
        )
        super().__init__(params, defaults, **engine)


@OptimConfig.register("lamb")
@dataclass
class LambConfig(ExtOptimConfig[Lamb]):
    """
    Config of :class:`Lamb`. Defaults are those of timm, without its clipping of the gradients,
    which is the trainer's.
    """

    lr: float = 1e-3
    """
    Learning rate, >= 0: how much of its norm a parameter moves in a step, where it adapts; else
    Adam's.
    """

    betas: Tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    eps: float = 1e-6
    """Added to the root of the bias-corrected second moment, >= 0."""

    weight_decay: float = 0.01
    """Part of the direction whose norm is divided by: ``r`` has ``weight_decay * p``. >= 0."""

    always_adapt: bool = False
    """
    Whether parameters without weight decay have their ratio of norms, too, as in the paper and
    optax; if not, theirs is 1, as in timm.
    """

    @classmethod
    def optimizer(cls) -> Type[Lamb]:
        return Lamb
