"""
Learning-rate schedules that OLMo-core lacks. Importing this package registers them with
OLMo-core's ``Scheduler``, under names that OLMo-core does not use.
"""

from .base import (
    WithMomentum,
    cycles_momentum,
    position,
    refuse_cycled_momentum,
    refuse_within,
)
from .cyclic import CyclicMode, CyclicScheduler
from .momentum import momentum_of, set_momentum
from .multi_step import MultiStepScheduler
from .one_cycle import AnnealStrategy, OneCycleScheduler
from .polynomial import PolynomialScheduler
from .restarts import CosWithRestarts

__all__ = [
    "AnnealStrategy",
    "CosWithRestarts",
    "CyclicMode",
    "CyclicScheduler",
    "MultiStepScheduler",
    "OneCycleScheduler",
    "PolynomialScheduler",
    "WithMomentum",
    "cycles_momentum",
    "momentum_of",
    "position",
    "refuse_cycled_momentum",
    "refuse_within",
    "set_momentum",
]
