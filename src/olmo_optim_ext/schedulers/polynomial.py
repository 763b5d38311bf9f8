"""
Polynomial decay, as ``torch.optim.lr_scheduler.PolynomialLR``.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Mapping, Optional

from olmo_core.optim import Scheduler

from ..engine.hyperparameters import POSITIVE, POSITIVE_INT, Allowed
from .base import UNIT, Rate, WithWarmup

__all__ = ["PolynomialScheduler"]


@Scheduler.register("polynomial")
@dataclass
class PolynomialScheduler(WithWarmup):
    """
    ``lr0 (alpha_f + (1 - alpha_f) (1 - (t - warmup) / (t_max - warmup))^power)``, and
    ``lr0 alpha_f`` from ``t_max`` on. With ``power`` 1 it is OLMo-core's ``linear_with_warmup``.
    """

    power: float = 1.0
    """> 0. Above 1 the rate falls fast at first, below 1 at the end. As in torch."""

    alpha_f: float = 0.0
    """The last learning rate over the initial one, in [0, 1]. torch's is always 0."""

    t_max: Optional[int] = None
    """Where the decay ends, in :data:`units`, >= 1. ``None`` is the end of the run."""

    allowed: ClassVar[Mapping[str, Allowed]] = {
        **WithWarmup.allowed,
        "power": POSITIVE,
        "alpha_f": UNIT,
        "t_max": POSITIVE_INT,
    }

    def get_lr(self, initial_lr: Rate, current: int, t_max: int) -> Rate:
        return super().get_lr(initial_lr, current, self.t_max or t_max)

    def factor(self, current: int, warmup: Fraction, t_max: int) -> float:
        if current >= t_max:
            return self.alpha_f
        left = float((t_max - current) / (t_max - warmup))
        return self.alpha_f + (1 - self.alpha_f) * left**self.power
