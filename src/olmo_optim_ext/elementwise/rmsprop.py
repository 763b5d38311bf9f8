"""
RMSprop (Hinton, lecture 6e of "Neural Networks for Machine Learning", 2012; the centered form from
Graves, arXiv:1308.0850, equations 38 to 45), as in ``torch.optim.RMSprop``.
"""

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import DECOUPLED, EngineOptions
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar
from ..engine.hyperparameters import to_flag
from ..engine.moments import Beta, Moment

__all__ = ["RMSprop", "RMSpropConfig"]


def rmsprop_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    return group["lr"], group["eps"], group["beta2"], 1 - group["beta2"], group["momentum"]


def rmsprop(
    param: torch.Tensor, grad: torch.Tensor, exp_avg_sq: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    """``v <- b2 v + (1 - b2) g^2``, ``p <- p - lr g / (sqrt(v) + eps)``."""
    lr, eps, beta2, rest2, _ = scalars.unbind()
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * rest2
    return lr * (grad / (exp_avg_sq.sqrt() + eps)), exp_avg_sq


def rmsprop_momentum(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    momentum: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """As :func:`rmsprop`, with ``u <- mu u + g / (sqrt(v) + eps)``, ``p <- p - lr u``."""
    lr, eps, beta2, rest2, mu = scalars.unbind()
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * rest2
    momentum = momentum * mu + grad / (exp_avg_sq.sqrt() + eps)
    return lr * momentum, exp_avg_sq, momentum


def _centered(
    grad: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg: torch.Tensor,
    scalars: Sequence[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``g / (sqrt(v - m^2) + eps)`` with ``m <- b2 m + (1 - b2) g``; and new ``v`` and ``m``."""
    eps, beta2, rest2 = scalars
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * rest2
    exp_avg = exp_avg * beta2 + grad * rest2
    # The variance is not negative, but its rounding may be.
    variance = torch.where(exp_avg_sq < exp_avg * exp_avg, 0.0, exp_avg_sq - exp_avg * exp_avg)
    return grad / (variance.sqrt() + eps), exp_avg_sq, exp_avg


def rmsprop_centered(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """As :func:`rmsprop`, with the variance ``v - m^2`` in place of ``v``."""
    lr, *rest, _ = scalars.unbind()
    scaled, exp_avg_sq, exp_avg = _centered(grad, exp_avg_sq, exp_avg, rest)
    return lr * scaled, exp_avg_sq, exp_avg


def rmsprop_centered_momentum(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    exp_avg: torch.Tensor,
    momentum: torch.Tensor,
    scalars: torch.Tensor,
) -> Tuple[torch.Tensor, ...]:
    """Both."""
    lr, *rest, mu = scalars.unbind()
    scaled, exp_avg_sq, exp_avg = _centered(grad, exp_avg_sq, exp_avg, rest)
    momentum = momentum * mu + scaled
    return lr * momentum, exp_avg_sq, exp_avg, momentum


_V, _M, _U = "exp_avg_sq", "exp_avg", "momentum"
_MOMENTS = (
    Moment(_V, 2, Beta("beta2"), corrected=False),
    Moment(_M, 1, Beta("beta2"), corrected=False),
)
_RULES: Dict[Tuple[bool, bool], ElementwiseRule] = {
    (False, False): ElementwiseRule((_V,), rmsprop_scalars, rmsprop, moments=_MOMENTS[:1]),
    (False, True): ElementwiseRule(
        (_V, _U), rmsprop_scalars, rmsprop_momentum, moments=_MOMENTS[:1]
    ),
    (True, False): ElementwiseRule((_V, _M), rmsprop_scalars, rmsprop_centered, moments=_MOMENTS),
    (True, True): ElementwiseRule(
        (_V, _M, _U), rmsprop_scalars, rmsprop_centered_momentum, moments=_MOMENTS
    ),
}
"""By whether it is centered, and has momentum."""


class RMSprop(ElementwiseOptimizer):
    """
    RMSprop. For the arguments see :class:`RMSpropConfig`.

    :raises OLMoConfigurationError: If a value is out of its range, or a group has momentum and the
        optimizer has none.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        beta2: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        centered: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **engine: Unpack[EngineOptions],
    ):
        self._has_momentum = momentum != 0
        self._centered = to_flag(centered, "centered", type(self).__name__)
        self.rule = _RULES[self._centered, self._has_momentum]
        defaults = {
            "lr": lr,
            "beta2": beta2,
            "eps": eps,
            "momentum": momentum,
            "weight_decay": weight_decay,
            DECOUPLED: decoupled_weight_decay,
        }
        super().__init__(params, defaults, **engine)

    def is_exact(self, buffer: str) -> bool:
        # The variance is a small difference of the two.
        return super().is_exact(buffer) or (self._centered and buffer in (_V, _M))

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        if group["momentum"] != 0 and not self._has_momentum:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'momentum' of a group is {group['momentum']}, allowed is "
                "0, as the optimizer has no momentum; give it one"
            )


@OptimConfig.register("rmsprop")
@dataclass
class RMSpropConfig(ExtOptimConfig[RMSprop]):
    """
    Config of :class:`RMSprop`. Defaults are those of ``torch.optim.RMSprop``.
    """

    lr: float = 1e-2
    """Learning rate, >= 0."""

    beta2: float = 0.99
    """Decay of the second moment, in [0, 1); ``alpha`` in torch."""

    eps: float = 1e-8
    """Added to the root of the second moment, which has no bias correction. >= 0."""

    momentum: float = 0.0
    """Decay of the momentum, in [0, 1). If it is not 0, it takes 4 bytes a parameter."""

    centered: bool = False
    """
    Divide by the standard deviation; takes 4 bytes a parameter. ``state_dtype`` is then that of the
    momentum alone, as the variance is a small difference of two numbers.
    """

    weight_decay: float = 0.0
    """How much of the weights a step takes away, >= 0: see :data:`decoupled_weight_decay`."""

    decoupled_weight_decay: bool = False
    """
    ``False``: L2, ``weight_decay * p`` is added to the gradient, as in torch. ``True``: a step
    multiplies parameters by ``1 - lr * weight_decay``.
    """

    @classmethod
    def optimizer(cls) -> Type[RMSprop]:
        return RMSprop
