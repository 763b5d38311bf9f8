"""
Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675, algorithm 2).
"""

from dataclasses import dataclass
from typing import Any, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import EngineOptions
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar
from ..engine.moments import Beta, Moment

__all__ = ["Lion", "LionConfig"]


def lion_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    beta1, beta2 = group["betas"]
    return group["lr"], beta1, 1 - beta1, beta2, 1 - beta2


def lion(
    param: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    """
    ``p <- (1 - lr wd) p - lr sign(b1 m + (1 - b1) g)``, then ``m <- b2 m + (1 - b2) g``.
    """
    lr, beta1, rest1, beta2, rest2 = scalars.unbind()
    step = lr * (exp_avg * beta1 + grad * rest1).sign()
    return step, exp_avg * beta2 + grad * rest2


class Lion(ElementwiseOptimizer):
    """
    Lion. For the arguments see :class:`LionConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ElementwiseRule(
        ("exp_avg",),
        lion_scalars,
        lion,
        moments=(Moment("exp_avg", 1, Beta("betas", 1), corrected=False),),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Tuple[float, ...] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **engine: Unpack[EngineOptions],
    ):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), **engine)


@OptimConfig.register("ext_lion")
@dataclass
class LionConfig(ExtOptimConfig[Lion]):
    """
    Config of :class:`Lion`. Defaults are those of the authors' code.
    """

    lr: float = 1e-4
    """Learning rate, >= 0: what a step moves a coordinate by. A third to a tenth of AdamW's."""

    betas: Tuple[float, ...] = (0.9, 0.99)
    """Of the average in the update, and of the one that is kept, two numbers in [0, 1)."""

    weight_decay: float = 0.0
    """
    Decoupled: a step multiplies parameters by ``1 - lr * weight_decay``. >= 0; as the rate is
    smaller, three to ten times AdamW's.
    """

    @classmethod
    def optimizer(cls) -> Type[Lion]:
        return Lion
