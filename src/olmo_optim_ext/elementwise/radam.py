"""
RAdam (Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", arXiv:1908.03265,
algorithm 2), in the form of ``torch.optim.RAdam``.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import DECOUPLED, EngineOptions
from ..engine.elementwise import (
    ElementwiseOptimizer,
    ElementwiseRule,
    Scalar,
    bias_correction,
)
from ..engine.moments import ADAM_MOMENTS
from .moments import MOMENTS, adam_moments

__all__ = ["RAdam", "RAdamConfig"]


def radam_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    """
    ``lr / (1 - b1^t)``; then factor and summand of the denominator ``a (sqrt(v) + eps) + b``. With
    ``rho_inf = 2 / (1 - b2) - 1`` and ``rho_t = rho_inf - 2 t b2^t / (1 - b2^t)``: for
    ``rho_t > 5``, ``a = 1 / (r_t sqrt(1 - b2^t))`` and ``b = 0``, where ``r_t = sqrt((rho_t - 4)
    (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))``; else ``a = 0`` and ``b = 1``.
    """
    lr, (beta1, beta2) = group["lr"], group["betas"]
    t = step.double()  # rho_t is a small difference of large numbers
    correction2 = bias_correction(beta2, t)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * (1 - correction2) / correction2
    known = rho > 5
    safe = torch.where(known, rho, 5.0)
    rectified = (safe - 4) * (safe - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * safe)
    factor = torch.where(known, (rectified * correction2).rsqrt(), 0.0)
    summand = torch.where(known, 0.0, 1.0)
    rest = (group["eps"], beta1, 1 - beta1, beta2, 1 - beta2)
    return lr / bias_correction(beta1, t), factor, summand, *rest


def radam(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``p <- p - lr / (1 - b1^t) * m * r_t sqrt(1 - b2^t) / (sqrt(v) + eps)``, or without the factors
    after ``m`` as long as the variance of ``1 / sqrt(v)`` is not known.
    """
    step_size, factor, summand, eps, *betas = scalars.unbind()
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, betas)
    denom = (exp_avg_sq.sqrt() + eps) * factor + summand
    return step_size * (exp_avg / denom), exp_avg, exp_avg_sq


class RAdam(ElementwiseOptimizer):
    """
    RAdam. For the arguments see :class:`RAdamConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ElementwiseRule(MOMENTS, radam_scalars, radam, moments=ADAM_MOMENTS)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **engine: Unpack[EngineOptions],
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            DECOUPLED: decoupled_weight_decay,
        }
        super().__init__(params, defaults, **engine)


@OptimConfig.register("radam")
@dataclass
class RAdamConfig(ExtOptimConfig[RAdam]):
    """
    Config of :class:`RAdam`. Defaults are those of ``torch.optim.RAdam``.
    """

    lr: float = 1e-3
    """
    Learning rate, >= 0. The first steps, five with ``b2`` = 0.999, are not divided by ``sqrt(v)``.
    """

    betas: Tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    eps: float = 1e-8
    """Added to the root of the second moment before its bias correction, >= 0."""

    weight_decay: float = 0.0
    """How much of the weights a step takes away, >= 0: see :data:`decoupled_weight_decay`."""

    decoupled_weight_decay: bool = False
    """
    ``False``: L2, ``weight_decay * p`` is added to the gradient, as in torch. ``True``: a step
    multiplies parameters by ``1 - lr * weight_decay``, as in the authors' code.
    """

    @classmethod
    def optimizer(cls) -> Type[RAdam]:
        return RAdam
