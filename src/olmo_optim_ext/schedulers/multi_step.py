"""
Decay in steps, as ``torch.optim.lr_scheduler.MultiStepLR``.
"""

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, List, Mapping, Optional

from olmo_core.optim import Scheduler

from ..engine.hyperparameters import INSIDE, POSITIVE, POSITIVE_INT, Allowed
from .base import WithWarmup, length

__all__ = ["MultiStepScheduler"]


def _rising(each: Allowed) -> Allowed:
    holds, words = each

    def is_rising(values: Any) -> bool:
        if not isinstance(values, (list, tuple)) or not values or not all(map(holds, values)):
            return False
        return all(before < after for before, after in zip(values, values[1:]))

    return is_rising, f"a list of at least one, rising, each {words}"


@Scheduler.register("multi_step")
@dataclass
class MultiStepScheduler(WithWarmup):
    """
    ``lr0 gamma^n`` after ``n`` milestones. Positions are those of the run, warm-up included; it
    comes first where a milestone lies within it.
    """

    milestones: Optional[List[int]] = None
    """Positions in :data:`units`, from which on the rate is lower. Rising integers >= 1."""

    milestone_fractions: Optional[List[float]] = None
    """The same as shares of the run. Rising numbers in (0, 1)."""

    gamma: float = 0.1
    """What a milestone multiplies the rate by, > 0. As in torch."""

    allowed: ClassVar[Mapping[str, Allowed]] = {
        **WithWarmup.allowed,
        "milestones": _rising(POSITIVE_INT),
        "milestone_fractions": _rising(INSIDE),
        "gamma": POSITIVE,
    }

    def __post_init__(self, *args: Any) -> None:
        super().__post_init__(*args)
        self._check_one_of("milestones", "milestone_fractions", required=True)

    def factor(self, current: int, warmup: Fraction, t_max: int) -> float:
        del warmup
        fractions = [length(None, each, t_max) for each in self.milestone_fractions or []]
        return self.gamma ** bisect_right(self.milestones or fractions, current)  # type: ignore[type-var]
