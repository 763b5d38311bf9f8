"""
The step loop for rules that need whole matrices.

Momentum lives on the shards. In a step every matrix goes to one owner, which runs the rule on it,
and its update comes back (:mod:`~olmo_optim_ext.engine.exchange`). While an owner computes one
bucket, another one is on its way.
"""

import math
from collections import Counter
from typing import (
    Any,
    Callable,
    ClassVar,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import numpy as np
import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_local_tensor
from torch.distributed.tensor import DTensor
from typing_extensions import Unpack

from .base import ALGORITHM, CALLS, STEP, GroupWork
from .exchange import (
    Broadcast,
    BroadcastExchange,
    Bucket,
    Matrix,
    RowExchange,
    Transfer,
    assign_owners,
)
from .factors import FactorPlan
from .host import HostMirror
from .layout import MatrixLayout
from .matrix_base import MatrixBase, MatrixOptions
from .placement import Path, gather_whole, local_part, placing_of
from .plan import Item, Job, Plan, items_of
from .write import chunks, some_of, write_state

__all__ = ["ALGORITHM", "MatrixOptimizer", "MatrixOptions", "Owned"]


class Owned(NamedTuple):
    """Whole matrices of one shape, on the rank that computes them."""

    x: torch.Tensor
    """What :meth:`MatrixOptimizer.on_shards` returned, ``(k, out, in)``."""

    factors: Dict[str, torch.Tensor]
    """Their factors, each ``(k, *shape)``."""

    step: torch.Tensor
    """Updates of each, including this one, ``(k,)``, on the device."""

    call: int
    """How often ``step()`` was called, including this time."""

    names: Tuple[str, ...]
    """Canonical names; of a parameter with several matrices ``name[index]``."""

    numbers: Optional[torch.Tensor]
    """What :meth:`MatrixOptimizer.measure` returned for them, ``(k, s)``."""

    phase: Any
    """What :meth:`MatrixOptimizer.phase` says of all of them."""


class MatrixOptimizer(MatrixBase):
    """
    An optimizer with a rule that needs whole matrices.
    """

    host_factors: ClassVar[Tuple[str, ...]] = ()
    """Factors by which the rule decides on the host what to compute: see :meth:`phase`."""

    def __init__(self, params: Any, defaults: Dict[str, Any], **options: Unpack[MatrixOptions]):
        self._exchanges: Dict[Any, RowExchange] = {}
        self._mirrors: Dict[Tuple[torch.Tensor, int], Dict[str, HostMirror]] = {}
        super().__init__(params, defaults, **options)

    def __getstate__(self) -> Dict[str, Any]:
        # Of process groups and devices; made again with the plans.
        return {**super().__getstate__(), "_exchanges": {}, "_mirrors": {}}

    measures: ClassVar[bool] = False
    """Whether the rule needs :meth:`measure`."""

    def measure(
        self,
        group: Mapping[str, Any],
        grads: Sequence[torch.Tensor],
        add: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """
        Numbers of whole gradients, which the rule needs before everything else.

        :param grads: For each of ``n`` matrices the part of its gradient that this rank has, in no
            particular order, perhaps empty.
        :param add: Adds tensors ``(n, ...)`` over the ranks that share the matrices.

        :returns: Shape ``(n, s)``, the same on all ranks.
        """
        raise NotImplementedError

    def on_shards(
        self,
        group: Mapping[str, Any],
        grad: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        numbers: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, ...]:
        """
        The part of the rule that needs no whole matrix. Pure and elementwise.

        :param grad: Some elements of the gradient, flat.
        :param buffers: The same elements of :data:`matrix_buffers`.
        :param numbers: What :meth:`measure` returned for the matrix that they belong to, ``(s,)``.

        :returns: What the owner needs, and the new buffers, shaped like ``grad``.
        """
        raise NotImplementedError

    def on_owner(
        self, group: Mapping[str, Any], owned: Owned
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """
        The part of the rule that needs whole matrices. Pure.

        :returns: The updates, to be subtracted after :meth:`scale`, ``(k, out, in)``, and the new
            factors.
        """
        raise NotImplementedError

    def wire_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """
        The dtype in which matrices travel and reach :meth:`on_owner`.

        :param dtype: In which the rule computes on the shards.
        """
        del device
        return dtype

    def phase(
        self,
        group: Mapping[str, Any],
        name: str,
        shape: Tuple[int, int],
        on_host: Mapping[str, np.ndarray],
    ) -> Any:
        """
        What a rule does with an ``(out, in)`` matrix in this step, where it decides so on the host:
        matrices are computed at once only with those in the same phase.

        :param name: Of the matrix.
        :param on_host: Its :data:`host_factors`, as they were before this step.
        """
        del group, name, shape, on_host

    def report(
        self, group: Mapping[str, Any], owned: Owned, updates: torch.Tensor
    ) -> Dict[str, torch.Tensor]:
        """
        What is worth knowing of a step. Called for steps of which a report was asked for, with what
        :meth:`on_owner` was given, but the new factors, and returned.

        :returns: By name, tensors ``(k, ...)``. No host-device sync.
        """
        return {}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """As the base's; a collective call where sharded parameters have factors."""
        super().load_state_dict(state_dict)
        for mirrors, factors in self._mirrored():
            for name, mirror in mirrors.items():
                mirror.update(factors[name])

    def plan(
        self, params: Sequence[Tuple[Dict[str, Any], torch.Tensor, MatrixLayout]]
    ) -> List[Plan]:
        drafts = []
        for group, param, layout in params:
            shapes = self._factor_shapes(group, layout)
            has_factors = any(shapes)
            replicas = None if has_factors else self._replicas
            placing = placing_of(param, layout, replicas, nested=not has_factors)
            end = placing.first_row + sum(placing.rows_of)
            blocks = [
                (i, block)
                for i, block in enumerate(layout.blocks())
                if placing.path != Path.rows or placing.first_row <= block.first_row < end
            ]
            draft = Plan(layout, placing, blocks, (), FactorPlan(shapes))
            drafts.append((param, draft))
        return self._with_owners(drafts)

    def _create_factors(self, group: Dict[str, Any], param: torch.Tensor, plan: Plan) -> None:
        super()._create_factors(group, param, plan)
        for matrix in range(len(plan.factors.shapes)):
            if self.host_factors and plan.factors.holds(matrix) and not param.is_meta:
                factors = plan.factors.views(self.state[param], matrix)
                self._mirrors[param, matrix] = {
                    name: HostMirror(factors[name]) for name in self.host_factors if name in factors
                }

    def _mirrored(self) -> Iterator[Tuple[Dict[str, HostMirror], Dict[str, torch.Tensor]]]:
        for (param, matrix), mirrors in self._mirrors.items():
            yield mirrors, self._plans[param].factors.views(self.state[param], matrix)

    def _with_owners(self, drafts: Sequence[Tuple[torch.Tensor, Plan]]) -> List[Plan]:
        """Largest first over all matrices of a group; matrices planned earlier keep their owner."""
        groups = {plan.placing.group for _, plan in drafts}
        group_of = {param: group for group in self.param_groups for param in group["params"]}
        owners: Dict[torch.Tensor, List[int]] = {}
        for process_group in groups - {None}:
            plans = {**self._plans, **dict(drafts)}
            mine = {p: plan for p, plan in plans.items() if plan.placing.group is process_group}
            items = [(p, plan, k) for p, plan in mine.items() for k in range(len(plan.blocks))]
            fixed = [
                plan.owners[k] if plan.owners else plan.sole_holders[k] for _, plan, k in items
            ]
            costs = [
                self.cost(group_of[param], *plan.shape(plan.blocks[k][1]))
                for param, plan, k in items
            ]
            found = assign_owners(costs, dist.get_world_size(process_group), fixed)
            for (param, _, _), owner in zip(items, found):
                owners.setdefault(param, []).append(owner)
        out = []
        for param, plan in drafts:
            its_owners = owners.get(param, ())
            in_shards = plan.placing.path == Path.rows
            factors = FactorPlan(
                plan.factors.shapes,
                its_owners if in_shards else (),
                plan.placing.group if in_shards else None,
            )
            out.append(Plan(plan.layout, plan.placing, plan.blocks, its_owners, factors))
        return out

    def update_matrices(self, work: Sequence[GroupWork]) -> None:
        alike: Dict[Tuple[Path, Optional[dist.ProcessGroup], torch.dtype], List[Job]] = {}
        for each in work:
            for member in each.members:
                plan = self._plans[member.param]
                key = (plan.placing.path, plan.placing.group, each.clock.dtype)
                alike.setdefault(key, []).append(Job(each, member, plan))
        for (path, process_group, _), jobs in alike.items():
            if self.measures:
                self._measure(jobs, process_group if path == Path.rows else None)
            if process_group is None and path == Path.local:
                self._update_local(items_of(jobs), _Shards(self, items_of(jobs)))
            elif process_group is None:
                for job in jobs:
                    self._update_redistributed(job)
            elif path == Path.rows:
                self._update_by_rows(jobs, process_group)
            else:
                self._update_by_broadcast(jobs, process_group)

    def _measure(self, jobs: Sequence[Job], process_group: Optional[dist.ProcessGroup]) -> None:
        """Let jobs know the numbers of their matrices."""

        def add(local: torch.Tensor) -> torch.Tensor:
            total = local.clone()
            if process_group is not None:
                dist.all_reduce(total, group=process_group)
            return total

        together: Dict[Any, List[Job]] = {}
        for i, job in enumerate(jobs):
            # Those that are gathered one by one, or all whole gradients would be there at once.
            gathered = job.plan.placing.path == Path.redistribute
            together.setdefault((id(job.group), i if gathered else 0), []).append(job)
        for some in together.values():
            grads = [job.view(self._grad_as_placed(job)) for job in some]
            parts = [x[job.here(k)] for job, x in zip(some, grads) for _, k in items_of([job])]
            numbers = self.measure(some[0].group, parts, add)
            if (proceed := some[0].work.proceed) is not None:
                numbers = torch.where(proceed, numbers, 0)
            counts = [len(job.plan.blocks) for job in some]
            for job, its in zip(some, numbers.split(counts)):
                job.numbers = its

    def _grad_as_placed(self, job: Job) -> torch.Tensor:
        """The local part of the gradient, or the whole one where that is what is computed with."""
        param, grad = job.member.param, job.member.grad
        if job.plan.placing.path != Path.redistribute:
            return grad
        assert isinstance(param, DTensor)
        return gather_whole(grad.contiguous(), param)

    def _update_local(self, items: Sequence[Item], shards: "_Shards") -> None:
        for stack in self._stacks(items):
            updates = self._on_owner(stack, [shards.take(job)[job.here(k)] for job, k in stack])
            for (job, k), update in zip(stack, updates):
                self.apply_update(job, job.weights()[job.here(k)], update, self._scale(job, k))

    def _update_redistributed(self, job: Job) -> None:
        param = job.member.param
        assert isinstance(param, DTensor)
        whole = gather_whole(self._on_shards(job), param)
        updates = torch.empty_like(whole, dtype=job.work.clock.dtype)
        for item in items_of([job]):
            _, k = item
            (update,) = self._on_owner([item], [job.view(whole)[job.here(k)]])
            job.view(updates)[job.here(k)] = update.to(updates.dtype) * self._scale(job, k)
        self.apply_update(job, get_local_tensor(param), local_part(updates, param), 1.0)

    def _update_by_rows(self, jobs: Sequence[Job], process_group: dist.ProcessGroup) -> None:
        rank = dist.get_rank(process_group)
        # Largest first, but all matrices of a parameter together, so that it is soon done with.
        ordered = sorted(jobs, key=lambda job: -job.plan.largest)
        items = [(job, k) for job, k in items_of(ordered) if job.plan.sole_holders[k] is None]
        mine = [(job, k) for job, k in items_of(jobs) if job.plan.sole_holders[k] == rank]
        exchange = self._row_exchange(items, process_group)
        like = self._empty_on_wire(jobs[0])
        shards = _Shards(self, [*items, *mine])

        def rows_of(i: int) -> torch.Tensor:
            job, k = items[i]
            return shards.take(job)[job.here(k)]

        def compute(bucket: Bucket, some: Sequence[int], buffer: torch.Tensor) -> None:
            for stack in self._stacks([items[i] for i in some]):
                indices = [index_of[id(job), k] for job, k in stack]
                whole = [exchange.whole(bucket, i, buffer) for i in indices]
                updates = self._on_owner(stack, whole)
                del whole
                for i, update in zip(indices, updates):
                    exchange.replace(bucket, i, buffer, update)

        def finish(bucket: Bucket, transfer: Transfer) -> None:
            for i, update in exchange.shards(bucket, transfer.wait()).items():
                job, k = items[i]
                self.apply_update(job, job.weights()[job.here(k)], update, self._scale(job, k))

        index_of = {(id(job), k): i for i, (job, k) in enumerate(items)}
        buckets = exchange.buckets
        arriving = exchange.start_gather(buckets[0], rows_of, like) if buckets else None
        self._update_local(mine, shards)
        returning = None
        for index, bucket in enumerate(buckets):
            # Two buckets are under way at most: with this one first the one before, then the next.
            assert arriving is not None
            buffer, owned = arriving.wait(), bucket[rank]
            compute(bucket, owned[: len(owned) // 2], buffer)
            if returning is not None:
                finish(buckets[index - 1], returning)
            if index + 1 < len(buckets):
                arriving = exchange.start_gather(buckets[index + 1], rows_of, like)
            compute(bucket, owned[len(owned) // 2 :], buffer)
            returning = exchange.start_scatter(bucket, buffer)
            del buffer
        if returning is not None:
            finish(buckets[-1], returning)

    def _update_by_broadcast(self, jobs: Sequence[Job], process_group: dist.ProcessGroup) -> None:
        rank = dist.get_rank(process_group)
        items = items_of(sorted(jobs, key=lambda job: -job.plan.largest))
        numels = [job.plan.blocks[k][1].numel for job, k in items]
        owners = [job.plan.owners[k] for job, k in items]
        like = self._empty_on_wire(jobs[0])
        exchange = BroadcastExchange(
            numels, owners, process_group, like.itemsize, self.bucket_bytes
        )
        shards = _Shards(self, items)

        def finish(bucket: Bucket, transfer: Broadcast) -> None:
            for i, update in exchange.results(bucket, transfer.wait()).items():
                job, k = items[i]
                target = job.weights()[job.here(k)]
                self.apply_update(job, target, update.view(target.shape), self._scale(job, k))

        before = None
        for bucket in exchange.buckets:
            buffer = like.new_empty(sum(numels[i] for owned in bucket for i in owned))
            results = exchange.results(bucket, buffer)
            for i in results:
                # Momentum moves on every rank, whoever computes the matrix.
                job, k = items[i]
                x = shards.take(job)[job.here(k)]
                if i in bucket[rank]:
                    (update,) = self._on_owner([items[i]], [x])
                    results[i].view(update.shape).copy_(update)
            if before is not None:
                finish(*before)
            before = (bucket, exchange.start(bucket, buffer))
            del buffer, results
        if before is not None:
            finish(*before)

    def _row_exchange(self, items: Sequence[Item], process_group: dist.ProcessGroup) -> RowExchange:
        key = (process_group, *((id(job.member.param), k) for job, k in items))
        if key not in self._exchanges:
            # Which parameters have gradients rarely changes; plans are cheap to make again.
            if len(self._exchanges) >= 16:
                self._exchanges.clear()
            matrices = [
                Matrix(block.n_cols, job.plan.rows_on[k], job.plan.owners[k])
                for job, k in items
                for _, block in [job.plan.blocks[k]]
            ]
            itemsize = self._empty_on_wire(items[0][0]).itemsize if items else 1
            self._exchanges[key] = RowExchange(matrices, process_group, itemsize, self.bucket_bytes)
        return self._exchanges[key]

    def _stacks(self, items: Sequence[Item]) -> List[List[Item]]:
        """
        Matrices that a rule computes at once. On CPU a loop over matrices is as fast as a batch,
        and does not depend on the mesh. On other devices those of one shape, group and phase, up
        to the size of a bucket; this was only reasoned.
        """
        stacks: Dict[Any, List[Item]] = {}
        seen: Counter = Counter()
        for number, (job, k) in enumerate(items):
            key: Any = number
            if job.member.grad.device.type != "cpu":
                block = job.plan.blocks[k][1]
                alike = (id(job.group), job.plan.shape(block), self._phase_of(job, k))
                # With its factors, or a stack of vectors could have gigabytes of them.
                shapes = job.plan.factors.shapes[job.plan.blocks[k][0]].values()
                numel = max(block.numel, sum(map(math.prod, shapes)))
                n_bytes = numel * job.work.clock.itemsize
                key = (alike, seen[alike] // max(1, self.bucket_bytes // n_bytes))
                seen[alike] += 1
            stacks.setdefault(key, []).append((job, k))
        return list(stacks.values())

    def _phase_of(self, job: Job, k: int) -> Any:
        index, block = job.plan.blocks[k]
        name = self.matrix_name(job.member.param, job.plan, index)
        mirrors = self._mirrors.get((job.member.param, index), {})
        on_host = {key: mirror.read() for key, mirror in mirrors.items()}
        return self.phase(job.group, name, job.plan.shape(block), on_host)

    def _on_owner(self, items: Sequence[Item], whole: Sequence[torch.Tensor]) -> List[torch.Tensor]:
        """The updates of whole matrices as they are stored; keeps their new factors."""
        first = items[0][0]
        views = [
            job.plan.factors.views(job.member.state, job.plan.blocks[k][0]) for job, k in items
        ]
        mirrors = [
            self._mirrors.get((job.member.param, job.plan.blocks[k][0]), {}) for job, k in items
        ]
        transposed = [job.plan.layout.in_out for job, _ in items]
        owned = Owned(
            _stack([x.mT if t else x for x, t in zip(whole, transposed)]),
            {name: _stack([view[name] for view in views]) for name in views[0]},
            # A skipped first step has no number; what it computes is not used.
            torch.stack([job.member.state[STEP] for job, _ in items]).clamp(min=1),
            first.group[CALLS],
            tuple(
                self.matrix_name(job.member.param, job.plan, job.plan.blocks[k][0])
                for job, k in items
            ),
            _numbers(items),
            self._phase_of(*items[0]),
        )
        updates, factors = self.on_owner(first.group, owned)
        if self.reports is not None:
            now = owned._replace(factors={**owned.factors, **factors})
            report = self.report(first.group, now, updates)
            for i, name in enumerate(owned.names):
                self.reports[name] = {key: values[i] for key, values in report.items()}
        for name, new in factors.items():
            for view, mirror, each in zip(views, mirrors, new):
                write_state([view[name]], [each], first.work.proceed, None)
                if name in mirror:
                    mirror[name].update(view[name])
        return [u.mT if t else u for u, t in zip(updates, transposed)]

    def _scale(self, job: Job, k: int) -> float:
        return self.scale(job.group, *job.plan.shape(job.plan.blocks[k][1]))

    def _on_shards(self, job: Job) -> torch.Tensor:
        """What the owner needs, shaped like the local part of the parameter; moves the buffers."""
        member, work = job.member, job.work.clock.dtype
        buffers = [member.local(name).view(-1) for name in self.matrix_buffers]
        grad = member.grad.reshape(-1)
        x = grad.new_empty(grad.shape, dtype=self.wire_dtype(work, grad.device))
        rounding = self.rounding_of(job, buffers)
        for begin, end in chunks(grad):
            part = grad[begin:end].to(work)
            if job.work.proceed is not None:
                # Owners of a skipped step compute with zeros: decompositions raise on NaN.
                part = torch.where(job.work.proceed, part, 0.0)
            some = [buffer[begin:end] for buffer in buffers]
            values = [buffer.to(work) for buffer in some]
            numbers = job.numbers_at(begin, end)
            x[begin:end], *new = self.on_shards(job.group, part, values, numbers)
            write_state(some, new, job.work.proceed, some_of(rounding, begin, end))
        return x.view(member.grad.shape)

    def _empty_on_wire(self, job: Job) -> torch.Tensor:
        grad = job.member.grad
        return grad.new_empty(0, dtype=self.wire_dtype(job.work.clock.dtype, grad.device))


class _Shards:
    """What owners need of each parameter, computed when it is first asked for, and then dropped."""

    def __init__(self, optim: MatrixOptimizer, items: Sequence[Item]):
        self._optim = optim
        self._uses = Counter(id(job) for job, _ in items)
        self._ready: Dict[int, torch.Tensor] = {}

    def take(self, job: Job) -> torch.Tensor:
        """The local part as ``(rows, cols)``, once for each matrix of the parameter."""
        key = id(job)
        if key not in self._ready:
            self._ready[key] = job.view(self._optim._on_shards(job))
        self._uses[key] -= 1
        return self._ready[key] if self._uses[key] else self._ready.pop(key)


def _numbers(items: Sequence[Item]) -> Optional[torch.Tensor]:
    numbers = [job.numbers[k] for job, k in items if job.numbers is not None]
    return _stack(numbers) if numbers else None


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
