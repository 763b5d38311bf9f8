"""
Whole matrices from sharded ones: which path a parameter takes, who computes which matrix, and the
all-to-all that moves row shards to their owners and the updates back.
"""

from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from olmo_core.config import StrEnum
from olmo_core.exceptions import OLMoError
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = [
    "BUCKET_BYTES",
    "Path",
    "RowExchange",
    "assign_owners",
    "gather_whole",
    "local_part",
    "path_of",
]

BUCKET_BYTES = 64 * 2**20
"""How many bytes an owner receives at the most in one exchange; a larger matrix goes alone."""


class Path(StrEnum):
    """How a rule that needs the whole matrix gets it."""

    local = "local"
    """The whole matrix is on this rank."""

    rows = "rows"
    """Rows are sharded over one mesh dimension: two all-to-alls, each matrix computed once."""

    redistribute = "redistribute"
    """Any other sharding: DTensor gathers the matrix on every rank, which all compute it."""


def path_of(param: torch.Tensor) -> Tuple[Path, Optional[dist.ProcessGroup]]:
    """
    The path of a parameter, read from its mesh and placements, and for :data:`Path.rows` the
    process group of the mesh dimension over which its rows are sharded.
    """
    if not isinstance(param, DTensor):
        return Path.local, None
    mesh = param.device_mesh
    sharded = [
        dim
        for dim, placement in enumerate(param.placements)
        if mesh.size(dim) > 1 and not isinstance(placement, Replicate)
    ]
    if not sharded:
        return Path.local, None
    # type() rather than isinstance(): _StridedShard has another order of rows.
    if len(sharded) == 1 and type(placement := param.placements[sharded[0]]) is Shard:
        if placement.dim == 0 and param.ndim == 2:
            return Path.rows, mesh.get_group(sharded[0])
    return Path.redistribute, None


def gather_whole(local: torch.Tensor, param: DTensor) -> torch.Tensor:
    """The whole tensor of which ``local`` is this rank's part under the sharding of ``param``."""
    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    ).full_tensor()


def local_part(whole: torch.Tensor, param: DTensor) -> torch.Tensor:
    """This rank's part of a tensor that every rank has whole, under the sharding of ``param``."""
    mesh = param.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, param.placements).to_local()


def assign_owners(costs: Sequence[float], n_owners: int) -> List[int]:
    """
    Largest-first packing: each item, in order of falling cost, goes to the least loaded owner.
    Ties go to the item and the owner that come first, so all ranks find the same answer.

    :returns: The owner of each item.
    """
    owners = [0] * len(costs)
    load = [0.0] * n_owners
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner = min(range(n_owners), key=load.__getitem__)
        owners[item] = owner
        load[owner] += costs[item]
    return owners


@dataclass
class _Transfer:
    """An all-to-all under way. Holds both buffers until it is waited for."""

    work: dist.Work
    sent: torch.Tensor
    received: torch.Tensor

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.received


Bucket = Tuple[Tuple[int, ...], ...]
"""For each owner the matrices that it computes in one exchange."""


class RowExchange:
    """
    Moves matrices whose rows are sharded over the ranks of a process group, as ``Shard(0)`` shards
    them, to the rank that owns each, and the results back.

    :param shapes: ``(rows, cols)`` of each whole matrix.
    :param costs: What computing each matrix costs, in any unit.
    :param group: The ranks that share the rows.
    :param itemsize: Bytes of an element on the wire.
    """

    def __init__(
        self,
        shapes: Sequence[Tuple[int, int]],
        costs: Sequence[float],
        group: dist.ProcessGroup,
        itemsize: int,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self.shapes = list(shapes)
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.owners = assign_owners(costs, self.size)
        self.buckets = self._fill_buckets(itemsize, bucket_bytes)

    def _fill_buckets(self, itemsize: int, bucket_bytes: int) -> List[Bucket]:
        # With even shards, a rank also sends at most what an owner receives.
        shares: List[List[List[int]]] = [[] for _ in range(self.size)]
        filled: Dict[int, int] = {}
        for item, (rows, cols) in sorted(
            enumerate(self.shapes), key=lambda entry: -entry[1][0] * entry[1][1]
        ):
            owner, n_bytes = self.owners[item], rows * cols * itemsize
            if not shares[owner] or filled[owner] + n_bytes > bucket_bytes:
                shares[owner].append([])
                filled[owner] = 0
            shares[owner][-1].append(item)
            filled[owner] += n_bytes
        n_buckets = max(map(len, shares), default=0)
        return [
            tuple(tuple(share[b]) if b < len(share) else () for share in shares)
            for b in range(n_buckets)
        ]

    def rows_on(self, item: int, rank: int) -> int:
        """How many rows of a matrix a rank of the group holds."""
        size, _ = Shard.local_shard_size_and_offset(self.shapes[item][0], self.size, rank)
        return int(size)

    def _numel_on(self, item: int, rank: int) -> int:
        return self.rows_on(item, rank) * self.shapes[item][1]

    def _splits(self, bucket: Bucket) -> Tuple[List[int], List[int]]:
        # What this rank holds for each owner, and what each rank holds for this owner.
        to_owners = [sum(self._numel_on(i, self.rank) for i in items) for items in bucket]
        from_ranks = [
            sum(self._numel_on(i, rank) for i in bucket[self.rank]) for rank in range(self.size)
        ]
        return to_owners, from_ranks

    def start_gather(
        self, bucket: Bucket, shard_of: Callable[[int], torch.Tensor], like: torch.Tensor
    ) -> _Transfer:
        """
        Start to move the shards of a bucket to their owners.

        :param shard_of: The local rows ``(rows_on(i, rank), cols)`` of matrix ``i``.
        :param like: Gives dtype and device of the buffers.
        """
        to_owners, from_ranks = self._splits(bucket)
        send = like.new_empty(sum(to_owners))
        offset = 0
        for item in (i for items in bucket for i in items):
            shard = shard_of(item)
            if shard.shape[0] != self.rows_on(item, self.rank):
                raise OLMoError(
                    f"matrix {self.shapes[item]} has {shard.shape[0]} rows on rank {self.rank} "
                    f"of {self.size}, Shard(0) gives it {self.rows_on(item, self.rank)}"
                )
            send[offset : offset + shard.numel()].copy_(shard.reshape(-1))
            offset += shard.numel()
        return self._all_to_all(send, to_owners, from_ranks)

    def whole(self, bucket: Bucket, received: torch.Tensor) -> Dict[int, torch.Tensor]:
        """The whole matrices of a bucket that this rank owns, from what it received."""
        pieces: Dict[int, List[torch.Tensor]] = {item: [] for item in bucket[self.rank]}
        offset = 0
        for rank in range(self.size):
            for item in bucket[self.rank]:
                n = self._numel_on(item, rank)
                pieces[item].append(received[offset : offset + n].view(-1, self.shapes[item][1]))
                offset += n
        return {item: torch.cat(rows) for item, rows in pieces.items()}

    def start_scatter(
        self, bucket: Bucket, results: Dict[int, torch.Tensor], like: torch.Tensor
    ) -> _Transfer:
        """Start to move the rows of this rank's results to the ranks that hold them."""
        to_owners, from_ranks = self._splits(bucket)
        send = like.new_empty(sum(from_ranks))
        offset, row = 0, dict.fromkeys(results, 0)
        for rank in range(self.size):
            for item in bucket[self.rank]:
                rows = self.rows_on(item, rank)
                part = results[item][row[item] : row[item] + rows].reshape(-1)
                send[offset : offset + part.numel()].copy_(part)
                row[item] += rows
                offset += part.numel()
        return self._all_to_all(send, from_ranks, to_owners)

    def shards(self, bucket: Bucket, received: torch.Tensor) -> Dict[int, torch.Tensor]:
        """The local rows of all results of a bucket, from what this rank received."""
        out: Dict[int, torch.Tensor] = {}
        offset = 0
        for item in (i for items in bucket for i in items):
            n = self._numel_on(item, self.rank)
            out[item] = received[offset : offset + n].view(-1, self.shapes[item][1])
            offset += n
        return out

    def _all_to_all(
        self, send: torch.Tensor, send_splits: List[int], receive_splits: List[int]
    ) -> _Transfer:
        received = send.new_empty(sum(receive_splits))
        work = dist.all_to_all_single(
            received, send, receive_splits, send_splits, group=self.group, async_op=True
        )
        return _Transfer(work, send, received)
