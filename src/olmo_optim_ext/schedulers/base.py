"""
What our schedulers share: checked fields, exact lengths, a warm-up, and momentum that runs against
the learning rate.

Each is the initial learning rate times a number that follows from the position in the run alone.
So an initial rate that is a tensor stays on its device, and a run resumes without any state.
"""

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Dict, Mapping, Optional, Protocol, Tuple, Union

import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import Scheduler
from olmo_core.optim.scheduler import SchedulerUnits

from ..engine.hyperparameters import (
    INSIDE,
    NATURAL,
    NON_NEGATIVE,
    Allowed,
    to_choice,
    to_flag,
)
from .momentum import momentum_of, set_momentum

__all__ = [
    "UNIT",
    "Clock",
    "ExtScheduler",
    "Rate",
    "WithMomentum",
    "WithWarmup",
    "cycles_momentum",
    "length",
    "position",
    "refuse_cycled_momentum",
    "refuse_within",
]

Rate = Union[float, torch.Tensor]

UNIT: Allowed = (lambda value: NON_NEGATIVE[0](value) and value <= 1, "a number in [0, 1]")


class Clock(Protocol):
    """What a scheduler reads of OLMo-core's trainer."""

    @property
    def global_step(self) -> int: ...

    @property
    def max_steps(self) -> Optional[int]: ...

    @property
    def global_train_tokens_seen(self) -> int: ...

    @property
    def max_tokens(self) -> Optional[int]: ...


def position(scheduler: Scheduler, clock: Clock) -> Tuple[int, int]:
    """
    Where a run stands and how long it is, in the scheduler's units.

    :raises OLMoConfigurationError: If its length is not known.
    """
    in_tokens = scheduler.units == SchedulerUnits.tokens
    now = clock.global_train_tokens_seen if in_tokens else clock.global_step
    t_max = clock.max_tokens if in_tokens else clock.max_steps
    if t_max is None:
        raise OLMoConfigurationError(
            f"{type(scheduler).__name__}: the length of the run in {scheduler.units} is not known, "
            "allowed is a trainer whose 'max_duration' tells it"
        )
    return now, t_max


def length(absolute: Optional[int], fraction: Optional[float], t_max: int) -> Optional[Fraction]:
    """
    A length that is given in units or as a share of ``t_max``, as the exact number that was
    written: ``0.1 * 30`` in floats is more than 3. Not rounded to whole units, so that it is the
    same in steps and in tokens.
    """
    if absolute is not None:
        return Fraction(absolute)
    return None if fraction is None else Fraction(str(fraction)) * t_max


@dataclass
class ExtScheduler(Scheduler):
    """
    Base class of the schedulers of this package. Values are checked when one is made.

    :raises OLMoConfigurationError: Names the field, the value and what is allowed.
    """

    allowed: ClassVar[Mapping[str, Allowed]] = {}
    """By field. ``None`` is allowed where it is the default."""

    def __post_init__(self, *_: Any) -> None:
        owner = type(self).__name__
        self.units = to_choice(SchedulerUnits, self.units, "units", owner)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in self.allowed or (value is None and field.default is None):
                continue
            holds, allowed = self.allowed[field.name]
            if not holds(value):
                raise OLMoConfigurationError(
                    f"{owner}: '{field.name}' is {value!r}, allowed is {allowed}"
                )

    def _check_one_of(self, first: str, second: str, required: bool) -> None:
        """Check that not both of two fields are given, and if ``required`` not none."""
        values = {name: getattr(self, name) for name in (first, second)}
        given = [name for name, value in values.items() if value is not None]
        if len(given) == 2 or (required and not given):
            shown = " and ".join(f"'{name}' is {value!r}" for name, value in values.items())
            raise OLMoConfigurationError(
                f"{type(self).__name__}: {shown}, allowed is {'' if required else 'at most '}one "
                "of them"
            )


@dataclass
class WithWarmup(ExtScheduler):
    """
    Base class of schedulers that may begin with a linear warm-up, to the initial learning rate at
    its end. Without ``warmup`` and ``warmup_fraction`` there is none.
    """

    warmup: Optional[int] = None
    """Length of the warm-up in :data:`units`, >= 0."""

    warmup_fraction: Optional[float] = None
    """Length of the warm-up as a share of the run, in [0, 1]."""

    warmup_min_lr: float = 0.0
    """Learning rate at position 0, >= 0 and at most the initial one. As in OLMo-core."""

    allowed: ClassVar[Mapping[str, Allowed]] = {
        "warmup": NATURAL,
        "warmup_fraction": UNIT,
        "warmup_min_lr": NON_NEGATIVE,
    }

    def __post_init__(self, *args: Any) -> None:
        super().__post_init__(*args)
        self._check_one_of("warmup", "warmup_fraction", required=False)

    def factor(self, current: int, warmup: Fraction, t_max: int) -> float:
        """What the initial learning rate is multiplied by, from the end of the warm-up on."""
        raise NotImplementedError

    def get_lr(self, initial_lr: Rate, current: int, t_max: int) -> Rate:
        warmup = length(self.warmup, self.warmup_fraction, t_max) or Fraction(0)
        if current >= warmup:
            return initial_lr * self.factor(current, warmup, t_max)
        # Of a tensor it would be a host-device sync.
        if not isinstance(initial_lr, torch.Tensor) and self.warmup_min_lr > initial_lr:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'warmup_min_lr' is {self.warmup_min_lr!r}, allowed is at "
                f"most the initial value, {initial_lr!r}"
            )
        share = float(current / warmup)
        return self.warmup_min_lr + (initial_lr - self.warmup_min_lr) * share


@dataclass
class WithMomentum(ExtScheduler):
    """
    Base class of schedulers that move the momentum against the learning rate: see
    :func:`~olmo_optim_ext.schedulers.momentum.set_momentum`. It is set with the learning rate, so
    not where a scheduler is one of those in ``sequential``.
    """

    cycle_momentum: bool = True
    """Whether to set the momentum, or the first beta, in every parameter group. As in torch."""

    base_momentum: float = 0.8
    """Momentum at the highest learning rate, in (0, 1)."""

    max_momentum: float = 0.9
    """Momentum at the lowest learning rate, in (0, 1), at least :data:`base_momentum`."""

    allowed: ClassVar[Mapping[str, Allowed]] = {"base_momentum": INSIDE, "max_momentum": INSIDE}

    def __post_init__(self, *args: Any) -> None:
        super().__post_init__(*args)
        owner = type(self).__name__
        to_flag(self.cycle_momentum, "cycle_momentum", owner)
        if self.base_momentum > self.max_momentum:
            raise OLMoConfigurationError(
                f"{owner}: 'base_momentum' is {self.base_momentum!r}, allowed is at most "
                f"'max_momentum', {self.max_momentum!r}"
            )

    def get_momentum(self, current: int, t_max: int) -> float:
        """The momentum at a position of the run."""
        raise NotImplementedError

    def set_lr(self, group: Dict[str, Any], trainer: Clock) -> Rate:
        """
        Set the learning rate of a parameter group, and its momentum.

        :param trainer: Only what :class:`Clock` has is read.

        :raises OLMoConfigurationError: If the group has no momentum, or one of 0, for which its
            optimizer may keep nothing.
        """
        lr = super().set_lr(group, trainer)  # type: ignore[arg-type]
        if self.cycle_momentum:
            self.check_group(group)
            set_momentum(group, self.get_momentum(*position(self, trainer)), self._why)
        return lr

    def check_group(self, group: Mapping[str, Any]) -> None:
        """
        Check whether the momentum of a parameter group can be set, if that is asked for.

        :raises OLMoConfigurationError: If it cannot.
        """
        if self.cycle_momentum and momentum_of(group, self._why) == 0:
            raise OLMoConfigurationError(
                f"{self._why}, which is not allowed, as the momentum of a parameter group is 0; "
                "allowed is false, or an optimizer with one > 0"
            )

    @property
    def _why(self) -> str:
        return f"{type(self).__name__}: 'cycle_momentum' is True"


def cycles_momentum(scheduler: Any) -> bool:
    """Whether a scheduler, if it is one, sets the momentum."""
    return isinstance(scheduler, WithMomentum) and scheduler.cycle_momentum


def refuse_cycled_momentum(scheduler: Scheduler, where: str) -> None:
    """
    Refuse schedulers that would cycle the momentum, where nothing but their value is read.

    :param where: The key of the scheduler, for the message.

    :raises OLMoConfigurationError: Also if one within it would.
    """
    if cycles_momentum(scheduler):
        raise OLMoConfigurationError(
            f"{where}.cycle_momentum: True is not allowed, allowed is false, as only a learning "
            "rate's own scheduler can set the momentum"
        )
    refuse_within(scheduler, where)


def refuse_within(scheduler: Scheduler, where: str) -> None:
    """As :func:`refuse_cycled_momentum`, but only of the schedulers within one."""
    for index, inner in enumerate(getattr(scheduler, "schedulers", [])):
        refuse_cycled_momentum(inner, f"{where}.schedulers.{index}")
