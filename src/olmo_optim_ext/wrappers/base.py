"""
What all wrappers share: a wrapper is a class that is mixed into that of the optimizer inside, so
that groups, gate, meshes and checkpoints are those of the optimizer inside.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import (
    Any,
    ClassVar,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    Type,
)

import torch
import torch.nn as nn
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import OptimConfig

from ..config import ExtOptimConfig
from ..engine.base import ExtOptimizer, GroupWork
from ..engine.hyperparameters import Allowed, check_hyperparameters
from ..engine.roles import ParamRole
from ..engine.write import chunks

__all__ = ["Wrapper", "WrapperConfig", "gated", "some_at_a_time", "wrapped"]

PREFIX = "wrapper_"
"""With which the names of a wrapper's options begin in the parameter groups."""


class Wrapper(ExtOptimizer):
    """
    Base class of what :func:`wrapped` mixes into an optimizer's class. ``update`` is the hook:
    ``super().update(work)`` does the step of the optimizer inside. :data:`own_buffers` are further
    state, shaped like the parameters.

    The names of what a wrapper keeps on itself begin with ``_wrapper``, as an optimizer inside may
    have any other. Its options are also in the groups, under names that begin with
    :data:`PREFIX`, so that a checkpoint tells with which it was made; those of this optimizer stay.

    :param params: As for the optimizer inside.
    :param own: The wrapper's options.
    :param inner: Keywords of the optimizer inside.
    :param lr: Learning rate; ``None`` leaves it to ``inner``. Likewise ``weight_decay``.
    :param options: Keywords that all optimizers take, and what follows from the model.
    """

    own_allowed: ClassVar[Mapping[str, Allowed]] = {}
    """What is allowed of the wrapper's options: elsewhere their names may mean other things."""

    own_buffers: ClassVar[Tuple[str, ...]] = ()

    def __init__(
        self,
        params: Any,
        own: Mapping[str, Any],
        inner: Optional[Mapping[str, Any]] = None,
        lr: Optional[float] = None,
        weight_decay: Optional[float] = None,
        **options: Any,
    ):
        check_hyperparameters(own, type(self).__name__, self.own_allowed)
        self._wrapper = dict(own)
        common = {"lr": lr, "weight_decay": weight_decay}
        given = {key: value for key, value in common.items() if value is not None}
        super().__init__(params, **{**(inner or {}), **given, **options})

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._name_options(self.param_groups[-1])

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            self._name_options(group)

    def _name_options(self, group: Dict[str, Any]) -> None:
        group.update({PREFIX + key: value for key, value in self._wrapper.items()})

    def buffers(self, group: Mapping[str, Any]) -> Sequence[str]:
        return (*super().buffers(group), *self.own_buffers)

    def __reduce_ex__(self, protocol: Any) -> Any:
        wrapper, inner = type(self).__bases__
        return _empty, (wrapper, inner), self.__getstate__()


def _empty(wrapper: Type[Wrapper], inner: Type[ExtOptimizer]) -> ExtOptimizer:
    cls = wrapped(wrapper, inner)
    return cls.__new__(cls)


_WRAPPED: Dict[Any, Type[ExtOptimizer]] = {}


def wrapped(wrapper: Type[Wrapper], inner: Type[ExtOptimizer]) -> Type[ExtOptimizer]:
    """The class of an optimizer with a wrapper around it, the same at every call."""
    if (wrapper, inner) not in _WRAPPED:
        members = {
            "__module__": wrapper.__module__,
            "__doc__": wrapper.__doc__,
            "exact_buffers": inner.exact_buffers | wrapper.exact_buffers,
        }
        name = f"{wrapper.__name__}{inner.__name__}"
        _WRAPPED[wrapper, inner] = type(name, (wrapper, inner), members)
    return _WRAPPED[wrapper, inner]


def gated(condition: torch.Tensor, work: GroupWork) -> torch.Tensor:
    """Whether a condition holds and the step is taken."""
    return condition if work.proceed is None else condition & work.proceed


def some_at_a_time(*tensors: torch.Tensor) -> Iterator[List[torch.Tensor]]:
    """The same elements of local tensors of one shape, so that temporaries stay in the cache."""
    if not all(x.is_contiguous() for x in tensors):
        yield list(tensors)
        return
    flat = [x.view(-1) for x in tensors]
    for begin, end in chunks(flat[0]):
        yield [x[begin:end] for x in flat]


_OF_THE_WRAPPER = frozenset(f.name for f in dataclasses.fields(ExtOptimConfig))
"""Fields that an optimizer inside takes from the wrapper."""


@dataclass
class WrapperConfig(ExtOptimConfig[ExtOptimizer]):
    """
    Base class of the configs of wrappers. Parameter groups, roles and layouts are those of the
    optimizer inside, so ``group_overrides`` have its hyperparameters.
    """

    inner: Any = field(default_factory=dict)
    """
    The optimizer inside: a mapping with ``name``, from the catalogue, and fields of its config, or
    a config, which becomes a mapping with all of its fields. Fields that all optimizers share are
    the wrapper's.
    """

    lr: Optional[float] = None
    """Learning rate, >= 0. ``None`` takes that of ``inner``."""

    weight_decay: Optional[float] = None
    """Decoupled weight decay, >= 0. ``None`` takes that of ``inner``."""

    wrapper: ClassVar[Type[Wrapper]]

    default_inner: ClassVar[str] = "ext_adamw"

    tuned: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By name, fields of optimizers inside whose defaults are others here."""

    def __post_init__(self, *args: Any) -> None:
        if isinstance(self.inner, ExtOptimConfig):
            self.inner = self._fields_of(self.inner)
        self.inner = _to_plain(self.inner)
        self._check_inner()
        super().__post_init__(*args)

    def _fields_of(self, config: ExtOptimConfig) -> Dict[str, Any]:
        # Of its own fields all, also those that have their defaults: those may be others here.
        out: Dict[str, Any] = {"name": config.get_registered_name()}
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            # lr and weight decay may be given here.
            given = f.name in ("lr", "weight_decay") and getattr(self, f.name) is not None
            left_out = value is None or given or f.name in _OF_THE_WRAPPER
            if not (left_out and value == _default(f)):
                out[f.name] = value
        return out

    def _check_inner(self) -> None:
        owner = type(self).__name__
        if not isinstance(self.inner, Mapping):
            raise OLMoConfigurationError(
                f"{owner}: 'inner' is {self.inner!r}, allowed is a mapping with the name of an "
                "optimizer and its fields"
            )
        fields = dict(self.inner)
        name = fields.pop("name", self.default_inner)
        inside = _optimizers_inside()
        names = [n for n in (name, f"ext_{name}") if isinstance(name, str) and n in inside]
        if not names:
            raise OLMoConfigurationError(
                f"{owner}: 'inner.name' is {name!r}, allowed are {_closest(name, inside)}"
            )
        self.inner = {"name": names[0], **fields}
        known = {f.name for f in dataclasses.fields(self._inner_class)} - _OF_THE_WRAPPER
        for key in fields:
            if key in _OF_THE_WRAPPER:
                raise OLMoConfigurationError(
                    f"{owner}: 'inner.{key}' cannot be set, allowed is {key!r} of {owner} itself"
                )
            if key not in known:
                raise OLMoConfigurationError(
                    f"{owner}: 'inner.{key}' is no field of {names[0]}, allowed are "
                    f"{_closest(key, known)}"
                )
        for key in ("lr", "weight_decay"):
            if key not in known and getattr(self, key) is not None:
                raise OLMoConfigurationError(
                    f"{owner}: '{key}' is {getattr(self, key)!r}, allowed is None, as {names[0]} "
                    "has no such field"
                )
            if fields.get(key) is not None and getattr(self, key) is not None:
                raise OLMoConfigurationError(
                    f"{owner}: '{key}' is {getattr(self, key)!r} and 'inner.{key}' is "
                    f"{fields[key]!r}, allowed is one of them"
                )

    @property
    def _inner_class(self) -> Type[ExtOptimConfig]:
        return _optimizers_inside()[self.inner["name"]]

    @property
    def rule_config(self) -> ExtOptimConfig:
        """The config of the optimizer inside."""
        fields = {key: value for key, value in self.inner.items() if key != "name"}
        common = {key: getattr(self, key) for key in sorted(_OF_THE_WRAPPER)}
        for key in ("lr", "weight_decay"):
            if getattr(self, key) is not None:
                common[key] = getattr(self, key)
        return self._inner_class(**{**self.tuned.get(self.inner["name"], {}), **fields, **common})

    def hyperparameters(self) -> Dict[str, Any]:
        """The keywords of the optimizer; ``inner`` are those of the one inside alone."""
        rule = self.rule_config.hyperparameters()
        own = super().hyperparameters()
        common: Dict[str, Any] = {k: rule.pop(k) for k in ("lr", "weight_decay") if k in rule}
        inner = {key: value for key, value in rule.items() if key not in _OF_THE_WRAPPER}
        return {**own, **common, "inner": inner}

    def allowed(self) -> Mapping[str, Allowed]:
        return self.wrapper.own_allowed

    def optimizer(self) -> Type[ExtOptimizer]:  # type: ignore[override]
        """The class of the optimizer, which depends on the one inside."""
        return wrapped(self.wrapper, self.rule_config.optimizer())

    def build_groups(self, model: nn.Module, strict: bool = True) -> List[Dict[str, Any]]:
        return self.rule_config.build_groups(model, strict)

    def roles(self, model: nn.Module, strict: bool = True) -> Dict[str, ParamRole]:
        return self.rule_config.roles(model, strict)

    def of_model(self, model: nn.Module, strict: bool = True) -> Dict[str, Any]:
        return self.rule_config.of_model(model, strict)


def _optimizers_inside() -> Dict[str, Type[ExtOptimConfig]]:
    """All that can be wrapped: ours, and others that build upon the same base."""
    known: Dict[str, Any] = {
        n: OptimConfig.get_registered_class(n) for n in OptimConfig.get_registered_names()
    }
    return {
        name: cls
        for name, cls in known.items()
        if issubclass(cls, ExtOptimConfig) and not issubclass(cls, WrapperConfig)
    }


def _closest(name: Any, allowed: Iterable[str]) -> str:
    from ..catalog import closest  # it imports this module

    return closest(str(name), sorted(allowed))


def _to_plain(value: Any) -> Any:
    """As it is in YAML, so that a config that was written and read is the same."""
    if isinstance(value, Mapping):
        return {key: _to_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value


def _default(f: Any) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
