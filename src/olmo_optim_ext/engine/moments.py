"""
What state means beyond the optimizer that keeps it: averages of gradients and of their squares,
which another optimizer can continue.
"""

from dataclasses import dataclass
from typing import Any, Callable, Mapping, Tuple

__all__ = ["ADAM_MOMENTS", "Moment", "average", "beta_of", "heavy_ball", "number"]

NumberOf = Callable[[Mapping[str, Any]], float]
"""From the hyperparameters of a group."""


@dataclass(frozen=True)
class Moment:
    """
    State ``x <- b x + w g^power`` that begins at 0: after ``t`` updates its mean is
    ``w / (1 - b) (1 - b^t)`` times that of ``g^power``.
    """

    key: str
    """The state's name."""

    power: int
    """1 for gradients, 2 for their squares."""

    beta: NumberOf
    """``b``."""

    weight: NumberOf
    """``w``: ``1 - b`` of an average, 1 of heavy-ball momentum."""

    corrected: bool = True
    """Whether the rule divides by ``1 - b^t``."""

    @property
    def meaning(self) -> str:
        return {1: "mean of gradients", 2: "mean of squared gradients"}[self.power]

    def gain(self, group: Mapping[str, Any]) -> float:
        """``w / (1 - b)``: the state over the mean, after many updates."""
        return self.weight(group) / (1 - self.beta(group))


def beta_of(key: str, index: int) -> NumberOf:
    """Of rules with several: ``group[key][index]``."""
    return lambda group: float(group[key][index])


def average(key: str, power: int, beta: NumberOf, corrected: bool = True) -> Moment:
    """``x <- b x + (1 - b) g^power``."""
    return Moment(key, power, beta, lambda group: 1 - beta(group), corrected)


def number(key: str) -> NumberOf:
    """``group[key]``."""
    return lambda group: float(group[key])


def heavy_ball(key: str, beta: NumberOf, weight: NumberOf = lambda group: 1.0) -> Moment:
    """``x <- b x + w g``."""
    return Moment(key, 1, beta, weight, corrected=False)


ADAM_MOMENTS: Tuple[Moment, ...] = (
    average("exp_avg", 1, beta_of("betas", 0)),
    average("exp_avg_sq", 2, beta_of("betas", 1)),
)
"""``m`` and ``v`` of Adam and its relatives."""
