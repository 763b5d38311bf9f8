"""
Runs whose weights to keep are an average of those that are trained: evaluation and export.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Iterator, Optional, Union

import torch
import torch.nn as nn
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import INITIAL_LR_FIELD, Scheduler
from olmo_core.optim.scheduler import SchedulerUnits
from olmo_core.train.callbacks import Callback, EvaluatorCallback
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..wrappers.schedule_free import ScheduleFree
from .attached import optimizer_of
from .passes import forget_whole_parameters

__all__ = ["AveragingCallback", "averaged", "check_never_decays", "export_averaged"]


@contextmanager
def averaged(model: nn.Module, optim: ScheduleFree) -> Iterator[None]:
    """
    Inside, the weights are the average, and afterwards bitwise what they were, whatever happens.

    :raises OLMoConfigurationError: If they are the average already.
    """
    forget_whole_parameters(model)
    with optim.averaged():
        try:
            yield
        finally:
            forget_whole_parameters(model)


def export_averaged(model: nn.Module, optim: ScheduleFree) -> Dict[str, torch.Tensor]:
    """
    The averaged weights, for use without the optimizer. Collective where parameters are sharded.

    :returns: As ``model.state_dict()``, whole and on the CPU, copies; where parameters are sharded
        on rank 0 only, and empty on others.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with averaged(model, optim):
        state = get_model_state_dict(model, options=options)
        return {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}


def check_never_decays(
    scheduler: Optional[Scheduler], initial_lr: float, t_max: int, where: str
) -> None:
    """
    Check a schedule at a thousand points.

    :param t_max: The length of the run, in the scheduler's units.
    :param where: For the message.

    :raises OLMoConfigurationError: If the learning rate falls.
    """
    if scheduler is None:
        return
    before = 0.0
    for now in [*range(0, t_max, max(1, t_max // 1000)), t_max]:
        lr = float(scheduler.get_lr(initial_lr, now, t_max))
        if lr < before * (1 - 1e-6):
            named = getattr(scheduler, "inner", scheduler)  # of one that scales another
            raise OLMoConfigurationError(
                f"{where}: {type(named).__name__} lowers the learning rate, at {now} of "
                f"{t_max} {scheduler.units} to {lr:.3g}, and the average of schedule_free is in "
                "place of that; allowed are schedules that never do: constant, "
                "constant_with_warmup, or none"
            )
        before = lr


@dataclass
class AveragingCallback(Callback):
    """
    Lets OLMo-core's evaluators see the average of ``schedule_free``, and no one else: checkpoints
    have the weights that are trained, and continue them::

        trainer_config.add_callback("averaging", AveragingCallback())

    Weights become the average for the time of an evaluation, so a run that is killed within one
    continues from its last checkpoint like any other. Evaluations of other weights than the run's,
    such as merged ones, stay as they are.

    :raises OLMoConfigurationError: When it is attached, unless the optimizer is ``schedule_free``,
        or if the scheduler lowers the learning rate.
    """

    # Before evaluators that run when training starts.
    priority: ClassVar[int] = 100

    def post_attach(self):
        self._check_scheduler()
        self._watch_evaluators()

    def pre_train(self):
        self._watch_evaluators()  # also those that were added since

    @property
    def _optim(self) -> ScheduleFree:
        owner = type(self).__name__
        return optimizer_of(self.trainer.train_module, ScheduleFree, "is schedule_free", owner)

    def _check_scheduler(self) -> None:
        group = self._optim.param_groups[0]
        initial_lr: Union[float, torch.Tensor] = group.get(INITIAL_LR_FIELD, group["lr"])
        scheduler = getattr(self.trainer.train_module, "scheduler", None)
        if scheduler is None:
            return
        in_tokens = scheduler.units == SchedulerUnits.tokens
        t_max = self.trainer.max_tokens if in_tokens else self.trainer.max_steps
        if t_max is not None:  # else the scheduler itself refuses
            check_never_decays(scheduler, float(initial_lr), t_max, type(self).__name__)

    def _watch_evaluators(self) -> None:
        for callback in self.trainer.callbacks.values():
            if isinstance(callback, EvaluatorCallback):
                if not isinstance(callback.perform_eval, _WithAverage):
                    evaluate = _WithAverage(self, callback.perform_eval)
                    callback.perform_eval = evaluate  # type: ignore[method-assign]


@dataclass
class _WithAverage:
    """An evaluator's ``perform_eval``, of the average."""

    averaging: AveragingCallback
    perform_eval: Any

    def __call__(self, prefix: str = "eval") -> None:
        if prefix != "eval":
            self.perform_eval(prefix=prefix)
            return
        module: Any = self.averaging.trainer.train_module
        with averaged(module.model, self.averaging._optim):
            self.perform_eval(prefix=prefix)
