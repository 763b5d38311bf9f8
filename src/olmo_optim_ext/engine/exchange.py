"""
Whole matrices from sharded ones: who computes which matrix, and what moves the shards to their
owners and the updates back.
"""

from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from olmo_core.exceptions import OLMoError

__all__ = [
    "BUCKET_BYTES",
    "Broadcast",
    "BroadcastExchange",
    "Bucket",
    "Matrix",
    "RowExchange",
    "Transfer",
    "assign_owners",
]

BUCKET_BYTES = 64 * 2**20
"""
How many bytes a rank sends and receives at the most in one exchange, together. Of matrices that are
larger than half of it, each owner has one at a time.
"""


def assign_owners(
    costs: Sequence[float], n_owners: int, fixed: Sequence[Optional[int]] = ()
) -> List[int]:
    """
    Largest-first packing: each item, in order of falling cost, goes to the least loaded owner.
    Ties go to the item and the owner that come first, so all ranks find the same answer.

    :param fixed: The owners of items that have one already, ``None`` for the others.

    :returns: The owner of each item.
    """
    owners: List[Optional[int]] = list(fixed) if fixed else [None] * len(costs)
    load = [0.0] * n_owners
    for cost, owner in zip(costs, owners):
        if owner is not None:
            load[owner] += cost
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        if owners[item] is None:
            owner = min(range(n_owners), key=load.__getitem__)
            owners[item] = owner
            load[owner] += costs[item]
    return [owner for owner in owners if owner is not None]


@dataclass(frozen=True)
class Matrix:
    """A matrix whose rows are shared by the ranks of a group."""

    cols: int
    rows_on: Tuple[int, ...]
    """How many of its rows, from top to bottom, each rank holds."""
    owner: int

    @property
    def numel(self) -> int:
        return sum(self.rows_on) * self.cols


@dataclass
class Transfer:
    """An all-to-all under way."""

    work: Optional[dist.Work]
    sent: Optional[torch.Tensor]
    received: Optional[torch.Tensor]

    def wait(self) -> torch.Tensor:
        """What was received; once, as nothing is held here afterwards."""
        assert self.work is not None and self.received is not None
        self.work.wait()
        received = self.received
        self.work = self.sent = self.received = None  # the work, too, holds both buffers
        return received


Bucket = Tuple[Tuple[int, ...], ...]
"""For each owner the matrices that it computes in one exchange."""


def _fill_buckets(
    n_bytes: Sequence[int], owners: Sequence[int], n_owners: int, bytes_of_owner: int
) -> List[Bucket]:
    """In the order given, each owner's part of a bucket up to a number of bytes."""
    shares: List[List[List[int]]] = [[] for _ in range(n_owners)]
    filled: Dict[int, int] = {}
    for item, (size, owner) in enumerate(zip(n_bytes, owners)):
        if not shares[owner] or filled[owner] + size > bytes_of_owner:
            shares[owner].append([])
            filled[owner] = 0
        shares[owner][-1].append(item)
        filled[owner] += size
    n_buckets = max(map(len, shares), default=0)
    return [
        tuple(tuple(share[b]) if b < len(share) else () for share in shares)
        for b in range(n_buckets)
    ]


def _fill_whole_buckets(
    n_bytes: Sequence[int], owners: Sequence[int], n_owners: int, bucket_bytes: int
) -> List[Bucket]:
    """In the order given, all owners' parts of a bucket together up to a number of bytes."""
    buckets: List[List[List[int]]] = []
    filled = 0
    for item, (size, owner) in enumerate(zip(n_bytes, owners)):
        if not buckets or filled + size > bucket_bytes:
            buckets.append([[] for _ in range(n_owners)])
            filled = 0
        buckets[-1][owner].append(item)
        filled += size
    return [tuple(map(tuple, bucket)) for bucket in buckets]


class RowExchange:
    """
    Moves matrices whose rows are shared by the ranks of a process group to the rank that owns each,
    and the results back.

    On the owner a bucket lies in one buffer, rank by rank, and results replace what was received:
    the same buffer travels back.

    :param matrices: The matrices, in the same order on all ranks.
    :param group: The ranks that share the rows.
    :param itemsize: Bytes of an element on the wire.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        group: dist.ProcessGroup,
        itemsize: int,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self.matrices = list(matrices)
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._known_places: Dict[Tuple[int, ...], Dict[int, List[Tuple[int, int]]]] = {}
        # With even shards, a rank also sends at most what an owner receives.
        n_bytes = [matrix.numel * itemsize for matrix in self.matrices]
        owners = [matrix.owner for matrix in self.matrices]
        self.buckets = _fill_buckets(n_bytes, owners, self.size, bucket_bytes // 2)

    def _numel_on(self, item: int, rank: int) -> int:
        return self.matrices[item].rows_on[rank] * self.matrices[item].cols

    def _splits(self, bucket: Bucket) -> Tuple[List[int], List[int]]:
        # What this rank holds for each owner, and what each rank holds for this owner.
        to_owners = [sum(self._numel_on(i, self.rank) for i in items) for items in bucket]
        from_ranks = [
            sum(self._numel_on(i, rank) for i in bucket[self.rank]) for rank in range(self.size)
        ]
        return to_owners, from_ranks

    def start_gather(
        self, bucket: Bucket, shard_of: Callable[[int], torch.Tensor], like: torch.Tensor
    ) -> Transfer:
        """
        Start to move the shards of a bucket to their owners.

        :param shard_of: The local rows ``(rows_on[rank], cols)`` of matrix ``i``.
        :param like: Gives dtype and device of the buffers.
        """
        to_owners, from_ranks = self._splits(bucket)
        send = like.new_empty(sum(to_owners))
        for item, begin, end in self._in_shards(bucket):
            shard = shard_of(item)
            if shard.shape[0] != self.matrices[item].rows_on[self.rank]:
                raise OLMoError(
                    f"a matrix has {shard.shape[0]} rows on rank {self.rank} of {self.size}, "
                    f"expected are {self.matrices[item].rows_on[self.rank]}"
                )
            send[begin:end].view(shard.shape).copy_(shard)
        return self._all_to_all(send, to_owners, from_ranks)

    def whole(self, bucket: Bucket, item: int, buffer: torch.Tensor) -> torch.Tensor:
        """
        A matrix that this rank owns.

        :param buffer: What was received for the bucket.

        :returns: ``(rows, cols)``, a view of the buffer where the rows lie in it in order.
        """
        if len(bucket[self.rank]) == 1:
            return buffer.view(-1, self.matrices[item].cols)
        return torch.cat(self._rows_in(bucket, item, buffer))

    def replace(
        self, bucket: Bucket, item: int, buffer: torch.Tensor, result: torch.Tensor
    ) -> None:
        """Put the result ``(rows, cols)`` of a matrix where the matrix was."""
        first = 0
        for part in self._rows_in(bucket, item, buffer):
            part.copy_(result[first : first + part.shape[0]])
            first += part.shape[0]

    def _rows_in(self, bucket: Bucket, item: int, buffer: torch.Tensor) -> List[torch.Tensor]:
        """The rows of a matrix in the owner's buffer, those of each rank a view."""
        cols = self.matrices[item].cols
        return [buffer[begin:end].view(-1, cols) for begin, end in self._places(bucket)[item]]

    def _places(self, bucket: Bucket) -> Dict[int, List[Tuple[int, int]]]:
        """For each matrix that this rank owns, where each rank's rows lie in its buffer."""
        mine = bucket[self.rank]
        if mine not in self._known_places:
            places: Dict[int, List[Tuple[int, int]]] = {item: [] for item in mine}
            offset = 0
            for rank in range(self.size):
                for item in mine:
                    n = self._numel_on(item, rank)
                    places[item].append((offset, offset + n))
                    offset += n
            self._known_places[mine] = places
        return self._known_places[mine]

    def start_scatter(self, bucket: Bucket, buffer: torch.Tensor) -> Transfer:
        """Start to move the results in the owners' buffers to the ranks that hold the rows."""
        to_owners, from_ranks = self._splits(bucket)
        return self._all_to_all(buffer, from_ranks, to_owners)

    def shards(self, bucket: Bucket, received: torch.Tensor) -> Dict[int, torch.Tensor]:
        """The local rows of all results of a bucket, views of what this rank received."""
        return {
            item: received[begin:end].view(-1, self.matrices[item].cols)
            for item, begin, end in self._in_shards(bucket)
        }

    def _in_shards(self, bucket: Bucket) -> List[Tuple[int, int, int]]:
        """Each matrix of a bucket, and where this rank's rows of it lie in its own buffer."""
        out, offset = [], 0
        for item in (i for items in bucket for i in items):
            n = self._numel_on(item, self.rank)
            out.append((item, offset, offset + n))
            offset += n
        return out

    def _all_to_all(
        self, send: torch.Tensor, send_splits: List[int], receive_splits: List[int]
    ) -> Transfer:
        received = send.new_empty(sum(receive_splits))
        work = dist.all_to_all_single(
            received, send, receive_splits, send_splits, group=self.group, async_op=True
        )
        return Transfer(work, send, received)


@dataclass
class Broadcast:
    """Broadcasts under way, by all owners of a bucket."""

    works: List[dist.Work]
    buffer: torch.Tensor

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        return self.buffer


class BroadcastExchange:
    """
    Sends the results of each owner to the other ranks of a group, which hold the same parameters.

    :param numels: Elements of each matrix.
    :param owners: The rank in the group that computes each.
    """

    def __init__(
        self,
        numels: Sequence[int],
        owners: Sequence[int],
        group: dist.ProcessGroup,
        itemsize: int,
        bucket_bytes: int = BUCKET_BYTES,
    ):
        self.numels = list(numels)
        self.group = group
        size = dist.get_world_size(group)
        n_bytes = [numel * itemsize for numel in numels]
        self.buckets = _fill_whole_buckets(n_bytes, owners, size, bucket_bytes)

    def results(self, bucket: Bucket, buffer: torch.Tensor) -> Dict[int, torch.Tensor]:
        """Where the result of each matrix of a bucket lies in the buffer, flat views."""
        out, offset = {}, 0
        for item in (i for items in bucket for i in items):
            out[item] = buffer[offset : offset + self.numels[item]]
            offset += self.numels[item]
        return out

    def start(self, bucket: Bucket, buffer: torch.Tensor) -> Broadcast:
        """Start to send what each owner put into its part of the buffer."""
        works, offset = [], 0
        for rank, items in enumerate(bucket):
            n = sum(self.numels[item] for item in items)
            if n:
                source = dist.get_global_rank(self.group, rank)
                part = buffer[offset : offset + n]
                works.append(dist.broadcast(part, source, group=self.group, async_op=True))
            offset += n
        return Broadcast(works, buffer)
