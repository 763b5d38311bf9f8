"""
Adagrad (Duchi, Hazan & Singer, JMLR 12, 2011, with the diagonal matrix), as in
``torch.optim.Adagrad``.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Sequence, Tuple, Type

import torch
from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import DECOUPLED, EngineOptions
from ..engine.elementwise import ElementwiseOptimizer, ElementwiseRule, Scalar

__all__ = ["Adagrad", "AdagradConfig"]


def adagrad_scalars(group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
    lr = group["lr"] / (1 + (step - 1) * group["lr_decay"])
    return lr, group["initial_accumulator_value"], group["eps"]


def adagrad(
    param: torch.Tensor, grad: torch.Tensor, sum_of_squares: torch.Tensor, scalars: torch.Tensor
) -> Tuple[torch.Tensor, ...]:
    """
    ``s <- s + g^2``, ``p <- p - lr / (1 + (t - 1) lr_decay) * g / (sqrt(s_0 + s) + eps)``.
    """
    lr, initial, eps = scalars.unbind()
    sum_of_squares = sum_of_squares + grad * grad
    return lr * (grad / ((sum_of_squares + initial).sqrt() + eps)), sum_of_squares


class Adagrad(ElementwiseOptimizer):
    """
    Adagrad. For the arguments see :class:`AdagradConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ElementwiseRule(("sum_of_squares",), adagrad_scalars, adagrad)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **engine: Unpack[EngineOptions],
    ):
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "weight_decay": weight_decay,
            DECOUPLED: decoupled_weight_decay,
        }
        super().__init__(params, defaults, **engine)


@OptimConfig.register("adagrad")
@dataclass
class AdagradConfig(ExtOptimConfig[Adagrad]):
    """
    Config of :class:`Adagrad`. Defaults are those of ``torch.optim.Adagrad``.
    """

    lr: float = 1e-2
    """Learning rate, >= 0."""

    lr_decay: float = 0.0
    """The rate is divided by ``1 + (t - 1) * lr_decay``, beside any schedule. >= 0."""

    initial_accumulator_value: float = 0.0
    """What is in the sums of squares before the first gradient, >= 0."""

    eps: float = 1e-10
    """Added to the root of the sum of squares, >= 0."""

    weight_decay: float = 0.0
    """How much of the weights a step takes away, >= 0: see :data:`decoupled_weight_decay`."""

    decoupled_weight_decay: bool = False
    """
    ``False``: L2, ``weight_decay * p`` is added to the gradient, as in torch. ``True``: a step
    multiplies parameters by ``1 - lr * weight_decay``, ``lr`` without :data:`lr_decay`.
    """

    @classmethod
    def optimizer(cls) -> Type[Adagrad]:
        return Adagrad
