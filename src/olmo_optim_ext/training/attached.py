"""
What a callback finds where it is attached.
"""

from typing import Any, Type, TypeVar

import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.train.train_module import TransformerTrainModule

__all__ = ["optimizer_of", "transformer_of"]

Opt = TypeVar("Opt", bound=torch.optim.Optimizer)


def optimizer_of(train_module: Any, kind: Type[Opt], allowed: str, owner: str) -> Opt:
    """
    The optimizer of a train module, if it is of some kind.

    :param allowed: What is allowed, in words.
    :param owner: What needs it, for the message.

    :raises OLMoConfigurationError: If it is another, or if there are several, as for pipelines.
    """
    optim = getattr(train_module, "optim", None)
    if not isinstance(optim, kind):
        raise OLMoConfigurationError(
            f"{owner}: 'optim' of the {type(train_module).__name__} is a {type(optim).__name__}, "
            f"allowed {allowed}"
        )
    return optim


def transformer_of(train_module: Any, owner: str) -> TransformerTrainModule:
    """
    The train module, if it is one that can make further passes.

    :param owner: What needs them, for the message.

    :raises OLMoConfigurationError: If it is for pipelines, or steps with an optimizer of its own.
    """
    if not isinstance(train_module, TransformerTrainModule):
        raise OLMoConfigurationError(
            f"{owner}: the train module is a {type(train_module).__name__}, allowed is "
            "TransformerTrainModule"
        )
    return train_module
