"""
A run that outlives a batch with a loss that is not finite.

The optimizer skips the step of such a batch, but the trainer ends the run when it sees the loss
among the metrics.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from olmo_core.train.callbacks import Callback
from olmo_core.train.common import TRAIN_CE_LOSS_METRIC, MetricMergeStrategy

from ..engine.base import ExtOptimizer
from .attached import optimizer_of

__all__ = ["LOSS_NOT_FINITE_METRIC", "BadBatchCallback"]

LOSS_NOT_FINITE_METRIC = "train/CE loss not finite"
"""1.0 for a step whose loss was NaN or infinite, else 0.0."""


@dataclass
class BadBatchCallback(Callback):
    """
    Lets a run go on after a batch with a loss that is not finite, if the optimizer skipped it::

        trainer_config.add_callback("bad_batches", BadBatchCallback())

    For such a step the trainer records the last finite loss in place of the batch's, and
    :data:`LOSS_NOT_FINITE_METRIC` says so. The run still ends with the trainer's ``RuntimeError``
    if the step was not skipped (``skip_step=False``), and if no loss has been finite since the
    training began, of which a resumed run knows from the checkpoint. There is no host-device sync.

    :raises OLMoConfigurationError: When it is attached, unless the train module has one optimizer,
        of this package: OLMo-core's own spoil the weights in a step that they report as skipped.
    """

    # Before the checkpointers, which make the trainer check all metrics recorded so far.
    priority: ClassVar[int] = 100

    def post_attach(self):
        self._optimizer()

    def post_train_batch(self):
        loss = self.trainer.get_metric(TRAIN_CE_LOSS_METRIC)
        if loss is None:  # one of the trainer's ``steps_to_skip``
            return
        optim = self._optimizer()
        gate = optim.shared
        # Of the gate's history, as it is in the checkpoint; it has finite losses only.
        known, last = gate["gate_count"][0] > 0, gate["gate_history"][0, -1]
        bad = ~loss.isfinite()
        replace = bad & known & optim.step_skipped.bool()
        # Neither is reduced: the train module has reduced the loss already, for the gate.
        self.trainer.record_metric(
            TRAIN_CE_LOSS_METRIC,
            torch.where(replace, last.to(loss), loss),
            merge_strategy=MetricMergeStrategy.latest,
        )
        self.trainer.record_metric(LOSS_NOT_FINITE_METRIC, bad.float())

    def _optimizer(self) -> ExtOptimizer:
        allowed = "are optimizers of olmo_optim_ext"
        return optimizer_of(self.trainer.train_module, ExtOptimizer, allowed, type(self).__name__)
