"""
A model and its optimizer as they were at some moment.
"""

import copy
from typing import Any, Dict, List, MutableMapping, Tuple

import torch
import torch.nn as nn
from olmo_core.distributed.utils import get_local_tensor

from .passes import forget_whole_parameters

__all__ = ["Snapshot"]

Kept = Dict[Any, Tuple[Any, Any]]
"""By key the value itself, and what it was."""


class Snapshot:
    """
    Parameters and buffers of a model, and state and parameter groups of an optimizer, any of
    torch's kind. Each rank keeps its own shards, in a second copy on the same device, so neither
    taking one nor :meth:`restore` is collective.

    :param model: The model, already parallelised.
    :param optim: Its optimizer.
    """

    def __init__(self, model: nn.Module, optim: torch.optim.Optimizer):
        forget_whole_parameters(model)  # or some would not be the parameters themselves
        self._model, self._optim = model, optim
        tensors = [*model.parameters(), *model.buffers()]
        self._tensors: List[Tuple[torch.Tensor, torch.Tensor]] = [(x, _copy(x)) for x in tensors]
        self._groups = [_keep(group) for group in optim.param_groups]
        self._state = {param: _keep(state) for param, state in optim.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """
        Make everything bitwise what it was, in the same tensors. State that was created since is
        dropped, as an optimizer that creates its state late will create it anew.
        """
        forget_whole_parameters(self._model)
        for tensor, before in self._tensors:
            get_local_tensor(tensor).copy_(before)
        for group, kept in zip(self._optim.param_groups, self._groups):
            _put_back(group, kept)
        for param in [*self._optim.state]:
            if param in self._state:
                _put_back(self._optim.state[param], self._state[param])
            else:
                del self._optim.state[param]


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return get_local_tensor(value.detach()).clone()
    return copy.deepcopy(value)


def _keep(values: MutableMapping[Any, Any]) -> Kept:
    return {k: (v, v if k == "params" else _copy(v)) for k, v in values.items()}


def _put_back(values: MutableMapping[Any, Any], kept: Kept) -> None:
    values.clear()
    for key, (value, before) in kept.items():
        if isinstance(value, torch.Tensor):
            # In place, as optimizers have views of what is in their state.
            get_local_tensor(value.detach()).copy_(before)
            values[key] = value
        else:
            values[key] = before
