"""
What a spec may be: everything that can be told before anything runs.
"""

from typing import TYPE_CHECKING, Optional

import torch
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.optim import INITIAL_LR_FIELD

from olmo_optim_ext.catalog import closest, list_optimizers, optimizer_info
from olmo_optim_ext.config import ExtOptimConfig, learning_rate
from olmo_optim_ext.schedulers import (
    WithMomentum,
    cycles_momentum,
    refuse_cycled_momentum,
    refuse_within,
)
from olmo_optim_ext.training import HyperparameterSchedule, check_never_decays, check_schedule
from olmo_optim_ext.wrappers.schedule_free import ScheduleFreeConfig

from .decoding import require
from .plans import plan_stages, run_span, same_kind
from .spec_parts import DataParallelism, ShareSpec, StageSizes, StageSpec, WarmStartSpec

if TYPE_CHECKING:
    from .training import JolmoModel

__all__ = ["check", "check_schedules_of"]


def check(spec: "JolmoModel", world_size: int = 1) -> None:
    """
    Check everything that needs neither data nor a device.

    :param world_size: The number of ranks.
    """
    require(bool(spec.name), "name", spec.name, "a text")
    require(0 <= spec.seed < 2**31, "seed", spec.seed, "an integer from 0 to 2^31 - 1")
    for key in ("sequence_length", "global_batch_size", "rank_microbatch_size"):
        require(getattr(spec, key) >= 1, key, getattr(spec, key), "an integer >= 1")
    require(
        spec.max_grad_norm is None or spec.max_grad_norm > 0,
        "max_grad_norm",
        spec.max_grad_norm,
        "null or a number > 0",
    )
    require(
        spec.max_grad_value is None or 0 < spec.max_grad_value < float("inf"),
        "max_grad_value",
        spec.max_grad_value,
        "null or a finite number > 0",
    )
    for key in ("evaluation.every", "evaluation.tokens", "checkpoint.every", "checkpoint.keep"):
        part, name = key.split(".")
        value = getattr(getattr(spec, part), name)
        require(value >= 1, key, value, "an integer >= 1")
    _check_stages(spec)
    longest = max(spec.sizes(stage).sequence_length for stage in spec.stages)
    require(
        spec.evaluation.tokens >= longest * len(spec.sources),
        "evaluation.tokens",
        spec.evaluation.tokens,
        f"at least sequence_length x sources ({longest} x {len(spec.sources)})",
    )
    data_ranks = _check_parallelism(spec, world_size)
    _check_batch(spec, spec.sizes(), data_ranks, "")
    spec.optimizer_config()
    spec.scheduler_config()
    for index, stage in enumerate(spec.stages):
        _check_batch(spec, spec.sizes(stage), data_ranks, f"stages.{index}.")
        spec.optimizer_config(stage)
        spec.scheduler_config(stage)
    _check_schedules(spec)
    _check_averages(spec)
    _check_optimizer_metrics(spec)
    if spec.warm_start is not None:
        _check_warm_start(spec, spec.warm_start)
    _check_switches(spec)


def _check_schedules(spec: "JolmoModel") -> None:
    for stage in (None, *spec.stages):
        scheduler, where = spec.scheduler_config(stage), spec.where(stage, "scheduler")
        refuse_within(scheduler, where)
        if spec.momentum_schedule is not None and cycles_momentum(scheduler):
            raise OLMoConfigurationError(
                f"momentum_schedule: {spec.momentum_schedule!r} is not allowed with "
                f"{where}.cycle_momentum true, as both set the momentum; allowed is null, or "
                "cycle_momentum false"
            )
    for name, scheduler in spec.hyperparameter_schedulers().items():
        refuse_cycled_momentum(scheduler, f"{name}_schedule")


def check_schedules_of(
    spec: "JolmoModel", optim: torch.optim.Optimizer, stage: Optional[StageSpec]
) -> None:
    """Whether all values that schedules give an optimizer are allowed."""
    groups, plans = optim.param_groups, plan_stages(spec)
    of_lr, where = spec.scheduler_config(stage), spec.where(stage, "scheduler")
    alone = stage is not None and stage.scheduler is not None
    over = next(p.span for p in plans if p.spec == stage) if alone else run_span(plans)
    begin, end = over.within(of_lr.units)
    for rate in sorted({float(group.get(INITIAL_LR_FIELD, group["lr"])) for group in groups}):
        check_schedule(of_lr, rate, end - begin, "learning rate", where)
    if isinstance(of_lr, WithMomentum):
        for group in groups:
            of_lr.check_group(group)
    for name, scheduler in spec.hyperparameter_schedulers().items():
        schedule = HyperparameterSchedule(name, scheduler, groups, f"{name}_schedule")
        schedule.check(run_span(plans).within(scheduler.units)[1])


def _check_averages(spec: "JolmoModel") -> None:
    """The average of ``schedule_free`` is in place of a decay: its stages may have none."""
    plans = plan_stages(spec)
    before: Optional[float] = None
    for plan in plans:
        config = spec.optimizer_config(plan.spec)
        if not isinstance(config, ScheduleFreeConfig):
            before = None
            continue
        scheduler, lr = plan.scheduler(spec, plans), learning_rate(config)
        units = scheduler.units
        (first, last), t_max = plan.span.within(units), plans[-1].span.within(units)[1]
        where = spec.where(plan.spec, "scheduler")
        if before is not None and not plan.changes_optimizer:
            begin = float(scheduler.get_lr(lr, first + (last - first) // plan.steps, t_max))
            require(
                begin >= before * (1 - 1e-6),
                f"stages.{plan.index}.lr_scale",
                plan.spec.lr_scale,
                f"what keeps the learning rate from falling, {before:.3g} to {begin:.3g}, as "
                "schedule_free takes no decay",
            )
        check_never_decays(scheduler, lr, t_max, where)
        before = float(scheduler.get_lr(lr, last, t_max))


def _check_switches(spec: "JolmoModel") -> None:
    """State of another optimizer goes over to those of this package alone."""
    carries = spec.warm_start is not None and spec.warm_start.optimizer_state
    before = spec.warm_start_optimizer_config() if carries else None
    for stage in spec.stages:
        config = spec.optimizer_config(stage)
        if before is not None and not same_kind(before, config):
            require(
                isinstance(config, ExtOptimConfig),
                f"{spec.where(stage, 'optimizer')}.name",
                spec.optimizer_of(stage)["name"],
                "the optimizer before it, or one of `olmo-optim list`, as state of another one "
                "goes over to those alone",
            )
        before = config


def _check_warm_start(spec: "JolmoModel", start: WarmStartSpec) -> None:
    if start.optimizer is not None:
        require(
            start.optimizer_state,
            "warm_start.optimizer_state",
            start.optimizer_state,
            "true with warm_start.optimizer",
        )
        spec.decode_optimizer(start.optimizer, spec.global_batch_size, "warm_start.optimizer")


def _check_optimizer_metrics(spec: "JolmoModel") -> None:
    asked = spec.optimizer_metrics
    if asked is None:
        return
    require(asked.every >= 1, "optimizer_metrics.every", asked.every, "an integer >= 1")
    if not any(spec.has_matrix_rule(stage) for stage in spec.stages):
        known = [n for n in list_optimizers() if optimizer_info(n).family == "matrix"]
        names = {str(spec.optimizer_of(stage)["name"]) for stage in spec.stages}
        raise OLMoConfigurationError(
            f"optimizer_metrics: the optimizer {' or '.join(map(repr, sorted(names)))} has no "
            f"rule for matrices, allowed is null, or one of {', '.join(known)}"
        )


def _check_stages(spec: "JolmoModel") -> None:
    require(bool(spec.sources), "sources", spec.sources, "at least one source")
    require(bool(spec.stages), "stages", spec.stages, "at least one stage")
    names = [stage.name for stage in spec.stages]
    for index, stage in enumerate(spec.stages):
        where = f"stages.{index}"
        plain = bool(stage.name) and not set(stage.name) & set("/\\\0") and stage.name[0] != "."
        allowed = "a name of its own that can be the name of a folder"
        require(plain and names.count(stage.name) == 1, f"{where}.name", stage.name, allowed)
        require(stage.tokens >= 1, f"{where}.tokens", stage.tokens, "an integer >= 1")
        finite = 0 <= stage.lr_scale < float("inf")
        require(finite, f"{where}.lr_scale", stage.lr_scale, "a finite number >= 0")
        for size in ("sequence_length", "global_batch_size", "rank_microbatch_size"):
            value = getattr(stage, size)
            allowed = "null or an integer >= 1"
            require(value is None or value >= 1, f"{where}.{size}", value, allowed)
        require(
            stage.warmup is None or stage.warmup >= 0,
            f"{where}.warmup",
            stage.warmup,
            "null or an integer >= 0",
        )
        _check_mixture(spec, stage, f"{where}.mixture")


def _check_mixture(spec: "JolmoModel", stage: StageSpec, where: str) -> None:
    for source, share in stage.mixture.items():
        key = f"{where}.{source}"
        require(source in spec.sources, key, source, closest(source, spec.sources))
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
                require(holds, f"{key}.{name}", value, allowed)
            if share.max_repetitions is not None and share.repetitions is not None:
                raise OLMoConfigurationError(
                    f"{key}.max_repetitions: {share.max_repetitions!r} is not allowed with "
                    "repetitions, allowed is null"
                )
        else:
            finite = 0 <= share < float("inf")
            require(finite, key, share, "a finite number >= 0, or a mapping")
    weights = {k: v for k, v in stage.mixture.items() if isinstance(v, float)}
    total = sum(weights.values())
    only_weights = len(weights) == len(stage.mixture)
    require(total > 0 or not only_weights, where, stage.mixture, "weights with a sum > 0")
    length = spec.sizes(stage).sequence_length
    for source, weight in weights.items() if only_weights else ():
        enough = weight == 0 or stage.tokens * weight / total >= length
        allowed = f"0, or enough for a sequence of {length} in {stage.tokens} tokens"
        require(enough, f"{where}.{source}", weight, allowed)


def _check_parallelism(spec: "JolmoModel", world_size: int) -> int:
    """The number of data parallel ranks."""
    shape, tensor = spec.parallelism, spec.parallelism.tensor
    require(shape.replicas >= 1, "parallelism.replicas", shape.replicas, "an integer >= 1")
    require(tensor >= 1, "parallelism.tensor", tensor, "an integer >= 1")
    if world_size > 1:
        many = f"with {world_size} ranks"
        require(
            world_size % tensor == 0, "parallelism.tensor", tensor, f"a divisor of {world_size}"
        )
        data_ranks = world_size // tensor
        require(
            shape.data != DataParallelism.none or data_ranks == 1,
            "parallelism.data",
            str(shape.data),
            f"ddp, fsdp or hsdp {many}",
        )
        require(
            shape.data != DataParallelism.ddp or tensor == 1,
            "parallelism.data",
            str(shape.data),
            "fsdp or hsdp with tensor parallelism",
        )
        if shape.data == DataParallelism.hsdp:
            require(
                data_ranks % shape.replicas == 0,
                "parallelism.replicas",
                shape.replicas,
                f"a divisor of {data_ranks} {many}",
            )
        else:
            require(shape.replicas == 1, "parallelism.replicas", shape.replicas, "1, but for hsdp")
    else:
        data_ranks = 1
    return data_ranks


def _check_batch(spec: "JolmoModel", sizes: StageSizes, data_ranks: int, where: str) -> None:
    require(
        sizes.rank_microbatch_size % sizes.sequence_length == 0,
        f"{where}rank_microbatch_size",
        sizes.rank_microbatch_size,
        f"a multiple of sequence_length ({sizes.sequence_length})",
    )
    unit = sizes.rank_microbatch_size * data_ranks
    require(
        sizes.global_batch_size % unit == 0,
        f"{where}global_batch_size",
        sizes.global_batch_size,
        f"a multiple of rank_microbatch_size x data parallel ranks "
        f"({sizes.rank_microbatch_size} x {data_ranks})",
    )
