"""
The step loop for rules that know a matrix by numbers of its rows and columns: second moments that
are factored, or shared by a row or several.

Such a number is that of the whole row, whichever ranks have parts of it: sums over what each rank
has are added over all, once for all parameters of a step. So these numbers are the same on all
ranks, which all keep them.
"""

import math
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from typing_extensions import Unpack

from .base import CALLS, EngineOptions, ExtOptimizer, GroupWork, Member
from .elementwise import (
    LEADING,
    DecayForm,
    Scalar,
    compile_rule,
    decay_form,
    decoupled_decay,
    kept_compiled,
    scalars_of,
)
from .placement import add_over_shards
from .row_plan import Piece, RowLayout, RowMatrix, RowPlan, RowSums, plan_of
from .write import Rounding, chunk_size, rounding_of, write_state, write_weights

__all__ = ["Numbers", "RowwiseOptimizer"]


class Numbers(NamedTuple):
    """What elements are multiplied by, or whatever the rule makes of it."""

    row: torch.Tensor
    """``(n_rows,)``, in the dtype of the clock."""
    col: torch.Tensor
    """``(n_cols,)``, or ``(1,)`` for all columns."""


class _Job(NamedTuple):
    """One parameter of a step."""

    member: Member
    plan: RowPlan
    work: GroupWork
    scalars: torch.Tensor
    """Those of the engine, and the rule's."""
    tensors: Tuple[torch.Tensor, torch.Tensor]
    """The local parts of the parameter and of its gradient."""


class RowwiseOptimizer(ExtOptimizer):
    """
    An optimizer that keeps vectors for the rows and columns of matrices. A subclass says which, how
    they follow from sums of squares, and what they do to an element.

    :param layouts: By canonical name, the matrices of a parameter; if it is not named, its first
        dimension is rows, and all of a vector is one row.
    """

    buffer_names: Tuple[str, ...] = ()
    """Names of the state of each element."""

    sums_columns: bool = False
    """Whether the rule wants sums of columns beside those of rows."""

    def __init__(
        self,
        params: Any,
        defaults: Dict[str, Any],
        layouts: Optional[Mapping[str, RowLayout]] = None,
        **engine: Unpack[EngineOptions],
    ):
        self._layouts = dict(layouts or {})
        self._plans: Dict[torch.Tensor, RowPlan] = {}
        super().__init__(params, defaults, **engine)

    def buffers(self, group: Mapping[str, Any]) -> Sequence[str]:
        return self.buffer_names

    def vectors(self, matrix: RowMatrix) -> Dict[str, int]:
        """Names and lengths of the state vectors of a matrix."""
        raise NotImplementedError

    def scalars(self, group: Mapping[str, Any], step: torch.Tensor) -> Sequence[Scalar]:
        """As :data:`~olmo_optim_ext.engine.elementwise.ElementwiseRule.scalars`."""
        raise NotImplementedError

    def follow(
        self,
        matrix: RowMatrix,
        sums: RowSums,
        vectors: Mapping[str, torch.Tensor],
        scalars: Sequence[torch.Tensor],
    ) -> Tuple[Numbers, Dict[str, torch.Tensor]]:
        """The numbers of a matrix's rows and columns, and its new state vectors."""
        raise NotImplementedError

    whole_sum: Any = None
    """
    ``(param, grad, row, col, scalars) -> 0-d sums``, if the rule needs any: they are added over the
    parameter. A static method; pure.
    """

    def more_scalars(
        self, totals: torch.Tensor, numel: int, scalars: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """What follows from :meth:`whole_sum`: further scalars of :meth:`rule`."""
        return ()

    rule: Any
    """
    ``(param, grad, *buffers, row, col, scalars) -> (what is subtracted, *buffers)``: elements
    ``(r, c)``, ``row`` is ``(r, 1)``, ``col`` is ``(1, c)`` or ``(1, 1)``. A static method; pure.
    """

    def _create_state(self, group: Dict[str, Any]) -> torch.Tensor:
        clock = super()._create_state(group)
        for param in (p for p in group["params"] if p.requires_grad):
            if not get_local_tensor(param).is_contiguous():
                raise OLMoConfigurationError(
                    f"{type(self).__name__}: parameter '{self.name_of(param)}' is not contiguous, "
                    "allowed are contiguous parameters"
                )
            plan = plan_of(param, self._layouts.get(self.name_of(param)), self.sums_columns)
            self._plans[param] = plan
            lengths: Dict[str, int] = {}
            for matrix in plan.layout.matrices:
                for name, n in self.vectors(matrix).items():
                    lengths[name] = lengths.get(name, 0) + n
            for name, n in lengths.items():
                self.state[param][name] = torch.zeros(n, dtype=clock.dtype, device=param.device)
        return clock

    def update(self, work: Sequence[GroupWork]) -> None:
        jobs = [
            _Job(
                *(member, self._plans[member.param], each, scalars),
                (get_local_tensor(member.param), member.grad.contiguous()),
            )
            for each in work
            for member, scalars in zip(
                each.members, scalars_of(each, self.scalars, decoupled_decay)
            )
        ]
        params = [job.member.param for job in jobs]
        totals = add_over_shards(params, [self._sums(job) for job in jobs])
        numbers = [self._follow(job, total) for job, total in zip(jobs, totals)]
        local = [self._whole_sums(job, its) for job, its in zip(jobs, numbers)]
        if local[0] is not None:
            summed = add_over_shards(params, [each for each in local if each is not None])
            jobs = [job._replace(scalars=self._extended(job, s)) for job, s in zip(jobs, summed)]
        for job, its in zip(jobs, numbers):
            self._write(job, its)

    def _sums(self, job: _Job) -> torch.Tensor:
        """Sums of squares of what this rank has of a gradient, zeros elsewhere: a vector."""
        flat = torch.zeros(sum(job.plan.sizes), dtype=torch.float64, device=job.member.grad.device)
        sums = job.plan.split(flat)
        l2 = decay_form(job.work.group) == DecayForm.l2
        for piece in job.plan.pieces:
            param, grad = (job.plan.view(x, piece) for x in job.tensors)
            rows, cols = sums[piece.matrix]
            for i, j in self._chunks(grad):
                its_rows, its_cols = self._kernel(_squares, grad)(
                    param[i:j] if l2 else None, grad[i:j], job.scalars, cols is not None
                )
                rows[piece.first_row + i : piece.first_row + j] += its_rows
                if cols is not None:
                    cols[piece.first_col : piece.first_col + grad.shape[1]] += its_cols
        return flat

    def _follow(self, job: _Job, total: torch.Tensor) -> List[Numbers]:
        """The numbers of each matrix; keeps its new vectors."""
        out: List[Numbers] = []
        begins: Dict[str, int] = {}
        scalars = job.scalars[LEADING:].unbind()
        for matrix, sums in zip(job.plan.layout.matrices, job.plan.split(total)):
            old = {}
            for name, n in self.vectors(matrix).items():
                begin = begins.get(name, 0)
                old[name] = job.member.state[name][begin : begin + n]
                begins[name] = begin + n
            numbers, new = self.follow(matrix, sums, old, scalars)
            out.append(numbers)
            write_state(list(old.values()), [new[key] for key in old], job.work.proceed, None)
        return out

    def _whole_sums(self, job: _Job, numbers: Sequence[Numbers]) -> Optional[torch.Tensor]:
        if self.whole_sum is None:
            return None
        parts = []
        for piece in job.plan.pieces:
            param, grad = (job.plan.view(x, piece) for x in job.tensors)
            row, col = _numbers_of(numbers[piece.matrix], piece, grad)
            for i, j in self._chunks(grad):
                parts.append(
                    self._kernel(_whole_sum, grad)(
                        self.whole_sum,
                        decay_form(job.work.group) == DecayForm.l2,
                        *(param[i:j], grad[i:j], row[i:j], col, job.scalars),
                    )
                )
        if not parts:
            empty = job.member.grad.new_zeros(1, 1)
            args = (empty, empty, empty, empty, job.scalars)
            parts = [torch.zeros_like(_whole_sum(self.whole_sum, False, *args))]
        return torch.stack(parts).sum(0)

    def _extended(self, job: _Job, totals: torch.Tensor) -> torch.Tensor:
        scalars = job.scalars[LEADING:].unbind()
        more = self.more_scalars(totals, job.member.param.numel(), scalars)
        return torch.cat([job.scalars, torch.stack(list(more)).to(job.scalars)])

    def _write(self, job: _Job, numbers: Sequence[Numbers]) -> None:
        param, grad = job.tensors
        buffers = [job.member.local(name) for name in self.buffer_names]
        rounding = rounding_of(job.member, buffers, self._names, job.work.group[CALLS], self._seed)
        places = None if rounding is None else _all_places(rounding, job.plan.shape)
        for piece in job.plan.pieces:
            views = [job.plan.view(x, piece) for x in (param, grad, *buffers)]
            row, col = _numbers_of(numbers[piece.matrix], piece, views[1])
            its_places = None if places is None else job.plan.view(places, piece)
            for i, j in self._chunks(views[1]):
                its_rounding = None
                if rounding is not None and its_places is not None:
                    its_rounding = Rounding(rounding.keys, its_places[i:j])
                self._kernel(_update_piece, views[1])(
                    self.rule,
                    *(view[i:j] for view in views[:2]),
                    [view[i:j] for view in views[2:]],
                    *(row[i:j], col, job.scalars, job.work.proceed),
                    *(decay_form(job.work.group), its_rounding),
                )

    def _chunks(self, x: torch.Tensor) -> List[Tuple[int, int]]:
        """First and last row of what an eager rule takes at a time."""
        n_rows, n_cols = x.shape
        size = n_rows if self._compile else max(1, chunk_size(x.device) // max(n_cols, 1))
        return [(begin, min(begin + size, n_rows)) for begin in range(0, n_rows, max(size, 1))]

    def _kernel(self, function: Callable[..., Any], x: torch.Tensor) -> Callable[..., Any]:
        # dynamo makes kernels of their own for lengths of 1; vectors are not worth them.
        if not self._compile or min(x.shape) == 1:
            return function
        return _compiled(function, type(self).__name__, x.is_contiguous(), x.dtype)


@kept_compiled
def _compiled(function: Callable[..., Any], *kind: Any) -> Callable[..., Any]:
    # A code object of its own for each kind: dynamo counts the kernels of each.
    return compile_rule(function, f"{kind[0]}{function.__name__}")


def _squares(
    param: Optional[torch.Tensor], grad: torch.Tensor, scalars: torch.Tensor, columns: bool
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    grad = grad.to(scalars.dtype)
    if param is not None:
        grad = grad + param.to(scalars.dtype) * scalars[1]
    squares = grad * grad
    cols = squares.sum(0, dtype=torch.float64) if columns else None
    return squares.sum(1, dtype=torch.float64), cols


def _whole_sum(
    whole_sum: Callable[..., Sequence[torch.Tensor]],
    l2: bool,
    param: torch.Tensor,
    grad: torch.Tensor,
    row: torch.Tensor,
    col: torch.Tensor,
    scalars: torch.Tensor,
) -> torch.Tensor:
    work = scalars.dtype
    param, grad = param.to(work), grad.to(work)
    if l2:
        grad = grad + param * scalars[1]
    sums = whole_sum(param, grad, row, col, scalars[LEADING:])
    return torch.stack([each.to(torch.float64) for each in sums])


def _update_piece(
    rule: Callable[..., Tuple[torch.Tensor, ...]],
    param: torch.Tensor,
    grad: torch.Tensor,
    buffers: Sequence[torch.Tensor],
    row: torch.Tensor,
    col: torch.Tensor,
    scalars: torch.Tensor,
    proceed: Optional[torch.Tensor],
    decay: DecayForm,
    rounding: Optional[Rounding],
) -> None:
    work = scalars.dtype
    old, grad = param.to(work), grad.to(work)
    if decay == DecayForm.l2:
        grad = grad + old * scalars[1]
    step, *new = rule(old, grad, *(b.to(work) for b in buffers), row, col, scalars[LEADING:])
    write_state(buffers, new, proceed, rounding)
    write_weights(param, old, step, scalars[0], proceed, decay == DecayForm.cautious)


def _numbers_of(
    numbers: Numbers, piece: Piece, x: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """``(r, 1)`` and ``(1, c)`` for the elements of a piece."""
    n_rows, n_cols = x.shape
    row = numbers.row[piece.first_row : piece.first_row + n_rows]
    col = numbers.col
    if len(col) > 1:
        col = col[piece.first_col : piece.first_col + n_cols]
    return row.unsqueeze(1).detach(), col.unsqueeze(0).detach()


def _all_places(rounding: Rounding, shape: Tuple[int, int]) -> torch.Tensor:
    """The place of each local element in the whole parameter, ``(rows, cols)``."""
    places = rounding.places
    if places.ndim == 0:  # of the first of consecutive elements
        places = torch.arange(math.prod(shape), device=places.device) + places
    return places.view(shape)
