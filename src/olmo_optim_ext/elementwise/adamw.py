"""
AdamW (Loshchilov & Hutter, arXiv:1711.05101, algorithm 2), in the form of ``torch.optim.AdamW``.
"""

from dataclasses import dataclass
from typing import Any, Tuple, Type

from olmo_core.optim import OptimConfig
from typing_extensions import Unpack

from ..config import ExtOptimConfig
from ..engine.base import EngineOptions
from ..engine.elementwise import ElementwiseOptimizer
from .moments import ADAM

__all__ = ["ADAMW", "AdamW", "AdamWConfig"]


ADAMW = ADAM


class AdamW(ElementwiseOptimizer):
    """
    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``p <- (1 - lr wd) p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)``. For the arguments
    see :class:`AdamWConfig`.

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
        **engine: Unpack[EngineOptions],
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, **engine)


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
