"""
What all optimizer configs share: validation, parameter groups, ``build()``.
"""

import dataclasses
import logging
import typing
from dataclasses import dataclass
from enum import Enum
from typing import (
    Any,
    ClassVar,
    Dict,
    FrozenSet,
    Generic,
    List,
    Mapping,
    Type,
    TypeVar,
)

import torch
import torch.nn as nn
from olmo_core.config import DType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import INITIAL_LR_FIELD, LR_FIELD, OptimConfig
from olmo_core.utils import move_to_device

from .engine.base import ALGORITHM, ExtOptimizer
from .engine.hyperparameters import Allowed, check_hyperparameters, to_choice, to_flag
from .engine.layout import MatrixLayout
from .engine.matrix_base import MatrixBase
from .engine.placement import data_parallel_group
from .engine.roles import (
    ParamRole,
    Role,
    RowBlocks,
    classify,
    frozen_parameter_names,
    layout_of,
    named_trainable_parameters,
)

__all__ = ["ExtOptimConfig", "MatrixOptimConfig", "learning_rate"]

log = logging.getLogger(__name__)

Opt = TypeVar("Opt", bound=ExtOptimizer)


@dataclass
class ExtOptimConfig(OptimConfig[Opt], Generic[Opt]):
    """
    Base class of the configs of this package. Its fields are the keywords of the optimizer, but
    for those in :data:`CONFIG_ONLY`.

    Values are checked when the config is made. The built optimizer keeps this config's
    hyperparameters when a checkpoint with others is loaded, and logs the differences; so
    ``fixed_fields`` of OLMo-core is true of every field here.

    :raises OLMoConfigurationError: Names the field, the value and what is allowed.
    """

    compile: bool = False
    """
    Compile the rule for single coordinates with ``torch.compile`` at the first step: one kernel for
    all shapes, which no schedule recompiles. ``step()`` itself is never compiled.
    """

    skip_step: bool = True
    """
    Skip a step, on all ranks alike and without a host-device sync, if a gradient, the loss or the
    gradient norm is not finite or a spike: parameters and state stay as they are.
    """

    rolling_interval_length: int = 128
    """
    Over how many steps the mean and the standard deviation of loss and gradient norm are taken,
    from 2 to 1024. No spike is found before half of them. As in OLMo-core's
    ``SkipStepAdamWConfig``.
    """

    sigma_factor: float = 6
    """
    How many standard deviations above the mean make a spike, > 0. As in OLMo-core's
    ``SkipStepAdamWConfig``.
    """

    state_dtype: DType = DType.float32
    """
    Dtype of state that is shaped like the parameter: float32, or bfloat16, rounded stochastically
    and on every mesh alike. Rules compute in float32; factors of matrices are float32.
    """

    seed: int = 0
    """Of whatever is random in a step, >= 0."""

    cautious_weight_decay: bool = False
    """
    Decay only the coordinates in which update and parameter do not differ in sign
    (arXiv:2510.12402).
    """

    CONFIG_ONLY: ClassVar[FrozenSet[str]] = frozenset({"group_overrides", "fixed_fields"})
    """Fields that decide what is built, not how it steps."""

    MODEL_OPTIONS: ClassVar[FrozenSet[str]] = frozenset()
    """Options of ``group_overrides`` that say what parameters are, and are no hyperparameters."""

    def __post_init__(self, *_: Any) -> None:
        owner = type(self).__name__
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if isinstance(value, list) and typing.get_origin(hint) is tuple:
                setattr(self, field.name, tuple(value))
            kinds = (hint, *typing.get_args(hint))
            if value is None and type(None) not in kinds:
                raise OLMoConfigurationError(f"{owner}: '{field.name}' is None, allowed is a value")
            for kind in kinds:
                if not isinstance(kind, type) or value is None:
                    continue
                if kind is bool:
                    to_flag(value, field.name, owner)
                elif issubclass(kind, Enum):
                    setattr(self, field.name, to_choice(kind, value, field.name, owner))
        check_hyperparameters(self.hyperparameters(), owner, self.allowed())

    @property
    def rule_config(self) -> "ExtOptimConfig":
        """The config of the rule: this one, or of a wrapper that of the optimizer inside."""
        return self

    def allowed(self) -> Mapping[str, Allowed]:
        """For fields that mean something else here than elsewhere, what is allowed."""
        return self.optimizer().allowed

    def hyperparameters(self) -> Dict[str, Any]:
        """The keywords of the optimizer."""
        return self.as_dict(exclude=self.CONFIG_ONLY, recurse=False)

    @classmethod
    def optimizer(cls) -> Type[Opt]:
        raise NotImplementedError

    def group_fields(self, row: ParamRole, opts: Mapping[str, Any]) -> Dict[str, Any]:
        """
        Fields of a parameter's group that follow from its role.

        :param opts: What ``group_overrides`` says of the parameter.
        """
        del row, opts
        return {}

    def roles(self, model: nn.Module, strict: bool = True) -> Dict[str, ParamRole]:
        """The role of each trainable parameter by canonical name, overrides applied."""
        return self._roles(model, self._overrides(model, strict))

    def _roles(
        self, model: nn.Module, overrides: Dict[str, Dict[str, Any]]
    ) -> Dict[str, ParamRole]:
        rows = classify(model)
        for name, opts in overrides.items():
            if "role" in opts:
                role = to_choice(
                    Role, opts["role"], f"group_overrides of {name}: role", _name(self)
                )
                rows[name] = dataclasses.replace(rows[name], role=role)
        return rows

    def build_groups(self, model: nn.Module, strict: bool = True) -> List[Dict[str, Any]]:
        """
        The parameter groups: one for each override and each rule, in the model's order.

        :param strict: Raise if a pattern in ``group_overrides`` matches no parameter.

        :raises OLMoConfigurationError: If a pattern matches nothing, or two overrides one
            parameter.
        """
        params = named_trainable_parameters(model)
        if not params:
            raise OLMoConfigurationError(
                f"{_name(self)}: the model has no trainable parameter, allowed is a model with one"
            )
        overrides = self._overrides(model, strict)
        rows = self._roles(model, overrides)
        groups: Dict[Any, Dict[str, Any]] = {}
        for name, param in params.items():
            opts = overrides.get(name, {})
            fields = self.group_fields(rows[name], opts)
            # Model options have their effect here.
            own = {key: value for key, value in opts.items() if key not in self.MODEL_OPTIONS}
            key = (id(opts) if opts else None, *fields.items())
            group = groups.setdefault(key, {"params": [], **fields, **own})
            group["params"].append((name, param))
        return list(groups.values())

    def of_model(self, model: nn.Module, strict: bool = True) -> Dict[str, Any]:
        """Further keywords of the optimizer, which follow from the model."""
        del model, strict
        return {}

    def _overrides(self, model: nn.Module, strict: bool) -> Dict[str, Dict[str, Any]]:
        # The options by parameter; parameters of one override share the same dict.
        params = named_trainable_parameters(model)
        frozen = frozen_parameter_names(model)
        by_name: Dict[str, Dict[str, Any]] = {}
        for index, override in enumerate(self.group_overrides or []):
            opts = dict(override.opts)
            if reserved := opts.keys() & {"params", ALGORITHM, *self.optimizer().counters}:
                raise OLMoConfigurationError(
                    f"{_name(self)}: '{min(reserved)}' cannot be set in 'group_overrides' {index}, "
                    "allowed are hyperparameters, and role for rules for matrices"
                )
            patterns = override.params
            is_list = isinstance(patterns, (list, tuple)) and len(patterns) > 0
            if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
                raise OLMoConfigurationError(
                    f"{_name(self)}: 'params' of 'group_overrides' {index} is {patterns!r}, "
                    "allowed is a list of names or patterns"
                )
            try:
                expanded = self._expand_param_globs(override, params, frozen, index, strict=strict)
            except OLMoConfigurationError as error:
                raise OLMoConfigurationError(
                    f"{_name(self)}: 'group_overrides' {index}: {error}"
                ) from None
            for name in dict.fromkeys(expanded.params):
                if name in by_name:
                    raise OLMoConfigurationError(
                        f"{_name(self)}: parameter '{name}' matches 'group_overrides' {index} "
                        f"({', '.join(override.params)}) and an earlier one, allowed is one"
                    )
                by_name[name] = opts
        return by_name

    def build(self, model: nn.Module, strict: bool = True) -> Opt:
        """
        Build the optimizer, with all of its state.

        :param model: The model to optimize, already parallelised.
        :param strict: Raise if a pattern in ``group_overrides`` matches no parameter.
        """
        groups = self.build_groups(model, strict=strict)
        optim = self.optimizer()(groups, **self.hyperparameters(), **self.of_model(model, strict))
        for group in optim.param_groups:
            group.setdefault(INITIAL_LR_FIELD, group[LR_FIELD])
            if self.compile:
                group[LR_FIELD] = move_to_device(torch.tensor(group[LR_FIELD]), self.device)
        _let_config_win(optim)
        for index, group in enumerate(optim.param_groups):
            fields = ", ".join(f"{k}={v}" for k, v in _settings(optim, group).items())
            log.info(f"{_name(optim)} group {index}, {len(group['params'])} parameters: {fields}")
        return optim


def learning_rate(config: OptimConfig) -> Any:
    """
    The learning rate of a config, also of OLMo-core's: of a wrapper that of the optimizer inside,
    unless it has one of its own; ``None`` if there is none.
    """
    if isinstance(config, ExtOptimConfig):
        return config.hyperparameters()["lr"]
    return getattr(config, "lr", None)


def _name(x: object) -> str:
    return type(x).__name__


def _settings(optim: ExtOptimizer, group: Mapping[str, Any]) -> Dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", *optim.counters)}


def _let_config_win(optim: ExtOptimizer) -> None:
    own = [_settings(optim, group) for group in optim.param_groups]

    def restore(loaded: torch.optim.Optimizer) -> None:
        changed = []
        for index, (group, fields) in enumerate(zip(loaded.param_groups, own)):
            for key, value in fields.items():
                # The saved lr is where the schedule stood, not a setting.
                if key != LR_FIELD and group.get(key) != value:
                    changed.append(f"group {index} {key}: {group.get(key)} -> {value}")
            lr = fields[LR_FIELD]
            if isinstance(lr, torch.Tensor):
                lr.fill_(fields[INITIAL_LR_FIELD])
            group.update(fields)
        if changed:
            log.warning(
                "The checkpoint was saved with other hyperparameters; the config's, or what a "
                "schedule makes of them, are used: " + "; ".join(changed)
            )

    optim.register_load_state_dict_post_hook(restore)


MatrixOpt = TypeVar("MatrixOpt", bound=MatrixBase)


@dataclass
class MatrixOptimConfig(ExtOptimConfig[MatrixOpt], Generic[MatrixOpt]):
    """
    Base class of the configs of optimizers with a rule for matrices, which leave other parameters
    to simpler rules. ``group_overrides`` may set the ``role`` of parameters.
    """

    row_blocks: RowBlocks = RowBlocks.whole
    """
    Which matrices a fused parameter is made of: ``whole``, as it is stored; ``fused``, q, k and v
    and gate and up apart; ``heads``, besides each head of q, k and v. ``group_overrides`` may set
    ``row_blocks`` to one of these, to a number of equal parts, or to a list of sizes.
    """

    share_replicas: bool = True
    """
    Under DDP, compute each matrix on one rank and send its update to the others; if not, each rank
    computes all. Rules with state of whole matrices always do the latter.
    """

    CONFIG_ONLY: ClassVar[FrozenSet[str]] = ExtOptimConfig.CONFIG_ONLY | {
        "row_blocks",
        "share_replicas",
    }

    MODEL_OPTIONS: ClassVar[FrozenSet[str]] = frozenset({"role", "row_blocks"})

    def takes_head(self) -> bool:
        """Whether the matrix rule also takes the head."""
        return False

    def algorithm_of(self, row: ParamRole, opts: Mapping[str, Any]) -> str:
        """Which rule a parameter follows."""
        del opts
        optimizer = self.optimizer()
        takes = {Role.matrix, Role.experts} | ({Role.head} if self.takes_head() else set())
        if row.role not in takes:
            (leftover,) = optimizer.leftover_rules
            return leftover
        return optimizer.algorithm

    def group_fields(self, row: ParamRole, opts: Mapping[str, Any]) -> Dict[str, Any]:
        algorithm = self.algorithm_of(row, opts)
        if algorithm == self.optimizer().algorithm and row.layout is None:
            raise OLMoConfigurationError(
                f"{_name(self)}: parameter '{row.name}' of shape {row.shape} has the role "
                f"'{row.role}', allowed are parameters that store matrices"
            )
        return {ALGORITHM: algorithm}

    def of_model(self, model: nn.Module, strict: bool = True) -> Dict[str, Any]:
        replicas = data_parallel_group(model) if self.share_replicas else None
        return {"layouts": self.layouts(model, strict), "replicas": replicas}

    def layouts(self, model: nn.Module, strict: bool = True) -> Dict[str, MatrixLayout]:
        """The matrices of each parameter that follows the matrix rule, by canonical name."""
        overrides = self._overrides(model, strict)
        out = {}
        for name, row in self._roles(model, overrides).items():
            opts = overrides.get(name, {})
            asked = opts.get("row_blocks")
            if self.group_fields(row, opts)[ALGORITHM] == self.optimizer().algorithm:
                out[name] = layout_of(row, self.row_blocks if asked is None else asked)
            elif asked is not None:
                raise OLMoConfigurationError(
                    f"{_name(self)}: 'row_blocks' is set for parameter '{name}' with the role "
                    f"'{row.role}', allowed are parameters that follow the rule for matrices"
                )
        return out
