"""
The second pass of sharpness-aware minimisation, in OLMo-core's training loop.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Optional

from olmo_core.train.callbacks import Callback

from ..wrappers.sam import SAM
from .attached import optimizer_of, transformer_of
from .passes import backward_again

__all__ = ["SAMCallback"]


@dataclass
class SAMCallback(Callback):
    """
    Gives ``sam`` its second pass over the batch::

        trainer_config.add_callback("sam", SAMCallback())

    It comes between the pass of the train module and the step, with the same micro-batches, before
    gradients are clipped. Metrics, and the loss that the gate sees, are those of the first pass;
    so are the gradients that other callbacks see before the step, such as OLMo-core's
    ``GAPMonitorCallback``, unless their priority is lower still.

    :raises OLMoConfigurationError: When it is attached, unless the optimizer is ``sam`` and the
        train module one that can make further passes.
    """

    # After callbacks that change the batch.
    priority: ClassVar[int] = -1000

    _batch: Optional[Dict[str, Any]] = None

    def post_attach(self):
        transformer_of(self.trainer.train_module, type(self).__name__)
        self._optimizer()

    def pre_step(self, batch: Dict[str, Any]):
        # The train module takes entries out of its own.
        self._batch = dict(batch) if self._optimizer().wants_second_pass() else None

    def pre_optim_step(self):
        batch, self._batch = self._batch, None
        if batch is None:
            return
        optim = self._optimizer()
        module = transformer_of(self.trainer.train_module, type(self).__name__)
        try:
            optim.perturb()
            module.zero_grads()
            backward_again(module, batch)
        finally:
            optim.unperturb()

    def _optimizer(self) -> SAM:
        return optimizer_of(self.trainer.train_module, SAM, "is sam", type(self).__name__)
