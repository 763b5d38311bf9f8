"""
A learning-rate range test in OLMo-core's training loop (Smith, "Cyclical Learning Rates for
Training Neural Networks", arXiv:1506.01186, section 3.3): train for a while with a rate that grows
exponentially, and look at the loss.
"""

import math
import sys
from dataclasses import dataclass, field
from typing import Any, Callable, ClassVar, List, Optional, Union

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_world_size, is_distributed
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import Scheduler, SkipStepOptimizer
from olmo_core.train import ReduceType
from olmo_core.train.callbacks import Callback
from olmo_core.train.common import TRAIN_CE_LOSS_METRIC, MetricMergeStrategy

from ..engine.base import ExtOptimizer
from .attached import optimizer_of, transformer_of
from .lr_curve import diverged
from .snapshot import Snapshot

__all__ = ["LRFinderCallback", "RangeScheduler", "without_gate"]


@dataclass
class RangeScheduler(Scheduler):
    """
    ``lr = initial_lr * low * (high / low)^((t - 1) / (steps - 1))`` for ``t = 1 .. steps``, counted
    from ``first_step``. Relative to the initial rate of each group, so that groups keep their
    proportion: OLMo-core's ``ExponentialScheduler`` starts all of them at the same ``lr_min``, and
    ends at the initial rates.
    """

    low: float = 1e-3
    high: float = 1e3
    steps: int = 100
    first_step: int = 0
    """Steps of the trainer before the test."""

    def factor(self, step: int) -> float:
        """By what the initial rates are multiplied at a step of the trainer."""
        share = (step - self.first_step - 1) / max(1, self.steps - 1)
        return self.low * (self.high / self.low) ** min(max(share, 0.0), 1.0)

    def get_lr(
        self, initial_lr: Union[float, torch.Tensor], current: int, t_max: int
    ) -> Union[float, torch.Tensor]:
        del t_max
        return initial_lr * self.factor(current)


@dataclass
class LRFinderCallback(Callback):
    """
    Makes a fit of the trainer a range test::

        finder = LRFinderCallback(steps=200)
        trainer_config.add_callback("lr_finder", finder)  # with no_checkpoints=True, no_evals=True
        trainer_config.build(train_module, data_loader).fit()
        print(suggest(finder.factors, finder.losses))

    The test begins with the weights and the optimizer state that there are when training starts,
    multiplies the initial rates of all groups by factors from ``low`` to ``high`` instead of what
    the train module's scheduler says, and stops the run after ``steps`` steps, or once the loss has
    diverged (:func:`~olmo_optim_ext.training.lr_curve.diverged`). Then weights, buffers and
    optimizer state are bitwise what they were, also after an error, and the scheduler is the train
    module's own. The trainer's counters and its data loader stay where the test has ended: build
    another trainer to train. Checkpoints and evaluations within the test are of its weights.

    A loss is of the weights after the steps before it. So ``losses[i]``, the mean over the batch
    and all ranks, is that of the batch after the step with ``factors[i]``. It is read from the
    device in every step. The first of all must be finite, else the trainer raises its
    ``RuntimeError``; a later one that is not ends the test, and the metrics have the last finite
    one in its place.

    The gate of optimizers is off within the test: a step that is skipped would hide that the rate
    was too high, and after a flat part the first rise of the loss looks like a spike.

    :raises OLMoConfigurationError: When it is attached, unless the train module is one with a
        single optimizer, or for factors and steps that are no range.
    """

    # Before callbacks that save weights when training ends, or make the trainer check its metrics.
    priority: ClassVar[int] = 1000

    low: float = 1e-3
    high: float = 1e3
    steps: int = 100

    factors: List[float] = field(default_factory=list, init=False)
    losses: List[float] = field(default_factory=list, init=False)
    finished: bool = field(default=False, init=False)
    """Whether the test came to its end, by divergence or after all steps."""

    _schedule: Optional[RangeScheduler] = field(default=None, init=False, repr=False)
    _undo: List[Callable[[], None]] = field(default_factory=list, init=False, repr=False)
    _latest: Optional[float] = field(default=None, init=False, repr=False)
    """The factor of the step before, whose loss is not known yet."""
    _last_finite: float = field(default=math.nan, init=False, repr=False)

    def post_attach(self):
        owner = type(self).__name__
        if not (0 < self.low < self.high < math.inf):
            raise OLMoConfigurationError(
                f"{owner}: 'low' is {self.low!r} and 'high' {self.high!r}, allowed are finite "
                "numbers with 0 < low < high"
            )
        if self.steps < 2:
            raise OLMoConfigurationError(
                f"{owner}: 'steps' is {self.steps!r}, allowed is an integer >= 2"
            )
        self._optimizer()

    def pre_train(self):
        module: Any = transformer_of(self.trainer.train_module, type(self).__name__)
        optim = self._optimizer()
        self._undo = [Snapshot(module.model, optim).restore, without_gate(optim)]
        before = module.scheduler
        self._undo.append(lambda: setattr(module, "scheduler", before))
        self._schedule = RangeScheduler(
            low=self.low, high=self.high, steps=self.steps, first_step=self.step
        )
        module.scheduler = self._schedule
        self.factors, self.losses, self.finished, self._latest = [], [], False, None

    def post_train_batch(self):
        assert self._schedule is not None
        loss = self.trainer.get_metric(TRAIN_CE_LOSS_METRIC)
        if loss is not None:  # else it is one of the trainer's ``steps_to_skip``
            self._observe(self._over_ranks(loss))
            self._latest = self._schedule.factor(self.step)
        done = self.step - self._schedule.first_step >= self.steps
        if done or diverged(self.losses):
            self.finished = True
            # All ranks have the same numbers.
            self.trainer.cancel_run("the range test is over", no_sync=True)

    def post_train(self):
        self.restore()

    def on_error(self, exc: BaseException):
        del exc
        self.restore()

    def close(self):
        self.restore()

    def restore(self) -> None:
        """Put everything back, if it is not yet."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()  # only now, so that an interrupted call is made again

    def _observe(self, loss: float) -> None:
        if self._latest is None:
            self._last_finite = loss
            return
        self.factors.append(self._latest)
        self.losses.append(loss)
        if math.isfinite(loss):
            self._last_finite = loss
            return
        # The trainer ends a run with an error when it sees such a loss among the metrics.
        reduced = isinstance(self._optimizer(), SkipStepOptimizer)
        self.trainer.record_metric(
            TRAIN_CE_LOSS_METRIC,
            self._last_finite,
            reduce_type=None if reduced else ReduceType.mean,
            merge_strategy=MetricMergeStrategy.latest,
        )

    def _over_ranks(self, loss: torch.Tensor) -> float:
        loss = loss.detach().double()  # reduced already, of some optimizers: the mean is the same
        if is_distributed():
            loss = loss / get_world_size()
            dist.all_reduce(loss)
        return float(loss)

    def _optimizer(self) -> torch.optim.Optimizer:
        owner = type(self).__name__
        module = transformer_of(self.trainer.train_module, owner)
        return optimizer_of(module, torch.optim.Optimizer, "is one optimizer", owner)


def without_gate(optim: torch.optim.Optimizer) -> Callable[[], None]:
    """
    Take the gate of an optimizer away, ours or one of OLMo-core's.

    :returns: What puts it back, with what it knew.
    """
    if isinstance(optim, ExtOptimizer):
        before = optim.skip_step
        optim.skip_step = False
        return lambda: setattr(optim, "skip_step", before)
    if isinstance(optim, SkipStepOptimizer):
        kept = {
            "rolling_interval_length": optim.rolling_interval_length,
            "_losses": [*optim._losses],
            "_grad_norms": [*optim._grad_norms],
        }
        optim.rolling_interval_length = sys.maxsize  # it skips nothing before half of that
        return lambda: optim.__dict__.update(kept)
    return lambda: None
