"""
The step loop for rules that need whole matrices.

Momentum lives on the shards. In a step every matrix goes to one owner, which runs the rule on it,
and its update comes back (:mod:`~olmo_optim_ext.engine.exchange`). While an owner computes one
bucket, another one is on its way.
"""

from collections import Counter
from typing import (
    Any,
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

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from torch.distributed.tensor import DTensor
from typing_extensions import Unpack

from .base import CALLS, STEP, EngineOptions, ExtOptimizer, GroupWork
from .elementwise import ElementwiseRule, apply_rule
from .exchange import (
    BUCKET_BYTES,
    Broadcast,
    BroadcastExchange,
    Bucket,
    Matrix,
    RowExchange,
    Transfer,
    assign_owners,
)
from .factors import FactorPlan, Shape
from .layout import MatrixLayout
from .placement import Path, gather_whole, local_part, placing_of
from .plan import Item, Job, Plan, items_of
from .write import chunks, rounding_of, some_of, write_state, write_weights

__all__ = ["ALGORITHM", "MatrixOptimizer", "MatrixOptions", "Owned"]

ALGORITHM = "algorithm"
"""Param-group key: which rule the parameters of a group follow."""


class MatrixOptions(EngineOptions, total=False):
    """Keywords that all optimizers for matrices take; see :class:`MatrixOptimizer`."""

    layouts: Optional[Mapping[str, MatrixLayout]]
    replicas: Optional[dist.ProcessGroup]


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


class MatrixOptimizer(ExtOptimizer):
    """
    An optimizer with a rule for whole matrices, and an elementwise rule for what that leaves:
    embeddings, head and vectors. Which of them a group follows is its ``algorithm``:
    :data:`algorithm` or :data:`leftover_algorithm`.

    A rule may keep factors of each matrix (:meth:`factor_shapes`), which only the owner has. Then
    ``state_dict()`` and ``load_state_dict()`` are collective where parameters are sharded: DCP
    calls them on all ranks.

    :param layouts: By canonical name, the matrices that a parameter stores; one if it is not named.
    :param replicas: The ranks that hold plain parameters alike, as under DDP, and share the work on
        their matrices; ``None`` if each rank computes all. A rule with factors computes all on each
        rank, as its state must not differ.
    """

    algorithm: ClassVar[str]
    leftover_algorithm: ClassVar[str] = "adamw"
    leftover_rule: ClassVar[ElementwiseRule]
    matrix_buffers: ClassVar[Tuple[str, ...]]

    bucket_bytes: ClassVar[int] = BUCKET_BYTES

    def __init__(
        self,
        params: Any,
        defaults: Dict[str, Any],
        layouts: Optional[Mapping[str, MatrixLayout]] = None,
        replicas: Optional[dist.ProcessGroup] = None,
        **engine: Unpack[EngineOptions],
    ):
        self._layouts = dict(layouts or {})
        self._replicas = replicas
        self._plans: Dict[torch.Tensor, Plan] = {}
        self._exchanges: Dict[Any, Any] = {}
        super().__init__(params, {**defaults, ALGORITHM: None}, **engine)
        if not any(group[ALGORITHM] == self.algorithm for group in self.param_groups):
            raise OLMoConfigurationError(
                f"{type(self).__name__}: no parameter has the role 'matrix', allowed is a model "
                "with at least one trainable matrix; for others choose an elementwise optimizer"
            )

    def __getstate__(self) -> Dict[str, Any]:
        # Process groups cannot be copied.
        without: Dict[str, Any] = {"_exchanges": {}, "_plans": {}, "_replicas": None}
        return {**super().__getstate__(), **without}

    def on_shards(
        self, group: Mapping[str, Any], grad: torch.Tensor, buffers: Sequence[torch.Tensor]
    ) -> Tuple[torch.Tensor, ...]:
        """
        The part of the rule that needs no whole matrix. Pure and elementwise.

        :param grad: Some elements of the gradient, flat.
        :param buffers: The same elements of :data:`matrix_buffers`.

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

    def scale(self, group: Mapping[str, Any], n_out: int, n_in: int) -> float:
        """By what an ``(out, in)`` update is multiplied, beside the learning rate."""
        raise NotImplementedError

    def cost(self, n_out: int, n_in: int) -> float:
        """Floating point operations of :meth:`on_owner` for one matrix: owners share them."""
        raise NotImplementedError

    def wire_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """
        The dtype in which matrices travel and reach :meth:`on_owner`.

        :param dtype: In which the rule computes on the shards.
        """
        del device
        return dtype

    def factor_shapes(self, group: Mapping[str, Any], n_out: int, n_in: int) -> Dict[str, Shape]:
        """Names and shapes of the factors of an ``(out, in)`` matrix. Float32."""
        return {}

    def fill_factor(self, group: Mapping[str, Any], name: str, factor: torch.Tensor) -> None:
        """Give a factor, which is zero, its first value."""

    def buffers(self, group: Mapping[str, Any]) -> Sequence[str]:
        if group[ALGORITHM] == self.algorithm:
            return self.matrix_buffers
        return self.leftover_rule.buffers

    def add_param_group(self, param_group: Dict[str, Any]) -> None:
        name = type(self).__name__
        algorithm = param_group.get(ALGORITHM)
        allowed = (self.algorithm, self.leftover_algorithm)
        if algorithm not in allowed:
            raise OLMoConfigurationError(
                f"{name}: '{ALGORITHM}' of a parameter group is {algorithm!r}, allowed are "
                f"{' and '.join(map(repr, allowed))}; {name}Config.build(model) sets it"
            )
        super().add_param_group(param_group)

    def _create_shared_state(self) -> None:
        super()._create_shared_state()
        self._make_plans()

    def _ensure_plans(self) -> None:
        if not self._plans:  # of a copy
            self._make_plans()

    def state_dict(self) -> Dict[str, Any]:
        """As the base's; a collective call where sharded parameters have factors."""
        self._ensure_plans()
        return super().state_dict()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """As the base's; a collective call where sharded parameters have factors."""
        self._ensure_plans()
        super().load_state_dict(state_dict)

    def _make_plans(self) -> None:
        new = [
            (group, param)
            for group in self.param_groups
            if group[ALGORITHM] == self.algorithm
            for param in group["params"]
            if param in self.state and param not in self._plans
        ]
        drafts = []
        for group, param in new:
            layout = self._layout_of(param)
            shapes = [
                self.factor_shapes(group, *((b.n_rows, b.n_cols)[:: -1 if layout.in_out else 1]))
                for b in layout.blocks()
            ]
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
            drafts.append((group, param, draft))
        for group, param, plan in self._with_owners(drafts):
            self._plans[param] = plan
            self._create_factors(group, param, plan)

    def _with_owners(
        self, drafts: Sequence[Tuple[Dict[str, Any], torch.Tensor, Plan]]
    ) -> Iterator[Tuple[Dict[str, Any], torch.Tensor, Plan]]:
        """Largest first over all matrices of a group; matrices planned earlier keep their owner."""
        groups = {plan.placing.group for _, _, plan in drafts}
        owners: Dict[torch.Tensor, List[int]] = {}
        for process_group in groups - {None}:
            plans = {**self._plans, **{param: plan for _, param, plan in drafts}}
            mine = {p: plan for p, plan in plans.items() if plan.placing.group is process_group}
            items = [(p, plan, k) for p, plan in mine.items() for k in range(len(plan.blocks))]
            fixed = [
                plan.owners[k] if plan.owners else plan.sole_holders[k] for _, plan, k in items
            ]
            costs = [self.cost(*plan.shape(plan.blocks[k][1])) for _, plan, k in items]
            found = assign_owners(costs, dist.get_world_size(process_group), fixed)
            for (param, _, _), owner in zip(items, found):
                owners.setdefault(param, []).append(owner)
        for group, param, plan in drafts:
            its_owners = owners.get(param, ())
            in_shards = plan.placing.path == Path.rows
            factors = FactorPlan(
                plan.factors.shapes,
                its_owners if in_shards else (),
                plan.placing.group if in_shards else None,
            )
            yield group, param, Plan(plan.layout, plan.placing, plan.blocks, its_owners, factors)

    def _create_factors(self, group: Dict[str, Any], param: torch.Tensor, plan: Plan) -> None:
        dtype = torch.promote_types(torch.float32, param.dtype)
        state = self.state[param]
        if all(name in state for name in plan.factors.names):  # of a copy
            return
        for name in plan.factors.names:
            state[name] = plan.factors.new(name, dtype, param.device)
        rank = dist.get_rank(plan.factors.group) if plan.factors.group is not None else None
        for matrix in range(len(plan.factors.shapes)):
            if rank is None or plan.owners[matrix] == rank:
                for name, factor in plan.factors.views(state, matrix).items():
                    self.fill_factor(group, name, factor)

    def _layout_of(self, param: torch.Tensor) -> MatrixLayout:
        owner, name = type(self).__name__, self.name_of(param)
        layout = self._layouts.get(name)
        if layout is None:
            if param.ndim != 2:
                raise OLMoConfigurationError(
                    f"{owner}: parameter '{name}' of shape {tuple(param.shape)} has algorithm "
                    f"{self.algorithm!r}, allowed are matrices, or a layout for it"
                )
            layout = MatrixLayout.whole(param.shape)
        if not get_local_tensor(param).is_contiguous():
            raise OLMoConfigurationError(
                f"{owner}: parameter '{name}' of shape {tuple(param.shape)} has algorithm "
                f"{self.algorithm!r} and is not contiguous, allowed are contiguous matrices"
            )
        if layout.rows * layout.cols != param.numel() or layout.rows % max(param.shape[0], 1):
            raise OLMoConfigurationError(
                f"{owner}: the layout of parameter '{name}' of shape {tuple(param.shape)} is "
                f"({layout.rows}, {layout.cols}), allowed are layouts that divide it"
            )
        return layout

    def placements(self) -> Dict[str, Tuple[Path, Tuple[int, ...]]]:
        """
        For each parameter with matrices the path that they take, and, where one rank computes a
        matrix, the global rank of the owner of each.
        """
        self._ensure_plans()
        out: Dict[str, Tuple[Path, Tuple[int, ...]]] = {}
        for param, plan in self._plans.items():
            group = plan.placing.group
            owners = [dist.get_global_rank(group, rank) for rank in plan.owners if group]
            out[self.name_of(param)] = (plan.placing.path, tuple(owners))
        return out

    def update(self, work: Sequence[GroupWork]) -> None:
        self._ensure_plans()
        leftover = [each for each in work if each.group[ALGORITHM] == self.leftover_algorithm]
        if leftover:
            apply_rule(self.leftover_rule, leftover, self._names, self._compile, self._seed)
        alike: Dict[Tuple[Path, Optional[dist.ProcessGroup], torch.dtype], List[Job]] = {}
        for each in work:
            if each.group[ALGORITHM] == self.algorithm:
                for member in each.members:
                    plan = self._plans[member.param]
                    key = (plan.placing.path, plan.placing.group, each.clock.dtype)
                    alike.setdefault(key, []).append(Job(each, member, plan))
        for (path, process_group, _), jobs in alike.items():
            if process_group is None and path == Path.local:
                self._update_local(items_of(jobs), _Shards(self, items_of(jobs)))
            elif process_group is None:
                for job in jobs:
                    self._update_redistributed(job)
            elif path == Path.rows:
                self._update_by_rows(jobs, process_group)
            else:
                self._update_by_broadcast(jobs, process_group)

    def _update_local(self, items: Sequence[Item], shards: "_Shards") -> None:
        for stack in self._stacks(items):
            updates = self._on_owner(stack, [shards.take(job)[job.here(k)] for job, k in stack])
            for (job, k), update in zip(stack, updates):
                self._apply(job, job.weights()[job.here(k)], update, self._scale(job, k))

    def _update_redistributed(self, job: Job) -> None:
        param = job.member.param
        assert isinstance(param, DTensor)
        whole = gather_whole(self._on_shards(job), param)
        updates = torch.empty_like(whole, dtype=job.work.clock.dtype)
        for item in items_of([job]):
            _, k = item
            (update,) = self._on_owner([item], [job.view(whole)[job.here(k)]])
            job.view(updates)[job.here(k)] = update.to(updates.dtype) * self._scale(job, k)
        self._apply(job, get_local_tensor(param), local_part(updates, param), 1.0)

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
                self._apply(job, job.weights()[job.here(k)], update, self._scale(job, k))

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
                self._apply(job, target, update.view(target.shape), self._scale(job, k))

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
        and does not depend on the mesh. On other devices those of one shape and group, up to the
        size of a bucket; this was only reasoned.
        """
        stacks: Dict[Any, List[Item]] = {}
        seen: Counter = Counter()
        for number, (job, k) in enumerate(items):
            key: Any = number
            if job.member.grad.device.type != "cpu":
                block = job.plan.blocks[k][1]
                alike = (id(job.group), job.plan.shape(block))
                n_bytes = block.numel * job.work.clock.itemsize
                key = (alike, seen[alike] // max(1, self.bucket_bytes // n_bytes))
                seen[alike] += 1
            stacks.setdefault(key, []).append((job, k))
        return list(stacks.values())

    def _on_owner(self, items: Sequence[Item], whole: Sequence[torch.Tensor]) -> List[torch.Tensor]:
        """The updates of whole matrices as they are stored; keeps their new factors."""
        first = items[0][0]
        views = [
            job.plan.factors.views(job.member.state, job.plan.blocks[k][0]) for job, k in items
        ]
        transposed = [job.plan.layout.in_out for job, _ in items]
        owned = Owned(
            _stack([x.mT if t else x for x, t in zip(whole, transposed)]),
            {name: _stack([view[name] for view in views]) for name in views[0]},
            # A skipped first step has no number; what it computes is not used.
            torch.stack([job.member.state[STEP] for job, _ in items]).clamp(min=1),
            first.group[CALLS],
            tuple(self._matrix_name(job, k) for job, k in items),
        )
        updates, factors = self.on_owner(first.group, owned)
        for name, new in factors.items():
            for view, each in zip(views, new):
                write_state([view[name]], [each], first.work.proceed, None)
        return [u.mT if t else u for u, t in zip(updates, transposed)]

    def _matrix_name(self, job: Job, k: int) -> str:
        name, index = self.name_of(job.member.param), job.plan.blocks[k][0]
        return name if len(job.plan.layout.blocks()) == 1 else f"{name}[{index}]"

    def _scale(self, job: Job, k: int) -> float:
        return self.scale(job.group, *job.plan.shape(job.plan.blocks[k][1]))

    def _on_shards(self, job: Job) -> torch.Tensor:
        """What the owner needs, shaped like the local part of the parameter; moves the buffers."""
        member, work = job.member, job.work.clock.dtype
        buffers = [member.local(name).view(-1) for name in self.matrix_buffers]
        grad = member.grad.reshape(-1)
        x = grad.new_empty(grad.shape, dtype=self.wire_dtype(work, grad.device))
        rounding = rounding_of(member, buffers, self._names, job.group[CALLS], self._seed)
        for begin, end in chunks(grad):
            part = grad[begin:end].to(work)
            if job.work.proceed is not None:
                # Owners of a skipped step compute with zeros: decompositions raise on NaN.
                part = torch.where(job.work.proceed, part, 0.0)
            some = [buffer[begin:end] for buffer in buffers]
            x[begin:end], *new = self.on_shards(job.group, part, [b.to(work) for b in some])
            write_state(some, new, job.work.proceed, some_of(rounding, begin, end))
        return x.view(member.grad.shape)

    def _apply(self, job: Job, weights: torch.Tensor, update: torch.Tensor, scale: float) -> None:
        """
        Decay and step.

        :param weights: Some of the local weights.
        :param update: The same elements of the update.
        """
        group, work = job.group, job.work.clock.dtype
        lr, decay = group["lr"], 1 - group["lr"] * group["weight_decay"]
        flat = weights.is_contiguous() and update.is_contiguous()
        if flat:
            weights, update = weights.view(-1), update.view(-1)
        for begin, end in chunks(weights) if flat else [(0, weights.shape[0])]:
            part, step = weights[begin:end], update[begin:end].to(work) * (lr * scale)
            write_weights(
                *(part, part.to(work), step, decay),
                *(job.work.proceed, bool(group["cautious_weight_decay"])),
            )

    def _empty_on_wire(self, job: Job) -> torch.Tensor:
        grad = job.member.grad
        return grad.new_empty(0, dtype=self.wire_dtype(job.work.clock.dtype, grad.device))

    def _to_checkpoint(self, param: torch.Tensor, key: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._saved_as_it_is(param, key):
            return tensor
        return self._plans[param].factors.to_checkpoint(param, key, tensor)

    def _saved_as_it_is(self, param: torch.Tensor, key: str) -> bool:
        plan = self._plans.get(param)
        return plan is None or key not in plan.factors.names

    def _shape_in_checkpoint(
        self, param: torch.Tensor, key: str, tensor: torch.Tensor
    ) -> torch.Size:
        if self._saved_as_it_is(param, key):
            return tensor.shape
        return torch.Size([self._plans[param].factors.numel(key)])

    def _from_checkpoint(
        self, param: torch.Tensor, key: str, tensor: torch.Tensor, saved: torch.Tensor
    ) -> None:
        if self._saved_as_it_is(param, key):
            tensor.copy_(saved)
        else:
            self._plans[param].factors.from_checkpoint(key, tensor, saved)


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


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
