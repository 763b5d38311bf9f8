"""
The step loop for rules that need a matrix only in products with thin factors, such as a power
iteration.

A matrix that ranks share is never brought together. Each rank multiplies its part with its rows of
a thin factor; the owner of the matrix adds the products up, does what needs a whole thin factor,
and sends each rank the rows that it needs.

In all of it ``A`` ``(a, b)`` is the matrix ``(out, in)`` or, where the rule says so, its transpose.
The *basis* ``V`` ``(b, r)`` is state; from it come ``P = orthonormal(A V)`` ``(a, r)`` and
``R = A^T P`` ``(b, r)``.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from torch.distributed.tensor import DTensor
from typing_extensions import Unpack

from .base import CALLS, GroupWork
from .exchange import assign_owners
from .factors import FactorPlan
from .layout import Block, MatrixLayout
from .matrix_base import MatrixBase, MatrixOptions
from .placement import Groups, Path, Placing, ranges_at, sharding_dims, sharding_group
from .plan import Job, Plan, items_of
from .thin import Rows, Thin, ThinExchange
from .write import chunks, some_of, write_state

__all__ = ["BASIS", "LowRankOptimizer"]

BASIS = "basis"
"""State key of ``V``."""

ROWS = 128
"""
Of an update that is made at a time on CPU: enough for a product, few enough for the cache.
"""

Key = Tuple[int, int]


class Part(NamedTuple):
    """Some rows and columns."""

    rows: Rows
    cols: Rows

    @property
    def shape(self) -> Tuple[int, int]:
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    def within(self, block: Block) -> "Part":
        """What of it is in a block, from the block's first row and column on; (0, 0) if nothing."""
        rows = _overlap(self.rows, block.first_row, block.n_rows)
        cols = _overlap(self.cols, block.first_col, block.n_cols)
        nothing = rows[0] == rows[1] or cols[0] == cols[1]
        return Part((0, 0), (0, 0)) if nothing else Part(rows, cols)


def _overlap(rows: Rows, first: int, n: int) -> Rows:
    begin, end = max(rows[0] - first, 0), min(rows[1] - first, n)
    return (begin, end) if begin < end else (0, 0)


@dataclass(frozen=True)
class LowRankPlan(Plan):
    """What does not change from step to step for a parameter."""

    boxes: Sequence[Part]
    """What each rank of the group has of the parameter; where each has all of it, one for all."""

    flipped: Sequence[bool]
    """Of each matrix whether ``A`` is the transpose of it as it is stored."""

    @property
    def _size(self) -> int:
        group = self.placing.group
        return 1 if group is None else dist.get_world_size(group)

    @property
    def _me(self) -> int:
        return 0 if len(self.boxes) == 1 else dist.get_rank(self.placing.group)

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """What is shaped like the local part of the parameter, as ``(rows, cols)``."""
        return x.view(self.boxes[self._me].shape)

    @cached_property
    def here(self) -> List[Tuple[slice, slice]]:
        box, out = self.boxes[self._me], []
        for _, block in self.blocks:
            part = box.within(block)
            row = block.first_row + part.rows[0] - box.rows[0]
            col = block.first_col + part.cols[0] - box.cols[0]
            n_rows, n_cols = part.shape
            out.append((slice(row, row + n_rows), slice(col, col + n_cols)))
        return out

    def shape_of_a(self, k: int) -> Tuple[int, int]:
        block = self.blocks[k][1]
        shape = (block.n_rows, block.n_cols)
        return shape[::-1] if self.flipped[k] else shape

    def thin_rank(self, k: int) -> int:
        """``r``."""
        return self.factors.shapes[k][BASIS][1]

    def basis_is_owners(self, k: int) -> bool:
        """Whether only the owner has the basis; else each rank has the rows that it needs."""
        by_rows = self.factors.by_rows
        return len(self.boxes) > 1 and (BASIS not in by_rows or by_rows[BASIS][k] is None)

    def has_rows_of_r(self, k: int) -> bool:
        """Whether the product with this rank's part is ``R`` in its rows, and no summand of it."""
        if len(self.boxes) == 1:
            return self.placing.group is None
        whole = (0, self.shape_of_a(k)[0])
        by_rows = all(rows in ((0, 0), whole) for rows, _ in self._sides[k])
        return by_rows and not self.basis_is_owners(k)

    def thin(self, k: int, side: int) -> Thin:
        """``P`` (``side`` 0), what has the rows of the basis (1) or one number a column (2)."""
        owner, n_rows = self.owners[k], (*self.shape_of_a(k), 1)[side]
        if side == 2 or len(self.boxes) == 1:  # all need all, and the owner computes
            sources = [(0, n_rows) if rank == owner else (0, 0) for rank in range(self._size)]
            targets = [(0, n_rows)] * self._size
        else:
            sources = targets = [sides[side] for sides in self._sides[k]]
        return Thin(n_rows, self.thin_rank(k), owner, sources, targets)

    @cached_property
    def _sides(self) -> List[List[Tuple[Rows, Rows]]]:
        """For each matrix and rank the rows and the columns of its part of ``A``."""
        out = []
        for flipped, (_, block) in zip(self.flipped, self.blocks):
            parts = [box.within(block) for box in self.boxes]
            out.append([(p.cols, p.rows) if flipped else (p.rows, p.cols) for p in parts])
        return out


class LowRankOptimizer(MatrixBase):
    """
    An optimizer with a rule that needs a matrix in products with thin factors only.

    Under FSDP and other shardings each rank has, beside its part of the momentum, the rows of the
    basis that belong to its rows, or, where the basis belongs to columns, the owner has all of it.
    """

    def __init__(self, params: Any, defaults: Dict[str, Any], **options: Unpack[MatrixOptions]):
        self._groups: Groups = {}
        self.exchanges: Dict[Any, ThinExchange] = {}
        super().__init__(params, defaults, **options)

    def __getstate__(self) -> Dict[str, Any]:
        return {**super().__getstate__(), "_groups": {}, "exchanges": {}}

    def thin_rank(self, group: Mapping[str, Any], n_out: int, n_in: int) -> int:
        """``r``, at most the smaller side."""
        raise NotImplementedError

    def transposes(self, group: Mapping[str, Any], n_out: int, n_in: int) -> bool:
        """Whether ``A`` is ``(in, out)``."""
        raise NotImplementedError

    def on_shards(
        self, group: Mapping[str, Any], grad: torch.Tensor, momentum: torch.Tensor
    ) -> torch.Tensor:
        """The matrix that is approximated: elementwise, pure."""
        raise NotImplementedError

    def on_owner(
        self, group: Mapping[str, Any], product: torch.Tensor, call: int, name: str
    ) -> torch.Tensor:
        """``P`` from ``A V``: both ``(a, r)``."""
        raise NotImplementedError

    def next_basis(
        self, group: Mapping[str, Any], r: torch.Tensor, lengths: torch.Tensor, basis: torch.Tensor
    ) -> torch.Tensor:
        """
        Some rows of the next basis. The update is ``P`` times its transpose.

        :param r: The same rows of ``R``, ``(n, r)``.
        :param lengths: Of the columns of all of ``R``, ``(r,)``.
        :param basis: The same rows of the basis.
        """
        raise NotImplementedError

    def subtracted(self, group: Mapping[str, Any]) -> float:
        """The momentum becomes what is approximated less this times ``P R^T``."""
        raise NotImplementedError

    def report(
        self, group: Mapping[str, Any], gram: torch.Tensor, n_out: int, n_in: int
    ) -> Dict[str, torch.Tensor]:
        """
        What is worth knowing of a step. Called on owners for steps of which a report was asked for.

        :param gram: ``R^T R``, ``(r, r)``.
        """
        return {}

    def factor_shapes(
        self, group: Mapping[str, Any], n_out: int, n_in: int
    ) -> Dict[str, Tuple[int, ...]]:
        b = n_out if self.transposes(group, n_out, n_in) else n_in
        return {BASIS: (b, self.thin_rank(group, n_out, n_in))}

    # Plans

    def plan(
        self, params: Sequence[Tuple[Dict[str, Any], torch.Tensor, MatrixLayout]]
    ) -> List[Plan]:
        placed = [self._placed(param, layout) for _, param, layout in params]
        owners: List[List[int]] = [[] for _ in params]
        group_of = {param: group for group in self.param_groups for param in group["params"]}
        for process_group in dict.fromkeys(placing.group for placing, _ in placed):
            if process_group is None:
                continue
            items = [
                (i, block)
                for i, ((placing, _), (_, _, layout)) in enumerate(zip(placed, params))
                if placing.group is process_group
                for block in layout.blocks()
            ]
            earlier = [
                (self.cost(group_of[param], *plan.shape(block)), owner)
                for param, plan in self._plans.items()
                if plan.placing.group is process_group
                for (_, block), owner in zip(plan.blocks, plan.owners)
            ]
            costs = [self.cost(params[i][0], *_out_in(params[i][2], block)) for i, block in items]
            found = assign_owners(
                [cost for cost, _ in earlier] + costs,
                dist.get_world_size(process_group),
                [owner for _, owner in earlier]
                + [_sole_holder(placed[i][1], block) for i, block in items],
            )
            for (i, _), owner in zip(items, found[len(earlier) :]):
                owners[i].append(owner)
        return [
            self._plan_one(group, param, layout, placing, boxes, its)
            for (group, param, layout), (placing, boxes), its in zip(params, placed, owners)
        ]

    def _plan_one(
        self,
        group: Dict[str, Any],
        param: torch.Tensor,
        layout: MatrixLayout,
        placing: Placing,
        boxes: List[Part],
        owners: List[int],
    ) -> Plan:
        blocks = list(enumerate(layout.blocks()))
        shapes = self._factor_shapes(group, layout)
        flipped = [
            self.transposes(group, *_out_in(layout, block)) != layout.in_out for _, block in blocks
        ]
        factors = FactorPlan(shapes)
        if len(boxes) > 1:
            # Where ranks share rows, what belongs to rows is with them.
            by_rows = [
                [box.within(block).shape[0] for box in boxes]
                if flips and _divides_rows(boxes, layout)
                else None
                for flips, (_, block) in zip(flipped, blocks)
            ]
            grid = _grid(param, placing.group)
            factors = FactorPlan(shapes, owners, placing.group, {BASIS: by_rows}, grid)
        return LowRankPlan(layout, placing, blocks, owners, factors, boxes, flipped)

    def _placed(self, param: torch.Tensor, layout: MatrixLayout) -> Tuple[Placing, List[Part]]:
        """Where a parameter is, and what each rank has of it."""
        group = sharding_group(param, self._groups)
        if group is None:
            boxes = [Part((0, layout.rows), (0, layout.cols))]
            shared = not isinstance(param, DTensor) and self._replicas is not None
            if shared and dist.get_world_size(self._replicas) > 1:
                return Placing(Path.broadcast, self._replicas), boxes
            return Placing(Path.local), boxes
        assert isinstance(param, DTensor)
        boxes = [self._box(param, layout, coordinate) for coordinate in _coordinates(param, group)]
        return Placing(Path.thin, group), boxes

    def _box(self, param: DTensor, layout: MatrixLayout, coordinate: Sequence[int]) -> Part:
        """What a rank has of a parameter, seen as ``(rows, cols)``."""
        ranges = ranges_at(param, coordinate)
        sharded = {getattr(param.placements[dim], "dim", 0) for dim in sharding_dims(param)}
        if sharded == {0}:
            first, n = ranges[0]
            per_index = layout.rows // max(param.shape[0], 1)
            return Part((first * per_index, (first + n) * per_index), (0, layout.cols))
        if param.ndim != 2:
            raise OLMoConfigurationError(
                f"{type(self).__name__}: parameter '{self.name_of(param)}' of shape "
                f"{tuple(param.shape)} has the placements {param.placements}, allowed for more "
                "than two dimensions are those that divide the first"
            )
        (row, n_rows), (col, n_cols) = ranges
        return Part((row, row + n_rows), (col, col + n_cols))

    # Steps

    def update_matrices(self, work: Sequence[GroupWork]) -> None:
        alike: Dict[Tuple[Optional[dist.ProcessGroup], torch.dtype], List[Job]] = {}
        for each in work:
            for member in each.members:
                plan = self._plans[member.param]
                key = (plan.placing.group, each.clock.dtype)
                alike.setdefault(key, []).append(Job(each, member, plan))
        for (process_group, dtype), jobs in alike.items():
            for some in self._buckets(jobs, dtype):
                _Step(self, some, process_group, dtype).run()

    def _buckets(self, jobs: Sequence[Job], dtype: torch.dtype) -> List[List[Job]]:
        """Parameters of which a rank has about as much as a bucket holds, or single ones."""
        buckets: List[List[Job]] = []
        filled = 0
        for job in sorted(jobs, key=lambda job: -job.plan.largest):
            alone = job.plan.placing.group is None  # nothing is exchanged
            numel = job.plan.layout.rows * job.plan.layout.cols
            size = numel * dtype.itemsize // len(_plan(job).boxes)
            if not buckets or alone or filled + size > self.bucket_bytes:
                buckets.append([])
                filled = 0
            buckets[-1].append(job)
            filled += size
        return buckets


def _out_in(layout: MatrixLayout, block: Block) -> Tuple[int, int]:
    shape = (block.n_rows, block.n_cols)
    return shape[::-1] if layout.in_out else shape


def _divides_rows(boxes: Sequence[Part], layout: MatrixLayout) -> bool:
    """Whether each rank has some whole rows, all ranks together all, in the order of ranks."""
    ends = [0, *accumulate(box.shape[0] for box in boxes)]
    in_order = all(
        box.cols == (0, layout.cols) and box.rows[0] in (begin, box.rows[1])
        for box, begin in zip(boxes, ends)
    )
    return in_order and ends[-1] == layout.rows


def _coordinates(param: DTensor, group: dist.ProcessGroup) -> List[List[int]]:
    """Of each rank of a group in the mesh of a parameter."""
    mesh = param.device_mesh.mesh
    return [(mesh == rank).nonzero()[0].tolist() for rank in dist.get_process_group_ranks(group)]


def _grid(param: torch.Tensor, group: Optional[dist.ProcessGroup]) -> List[List[Tuple[int, int]]]:
    """See :data:`~olmo_optim_ext.engine.factors.FactorPlan.grid`."""
    assert isinstance(param, DTensor) and group is not None
    mesh, dims = param.device_mesh, sharding_dims(param)
    return [[(mesh.size(dim), at[dim]) for dim in dims] for at in _coordinates(param, group)]


def _sole_holder(boxes: Sequence[Part], block: Block) -> Optional[int]:
    """The rank that has all of a matrix, if there is one."""
    holders = [rank for rank, box in enumerate(boxes) if box.within(block).shape != (0, 0)]
    return holders[0] if len(holders) == 1 and len(boxes) > 1 else None


class _Step:
    """One step of some parameters that are shared by the same ranks."""

    def __init__(
        self,
        optim: LowRankOptimizer,
        jobs: Sequence[Job],
        process_group: Optional[dist.ProcessGroup],
        dtype: torch.dtype,
    ):
        self._optim = optim
        self._jobs = jobs
        self._group = process_group
        self._rank = 0 if process_group is None else dist.get_rank(process_group)
        self._like = jobs[0].member.grad.new_empty(0, dtype=dtype)
        self._items = [(job, _plan(job), k) for job, k in items_of(jobs)]
        self._every = range(len(self._items))
        self._held: Dict[int, torch.Tensor] = {}
        self._whole_r: Dict[Key, torch.Tensor] = {}

    def run(self) -> None:
        new = {id(job): self._approximated(job) for job in self._jobs}
        self._held = self._bases_here()
        blocks = [plan.view(new[id(job)])[plan.here[k]] for job, plan, k in self._items]
        a = [x.mT if plan.flipped[k] else x for x, (_, plan, k) in zip(blocks, self._items)]
        basis = self._basis()
        p = self._orthonormal(a, basis)
        r, lengths = self._other_side(a, p)
        self._report(r)
        basis = self._next_basis(basis, r, lengths)
        for x, its_p, its_r, its_basis, (job, plan, k) in zip(blocks, p, r, basis, self._items):
            left, right = (its_r, its_p) if plan.flipped[k] else (its_p, its_r)
            x.addmm_(left, right.mT, alpha=-self._optim.subtracted(job.group))
            left, right = (its_basis, its_p) if plan.flipped[k] else (its_p, its_basis)
            self._apply(job, k, left, right)
        for job in self._jobs:
            self._keep_momentum(job, new[id(job)])

    def _approximated(self, job: Job) -> torch.Tensor:
        """What is approximated, shaped like the local part of the parameter."""
        (momentum,) = (job.member.local(name).view(-1) for name in self._optim.matrix_buffers)
        grad, work = job.member.grad.reshape(-1), self._like.dtype
        out = self._like.new_empty(grad.shape)
        for begin, end in chunks(grad):
            part = grad[begin:end].to(work)
            if job.work.proceed is not None:
                # A skipped step computes with zeros: what follows may not see NaN.
                part = torch.where(job.work.proceed, part, 0.0)
            out[begin:end] = self._optim.on_shards(job.group, part, momentum[begin:end].to(work))
        return out

    def _basis(self) -> List[torch.Tensor]:
        """The rows of each basis that belong to this rank's part of ``A``."""
        held = self._held
        sent = [i for i, (_, plan, k) in enumerate(self._items) if plan.basis_is_owners(k)]
        mine = {(i, 1): held[i] for i in sent if i in held}
        received = self._spread([(i, 1) for i in sent], mine)
        return [received[i, 1] if (i, 1) in received else held[i] for i in self._every]

    def _bases_here(self) -> Dict[int, torch.Tensor]:
        """The bases in this rank's state."""
        out = {}
        for i, (job, plan, k) in enumerate(self._items):
            views = plan.factors.views(job.member.state, k)
            if BASIS in views:
                out[i] = views[BASIS].to(self._like.dtype)
        return out

    def _orthonormal(
        self, a: Sequence[torch.Tensor], basis: Sequence[torch.Tensor]
    ) -> List[torch.Tensor]:
        """The rows of each ``P`` that belong to this rank's part of ``A``."""
        which = [(i, 0) for i in self._every]
        owned = self._collect(which, lambda i: a[i] @ basis[i])
        for (i, side), product in owned.items():
            job, plan, k = self._items[i]
            name = self._optim.matrix_name(job.member.param, plan, k)
            owned[i, side] = self._optim.on_owner(job.group, product, job.group[CALLS], name)
        received = self._spread(which, owned)
        return [received[i, 0] for i in self._every]

    def _other_side(
        self, a: Sequence[torch.Tensor], p: Sequence[torch.Tensor]
    ) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """
        The rows of each ``R`` that belong to this rank's part of ``A``, and of each the lengths of
        its columns.
        """
        here = [i for i, (_, plan, k) in enumerate(self._items) if plan.has_rows_of_r(k)]
        r = {(i, 1): a[i].mT @ p[i] for i in here}
        # In float64 no square of a float32 overflows or is lost.
        squares = [r[i, 1].double().square().sum(0) for i in here]
        if here and self._group is not None:
            total = torch.cat(squares)
            dist.all_reduce(total, group=self._group)
            squares = list(total.split([len(each) for each in squares]))
        lengths = {(i, 2): each.sqrt().to(self._like.dtype) for i, each in zip(here, squares)}

        there = [i for i in self._every if i not in here]
        sums = self._collect([(i, 1) for i in there], lambda i: a[i].mT @ p[i])
        for (i, _), whole in list(sums.items()):
            sums[i, 2] = whole.double().square().sum(0, keepdim=True).sqrt().to(whole.dtype)
        self._whole_r = sums
        received = self._spread([(i, side) for i in there for side in (1, 2)], sums)
        r.update({key: x for key, x in received.items() if key[1] == 1})
        lengths.update({key: x[0] for key, x in received.items() if key[1] == 2})
        return [r[i, 1] for i in self._every], [lengths[i, 2] for i in self._every]

    def _next_basis(
        self,
        basis: Sequence[torch.Tensor],
        r: Sequence[torch.Tensor],
        lengths: Sequence[torch.Tensor],
    ) -> List[torch.Tensor]:
        """The rows of each new basis that belong to this rank's part of ``A``; keeps them."""
        out, held = [], self._held
        for i, (job, plan, k) in enumerate(self._items):
            group = job.group
            out.append(self._optim.next_basis(group, r[i], lengths[i], basis[i]))
            if i not in held:
                continue
            new = out[i]
            if plan.basis_is_owners(k):
                whole = self._whole_r[i, 1]
                new = self._optim.next_basis(group, whole, lengths[i], held[i])
            state = plan.factors.views(job.member.state, k)[BASIS]
            write_state([state], [new.to(state.dtype)], job.work.proceed, None)
        return out

    def _report(self, r: Sequence[torch.Tensor]) -> None:
        if self._optim.reports is None:
            return
        for i, (job, plan, k) in enumerate(self._items):
            gram = r[i].mT @ r[i]
            if plan.has_rows_of_r(k) and self._group is not None:
                dist.all_reduce(gram, group=self._group)
            elif (i, 1) in self._whole_r:
                gram = self._whole_r[i, 1].mT @ self._whole_r[i, 1]
            if self._group is None or plan.owners[k] == self._rank:
                name = self._optim.matrix_name(job.member.param, plan, k)
                out_in = plan.shape(plan.blocks[k][1])
                self._optim.reports[name] = self._optim.report(job.group, gram, *out_in)

    def _apply(self, job: Job, k: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Subtract ``left right^T`` from this rank's part of a matrix."""
        plan = _plan(job)
        weights = plan.view(get_local_tensor(job.member.param))[plan.here[k]]
        scale = self._optim.scale(job.group, *plan.shape(plan.blocks[k][1]))
        for begin, end in _row_chunks(weights):
            update = left[begin:end] @ right.mT
            self._optim.apply_update(job, weights[begin:end], update, scale)

    def _keep_momentum(self, job: Job, new: torch.Tensor) -> None:
        buffers = [job.member.local(name).view(-1) for name in self._optim.matrix_buffers]
        rounding = self._optim.rounding_of(job, buffers)
        for begin, end in chunks(new):
            some = [buffer[begin:end] for buffer in buffers]
            part = some_of(rounding, begin, end)
            write_state(some, [new[begin:end]], job.work.proceed, part)

    # Exchanges, of (item, side): side 0 is that of P, 1 that of the basis, 2 one number a column.

    def _collect(
        self, which: Sequence[Key], part_of: Callable[[int], torch.Tensor]
    ) -> Dict[Key, torch.Tensor]:
        """The sums of what this rank owns."""
        if self._group is None or not which:
            return {(i, side): part_of(i) for i, side in which}
        exchange = self._exchange(which)
        parts = [
            part_of(i) if len(range(*factor.sources[self._rank])) else self._like
            for (i, _), factor in zip(which, exchange.factors)
        ]
        sums = exchange.collect(parts, self._like)
        return {which[j]: total for j, total in sums.items()}

    def _spread(
        self, which: Sequence[Key], owned: Mapping[Key, torch.Tensor]
    ) -> Dict[Key, torch.Tensor]:
        """What this rank needs of what others own."""
        if self._group is None or not which:
            return dict(owned)
        exchange = self._exchange(which)
        wholes = {j: owned[key] for j, key in enumerate(which) if key in owned}
        return dict(zip(which, exchange.spread(wholes, self._like)))

    def _exchange(self, which: Sequence[Key]) -> ThinExchange:
        assert self._group is not None
        plans = [(*self._items[i][1:], side) for i, side in which]
        items = tuple((id(plan), k, side) for plan, k, side in plans)
        known = self._optim.exchanges
        if items not in known:
            # Which parameters have gradients rarely changes; exchanges are cheap to make again.
            if len(known) >= 256:
                known.clear()
            factors = [plan.thin(k, side) for plan, k, side in plans]
            known[items] = ThinExchange(factors, self._group)
        return known[items]


def _plan(job: Job) -> LowRankPlan:
    assert isinstance(job.plan, LowRankPlan)
    return job.plan


def _row_chunks(x: torch.Tensor) -> List[Tuple[int, int]]:
    """Begin and end of the rows for which an update is made at a time: see :data:`ROWS`."""
    n, step = x.shape[0], ROWS if x.device.type == "cpu" else max(x.shape[0], 1)
    return [(begin, min(begin + step, n)) for begin in range(0, n, step)]
