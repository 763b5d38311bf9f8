"""
The base class of all optimizers: names, eager state, the two counters, the gate and the state-dict
contract.

Three facts of :mod:`torch.distributed.checkpoint` (DCP) shape it. DCP materialises lazy state by
calling ``step()`` with zero gradients, which moves bias corrections: so state is created when the
optimizer is built. DCP keeps only ``state`` and ``param_groups``: so the call count lives in the
groups. And ``Optimizer.load_state_dict`` casts state to the parameter's dtype: so state is loaded
by copying into the tensors that exist.
"""

import copy
import inspect
from enum import Enum
from functools import lru_cache
from typing import (
    Any,
    Callable,
    ClassVar,
    Dict,
    FrozenSet,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypedDict,
    Union,
)

import torch
from olmo_core.config import DType
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import SkipStepOptimizer
from torch.distributed.tensor import DTensor

from .gate import all_finite, decide, gate_state
from .hyperparameters import Allowed, check_hyperparameters, to_flag
from .moments import Moment

__all__ = [
    "ALGORITHM",
    "CALLS",
    "DECOUPLED",
    "STEP",
    "EngineOptions",
    "ExtOptimizer",
    "GroupWork",
    "Member",
]

ALGORITHM = "algorithm"
"""Param-group key of optimizers with several rules: which one the parameters of a group follow."""

CALLS = "calls"
"""Param-group key: how often ``step()`` was called, a host integer, the same in every group."""

DECOUPLED = "decoupled_weight_decay"
"""
Param-group key of rules that offer both: true for ``p <- (1 - lr * weight_decay) p``, false for L2,
``g <- g + weight_decay * p`` before anything else.
"""

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


class EngineOptions(TypedDict, total=False):
    """
    Keywords that all optimizers take beside their hyperparameters; for their meaning see
    :class:`~olmo_optim_ext.config.ExtOptimConfig`.
    """

    compile: bool
    skip_step: bool
    rolling_interval_length: int
    sigma_factor: float
    state_dtype: DType
    seed: int
    cautious_weight_decay: bool


class GroupWork(NamedTuple):
    """What a step has to do for one parameter group."""

    group: Dict[str, Any]
    """The group's hyperparameters."""

    clock: torch.Tensor
    """Updates of each trainable parameter of the group, including this one, shape ``(n,)``."""

    members: Sequence[Member]
    """The parameters of the group that have a gradient, never empty."""

    proceed: Optional[torch.Tensor]
    """Whether the step is taken, a 0-d bool tensor; ``None`` without a gate."""


class ExtOptimizer(SkipStepOptimizer):
    """
    Base class of all optimizers of this package.

    A subclass says with :meth:`buffers` which tensors of the parameter's shape it keeps, and does
    its work in :meth:`update`. State is sharded like the parameter, and exists from construction
    for every trainable parameter on every rank.

    With ``skip_step`` a bad batch leaves parameters and state as they are, on all ranks alike
    (:mod:`~olmo_optim_ext.engine.gate`). :data:`latest_loss` and :data:`latest_grad_norm` are
    optional; the trainer sets them. Without the norm, a step checks the gradients itself.

    :param params: Parameters, ``(name, parameter)`` pairs or parameter groups of either. Parameters
        without a name are called ``param.N`` in messages.
    :param defaults: Default hyperparameters of a group.

    :raises OLMoConfigurationError: If a hyperparameter of any group is unknown or out of its range.
    """

    allowed: ClassVar[Mapping[str, Allowed]] = {}
    """For hyperparameters that mean something else here than elsewhere, what is allowed."""

    nullable: ClassVar[FrozenSet[str]] = frozenset()
    """Hyperparameters of groups for which ``None`` is a value."""

    counters: ClassVar[Tuple[str, ...]] = (CALLS,)
    """Param-group keys of host integers that only count, the same in every group, from 0."""

    exact_buffers: ClassVar[FrozenSet[str]] = frozenset()
    """Of :meth:`buffers` those that are like weights: ``state_dtype`` does not apply to them."""

    def __init__(
        self,
        params: Any,
        defaults: Dict[str, Any],
        compile: bool = False,
        skip_step: bool = True,
        rolling_interval_length: int = 128,
        sigma_factor: float = 6,
        state_dtype: DType = DType.float32,
        seed: int = 0,
        cautious_weight_decay: bool = False,
    ):
        name = type(self).__name__
        options = dict(
            rolling_interval_length=rolling_interval_length,
            sigma_factor=sigma_factor,
            state_dtype=state_dtype,
            seed=seed,
        )
        check_hyperparameters(options, name)
        self._compile = to_flag(compile, "compile", name)
        self._skip_step = to_flag(skip_step, "skip_step", name)
        self._state_dtype = DType(state_dtype).as_pt()
        self._seed = seed
        self._names: Dict[torch.Tensor, str] = {}
        self._clocks: List[torch.Tensor] = []
        self._latest: Dict[str, Optional[torch.Tensor]] = {"loss": None, "grad_norm": None}
        self._proceed: Optional[torch.Tensor] = None
        self._shared_holder: Optional[torch.Tensor] = None
        self._shared_keys: FrozenSet[str] = frozenset()
        self._complete = False
        super().__init__(
            params,
            {
                **defaults,
                "cautious_weight_decay": cautious_weight_decay,
                **dict.fromkeys(self.counters, 0),
            },
            rolling_interval_length=rolling_interval_length,
            sigma_factor=sigma_factor,  # type: ignore[arg-type]
        )
        self._complete = True
        self._create_shared_state()

    def _create_shared_state(self) -> None:
        """Create state that belongs to no parameter in that of one: DCP keeps it there."""
        if not self.state:
            return
        # The first by name, so that it does not depend on the groups.
        holder, before = min(self.state, key=self.name_of), self._shared_holder
        if before is None:
            shared = self.shared_state(holder.device)
            self._shared_keys = frozenset(shared)
            self.state[holder].update(shared)
        elif before is not holder:
            moved = {key: self.state[before].pop(key) for key in sorted(self._shared_keys)}
            self.state[holder].update(moved)
        self._shared_holder = holder

    def shared_state(self, device: torch.device) -> Dict[str, torch.Tensor]:
        """
        New state that belongs to no parameter, the same on all ranks: that of the gate, to which a
        subclass may add. :data:`shared` is where it lives.
        """
        return gate_state(device)

    @property
    def shared(self) -> Dict[str, torch.Tensor]:
        """The state of the parameter that holds what :meth:`shared_state` made."""
        assert self._shared_holder is not None
        return self.state[self._shared_holder]

    @property
    def latest_loss(self) -> Optional[torch.Tensor]:
        """The loss of the batch of the next step, 0-d, the same on all ranks."""
        return self._latest["loss"]

    @latest_loss.setter
    def latest_loss(self, loss: torch.Tensor) -> None:
        self._latest["loss"] = loss

    @property
    def latest_grad_norm(self) -> Optional[torch.Tensor]:
        """The norm of all gradients of the next step, 0-d, the same on all ranks."""
        return self._latest["grad_norm"]

    @latest_grad_norm.setter
    def latest_grad_norm(self, grad_norm: torch.Tensor) -> None:
        self._latest["grad_norm"] = grad_norm

    @property
    def skip_step(self) -> bool:
        """Whether there is a gate. It may be taken away, and put back, between two steps."""
        return self._skip_step

    @skip_step.setter
    def skip_step(self, skip_step: bool) -> None:
        self._skip_step = to_flag(skip_step, "skip_step", type(self).__name__)

    def get_step_factor(self) -> torch.Tensor:
        """1.0 if the last call of :meth:`step` took the step, 0.0 if it skipped it."""
        if self._proceed is None:
            return torch.ones((), device=self.device)
        return self._proceed.float()

    def buffers(self, group: Mapping[str, Any]) -> Sequence[str]:
        """Names of the state tensors, shaped like the parameter, of the parameters of a group."""
        raise NotImplementedError

    def is_exact(self, buffer: str) -> bool:
        """Whether ``state_dtype`` does not apply to one of :meth:`buffers`."""
        return buffer in self.exact_buffers

    def moments(self, group: Mapping[str, Any]) -> Sequence[Moment]:
        """
        Which state of the parameters of a group are averages of gradients or of their squares, so
        that another optimizer can continue them.
        """
        del group
        return ()

    def put(self, param: torch.Tensor, key: str, value: torch.Tensor) -> None:
        """
        Set state that has a number for each element of the parameter. All ranks call it.

        :param value: Shaped and sharded like the parameter.
        """
        get_local_tensor(self.state[param][key]).copy_(get_local_tensor(value))

    def update(self, work: Sequence[GroupWork]) -> None:
        """Update parameters and state in place. Called once a step, on all ranks alike."""
        raise NotImplementedError

    def prepare_step(self) -> None:
        """Called first by :meth:`step`, on all ranks alike, after a closure."""

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
        known = {*self.defaults, "initial_lr"} - {*self.counters}
        for key in group.keys() - {"params"}:
            is_none = group[key] is None and self.defaults.get(key) is not None
            if key not in known or (is_none and key not in self.nullable):
                problem = "is None" if key in known else "is not a field of a parameter group"
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: '{key}' {problem}, allowed are values of "
                    f"{', '.join(sorted(known))}"
                )
            group[key] = _plain(group[key])
        values = {**self.defaults, **group}
        check_hyperparameters(values, type(self).__name__, self.allowed)
        for key in _flags(type(self).__mro__) & values.keys():
            to_flag(values[key], key, type(self).__name__)
        if not values.get(DECOUPLED, True) and values["cautious_weight_decay"]:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: '{DECOUPLED}' is False with 'cautious_weight_decay', "
                "allowed is True, as L2 weight decay has no mask"
            )
        self.check_group(values)

        names = [name for name, _ in named if name is not None]
        taken = {*self._names.values()}
        for i, name in enumerate(names):
            if name in taken or name in names[:i]:
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: two parameters are named '{name}', allowed is one"
                )

        super().add_param_group(group)
        group = self.param_groups[-1]
        group.update({key: self.param_groups[0][key] for key in self.counters})
        for name, param in named:
            self._names[param] = name if name is not None else f"param.{len(self._names)}"
        self._clocks.append(self._create_state(group))
        if self._complete:
            self._create_shared_state()

    def _create_state(self, group: Dict[str, Any]) -> torch.Tensor:
        trainable = [p for p in group["params"] if p.requires_grad]
        dtype = torch.float32
        for param in trainable:
            if param.dtype not in (torch.float32, torch.bfloat16, torch.float64):
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: parameter '{self.name_of(param)}' has dtype "
                    f"{param.dtype}, allowed are float32, bfloat16 and float64"
                )
            dtype = torch.promote_types(dtype, param.dtype)
        device = trainable[0].device if trainable else None
        clock = torch.zeros(len(trainable), dtype=dtype, device=device)
        buffer_dtype = dtype if self._state_dtype == torch.float32 else self._state_dtype
        for param, step in zip(trainable, clock.unbind()):
            self.state[param] = {STEP: step}
            for name in self.buffers(group):
                self.state[param][name] = torch.zeros_like(
                    param,
                    dtype=dtype if self.is_exact(name) else buffer_dtype,
                    memory_format=torch.contiguous_format,
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
        self.prepare_step()
        members_of = []
        for group in self.param_groups:
            group[CALLS] += 1
            members_of.append(self._members(group))
        proceed = self._open_gate([member for members in members_of for member in members])
        work: List[GroupWork] = []
        for group, clock, members in zip(self.param_groups, self._clocks, members_of):
            if not members:
                continue
            advance: Union[int, torch.Tensor] = 1 if proceed is None else proceed
            if len(members) == len(clock):
                clock.add_(advance)
            else:
                for member in members:
                    member.state[STEP].add_(advance)
            work.append(GroupWork(group, clock, members, proceed))
        if work:
            self.update(work)
        return loss

    def _open_gate(self, members: Sequence[Member]) -> Optional[torch.Tensor]:
        loss, grad_norm = self._latest["loss"], self._latest["grad_norm"]
        self._latest = {"loss": None, "grad_norm": None}  # of this batch only
        self._proceed = None
        if not self._skip_step or not members:
            return None
        proceed = None
        if loss is not None or grad_norm is not None:
            proceed = decide(
                self.shared,
                loss,
                grad_norm,
                self.rolling_interval_length,
                self.sigma_factor,
            )
        if grad_norm is None:
            finite = all_finite([m.param for m in members], [m.grad for m in members])
            proceed = finite if proceed is None else proceed & finite
        self._proceed = proceed
        return proceed

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

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)
        for group, clock in zip(self.param_groups, self._clocks):
            trainable = (param for param in group["params"] if param in self.state)
            for param, step in zip(trainable, clock.unbind()):  # pickle made them tensors apart
                self.state[param][STEP] = step

    def _to_checkpoint(self, param: torch.Tensor, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """A state tensor as it is saved."""
        del param, key
        return tensor

    def _saved_as_it_is(self, param: torch.Tensor, key: str) -> bool:
        """Whether :meth:`_to_checkpoint` returns the tensor itself."""
        del param, key
        return True

    def _shape_in_checkpoint(
        self, param: torch.Tensor, key: str, tensor: torch.Tensor
    ) -> torch.Size:
        """The shape of what :meth:`_to_checkpoint` returns."""
        del param, key
        return tensor.shape

    def _from_checkpoint(
        self, param: torch.Tensor, key: str, tensor: torch.Tensor, saved: torch.Tensor
    ) -> None:
        """Fill a state tensor from what :meth:`_to_checkpoint` returned."""
        del param, key
        tensor.copy_(saved)

    def state_dict(self) -> Dict[str, Any]:
        """
        As :meth:`torch.optim.Optimizer.state_dict`, and the names of the parameters of each group,
        which DCP has no use for.
        """
        packed = super().state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        state = {
            index: {
                key: self._to_checkpoint(param, key, tensor)
                for key, tensor in self.state[param].items()
            }
            for index, param in enumerate(params)
            if param in self.state
        }
        names = [[self.name_of(p) for p in group["params"]] for group in self.param_groups]
        return {**packed, "state": state, "param_names": names}

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
        saved_states = [dict(saved) for saved in state_dict["state"].values()]
        shared = {key: s.pop(key) for s in saved_states for key in self._shared_keys if key in s}
        state_of = dict(zip(state_dict["state"], saved_states))
        pairs = []
        for param in self.state:
            saved = state_of.get(saved_of[param][1], {})
            pairs.append((param, {**saved, **shared} if param is self._shared_holder else saved))
        for param, saved in pairs:
            self._check_param_state(param, saved)
        for param, saved in pairs:
            for key, tensor in self.state[param].items():
                self._from_checkpoint(param, key, tensor, saved[key])
        for group in self.param_groups:
            saved_group = saved_groups[saved_of[group["params"][0]][0]]
            group.update({k: copy.deepcopy(v) for k, v in saved_group.items() if k != "params"})

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
            if self._saved_as_it_is(param, key) and isinstance(value, DTensor) != isinstance(
                tensor, DTensor
            ):
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: of the state to load for '{self.name_of(param)}' and "
                    f"this optimizer's only one is sharded in '{key}', allowed are both or none; "
                    "torch.distributed.checkpoint converts between them"
                )
            expected = self._shape_in_checkpoint(param, key, tensor)
            if not isinstance(value, torch.Tensor) or value.shape != expected:
                found = tuple(value.shape) if isinstance(value, torch.Tensor) else value
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: the state to load for '{self.name_of(param)}' has "
                    f"'{key}' of shape {found}, this optimizer keeps {tuple(expected)}"
                )


@lru_cache(maxsize=None)
def _flags(classes: Tuple[Any, ...]) -> FrozenSet[str]:
    """The keywords of an optimizer and its base classes whose defaults are true or false."""
    signatures = [inspect.signature(cls.__init__) for cls in classes]
    return frozenset(
        name
        for signature in signatures
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.default, bool)
    )


def _plain(value: Any) -> Any:
    # What torch.load(weights_only=True) reads.
    if isinstance(value, Enum):
        return value.value
    return tuple(value) if isinstance(value, list) else value
