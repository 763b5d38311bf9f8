"""
An experiment: its spec, how the spec is read from YAML, and what OLMo-core objects it stands for.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Type

import torch
import yaml
from olmo_core.config import DType, StrEnum
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.nn.attention.flash_attn_api import has_flash_attn_2
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import INITIAL_LR_FIELD, ConstantScheduler, OptimConfig, Scheduler
from olmo_core.optim.scheduler import SchedulerUnits
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

from .decoding import decode_fields, decode_registered, to_plain
from .sources import SourceSpec

__all__ = [
    "CheckpointSpec",
    "EvaluationSpec",
    "JolmoModel",
    "OptimizerMetricsSpec",
    "ParallelismSpec",
    "StageSpec",
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
class StageSpec:
    """A part of the run with a mixture of its own."""

    name: str
    tokens: int
    """Rounded up to whole batches."""
    mixture: Dict[str, float]
    """Weight of each source, normalised to sum to 1."""
    lr_scale: float = 1.0
    """The schedule's learning rate is multiplied by this."""


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
    ``type``, and any field of that scheduler: OLMo-core's, or one of ``olmo_optim_ext.schedulers``.
    It runs over the whole run.
    """
    weight_decay_schedule: Optional[Dict[str, Any]] = None
    """Such a scheduler for the weight decay, over the whole run; ``null`` leaves it as it is."""
    momentum_schedule: Optional[Dict[str, Any]] = None
    """The same for the momentum, or the first of the betas, of each parameter group."""
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
        _require(
            self.evaluation.tokens >= self.sequence_length * len(self.sources),
            "evaluation.tokens",
            self.evaluation.tokens,
            f"at least sequence_length x sources ({self.sequence_length} x {len(self.sources)})",
        )
        self._check_batch(world_size)
        self.optimizer_config()
        self._check_optimizer_metrics()
        self._check_scheduler()
        self._check_schedules()

    def _run_length(self, scheduler: Scheduler) -> int:
        """Of the whole run, in the scheduler's units."""
        steps = sum(math.ceil(stage.tokens / self.global_batch_size) for stage in self.stages)
        in_tokens = scheduler.units == SchedulerUnits.tokens
        return steps * self.global_batch_size if in_tokens else steps

    def _check_schedules(self) -> None:
        refuse_within(self.scheduler_config(), "scheduler")
        for name, scheduler in self.hyperparameter_schedulers().items():
            refuse_cycled_momentum(scheduler, f"{name}_schedule")
        if self.momentum_schedule is not None and cycles_momentum(self.scheduler_config()):
            raise OLMoConfigurationError(
                f"momentum_schedule: {self.momentum_schedule!r} is not allowed, allowed is null, "
                f"or scheduler.cycle_momentum false, as the scheduler sets the momentum, too"
            )

    def _check_schedules_of(self, optim: torch.optim.Optimizer) -> None:
        """Whether schedules have allowed values for the groups of an optimizer all through."""
        groups, of_lr = optim.param_groups, self.scheduler_config()
        t_max = self._run_length(of_lr)
        for rate in sorted({float(group.get(INITIAL_LR_FIELD, group["lr"])) for group in groups}):
            check_schedule(of_lr, rate, t_max, "learning rate", "scheduler")
        if isinstance(of_lr, WithMomentum):
            for group in groups:
                of_lr.check_group(group)
        for name, scheduler in self.hyperparameter_schedulers().items():
            where = f"{name}_schedule"
            HyperparameterSchedule(name, scheduler, groups, where).check(
                self._run_length(scheduler)
            )

    def _check_scheduler(self) -> None:
        scheduler, config = self.scheduler_config(), self.optimizer_config()
        if not isinstance(config, ScheduleFreeConfig):
            return
        t_max = self._run_length(scheduler)
        lr = config.hyperparameters()["lr"]
        check_never_decays(scheduler, lr, t_max, "scheduler")
        scales = [stage.lr_scale for stage in self.stages]
        for index, (before, scale) in enumerate(zip(scales, scales[1:]), start=1):
            allowed = f"at least the {before} of the stage before, as schedule_free takes no decay"
            _require(scale >= before, f"stages.{index}.lr_scale", scale, allowed)

    def _check_optimizer_metrics(self) -> None:
        asked = self.optimizer_metrics
        if asked is None:
            return
        _require(asked.every >= 1, "optimizer_metrics.every", asked.every, "an integer >= 1")
        config = self.optimizer_config()
        rule = config.rule_config if isinstance(config, ExtOptimConfig) else config
        if not isinstance(rule, MatrixOptimConfig):
            known = [n for n in list_optimizers() if optimizer_info(n).family == "matrix"]
            raise OLMoConfigurationError(
                f"optimizer_metrics: the optimizer {self.optimizer['name']!r} has no rule for "
                f"matrices, allowed is null, or one of {', '.join(known)}"
            )

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
            for source, weight in stage.mixture.items():
                key = f"{where}.mixture.{source}"
                _require(source in self.sources, key, source, closest(source, self.sources))
                finite = 0 <= weight < float("inf")
                _require(finite, key, weight, "a finite number >= 0")
            total = sum(stage.mixture.values())
            _require(total > 0, f"{where}.mixture", stage.mixture, "weights with a sum > 0")
            for source, weight in stage.mixture.items():
                _require(
                    weight == 0 or stage.tokens * weight / total >= self.sequence_length,
                    f"{where}.mixture.{source}",
                    weight,
                    f"0, or enough for a sequence of {self.sequence_length} in {stage.tokens} "
                    "tokens",
                )

    def _check_batch(self, world_size: int) -> None:
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
        _require(
            self.rank_microbatch_size % self.sequence_length == 0,
            "rank_microbatch_size",
            self.rank_microbatch_size,
            f"a multiple of sequence_length ({self.sequence_length})",
        )
        unit = self.rank_microbatch_size * data_ranks
        _require(
            self.global_batch_size % unit == 0,
            "global_batch_size",
            self.global_batch_size,
            f"a multiple of rank_microbatch_size x data parallel ranks "
            f"({self.rank_microbatch_size} x {data_ranks})",
        )

    def optimizer_config(self) -> OptimConfig:
        """The config of the optimizer."""
        values = dict(self.optimizer)
        name = values.pop("name", None)
        _require(
            isinstance(name, str), "optimizer.name", name, f"one of {', '.join(list_optimizers())}"
        )
        if issubclass(_optimizer_config_class(name), SophiaConfig):
            values.setdefault("batch_tokens", self.global_batch_size)
        config = _build_optimizer_spec(name, **values)
        if isinstance(config, WrapperConfig) and isinstance(config.rule_config, SophiaConfig):
            inner = {"batch_tokens": self.global_batch_size, **config.inner}
            config = config.replace(inner=inner)
        return config

    def scheduler_config(self) -> Scheduler:
        """The learning-rate schedule; constant if none is asked for."""
        if self.scheduler is None:
            return ConstantScheduler()
        return decode_registered(Scheduler, self.scheduler, "scheduler")

    def hyperparameter_schedulers(self) -> Dict[ScheduledField, Scheduler]:
        """The schedules of weight decay and momentum that are asked for."""
        asked = {field: getattr(self, f"{field}_schedule") for field in ScheduledField}
        return {
            field: decode_registered(Scheduler, fields, f"{field}_schedule")
            for field, fields in asked.items()
            if fields is not None
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

    def build_on_meta(self, vocab_size: int) -> Tuple[torch.nn.Module, torch.optim.Optimizer]:
        """
        The model and its optimizer without memory, which shows whether they can be built.

        :param vocab_size: Of the tokenizer.

        :raises OLMoConfigurationError: With whatever their classes refuse.
        """
        try:
            model = self.model_config(vocab_size).build(init_device="meta")
        except OLMoConfigurationError:
            raise
        except Exception as error:  # OLMo-core's layers raise many types
            raise OLMoConfigurationError(f"model: it cannot be built: {_words(error)}") from None
        try:
            optim = self.optimizer_config().build(model)
        except OLMoConfigurationError as error:
            raise OLMoConfigurationError(f"optimizer: {error}") from None
        except Exception as error:  # OLMo-core's own optimizers, too
            raise OLMoConfigurationError(
                f"optimizer: it cannot be built: {_words(error)}"
            ) from None
        self._check_schedules_of(optim)
        return model, optim

    def train_module_config(self, world_size: int) -> TransformerTrainModuleConfig:
        """The config of the train module."""
        shape = self.parallelism
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
            rank_microbatch_size=self.rank_microbatch_size,
            max_sequence_length=self.sequence_length,
            optim=self.optimizer_config(),
            scheduler=self.scheduler_config(),
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


def _optimizer_config_class(name: str) -> Type[OptimConfig]:
    if name.startswith(OLMO_CORE_PREFIX):
        own = name[len(OLMO_CORE_PREFIX) :]
        theirs = sorted(set(OptimConfig.get_registered_names()) - set(list_optimizers()))
        if own not in theirs:
            raise OLMoConfigurationError(
                f"optimizer.name: OLMo-core has no optimizer {own!r}, allowed are "
                f"{closest(own, theirs)}"
            )
        return OptimConfig.get_registered_class(own)
    try:
        return optimizer_info(name).config_class
    except OLMoConfigurationError as error:
        raise OLMoConfigurationError(f"optimizer.name: {error}") from None


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
    cls = _optimizer_config_class(name)
    known = {f.name for f in fields(cls)}
    if "betas" in values and "betas" not in known and "adamw_betas" in known:
        values.setdefault("adamw_betas", values["betas"])
        del values["betas"]
    return decode_fields(cls, values, "optimizer")


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
