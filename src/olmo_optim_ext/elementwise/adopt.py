"""
ADOPT (Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate",
arXiv:2411.02853, algorithm 2), as in the authors' code.
"""

import math
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence, Tuple, Type

import torch
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import DECOUPLED, EngineOptions
from ..engine.elementwise import (
    ElementwiseOptimizer,
    ElementwiseRule,
    Scalar,
    decoupled_decay,
    first_or,
)
from ..engine.hyperparameters import POSITIVE
from .moments import MOMENTS

__all__ = ["Adopt", "AdoptConfig"]


def adopt_decay(group: Mapping[str, Any], step: torch.Tensor) -> Scalar:
    """``1 - lr wd``, but nothing in the first update, which moves no weight."""
    return first_or(step, 1.0, decoupled_decay(group, step))


def adopt_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    beta1, beta2 = group["betas"]
    exponent = group["clip_exp"]
    limit = first_or(step, 0.0, math.inf if exponent is None else (step - 1).pow(exponent))
    of_square = first_or(step, 1.0, 1 - beta2)
    return group["lr"], limit, group["eps"], beta1, 1 - beta1, beta2, of_square


def adopt(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    The first update is ``v <- g^2`` only. With ``t`` counted from 1 after that, and ``v`` of the
    gradients before: ``n = clip(g / max(sqrt(v), eps), -t^c, t^c)``, ``m <- b1 m + (1 - b1) n``,
    ``p <- (1 - lr wd) p - lr m``, then ``v <- b2 v + (1 - b2) g^2``.
    """
    lr, limit, eps, beta1, rest1, beta2, of_square = scalars.unbind()
    normed = grad / torch.maximum(exp_avg_sq.sqrt(), eps)
    # In the first update the limit is 0.
    normed = torch.maximum(torch.minimum(normed, limit), -limit)
    exp_avg = exp_avg * beta1 + normed * rest1
    return lr * exp_avg, exp_avg, exp_avg_sq * beta2 + grad * grad * of_square


class Adopt(ElementwiseOptimizer):
    """
    ADOPT. For the arguments see :class:`AdoptConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ElementwiseRule(MOMENTS, adopt_scalars, adopt, decay=adopt_decay)
    nullable = frozenset({"clip_exp"})
    allowed = {"eps": POSITIVE}  # the first second moment is 0

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        clip_exp: Optional[float] = 0.25,
        **engine: Unpack[EngineOptions],
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            DECOUPLED: decoupled_weight_decay,
            "clip_exp": clip_exp,
        }
        super().__init__(params, defaults, **engine)


@OptimConfig.register("adopt")
@dataclass
class AdoptConfig(ExtOptimConfig[Adopt]):
    """
    Config of :class:`Adopt`. Defaults are those of the authors' code.
    """

    lr: float = 1e-3
    """Learning rate, >= 0."""

    betas: Tuple[float, ...] = (0.9, 0.9999)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    eps: float = 1e-6
    """The least that a gradient is divided by, > 0."""

    weight_decay: float = 0.0
    """How much of the weights a step takes away, >= 0: see :data:`decoupled_weight_decay`."""

    decoupled_weight_decay: bool = False
    """
    ``False``: L2, ``weight_decay * p`` is added to the gradient, the default of the authors.
    ``True``: a step multiplies parameters by ``1 - lr * weight_decay``.
    """

    clip_exp: Optional[float] = 0.25
    """
    Normed gradients are clipped at ``t^clip_exp``, which has to be >= 0. ``None`` clips nothing, as
    in the paper's first version. timm's is 0.333.
    """

    @classmethod
    def optimizer(cls) -> Type[Adopt]:
        return Adopt
