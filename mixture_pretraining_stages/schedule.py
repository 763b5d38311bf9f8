"""
The learning rate of a stage: the run's schedule, or one of the stage's own, with its scale and its
warm-up.
"""

from dataclasses import dataclass
from typing import Any, Dict, NamedTuple, Optional, Tuple, Union

import torch
from olmo_core.optim import Scheduler
from olmo_core.optim.scheduler import SchedulerUnits

__all__ = ["Clock", "Span", "StageScheduler"]


class Span(NamedTuple):
    """A part of the run, or all of it."""

    first_step: int
    last_step: int
    first_token: int
    last_token: int

    def within(self, units: SchedulerUnits) -> Tuple[int, int]:
        """Its begin and its end."""
        if units == SchedulerUnits.tokens:
            return self.first_token, self.last_token
        return self.first_step, self.last_step


class Clock(NamedTuple):
    """Where a run stands: what a scheduler asks of a trainer."""

    global_step: int
    max_steps: int
    global_train_tokens_seen: int
    max_tokens: int


@dataclass
class StageScheduler(Scheduler):
    """
    A schedule, scaled for a stage.

    :param inner: The schedule.
    :param scale: By what its learning rate is multiplied.
    :param warmup: Steps of a linear warm-up at the start of the stage.
    :param stage: The stage's part of the run.
    :param over: The part that the schedule runs over: the stage, or the run.
    """

    inner: Optional[Scheduler] = None
    scale: float = 1.0
    warmup: int = 0
    stage: Optional[Span] = None
    over: Optional[Span] = None

    def __post_init__(self, *_: Any) -> None:
        assert self.inner is not None
        self.units, self.lr_field = self.inner.units, self.inner.lr_field
        self.initial_lr_field = self.inner.initial_lr_field

    def get_lr(
        self, initial_lr: Union[float, torch.Tensor], current: int, t_max: int
    ) -> Union[float, torch.Tensor]:
        """At a step or token of the run; outside of the stage as at its begin or end."""
        assert self.inner is not None
        if self.stage is None or self.over is None:
            return self.inner.get_lr(initial_lr, current, t_max) * self.scale
        first, last = self.stage.within(self.units)
        current = min(max(current, first), last)
        begin, end = self.over.within(self.units)
        return self.inner.get_lr(initial_lr, current - begin, end - begin) * self._factor(current)

    def set_lr(self, group: Dict[str, Any], trainer: Any) -> Union[float, torch.Tensor]:
        """As the base's. The schedule may set more than the learning rate."""
        assert self.inner is not None
        if self.stage is None or self.over is None:
            return super().set_lr(group, trainer)
        over, step, tokens = self.over, trainer.global_step, trainer.global_train_tokens_seen
        clock = Clock(
            step - over.first_step,
            over.last_step - over.first_step,
            tokens - over.first_token,
            over.last_token - over.first_token,
        )
        lr = self.inner.set_lr(group, clock)  # type: ignore[arg-type]
        lr = lr * self._factor(tokens if self.units == SchedulerUnits.tokens else step)
        if isinstance(group[self.lr_field], torch.Tensor):
            group[self.lr_field].fill_(lr)
        else:
            group[self.lr_field] = lr
        return lr

    def _factor(self, current: int) -> float:
        if not self.warmup or self.stage is None:
            return self.scale
        first, last = self.stage.within(self.units)
        per_step = (last - first) / (self.stage.last_step - self.stage.first_step)
        return self.scale * min(1.0, (current - first) / (self.warmup * per_step))
