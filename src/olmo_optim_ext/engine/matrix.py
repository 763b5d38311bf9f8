"""
The step loop for rules that need whole matrices.

Momentum lives on the shards. In a step every matrix goes to one owner, which runs the rule on it,
and its update comes back (:mod:`~olmo_optim_ext.engine.exchange`). While an owner computes one
bucket, the next one is on its way.
"""

from typing import Any, ClassVar, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_local_tensor
from olmo_core.exceptions import OLMoConfigurationError
from torch.distributed.tensor import DTensor

from .base import ExtOptimizer, GroupWork, Member
from .elementwise import ElementwiseRule, apply_rule
from .exchange import Path, RowExchange, gather_whole, local_part, path_of
from .hyperparameters import to_flag

__all__ = ["ALGORITHM", "MatrixOptimizer"]

ALGORITHM = "algorithm"
"""Param-group key: which rule the parameters of a group follow."""


class _Item(NamedTuple):
    group: Dict[str, Any]
    member: Member

    @property
    def shape(self) -> Tuple[int, int]:
        rows, cols = self.member.param.shape
        return rows, cols


class MatrixOptimizer(ExtOptimizer):
    """
    An optimizer with a rule for whole matrices, and an elementwise rule for what that leaves:
    embeddings, head and vectors. Which of them a group follows is its ``algorithm``:
    :data:`algorithm` or :data:`leftover_algorithm`.

    :param compile: Compile the elementwise rule.
    """

    algorithm: ClassVar[str]
    leftover_algorithm: ClassVar[str] = "adamw"
    leftover_rule: ClassVar[ElementwiseRule]
    matrix_buffers: ClassVar[Tuple[str, ...]]

    def __init__(self, params: Any, defaults: Dict[str, Any], compile: bool = False):
        self._compile = to_flag(compile, "compile", type(self).__name__)
        self._exchanges: Dict[Tuple[int, ...], RowExchange] = {}
        super().__init__(params, {**defaults, ALGORITHM: None})
        if not any(group[ALGORITHM] == self.algorithm for group in self.param_groups):
            raise OLMoConfigurationError(
                f"{type(self).__name__}: no parameter has the role 'matrix', allowed is a model "
                "with at least one trainable matrix; for others choose an elementwise optimizer"
            )

    def __getstate__(self) -> Dict[str, Any]:
        # Exchanges hold process groups and are keyed by identity.
        return {**super().__getstate__(), "_exchanges": {}}

    def on_shards(
        self, group: Mapping[str, Any], grad: torch.Tensor, buffers: Sequence[torch.Tensor]
    ) -> Tuple[torch.Tensor, ...]:
        """
        The part of the rule that needs no whole matrix. Pure and elementwise.

        :param grad: The local part of the gradient.
        :param buffers: The local parts of :data:`matrix_buffers`, shaped like ``grad``.

        :returns: What the owner needs, shaped like ``grad``, and the new buffers.
        """
        raise NotImplementedError

    def on_owner(self, group: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
        """
        The part of the rule that needs whole matrices. Pure.

        :param x: Matrices of one shape, ``(k, rows, cols)``.

        :returns: Their updates, to be subtracted after :meth:`scale`, ``(k, rows, cols)``.
        """
        raise NotImplementedError

    def scale(self, group: Mapping[str, Any], rows: int, cols: int) -> float:
        """By what a ``(rows, cols)`` update is multiplied, beside the learning rate."""
        raise NotImplementedError

    def cost(self, rows: int, cols: int) -> float:
        """Floating point operations of :meth:`on_owner` for one matrix: owners share them."""
        raise NotImplementedError

    def wire_dtype(self, state: torch.Tensor) -> torch.dtype:
        """
        The dtype in which matrices travel and reach :meth:`on_owner`.

        :param state: A buffer of the matrix.
        """
        return state.dtype

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
        if algorithm == self.algorithm:
            for param in self.param_groups[-1]["params"]:
                if param.ndim != 2:
                    raise OLMoConfigurationError(
                        f"{name}: parameter '{self.name_of(param)}' of shape "
                        f"{tuple(param.shape)} has algorithm {algorithm!r}, allowed are matrices"
                    )

    def placements(self) -> Dict[str, Tuple[Path, Optional[int]]]:
        """
        For each matrix the path that it takes and, where one rank computes it, the global rank of
        its owner when all matrices have gradients.
        """
        out: Dict[str, Tuple[Path, Optional[int]]] = {}
        for (path, process_group, _), items in self._by_path(self._all_matrices()).items():
            names = [self.name_of(item.member.param) for item in items]
            owners: List[Optional[int]] = [None] * len(items)
            if process_group is not None:
                exchange = self._exchange(items, process_group)
                owners = [dist.get_global_rank(process_group, rank) for rank in exchange.owners]
            out.update({name: (path, owner) for name, owner in zip(names, owners)})
        return out

    def _all_matrices(self) -> List[_Item]:
        return [
            _Item(group, Member(0, param, param, self.state[param]))
            for group in self.param_groups
            if group[ALGORITHM] == self.algorithm
            for param in group["params"]
            if param in self.state
        ]

    def _by_path(
        self, items: Sequence[_Item]
    ) -> Dict[Tuple[Path, Optional[dist.ProcessGroup], torch.dtype], List[_Item]]:
        by_path: Dict[Any, List[_Item]] = {}
        for item in items:
            key = (*path_of(item.member.param), self._state_dtype(item.member))
            by_path.setdefault(key, []).append(item)
        return by_path

    def update(self, work: Sequence[GroupWork]) -> None:
        matrices: List[_Item] = []
        for group, clock, members in work:
            if group[ALGORITHM] == self.leftover_algorithm:
                apply_rule(self.leftover_rule, group, clock, members, self._compile)
            else:
                matrices += [_Item(group, member) for member in members]
        for (path, process_group, _), items in self._by_path(matrices).items():
            if process_group is not None:
                self._update_by_rows(items, process_group)
            else:
                for item in items:
                    self._update_whole(item, path)

    def _update_whole(self, item: _Item, path: Path) -> None:
        param = item.member.param
        x = self._on_shards(item)
        if path == Path.redistribute:
            assert isinstance(param, DTensor)
            x = gather_whole(x, param)
        update = self.on_owner(item.group, x.unsqueeze(0))[0]
        if path == Path.redistribute:
            assert isinstance(param, DTensor)
            update = local_part(update, param)
        self._apply(item, update)

    def _update_by_rows(self, items: Sequence[_Item], process_group: dist.ProcessGroup) -> None:
        exchange = self._exchange(items, process_group)
        like = self._empty_on_wire(items[0])

        def start_gather(bucket):
            return exchange.start_gather(bucket, lambda i: self._on_shards(items[i]), like)

        def apply(bucket, transfer):
            for i, update in exchange.shards(bucket, transfer.wait()).items():
                self._apply(items[i], update)

        buckets = exchange.buckets
        arriving = start_gather(buckets[0])
        returning = None
        for index, bucket in enumerate(buckets):
            following = start_gather(buckets[index + 1]) if index + 1 < len(buckets) else None
            updates = self._on_owner(items, exchange.whole(bucket, arriving.wait()))
            if returning is not None:
                apply(buckets[index - 1], returning)
            returning = exchange.start_scatter(bucket, updates, like)
            arriving = following
        apply(buckets[-1], returning)

    def _exchange(self, items: Sequence[_Item], process_group: dist.ProcessGroup) -> RowExchange:
        key = (id(process_group), *(id(item.member.param) for item in items))
        if key not in self._exchanges:
            # Which parameters have gradients rarely changes; plans are cheap to make again.
            if len(self._exchanges) >= 16:
                self._exchanges.clear()
            shapes = [item.shape for item in items]
            itemsize = self._empty_on_wire(items[0]).itemsize
            costs = [self.cost(*shape) for shape in shapes]
            self._exchanges[key] = RowExchange(shapes, costs, process_group, itemsize)
        return self._exchanges[key]

    def _on_owner(
        self, items: Sequence[_Item], whole: Dict[int, torch.Tensor]
    ) -> Dict[int, torch.Tensor]:
        stacks: Dict[Tuple[int, ...], List[int]] = {}
        for i, x in whole.items():
            # On CPU a loop over matrices is as fast as a batch, and does not depend on the mesh.
            key = (i,) if x.device.type == "cpu" else (id(items[i].group), *x.shape)
            stacks.setdefault(key, []).append(i)
        updates: Dict[int, torch.Tensor] = {}
        for stack in stacks.values():
            x = torch.stack([whole[i] for i in stack])
            updates.update(zip(stack, self.on_owner(items[stack[0]].group, x)))
        return updates

    def _on_shards(self, item: _Item) -> torch.Tensor:
        buffers = [item.member.local(name) for name in self.matrix_buffers]
        grad = item.member.grad.to(self._state_dtype(item.member))
        x, *new_buffers = self.on_shards(item.group, grad, buffers)
        for buffer, new in zip(buffers, new_buffers):
            buffer.copy_(new)
        return x.to(self.wire_dtype(buffers[0]))

    def _apply(self, item: _Item, update: torch.Tensor) -> None:
        group = item.group
        param = get_local_tensor(item.member.param)
        if param.numel() == 0:
            return
        work = self._state_dtype(item.member)
        lr = group["lr"]
        step_size = lr * self.scale(group, *item.shape)
        decay = 1 - lr * group["weight_decay"]
        param.copy_(param.to(work) * decay - update.to(work) * step_size)

    def _state_dtype(self, member: Member) -> torch.dtype:
        return member.state[self.matrix_buffers[0]].dtype

    def _empty_on_wire(self, item: _Item) -> torch.Tensor:
        state = item.member.local(self.matrix_buffers[0])
        return state.new_empty(0, dtype=self.wire_dtype(state))
