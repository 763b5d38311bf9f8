"""
Further forward and backward passes over a batch, beside the one that a train module makes of it.

They are OLMo-core's own dry run, as at the start of a fit: so micro-batches, gradient accumulation,
the synchronisation of gradients, autocast and auxiliary losses are those of the main pass, also
where a later OLMo-core does them otherwise.
"""

from contextlib import contextmanager
from typing import Any, Dict, Iterator

import torch.nn as nn
from olmo_core.train.train_module import TransformerTrainModule
from torch.distributed.fsdp import FSDPModule

__all__ = ["backward_again", "forget_whole_parameters", "gradients_apart"]


def forget_whole_parameters(model: nn.Module) -> None:
    """
    Drop what FSDP keeps of whole parameters. A forward pass without a backward one, as in an
    evaluation, may leave some, which the next pass would use in place of weights that have changed
    since, and in place of the parameters: OLMo-core's head is such a module.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def backward_again(train_module: TransformerTrainModule, batch: Dict[str, Any]) -> None:
    """
    Add the gradients of the mean loss of a batch to those that there are. Collective, like the main
    pass. Nothing else remains of it: no metrics, no loss for the gate, and not of what routers
    count of experts.

    :param batch: As the trainer gives it to callbacks before the step: the main pass takes entries
        out of its own, so after that a shallow copy made before it. It is left as it is.
    """
    forget_whole_parameters(train_module.model)  # weights may have moved
    with _muted(train_module):
        train_module.train_batch(dict(batch), dry_run=True)


@contextmanager
def gradients_apart(train_module: TransformerTrainModule) -> Iterator[None]:
    """
    Inside there are no gradients at first, and afterwards those that there were before, the same
    tensors.
    """
    forget_whole_parameters(train_module.model)  # or some would not be the parameters themselves
    params = list(train_module.model.parameters())
    before = [param.grad for param in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in zip(params, before):
            param.grad = grad


@contextmanager
def _muted(train_module: TransformerTrainModule) -> Iterator[None]:
    def record_nothing(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        del name, value, args, kwargs

    # Of the instance, which hides the method of the class.
    train_module.record_metric = record_nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        del train_module.record_metric
