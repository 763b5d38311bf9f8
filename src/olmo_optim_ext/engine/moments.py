"""
What state means beyond the optimizer that keeps it: averages of gradients and of their squares,
which another optimizer can continue.
"""

from dataclasses import dataclass
from typing import Any, Mapping, Optional, Tuple

__all__ = ["ADAM_MOMENTS", "Beta", "Moment"]


@dataclass(frozen=True)
class Beta:
    """How much of an average stays in an update, among the hyperparameters of a group."""

    key: str
    index: Optional[int] = None
    """Its place, where the group has several under the key."""
    new: bool = False
    """Whether the group has what is new in the average instead, as Scion does."""

    def __call__(self, group: Mapping[str, Any]) -> float:
        value = float(group[self.key] if self.index is None else group[self.key][self.index])
        return 1 - value if self.new else value


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

    beta: Beta
    """``b``."""

    corrected: bool = True
    """Whether the rule divides by ``1 - b^t``."""

    heavy_ball: bool = False
    """Whether ``w`` is 1 less the group's ``dampening``, if it has one, and not ``1 - b``."""

    @property
    def meaning(self) -> str:
        return {1: "mean of gradients", 2: "mean of squared gradients"}[self.power]

    def gain(self, group: Mapping[str, Any]) -> float:
        """``w / (1 - b)``: the state over the mean, after many updates."""
        if not self.heavy_ball:
            return 1.0
        return (1 - float(group.get("dampening", 0.0))) / (1 - self.beta(group))


ADAM_MOMENTS: Tuple[Moment, ...] = (
    Moment("exp_avg", 1, Beta("betas", 0)),
    Moment("exp_avg_sq", 2, Beta("betas", 1)),
)
"""``m`` and ``v`` of Adam and its relatives."""
