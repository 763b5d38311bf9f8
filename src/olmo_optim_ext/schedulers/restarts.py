"""
Cosine with warm restarts (SGDR, Loshchilov & Hutter, arXiv:1608.03983), as
``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts``.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Mapping, Optional

from olmo_core.optim import Scheduler

from ..engine.hyperparameters import POSITIVE_INT, SHARE, Allowed
from .base import UNIT, WithWarmup, length

__all__ = ["CosWithRestarts"]


@Scheduler.register("cos_with_restarts")
@dataclass
class CosWithRestarts(WithWarmup):
    """
    ``lr0 (alpha_f + (1 - alpha_f) (1 + cos(pi t_cur / t_i)) / 2)`` with ``t_cur`` the position
    since the last restart, ``t_i`` the length of the period. Periods begin after the warm-up. Where
    one ends with the run there is no restart, which would give the last step the highest rate.
    """

    period: Optional[int] = None
    """Length of the first period in :data:`units`, >= 1. ``T_0`` in torch."""

    period_fraction: Optional[float] = None
    """The same as a share of the run, in (0, 1]."""

    t_mult: int = 1
    """What each period's length is multiplied by for the next, an integer >= 1. As in torch."""

    alpha_f: float = 0.0
    """Learning rate at the end of a period over the initial one, in [0, 1]. torch's default."""

    allowed: ClassVar[Mapping[str, Allowed]] = {
        **WithWarmup.allowed,
        "period": POSITIVE_INT,
        "period_fraction": SHARE,
        "t_mult": POSITIVE_INT,
        "alpha_f": UNIT,
    }

    def __post_init__(self, *args: Any) -> None:
        super().__post_init__(*args)
        self._check_one_of("period", "period_fraction", required=True)

    def factor(self, current: int, warmup: Fraction, t_max: int) -> float:
        period = length(self.period, self.period_fraction, t_max)
        assert period is not None
        since = current - warmup
        while self.t_mult > 1 and since >= period:
            since, period = since - period, period * self.t_mult
        share = float(since % period / period)
        if share == 0 and current == t_max > warmup:
            share = 1.0
        return self.alpha_f + (1 - self.alpha_f) * (1 + math.cos(math.pi * share)) / 2
