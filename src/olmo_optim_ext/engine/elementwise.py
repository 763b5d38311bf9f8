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
    ClassVar,
    Dict,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
from olmo_core.distributed.utils import get_local_tensor

from .base import CALLS, ExtOptimizer, GroupWork, Member
from .placement import sharding_dims, sum_over_shards
from .write import Rounding, chunks, rounding_of, some_of, write_state, write_weights

__all__ = [
    "ElementwiseOptimizer",
    "ElementwiseRule",
    "Scalar",
    "WholeSums",
    "apply_rule",
    "bias_correction",
    "forget_compiled",
]

Scalar = Union[float, torch.Tensor]
"""A host number, or a tensor of shape ``(n,)`` with a value for each parameter of the group."""

Update = Callable[..., Tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class WholeSums:
    """Numbers that a rule needs of the whole parameter."""

    of: Callable[..., Sequence[torch.Tensor]]
    """
    ``(param, grad, *buffers, scalars) -> 0-d tensors``: sums over the elements given, with the
    arguments of :data:`ElementwiseRule.update` but for the last scalars. They are added over the
    whole parameter, on all ranks, in float64: counts are exact.
    """

    scalars: Callable[..., Sequence[torch.Tensor]]
    """
    ``(sums, numel, scalars)``: further scalars of :data:`ElementwiseRule.update`, after those that
    it is given. Sums and scalars are sequences of tensors of one shape; pure.
    """


@dataclass(frozen=True)
class ElementwiseRule:
    """
    An update rule as pure functions. What :data:`update` says is subtracted from the parameter
    after decoupled weight decay, which is the engine's part: ``p <- (1 - lr * weight_decay) p``, or
    with ``cautious_weight_decay`` (arXiv:2510.12402) the same only where update and parameter do
    not differ in sign.
    """

    buffers: Tuple[str, ...]
    """Names of the state tensors, in the order in which :data:`update` takes and returns them."""

    scalars: Callable[[Mapping[str, Any], torch.Tensor], Sequence[Scalar]]
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


def bias_correction(beta: float, step: torch.Tensor) -> torch.Tensor:
    """
    ``1 - beta**step`` without the cancellation that costs float32 four digits at small steps.

    :param step: Shape ``(n,)``, counted from 1.
    """
    if beta == 0.0:
        return torch.ones_like(step)
    return -torch.expm1(step * math.log(beta))


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
    """The decay factor and the rule's scalars, ``(1 + k,)``."""
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
    scalars = [_scalars(rule, each) for each in work]
    sums = rule.sums
    if sums is not None and not all(job.whole for its_jobs in jobs for job in its_jobs):
        scalars = _with_sums(sums, work, jobs, scalars, compiled)
        sums = None
    for cautious_decay in (False, True):
        # One by one: where shards are not consecutive, places for rounding take much memory.
        calls = (
            _Call(
                *(job.param, job.grad, job.buffers, its),
                rounding_of(job.member, job.buffers, names, each.group[CALLS], seed),
            )
            for each, its_jobs, its_scalars in zip(work, jobs, scalars)
            if bool(each.group["cautious_weight_decay"]) == cautious_decay
            for job, its in zip(its_jobs, its_scalars)
            if job.param.numel() > 0
        )
        update = _update_compiled if compiled else _update_in_chunks
        update(rule, sums, calls, work[0].proceed, cautious_decay)
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


def _scalars(rule: ElementwiseRule, each: GroupWork) -> List[torch.Tensor]:
    """For each member the decay factor and the rule's scalars, ``(1 + k,)``."""
    group = each.group
    values = [1 - group["lr"] * group["weight_decay"], *rule.scalars(group, each.clock)]
    columns = [
        value if isinstance(value, torch.Tensor) else torch.full_like(each.clock, value)
        for value in values
    ]
    table = torch.stack([column.expand_as(each.clock) for column in columns], dim=1)
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
    params, local, numels = [], [], []
    compiled_sums = _compiled_sums(sums) if compiled else _sums_in_chunks
    for its_jobs, its_scalars in zip(jobs, scalars):
        for job, its in zip(its_jobs, its_scalars):
            params.append(job.member.param)
            numels.append(job.member.param.numel())
            # As in _update_compiled: no kernel of their own for lengths 0 and 1.
            count = compiled_sums if job.param.numel() > 1 else _sums_in_chunks
            local.append(count(sums, job.param, job.grad, job.buffers, its))
    totals = sum_over_shards(params, torch.stack(local)).unbind(1)
    numel = _float64(tuple(numels), local[0].device)
    flat = torch.stack([its for its_scalars in scalars for its in its_scalars])
    more = torch.stack(list(sums.scalars(totals, numel, flat[:, 1:].unbind(1))), dim=1)
    rows = iter(torch.cat([flat, more.to(flat)], dim=1).unbind())
    return [[next(rows).detach() for _ in its_scalars] for its_scalars in scalars]


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
) -> torch.Tensor:
    work = scalars.dtype
    args = (x.to(work) for x in (param, grad, *buffers))
    return torch.stack([part.to(torch.float64) for part in sums.of(*args, scalars[1:])])


def _sums_in_chunks(
    sums: WholeSums,
    param: torch.Tensor,
    grad: torch.Tensor,
    buffers: Sequence[torch.Tensor],
    scalars: torch.Tensor,
) -> torch.Tensor:
    parts = [
        _local_sums(sums, param[i:j], grad[i:j], [b[i:j] for b in buffers], scalars)
        for i, j in chunks(param)
    ]
    return torch.stack(parts).sum(dim=0)


def _and_from_sums(
    sums: WholeSums, local: torch.Tensor, numel: int, scalars: torch.Tensor
) -> torch.Tensor:
    more = sums.scalars(local.unbind(), numel, scalars[1:].unbind())
    return torch.cat([scalars, torch.stack(list(more)).to(scalars)])


def _update_in_place(
    update: Update,
    sums: Optional[WholeSums],
    param: torch.Tensor,
    grad: torch.Tensor,
    buffers: Sequence[torch.Tensor],
    scalars: torch.Tensor,
    proceed: Optional[torch.Tensor],
    cautious_decay: bool,
    rounding: Optional[Rounding],
) -> None:
    if sums is not None:
        local = _local_sums(sums, param, grad, buffers, scalars)
        scalars = _and_from_sums(sums, local, param.numel(), scalars)
    work = scalars.dtype
    old = param.to(work)
    args = (grad.to(work), *(buffer.to(work) for buffer in buffers), scalars[1:])
    step, *new_buffers = update(old, *args)
    write_weights(param, old, step, scalars[0], proceed, cautious_decay)
    write_state(buffers, new_buffers, proceed, rounding)


def _update_in_chunks(
    rule: ElementwiseRule,
    sums: Optional[WholeSums],
    calls: Iterable[_Call],
    proceed: Optional[torch.Tensor],
    cautious_decay: bool,
) -> None:
    for param, grad, buffers, scalars, rounding in calls:
        if sums is not None:
            local = _sums_in_chunks(sums, param, grad, buffers, scalars)
            scalars = _and_from_sums(sums, local, param.numel(), scalars)
        for i, j in chunks(param):
            _update_in_place(
                *(rule.update, None, param[i:j], grad[i:j], [b[i:j] for b in buffers], scalars),
                *(proceed, cautious_decay, some_of(rounding, i, j)),
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
    cautious_decay: bool,
    roundings: Sequence[Optional[Rounding]],
) -> None:
    for args in zip(params, grads, buffers, scalars.unbind(), roundings):
        _update_in_place(update, sums, *args[:4], proceed, cautious_decay, args[4])


def _update_compiled(
    rule: ElementwiseRule,
    sums: Optional[WholeSums],
    calls: Iterable[_Call],
    proceed: Optional[torch.Tensor],
    cautious_decay: bool,
) -> None:
    compiled = _compiled(rule, sums)

    def run(batch: Sequence[_Call]) -> None:
        params, grads, buffers, scalars, roundings = zip(*batch)
        # Stacked anew, because dynamo guards on what a tensor is a view of.
        compiled.function(
            *(rule.update, sums, params, grads, buffers, torch.stack(scalars)),
            *(proceed, cautious_decay, roundings),
        )

    calls = list(calls)
    # dynamo makes a kernel of its own for a length of 1; a shard of one element is not worth it.
    single = [call for call in calls if call.param.numel() == 1]
    _update_in_chunks(rule, sums, single, proceed, cautious_decay)
    kinds: Dict[Any, List[_Call]] = {}
    for call in calls:
        if call.param.numel() > 1:
            kinds.setdefault((call.kind(), proceed is None, cautious_decay), []).append(call)
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


@dataclass
class _Compiled:
    function: Callable[..., Any]
    padding: Dict[Any, List[_Call]]
    """By what it was compiled for: calls that fill up a batch."""


@lru_cache(maxsize=None)
def _compiled(rule: ElementwiseRule, sums: Optional[WholeSums]) -> _Compiled:
    what = "update" if sums is None else "sum_and_update"
    return _Compiled(_compile(_update_batch, f"{rule.update.__name__}_{what}"), {})


def forget_compiled() -> None:
    """
    Compile all rules anew when they are next used. Belongs to :func:`torch._dynamo.reset`, after
    which equal lengths would be taken for the same.
    """
    _compiled.cache_clear()
    _compiled_sums.cache_clear()


@lru_cache(maxsize=None)
def _compiled_sums(sums: WholeSums) -> Callable[..., Any]:
    return _compile(_local_sums, f"{sums.of.__name__}_sums")


def _compile(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    # A code object of its own, because dynamo counts recompilations per code object: with a shared
    # one, the ninth rule of a process would run eagerly.
    assert isinstance(function, FunctionType)
    # Without dynamic_threads inductor takes the number of threads from the first shape that it
    # sees, and a kernel made for all shapes runs on one thread.
    return torch.compile(
        FunctionType(function.__code__.replace(co_name=name), globals()),
        dynamic=True,
        fullgraph=True,
        options={"cpp.dynamic_threads": True},
    )


class ElementwiseOptimizer(ExtOptimizer):
    """
    An optimizer with one :class:`ElementwiseRule` for all of its parameters.
    """

    rule: ClassVar[ElementwiseRule]

    def buffers(self, group: Mapping[str, Any]) -> Sequence[str]:
        del group
        return self.rule.buffers

    def update(self, work: Sequence[GroupWork]) -> None:
        apply_rule(self.rule, work, self._names, self._compile, self._seed)
