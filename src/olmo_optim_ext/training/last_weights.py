"""
The gradient of a batch at the last weights, for :class:`~olmo_optim_ext.elementwise.mars.Mars` with
``exact``, in OLMo-core's training loop.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, Tuple

from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.callbacks import Callback
from olmo_core.train.train_module import TransformerTrainModule

from ..elementwise.mars import Mars
from .attached import optimizer_of, transformer_of
from .gradient_values import ClipGradValueCallback
from .passes import backward_again, gradients_apart

__all__ = ["LastWeightsCallback"]


@dataclass
class LastWeightsCallback(Callback):
    """
    Gives ``mars`` with ``exact: true`` the gradient of each batch at the last weights, before the
    main pass::

        trainer_config.add_callback("last_weights", LastWeightsCallback())

    It has the same micro-batches, and is clipped by its own norm at the train module's
    ``max_grad_norm``, as in the authors' code, and before that like the main one where there is a
    ``ClipGradValueCallback``.

    :raises OLMoConfigurationError: When it is attached, unless the optimizer is ``mars`` with
        ``exact`` and the train module one that can make further passes.
    """

    # After callbacks that change the batch.
    priority: ClassVar[int] = -1000

    def post_attach(self):
        self._parts()

    def pre_step(self, batch: Dict[str, Any]):
        module, optim = self._parts()
        with gradients_apart(module):
            with optim.at_last_weights():
                backward_again(module, batch)
            for callback in self.trainer.callbacks.values():
                if isinstance(callback, ClipGradValueCallback):
                    callback.pre_optim_step()
            if module.max_grad_norm is not None:
                module._clip_grad_norm(module.max_grad_norm)
            optim.keep_last_gradients()

    def _parts(self) -> Tuple[TransformerTrainModule, Mars]:
        owner, allowed = type(self).__name__, "is mars with exact: true"
        module = transformer_of(self.trainer.train_module, owner)
        optim = optimizer_of(module, Mars, allowed, owner)
        if not optim.exact:
            raise OLMoConfigurationError(f"{owner}: 'exact' of mars is False, allowed {allowed}")
        return module, optim
