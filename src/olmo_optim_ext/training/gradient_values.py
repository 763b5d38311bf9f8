"""
Gradients whose values are clipped, in OLMo-core's training loop.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Iterable

import torch
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.callbacks import Callback
from torch.distributed.tensor import DTensor

from ..engine.hyperparameters import POSITIVE
from .attached import transformer_of

__all__ = ["ClipGradValueCallback", "clip_grad_value"]


@torch.no_grad()
def clip_grad_value(params: Iterable[torch.Tensor], max_value: float) -> None:
    """
    ``g <- min(max(g, -max_value), max_value)`` for every value of the gradients of parameters, as
    ``torch.nn.utils.clip_grad_value_``, but an infinite one becomes infinity, and not the bound: a
    batch that is not finite must still look like one. NaN stays NaN. Each rank clips its shards.
    """
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        if isinstance(grad, DTensor) and isinstance(param, DTensor):
            if grad.placements != param.placements:  # such as sums that no rank has yet
                param.grad = grad = grad.redistribute(param.device_mesh, param.placements)
        local = get_local_tensor(grad)
        infinite = local.isinf()
        local.clamp_(-max_value, max_value).masked_fill_(infinite, math.inf)


@dataclass
class ClipGradValueCallback(Callback):
    """
    Clips the values of gradients before each step, with :func:`clip_grad_value`::

        trainer_config.add_callback("clip_grad_value", ClipGradValueCallback(max_grad_value=1.0))

    It comes before the train module clips their norm at ``max_grad_norm``, which is then that of
    the clipped values, and after the second pass of ``sam``. There is no host-device sync, and
    nothing is exchanged.

    :raises OLMoConfigurationError: When it is attached, if the value is not allowed, or the train
        module's gradients are not those of its parameters.
    """

    # After callbacks that make further passes before the step.
    priority: ClassVar[int] = -2000

    max_grad_value: float = 1.0
    """Largest absolute value, > 0 and finite."""

    def post_attach(self):
        holds, allowed = POSITIVE
        owner = type(self).__name__
        if not holds(self.max_grad_value):
            raise OLMoConfigurationError(
                f"{owner}: 'max_grad_value' is {self.max_grad_value!r}, allowed is {allowed}"
            )
        transformer_of(self.trainer.train_module, owner)

    def pre_optim_step(self):
        module = transformer_of(self.trainer.train_module, type(self).__name__)
        clip_grad_value(module.model.parameters(), self.max_grad_value)
