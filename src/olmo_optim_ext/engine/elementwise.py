"""
The step loop for rules that act on each coordinate alone, and, if they need it, on a few numbers
of the whole parameter.

A rule sees flat local views and a small vector of scalars that were computed before it. So one
rule serves every shape and sharding, nothing that a schedule changes is baked into a compiled
kernel, and the update of a shard is bitwise the shard of the update.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    Union,
)

import torch
from olmo_core.config import StrEnum
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError

from .base import CALLS, DECOUPLED, ExtOptimizer, GroupWork, Member
from .moments import Moment
from .placement import sharding_dims, sum_over_shards
from .write import Rounding, chunks, rounding_of, some_of, write_state, write_weights

__all__ = [
    "LEADING",
    "DecayForm",
    "ElementwiseOptimizer",
    "ElementwiseRule",
    "Scalar",
    "WholeSums",
    "apply_rule",
    "bias_correction",
    "compile_rule",
    "decay_form",
    "decoupled_decay",
    "first_or",
    "forget_compiled",
    "kept_compiled",
    "no_decay",
    "scalars_of",
    "sum_over_model",
]

F = TypeVar("F", bound=Callable[..., Any])

Scalar = Union[float, torch.Tensor]
"""A host number, or a tensor of shape ``(n,)`` with a value for each parameter of the group."""

Update = Callable[..., Tuple[torch.Tensor, ...]]
SumsOf = Callable[..., Sequence[torch.Tensor]]
ScalarsOf = Callable[[Mapping[str, Any], torch.Tensor], Sequence[Scalar]]
DecayOf = Callable[[Mapping[str, Any], torch.Tensor], Scalar]


class DecayForm(StrEnum):
    """What ``weight_decay`` of a group does."""

    decoupled = "decoupled"
    cautious = "cautious"
    l2 = "l2"


def decay_form(group: Mapping[str, Any]) -> DecayForm:
    if not group.get(DECOUPLED, True):
        return DecayForm.l2
    return DecayForm.cautious if group["cautious_weight_decay"] else DecayForm.decoupled


def decoupled_decay(group: Mapping[str, Any], step: torch.Tensor) -> Scalar:
    """``1 - lr * weight_decay``."""
    return 1 - group["lr"] * group["weight_decay"]


def no_decay(group: Mapping[str, Any], step: torch.Tensor) -> Scalar:
    """Of rules whose update has it already."""
    return 1.0


@dataclass(frozen=True)
class WholeSums:
    """Numbers that a rule needs of the whole parameter."""

    of: SumsOf
    """
    ``(param, grad, *buffers, scalars) -> 0-d tensors``: sums over the elements given, with the
    arguments of :data:`ElementwiseRule.update` but for the last scalars. They are added over the
    whole parameter, on all ranks, in float64: counts are exact. Others should be added in float64
    from the first element on: then what follows from them is rarely another float32 on another
    mesh, which stochastic rounding would make another bfloat16.
    """

    scalars: Callable[..., Sequence[torch.Tensor]]
    """
    ``(sums, numel, scalars)``: further scalars of :data:`ElementwiseRule.update`, after those that
    it is given. Sums and scalars are sequences of tensors of one shape; pure.
    """

    raw_gradient: bool = False
    """Whether sums are of gradients without L2 weight decay."""


@dataclass(frozen=True)
class ElementwiseRule:
    """
    An update rule as pure functions. What :data:`update` says is subtracted from the parameter
    after decoupled weight decay, which is the engine's part: ``p <- (1 - lr * weight_decay) p``, or
    with ``cautious_weight_decay`` (arXiv:2510.12402) the same only where update and parameter do
    not differ in sign. Where a group's :data:`DECOUPLED` is false it is the gradient that the
    engine changes, ``g <- g + weight_decay * p``.
    """

    buffers: Tuple[str, ...]
    """Names of the state tensors, in the order in which :data:`update` takes and returns them."""

    scalars: ScalarsOf
    """From the group's hyperparameters and its clock ``(n,)``: what :data:`update` needs."""

    update: Update
    """
    ``(param, grad, *buffers, scalars) -> (what is subtracted, *buffers)``: flat tensors of one
    length, and scalars of shape ``(k,)``; of the buffers the last may be left out, if they stay.
    Pure, and made of single additions, products, quotients and roots: fused kernels such as
    ``lerp`` may round their vector body and their tail differently, which would make the result
    depend on where a shard ends.
    """

    sums: Optional[WholeSums] = None

    decay: DecayOf = decoupled_decay
    """From the group and its clock: by what decoupled weight decay multiplies the parameter."""

    moments: Tuple[Moment, ...] = ()
    """What of :data:`buffers` are averages of gradients, or of their squares."""


def bias_correction(beta: float, step: torch.Tensor) -> torch.Tensor:
    """
    ``1 - beta**step`` without the cancellation that costs float32 four digits at small steps.

    :param step: Shape ``(n,)``, counted from 1.
    """
    if beta == 0.0:
        return torch.ones_like(step)
    return -torch.expm1(step * math.log(beta))


LEADING = 2
"""Scalars that are the engine's: the factor of decoupled weight decay, and that of L2."""


def first_or(step: torch.Tensor, first: Scalar, later: Scalar) -> torch.Tensor:
    """
    ``first`` in a parameter's first update and ``later`` afterwards, in the dtype of the clock.

    :param step: Shape ``(n,)``, counted from 1.
    """
    return torch.where(step == 1, _like(step, first), _like(step, later))


def _like(step: torch.Tensor, value: Scalar) -> torch.Tensor:
    # With its dtype: torch takes its default for a number.
    return value.to(step) if isinstance(value, torch.Tensor) else torch.full_like(step, value)


class _Job(NamedTuple):
    """One parameter of a step."""

    member: Member
    param: torch.Tensor
    """Local part, flat; a copy where that is not a view."""
    grad: torch.Tensor
    buffers: List[torch.Tensor]
    whole: bool
    """Whether this rank has all of it."""


class _Call(NamedTuple):
    """What is given for one parameter to the function that updates it."""

    param: torch.Tensor
    grad: torch.Tensor
    buffers: List[torch.Tensor]
    scalars: torch.Tensor
    """:data:`LEADING` scalars and the rule's, ``(LEADING + k,)``."""
    rounding: Optional[Rounding]

    def kind(self) -> Tuple[Any, ...]:
        """What a compiled kernel is made for."""
        places = None if self.rounding is None else self.rounding.places.ndim
        return (
            self.param.device,
            *(x.dtype for x in (self.param, self.grad, *self.buffers)),
            places,
        )


def apply_rule(
    rule: ElementwiseRule,
    work: Sequence[GroupWork],
    names: Mapping[torch.Tensor, str],
    compiled: bool,
    seed: int,
) -> None:
    """
    Update parameters and buffers in place, parameter by parameter.

    :param work: Of one step.
    :param names: Of the parameters, for the random numbers of bfloat16 state.
    """
    jobs = [[_job(rule, member) for member in each.members] for each in work]
    scalars = [scalars_of(each, rule.scalars, rule.decay) for each in work]
    sums = rule.sums
    if sums is not None and not all(job.whole for its_jobs in jobs for job in its_jobs):
        scalars = _with_sums(sums, work, jobs, scalars, compiled)
        sums = None
    for decay in dict.fromkeys(decay_form(each.group) for each in work):
        # One by one: where shards are not consecutive, places for rounding take much memory.
        calls = (
            _Call(
                *(job.param, job.grad, job.buffers, its),
                rounding_of(job.member, job.buffers, names, each.group[CALLS], seed),
            )
            for each, its_jobs, its_scalars in zip(work, jobs, scalars)
            if decay_form(each.group) == decay
            for job, its in zip(its_jobs, its_scalars)
            if job.param.numel() > 0
        )
        update = _update_compiled if compiled else _update_in_chunks
        update(rule, sums, calls, work[0].proceed, decay)
    for job in (job for its_jobs in jobs for job in its_jobs):
        local = get_local_tensor(job.member.param)
        if not local.is_contiguous():  # then the flat one is a copy
            local.copy_(job.param.view(local.shape))


def _job(rule: ElementwiseRule, member: Member) -> _Job:
    return _Job(
        member,
        _flat(get_local_tensor(member.param)),
        _flat(member.grad),
        [_flat(member.local(name)) for name in rule.buffers],
        not sharding_dims(member.param),
    )


def _flat(x: torch.Tensor) -> torch.Tensor:
    # Detached, because dynamo guards on the shape of what a tensor is a view of.
    return x.reshape(-1).detach()


def scalars_of(each: GroupWork, scalars: ScalarsOf, decay: DecayOf) -> List[torch.Tensor]:
    """For each member :data:`LEADING` scalars and the rule's, ``(LEADING + k,)``."""
    group, clock = each.group, each.clock
    if decay_form(group) == DecayForm.l2:
        leading: Tuple[Scalar, ...] = (1.0, group["weight_decay"])
    else:
        leading = (decay(group, clock), 0.0)
    columns = [_like(clock, value) for value in (*leading, *scalars(group, clock))]
    table = torch.stack([column.expand_as(clock) for column in columns], dim=1)
    rows = table.detach().unbind()
    return [rows[member.slot] for member in each.members]


def _with_sums(
    sums: WholeSums,
    work: Sequence[GroupWork],
    jobs: Sequence[Sequence[_Job]],
    scalars: Sequence[Sequence[torch.Tensor]],
    compiled: bool,
) -> List[List[torch.Tensor]]:
    """The scalars with those that follow from sums: one exchange for all parameters of a step."""
    totals = _whole_sums(sums, work, jobs, scalars, compiled)
    numels = tuple(job.member.param.numel() for its_jobs in jobs for job in its_jobs)
    numel = _float64(numels, totals.device)
    flat = torch.stack([its for its_scalars in scalars for its in its_scalars])
    more = sums.scalars(totals.unbind(1), numel, flat[:, LEADING:].unbind(1))
    rows = iter(torch.cat([flat, torch.stack(list(more), dim=1).to(flat)], dim=1).unbind())
    return [[next(rows).detach() for _ in its_scalars] for its_scalars in scalars]


def sum_over_model(
    rule: ElementwiseRule, sums: WholeSums, work: Sequence[GroupWork], compiled: bool
) -> torch.Tensor:
    """
    The sums added over all parameters, on all ranks.

    :returns: Shape ``(r,)``, float64.
    """
    jobs = [[_job(rule, member) for member in each.members] for each in work]
    scalars = [scalars_of(each, rule.scalars, rule.decay) for each in work]
    return _whole_sums(sums, work, jobs, scalars, compiled).sum(0)


def _whole_sums(
    sums: WholeSums,
    work: Sequence[GroupWork],
    jobs: Sequence[Sequence[_Job]],
    scalars: Sequence[Sequence[torch.Tensor]],
    compiled: bool,
) -> torch.Tensor:
    """For each parameter, those of the first group first, its sums: ``(n, r)``, float64."""
    params, local = [], []
    compiled_sums = _compiled_sums(sums) if compiled else _sums_in_chunks
    for each, its_jobs, its_scalars in zip(work, jobs, scalars):
        for job, its in zip(its_jobs, its_scalars):
            params.append(job.member.param)
            # As in _update_compiled: no kernel of their own for lengths 0 and 1.
            count = compiled_sums if job.param.numel() > 1 else _sums_in_chunks
            args = (job.param, job.grad, job.buffers, its)
            local.append(count(sums, *args, decay_form(each.group)))
    return sum_over_shards(params, torch.stack(local))


@lru_cache(maxsize=64)
def _float64(values: Tuple[int, ...], device: torch.device) -> torch.Tensor:
    # Kept, because a copy from the host at every step would be a sync.
    return torch.tensor(values, dtype=torch.float64, device=device)


def _local_sums(
    sums: WholeSums,
    param: torch.Tensor,
    grad: torch.Tensor,
    buffers: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    decay: DecayForm,
) -> torch.Tensor:
    work = scalars.dtype
    param, grad, *buffers = (x.to(work) for x in (param, grad, *buffers))
    if decay == DecayForm.l2 and not sums.raw_gradient:
        grad = grad + param * scalars[1]
    parts = sums.of(param, grad, *buffers, scalars[LEADING:])
    return torch.stack([part.to(torch.float64) for part in parts])


def _sums_in_chunks(
    sums: WholeSums,
    param: torch.Tensor,
    grad: torch.Tensor,
    buffers: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    decay: DecayForm,
) -> torch.Tensor:
    parts = [
        _local_sums(sums, param[i:j], grad[i:j], [b[i:j] for b in buffers], scalars, decay)
        for i, j in chunks(param)
    ]
    return torch.stack(parts).sum(dim=0)


def _and_from_sums(
    sums: WholeSums, local: torch.Tensor, numel: int, scalars: torch.Tensor
) -> torch.Tensor:
    more = sums.scalars(local.unbind(), numel, scalars[LEADING:].unbind())
    return torch.cat([scalars, torch.stack(list(more)).to(scalars)])


def _update_in_place(
    update: Update,
    sums: Optional[WholeSums],
    param: torch.Tensor,
    grad: torch.Tensor,
    buffers: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    proceed: Optional[torch.Tensor],
    decay: DecayForm,
    rounding: Optional[Rounding],
) -> None:
    if sums is not None:
        local = _local_sums(sums, param, grad, buffers, scalars, decay)
        scalars = _and_from_sums(sums, local, param.numel(), scalars)
    work = scalars.dtype
    old, grad = param.to(work), grad.to(work)
    if decay == DecayForm.l2:
        grad = grad + old * scalars[1]
    args = (grad, *(buffer.to(work) for buffer in buffers), scalars[LEADING:])
    step, *new_buffers = update(old, *args)
    # State first: a rule may keep the parameter, of which the old one is not always a copy.
    write_state(buffers, new_buffers, proceed, rounding)
    write_weights(param, old, step, scalars[0], proceed, decay == DecayForm.cautious)


def _update_in_chunks(
    rule: ElementwiseRule,
    sums: Optional[WholeSums],
    calls: Iterable[_Call],
    proceed: Optional[torch.Tensor],
    decay: DecayForm,
) -> None:
    for param, grad, buffers, scalars, rounding in calls:
        if sums is not None:
            local = _sums_in_chunks(sums, param, grad, buffers, scalars, decay)
            scalars = _and_from_sums(sums, local, param.numel(), scalars)
        for i, j in chunks(param):
            _update_in_place(
                *(rule.update, None, param[i:j], grad[i:j], [b[i:j] for b in buffers], scalars),
                *(proceed, decay, some_of(rounding, i, j)),
            )


BATCH = 8
"""
Parameters for one call of a compiled function, which costs 30 microseconds whatever it does. More
make the one compilation longer and gain little.
"""


def _update_batch(
    update: Update,
    sums: Optional[WholeSums],
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    buffers: Sequence[Sequence[torch.Tensor]],
    scalars: torch.Tensor,
    proceed: Optional[torch.Tensor],
    decay: DecayForm,
    roundings: Sequence[Optional[Rounding]],
) -> None:
    for args in zip(params, grads, buffers, scalars.unbind(), roundings):
        _update_in_place(update, sums, *args[:4], proceed, decay, args[4])


def _update_compiled(
    rule: ElementwiseRule,
    sums: Optional[WholeSums],
    calls: Iterable[_Call],
    proceed: Optional[torch.Tensor],
    decay: DecayForm,
) -> None:
    compiled = _compiled(rule, sums)

    def run(batch: Sequence[_Call]) -> None:
        params, grads, buffers, scalars, roundings = zip(*batch)
        # Stacked anew, because dynamo guards on what a tensor is a view of.
        compiled.function(
            *(rule.update, sums, params, grads, buffers, torch.stack(scalars)),
            *(proceed, decay, roundings),
        )

    calls = list(calls)
    # dynamo makes a kernel of its own for a length of 1; a shard of one element is not worth it.
    single = [call for call in calls if call.param.numel() == 1]
    _update_in_chunks(rule, sums, single, proceed, decay)
    kinds: Dict[Any, List[_Call]] = {}
    for call in calls:
        if call.param.numel() > 1:
            kinds.setdefault((call.kind(), proceed is None, decay), []).append(call)
    for kind, some in kinds.items():
        if kind not in compiled.padding:
            # The first time with all lengths different: dynamo takes equal ones for the same.
            run([_example(some[0], 17 + 2 * i) for i in range(BATCH)])
            compiled.padding[kind] = [_example(some[0], 16) for _ in range(BATCH - 1)]
        for begin in range(0, len(some), BATCH):
            batch = some[begin : begin + BATCH]
            run(batch + compiled.padding[kind][: BATCH - len(batch)])


def _example(call: _Call, n: int) -> _Call:
    """A call like the given one, for ``n`` elements that are nobody's."""
    rounding = call.rounding
    if rounding is not None:
        places = rounding.places.new_zeros(n if rounding.places.ndim else ())
        rounding = Rounding(rounding.keys.clone(), places)
    return _Call(
        call.param.new_ones(n),
        call.grad.new_ones(n),
        [buffer.new_ones(n) for buffer in call.buffers],
        call.scalars.clone(),
        rounding,
    )


_KEPT: List[Any] = []


def kept_compiled(make: F) -> F:
    """Of a function that compiles another: keeps what it made, until :func:`forget_compiled`."""
    made: Any = lru_cache(maxsize=None)(make)
    _KEPT.append(made)
    return made


@dataclass
class _Compiled:
    function: Callable[..., Any]
    padding: Dict[Any, List[_Call]]
    """By what it was compiled for: calls that fill up a batch."""


@kept_compiled
def _compiled(rule: ElementwiseRule, sums: Optional[WholeSums]) -> _Compiled:
    what = "update" if sums is None else "sum_and_update"
    return _Compiled(compile_rule(_update_batch, f"{rule.update.__name__}_{what}"), {})


def forget_compiled() -> None:
    """
    Compile all rules anew when they are next used. Belongs to :func:`torch._dynamo.reset`, after
    which equal lengths would be taken for the same.
    """
    for made in _KEPT:
        made.cache_clear()


@kept_compiled
def _compiled_sums(sums: WholeSums) -> Callable[..., Any]:
    return compile_rule(_local_sums, f"{sums.of.__name__}_sums")


def compile_rule(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of tensors of any length, compiled; :func:`forget_compiled` if it is kept."""
    # A code object of its own, because dynamo counts recompilations per code object: with a shared
    # one, the ninth rule of a process would run eagerly.
    assert isinstance(function, FunctionType)
    # Without dynamic_threads inductor takes the number of threads from the first shape that it
    # sees, and a kernel made for all shapes runs on one thread.
    return torch.compile(
        FunctionType(function.__code__.replace(co_name=name), function.__globals__),
        dynamic=True,
        fullgraph=True,
        options={"cpp.dynamic_threads": True},
    )


class ElementwiseOptimizer(ExtOptimizer):
    """
    An optimizer with one :class:`ElementwiseRule` for all of its parameters, or by group.
    """

    rule: ElementwiseRule

    def moments(self, group: Mapping[str, Any]) -> Sequence[Moment]:
        return self.rule_of(group).moments

    def rule_of(self, group: Mapping[str, Any]) -> ElementwiseRule:
        """The rule of a group's parameters, which never changes."""
        del group
        return self.rule

    def buffers(self, group: Mapping[str, Any]) -> Sequence[str]:
        return self.rule_of(group).buffers

    def check_group(self, group: Mapping[str, Any]) -> None:
        if group["cautious_weight_decay"] and self.rule_of(group).decay is no_decay:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: 'cautious_weight_decay' is True, allowed is False, as "
                "weight decay is a part of the direction here"
            )

    def update(self, work: Sequence[GroupWork]) -> None:
        by_rule: Dict[ElementwiseRule, List[GroupWork]] = {}
        for each in work:
            by_rule.setdefault(self.rule_of(each.group), []).append(each)
        for rule, some in by_rule.items():
            apply_rule(rule, some, self._names, self._compile, self._seed)
