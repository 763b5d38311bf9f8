"""
State of whole matrices, such as Kronecker factors: while running on the owner of the matrix only,
so that memory and work are divided among the ranks; in a checkpoint divided evenly, whoever owned
it, so that any other number of ranks can read it.
"""

from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from .placement import row_range, sharding_dims

__all__ = ["FactorPlan"]

Shape = Tuple[int, ...]


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

    @property
    def names(self) -> List[str]:
        return list(dict.fromkeys(name for shapes in self.shapes for name in shapes))

    def _numel(self, name: str, matrix: int) -> int:
        shape = self.shapes[matrix].get(name)
        return 0 if shape is None else int(torch.Size(shape).numel())

    def _offsets(self, name: str, owner: Optional[int]) -> Dict[int, Tuple[int, int]]:
        """First and last element of each matrix, among those of an owner or of all."""
        out, offset = {}, 0
        for matrix in range(len(self.shapes)):
            if owner is None or self.owners[matrix] == owner:
                n = self._numel(name, matrix)
                out[matrix] = (offset, offset + n)
                offset += n
        return out

    @property
    def _rank(self) -> Optional[int]:
        return dist.get_rank(self.group) if self.group is not None else None

    def new(self, name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Zeros for the factors of a name that this rank holds."""
        offsets = self._offsets(name, self._rank)
        n = max((end for _, end in offsets.values()), default=0)
        return torch.zeros(n, dtype=dtype, device=device)

    def views(self, state: Mapping[str, torch.Tensor], matrix: int) -> Dict[str, torch.Tensor]:
        """The factors of a matrix that this rank holds, views of its state."""
        out = {}
        for name, shape in self.shapes[matrix].items():
            begin, end = self._offsets(name, self._rank)[matrix]
            out[name] = state[name][begin:end].view(shape)
        return out

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
        (dim,) = sharding_dims(param)
        placements = [Shard(0) if d == dim else Replicate() for d in range(param.device_mesh.ndim)]
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
        return row_range(self.numel(name), dist.get_world_size(self.group), rank)

    def _segments(self, name: str, owner: int, rank: int) -> List[Tuple[int, int, int]]:
        """What an owner holds of a rank's chunk: begin there, begin in the chunk, length."""
        first, n = self._chunk(name, rank)
        everywhere, held = self._offsets(name, None), self._offsets(name, owner)
        out = []
        for matrix, (begin_held, _) in held.items():
            begin, end = everywhere[matrix]
            low, high = max(begin, first), min(end, first + n)
            if low < high:
                out.append((begin_held + low - begin, low - first, high - low))
        return out

    def _sent(self, name: str) -> List[List[Tuple[int, int]]]:
        """For each rank the ranges of what this owner holds that belong to that rank's chunk."""
        assert self.group is not None
        me = dist.get_rank(self.group)
        return [
            [(held, held + n) for held, _, n in self._segments(name, me, rank)]
            for rank in range(dist.get_world_size(self.group))
        ]

    def _received(self, name: str) -> List[List[Tuple[int, int]]]:
        """For each owner the ranges of this rank's chunk that the owner holds."""
        assert self.group is not None
        me = dist.get_rank(self.group)
        return [
            [(chunk, chunk + n) for _, chunk, n in self._segments(name, owner, me)]
            for owner in range(dist.get_world_size(self.group))
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
