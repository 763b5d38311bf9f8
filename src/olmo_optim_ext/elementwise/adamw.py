"""
AdamW (Loshchilov & Hutter, arXiv:1711.05101, algorithm 2), in the form of ``torch.optim.AdamW``.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.optim import OptimConfig

from ..config import ExtOptimConfig
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar, bias_correction

__all__ = ["ADAMW", "AdamW", "AdamWConfig"]


def adamw_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    return (
        1 - lr * group["weight_decay"],
        lr / bias_correction(beta1, step),
        bias_correction(beta2, step).rsqrt(),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        group["eps"],
    )


def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``p <- (1 - lr wd) p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)``.
    """
    decay, step_size, rsqrt_correction2, beta1, rest1, beta2, rest2, eps = scalars.unbind()
    exp_avg = exp_avg * beta1 + grad * rest1
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * rest2
    denom = exp_avg_sq.sqrt() * rsqrt_correction2 + eps
    return param * decay - step_size * (exp_avg / denom), exp_avg, exp_avg_sq


ADAMW = ElementwiseRule(("exp_avg", "exp_avg_sq"), adamw_scalars, adamw)


class AdamW(ElementwiseOptimizer):
    """
    AdamW with decoupled weight decay. For the arguments see :class:`AdamWConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ADAMW

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        compile: bool = False,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, compile=compile)


@OptimConfig.register("ext_adamw")
@dataclass
class AdamWConfig(ExtOptimConfig[AdamW]):
    """
    Config of :class:`AdamW`. Defaults are those of ``torch.optim.AdamW``.
    """

    lr: float = 1e-3
    """Learning rate, >= 0."""

    betas: Tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment, >= 0."""

    weight_decay: float = 1e-2
    """Decoupled: a step multiplies parameters by ``1 - lr * weight_decay``. >= 0."""

    @classmethod
    def optimizer(cls) -> Type[AdamW]:
        return AdamW
