"""
The base class of all optimizers: names, eager state, the two counters and the state-dict contract.

Three facts of :mod:`torch.distributed.checkpoint` (DCP) shape it. DCP materialises lazy state by
calling ``step()`` with zero gradients, which moves bias corrections: so state is created when the
optimizer is built. DCP keeps only ``state`` and ``param_groups``: so the call count lives in the
groups. And ``Optimizer.load_state_dict`` casts state to the parameter's dtype: so state is loaded
by copying into the tensors that exist.
"""

from enum import Enum
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

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
        known = {*self.defaults, "initial_lr"} - {CALLS}
        for key in group.keys() - {"params"}:
            if key not in known or (group[key] is None and self.defaults.get(key) is not None):
                problem = "is None" if key in known else "is not a field of a parameter group"
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: '{key}' {problem}, allowed are values of "
                    f"{', '.join(sorted(known))}"
                )
            group[key] = _plain(group[key])
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
        for param in group["params"]:
            if param.grad is not None and param not in self.state:
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: parameter '{self.name_of(param)}' has a gradient but "
                    "no state, as it was frozen when the optimizer was built; build another one"
                )
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

    def __getstate__(self) -> Dict[str, Any]:
        # torch keeps only groups and state; hooks may be closures, which cannot be pickled.
        return {key: value for key, value in self.__dict__.items() if "hook" not in key}

    def state_dict(self) -> Dict[str, Any]:
        """
        As :meth:`torch.optim.Optimizer.state_dict`, and the names of the parameters of each group,
        which DCP has no use for.
        """
        names = [[self.name_of(p) for p in group["params"]] for group in self.param_groups]
        return {**super().state_dict(), "param_names": names}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """
        Load what :meth:`state_dict` returned, by copying into the existing state: dtypes and
        shardings stay as this optimizer made them.

        :param state_dict: Parameters are matched by name where there are names, so the groups may
            be others; else by position.

        :raises OLMoConfigurationError: If groups, parameters or state tensors do not correspond.
            Nothing has been loaded then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            if (changed := pre_hook(self, state_dict)) is not None:
                state_dict = changed

        saved_groups = state_dict["param_groups"]
        saved_of = self._match(saved_groups, state_dict.get("param_names"))
        pairs = [
            (param, state_dict["state"].get(saved_of[param][1], {}))
            for group in self.param_groups
            for param in group["params"]
            if param in self.state
        ]
        for param, saved in pairs:
            self._check_param_state(param, saved)
        for param, saved in pairs:
            for key, tensor in self.state[param].items():
                tensor.copy_(saved[key])
        for group in self.param_groups:
            saved_group = saved_groups[saved_of[group["params"][0]][0]]
            group.update({k: v for k, v in saved_group.items() if k != "params"})

        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _match(
        self, saved_groups: List[Dict[str, Any]], names: Optional[List[List[str]]]
    ) -> Dict[torch.Tensor, Tuple[int, Any]]:
        """For each parameter the index of its saved group, and the key of its saved state."""
        owner = type(self).__name__
        if names is None:
            saved_sizes = [len(g["params"]) for g in saved_groups]
            sizes = [len(g["params"]) for g in self.param_groups]
            if saved_sizes != sizes:
                raise OLMoConfigurationError(
                    f"{owner}: the state to load has parameter groups of sizes {saved_sizes}, "
                    f"this optimizer has {sizes}"
                )
            return {
                param: (index, key)
                for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups))
                for param, key in zip(group["params"], saved["params"])
            }
        by_name = {
            name: (index, key)
            for index, (group_names, saved) in enumerate(zip(names, saved_groups))
            for name, key in zip(group_names, saved["params"])
        }
        params = {self.name_of(p): p for group in self.param_groups for p in group["params"]}
        if by_name.keys() != params.keys():
            other = sorted(by_name.keys() ^ params.keys())
            raise OLMoConfigurationError(
                f"{owner}: the state to load is for other parameters than this optimizer's: only "
                f"one of them has {', '.join(other[:3])}" + (" ..." if len(other) > 3 else "")
            )
        return {params[name]: place for name, place in by_name.items()}

    def _check_param_state(self, param: torch.Tensor, saved: Mapping[str, Any]) -> None:
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


def _plain(value: Any) -> Any:
    # What torch.load(weights_only=True) reads.
    if isinstance(value, Enum):
        return value.value
    return tuple(value) if isinstance(value, list) else value
