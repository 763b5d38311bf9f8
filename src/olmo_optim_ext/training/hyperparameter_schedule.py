"""
Weight decay and momentum that follow a schedule, in OLMo-core's training loop.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

import torch
from olmo_core.config import StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import ConstantScheduler, Scheduler
from olmo_core.optim.scheduler import SchedulerUnits
from olmo_core.train.callbacks import Callback

from ..engine.hyperparameters import FRACTION, NON_NEGATIVE, POSITIVE, Allowed, to_choice
from ..schedulers.base import Clock, cycles_momentum, position, refuse_cycled_momentum
from ..schedulers.momentum import MOMENTUM_KEYS, momentum_of, set_momentum
from .attached import optimizer_of

__all__ = [
    "HyperparameterSchedule",
    "HyperparameterScheduleCallback",
    "ScheduledField",
    "check_schedule",
]

Group = Dict[str, Any]

CHECKED = 1000
"""At how many positions a schedule is checked before a run."""


class ScheduledField(StrEnum):
    """What can follow a schedule beside the learning rate."""

    weight_decay = "weight_decay"

    momentum = "momentum"
    """``momentum`` or the first of ``betas``, whichever the rule of a group uses."""


def check_schedule(
    scheduler: Scheduler,
    initial: float,
    t_max: int,
    what: str,
    where: str,
    allowed: Allowed = NON_NEGATIVE,
) -> None:
    """
    Evaluate a schedule at about a thousand positions of a run, the last two among them.

    :param initial: The initial value.
    :param t_max: The length of the run, in the scheduler's units.
    :param what: What is scheduled, for the message.
    :param where: For the message.
    :param allowed: Of its values.

    :raises OLMoConfigurationError: If a value is not allowed, or if the scheduler has none.
    """
    for now in sorted({*range(1, t_max, max(1, t_max // CHECKED)), max(1, t_max - 1), t_max}):
        at = f"{where}: {type(scheduler).__name__} at {now} of {t_max} {scheduler.units}"
        try:
            value = float(scheduler.get_lr(initial, now, t_max))
        except (ArithmeticError, AssertionError) as error:  # of OLMo-core's schedulers
            raise OLMoConfigurationError(
                f"{at} fails for the {what} {initial:g} with {type(error).__name__}, allowed are "
                "fields for which it has a value"
            ) from None
        _check_value(value, what, at, allowed)


def _check_value(value: float, what: str, at: str, allowed: Allowed) -> None:
    holds, words = allowed
    if not holds(value):
        raise OLMoConfigurationError(f"{at} makes the {what} {value:.6g}, allowed is {words}")


class HyperparameterSchedule:
    """
    A schedule of one field of parameter groups. The initial value of each group is the one that it
    has now; groups where it is 0 keep it.

    :param field: What is scheduled.
    :param scheduler: Any; its ``get_lr`` gets the value of a group for the learning rate.
    :param groups: The parameter groups of an optimizer.
    :param where: What asks for it, for messages.

    :raises OLMoConfigurationError: If a group has no such field, or no group a value above 0.
    """

    def __init__(
        self,
        field: ScheduledField,
        scheduler: Scheduler,
        groups: Sequence[Group],
        where: str,
    ):
        self.field = to_choice(ScheduledField, field, "field", where)
        self.scheduler = scheduler
        self.where = where
        self.what = self.field.replace("_", " ")
        refuse_cycled_momentum(scheduler, where)
        self.initial = [self._get(group) for group in groups]
        self.allowed = self._allowed(groups)
        keys = {"weight_decay"} if self.field == ScheduledField.weight_decay else MOMENTUM_KEYS
        self._before = [{key: group[key] for key in keys & group.keys()} for group in groups]
        if not any(self.initial):
            raise OLMoConfigurationError(
                f"{where}: the {self.what} is 0 in all parameter groups, allowed is an optimizer "
                "with one > 0"
            )

    def _get(self, group: Group) -> float:
        if self.field == ScheduledField.momentum:
            return momentum_of(group, f"{self.where}: the momentum is scheduled")
        if "weight_decay" not in group:
            raise OLMoConfigurationError(
                f"{self.where}: a parameter group has no 'weight_decay', allowed is an optimizer "
                "with one"
            )
        return group["weight_decay"]

    def _set(self, group: Group, value: float) -> None:
        if self.field == ScheduledField.momentum:
            set_momentum(group, value, f"{self.where}: the momentum is scheduled")
        else:
            group["weight_decay"] = value

    def _allowed(self, groups: Sequence[Group]) -> Allowed:
        if self.field == ScheduledField.momentum:
            return FRACTION
        # Of lars and lamb: parameters without weight decay take steps of another size.
        if any(group.get("always_adapt") is False for group in groups):
            return POSITIVE[0], "a finite number > 0 with 'always_adapt' False"
        return NON_NEGATIVE

    def check(self, t_max: int) -> None:
        """
        Check the values of a whole run.

        :param t_max: Its length, in the scheduler's units.

        :raises OLMoConfigurationError: If one is not allowed.
        """
        for initial in sorted({*self.initial} - {0}):
            check_schedule(self.scheduler, initial, t_max, self.what, self.where, self.allowed)

    def apply(self, groups: Sequence[Group], clock: Clock) -> List[float]:
        """
        Set the values of a step.

        :param groups: Those that this was made with, or others like them.

        :returns: The value of each.

        :raises OLMoConfigurationError: If one is not allowed.
        """
        now, t_max = position(self.scheduler, clock)
        at = f"{self.where}: {type(self.scheduler).__name__} at {now} of {t_max}"
        values = []
        for group, initial in zip(groups, self.initial):
            value = initial
            if initial:
                value = float(self.scheduler.get_lr(initial, now, t_max))
                _check_value(value, self.what, at, self.allowed)
                self._set(group, value)
            values.append(value)
        return values

    def reset(self, groups: Sequence[Group]) -> None:
        """Set the initial values, to the last bit."""
        for group, before in zip(groups, self._before):
            group.update(before)


@dataclass
class HyperparameterScheduleCallback(Callback):
    """
    Lets weight decay or momentum follow a schedule over the whole run::

        trainer_config.add_callback(
            "weight_decay_schedule",
            HyperparameterScheduleCallback("weight_decay", LinearWithWarmup(warmup=0, alpha_f=0.1)),
        )

    Before each step every parameter group gets the scheduler's value for the one that it had when
    this was attached: that of the optimizer's config, overrides of groups included. Groups where it
    is 0 keep it. When training ends, groups have their initial values again, so that another
    trainer can continue with the same optimizer. There is no state: what a checkpoint says of the
    values does not matter, as the next step sets them.

    Values are numbers on the host, and the optimizers of this package are not recompiled for
    them. The metrics have them as ``optim/weight decay (group 0)``.

    :raises OLMoConfigurationError: When it is attached, if the optimizer has no such field, or it
        is 0 everywhere, or may not change (the momentum of ``schedule_free``); if the train
        module's scheduler sets the momentum, too; if a value of the run is not allowed.
    """

    field: ScheduledField = ScheduledField.weight_decay
    """``weight_decay`` or ``momentum``: ``momentum``, or the first of ``betas``."""

    scheduler: Scheduler = dataclasses.field(default_factory=ConstantScheduler)
    """Any, in steps or in tokens."""

    _schedule: Optional[HyperparameterSchedule] = None

    def post_attach(self):
        where = f"{type(self).__name__} of {self.field}"
        optim = self._optim
        self._schedule = HyperparameterSchedule(
            self.field, self.scheduler, optim.param_groups, where
        )
        self._check_other_scheduler(where)
        in_tokens = self.scheduler.units == SchedulerUnits.tokens
        t_max = self.trainer.max_tokens if in_tokens else self.trainer.max_steps
        if t_max is not None:  # else the first step raises
            self._schedule.check(t_max)

    def _check_other_scheduler(self, where: str) -> None:
        other = getattr(self.trainer.train_module, "scheduler", None)
        if self.field == ScheduledField.momentum and cycles_momentum(other):
            raise OLMoConfigurationError(
                f"{where}: the train module's {type(other).__name__} sets the momentum, too, "
                "allowed is cycle_momentum False"
            )

    def pre_optim_step(self):
        assert self._schedule is not None
        values = self._schedule.apply(self._optim.param_groups, self.trainer)
        for index, value in enumerate(values):
            self.trainer.record_metric(
                f"{self._schedule.what} (group {index})", value, namespace="optim"
            )

    def close(self):
        if self._schedule is not None:
            self._schedule.reset(self._optim.param_groups)

    @property
    def _optim(self) -> torch.optim.Optimizer:
        allowed, owner = "are optimizers of torch's kind", type(self).__name__
        return optimizer_of(self.trainer.train_module, torch.optim.Optimizer, allowed, owner)
