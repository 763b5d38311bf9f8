"""
LARS (You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks", arXiv:1708.03888,
algorithm 1), as in timm.
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
    WholeSums,
    no_decay,
)
from .moments import MOMENTUM, adapts, heavy_ball, heavy_ball_scalars

__all__ = ["Lars", "LarsConfig"]


def lars_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    return (
        *(group["lr"], adapts(group), group["weight_decay"]),
        *(group["trust_coefficient"], group["eps"], *heavy_ball_scalars(group, step)),
    )


def sums_of_squares(
    param: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    """``sum(p^2)`` and ``sum(g^2)``."""
    return (param * param).sum(dtype=torch.float64), (grad * grad).sum(dtype=torch.float64)


def trust_ratio(
    sums: Sequence[torch.Tensor], numel: Scalar, scalars: Sequence[torch.Tensor]
) -> Tuple[torch.Tensor, ...]:
    """``trust ||p|| / (||g|| + wd ||p|| + eps)``, 1 where a norm is 0."""
    of_param, of_grad = (x.sqrt() for x in sums)
    _, adapted, weight_decay, trust, eps, *_ = (x.to(of_param) for x in scalars)
    ratio = trust * of_param / (of_grad + weight_decay * of_param + eps)
    return (torch.where((of_param == 0) | (of_grad == 0) | (adapted == 0), 1.0, ratio),)


def lars(
    param: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    """
    ``g' = trust ||p|| / (||g|| + wd ||p|| + eps) (g + wd p)`` with norms over the whole parameter,
    ``u <- mu u + (1 - dampening) g'``, but ``u <- g'`` in the first update; ``p <- p - lr u``, or
    with Nesterov's momentum ``p <- p - lr (g' + mu u)``.
    """
    lr, _, weight_decay, _, _, *rest, ratio = scalars.unbind()
    step, momentum = heavy_ball((grad + param * weight_decay) * ratio, momentum, rest)
    return lr * step, momentum


class Lars(ElementwiseOptimizer):
    """
    LARS. For the arguments see :class:`LarsConfig`.

    :raises OLMoConfigurationError: If a value is out of its range, or ``nesterov`` is asked for
        without momentum.
    """

    rule = ElementwiseRule(
        MOMENTUM, lars_scalars, lars, WholeSums(sums_of_squares, trust_ratio), decay=no_decay
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        always_adapt: bool = False,
        **engine: Unpack[EngineOptions],
    ):
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            always_adapt=always_adapt,
        )
        super().__init__(params, defaults, **engine)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        if group["nesterov"] and group["momentum"] == 0:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'nesterov' is True with 'momentum' 0, allowed is "
                "momentum > 0"
            )


@OptimConfig.register("lars")
@dataclass
class LarsConfig(ExtOptimConfig[Lars]):
    """
    Config of :class:`Lars`. Defaults are those of timm, but for the momentum, which is 0 there.
    """

    lr: float = 1.0
    """
    Learning rate, >= 0. Parameters that adapt move by ``lr * trust_coefficient`` times their norm;
    others, and all without weight decay unless :data:`always_adapt`, follow SGD with this rate.
    """

    momentum: float = 0.9
    """Decay of the momentum, in [0, 1)."""

    dampening: float = 0.0
    """The momentum takes ``1 - dampening`` of a gradient, in [0, 1]."""

    nesterov: bool = False
    """Look ahead; needs momentum."""

    weight_decay: float = 0.0
    """L2: part of what is scaled, ``g + weight_decay * p``. >= 0."""

    trust_coefficient: float = 1e-3
    """How much of its norm a parameter moves by a gradient, > 0."""

    eps: float = 1e-8
    """Added to the norms that are divided by, >= 0."""

    always_adapt: bool = False
    """
    Whether parameters without weight decay have their ratio of norms, too, as in the paper; if not,
    theirs is 1, plain SGD, as in timm.
    """

    @classmethod
    def optimizer(cls) -> Type[Lars]:
        return Lars
