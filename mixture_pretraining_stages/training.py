"""
An experiment: its spec, and what OLMo-core objects it stands for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Optional, Tuple, Type

import torch
from olmo_core.config import DType
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import ConstantScheduler, OptimConfig, Scheduler
from olmo_core.train.train_module import (
    TransformerActivationCheckpointingConfig,
    TransformerDataParallelConfig,
    TransformerTensorParallelConfig,
    TransformerTrainModuleConfig,
)

from olmo_optim_ext.catalog import closest, list_optimizers, optimizer_info
from olmo_optim_ext.config import ExtOptimConfig, MatrixOptimConfig
from olmo_optim_ext.elementwise.sophia import SophiaConfig
from olmo_optim_ext.training import ScheduledField
from olmo_optim_ext.wrappers.base import WrapperConfig

from . import checks
from .comparing.comparison import ComparisonSpec
from .decoding import decode_fields, decode_registered, require, to_plain
from .models import model_config, words
from .sources import SourceSpec
from .spec_parts import (
    CheckpointSpec,
    DataParallelism,
    EvaluationSpec,
    OptimizerMetricsSpec,
    ParallelismSpec,
    Precision,
    StageSizes,
    StageSpec,
    WarmStartSpec,
)

__all__ = ["JolmoModel"]

OLMO_CORE_PREFIX = "olmo_core."
"""Of optimizer names that mean OLMo-core's own, as in ``olmo_core.muon``."""


@dataclass
class JolmoModel:
    """
    The spec of a pretraining experiment.

    :raises OLMoConfigurationError: From :meth:`check`, naming the key, the value and what is
        allowed.
    """

    name: str
    sources: Dict[str, SourceSpec]
    stages: List[StageSpec]
    optimizer: Dict[str, Any]
    """
    ``name``, and any field of that optimizer's config. ``batch_tokens``, where it or the optimizer
    inside has one, is ``global_batch_size`` if it is not given.
    """
    model: Any = "olmo3_14M"
    """
    The name of a factory of OLMo-core's ``TransformerConfig``, a mapping with ``factory`` and its
    arguments, or a full ``TransformerConfig``.
    """
    tokenizer: Any = "bytes"
    """``bytes``, the path of a ``tokenizer.json``, or OLMo-core's ``TokenizerConfig``."""
    sequence_length: int = 1024
    global_batch_size: int = 65_536
    """In tokens."""
    rank_microbatch_size: int = 8192
    """In tokens: what a rank processes at a time."""
    seed: int = 42
    scheduler: Optional[Dict[str, Any]] = None
    """
    ``type``, and any field of that scheduler, of OLMo-core's or this package's. It runs over the
    whole run.
    """
    weight_decay_schedule: Optional[Dict[str, Any]] = None
    """Such a scheduler for the weight decay, over the whole run; ``null`` leaves it as it is."""
    momentum_schedule: Optional[Dict[str, Any]] = None
    """The same for the momentum, or the first of the betas, of each parameter group."""
    warm_start: Optional[WarmStartSpec] = None
    """Begin with the weights of a checkpoint; ``null`` begins with random ones."""
    max_grad_norm: Optional[float] = 1.0
    max_grad_value: Optional[float] = None
    """Largest absolute value in a gradient; clipped before the norm is."""
    precision: Precision = Precision.float32
    compile: bool = False
    """Compile the model."""
    activation_checkpointing: Optional[TransformerActivationCheckpointingConfig] = None
    parallelism: ParallelismSpec = field(default_factory=ParallelismSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    optimizer_metrics: Optional[OptimizerMetricsSpec] = None
    """Record what an optimizer for matrices does to them; ``null`` records nothing."""
    wandb: Optional[Dict[str, Any]] = None
    """Fields of OLMo-core's ``WandBCallback``."""
    comet: Optional[Dict[str, Any]] = None
    """Fields of OLMo-core's ``CometCallback``."""
    comparison: Optional[ComparisonSpec] = None
    """What ``olmo-optim compare`` compares. Commands for one run refuse it."""
    cache: Optional[str] = None
    """Where tokenised text is kept; default is the user's cache folder."""
    output: str = "runs"

    def check(self, world_size: int = 1) -> None:
        """
        Check everything that needs neither data nor a device.

        :param world_size: The number of ranks.

        :raises OLMoConfigurationError: Names the key, the value and what is allowed.
        """
        checks.check(self, world_size)

    def sizes(self, stage: Optional[StageSpec] = None) -> StageSizes:
        """The sizes of a stage, or what the run has for stages without their own."""
        run = (self.sequence_length, self.global_batch_size, self.rank_microbatch_size)
        if stage is None:
            return StageSizes(*run)
        own = (stage.sequence_length, stage.global_batch_size, stage.rank_microbatch_size)
        return StageSizes(*(b if a is None else a for a, b in zip(own, run)))

    def optimizer_of(self, stage: StageSpec) -> Dict[str, Any]:
        """``name`` and fields of the optimizer of a stage."""
        return self.optimizer if stage.optimizer is None else stage.optimizer

    def where(self, stage: Optional[StageSpec], key: str) -> str:
        """The dotted key of something that a stage may have of its own."""
        if stage is None or getattr(stage, key) is None:
            return key
        return f"stages.{self.stages.index(stage)}.{key}"

    def has_matrix_rule(self, stage: StageSpec) -> bool:
        """Whether the optimizer of a stage, or the one inside, has a rule for matrices."""
        config = self.optimizer_config(stage)
        rule = config.rule_config if isinstance(config, ExtOptimConfig) else config
        return isinstance(rule, MatrixOptimConfig)

    def optimizer_config(self, stage: Optional[StageSpec] = None) -> OptimConfig:
        """The config of the optimizer of a stage, or of the run's."""
        values = self.optimizer if stage is None else self.optimizer_of(stage)
        batch_tokens = self.sizes(stage).global_batch_size
        return self.decode_optimizer(values, batch_tokens, self.where(stage, "optimizer"))

    def warm_start_optimizer_config(self) -> OptimConfig:
        """The config of the optimizer whose state the first stage begins with."""
        assert self.warm_start is not None
        values = self.warm_start.optimizer
        if values is None:
            return self.optimizer_config(self.stages[0])
        return self.decode_optimizer(values, self.global_batch_size, "warm_start.optimizer")

    def decode_optimizer(
        self, fields: Mapping[str, Any], batch_tokens: int, where: str
    ) -> OptimConfig:
        values = dict(fields)
        name = values.pop("name", None)
        known = ", ".join(list_optimizers())
        require(isinstance(name, str), f"{where}.name", name, f"one of {known}")
        if issubclass(_optimizer_config_class(name, where), SophiaConfig):
            values.setdefault("batch_tokens", batch_tokens)
        config = _decode_optimizer(name, values, where)
        if isinstance(config, WrapperConfig) and isinstance(config.rule_config, SophiaConfig):
            config = config.replace(inner={"batch_tokens": batch_tokens, **config.inner})
        return config

    def scheduler_config(self, stage: Optional[StageSpec] = None) -> Scheduler:
        """The learning-rate schedule of a stage, or of the run; constant if none is asked for."""
        own = None if stage is None else stage.scheduler
        values = self.scheduler if own is None else own
        if values is None:
            return ConstantScheduler()
        return decode_registered(Scheduler, values, self.where(stage, "scheduler"))

    def hyperparameter_schedulers(self) -> Dict[ScheduledField, Scheduler]:
        """The schedules of weight decay and momentum that are asked for."""
        asked = {name: getattr(self, f"{name}_schedule") for name in ScheduledField}
        return {
            name: decode_registered(Scheduler, values, f"{name}_schedule")
            for name, values in asked.items()
            if values is not None
        }

    def model_config(self, vocab_size: int) -> TransformerConfig:
        """
        The config of the model.

        :param vocab_size: Of the tokenizer. A factory gets it padded to a multiple of 128.
        """
        return model_config(self.model, self.seed, vocab_size)

    def build_on_meta(
        self, vocab_size: int, stage: Optional[StageSpec] = None
    ) -> Tuple[torch.nn.Module, torch.optim.Optimizer]:
        """
        The model and its optimizer without memory, which shows whether they can be built.

        :param vocab_size: Of the tokenizer.
        :param stage: Whose optimizer; ``None`` is the run's.

        :raises OLMoConfigurationError: With whatever their classes refuse.
        """
        try:
            model = self.model_config(vocab_size).build(init_device="meta")
        except OLMoConfigurationError:
            raise
        except Exception as error:  # OLMo-core's layers raise many types
            raise OLMoConfigurationError(f"model: it cannot be built: {words(error)}") from None
        where = self.where(stage, "optimizer")
        try:
            optim = self.optimizer_config(stage).build(model)
        except OLMoConfigurationError as error:
            raise OLMoConfigurationError(f"{where}: {error}") from None
        except Exception as error:  # OLMo-core's own optimizers, too
            raise OLMoConfigurationError(f"{where}: it cannot be built: {words(error)}") from None
        checks.check_schedules_of(self, optim, stage)
        return model, optim

    def tensor_ranks(self, world_size: int) -> int:
        """How many ranks share each layer, and see the same batch."""
        return self.parallelism.tensor if world_size > 1 else 1

    def train_module_config(
        self, world_size: int, stage: Optional[StageSpec] = None
    ) -> TransformerTrainModuleConfig:
        """The config of the train module, with the optimizer and the sizes of a stage."""
        shape, sizes = self.parallelism, self.sizes(stage)
        data, tensor = None, None
        if world_size > 1:
            if shape.data != DataParallelism.none:
                data = TransformerDataParallelConfig(
                    name=DataParallelType(str(shape.data)),
                    num_replicas=shape.replicas if shape.data == DataParallelism.hsdp else None,
                )
            if shape.tensor > 1:
                tensor = TransformerTensorParallelConfig(degree=shape.tensor)
        return TransformerTrainModuleConfig(
            rank_microbatch_size=sizes.rank_microbatch_size,
            max_sequence_length=sizes.sequence_length,
            optim=self.optimizer_config(stage),
            scheduler=self.scheduler_config(stage),
            max_grad_norm=self.max_grad_norm,
            compile_model=self.compile,
            ac_config=self.activation_checkpointing,
            dp_config=data,
            tp_config=tensor,
            autocast_precision=DType.bfloat16 if self.precision == Precision.bfloat16 else None,
        )

    def as_plain(self) -> Dict[str, Any]:
        """The spec with all defaults, as plain data."""
        return to_plain(self)


def _optimizer_config_class(name: str, where: str = "optimizer") -> Type[OptimConfig]:
    if name.startswith(OLMO_CORE_PREFIX):
        own = name[len(OLMO_CORE_PREFIX) :]
        theirs = sorted(set(OptimConfig.get_registered_names()) - set(list_optimizers()))
        if own not in theirs:
            raise OLMoConfigurationError(
                f"{where}.name: OLMo-core has no optimizer {own!r}, allowed are "
                f"{closest(own, theirs)}"
            )
        return OptimConfig.get_registered_class(own)
    try:
        return optimizer_info(name).config_class
    except OLMoConfigurationError as error:
        raise OLMoConfigurationError(f"{where}.name: {error}") from None


def _optimizer_class_name(name: str) -> str:
    """
    The class name of an optimizer's config, by which OLMo-core's configs find it (``_CLASS_``).

    :param name: A catalogue name, with or without ``ext_``, or ``olmo_core.`` and one of
        OLMo-core's names.

    :raises OLMoConfigurationError: If there is none; gives the closest names.
    """
    cls = _optimizer_config_class(name)
    return f"{cls.__module__}.{cls.__name__}"


def _build_optimizer_spec(name: str, **values: Any) -> OptimConfig:
    """
    The config of an optimizer, from fields that mean the same for all of them (``lr``,
    ``weight_decay``, ``betas``) and any others that its config has. Where a rule for matrices has
    no betas of its own, ``betas`` are those of the AdamW beside it.

    :raises OLMoConfigurationError: If there is no such optimizer or field, or a value is not
        allowed.
    """
    return _decode_optimizer(name, values, "optimizer")


def _decode_optimizer(name: str, values: Dict[str, Any], where: str) -> OptimConfig:
    cls = _optimizer_config_class(name, where)
    known = {f.name for f in fields(cls)}
    if "betas" in values and "betas" not in known and "adamw_betas" in known:
        rest = {key: value for key, value in values.items() if key != "betas"}
        values = {"adamw_betas": values["betas"], **rest}
    return decode_fields(cls, values, where)
