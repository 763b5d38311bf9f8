"""
Cautious AdamW (Liang et al., "Cautious Optimizers: Improving Training with One Line of Code",
arXiv:2411.16085), as in the authors' code: AdamW that leaves alone the coordinates in which
momentum and gradient differ in sign, and makes up for them in the others.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import EngineOptions
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar, WholeSums
from ..engine.moments import ADAM_MOMENTS
from .moments import MOMENTS, adam_moments, adam_scalars

__all__ = ["CautiousAdamW", "CautiousAdamWConfig"]


def cautious_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    return *adam_scalars(group, step), group["mask_eps"]


def kept_coordinates(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """How many coordinates have ``m g > 0``, with ``m`` already updated."""
    _, _, _, beta1, rest1, *_ = scalars.unbind()
    exp_avg = exp_avg * beta1 + grad * rest1
    return ((exp_avg * grad > 0).sum(dtype=torch.int32),)


def mask_scale(
    sums: Sequence[torch.Tensor], numel: Scalar, scalars: Sequence[torch.Tensor]
) -> Tuple[torch.Tensor, ...]:
    """``1 / max(mean(mask), mask_eps)``, with the mean over the whole parameter."""
    mask_eps = scalars[-1]
    return (torch.maximum(sums[0] / numel, mask_eps.to(sums[0])).reciprocal(),)


def cautious_adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """
    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, ``mask = [m g > 0]``,
    ``p <- (1 - lr wd) p - lr / (1 - b1^t) * mask / max(mean(mask), mask_eps) *
    m / (sqrt(v / (1 - b2^t)) + eps)``.
    """
    step_size, rsqrt_correction2, eps, *betas, _, scale = scalars.unbind()
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, betas)
    denom = exp_avg_sq.sqrt() * rsqrt_correction2 + eps
    # Not "> 0 else 0": a NaN must show where there is no gate.
    step = torch.where(exp_avg * grad <= 0, 0.0, exp_avg / denom)
    return (step_size * scale) * step, exp_avg, exp_avg_sq


class CautiousAdamW(ElementwiseOptimizer):
    """
    AdamW with a mask. For the arguments see :class:`CautiousAdamWConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ElementwiseRule(
        MOMENTS,
        cautious_scalars,
        cautious_adamw,
        WholeSums(kept_coordinates, mask_scale),
        moments=ADAM_MOMENTS,
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        mask_eps: float = 1e-3,
        **engine: Unpack[EngineOptions],
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, mask_eps=mask_eps)
        super().__init__(params, defaults, **engine)


@OptimConfig.register("cautious_adamw")
@dataclass
class CautiousAdamWConfig(ExtOptimConfig[CautiousAdamW]):
    """
    Config of :class:`CautiousAdamW`. Defaults are those of the authors' ``AdamW``.
    """

    lr: float = 1e-3
    """Learning rate, >= 0."""

    betas: Tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    eps: float = 1e-6
    """Added to the root of the bias-corrected second moment, >= 0."""

    weight_decay: float = 0.0
    """Decoupled: a step multiplies parameters by ``1 - lr * weight_decay``, masked or not. >= 0."""

    mask_eps: float = 1e-3
    """The smallest share of kept coordinates that the others are scaled up for, > 0."""

    @classmethod
    def optimizer(cls) -> Type[CautiousAdamW]:
        return CautiousAdamW
