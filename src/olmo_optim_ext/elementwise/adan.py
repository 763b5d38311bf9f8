"""
Adan (Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
arXiv:2208.06677, algorithm 1), as in the authors' code.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import EngineOptions
from ..engine.elementwise import (
    ElementwiseOptimizer,
    ElementwiseRule,
    Scalar,
    bias_correction,
    first_or,
)
from ..engine.hyperparameters import THREE_BETAS
from ..engine.moments import Beta, Moment

__all__ = ["Adan", "AdanConfig"]

BUFFERS = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "last_grad")


def adan_decay(group: Mapping[str, Any], step: torch.Tensor) -> Scalar:
    """``1 / (1 + lr wd)``, or without the proximal form ``1 - lr wd``."""
    decay = group["lr"] * group["weight_decay"]
    return 1 - decay if group["no_prox"] else 1 / (1 + decay)


def adan_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    beta1, beta2, beta3 = group["betas"]
    # The proximal form shrinks what the update has led to: the update as well.
    lr = group["lr"] if group["no_prox"] else group["lr"] * adan_decay(group, step)
    return (
        lr / bias_correction(beta1, step),
        lr * beta2 / bias_correction(beta2, step),
        bias_correction(beta3, step).rsqrt(),
        first_or(step, 0.0, 1.0),
        group["eps"],
        *(beta1, 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3),
    )


def adan(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_diff: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    last_grad: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    With ``d = g - g_(t-1)``, 0 in the first update: ``m <- b1 m + (1 - b1) g``,
    ``n <- b2 n + (1 - b2) d``, ``v <- b3 v + (1 - b3) (g + b2 d)^2``,
    ``p <- (p - lr (m / (1 - b1^t) + b2 n / (1 - b2^t)) / (sqrt(v / (1 - b3^t)) + eps)) /
    (1 + lr wd)``. The betas are 1 minus the paper's.
    """
    of_m, of_n, rsqrt_correction3, later, eps, *betas = scalars.unbind()
    beta1, rest1, beta2, rest2, beta3, rest3 = betas
    difference = (grad - last_grad) * later
    ahead = grad + difference * beta2
    exp_avg = exp_avg * beta1 + grad * rest1
    exp_avg_diff = exp_avg_diff * beta2 + difference * rest2
    exp_avg_sq = exp_avg_sq * beta3 + ahead * ahead * rest3
    denom = exp_avg_sq.sqrt() * rsqrt_correction3 + eps
    step = (exp_avg * of_m + exp_avg_diff * of_n) / denom
    return step, exp_avg, exp_avg_diff, exp_avg_sq, grad


class Adan(ElementwiseOptimizer):
    """
    Adan. For the arguments see :class:`AdanConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    # The second moment is not of gradients alone.
    rule = ElementwiseRule(
        BUFFERS,
        adan_scalars,
        adan,
        decay=adan_decay,
        moments=(Moment("exp_avg", 1, Beta("betas", 0)),),
    )
    allowed = {"betas": THREE_BETAS}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        **engine: Unpack[EngineOptions],
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_prox=no_prox)
        super().__init__(params, defaults, **engine)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        if group["cautious_weight_decay"] and not group["no_prox"]:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'cautious_weight_decay' is True with 'no_prox' False, "
                "allowed is no_prox: true, as the proximal form shrinks the update, too"
            )


@OptimConfig.register("adan")
@dataclass
class AdanConfig(ExtOptimConfig[Adan]):
    """
    Config of :class:`Adan`. Defaults are those of the authors' code.
    """

    lr: float = 1e-3
    """Learning rate, >= 0."""

    betas: Tuple[float, ...] = (0.98, 0.92, 0.99)
    """
    Decay of the averages of gradients, of their differences, and of squares, three numbers in
    [0, 1). As in the code: the paper's are 1 minus these.
    """

    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment, >= 0."""

    weight_decay: float = 0.0
    """How much of the weights a step takes away, >= 0: see :data:`no_prox`."""

    no_prox: bool = False
    """
    ``False``: the proximal form, a step divides the result by ``1 + lr * weight_decay``. ``True``:
    decoupled, parameters are multiplied by ``1 - lr * weight_decay`` before.
    """

    @classmethod
    def optimizer(cls) -> Type[Adan]:
        return Adan
