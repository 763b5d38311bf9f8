"""
One cycle (Smith & Topin, "Super-Convergence", arXiv:1708.07120), as
``torch.optim.lr_scheduler.OneCycleLR``.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, List, Mapping, Optional, Tuple

from olmo_core.config import StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import Scheduler

from ..engine.hyperparameters import INSIDE, POSITIVE_INT, Allowed, to_choice, to_flag
from .base import Rate, WithMomentum, length

__all__ = ["AnnealStrategy", "OneCycleScheduler"]

RISE = 0.3
"""Share of the run in which the rate rises if none is given: torch's ``pct_start``."""

AT_LEAST_ONE: Allowed = (
    lambda value: (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value < math.inf
    ),
    "a finite number >= 1",
)


class AnnealStrategy(StrEnum):
    """How the rate goes from one value to the next."""

    cos = "cos"
    linear = "linear"


@Scheduler.register("one_cycle")
@dataclass
class OneCycleScheduler(WithMomentum):
    """
    From ``lr0 / div_factor`` up to ``lr0``, then down to ``lr0 / (div_factor final_div_factor)`` at
    ``t_max``; with ``three_phase`` first back to ``lr0 / div_factor``, in the time that the rise
    took. Meanwhile momentum goes from ``max_momentum`` to ``base_momentum`` and back.
    """

    base_momentum: float = 0.85
    """Momentum at the highest learning rate, in (0, 1). As in torch."""

    max_momentum: float = 0.95
    """Momentum at the first and the last one, in (0, 1). As in torch."""

    warmup: Optional[int] = None
    """Length of the rise in :data:`units`, >= 1."""

    warmup_fraction: Optional[float] = None
    """
    The same as a share of the run, in (0, 1), with ``three_phase`` at most 0.5. 0.3, torch's
    ``pct_start``, if neither is given.
    """

    anneal_strategy: AnnealStrategy = AnnealStrategy.cos
    """``cos`` or ``linear``. As in torch."""

    div_factor: float = 25.0
    """The initial learning rate, which is the highest, over the first one, >= 1. As in torch."""

    final_div_factor: float = 1e4
    """The first learning rate over the last one, >= 1. As in torch."""

    three_phase: bool = False
    """Whether to come down as slowly as up before the last fall. As in torch and the paper."""

    t_max: Optional[int] = None
    """Where the cycle ends, in :data:`units`, >= 1. ``None`` is the end of the run."""

    allowed: ClassVar[Mapping[str, Allowed]] = {
        **WithMomentum.allowed,
        "warmup": POSITIVE_INT,
        "warmup_fraction": INSIDE,
        "div_factor": AT_LEAST_ONE,
        "final_div_factor": AT_LEAST_ONE,
        "t_max": POSITIVE_INT,
    }

    def __post_init__(self, *args: Any) -> None:
        super().__post_init__(*args)
        owner = type(self).__name__
        self.anneal_strategy = to_choice(
            AnnealStrategy, self.anneal_strategy, "anneal_strategy", owner
        )
        to_flag(self.three_phase, "three_phase", owner)
        self._check_one_of("warmup", "warmup_fraction", required=False)
        if self.three_phase and (self.warmup_fraction or 0) > 0.5:
            raise OLMoConfigurationError(
                f"{owner}: 'warmup_fraction' is {self.warmup_fraction!r} with 'three_phase' True, "
                "allowed is at most 0.5, as the way back takes as long"
            )

    def get_lr(self, initial_lr: Rate, current: int, t_max: int) -> Rate:
        low = 1 / self.div_factor
        return initial_lr * self._value(current, t_max, low, 1.0, low / self.final_div_factor)

    def get_momentum(self, current: int, t_max: int) -> float:
        high = self.max_momentum
        return self._value(current, t_max, high, self.base_momentum, high)

    def _value(self, current: int, t_max: int, first: float, middle: float, last: float) -> float:
        t_max = self.t_max or t_max
        given = self.warmup is not None or self.warmup_fraction is not None
        rise = length(self.warmup, self.warmup_fraction if given else RISE, t_max)
        assert rise is not None
        points: List[Tuple[Fraction, float]] = [(Fraction(0), first), (rise, middle)]
        if self.three_phase:
            points.append((2 * rise, first))
        points.append((Fraction(t_max), last))
        for (begin, start), (end, stop) in zip(points, points[1:]):
            if current < end:
                return self._anneal(start, stop, float((current - begin) / (end - begin)))
        return last

    def _anneal(self, start: float, stop: float, share: float) -> float:
        if self.anneal_strategy == AnnealStrategy.linear:
            return start + (stop - start) * share
        return stop + (start - stop) / 2 * (1 + math.cos(math.pi * share))
