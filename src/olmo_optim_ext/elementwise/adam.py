"""
Adam (Kingma & Ba, arXiv:1412.6980, algorithm 1), with L2 weight decay as in ``torch.optim.Adam``.
"""

from dataclasses import dataclass
from typing import Any, Tuple, Type

from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import DECOUPLED, EngineOptions
from ..engine.elementwise import ElementwiseOptimizer
from .moments import ADAM

__all__ = ["Adam", "AdamConfig"]


class Adam(ElementwiseOptimizer):
    """
    ``g <- g + wd p``, ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``p <- p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)``. For the arguments see
    :class:`AdamConfig`.

    :raises OLMoConfigurationError: If a value is out of its range.
    """

    rule = ADAM

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Tuple[float, ...] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **engine: Unpack[EngineOptions],
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            DECOUPLED: decoupled_weight_decay,
        }
        super().__init__(params, defaults, **engine)


@OptimConfig.register("ext_adam")
@dataclass
class AdamConfig(ExtOptimConfig[Adam]):
    """
    Config of :class:`Adam`. Defaults are those of ``torch.optim.Adam``.
    """

    lr: float = 1e-3
    """Learning rate, >= 0."""

    betas: Tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and of the second moment, two numbers in [0, 1)."""

    eps: float = 1e-8
    """Added to the root of the bias-corrected second moment, >= 0."""

    weight_decay: float = 0.0
    """How much of the weights a step takes away, >= 0: see :data:`decoupled_weight_decay`."""

    decoupled_weight_decay: bool = False
    """
    ``False``: L2, ``weight_decay * p`` is added to the gradient. ``True``: a step multiplies
    parameters by ``1 - lr * weight_decay``, which is AdamW.
    """

    @classmethod
    def optimizer(cls) -> Type[Adam]:
        return Adam
