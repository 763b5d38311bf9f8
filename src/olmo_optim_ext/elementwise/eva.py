"""
EVA, "exponential moving average with variance adaptation": Adam with a factor for each tensor that
shrinks as its gradient's elements spread. It is the rule of the crate trustformers-optim
(``src/eva.rs``) and has no paper; Eva (Zhang et al., ICLR 2023) is another method.
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
    WholeSums,
)
from ..engine.moments import ADAM_MOMENTS
from .moments import MOMENTS, adam_scalars, adam_update

__all__ = ["Eva", "EvaConfig"]


def eva_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    return *adam_scalars(group, step), group["adaptation_strength"]


def sums_of_gradient(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """``sum(g)`` and ``sum(g^2)``, of the gradient without weight decay."""
    wide = grad.to(torch.float64)  # the variance is a difference of what follows
    return grad.sum(dtype=torch.float64), (wide * wide).sum()


def variance_factor(
    sums: Sequence[torch.Tensor], numel: Scalar, scalars: Sequence[torch.Tensor]
) -> Tuple[torch.Tensor, ...]:
    """
    ``clamp(1 / (1 + strength sqrt(Var(g) + eps)), 0.1, 2)``, with the variance of the elements of
    the whole parameter.
    """
    mean, mean_square = (x / numel for x in sums)
    _, _, eps, *_, strength = (x.to(mean) for x in scalars)
    variance = (mean_square - mean * mean).clamp(min=0)
    return ((1 + strength * (variance + eps).sqrt()).reciprocal().clamp(0.1, 2.0),)


def eva(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    ``g <- g + wd p``, ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``p <- p - f lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)`` with ``f`` of
    :func:`variance_factor`.
    """
    *of_adam, _, factor = scalars.unbind()
    step, exp_avg, exp_avg_sq = adam_update(param, grad, exp_avg, exp_avg_sq, torch.stack(of_adam))
    return factor * step, exp_avg, exp_avg_sq


class Eva(ElementwiseOptimizer):
    """
    EVA. For the arguments see :class:`EvaConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ElementwiseRule(
        MOMENTS,
        eva_scalars,
        eva,
        WholeSums(sums_of_gradient, variance_factor, raw_gradient=True),
        moments=ADAM_MOMENTS,
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decoupled_weight_decay: bool = False,
        adaptation_strength: float = 1.0,
        **engine: Unpack[EngineOptions],
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            DECOUPLED: decoupled_weight_decay,
            "adaptation_strength": adaptation_strength,
        }
        super().__init__(params, defaults, **engine)


@OptimConfig.register("eva")
@dataclass
class EvaConfig(ExtOptimConfig[Eva]):
    """
    Config of :class:`Eva`. Defaults are those of trustformers-optim.
    """

    lr: float = 1e-3
    """Learning rate, >= 0."""

    betas: Tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment, and to the variance. >= 0."""

    weight_decay: float = 0.01
    """How much of the weights a step takes away, >= 0: see :data:`decoupled_weight_decay`."""

    decoupled_weight_decay: bool = False
    """
    ``False``: L2, ``weight_decay * p`` is added to the gradient. ``True``: a step multiplies
    parameters by ``1 - lr * weight_decay``.
    """

    adaptation_strength: float = 1.0
    """
    How much the spread of a gradient shrinks the step, >= 0. For the small gradients of language
    models the factor is close to 1, and this is Adam.
    """

    @classmethod
    def optimizer(cls) -> Type[Eva]:
        return Eva
