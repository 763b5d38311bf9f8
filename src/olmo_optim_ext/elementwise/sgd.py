"""
Stochastic gradient descent with momentum (Polyak 1964; Nesterov 1983, in the form of Sutskever et
al. 2013), as in ``torch.optim.SGD``.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import DECOUPLED, EngineOptions
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar
from ..engine.moments import Beta, Moment
from .moments import MOMENTUM, heavy_ball, heavy_ball_scalars

__all__ = ["SGD", "SGDConfig"]


def sgd_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    return group["lr"], *heavy_ball_scalars(group, step)


def sgd(
    param: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    """
    ``u <- mu u + (1 - dampening) g``, but ``u <- g`` in the first update;
    ``p <- p - lr u``, or with Nesterov's momentum ``p <- p - lr (g + mu u)``.
    """
    lr, *rest = scalars.unbind()
    step, momentum = heavy_ball(grad, momentum, rest)
    return lr * step, momentum


class SGD(ElementwiseOptimizer):
    """
    SGD with momentum. For the arguments see :class:`SGDConfig`.

    :raises OLMoConfigurationError: If a value is out of its range, or ``nesterov`` is asked for
        without momentum or with dampening.
    """

    rule = ElementwiseRule(
        MOMENTUM,
        sgd_scalars,
        sgd,
        moments=(Moment("momentum", 1, Beta("momentum"), corrected=False, heavy_ball=True),),
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **engine: Unpack[EngineOptions],
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            DECOUPLED: decoupled_weight_decay,
        }
        super().__init__(params, defaults, **engine)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'nesterov' is True with 'momentum' {group['momentum']} "
                f"and 'dampening' {group['dampening']}, allowed is momentum > 0 without dampening"
            )


@OptimConfig.register("sgd")
@dataclass
class SGDConfig(ExtOptimConfig[SGD]):
    """
    Config of :class:`SGD`. Defaults are those of ``torch.optim.SGD`` but for the momentum.
    """

    lr: float = 1e-3
    """Learning rate, >= 0."""

    momentum: float = 0.9
    """Decay of the momentum, in [0, 1). torch's default is 0."""

    dampening: float = 0.0
    """The momentum takes ``1 - dampening`` of a gradient, in [0, 1]."""

    nesterov: bool = False
    """Look ahead; needs momentum and no dampening."""

    weight_decay: float = 0.0
    """How much of the weights a step takes away, >= 0: see :data:`decoupled_weight_decay`."""

    decoupled_weight_decay: bool = False
    """
    ``False``: L2, ``weight_decay * p`` is added to the gradient, as in torch. ``True``: a step
    multiplies parameters by ``1 - lr * weight_decay`` (SGDW, arXiv:1711.05101).
    """

    @classmethod
    def optimizer(cls) -> Type[SGD]:
        return SGD
