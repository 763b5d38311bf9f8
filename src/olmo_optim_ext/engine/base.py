"""
The base class of all optimizers: names, eager state, the two counters and the state-dict contract.

Three facts of :mod:`torch.distributed.checkpoint` (DCP) shape it. DCP materialises lazy state by
calling ``step()`` with zero gradients, which moves bias corrections: so state is created when the
optimizer is built. DCP keeps only ``state`` and ``param_groups``: so the call count lives in the
groups. And ``Optimizer.load_state_dict`` casts state to the parameter's dtype: so state is loaded
by copying into the tensors that exist.
"""

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

import torch
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from .hyperparameters import check_hyperparameters

__all__ = ["CALLS", "STEP", "ExtOptimizer", "GroupWork", "Member"]

CALLS = "calls"
"""Param-group key: how often ``step()`` was called, a host integer, the same in every group."""

STEP = "step"
"""State key: how often the parameter was updated, a 0-d tensor on the parameter's device."""


class Member(NamedTuple):
    """One parameter that has a gradient, as the update loops see it."""

    slot: int
    """Its place in the group's clock."""

    param: torch.Tensor
    """The parameter: a plain tensor or a :class:`DTensor`."""

    grad: torch.Tensor
    """The local part of its gradient, shaped like the local part of the parameter."""

    state: Dict[str, torch.Tensor]
    """Its state."""

    def local(self, name: str) -> torch.Tensor:
        """The local part of a state tensor."""
        return get_local_tensor(self.state[name])


class GroupWork(NamedTuple):
    """What a step has to do for one parameter group."""

    group: Dict[str, Any]
    """The group's hyperparameters."""

    clock: torch.Tensor
    """Updates of each trainable parameter of the group, including this one, shape ``(n,)``."""

    members: Sequence[Member]
    """The parameters of the group that have a gradient, never empty."""


class ExtOptimizer(Optimizer):
    """
    Base class of all optimizers of this package.

    A subclass says with :meth:`buffers` which tensors of the parameter's shape it keeps, and does
    its work in :meth:`update`. State is float32 (float64 for float64 parameters), sharded
    like the parameter, and exists from construction for every trainable parameter on every rank.

    :param params: Parameters, ``(name, parameter)`` pairs or parameter groups of either. Parameters
        without a name are called ``param.N`` in messages.
    :param defaults: Default hyperparameters of a group.

    :raises OLMoConfigurationError: If a hyperparameter of any group is unknown or out of its range.
    """

    def __init__(self, params: Any, defaults: Dict[str, Any]):
        self._names: Dict[torch.Tensor, str] = {}
        self._clocks: List[torch.Tensor] = []
        super().__init__(params, {**defaults, CALLS: 0})

    def buffers(self, group: Mapping[str, Any]) -> Sequence[str]:
        """Names of the state tensors, shaped like the parameter, of the parameters of a group."""
        raise NotImplementedError

    def update(self, work: Sequence[GroupWork]) -> None:
        """Update parameters and state in place. Called once a step, on all ranks alike."""
        raise NotImplementedError

    def check_group(self, group: Mapping[str, Any]) -> None:
        """
        Check what :mod:`~olmo_optim_ext.engine.hyperparameters` does not know.

        :raises OLMoConfigurationError: If a value of the group is not allowed.
        """

    def name_of(self, param: torch.Tensor) -> str:
        """The canonical name of a parameter."""
        return self._names[param]

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        """
        Add a group and create the state of its parameters.

        :raises OLMoConfigurationError: If a key of the group is unknown or a value not allowed.
        """
        group = dict(param_group)
        params = group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        named = [p if isinstance(p, tuple) else (None, p) for p in params]
        group["params"] = [p for _, p in named]
        known = {*self.defaults, "initial_lr"}
        for key in group.keys() - {"params"}:
            if key not in known:
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: '{key}' is not a field of a parameter group, "
                    f"allowed are {', '.join(sorted(known - {CALLS}))}"
                )
        check_hyperparameters({**self.defaults, **group}, type(self).__name__)
        self.check_group({**self.defaults, **group})

        super().add_param_group(group)
        group = self.param_groups[-1]
        for name, param in named:
            self._names[param] = name if name is not None else f"param.{len(self._names)}"
        self._clocks.append(self._create_state(group))

    def _create_state(self, group: Dict[str, Any]) -> torch.Tensor:
        trainable = [p for p in group["params"] if p.requires_grad]
        dtype = torch.float32
        for param in trainable:
            if not param.is_floating_point():
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: parameter '{self.name_of(param)}' has dtype "
                    f"{param.dtype}, allowed are real floating point dtypes"
                )
            dtype = torch.promote_types(dtype, param.dtype)
        device = trainable[0].device if trainable else None
        clock = torch.zeros(len(trainable), dtype=dtype, device=device)
        for param, step in zip(trainable, clock.unbind()):
            self.state[param] = {STEP: step}
            for name in self.buffers(group):
                self.state[param][name] = torch.zeros_like(
                    param, dtype=dtype, memory_format=torch.contiguous_format
                )
        return clock

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """
        Update every parameter that has a gradient.

        :param closure: Re-evaluates the model and returns the loss.

        :returns: What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work: List[GroupWork] = []
        for group, clock in zip(self.param_groups, self._clocks):
            group[CALLS] += 1
            members = self._members(group)
            if not members:
                continue
            if len(members) == len(clock):
                clock.add_(1)
            else:
                for member in members:
                    member.state[STEP].add_(1)
            work.append(GroupWork(group, clock, members))
        if work:
            self.update(work)
        return loss

    def _members(self, group: Dict[str, Any]) -> List[Member]:
        trainable = (p for p in group["params"] if p in self.state)
        return [
            Member(slot, param, self._local_grad(param), self.state[param])
            for slot, param in enumerate(trainable)
            if param.grad is not None
        ]

    def _local_grad(self, param: torch.Tensor) -> torch.Tensor:
        grad = param.grad
        assert grad is not None
        if grad.is_sparse:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: the gradient of '{self.name_of(param)}' is sparse, "
                "allowed are dense gradients"
            )
        if isinstance(grad, DTensor) and isinstance(param, DTensor):
            if grad.placements != param.placements:
                grad = grad.redistribute(param.device_mesh, param.placements)
        return get_local_tensor(grad)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """
        Load what :meth:`state_dict` returned, by copying into the existing state: dtypes and
        shardings stay as this optimizer made them.

        :param state_dict: Parameters are matched by position, as in
            :meth:`torch.optim.Optimizer.load_state_dict`.

        :raises OLMoConfigurationError: If groups, parameters or state tensors do not correspond.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            if (changed := pre_hook(self, state_dict)) is not None:
                state_dict = changed

        saved_groups = state_dict["param_groups"]
        saved_sizes = [len(g["params"]) for g in saved_groups]
        sizes = [len(g["params"]) for g in self.param_groups]
        if saved_sizes != sizes:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: the state to load has parameter groups of sizes "
                f"{saved_sizes}, this optimizer has {sizes}"
            )
        for group, saved in zip(self.param_groups, saved_groups):
            for param, key in zip(group["params"], saved["params"]):
                if param in self.state:
                    self._load_param_state(param, state_dict["state"].get(key, {}))
        for group, saved in zip(self.param_groups, saved_groups):
            group.update({k: v for k, v in saved.items() if k != "params"})

        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_param_state(self, param: torch.Tensor, saved: Mapping[str, Any]) -> None:
        state = self.state[param]
        if saved.keys() != state.keys():
            raise OLMoConfigurationError(
                f"{type(self).__name__}: the state to load for '{self.name_of(param)}' has "
                f"{sorted(saved)}, this optimizer keeps {sorted(state)}"
            )
        for key, tensor in state.items():
            value = saved[key]
            if not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
                found = tuple(value.shape) if isinstance(value, torch.Tensor) else value
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: the state to load for '{self.name_of(param)}' has "
                    f"'{key}' of shape {found}, this optimizer keeps {tuple(tensor.shape)}"
                )
            tensor.copy_(value)
