"""
State of whole matrices, such as Kronecker factors: while running on the owner of the matrix only,
so that memory and work are divided among the ranks; in a checkpoint divided evenly, whoever owned
it, so that any other number of ranks can read it.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from .placement import row_range, sharding_dims

__all__ = ["FactorPlan"]

Shape = Tuple[int, ...]
Offsets = Dict[int, Tuple[int, int, int]]


@dataclass(frozen=True)
class FactorPlan:
    """
    The factors of one parameter. Those of one name and of all of its matrices are one flat tensor:
    on a rank that of the matrices that it owns, empty if there are none.
    """

    shapes: Sequence[Mapping[str, Shape]]
    """For each matrix the shapes of its factors."""

    owners: Sequence[int] = ()
    """The rank in the group that owns each matrix; empty if every rank has all."""

    group: Optional[dist.ProcessGroup] = None

    by_rows: Mapping[str, Sequence[Optional[Sequence[int]]]] = field(default_factory=dict)
    """
    Factors whose rows are not the owner's, but shared by the ranks: for each matrix how many of
    them each rank has, in the order of ranks; ``None`` if they are the owner's after all.
    """

    grid: Sequence[Sequence[Tuple[int, int]]] = ()
    """
    Where parameters are divided over several dimensions of a mesh: for each rank of the group the
    size of each of these dimensions, and its place in it.
    """

    @property
    def names(self) -> List[str]:
        return list(dict.fromkeys(name for shapes in self.shapes for name in shapes))

    def _numel(self, name: str, matrix: int) -> int:
        shape = self.shapes[matrix].get(name)
        return 0 if shape is None else int(torch.Size(shape).numel())

    def _part(self, name: str, matrix: int, rank: Optional[int]) -> Optional[Tuple[int, int]]:
        """
        Begin and end of the elements of a factor that a rank has, if it has any part; for ``None``
        of all elements.
        """
        n = self._numel(name, matrix)
        if rank is None or self.group is None:
            return 0, n
        if (rows_on := self._rows_on(name, matrix)) is not None:
            n //= max(sum(rows_on), 1)
            return sum(rows_on[:rank]) * n, sum(rows_on[: rank + 1]) * n
        return (0, n) if self.owners[matrix] == rank else None

    def _rows_on(self, name: str, matrix: int) -> Optional[Sequence[int]]:
        return self.by_rows[name][matrix] if name in self.by_rows else None

    def _offsets(self, name: str, rank: Optional[int]) -> Offsets:
        """
        For each matrix of which a rank has a part, or for all, where that begins among what the
        rank has, and its first and last element.
        """
        if (name, rank) in self._known_offsets:
            return self._known_offsets[name, rank]
        out: Offsets = {}
        offset = 0
        for matrix in range(len(self.shapes)):
            if (part := self._part(name, matrix, rank)) is not None:
                out[matrix] = (offset, *part)
                offset += part[1] - part[0]
        self._known_offsets[name, rank] = out
        return out

    @cached_property
    def _known_offsets(self) -> Dict[Tuple[str, Optional[int]], Offsets]:
        return {}

    @property
    def _rank(self) -> Optional[int]:
        return dist.get_rank(self.group) if self.group is not None else None

    def holds(self, matrix: int) -> bool:
        """Whether this rank has the factors of a matrix, but for those shared by rows."""
        return self.group is None or self.owners[matrix] == self._rank

    def new(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Zeros for the factors of a name that this rank holds."""
        parts = self._offsets(name, self._rank).values()
        return torch.zeros(sum(end - begin for _, begin, end in parts), dtype=dtype, device=device)

    def views(self, state: Mapping[str, torch.Tensor], matrix: int) -> Dict[str, torch.Tensor]:
        """What this rank holds of the factors of a matrix, views of its state."""
        out = {}
        for name in self.shapes[matrix]:
            offsets = self._offsets(name, self._rank)
            if matrix in offsets:
                offset, begin, end = offsets[matrix]
                held = state[name][offset : offset + end - begin]
                out[name] = held.view(self._held_shape(name, matrix, end - begin))
        return out

    def held_part(self, name: str, matrix: int, whole: torch.Tensor) -> torch.Tensor:
        """What this rank holds of a whole factor, shaped as :meth:`views` has it."""
        part = self._part(name, matrix, self._rank)
        assert part is not None
        held = whole.reshape(-1)[slice(*part)]
        return held.view(self._held_shape(name, matrix, held.numel()))

    def _held_shape(self, name: str, matrix: int, numel: int) -> Shape:
        shape = self.shapes[matrix][name]
        shared = self._rows_on(name, matrix) is not None
        return (numel // math.prod(shape[1:]), *shape[1:]) if shared else shape

    def numel(self, name: str) -> int:
        """Elements of the factors of all matrices."""
        return sum(self._numel(name, matrix) for matrix in range(len(self.shapes)))

    def to_checkpoint(self, param: torch.Tensor, name: str, held: torch.Tensor) -> torch.Tensor:
        """
        The factors of all matrices, flat, sharded evenly over the ranks of the group. A collective
        call where the parameter is sharded.
        """
        if self.group is None:
            return held
        parts = [held[begin:end] for segments in self._sent(name) for begin, end in segments]
        received = self._exchange(name, torch.cat([held.new_empty(0), *parts]), to_owners=False)
        chunk = received.new_empty(self._chunk(name, dist.get_rank(self.group))[1])
        offset = 0
        for begin, end in (s for segments in self._received(name) for s in segments):
            chunk[begin:end] = received[offset : offset + end - begin]
            offset += end - begin
        assert isinstance(param, DTensor)
        dims = sharding_dims(param)
        placements = [Shard(0) if d in dims else Replicate() for d in range(param.device_mesh.ndim)]
        return DTensor.from_local(
            chunk,
            param.device_mesh,
            placements,
            run_check=False,
            shape=torch.Size([self.numel(name)]),
            stride=(1,),
        )

    def from_checkpoint(self, name: str, held: torch.Tensor, saved: torch.Tensor) -> None:
        """Fill what this rank holds from what :meth:`to_checkpoint` made. Collective as that."""
        if self.group is None:
            whole = saved.full_tensor() if isinstance(saved, DTensor) else saved
            held.copy_(whole)
            return
        begin, n = self._chunk(name, dist.get_rank(self.group))
        chunk = saved.to_local() if isinstance(saved, DTensor) else saved[begin : begin + n]
        chunk = chunk.to(held)
        parts = [chunk[begin:end] for segments in self._received(name) for begin, end in segments]
        received = self._exchange(name, torch.cat([held.new_empty(0), *parts]), to_owners=True)
        offset = 0
        for begin, end in (s for segments in self._sent(name) for s in segments):
            held[begin:end] = received[offset : offset + end - begin]
            offset += end - begin

    def _chunk(self, name: str, rank: int) -> Tuple[int, int]:
        assert self.group is not None
        first, n = 0, self.numel(name)
        for size, place in (
            self.grid[rank] if self.grid else [(dist.get_world_size(self.group), rank)]
        ):
            offset, n = row_range(n, size, place)
            first += offset
        return first, n

    def _segments(self, name: str, holder: int, rank: int) -> List[Tuple[int, int, int]]:
        """What one rank holds of another's chunk: begin there, begin in the chunk, length."""
        first, n = self._chunk(name, rank)
        everywhere, held = self._offsets(name, None), self._offsets(name, holder)
        out = []
        for matrix, (offset, begin, end) in held.items():
            start = everywhere[matrix][0] + begin  # among the elements of all matrices
            low, high = max(start, first), min(start + end - begin, first + n)
            if low < high:
                out.append((offset + low - start, low - first, high - low))
        return out

    def _sent(self, name: str) -> List[List[Tuple[int, int]]]:
        """For each rank the ranges of what this rank holds that belong to that rank's chunk."""
        assert self.group is not None
        me = dist.get_rank(self.group)
        return [
            [(held, held + n) for held, _, n in self._segments(name, me, rank)]
            for rank in range(dist.get_world_size(self.group))
        ]

    def _received(self, name: str) -> List[List[Tuple[int, int]]]:
        """For each rank the ranges of this rank's chunk that that one holds."""
        assert self.group is not None
        me = dist.get_rank(self.group)
        return [
            [(chunk, chunk + n) for _, chunk, n in self._segments(name, holder, me)]
            for holder in range(dist.get_world_size(self.group))
        ]

    def _exchange(self, name: str, send: torch.Tensor, to_owners: bool) -> torch.Tensor:
        sizes = [
            [sum(end - begin for begin, end in segments) for segments in side]
            for side in (self._sent(name), self._received(name))
        ]
        sent, received = reversed(sizes) if to_owners else sizes
        out = send.new_empty(sum(received))
        dist.all_to_all_single(out, send, received, sent, group=self.group)
        return out
