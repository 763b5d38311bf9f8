"""
Cyclical learning rates (Smith, arXiv:1506.01186), as ``torch.optim.lr_scheduler.CyclicLR``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Mapping, Optional

from olmo_core.config import StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import Scheduler

from ..engine.hyperparameters import POSITIVE_INT, SHARE, Allowed, to_choice
from .base import UNIT, Rate, WithMomentum, length

__all__ = ["CyclicMode", "CyclicScheduler"]


class CyclicMode(StrEnum):
    """How high the cycles are."""

    triangular = "triangular"
    """All alike."""

    triangular2 = "triangular2"
    """Each half as high as the one before."""

    exp_range = "exp_range"
    """``gamma`` to the number of cycles so far, parts of cycles included."""


@Scheduler.register("cyclic")
@dataclass
class CyclicScheduler(WithMomentum):
    """
    Straight up from ``lr0 alpha_base`` to ``lr0`` and down again, over and over:
    ``lr0 (alpha_base + (1 - alpha_base) h)`` with ``h`` from 0 to 1 and back, times the factor of
    :data:`mode`. Momentum is ``max_momentum - (max_momentum - base_momentum) h``.
    """

    base_momentum: float = 0.8
    """Momentum at the highest learning rate, in (0, 1). As in torch."""

    max_momentum: float = 0.9
    """Momentum at the lowest learning rate, in (0, 1). As in torch."""

    up: Optional[int] = None
    """Length of the rise in :data:`units`, >= 1. ``step_size_up`` in torch."""

    up_fraction: Optional[float] = None
    """The same as a share of the run, in (0, 1]."""

    down: Optional[int] = None
    """Length of the fall in :data:`units`, >= 1. That of the rise if none is given, as in torch."""

    down_fraction: Optional[float] = None
    """The same as a share of the run, in (0, 1]."""

    alpha_base: float = 0.25
    """
    The lowest learning rate over the initial one, which is the highest, in [0, 1]. The paper's rule
    of thumb is 1/3 or 1/4; torch has no default.
    """

    mode: CyclicMode = CyclicMode.triangular
    """``triangular``, ``triangular2`` or ``exp_range``. As in torch."""

    gamma: float = 1.0
    """
    With ``exp_range``, how high a cycle is over the one before, in (0, 1]. torch's is for a step
    rather than for a cycle.
    """

    allowed: ClassVar[Mapping[str, Allowed]] = {
        **WithMomentum.allowed,
        "up": POSITIVE_INT,
        "up_fraction": SHARE,
        "down": POSITIVE_INT,
        "down_fraction": SHARE,
        "alpha_base": UNIT,
        "gamma": SHARE,
    }

    def __post_init__(self, *args: Any) -> None:
        super().__post_init__(*args)
        owner = type(self).__name__
        self.mode = to_choice(CyclicMode, self.mode, "mode", owner)
        self._check_one_of("up", "up_fraction", required=True)
        self._check_one_of("down", "down_fraction", required=False)
        if self.gamma != 1 and self.mode != CyclicMode.exp_range:
            raise OLMoConfigurationError(
                f"{owner}: 'gamma' is {self.gamma!r} with 'mode' {self.mode}, allowed is 1, or "
                "mode exp_range"
            )

    def get_lr(self, initial_lr: Rate, current: int, t_max: int) -> Rate:
        height = self._height(current, t_max)
        return initial_lr * (self.alpha_base + (1 - self.alpha_base) * height)

    def get_momentum(self, current: int, t_max: int) -> float:
        height = self._height(current, t_max)
        return self.max_momentum - (self.max_momentum - self.base_momentum) * height

    def _height(self, current: int, t_max: int) -> float:
        up = length(self.up, self.up_fraction, t_max)
        assert up is not None
        down = length(self.down, self.down_fraction, t_max) or up
        cycles, at = divmod(current, up + down)
        height = float(at / up if at <= up else (up + down - at) / down)
        if self.mode == CyclicMode.triangular2:
            return height * 0.5 ** int(cycles)
        return height * self.gamma ** float(current / (up + down))
