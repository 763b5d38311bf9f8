"""
The step loop for rules that act on each coordinate alone.

A rule sees flat local views and a small vector of scalars that were computed before it. So one
rule serves every shape and sharding, nothing that a schedule changes is baked into a compiled
kernel, and the update of a shard is bitwise the shard of the update.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any, Callable, ClassVar, Dict, Mapping, Sequence, Tuple, Union

import torch
from olmo_core.distributed.utils import get_local_tensor

from .base import ExtOptimizer, GroupWork, Member
from .hyperparameters import to_flag

__all__ = ["ElementwiseOptimizer", "ElementwiseRule", "Scalar", "apply_rule", "bias_correction"]

Scalar = Union[float, torch.Tensor]
"""A host number, or a tensor of shape ``(n,)`` with a value for each parameter of the group."""


@dataclass(frozen=True)
class ElementwiseRule:
    """An update rule as pure functions."""

    buffers: Tuple[str, ...]
    """Names of the state tensors, in the order in which :data:`update` takes and returns them."""

    scalars: Callable[[Mapping[str, Any], torch.Tensor], Sequence[Scalar]]
    """From the group's hyperparameters and its clock ``(n,)``: what :data:`update` needs."""

    update: Callable[..., Tuple[torch.Tensor, ...]]
    """
    ``(param, grad, *buffers, scalars) -> (param, *buffers)``: flat tensors of one length, and
    scalars of shape ``(k,)``. Pure, and made of single additions, products, quotients and roots:
    fused kernels such as ``lerp`` may round their vector body and their tail differently, which
    would make the result depend on where a shard ends.
    """


def bias_correction(beta: float, step: torch.Tensor) -> torch.Tensor:
    """
    ``1 - beta**step`` without the cancellation that costs float32 four digits at small steps.

    :param step: Shape ``(n,)``, counted from 1.
    """
    if beta == 0.0:
        return torch.ones_like(step)
    return -torch.expm1(step * math.log(beta))


def apply_rule(
    rule: ElementwiseRule,
    group: Mapping[str, Any],
    clock: torch.Tensor,
    members: Sequence[Member],
    compiled: bool,
) -> None:
    """
    Update parameters and buffers in place, parameter by parameter.

    :param clock: Updates of each parameter of the group including this one, shape ``(n,)``.
    """
    values = [
        s if isinstance(s, torch.Tensor) else torch.full_like(clock, s)
        for s in rule.scalars(group, clock)
    ]
    scalars = torch.stack([v.expand_as(clock) for v in values], dim=1)  # (n, k)
    run = _compiled(rule) if compiled else _update_in_place
    for member in members:
        param = get_local_tensor(member.param)
        if param.numel() == 0:
            continue
        flat = _flat(param)
        buffers = [_flat(member.local(name)) for name in rule.buffers]
        run(rule.update, flat, _flat(member.grad), buffers, scalars[member.slot].detach())
        if not param.is_contiguous():  # then flat was a copy
            param.copy_(flat.view(param.shape))


def _flat(x: torch.Tensor) -> torch.Tensor:
    # Detached, because dynamo guards on the shape of what a tensor is a view of.
    return x.reshape(-1).detach()


def _update_in_place(
    update: Callable[..., Tuple[torch.Tensor, ...]],
    param: torch.Tensor,
    grad: torch.Tensor,
    buffers: Sequence[torch.Tensor],
    scalars: torch.Tensor,
) -> None:
    work = scalars.dtype
    new_param, *new_buffers = update(param.to(work), grad.to(work), *buffers, scalars)
    param.copy_(new_param)
    for buffer, new in zip(buffers, new_buffers):
        buffer.copy_(new)


@lru_cache(maxsize=None)
def _compiled(rule: ElementwiseRule) -> Callable[..., None]:
    # A code object of its own, because dynamo counts recompilations per code object: with a shared
    # one, the ninth rule of a process would run eagerly.
    code = _update_in_place.__code__.replace(co_name=f"{rule.update.__name__}_in_place")
    # Without dynamic_threads inductor takes the number of threads from the first shape that it
    # sees, and a kernel made for all shapes runs on one thread.
    return torch.compile(
        FunctionType(code, globals()),
        dynamic=True,
        fullgraph=True,
        options={"cpp.dynamic_threads": True},
    )


class ElementwiseOptimizer(ExtOptimizer):
    """
    An optimizer with one :class:`ElementwiseRule` for all of its parameters.

    :param compile: Compile the rule with :func:`torch.compile` at the first step: one kernel for
        all shapes. ``step()`` itself is never compiled.
    """

    rule: ClassVar[ElementwiseRule]

    def __init__(self, params: Any, defaults: Dict[str, Any], compile: bool = False):
        self._compile = to_flag(compile, "compile", type(self).__name__)
        super().__init__(params, defaults)

    def buffers(self, group: Mapping[str, Any]) -> Sequence[str]:
        del group
        return self.rule.buffers

    def update(self, work: Sequence[GroupWork]) -> None:
        for group, clock, members in work:
            apply_rule(self.rule, group, clock, members, self._compile)
