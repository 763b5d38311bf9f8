"""
An experiment: its spec, how the spec is read from YAML, and what OLMo-core objects it stands for.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Type, Union

import torch
import yaml
from olmo_core.config import DType, StrEnum
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.attention.flash_attn_api import has_flash_attn_2
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import INITIAL_LR_FIELD, ConstantScheduler, OptimConfig, Scheduler
from olmo_core.train.train_module import (
    TransformerActivationCheckpointingConfig,
    TransformerDataParallelConfig,
    TransformerTensorParallelConfig,
    TransformerTrainModuleConfig,
)
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from olmo_optim_ext.catalog import closest, list_optimizers, optimizer_info
from olmo_optim_ext.config import ExtOptimConfig, MatrixOptimConfig
from olmo_optim_ext.elementwise.sophia import SophiaConfig
from olmo_optim_ext.schedulers import (
    WithMomentum,
    cycles_momentum,
    refuse_cycled_momentum,
    refuse_within,
)
from olmo_optim_ext.training import (
    HyperparameterSchedule,
    ScheduledField,
    check_never_decays,
    check_schedule,
)
from olmo_optim_ext.wrappers.base import WrapperConfig
from olmo_optim_ext.wrappers.schedule_free import ScheduleFreeConfig

from .comparison import ComparisonSpec
from .decoding import decode_fields, decode_registered, to_plain
from .plans import plan_stages, run_span
from .sources import SourceSpec

__all__ = [
    "CheckpointSpec",
    "EvaluationSpec",
    "JolmoModel",
    "OptimizerMetricsSpec",
    "ParallelismSpec",
    "ShareSpec",
    "StageSizes",
    "StageSpec",
    "WarmStartSpec",
    "load_spec",
]

OLMO_CORE_PREFIX = "olmo_core."
"""Of optimizer names that mean OLMo-core's own, as in ``olmo_core.muon``."""


class Precision(StrEnum):
    """In what the forward and the backward pass compute. Parameters are float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    """Autocast."""


class DataParallelism(StrEnum):
    """How ranks share the data, and the model's state."""

    none = "none"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


@dataclass
class ParallelismSpec:
    """How ranks share the work. With one rank nothing of it applies."""

    data: DataParallelism = DataParallelism.fsdp
    replicas: int = 1
    """Copies of the sharded model, with ``hsdp``."""
    tensor: int = 1
    """Ranks that share each layer."""


@dataclass
class ShareSpec:
    """
    How much of a stage is from a source: exactly one of :attr:`weight`, :attr:`tokens` and
    :attr:`repetitions`.
    """

    weight: Optional[float] = None
    """Relative to other weights, of what :attr:`tokens` and :attr:`repetitions` leave."""
    tokens: Optional[int] = None
    """So many tokens."""
    repetitions: Optional[float] = None
    """So often all of the source's training tokens."""
    max_repetitions: Optional[float] = None
    """
    No token more often than this. What a weight would ask for beyond it goes to the other weights.
    """


@dataclass
class StageSpec:
    """A part of the run with a mixture of its own. What is ``null`` is the run's."""

    name: str
    tokens: int
    """Rounded up to whole batches."""
    mixture: Dict[str, Union[float, ShareSpec]]
    """For each source its weight, or a :class:`ShareSpec`."""
    lr_scale: float = 1.0
    """The schedule's learning rate is multiplied by this."""
    warmup: Optional[int] = None
    """
    Steps in which the learning rate rises linearly to the schedule's, at the start of the stage. By
    default none; where the optimizer is another than in the stage before, a twentieth of the
    stage's, at least 1 and at most 100.
    """
    scheduler: Optional[Dict[str, Any]] = None
    """``type``, and any field of that scheduler. It runs over this stage alone."""
    optimizer: Optional[Dict[str, Any]] = None
    """``name``, and any field of that optimizer's config."""
    sequence_length: Optional[int] = None
    global_batch_size: Optional[int] = None
    """In tokens."""
    rank_microbatch_size: Optional[int] = None
    """In tokens."""


class StageSizes(NamedTuple):
    """Sizes of a stage, in tokens."""

    sequence_length: int
    global_batch_size: int
    rank_microbatch_size: int


@dataclass
class WarmStartSpec:
    """What the first stage begins with, in place of random weights."""

    path: str
    """
    The folder of a checkpoint of OLMo-core's, of a model of the same shape: a ``stepN``, or only
    its ``model_and_optim``.
    """
    optimizer_state: bool = False
    """Begin with the state of its optimizer, too. The weights alone if not."""
    optimizer: Optional[Dict[str, Any]] = None
    """
    The optimizer that has left the state: ``name`` and fields, as for a run; ``null`` is the first
    stage's. Of another one goes over what means the same in both.
    """


@dataclass
class EvaluationSpec:
    every: int = 100
    """In steps; the end of a stage is always evaluated."""
    tokens: int = 65_536
    """Held-out tokens of an evaluation, shared evenly by the sources."""


@dataclass
class CheckpointSpec:
    every: int = 100
    """In steps; the end of a stage is always saved."""
    keep: int = 2
    """Checkpoints kept of each stage."""


@dataclass
class OptimizerMetricsSpec:
    """What an optimizer for matrices reports of them: see ``MatrixMetricsCallback``."""

    every: int = 50
    """In steps."""
    per_layer: bool = True
    """Also each parameter on its own, beside the means over roles."""


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
        """
        _require(bool(self.name), "name", self.name, "a text")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "an integer from 0 to 2^31 - 1")
        for key in ("sequence_length", "global_batch_size", "rank_microbatch_size"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "an integer >= 1")
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "max_grad_norm",
            self.max_grad_norm,
            "null or a number > 0",
        )
        _require(
            self.max_grad_value is None or 0 < self.max_grad_value < float("inf"),
            "max_grad_value",
            self.max_grad_value,
            "null or a finite number > 0",
        )
        for key in ("evaluation.every", "evaluation.tokens", "checkpoint.every", "checkpoint.keep"):
            part, name = key.split(".")
            value = getattr(getattr(self, part), name)
            _require(value >= 1, key, value, "an integer >= 1")
        self._check_stages()
        longest = max(self.sizes(stage).sequence_length for stage in self.stages)
        _require(
            self.evaluation.tokens >= longest * len(self.sources),
            "evaluation.tokens",
            self.evaluation.tokens,
            f"at least sequence_length x sources ({longest} x {len(self.sources)})",
        )
        data_ranks = self._check_parallelism(world_size)
        self._check_batch(self.sizes(), data_ranks, "")
        self.optimizer_config()
        self.scheduler_config()
        for index, stage in enumerate(self.stages):
            self._check_batch(self.sizes(stage), data_ranks, f"stages.{index}.")
            self.optimizer_config(stage)
            self.scheduler_config(stage)
        self._check_schedules()
        self._check_averages()
        self._check_optimizer_metrics()
        if self.warm_start is not None:
            self._check_warm_start(self.warm_start)

    def _check_schedules(self) -> None:
        for stage in (None, *self.stages):
            scheduler, where = self.scheduler_config(stage), self._where(stage, "scheduler")
            refuse_within(scheduler, where)
            if self.momentum_schedule is not None and cycles_momentum(scheduler):
                raise OLMoConfigurationError(
                    f"momentum_schedule: {self.momentum_schedule!r} is not allowed with "
                    f"{where}.cycle_momentum true, as both set the momentum; allowed is null, or "
                    "cycle_momentum false"
                )
        for name, scheduler in self.hyperparameter_schedulers().items():
            refuse_cycled_momentum(scheduler, f"{name}_schedule")

    def _check_schedules_of(self, optim: torch.optim.Optimizer, stage: Optional[StageSpec]) -> None:
        """Whether all values that schedules give an optimizer are allowed."""
        groups, plans = optim.param_groups, plan_stages(self)
        of_lr, where = self.scheduler_config(stage), self._where(stage, "scheduler")
        alone = stage is not None and stage.scheduler is not None
        over = next(p.span for p in plans if p.spec == stage) if alone else run_span(plans)
        begin, end = over.within(of_lr.units)
        for rate in sorted({float(group.get(INITIAL_LR_FIELD, group["lr"])) for group in groups}):
            check_schedule(of_lr, rate, end - begin, "learning rate", where)
        if isinstance(of_lr, WithMomentum):
            for group in groups:
                of_lr.check_group(group)
        for name, scheduler in self.hyperparameter_schedulers().items():
            schedule = HyperparameterSchedule(name, scheduler, groups, f"{name}_schedule")
            schedule.check(run_span(plans).within(scheduler.units)[1])

    def _check_averages(self) -> None:
        """The average of ``schedule_free`` is in place of a decay: its stages may have none."""
        plans = plan_stages(self)
        before: Optional[float] = None
        for plan in plans:
            config = self.optimizer_config(plan.spec)
            if not isinstance(config, ScheduleFreeConfig):
                before = None
                continue
            scheduler, lr = plan.scheduler(self, plans), config.hyperparameters()["lr"]
            units = scheduler.units
            (first, last), t_max = plan.span.within(units), plans[-1].span.within(units)[1]
            where = self._where(plan.spec, "scheduler")
            if before is not None and not plan.changes_optimizer:
                begin = float(scheduler.get_lr(lr, first + (last - first) // plan.steps, t_max))
                _require(
                    begin >= before * (1 - 1e-6),
                    f"stages.{plan.index}.lr_scale",
                    plan.spec.lr_scale,
                    f"what keeps the learning rate from falling, {before:.3g} to {begin:.3g}, as "
                    "schedule_free takes no decay",
                )
            check_never_decays(scheduler, lr, t_max, where)
            before = float(scheduler.get_lr(lr, last, t_max))

    def _check_warm_start(self, start: WarmStartSpec) -> None:
        if start.optimizer is not None:
            _require(
                start.optimizer_state,
                "warm_start.optimizer_state",
                start.optimizer_state,
                "true with warm_start.optimizer",
            )
            self._optimizer_config(start.optimizer, self.global_batch_size, "warm_start.optimizer")

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

    def _where(self, stage: Optional[StageSpec], key: str) -> str:
        """The dotted key of something that a stage may have of its own."""
        if stage is None or getattr(stage, key) is None:
            return key
        return f"stages.{self.stages.index(stage)}.{key}"

    def _check_optimizer_metrics(self) -> None:
        asked = self.optimizer_metrics
        if asked is None:
            return
        _require(asked.every >= 1, "optimizer_metrics.every", asked.every, "an integer >= 1")
        if not any(self.has_matrix_rule(stage) for stage in self.stages):
            known = [n for n in list_optimizers() if optimizer_info(n).family == "matrix"]
            names = {str(self.optimizer_of(stage)["name"]) for stage in self.stages}
            raise OLMoConfigurationError(
                f"optimizer_metrics: the optimizer {' or '.join(map(repr, sorted(names)))} has no "
                f"rule for matrices, allowed is null, or one of {', '.join(known)}"
            )

    def has_matrix_rule(self, stage: StageSpec) -> bool:
        """Whether the optimizer of a stage, or the one inside, has a rule for matrices."""
        config = self.optimizer_config(stage)
        rule = config.rule_config if isinstance(config, ExtOptimConfig) else config
        return isinstance(rule, MatrixOptimConfig)

    def _check_stages(self) -> None:
        _require(bool(self.sources), "sources", self.sources, "at least one source")
        _require(bool(self.stages), "stages", self.stages, "at least one stage")
        names = [stage.name for stage in self.stages]
        for index, stage in enumerate(self.stages):
            where = f"stages.{index}"
            plain = bool(stage.name) and not set(stage.name) & set("/\\\0") and stage.name[0] != "."
            allowed = "a name of its own that can be the name of a folder"
            _require(plain and names.count(stage.name) == 1, f"{where}.name", stage.name, allowed)
            _require(stage.tokens >= 1, f"{where}.tokens", stage.tokens, "an integer >= 1")
            finite = 0 <= stage.lr_scale < float("inf")
            _require(finite, f"{where}.lr_scale", stage.lr_scale, "a finite number >= 0")
            for size in ("sequence_length", "global_batch_size", "rank_microbatch_size"):
                value = getattr(stage, size)
                allowed = "null or an integer >= 1"
                _require(value is None or value >= 1, f"{where}.{size}", value, allowed)
            _require(
                stage.warmup is None or stage.warmup >= 0,
                f"{where}.warmup",
                stage.warmup,
                "null or an integer >= 0",
            )
            self._check_mixture(stage, f"{where}.mixture")

    def _check_mixture(self, stage: StageSpec, where: str) -> None:
        for source, share in stage.mixture.items():
            key = f"{where}.{source}"
            _require(source in self.sources, key, source, closest(source, self.sources))
            if isinstance(share, ShareSpec):
                given = [n for n in ("weight", "tokens", "repetitions") if getattr(share, n)]
                if len(given) != 1:
                    raise OLMoConfigurationError(
                        f"{key}: it has {' and '.join(given) or 'no amount'}, allowed is exactly "
                        "one of weight, tokens and repetitions, above 0"
                    )
                for name in (*given, "max_repetitions"):
                    value = getattr(share, name)
                    least = 1 if name == "max_repetitions" else 0
                    holds = value is None or (least <= value < float("inf") and value > 0)
                    allowed = f"a finite number {'>= 1' if least else '> 0'}"
                    _require(holds, f"{key}.{name}", value, allowed)
                if share.max_repetitions is not None and share.repetitions is not None:
                    raise OLMoConfigurationError(
                        f"{key}.max_repetitions: {share.max_repetitions!r} is not allowed with "
                        "repetitions, allowed is null"
                    )
            else:
                finite = 0 <= share < float("inf")
                _require(finite, key, share, "a finite number >= 0, or a mapping")
        weights = {k: v for k, v in stage.mixture.items() if isinstance(v, float)}
        total = sum(weights.values())
        only_weights = len(weights) == len(stage.mixture)
        _require(total > 0 or not only_weights, where, stage.mixture, "weights with a sum > 0")
        length = self.sizes(stage).sequence_length
        for source, weight in weights.items() if only_weights else ():
            enough = weight == 0 or stage.tokens * weight / total >= length
            allowed = f"0, or enough for a sequence of {length} in {stage.tokens} tokens"
            _require(enough, f"{where}.{source}", weight, allowed)

    def _check_parallelism(self, world_size: int) -> int:
        """The number of data parallel ranks."""
        shape, tensor = self.parallelism, self.parallelism.tensor
        _require(shape.replicas >= 1, "parallelism.replicas", shape.replicas, "an integer >= 1")
        _require(tensor >= 1, "parallelism.tensor", tensor, "an integer >= 1")
        if world_size > 1:
            many = f"with {world_size} ranks"
            _require(
                world_size % tensor == 0, "parallelism.tensor", tensor, f"a divisor of {world_size}"
            )
            data_ranks = world_size // tensor
            _require(
                shape.data != DataParallelism.none or data_ranks == 1,
                "parallelism.data",
                str(shape.data),
                f"ddp, fsdp or hsdp {many}",
            )
            _require(
                shape.data != DataParallelism.ddp or tensor == 1,
                "parallelism.data",
                str(shape.data),
                "fsdp or hsdp with tensor parallelism",
            )
            if shape.data == DataParallelism.hsdp:
                _require(
                    data_ranks % shape.replicas == 0,
                    "parallelism.replicas",
                    shape.replicas,
                    f"a divisor of {data_ranks} {many}",
                )
            else:
                _require(
                    shape.replicas == 1, "parallelism.replicas", shape.replicas, "1, but for hsdp"
                )
        else:
            data_ranks = 1
        return data_ranks

    def _check_batch(self, sizes: StageSizes, data_ranks: int, where: str) -> None:
        _require(
            sizes.rank_microbatch_size % sizes.sequence_length == 0,
            f"{where}rank_microbatch_size",
            sizes.rank_microbatch_size,
            f"a multiple of sequence_length ({sizes.sequence_length})",
        )
        unit = sizes.rank_microbatch_size * data_ranks
        _require(
            sizes.global_batch_size % unit == 0,
            f"{where}global_batch_size",
            sizes.global_batch_size,
            f"a multiple of rank_microbatch_size x data parallel ranks "
            f"({sizes.rank_microbatch_size} x {data_ranks})",
        )

    def optimizer_config(self, stage: Optional[StageSpec] = None) -> OptimConfig:
        """The config of the optimizer of a stage, or of the run's."""
        values = self.optimizer if stage is None else self.optimizer_of(stage)
        batch_tokens = self.sizes(stage).global_batch_size
        return self._optimizer_config(values, batch_tokens, self._where(stage, "optimizer"))

    def warm_start_optimizer_config(self) -> OptimConfig:
        """The config of the optimizer whose state the first stage begins with."""
        assert self.warm_start is not None
        values = self.warm_start.optimizer
        if values is None:
            return self.optimizer_config(self.stages[0])
        return self._optimizer_config(values, self.global_batch_size, "warm_start.optimizer")

    def _optimizer_config(
        self, fields: Mapping[str, Any], batch_tokens: int, where: str
    ) -> OptimConfig:
        values = dict(fields)
        name = values.pop("name", None)
        known = ", ".join(list_optimizers())
        _require(isinstance(name, str), f"{where}.name", name, f"one of {known}")
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
        return decode_registered(Scheduler, values, self._where(stage, "scheduler"))

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
        if isinstance(self.model, str):
            config = _from_factory(self.model, {}, vocab_size)
        elif isinstance(self.model, Mapping) and "factory" in self.model:
            arguments = {k: v for k, v in self.model.items() if k != "factory"}
            config = _from_factory(str(self.model["factory"]), arguments, vocab_size)
        elif isinstance(self.model, Mapping):
            try:
                config = TransformerConfig.from_dict(dict(self.model))
            except Exception as error:  # OLMo-core's decoding raises many types
                raise OLMoConfigurationError(
                    f"model: it is no TransformerConfig of OLMo-core: {error}"
                ) from None
        else:
            allowed = "a factory's name or a mapping"
            raise OLMoConfigurationError(
                f"model: {self.model!r} is not allowed, allowed is {allowed}"
            )
        _require(
            config.vocab_size >= vocab_size,
            "model.vocab_size",
            config.vocab_size,
            f"at least the tokenizer's {vocab_size}",
        )
        if DType.float16 in _dtypes(config.as_dict()):
            raise OLMoConfigurationError(f"model: a dtype is 'float16', {_NO_FLOAT16}")
        config.init_seed = self.seed
        return config

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
            raise OLMoConfigurationError(f"model: it cannot be built: {_words(error)}") from None
        where = self._where(stage, "optimizer")
        try:
            optim = self.optimizer_config(stage).build(model)
        except OLMoConfigurationError as error:
            raise OLMoConfigurationError(f"{where}: {error}") from None
        except Exception as error:  # OLMo-core's own optimizers, too
            raise OLMoConfigurationError(f"{where}: it cannot be built: {_words(error)}") from None
        self._check_schedules_of(optim, stage)
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


_NO_FLOAT16 = (
    "which is not allowed, as OLMo-core has no gradient scaler; allowed is float32 or bfloat16"
)


def _dtypes(value: Any) -> List[Any]:
    """All values of keys ``dtype``, at any depth."""
    if isinstance(value, Mapping):
        nested = [each for v in value.values() for each in _dtypes(v)]
        return [v for k, v in value.items() if k == "dtype"] + nested
    if isinstance(value, (list, tuple)):
        return [each for v in value for each in _dtypes(v)]
    return []


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _require(holds: bool, key: str, value: Any, allowed: str) -> None:
    if not holds:
        raise OLMoConfigurationError(f"{key}: {value!r} is not allowed, allowed is {allowed}")


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


def _factories() -> List[str]:
    found = []
    for name, member in inspect.getmembers(TransformerConfig, inspect.ismethod):
        if not name.startswith("_") and "vocab_size" in inspect.signature(member).parameters:
            found.append(name)
    return found


def _from_factory(name: str, arguments: Dict[str, Any], vocab_size: int) -> TransformerConfig:
    known = _factories()
    if name not in known:
        raise OLMoConfigurationError(
            f"model: OLMo-core has no model {name!r}, allowed are {closest(name, known)}"
        )
    arguments = {"vocab_size": 128 * -(-vocab_size // 128), **arguments}
    backend = arguments.get("attn_backend")
    if backend is not None:
        backends = [str(b.value) for b in AttentionBackendName]
        _require(backend in backends, "model.attn_backend", backend, closest(backend, backends))
        arguments["attn_backend"] = AttentionBackendName(backend)
    elif not has_flash_attn_2():
        # The factories of OLMo 3 ask for flash attention, which runs on GPUs only.
        arguments["attn_backend"] = AttentionBackendName.torch
    if isinstance(dtype := arguments.get("dtype"), str):
        dtypes = [str(d.value) for d in DType]
        _require(dtype in dtypes, "model.dtype", dtype, closest(dtype, dtypes))
        arguments["dtype"] = DType(dtype)
    try:
        return getattr(TransformerConfig, name)(**arguments)
    except Exception as error:  # whatever arithmetic makes of wrong arguments
        raise OLMoConfigurationError(
            f"model: {name} refuses its arguments: {_words(error)}"
        ) from None


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JolmoModel:
    """
    Read a spec from YAML. ``include`` names files, relative to this one, that come first;
    interpolation is OmegaConf's.

    :param overrides: ``key=value`` with a dotted key, such as ``optimizer.lr=0.01`` or
        ``stages.0.tokens=1000``. A mapping as value replaces the one that was there.

    :raises OLMoConfigurationError: If a file cannot be read, is no mapping, or has a key or value
        that is not allowed.
    """
    config = _load_yaml(Path(path), ())
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not all(key.split(".")):
            raise OLMoConfigurationError(f"{override!r} is not allowed, allowed is key=value")
        try:
            parsed = OmegaConf.from_dotlist([f"value={value}"])
            OmegaConf.update(config, key, parsed._get_node("value"), merge=False)
        except (OmegaConfBaseException, yaml.YAMLError, IndexError, TypeError, ValueError) as error:
            raise OLMoConfigurationError(f"{override}: {_first_line(error)}") from None
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise OLMoConfigurationError(f"{path}: {_first_line(error)}") from None
    assert isinstance(plain, dict)
    parallelism = plain.get("parallelism")
    if isinstance(parallelism, dict) and "pipeline" in parallelism:
        raise OLMoConfigurationError(
            "parallelism.pipeline: pipeline parallelism is not supported, allowed are data, "
            "replicas and tensor"
        )
    if plain.get("precision") == "float16":
        raise OLMoConfigurationError(f"precision: it is 'float16', {_NO_FLOAT16}")
    return decode_fields(JolmoModel, {str(k): v for k, v in plain.items()}, "")


def _load_yaml(path: Path, including: Tuple[Path, ...]) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
        config = OmegaConf.create(text)
    except OSError as error:
        raise OLMoConfigurationError(f"{path}: {error.strerror}, allowed is a YAML file") from None
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise OLMoConfigurationError(f"{path}: it is no YAML: {_first_line(error)}") from None
    # A text without a colon is a mapping with an empty value to OmegaConf.
    if not isinstance(config, DictConfig) or not isinstance(yaml.safe_load(text), dict):
        raise OLMoConfigurationError(
            f"{path}: it is {'empty' if not text.strip() else 'not a mapping'}, allowed is a YAML "
            "mapping"
        )
    files = config.pop("include", None) or []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, (list, ListConfig)):
        raise OLMoConfigurationError(
            f"{path}: include: {files!r} is not allowed, allowed is a file or a list of files"
        )
    for name in reversed(list(files)):
        base = (path.parent / str(name)).resolve()
        if base in including:
            raise OLMoConfigurationError(f"{path}: include of {name} is circular")
        merged = OmegaConf.merge(_load_yaml(base, (*including, base)), config)
        assert isinstance(merged, DictConfig)
        config = merged
    return config


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
